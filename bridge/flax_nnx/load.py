"""load: the values of a model of one library into a model of the other, of the same architecture.

Law: strict unless asked otherwise: what is missing, unexpected, of another shape or dtype is one error that lists all
paths, and nothing is written then. What is written goes into the Variables that are there. Loading there and back is
the identity. Where a layer is laid out otherwise, `_plain` (tuples as keys) and `_ZEROS` (a bias) say how, once.
Knows leaves and paths; knows nothing of how models are made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge.flax_nnx._errors import NotLoadableError, StateMismatchError
from bridge.variables.load import place
from nnx_core._errors import Path

#: Path prefixes of the source -> path prefixes in the target, the longest that fits wins; or a function of the path.
Rename = Mapping[Any, Any] | Callable[[Path], tuple[Hashable, ...]]

#: Parameters that one library has and the other computes without; zero is what the other computes with.
_ZEROS = frozenset({"hn_bias"})  # of GRUCell: flax.nnx has no bias on the recurrent side


@dataclass(frozen=True)
class TransferReport:
    """What `load` did; paths as in the target, keys as strings.

    Attributes:
      loaded: what was written.
      missing: what the target has and the source lacks, left as it was.
      left_out: random state of the source that the target has no place for: versions of flax keep it in other places.
    """

    loaded: tuple[Path, ...] = ()
    missing: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()


class _Leaf:
    """One value of a model or State, and how it is written."""

    def __init__(self, path: Path, x: Any):
        self.path, self.variable = path, x
        self.is_variable = isinstance(x, nnx.Variable | flax_nnx.Variable)

    @property
    def value(self) -> Any:
        raw = self.variable.get_raw_value() if self.is_variable else self.variable
        return raw[...] if isinstance(raw, jax.Ref) else raw

    @property
    def is_random_state(self) -> bool:
        if self.is_variable:
            return isinstance(self.variable, nnx.RngState | flax_nnx.RngState)
        return _is_key(self.value)

    @property
    def is_required(self) -> bool:
        transient = nnx.Intermediate | flax_nnx.Intermediate
        return not self.is_random_state and not isinstance(self.variable, transient)


def load(target: Any, source: Any, *, strict: bool = True, rename: Rename | None = None) -> TransferReport:
    """Write the values of `source` into `target`, in place: models, States and optimizers of both libraries.

    Either may be a module or an `Optimizer` of nnx_core or of flax.nnx, or a State of one; the source also nested dicts
    of arrays, as checkpoints hold them, with `{"value": array}` for Variables where an old one has that. Integer keys
    and their digits are the same key, and so are the tuples that flax.nnx's WeightNorm and SpectralNorm have as keys.
    Random state and intermediates are loaded where given, and never missed.

    Args:
      target: what is written to.
      source: where the values come from; not changed.
      strict: raise unless everything fits; else load what fits.
      rename: path prefixes of the source (`"encoder/0"` or tuples) and what they are in the target.

    Raises:
      StateMismatchError: with `strict`, listing all that does not fit; nothing has been written then.
      NotLoadableError: if one of the two has no state.

    >>> import nnx_core as nnx
    >>> from flax import nnx as flax_nnx
    >>> ours = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> theirs = flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(1))
    >>> report = load(ours, theirs)
    >>> report.loaded, bool((ours.kernel[...] == theirs.kernel[...]).all())
    ((('bias',), ('kernel',)), True)
    """
    targets = _leaves_of(target, "the target", lambda path: path)
    sources = _leaves_of(source, "the source", _renaming(rename))
    writes: list[tuple[Path, _Leaf, Any]] = []
    different: list[tuple[Path, object, object]] = []
    unexpected: list[Path] = []
    left_out: list[Path] = []
    for path, leaf in sources.items():
        goal = targets.get(path)
        if goal is None:
            if leaf.is_random_state or not leaf.is_required:
                left_out.append(path)
            elif not _may_be_absent(path, leaf.value):
                unexpected.append(path)
            continue
        value = _as_key(leaf.value, goal.value)
        expected, found = _form(goal.value), _form(value)
        if expected != found:
            different.append((path, expected, found))
        else:
            writes.append((path, goal, value))
    missing = [path for path, goal in targets.items() if path not in sources and goal.is_required]
    zeros = [path for path in missing if path[-1] in _ZEROS and not _is_empty(sources)]
    missing = [path for path in missing if path not in zeros]
    if strict and (missing or unexpected or different):
        raise StateMismatchError(missing, unexpected, different)
    writes += [(path, targets[path], jnp.zeros_like(targets[path].value)) for path in zeros]
    _write(target, writes)
    return TransferReport(tuple(path for path, _, _ in writes), tuple(missing), tuple(left_out))


# ---- leaves ----


def _leaves_of(node: Any, role: str, rename: Callable[[Path], Path]) -> dict[Path, _Leaf]:
    leaves: dict[Path, _Leaf] = {}
    for path, x in _pairs_of(node, role):
        leaves[rename(_plain(path, x))] = _Leaf(path, x)
    return leaves


def _pairs_of(node: Any, role: str) -> list[tuple[Path, Any]]:
    if isinstance(node, nnx.Object | nnx.State):
        return list(nnx.to_flat_state(nnx.state(node) if isinstance(node, nnx.Object) else node))
    if isinstance(node, flax_nnx.Pytree):
        node = flax_nnx.state(node)
    if isinstance(node, flax_nnx.State | Mapping):
        return list(_nested(node, ()))
    raise NotLoadableError(role, node)


def _nested(tree: Any, path: Path) -> list[tuple[Path, Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [pair for key, child in tree.items() for pair in _nested(child, (*path, key))]


def _plain(path: Path, x: Any) -> Path:
    """`path` with strings for integers, tuples taken apart, and without the "value" of an old State's leaf."""
    keys: list[str] = []
    for key in path:
        keys += map(str, key) if isinstance(key, tuple) else [str(key)]
    is_variable = isinstance(x, nnx.Variable | flax_nnx.Variable)
    if not is_variable and len(keys) > 1 and keys[-1] in ("value", "raw_value"):
        keys.pop()
    return tuple(keys)


def _renaming(rename: Rename | None) -> Callable[[Path], Path]:
    if rename is None:
        return lambda path: path
    if callable(rename):
        return lambda path: tuple(map(str, rename(path)))
    rules = {_keys(old): _keys(new) for old, new in rename.items()}
    lengths = sorted({len(old) for old in rules}, reverse=True)

    def apply(path: Path) -> Path:
        for length in lengths:
            if path[:length] in rules and len(path) >= length:
                return (*rules[path[:length]], *path[length:])
        return path

    return apply


def _keys(path: Any) -> Path:
    if isinstance(path, str):
        return tuple(path.split("/")) if path else ()
    return tuple(map(str, path))


# ---- values ----


def _form(value: Any) -> str:
    if not hasattr(value, "shape"):
        return str(jax.tree.map(lambda x: str(jnp.result_type(x)), value))
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _as_key(value: Any, goal: Any) -> Any:
    """`value` as a typed key where one is wanted and the data of one is given, as checkpoints hold it."""
    if not _is_key(goal) or _is_key(value) or str(getattr(value, "dtype", "")) != "uint32":
        return value
    return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(goal))


def _may_be_absent(path: Path, value: Any) -> bool:
    """Whether the other library computes the same without this parameter."""
    return path[-1] in _ZEROS and not isinstance(value, jax.core.Tracer) and not np.any(np.asarray(value))


def _is_empty(leaves: Mapping[Path, _Leaf]) -> bool:
    return not any(leaf.is_required for leaf in leaves.values())


def _write(target: Any, writes: list[tuple[Path, _Leaf, Any]]) -> None:
    arrays: list[tuple[Path, Any]] = []
    for _, goal, _ in writes:
        if isinstance(goal.variable, nnx.Variable):
            goal.variable._check_can_write()  # all of them first, so that a call that raises has written nothing
    for _, goal, value in writes:
        value = place(value, goal.value)
        if not goal.is_variable:
            arrays.append((goal.path, value))
        elif isinstance(goal.variable, nnx.Variable):
            goal.variable.overwrite(value)
        elif isinstance(goal.variable.get_raw_value(), jax.Ref):
            goal.variable.get_raw_value()[...] = value
        else:
            goal.variable.set_raw_value(value)
    if arrays:
        _write_arrays(target, arrays)


def _write_arrays(target: Any, arrays: list[tuple[Path, Any]]) -> None:
    if isinstance(target, nnx.Object):
        nnx.update(target, nnx.from_flat_state(arrays))
    elif isinstance(target, flax_nnx.Pytree):
        flax_nnx.update(target, flax_nnx.from_flat_state(arrays))
    else:
        for path, value in arrays:
            level = target
            for key in path[:-1]:
                level = level[key]
            level[path[-1]] = value
