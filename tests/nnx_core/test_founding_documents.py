"""The documents that this package began with (`seeds/`): their examples run as they are written there.

The first generation's document on `nnx_core.legacy`, the page of Module on `nnx_core`, that of the bridge on `bridge`.
Changed is only what JAX or the package is called today: key functions, and where a name is imported from.
"""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bridge
import nnx_core
from nnx_core import legacy
from tests.tolerance import assert_trees_close, assert_trees_equal

# What the document prints, as it stands there.
LINEAR = """\
Linear(
  din=2,
  dout=2,
  w=MutableVariable(
      collection='params',
      value=Array([[0.31696808, 0.55285215],
             [0.31418085, 0.7399571 ]], dtype=float32)
  ),
  b=MutableVariable(
      collection='params',
      value=Array([0., 0.], dtype=float32)
  )
)"""
INTERM = """\
State({
  ('interm',): Variable(
      collection='interm',
      value=Array([[1., 1.],
             [1., 1.]], dtype=float32),
      sharding=None
  )
})"""
SPLIT = """\
State({
  ('b',): Variable(
      collection='params',
      value=Array([0., 0.], dtype=float32),
      sharding=None
  ),
  ('w',): Variable(
      collection='params',
      value=Array([[0.31696808, 0.55285215],
             [0.31418085, 0.7399571 ]], dtype=float32),
      sharding=None
  )
})
ModuleDef(
  type=Linear,
  index=0,
  submodules=(),
  static_fields=(('din', 2), ('dout', 2))
)"""
SELF_REFERENCE = """\
State({
  ('b',): Variable(
      collection='params',
      value=Array([0., 0.], dtype=float32),
      sharding=None
  ),
  ('w',): Variable(
      collection='params',
      value=Array([[0.31696808, 0.55285215],
             [0.31418085, 0.7399571 ]], dtype=float32),
      sharding=None
  ),
  ('x',): Array(1, dtype=int32, weak_type=True)
})
ModuleDef(
  type=SelfReferenceLinear,
  index=0,
  submodules=(('submodule', 0),),
  static_fields=(('din', 2), ('dout', 2))
)"""
FOO = """\
State({
  ('dict', 'a'): Variable(
      collection='params',
      value=Array([[1., 1.],
             [1., 1.]], dtype=float32),
      sharding=None
  ),
  ('dict', 'b', 'bias'): Variable(
      collection='params',
      value=Array([0., 0.], dtype=float32),
      sharding=None
  ),
  ('dict', 'b', 'kernel'): Variable(
      collection='params',
      value=Array([[0.16806164, 1.1717631 ],
             [0.44064113, 0.92326844]], dtype=float32),
      sharding=None
  ),
  ('seq', '0'): Variable(
      collection='params',
      value=Array([[1., 1.],
             [1., 1.]], dtype=float32),
      sharding=None
  ),
  ('seq', '1', 'bias'): Variable(
      collection='params',
      value=Array([0., 0.], dtype=float32),
      sharding=None
  ),
  ('seq', '1', 'kernel'): Variable(
      collection='params',
      value=Array([[-0.35356975,  0.06913038],
             [-1.2359275 ,  0.2171132 ]], dtype=float32),
      sharding=None
  )
})"""


def up_to_numbers(text):
    """`text` with each number of an array as `#`, and without the spaces that give numbers one width."""
    text = re.sub(r"-?\d+\.\d*(e[-+]?\d+)?", "#", text)
    return re.sub(r"(?<=#) +|(?<=\[) +|(?<=, ) +(?=#)", "", text)


def test_the_first_generation():
    nnx = legacy

    class Linear(nnx.Module):
        def __init__(self, din: int, dout: int, *, ctx: nnx.Context):
            self.din = din
            self.dout = dout
            self.w = nnx.param(jax.random.uniform(ctx.make_rng("params"), (din, dout)))
            self.b = nnx.param(jnp.zeros((dout,)))

        def __call__(self, x):
            self.interm = nnx.var("interm", x)
            return x @ self.w + self.b

    ctx = nnx.Context(jax.random.PRNGKey(0))
    linear = Linear(2, 2, ctx=ctx)
    assert up_to_numbers(repr(linear)) == up_to_numbers(LINEAR)
    y = linear(jnp.ones((2, 2)))
    interm = linear.pop("interm")
    assert up_to_numbers(repr(interm)) == up_to_numbers(INTERM)
    assert list(interm) == [("interm",)]
    assert_trees_equal(interm["interm"].value, jnp.ones((2, 2)))
    assert not hasattr(linear, "interm")
    assert_trees_close(y, jnp.ones((2, 2)) @ linear.w.value + linear.b.value)

    state, moduledef = linear.split()
    assert up_to_numbers(f"{state}\n{moduledef}") == up_to_numbers(SPLIT)
    assert list(state) == [("b",), ("w",)]
    assert [variable.collection for variable in state.values()] == ["params", "params"]
    assert [nnx.collection_of(variable) for variable in state.values()] == ["params", "params"]
    assert (moduledef.type, moduledef.index, moduledef.submodules) == (Linear, 0, ())
    assert moduledef.static_fields == (("din", 2), ("dout", 2))


def test_the_first_generation_refers_to_itself():
    nnx = legacy

    class SelfReferenceLinear(nnx.Module):
        def __init__(self, din: int, dout: int, *, ctx: nnx.Context):
            self.din = din
            self.dout = dout
            self.x = jnp.array(1)
            self.w = nnx.param(jax.random.uniform(ctx.make_rng("params"), (din, dout)))
            self.b = nnx.param(jnp.zeros((dout,)))
            self.submodule = self

        def __call__(self, x):
            return x @ self.submodule.w + self.submodule.b

    linear = SelfReferenceLinear(2, 2, ctx=nnx.Context(jax.random.PRNGKey(0)))
    y = linear(jnp.ones((2, 2)))
    state, moduledef = linear.split()
    assert up_to_numbers(f"{state}\n{moduledef}") == up_to_numbers(SELF_REFERENCE)
    assert list(state) == [("b",), ("w",), ("x",)]
    assert_trees_equal(state["x"], jnp.array(1))
    assert moduledef.submodules == (("submodule", 0),)
    assert moduledef.static_fields == (("din", 2), ("dout", 2))
    linear2 = moduledef.merge(state)
    assert linear2.submodule is linear2
    assert_trees_equal(linear2(jnp.ones((2, 2))), y)


def test_the_first_generation_holds_others_by_key_and_by_position():
    nnx, ctx = legacy, legacy.Context(jax.random.PRNGKey(0))

    class Foo(nnx.Module):
        def __init__(self, ctx: nnx.Context):
            self.dict = nnx.Map({
                "a": nnx.param(jnp.ones((2, 2))),
                "b": nnx.Linear(2, 2, ctx=ctx),
                "c": "aaa",
            })  # fmt: skip
            self.seq = nnx.Seq([
                nnx.param(jnp.ones((2, 2))),
                nnx.Linear(2, 2, ctx=ctx),
                "bbb"
            ])  # fmt: skip

    foo = Foo(ctx=ctx)
    state, moduledef = foo.split()
    paths = [("dict", "a"), ("dict", "b", "bias"), ("dict", "b", "kernel")]
    paths += [("seq", 0), ("seq", 1, "bias"), ("seq", 1, "kernel")]
    assert list(state) == paths
    assert up_to_numbers(str(state)) == up_to_numbers(FOO)
    assert state["seq", "0"] is state["seq", 0]
    (first, in_dict), (second, in_seq) = moduledef.submodules
    assert (moduledef.type, moduledef.index, first, second) == (Foo, 0, "dict", "seq")
    assert (in_dict.type, in_dict.index, in_dict.static_fields) == (nnx.Map, 1, (("c", "aaa"),))
    assert (in_seq.type, in_seq.static_fields) == (nnx.Seq, ((2, "bbb"),))


def test_the_tiny_first_generation():
    """Its definitions are those of `legacy`; `KeyArray` is gone from JAX. What follows them is as written."""
    Module, Variable, State, Context = legacy.Module, legacy.Variable, legacy.State, legacy.Context
    random = jax.random

    class Linear(Module):
        def __init__(self, din: int, dout: int, *, ctx: Context):
            self.din = din
            self.dout = dout
            key = ctx.make_rng("params")
            self.w = Variable("params", random.uniform(key, (din, dout)))
            self.b = Variable("params", jnp.zeros((dout,)))
            self.count = Variable("counts", 0)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.count.value += 1
            return x @ self.w.value + self.b.value

    module = Linear(2, 2, ctx=Context(random.PRNGKey(0)))
    y = module(jnp.ones((1, 2)))
    y = module(jnp.ones((1, 2)))

    state, moduledef = module.partition()
    assert {path: variable.collection for path, variable in state.items()} == {
        ("b",): "params",
        ("count",): "counts",
        ("w",): "params",
    }
    assert (moduledef.type, moduledef.index, dict(moduledef.submodules)) == (Linear, 0, {})
    assert dict(moduledef.static_fields) == {"din": 2, "dout": 2}

    params = state.filter("params")
    counts = state.filter("counts")
    assert (list(params), list(counts)) == ([("b",), ("w",)], [("count",)])
    assert counts["count"].value == 2

    again, (state, moduledef) = moduledef.apply(State(**params, **counts))(jnp.ones((1, 2)))
    assert_trees_equal(again, y)

    module = moduledef.merge(state)
    assert module.count.value == 3


def test_states_by_keywords():
    model = legacy.Map(a=legacy.param(1.0), layers=legacy.Seq([legacy.var("cache", 2.0)]))
    state, moduledef = model.split()
    params, rest = state.filter("params", ...)
    assert legacy.State(**params, **rest) == state == legacy.State(**{"a": state["a"], "layers/0": state["layers", 0]})
    assert list(state.keys()) == list(state) == [("a",), ("layers", 0)]
    assert sorted(state.keys(), reverse=True)[0][0] == "layers"
    assert ("layers", 0) in state.keys()  # noqa: SIM118  # the view itself is asked
    assert dict(state)["layers", 0] is state["layers", 0]
    assert pickle.loads(pickle.dumps(list(state.keys()))) == list(state)
    assert moduledef.merge(legacy.State(**params, **rest))["layers"][0].value == 2.0
    with pytest.raises(TypeError, match="multiple values"):
        legacy.State(**params, **params)


def test_the_page_of_module():
    nnx = nnx_core
    bias = jax.random.normal(jax.random.key(0), (4,))
    state = nnx.State({"bias": bias})  # in reality load it from a checkpoint
    linear = nnx.Linear.partial_init(state)(2, 4, rngs=nnx.Rngs(1))
    y = linear(jnp.ones((1, 2)))
    assert jnp.allclose(linear.bias, bias)
    assert y.shape == (1, 4)
    assert_trees_equal(linear.kernel[...], nnx.Linear(2, 4, rngs=nnx.Rngs(1)).kernel[...])

    class Block(nnx.Module):
        def __init__(self, din, dout, *, rngs: nnx.Rngs):
            self.linear = nnx.Linear(din, dout, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=False)
            self.batch_norm = nnx.BatchNorm(10, use_running_average=False, rngs=rngs)

    block = Block(2, 5, rngs=nnx.Rngs(0))
    assert (block.dropout.deterministic, block.batch_norm.use_running_average) == (False, False)
    block.set_attributes(deterministic=True, use_running_average=True)
    assert (block.dropout.deterministic, block.batch_norm.use_running_average) == (True, True)
    block = Block(2, 5, rngs=nnx.Rngs(0))
    # The page's example names an attribute that no Dropout has, which by the page's own text is a ValueError, and in
    # flax.nnx to this day: nothing is changed by it.
    with pytest.raises(ValueError, match=r"attributes: \['use_running_average'\]"):
        block.set_attributes(nnx.Dropout, deterministic=True, use_running_average=True)
    assert (block.dropout.deterministic, block.batch_norm.use_running_average) == (False, False)
    block.set_attributes(nnx.Dropout, deterministic=True, use_running_average=True, raise_if_not_found=False)
    # Only the dropout will be modified
    assert (block.dropout.deterministic, block.batch_norm.use_running_average) == (True, False)


def test_the_page_of_the_bridge():
    nnx = nnx_core
    linen_module = nn.Dense(features=64)
    x = jax.numpy.ones((1, 32))
    # Like Linen init(), initialize with a sample input
    model = bridge.ToNNX(linen_module, rngs=nnx.Rngs(0)).lazy_init(x)
    # Like Linen apply(), but using NNX's direct call method
    y = model(x)
    assert model.kernel.shape == (32, 64)
    assert_trees_close(y, x @ model.kernel[...] + model.bias[...])

    model = bridge.ToLinen(nnx.Linear, args=(32, 64))
    y, variables = model.init_with_output(jax.random.key(0), x)
    assert y.shape == (1, 64)
    assert variables["params"]["kernel"].shape == (32, 64)
    assert_trees_close(model.apply(variables, x), y)
    assert isinstance(bridge.to_linen(nnx.Linear, 32, 64), nn.Module)

    class Names:
        params = {nn.PARTITION_NAME: "layer"} if hasattr(nn, "PARTITION_NAME") else {"partition_name": "layer"}

    box = bridge.NNXMeta(nnx.Param, np.ones((2, 3)), {"out_sharding": ("in", "out")})
    for index in (0, 1, 2, -1):
        assert box.add_axis(index, Names.params).remove_axis(index, Names.params) == box
    assert_trees_equal(box.replace_boxed(np.zeros(2)).unbox(), np.zeros(2))
    assert isinstance(box.to_nnx_variable(), nnx.Param)
