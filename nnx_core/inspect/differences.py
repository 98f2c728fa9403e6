"""diff: what differs between two models, States or trees of arrays, path by path.

Law: `diff(a, b)` is empty iff a and b agree in paths, types, shapes, dtypes, values, metadata, static attributes and
in what is shared with what; `diff(a, clone(a))` is. Neither is changed, and both may have cycles. Values compare
exactly unless a tolerance is given; NaN equals NaN.
Not everything is told by everything: a State has no static attributes, so against a State only state is compared,
and a bare array (a pure dict) has no Variable type, so against one only the value is.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import jax
import numpy as np

from nnx_core._errors import Path, show_path
from nnx_core._repr import show_array, show_value
from nnx_core.graph.api import state as state_of
from nnx_core.graph.classify import DICT, PYTREE, SEQUENCE, STATE, kind_of
from nnx_core.graph.objects import Object, is_array
from nnx_core.graph.walk import children
from nnx_core.inspect._errors import ToleranceError
from nnx_core.variables import Variable, is_ref

ONLY_A, ONLY_B = "only in a", "only in b"
TYPE, SHAPE, DTYPE, VALUE = "type", "shape", "dtype", "value"
METADATA, STATIC, SHARING = "metadata", "static", "sharing"
KINDS = (ONLY_A, ONLY_B, TYPE, SHAPE, DTYPE, VALUE, METADATA, STATIC, SHARING)


@dataclass(frozen=True)
class Difference:
    """One difference.

    `kind` is one of `only in a`, `only in b`, `type`, `shape`, `dtype`, `value`, `metadata`, `static`, `sharing`;
    `a` and `b` say what each side has, as text (empty where it has nothing). Where values of arrays differ, `count`
    of `size` elements do, by `max_abs` at most (NaN against a number is infinitely far; RNG keys have no distance).
    """

    path: Path
    kind: str
    a: str
    b: str
    max_abs: float | None = None
    count: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        return f"{show_path(self.path)}: {self.kind}: {self.told}"

    @property
    def told(self) -> str:
        """What differs, in words."""
        if self.count is not None:
            most = "" if self.max_abs is None else f", by at most {self.max_abs:.3g}"
            numbers = f": {self.a} -> {self.b}" if self.size == 1 and self.max_abs is not None else ""
            return f"{self.count:,} of {self.size:,} differ{most}{numbers}"
        if self.kind in (ONLY_A, ONLY_B):
            return self.a or self.b
        return f"{self.a} -> {self.b}"


@dataclass(frozen=True)
class Diff(Sequence[Difference]):
    """The differences between two graphs, in walking order: a sequence that is falsy if there are none.

    `str` gives one line a difference; rich prints it as a table.
    """

    differences: tuple[Difference, ...]
    compared: int

    @overload
    def __getitem__(self, index: int) -> Difference: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Difference, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        return self.differences[index]

    def __len__(self) -> int:
        return len(self.differences)

    def of_kind(self, *kinds: str) -> "Diff":
        """Those of these kinds alone."""
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"Diff.of_kind: expected kinds among {list(KINDS)}, found {sorted(unknown)}.")
        return Diff(tuple(x for x in self.differences if x.kind in kinds), self.compared)

    def __str__(self) -> str:
        if not self:
            return f"No differences in {self.compared:,} values."
        rows = [(show_path(x.path), x.kind, x.told) for x in self.differences]
        path, kind = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{p:<{path}}  {k:<{kind}}  {told}" for p, k, told in rows]
        return "\n".join([f"{self._title}:", *(f"  {line}" for line in lines)])

    __repr__ = __str__

    @property
    def _title(self) -> str:
        return f"{len(self)} difference{'s' if len(self) > 1 else ''} in {self.compared:,} values"

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        if not self:
            return Text(str(self), style="green")
        table = Table(title=self._title, title_justify="left")
        for name in ("path", "kind", "difference"):
            table.add_column(name)
        for x in self.differences:
            table.add_row(Text(show_path(x.path)), Text(x.kind), Text(x.told))
        return table


def diff(a: Any, b: Any, *, atol: float = 0.0, rtol: float = 0.0) -> Diff:
    """What differs between `a` and `b`.

    Args:
      a: a module or other object, a State, or any tree of such, of Variables and of arrays of any shape and dtype.
      b: another. If one of them is a State, a dict or a list and the other an object, the states are compared.
      atol: numbers that differ by at most `atol + rtol * abs(b)` are equal; 0.0 compares exactly, and NaN equals
        NaN in either case.
      rtol: see `atol`. Differences are taken in float64.

    Returns:
      A Diff: falsy if there is no difference.

    Raises:
      ToleranceError: if `atol` or `rtol` is negative or not a number.

    Example:
      >>> import nnx_core as nnx
      >>> from nnx_core.inspect.differences import diff
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> other = nnx.clone(model)
      >>> bool(diff(model, other))
      False
      >>> other.bias[1] = 0.5
      >>> other.out_features = 4
      >>> print(diff(model, other))
      2 differences in 11 values:
        bias          value   1 of 3 differ, by at most 0.5
        out_features  static  3 -> 4
    """
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if not (isinstance(tolerance, int | float) and tolerance >= 0):
            raise ToleranceError(name, tolerance)
    if isinstance(a, Object) != isinstance(b, Object) and all(
        isinstance(x, Object) or _is_container(x) for x in (a, b)
    ):
        a, b = (state_of(x) if isinstance(x, Object) else x for x in (a, b))
    comparison = _Comparison(atol, rtol)
    comparison.compare(a, b, ())
    return Diff(tuple(comparison.found), comparison.compared)


def _is_container(x: Any) -> bool:
    return kind_of(x) in (STATE, DICT, SEQUENCE)


class _Comparison:
    """A walk through both graphs at once."""

    def __init__(self, atol: float, rtol: float):
        self.atol, self.rtol = atol, rtol
        self.found: list[Difference] = []
        self.compared = 0
        self._first: tuple[dict[int, Path], dict[int, Path]] = {}, {}  # where each object and Variable was first
        self._pairs: set[tuple[int, int]] = set()
        self._unshared: set[Path] = set()
        self._alive: list[Any] = []  # so that no id is used twice

    def _add(self, path: Path, kind: str, a: str, b: str, **numbers: Any) -> None:
        self.found.append(Difference(path, kind, a, b, **numbers))

    def compare(self, a: Any, b: Any, path: Path, *, fixed: bool = False) -> None:
        """Compare what is at `path` on both sides, and all below it; `fixed` in a static attribute."""
        if self._check_sharing(a, b, path):
            return
        if isinstance(a, Variable) or isinstance(b, Variable):
            self._compare_variables(a, b, path)
        elif is_array(a) and is_array(b):
            self._compare_arrays(a, b, path)
        elif _has_children(a) and _has_children(b):
            if (mismatch := _type_mismatch(a, b)) is not None:
                self._add(path, TYPE, *mismatch)
            self._compare_children(a, b, path, fixed)
        else:
            self._compare_leaves(a, b, path, fixed)

    def _check_sharing(self, a: Any, b: Any, path: Path) -> bool:
        """Report it if only one side was here before, or each at another path; True if this pair was."""
        before = [self._reached(x, path, first) for x, first in zip((a, b), self._first, strict=True)]
        if before[0] != before[1] and not any(path[:i] in self._unshared for i in range(len(path))):
            self._unshared.add(path)  # and so is all below it, which need not be said
            self._add(path, SHARING, *(_shared(p) for p in before))
        if before == [None, None] and not (_has_identity(a) and _has_identity(b)):
            return False
        pair = id(a), id(b)
        seen = pair in self._pairs
        self._pairs.add(pair)
        return seen

    def _reached(self, x: Any, path: Path, first: dict[int, Path]) -> Path | None:
        if not _has_identity(x):
            return None
        self._alive.append(x)
        known = first.setdefault(id(x), path)
        return None if known == path else known

    def _compare_variables(self, a: Any, b: Any, path: Path) -> None:
        if isinstance(a, Variable) and isinstance(b, Variable):
            if type(a) is not type(b):
                self._add(path, TYPE, *_type_names(a, b))
            ours, theirs = a.get_metadata(), b.get_metadata()
            for name in sorted({**ours, **theirs}, key=str):
                if name not in ours or name not in theirs or not _same(ours[name], theirs[name]):
                    texts = (show_value(m[name]) if name in m else "none" for m in (ours, theirs))
                    self._add((*path, name), METADATA, *texts)
        self.compare(_raw(a), _raw(b), path)

    def _compare_children(self, a: Any, b: Any, path: Path, fixed: bool) -> None:
        ours, theirs = dict(children(a)), dict(children(b))
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            below = (*path, key)
            if key not in theirs:
                self._one_sided(ours[key], below, ONLY_A)
            elif key not in ours:
                self._one_sided(theirs[key], below, ONLY_B)
            else:
                configures = isinstance(a, Object) and not any(_is_state(x, key) for x in (a, b))
                self.compare(ours[key], theirs[key], below, fixed=fixed or configures)

    def _one_sided(self, x: Any, path: Path, kind: str) -> None:
        """Each Variable and array below `path`, or what is there if there is none."""
        first = self._first[kind == ONLY_B]
        leaves = list(_leaves(x, path, first))
        for at, leaf in leaves or [(path, x)]:
            text = _summary(leaf)
            self._add(at, kind, *((text, "") if kind == ONLY_A else ("", text)))

    def _compare_leaves(self, a: Any, b: Any, path: Path, fixed: bool) -> None:
        """Numbers, strings, functions: whatever has no shape; or something with shape against something without."""
        self.compared += 1
        if any(is_array(x) or _has_children(x) for x in (a, b)):
            self._add(path, TYPE, _summary(a), _summary(b))
        elif not fixed and type(a) is type(b) and isinstance(a, int | float | complex) and not isinstance(a, bool):
            self._compare_numbers(np.asarray(a), np.asarray(b), path)
        elif not _same(a, b):
            self._add(path, STATIC if fixed else VALUE, show_value(a), show_value(b))

    def _compare_arrays(self, a: Any, b: Any, path: Path) -> None:
        self.compared += 1
        a, b = _read(a), _read(b)
        if a.shape != b.shape:
            self._add(path, SHAPE, _of_shape(a), _of_shape(b))
        if a.dtype != b.dtype:
            self._add(path, DTYPE, str(a.dtype), str(b.dtype))
        if a.shape != b.shape or (a.dtype != b.dtype and (_is_key(a) or _is_key(b))):
            return
        if _is_abstract(a) or _is_abstract(b):
            return
        unread = [_why_unreadable(x) for x in (a, b)]
        if any(unread):  # unknown is not equal
            self._add(path, VALUE, *(why or "readable" for why in unread))
        else:
            self._compare_numbers(a, b, path)

    def _compare_numbers(self, a: Any, b: Any, path: Path) -> None:
        keys = _is_key(a)
        ours, theirs = _host(a), _host(b)
        differs, distance = _distances(ours, theirs, 0.0 if keys else self.atol, 0.0 if keys else self.rtol)
        if keys and ours.ndim > len(a.shape):  # a key is several integers
            differs = differs.any(axis=tuple(range(len(a.shape), ours.ndim)))
        if not differs.any():
            return
        most = None if keys else float(np.max(distance[differs]))
        self._add(path, VALUE, _shown(a), _shown(b), max_abs=most, count=int(differs.sum()), size=int(differs.size))


# ---- what things are ---------------------------------------------------------------------------------------


def _has_identity(x: Any) -> bool:
    return isinstance(x, Object | Variable)


def _has_children(x: Any) -> bool:
    return isinstance(x, Object) or kind_of(x) in (STATE, DICT, SEQUENCE, PYTREE)


def _is_state(x: Any, key: Any) -> bool:
    """Whether an attribute is data, by its mark."""
    return isinstance(x, Object) and x._nnx_mark(key) == "data"


def _type_mismatch(a: Any, b: Any) -> tuple[str, str] | None:
    if type(a) is type(b) or (kind_of(a) in (STATE, DICT) and kind_of(b) in (STATE, DICT)):
        return None
    return _type_names(a, b)


def _type_names(a: Any, b: Any) -> tuple[str, str]:
    """The names of two types; with their modules if they are two of one name."""
    names = [type(x).__name__ for x in (a, b)]
    if names[0] == names[1]:
        names = [f"{type(x).__module__}.{type(x).__qualname__}" for x in (a, b)]
    return names[0], names[1]


def _shared(path: Path | None) -> str:
    return "its own" if path is None else f"shared with {show_path(path)}"


def _summary(x: Any) -> str:
    if isinstance(x, Variable):
        inner = _raw(x)
        return f"{type(x).__name__}({_summary(inner)})" if is_array(inner) else type(x).__name__
    if is_array(x) and hasattr(x, "shape"):
        return f"{x.dtype}{_of_shape(x)}"
    return type(x).__name__ if _has_children(x) else show_value(x)


def _shown(x: Any) -> str:
    """The numbers of an array if they are few, else its dtype and shape."""
    text = show_array(x)
    return text.partition(" ")[2] or text


def _of_shape(x: Any) -> str:
    return f"[{','.join(map(str, x.shape))}]"


def _leaves(x: Any, path: Path, seen: dict[int, Path]) -> Iterator[tuple[Path, Any]]:
    if _has_identity(x):
        if id(x) in seen and seen[id(x)] != path:
            return
        seen[id(x)] = path
    if isinstance(x, Variable) or is_array(x):
        yield path, x
        return
    for key, child in children(x):
        yield from _leaves(child, (*path, key), seen)


def _same(a: Any, b: Any) -> bool:
    """Whether two values without shape are equal; a partial is what it calls, NaN is itself, 1 is not True."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, functools.partial):
        return _same(a.func, b.func) and _same(a.args, b.args) and _same(a.keywords, b.keywords)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and math.isnan(a) and math.isnan(b):
        return True
    try:
        return bool(np.all(a == b))
    except Exception:  # noqa: BLE001  # somebody's `==`: what cannot be said to be equal is reported
        return False


# ---- arrays ------------------------------------------------------------------------------------------------


def _raw(x: Any) -> Any:
    return x.get_raw_value() if isinstance(x, Variable) else x


def _read(x: Any) -> Any:
    """An array; of a Ref its present value, of what only promises to be an array (`__jax_array__`) the array."""
    if is_ref(x):
        return x[...]
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else x.__jax_array__()


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_abstract(x: Any) -> bool:
    """Whether there are no values to compare, by nature."""
    return isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) or x.dtype == jax.dtypes.float0


def _why_unreadable(x: Any) -> str | None:
    """Why the values of an array cannot be compared; None if they can."""
    if isinstance(x, jax.Array) and x.is_deleted():
        return "deleted"
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return "on other hosts"
    return None


def _host(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _distances(a: np.ndarray, b: np.ndarray, atol: float, rtol: float) -> tuple[np.ndarray, np.ndarray]:
    """(which elements differ, by how much) of two arrays of one shape, of any dtypes."""
    if {a.dtype.kind, b.dtype.kind} & set("OSUMm"):
        return np.asarray(a != b), np.full(a.shape, np.inf)  # objects, texts and dates have no distance
    wide = np.dtype("complex128" if "c" in (a.dtype.kind, b.dtype.kind) else "float64")
    x, y = a.astype(wide), b.astype(wide)
    nans = np.isnan(x) & np.isnan(y)
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (x == y) | nans
        if a.dtype == b.dtype and a.dtype.kind in "iu":
            equal = a == b  # float64 does not tell 2**53 from 2**53 + 1
        distance = np.where(equal, 0.0, np.abs(x - y))
        distance = np.where(np.isnan(distance), np.inf, distance)
        allowed = atol + (rtol * np.abs(y) if rtol else 0.0)
        differs = ~equal & ~(distance <= allowed) if atol or rtol else ~equal
    return np.asarray(differs), np.asarray(distance)
