"""Two models that `linen-nnx compare` is told of, each with the values that it is compared on.

Law: a model without values of its own takes those of the other; if neither has any they are random, near those that
Linen's `init` makes (or the NNX model's own); how values came to be where they are is said.
Knows words, models and rules; knows nothing of how models are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import typer

from bridge._errors import VariablesMismatchError, show_path
from bridge._types import Path as ModulePath
from bridge.cli.models import derived_rules, linen_module, made_of_rngs, nnx_module
from bridge.cli.words import load_attribute, users_code
from bridge.equivalence.drawing import Draw
from bridge.tracing.pure_call import linen_call
from bridge.variables.mapping import tree_of

if TYPE_CHECKING:
    from bridge.checkpoint.derivation.derived import Derived
    from bridge.tracing.pairs import Doubt

_SEED = 0  # of random values


@dataclass(frozen=True)
class Side:
    """One of two models.

    Attributes:
      name: as the user wrote it.
      model: a Linen module, an NNX module, or a function of the inputs.
      variables: the values of a Linen module; None if it has none yet.
      bare: whether its values may be replaced by those of the other.
    """

    name: str
    model: Any
    variables: Mapping[str, Any] | None = None
    bare: bool = False

    @property
    def is_linen(self) -> bool:
        from flax import linen as nn

        return isinstance(self.model, nn.Module)

    @property
    def is_nnx(self) -> bool:
        import nnx_core

        return isinstance(self.model, nnx_core.Module)

    @property
    def subject(self) -> Any:
        """In the form that `bridge.equivalence.compare` takes."""
        return (self.model, self.variables) if self.is_linen else self.model


@dataclass(frozen=True)
class Sides:
    """Both, what is made of what in going from Linen's to NNX's values, and how those values came about."""

    a: Side
    b: Side
    rules: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where values may come from, beside the models: a checkpoint, rules, and what both are called with."""

    inputs: Sequence[Any]
    keywords: Mapping[str, Any]
    methods: tuple[str, str]
    checkpoint: Path | None = None
    rules: Path | None = None


def linen_and_nnx(linen: str, nnx: str, source: Source) -> Sides:
    """`--linen` and `--nnx`: NNX takes Linen's values, whatever it has of its own."""
    model = nnx_module(nnx, abstract=False)
    return filled(Side(linen, linen_module(linen), bare=True), Side(nnx, model, bare=True), source)


def any_two(a: str, b: str, source: Source) -> Sides:
    """`--a` and `--b`."""
    return filled(_side(a), _side(b), source)


def _side(reference: str) -> Side:
    """A model as it is, or as what is named makes it of nothing or of `rngs`; else a function of the inputs."""
    from flax import linen as nn

    import nnx_core

    model = load_attribute(reference)
    is_new = isinstance(model, type)
    if is_new or (callable(model) and not isinstance(model, nn.Module | nnx_core.Module) and _makes(model)):
        is_new = is_new or "rngs" in inspect.signature(model).parameters
        with users_code(f"{reference!r} cannot be made from `rngs` or from nothing"):
            model = made_of_rngs(model)
    match model:
        case nn.Module():
            return Side(reference, model, bare=True)
        case nnx_core.Module():
            return Side(reference, model, bare=is_new)
        case (nn.Module() as module, Mapping() as variables):
            return Side(reference, module, variables)
    if callable(model):
        return Side(reference, model)
    raise typer.BadParameter(
        f"{reference!r} is {type(model).__name__}; to be compared are Linen modules, alone or as a pair with their"
        " variables, NNX modules, what makes one of these of nothing or of `rngs`, and functions of the inputs"
    )


def _makes(function: Any) -> bool:
    """Whether a function makes a model: it can be called with nothing, or with `rngs` alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a builtin
        return False
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in free}
    return needed <= {"rngs"} and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


# ---- values ------------------------------------------------------------------------------------------------


def filled(a: Side, b: Side, source: Source) -> Sides:
    """Both with values."""
    crossing = (a.is_linen and b.is_nnx) or (a.is_nnx and b.is_linen)
    if source.rules is not None and not crossing:
        raise typer.BadParameter("--rules lead from a Linen model to an NNX model: these are not one of each")
    if source.checkpoint is not None:
        a, b = _restored(a, b, source)
    if not crossing:
        a, b, whence = _alike(a, b, source)
        return Sides(a, b, notes=(whence,))
    linen, nnx = (a, b) if a.is_linen else (b, a)
    rules, how = _rules(linen, nnx, source)
    linen, nnx, whence = _crossed(linen, nnx, rules, source)
    a, b = (linen, nnx) if a.is_linen else (nnx, linen)
    return Sides(a, b, rules, (whence, how))


def _restored(a: Side, b: Side, source: Source) -> tuple[Side, Side]:
    """The Linen models that have no values yet with those of the checkpoint."""
    takes = [side.is_linen and side.bare for side in (a, b)]
    if not any(takes):
        raise typer.BadParameter("--checkpoint is for a Linen module without variables: none of the models is one")
    both = [
        replace(side, variables=_of_checkpoint(side, method, source), bare=False) if take else side
        for side, method, take in zip((a, b), source.methods, takes, strict=True)
    ]
    return both[0], both[1]


def _of_checkpoint(side: Side, method: str, source: Source) -> Mapping[str, Any]:
    """What a checkpoint of any format and layout has for a Linen module; strict."""
    import bridge
    import nnx_core
    from bridge import checkpoint

    def wrapped() -> Any:
        model = bridge.ToNNX(side.model, rngs=nnx_core.Rngs(_SEED))
        return model.lazy_init(*source.inputs, method=method, **source.keywords)

    with users_code(f"{side.name!r} cannot be called with these inputs"):
        model = nnx_core.eval_shape(wrapped)
    checkpoint.load_into(model, source.checkpoint, rng=_SEED)
    return bridge.variables_of(model)


def _rules(linen: Side, nnx: Side, source: Source) -> tuple[Any, str]:
    """What is made of what, and who says so.

    Rules that no run has proven do here: whether they lead to the same model is what the comparison finds out. So do
    names that the order of calls is against.
    """
    from bridge.checkpoint.derivation.derive import DerivationError
    from bridge.checkpoint.rules.apply import read_rules

    if source.rules is not None:
        return read_rules(source.rules), f"rules: {source.rules}"
    try:
        derived = _derived(linen, nnx, source)
    except DerivationError as error:
        named = None if error.linen or error.nnx else _by_names(linen, nnx, source, error.ambiguous)
        if named is None:
            raise
        return named
    how = _sureness(derived)
    if derived.exchanged:
        pairs = ", ".join(f"{ours} = {theirs}" for ours, theirs in derived.exchanged)
        how = f"{how}, only with layers exchanged, against the order of calls: {pairs}"
    return derived, f"rules: derived from both models{how}"


def _derived(linen: Side, nnx: Side, source: Source, rename: Mapping[ModulePath, ModulePath] | None = None) -> Derived:
    call = linen.model, nnx.model, source.inputs, source.keywords
    return derived_rules(*call, method=source.methods, rename=rename, unproven=True)


def _sureness(derived: Derived) -> str:
    return f"; not proven: {derived.unproven}" if derived.unproven else " and proven on random numbers"


def _by_names(linen: Side, nnx: Side, source: Source, doubts: Sequence[Doubt]) -> tuple[Derived, str] | None:
    """Layers that are called in another order than their names have: the names hold, and what the order says is told.

    None where names do not say of each what it is.
    """
    from bridge.checkpoint.derivation.derive import UnknownPathError

    named = {doubt.linen: doubt.nnx for doubt in doubts}
    called = {doubt.linen: doubt.other for doubt in doubts}
    try:
        derived = _derived(linen, nnx, source, named)
    except UnknownPathError:
        return None
    how = f"rules: derived from both models, by names against the order of calls ({_pairs(named)}){_sureness(derived)}"
    if derived.unproven and _is_proven(linen, nnx, source, called):
        how = f"{how}; both compute the same only with layers exchanged, by the order of calls: {_pairs(called)}"
    return derived, how


def _pairs(paths: Mapping[ModulePath, ModulePath]) -> str:
    return ", ".join(f"{show_path(ours)} = {show_path(theirs)}" for ours, theirs in paths.items())


def _is_proven(linen: Side, nnx: Side, source: Source, rename: Mapping[ModulePath, ModulePath]) -> bool:
    from bridge.checkpoint.derivation.derive import DerivationError, UnknownPathError

    try:
        return not _derived(linen, nnx, source, rename).unproven
    except (DerivationError, UnknownPathError):
        return False


def _crossed(linen: Side, nnx: Side, rules: Any, source: Source) -> tuple[Side, Side, str]:
    """Values of one in the other, as the rules say."""
    import nnx_core
    from bridge.checkpoint.in_memory import state_to_variables, variables_to_state

    if linen.bare and not nnx.bare:
        variables, _ = state_to_variables(nnx.model, rules=rules.inverse(), unproven=True)
        return replace(linen, variables=variables, bare=False), nnx, f"values: those of {nnx.name}"
    if not (linen.bare or nnx.bare):
        return linen, nnx, "values: of each model its own"
    whence = f"values: those of {source.checkpoint or linen.name}"
    if linen.variables is None:
        linen = _by_itself(linen, source.methods[0], source)
        whence = f"values: random ones near those that init makes, seed {_SEED}"
    state, _ = variables_to_state(linen.variables, rules=rules, target=nnx.model, unproven=True)
    model = nnx_core.clone(nnx.model)  # a module-level model of the user's stays as it is
    nnx_core.update(model, state)
    return linen, replace(nnx, model=model, bare=False), whence


def _alike(a: Side, b: Side, source: Source) -> tuple[Side, Side, str]:
    """Two Linen models, two NNX models, or one beside a function."""
    same_kind = (a.is_linen and b.is_linen) or (a.is_nnx and b.is_nnx)
    if not same_kind or not (a.bare or b.bare):
        both = [_by_itself(side, method, source) for side, method in zip((a, b), source.methods, strict=True)]
        return both[0], both[1], "values: of each model its own"
    if not a.bare:
        return a, _with_values_of(a, b), f"values: those of {a.name}"
    if not b.bare:
        return _with_values_of(b, a), b, f"values: those of {b.name}"
    a = _by_itself(a, source.methods[0], source)
    return a, _with_values_of(a, b), f"values: random ones near those of {a.name}, seed {_SEED}"


def _by_itself(side: Side, method: str, source: Source) -> Side:
    """With random values, near its own, if it is bare."""
    import nnx_core

    if not side.bare:
        return side
    if side.is_linen:
        return replace(side, variables=_random_variables(side, method, source), bare=False)
    model, draw = nnx_core.clone(side.model), Draw(_SEED)
    state = nnx_core.state(model, nnx_core.Not(nnx_core.RngState))
    nnx_core.update(model, jax.tree.map(draw.near, state))
    return replace(side, model=model, bare=False)


def _random_variables(side: Side, method: str, source: Source) -> Mapping[str, Any]:
    draw = Draw(_SEED)
    inputs, keywords = jax.tree.map(draw.array, (tuple(source.inputs), dict(source.keywords)))
    with users_code(f"{side.name!r} cannot be called with these inputs"):
        initial = linen_call(side.model, method, None, inputs, keywords).initial()
    return tree_of([(at, draw.near(x)) for at, x in sorted(initial.items())])


def _with_values_of(one: Side, other: Side) -> Side:
    """`other`, which is of the same kind, with the values of `one`, whose names it must have."""
    import nnx_core

    if other.is_linen:  # what it lacks or has too much, its own `apply` tells
        return replace(other, variables=one.variables, bare=False)
    model = nnx_core.clone(other.model)
    ours, theirs = (nnx_core.state(side, nnx_core.Not(nnx_core.RngState)) for side in (one.model, model))
    our_paths, their_paths = (set(dict(nnx_core.to_flat_state(state))) for state in (ours, theirs))
    missing, unexpected = their_paths - our_paths, our_paths - their_paths
    if missing or unexpected:
        raise VariablesMismatchError(missing, unexpected, source=one.name, target=other.name)
    nnx_core.update(model, ours)
    return replace(other, model=model, bare=False)
