"""nnx_core.inspect.diff: empty iff two graphs agree in everything; else path, kind, and how much."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import nnx_core as nnx
from nnx_core.inspect import Diff, Difference, ToleranceError, diff


def told(differences):
    return [(x.path, x.kind, x.told) for x in differences]


class Model(nnx.Module):
    def __init__(self, rngs, **options):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.tied = self.linear
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = [nnx.Linear(3, 3, rngs=rngs), {"x": nnx.Param(jnp.ones(2))}]
        self.table = jnp.arange(4.0)
        self.me = self
        self.start = functools.partial(jnp.full, fill_value=float("nan"))
        self.nan = float("nan")
        for name, value in options.items():
            setattr(self, name, value)


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


# ---- equal -------------------------------------------------------------------------------------------------


def test_a_clone_differs_in_nothing(model):
    found = diff(model, nnx.clone(model))
    assert not found
    assert (len(found), list(found)) == (0, [])
    assert found.compared > 20
    assert str(found) == f"No differences in {found.compared} values."
    assert not diff(model, Model(nnx.Rngs(0)))
    assert not diff(nnx.split(model)[1], nnx.split(nnx.clone(model))[1])


def test_nothing_is_changed(model):
    before = nnx.clone(model)
    diff(model, nnx.clone(model))
    assert nnx.graphdef(model) == nnx.graphdef(before)
    assert int(model.dropout.rngs.count[...]) == int(before.dropout.rngs.count[...])


def test_states_dicts_and_models_compare_with_each_other(model):
    state = nnx.state(model)
    assert not diff(model, state)
    assert not diff(state, nnx.to_pure_dict(state))
    assert not diff(nnx.to_pure_dict(state), model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params["bn"]["scale"] = params["bn"]["scale"] + 1
    del params["linear"]["bias"]
    assert told(diff(nnx.state(model, nnx.Param), params)) == [
        (("bn", "scale"), "value", "3 of 3 differ, by at most 1"),
        (("linear", "bias"), "only in a", "Param(float32[3])"),
    ]


# ---- values ------------------------------------------------------------------------------------------------


def test_values_say_how_many_and_how_much():
    a, b = jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[0, 1].set(0.5).at[1, 1].set(-2.0)
    [found] = diff({"x": a}, {"x": b})
    assert found == Difference(("x",), "value", "[[0., 0., 0.], [0., 0., 0.]]", found.b, max_abs=2.0, count=2, size=6)
    assert str(found) == "x: value: 2 of 6 differ, by at most 2"
    assert told(diff(jnp.float32(1), jnp.float32(3))) == [((), "value", "1 of 1 differ, by at most 2: 1. -> 3.")]


@pytest.mark.parametrize(
    ("a", "b", "options", "count", "most"),
    [
        ([1.0, np.nan, np.inf, -0.0], [1.0, np.nan, np.inf, 0.0], {}, 0, None),
        ([np.nan, 1.0], [1.0, 1.0], {}, 1, np.inf),
        ([np.nan, 1.0], [1.0, 1.0], {"atol": 1e9, "rtol": 1e9}, 1, np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], {"atol": 1e9}, 1, np.inf),
        ([1.0, 2.0], [1.25, 2.0], {}, 1, 0.25),
        ([1.0, 2.0], [1.25, 2.0], {"atol": 0.25}, 0, None),
        ([1.0, 2.0], [1.25, 2.0], {"rtol": 0.2}, 0, None),
        ([1.0, 2.0], [1.25, 2.0], {"rtol": 0.1, "atol": 0.1}, 1, 0.25),
        (np.array([2**53]), np.array([2**53 + 1]), {}, 1, 0.0),  # float64 does not tell them apart
        (np.array([2**62 + 1]), np.array([2**62 + 1]), {}, 0, None),
        (np.array([True, False]), np.array([True, True]), {}, 1, 1.0),
        (np.array([1 + 1j]), np.array([1 - 1j]), {}, 1, 2.0),
        (np.array([1.0], jnp.bfloat16), np.array([1.5], jnp.bfloat16), {}, 1, 0.5),
        (np.array([3], np.uint8), np.array([5], np.uint8), {}, 1, 2.0),
        (np.array(["a", "b"]), np.array(["a", "c"]), {}, 1, np.inf),
        (np.zeros((0, 3)), np.zeros((0, 3)), {}, 0, None),
    ],
)
def test_tolerances(a, b, options, count, most):
    found = diff(np.asarray(a), np.asarray(b), **options)
    assert [(x.count, x.max_abs) for x in found] == ([(count, most)] if count else [])


def test_python_numbers_that_are_data_have_tolerances_too():
    a, b = nnx.State({"x": nnx.Param(1.0), "n": 1}), nnx.State({"x": nnx.Param(1.25), "n": 1})
    assert told(diff(a, b)) == [(("x",), "value", "1 of 1 differ, by at most 0.25: 1. -> 1.25")]
    assert not diff(a, b, atol=0.25)
    assert told(diff({"x": 1}, {"x": 1.0})) == [(("x",), "value", "1 -> 1.0")]


def test_shapes_and_dtypes():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 2), jnp.bfloat16)
    assert told(diff(a, b)) == [((), "shape", "[2,3] -> [3,2]"), ((), "dtype", "float32 -> bfloat16")]
    assert told(diff(jnp.array([1.0, 1.001]), jnp.array([1.0, 1.0], jnp.bfloat16))) == [
        ((), "dtype", "float32 -> bfloat16"),
        ((), "value", "1 of 2 differ, by at most 0.001"),
    ]


def test_rng_keys():
    a, b = jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.key(0), 3).at[1].set(jax.random.key(9))
    assert not diff(a, jnp.array(a))
    assert told(diff(a, b, atol=1e9)) == [((), "value", "1 of 3 differ")]
    assert told(diff(jax.random.key(0), jax.random.key(0, impl="rbg"))) == [((), "dtype", "key<fry> -> key<rbg>")]
    assert told(diff(jax.random.key(0), jnp.zeros(()))) == [((), "dtype", "key<fry> -> float32")]
    other = nnx.clone(streams := nnx.Rngs(0, dropout=1))
    other.dropout()
    assert told(diff(streams, other)) == [(("dropout", "count"), "value", "1 of 1 differ, by at most 1: 0 -> 1")]


def test_values_that_are_not_there():
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    real = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert not diff(abstract, real)  # shapes and dtypes are all that one of them has
    assert told(diff(abstract, nnx.Linear(2, 3, param_dtype=jnp.float16, rngs=nnx.Rngs(0))))[0][1] == "dtype"
    real.kernel[...].delete()
    other = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert told(diff(real, other)) == [(("kernel",), "value", "deleted -> readable")]
    assert diff(real, real)  # unknown is not equal


def test_refs_compare_by_what_they_hold():
    a, b = (nnx.Param(jnp.full(2, x), ref=True) for x in (1.0, 2.0))
    assert told(diff(a, b)) == [((), "value", "2 of 2 differ, by at most 1")]
    assert not diff(a, nnx.Param(jnp.full(2, 1.0)))


# ---- structure ---------------------------------------------------------------------------------------------


def test_paths_of_one_side(model):
    other = nnx.clone(model)
    del other.blocks[1]
    other.extra = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    other.note = "new"
    assert told(diff(model, other)) == [
        (("blocks", 1, "x"), "only in a", "Param(float32[2])"),
        (("extra", "kernel"), "only in b", "Param(float32[1,1])"),
        (("note",), "only in b", "'new'"),
    ]
    assert [x.kind for x in diff(other, model)] == ["only in b", "only in a", "only in a"]


def test_types_metadata_and_static_attributes(model):
    other = nnx.clone(model)
    other.linear.kernel = nnx.Cache(model.linear.kernel[...], tag="x")
    other.linear.out_features = 4
    other.bn = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    other.start = functools.partial(jnp.full, fill_value=0.0)
    found = diff(model, other)
    assert (("bn",), "type", "BatchNorm -> Linear") in told(found)
    assert told(found.of_kind("type"))[1:] == [(("linear", "kernel"), "type", "Param -> Cache")]
    assert told(found.of_kind("metadata")) == [(("linear", "kernel", "tag"), "metadata", "none -> 'x'")]
    static = {x.path: x.told for x in found.of_kind("static")}
    assert static.pop(("start",)).endswith("fill_value=0.0)")
    assert static == {("linear", "out_features"): "3 -> 4"}
    with pytest.raises(ValueError, match=r"Diff\.of_kind: expected kinds among .*'sharing'.*found \['values'\]"):
        found.of_kind("values")


def test_static_attributes_tell_1_from_true():
    a, b = (Model(nnx.Rngs(0), flag=flag, dims=dims) for flag, dims in ((1, (1, 2)), (True, (1, 3))))
    assert told(diff(a, b)) == [(("dims", 1), "static", "2 -> 3"), (("flag",), "static", "1 -> True")]


def test_containers_of_another_type_are_entered():
    a, b = {"x": [jnp.ones(2), 1]}, {"x": (jnp.ones(2), 2)}
    assert told(diff(a, b)) == [
        (("x",), "type", "list -> tuple"),
        (("x", 1), "value", "1 of 1 differ, by at most 1: 1 -> 2"),
    ]
    assert told(diff({"x": jnp.ones(2)}, {"x": {"y": 1}})) == [(("x",), "type", "float32[2] -> dict")]
    assert told(diff({"x": jnp.ones(2)}, {"x": None})) == [(("x",), "type", "float32[2] -> None")]


def test_sharing(model):
    other = nnx.clone(model)
    other.tied = nnx.clone(other.linear)
    assert told(diff(model, other)) == [(("tied",), "sharing", "shared with linear -> its own")]
    other.tied.bias[0] = 1.0  # what is no longer shared is compared
    assert told(diff(model, other)) == [
        (("tied",), "sharing", "shared with linear -> its own"),
        (("tied", "bias"), "value", "1 of 3 differ, by at most 1"),
    ]
    v, w = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))
    assert told(diff([v, w, v], [v, w, w])) == [((2,), "sharing", "shared with [0] -> shared with [1]")]


def test_cycles_of_different_length_end():
    class Node(nnx.Module):
        def __init__(self, value):
            self.value = nnx.Param(jnp.float32(value))
            self.next = self

    one, two = Node(1), Node(1)
    two.next = Node(1)
    two.next.next = two
    assert [x.kind for x in diff(one, two)] == ["sharing"] * len(diff(one, two))
    assert diff(one, two)
    assert not diff(two, nnx.clone(two))


def test_attributes_whose_comparison_raises():
    class Odd:
        def __eq__(self, other):
            raise RuntimeError("no")

        __hash__ = object.__hash__

        def __repr__(self):
            return "Odd"

    same = Odd()
    assert not diff(Model(nnx.Rngs(0), odd=same), Model(nnx.Rngs(0), odd=same))
    assert told(diff(Model(nnx.Rngs(0), odd=same), Model(nnx.Rngs(0), odd=Odd()))) == [
        (("odd",), "static", "Odd -> Odd")
    ]


# ---- reading it --------------------------------------------------------------------------------------------


def test_text_is_aligned_and_rich_draws_a_table():
    found = diff({"a": {"b": 1, "[red]": 1}}, {"a": {"b": 2, "[red]": 3}})
    assert isinstance(found, Diff)
    assert str(found) == (
        "2 differences in 2 values:\n"
        "  a['[red]']  value  1 of 1 differ, by at most 2: 1 -> 3\n"
        "  a.b         value  1 of 1 differ, by at most 1: 1 -> 2"
    )
    assert found[0].path == ("a", "[red]")
    assert found[:1] == (found[0],)
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(found, diff(1, 1))
    text = console.file.getvalue()
    assert "2 differences in 2 values" in text
    assert "a['[red]']" in text
    assert "No differences in 1 values." in text


@pytest.mark.parametrize("options", [{"atol": -1}, {"rtol": float("nan")}, {"atol": "1"}])
def test_tolerances_must_be_numbers(options):
    [(name, value)] = options.items()
    with pytest.raises(ToleranceError, match=rf"diff: expected {name} to be a number >= 0, found {value!r}"):
        diff(1, 1, **options)
