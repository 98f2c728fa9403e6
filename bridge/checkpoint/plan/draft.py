"""A plan while it is being made: what was asked for, and what the steps so far have put into it.

Law: a Request never changes; a step adds to a Draft and takes nothing away, but for what the target has no place for.
Knows keys and expressions; knows nothing of the steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from bridge._types import Location, Path
from bridge.checkpoint.options import ConversionOptions
from bridge.checkpoint.plan.note import Note
from bridge.checkpoint.plan.target import Target
from bridge.checkpoint.tree.canonical import Key, Parts, Role
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.ops import Op
from bridge.checkpoint.tree.tree import Tree


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      tree: the source.
      source: what each of its leaves is.
      options: what the user wants; `to` and `rng` count here, `rules`, `tx`, `nested` and `empty`.
      note: what an earlier conversion has noted beside the source.
      target: what the result must fit, if the user has it.
    """

    tree: Tree
    source: Parts
    options: ConversionOptions
    note: Note
    target: Target | None

    @property
    def to_nnx(self) -> bool:
        """Whether the result is in NNX's layout."""
        return self.options.to == "nnx"

    @functools.cached_property
    def paths(self) -> dict[Location, Path]:
        """Where the source has each variable that is one leaf."""
        whole: dict[Location, Path] = {}
        for key, path in self.source.leaves.items():
            if key.role is Role.MODEL and key.location and not key.tail:
                whole[key.location] = path
        return whole

    @functools.cached_property
    def variables(self) -> dict[Location, Leaf]:
        """Shape and dtype of each of these in the source."""
        return {location: self.tree.leaves[path] for location, path in self.paths.items()}

    @functools.cached_property
    def trained(self) -> set[Location]:
        """What the source's optimizer has slots of; where there is none, the params."""
        slots = {key.location for key in self.source.leaves if key.role is Role.OPTIMIZER and key.location}
        return slots or {location for location in self.paths if location[0] == "params"}


@dataclass
class Draft:
    """What the steps have found.

    Attributes:
      variables: new location -> how it is made, from `Read`s of old *locations*.
      new: variables that come from the target, as the rules say.
      made: key of a leaf of the result -> how it is made, from `Read`s of paths of the source.
      masked: keys that stand for a variable and have no value.
      dropped: path of the source -> why it has no place.
      asked: those of `dropped` that a rule or an option says may go.
      warnings, notes: as in `Plan`.
    """

    request: Request
    variables: dict[Location, Op] = field(default_factory=dict)
    new: frozenset[Location] = frozenset()
    made: dict[Key, Op] = field(default_factory=dict)
    masked: set[Key] = field(default_factory=set)
    dropped: dict[Path, str] = field(default_factory=dict)
    asked: set[Path] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, path: Path, why: str, *, asked: bool = False) -> None:
        """Note that a leaf of the source has no place."""
        self.dropped[path] = why
        if asked:
            self.asked.add(path)

    def models(self) -> dict[Location, Op]:
        """How each variable of the result is made, or part of one whose value is a tree."""
        return {key.location: op for key, op in self.made.items() if key.role is Role.MODEL and key.location}
