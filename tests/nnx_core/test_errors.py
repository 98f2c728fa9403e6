"""Errors are an interface: every raise of nnx_core's rooms 0 to 5, by class and text.

Each message says where (both paths if two are involved), what was expected, what was found and what to do.
"""

import inspect

import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core import _errors
from tests.strategies import portrait, stack_of_affine
from tests.support.arrays import ones
from tests.support.error_cases import CASES

X = ones(2, 3)

# The builtin errors that a caller may catch instead of ours.
BUILTINS = {
    "DepthError": (RecursionError,),
    "InPlaceError": (NotImplementedError,),
    "MissingRngError": (AttributeError, KeyError),
    "NotAGraphError": (TypeError,),
    "NotDifferentiableError": (TypeError,),
    "OptimizerError": (TypeError,),
}


@pytest.mark.parametrize(("act", "kind", "text"), CASES.values(), ids=CASES)
def test_error(act, kind, text):
    expected = getattr(_errors, kind) if isinstance(kind, str) else kind
    with pytest.raises(expected, match=f"(?s){text}") as caught:
        act()
    if isinstance(kind, str):
        assert type(caught.value) is expected
        assert isinstance(caught.value, nnx.NnxError)
        assert all(issubclass(expected, builtin) for builtin in BUILTINS.get(kind, (ValueError,)))


def test_every_error_class_has_a_case():
    classes = {
        name
        for name, c in vars(_errors).items()
        if inspect.isclass(c) and issubclass(c, nnx.NnxError) and c is not nnx.NnxError
    }
    assert classes - {kind for _, kind, _ in CASES.values()} == set()


@pytest.mark.parametrize("path", [(), ("a",), ("args", 0, "layers", 1, "kernel"), ("a b", ("t", 1))])
def test_paths_are_written_as_one_would_type_them(path):
    want = {0: "<root>", 1: "a", 5: "args[0].layers[1].kernel", 2: "['a b'][('t', 1)]"}[len(path)]
    assert _errors.show_path(path) == want


def test_a_refused_call_changes_nothing():
    m = stack_of_affine(4)
    before = portrait(m)
    with pytest.raises(ValueError, match="reached twice"):
        nnx.vmap(lambda a, b: a(X), in_axes=(0, None))(m, m)
    with pytest.raises(ValueError, match="does not fit"):
        nnx.update(m, {"kernel": jnp.zeros((3, 3)), "nosuch": X})
    assert portrait(m) == before
