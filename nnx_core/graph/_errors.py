"""Errors of the functions on graphs; one class a mistake."""

from collections.abc import Iterable

from nnx_core._errors import NnxError, Path, show_path, show_paths


class LeafCountError(NnxError, ValueError):
    """A list of leaves of the wrong length."""

    def __init__(self, expected: int, found: int):
        super().__init__(
            f"Incorrect number of leaves: expected {expected}, found {found}.\n"
            "Pass the list that nnx.flatten(..., with_paths=False) gave together with this GraphDef."
        )


class IndexSpaceError(NnxError, ValueError):
    """A GraphDef refers to objects that another one introduced, and they are not known."""

    def __init__(self, missing: int, known: int):
        super().__init__(
            f"The GraphDef refers to object {missing} of its index space, of which {known} are known.\n"
            "Unflatten the GraphDefs of one ref_index in the order they were made, with one index_ref."
        )


class DuplicateVariableError(NnxError, ValueError):
    """A Variable is reached more than once where each path needs its own."""

    def __init__(self, groups: Iterable[list[Path]]):
        rows = "".join(f"\n  ---{show_paths(paths)}" for paths in groups)
        super().__init__(
            f"Found duplicate Variables at paths:{rows}\n  ---\n"
            "Pass allow_duplicates=True to keep them shared, or nnx.clone(...) one of them."
        )


class PopError(NnxError, ValueError):
    """A Variable cannot be removed from where it is."""

    def __init__(self, path: Path, kind: str, container: str):
        super().__init__(
            f"Cannot pop {show_path(path)}, a {kind}: expected it in a module, nnx.List, nnx.Dict or dict, found it"
            f" in a {container}, which would not be the same without it. Nothing was popped.\n"
            "Keep it in an nnx.List or a dict, or leave it out with another filter."
        )


class StaticDataError(NnxError, ValueError):
    """An attribute that is marked static holds data."""

    def __init__(self, owner: str, path: Path, kind: str):
        super().__init__(
            f"Found data in the static attribute {show_path(path)} of {owner}: a {kind}.\n"
            "Mark it with nnx.data(...), or store it without nnx.static(...)."
        )


class ReadOnlyError(NnxError, TypeError):
    """Something is to be written in place, and nothing on the way to it can be written."""

    def __init__(self, path: Path, kind: str):
        super().__init__(
            f"{show_path(path)} cannot be written in place: it is in a {kind}, which cannot be changed.\n"
            "Expected a module, list, dict or Variable on the way. Put it into one, or build a new value."
        )


class ContextError(NnxError, ValueError):
    """An update context that is not there, or is used out of turn."""
