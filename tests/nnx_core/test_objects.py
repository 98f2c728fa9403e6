"""Objects: Module, Pytree, List, Dict, Sequential; which attributes are data and which are static."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Node, Record, Tied, portrait, reachable
from tests.tolerance import assert_trees_equal


def paths(x, *filters):
    return list(nnx.to_flat_state(nnx.state(x, *filters)).paths)


# ---- attributes ------------------------------------------------------------------------------------------------

DATA = {
    "variable": lambda: nnx.Param(jnp.ones(2)),
    "jax array": lambda: jnp.ones(2),
    "numpy array": lambda: np.ones(2, np.float32),
    "key": lambda: jax.random.key(0),
}
STATIC = {
    "int": 3,
    "float": 1.5,
    "bool": True,
    "str": "s",
    "none": None,
    "tuple": (1, "a"),
    "function": jnp.tanh,
    "dtype": jnp.float32,
    "list of ints": [1, 2],
    "dict of strings": {"a": "b"},
}


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_arrays_and_variables_are_data(make):
    m = Node()
    m.x = make()
    assert nnx.is_data(m.x)
    assert paths(m) == [("x",)]


@pytest.mark.parametrize("value", STATIC.values(), ids=STATIC)
def test_everything_else_is_static(value):
    m = Node()
    m.x = value
    assert not nnx.is_data(value)
    assert paths(m) == []
    assert nnx.merge(*nnx.split(m)).x == value


def test_objects_are_data():
    assert nnx.is_data(Affine())
    assert nnx.is_data(Record())
    assert nnx.is_data(nnx.List([1]))
    assert not nnx.is_data(Affine)  # the class


def test_row40_plain_containers_of_modules_are_data():
    m = Node()
    m.layers = [Affine(), Affine(seed=1)]
    m.heads = {"a": Affine(), "b": nnx.Param(jnp.ones(1))}
    m.pair = (Affine(), 3)
    m.deep = {"x": [nnx.Param(jnp.ones(1)), (jnp.ones(1), "s")]}
    assert paths(m, nnx.Param) == [
        ("deep", "x", 0),
        ("heads", "a", "kernel"),
        ("heads", "b"),
        ("layers", 0, "kernel"),
        ("layers", 1, "kernel"),
        ("pair", 0, "kernel"),
    ]
    assert ("deep", "x", 1, 0) in paths(m)
    twin = nnx.merge(*nnx.split(m))
    assert portrait(twin) == portrait(m)
    assert twin.pair[1] == 3


def test_row40_a_list_that_grows_after_assignment():
    m = Node()
    m.layers = []
    m.layers.append(Affine())
    assert paths(m, nnx.Param) == [("layers", 0, "kernel")]


def test_row40_a_static_attribute_may_become_data_and_back():
    m = Node()
    m.x = None
    m.x = nnx.Param(jnp.ones(1))
    assert paths(m) == [("x",)]
    m.x = 3
    assert paths(m) == []


def test_numbers_marked_data_are_leaves():
    m = Node()
    m.n = nnx.data(3)
    assert m.n == 3
    assert paths(m) == [("n",)]
    m.n = 4  # the mark belongs to the attribute
    assert nnx.state(m)["n"] == 4


def test_static_marks_hide_a_value():
    m = Node()
    m.x = nnx.data(3)
    m.x = nnx.static(4)
    assert m.x == 4
    assert paths(m) == []


def test_class_annotations_mark_attributes():
    class Marked(nnx.Pytree):
        n: nnx.Data[int]
        shape: nnx.Static[tuple]

        def __init__(self):
            self.n = 3
            self.shape = (2, 3)

    m = Marked()
    assert paths(m) == [("n",)]
    assert m.shape == (2, 3)


def test_deleting_an_attribute():
    m = Affine()
    del m.calls
    assert paths(m) == [("kernel",)]
    assert not hasattr(m, "calls")
    with pytest.raises(AttributeError, match="calls"):
        del m.calls


def test_attributes_are_walked_in_sorted_order():
    m = Node()
    for name in "cab":
        setattr(m, name, nnx.Param(jnp.ones(1)))
    assert paths(m) == [("a",), ("b",), ("c",)]


def test_a_property_and_a_method_are_not_attributes():
    class Shaped(Affine):
        @property
        def shape(self):
            return self.kernel.shape

    assert Shaped().shape == (3, 3)
    assert paths(Shaped()) == [("calls",), ("kernel",)]


# ---- identity, copies, pytrees ------------------------------------------------------------------------------------


def test_objects_compare_and_hash_by_identity():
    a, b = Affine(), Affine()
    assert a == a
    assert a != b
    assert len({a, b, a}) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nnx.clone])
def test_deep_copies_are_isomorphic_and_separate(duplicate):
    m = Tied()
    twin = duplicate(m)
    assert portrait(twin) == portrait(m)
    assert not {id(x) for x in reachable(twin)} & {id(x) for x in reachable(m)}


def test_a_shallow_copy_shares_its_children():
    m = Tied()
    twin = copy.copy(m)
    assert twin is not m
    assert twin.encode is m.encode
    twin.encode = None
    assert m.encode is not None


def test_a_module_is_a_pytree():
    m = Affine()
    assert_trees_equal(jax.tree.leaves(m), [m.calls.get_value(), m.kernel.get_value()])
    doubled = jax.tree.map(lambda x: x * 2, m)
    assert type(doubled) is Affine
    assert_trees_equal(doubled.kernel.get_value(), m.kernel[...] * 2)
    assert (doubled.n_in, doubled.n_out) == (3, 3)


def test_leaf_paths_of_a_module_name_its_attributes():
    shown = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Affine())]
    assert shown == [".calls.value", ".kernel.value"]


def test_a_module_crosses_jax_jit_and_vmap():
    m = Affine()
    assert_trees_equal(jax.jit(lambda m: m.kernel[...])(m), m.kernel.get_value())
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), m)
    assert jax.vmap(lambda m: m.kernel.sum())(stack).shape == (2,)


def test_treedefs_are_equal_iff_structures_are():
    structure = jax.tree.structure
    assert structure(Affine()) == structure(Affine(seed=1))
    assert hash(structure(Affine())) == hash(structure(Affine(seed=1)))
    assert structure(Affine()) != structure(Affine(2, 3))
    assert structure(nnx.clone(Affine())) == structure(Affine())


def test_repr_shows_the_tree():
    text = repr(Tied())
    for part in ("Tied(", "encode", "kernel", "Param("):
        assert part in text
    ring = Node()
    ring.me = ring
    assert "Node(" in repr(ring)  # and it ends


def test_objects_created_outside_a_trace_cannot_be_changed_inside():
    m = Affine()

    def grow(x):
        m.extra = 3
        return x

    with pytest.raises(Exception, match=r"Affine"):
        nnx.jit(grow)(jnp.ones(1))
    assert not hasattr(m, "extra")


# ---- List ------------------------------------------------------------------------------------------------------


def test_list_does_what_lists_do():
    x = nnx.List([1, 2])
    x.append(3)
    x.extend([4, 5])
    x.insert(0, 0)
    x[1] = 10
    assert list(x) == [0, 10, 2, 3, 4, 5]
    assert (len(x), x[-1], list(x[1:3])) == (6, 5, [10, 2])
    assert x.pop() == 5
    assert x.pop(0) == 0
    del x[0]
    assert list(x) == [2, 3, 4]
    x.reverse()
    assert list(x) == [4, 3, 2]
    assert 3 in x
    assert x.index(3) == 1
    assert x.count(3) == 1
    x.remove(3)
    x.clear()
    assert len(x) == 0
    with pytest.raises(IndexError, match=r".*"):
        x[0]
    with pytest.raises(IndexError, match=r".*"):
        x.pop()


def test_list_slices_can_be_assigned():
    x = nnx.List([1, 2, 3])
    x[0:2] = [7, 8]
    assert list(x) == [7, 8, 3]


def test_list_items_are_state():
    x = nnx.List([nnx.Param(jnp.ones(1)), 3, Affine(), jnp.ones(2)])
    assert paths(x) == [(0,), (2, "calls"), (2, "kernel"), (3,)]
    del x[0]
    assert paths(x) == [(1, "calls"), (1, "kernel"), (2,)]
    assert next(iter(nnx.merge(*nnx.split(x)))) == 3


def test_list_is_an_object_with_identity():
    m = Node()
    m.a = nnx.List([nnx.Param(jnp.ones(1))])
    m.b = m.a
    twin = nnx.clone(m)
    assert twin.a is twin.b
    assert isinstance(m.a, nnx.Module)


# ---- Dict ------------------------------------------------------------------------------------------------------


def test_dict_does_what_dicts_do():
    x = nnx.Dict({"a": 1}, b=2)
    x["c"] = 3
    assert dict(x) == {"a": 1, "b": 2, "c": 3}
    assert (len(x), x["a"], x.get("q"), x.get("q", 5)) == (3, 1, None, 5)
    assert "b" in x
    assert list(x.keys()) == ["a", "b", "c"]
    assert list(x.values()) == [1, 2, 3]
    x.update(d=4)
    assert x.pop("d") == 4
    assert x.setdefault("a", 9) == 1
    del x["a"]
    assert list(x) == ["b", "c"]
    x.clear()
    assert len(x) == 0
    with pytest.raises(KeyError, match="a"):
        x["a"]


def test_dict_items_are_attributes_too():
    x = nnx.Dict(a=1)
    assert x.a == 1
    x.b = nnx.Param(jnp.ones(1))
    assert x["b"] is x.b
    del x.b
    assert "b" not in x


def test_dict_items_are_state():
    x = nnx.Dict(b=Affine(), a=nnx.Param(jnp.ones(1)), c=3)
    assert paths(x) == [("a",), ("b", "calls"), ("b", "kernel")]
    assert nnx.merge(*nnx.split(x))["c"] == 3


# ---- Sequential ------------------------------------------------------------------------------------------------


def test_sequential_composes():
    assert nnx.Sequential(lambda x: x + 1, lambda x: x * 2)(3) == 8


def test_sequential_spreads_tuples_and_dicts():
    assert nnx.Sequential(lambda x: (x, x + 1), lambda a, b: a * b)(3) == 12
    assert nnx.Sequential(lambda x: {"a": x}, lambda a: a + 1)(3) == 4
    assert nnx.Sequential(lambda *, a, b: a - b)(a=3, b=1) == 2


def test_sequential_of_modules():
    m = nnx.Sequential(Affine(), jnp.tanh, Affine(seed=1))
    x = jnp.ones((2, 3))
    a, b = m.layers[0].kernel[...], m.layers[2].kernel[...]
    assert_trees_equal(m(x), jnp.tanh(x @ a) @ b)
    assert paths(m, nnx.Param) == [("layers", 0, "kernel"), ("layers", 2, "kernel")]


# ---- Module: train, eval, set_attributes ---------------------------------------------------------------------------


class Mode(nnx.Module):
    def __init__(self):
        self.deterministic = False
        self.use_running_average = False
        self.rate = 0.5


class Tower(nnx.Module):
    def __init__(self):
        self.rate = 0.1
        self.parts = nnx.List([Mode(), nnx.Dict(deep=Mode())])

    def modes(self):
        return [self.parts[0], self.parts[1]["deep"]]


def test_eval_and_train_reach_every_module():
    m = Tower()
    m.eval()
    assert all(x.deterministic and x.use_running_average for x in m.modes())
    m.train()
    assert not any(x.deterministic or x.use_running_average for x in m.modes())


def test_train_and_eval_take_further_attributes():
    m = Tower()
    m.eval(rate=0.0)
    assert [x.rate for x in (m, *m.modes())] == [0.0, 0.0, 0.0]
    m.train(rate=1.0)
    assert m.rate == 1.0


def test_set_attributes_by_filter():
    m = Tower()
    m.set_attributes(Mode, rate=0.9)
    assert [x.rate for x in (m, *m.modes())] == [0.1, 0.9, 0.9]


def test_set_attributes_of_nobody():
    m = Tower()
    with pytest.raises(ValueError, match=r"(?s)at least one instance.*nosuch"):
        m.set_attributes(nosuch=1)
    m.set_attributes(nosuch=1, raise_if_not_found=False)
    assert not hasattr(m, "nosuch")


# ---- Module: sow, perturb ------------------------------------------------------------------------------------------


class Sower(nnx.Module):
    def __init__(self):
        self.child = Affine()

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        y = self.child(x)
        self.child.sow(nnx.Intermediate, "out", y)
        return y


def test_sow_appends_to_a_tuple_until_popped():
    m, x = Sower(), jnp.ones((1, 3))
    m(x)
    m(x * 2)
    assert isinstance(m.seen, nnx.Intermediate)
    assert_trees_equal(m.seen.get_value(), (x, x * 2))
    state = nnx.pop(m, nnx.Intermediate)
    assert len(state["child"]["out"].get_value()) == 2
    assert not hasattr(m, "seen")
    m(x)
    assert len(m.seen.get_value()) == 1


def test_sow_with_a_reduction():
    m = Node()
    for x in (1.0, 2.0, 3.0):
        m.sow(nnx.Intermediate, "total", x, init_fn=lambda: 10.0, reduce_fn=lambda a, b: a + b)
    assert m.total.get_value() == 16.0


def test_sow_refuses_a_taken_name():
    m = Node()
    m.w = nnx.Param(jnp.ones(1))
    m.n = 3
    with pytest.raises(ValueError, match=r"'?w'?.*Intermediate.*Param"):
        m.sow(nnx.Intermediate, "w", 1.0)
    with pytest.raises(ValueError, match=r"'n'.*int|'n'.*Variable"):
        m.sow(nnx.Intermediate, "n", 1.0)


def test_sow_inside_jit_reaches_the_caller():
    m, x = Sower(), jnp.ones((1, 3))
    nnx.jit(lambda m, x: m(x))(m, x)
    assert_trees_equal(m.seen.get_value(), (x,))
    nnx.jit(lambda m, x: m(x))(m, x * 2)
    assert_trees_equal(nnx.pop(m, nnx.Intermediate)["seen"].get_value(), (x, x * 2))


def test_row48_pop_can_ask_for_the_exact_type():
    class Loss(nnx.Intermediate): ...

    m = Node()
    m.a, m.b = nnx.Intermediate(jnp.ones(1)), Loss(jnp.ones(1))
    exactly = nnx.pop(m, lambda path, x: type(x) is nnx.Intermediate)
    assert list(exactly) == ["a"]
    assert isinstance(m.b, Loss)


class Perturbed(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(2.0))

    def __call__(self, x):
        return self.perturb("h", x * self.w) ** 2


def test_perturb_gives_the_gradient_of_an_intermediate():
    m = Perturbed()
    x = jnp.float32(3.0)
    assert float(m(x)) == 36.0
    assert isinstance(m.h, nnx.Perturbation)
    grads = nnx.grad(lambda m: m(x), argnums=nnx.DiffState(0, nnx.Perturbation))(m)
    assert_trees_equal(grads["h"].get_value(), jnp.float32(12.0))


def test_train_never_writes_a_flag_over_state():
    class Gate(nnx.Module):
        def __init__(self):
            self.deterministic = nnx.Param(jnp.ones(2))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    gate = Gate()
    param = gate.deterministic
    gate.eval()
    assert gate.deterministic is param
    assert gate.dropout.deterministic
    with pytest.raises(ValueError, match="deterministic"):
        gate.set_attributes(nnx.OfType(Gate), deterministic=True)
    gate.set_attributes(nnx.OfType(Gate), deterministic=nnx.Param(jnp.zeros(2)))  # not a flag
    assert float(gate.deterministic.sum()) == 0
