"""What the tests of derived rules share: two models, random values on both sides, and outputs compared.

Law: every variable is random, so that two layers of one shape that were swapped give other numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import nnx_core as nnx
from bridge.checkpoint.derivation.derive import Derived, derive
from bridge.checkpoint.tree.ops import Read
from bridge.tracing.pure_call import quick_options
from bridge.variables.kinds import collection_of
from bridge.variables.mapping import leaves, tree_of
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(1, 2, 5, 4))


class NestedCalls(nn.Module):
    """`Dense_0` is the last layer: Python evaluates the outer constructor first."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(4)(nn.tanh(nn.Dense(4)(x)))))


class Chain(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(4, 4, rngs=rngs)
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.middle = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.middle(nnx.tanh(self.first(x)))))


def reads(values: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Read]:
    return {at: Read(at, tuple(x.shape), str(x.dtype)) for at, x in values.items()}


def converted(derived: Derived, values: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    def read(path: Any, region: Any = None) -> Any:
        return values[path] if region is None else values[path][region]

    return {at: op.value(read) for at, op in derived.apply(reads(values)).made.items()}


def random_variables(module: Any, *inputs: Any, method: Any = "__call__", **kwargs: Any) -> dict[tuple[str, ...], Any]:
    """By location; variances are positive."""
    call = getattr(type(module), method) if isinstance(method, str) else method
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=call, **kwargs))
    draw = np.random.default_rng(3)
    lowest = {at: 0.5 if at[-1].endswith(("var", "sigma")) else -1 for at, _ in leaves(shapes)}
    return {
        at: np.asarray(draw.uniform(lowest[at], 1.0, x.shape).astype(x.dtype))
        for at, x in leaves(shapes)
        if at[0] != "intermediates"
    }


def located(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    return {
        (collection_of(type(x)), *map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState)
    }


def check(
    linen: Any,
    make: Any,
    *inputs: Any,
    method: Any = "__call__",
    same_bits: bool = True,
    options: Any = None,
    **kwargs: Any,
) -> Derived:
    """Derive, convert random values, and compare the outputs of both models, and the way back."""
    derived = derive(linen, make, *inputs, method=method, **(options or {}), **kwargs)
    methods = method if isinstance(method, tuple) else (method, method)
    values = random_variables(linen, *inputs, method=methods[0], **kwargs)
    made = converted(derived, values)
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    if derived.fresh or any(isinstance(x, nnx.RngState) for _, x in nnx.iter_graph(model)):
        model = make(nnx.Rngs(0))
    variables = located(model)
    assert made.keys() | set(derived.fresh) == variables.keys()
    for at, value in made.items():
        assert variables[at].shape == value.shape, at
        variables[at].set_value(jnp.asarray(value))
    call = getattr(type(linen), methods[0]) if isinstance(methods[0], str) else methods[0]
    expected, _ = jax.jit(
        lambda v, *x: linen.apply(v, *x, method=call, mutable=True, rngs={"params": jax.random.key(0)}, **kwargs),
        compiler_options=quick_options(),
    )(tree_of(values.items()), *inputs)
    graphdef, state = nnx.split(model)

    def run(state: Any, *x: Any) -> Any:
        model, f = nnx.merge(graphdef, state), methods[1]
        return getattr(model, f)(*x, **kwargs) if isinstance(f, str) else f(model, *x, **kwargs)

    actual = jax.jit(run, compiler_options=quick_options())(state, *inputs)
    (assert_trees_equal if same_bits else assert_trees_close)(actual, expected)
    kept = {at: x for at, x in values.items() if at not in derived.dropped}
    assert_trees_equal(dict(sorted(converted(derived.inverse(), made).items())), dict(sorted(kept.items())))
    return derived
