"""Rules that follow from the two models themselves: which Linen variable is which NNX Variable, and how it is made.

Law: every variable of both models is paired exactly once, or stands in one error; nothing is guessed where two would do
as well, and nothing is handed out that was not proven by running both models, unless the caller says so.
Knows modules, through their traces; knows nothing of files, optimizers or layouts of checkpoints.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import BridgeError, near_misses, show_path
from bridge._types import Location, Path
from bridge.checkpoint.derivation.bench import Bench
from bridge.checkpoint.derivation.derived import Derived, Proof, Unsure
from bridge.checkpoint.derivation.forward import RandomCallError
from bridge.checkpoint.derivation.proposal import FUSED, RESHAPED, Fusion, Proposal, base_of, fusions_of
from bridge.checkpoint.derivation.search import Search, proven, undecided
from bridge.tracing.data_flow import DataFlow
from bridge.tracing.pairs import Doubt, Instance, Pairing, Tie, pair
from bridge.tracing.pure_call import linen_call, module_of, nnx_call, streams_of
from bridge.tracing.trace import Method, Part, Unit, trace_linen, trace_nnx

#: A prefix of paths, without the collection: keys, or keys with `/` between them.
Prefix = str | tuple[str, ...]

_MOST_LINES = 40

#: Up to this many bytes of variables, `derive` runs both models by itself where it is unsure.
_MOST_BYTES = 256 * 2**20


class DerivationError(BridgeError, ValueError):
    """Two models whose variables cannot be paired without guessing.

    Attributes:
      linen, nnx: locations that have no counterpart.
      ambiguous: what could be paired in two ways.
    """

    def __init__(self, linen: Sequence[Unit], nnx: Sequence[Unit], ambiguous: Sequence[Doubt] = ()):
        self.linen, self.nnx = _locations(linen), _locations(nnx)
        self.ambiguous = tuple(ambiguous)
        counts = {"of Linen": len(self.linen), "of NNX": len(self.nnx), "ambiguous": len(self.ambiguous)}
        counted = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        lines = [f"the variables of the two models cannot all be paired: {counted}"]
        lines += ["expected: each Linen variable has one counterpart in NNX", "found:"]
        lines += _listed("in Linen, and without a counterpart in NNX:", linen, nnx)
        lines += _listed("in NNX, and without a counterpart in Linen:", nnx, linen)
        if ambiguous:
            lines += ["  what their names are against:", *(f"    {doubt.text}" for doubt in ambiguous[:_MOST_LINES])]
        super().__init__("\n".join([*lines, *_advice(linen, nnx, ambiguous)]))


class UnknownPathError(BridgeError, LookupError):
    """`rename` or `fresh` names a path at which a model has nothing."""

    def __init__(self, path: Path, model: str, units: Iterable[Unit]):
        self.path = path
        known: set[str] = set()
        for location in _locations(units):
            known.update(show_path(location[1:length]) for length in range(2, len(location) + 1))
        near = near_misses(show_path(path), sorted(known)) or sorted(known)[:3]
        super().__init__(
            f"{show_path(path)}: not in {model}\n  expected: the path of a module or variable, without its collection\n"
            f"  found: none there, or another entry has it already; there are {', '.join(near) or 'no others'}\n"
            "Mend rename or fresh."
        )


class UnsureDerivationWarning(UserWarning):
    """Layers were paired by the order of calls alone, and nothing has shown that they are the same ones."""

    def __init__(self, unsure: Sequence[Unsure], why: str):
        self.unsure = tuple(unsure)
        groups = "".join(f"\n  {group}" for group in self.unsure[:_MOST_LINES])
        what = "layers of one class and the same shapes could be swapped:" if groups else "the mapping is not proven"
        super().__init__(
            f"{what}{groups}\n  not confirmed: {why}\n"
            "Run compare_forward, or derive(..., check=True), or say what is what: derive(..., rename=...)."
        )


class UnprovenDerivationError(BridgeError, ValueError):
    """Nothing has shown that a mapping is right, and so it is not handed out.

    Attributes:
      derived: what order, shapes and names propose, unproven; or the rules that were to be proven.
      why: what is missing.
      lines: where the models part, or what could be exchanged.
    """

    def __init__(self, derived: Any, why: str, lines: Sequence[str], advice: str):
        self.derived, self.why, self.lines = derived, why, tuple(lines)
        shown = "\n".join(f"    {line}" for line in self.lines[:_MOST_LINES])
        super().__init__(
            f"the mapping is not proven: {why}\n  expected: the same outputs and gradients in both models\n"
            f"  found:\n{shown}\n{advice}\n"
            "unproven=True (--unproven) hands it out as it is, and every report will say so."
        )


def _locations(units: Iterable[Unit]) -> tuple[Location, ...]:
    return tuple(part.location for _, part in _parts(units))


def _listed(title: str, units: Sequence[Unit], others: Sequence[Unit]) -> list[str]:
    candidates = {show_path(part.location): (unit, part) for unit, part in _parts(others)}
    lines: list[str] = []
    parts = _parts(units)
    for unit, part in parts[:_MOST_LINES]:
        line = f"    {part}, of {unit.kind}{_when(unit)}"
        nearest = _nearest(unit, part, candidates)
        if nearest:
            other, candidate = candidates[nearest]
            line += f"; nearest: {candidate}, of {other.kind}{_when(other)}"
        lines.append(line)
    if len(parts) > _MOST_LINES:
        lines.append(f"    ... and {len(parts) - _MOST_LINES} more")
    return [f"  {title}", *lines] if lines else []


def _parts(units: Iterable[Unit]) -> list[tuple[Unit, Part]]:
    """Each variable once, with a unit that it belongs to."""
    parts: dict[Location, tuple[Unit, Part]] = {}
    for unit in units:
        for slot in unit.slots.values():
            parts[slot.part.location] = unit, slot.part
    return list(parts.values())


def _when(unit: Unit) -> str:
    return ", never called" if unit.order is None else f", call {unit.order}"


def _nearest(unit: Unit, part: Part, candidates: Mapping[str, tuple[Unit, Part]]) -> str | None:
    """Of the same class if there is one, then of the same rank and name; the first in the order of calls."""

    def score(name: str) -> tuple[bool, ...]:
        other, candidate = candidates[name]
        same_layer = unit.family is not None and unit.family is other.family
        return same_layer, candidate.location[-1] == part.location[-1], candidate.shape == part.shape

    best = max(candidates, key=score, default=None)
    if best is not None and any(score(best)):
        return best
    return next(iter(near_misses(show_path(part.location), candidates, 1)), None)


def _advice(linen: Sequence[Unit], nnx: Sequence[Unit], ambiguous: Sequence[Doubt]) -> list[str]:
    lines = ["If the models are the same one, say what is what:"]
    example: tuple[Path, Path, bool] | None = None
    if ambiguous:
        example = ambiguous[0].linen, ambiguous[0].nnx, ambiguous[0].is_module
    elif linen and nnx:
        example = _place(linen[0]), _place(nnx[0]), linen[0].family is not None
    if example is not None:
        first, second, below = show_path(example[0]), show_path(example[1]), "/**" if example[2] else ""
        lines.append(f"  derive(..., rename={{{first!r}: {second!r}}}), or in a rules file (--rules):")
        lines.append(f'  [[rule]]\n  from = "*/{first}{below}"\n  to = "*/{second}{below}"')
    if linen:
        first = show_path(_place(linen[0]))
        lines.append(f"  derive(..., rename={{{first!r}: None}}) drops what NNX has no place for.")
    if nnx:
        first = show_path(_place(nnx[0]))
        lines.append(f"  derive(..., fresh=[{first!r}]) leaves the NNX model its own values there.")
    return lines


def _place(unit: Unit) -> Path:
    """What to call a unit by: its path, or its variable's where it is not meant as a whole."""
    return unit.path if unit.family is not None else next(iter(unit.slots.values())).part.location[1:]


# ---- deriving ----


def derive(
    linen_module: nn.Module,
    nnx_module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *inputs: Any,
    rngs: Any = None,
    method: Method | tuple[Method, Method] = "__call__",
    rename: Mapping[Prefix, Prefix | None] | None = None,
    fresh: Iterable[Prefix] = (),
    check: bool | None = None,
    unproven: bool = False,
    **kwargs: Any,
) -> Derived:
    """How the variables of a Linen model become those of an NNX model, and back.

    Both models are called abstractly, and their layers paired by class, shapes and the order of first calls: layers of
    one class and the same shapes are the same ones in the same order. Names decide where a layer is never called, and
    must not contradict the order elsewhere; names that Linen gives by itself (`Dense_0`) say nothing. A module that
    is called several times counts once. Layers in a stack (nn.scan, nn.vmap; nnx.scan, nnx.vmap) are the same as
    that many layers one by one. Variables of modules of the user's own may have any names, if their shapes differ.

    All of that is a proposal. Both models prove it: they are run, each compiled once, on several draws of random
    variables and inputs, and their outputs and the gradients of a random sum of these must agree. If they do not,
    others are tried: layers, stacks and whole subtrees exchanged; kernels turned, reshaped, with blocks in another
    order (gates, heads, channels first), fused or cut (query, key and value); norms that multiply by `1 + scale`. Runs
    on numbers that hide the difference tell where it lies. What is handed out was proven. Layers that no output and no
    gradient tells apart are an error, unless names do.

    Args:
      linen_module: unbound.
      nnx_module: real or abstract, or a function of `nnx.Rngs` that makes it, which runs abstractly. Not changed.
      *inputs, **kwargs: of the call: arrays, `jax.ShapeDtypeStruct`s, flags. Floating arrays are varied for all draws
        but the first.
      rngs: for Linen's init, as `module.init` takes them.
      method: the name of the method to call, or a function of (module, *inputs, **kwargs); or two, Linen's first.
      rename: what is what, decided beforehand: Linen path -> NNX path of modules or variables, without the collection;
        None for what has no place in NNX. What is below one is paired with what is below the other.
      fresh: paths of NNX whose values Linen does not have: those of the model stay.
      check: whether to run the models: True, always; False, never, and the result is not proven; None, unless the
        Linen variables have more than 256 MiB.
      unproven: hand out what could not be proven, with a warning: the result, and every report of what is done with it,
        says so.

    Returns:
      What `apply`s to the leaves of Linen, `inverse()` of which to those of NNX, with its `proof`; or with the reason
      why there is none in `unproven`, and in `unsure` what the order of calls alone has paired.

    Raises:
      DerivationError: variables without a counterpart, or with several; all of them.
      UnprovenDerivationError: the models part, could not be run, draw random numbers (give keywords or a method without
        dropout), or nothing tells layers apart; it shows where.
      UnknownPathError: `rename` or `fresh` names what there is not.
      RandomCallError: with check=True, for a call that draws random numbers.

    >>> import jax
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.hidden, self.out = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, use_bias=False, rngs=rngs)
    ...
    ...     def __call__(self, x):
    ...         return self.out(nnx.relu(self.hidden(x)))
    >>> x = jax.ShapeDtypeStruct((1, 8), "float32")
    >>> print(derive(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8, use_bias=False)]), Net, x))
    Linen                   NNX                   paired by
    params/layers_0/bias    params/hidden/bias    Dense/Linear, the only ones alike (8,)
    params/layers_0/kernel  params/hidden/kernel  Dense/Linear, the only ones alike (8, 8)
    params/layers_2/kernel  params/out/kernel     Dense/Linear, the only ones alike (8, 8)
    """
    methods = method if isinstance(method, tuple) else (method, method)
    model = module_of(nnx_module)
    linen = trace_linen(linen_module, methods[0], rngs, inputs, kwargs)
    ours = trace_nnx(model, methods[1], inputs, kwargs)
    paired = _paired(linen, ours, rename or {}, fresh)
    base = base_of(paired.pairing.groups, paired.fusions, paired.dropped, paired.fresh)

    def unsure() -> tuple[Unsure, ...]:
        # Both models are traced again, whole: what one layer needs of another may confirm their order.
        ties = paired.pairing.ties
        if not ties:
            return ()
        call = linen_call(linen_module, methods[0], rngs, inputs, kwargs)
        linen_flow = DataFlow(linen, call, streams_of(rngs), inputs, kwargs)
        nnx_flow = DataFlow(ours, nnx_call(model, methods[1]), None, inputs, kwargs)
        return _groups(tie for tie in ties if not (linen_flow.in_order(*tie.linen) and nnx_flow.in_order(*tie.nnx)))

    hand_out = False
    try:
        if check is False:
            raise _NotRun("check=False")
        if check is None and _nbytes(linen) > _MOST_BYTES:
            raise _NotRun(
                f"the variables have more than {_MOST_BYTES >> 20} MiB: check=True runs the models all the same"
            )
        return _proven(base, functools.partial(Bench, linen_module, model, inputs, kwargs, rngs, method), bool(check))
    except _NotRun as reason:
        derived = replace(base.derived, unsure=unsure(), unproven=str(reason))
        if not unproven and check is not False:
            advice = "Give inputs that both models run on here, without drawing random numbers."
            raise UnprovenDerivationError(derived, "the models were not compared", [str(reason)], advice) from reason
    except UnprovenDerivationError as failed:
        derived = failed.derived if failed.derived.unsure else replace(failed.derived, unsure=unsure())
        if not unproven:
            if paired.left:
                units = [*paired.left[0]], [*paired.left[1]]
                raise _with_note(DerivationError(*units), str(failed)) from failed
            raise
        hand_out = True
    if derived.unsure or hand_out:
        warnings.warn(UnsureDerivationWarning(derived.unsure, derived.unproven), stacklevel=2)
    return derived


def prove(
    linen_module: nn.Module,
    nnx_module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    rules: Any,
    *inputs: Any,
    rngs: Any = None,
    method: Method | tuple[Method, Method] = "__call__",
    **kwargs: Any,
) -> Proof:
    """Show that rules which somebody wrote, or kept in a file, lead from one model to the same one.

    Args:
      rules: from Linen to NNX: `Rules`, or what `derive` gave, either way.
      Others as for `derive`.

    Returns:
      The proof: outputs and gradients of both models agree on several draws of random numbers.

    Raises:
      UnprovenDerivationError: they do not, or the call draws random numbers; it shows where they part.
      VariablesMismatchError, RulesError: the rules do not lead to the NNX model's variables.

    >>> import jax
    >>> from bridge.checkpoint.rules.apply import Rules
    >>> x = jax.ShapeDtypeStruct((1, 2), "float32")
    >>> theirs, ours = nn.Sequential([nn.Dense(3)]), lambda rngs: nnx.Sequential(nnx.Linear(2, 3, rngs=rngs))
    >>> print(prove(theirs, ours, Rules.from_rename({"layers_0": "layers/0"}), x))
    proven: 1 outputs and 2 gradients on 3 draws of random numbers agree, outputs bit for bit
    """
    rules = rules.inverse() if getattr(rules, "to", "nnx") == "linen" else rules
    bench = Bench(linen_module, nnx_module, inputs, kwargs, rngs, method)
    proof, evidence = proven(bench, rules)
    if proof is not None:
        return proof
    random = bench.which_is_random(bench.point(0), rules)
    lines = evidence.describe()
    if random is not None:
        lines = [str(RandomCallError(random))]
    raise UnprovenDerivationError(rules, "the models do not compute the same under these rules", lines, "Mend them.")


class _NotRun(Exception):
    """Why both models could not be run."""


def _with_note(error: DerivationError, note: str) -> DerivationError:
    error.add_note(note)
    return error


def _proven(base: Proposal, make_bench: Callable[[], Bench], always: bool) -> Derived:
    """The first proposal that both models prove, if no other is as good."""
    try:
        bench = make_bench()
        proof, evidence = proven(bench, base.derived)
        random = None if proof is not None else bench.which_is_random(bench.point(0), base.derived)
        if random is not None:
            raise RandomCallError(random)
    except Exception as error:  # a kernel for another accelerator, dropout, inputs that only the user can make
        if always:
            raise
        raise _NotRun(f"the models do not run here: {error}") from error
    proposal = base
    if proof is None:
        other = Search(bench, base).find()
        if other is None:
            lines = evidence.describe()
            why = "the models do not compute the same under any mapping that was tried"
            if base.dropped or base.fresh:
                why += " (outputs that depend on variables that are dropped or fresh differ)"
            derived = replace(base.derived, unproven=f"{why}: {'; '.join(lines)}")
            advice = "If the models are the same one, say what is what: derive(..., rename={Linen path: NNX path})."
            raise UnprovenDerivationError(derived, why, lines, advice)
        proposal, proof = other
    ties = undecided(bench, proposal, proof)
    unsure = _exchangeable(proposal, ties)
    if unsure:
        why = "run, but the outputs are as good either way"
        derived = replace(proposal.derived, unsure=unsure, unproven=why)
        first = show_path(tuple(unsure[0].linen[0].split("/")))
        advice = f"Say what is what: derive(..., rename={{{first!r}: {unsure[0].nnx[0]!r}}}), or as it should be."
        lines = [str(group) for group in unsure]
        raise UnprovenDerivationError(derived, f"{why}: no output and no gradient tells layers apart", lines, advice)
    return replace(proposal.derived, exchanged=tuple(_exchanged(proposal)), proof=proof, unproven="")


def _exchanged(proposal: Proposal) -> Iterator[tuple[str, str]]:
    """Pairs of layers that the order of calls would have paired otherwise."""
    for group, order in zip(proposal.groups, proposal.orders, strict=True):
        for number, chosen in enumerate(order):
            if chosen != number:
                yield _name_of(group.pairs[chosen][0]), _name_of(group.pairs[number][1])


def _exchangeable(proposal: Proposal, ties: Sequence[Sequence[tuple[int, int]]]) -> tuple[Unsure, ...]:
    """Layers that could be exchanged, those that hang together in one group, in the order of their calls."""
    unsure: list[Unsure] = []
    for group, order, pairs in zip(proposal.groups, proposal.orders, ties, strict=True):
        sets: list[set[int]] = []
        for pair_of_layers in pairs:
            joined = set(pair_of_layers).union(*(one for one in sets if one & set(pair_of_layers)))
            sets = [*(one for one in sets if not one & joined), joined]
        for together in sets:
            linen = tuple(_name_of(group.pairs[order[n]][0]) for n in sorted(together))
            nnx = tuple(_name_of(group.pairs[n][1]) for n in sorted(together))
            unsure.append(Unsure(linen, nnx))
    return tuple(unsure)


def _name_of(instance: Instance) -> str:
    unit, index = instance
    return show_path(_place(unit)) + "".join(f"[{n}]" for n in index)


@dataclass(frozen=True)
class _Paired:
    """All pairs, what is fused, dropped and fresh; and what the fused were before: Linen's units, and NNX's."""

    pairing: Pairing
    fusions: tuple[Fusion, ...]
    dropped: tuple[Location, ...]
    fresh: tuple[Location, ...]
    left: tuple[tuple[Unit, ...], tuple[Unit, ...]] | None


def _paired(
    linen: Sequence[Unit], ours: Sequence[Unit], rename: Mapping[Prefix, Prefix | None], fresh: Iterable[Prefix]
) -> _Paired:
    """What is what, as far as order, shapes and names tell."""
    pairing = Pairing()
    dropped: list[Location] = []
    kept: list[Location] = []
    inner_first = sorted(rename.items(), key=lambda item: -len(_keys(item[0])))
    for old, new in inner_first:
        inside, linen = _take(linen, _keys(old), "the Linen model")
        if new is None:
            dropped += _locations(inside)
        else:
            counterpart, ours = _take(ours, _keys(new), "the NNX model")
            _add(pairing, pair(inside, counterpart))
    for prefix in fresh:
        inside, ours = _take(ours, _keys(prefix), "the NNX model")
        kept += _locations(inside)
    _add(pairing, pair(linen, ours))
    left = (tuple(pairing.linen), tuple(pairing.nnx))
    fusions, *rest = fusions_of(*left, FUSED)
    if fusions:  # the layers beside the fused ones may be as many on both sides now
        pairing.linen, pairing.nnx = [], []
        _add(pairing, pair(*rest))
    more, *rest = fusions_of(pairing.linen, pairing.nnx, RESHAPED)
    fusions += more
    if any(rest) or pairing.ambiguous:
        raise DerivationError(*left, pairing.ambiguous)
    return _Paired(pairing, tuple(fusions), tuple(dropped), tuple(kept), left if fusions else None)


def _nbytes(units: Iterable[Unit]) -> int:
    """Bytes of the variables."""
    parts = {part.location: part for _, part in _parts(units)}
    return sum(math.prod(part.shape) * _itemsize(part.dtype) for part in parts.values())


def _itemsize(dtype: str) -> int:
    return 8 if dtype.startswith("key<") else jnp.dtype(dtype).itemsize


def _groups(ties: Iterable[Tie]) -> tuple[Unsure, ...]:
    """Neighbours that share a layer are one group."""
    groups: list[list[tuple[Instance, Instance]]] = []
    for tie in ties:
        first, second = zip(tie.linen, tie.nnx, strict=True)
        if groups and groups[-1][-1] == first:
            groups[-1].append(second)
        else:
            groups.append([first, second])

    unsure: list[Unsure] = []
    for group in groups:
        linen, nnx = zip(*group, strict=True)
        unsure.append(Unsure(tuple(map(_name_of, linen)), tuple(map(_name_of, nnx))))
    return tuple(unsure)


def _keys(prefix: Prefix) -> Path:
    return tuple(prefix.split("/")) if isinstance(prefix, str) else tuple(map(str, prefix))


def _take(units: Sequence[Unit], prefix: Path, model: str) -> tuple[list[Unit], list[Unit]]:
    """What is at or below `prefix`, and the rest; a unit that is in part is cut in two."""
    inside, outside = [], []
    for unit in units:
        below = [name for name, slot in unit.slots.items() if slot.part.location[1 : len(prefix) + 1] == prefix]
        others = [name for name in unit.slots if name not in below]
        if below:
            inside.append(unit.only(below))
        if others:
            outside.append(unit.only(others))
    if not inside:
        raise UnknownPathError(prefix, model, units)
    return inside, outside


def _add(pairing: Pairing, more: Pairing) -> None:
    pairing.links += more.links
    pairing.groups += more.groups
    pairing.linen += more.linen
    pairing.nnx += more.nnx
    pairing.ambiguous += more.ambiguous
    pairing.ties += more.ties
