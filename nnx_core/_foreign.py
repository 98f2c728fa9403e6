"""Objects of another NNX library (flax.nnx), which are no part of a graph here: recognized by their protocol.

Law: what is recognized is never walked, stored as a value or taken for a pytree in silence: it would be computed with
and not trained, and what it writes would be lost. No library is imported to find out.
Knows classes; knows nothing of graphs. `FromFlax` of `bridge.flax_nnx` is what its error sends users to.
"""

from typing import Any

from nnx_core._errors import NnxError, Path, show_path

#: What classes of flax.nnx have: graph objects of 0.11 and later, of 0.10; `_variable_meta_call` is of their metaclass.
_OF_OBJECTS = ("_pytree__is_pytree", "_graph_node_flatten")
_OF_VARIABLES = "_variable_meta_call"

_known: dict[type, bool] = {}
_own: list[type] = []


def own(*kinds: type) -> None:
    """Say that these classes, and those derived from them, are of this library. A hook for the rooms that have them."""
    _own.extend(kinds)


def is_foreign(kind: type) -> bool:
    """Whether instances of `kind` are graph objects or Variables of another NNX library; remembered by class."""
    known = _known.get(kind)
    if known is None:
        known = _known[kind] = not issubclass(kind, tuple(_own)) and (
            any(hasattr(kind, name) for name in _OF_OBJECTS) or hasattr(type(kind), _OF_VARIABLES)
        )
    return known


class ForeignObjectError(NnxError, TypeError):
    """A module, Variable or random stream of flax.nnx stands where one of this library is expected."""

    def __init__(self, path: Path, found: type):
        library = next((base.__module__ for base in reversed(found.__mro__) if is_foreign(base)), found.__module__)
        super().__init__(
            f"{show_path(path)} is a {found.__qualname__}, of another NNX library ({library}).\n"
            "  expected: a module, Variable or container of nnx_core, whose state is seen and written back\n"
            f"  found: {found.__module__}.{found.__qualname__}, which would be computed with and never updated\n"
            "Wrap a module with bridge.flax_nnx.FromFlax(module). Values alone: bridge.flax_nnx.load(model, source), or"
            " from_state(state) for a State. Random streams: nnx_core.Rngs."
        )


def require_own(x: Any, path: Path = ()) -> Any:
    """`x`, unless it is of another library.

    Raises:
      ForeignObjectError: naming `path`.
    """
    if is_foreign(type(x)):
        raise ForeignObjectError(path, type(x))
    return x
