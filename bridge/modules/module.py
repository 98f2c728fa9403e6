"""bridge.Module: modules written as in Linen (`setup`, `@compact`, `param`), whose state is Variables of NNX.

A module is configuration until `init`, `apply` or `bind` gives a copy of it variables; then its variables and
submodules are attributes, and everything that works on NNX modules works on it.
Law: the variables that `init` returns are what `apply` takes, under Linen's names; what apply may not write, it cannot
change; what is missing is an error. The caller's module, variables and other modules stay as they are.
Knows names and attributes; knows nothing of the wrappers ToNNX and ToLinen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
from flax.core import FrozenDict, freeze, meta
from flax.core.scope import CollectionFilter, DenyList, in_filter

import nnx_core as nnx
from bridge._errors import UnboundModuleError, linen_not_found
from bridge._types import Location
from bridge.modules.attributes import adopt, free_key, keep, park, unpark
from bridge.modules.methods import ModuleMeta, compact, method_of, note_methods
from bridge.modules.scope import (
    AttrPriority,
    ModuleStackEntry,
    Scope,
    current_context,
    current_module,
    running,
    streams,
)
from bridge.modules.tree import OWN, check_writes, collect, config_of, is_bridge_module, run_of, unbound
from bridge.modules.waiting import check_shape, flat, take_one, waiting_of
from bridge.nnx_in_linen.host import Host, hosted
from bridge.variables.kinds import collection_of, variable_type
from bridge.variables.mapping import inside, linen_tree, put
from bridge.variables.metadata import to_linen_value, to_nnx_variable
from nnx_core.modes import sowing_needs_capture

__all__ = ["AttrPriority", "Module", "ModuleStackEntry", "Scope", "compact", "current_context", "current_module"]

M = TypeVar("M", bound="Module")
_ALL_BUT_PARAMS = DenyList("params")


@dataclass_transform(field_specifiers=(dataclasses.field, nnx.data, nnx.static))
class Module(nnx.Module, metaclass=ModuleMeta):
    """A module written as in Linen: annotations are its fields, `setup` or compact methods make what it consists of.

    NNX modules are submodules through `nnx_in_bridge_mdl`, Linen modules through `linen_in_bridge_mdl`.
    Keys are drawn from `rngs` one after another, as in NNX: from the stream asked for, else `default`, else `params`.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> class Scale(Module):
      ...     size: int
      ...
      ...     def setup(self):
      ...         self.factor = self.param("factor", nnx.initializers.ones, (self.size,))
      ...
      ...     def __call__(self, x):
      ...         return x * self.factor
      >>> variables = Scale(2).init(0, jnp.ones(2))
      >>> Scale(2).apply(variables, jnp.arange(2.0)).tolist()
      [0.0, 1.0]
    """

    scope: Any
    attr_priorities: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        note_methods(cls)
        has_own_init = any(map(_defines_init, _user_bases(cls)))
        dataclasses.dataclass(init=not has_own_init, repr=False, eq=False)(cls)
        if "__init__" in vars(cls) and not has_own_init:
            cls.__init__._bridge_made = True  # type: ignore[attr-defined]

    # ---- init, apply, bind ----

    def init_with_output(
        self,
        rngs: Any = None,
        *args: Any,
        method: Callable[..., Any] | str = "__call__",
        mutable: Any = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """(result, variables) of a first call; see `init`.

        Args:
          mutable: the collections to return; by default all but `intermediates`.
        """
        shown = DenyList("intermediates") if mutable is False else mutable
        return self.apply({}, *args, rngs=rngs, method=method, mutable=shown, _initialize=True, **kwargs)

    def init(
        self, rngs: Any = None, *args: Any, method: Callable[..., Any] | str = "__call__", **kwargs: Any
    ) -> dict[str, Any]:
        """The variables that a call of `method` needs: {collection: {name: ...}}.

        Args:
          rngs: a seed, a key, seeds and keys by name of the stream, or an Rngs, whose counts move.
          *args, **kwargs: arguments of the method.
          method: its name, or a function of (module, *args, **kwargs).

        Raises:
          InvalidRngError: (flax.errors) if a key is drawn and there is no stream for it.
        """
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Callable[..., Any] | str = "__call__",
        mutable: CollectionFilter = False,
        _initialize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call `method` with these variables.

        Args:
          variables: {collection: {name: ...}}, any Mapping, boxed or not; not changed.
          *args, **kwargs: arguments of the method.
          rngs: as for `init`.
          method: its name, or a function of (module, *args, **kwargs).
          mutable: the collections that the call may write, and that are returned.

        Returns:
          The result; unless `mutable` is False, (result, variables of the mutable collections).

        Raises:
          ScopeParamNotFoundError, ScopeVariableNotFoundError, ScopeCollectionNotFound, ScopeParamShapeError,
            ModifyScopeVariableError, InvalidRngError: (flax.errors) where a Linen module raises them.
          NameTwiceError: if two things get one name.
        """
        scope = Scope(streams(rngs), True if _initialize else mutable)
        scope._initializing = _initialize
        scope._waiting = waiting_of(variables)
        before = {location: variable.get_raw_value() for location, variable in flat(scope._waiting)}
        run, bound = method_of(method), unbound(self)

        def make_key(name: str) -> jax.Array:
            return scope.make_key(name, type(bound).__name__)

        host = Host(None, _initialize, tuple(scope.rngs), make_key, mutable=mutable)
        with hosted(host), run_of() as met, running(ModuleStackEntry(bound, in_compact=False, method="apply")):
            bound._bind(scope, owned=True)
            out = run(bound, *args, **kwargs)
        met.restore()
        after = collect(bound)
        if not _initialize:
            check_writes(before, after, mutable)
        if mutable is False:
            return out
        shown = {location: variable for location, variable in after.items() if in_filter(mutable, location[0])}
        return out, linen_tree(shown)

    def bind(
        self: M,
        variables: Mapping[str, Any],
        *,
        rngs: Any = None,
        mutable: CollectionFilter = _ALL_BUT_PARAMS,
    ) -> M:
        """A copy of this module that keeps its variables, like every NNX module: to call it, train it, put it in one.

        Args:
          variables: as for `apply`.
          rngs: streams for its calls.
          mutable: the collections in which calls may make variables.

        >>> import nnx_core as nnx, jax.numpy as jnp
        >>> class Bias(Module):
        ...     @compact
        ...     def __call__(self, x):
        ...         return x + self.param("bias", nnx.initializers.zeros, x.shape)
        >>> bias = Bias().bind({"params": {"bias": jnp.ones(2)}})
        >>> bias(jnp.zeros(2)).tolist(), nnx.state(bias, nnx.Param)["bias"].shape
        ([1.0, 1.0], (2,))
        """
        scope = Scope(streams(rngs), mutable)
        scope._waiting, scope._stays = waiting_of(variables), True
        bound = unbound(self)
        with hosted(None), run_of(), running(ModuleStackEntry(bound, in_compact=False, method="bind")):
            bound._bind(scope, owned=True)
        return bound

    # ---- what methods use ----

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> nnx.Param[Any]:
        """The parameter `name`; made by `init_fn(key, *init_args, **init_kwargs)` where variables are made.

        Args:
          name: its name; it may be used once in a method.
          init_fn: an initializer; the result may be boxed, or have metadata.
          unbox: False keeps the value of the Variable in its Linen box.

        Raises:
          ScopeParamShapeError: if it is there with another shape than `init_fn` gives.
          ScopeParamNotFoundError, ScopeCollectionNotFound: if it is missing and `params` are not mutable.
          NameTwiceError: if the name is taken.
        """
        scope = self._scope(f"param {name!r}")

        def make(key: Any) -> Any:
            return init_fn(key, *init_args, **init_kwargs)

        variable = self._existing("params", name, "param")
        if variable is None:
            variable = self._new("params", name, lambda: make(scope.make_key("params", type(self).__name__)))
        else:
            check_shape(self._at("params", name), variable, make)
        return _boxed(variable, unbox)

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> nnx.Variable[Any]:
        """The variable `name` of the collection `col`; made by `init_fn(*init_args, **init_kwargs)`, if it may be.

        Raises:
          ScopeVariableNotFoundError, ScopeCollectionNotFound: if it is missing, and there is no `init_fn` or the
            collection is not mutable.
          NameTwiceError: if the name is taken.
        """
        self._scope(f"variable {name!r}")
        variable = self._existing(col, name, "variable")
        if variable is None:
            make = None if init_fn is None else functools.partial(init_fn, *init_args, **init_kwargs)
            variable = self._new(col, name, make)
        return _boxed(variable, unbox)

    def make_rng(self, name: str = "default") -> jax.Array:
        """The next key of the stream `name`, or of `default` or `params` where there is none.

        Raises:
          InvalidRngError: (flax.errors) if none of them is there.
        """
        return self._scope(f"make_rng({name!r})").make_key(name, type(self).__name__)

    def is_initializing(self) -> bool:
        """Whether the variables are being made."""
        return self.scope is not None and self.scope._initializing

    def set_attr_priority(self, name: str, value: AttrPriority) -> None:
        """Say how much the attribute `name` has to say in the name of a submodule that other attributes hold too."""
        self.attr_priorities = {**self.attr_priorities, name: value}

    @property
    def variables(self) -> FrozenDict[str, Any]:
        """The variables of a bound module, as a FrozenDict; empty for others."""
        variables = {} if self.scope is None else collect(self)
        return freeze(linen_tree(variables))

    def sow(
        self,
        variable_type: Any,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = lambda xs, x: (*xs, x),
        init_fn: Callable[[], Any] = lambda: (),
        capture_noop: bool | None = None,
    ) -> bool:
        """As for every NNX module; does nothing, and returns False, where the collection may not be written."""
        if sowing_needs_capture(capture_noop):
            return False
        if self.scope is not None:
            collection = collection_of(_class_of(variable_type))
            if not in_filter(self.scope.mutable, collection):
                return False
            self._take(collection, name)
        return super().sow(variable_type, name, value, reduce_fn, init_fn, capture_noop=False)

    def perturb(
        self, name: str, value: Any, variable_type: Any = nnx.Perturbation, capture_noop: bool | None = None
    ) -> Any:
        """As for every NNX module; `value` itself where the variable is missing and may not be made."""
        if sowing_needs_capture(capture_noop):
            return value
        if self.scope is not None:
            collection = collection_of(_class_of(variable_type))
            if self._take(collection, name) is None:
                if not self.scope.may_make(collection):
                    return value
                self._new(collection, name, lambda: jax.tree.map(jax.numpy.zeros_like, value))
        return super().perturb(name, value, variable_type, capture_noop=False)

    # ---- variables ----

    def _scope(self, what: str) -> Scope:
        if self.scope is None:
            raise UnboundModuleError(type(self), what)
        return self.scope

    def _at(self, collection: str, name: str) -> Location:
        return (collection, *self.scope._path, name)

    def _existing(self, collection: str, name: str, what: str) -> nnx.Variable[Any] | None:
        entry = current_context()
        if entry is not None and entry.module is self:
            entry.give(what, collection, name)
        return self._take(collection, name)

    def _take(self, collection: str, name: str) -> nnx.Variable[Any] | None:
        """The Variable of this name, which becomes an attribute if it waited."""
        scope = self.scope
        if (key := scope.attribute_of(collection, name)) is not None:
            return self.__dict__[key]
        unpark(self, name)
        own = self.__dict__.get(name)
        if isinstance(own, nnx.Variable) and collection_of(type(own)) == collection:
            return own
        variable = take_one(scope._waiting, collection, name)
        if variable is not None:
            keep(self, collection, name, variable)
        return variable

    def _new(self, collection: str, name: str, make: Callable[[], Any] | None) -> nnx.Variable[Any]:
        if make is None or not self.scope.may_make(collection):
            raise linen_not_found(self._at(collection, name), empty=collection not in self.scope._waiting)
        value = make()
        if isinstance(value, meta.AxisMetadata):
            variable = to_nnx_variable(collection, value)
        else:
            variable = variable_type(collection)(value)
        keep(self, collection, name, variable)
        return variable

    # ---- submodules ----

    def _bind(self, scope: Scope, *, owned: bool) -> None:
        """Take `scope`, and bind what the fields hold; `owned` says that those are copies already."""
        scope._config = tuple(key for key in self.__dict__ if key not in OWN)
        nnx.Module.__setattr__(self, "scope", scope)
        for key in scope._config:
            value = adopt(self, (key,), self.__dict__[key], owned=owned)
            if value is not self.__dict__[key]:
                super().__setattr__(key, value)
        entry = current_context()
        if not hasattr(type(self), "setup"):
            park(self)
        elif entry is not None and entry.method == "setup" and not scope._initializing:
            # An attribute yet to come may name it, and its variables wait there.
            scope._setup_due = True
            entry.due.append(self._setup_if_due)
        else:
            self._run_setup()

    def _setup_if_due(self) -> None:
        if self.scope._setup_due:
            self._run_setup()

    def _run_setup(self) -> None:
        self.scope._setup_due = False
        entry = ModuleStackEntry(self, in_compact=False, method="setup")
        with running(entry):
            self.setup()  # type: ignore[attr-defined]  # _bind has looked
        for due in entry.due:
            due()
        park(self)

    def _attach(self, entry: ModuleStackEntry, name: str, child: Any) -> Any:
        """Make `child` the submodule `name`, or return the one that an earlier call made."""
        entry.give("submodule", None, name)
        scope = self.scope
        unpark(self, name)
        key = scope.attribute_of(None, name)
        old = None if key is None else self.__dict__.get(key)
        if old is not None:
            if not is_bridge_module(old) or (type(old) is type(child) and config_of(old) == config_of(child)):
                return old
            for location, variable in collect(old).items():
                put(scope._waiting, inside(location, (name,)), variable)
            nnx.Module.__delattr__(self, key)
        key = free_key(self, name)
        scope.register(key, None, name)
        nnx.Module.__setattr__(self, key, adopt(self, (name,), child, owned=False))
        return self.__dict__[key]

    # ---- attributes ----

    def __setattr__(self, name: str, value: Any) -> None:
        scope = self.__dict__.get("scope")
        if scope is None or name in OWN:
            super().__setattr__(name, value)
            return
        held = scope.variable_at(name)
        if held is not None and value is not (variable := self.__dict__[name]):
            # `self.w = self.param("w", ...)[...]`: the attribute is the user's.
            super().__delattr__(name)
            super().__setattr__(name, value)
            keep(self, *held, variable)
            return
        super().__setattr__(name, adopt(self, (name,), value, owned=False))

    def __getattr__(self, name: str) -> Any:
        scope = self.__dict__.get("scope")
        if scope is not None and not name.startswith("__") and scope._setup_due:
            self._run_setup()
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Module):
            return self is other
        alone = self.__dict__.get("scope") is None and other.__dict__.get("scope") is None
        return alone and type(self) is type(other) and config_of(self) == config_of(other)

    def __hash__(self) -> int:
        if self.__dict__.get("scope") is None:
            return hash((type(self), config_of(self)))
        return object.__hash__(self)


def _user_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if issubclass(base, Module) and "__bridge_base__" not in vars(base)]


def _defines_init(cls: type) -> bool:
    return "__init__" in vars(cls) and not hasattr(cls.__init__, "_bridge_made")


Module.__bridge_base__ = True  # type: ignore[attr-defined]


# ---- helpers ----


def _class_of(variable_type_or_name: Any) -> type[nnx.Variable[Any]]:
    if isinstance(variable_type_or_name, str):
        return variable_type(variable_type_or_name)
    return variable_type_or_name


def _boxed(variable: Any, unbox: bool) -> Any:
    """The Variable, or one whose value is in its Linen box."""
    return variable if unbox else type(variable)(to_linen_value(variable))
