"""Both models run on the same values and inputs: whether rules lead to a model that computes the same.

Law: nothing of the caller's is read or changed but the structure of the models: every variable is drawn anew, so that
two layers of one shape that were swapped give other outputs, and the drawn ones are of the size that the author meant.
Knows modules, rules and numbers; knows nothing of how rules are found, or of files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import BridgeError, VariablesMismatchError
from bridge._types import Location, Shape
from bridge.equivalence.compiled import Compiled, options_for
from bridge.equivalence.dependence import ranges_of
from bridge.equivalence.drawing import Draw, with_other_key
from bridge.equivalence.inputs import drawn
from bridge.equivalence.numbers import Difference, difference, form_of, on_host, over, same_bits
from bridge.tracing.pure_call import Values, linen_call, module_of, nnx_call, streams_of
from bridge.tracing.trace import Method


class ForwardMismatchError(BridgeError, ValueError):
    """The two models give other outputs for the same values.

    Attributes:
      path: of the output; "" if there is only one.
      difference, tolerance: the largest difference, and what it may be.
    """

    def __init__(self, path: str, expected: str, found: str, hint: str, difference: float, tolerance: float):
        self.path, self.difference, self.tolerance = path, difference, tolerance
        super().__init__(
            f"output{path}: the two models do not compute the same\n  expected: {expected}\n  found: {found}\n{hint}"
        )


class RandomCallError(BridgeError, ValueError):
    """A call draws random numbers: two models never draw the same ones, so that their outputs say nothing."""

    def __init__(self, model: str):
        super().__init__(
            f"the call of the {model} model draws random numbers, as dropout does\n"
            "  expected: the same output for any keys\n  found: another one with other keys\n"
            "Compare a call without: deterministic=True, train=False, or a `method` that is so."
        )


@dataclass(frozen=True)
class ForwardReport:
    """What a comparison has shown.

    Attributes:
      differences: path of an output -> largest difference.
      tolerances: path of an output -> what that could have been.
      bit_equal: whether all outputs have the same bits.
    """

    differences: Mapping[str, float]
    tolerances: Mapping[str, float]
    bit_equal: bool

    @property
    def worst(self) -> float:
        """The largest difference over its tolerance; at most 1."""
        return max(over(x, self.tolerances[at]) for at, x in self.differences.items())

    def __str__(self) -> str:
        if self.bit_equal:
            return f"{len(self.differences)} outputs, bit for bit the same"
        rows = [f"output{at}: {x:.3g} (up to {self.tolerances[at]:.3g})" for at, x in self.differences.items()]
        return "\n  ".join(["largest differences", *rows])


def compare_forward(
    linen_module: nn.Module,
    nnx_module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    rules: Any,
    *inputs: Any,
    rngs: Any = None,
    method: Method | tuple[Method, Method] = "__call__",
    seed: int = 0,
    **kwargs: Any,
) -> ForwardReport:
    """Run both models, compiled, on the same random variables and inputs, and compare what they return.

    Variables are as Linen's `init` makes them, but each number is multiplied by another in [0.7, 1.3). Where all are
    the same, as in a bias, they are drawn from [0.5, 1.5) with their sign; zeros from [-0.5, 0.5), over the root of
    the fan-in. Integers and bools are shuffled. Matrix products are in full precision. Outputs alone are compared:
    not what a call writes, which `prove` and `derive` do.

    Args:
      linen_module, nnx_module, method, rngs, **kwargs: as for `derive`. Values of the NNX model are used only where the
        rules say nothing of them.
      rules: from Linen to NNX: of `derive`, of `read_rules`, ...
      *inputs: arrays, `jax.ShapeDtypeStruct`s, which are drawn as `bridge.equivalence.compare` does; flags.
      seed: of all that is random.

    Returns:
      The largest difference of each output.

    Raises:
      ForwardMismatchError: outputs differ by more than the tolerance of their dtype, or are not finite.
      RandomCallError: they differ, and one of the models draws random numbers.
      VariablesMismatchError: the rules do not lead to the NNX model's variables.

    >>> from bridge.checkpoint.derivation.derive import derive
    >>> theirs, x = nn.Sequential([nn.Dense(8), nn.Dense(2)]), jax.ShapeDtypeStruct((1, 4), "float32")
    >>> def ours(rngs):
    ...     return nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
    >>> print(compare_forward(theirs, ours, derive(theirs, ours, x), x))
    1 outputs, bit for bit the same
    """
    return Trial(linen_module, nnx_module, inputs, kwargs, rngs, method, seed).compare(rules)


class Trial:
    """Two models and the values they are run on; each is compiled once, for any number of rules."""

    def __init__(
        self,
        linen_module: nn.Module,
        nnx_module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        rngs: Any = None,
        method: Method | tuple[Method, Method] = "__call__",
        seed: int = 0,
    ):
        methods = method if isinstance(method, tuple) else (method, method)
        draw = Draw(seed)
        self._seed, self._abstract = seed, (tuple(inputs), dict(kwargs))
        theirs = linen_call(linen_module, methods[0], rngs, *jax.tree.map(draw.array, self._abstract))
        ours = nnx_call(module_of(nnx_module), methods[1])
        self.values: Values = {at: draw.near(x) for at, x in sorted(theirs.initial().items())}
        self._own = {at: jax.tree.map(draw.array, x) for at, x in sorted(ours.variables.items())}
        self._keys = streams_of(rngs)
        options = options_for(self.values)
        self._run_linen, self._run_nnx = Compiled(theirs.run, options), Compiled(ours.run, options)

    @functools.cached_property
    def _inputs(self) -> Any:
        """Integers of them as far as Linen's tables reach."""
        self._run_linen.prepare(self.values, self._keys, *self._abstract)
        ranges = ranges_of(self._run_linen.program, (self.values, self._keys), self._abstract)
        return drawn(self._abstract, Draw(self._seed).array, ranges, self._seed)

    @functools.cached_property
    def expected(self) -> Any:
        """What the Linen model returns."""
        return self._run_linen(self.values, self._keys, *self._inputs)

    def compare(self, rules: Any) -> ForwardReport:
        """See `compare_forward`."""
        if getattr(rules, "to", "nnx") == "linen":
            rules = rules.inverse()
        values = nnx_values(rules, self.values, self._own)
        actual = self._run_nnx(values, None, *self._inputs)
        notes = "\n".join(map(str, getattr(rules, "unsure", ())))
        try:
            return _report(actual, self.expected, self._run_linen.least, notes)
        except ForwardMismatchError:
            # Both models run once more, with other keys: if chance has made the difference, it says nothing.
            self._require_no_chance(values, actual)
            raise

    def _require_no_chance(self, values: Values, actual: Any) -> None:
        """RandomCallError if other keys make other outputs."""
        random = which_is_random(
            lambda keys: self._run_linen(self.values, keys, *self._inputs), self.expected, self._keys,
            lambda values: self._run_nnx(values, None, *self._inputs), actual, values,
        )  # fmt: skip
        if random is not None:
            raise RandomCallError(random)


def nnx_values(rules: Any, values: Values, own: Values) -> Values:
    """What the rules make of Linen's values; where they say nothing, the NNX model's own.

    Raises:
      VariablesMismatchError: they make what the model has no place for.
    """
    made = rules.convert(values)
    unexpected = [at for at in made if at not in own]
    shapes: list[tuple[Location, Shape, Shape]] = []
    for at, x in made.items():
        if at in own and np.shape(x) != np.shape(own[at]):
            shapes.append((at, np.shape(own[at]), np.shape(x)))
    if unexpected or shapes:
        raise VariablesMismatchError((), unexpected, shapes, source="the rules' outcome", target="the NNX model")
    return dict(own) | made


def which_is_random(
    linen: Callable[[Any], Any], expected: Any, keys: Mapping[str, Any],
    ours: Callable[[Values], Any], actual: Any, values: Values,
) -> str | None:  # fmt: skip
    """Whether other keys make other outputs than `expected` and `actual`: of 'Linen', 'NNX' or None."""
    if not same_bits(linen({name: jax.random.fold_in(key, 1) for name, key in keys.items()}), expected):
        return "Linen"
    others = {location: with_other_key(x) for location, x in values.items()}
    return None if same_bits(ours(others), actual) else "NNX"


# ---- comparing outputs ----


def outputs_apart(actual: Any, expected: Any, least: Any) -> tuple[dict[str, Difference], tuple[str, str] | None]:
    """Path of an output -> difference; or, if nothing can be compared, what was expected and what was found.

    Args:
      least: of each output the smallest tolerance, in the form of `expected`.
    """
    ours, theirs = _outputs(actual), _outputs(expected)
    if [x.shape for _, x in ours] != [x.shape for _, x in theirs] or not ours:
        return {}, (_forms(theirs) or "arrays", _forms(ours) or "nothing")
    if not any(np.isfinite(x).any() for _, x in theirs if x.dtype.kind != "O"):
        return {}, ("finite numbers", "none: nothing can be compared")
    triples = zip(ours, theirs, jax.tree.leaves(least), strict=True)
    return {path: difference(a, b, allowed) for (path, a), (_, b), allowed in triples}, None


def _report(actual: Any, expected: Any, least: Any, notes: str) -> ForwardReport:
    """The report, or the error for the output that is off the most."""
    hint = "Two layers may be swapped: look at print(derived), and give derive(..., rename=...) what is what."
    hint = f"{notes}\n{hint}" if notes else hint
    offs, misfit = outputs_apart(actual, expected, least)
    if misfit is not None:
        raise ForwardMismatchError("", *misfit, hint, math.inf, 0.0)
    worst = max(offs, key=lambda path: (offs[path].ratio, offs[path].absolute))
    size, most = offs[worst].absolute, offs[worst].tolerance
    if size > most:
        wanted = f"a difference of at most {most:.3g}" if most else "no difference"
        raise ForwardMismatchError(worst, wanted, f"one of {size:.3g}", hint, size, most)
    differences = {path: off.absolute for path, off in offs.items()}
    tolerances = {path: off.tolerance for path, off in offs.items()}
    return ForwardReport(differences, tolerances, same_bits(actual, expected))


def _forms(outputs: list[tuple[str, np.ndarray]]) -> str:
    return ", ".join(form_of(x) for _, x in outputs)


def _outputs(tree: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), on_host(x)) for path, x in leaves]
