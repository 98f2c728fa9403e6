"""Rules that follow from the two models themselves: which Linen variable is which NNX Variable, and how it is made.

Law: every variable of both models is paired exactly once, or stands in one error; nothing is guessed where two would do
as well; `derived.inverse()` undoes `derived`, bit for bit. Both models are traced abstractly. Where the order of calls
alone has decided, both are also run, on random values, or else the result and a warning say so.
Knows modules, through their traces; knows nothing of files, optimizers or layouts of checkpoints.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import BridgeError, VariablesMismatchError, near_misses, show_path
from bridge._types import Location, Path, Shape
from bridge.checkpoint.derivation.expressions import linen_op, nnx_op
from bridge.checkpoint.derivation.forward import ForwardMismatchError, ForwardReport, Trial
from bridge.checkpoint.derivation.to_rules import rules_of
from bridge.checkpoint.rules.apply import RuleResult, Rules, pairs_of, reads_of
from bridge.checkpoint.tree.ops import Op, values_of
from bridge.tracing.data_flow import DataFlow
from bridge.tracing.pairs import Doubt, Index, Instance, Link, Pairing, Tie, pair
from bridge.tracing.pure_call import linen_call, module_of, nnx_call, streams_of
from bridge.tracing.trace import TRANSIENT, Method, Part, Slot, Unit, trace_linen, trace_nnx

#: A prefix of paths, without the collection: keys, or keys with `/` between them.
Prefix = str | tuple[str, ...]
To = Literal["nnx", "linen"]

_MOST_LINES = 40

#: Up to this many bytes of variables, `derive` runs both models by itself where it is unsure.
_MOST_BYTES = 256 * 2**20

#: Models that differ by rounding do so by a like amount whichever of two layers is which; swapped ones by more.
_FAR = 10


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
        groups = "\n".join(f"  {group}" for group in self.unsure[:_MOST_LINES])
        super().__init__(
            f"layers of one class and the same shapes could be swapped:\n{groups}\n  not confirmed: {why}\n"
            "Run compare_forward, or derive(..., check=True), or say what is what: derive(..., rename=...)."
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
        lines.append(f"  derive(..., rename={{{first!r}: {second!r}}}), or in a rules file:")
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


# ---- the result ----


@dataclass(frozen=True)
class Unsure:
    """Layers, in the order of their calls, which neither names nor the flow of data puts in that order."""

    linen: tuple[str, ...]
    nnx: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.linen)} -> {', '.join(self.nnx)}: paired by call order alone"


@dataclass(frozen=True)
class Derived:
    """How each variable of one model is made from those of the other. Takes the place of rules.

    Attributes:
      links: which variables were paired, and why.
      dropped, fresh: Linen variables without a place in NNX, and the other way round, as the caller said.
      to: where `apply` goes.
      unsure: what the order of calls alone has paired, and no comparison of outputs has confirmed.
    """

    links: tuple[Link, ...]
    dropped: tuple[Location, ...] = ()
    fresh: tuple[Location, ...] = ()
    to: To = "nnx"
    unsure: tuple[Unsure, ...] = ()

    def inverse(self) -> Derived:
        """The way back."""
        return replace(self, to="linen" if self.to == "nnx" else "nnx")

    @functools.cached_property
    def made(self) -> dict[Location, Op]:
        """Target location -> how it is made from source locations."""
        makers: dict[Location, list[Link]] = {}
        for link in self.links:
            makers.setdefault(self._source_and_target(link)[1].location, []).append(link)
        make = nnx_op if self.to == "nnx" else linen_op
        return {at: make(links) for at, links in makers.items()}

    def apply(self, leaves: Mapping[Location, Op]) -> RuleResult:
        """The leaves of the target.

        Args:
          leaves: those of the source, all of a collection or none of it.

        Raises:
          VariablesMismatchError: leaves that the source model has not, or that are missing, or of another shape.
        """
        gone, new = (self.dropped, self.fresh) if self.to == "nnx" else (self.fresh, self.dropped)
        dropped = {at: "the caller of derive said so" for at in gone if at in leaves}
        dropped |= {at: "made anew by every call" for at in leaves if at[0] in TRANSIENT}
        kept = {at: op for at, op in leaves.items() if at not in dropped}
        present = {at[0] for at in kept}
        self._require(kept, present)
        made: dict[Location, Op] = {}
        for at, op in self.made.items():
            if next(op.sources())[0] in present:
                made[at] = op.on(kept.__getitem__)
        return RuleResult(made, dropped, tuple(new))

    def convert(self, values: Mapping[Location, Any]) -> dict[Location, Any]:
        """What becomes of the source's values: arrays, or what a transformation of JAX puts in their place.

        Args:
          values: by location, all of a collection or none of it; not changed.

        Returns:
          The target's values by location, without what is fresh in it.

        Raises: what `apply` raises.
        """
        return values_of(self.apply(reads_of(values)).made, values)

    def pairs(self) -> list[tuple[Location, Location]]:
        """(Linen's location, NNX's location) of each pair, whichever way this leads; each once."""
        towards_nnx = self if self.to == "nnx" else self.inverse()
        return pairs_of(towards_nnx.made)

    def _source_and_target(self, link: Link) -> tuple[Part, Part]:
        return (link.linen.part, link.nnx.part) if self.to == "nnx" else (link.nnx.part, link.linen.part)

    def _require(self, leaves: Mapping[Location, Op], collections: Collection[str]) -> None:
        """Raise VariablesMismatchError unless leaves are those of the source model, in these collections."""
        parts = {part.location: part for part, _ in map(self._source_and_target, self.links)}
        missing = [at for at in parts if at not in leaves and at[0] in collections]
        unexpected: list[Location] = []
        shapes: list[tuple[Location, Shape, Shape]] = []
        for at, op in leaves.items():
            if at not in parts:
                unexpected.append(at)
            elif op.shape != parts[at].shape:
                shapes.append((at, parts[at].shape, op.shape))
        if missing or unexpected or shapes:
            model = "the Linen model" if self.to == "nnx" else "the NNX model"
            raise VariablesMismatchError(missing, unexpected, shapes, source="the checkpoint", target=model)

    def rules(self) -> Rules:
        """The same as rules, to be edited and kept; `Rules.then` puts others before them.

        Raises:
          UnsayableRuleError: layers are stacked in a way, or have names, for which there is no rule.
          RulesError: `to` is "linen" and something is dropped or fresh.
        """
        forward = rules_of(self.links, self.dropped, self.fresh)
        return forward if self.to == "nnx" else forward.inverse()

    def to_toml(self) -> str:
        """The text of a rules file, which `read_rules` takes. Raises what `rules` does."""
        return self.rules().to_toml()

    def table(self) -> list[tuple[str, str, str]]:
        """(Linen path, NNX path, how they were paired and the shape), a row for each pair."""
        rows: list[tuple[str, str, str]] = []
        for link in self.links:
            linen, nnx = _shown(link.linen, link.linen_index), _shown(link.nnx, link.nnx_index)
            rows.append((linen, nnx, f"{link.how} {link.linen.shape}"))
        return rows

    def __str__(self) -> str:
        rows = [("Linen", "NNX", "paired by"), *self.table()]
        rows += [(show_path(at), "-", "dropped") for at in self.dropped]
        rows += [("-", show_path(at), "of the NNX model") for at in self.fresh]
        linen_width = max(len(linen) for linen, _, _ in rows)
        nnx_width = max(len(nnx) for _, nnx, _ in rows)
        lines = [f"{linen:{linen_width}}  {nnx:{nnx_width}}  {how}" for linen, nnx, how in rows]
        lines += [f"{group}: check with compare_forward" for group in self.unsure]
        return "\n".join(lines)


def _shown(slot: Slot, index: Index) -> str:
    at = "".join(f"[{n}]" for n in index)
    part = f" part {slot.index} of {slot.count}" if slot.count > 1 else ""
    return f"{show_path(slot.part.location)}{at}{part}"


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
    **kwargs: Any,
) -> Derived:
    """How the variables of a Linen model become those of an NNX model, and back.

    Both models are called abstractly, and their layers paired by class, shapes and the order of first calls: layers of
    one class and the same shapes are the same ones in the same order. Names decide where a layer is never called, and
    must not contradict the order elsewhere; names that Linen gives by itself (`Dense_0`) say nothing. A module that
    is called several times counts once. Layers in a stack (nn.scan, nn.vmap; nnx.scan, nnx.vmap) are the same as
    that many layers one by one. Variables of modules of the user's own may have any names, if their shapes differ.

    Two branches of one shape without names, called in another order, would be taken for one another. So neighbours in
    the order of calls are unsure unless both models' names tell them apart, or one needs the other's output in both
    models (which a second abstract trace of each shows). What is unsure is checked: both models run once, compiled,
    what `compare_forward` demands must hold, and the outputs must be further off with the two swapped; a swap that no
    output shows stays unsure. Nothing else is ever computed.

    Args:
      linen_module: unbound.
      nnx_module: real or abstract, or a function of `nnx.Rngs` that makes it, which runs abstractly. Not changed.
      *inputs, **kwargs: of the call: arrays, `jax.ShapeDtypeStruct`s, flags.
      rngs: for Linen's init, as `module.init` takes them.
      method: the name of the method to call, or a function of (module, *inputs, **kwargs); or two, Linen's first.
      rename: what is what, decided beforehand: Linen path -> NNX path of modules or variables, without the collection;
        None for what has no place in NNX. What is below one is paired with what is below the other.
      fresh: paths of NNX whose values Linen does not have: those of the model stay.
      check: whether to run the models: True, always; False, never; None, where something is unsure, nothing is dropped
        or fresh, the Linen variables have at most 256 MiB, and the models run here without drawing random numbers.

    Returns:
      What `apply`s to the leaves of Linen, `inverse()` of which to those of NNX. Its `unsure` is what was not checked,
      with an UnsureDerivationWarning.

    Raises:
      DerivationError: variables without a counterpart, or with several; all of them.
      UnknownPathError: `rename` or `fresh` names what there is not.
      ForwardMismatchError: a check has found other outputs; it lists what is unsure.
      RandomCallError: the same with check=True, for a call that draws random numbers.

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
    pairing, dropped, kept = _paired(linen, ours, rename or {}, fresh)
    links = sorted(dict.fromkeys(pairing.links), key=lambda link: (link.linen.part.location, link.linen_index))
    ties = pairing.ties
    if ties:  # both models are traced again, whole: what one layer needs of another may confirm their order
        call = linen_call(linen_module, methods[0], rngs, inputs, kwargs)
        linen_flow = DataFlow(linen, call, streams_of(rngs), inputs, kwargs)
        nnx_flow = DataFlow(ours, nnx_call(model, methods[1]), None, inputs, kwargs)
        ties = [tie for tie in ties if not (linen_flow.in_order(*tie.linen) and nnx_flow.in_order(*tie.nnx))]
    derived = Derived(tuple(links), dropped, kept, unsure=_groups(ties))
    if check or (check is None and derived.unsure):
        trial = functools.partial(Trial, linen_module, model, inputs, kwargs, rngs, method)
        derived, why = _checked(derived, ties, trial, always=bool(check))
    else:
        why = "check=False"
    if derived.unsure:
        warnings.warn(UnsureDerivationWarning(derived.unsure, why), stacklevel=2)
    return derived


def _paired(
    linen: Sequence[Unit], ours: Sequence[Unit], rename: Mapping[Prefix, Prefix | None], fresh: Iterable[Prefix]
) -> tuple[Pairing, tuple[Location, ...], tuple[Location, ...]]:
    """All pairs, and what is dropped and fresh."""
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
    if pairing.linen or pairing.nnx or pairing.ambiguous:
        raise DerivationError(pairing.linen, pairing.nnx, pairing.ambiguous)
    return pairing, tuple(dropped), tuple(kept)


def _checked(derived: Derived, ties: Sequence[Tie], trial: Callable[[], Trial], always: bool) -> tuple[Derived, str]:
    """With no more than what the outputs cannot tell apart as unsure; and why that is left."""
    if not always:
        if derived.dropped or derived.fresh:
            return derived, "the outputs differ anyway, as variables are dropped or fresh"
        if _nbytes(derived) > _MOST_BYTES:
            return derived, f"the variables have more than {_MOST_BYTES >> 20} MiB"
    try:
        compare = trial().compare
        off = compare(derived).worst
        left = [tie for tie in ties if not _is_worse(compare, _swapped(derived, tie), off)]
    except ForwardMismatchError:
        raise
    except Exception as error:  # a kernel for another accelerator, dropout, inputs that only the user can make
        if always:
            raise
        return derived, f"the models do not run here: {error}"
    return replace(derived, unsure=_groups(left)), "run, but the outputs are as good either way"


def _nbytes(derived: Derived) -> int:
    """Bytes of Linen's variables."""
    parts = {link.linen.part for link in derived.links}
    return sum(math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in parts)


def _swapped(derived: Derived, tie: Tie) -> Derived:
    """The same with the two layers of a tie the other way round."""

    def sides(link: Link) -> tuple[Any, ...]:
        return link.linen, link.linen_index, link.nnx, link.nnx_index

    gone = set(map(sides, tie.links))
    links = [link for link in derived.links if sides(link) not in gone]
    return replace(derived, links=tuple(dict.fromkeys([*links, *tie.swapped])))


def _is_worse(compare: Callable[[Derived], ForwardReport], swapped: Derived, off: float) -> bool:
    """Whether the outputs are off by far more than `off`. Deep in a model, a swap may cost less than the tolerance."""
    try:
        return compare(swapped).worst > _FAR * off
    except ForwardMismatchError:
        return True


def _groups(ties: Iterable[Tie]) -> tuple[Unsure, ...]:
    """Neighbours that share a layer are one group."""
    groups: list[list[tuple[Instance, Instance]]] = []
    for tie in ties:
        first, second = zip(tie.linen, tie.nnx, strict=True)
        if groups and groups[-1][-1] == first:
            groups[-1].append(second)
        else:
            groups.append([first, second])

    def name(instance: Instance) -> str:
        unit, index = instance
        return show_path(_place(unit)) + "".join(f"[{n}]" for n in index)

    unsure: list[Unsure] = []
    for group in groups:
        linen, nnx = zip(*group, strict=True)
        unsure.append(Unsure(tuple(map(name, linen)), tuple(map(name, nnx))))
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
    pairing.linen += more.linen
    pairing.nnx += more.nnx
    pairing.ambiguous += more.ambiguous
    pairing.ties += more.ties
