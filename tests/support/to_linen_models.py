"""Models and helpers of the ToLinen tests."""

import jax
import jax.extend.core
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal
from tests.twins import unless_same_program

KEY, DROPOUT = jax.random.key(0), {"dropout": jax.random.key(1)}
X = jnp.asarray(normal(7, 8, 3) + 1)


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


def equal_programs(ours, theirs, *args):
    """Both functions give equal results; what lowers to one and the same program is not compiled to see it."""
    results = unless_same_program(ours, theirs, *args)
    if results is not None:
        equal(*results)


class Block(nnx.Module):
    def __init__(self, width, rate=0.0, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


class Net(nnx.Module):
    def __init__(self, width, depth, classes=2, rate=0.0, *, rngs):
        self.blocks = [Block(width, rate, rngs=rngs) for _ in range(depth)]
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x, train=True):
        if not train:
            self.eval()
        x = self.features(x)
        self.sow(nnx.Intermediate, "h", x)
        return self.head(x)


def native(make, variables):
    """The NNX module itself, with the weights of `variables`."""
    module = make()
    for path, x in list(nnx.iter_graph(module)):
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState):
            leaf = variables[nnx.variable_name_from_type(type(x))]
            for key in path:
                leaf = leaf[str(key)]
            x.set_value(leaf)
    return module


def primitives(f, *args):
    """Names of all primitives of a function, one for each use, inner jaxprs included."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found.append(eqn.primitive.name)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(sub)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found


def changed(variables, path, value=None):
    flat = flatten_dict(variables, sep="/")
    flat[path] = value
    return unflatten_dict({k: v for k, v in flat.items() if v is not None}, sep="/")
