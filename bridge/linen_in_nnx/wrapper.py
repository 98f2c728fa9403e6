"""ToNNX: a Linen module as an NNX module.

The wrapped module is configuration; its variables are Variables of this object, under Linen's own paths. A call
builds Linen's variables dict, runs `apply`, and writes what changed back into the same Variables.

Law: outputs, gradients and updates are those of `module.apply` with the same variables and keys. A Variable that
exists before a call is the same object after it. A name is a variable first, then a field, then what the class or
`setup` of the Linen module makes.
Knows calls and attributes; knows nothing of ToLinen, nor how the graph sees it (`as_graph`) or is filled (`init`).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.core.scope import DenyList, in_filter, union_filters

import nnx_core as nnx
from bridge._errors import LINEN_NOT_FOUND
from bridge.linen_in_nnx._errors import (
    LinenAttributeError,
    NoModeWarning,
    NotALinenModuleError,
    NotInitializedError,
    StateAttributeError,
)
from bridge.linen_in_nnx.abstract_run import abstract_run
from bridge.linen_in_nnx.as_graph import (
    Inventory,
    LinenNode,
    LinenScope,
    at_home,
    filled,
    is_empty,
    nested_variables,
    write_value,
)
from bridge.linen_in_nnx.config import WHEN_TRAINING, Wrapped, unpacking
from bridge.linen_in_nnx.init import init_one, keys_for, lazy_init, make_variables, record
from bridge.linen_in_nnx.rngs import RngSource
from bridge.linen_in_nnx.submodules import has_getattr, has_setup, holds_modules, look, of_class, reported
from bridge.nnx_in_linen.host import captured_around, is_linen_initializing, made_around, mutable_around, placed
from bridge.variables.load import load_into
from bridge.variables.mapping import leaves, locations, variables_from
from bridge.variables.metadata import to_nnx_variable
from nnx_core._changes import touch

__all__ = ["ToNNX", "lazy_init"]


class ToNNX(LinenNode):
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

    __slots__ = ()

    def __init__(self, module: nn.Module, rngs: RngSource = None, *, parity: bool = False):
        if not isinstance(module, nn.Module):
            raise NotALinenModuleError(module)
        # Bound, or made inside another Linen module: NNX owns this one.
        if module.parent is not None:
            module = module.clone(parent=None)
        object.__setattr__(self, "_nnx_variables", {})
        self._nnx_wrap(Wrapped(module, parity))
        if isinstance(rngs, nnx.Rngs) and not parity:
            rngs = rngs.fork()
        elif rngs is not None:
            rngs = nnx.Rngs(rngs)  # streams of its own, with the same keys
        self.__dict__["rngs"] = rngs  # past __setattr__: a field of the Linen module may have this name
        self._nnx_arrange()
        touch(self)

    # ---- calls ----

    def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
        """Make the variables that this call needs and that are not there; see `bridge.lazy_init`."""
        init_one(self, args, kwargs)
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
        run = abstract_run()
        if run is not None and run.place_of(self) is not None:
            record(run, self, args, kwargs, rngs, method)
        elif is_linen_initializing():
            if not self._nnx_variables:
                return self._init(args, kwargs, rngs, method)
            if self._nnx_inventory().collections == ["intermediates"]:  # what an earlier call sowed
                make_variables(self, args, kwargs, rngs, method)
        return self._apply(args, kwargs, rngs, method, mutable)

    #: What `lazy_init` takes for the wrapped module itself; a call that a subclass defines runs like any method.
    _nnx_call = __call__

    def _apply(self, args: Any, kwargs: Any, rngs: RngSource, method: Any, mutable: Any) -> Any:
        inventory, wrapped = self._nnx_inventory(), self._nnx_wrapped
        keys = keys_for(self, rngs)
        run, kwargs = wrapped.method(method, args, kwargs)
        if mutable is None:
            mutable = _writable(inventory.collections) or False
        captured = in_filter(mutable, "intermediates") and captured_around()
        captured = kwargs.pop("capture_intermediates", captured)
        try:
            with reported(self):
                # By the class: `init` and `apply` may be names of the user's (a policy with its own `init`).
                result = nn.Module.apply(
                    wrapped.module,
                    filled(inventory.template),
                    args,
                    kwargs,
                    rngs=keys.by_name or None,
                    method=keys.watching(placed(unpacking(run))),
                    mutable=mutable,
                    capture_intermediates=captured,
                )
        except LINEN_NOT_FOUND as error:
            if inventory.variables or mutable_around() is not None:
                raise  # inside Linen it is Linen's variables that lack something
            raise NotInitializedError(type(wrapped.module).__name__, error) from error
        keys.settle()
        if mutable is False:
            return result
        output, updates = result
        self._write(inventory, updates)
        return output

    def _init(self, args: Any, kwargs: Any, rngs: RngSource, method: Any) -> Any:
        """What the first call returns while the Linen module around is initialised: what Linen's own `init` does."""
        wrapped, around = self._nnx_wrapped, mutable_around()
        keys = keys_for(self, rngs)
        run, kwargs = wrapped.method(method, args, kwargs)
        with reported(self), keys.required(wrapped.module):
            output, variables = nn.Module.init_with_output(
                wrapped.module,
                keys.by_name,
                args,
                kwargs,
                method=keys.watching(placed(unpacking(run))),
                mutable=DenyList("intermediates") if around is None else around,
            )
        keys.settle()
        new = variables_from(leaf for leaf in leaves(variables) if not is_empty(leaf[1]))
        if new:
            self._nnx_add(new)
        return output

    def _write(self, inventory: Inventory, updates: Mapping[str, Any]) -> None:
        run = abstract_run()
        # Where variables are made, layers leave what is there as it is (BatchNorm's averages).
        keeps = is_linen_initializing() or (run is not None and run.keeps(self))
        new = {}
        for location, value in leaves(updates):
            variable = inventory.variables.get(location)
            if variable is None:
                if not is_empty(value):
                    new[location] = to_nnx_variable(location[0], value)
                continue
            # To what is sown, a tuple, Linen appends in init too.
            is_sown = location[0] == "intermediates" or type(value) is tuple
            if is_sown or not keeps:
                write_value(variable, value, location)
        if new:
            self._nnx_add(new)

    # ---- attributes ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_nnx_")):
            # Not filled yet (copy, pickle), or a protocol of Python or its tools.
            raise AttributeError(name)
        if name in self._nnx_variables:
            return at_home(self._nnx_variables[name], self, (name,))
        if self._nnx_wrapped.has(name):
            value = self._nnx_wrapped.get(name)
            return look(self, (), name) if holds_modules(value) else value
        return self._of_linen(name)

    def _of_linen(self, name: str) -> Any:
        """What the Linen module has by this name besides fields: of its class, or made in `setup`."""
        attribute = of_class(type(self.module), name)
        if attribute is None:
            return self._of_setup(name)
        if inspect.isfunction(attribute):
            return functools.partial(self, method=name)
        is_bound_to_class = isinstance(attribute, staticmethod | classmethod)
        if hasattr(attribute, "__get__") and not is_bound_to_class:  # a property, of any kind
            return self(method=lambda module: getattr(module, name))
        return getattr(self.module, name)

    def _of_setup(self, name: str) -> Any:
        # Training flags are set, not computed.
        if name not in WHEN_TRAINING and (has_setup(self.module) or has_getattr(self.module)):
            try:
                return look(self, (), name)
            except AttributeError as error:
                raise self._no_attribute(name) from error
        raise self._no_attribute(name)

    def _no_attribute(self, name: str) -> AttributeError:
        kind = type(self.module).__name__
        return AttributeError(
            f"ToNNX({kind}) has no attribute or variable {name!r}, and neither has {kind}; its"
            f" variables are {list(self._nnx_variables)}."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        nested = nested_variables(value)
        if name in self.__dict__:
            super().__setattr__(name, value)
        elif nested is not None:
            self._put_variables(name, nested)
        elif name in self._nnx_variables and not (name in WHEN_TRAINING and isinstance(value, bool | None)):
            self._set_variable(name, value)
        elif self._nnx_wrapped.has(name):
            self._nnx_check_can_write(name)
            self._nnx_wrap(self._nnx_wrapped.set(name, value))
            touch(self)
        elif name not in self._nnx_variables:  # else `train()` of a model around means a flag, and there is none
            if name not in _OWN and self._is_computed(name):
                raise LinenAttributeError(type(self.module).__name__, name)
            super().__setattr__(name, value)
            self._nnx_arrange()
            touch(self)

    def _is_computed(self, name: str) -> bool:
        """Whether the Linen module makes this attribute itself, so that setting one here would not reach it."""
        attribute = of_class(type(self.module), name)
        if attribute is not None:  # who hides a method calls another one
            return not inspect.isfunction(attribute) and not isinstance(attribute, staticmethod | classmethod)
        try:
            self._of_setup(name)
        except AttributeError:
            return False
        return True

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name not in self._nnx_variables:
            super().__delattr__(name)
        else:
            self._nnx_check_can_write(name)
            del self._nnx_variables[name]
        self._nnx_arrange()
        touch(self)

    def _set_variable(self, name: str, value: Any) -> None:
        self._nnx_check_can_write(name)
        if not isinstance(value, nnx.Variable | LinenScope):
            raise StateAttributeError(name, value)
        self._nnx_variables[name] = value
        touch(self)

    def _put_variables(self, name: str, nested: Mapping[str, Any]) -> None:
        """Write into the Variables below `name`, and hold those that are given and not there.

        Raises:
          VariablesMismatchError: if one that is there is not given, or is given in another shape or dtype.
        """
        self._nnx_check_can_write(name)
        given = dict(locations({name: nested}))
        variables = self._nnx_inventory().variables
        there = {location: x for location, x in variables.items() if location[1] == name and len(location) > 2}
        new = {location: x for location, x in given.items() if location not in there}
        if there:
            known = {location: x for location, x in given.items() if location in there}
            load_into(there, known, f"{name} of ToNNX({type(self.module).__name__})")
        if new:
            self._nnx_add(new)

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


def _writable(held: list[str]) -> Any:
    """The collections that a call may write: those it holds; inside a Linen module, as for any submodule of it."""
    if (around := mutable_around()) is not None:
        return around
    state = [name for name in held if name not in ("params", "intermediates")]
    return union_filters(state, made_around())
