"""The table of layers: one row each, with its twin in Linen and the map between their parameters.

Law: whatever is tested for every layer (Linen equivalence, transforms, layouts) is tested from these rows, so
a new layer is one new row. `assert_equal_to_twin` is the comparison; options that only one layer has are rows
that its own test file makes with `dataclasses.replace`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
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
    params: Mapping[str, str]  # path in the module -> path in Linen's variables
    modes: Modes = field(default_factory=lambda: NO_MODES)
    twin_modes: Modes = field(default_factory=lambda: NO_MODES)
    method: str = "__call__"
    integers_below: int | None = None  # the input is integers, not numbers

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
        assert sorted(self.params.values()) == sorted(values), "the row's parameter map is not Linen's layout"
        for path, linen_path in self.params.items():
            _variable(module, path).set_value(values[linen_path])

    def read(self, module: Any) -> Values:
        return {linen_path: _variable(module, path)[...] for path, linen_path in self.params.items()}

    def functional(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[jax.Array, Values]]:
        """The layer as a pure function (values, x) -> (y, updated values)."""
        graphdef, state = nnx.split(self.make(nnx, nnx.Rngs(0), **dtypes))

        def f(values: Values, x: jax.Array) -> tuple[jax.Array, Values]:
            # Variables of this trace, so that they can be written.
            module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
            self.write(module, values)
            y = getattr(module, self.method)(x, **self.modes[train])
            return y, self.read(module)

        return f

    def functional_twin(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[jax.Array, Values]]:
        """The Linen twin in the same form."""
        twin = self.twin(**dtypes)

        def f(values: Values, x: jax.Array) -> tuple[jax.Array, Values]:
            variables = unflatten_dict(values, sep="/")
            y, updates = twin.apply(variables, x, mutable=["batch_stats"], method=self.method, **self.twin_modes[train])
            return y, values | flatten_dict(updates, sep="/")

        return f


def _variable(module: Any, path: str) -> Any:
    for name in path.split("/"):
        module = getattr(module, name)
    return module


def assert_equal_to_twin(layer: Layer, *, train: bool, inputs: Any = jnp.float32, **dtypes: Any) -> None:
    """Forward, updated statistics and both gradients are Linen's, under jit, for the same values.

    Bit for bit on CPU, where both sides compile to the same program; else within the table of tolerances.
    """
    values, x = layer.variables(**dtypes), layer.example(inputs)
    ours = jax.jit(_with_gradients(layer.functional(train=train, **dtypes)))(values, x)
    theirs = jax.jit(_with_gradients(layer.functional_twin(train=train, **dtypes)))(values, x)
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(ours, theirs)


def _with_gradients(f: Callable[[Values, jax.Array], tuple[jax.Array, Values]]) -> Callable[..., Any]:
    def g(values: Values, x: jax.Array) -> dict[str, Any]:
        def loss(values: Values, x: jax.Array) -> tuple[jax.Array, Any]:
            y, updated = f(values, x)
            # A weight for each output: the gradient of a plain sum is zero behind a normalization.
            weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y.astype(jnp.float32) * weights), (y, updated)

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
        grads, (y, updated) = jax.grad(loss, argnums, has_aux=True)(values, x)
        return {"output": y, "updated": updated, "gradients": grads}

    return g


LAYERS = (
    Layer(
        "Linear",
        make=lambda lib, rngs, **d: lib.Linear(4, 5, rngs=rngs, **d),
        twin=lambda **d: linen.Dense(5, **d),
        shape=(2, 3, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
    ),
    Layer(
        "Conv",
        make=lambda lib, rngs, **d: lib.Conv(4, 6, (3, 3), rngs=rngs, **d),
        twin=lambda **d: linen.Conv(6, (3, 3), **d),
        shape=(2, 5, 7, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
    ),
    Layer(
        "BatchNorm",
        make=lambda lib, rngs, **d: lib.BatchNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.BatchNorm(**d),
        shape=(6, 3, 4),
        params={
            "scale": "params/scale",
            "bias": "params/bias",
            "mean": "batch_stats/mean",
            "var": "batch_stats/var",
        },
        modes={train: {"use_running_average": not train} for train in (True, False)},
        twin_modes={train: {"use_running_average": not train} for train in (True, False)},
    ),
    Layer(
        "LayerNorm",
        make=lambda lib, rngs, **d: lib.LayerNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.LayerNorm(**d),
        shape=(2, 3, 4),
        params={"scale": "params/scale", "bias": "params/bias"},
    ),
    Layer(
        "Dropout",  # computes in the dtype of its input and has no parameters
        make=lambda lib, rngs, **_: lib.Dropout(0.3, rngs=rngs),
        twin=lambda **_: linen.Dropout(0.3),
        shape=(8, 16),
        params={},
        modes={train: {"deterministic": not train, "rngs": KEY} for train in (True, False)},
        twin_modes={train: {"deterministic": not train, "rng": KEY} for train in (True, False)},
    ),
    Layer(
        "Embed",
        make=lambda lib, rngs, **d: lib.Embed(7, 4, rngs=rngs, **d),
        twin=lambda **d: linen.Embed(7, 4, **d),
        shape=(2, 3),
        params={"embedding": "params/embedding"},
        integers_below=8,  # 7 is out of range: NaN on both sides
    ),
    Layer(
        "Embed.attend",
        make=lambda lib, rngs, **d: lib.Embed(7, 4, rngs=rngs, **d),
        twin=lambda **d: linen.Embed(7, 4, **d),
        shape=(2, 3, 4),
        params={"embedding": "params/embedding"},
        method="attend",
    ),
    Layer(
        "PReLU",  # Linen's has no dtype: it computes in the dtype of its input
        make=lambda lib, rngs, dtype=None, **d: lib.PReLU(**d),
        twin=lambda dtype=None, **d: linen.PReLU(**d),
        shape=(2, 3, 4),
        params={"negative_slope": "params/negative_slope"},
    ),
)
