"""Reprs: sizes by kind, each Variable once; large models elided; no state of a model makes them fail."""

import functools

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from nnx_core._repr import MAX_ITEMS, show_value, sizes_by_kind


def first_line(x):
    return repr(x).splitlines()[0]


class Model(nnx.Module):
    """Everything a repr meets: sharing, a cycle, plain containers, arrays, functions, random streams."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.tied = self.linear
        self.weight = self.linear.kernel
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = {"a": [nnx.Linear(3, 3, use_bias=False, rngs=rngs)]}
        self.table = jnp.ones(20)
        self.f = nnx.relu


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda nnx: nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        lambda nnx: nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
        lambda nnx: nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        lambda nnx: nnx.Linear(3000, 30, rngs=nnx.Rngs(0)),
        lambda nnx: nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(1))),
    ],
    ids=["linear", "batchnorm", "dropout", "large", "sequential"],
)
def test_first_line_says_what_flax_says(make):
    def counts(text):
        kind, _, note = text.partition(" # ")
        return kind, sorted(note.split("), "))  # kinds come as they are reached: here in attribute order

    assert counts(first_line(make(nnx))) == counts(first_line(make(flax.nnx)))


def test_shared_variables_count_once_and_shared_modules_show_once():
    text = repr(Model(nnx.Rngs(0)))
    assert text.splitlines()[0] == (
        "Model( # Param: 24 (96 B), BatchStat: 6 (24 B), RngState: 2 (12 B), Total: 32 (132 B)"
    )
    assert "\n  linear=Linear( # Param: 9 (36 B)\n    kernel=Param(float32[2,3] [[" in text
    assert "\n  tied=Linear(...),\n  weight=Param(...),\n" in text
    assert "\n  blocks={ # Param: 9 (36 B)\n    'a': [ # Param: 9 (36 B)\n      Linear( # Param: 9 (36 B)\n" in text
    assert "\n  table=float32[20],\n  f=<function relu>\n)" in text
    assert text == repr(Model(nnx.Rngs(0)))  # no addresses


def test_states_have_sizes_too():
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert str(state) == repr(state)
    assert first_line(state) == "State({ # Param: 24 (96 B)"
    assert "\n  'linear': { # Param: 9 (36 B)\n    'bias': Param(float32[3] [0., 0., 0.]),\n" in repr(state)
    assert repr(nnx.State({"a": 1, "b": {"c": 2}})) == "State({'a': 1, 'b': {'c': 2}})"
    assert first_line(nnx.to_flat_state(state)) == "FlatState{ # Param: 24 (96 B)"


def test_graphdef_says_what_it_is_of():
    assert repr(nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == "GraphDef(Linear, 1 objects, 2 variables)"


def test_optimizer_shows_its_state_as_a_tree():
    optimizer = nnx.Optimizer(nnx.Linear(20, 3, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    text = repr(optimizer)
    assert "ScaleByAdamState( # " in text
    assert "\n      mu={ # OptVariable: 63 (252 B)\n" in text
    assert sizes_by_kind([optimizer])["OptVariable"].size == 126


# ---- large models ------------------------------------------------------------------------------------------


def test_layers_that_look_the_same_are_shown_once():
    class Deep(nnx.Module):
        def __init__(self):
            self.layers = [nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(i)) for i in range(50)]
            self.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    model = Deep()
    text = repr(model)
    assert text.splitlines()[0] == "Deep( # Param: 3,236 (12.9 KB)"
    assert text.count("Linear(") == 2
    assert "    )\n    # and 49 more like this\n  ],\n  head=Linear(" in text
    assert repr(nnx.state(model.layers)).splitlines()[1:] == [
        *("  0: {'kernel': Param(float32[8,8])}", "  # and 49 more like this", "})")
    ]
    model.layers[30] = nnx.Linear(8, 9, rngs=nnx.Rngs(0))
    assert [line.strip() for line in repr(model).splitlines() if "more like" in line] == [
        *("# and 29 more like this", "# and 18 more like this")
    ]


def test_long_containers_and_texts_are_cut():
    state = nnx.State({f"p{i}": nnx.Param(jnp.ones(())) for i in range(1000)})
    assert len(repr(state).splitlines()) == MAX_ITEMS + 3
    assert "\n  # and 900 more\n" in repr(state)
    assert show_value("x" * 5000).endswith("... (5,002 characters)")
    assert show_value([jnp.ones(3), jnp.ones(7)]) == "[float32[3] [1., 1., 1.], float32[7]]"


# ---- nothing makes it fail ---------------------------------------------------------------------------------


class Ring(nnx.Module):
    def __init__(self):
        self.me = self
        self.ring = [self, {"again": self}]
        self.call = functools.partial(self.step)
        self.p = nnx.Param(jnp.ones(2))

    def step(self):
        return self.p


def test_cycles_end():
    text = repr(Ring())
    assert text.splitlines()[0] == "Ring( # Param: 2 (8 B)"
    assert text.count("float32[2]") == 1
    assert len(text) < 600
    loop = [1]
    loop.append(loop)
    assert show_value(loop) == "[1, [...]]"


def test_abstract_traced_and_donated_arrays():
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert first_line(abstract) == "Linear( # Param: 9 (36 B)"
    traced = []
    nnx.jit(lambda m: traced.append(repr(m)))(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert traced == [repr(abstract)]
    donated = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    donated.kernel[...].delete()
    assert "kernel=Param(float32[2,3] deleted),\n  bias=Param(float32[3] [0., 0., 0.])" in repr(donated)
    assert "Ref float32[2]" in repr(nnx.Param(jnp.ones(2), ref=True))
    assert repr(nnx.RngKey(jax.random.key(0))) == "RngKey(key<fry>[])"


def test_half_initialised_objects():
    seen = []

    class Half(nnx.Module):
        def __init__(self):
            self.a = 1
            seen.append(repr(self))
            self.p = object.__new__(nnx.Param)
            self.l, self.d = nnx.List.__new__(nnx.List), nnx.Dict.__new__(nnx.Dict)

    assert repr(Half()) == "Half(a=1, p=Param(MISSING), l=List[], d=Dict{})"
    assert seen == ["Half(a=1)"]
    assert repr(object.__new__(nnx.Param)) == "Param(MISSING)"
    assert repr(nnx.List.__new__(nnx.List)) == "List[]"


def test_attributes_whose_repr_raises():
    class Broken:
        def __repr__(self):
            raise OSError("no")

    class Holds(nnx.Module):
        def __init__(self):
            self.x = nnx.static(Broken())
            self.y = (Broken(), jnp.ones(9))

    text = repr(Holds())
    assert "x=<Broken whose repr raised OSError>" in text
    assert "<Broken whose repr raised OSError>, float32[9]" in text


def test_values_read_well():
    assert show_value(jnp.bfloat16) == "bfloat16"
    assert show_value(np.float32) == "float32"
    assert show_value(np.dtype("int8")) == "int8"
    assert show_value((jnp.ones(9),)) == "(float32[9],)"
    assert show_value({"a": 1}) == "{'a': 1}"
    assert show_value(optax.EmptyState()) == "EmptyState()"
    assert show_value(functools.partial(int, base=2)) == repr(functools.partial(int, base=2))
