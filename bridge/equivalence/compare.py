"""Two models compared: everything that they compute on equal terms, and where they part.

Law: what is called equal was run on both sides and compared; what could not be is listed; a comparison in which
nothing was compared is an error. Nothing of the caller's is changed.
Knows the other files of this room; knows no files of weights, and no rules but by what they do to values.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import nnx_core as nnx
from bridge._errors import BridgeError, show_path
from bridge._types import Location
from bridge.equivalence.causes import Case, parting
from bridge.equivalence.counterparts import Counterparts, Match, counterparts
from bridge.equivalence.findings import BEFORE, Findings, largest
from bridge.equivalence.inputs import Inputs, inputs_of
from bridge.equivalence.inspection import Inspection, layer_of
from bridge.equivalence.layers import path_pairs
from bridge.equivalence.numbers import is_inexact, is_key, same_bits
from bridge.equivalence.outcome import Outcome, Run
from bridge.equivalence.report import Finding, Parting, Report
from bridge.equivalence.rows import Evidence
from bridge.equivalence.subjects import ComparisonError, Keys, Subject, ValueRules, subject_of
from bridge.equivalence.training import train
from bridge.tracing.trace import Method, Unit
from bridge.variables.kinds import LINEN_COLLECTIONS


class NotEquivalentError(BridgeError, AssertionError):
    """Two models are not equal; `report` says in what."""

    def __init__(self, report: Report):
        self.report = report
        super().__init__(str(report))


def assert_equivalent(a: Any, b: Any, *inputs: Any, **options: Any) -> Report:
    """`compare`, and an error unless the two are equal.

    Raises:
      NotEquivalentError: they are not; with the report, and its text.
      ComparisonError: they cannot be compared.

    >>> import jax.numpy as jnp
    >>> assert_equivalent(jnp.tanh, jnp.tanh, jax.ShapeDtypeStruct((2, 3), "float32")).bit_equal
    True
    """
    report = compare(a, b, *inputs, **options)
    if not report.equal:
        raise NotEquivalentError(report)
    return report


def compare(
    a: Any,
    b: Any,
    *inputs: Any,
    rules: ValueRules | None = None,
    method: Method | tuple[Method, Method] = "__call__",
    seeds: Sequence[int] = (0, 1),
    gradients: bool = True,
    state: bool = True,
    layers: bool = True,
    steps: int = 0,
    tx: Any = None,
    loss: Callable[..., Any] | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> Report:
    """Whether two models compute the same: outputs, gradients, state, training; and where they part, layer by layer.

    Both run compiled, each with its own variables, in full precision. Gradients are those of a loss that weighs every
    inexact output by fixed random numbers. Then both run once more, layer by layer, and `b` a third time, in which
    each of its layers is fed what a's was: so a layer that is wrong is told from one that was fed wrong numbers.

    Args:
      a, b: `(linen_module, variables)`, a `ToNNX` or another NNX module, `(ToLinen, variables)`, or functions. What is
        expected is what `a` does.
      *inputs, **kwargs: of the call: arrays, `jax.ShapeDtypeStruct`s (normal numbers, drawn anew for each seed; 0 and 1
        for integers and bools), trees of these, flags; or the path of an `.npz` with a batch.
      rules: what of Linen's variables is what of the NNX model's; else names decide, or class, shapes and the order of
        calls.
      method: the name of the method to call, or a function of (module, *inputs); or two, a's first.
      seeds: for abstract inputs.
      gradients, state, layers: False leaves them out, which the report says.
      steps: how many steps to train both, with `tx`, an optax optimizer, or two of them.
      loss: (output, *inputs) -> number, for training; by default the distance from random targets.
      rngs: keys of Linen's random streams, by name, or one key; both models get the same ones.

    Raises:
      ComparisonError: bad usage, a model that does not run on the inputs, or nothing that could be compared.

    >>> from flax import linen as nn
    >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
    >>> linen = nn.Dense(4)
    >>> variables = linen.init(jax.random.key(0), jax.numpy.ones((2, 3)))
    >>> native = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> compare((linen, variables), native, x).first.cause
    'parameters'
    >>> nnx.update(native, variables["params"])
    >>> compare((linen, variables), native, x).equal
    True
    """
    _require_training(steps, tx)
    _require_seeds(seeds)
    if isinstance(method, tuple) and len(method) != 2:
        raise ComparisonError("method=", "one for both models, or two, a's first", repr(method), "Give one or two.")
    methods = method if isinstance(method, tuple) else (method, method)
    sides = subject_of(a, methods[0], "a"), subject_of(b, methods[1], "b")
    batch = inputs_of(inputs, kwargs)
    chosen = tuple(seeds) if batch.is_drawn else tuple(seeds)[:1]
    comparison = Comparison(*sides, batch, _keys_of(rngs), chosen, rules)
    comparison.run(gradients=gradients, state=state)
    if steps:
        comparison.train(steps, tx, loss)
    return comparison.report(layers=layers)


def _require_training(steps: Any, tx: Any) -> None:
    if not isinstance(steps, int | np.integer) or steps < 0:
        raise ComparisonError("steps=", "a number of training steps", repr(steps), "Give steps=3, or leave it out.")
    if steps and tx is None:
        raise ComparisonError("training was asked for", "an optimizer, tx=", f"steps={steps} alone", "Pass tx=optax...")
    is_one = hasattr(tx, "init") and hasattr(tx, "update")
    optimizers = (tx,) if tx is None or is_one or not isinstance(tx, tuple) else tx
    if len(optimizers) > 2 or not all(x is None or (hasattr(x, "init") and hasattr(x, "update")) for x in optimizers):
        raise ComparisonError(
            "tx=", "an optax optimizer, or two, a's first", repr(tx), "Pass tx=optax.adam(1e-3), say."
        )


def _require_seeds(seeds: Any) -> None:
    numbers = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else []
    if not numbers or not all(isinstance(seed, int | np.integer) and seed >= 0 for seed in numbers):
        raise ComparisonError("seeds=", "one or more numbers from 0 on", repr(seeds), "Leave seeds=(0, 1).")


def _keys_of(rngs: Any) -> Keys:
    if rngs is None:
        return None
    if isinstance(rngs, str | bytes):
        raise ComparisonError("rngs=", "a key, a seed, Rngs, or keys by stream", repr(rngs), "Give jax.random.key(0).")
    if isinstance(rngs, nnx.Rngs):
        return {name: stream.key.get_value() for name, stream in rngs.items()}
    if isinstance(rngs, Mapping):
        return {name: nnx.rnglib.as_key(key) for name, key in rngs.items()}
    return {"params": nnx.rnglib.as_key(rngs)}


@dataclass
class _Seen:
    """What the first seed with a difference, or else the first, has been run on."""

    seed: int
    args: Any
    kwargs: Any
    is_different: bool


class Comparison:
    """Two subjects, and what has been found so far."""

    def __init__(
        self,
        a: Subject,
        b: Subject,
        inputs: Inputs,
        keys: Keys,
        seeds: tuple[int, ...],
        rules: ValueRules | None,
    ):
        self.a, self.b, self.inputs, self.keys, self.seeds = a, b, inputs, keys, seeds
        self.findings = Findings()
        self._units: dict[str, list[Unit]] = {}
        self.pairs = self._paired(rules)
        self._seen: _Seen | None = None

    # ---- what is what ----

    def _paired(self, rules: ValueRules | None) -> Counterparts:
        try:
            return counterparts(self.a, self.b, rules, self._units_of)
        except ComparisonError:
            raise
        except Exception as error:
            raise ComparisonError(
                "which layers are which cannot be found out",
                "two models that can be traced abstractly, and rules that fit them",
                f"{type(error).__name__}: {error}",
                "Give rules= that say what is what.",
            ) from error

    def _units_of(self, subject: Subject) -> list[Unit]:
        args, kwargs = self.inputs.args, dict(self.inputs.kwargs)
        return subject.units(self.keys, args, kwargs)

    # ---- running ----

    def run(self, *, gradients: bool, state: bool) -> None:
        """Compare parameters, outputs, and what else is asked for."""
        if gradients:
            self._say_what_has_no_gradient()
        else:
            self.findings.leave_out("gradients: gradients=False")
        if not state:
            self.findings.leave_out("state: state=False")
        self._compare_parameters()
        runs = Run(self.a, "a", gradients), Run(self.b, "b", gradients)
        for seed in self.seeds:
            args, kwargs = self.inputs.drawn(seed)
            one = runs[0](self.a.values, self.keys, args, kwargs)
            two = runs[1](self.b.values, self.keys, args, kwargs)
            self.findings.least = min(runs[0].tolerance, runs[1].tolerance)
            self._compare_outcomes(one, two, seed, runs, gradients=gradients, state=state)
            self._look_at(seed, args, kwargs)
        self._compare_presence(runs)
        if self.keys is not None:
            self._compare_other_keys(runs)

    def _say_what_has_no_gradient(self) -> None:
        """Of collections of the user's own: they may well be trained, and only parameters are differentiated by."""
        for which, subject in (("a", self.a), ("b", self.b)):
            inexact = [at for at, x in subject.values.items() if is_inexact(x) and at not in subject.parameters]
            for collection in sorted({at[0] for at in inexact} - LINEN_COLLECTIONS):
                self.findings.leave_out(f"gradients by the collection {collection!r} of {which}: it is not 'params'")

    def _look_at(self, seed: int, args: Any, kwargs: Any) -> None:
        different = any(not finding.equal for finding in self.findings.all)
        if self._seen is None or (different and not self._seen.is_different):
            self._seen = _Seen(seed, args, kwargs, different)

    def _compare_parameters(self) -> None:
        for match in self.pairs.values(self.a.values, self.b.values):
            path, other = show_path(match.a), show_path(match.b)
            if match.a in self.a.parameters:
                self.findings.compare("parameter", path, other, match.x_a, match.x_b, text=match.text)
            elif not _same(self.findings, match):
                text = ", ".join(filter(None, (BEFORE, match.text)))
                self.findings.compare("state", path, other, match.x_a, match.x_b, text=text)

    def _compare_presence(self, runs: tuple[Run, Run]) -> None:
        """What one of two layers has and the other has not; what no output depends on makes no difference."""
        for run, only, other in ((runs[0], self.pairs.only_a, "b"), (runs[1], self.pairs.only_b, "a")):
            for at in only:
                path, side = show_path(at), run.which
                if self._is_unused(run, at):
                    self.findings.leave_out(f"{path}: only in {side}, and no output depends on it")
                    continue
                paths = (path, "") if side == "a" else ("", path)
                text = f"{path} is in {side} and not in {other}"
                self.findings.add(Finding("structure", *paths, None, False, text=text))
        for side, unpaired in (("a", self.pairs.unpaired_a), ("b", self.pairs.unpaired_b)):
            for at in unpaired:
                self.findings.leave_out(f"{show_path(at)} of {side}, and its gradient: no counterpart was found")

    def _is_unused(self, run: Run, at: Location) -> bool:
        """Whether the outputs are the same, bit by bit, with another value there."""
        args, kwargs = self.inputs.drawn(self.seeds[0])
        values = run.subject.values
        moved = jax.tree.map(lambda x: x if is_key(x) else x + jax.numpy.ones_like(x), values[at])
        outcomes = [run(changed, self.keys, args, kwargs) for changed in (values, {**values, at: moved})]
        return same_bits(*(list(outcome.outputs.values()) for outcome in outcomes))

    # ---- one seed ----

    def _compare_outcomes(
        self, one: Outcome, two: Outcome, seed: int, runs: tuple[Run, Run], *, gradients: bool, state: bool
    ) -> None:
        self._compare_outputs(one, two, seed)
        shapes = [[getattr(x, "shape", ()) for x in outcome.outputs.values()] for outcome in (one, two)]
        if gradients and shapes[0] != shapes[1]:
            self.findings.leave_out("gradients: of other outputs in a than in b")
        elif gradients:
            self._compare_gradients(one, two, seed, runs)
        if state:
            self._compare_state(one, two, seed)

    def _compare_outputs(self, one: Outcome, two: Outcome, seed: int) -> None:
        ours, theirs = list(one.outputs.items()), list(two.outputs.items())
        names, others = list(one.outputs), list(two.outputs)
        if names != others:
            text = f"a returns {_named(names)}, b returns {_named(others)}"
            self.findings.add(Finding("structure", "", "", None, False, seed, None, text))
        if not ours and not theirs:
            self.findings.leave_out("outputs: the call returns none")
        common = [name for name in names if name in two.outputs]
        if names != others and common:  # what is missing on one side must not shift the rest
            pairs = [(name, one.outputs[name], name, two.outputs[name]) for name in common]
        elif len(ours) == len(theirs):
            pairs = [(path, x, other, y) for (path, x), (other, y) in zip(ours, theirs, strict=True)]
        else:
            pairs = []
        for path, x, other, y in pairs:
            self.findings.compare("output", path, other, x, y, seed=seed)
            if _is_hollow(x) and _is_hollow(y):
                text = f"output {path}".rstrip()
                self.findings.leave_out(f"{text}: no finite number in a or b (seed {seed}), only which are NaN or inf")

    def _compare_gradients(self, one: Outcome, two: Outcome, seed: int, runs: tuple[Run, Run]) -> None:
        if one.gradients is None and two.gradients is None:
            why = runs[0].why or runs[1].why or "neither model runs under jit"
            self.findings.leave_out(f"gradients: {why}")
            return
        if one.gradients is None or two.gradients is None:
            which, run = ("a", runs[0]) if one.gradients is None else ("b", runs[1])
            why = run.why or "it does not run under jit"
            self.findings.leave_out(f"gradients: {which} has none: {why}")
            return
        self.findings.compare_all("gradient", self.pairs.cotangents(one.gradients, two.gradients), seed=seed)
        ours, theirs = one.input_gradients or {}, two.input_gradients or {}
        matches = [Match((path,), (path,), ours[path], theirs[path]) for path in ours if path in theirs]
        for match in matches:
            text = f"of the input {match.a[0]}"
            floor = self.findings.rounding(match.x_a) * _scale_of(matches)
            self.findings.compare(
                "gradient", f"inputs/{match.a[0]}", f"inputs/{match.b[0]}", match.x_a, match.x_b,
                seed=seed, floor=floor, text=text,
            )  # fmt: skip

    def _compare_state(self, one: Outcome, two: Outcome, seed: int) -> None:
        known_a = {at: x for at, x in {**self.a.values, **one.written}.items() if at in self.a.values}
        known_b = {at: x for at, x in {**self.b.values, **two.written}.items() if at in self.b.values}

        def is_state(match: Match) -> bool:
            if match.a not in self.a.parameters or match.b not in self.b.parameters:
                return True
            return match.a in one.written or match.b in two.written

        matches = filter(is_state, self.pairs.values(known_a, known_b))
        self.findings.compare_all("state", matches, seed=seed)
        self._compare_new(
            {at: x for at, x in one.written.items() if at not in self.a.values},
            {at: x for at, x in two.written.items() if at not in self.b.values},
            seed,
        )

    def _compare_new(self, ours: Mapping[Location, Any], theirs: Mapping[Location, Any], seed: int) -> None:
        """What a call has made: sown values, caches; under the name, in the counterpart of its module."""
        kinds = [{at[1:-1]: object for at in side} for side in (ours, theirs)]
        paths = path_pairs(self.pairs, *kinds)
        left = dict(theirs)
        for at, x in sorted(ours.items()):
            candidates = [(at[0], *paths[at[1:-1]], at[-1])] if at[1:-1] in paths else []
            candidates += [other for other in left if (other[0], other[-1]) == (at[0], at[-1])]
            partner = next((other for other in candidates if other in left), None)
            if partner is None:
                self.findings.leave_out(f"state {show_path(at)}: the call makes it in a, and not in b")
                continue
            self.findings.compare("state", show_path(at), show_path(partner), x, left.pop(partner), seed=seed)
        for at in left:
            self.findings.leave_out(f"state {show_path(at)}: the call makes it in b, and not in a")

    # ---- random streams ----

    def _compare_other_keys(self, runs: tuple[Run, Run]) -> None:
        """The same outputs for other keys too; whether keys matter at all."""
        assert self.keys is not None
        seed = self.seeds[0]
        args, kwargs = self.inputs.drawn(seed)
        others = {name: jax.random.fold_in(key, 1) for name, key in self.keys.items()}
        one, two = (run(run.subject.values, others, args, kwargs) for run in runs)
        before = runs[0](self.a.values, self.keys, args, kwargs)
        if same_bits(list(before.outputs.values()), list(one.outputs.values())):
            self.findings.leave_out("random streams: no output of a depends on the keys")
            return
        if len(one.outputs) != len(two.outputs):
            return
        for (path, x), (other, y) in zip(one.outputs.items(), two.outputs.items(), strict=True):
            self.findings.compare("random", path, other, x, y, seed=seed, text="with other keys")

    def _draws(self, subject: Subject, which: str, seen: _Seen) -> bool:
        """Whether other keys lead to other outputs."""
        if not subject.has_chance(subject.values, self.keys, seen.args, seen.kwargs):
            return False
        names = [*(self.keys or ()), "params", "default"]
        run = Run(subject, which, with_gradients=False)
        outputs = []
        for number in (0, 1):
            keys = {name: jax.random.fold_in(jax.random.key(number), n) for n, name in enumerate(names)}
            outputs.append(run(subject.values, keys, seen.args, seen.kwargs).outputs)
        return not same_bits(*(list(x.values()) for x in outputs))

    # ---- training ----

    def train(self, steps: int, tx: Any, loss: Callable[..., Any] | None) -> None:
        """Train both, on the inputs of the first seed."""
        if not (self.a.parameters and self.b.parameters):
            self.findings.leave_out("training: there are no parameters")
            return
        args, kwargs = self.inputs.drawn(self.seeds[0])
        options = {"steps": steps, "tx": tx, "loss": loss, "keys": self.keys, "seed": self.seeds[0]}
        train(self.a, self.b, self.pairs, self.findings, args=args, kwargs=kwargs, **options)

    # ---- the report ----

    def report(self, *, layers: bool) -> Report:
        """All of it.

        Raises:
          ComparisonError: nothing was compared.
        """
        rows: list[Evidence] = []
        if layers and self._seen is not None:
            seen = self._seen
            inspection = Inspection(self.a, self.b, self.pairs, self.keys, seen.seed, seen.args, seen.kwargs)
            rows = inspection.rows(self.findings)
        else:
            self.findings.leave_out("layers: layers=False")
        found = self.findings.all
        if not found:
            raise ComparisonError(
                "nothing was compared",
                "at least one output, parameter or state on both sides",
                "; ".join(self.findings.not_compared) or "none",
                "Give inputs, a method or rules with which there is something to compare.",
            )
        first = self._parting(rows) if any(not finding.equal for finding in found) else None
        return Report(
            self.a.words,
            self.b.words,
            found,
            tuple(row.row for row in rows),
            first,
            self.seeds,
            tuple(self.findings.not_compared),
            jax.default_backend(),
            {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        )

    def _parting(self, rows: Sequence[Evidence]) -> Parting:
        seen = self._seen
        assert seen is not None
        outputs_differ = any(f.what in ("output", "random") and not f.equal for f in self.findings.all)
        draws = (False, False)
        if outputs_differ:
            draws = self._draws(self.a, "a", seen), self._draws(self.b, "b", seen)
        paths = {row.pair.a.event.path for row in rows if row.pair is not None}
        layers = {show_path(at): layer_of(at, paths) for at in self.a.values}
        held = frozenset(at[1:-1] for at, _ in self.pairs.located or ())
        return parting(Case(self.findings.all, rows, self.pairs.exchanged, draws, layers, held))


def _same(findings: Findings, match: Match) -> bool:
    leaves = list(zip(jax.tree.leaves(match.x_a), jax.tree.leaves(match.x_b), strict=False))
    offs = [findings.difference(x, y) for x, y in leaves if hasattr(x, "dtype") and hasattr(y, "dtype")]
    return all(off.equal and not off.forms for off in offs)


def _named(names: Sequence[str]) -> str:
    return ", ".join(name or "one value" for name in names) or "nothing"


def _is_hollow(x: Any) -> bool:
    """Whether no number in it is finite."""
    if not is_inexact(x) or not x.size:
        return False
    return not bool(jax.numpy.isfinite(x).any())


def _scale_of(matches: Sequence[Match]) -> float:
    return largest([match.x_a for match in matches])
