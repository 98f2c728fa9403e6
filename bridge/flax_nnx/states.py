"""States of flax.nnx and of nnx_core, one for the other, and the leaves of whatever has some.

Law: `from_state(to_state(s)) == s`: values are the same arrays, types and metadata cross as `kinds` says.
Knows States, and modules as what has one; knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge.flax_nnx.kinds import to_ours, to_theirs
from nnx_core._errors import Path


def from_state(state: Any) -> nnx.State:
    """An `nnx_core.State` with the values of a State of flax.nnx, in new Variables.

    Args:
      state: a State of flax.nnx, of a module or of an optimizer; nested dicts of its Variables or of arrays will do.

    >>> import nnx_core as nnx
    >>> from flax import nnx as flax_nnx
    >>> state = from_state(flax_nnx.state(flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))))
    >>> type(state["kernel"]) is nnx.Param, state["kernel"].shape
    (True, (2, 3))
    """
    pairs = flax_nnx.to_flat_state(state)
    return nnx.State((path, to_ours(x) if isinstance(x, flax_nnx.Variable) else x) for path, x in pairs)


def to_state(state: Mapping[Hashable, Any]) -> Any:
    """A State of flax.nnx with the values of an `nnx_core.State`, in new Variables; the inverse of `from_state`.

    >>> import nnx_core as nnx
    >>> from flax import nnx as flax_nnx
    >>> state = to_state(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    >>> type(state["kernel"]) is flax_nnx.Param
    True
    """
    pairs = nnx.to_flat_state(state)
    return flax_nnx.from_flat_state([(path, to_theirs(x) if isinstance(x, nnx.Variable) else x) for path, x in pairs])


# ---- what the rooms above ask of objects of flax.nnx ----


def their_state(node: Any) -> Any:
    """The State of a module or an optimizer of flax.nnx."""
    return flax_nnx.state(node)


def their_flat_state(state: Any) -> list[tuple[Path, Any]]:
    """(path, Variable or array) of a State of flax.nnx."""
    return list(flax_nnx.to_flat_state(state))


def map_their_state(f: Callable[[Path, Any], Any], state: Any) -> Any:
    """A State of flax.nnx with f(path, leaf) for each leaf."""
    return flax_nnx.map_state(f, state)
