"""ToNNX: a Linen module as an NNX module.

The wrapped module is configuration; its variables are Variables of this object, under Linen's own paths. A call
builds Linen's variables dict, runs `apply`, and writes what changed back into the same Variables.

Law: outputs, gradients and updates are those of `module.apply` with the same variables and keys. A Variable that
exists before a call is the same object after it. Any name is legal in Linen, so the variables live apart from
attributes, and in the graph attributes make room: Linen's names stay as they are.
Knows Linen modules and the object graph; knows nothing of ToLinen.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import DenyList, in_filter, union_filters

import nnx_core as nnx
from bridge._errors import LINEN_NOT_FOUND, UnboundModuleError, show_path
from bridge._types import Location
from bridge.linen_in_nnx import init as to_nnx_init
from bridge.linen_in_nnx._errors import (
    AlreadyInitializedError,
    LinenAttributeError,
    NoModeWarning,
    NoOwnerError,
    NoRngsError,
    NotALinenModuleError,
    NotInitializedError,
    StateAttributeError,
    UnknownValueError,
)
from bridge.linen_in_nnx.as_graph import (
    Level,
    LinenScope,
    View,
    at_home,
    filled,
    is_empty,
    scoped,
    sync,
    view_of,
    write_value,
)
from bridge.linen_in_nnx.config import WHEN_TRAINING, Wrapped, open_flags
from bridge.linen_in_nnx.rngs import Keys, RngSource
from bridge.linen_in_nnx.submodules import Submodule, has_setup, holds_modules, look, method_at, of_class, reported
from bridge.nnx_in_linen.host import captured_around, is_linen_initializing, made_around, mutable_around, placed
from bridge.variables.mapping import leaves, nest
from bridge.variables.metadata import to_nnx_variable
from nnx_core._changes import touch
from nnx_core.graph.api import plan_of


class ToNNX(nnx.Module):
    """A Linen module as an NNX module.

    Its variables appear with the first `lazy_init`, as Variables under Linen's paths; names that are attributes or
    methods here (`rngs`, `train`, ...) are reached through `nnx.state(model)`. Fields, properties and methods of the
    Linen module are reached as attributes. A bool assigned to `deterministic`, `use_running_average`, `train` or
    `training` is meant for the module's flag, as train() of a model around it means it; a Variable of that name stays.

    Args:
      module: any Linen module.
      rngs: an `nnx.Rngs`, a key or a seed; its streams go to Linen by name, `default` as `params`. A fork of it is
        kept.
      parity: hand Linen exactly the keys given, never folded: `lazy_init` equals `module.init(keys, ...)` and a
        call equals `module.apply(..., rngs=keys)` bit for bit. As in Linen the same keys then give the same dropout
        mask in each call: pass `rngs=` to the call, or `nnx.reseed` it.

    Raises:
      NotALinenModuleError: if `module` is something else.

    >>> from flax import linen as nn
    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> model = ToNNX(nn.Dense(64), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 32)))
    >>> model(jnp.ones((1, 32))).shape, model.kernel.shape, model.features
    ((1, 64), (32, 64), 64)
    """

    __slots__ = ("_nnx_variables", "_nnx_wrapped")
    _nnx_variables: dict[str, Any]
    _nnx_wrapped: Wrapped
    rngs: nnx.Rngs | None

    def __init__(self, module: nn.Module, rngs: RngSource = None, *, parity: bool = False):
        if not isinstance(module, nn.Module):
            raise NotALinenModuleError(module)
        if module.parent is not None:  # bound, or made inside another Linen module: NNX owns this one
            module = module.clone(parent=None)
        _set_variables(self, {})
        _set_wrapped(self, Wrapped(module, parity))
        if isinstance(rngs, nnx.Rngs) and not parity:
            rngs = rngs.fork()
        elif rngs is not None:
            rngs = nnx.Rngs(rngs)  # streams of its own, with the same keys
        self.rngs = rngs

    @property
    def module(self) -> nn.Module:
        """The Linen module."""
        return self._nnx_wrapped.module

    # ---- calls ----

    def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
        """Make the variables that this call needs and that are not there; see `bridge.lazy_init`."""
        _init_one(self, args, kwargs)
        return self

    def __call__(
        self,
        *args: Any,
        rngs: RngSource = None,
        method: Callable[..., Any] | str | None = None,
        mutable: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What `module.apply` returns, without the updates: those are written into the Variables.

        Args:
          *args: arguments of the method.
          rngs: streams, keys or seeds for this call; by default the streams given to the constructor.
          method: a method of the Linen module, its name, or a function of the bound module.
          mutable: the collections that may be written, as for `apply`; by default those that are there, except
            `params` and `intermediates`, and inside a Linen module only what is mutable there.
          **kwargs: keywords of the method.

        Raises:
          NotInitializedError: if variables are needed and none have been made.
        """
        if (recorder := to_nnx_init.recorder()) is not None and (place := recorder.place_of(self)) is not None:
            self._record(recorder, place, args, kwargs, rngs, method)
        elif is_linen_initializing():
            if not self._nnx_variables:
                return self._init(args, kwargs, rngs, method)
            if self._view().collections == ["intermediates"]:  # what an earlier call sowed
                self._make_variables(args, kwargs, rngs, method)
        return self._apply(args, kwargs, rngs, method, mutable)

    def _apply(self, args: Any, kwargs: Any, rngs: RngSource, method: Any, mutable: Any) -> Any:
        view, wrapped = self._view(), self._nnx_wrapped
        keys = Keys(self.rngs if rngs is None else rngs, exact=wrapped.exact)
        run, kwargs = self._method(method, args, kwargs)
        if mutable is None:
            mutable = _writable(view.collections) or False
        try:
            with reported(self):
                result = wrapped.module.apply(
                    filled(view.template),
                    *args,
                    rngs=keys.by_name or None,
                    method=keys.watching(placed(run)),
                    mutable=mutable,
                    **{"capture_intermediates": in_filter(mutable, "intermediates") and captured_around(), **kwargs},
                )
        except LINEN_NOT_FOUND as error:
            if view.variables or mutable_around() is not None:
                raise  # inside Linen it is Linen's variables that lack something
            raise NotInitializedError(type(wrapped.module).__name__, error) from error
        keys.settle()
        if mutable is False:
            return result
        output, updates = result
        self._write(view, updates)
        return output

    def _init(self, args: Any, kwargs: Any, rngs: RngSource, method: Any) -> Any:
        """What the first call returns while the Linen module around is initialised: what Linen's own `init` does."""
        wrapped, around = self._nnx_wrapped, mutable_around()
        keys = self._keys(rngs)
        run, kwargs = self._method(method, args, kwargs)
        with reported(self):
            output, made = wrapped.module.init_with_output(
                keys.by_name,
                *args,
                method=keys.watching(placed(run)),
                mutable=DenyList("intermediates") if around is None else around,
                **kwargs,
            )
        keys.settle()
        new = {at: to_nnx_variable(at[0], x) for at, x in leaves(made) if not is_empty(x)}
        if new:
            self._add(self._view(), new)
        return output

    def _keys(self, rngs: RngSource) -> Keys:
        keys = Keys(self.rngs if rngs is None else rngs, exact=self._nnx_wrapped.exact)
        if not keys.by_name:
            raise NoRngsError(type(self.module).__name__)
        return keys

    def _make_variables(
        self,
        args: Any,
        kwargs: Any,
        rngs: RngSource,
        method: Any,
        note: Callable[[dict[Location, Any]], None] | None = None,
    ) -> int:
        """Make the variables that this call needs and that are not there; how many there were.

        `note` is told of them before anything is changed.
        """
        wrapped, view = self._nnx_wrapped, self._view()
        keys = self._keys(rngs)
        run, kwargs = self._method(method, args, kwargs)
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, kwargs)))
        init = functools.partial(wrapped.module.init, keys.by_name, method=keys.watching(run))
        if abstract:
            made = to_nnx_init.from_shapes(type(wrapped.module).__name__, init, args, kwargs)
        else:
            made = init(*args, **kwargs)
        new = {at: value for at, value in leaves(made) if at not in view.variables and not is_empty(value)}
        if new:
            if note is not None:
                note(new)
            keys.settle()
            self._add(view, {at: to_nnx_variable(at[0], value) for at, value in new.items()})
        return len(new)

    def _record(self, recorder: Any, place: int, args: Any, kwargs: Any, rngs: RngSource, method: Any) -> None:
        """Make the variables of this abstract call, and have the recorder note what it was."""
        exact = self._nnx_wrapped.exact
        keys = None if rngs is None else Keys(rngs, exact=exact).by_name
        if self._nnx_variables and not (keys or Keys(self.rngs, exact=exact).by_name):
            return  # loaded, and not to be made
        note = lambda made: recorder.add(place, made, (args, kwargs), method, keys)  # noqa: E731
        self._make_variables(args, kwargs, rngs, method, note)

    def _method(self, method: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What to call with the bound module, and keywords with the flags that the caller left open."""
        if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
            method = method.__func__
        run = method if callable(method) else _by_name(method)
        if defaults := self._nnx_wrapped.defaults:
            target = method if callable(method) else getattr(type(self.module), method or "__call__")
            kwargs = {**open_flags(target, defaults, args, kwargs), **kwargs}
        return run, kwargs

    # ---- variables ----

    def _view(self) -> View:
        plan = plan_of(self)
        return plan.remember("bridge.linen_in_nnx.wrapper", lambda: view_of(self._nnx_variables))  # type: ignore[no-any-return]

    def _write(self, view: View, updates: Mapping[str, Any]) -> None:
        new = {}
        # Where variables are made, layers leave what is there as it is (BatchNorm's averages).
        initializing = is_linen_initializing() or ((r := to_nnx_init.recorder()) is not None and r.keeps(self))
        for at, value in leaves(updates):
            variable = view.variables.get(at)
            if variable is not None and initializing and at[0] != "intermediates" and type(value) is not tuple:
                continue  # what is sown is a tuple: Linen appends to it in init too
            if variable is not None:
                write_value(variable, value, at)
            elif not is_empty(value):
                new[at] = to_nnx_variable(at[0], value)
        if new:
            self._add(view, new)

    def _nnx_take(self, at: Location, variable: nnx.Variable[Any]) -> None:
        """Hold a Variable that the Linen module around kept for this one."""
        self._add(self._view(), {at: variable})

    def _add(self, view: View, new: dict[Location, nnx.Variable[Any]]) -> None:
        self._nnx_check_can_write(next(iter(new))[1])
        sync(self._nnx_variables, nest({**view.variables, **new}, Level))
        self._arrange()
        touch(self)

    # ---- how the graph sees it: the wrapped module, plain attributes, variables ----

    def _arrange(self) -> None:
        """Give attributes keys in the graph that no variable has; kept in `_nnx_wrapped`, so that copies agree."""
        wrapped, used = self._nnx_wrapped, set(self._nnx_variables)
        key = _free("to_nnx__module", used)
        attributes = tuple([(_free(name, used), name) for name in self.__dict__])
        if key != wrapped.key or attributes != wrapped.attributes:
            _set_wrapped(self, wrapped.replace(key=key, attributes=attributes))

    def _nnx_items(self) -> dict[Any, Any]:
        wrapped = self._nnx_wrapped
        own = {key: self.__dict__[name] for key, name in wrapped.attributes}
        return {wrapped.key: wrapped, **own, **self._nnx_variables}

    def _nnx_storage(self) -> Any:
        return _Storage(self)

    def _nnx_mark(self, key: Any) -> str | None:
        if key == self._nnx_wrapped.key:
            return "static"
        name = dict(self._nnx_wrapped.attributes).get(key)
        return None if name is None else super()._nnx_mark(name)

    def _nnx_fill(self, items: dict[Any, Any], marks: Any) -> None:
        [wrapped] = [x for x in items.values() if type(x) is Wrapped]
        names = dict(wrapped.attributes)
        variables = {k: scoped(x) for k, x in items.items() if x is not wrapped and k not in names}
        self.__dict__.clear()
        self.__dict__.update({names[k]: x for k, x in items.items() if k in names})
        _set_variables(self, variables)
        _set_wrapped(self, wrapped)
        self._arrange()
        if marks:
            object.__setattr__(self, "_nnx_marks", dict(marks))

    def _nnx_assign(self, changed: dict[Any, Any], removed: tuple[Any, ...]) -> None:
        items = {key: x for key, x in self._nnx_items().items() if key not in removed}
        self._nnx_fill({**items, **changed}, ())
        touch(self)

    # ---- attributes ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_nnx_")):
            raise AttributeError(name)  # not filled yet (copy, pickle), or a protocol of Python or its tools
        if name in self._nnx_variables:
            return at_home(self._nnx_variables[name], self, (name,))
        if self._nnx_wrapped.has(name):
            value = self._nnx_wrapped.get(name)
            return look(self, (), name) if holds_modules(value) else value
        return self._of_linen(name)

    def _of_linen(self, name: str) -> Any:
        """What the Linen module has by this name besides fields: of its class, or made in `setup`."""
        kind = type(self.module)
        found, reason = of_class(kind, name), None
        if found is None and has_setup(self.module) and name not in WHEN_TRAINING:  # which are set, not computed
            try:
                return look(self, (), name)
            except AttributeError as error:
                reason = error
        if found is None:
            raise AttributeError(
                f"ToNNX({kind.__name__}) has no attribute or variable {name!r}, and neither has {kind.__name__}; its"
                f" variables are {list(self._nnx_variables)}."
            ) from reason
        if inspect.isfunction(found):
            return functools.partial(self, method=name)
        if hasattr(found, "__get__") and not isinstance(found, staticmethod | classmethod):  # a property, of any kind
            return self(method=lambda module: getattr(module, name))
        return getattr(self.module, name)

    def _nnx_at(self, path: tuple[str, ...]) -> Any:
        """The submodule at `path`: itself, its variables, or a view where it has none."""
        scope: Any = self
        for depth, name in enumerate(path):
            level = self._nnx_variables if depth == 0 else scope
            if type(level.get(name)) is not LinenScope:
                return Submodule(self, path)
            scope = at_home(level[name], self, path[: depth + 1])
        return scope

    def _nnx_variable_at(self, at: Location) -> nnx.Variable[Any]:
        return self._view().variables[at]

    def _nnx_linen_variables(self) -> dict[str, Any]:
        return filled(self._view().template)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        elif name in self._nnx_variables and not (name in WHEN_TRAINING and isinstance(value, bool | None)):
            self._set_variable(name, value)
        elif self._nnx_wrapped.has(name):
            self._nnx_check_can_write(name)
            _set_wrapped(self, self._nnx_wrapped.set(name, value))
            touch(self)
        elif name not in self._nnx_variables:  # else `train()` of a model around means a flag, and there is none
            if name not in _OWN and self._is_computed(name):
                raise LinenAttributeError(type(self.module).__name__, name)
            super().__setattr__(name, value)
            self._arrange()
            touch(self)

    def _is_computed(self, name: str) -> bool:
        """Whether the Linen module makes this attribute itself, so that setting one here would not reach it."""
        if (found := of_class(type(self.module), name)) is not None:  # who hides a method calls another one
            return not inspect.isfunction(found) and not isinstance(found, staticmethod | classmethod)
        try:
            self._of_linen(name)
        except AttributeError:
            return False
        return True

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name not in self._nnx_variables:
            super().__delattr__(name)
        else:
            self._nnx_check_can_write(name)
            del self._nnx_variables[name]
        self._arrange()
        touch(self)

    def _set_variable(self, name: str, value: Any) -> None:
        self._nnx_check_can_write(name)
        if not isinstance(value, nnx.Variable | LinenScope):
            raise StateAttributeError(name, value)
        self._nnx_variables[name] = value
        touch(self)

    # ---- training and evaluation ----

    def train(self, **attributes: Any) -> None:
        """Set the wrapped module's flags for training: fields, or arguments of calls that do not give them.

        Warns:
          NoModeWarning: if it has none of deterministic, use_running_average, train and training.
        """
        self._warn_without_flags("train")
        super().train(**attributes)

    def eval(self, **attributes: Any) -> None:
        """Set the wrapped module's flags for evaluation; see `train`."""
        self._warn_without_flags("eval")
        super().eval(**attributes)

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> dict[str, bool | None]:
        """Set the wrapped module's flags for `nnx.view`, which calls this on a copy.

        Args:
          deterministic: as `eval` (True) and `train` (False) set it; None leaves it as it is.
          use_running_average: as `eval` (True) and `train` (False) set it; None leaves it as it is.

        Returns:
          Those that nothing in the wrapped module stands for.
        """
        flags = {"deterministic": deterministic, "use_running_average": use_running_average}
        for name, value in flags.items():
            if value is not None and self._nnx_wrapped.has(name):
                setattr(self, name, value)
        return {name: value for name, value in flags.items() if not self._nnx_wrapped.has(name)}

    def _warn_without_flags(self, mode: str) -> None:
        if not any(map(self._nnx_wrapped.has, WHEN_TRAINING)):
            warnings.warn(
                f"ToNNX({type(self.module).__name__}).{mode}() has no effect: neither a field nor an argument of"
                f" __call__ is one of {', '.join(WHEN_TRAINING)}. Pass the mode as your module expects it.",
                NoModeWarning,
                stacklevel=3,
            )


_OWN = ("rngs",)
_set_variables = ToNNX.__dict__["_nnx_variables"].__set__
_set_wrapped = ToNNX.__dict__["_nnx_wrapped"].__set__


class _Storage:
    """Reads and writes one item of a ToNNX by its key in the graph."""

    __slots__ = ("_owner",)

    def __init__(self, owner: ToNNX):
        self._owner = owner

    def _find(self, key: str) -> tuple[dict[str, Any], str]:
        names = dict(self._owner._nnx_wrapped.attributes)
        return (self._owner.__dict__, names[key]) if key in names else (self._owner._nnx_variables, key)

    def __getitem__(self, key: str) -> Any:
        items, name = self._find(key)
        return items[name]

    def __setitem__(self, key: str, value: Any) -> None:
        items, name = self._find(key)
        items[name] = value


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "@"
    used.add(name)
    return name


def _writable(held: list[str]) -> Any:
    """The collections that a call may write: those it holds; inside a Linen module, as for any submodule of it."""
    if (around := mutable_around()) is not None:
        return around
    return union_filters([name for name in held if name not in ("params", "intermediates")], made_around())


@functools.cache
def _by_name(method: str | None) -> Callable[..., Any]:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (module if method is None else getattr(module, method))(*args, **kwargs)

    return call


# ---- initialisation ----------------------------------------------------------------------------------------


def _wrappers_in(node: Any) -> list[ToNNX]:
    return [x for _, x in nnx.iter_graph(node) if isinstance(x, ToNNX)]


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the variables of every wrapped Linen module that a call needs; what is there stays as it is.

    A model that has wrapped modules inside runs abstractly, on a copy: no forward pass is computed and no other
    state changes. Each wrapped module is then initialised for the shapes it was called with, or for the values
    where it needs them, from the random keys of that call or its own. Where nnx.vmap or nnx.scan gives the variables
    an axis, they are stacked, each from its own keys as in such a call (nnx.split_rngs).

    Args:
      fn: a ToNNX, a submodule of one, any other NNX module, or a method of one.
      *args, **kwargs: what to call it with, `jax.ShapeDtypeStruct`s for arrays if you like. A ToNNX also takes
        `rngs`, `method` and `mutable`, as in a call.

    Returns:
      `fn`.

    Raises:
      AlreadyInitializedError: if `fn` is a ToNNX that has all it needs.
      NoRngsError: if a module has no random keys.
      UnknownValueError: if variables depend on the values of inputs, and only their shapes are known.
      NoOwnerError: if `fn` belongs to no module.
      UnboundModuleError: if the call reaches a `bridge.Module` without variables: it has no random keys of its own,
        so `bind` gives it what its `init` made.

    >>> from flax import linen as nn
    >>> import nnx_core as nnx, jax, jax.numpy as jnp
    >>> model = nnx.Sequential(ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)), nnx.relu)
    >>> lazy_init(model, jax.ShapeDtypeStruct((1, 2), jnp.float32)).layers[0].kernel.shape
    (2, 3)
    """
    target = fn
    if isinstance(fn, functools.partial) and isinstance(fn.func, ToNNX | LinenScope | Submodule):
        target, kwargs = fn.func, {**fn.keywords, **kwargs}  # `model.encode` of a wrapped module
    owner = getattr(target, "__self__", target)
    if isinstance(target, LinenScope | Submodule):
        wrapper, path = target._nnx_place()
        _init_one(wrapper, args, {**kwargs, "method": method_at(path, kwargs.get("method"))})
    elif isinstance(owner, ToNNX) and (owner is target or target.__func__ is ToNNX.__call__):
        _init_one(owner, args, kwargs)
    elif isinstance(owner, nnx.Object):
        _init_inside(owner, type(owner).__call__ if owner is target else target.__func__, args, kwargs)
    else:
        raise NoOwnerError(fn)
    return fn


def _init_one(wrapper: ToNNX, args: Any, kwargs: dict[str, Any], rngs: RngSource = None, method: Any = None) -> None:
    kwargs = dict(kwargs)
    rngs, method = kwargs.pop("rngs", rngs), kwargs.pop("method", method)
    kwargs.pop("mutable", None)  # everything is, while it is made
    count = len(wrapper._view().variables)
    if count and method is None:
        raise AlreadyInitializedError(type(wrapper.module).__name__, count)
    made = wrapper._make_variables(args, kwargs, rngs, method)
    if count and not made:
        raise AlreadyInitializedError(type(wrapper.module).__name__, count)


def _init_inside(owner: nnx.Object, method: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
    wrappers = _wrappers_in(owner)
    try:
        calls, stacks = to_nnx_init.calls_in(owner, _wrappers_in, method, args, kwargs)
    except UnboundModuleError as error:
        unbound = [(path, x) for path, x in nnx.iter_graph(owner) if type(x) is error.kind and x.scope is None]
        if not unbound:
            raise
        places = ", ".join(show_path(path) for path, _ in unbound)
        raise UnboundModuleError(error.kind, f"a call in lazy_init, at {places},") from error
    stacked = [(wrappers[stack.place], *stack.values()) for stack in stacks]
    with to_nnx_init.all_or_nothing([wrappers[call.place] for call in calls]):
        for call in calls:
            make, keys = wrappers[call.place]._make_variables, call.keys()
            try:
                make(*call.shapes(), keys, call.method)
            except UnknownValueError:  # shapes are not enough for this one
                make(*call.values(), keys, call.method)
    for wrapper, variables, counts in stacked:
        wrapper._add(wrapper._view(), variables)
        for name, count in counts.items():
            wrapper.rngs[name].count.set_value(count)
