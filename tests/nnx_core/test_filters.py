"""Filters choose Variables by (path, value)."""

import collections.abc
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core as nnx
from tests.strategies import LAW
from tests.support.arrays import key, ones

PATH = ("layers", 0, "kernel")
PARAM = nnx.Param(ones(1), tag="hi")
STAT = nnx.BatchStat(ones(1))
KEY = nnx.RngKey(key(0), tag="params")
ARRAY = ones(1)
VALUES = (PARAM, STAT, KEY, ARRAY)

CASES = {
    "type": (nnx.Param, "p"),
    "base type": (nnx.RngState, "k"),
    "every Variable": (nnx.Variable, "psk"),
    "array type": (jax.Array, "a"),
    "everything": (..., "pska"),
    "True": (True, "pska"),
    "nothing": (None, ""),
    "False": (False, ""),
    "tag": ("hi", "p"),
    "tag of an rng": ("params", "k"),
    "tuple is any": ((nnx.Param, nnx.BatchStat), "ps"),
    "list is any": ([nnx.Param, "params"], "pk"),
    "function": (lambda path, value: isinstance(value, nnx.BatchStat), "s"),
    "function of the path": (lambda path, value: path[0] == "layers", "pska"),
    "Any": (nnx.Any(nnx.Param, nnx.BatchStat), "ps"),
    "All": (nnx.All(nnx.Variable, "hi"), "p"),
    "Not": (nnx.Not(nnx.Param), "ska"),
    "nested": (nnx.All(nnx.Variable, nnx.Not((nnx.Param, nnx.RngState))), "s"),
    "empty Any": (nnx.Any(), ""),
    "empty All": (nnx.All(), "pska"),
    "PathContains": (nnx.PathContains("kernel"), "pska"),
    "PathContains, int": (nnx.PathContains(0), "pska"),
    "PathContains, absent": (nnx.PathContains("kern"), ""),
    "WithTag": (nnx.WithTag("hi"), "p"),
    "OfType": (nnx.OfType(nnx.Param), "p"),
    "Everything": (nnx.Everything(), "pska"),
    "Nothing": (nnx.Nothing(), ""),
}


def chosen(filter_) -> str:
    predicate = nnx.filterlib.to_predicate(filter_)
    return "".join(name for name, value in zip("pska", VALUES, strict=True) if predicate(PATH, value))


@pytest.mark.parametrize(("filter_", "want"), CASES.values(), ids=CASES)
def test_filter_chooses(filter_, want):
    assert chosen(filter_) == want


def test_path_contains_a_part_of_a_key():
    assert chosen(nnx.PathContains("kern", exact=False)) == "pska"
    assert chosen(nnx.PathContains("kern", exact=True)) == ""


def test_row50_a_pattern_filters_by_path():
    m = nnx.Dict(encoder=nnx.Dict(kernel=PARAM.copy()), decoder=nnx.Dict(kernel=PARAM.copy()))
    found = nnx.to_flat_state(nnx.state(m, nnx.PathRegex("enc.*kernel")))
    assert list(found.paths) == [("encoder", "kernel")]


@pytest.mark.parametrize("wrong", [3, 2.5, object()])
def test_something_that_is_no_filter(wrong):
    with pytest.raises((TypeError, ValueError), match=r"(?i)filter"):
        nnx.filterlib.to_predicate(wrong)


@pytest.mark.parametrize(
    "make", [lambda: nnx.Not(nnx.Param), lambda: nnx.All(nnx.Param, "hi"), lambda: nnx.Any(nnx.Param, None)]
)
def test_filters_are_values(make):
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != nnx.Not(nnx.Cache)


def test_filters_of_different_kind_differ():
    assert nnx.All(nnx.Param) != nnx.Any(nnx.Param)


atoms = st.sampled_from([nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Variable, ..., None, "hi", "params"])
filters = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(nnx.Not),
        st.lists(inner, max_size=3).map(lambda fs: nnx.All(*fs)),
        st.lists(inner, max_size=3).map(lambda fs: nnx.Any(*fs)),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=5,
)


def meet(a, b):
    return "".join(c for c in a if c in b)


@given(filters, filters)
@LAW
def test_filters_are_a_boolean_algebra(f, g):
    everything = chosen(...)
    complement = "".join(c for c in everything if c not in chosen(f))
    assert chosen(nnx.Not(f)) == complement
    assert chosen(nnx.Not(nnx.Not(f))) == chosen(f)
    assert chosen(nnx.All(f, g)) == chosen(nnx.All(g, f)) == meet(chosen(f), chosen(g))
    assert chosen(nnx.Not(nnx.Any(f, g))) == chosen(nnx.All(nnx.Not(f), nnx.Not(g)))
    assert chosen((f, g)) == chosen([f, g]) == chosen(nnx.Any(f, g))


@given(st.lists(filters, min_size=1, max_size=3))
@LAW
def test_split_by_filters_ending_in_the_rest_is_a_partition(fs):
    fs = [f for f in fs if f is not ...]
    m = nnx.Dict(p=PARAM.copy(), s=STAT.copy(), k=KEY.copy(), a=ARRAY)
    parts = nnx.state(m, *fs, ...)
    parts = parts if isinstance(parts, tuple) else (parts,)
    names = [name for part in parts for name in part]
    assert sorted(names) == ["a", "k", "p", "s"]
    for part, f in zip(parts, [*fs, ...], strict=True):
        assert all(name in chosen(f) for name in part)


# ---- which answers may be remembered ----


class _Shaped(type):
    """A metaclass that reads the value, as jaxtyping's does."""

    def __instancecheck__(cls, x) -> bool:
        return getattr(x, "shape", None) == (4,)


class _FourLong(metaclass=_Shaped):
    pass


class _Mixed(nnx.OfType):
    """A user's filter, derived from one of ours, may read what it likes."""

    def __call__(self, path, value):
        return value.ndim == 2


PURE = {
    **{name: case[0] for name, case in CASES.items() if not name.startswith("function")},
    "PathIn": nnx.PathIn(("a",)),
    "PathRegex": nnx.filterlib.PathRegex("a/.*"),
    "compiled pattern": re.compile("a"),
    "abstract base class": collections.abc.Mapping,
    "subclass of Variable": type("Mine", (nnx.Param,), {}),
}
IMPURE = {
    "function": lambda path, value: True,
    "inside of Not": nnx.Not(lambda path, value: value.ndim == 2),
    "inside of All": nnx.All(nnx.Param, lambda path, value: True),
    "inside of a list": [nnx.Param, lambda path, value: True],
    "type that reads the value": _FourLong,
    "subclass of ours": _Mixed(nnx.Param),
    "bound method": {"kernel"}.__contains__,
}


@pytest.mark.parametrize("filter_", PURE.values(), ids=PURE)
def test_filters_of_path_type_and_metadata_are_pure(filter_):
    assert nnx.filterlib.is_pure(filter_)


@pytest.mark.parametrize("filter_", IMPURE.values(), ids=IMPURE)
def test_filters_that_may_read_anything_are_not(filter_):
    assert not nnx.filterlib.is_pure(filter_)


def test_a_predicate_of_the_users_may_say_that_it_is():
    def by_path(path, value):
        return path[0] == "layers"

    by_path.is_pure = True
    assert nnx.filterlib.is_pure(nnx.All(nnx.Param, by_path))


def test_what_is_no_filter_is_neither():
    with pytest.raises(ValueError, match=r"Expected a filter .*, found 3"):
        nnx.filterlib.is_pure(3)
