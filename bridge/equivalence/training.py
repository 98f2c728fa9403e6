"""Both models trained for some steps: losses, parameters, and what the optimizer keeps for each of them.

Law: each model is trained by its own gradients, on the same inputs and keys, from its own values. An element whose
gradient is no more than rounding is left out, and said to be: adaptive optimizers make a step of full size of its sign.
Knows subjects, optimizers and findings; knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bridge._errors import show_path
from bridge._types import Location
from bridge.equivalence.compiled import Compiled, options_for
from bridge.equivalence.counterparts import Counterparts, Match
from bridge.equivalence.findings import Findings, is_near, rounding
from bridge.equivalence.numbers import is_inexact, largest, on_host, relative_tolerance
from bridge.equivalence.report import Finding
from bridge.equivalence.subjects import ComparisonError, Keys, Subject, Values
from bridge.tracing.trace import is_array
from bridge.variables.mapping import tree_of

_STEP = 2.0  # of the last bit of a parameter, which each step may round otherwise
_MOST_NAMED = 5
_NORMALIZED = 10.0  # an optimizer that divides by a gradient's size hands on its relative error, not the absolute one


@dataclass
class Trained:
    """A model in training.

    Attributes:
      values: all of its variables.
      state: the optimizer's.
      gradients, loss: of the last step.
      least: of loss, gradients, values and state, the smallest tolerance: above 0 where half precision has been on the
        way to it in any step.
    """

    subject: Subject
    values: dict[Location, Any]
    state: Any
    gradients: Values = field(default_factory=dict)
    loss: Any = None
    least: Any = None

    def allowed(self, what: int, at: Location) -> float:
        """The smallest tolerance of a gradient (1), or a value (2)."""
        return max(jax.tree.leaves(self.least[what].get(at)), default=0.0)


def train(
    a: Subject,
    b: Subject,
    pairs: Counterparts,
    findings: Findings,
    *,
    steps: int,
    tx: Any,
    loss: Callable[..., Any] | None,
    keys: Keys,
    args: Any,
    kwargs: Any,
    seed: int,
) -> None:
    """Train both, and add what was found after each step to `findings`.

    Raises:
      ComparisonError: a model cannot be trained.
    """
    optimizers = tx if isinstance(tx, tuple) and not hasattr(tx, "update") else (tx, tx)
    models = [_start(subject, optimizer) for subject, optimizer in zip((a, b), optimizers, strict=True)]
    runs = [_step_of(model.subject, optimizer, loss) for model, optimizer in zip(models, optimizers, strict=True)]
    starts = [{at: model.values[at] for at in model.subject.parameters} for model in models]
    steady: dict[tuple[Location, Location], Any] = {}
    for step in range(1, steps + 1):
        now = None if keys is None else {name: jax.random.fold_in(key, step) for name, key in keys.items()}
        for which, model, run in zip("ab", models, runs, strict=True):
            _advance(which, model, run, now, args, kwargs)
        one, two = models
        allowed = min(one.least[0], two.least[0])
        findings.compare("loss", "", "", one.loss, two.loss, seed=seed, step=step, least=allowed)
        for match in pairs.cotangents(one.gradients, two.gradients):
            allowed = min(one.allowed(1, match.a), two.allowed(1, match.b))
            mask = _is_steady(match, allowed, largest(list(one.gradients.values())))
            key = (match.a, match.b)
            steady[key] = mask & steady[key] if key in steady else mask
    _compare_changes(models, starts, pairs, findings, steady, seed, steps)
    trained = [{at: model.values[at] for at in model.subject.parameters} for model in models]
    matches = list(pairs.values(*trained))
    _compare("trained parameter", matches, trained, steady, findings, seed, steps, models)
    trains = {match.a: match.b for match in matches}
    for name, slots in _slots(models, findings):
        matches = [Match(m.a, m.b, m.x_a, m.x_b, name) for m in pairs.cotangents(*slots)]
        _compare("optimizer state", matches, slots, {}, findings, seed, steps, models)
        _compare_masks(name, slots, matches, trains, findings)


def _compare_changes(
    models: list[Trained],
    starts: list[dict[Location, Any]],
    pairs: Counterparts,
    findings: Findings,
    steady: Mapping[tuple[Location, Location], Any],
    seed: int,
    step: int,
) -> None:
    """How far parameters have moved: with a small rate, far less than what the parameters themselves may be apart."""
    changes: list[dict[Location, Any]] = []
    for model, start in zip(models, starts, strict=True):
        changes.append({at: _minus(model.values[at], x) for at, x in start.items()})
    rounded = {at: largest([x]) * float(jnp.finfo(x.dtype).eps) for at, x in starts[0].items()}
    for match in pairs.cotangents(*changes):
        mask = steady.get((match.a, match.b))
        x, y = on_host(match.x_a), on_host(match.x_b)
        if mask is not None and np.shape(mask) == x.shape == y.shape:
            x, y = x[mask], y[mask]  # what is left out is told where the parameters are compared
        allowed = min(models[0].allowed(2, match.a), models[1].allowed(2, match.b))
        relative = max(relative_tolerance(x.dtype.name), allowed)
        floor = max(_STEP * step * rounded.get(match.a, 0.0), _NORMALIZED * relative * largest([x]))
        findings.compare(
            "trained parameter", show_path(match.a), show_path(match.b), x, y,
            seed=seed, step=step, least=allowed, floor=floor, text=match.text,
        )  # fmt: skip


def _minus(x: Any, y: Any) -> Any:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return on_host(x).astype(wide) - on_host(y).astype(wide)


def _start(subject: Subject, tx: Any) -> Trained:
    parameters = {at: jnp.asarray(subject.values[at]) for at in sorted(subject.parameters)}
    return Trained(subject, dict(subject.values), tx.init(_nested(parameters)))


def _nested(values: Values) -> dict[str, Any]:
    """As a tree that optimizers know: names below names, without the collection where there is but one."""
    tree = tree_of(sorted(values.items()))
    return tree.get("params", {}) if set(tree) == {"params"} else tree


def _step_of(subject: Subject, tx: Any, loss: Callable[..., Any] | None) -> Compiled:
    def step(values: Values, state: Any, keys: Keys, args: Any, kwargs: Any) -> Any:
        parameters = {at: x for at, x in values.items() if at in subject.parameters}

        def loss_of(parameters: Values) -> Any:
            output, written = subject.run({**values, **parameters}, keys, args, kwargs)
            total = _distance(output) if loss is None else loss(output, *args)
            return total, {at: x for at, x in written.items() if at in values}

        (total, written), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        nested = _nested(parameters)
        updates, state = tx.update(_nested(gradients), state, nested)
        moved = jax.tree.map(lambda x, update: (x + update).astype(x.dtype), nested, updates)
        new = _like(parameters, moved)
        return total, gradients, {**values, **written, **new}, state

    return Compiled(step, options_for(subject.values))


def _like(parameters: Values, nested: Any) -> dict[Location, Any]:
    """By location again."""
    # Both are flattened in the order of their keys, and a location is its path.
    values = zip(sorted(parameters), jax.tree.leaves(nested, is_leaf=_is_masked), strict=True)
    return {at: x for at, x in values if not _is_masked(x)}


def _is_masked(x: Any) -> bool:
    """Whether an optimizer keeps nothing for a parameter here, as another one has it (optax.masked)."""
    return isinstance(x, optax.MaskedNode)


def _compare_masks(
    name: str, slots: tuple[Values, Values], matches: Sequence[Match], trains: Mapping[Location, Location],
    findings: Findings,
) -> None:  # fmt: skip
    """Whether both optimizers keep something for the same parameters."""
    known = {match.a for match in matches}
    for at, there in trains.items():
        if at not in known and (at in slots[0]) != (there in slots[1]):
            which = "a" if at in slots[0] else "b"
            text = f"{name} is kept in {which} alone"
            findings.add(Finding("optimizer state", show_path(at), show_path(there), None, False, text=text))


def _distance(output: Any) -> Any:
    """The mean squared distance of all inexact outputs from random targets: bounded, whatever the model returns."""
    total: Any = 0.0
    for number, x in enumerate(filter(is_inexact, jax.tree.leaves(output))):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        target = jax.random.normal(jax.random.key(number), x.shape)
        total = total + jnp.mean(jnp.abs(x.astype(wide) - target) ** 2)
    return total


def _advance(which: str, model: Trained, run: Compiled, keys: Keys, args: Any, kwargs: Any) -> None:
    try:
        trees = model.values, model.state, keys, args, kwargs
        none = jax.tree.map(lambda x: 0.0, trees)
        before = none if model.least is None else (*model.least[2:], *none[2:])
        model.loss, model.gradients, model.values, model.state = run(*trees)
        model.least = run.least if model.least is None else run.least_after(trees, before)
    except Exception as error:
        raise ComparisonError(
            f"{which} ({model.subject.words}) cannot be trained",
            "a loss that is differentiable by its parameters, and an optimizer that takes them",
            f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}",
            "Give loss= and tx= that fit the model, or steps=0.",
        ) from error


def _is_steady(match: Match, allowed: float, scale: float) -> Any:
    """Where a gradient is so large that rounding does not turn it; or zero on both sides."""
    x, y = np.abs(on_host(match.x_a)), np.abs(on_host(match.x_b))
    if x.shape != y.shape:
        return np.asarray(True)
    relative = max(relative_tolerance(x.dtype.name), allowed)
    least = max(scale * rounding(match.x_a, allowed), float(x.max(initial=0.0)) * relative**0.5)
    return ((x > least) & (y > least)) | ((x == 0) & (y == 0))


def _compare(
    what: Any,
    matches: list[Match],
    sides: Any,
    steady: Mapping[tuple[Location, Location], Any],
    findings: Findings,
    seed: int,
    step: int,
    models: list[Trained],
) -> None:
    scale = largest(list(sides[0].values()))
    for match in matches:
        x, y, path = match.x_a, match.x_b, show_path(match.a)
        mask = steady.get((match.a, match.b))
        # A moment is no more exact than the gradient that it is made of.
        allowed = min(model.allowed(2, at) for model, at in zip(models, (match.a, match.b), strict=True))
        floor = scale * rounding(x, allowed)
        is_array_pair = is_array(x) and is_array(y)
        if is_array_pair and is_near(x, y, allowed, floor):
            mask = None  # nothing needs to be left out
        if mask is not None and np.shape(mask) == np.shape(x) == np.shape(y) and not mask.all():
            left_out = int(mask.size - mask.sum())
            findings.leave_out(f"{what} {path}: {left_out} of {mask.size} elements, whose gradients are rounding")
            if left_out == mask.size:
                continue
            x, y = on_host(x)[mask], on_host(y)[mask]
        findings.compare(
            what, path, show_path(match.b), x, y,
            seed=seed, step=step, least=allowed, floor=floor, text=match.text,
        )  # fmt: skip


def _slots(models: list[Trained], findings: Findings) -> Iterator[tuple[str, tuple[Values, Values]]]:
    """What an optimizer keeps for each parameter (its moments, say), by parameter; what else it keeps is compared."""
    sides = []
    for model in models:
        parameters = {at: model.values[at] for at in sorted(model.subject.parameters)}
        treedef = jax.tree.structure(_nested(parameters))
        sides.append((parameters, _found(model.state, treedef), treedef))
    (ours, slots_a, _), (theirs, slots_b, _) = sides
    names = [[name for name, _, _ in slots] for slots in (slots_a, slots_b)]
    if names[0] != names[1]:
        only = [", ".join(sorted(set(own) - set(other))[:_MOST_NAMED]) for own, other in (names, names[::-1])]
        text = f"it has another structure on each side: in a alone {only[0] or 'nothing'}, in b {only[1] or 'nothing'}"
        findings.add(Finding("optimizer state", "", "", None, False, text=text))
        return
    for (name, is_slot, x), (_, _, y) in zip(slots_a, slots_b, strict=True):
        if is_slot:
            yield name, (_like(ours, x), _like(theirs, y))
        elif is_array(x):
            allowed = min(max(jax.tree.leaves(model.least[3]), default=0.0) for model in models)
            findings.compare("optimizer state", name, name, x, y, least=allowed)


def _found(state: Any, treedef: Any) -> list[tuple[str, bool, Any]]:
    """(path in the state, whether it has the form of the parameters, value)."""

    def is_slot(x: Any) -> bool:
        return jax.tree.structure(x, is_leaf=_is_masked) == treedef

    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_slot)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), is_slot(x), x) for path, x in leaves]
