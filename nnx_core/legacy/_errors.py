"""What can go wrong in the first-generation API only.

Law: as in `nnx_core._errors`: one class per mistake, also the builtin a caller would expect, and what to do.
"""

from collections.abc import Iterable

from nnx_core._errors import MissingRngError, NnxError, Path, show_path


class CollectionError(NnxError, TypeError):
    """A collection is not named by a string."""

    def __init__(self, found: object):
        super().__init__(
            f"A collection is named by a string, such as 'batch_stats'; found {type(found).__name__}.\n"
            "The name comes first: nnx.var('batch_stats', value); parameters are nnx.param(value)."
        )


class NotAStateError(NnxError, TypeError):
    """Something that is no State was given where one is needed."""

    def __init__(self, function: str, found: object):
        super().__init__(
            f"{function} expects States, found {type(found).__name__}.\n"
            "Pass them one by one, without the ModuleDef: state, moduledef = module.split(), then"
            f" {function}(state)."
        )


class SubmoduleDefError(NnxError, ValueError):
    """The ModuleDef of a submodule was merged by itself."""

    def __init__(self, kind: type, path: Path):
        super().__init__(
            f"This ModuleDef describes {show_path(path)} ({kind.__name__}) as a part of a whole, whose references by"
            " index it may hold.\nMerge the ModuleDef that split returned, or split the submodule itself:"
            f" state, moduledef = {show_path(('module', *path))}.split()."
        )


class MissingStreamError(MissingRngError, ValueError):
    """A Context has neither the stream asked for nor a default one."""

    def __init__(self, name: str, streams: Iterable[str]):
        super().__init__(name, streams)
        self.text = (
            f"This Context has no stream {name!r} and no default one; found {sorted(streams)}.\n"
            f"Create it with nnx.Context(..., {name}=key), or nnx.Context(key) for a default."
        )


class ContextError(NnxError, TypeError):
    """A layer was given something else where it needs a Context."""

    def __init__(self, layer: str, found: object):
        super().__init__(
            f"{layer}(..., ctx=...) expects a Context, found {type(found).__name__}.\nPass ctx=nnx.Context(key)."
        )
