"""What differs between two checkpoints, leaf by leaf, whatever format and layout each has.

Law: nothing is changed or written; a checkpoint does not differ from itself, nor from its own conversion.
Numbers are compared as numbers: NaN equals NaN, -0.0 equals 0.0; integers, booleans, random keys and strings exactly.
Knows sources and expressions over leaves; knows nothing of how a format stores them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bridge._types import Path
from bridge.checkpoint.formats.open import open_source
from bridge.checkpoint.formats.protocol import Source
from bridge.checkpoint.options import MAX_MEMORY, ConversionOptions, LeafRules
from bridge.checkpoint.plan.note import read_note
from bridge.checkpoint.plan.place import metadata_of, place_in
from bridge.checkpoint.plan.plan import plan_of
from bridge.checkpoint.stream import Batch, Progress, batches, host
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.canonical import Form, Parts, Role, take_apart
from bridge.checkpoint.tree.inner import below, outside
from bridge.checkpoint.tree.layout import Kind, Layout, Leaf
from bridge.checkpoint.tree.ops import Op
from bridge.checkpoint.tree.tree import Tree, read_of, reads_of

# Elements that are compared at once: their float64 copies are small beside the leaves.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Difference:
    """One leaf that differs.

    Attributes:
      path: where, in the names that both are compared under.
      what: 'only in a', 'only in b', 'shape', 'dtype' or 'values'.
      a, b: dtype and shape on either side, or the text of two strings; empty where the leaf is absent.
      count: elements that differ by more than the tolerance.
      max_abs: the largest difference among them; infinite against NaN.
      first: index of the first of them.
    """

    path: Path
    what: str
    a: str = ""
    b: str = ""
    count: int = 0
    max_abs: float = 0.0
    first: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DiffReport:
    """The differences between two checkpoints, in their order, and how many leaves were compared.

    `same` is True when there is none. `how` says in words under which names they were compared; `left_out` names the
    items of either that were not.
    """

    a: str
    b: str
    differences: tuple[Difference, ...]
    compared: int
    nbytes: int
    how: str
    left_out: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def diff(
    a: str | FilePath,
    b: str | FilePath,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    raw: bool = False,
    rules: LeafRules | None = None,
    max_memory: int = MAX_MEMORY,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare the checkpoints at `a` and `b`, each of any format.

    Args:
      a, b: as for `open_source`.
      atol, rtol: floating point elements may differ by `atol + rtol * abs(b)`.
      raw: compare the paths as they are. Otherwise leaves are the same ones if they mean the same: boxes, levels
        `value` and the names of model and optimizer do not count, and where one is in Linen's layout and one in NNX's,
        Linen's is compared as what `convert` would make of it.
      rules: from Linen's names to NNX's, as for `convert`; used where the layouts differ.
      max_memory: bytes of leaves in memory at once.
      progress: called as `progress("comparing", bytes done, bytes in all)`.

    Raises:
      CheckpointNotFoundError, CheckpointCorruptError, CheckpointLayoutError: as for `open_source`.

    Example::

        diff("run/linen/12", "run/nnx/12", rules=read_rules("names.toml")).same  # True
    """
    with closing(open_source(a)) as first, closing(open_source(b)) as second:
        left, right, how = _sides(first, second, raw, rules)
        only_a, only_b = left.without(right), right.without(left)
        rows = [Difference(path, "only in a", a=_form(op)) for path, op in only_a.items()]
        rows += [Difference(path, "only in b", b=_form(op)) for path, op in only_b.items()]
        shared = [path for path in left.made if path in right.made]
        nbytes, done = sum(left.leaves[path].nbytes for path in shared), 0
        for batch in batches(left.only(shared), left.leaves, first.tree.leaves, max_memory // 2):
            other = right.batch(batch.leaves)
            read_a, read_b = batch.reader(first.read), other.reader(second.read)
            for path, op in batch.leaves.items():
                rows += _compare(path, op.value(read_a), other.leaves[path].value(read_b), atol, rtol)
            done += sum(left.leaves[path].nbytes for path in batch.leaves)
            if progress is not None:
                progress("comparing", done, nbytes)
        first.require_unchanged()
        second.require_unchanged()
    order = {path: place for place, path in enumerate({**left.made, **right.made})}
    rows.sort(key=lambda row: order[row.path])
    left_out = [f"{source.path}: {item.name}" for source in (first, second) for item in source.around.left_out]
    return DiffReport(str(first.path), str(second.path), tuple(rows), len(shared), nbytes, how, tuple(left_out))


# --- names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One checkpoint under the names it is compared by: how each leaf is made, and its form."""

    source: Source
    made: Mapping[Path, Op]
    leaves: Mapping[Path, Leaf]
    streams: frozenset[Path] = frozenset()

    def without_streams(self) -> _Side:
        return replace(self, made={path: op for path, op in self.made.items() if path not in self.streams})

    def without(self, other: _Side) -> dict[Path, Op]:
        return {path: op for path, op in self.made.items() if path not in other.made}

    def only(self, paths: Iterable[Path]) -> dict[Path, Op]:
        return {path: self.made[path] for path in paths}

    def batch(self, paths: Iterable[Path]) -> Batch:
        """The leaves at `paths` as one batch, however large: the other side's budget chose them."""
        batch = Batch({path: leaf.nbytes for path, leaf in self.source.tree.leaves.items()})
        for path in paths:
            batch.take(path, self.made[path], self.leaves[path].nbytes, budget=sys.maxsize)
        return batch


def _sides(a: Source, b: Source, raw: bool, rules: LeafRules | None) -> tuple[_Side, _Side, str]:
    first, second = _state(a, raw), _state(b, raw)
    if raw or Kind.UNKNOWN in (first.kind, second.kind):
        return _as_stored(a), _as_stored(b), "by the paths as they are stored"
    left, right, how = _state_sides(first, second, rules)
    # Where both have the state at one place, its leaves are called as they are in the whole tree.
    place = first.place if first.place == second.place else ()
    return _whole(left, first, place), _whole(right, second, place), how


@dataclass(frozen=True)
class _State:
    """The training state in a source: where, and it as a tree; `metadata` is what is said of it."""

    source: Source
    place: Path
    tree: Tree
    metadata: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        return self.tree.layout.kind

    def parts(self) -> Parts:
        return take_apart(self.tree, self.tree.layout, read_note(self.metadata).known)


def _state(source: Source, raw: bool) -> _State:
    place = () if raw else place_in(source.tree, source.metadata, None, source.path)
    return _State(source, place, below(source.tree, place), metadata_of(source.metadata, place))


def _state_sides(a: _State, b: _State, rules: LeafRules | None) -> tuple[_Side, _Side, str]:
    """Both states, by paths below their places."""
    parts_a, parts_b = a.parts(), b.parts()
    if parts_a.form.is_nnx == parts_b.form.is_nnx:
        form = parts_a.form if parts_a.form.kind is parts_b.form.kind else _common(parts_a.form)
        return _by_key(a, parts_a, form), _by_key(b, parts_b, form), f"by the names of {form.kind.value}"
    if parts_a.form.is_nnx:
        left, right, converted = _by_key(a, parts_a, parts_a.form), _as_nnx(b, rules, parts_a.form), "b"
    else:
        left, right, converted = _as_nnx(a, rules, parts_b.form), _by_key(b, parts_b, parts_b.form), "a"
    how = f"by NNX's names: {converted} is compared as what `convert` makes of it"
    if getattr(rules, "unproven", ""):
        how += ", by derived rules that are not proven"
    if left.streams and right.streams:
        return left, right, how
    return left.without_streams(), right.without_streams(), how + ", without random streams, which Linen has not"


def _whole(side: _Side, state: _State, place: Path) -> _Side:
    """With the paths of the whole tree, and what is outside of the state as it is stored."""
    if not state.place:
        return side
    leaves = state.source.tree.leaves

    def read(path: Path) -> Op:
        return read_of(leaves[(*state.place, *path)])

    made = {(*place, *path): op.on(read) for path, op in side.made.items()}
    forms = {(*place, *path): leaf for path, leaf in side.leaves.items()}
    for path in outside(state.source.tree, state.place):
        made[path] = read_of(leaves[path])
        forms[path] = leaves[path]
    return _Side(side.source, made, forms, frozenset((*place, *path) for path in side.streams))


def _common(form: Form) -> Form:
    """A form with a place for all that another of its kind may have."""
    return Form(Kind.NNX_TRAINING, ("model",)) if form.is_nnx else Form(Kind.LINEN_TRAIN_STATE)


def _as_stored(source: Source) -> _Side:
    leaves = source.tree.leaves
    return _Side(source, reads_of(leaves), leaves)


def _by_key(state: _State, parts: Parts, form: Form) -> _Side:
    leaves = state.tree.leaves
    return _named(state.source, reads_of(leaves), leaves, parts, form)


def _as_nnx(state: _State, rules: LeafRules | None, form: Form) -> _Side:
    """A Linen checkpoint under the names of an NNX one."""
    options = ConversionOptions(to="nnx", rules=rules, rng="keep", unproven=True)
    plan = plan_of(state.tree, options, state.tree.layout, state.metadata)
    parts = take_apart(plan.target, Layout(plan.target_layout, "planned"), plan.memo.known)
    return _named(state.source, plan.made, plan.target.leaves, parts, form)


def _named(source: Source, made: Mapping[Path, Op], leaves: Mapping[Path, Leaf], parts: Parts, form: Form) -> _Side:
    names = {form.path(key): path for key, path in parts.leaves.items()}
    streams = [form.path(key) for key in parts.leaves if key.role is Role.STREAM]
    ops = {name: made[path] for name, path in names.items()}
    forms = {name: leaves[path] for name, path in names.items()}
    return _Side(source, ops, forms, frozenset(streams))


# --- numbers ------------------------------------------------------------------------------------------------


def _form(op: Op) -> str:
    return f"{op.dtype}{list(op.shape)}"


def _compare(path: Path, a: Any, b: Any, atol: float, rtol: float) -> list[Difference]:
    """The difference of two leaves; an empty list if there is none."""
    (shape_a, dtype_a), (shape_b, dtype_b) = layout.describe(a), layout.describe(b)
    form_a, form_b = f"{dtype_a}{list(shape_a)}", f"{dtype_b}{list(shape_b)}"
    if shape_a != shape_b:
        return [Difference(path, "shape", form_a, form_b)]
    if dtype_a != dtype_b:
        return [Difference(path, "dtype", form_a, form_b)]
    if dtype_a == "str":
        return [] if a == b else [Difference(path, "values", repr(a), repr(b), count=1, max_abs=math.inf)]
    x, y = host(a), host(b)
    count, worst, first = 0, 0.0, None
    for start, part_x, part_y in _chunks(x, y):
        differs, size = _differing(part_x, part_y, atol, rtol)
        if not differs.any():
            continue
        if first is None:
            first = tuple(map(int, np.unravel_index(start + int(np.argmax(differs)), x.shape)))
        count += int(differs.sum())
        worst = max(worst, float(size[differs].max()))
    return [Difference(path, "values", form_a, form_b, count, worst, first)] if count else []


def _chunks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """`(number of the first element, elements of x, elements of y)`, in row-major order and small enough to copy."""
    if x.size <= _AT_ONCE or x.ndim == 0:
        yield 0, x.reshape(-1), y.reshape(-1)
        return
    inner = x.size // len(x)
    rows = max(1, _AT_ONCE // inner)
    for row in range(0, len(x), rows):
        if inner <= _AT_ONCE:
            yield row * inner, x[row : row + rows].reshape(-1), y[row : row + rows].reshape(-1)
            continue
        for start, part_x, part_y in _chunks(x[row], y[row]):
            yield row * inner + start, part_x, part_y


def _differing(x: np.ndarray, y: np.ndarray, atol: float, rtol: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the elements differ by more than the tolerance, and by how much."""
    exact = x.dtype.kind in "biu"
    wide = "complex128" if x.dtype.kind == "c" else "float64"
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = x.astype(wide), y.astype(wide)
        size = np.abs(p - q)
        close = (p == q) | (np.isnan(p) & np.isnan(q))
        close |= np.isfinite(p) & np.isfinite(q) & (size <= atol + rtol * np.abs(q))
    return (x != y) if exact else ~close, np.where(np.isnan(size), np.inf, size)
