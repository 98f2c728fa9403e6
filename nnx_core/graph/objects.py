"""Objects: Python objects whose attributes are a graph.

Law: every change of an attribute through Python's own syntax is counted, so a cached plan knows of it; writing
an array over an array is a change of value, not of structure, and is not counted. An object is changed only
under the trace that created it. Objects are JAX pytrees too.
"""

import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Callable, Hashable, Iterable
from typing import Annotated, Any, TypeVar

import jax
import numpy as np

from nnx_core import _trace
from nnx_core._borrowed import Borrowing, current_borrowing
from nnx_core._changes import touch
from nnx_core._errors import TraceError
from nnx_core._foreign import own
from nnx_core._repr import show_fields
from nnx_core._statics import fixed as as_part
from nnx_core._statics import unfixed
from nnx_core._trace import current_trace
from nnx_core.graph._errors import StaticDataError
from nnx_core.state import sorted_keys
from nnx_core.variables import MISSING, Variable, set_trace

T = TypeVar("T")

_DATA, _STATIC = "data", "static"
_CHILD = "child"  # of what JAX put where a child was: data to JAX, whatever it is, and no part of the structure
#: `x: nnx.Data[list[jax.Array]]` and `y: nnx.Static[Config]` mark attributes for every instance.
Data = Annotated[T, _DATA]
Static = Annotated[T, _STATIC]


@dataclasses.dataclass(frozen=True)
class Marked:
    """A value on its way into an attribute, together with how the attribute is to be treated."""

    value: Any
    mark: str


def _mark(mark: str, value: Any, options: dict[str, Any]) -> Any:
    if value is not MISSING and not options:
        return Marked(value, mark)
    if value is not MISSING:
        options["default"] = value
    return dataclasses.field(**options, metadata={**options.pop("metadata", {}), "nnx": mark})


def data(value: Any = MISSING, /, **field_options: Any) -> Any:
    """Mark an attribute as data: its numbers are leaves, not configuration.

    Without a value, or with options of `dataclasses.field`, a field of a dataclass.

    Example:
      >>> import nnx_core as nnx
      >>> class Counter(nnx.Module):
      ...     def __init__(self):
      ...         self.count = nnx.data(0)
      >>> nnx.state(Counter())
      State({'count': 0})
    """
    return _mark(_DATA, value, field_options)


def static(value: Any = MISSING, /, **field_options: Any) -> Any:
    """Mark an attribute as static: part of the graph's structure, compared by value; a hash is used if there is one."""
    return _mark(_STATIC, value, field_options)


def _slot(name: str) -> Any:
    return Object.__dict__[name].__set__


class Object:
    """Base of everything whose attributes are walked: modules, containers, random streams.

    Attributes that are Variables, arrays, other objects, or lists, tuples and dicts of these are data; all
    others (numbers, strings, functions, ...) are static unless marked with `nnx.data`.

    A transform remembers how a module is built, and sees every change that is made by Python's own syntax, also in
    plain lists and dicts, and in configuration. What goes past it, `vars(m)["name"] = ...` or `object.__setattr__`,
    stays unseen until something else of the module changes.

    Raises:
      TraceError: if an attribute is set under another trace than the one that created the object.
    """

    __slots__ = ("__dict__", "__weakref__", "_nnx_marks", "_nnx_plan", "_nnx_trace", "_nnx_version")
    _nnx_marks: dict[str, str]
    _nnx_plan: Any  # the walk of this object, remembered by graph.api while it holds
    _nnx_trace: object
    _nnx_version: int
    _pytree__state: Any  # see set_state_view
    _nnx_class_marks: dict[str, str] = {}  # noqa: RUF012  # replaced, never written, by __init_subclass__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return create(cls)

    def __init_subclass__(cls, *, pytree: bool = True, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        marks = _annotated_marks(cls)
        if marks:
            cls._nnx_class_marks = {**cls._nnx_class_marks, **marks}
        if pytree:
            jax.tree_util.register_pytree_with_keys(
                cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten
            )

    def _nnx_check_can_write(self, name: str | None) -> None:
        """Raise TraceError if this is not the trace to write under; `name` of an attribute, None for an item."""
        trace = self._nnx_trace
        if trace != current_trace():
            raise TraceError(_part(self, name), _trace.locate(self))
        if type(trace) is Borrowing:
            trace.wrote(self, _part(self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._nnx_check_can_write(name)
        if type(value) is Marked:
            value = self._nnx_set_marked(name, value)
        elif isinstance(value, jax.Array) and isinstance(self.__dict__.get(name), jax.Array):
            self.__dict__[name] = value
            return
        elif self._nnx_marks or self._nnx_class_marks:
            self._nnx_require_mark(name, value)
        object.__setattr__(self, name, value)
        touch(self)

    def __delattr__(self, name: str) -> None:
        self._nnx_check_can_write(name)
        object.__delattr__(self, name)
        self._nnx_drop_marks((name,))
        touch(self)

    # ---- marks: of values, which leave with them ----

    def _nnx_set_mark(self, key: Hashable, mark: str) -> None:
        object.__setattr__(self, "_nnx_marks", {**self._nnx_marks, self._nnx_mark_name(key): mark})

    def _nnx_drop_marks(self, keys: Iterable[Hashable]) -> None:
        names = set(map(self._nnx_mark_name, keys)) & self._nnx_marks.keys()
        if names:
            kept = {name: mark for name, mark in self._nnx_marks.items() if name not in names}
            object.__setattr__(self, "_nnx_marks", kept)

    def _nnx_set_marked(self, key: Hashable, marked: Marked) -> Any:
        """Note the mark of a new value; the value itself."""
        require_fitting_mark(self, key, marked)
        self._nnx_set_mark(key, marked.mark)
        return marked.value

    def _nnx_require_mark(self, key: Hashable, value: Any) -> None:
        """A value without a mark takes over that of the value before it, unless that was static and it is data."""
        if self._nnx_mark(key) != _STATIC or not holds_data(value):
            return
        if self._nnx_mark_name(key) not in self._nnx_marks:
            raise _static_data(self, key, value)
        self._nnx_drop_marks((key,))

    # ---- how the walk sees an object; containers have their own ----

    def _nnx_items(self) -> dict[Any, Any]:
        """Key -> child, in the object's own order."""
        return self.__dict__

    def _nnx_storage(self) -> Any:
        """Where items live: `storage[key]` reads and writes one."""
        return self.__dict__

    def _nnx_drop_static(self, changed: dict[Any, Any]) -> None:
        """No value that is data stays marked static."""
        if self._nnx_marks:
            keys = [key for key, x in changed.items() if self._nnx_mark(key) == _STATIC and holds_data(x)]
            self._nnx_drop_marks(keys)

    def _nnx_mark_name(self, key: Hashable) -> Any:
        """The mark of the value under `key` is kept under this string."""
        return key

    def _nnx_mark(self, key: Hashable) -> str | None:
        return self._nnx_marks.get(key) or self._nnx_class_marks.get(key)  # type: ignore[call-overload]

    def _nnx_fill(self, items: dict[Any, Any], marks: Hashable) -> None:
        """Take these items; only ever called on an object that `create` has just made."""
        self.__dict__.update(items)
        if marks:
            object.__setattr__(self, "_nnx_marks", dict(marks))  # type: ignore[call-overload]

    def _nnx_assign(self, changed: dict[Any, Any], removed: tuple[Any, ...]) -> None:
        """Set and remove items, as attribute syntax does, without the trace check."""
        for key in removed:
            self.__dict__.pop(key, None)
        self._nnx_drop_marks(removed)
        self._nnx_drop_static(changed)
        self.__dict__.update(changed)
        touch(self)

    # ---- Python protocols ----

    def __getstate__(self) -> dict[str, Any]:
        return {"items": dict(self._nnx_items()), "marks": tuple(self._nnx_marks.items())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._nnx_fill(state["items"], state["marks"])

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (type(self),), self.__getstate__()

    def __copy__(self) -> Any:
        new = create(type(self))
        new._nnx_fill(dict(self._nnx_items()), tuple(self._nnx_marks.items()))
        return new

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return show_fields(type(self).__name__, [(f"{k}=", v) for k, v in self._nnx_items().items()])


own(Object)


def require_fitting_mark(obj: Object, key: Hashable, marked: Marked) -> None:
    """Raise StaticDataError if a value that is to be static holds data."""
    if marked.mark == _STATIC and holds_data(marked.value):
        raise _static_data(obj, key, marked.value)


def _static_data(obj: Object, key: Hashable, value: Any) -> StaticDataError:
    return StaticDataError(type(obj).__name__, (key,), type(value).__name__)


def _part(obj: Object, name: str | None) -> str:
    part = "an item" if name is None else f"attribute {name!r}"
    return f"{part} of {type(obj).__name__}"


# The slots themselves: no __setattr__ on the way, which would ask for the trace and count a change.
_set_marks, _set_trace, _set_version = map(_slot, ("_nnx_marks", "_nnx_trace", "_nnx_version"))
set_plan: Callable[[Object, Any], None] = _slot("_nnx_plan")
_NO_MARKS: dict[str, str] = {}


def create(kind: type[Any], trace: object = None) -> Any:
    """An object of class `kind` without attributes; no `__init__`. `trace` is `current_trace()`, if known."""
    obj = object.__new__(kind)
    _set_version(obj, 0)
    set_plan(obj, None)
    _set_marks(obj, _NO_MARKS)
    _set_trace(obj, current_trace() if trace is None else trace)
    return obj


def set_state_view(view: Any) -> None:
    """Let `obj._pytree__state` be `view`, a descriptor. A hook: `_compat_paths` has what flax.nnx's clients expect."""
    Object._pytree__state = view


def _annotated_marks(cls: type) -> dict[str, str]:
    marks: dict[str, str] = {}
    for name, annotation in inspect.get_annotations(cls).items():
        mark = getattr(annotation, "__metadata__", (None,))[0]
        if mark in (_DATA, _STATIC):
            marks[name] = mark
        elif isinstance(field := cls.__dict__.get(name), dataclasses.Field) and "nnx" in field.metadata:
            marks[name] = field.metadata["nnx"]
    return marks


def is_array(x: Any) -> bool:
    """Whether `x` is something JAX treats as one array, abstract ones and Refs included."""
    if isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.Ref):
        return True
    # A class has the attributes of its instances: Param is no array, though a Param would be one.
    return hasattr(x, "__jax_array__") and not isinstance(x, Variable | type)


def is_data(value: Any) -> bool:
    """Whether an attribute with this value is data: an array, Variable, object, or a pytree with one inside.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> nnx.is_data([jnp.ones(2)]), nnx.is_data([1, 2])
      (True, False)
    """
    if isinstance(value, (Variable, Object, *_data_types)) or is_array(value):
        return True
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, Variable | Object))
    if len(leaves) == 1 and leaves[0] is value:
        return False
    return any(isinstance(x, Variable | Object) or is_array(x) for x in leaves)


def holds_data(value: Any) -> bool:
    """Whether there is in `value` what JAX has to know of: as `is_data`, but abstract arrays may be configuration."""
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, Variable | Object))
    return any(is_data(x) and not isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


_data_types: list[type] = []


def register_data_type(type_: type[T]) -> type[T]:
    """Say that attributes of this type are data; also a decorator."""
    if type_ not in _data_types:
        _data_types.append(type_)
    return type_


def dataclass(cls: type[Any] | None = None, /, **options: Any) -> Any:
    """`dataclasses.dataclass` for modules; `nnx.data()` and `nnx.static()` are its field specifiers.

    Two modules are the same only if they are one object, as without it.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> @nnx.dataclass
      ... class Scale(nnx.Module):
      ...     factor: nnx.Param
      ...     name: str = nnx.static(default="scale")
      >>> Scale(nnx.Param(jnp.ones(2))).name
      'scale'
    """
    options.setdefault("eq", False)
    options.setdefault("repr", False)
    make = dataclasses.dataclass(**options)
    return make if cls is None else make(cls)


def has_data(value: Any) -> bool:
    """Whether there is any data in `value`, a pytree."""
    return is_data(value)


# ---- pytree: data attributes are children, static ones are part of the treedef ----


def _split_attributes(obj: Object) -> tuple[list[Any], list[Any], tuple[Any, ...]]:
    items = obj._nnx_items()
    keys, children, fixed = [], [], []
    for key in sorted_keys(items):
        mark = obj._nnx_mark(key)
        if mark in (_DATA, _CHILD) or (mark is None and is_data(items[key])):
            keys.append(key)
            children.append(items[key])
        else:
            fixed.append((key, type(items[key]), as_part(items[key])))
    marks = [(key, mark) for key, mark in obj._nnx_marks.items() if mark != _CHILD]
    return keys, children, (tuple(keys), tuple(fixed), tuple(sorted(marks)), tuple(items))


def _flatten(obj: Object) -> tuple[list[Any], Any]:
    if type(obj._nnx_trace) is Borrowing:
        obj._nnx_trace.used(obj)
    _, children, aux = _split_attributes(obj)
    return children, aux


def _flatten_with_keys(obj: Object) -> tuple[list[tuple[Any, Any]], Any]:
    if type(obj._nnx_trace) is Borrowing:
        obj._nnx_trace.used(obj)
    keys, children, aux = _split_attributes(obj)
    return [(_key_entry(obj, k), c) for k, c in zip(keys, children, strict=True)], aux


def _key_entry(obj: Object, key: Any) -> Any:
    if isinstance(key, int):
        return jax.tree_util.SequenceKey(key)
    return jax.tree_util.GetAttrKey(key) if key in obj.__dict__ else jax.tree_util.DictKey(key)


def _unflatten(kind: type[Any], aux: Any, children: Any) -> Any:
    keys, fixed, marks, order = aux
    items = dict(zip(keys, children, strict=True))
    items |= {key: unfixed(part) for key, _, part in fixed}
    obj = create(kind, _borrow(children))
    obj._nnx_fill({key: items[key] for key in order}, marks)
    # JAX puts anything in the place of arrays (axes, shapes, None), and what was a child has to stay one.
    known = {**kind._nnx_class_marks, **obj._nnx_marks}
    names = map(obj._nnx_mark_name, keys)
    others = [name for name, child in zip(names, children, strict=True) if name not in known and not is_data(child)]
    if others:
        _set_marks(obj, {**obj._nnx_marks, **dict.fromkeys(others, _CHILD)})
    return obj


def _borrow(children: Any) -> Borrowing | None:
    """Under a JAX transform: what notices writes to the object that JAX rebuilds with these children.

    The children come first, so those that hold a tracer, or belong to a copy that does, are marked already.
    """
    borrowing = None
    for child in children:
        if isinstance(child, Variable) and isinstance(child._raw_value, jax.core.Tracer):
            borrowing = borrowing or current_borrowing()
            set_trace(child, borrowing)
        elif isinstance(child, Object) and type(child._nnx_trace) is Borrowing:
            borrowing = child._nnx_trace
    return borrowing
