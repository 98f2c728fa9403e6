"""A Variable is a named place that holds one value: an array, or a pytree of arrays.

Law: identity matters, not equality; a Variable is written only under the trace that created it; metadata is
inert: it never touches the value, needs no mesh, and every change of it is counted (`_changes`).
Knows nothing of objects, paths or transforms.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Generic, TypeVar

import jax

from nnx_core import _trace
from nnx_core._axis_names import insert_name, remove_name
from nnx_core._borrowed import Borrowing
from nnx_core._changes import touch
from nnx_core._errors import InPlaceError, TraceError
from nnx_core._foreign import is_foreign, own, require_own
from nnx_core._in_place import fitted_part, written
from nnx_core._repr import show_fields
from nnx_core._statics import freeze_metadata, thaw_metadata
from nnx_core._trace import Site, caller, current_trace, show_site
from nnx_core.modes import var_defaults

A = TypeVar("A")
V = TypeVar("V", bound="Variable[Any]")

MISSING: Any = type("MISSING", (), {"__repr__": lambda self: "MISSING"})()

#: Older names of the one key that holds axis names, newest first; read and written as that key.
AXIS_NAMES = "out_sharding"
#: Axis names of an optimizer's moments, where they are others than the parameter's.
OPTIMIZER_AXIS_NAMES = "optimizer_sharding"
#: Whether this Variable and the moments made from it are placed; if absent, the default decides.
EAGER_SHARDING = "eager_sharding"
_OLD_KEYS = {"sharding_names": AXIS_NAMES, "sharding": AXIS_NAMES}
_HOOKS = ("on_create_value", "on_get_value", "on_set_value", "on_add_axis", "on_remove_axis")
_SLOTS = ("_raw_value", "_var_metadata", "_trace_state", "_nnx_version", "_site")


def current_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `metadata` with axis names under the key of today; of several, what the newest key says counts.

    >>> current_keys({"sharding": ("a",), "unit": "m"})
    {'out_sharding': ('a',), 'unit': 'm'}
    """
    names = [metadata[key] for key in (AXIS_NAMES, *_OLD_KEYS) if metadata.get(key) is not None]
    new = {_OLD_KEYS.get(key, key): x for key, x in metadata.items()}
    if names:
        new[AXIS_NAMES] = names[0]
    return new


@dataclass(frozen=True)
class VariableMetadata(Generic[A]):
    """A value together with the metadata its Variable shall have; what `with_metadata` initializers return."""

    raw_value: A
    on_set_value: Any = ()
    on_get_value: Any = ()
    on_create_value: Any = ()
    on_add_axis: Any = ()
    on_remove_axis: Any = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all_metadata(self) -> dict[str, Any]:
        """The metadata, hooks included, as a Variable keeps it."""
        return {**{name: hook for name in _HOOKS if (hook := getattr(self, name)) != ()}, **self.metadata}


class Variable(Generic[A]):
    """A place that holds one value, with metadata; the state of modules is made of these.

    Args:
      value: an array of any shape and dtype, or a pytree of arrays.
      ref: hold the value in a `jax.Ref`, which JAX mutates in place.
      eager_sharding: whether the value goes where its axis names say, kept as metadata; None leaves
        it to `use_eager_sharding`.
      **metadata: anything hashable; `out_sharding` names the value's axes. `on_get_value`,
        `on_set_value`, `on_create_value`, `on_add_axis` and `on_remove_axis` are hooks.

    Raises:
      TraceError: on a write under another trace than the one that created the Variable.
      WriteError: if `v[...] = x` or `v[i] = x` does not fit the shape and dtype of what is there.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> v = nnx.Param(jnp.ones((2, 3)), out_sharding=("in", "out"))
      >>> v[...] = v * 2
      >>> v.shape, float(v.sum()), v.out_sharding
      ((2, 3), 12.0, ('in', 'out'))
    """

    __slots__ = (*_SLOTS, "__weakref__")
    _raw_value: A
    _var_metadata: dict[str, Any]
    _trace_state: object
    _nnx_version: int
    _site: Site  # where `__init__` was called; what unpickling, merge and transforms make has none

    def __init__(
        self,
        value: A | VariableMetadata[A],
        *,
        hijax: bool | None = None,
        ref: bool | None = None,
        eager_sharding: bool | None = None,
        **metadata: Any,
    ):
        del hijax  # flax.nnx's switch; here there is one kind of Variable
        if isinstance(value, VariableMetadata):
            metadata = {**value.all_metadata, **metadata}
            value = value.raw_value
        elif isinstance(value, Variable):
            metadata = {**value._var_metadata, **metadata}
            value = value._raw_value
        elif is_foreign(type(value)):
            require_own(value, (type(self).__name__,))
        if eager_sharding is not None:
            metadata[EAGER_SHARDING] = eager_sharding
        _fill(self, value, {_OLD_KEYS.get(k, k): v for k, v in metadata.items()} if metadata else {})
        ref = var_defaults().ref if ref is None else ref
        created = _placed(self, self.create_value(value))
        _set_raw(self, jax.new_ref(created) if ref else created)
        _set_site(self, caller())

    # ---- value ----

    def _check_can_write(self) -> None:
        trace = self._trace_state
        if trace != current_trace():
            raise TraceError(self._describe(), _trace.locate(self), show_site(getattr(self, "_site", None)))
        if type(trace) is Borrowing:
            trace.wrote(self, self._describe())

    def _describe(self) -> str:
        return f"{type(self).__name__}{_shape_text(self._raw_value)}"

    def create_value(self, value: A) -> A:
        """`value` after the `on_create_value` hooks."""
        return self._run_hooks("on_create_value", value)

    def get_value(self, *, index: Any = MISSING) -> A:
        """The value after the `on_get_value` hooks; `index` reads a part of it."""
        raw = self._raw_value
        if type(self._trace_state) is Borrowing:
            self._trace_state.used(self)
        if is_ref(raw):
            raw = raw[...] if index is MISSING else raw[index]
            index = MISSING
        value = self._run_hooks("on_get_value", raw)
        return value if index is MISSING or index is ... else value[index]

    def set_value(self, value: A, *, index: Any = MISSING) -> None:
        """Replace the value, or with `index` write into it, after the `on_set_value` hooks.

        With an index (`...` for all of it), and always in a `jax.Ref`, shape, dtype and devices stay, as in
        numpy: `value` is broadcast and cast. What does not fit raises WriteError.
        """
        if isinstance(value, Variable) or (is_foreign(type(value)) and hasattr(value, "get_value")):
            value = value.get_value()
        elif is_foreign(type(value)):
            require_own(value, ("value",))
        raw = self._raw_value
        if is_ref(raw):  # may be written under any trace: that is what it is for
            self._write_ref(raw, ... if index is MISSING else index, self._run_hooks("on_set_value", value))
            return
        self._check_can_write()
        value = self._run_hooks("on_set_value", value)
        _set_raw(self, value if index is MISSING else written(raw, index, value, self._where))

    def _write_ref(self, ref: Any, index: Any, value: Any) -> None:
        ref[index] = fitted_part(ref.shape, ref.dtype, index, value, self._where)

    def _where(self) -> str:
        path = _trace.locate(self)
        return self._describe() if path is None else f"{self._describe()} at {path}"

    value = property(get_value, set_value, doc="The value; the same as `v[...]`.")

    def get_raw_value(self) -> A:
        """The stored value, without hooks (a `jax.Ref` for ref Variables)."""
        if type(self._trace_state) is Borrowing:
            self._trace_state.used(self)
        return self._raw_value

    def set_raw_value(self, value: A, *, _unsafe_bypass_check: bool = False) -> None:
        """Store `value` without hooks."""
        if not _unsafe_bypass_check:
            self._check_can_write()
        _set_raw(self, value)

    raw_value = property(get_raw_value, set_raw_value)

    def overwrite(self, value: A) -> None:
        """Store `value` without hooks: in the `jax.Ref` of this Variable, if it has one and `value` is none."""
        self._check_can_write()
        if is_ref(self._raw_value) and not is_ref(value):
            self._write_ref(self._raw_value, ..., value)
        else:
            _set_raw(self, value)

    def copy_from(self, other: "Variable[A]") -> None:
        """Take value and metadata of `other`, which must be of the same type."""
        if type(other) is not type(self):
            raise ValueError(f"Expected a {type(self).__name__}, found a {type(other).__name__}.")
        self.update_from_state(other)

    def update_from_state(self, variable_state: "Variable[A]") -> None:
        """Take value and metadata of `variable_state`."""
        self.overwrite(variable_state._raw_value)
        if self._var_metadata != variable_state._var_metadata:
            object.__setattr__(self, "_var_metadata", dict(variable_state._var_metadata))
            touch(self)

    def _run_hooks(self, name: str, value: Any) -> Any:
        for hook in _hooks(self, name):
            value = hook(self, value)
        return value

    # ---- metadata ----

    @property
    def type(self) -> type["Variable[A]"]:
        """The class of this Variable."""
        return type(self)

    var_type = type

    @property
    def has_ref(self) -> bool:
        """Whether the value lives in a `jax.Ref`."""
        return is_ref(self._raw_value)

    ref = has_ref
    hijax = property(lambda self: False, doc="Whether this is flax.nnx's other kind of Variable: there is none here.")

    def get_metadata(self, name: str | None = None, default: Any = MISSING, **_: Any) -> Any:
        """All metadata as a new dict, or the one called `name`."""
        if name is None:
            return dict(self._var_metadata)
        value = self._var_metadata.get(_OLD_KEYS.get(name, name), default)
        if value is MISSING:
            raise KeyError(f"{type(self).__name__} has no metadata {name!r}; it has {sorted(self._var_metadata)}.")
        return value

    def set_metadata(self, *args: Any, **metadata: Any) -> None:
        """`set_metadata(a=1)` or `set_metadata("a", 1)` add or replace; `set_metadata({...})` replaces all."""
        new = dict(self._var_metadata)
        if len(args) == 1 and not metadata:
            new = dict(args[0])
        elif len(args) == 2 and not metadata:
            new[args[0]] = args[1]
        elif not args:
            new.update(metadata)
        else:
            raise TypeError("set_metadata takes one mapping, a name and a value, or keywords.")
        self._check_can_write()
        object.__setattr__(self, "_var_metadata", {_OLD_KEYS.get(k, k): v for k, v in new.items()})
        touch(self)

    def has_metadata(self, name: str) -> bool:
        """Whether there is metadata called `name`."""
        return _OLD_KEYS.get(name, name) in self._var_metadata

    def del_metadata(self, name: str) -> None:
        """Remove the metadata called `name`."""
        self._check_can_write()
        new = dict(self._var_metadata)
        if new.pop(_OLD_KEYS.get(name, name), MISSING) is MISSING:
            raise KeyError(f"{type(self).__name__} has no metadata {name!r}; it has {sorted(new)}.")
        object.__setattr__(self, "_var_metadata", new)
        touch(self)

    @property
    def sharding_names(self) -> Any:
        """The axis names (metadata `out_sharding`), None if there are none."""
        return self.get_metadata(AXIS_NAMES, None)

    def add_axis(self, axis_index: int, axis_name: Any = None) -> None:
        """Say that the value gets a new axis at `axis_index` (of the value that has it)."""
        self._rename(insert_name, axis_index, axis_name)
        for hook in _hooks(self, "on_add_axis"):
            hook(self, axis_index, axis_name)

    def remove_axis(self, axis_index: int, axis_name: Any = None) -> None:
        """Say that the value loses its axis `axis_index`; the inverse of `add_axis`."""
        self._rename(remove_name, axis_index)
        for hook in _hooks(self, "on_remove_axis"):
            hook(self, axis_index, axis_name)

    def _rename(self, change: Callable[..., Any], *axis: Any) -> None:
        for key in (AXIS_NAMES, OPTIMIZER_AXIS_NAMES):
            if (names := self._var_metadata.get(key)) is not None:
                self.set_metadata(key, change(names, *axis))

    # ---- copies ----

    def replace(self, value: Any = MISSING, **updates: Any) -> "Variable[Any]":
        """A new Variable of this type with another value or other metadata."""
        updates.pop("_copy_ref", None)
        if isinstance(value, Variable):
            updates = {**value._var_metadata, **updates}
            value = value._raw_value
        value = self._raw_value if value is MISSING else value
        metadata = {**self._var_metadata, **{_OLD_KEYS.get(k, k): v for k, v in updates.items()}}
        return new_variable(type(self), value, metadata)

    copy = to_state = replace  # States hold Variables themselves

    @classmethod
    def from_metadata(cls, value: A, attributes: Mapping[str, Any]) -> "Variable[A]":
        """A Variable of this class from a raw value and metadata; no hooks run."""
        return new_variable(cls, value, current_keys(attributes))

    def __getstate__(self) -> dict[str, Any]:
        return {"_raw_value": self._raw_value, "_var_metadata": dict(self._var_metadata)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        _fill(self, state["_raw_value"], current_keys(state["_var_metadata"]))

    def __copy__(self: V) -> V:
        return new_variable(type(self), self._raw_value, dict(self._var_metadata))

    def __deepcopy__(self: V, memo: dict[int, Any]) -> V:
        value = self._raw_value
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            memo[id(value)] = jax.numpy.copy(value)  # in a trace, JAX's own deep copy of a key from outside fails
        new: V = type(self).__new__(type(self))
        memo[id(self)] = new  # before what is in it, which may lead back here
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    # ---- Python protocols ----

    def __getattr__(self, name: str) -> Any:
        if name in _SLOTS or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # not filled yet (copy, pickle), or a protocol the value must not lend
        metadata = self._var_metadata
        key = name if name in metadata else name if name == "sharding" else _OLD_KEYS.get(name, name)
        if key in metadata:
            return metadata[key]
        try:
            return getattr(self.get_value(), name)
        except AttributeError:
            if name in late_answers:
                return late_answers[name](self)
            raise AttributeError(
                f"{type(self).__name__} has no attribute or metadata {name!r}, and neither has its value."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SLOTS and not hasattr(type(self), name):
            raise AttributeError(
                f"Cannot set attribute {name!r} of {type(self).__name__}. Write the value with v[...] = x,"
                f" metadata with v.set_metadata({name}=...)."
            )
        object.__setattr__(self, name, value)
        if name == "__class__":  # what kind of Variable it is belongs to the structure
            touch(self)

    def __getitem__(self, key: Any) -> Any:
        return self.get_value(index=key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set_value(value, index=key)

    # Above numpy's: `np.log(2) * v` is `v.__rmul__`, which traces, and not numpy's product of `np.asarray(v)`.
    __array_priority__ = 100

    def __jax_array__(self) -> Any:
        return self.get_value()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_value()(*args, **kwargs)  # type: ignore[operator]  # values may be callables

    def __len__(self) -> int:
        return len(self.get_value())  # type: ignore[arg-type]  # as the value allows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.get_value())  # type: ignore[call-overload]  # as the value allows

    def __contains__(self, item: Any) -> bool:
        return item in self.get_value()  # type: ignore[operator]  # as the value allows

    def __repr__(self) -> str:
        raw = getattr(self, "_raw_value", MISSING)  # MISSING before `__init__` has run: in a debugger, in an error
        metadata = getattr(self, "_var_metadata", {})
        return show_fields(type(self).__name__, [("", raw), *((f"{k}=", v) for k, v in metadata.items())])

    __hash__ = None  # type: ignore[assignment]  # == is elementwise, as for arrays


own(Variable)
_set_raw = Variable._raw_value.__set__  # type: ignore[attr-defined]  # the slot itself: no __setattr__ on the way
_set_metadata = Variable._var_metadata.__set__  # type: ignore[attr-defined]
_set_trace = Variable._trace_state.__set__  # type: ignore[attr-defined]
_set_version = Variable._nnx_version.__set__  # type: ignore[attr-defined]
_set_site = Variable._site.__set__  # type: ignore[attr-defined]
get_raw = operator.attrgetter("_raw_value")
#: What each Variable answers where its metadata and its value do not. A hook: `legacy`, rooms above, knows collections.
late_answers: dict[str, Callable[[Variable[Any]], Any]] = {}
set_raw: Callable[[Variable[Any], Any], None] = _set_raw
set_trace: Callable[[Variable[Any], object], None] = _set_trace


#: How the value of a new Variable gets to its devices: (variable, value) -> value.
PlaceValue = Callable[[Variable[Any], Any], Any]


def _where_it_is(variable: Variable[Any], value: Any) -> Any:
    return value


_placed: PlaceValue = _where_it_is


def place_new_values_with(place: PlaceValue) -> None:
    """Let `place` move the value of every new Variable. A hook: `sharding`, rooms above, knows meshes."""
    global _placed
    _placed = place


def _fill(variable: Variable[Any], value: Any, metadata: dict[str, Any], trace: object = None) -> None:
    _set_raw(variable, value)
    _set_metadata(variable, metadata)
    _set_trace(variable, current_trace() if trace is None else trace)
    _set_version(variable, 0)


def new_variable(kind: type[V], value: Any, metadata: dict[str, Any], trace: object = None) -> V:
    """A Variable of class `kind` as it is: no hooks, no `__init__`. `metadata` is not copied.

    `trace` is `current_trace()`, for callers that make many.
    """
    variable = kind.__new__(kind)
    # As `_fill`, without its call: `merge` and the trace of every transform make one for each Variable of a model.
    _set_raw(variable, value)
    _set_metadata(variable, metadata)
    _set_trace(variable, current_trace() if trace is None else trace)
    _set_version(variable, 0)
    return variable


def set_metadata_dict(variable: Variable[Any], metadata: dict[str, Any]) -> None:
    """Replace all metadata without a trace check (transforms do this on what they own)."""
    _set_metadata(variable, metadata)
    touch(variable)


def is_ref(value: Any) -> bool:
    """Whether `value` is a `jax.Ref` (or a tracer of one)."""
    kind = type(value)
    if kind in _never_refs:
        return False
    found = isinstance(value, jax.Ref)
    if not found and not isinstance(value, jax.core.Tracer):  # one type of tracer stands for arrays and Refs alike
        _never_refs.add(kind)
    return found


_never_refs: set[type] = set()


def _shape_text(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return "" if shape is None else f" of shape {tuple(shape)}"


def _hooks(variable: Variable[Any], name: str) -> tuple[Callable[..., Any], ...]:
    own = variable._var_metadata.get(name, ())
    hooks = tuple(own) if isinstance(own, list | tuple) else (own,)
    method = getattr(type(variable), name, None)
    return hooks if method is None else (method, *hooks)


# ---- operators: what an array does, a Variable does with its value ----


def _unary(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: op(self.get_value())


def _binary(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return op(self.get_value(), other.get_value() if isinstance(other, Variable) else other)

    return method


def _reflected(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: op(other, self.get_value())


_BINARY = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
for _name in _BINARY.split():
    _op = getattr(operator, f"__{_name}__")
    setattr(Variable, f"__{_name}__", _binary(_op))
    setattr(Variable, f"__r{_name}__", _reflected(_op))


def _in_place(symbol: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        raise InPlaceError(type(self).__name__, symbol)

    return method


_SYMBOLS = "+ - * @ / // % ** << >> & | ^"
for _name, _symbol in zip(_BINARY.split(), _SYMBOLS.split(), strict=True):
    setattr(Variable, f"__i{_name}__", _in_place(_symbol))
for _name in ["eq", "ne", "lt", "le", "gt", "ge"]:
    setattr(Variable, f"__{_name}__", _binary(getattr(operator, f"__{_name}__")))
for _name in ["neg", "pos", "abs", "invert", "index"]:
    setattr(Variable, f"__{_name}__", _unary(getattr(operator, f"__{_name}__")))
for _name, _op in {"int": int, "float": float, "complex": complex, "bool": bool, "round": round}.items():
    setattr(Variable, f"__{_name}__", _unary(_op))
Variable.__hash__ = None  # type: ignore[assignment]  # setting __eq__ above does not unset it


# ---- pytree: a Variable is a node with one child ----


def _flatten(v: Variable[Any]) -> tuple[tuple[Any], tuple[type, tuple[tuple[str, Any], ...]]]:
    if type(v._trace_state) is Borrowing:
        v._trace_state.used(v)
    return (v._raw_value,), (type(v), freeze_metadata(v._var_metadata))


def _flatten_with_keys(v: Variable[Any]) -> tuple[tuple[tuple[Any, Any]], Any]:
    (value,), aux = _flatten(v)
    return ((_VALUE_KEY, value),), aux


def _unflatten(aux: Any, children: Any) -> Variable[Any]:
    kind, metadata = aux
    return new_variable(kind, children[0], thaw_metadata(metadata))


_VALUE_KEY = jax.tree_util.GetAttrKey("value")


def _register(kind: type) -> None:
    jax.tree_util.register_pytree_with_keys(kind, _flatten_with_keys, _unflatten, _flatten)


_register(Variable)


def _init_subclass(cls: type, **kwargs: Any) -> None:
    super(Variable, cls).__init_subclass__(**kwargs)
    _register(cls)


Variable.__init_subclass__ = classmethod(_init_subclass)  # type: ignore[assignment]


def with_metadata(
    initializer: Callable[..., Any],
    on_set_value: Any = (),
    on_get_value: Any = (),
    on_create_value: Any = (),
    on_add_axis: Any = (),
    on_remove_axis: Any = (),
    **metadata: Any,
) -> Callable[..., VariableMetadata[Any]]:
    """An initializer whose result carries metadata and hooks for the Variable it will fill.

    Example:
      >>> import nnx_core as nnx, jax
      >>> init = nnx.with_metadata(nnx.initializers.ones, unit="m")
      >>> nnx.Param(init(jax.random.key(0), (2,))).unit
      'm'
    """
    hooks = (on_create_value, on_get_value, on_set_value, on_add_axis, on_remove_axis)
    metadata |= {name: hook for name, hook in zip(_HOOKS, hooks, strict=True) if hook != ()}

    @wraps(initializer)
    def initialize(*args: Any, **kwargs: Any) -> VariableMetadata[Any]:
        value = initializer(*args, **kwargs)
        if isinstance(value, VariableMetadata):
            return VariableMetadata(value.raw_value, metadata={**value.all_metadata, **metadata})
        return VariableMetadata(value, metadata=metadata)

    return initialize
