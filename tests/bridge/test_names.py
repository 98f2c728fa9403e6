"""The public names of flax.nnx.bridge, their signatures, its module paths: ours, but for a table of reasons."""

import importlib
import inspect

import pytest
from flax.nnx import bridge as theirs

import bridge as ours

#: Signatures that say more than theirs, and begin with theirs.
MORE = {
    "ToNNX": "parity=: hand Linen exactly the keys given (row 32)",
    "ToLinen": "abstract_init= and the options of rows 35, 62 and 65",
    "to_linen": "the same options",
}
PUBLIC = [name for name in dir(theirs) if not name.startswith("_")]
PATHS = ["module", "interop", "variables", "wrappers"]
#: Bookkeeping of flax's own implementation, reachable only because its modules list no public names.
INTERNAL = {"ModuleBase", "ModuleContext", "ModuleState", "has_setup", "A", "B", "F", "M"}


def parameters(f):
    """Name, kind and whether there is a default, of each parameter of a call."""
    f = f.__init__ if isinstance(f, type) else f
    return [
        (p.name, p.kind, p.default is not p.empty)
        for p in inspect.signature(f).parameters.values()
        if p.name not in ("self", "parent", "name")
    ]


def test_every_public_name_is_here():
    assert [name for name in PUBLIC if name not in ours.__all__] == []
    assert [name for name in ours.__all__ if not hasattr(ours, name)] == []


@pytest.mark.parametrize(
    "name", [n for n in PUBLIC if callable(getattr(theirs, n)) and n not in MORE | {"AttrPriority": 0}]
)
def test_signatures_are_the_same(name):
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


@pytest.mark.parametrize("name", sorted(MORE))
def test_signatures_that_say_more_begin_the_same(name):
    """Each parameter of theirs is one of ours, at the same place if it may be positional."""
    mine, other = parameters(getattr(ours, name)), parameters(getattr(theirs, name))
    assert [p for p in other if p not in mine] == []
    positional = [p for p in other if p[1] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert mine[: len(positional)] == positional


def test_to_linen_class_has_the_same_signature():
    assert parameters(ours.wrappers.to_linen_class) == parameters(theirs.wrappers.to_linen_class)


def test_attr_priorities_are_the_same():
    assert [(p.name, int(p)) for p in ours.AttrPriority] == [(p.name, int(p)) for p in theirs.AttrPriority]


OWN_METHODS = """init init_with_output apply param variable make_rng is_initializing set_attr_priority
    sow perturb train eval set_attributes iter_modules iter_children""".split()


#: Parameters that flax has from 0.12.12 on.
LATER = {"capture_noop"}


@pytest.mark.parametrize("name", OWN_METHODS)
def test_methods_of_module_have_the_same_signatures(name):
    mine, other = parameters(getattr(ours.Module, name)), parameters(getattr(theirs.Module, name))
    assert [p for p in mine if p in other or p[0] not in LATER] == other


def test_module_has_every_public_attribute():
    assert [name for name in dir(theirs.Module) if not name.startswith("_") and not hasattr(ours.Module, name)] == []
    assert isinstance(inspect.getattr_static(ours.Module, "variables"), property)


@pytest.mark.parametrize("path", PATHS)
def test_module_paths_hold_the_same_names(path):
    """`from bridge.wrappers import ToNNX`, and so on: what flax defines there is there."""
    there = importlib.import_module(f"flax.nnx.bridge.{path}")
    here = importlib.import_module(f"bridge.{path}")
    assert getattr(ours, path) is here
    defined = {
        name
        for name, x in vars(there).items()
        if not name.startswith("_") and getattr(x, "__module__", None) == there.__name__
    }
    missing = {name for name in defined - INTERNAL if not hasattr(here, name)}
    assert missing - {"ModuleMeta"} == set()


def test_paths_are_aliases():
    from bridge.wrappers import Functional, ToLinen, ToNNX, lazy_init

    from bridge.variables import to_linen_var, with_partitioning

    assert (ToNNX, ToLinen, lazy_init, Functional) == (ours.ToNNX, ours.ToLinen, ours.lazy_init, ours.Functional)
    assert (to_linen_var, with_partitioning) == (ours.to_linen_var, ours.with_partitioning)


#: What flax imports there for its annotations.
ANNOTATIONS = {"tp", "DtypeLikeInexact", "Initializer"}


@pytest.mark.parametrize(
    "name", [n for n in dir(theirs.initializers) if not n.startswith("_") and n not in ANNOTATIONS]
)
def test_initializers(name):
    assert hasattr(ours.initializers, name)
