"""The first-generation NNX API: `from nnx_core import legacy as nnx`.

State is taken out of a module and passed through plain JAX transforms by hand. Law: everything here is a view of
the rooms below (graph, state, kinds, rngs, nn); a legacy Module is an nnx_core Module, so both APIs mix.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from nnx_core import legacy as nnx
  >>> class Linear(nnx.Module):
  ...     def __init__(self, din, dout, *, ctx):
  ...         self.w = nnx.param(jax.random.uniform(ctx.make_rng("params"), (din, dout)))
  ...         self.b = nnx.param(jnp.zeros((dout,)))
  ...
  ...     def __call__(self, x):
  ...         return x @ self.w + self.b
  >>> params, moduledef = Linear(3, 2, ctx=nnx.Context(jax.random.key(0))).split()
  >>> @jax.jit
  ... def train_step(params, x, y):
  ...     def loss(params):
  ...         pred, _ = moduledef.apply(params)(x)
  ...         return jnp.mean((pred - y) ** 2)
  ...
  ...     grads = jax.grad(loss)(params)
  ...     return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  >>> list(train_step(params, jnp.ones((4, 3)), jnp.zeros((4, 2))))
  [('b',), ('w',)]
"""

from nnx_core.legacy.collections import Variable, collection_of, param, var
from nnx_core.legacy.context import Context
from nnx_core.legacy.layers import Linear
from nnx_core.legacy.module import Map, Module, Seq
from nnx_core.legacy.moduledef import ModuleDef
from nnx_core.legacy.state import State

__all__ = [
    # collections
    "Variable",
    "collection_of",
    "param",
    "var",
    # context
    "Context",
    # layers
    "Linear",
    # module
    "Map",
    "Module",
    "Seq",
    # moduledef
    "ModuleDef",
    # state
    "State",
]
