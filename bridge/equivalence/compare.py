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
from bridge.equivalence.causes import Case, named_pairs, parting
from bridge.equivalence.counterparts import Counterparts, Match, counterparts
from bridge.equivalence.effects import compare_effects
from bridge.equivalence.findings import BEFORE, Findings, is_near
from bridge.equivalence.inputs import Inputs, inputs_of
from bridge.equivalence.inspection import Inspection, layer_of
from bridge.equivalence.layers import held_in
from bridge.equivalence.numbers import is_inexact, is_key, on_host, same_bits
from bridge.equivalence.outcome import Kind, Outcome, Run
from bridge.equivalence.report import Finding, Parting, Report
from bridge.equivalence.rounding import Rounding
from bridge.equivalence.rows import Evidence
from bridge.equivalence.subjects import ComparisonError, Keys, Subject, ValueRules, subject_of
from bridge.equivalence.training import train
from bridge.tracing.trace import Method, Unit
from bridge.variables.kinds import LINEN_COLLECTIONS

_MOST_NAMED = 5
_INPUTS = "inputs"


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
      *inputs, **kwargs: of the call: arrays, `jax.ShapeDtypeStruct`s, drawn anew for each seed, trees of these, flags;
        or the path of an `.npz` with a batch. Drawn are normal numbers; 0 and 1 for bools; integers from 0 to the rows
        of the smallest table that they are indices of, in either model; 0 and 1 where an index is computed of them; 0
        to 3 elsewhere, of those that are turned to floating numbers, as masks are, for odd seeds alone.
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
    comparison.run(gradients=gradients, state=state, has_to_pair=gradients or steps > 0)
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


class _Draw:
    """Both models run on the inputs of one seed."""

    def __init__(
        self, seed: int, runs: tuple[Run, Run], outcomes: tuple[Outcome, Outcome], keys: Keys, args: Any, kwargs: Any
    ):
        self.seed, self.runs, self.outcomes, self.args, self.kwargs = seed, runs, outcomes, args, kwargs
        self._keys = keys
        self._rounding = Rounding(runs, outcomes, keys, args, kwargs)

    def least(self, what: Kind, at: Any, other: Any) -> float:
        """The smallest tolerance of two values: above 0 if half precision reaches both."""
        return min(self.outcomes[0].allowed(what, at), self.outcomes[1].allowed(what, other))

    def floor(self, what: Kind, at: Any, other: Any, x: Any, y: Any, floor: float = 0.0) -> tuple[float, str]:
        """What two values may differ by in any case, and why, in words."""
        if is_near(x, y, self.least(what, at, other), floor):
            return floor, ""
        zero = self._rounding.floor(what, at, other, x, y)
        return (zero, "zero but for rounding") if zero > floor else (floor, "")

    def rounding_of(self, what: Kind) -> tuple[Any, Any]:
        """`least` and `floor` of pairs of values."""

        def least(match: Match) -> float:
            return self.least(what, *_places(what, match))

        def floor(match: Match, floor: float) -> tuple[float, str]:
            return self.floor(what, *_places(what, match), match.x_a, match.x_b, floor)

        return least, floor

    def is_unused(self, which: str, at: Location) -> bool:
        """Whether the outputs are the same, bit by bit, with another value there."""
        side = "ab".index(which)
        run, outcome = self.runs[side], self.outcomes[side]
        if np.any(on_host((outcome.gradients or {}).get(at, 0))):
            return False
        values = run.subject.values
        moved = jax.tree.map(lambda x: x if is_key(x) else x + np.ones_like(x), values[at])
        other = run({**values, at: moved}, self._keys, self.args, self.kwargs)
        return same_bits(list(outcome.outputs.values()), list(other.outputs.values()))


def _places(what: Kind, match: Match) -> tuple[Any, Any]:
    """Where an outcome has the two values."""
    if what != "input_gradients":
        return match.a, match.b
    return "/".join(match.a[1:]), "/".join(match.b[1:])


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
        self._runs: tuple[Run, ...] = ()

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
                "Give rules= (--rules) that say what is what; random streams that they draw from: rngs= (--rng).",
            ) from error

    def _units_of(self, subject: Subject) -> list[Unit]:
        args, kwargs = self.inputs.args, dict(self.inputs.kwargs)
        return subject.units(self.keys, args, kwargs)

    # ---- running ----

    def run(self, *, gradients: bool, state: bool, has_to_pair: bool = True) -> None:
        """Compare parameters, outputs, and what else is asked for.

        Args:
          has_to_pair: whether parameters without a counterpart are a finding: something of them is to be compared.
        """
        if gradients:
            self._say_what_has_no_gradient()
        else:
            self.findings.leave_out("gradients: gradients=False")
        if not state:
            self.findings.leave_out("state: state=False")
        self._compare_parameters()
        runs = Run(self.a, "a", gradients), Run(self.b, "b", gradients)
        self._runs = runs
        abstract = self.inputs.args, dict(self.inputs.kwargs)
        for run in runs:
            run.prepare(run.subject.values, self.keys, *abstract)
        self.inputs = self.inputs.within([run.ranges(self.keys, *abstract) for run in runs])
        self.findings.least = min(run.tolerance for run in runs)
        draws: list[_Draw] = []
        for seed in self.seeds:
            args, kwargs = self.inputs.drawn(seed)
            one, two = (run(run.subject.values, self.keys, args, kwargs) for run in runs)
            draw = _Draw(seed, runs, (one, two), self.keys, args, kwargs)
            self._compare_outcomes(draw, gradients=gradients, state=state)
            self._look_at(seed, args, kwargs)
            draws.append(draw)
        self._compare_presence(draws[0], has_to_pair)
        if self.keys is not None:
            self._compare_other_keys(draws[0])

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

    def _compare_presence(self, draw: _Draw, has_to_pair: bool) -> None:
        """What one of two layers has and the other has not, and parameters that were not paired at all.

        What no output depends on makes no difference.
        """
        for which, only, other in (("a", self.pairs.only_a, "b"), ("b", self.pairs.only_b, "a")):
            for at in only:
                path = show_path(at)
                if draw.is_unused(which, at):
                    self.findings.leave_out(f"{path}: only in {which}, and no output depends on it")
                    continue
                paths = (path, "") if which == "a" else ("", path)
                text = f"{path} is in {which} and not in {other}"
                self.findings.add(Finding("structure", *paths, None, False, text=text))
        has_to_pair = has_to_pair and bool(self.a.parameters and self.b.parameters)
        for which, subject, unpaired in (("a", self.a, self.pairs.unpaired_a), ("b", self.b, self.pairs.unpaired_b)):
            lost: list[str] = []
            for at in unpaired:
                path = show_path(at)
                if has_to_pair and at in subject.parameters and not draw.is_unused(which, at):
                    lost.append(path)
                else:
                    self.findings.leave_out(f"{path} of {which}, and its gradient: no counterpart was found")
            if lost:
                self.findings.add(Finding("structure", "", "", None, False, text=_unpaired_text(which, lost)))

    # ---- one seed ----

    def _compare_outcomes(self, draw: _Draw, *, gradients: bool, state: bool) -> None:
        one, two = draw.outcomes
        self._compare_outputs(draw)
        shapes = [[getattr(x, "shape", ()) for x in outcome.outputs.values()] for outcome in (one, two)]
        if gradients and shapes[0] != shapes[1]:
            self.findings.leave_out("gradients: of other outputs in a than in b")
        elif gradients:
            self._compare_gradients(draw)
        if state:
            compare_effects(self.a, self.b, self.pairs, self.findings, one, two, draw.seed)

    def _compare_outputs(self, draw: _Draw) -> None:
        (one, two), seed = draw.outcomes, draw.seed
        ours, theirs = list(one.outputs.items()), list(two.outputs.items())
        names, others = list(one.outputs), list(two.outputs)
        text = f"a returns {_named(names)}, b returns {_named(others)}" if names != others else ""
        if not text and one.containers != two.containers:
            text = f"a returns {one.containers}, b returns {two.containers}"
        if text:
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
            floor, text = draw.floor("outputs", path, other, x, y)
            least = draw.least("outputs", path, other)
            self.findings.compare("output", path, other, x, y, seed=seed, least=least, floor=floor, text=text)
            if _is_hollow(x) and _is_hollow(y):
                text = f"output {path}".rstrip()
                self.findings.leave_out(f"{text}: no finite number in a or b (seed {seed}), only which are NaN or inf")

    def _compare_gradients(self, draw: _Draw) -> None:
        one, two = draw.outcomes
        if one.gradients is None and two.gradients is None:
            why = draw.runs[0].why or draw.runs[1].why or "neither model runs under jit"
            self.findings.leave_out(f"gradients: {why}")
            return
        if one.gradients is None or two.gradients is None:
            which, run = ("a", draw.runs[0]) if one.gradients is None else ("b", draw.runs[1])
            why = run.why or "it does not run under jit"
            self.findings.leave_out(f"gradients: {which} has none: {why}")
            return
        matches = self.pairs.cotangents(one.gradients, two.gradients)
        self.findings.compare_all("gradient", matches, *draw.rounding_of("gradients"), seed=draw.seed)
        ours, theirs = one.input_gradients or {}, two.input_gradients or {}
        matches = []
        for path in filter(theirs.__contains__, ours):
            at = (_INPUTS, *path.split("/"))
            matches.append(Match(at, at, ours[path], theirs[path], f"of the input {path}"))
        self.findings.compare_all("gradient", matches, *draw.rounding_of("input_gradients"), seed=draw.seed)

    # ---- random streams ----

    def _compare_other_keys(self, draw: _Draw) -> None:
        """The same outputs for other keys too; whether keys matter at all."""
        assert self.keys is not None
        others = {name: jax.random.fold_in(key, 1) for name, key in self.keys.items()}
        one, two = (run(run.subject.values, others, draw.args, draw.kwargs) for run in draw.runs)
        if same_bits(list(draw.outcomes[0].outputs.values()), list(one.outputs.values())):
            self.findings.leave_out("random streams: no output of a depends on the keys")
            return
        if len(one.outputs) != len(two.outputs):
            return
        for (path, x), (other, y) in zip(one.outputs.items(), two.outputs.items(), strict=True):
            least = draw.least("outputs", path, other)
            self.findings.compare("random", path, other, x, y, seed=draw.seed, least=least, text="with other keys")

    def _draws(self, run: Run, seen: _Seen) -> bool:
        """Whether other keys lead to other outputs."""
        if not run.draws_numbers:
            return False
        subject, which = run.subject, run.which
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
            _notes(self.pairs),
        )

    def _parting(self, rows: Sequence[Evidence]) -> Parting:
        seen = self._seen
        assert seen is not None
        outputs_differ = any(f.what in ("output", "random") and not f.equal for f in self.findings.all)
        draws = (False, False)
        if outputs_differ:
            draws = self._draws(self._runs[0], seen), self._draws(self._runs[1], seen)
        paths = {row.pair.a.event.path for row in rows if row.pair is not None}
        layers = {show_path(at): layer_of(at, paths) for at in self.a.values}
        held = held_in(self.pairs, self.a.values, self.b.values)
        return parting(Case(self.findings.all, rows, self.pairs.exchanged, draws, layers, held))


def _notes(pairs: Counterparts) -> tuple[str, ...]:
    """That layers were paired by their numbers, which the reader would not expect."""
    if not pairs.exchanged:
        return ()
    return (f"paired by their numbers, against names or the order of calls: {named_pairs(pairs.exchanged)}",)


def _same(findings: Findings, match: Match) -> bool:
    leaves = list(zip(jax.tree.leaves(match.x_a), jax.tree.leaves(match.x_b), strict=False))
    offs = [findings.difference(x, y) for x, y in leaves if hasattr(x, "dtype") and hasattr(y, "dtype")]
    return all(off.equal and not off.forms for off in offs)


def _unpaired_text(which: str, paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return (
        f"no counterpart was found for {', '.join(paths[:_MOST_NAMED])}{more} of {which}, "
        "so neither these parameters nor their gradients were compared: give rules= that say what is what, "
        "or gradients=False for outputs alone"
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(name or "one value" for name in names) or "nothing"


def _is_hollow(x: Any) -> bool:
    """Whether no number in it is finite."""
    if not is_inexact(x) or not x.size:
        return False
    return not np.isfinite(on_host(x)).any()
