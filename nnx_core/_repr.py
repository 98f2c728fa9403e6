"""Short, readable reprs: nested, indented, arrays as shape and dtype, sizes by kind.

Law: showing never raises and never changes what it shows, whatever state it is in: half initialised, traced,
abstract, donated, cyclic. An object that is reached twice is shown and counted once.
Knows text and sizes; a Variable is what has `_var_metadata`, an object what has `_nnx_items`. What a thing shows
of itself it passes in as (name, value) pairs.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_NUMBERS = 6  # arrays with more are shown as dtype and shape alone
MAX_WIDTH = 100  # what is shorter stays on one line
MAX_ITEMS = 100  # of one container
MAX_TEXT = 1000  # characters of one value that is no part of the graph: a vocabulary, say

#: Kinds that are counted together with all kinds made from them. By name: `kinds` is a room above this one.
GROUPS = ("RngState",)

_SCALAR_TYPE = type(jnp.float32)  # `jnp.float32` is no class of numpy's, and shows as `<class 'jax.numpy.float32'>`
_shown: ContextVar[set[int] | None] = ContextVar("_shown", default=None)


# ---- sizes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeBytes:
    """Number of elements, and of bytes. They add up; zero is falsy; `str` gives `1,234 (4.9 KB)`."""

    size: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, values: Any) -> "SizeBytes":
        """The size of all arrays in a pytree, abstract ones, RNG keys and Refs included."""
        size = total = 0
        for x in jax.tree.leaves(values):
            if hasattr(x, "shape") and hasattr(x, "dtype"):
                count = int(np.prod(x.shape, dtype=np.int64))
                size, total = size + count, total + count * x.dtype.itemsize
        return cls(size, total)

    @classmethod
    def from_array(cls, x: Any) -> "SizeBytes":
        """The size of one array; flax.nnx's name."""
        return cls.of(x)

    def __add__(self, other: "SizeBytes") -> "SizeBytes":
        return SizeBytes(self.size + other.size, self.bytes + other.bytes)

    def __bool__(self) -> bool:
        return bool(self.size)

    def __str__(self) -> str:
        return f"{self.size:,} ({show_bytes(self.bytes)})"

    __repr__ = __str__


def show_bytes(count: int) -> str:
    """Bytes in powers of 1000, as disks and flax.nnx count them.

    >>> show_bytes(999), show_bytes(23_160), show_bytes(8_030_261_248)
    ('999 B', '23.2 KB', '8.0 GB')
    """
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("KB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95 or unit == "TB":  # 999.96 would show as 1000.0
            break
    return f"{size:.1f} {unit}"


def kind_name(kind: type) -> str:
    """The name under which Variables of this type are counted."""
    return next((c.__name__ for c in kind.__mro__ if c.__name__ in GROUPS), kind.__name__)


def sizes_by_kind(values: Iterable[Any]) -> dict[str, SizeBytes]:
    """Kind -> size of all Variables that are reached from `values`, each once, in the order they are reached."""
    found: dict[str, SizeBytes] = {}
    for variable in _variables(values):
        name = kind_name(type(variable))
        found[name] = found.get(name, SizeBytes()) + SizeBytes.of(getattr(variable, "_raw_value", None))
    return found


def _variables(values: Iterable[Any]) -> Iterator[Any]:
    seen: dict[int, Any] = {}  # what was seen stays alive, so that no id is used twice
    stack = list(values)[::-1]
    while stack:
        x = stack.pop()
        if _is_variable(x) or _is_object(x) or isinstance(x, dict | list | tuple):
            if id(x) in seen:
                continue
            seen[id(x)] = x
        if _is_variable(x):
            yield x
        else:
            stack += list(_children(x))[::-1]


def _children(x: Any) -> Iterable[Any]:
    if _is_object(x):
        return x._nnx_items().values()
    if isinstance(x, Mapping):
        return x.values()
    return x if isinstance(x, list | tuple) else ()


def _is_variable(x: Any) -> bool:
    return hasattr(type(x), "_var_metadata")


def _is_object(x: Any) -> bool:
    return hasattr(type(x), "_nnx_items")


def size_note(values: Iterable[Any]) -> str:
    """`Param: 20 (80 B), BatchStat: 4 (16 B), Total: 24 (96 B)`, or nothing."""
    sizes = {kind: size for kind, size in sizes_by_kind(values).items() if size}
    if len(sizes) > 1:
        sizes["Total"] = sum(sizes.values(), SizeBytes())
    return ", ".join(f"{kind}: {size}" for kind, size in sizes.items())


# ---- values ------------------------------------------------------------------------------------------------


def show_value(value: Any) -> str:
    """An array as `float32[2,3]`, with its numbers if they are few; everything else as its repr, if it has one."""
    try:
        return _show(value)
    except Exception as error:  # noqa: BLE001  # a repr is read while something else is wrong: it must not add to that
        return f"<{type(value).__name__} whose repr raised {type(error).__name__}>"


def _show(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.Ref):
        return show_array(value)
    if _is_object(value) or _is_variable(value):
        return _show_once(value)
    if type(value) in (list, tuple, dict) or hasattr(type(value), "_fields"):
        return _show_container(value)
    if hasattr(type(value), "_mapping") and _shown.get() is not None:  # a State in a State: its keys say enough
        return show_fields("", ((f"{key!r}: ", x) for key, x in value.items()), "{}")
    if isinstance(value, _SCALAR_TYPE | np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    text = repr(value)
    if callable(value) and " at 0x" in text and isinstance(name := getattr(value, "__name__", None), str):
        return f"<function {name}>"  # its address says nothing, and differs between two runs
    if "\n" not in text and len(text) > MAX_TEXT:
        return f"{text[:MAX_TEXT]}... ({len(text):,} characters)"
    return text


def show_array(value: Any) -> str:
    """`float32[2,3]`, numbers behind it if they are few and at hand."""
    text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, jax.Ref):
        return f"Ref {text}"
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_deleted():
        return f"{text} deleted"
    return f"{text} {_numbers(value)}".rstrip()


def _numbers(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer) or value.size > MAX_NUMBERS:
        return ""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return ""
    return np.array2string(np.asarray(value), separator=", ").replace("\n", "")


def _show_once(value: Any) -> str:
    shown = _shown.get()
    if shown is None:  # nothing around it: it is the whole
        return repr(value)
    if id(value) in shown:
        return f"{type(value).__name__}(...)"
    shown.add(id(value))
    return repr(value)


def _show_container(value: Any) -> str:
    """A list, tuple or dict: Python's own repr if that is short, else one item a line."""
    with _showing(value) as first:
        if not first:
            return "..."
        if not _is_deep(value) and len(text := repr(value)) <= MAX_WIDTH and "\n" not in text:
            return text
        if hasattr(type(value), "_fields"):
            return show_fields(type(value).__name__, zip((f"{name}=" for name in value._fields), value, strict=True))
        if isinstance(value, dict):
            return show_fields("", ((f"{key!r}: ", x) for key, x in value.items()), "{}")
        text = show_fields("", (("", x) for x in value), "[]" if isinstance(value, list) else "()")
        return f"{text[:-1]},)" if isinstance(value, tuple) and len(value) == 1 and "\n" not in text else text


def _is_deep(value: Any) -> bool:
    """Whether there is something in a container that is shown better than Python's own repr would."""
    seen: dict[int, Any] = {}  # a list may hold itself
    stack = [value]
    while stack:
        x = stack.pop()
        if _is_object(x) or _is_variable(x) or _is_long(x):
            return True
        if isinstance(x, dict | list | tuple) and id(x) not in seen:
            seen[id(x)] = x
            stack += _children(x)
    return False


def _is_long(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not _numbers(x)


@contextlib.contextmanager
def _showing(value: Any) -> Iterator[bool]:
    """Whether `value` is not being shown already, further out."""
    shown = _shown.get()
    if shown is None:
        token = _shown.set({id(value)})
        try:
            yield True
        finally:
            _shown.reset(token)
    elif id(value) in shown:
        yield False
    else:
        shown.add(id(value))
        try:
            yield True
        finally:
            shown.discard(id(value))


# ---- fields ------------------------------------------------------------------------------------------------


def show_fields(name: str, fields: Iterable[tuple[str, Any]], brackets: str = "()") -> str:
    """`name(a=1, b=...)`, one field a line as soon as there is a nested one, sizes of what is inside on the first."""
    fields = list(fields)
    token = _shown.set(set()) if _shown.get() is None else None
    try:
        texts = [(key, show_value(value)) for key, value in fields]
    finally:
        if token is not None:
            _shown.reset(token)
    flat = f"{name}{brackets[0]}{', '.join(key + text for key, text in texts)}{brackets[1]}"
    note = _safe_size_note(fields)
    is_module = bool(note and name and brackets == "()")
    if (len(flat) <= MAX_WIDTH or len(texts) == 1) and "\n" not in flat and not is_module:
        return flat
    body = "\n".join("  " + line.replace("\n", "\n  ") for line in _lines(texts))
    return f"{name}{brackets[0]}{f' # {note}' if note else ''}\n{body}\n{brackets[1]}"


def _safe_size_note(fields: list[tuple[str, Any]]) -> str:
    try:
        return size_note(value for _, value in fields)
    except Exception:  # noqa: BLE001  # as in show_value: half-initialised things have no size to tell
        return ""


def _lines(texts: list[tuple[str, str]]) -> list[str]:
    """The fields, commas between them; of long runs that look alike only the first, of too many only the ends."""
    lines: list[str] = []
    for key, text, more in _runs(texts):
        lines.append(f"{key}{text},")
        if more:
            lines.append(f"# and {more} more like this")
    if len(lines) > MAX_ITEMS:
        half = MAX_ITEMS // 2
        lines = [*lines[:half], f"# and {len(lines) - 2 * half} more", *lines[-half:]]
    last = max((i for i, line in enumerate(lines) if not line.startswith("# and ")), default=None)
    if last is not None:
        lines[last] = lines[last][:-1]
    return lines


def _runs(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str, int]]:
    """(key, text, how many more look the same); only numbered ones, and no plain numbers: layers."""
    i = 0
    while i < len(texts):
        key, text = texts[i]
        end = i + 1
        if _is_numbered(key) and text.endswith((")", "}", "]")):
            while end < len(texts) and _is_numbered(texts[end][0]) and texts[end][1] == text:
                end += 1
        more = end - i - 1 if end - i > 2 else 0
        yield key, text, more
        i = i + 1 + more


def _is_numbered(key: str) -> bool:
    return not key or key.removesuffix(": ").isdigit()
