"""What can go wrong between Linen and NNX, one class for each mistake.

Law: every class is a `BridgeError` and also the builtin that plain Python code would catch; every message
names where it happened, what was expected, what was found and what to do next.
What Linen itself raises for a missing variable is said here too, for every room that stands in for Linen.
Knows key paths and text; knows nothing of modules, arrays or file formats.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import flax.errors

from bridge._types import Location, Path

# difflib compares each missing path with each unexpected one; past this many pairs a hint costs seconds.
_MOST_COMPARISONS = 20_000


def show_path(path: Sequence[object] | str) -> str:
    """`('a', 'b')` as `a/b`; a key that holds a `/` itself, as Linen's WeightNorm makes them, is quoted.

    >>> show_path(("params", "Dense_0", "kernel"))
    'params/Dense_0/kernel'
    >>> show_path(("params", "WeightNorm_0", "Dense_0/kernel/scale"))
    "params/WeightNorm_0/'Dense_0/kernel/scale'"
    """
    if isinstance(path, str):
        return path
    return "/".join(map(_show_key, path)) or "(root)"


def _show_key(key: object) -> str:
    text = str(key)
    return repr(text) if "/" in text or not text else text


def near_misses(wanted: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that look like `wanted`, best first; empty when none does.

    >>> near_misses("params/Dense_0/kernel", ["params/Dense0/kernel", "step"])
    ['params/Dense0/kernel']
    """
    return difflib.get_close_matches(wanted, list(candidates), n=count, cutoff=0.6)


def cut_short(lines: Sequence[str], most: int, indent: str = "  ") -> list[str]:
    """The first lines, and how many more there are.

    >>> cut_short(["  a", "  b", "  c"], most=2)
    ['  a', '  b', '  and 1 more']
    """
    rest = len(lines) - most
    return [*lines[:most], f"{indent}and {rest} more"] if rest > 0 else list(lines)


#: What Linen raises for a variable that is missing.
LINEN_NOT_FOUND = (
    flax.errors.ScopeCollectionNotFound,
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeVariableNotFoundError,
)


def linen_place(location: Location, inside: Path = ()) -> tuple[str, str]:
    """(name, path of its scope) as Linen's errors show a variable; `inside`: where the module with it is.

    >>> linen_place(("params", "Dense_0", "kernel"), inside=("Block_1",))
    ('kernel', '/Block_1/Dense_0')
    """
    return location[-1], "/" + "/".join((*inside, *location[1:-1]))


def linen_not_found(location: Location, inside: Path = (), *, empty: bool) -> Exception:
    """What Linen raises for a variable that is missing; `empty`: so is its collection.

    >>> type(linen_not_found(("params", "kernel"), empty=False)).__name__
    'ScopeParamNotFoundError'
    """
    collection, (name, scope) = location[0], linen_place(location, inside)
    if empty:
        return flax.errors.ScopeCollectionNotFound(collection, name, scope)
    if collection == "params":
        return flax.errors.ScopeParamNotFoundError(name, scope)
    return flax.errors.ScopeVariableNotFoundError(name, collection, scope)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, with commas, and dots if there are more.

    >>> listed(["a", "b", "c"], most=2)
    'a, b, ...'
    """
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


class BridgeError(Exception):
    """Base of every error that `bridge` raises on purpose."""


class MissingDependencyError(BridgeError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""

    def __init__(self, what: str, package: str, extra: str):
        self.package, self.extra = package, extra
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed.\n"
            f"Install it: pip install 'linen-nnx-bridge[{extra}]'"
        )


class CheckpointError(BridgeError):
    """A checkpoint cannot be used. `path` is the file or folder, `expected` and `found` say why, in words."""

    def __init__(self, problem: str, path: object, *, expected: str, found: str, hint: str = ""):
        self.path, self.expected, self.found = str(path), expected, found
        lines = [f"{problem}: {path}", f"  expected: {expected}", f"  found: {found}"]
        super().__init__("\n".join([*lines, hint] if hint else lines))


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint at that path, or no such step or item in it."""

    __str__ = Exception.__str__  # OSError's own __str__ formats errno and file name


class CheckpointCorruptError(CheckpointError, ValueError):
    """A checkpoint is there, but a file in it is missing, cut short or unreadable."""


class CheckpointChangedError(CheckpointCorruptError):
    """A checkpoint was written to, or replaced, while it was read: what was read may be a mixture of two."""


class CheckpointLayoutError(CheckpointError, ValueError):
    """The checkpoint is whole, but does not hold what was asked for (no params, several items, ...)."""


class CheckpointTooLargeError(CheckpointError, MemoryError):
    """The arrays are larger than the memory of this machine: a damaged shape, or a model for a bigger one."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """Something is at the path that a checkpoint is to be written to."""

    __str__ = Exception.__str__


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint cannot be written: disk full, a number type that the format lacks, another one half-written."""

    __str__ = Exception.__str__


class CheckpointAccessError(CheckpointError, PermissionError):
    """A path that leads to no data: on a store that is not read, or without the right to read or write it."""

    __str__ = Exception.__str__


class RenameClashError(BridgeError, ValueError):
    """A renaming gives two params one name, or makes one param's path the start of another's."""

    def __init__(self, first: Path, first_new: Path, second: Path, second_new: Path):
        super().__init__(
            f"two params clash after renaming:\n  {show_path(first)} -> {show_path(first_new)}\n"
            f"  {show_path(second)} -> {show_path(second_new)}\n"
            "  expected: a path of its own for each param\n  found: the same path, or one inside the other\n"
            "Change the renaming so that no param's path is, or begins with, another's."
        )


class OptStateOrderError(BridgeError, ValueError):
    """Part of an optimizer state follows the *order* of the params, which renaming changes."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        listed = "\n".join(f"  {show_path(path)}" for path in self.paths)
        super().__init__(
            "the optimizer state holds vectors over all params in key order (optax.flatten), and the\n"
            f"renaming changes that order:\n{listed}\n"
            "  expected: one entry for each param\n  found: one entry for all of them\n"
            "Rename so that the params sort in the same order, or start with a fresh optimizer state."
        )


class VariablesMismatchError(BridgeError, ValueError):
    """Variables do not fit what they are loaded into: one error, with every wrong path, sorted.

    Args:
        missing: paths that the target has and the variables lack.
        unexpected: paths that the variables have and the target lacks.
        wrong_shape: `(path, expected, found)`.
        wrong_dtype: `(path, expected, found)`.
        source: what is loaded ("variables", "checkpoint /tmp/ck").
        target: what it is loaded into ("the model", "the optimizer state").

    >>> error = VariablesMismatchError(missing=[("params", "fc1", "kernel")], unexpected=[("params", "fc_1", "kernel")])
    >>> print(error)
    variables and the model do not match: 1 missing, 1 unexpected
    missing (in the model, not in variables):
      params/fc1/kernel   (did you mean params/fc_1/kernel?)
    unexpected (in variables, not in the model):
      params/fc_1/kernel
    Nothing was changed.
    """

    def __init__(
        self,
        missing: Iterable[Path] = (),
        unexpected: Iterable[Path] = (),
        wrong_shape: Iterable[tuple[Path, Any, Any]] = (),
        wrong_dtype: Iterable[tuple[Path, Any, Any]] = (),
        *,
        source: str = "variables",
        target: str = "the model",
    ):
        self.missing = sorted(missing, key=show_path)
        self.unexpected = sorted(unexpected, key=show_path)
        self.wrong_shape = sorted(wrong_shape, key=lambda row: show_path(row[0]))
        self.wrong_dtype = sorted(wrong_dtype, key=lambda row: show_path(row[0]))
        self.source, self.target = source, target
        super().__init__("\n".join([self._headline(), *self._sections(), "Nothing was changed."]))

    def _headline(self) -> str:
        counts = {
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "wrong shape": len(self.wrong_shape),
            "wrong dtype": len(self.wrong_dtype),
        }
        listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{self.source} and {self.target} do not match: {listed}"

    def _sections(self) -> list[str]:
        lines: list[str] = []
        if self.missing:
            lines.append(f"missing (in {self.target}, not in {self.source}):")
            lines += _with_hints(self.missing, self.unexpected)
        if self.unexpected:
            lines.append(f"unexpected (in {self.source}, not in {self.target}):")
            lines += [f"  {show_path(path)}" for path in self.unexpected]
        for title, rows in (("wrong shape", self.wrong_shape), ("wrong dtype", self.wrong_dtype)):
            if rows:
                lines.append(f"{title}:")
                lines += [f"  {show_path(path)}: expected {want}, found {got}" for path, want, got in rows]
        return lines


def _with_hints(missing: list[Path], unexpected: list[Path]) -> list[str]:
    are_few = len(missing) * len(unexpected) <= _MOST_COMPARISONS
    candidates = list(map(show_path, unexpected)) if are_few else []
    lines = []
    for path in missing:
        close = near_misses(show_path(path), candidates)
        hint = f"   (did you mean {' or '.join(close)}?)" if close else ""
        lines.append(f"  {show_path(path)}{hint}")
    return lines


class UnboundModuleError(BridgeError, ValueError):
    """A module of `bridge.Module` was used that has no variables to work with.

    Attributes:
      kind: the class of that module.
    """

    def __init__(self, kind: type, what: str):
        self.kind, module = kind, kind.__name__
        super().__init__(
            f"{what} of {module}, which is not bound to variables.\n"
            "  expected: a module inside init or apply, made in `setup()` or in a method with `@compact`\n"
            "  found: a module on its own\n"
            f"Call {module}(...).init(rngs, ...) and .apply(variables, ...); to keep it in an NNX module, give it its"
            " variables: .bind(variables)."
        )
