"""Configuration of any kind: equality decides, a hash is used where there is one, a change in place is seen."""

import copy
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core._statics import Fixed, fixed, unfixed
from tests.support.arrays import ones
from tests.tolerance import assert_trees_equal


@dataclasses.dataclass
class Config:
    """As most public models have it: mutable, compared by content, without a hash."""

    width: int = 2
    names: dict = dataclasses.field(default_factory=dict)


class Doubtful:
    """`==` answers with an array."""

    __hash__ = None

    def __init__(self, width=2):
        self.width = width

    def __eq__(self, other):
        return np.array([True, False])


class Refusing(Doubtful):
    """`==` raises."""

    def __eq__(self, other):
        raise RuntimeError("no comparison")


class Locked:
    """Cannot be copied."""

    __hash__ = None

    def __init__(self, width=2):
        self.width, self.lock = width, threading.Lock()

    def __eq__(self, other):
        return self.width == other.width


KINDS = [Config, Doubtful, Refusing, Locked]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def model(lib, config):
    class Model(lib.Module):
        def __init__(self):
            self.config = config
            self.weight = lib.Param(ones(3))

        def __call__(self, x):
            return self.weight[...] * x * self.config.width

    return Model()


def counted(f):
    """f under nnx.jit, and the list that grows at each trace."""
    traces = []

    def traced(*args):
        traces.append(None)
        return f(*args)

    return nnx.jit(traced), traces


@kinds
def test_a_module_with_it_runs_everywhere(kind):
    m = model(nnx, kind())
    expected = ones(3) * 2
    f, traces = counted(lambda m, x: m(x))
    for _ in range(3):
        assert_trees_equal(f(m, 1.0), expected)
    assert len(traces) == 1
    assert nnx.eval_shape(lambda m: m(1.0), m).shape == (3,)
    assert_trees_equal(jax.jit(lambda m: m(1.0))(m), expected)
    assert_trees_equal(nnx.remat(lambda m: m(1.0))(m), expected)
    assert_trees_equal(nnx.clone(m)(1.0), expected)
    assert nnx.merge(*nnx.split(m)).config is m.config
    assert jax.tree.structure(m) == jax.tree.structure(m)
    assert_trees_equal(nnx.grad(lambda m: m(1.0).sum())(m)["weight"][...], expected)


@kinds
def test_it_may_be_an_argument_of_any_transform(kind):
    config, x = kind(), ones(3)
    assert float(nnx.jit(lambda c, x: x.sum() * c.width)(config, x)) == 6
    assert float(nnx.grad(lambda c, x: x.sum() * c.width, argnums=1)(config, x)[0]) == 2
    assert_trees_equal(nnx.vmap(lambda c, x: x * c.width, in_axes=(None, 0))(config, x), x * 2)
    step = nnx.scan(lambda h, c, x: (h, x * c.width), in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
    assert_trees_equal(step(0.0, config, x)[1], x * 2)
    assert float(nnx.cond(True, lambda c, x: x[0] * c.width, lambda c, x: x[0], config, x)) == 2
    assert float(nnx.jit(lambda c, x: x[0] * c.width, static_argnums=0)(config, x)) == 2


def test_flax_runs_the_same_program():
    outputs = [lib.jit(lambda m, x: m(x))(model(lib, Config()), 1.0) for lib in (nnx, flax_nnx)]
    assert_trees_equal(*outputs)


def test_equal_configurations_share_one_compiled_function():
    f, traces = counted(lambda m, x: m(x))
    m = model(nnx, Config())
    f(m, 1.0)
    m.config = Config()
    f(m, 1.0)
    assert len(traces) == 1
    m.config = Config(5)
    assert_trees_equal(f(m, 1.0), ones(3) * 5)
    assert len(traces) == 2


def test_a_change_in_place_is_seen():
    f, traces = counted(lambda m, x: m(x))
    m = model(nnx, Config())
    f(m, 1.0)
    m.config.width = 7
    assert_trees_equal(f(m, 1.0), ones(3) * 7)
    m.config.names["deep"] = [1]
    f(m, 1.0)
    assert len(traces) == 3
    m.config.width = 2
    m.config.names.clear()
    assert_trees_equal(f(m, 1.0), ones(3) * 2)
    assert len(traces) == 3  # as it was at first


@pytest.mark.parametrize(
    "make",
    [lambda: np.ones(2), lambda: ones(2), lambda: [np.ones(2)], lambda: model(nnx, Config()), lambda: nnx.Param(1)],
)
def test_a_static_argument_that_holds_data_is_refused(make):
    with pytest.raises(ValueError, match=r"args\[0\], a static argument, is or holds arrays.*not static"):
        nnx.jit(lambda c, x: x, static_argnums=0)(make(), 1.0)


def test_abstract_arrays_are_configuration():
    form = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for lib in (nnx, flax_nnx):
        made = lib.jit(lambda form, x: jnp.full(form.shape, x), static_argnums=0)(form, 1.0)
        assert_trees_equal(made, ones(2, 3))


def test_a_config_that_holds_an_array_is_compared_by_its_bits():
    a, b, c = (Config(names={"table": np.arange(n)}) for n in (3, 3, 4))
    assert fixed(a) == fixed(b)
    assert fixed(a) != fixed(c)
    seen = fixed(a)
    a.names["table"][0] = 7
    assert not seen.is_current


def test_a_set_as_configuration():
    m = model(nnx, Config())
    m.choices = {1, 2}
    f = nnx.jit(lambda m: jnp.int32(len(m.choices)))
    assert int(f(m)) == 2
    m.choices.add(3)
    assert int(f(m)) == 3


def test_the_function_sees_the_object_itself():
    m = model(nnx, Config())
    seen = []
    nnx.jit(lambda m: seen.append(m.config))(m)
    assert seen[0] is m.config


def test_metadata_of_any_kind():
    v = nnx.Param(ones(2), info={"a": [1, {2}]}, names=[["x"], None])
    w = nnx.jit(lambda v: v)(v)
    assert w is v
    assert (v.info, v.names) == ({"a": [1, {2}]}, [["x"], None])
    assert nnx.clone(v).get_metadata("names") == [["x"], None]
    assert nnx.jit(lambda v: v * 2)(v).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, False),
        ((1,), (1.0,), False),
        ([1, {2}], [1, {2}], True),
        ([1, {2}], [1, {3}], False),
        (Config(), Config(), True),
        (Config(), Config(3), False),
        (Doubtful(), Doubtful(), False),
        (Refusing(), Refusing(), False),
        (np.float32, np.float32, True),
        ((np.ones(2),), (np.ones(2),), True),
        ((np.ones(2),), (np.ones(3),), False),
        (jnp.dtype("float32"), jnp.dtype("float32"), True),
    ],
)
def test_equality_decides(a, b, same):
    key_a, key_b = (type(a), fixed(a)), (type(b), fixed(b))
    assert (key_a == key_b) is same
    assert not same or hash(key_a) == hash(key_b)
    assert unfixed(fixed(a)) is a


@pytest.mark.parametrize("kind", [Doubtful, Refusing])
def test_where_equality_gives_no_answer_identity_does(kind):
    value = kind()
    assert fixed(value) == fixed(value)
    assert fixed(value) != fixed(copy.copy(value))


def test_repr_is_that_of_the_value():
    assert repr(fixed([1])) == "[1]"
    assert fixed([1]) != [1]
    assert not Fixed([1], [2]).is_current
