"""Errors are an interface: their classes, and what their text names."""

import pytest

from bridge import _errors
from bridge._errors import (
    BridgeError,
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    CheckpointTooLargeError,
    MissingDependencyError,
    OptStateOrderError,
    RenameClashError,
    VariablesMismatchError,
    show_path,
)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (MissingDependencyError, ImportError),
        (CheckpointNotFoundError, FileNotFoundError),
        (CheckpointCorruptError, ValueError),
        (CheckpointLayoutError, ValueError),
        (CheckpointTooLargeError, MemoryError),
        (OptStateOrderError, ValueError),
        (RenameClashError, ValueError),
        (VariablesMismatchError, ValueError),
    ],
)
def test_every_error_is_a_bridge_error_and_a_builtin(kind, builtin):
    assert issubclass(kind, BridgeError)
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", [CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError])
def test_checkpoint_errors_name_path_expected_and_found(kind):
    error = kind("it broke", "/a/b", expected="bread", found="stone", hint="Bake.")
    assert str(error) == "it broke: /a/b\n  expected: bread\n  found: stone\nBake."
    assert (error.path, error.expected, error.found) == ("/a/b", "bread", "stone")


def test_missing_dependency_says_how_to_install():
    with pytest.raises(
        ImportError,
        match=r"needs the package 'orbax-checkpoint'.*\n.*pip install 'linen-nnx-bridge\[orbax\]'",
    ):
        raise MissingDependencyError("Reading", "orbax-checkpoint", "orbax")


def test_mismatch_lists_everything_sorted_in_one_message():
    error = VariablesMismatchError(
        missing=[("params", "b", "kernel"), ("params", "a", "kernel")],
        unexpected=[("params", "zz", "bias")],
        wrong_shape=[(("params", "d", "kernel"), (3, 4), (4, 3)), (("params", "c", "kernel"), (1,), (2,))],
        wrong_dtype=[(("params", "e", "bias"), "float32", "bfloat16")],
        source="the checkpoint",
    )
    assert str(error) == (
        "the checkpoint and the model do not match: 2 missing, 1 unexpected, 2 wrong shape, 1 wrong dtype\n"
        "missing (in the model, not in the checkpoint):\n"
        "  params/a/kernel\n"
        "  params/b/kernel\n"
        "unexpected (in the checkpoint, not in the model):\n"
        "  params/zz/bias\n"
        "wrong shape:\n"
        "  params/c/kernel: expected (1,), found (2,)\n"
        "  params/d/kernel: expected (3, 4), found (4, 3)\n"
        "wrong dtype:\n"
        "  params/e/bias: expected float32, found bfloat16\n"
        "Nothing was changed."
    )
    assert error.missing == [("params", "a", "kernel"), ("params", "b", "kernel")]


def test_mismatch_suggests_near_misses():
    error = VariablesMismatchError(
        missing=[("params", "layers_0", "kernel")],
        unexpected=[("params", "layers", "0", "kernel"), ("step",)],
    )
    assert "params/layers_0/kernel   (did you mean params/layers/0/kernel?)" in str(error)


def test_a_very_long_list_is_complete_and_quick():
    missing = [("params", f"layer_{i}", "kernel") for i in range(2000)]
    error = VariablesMismatchError(missing=missing, unexpected=[("params", f"layers.{i}.kernel") for i in range(2000)])
    assert all(show_path(path) in str(error) for path in missing)
    assert "did you mean" not in str(error)


def test_keys_with_a_slash_are_quoted():
    assert show_path(("a", "b/c")) == "a/'b/c'"
    assert show_path(()) == "(root)"
    assert show_path("as/given") == "as/given"


def test_rename_clash_names_both_params():
    with pytest.raises(RenameClashError, match=r"(?s)a/w -> x.*b/w -> x/y"):
        raise RenameClashError(("a", "w"), ("x",), ("b", "w"), ("x", "y"))


def test_near_misses_are_empty_when_nothing_is_near():
    assert _errors.near_misses("kernel", ["zzz"]) == []
