"""transform_metadata wherever it stands, other metadata keys, overridden hooks: axis names as flax.nnx has them."""

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core._errors import MetadataError
from tests.support.arrays import keys
from tests.tolerance import assert_trees_close

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")
KEYS = keys(0, 1, 2, 3)


def names_of(variable):
    return tuple(variable.get_metadata().get("out_sharding"))


def make(n):
    init = n.with_partitioning(n.initializers.ones, ("a", "b"), eager_sharding=False)
    return lambda key: n.Linear(2, 3, kernel_init=init, rngs=n.Rngs(key))


# ---- where it stands ---------------------------------------------------------------------------------------------

AXES = ({}, {"out_axes": 1}, {"in_axes": None})
PLACES = {
    "alone": lambda n, f, kw: n.transform_metadata(f, partition="layers", **kw)(KEYS[0]),
    "under jax.vmap": lambda n, f, kw: jax.vmap(
        n.transform_metadata(f, partition="layers", **kw), out_axes=kw.get("out_axes", 0)
    )(KEYS),
    "around jax.vmap": lambda n, f, kw: n.transform_metadata(
        jax.vmap(f, out_axes=kw.get("out_axes", 0)), partition="layers", **kw
    )(KEYS),
    "under vmap": lambda n, f, kw: n.vmap(
        n.transform_metadata(f, partition="layers", **kw), out_axes=kw.get("out_axes", 0)
    )(KEYS),
    "around vmap": lambda n, f, kw: n.transform_metadata(
        n.vmap(f, out_axes=kw.get("out_axes", 0)), partition="layers", **kw
    )(KEYS),
    "under jit": lambda n, f, kw: n.jit(n.transform_metadata(f, partition="layers", **kw))(KEYS[0]),
    "no name": lambda n, f, kw: n.transform_metadata(f, partition=None, **kw)(KEYS[0]),
}


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_names_of_what_is_made_as_flax_nnx(place, axes):
    ours, theirs = (place(n, make(n), axes).kernel for n in (nnx, flax_nnx))
    assert names_of(ours) == names_of(theirs)
    assert ours.shape == theirs.shape


USES = {
    "alone": lambda n, f: n.transform_metadata(f, partition="layers"),
    "axes of both": lambda n, f: n.transform_metadata(f, in_axes=(0, None), partition="layers"),
    "not mapped": lambda n, f: n.transform_metadata(f, in_axes=(None, 0), partition="layers"),
    "under jax.vmap": lambda n, f: jax.vmap(n.transform_metadata(f, partition="layers"), in_axes=(0, None)),
    "under vmap": lambda n, f: n.vmap(n.transform_metadata(f, partition="layers"), in_axes=(0, None)),
}


@pytest.mark.parametrize(("use", "writes"), [(use, name != "under jax.vmap") for name, use in USES.items()], ids=USES)
def test_names_of_what_is_used_as_flax_nnx(use, writes):
    def story(n):
        stack = n.vmap(n.transform_metadata(make(n), partition="layers"))(KEYS)
        inside = []

        def double(m, x):
            inside.append(names_of(m.kernel))
            if writes:  # under plain JAX a write is lost, and says so
                m.kernel[...] = 2 * m.kernel[...]
            return x * m.kernel.sum()

        y = use(n, double)(stack, 2.0)
        return y, [*inside[-1:], names_of(stack.kernel)], stack.kernel[...]

    (y, names, kernel), (their_y, their_names, their_kernel) = story(nnx), story(flax_nnx)
    assert names == their_names
    assert_trees_close((y, kernel), (their_y, their_kernel))


def test_negative_axes_count_from_the_end():
    seen = []

    def look(v):
        seen.append(names_of(v))

    stacked = nnx.Param(jnp.ones((2, 4)), out_sharding=("a", "l"))
    nnx.transform_metadata(look, in_axes=-1, partition="l")(stacked)
    jax.vmap(nnx.transform_metadata(look, in_axes=-1, partition="l"), in_axes=1)(stacked)
    assert seen == [("a",), ("a",)]
    made = nnx.transform_metadata(lambda: nnx.Param(jnp.ones(2), out_sharding=("a",)), out_axes=-1, partition="l")()
    assert names_of(made) == ("a", "l")


def test_a_method_and_what_it_adds():
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 2)), out_sharding=("l", "a"))

        @nnx.transform_metadata(partition="l")
        def grow(self):
            self.names = names_of(self.w)
            self.new = nnx.Param(jnp.ones(2), out_sharding=("z",))

    layer = Layer()
    layer.grow()
    assert (layer.names, names_of(layer.w), names_of(layer.new)) == (("a",), ("l", "a"), ("l", "z"))


def test_another_name_raises():
    for n in (nnx, flax_nnx):
        v = n.Param(jnp.ones((4, 2)), out_sharding=("l", "a"), eager_sharding=False)
        with pytest.raises(ValueError, match=r"'l', 'a'\).*(other|found 'l')"):
            n.transform_metadata(lambda v: None, partition="other")(v)
    with pytest.raises(MetadataError, match=r"Axis 0 of a Param with axis names \('l', 'a'\).*'other', found 'l'"):
        nnx.transform_metadata(lambda v: None, partition="other")(v := nnx.Param(1.0, out_sharding=("l", "a")))


# ---- other keys --------------------------------------------------------------------------------------------------

METADATA = {nnx.PARTITION_NAME: "l", "labels": "L"}
LABELS = ({}, {"labels": ("x",)}, {"labels": ("L", "x")}, {"labels": "x"}, {"labels": 3}, {"labels": ()})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_other_keys_get_the_axis_too_as_flax_nnx(labels, axis):
    def story(n):
        def one(key):
            return n.Param(jnp.ones(2), out_sharding=("a",), eager_sharding=False, **labels)

        made = n.vmap(one, out_axes=axis, transform_metadata=METADATA)(KEYS)
        inside = []
        n.vmap(lambda v: inside.append(v.get_metadata().get("labels")), in_axes=axis, transform_metadata=METADATA)(made)
        return names_of(made), made.get_metadata().get("labels"), inside[-1]

    assert story(nnx) == story(flax_nnx)


def test_another_name_under_another_key_raises():
    for n in (nnx, flax_nnx):
        v = n.Param(jnp.ones((4, 2)), labels=("x", "y"))
        with pytest.raises(ValueError, match=r"(?s)\('x', 'y'\).*'?(L|x)'"):
            n.vmap(lambda v: None, transform_metadata=METADATA)(v)
    with pytest.raises(MetadataError, match=r"Axis 0 of a Param with labels \('x', 'y'\) is mapped under the name 'L'"):
        nnx.vmap(lambda v: None, transform_metadata=METADATA)(nnx.Param(jnp.ones((4, 2)), labels=("x", "y")))


# ---- overridden hooks --------------------------------------------------------------------------------------------

MAPS = {
    "vmap": lambda n, f: n.vmap(f, transform_metadata={n.PARTITION_NAME: "l"})(KEYS),
    "scan": lambda n, f: n.scan(
        lambda c, k: (c, f(k)), transform_metadata={n.PARTITION_NAME: "l"}, in_axes=(n.Carry, 0), out_axes=(n.Carry, 0)
    )(0.0, KEYS)[1],
    "transform_metadata": lambda n, f: n.transform_metadata(f, partition="l")(KEYS[0]),
}


@pytest.mark.parametrize("mapped", MAPS.values(), ids=MAPS)
def test_an_overridden_add_axis_is_called_without_metadata_as_flax_nnx(mapped):
    def calls(n):
        log = []

        class Own(n.Param):
            def add_axis(self, index, name):
                log.append(("add", index, name))

            def remove_axis(self, index, name):
                log.append(("remove", index, name))

        mapped(n, lambda key: Own(jnp.ones(2)))
        made = list(log)
        n.transform_metadata(lambda v: v.sum(), partition="l")(Own(jnp.ones((4, 2))))
        return made, log[len(made) :][:1]

    assert calls(nnx) == calls(flax_nnx)
