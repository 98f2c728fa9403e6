"""A layer beside its twin in Linen, as two pure functions of the same values, and their comparison.

Law: both sides get the same bits and must return the same bits (or the table's tolerance): output, updated
collections, gradients with respect to parameters and input. Knows no particular layer: `tests/layers.py` does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from tests.support.arrays import key
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY = key(17)  # what both sides get where a call needs randomness
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
    same_initial_values: bool = True  # False where a seed gives other values than in flax.nnx: say why in the row
    same_bits: bool = True  # False only where the arithmetic differs from Linen's on purpose: say why in the row
    # Forms by dtypes, traced once: hundreds of tests ask for the same few.
    _forms: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def example(self, dtype: Any = jnp.float32) -> jax.Array:
        """The input. Its mean is not zero, so that dtypes show in the statistics."""
        draw = np.random.default_rng(1)  # not jax.random, which compiles a program for each shape
        if self.integers_below:
            return jnp.asarray(draw.integers(-1, self.integers_below, self.shape, np.int32))
        return jnp.asarray((draw.normal(size=self.shape) + 3).astype(dtype))

    def variables(self, **dtypes: Any) -> Values:
        """Linen's variables with random contents: zeros and ones would hide a swapped or forgotten one."""
        draw = np.random.default_rng(2)
        return {
            path: jnp.asarray(draw.uniform(0.1, 1.0, leaf.shape).astype(leaf.dtype))
            for path, leaf in self._once("variables", self._form_of_variables, dtypes)
        }

    def _form_of_variables(self, dtypes: Mapping[str, Any]) -> list[tuple[str, jax.ShapeDtypeStruct]]:
        method = {} if self.method == "__call__" else {"method": self.method}

        def init(x: jax.Array) -> Any:
            return self.twin(**dtypes).init(KEY, x, **self.twin_modes[False], **method)

        return sorted(_flat(jax.eval_shape(init, self.example())).items())

    def _once(self, what: str, form: Callable[[Mapping[str, Any]], Any], dtypes: Mapping[str, Any]) -> Any:
        key = (what, *sorted(dtypes.items()))
        if key not in self._forms:
            self._forms[key] = form(dtypes)
        return self._forms[key]

    def write(self, module: Any, values: Values) -> None:
        """Copy `values` into the module; every one of them, into every one of its parameters."""
        mapped = [name for names in self.params.values() for name in _names(names)]
        assert sorted(mapped) == sorted(values), "the row's parameter map is not Linen's layout"
        for path, names in self.params.items():
            parts = [values[name] for name in _names(names)]
            _variable(module, path).set_value(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1))

    def read(self, module: Any) -> Values:
        """The module's values by Linen's paths."""
        return self.to_linen({path: _variable(module, path)[...] for path in self.params})

    def to_linen(self, values: Mapping[str, jax.Array]) -> Values:
        """Values by the module's paths, some or all, as values by Linen's paths."""
        found = {}
        for path, value in values.items():
            names = _names(self.params[path])
            parts = [value] if len(names) == 1 else jnp.split(value, len(names), axis=-1)
            found |= dict(zip(names, parts, strict=True))
        return found

    def module(self, values: Values, **dtypes: Any) -> Any:
        """A new module with these values, which may be written under the running trace."""

        graphdef, state = self._once("module", self._form_of_module, dtypes)
        module = nnx.merge(graphdef, jax.tree.map(_blank, state))
        self.write(module, values)
        return module

    def _form_of_module(self, dtypes: Mapping[str, Any]) -> tuple[Any, Any]:
        def make() -> Any:
            return self.make(nnx, nnx.Rngs(0), **dtypes)

        # Abstract: initial values would only cost time, and are not part of the program that is compared.
        graphdef, state = nnx.split(nnx.eval_shape(make))
        if not all(isinstance(leaf, nnx.Variable) for _, leaf in nnx.to_flat_state(state)):
            with jax.ensure_compile_time_eval():  # arrays of its own, such as a mask, must be what they are
                graphdef, state = nnx.split(make())
        return graphdef, state

    def call(self, module: Any, x: jax.Array, **modes: Any) -> Any:
        """The layer's output, from either library's module."""
        return (getattr(module, self.method) if isinstance(self.method, str) else partial(self.method, module))(
            x, **modes
        )

    def functional(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[Any, Values]]:
        """The layer as a pure function (values, x) -> (y, updated values)."""

        def f(values: Values, x: jax.Array) -> tuple[Any, Values]:
            module = self.module(values, **dtypes)
            before = {path: _variable(module, path).get_value() for path in self.params}
            y = self.call(module, x, **self.modes[train])
            after = {path: _variable(module, path).get_value() for path in self.params}
            # Only what was written: splitting fused parameters again is no part of the layer's program.
            return y, values | self.to_linen({path: v for path, v in after.items() if v is not before[path]})

        return f

    def functional_twin(self, *, train: bool, **dtypes: Any) -> Callable[[Values, jax.Array], tuple[Any, Values]]:
        """The Linen twin in the same form."""
        twin = self.twin(**dtypes)

        def f(values: Values, x: jax.Array) -> tuple[Any, Values]:
            variables = unflatten_dict({_keys(path): value for path, value in values.items()})
            y, updates = twin.apply(
                variables, x, mutable=DenyList("params"), method=self.method, **self.twin_modes[train]
            )
            return y, values | _flat(updates)

        return f


def _blank(leaf: Any) -> Any:
    """Zeros, or one key, where a leaf is abstract."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(KEY, leaf.shape)
    return np.zeros(leaf.shape, leaf.dtype)


def _flat(tree: Any) -> Values:
    """Linen's variables by path. WeightNorm's keys hold slashes of their own, which a path shows as `|`."""
    return {"/".join(key.replace("/", "|") for key in keys): leaf for keys, leaf in flatten_dict(tree).items()}


def _keys(path: str) -> tuple[str, ...]:
    return tuple(key.replace("|", "/") for key in path.split("/"))


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


def assert_equal_to_twin(
    layer: Layer, *, train: bool, inputs: Any = jnp.float32, **dtypes: Any
) -> dict[str, float | bool]:
    """Forward, updated statistics and both gradients are Linen's, under jit, for the same values.

    Bit for bit on CPU, where both sides compile to the same program; else within the table of tolerances, at the
    precision of the computation: the float32 gradient of a float16 product has float16's.
    Returns the largest differences, for the report.
    """
    values, x = layer.variables(**dtypes), layer.example(inputs)
    f, g = (with_gradients(make(train=train, **dtypes)) for make in (layer.functional, layer.functional_twin))
    if (results := unless_same_program(f, g, values, x)) is None:
        return {"forward": 0.0, "gradient": 0.0, "bits": True}
    ours, theirs = results
    exact = layer.same_bits and jax.default_backend() == "cpu"
    if exact:
        assert_trees_equal(ours, theirs)
    else:
        assert_trees_close(*(_rounded(tree, dtypes.get("dtype")) for tree in (ours, theirs)))
    return {**forward_and_gradient(ours, theirs), "bits": exact or same_bits(ours, theirs)}


def _rounded(tree: Any, dtype: Any) -> Any:
    """Leaves of a wider floating dtype in `dtype`, which is what they were computed in."""

    def rounded(x: jax.Array) -> jax.Array:
        wider = jnp.issubdtype(x.dtype, jnp.floating) and jnp.promote_types(x.dtype, dtype) == x.dtype
        return x.astype(dtype) if wider else x

    return tree if dtype is None else jax.tree.map(rounded, tree)


def with_gradients(f: Callable[[Values, jax.Array], tuple[Any, Values]]) -> Callable[..., Any]:
    """(values, x) -> output, updated values and both gradients of a weighted sum of the output."""

    def g(values: Values, x: jax.Array) -> dict[str, Any]:
        def loss(values: Values, x: jax.Array) -> tuple[jax.Array, Any]:
            y, updated = f(values, x)
            return sum(map(weighted_sum, jax.tree.leaves(y))), (y, updated)

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
        grads, (y, updated) = jax.grad(loss, argnums, has_aux=True)(values, x)
        return {"output": y, "updated": updated, "gradients": grads}

    return g


def weighted_sum(y: jax.Array) -> jax.Array:
    """A weight for each output: the gradient of a plain sum is zero behind a normalization."""
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y.astype(jnp.float32) * weights)


def unless_same_program(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any) -> tuple[Any, Any] | None:
    """What both return for `args`, compiled; None if both trace or lower to one and the same program.

    Then they are equal on every input, compiled or not: most layers are, and need not be compiled twice to be
    compared. Of two programs every operation is compared, which arguments it takes, the constants, and the results'
    tree, shapes and dtypes; not the names of functions. Nine in ten are one already as they are traced: to print a
    trace takes a tenth of the time that it takes to lower it.
    """
    traced = [jax.jit(f, keep_unused=True).trace(*args) for f in (ours, theirs)]  # or arguments would move up
    results = [jax.tree.flatten(jax.tree.map(lambda x: (x.shape, x.dtype), t.out_info)) for t in traced]
    constants = [_constants(t.jaxpr) for t in traced]  # their values are no part of the text
    comparable = results[0] == results[1] and same_bits(*constants)
    if comparable and _trace(traced[0]) == _trace(traced[1]):
        return None
    first, second = (t.lower() for t in traced)
    if comparable and _program(first) == _program(second):
        return None
    return first.compile()(*args), second.compile()(*args)


def _trace(traced: Any) -> str:
    """The jaxpr's text, in which variables are named by the order in which they appear."""
    text = str(traced.jaxpr)
    assert "..." not in text  # nothing is left out of it
    return text


def _constants(jaxpr: Any) -> list[Any]:
    """The constants of a jaxpr, closed or not, and of those inside it."""
    constants = list(getattr(jaxpr, "consts", ()))
    for eqn in jaxpr.eqns:
        inner = jax.tree.leaves(list(eqn.params.values()))
        for value in inner:
            constants += _constants(value) if hasattr(value, "eqns") else []
    return constants


def _program(lowered: Any) -> str:
    """The StableHLO text, with functions named by the order in which they appear."""
    names: dict[str, str] = {}
    text = lowered.as_text()
    assert "dense_resource" not in text  # nothing is left out of it
    return re.sub(r"@[\w.]+|@\"[^\"]+\"", lambda found: names.setdefault(found[0], f"@{len(names)}"), text)


def equations(jaxpr: Any) -> int:
    """Number of equations, those of inner jaxprs included."""
    inner = (getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values())
    return len(jaxpr.eqns) + sum(equations(value) for value in inner if hasattr(value, "eqns"))


def max_difference(ours: Any, theirs: Any) -> float:
    """The largest |a - b| over all leaves; NaN in the same place is no difference. For reports: it asserts nothing."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max((_difference(np.asarray(a), np.asarray(b)) for a, b in pairs), default=0.0)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    wide = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.max(np.where(np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64)), 0, wide), initial=0))


def forward_and_gradient(ours: Any, theirs: Any) -> dict[str, float]:
    """Both for what `with_gradients` returns."""
    return {
        "forward": max_difference((ours["output"], ours["updated"]), (theirs["output"], theirs["updated"])),
        "gradient": max_difference(ours["gradients"], theirs["gradients"]),
    }


def same_bits(ours: Any, theirs: Any) -> bool:
    """Whether `assert_trees_equal` passes."""
    try:
        assert_trees_equal(ours, theirs)
    except AssertionError:
        return False
    return True
