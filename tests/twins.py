"""A layer beside its twin in Linen, as two pure functions of the same values, and their comparison.

Law: both sides get the same bits and must return the same bits (or the table's tolerance): output, updated
collections, gradients with respect to parameters and input. Knows no particular layer: `tests/layers.py` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY = jax.random.key(17)  # what both sides get where a call needs randomness
Values = dict[str, jax.Array]  # Linen path -> array
Modes = Mapping[bool, Mapping[str, Any]]  # train? -> keyword arguments of the call

NO_MODES: Modes = {True: {}, False: {}}


@dataclass(frozen=True)
class Layer:
    """One layer in both APIs. Paths are joined with `/`; those of Linen start with the collection."""

    name: str
    make: Callable[..., Any]  # (lib, rngs, **dtypes) -> module; lib is nnx_core, or flax.nnx as an oracle
    twin: Callable[..., linen.Module]  # (**dtypes) -> Linen module
    shape: tuple[int, ...]  # of the example input
    # path in the module -> path in Linen's variables; several are joined along the last axis (fused gates)
    params: Mapping[str, str | tuple[str, ...]]
    modes: Modes = field(default_factory=lambda: NO_MODES)
    twin_modes: Modes = field(default_factory=lambda: NO_MODES)
    # Its name, or a function (module, x, **modes) -> output that calls either side
    method: str | Callable[..., Any] = "__call__"
    integers_below: int | None = None  # the input is integers, not numbers
    in_flax_nnx: bool = True  # whether flax.nnx has the layer under this name: signatures and initial values
    same_bits: bool = True  # False only where the arithmetic differs from Linen's on purpose: say why in the row

    def example(self, dtype: Any = jnp.float32) -> jax.Array:
        """The input. Its mean is not zero, so that dtypes show in the statistics."""
        if self.integers_below:
            return jax.random.randint(jax.random.key(1), self.shape, -1, self.integers_below)
        return (jax.random.normal(jax.random.key(1), self.shape) + 3).astype(dtype)

    def variables(self, **dtypes: Any) -> Values:
        """Linen's variables with random contents: zeros and ones would hide a swapped or forgotten one."""
        shapes = jax.eval_shape(
            lambda x: self.twin(**dtypes).init(
                KEY,
                x,
                **self.twin_modes[False],
                **({} if self.method == "__call__" else {"method": self.method}),
            ),
            self.example(),
        )
        flat = flatten_dict(shapes, sep="/")
        keys = jax.random.split(jax.random.key(2), len(flat)) if flat else []
        return {
            path: jax.random.uniform(key, leaf.shape, minval=0.1, maxval=1.0).astype(leaf.dtype)
            for key, (path, leaf) in zip(keys, sorted(flat.items()), strict=True)
        }

    def write(self, module: Any, values: Values) -> None:
        """Copy `values` into the module; every one of them, into every one of its parameters."""
        mapped = [name for names in self.params.values() for name in _names(names)]
        assert sorted(mapped) == sorted(values), "the row's parameter map is not Linen's layout"
        for path, names in self.params.items():
            parts = [values[name] for name in _names(names)]
            _variable(module, path).set_value(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1))

    def read(self, module: Any) -> Values:
        values = {}
        for path, names in self.params.items():
            value, names = _variable(module, path)[...], _names(names)
            parts = [value] if len(names) == 1 else jnp.split(value, len(names), axis=-1)
            values |= dict(zip(names, parts, strict=True))
        return values

    def call(self, module: Any, x: jax.Array, **modes: Any) -> Any:
        """The layer's output, from either library's module."""
        return (getattr(module, self.method) if isinstance(self.method, str) else partial(self.method, module))(
            x, **modes
        )

    def functional(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[Any, Values]]:
        """The layer as a pure function (values, x) -> (y, updated values)."""
        graphdef, state = nnx.split(self.make(nnx, nnx.Rngs(0), **dtypes))

        def f(values: Values, x: jax.Array) -> tuple[Any, Values]:
            # Variables of this trace, so that they can be written.
            module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
            self.write(module, values)
            y = self.call(module, x, **self.modes[train])
            return y, self.read(module)

        return f

    def functional_twin(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[Any, Values]]:
        """The Linen twin in the same form."""
        twin = self.twin(**dtypes)

        def f(values: Values, x: jax.Array) -> tuple[Any, Values]:
            variables = unflatten_dict(values, sep="/")
            y, updates = twin.apply(
                variables, x, mutable=DenyList("params"), method=self.method, **self.twin_modes[train]
            )
            return y, values | flatten_dict(updates, sep="/")

        return f


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _variable(module: Any, path: str) -> Any:
    """The Variable at `path`: attributes, and keys or indices of containers."""
    for name in path.split("/"):
        if hasattr(module, name):
            module = getattr(module, name)
        else:
            module = module[int(name) if name.isdigit() else name]
    return module


def assert_equal_to_twin(layer: Layer, *, train: bool, inputs: Any = jnp.float32, **dtypes: Any) -> None:
    """Forward, updated statistics and both gradients are Linen's, under jit, for the same values.

    Bit for bit on CPU, where both sides compile to the same program; else within the table of tolerances.
    """
    values, x = layer.variables(**dtypes), layer.example(inputs)
    ours = jax.jit(with_gradients(layer.functional(train=train, **dtypes)))(values, x)
    theirs = jax.jit(with_gradients(layer.functional_twin(train=train, **dtypes)))(values, x)
    exact = layer.same_bits and jax.default_backend() == "cpu"
    (assert_trees_equal if exact else assert_trees_close)(ours, theirs)


def with_gradients(f: Callable[[Values, jax.Array], tuple[Any, Values]]) -> Callable[..., Any]:
    """(values, x) -> output, updated values and both gradients of a weighted sum of the output."""

    def g(values: Values, x: jax.Array) -> dict[str, Any]:
        def loss(values: Values, x: jax.Array) -> tuple[jax.Array, Any]:
            y, updated = f(values, x)
            return sum(map(_weighted_sum, jax.tree.leaves(y))), (y, updated)

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
        grads, (y, updated) = jax.grad(loss, argnums, has_aux=True)(values, x)
        return {"output": y, "updated": updated, "gradients": grads}

    return g


def _weighted_sum(y: jax.Array) -> jax.Array:
    """A weight for each output: the gradient of a plain sum is zero behind a normalization."""
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y.astype(jnp.float32) * weights)
