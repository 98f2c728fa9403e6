"""NNX and Linen modules as submodules of a `bridge.Module`.

Law: where variables are made, the constructor draws its keys from the bridge module's streams, one after another;
else it is only traced, draws nothing, and its variables are those given, or an error.
Knows the running bridge module and both kinds of modules; knows nothing of collections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn

import nnx_core as nnx
from bridge.linen_in_nnx.wrapper import ToNNX
from bridge.modules._errors import OutsideBridgeModuleError
from bridge.modules.scope import ModuleStackEntry, current_context
from bridge.modules.waiting import abstract
from bridge.nnx_in_linen.host import made_by, made_kind


def nnx_in_bridge_mdl(factory: Callable[[nnx.Rngs], nnx.Module], name: str | None = None) -> nnx.Module:
    """An NNX module as a submodule of the bridge module that is running.

    Args:
      factory: a function of an `nnx.Rngs` that returns the module; of flax.nnx's, where its annotation says so
        (`def make(rngs: flax.nnx.Rngs)`), if the module is one of flax.nnx.
      name: its name in a compact method, else `Class_0`; in `setup`, the attribute it is assigned to is its name.

    Raises:
      OutsideBridgeModuleError: if no bridge module is running.
      NameTwiceError: if the name is taken.
      ScopeParamNotFoundError, ScopeParamShapeError: (flax.errors) if the variables given do not fit.

    >>> import nnx_core as nnx, jax, jax.numpy as jnp
    >>> from bridge.modules.module import Module, compact
    >>> class Head(Module):
    ...     @compact
    ...     def __call__(self, x):
    ...         return nnx_in_bridge_mdl(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(x)
    >>> jax.tree.map(jnp.shape, Head().init(0, jnp.ones((1, 2))))
    {'params': {'Linear_0': {'bias': (3,), 'kernel': (2, 3)}}}
    """
    entry = _running("nnx_in_bridge_mdl")
    scope, kind = entry.module.scope, type(entry.module).__name__
    if scope._initializing:
        module = made_by(factory, (), {}, scope.rngs, None)
    else:
        module = abstract(factory, scope.rngs, kind)
    return _attached(entry, module, made_kind(module), name)


def linen_in_bridge_mdl(linen_module: nn.Module, name: str | None = None) -> nnx.Module:
    """A Linen module as a submodule of the bridge module that is running: a `ToNNX` of it.

    Args:
      linen_module: the Linen module; its variables are made by the first call in `init`.
      name: as for `nnx_in_bridge_mdl`.

    Raises:
      OutsideBridgeModuleError: if no bridge module is running.
      NameTwiceError: if the name is taken.

    >>> from flax import linen as nn
    >>> import jax, jax.numpy as jnp
    >>> from bridge.modules.module import Module, compact
    >>> class Head(Module):
    ...     @compact
    ...     def __call__(self, x):
    ...         return linen_in_bridge_mdl(nn.Dense(3))(x)
    >>> jax.tree.map(jnp.shape, Head().init(0, jnp.ones((1, 2))))
    {'params': {'Dense_0': {'bias': (3,), 'kernel': (2, 3)}}}
    """
    entry = _running("linen_in_bridge_mdl")
    scope = entry.module.scope
    module = ToNNX(linen_module, rngs=scope.rngs if scope._initializing else None)
    if not scope._initializing:
        module.rngs = scope.rngs  # the streams themselves: a fork would draw from each of them
    return _attached(entry, module, type(linen_module), name)


def _running(function: str) -> ModuleStackEntry:
    entry = current_context()
    if entry is None or entry.module.scope is None:
        raise OutsideBridgeModuleError(function)
    return entry


def _attached(entry: ModuleStackEntry, module: nnx.Module, kind: type, name: str | None) -> Any:
    if not entry.in_compact and name is None:
        return module  # the attribute that it is assigned to names it
    return entry.module._attach(entry, name or entry.automatic_name(kind), module)
