"""nnx.data and nnx.static: a mark belongs to a value, in attributes and in containers; pop from plain containers."""

import copy
import dataclasses

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core.graph._errors import PopError, StaticDataError
from tests.oracle import same
from tests.tolerance import assert_trees_equal

pytestmark = pytest.mark.filterwarnings("ignore:'(Static|Data)' is deprecated:DeprecationWarning")  # flax's


def paths(lib, x):
    return [path for path, _ in lib.to_flat_state(lib.state(x))]


def with_head(lib, *values):
    m = lib.Module()
    for value in values:
        m.head = value(lib)
    return m


def static_pair(lib):
    return lib.static((1, 2))


def param(lib):
    return lib.Param(jnp.ones(1))


# ---- attributes --------------------------------------------------------------------------------------------------

SEQUENCES = {
    "data after static": (static_pair, lambda lib: lib.data(1)),
    "static after data": (lambda lib: lib.data(1), lambda lib: lib.static(2)),
    "a number after data stays data": (lambda lib: lib.data(1), lambda lib: 2),
    "a number after None that is data": (lambda lib: lib.data(None), lambda lib: 1.5),
    "a number after static stays static": (lambda lib: lib.static(1), lambda lib: 2),
    "abstract arrays may be static": (lambda lib: lib.static(jax.ShapeDtypeStruct((1,), jnp.float32)),),
    "None after a Param": (param, lambda lib: None),
}


@pytest.mark.parametrize("values", SEQUENCES.values(), ids=SEQUENCES)
def test_assignments_as_in_flax(values):
    same(lambda lib: paths(lib, with_head(lib, *values)))


DATA = {
    "Param": param,
    "array": lambda lib: jnp.ones(1),
    "numpy": lambda lib: np.ones(1),
    "module": lambda lib: lib.Linear(1, 1, rngs=lib.Rngs(0)),
    "list": lambda lib: [jnp.ones(1)],
    "tuple": lambda lib: (2, np.ones(1)),
    "dict": lambda lib: {"a": lib.Param(jnp.ones(1))},
}


@pytest.mark.parametrize("kind", DATA)
def test_data_after_static_is_data(kind):
    # flax raises here: either way nothing is silently left out of training.
    theirs = flax.nnx
    with pytest.raises(ValueError, match="static attribute"):
        with_head(theirs, static_pair, DATA[kind])
    assert paths(nnx, with_head(nnx, static_pair, DATA[kind]))
    traced = with_head(nnx, static_pair)
    nnx.jit(lambda m: setattr(m, "head", DATA[kind](nnx)))(traced)
    assert paths(nnx, traced) == paths(nnx, with_head(nnx, DATA[kind]))


@pytest.mark.parametrize("lib", [nnx, flax.nnx])
@pytest.mark.parametrize("kind", DATA)
def test_data_in_static_is_refused_as_in_flax(kind, lib):
    class Annotated(lib.Module):
        x: lib.Static[object]

        def __init__(self, x):
            self.x = x

    @dataclasses.dataclass
    class Dataclass(lib.Module):
        x: object = lib.static()

    @lib.dataclass
    class Own(lib.Module):
        x: object = lib.static(default=3)

    m = lib.Module()
    with pytest.raises(ValueError, match=r"(?s)[Dd]ata .*static"):
        m.head = lib.static(DATA[kind](lib))
    assert not hasattr(m, "head")
    for make in (Annotated, Dataclass, Own):
        with pytest.raises(ValueError, match=r"(?s)data .*static"):
            make(DATA[kind](lib))
    own = Own()
    with pytest.raises(ValueError, match=r"(?s)data .*static"):
        own.x = DATA[kind](lib)
    assert own.x == 3


def test_what_the_error_says():
    m = nnx.Module()
    text = r"^Found data in the static attribute head of Module: a Param\.\nMark it with nnx\.data"
    with pytest.raises(StaticDataError, match=text):
        m.head = nnx.static(nnx.Param(jnp.ones(1)))
    with pytest.raises(StaticDataError, match=r"attribute \[0\] of List: a ndarray"):
        nnx.List([nnx.static(np.ones(1))])


def test_a_mark_goes_with_its_value():
    def program(lib):
        m = lib.Module()
        m.x = lib.data(1)
        del m.x
        m.x = 2
        n = lib.Module()
        n.x = lib.static(1)
        del n.x
        n.x = jnp.ones(1)
        return paths(lib, m), paths(lib, n)

    same(program)


def test_what_the_class_says_gives_way_to_nnx_data():
    def program(lib):
        class M(lib.Module):
            x: lib.Static[object]
            y: lib.Data[object]

            def __init__(self):
                self.x = lib.data(1)
                self.y = lib.static(2)

        return paths(lib, M())

    same(program)


# ---- containers --------------------------------------------------------------------------------------------------


def marked_list(lib):
    m = lib.Module()
    m.items = lib.List([lib.data(1), 2, lib.static(3)])
    return m


def marked_dict(lib):
    m = lib.Module()
    m.items = lib.Dict({"a": lib.data(1), "b": 2}, c=lib.static(3))
    return m


def set_in_list(lib):
    m = marked_list(lib)
    m.items[1] = lib.data(5)
    m.items[0] = 7
    return m


def set_in_dict(lib):
    m = marked_dict(lib)
    m.items["b"] = lib.data(5)
    m.items.d = lib.data(6)
    m.items["a"] = 7
    return m


CONTAINERS = {"list": marked_list, "dict": marked_dict, "set in list": set_in_list, "set in dict": set_in_dict}
COPIES = {
    "itself": lambda lib, m: m,
    "merge": lambda lib, m: lib.merge(*lib.split(m)),
    "deepcopy": lambda lib, m: copy.deepcopy(m),
    "tree": lambda lib, m: jax.tree.map(lambda x: x, m),
    "clone": lambda lib, m: lib.clone(m),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_marks_in_containers_as_in_flax(make, copied):
    def program(lib):
        m = copied(lib, make(lib))
        items = m.items
        values = [items[key] for key in sorted(items)] if hasattr(items, "keys") else list(items)
        return paths(lib, m), [int(x) for x in values]

    same(program)


def test_numbers_of_a_list_travel_through_jit():
    def program(lib):
        m = marked_list(lib)

        def count(m):
            m.items[0] = m.items[0] + 1
            return m.items[1] * 2

        return lib.jit(count)(m), paths(lib, m), m.items[0]

    same(program)


def test_marks_move_with_the_items_of_a_list():
    # flax keeps them with the index
    items = nnx.List([nnx.data(1), 2, nnx.data(3)])
    items.insert(0, 0)
    items.append(nnx.data(4))
    assert list(items) == [0, 1, 2, 3, 4]
    assert paths(nnx, items) == [(1,), (3,), (4,)]
    del items[1]
    assert paths(nnx, items) == [(2,), (3,)]
    items[0:2] = [nnx.data(9)]
    assert list(items) == [9, 3, 4]
    assert paths(nnx, items) == [(0,), (1,), (2,)]
    assert items.pop() == 4
    assert paths(nnx, items) == [(0,), (1,)]


def test_a_refused_item_changes_nothing():
    items = nnx.List([nnx.data(1), 2])
    for act in (
        lambda x: items.append(x),
        lambda x: items.__setitem__(1, x),
        lambda x: items.__setitem__(slice(0, 2), [x]),
    ):
        with pytest.raises(StaticDataError, match=r"attribute \[\d\] of List"):
            act(nnx.static(jnp.ones(1)))
    assert list(items) == [1, 2]
    assert paths(nnx, items) == [(0,)]


def test_keys_of_any_kind_are_marked():
    mapping = nnx.Dict({1: nnx.data(1), "a": nnx.data(2), (2, 3): nnx.data(3), "x": 4})
    del mapping["a"]
    assert set(paths(nnx, mapping)) == {(1,), ((2, 3),)}
    assert paths(nnx, nnx.merge(*nnx.split(mapping))) == paths(nnx, mapping)


# ---- pop ---------------------------------------------------------------------------------------------------------


def holding(lib, make):
    m = lib.Module()
    m.held = lib.data(make(lib.Intermediate(jnp.ones(1)), lib.Param(jnp.zeros(1))))
    return m


DICTS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "nested": lambda a, b: {"x": [({"a": a, "b": b},)]},
}


@pytest.mark.parametrize("make", DICTS.values(), ids=DICTS)
def test_pop_removes_from_plain_dicts_as_in_flax(make):
    def program(lib):
        m = holding(lib, make)
        popped = lib.pop(m, lib.Intermediate)
        return len(jax.tree.leaves(popped)), paths(lib, m), paths(lib, lib.clone(m))

    same(program)


def test_pop_from_a_plain_dict_in_jit():
    m = holding(nnx, DICTS["nested"])
    nnx.state(m)
    popped = nnx.jit(lambda m: nnx.pop(m, nnx.Intermediate))(m)
    assert_trees_equal(jax.tree.leaves(popped), [jnp.ones(1)])
    assert paths(nnx, m) == [("held", "x", 0, 0, "b")]


def test_a_shared_variable_is_popped_from_every_place_it_is_at():
    m = holding(nnx, lambda a, b: {"x": [{"a": a, "b": b}], "y": {"a": a}})
    m.again = m.held["y"]["a"]
    nnx.pop(m, nnx.Intermediate)
    assert paths(nnx, m) == [("held", "x", 0, "b")]


def test_pop_from_a_dict_itself():
    def program(lib):
        tree = {"a": lib.Intermediate(jnp.ones(1)), "b": lib.Param(jnp.ones(1))}
        return len(jax.tree.leaves(lib.pop(tree, lib.Intermediate))), sorted(tree)

    same(program)


@pytest.mark.parametrize("make", [lambda a, b: [a, b], lambda a, b: (a,), lambda a, b: {"y": [{"z": b}, a]}])
def test_pop_raises_where_it_cannot_remove_as_in_flax(make):
    for lib in (nnx, flax.nnx):
        m = holding(lib, make)
        with pytest.raises(ValueError, match="Cannot pop"):
            lib.pop(m, lib.Intermediate)
    m = holding(nnx, make)
    before = paths(nnx, m)
    text = r"^Cannot pop held.*, a Intermediate: expected it in .* in a (list|tuple), which .* popped\.\nKeep it"
    with pytest.raises(PopError, match=f"(?s){text}"):
        nnx.pop(m, nnx.Intermediate)
    assert paths(nnx, m) == before
