"""What `derive` gives: how each variable of one model is made from those of the other, and how sure that is.

Law: `derived.inverse()` undoes `derived`, bit for bit, but for constants, which are undone up to rounding; a mapping
that was not proven says why.
Knows links and rules; knows nothing of how they were found.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bridge._errors import VariablesMismatchError, show_path
from bridge._types import Location, Shape
from bridge.checkpoint.derivation.expressions import linen_op, nnx_op
from bridge.checkpoint.derivation.to_rules import rules_of
from bridge.checkpoint.rules.apply import RuleResult, Rules, pairs_of, reads_of
from bridge.checkpoint.rules.rule import Rule
from bridge.checkpoint.tree.ops import Op, Read, values_of
from bridge.tracing.pairs import Index, Link
from bridge.tracing.trace import TRANSIENT, Part, Slot

To = Literal["nnx", "linen"]


@dataclass(frozen=True)
class Unsure:
    """Layers, in the order of their calls, which neither names nor the flow of data puts in that order."""

    linen: tuple[str, ...]
    nnx: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.linen)} -> {', '.join(self.nnx)}: paired by call order alone"


@dataclass(frozen=True)
class Proof:
    """What has shown that two models are the same under a mapping.

    Attributes:
      seeds: of the random numbers that both were run on.
      outputs, gradients: how many arrays were compared for each seed.
      worst: the largest difference over its tolerance.
      bit_equal: whether all outputs had the same bits.
      notes: what was not compared, or not reached, and why.
      written: how many arrays of state, as the call leaves it, were compared for each seed.
    """

    seeds: tuple[int, ...]
    outputs: int
    gradients: int
    worst: float
    bit_equal: bool
    notes: tuple[str, ...] = ()
    written: int = 0

    def __str__(self) -> str:
        how = "bit for bit" if self.bit_equal else f"within {self.worst:.2g} of what rounding may do"
        what = f"{self.outputs} outputs and {self.gradients} gradients"
        if self.written:
            what = f"{self.outputs} outputs, {self.gradients} gradients and {self.written} arrays of state"
        what = f"{what} on {len(self.seeds)} draws of random numbers"
        return "; ".join((f"proven: {what} agree, outputs {how}", *self.notes))


@dataclass(frozen=True)
class Reworked:
    """Variables whose numbers stand otherwise in the other model, or are fused or cut there, and the rule for them.

    Attributes:
      rule: from Linen to NNX, in literal locations, or for a stack.
      linen, nnx: the variables.
      how: why these.
    """

    rule: Rule
    linen: tuple[Part, ...]
    nnx: tuple[Part, ...]
    how: str


@dataclass(frozen=True)
class Derived:
    """How each variable of one model is made from those of the other. Takes the place of rules.

    Attributes:
      links: which variables were paired, and why.
      dropped, fresh: Linen variables without a place in NNX, and the other way round, as the caller said.
      to: where `apply` goes.
      unsure: what the order of calls alone has paired, and nothing has confirmed.
      reworked: what is not the same array on both sides.
      exchanged: (Linen's layer, NNX's) that are not called in the same order, as runs of both models have shown.
      proof: what has shown that it is right; None if nothing has.
      unproven: why there is no proof; "" if there is one.
    """

    links: tuple[Link, ...]
    dropped: tuple[Location, ...] = ()
    fresh: tuple[Location, ...] = ()
    to: To = "nnx"
    unsure: tuple[Unsure, ...] = ()
    reworked: tuple[Reworked, ...] = ()
    exchanged: tuple[tuple[str, str], ...] = ()
    proof: Proof | None = field(default=None, compare=False)
    unproven: str = field(default="it was made by hand", compare=False)

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
        made = {at: make(links) for at, links in makers.items()}
        for part in self.reworked:
            sources, _ = self._sides(part)
            rule = part.rule if self.to == "nnx" else part.rule.inverse()
            reads = {source.location: Read(source.location, source.shape, source.dtype) for source in sources}
            made |= Rules([rule], default="error").apply(reads).made
        return made

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

    def _sides(self, part: Reworked) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        return (part.linen, part.nnx) if self.to == "nnx" else (part.nnx, part.linen)

    def _source_and_target(self, link: Link) -> tuple[Part, Part]:
        return (link.linen.part, link.nnx.part) if self.to == "nnx" else (link.nnx.part, link.linen.part)

    def _require(self, leaves: Mapping[Location, Op], collections: Collection[str]) -> None:
        """Raise VariablesMismatchError unless leaves are those of the source model, in these collections."""
        parts = {part.location: part for part, _ in map(self._source_and_target, self.links)}
        for reworked in self.reworked:
            parts |= {part.location: part for part in self._sides(reworked)[0]}
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
        ruled: list[Rule] = [part.rule for part in self.reworked]
        taken = [part.location for reworked in self.reworked for part in reworked.linen]
        plain = rules_of(self.links, self.dropped, self.fresh, taken)
        forward = replace(plain, rules=(*ruled, *plain.rules), unproven=self.unproven)
        return forward if self.to == "nnx" else forward.inverse()

    def to_toml(self) -> str:
        """The text of a rules file, which `read_rules` takes, and whether it is proven. Raises what `rules` does."""
        word = f"not proven: {self.unproven}" if self.unproven else str(self.proof)
        comment = "\n".join(f"# {line}" for line in word.splitlines())
        return f"{comment}\n{self.rules().to_toml()}"

    def table(self) -> list[tuple[str, str, str]]:
        """(Linen path, NNX path, how they were paired and the shape), a row for each pair."""
        rows: list[tuple[str, str, str]] = []
        for link in self.links:
            linen, nnx = _shown(link.linen, link.linen_index), _shown(link.nnx, link.nnx_index)
            rows.append((linen, nnx, f"{link.how} {link.linen.shape}"))
        for part in self.reworked:
            linen, nnx = (", ".join(show_path(x.location) for x in side) for side in (part.linen, part.nnx))
            rows.append((linen, nnx, part.how))
        return rows

    def __str__(self) -> str:
        rows = [("Linen", "NNX", "paired by"), *self.table()]
        rows += [(show_path(at), "-", "dropped") for at in self.dropped]
        rows += [("-", show_path(at), "of the NNX model") for at in self.fresh]
        linen_width = max(len(linen) for linen, _, _ in rows)
        nnx_width = max(len(nnx) for _, nnx, _ in rows)
        lines = [f"{linen:{linen_width}}  {nnx:{nnx_width}}  {how}" for linen, nnx, how in rows]
        lines += [f"{linen} -> {nnx}: against the order of calls" for linen, nnx in self.exchanged]
        lines += [f"{group}: check with compare_forward" for group in self.unsure]
        if self.unproven:
            lines.append(f"not proven: {self.unproven}")
        return "\n".join(lines)


def _shown(slot: Slot, index: Index) -> str:
    at = "".join(f"[{n}]" for n in index)
    part = f" part {slot.index} of {slot.count}" if slot.count > 1 else ""
    return f"{show_path(slot.part.location)}{at}{part}"
