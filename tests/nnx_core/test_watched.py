"""graph.watched: what is watched is what it was, but for who is told of its calls; and what a public method is."""

import pytest

import nnx_core as nnx
from nnx_core.graph.watched import Watched, plain_class, public_methods, set_class, watched_class
from tests.support.arrays import ones
from tests.support.watched_models import CALLED, CASES, Methods

X = ones(2)


def captured(model, *args):
    nnx.capture(model, nnx.Intermediate)(*args)


def captured_outputs(model, *args):
    nnx.capture(model, method_outputs=nnx.Intermediate)(*args)


def tabulated(model, *args):
    nnx.tabulate(model, *args)


def counted(model, *args):
    nnx.tabulate(model, *args, compute_flops=True)


def captured_twice(model, *args):
    nnx.capture(captured, nnx.Cache)(model, *args)


def captured_in_a_table(model, *args):
    class Outer(nnx.Module):
        def __init__(self):
            self.model = model

        def __call__(self, *args):
            captured_outputs(self.model, *args)

    nnx.tabulate(Outer(), *args)


WATCHERS = [captured, captured_outputs, captured_twice, tabulated, counted, captured_in_a_table]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_a_watched_module_is_what_it_was(watch, case):
    case(lambda cls: watch(cls()))


def test_public_methods():
    assert set(public_methods(Methods)) == CALLED
    assert public_methods(Methods)["inherited"] is Methods.inherited
    assert public_methods(nnx.Module) == public_methods(nnx.List) == public_methods(nnx.Dict) == {}
    assert list(public_methods(nnx.Sequential)) == ["__call__"]
    assert {"__call__", "split", "fork"} <= set(public_methods(nnx.RngStream))


def test_who_watches_agrees_on_what_a_public_method_is():
    _, sown = nnx.capture(Methods(), method_outputs=nnx.Intermediate)(X)
    assert set(sown) - {"sown"} == CALLED
    rows = []
    nnx.tabulate(Methods(), X, row_filter=lambda row: rows.append(row) or True)
    assert {row.path[0] if row.path else "__call__" for row in rows} == CALLED


def test_watched_twice_and_plain_again():
    class Model(nnx.Module):
        calls = 0

        def __call__(self):
            type(self).calls += 1

    class Front(Watched):
        __slots__ = ()

    told = []

    def wrap(name, method):
        return lambda self: told.append(name) or method(self)

    first = watched_class(Model, wrap)
    second = watched_class(first, None, Front, label="second")
    model = Model()
    set_class(model, second)
    model()
    assert (told, Model.calls, type(model).label) == (["__call__"], 1, "second")
    assert (plain_class(second), plain_class(first), plain_class(Model)) == (first, Model, Model)
    assert (plain_class(second, Front), plain_class(first, Front)) == (first, first)


def test_a_class_derived_from_a_watched_one_is_a_class_of_its_own():
    class Model(nnx.Module):
        pass

    derived = type("Derived", (watched_class(Model, None),), {})
    derived.label = 1
    assert not hasattr(Model, "label")
    del derived.label
    assert not hasattr(derived, "label")
