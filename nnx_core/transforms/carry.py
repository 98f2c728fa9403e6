"""What a loop carries, and the check that it comes back in the form it had.

Law: a carry keeps its structure. Objects come back as themselves, with new values. A Variable comes back as itself,
or another one of the same class and metadata takes its place, as in a State that is rebuilt in each step: then the
new one's value goes on. So it is with what stands in an attribute.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nnx_core._errors import Path, StructureError, show_path
from nnx_core.graph.effects import After
from nnx_core.graph.pack import Leaves
from nnx_core.graph.structure import (
    ArrayDef,
    CellDef,
    Element,
    GraphDef,
    Leaf,
    Node,
    Ref,
    Static,
    VariableDef,
    leaf_defs,
    nodes,
)
from nnx_core.transforms.groups import Carry
from nnx_core.transforms.lift import arguments_of, name_of


class Route:
    """From what one step returns for the group Carry to what the next one takes, and back.

    A step returns the values of the cells it was given, then those of what it made. The next step takes values in
    the order of the structure, each from the cell itself or from the Variable that came back in its place.
    """

    def __init__(self, graphdef: GraphDef, after: After, group: int, replaced: dict[int, int]):
        owned: list[CellDef] = [d for _, d in leaf_defs(graphdef.root) if not isinstance(d, Leaf) and d.group == group]
        travelling = [write.id for write in after.cells if write.group == group]
        new = [element for change in after.objects for _, element in change.set]
        defs = [d for element in (*new, after.result.root) for _, d in leaf_defs(element)]
        made = [d.id for d in defs if not isinstance(d, Leaf) and d.group == group]
        place_of = {index: place for place, index in enumerate((*travelling, *made))}
        self._takes = [place_of[replaced.get(d.id, d.id)] for d in owned]
        self._left_out = frozenset(range(len(place_of))).difference(self._takes)
        self._size = len(place_of)
        self._replaced = replaced

    def forward(self, returned: Leaves) -> Leaves:
        """What the next step takes of what a step returned."""
        values, loose = returned
        return [values[place] for place in self._takes], loose

    def back(self, taken: Leaves, f: Callable[..., Any], after: After) -> tuple[After, Leaves]:
        """The last of it as a step would have returned it, and `after` without what did not go on.

        Raises:
          StructureError: if `f` wrote to a Variable and returned another one in its place: which write counts?
        """
        values, loose = taken
        returned: list[Any] = [None] * self._size
        for place, value in zip(self._takes, values, strict=True):
            returned[place] = value
        if not self._left_out:
            return after, (returned, loose)
        gone = frozenset(self._replaced) & after.travelling
        if not gone <= after.idle:
            raise StructureError(
                f"{name_of(f)} wrote to a Variable of its carry and returned another one in its place. Expected one of"
                " the two: write to the Variable and return it, or leave it as it is and return a new one."
            )
        kept = tuple(write for write in after.cells if write.id not in gone)
        after = dataclasses.replace(after, cells=kept, idle=after.idle - gone)
        return after, ([x for place, x in enumerate(returned) if place not in self._left_out], loose)


class Following:
    """How a carry came back from one step of `f`: whether with the structure it had, and what is new in it."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        #: Index of something of the carry -> index of the new thing that came back in its place.
        self.new: dict[int, int] = {}
        self._places: Counter[int] = Counter()  # at how many, by the index of what was there

    def follow(self, before: Element, after: Element, path: Path, *, inside: bool = False) -> None:
        """Raise StructureError unless `after` has the structure of `before`; note what is new.

        Inside of an object, other objects of the same structure may take the place of those that were there.
        """
        if isinstance(before, Node | VariableDef | Ref) and type(after) is Ref:
            # The thing itself, which is a Ref in a result since the arguments introduced it; or what took its place.
            if before.id is not None and self.new.get(before.id, before.id) == after.id:
                self._places[before.id] += 1
                return
        elif type(before) is Node and type(after) is Node and _may_follow(before, after, inside):
            if (before.kind, before.keys, before.extra) == (after.kind, after.keys, after.extra):
                self._note(before.id, after.id)
                for key, given, returned in zip(before.keys, before.children, after.children, strict=True):
                    self.follow(given, returned, (*path, key), inside=inside)
                return
        elif type(before) is ArrayDef and type(after) is ArrayDef:
            self._note(before.id, after.id)
            return
        elif type(before) is VariableDef and type(after) is VariableDef:
            if (before.kind, before.metadata) == (after.kind, after.metadata):
                self._note(before.id, after.id)
                return
        elif type(before) is type(after) and before == after:
            return
        raise self._differs(before, after, path)

    def _note(self, before: int | None, after: int | None) -> None:
        if before is not None and after is not None:  # containers have no index
            self.new[before] = after
            self._places[before] += 1

    def follow_attributes(self, after: After, parts: Iterable[Element]) -> None:
        """As `follow`, for what was set in the objects of a carry, `parts` of the arguments."""
        objects = {d.id: (path, d) for part in parts for path, d in nodes(part) if type(d) is Node and d.id is not None}
        for change in after.objects:
            if change.id not in objects:
                continue
            path, before = objects[change.id]
            children = dict(zip(before.keys, before.children, strict=True))
            is_alike = change.order is None and not change.removed and change.marks == before.extra
            if not is_alike or not children.keys() >= dict(change.set).keys():
                raise _changed(self.f, after)
            for key, element in change.set:
                self.follow(children[key], element, ("carry", *path, key), inside=True)

    def require_everywhere(self, parts: Iterable[Element]) -> None:
        """Raise StructureError if something new came back at one place of the carry, and at another what was there."""
        places = Counter(getattr(d, "id", None) for part in parts for _, d in nodes(part))
        for index in self.new:
            if places[index] != self._places[index]:
                raise StructureError(
                    f"{name_of(self.f)} put something new at one place of its carry, where the same Variable or object"
                    f" stood at {places[index]} places. Expected it at all of them or at none: write to what is there,"
                    " or replace it everywhere."
                )

    def _differs(self, before: Element, after: Element, path: Path) -> StructureError:
        expected, found = described(before), described(after)
        if expected == found:
            expected, found = _told_apart(before, after)
        return StructureError(
            f"{name_of(self.f)} must return its carry with the structure it was given; {show_path(path)} differs:\n"
            f"  given:    {expected}\n  returned: {found}\n"
            "Update modules in place and return the same objects."
        )


def _may_follow(before: Node, after: Node, inside: bool) -> bool:
    """Whether a container may take the place of a container, or inside of an object a new object that of an object."""
    return before.id is None is after.id or (inside and before.id is not None is not after.id)


def _told_apart(before: Element, after: Element) -> tuple[str, str]:
    """Two structures that read the same, with what tells them apart."""
    text = described(before)
    if isinstance(before, Node) and isinstance(after, Node) and before.id is not None:
        return f"{text}, the caller's object", f"{text}, another object"
    if isinstance(before, VariableDef) and isinstance(after, VariableDef):
        return f"{text} with metadata {dict(before.metadata)}", f"{text} with metadata {dict(after.metadata)}"
    if isinstance(before, Node) and isinstance(after, Node):
        return f"{text} made by {before.extra}", f"{text} made by {after.extra}"
    return f"{text} at its first place", f"{text} that stands at another place of the carry too"


def described(d: Element) -> str:
    """A structure in words, for errors."""
    if type(d) is Static:
        return repr(d.value)
    if type(d) is Node:
        is_sequence = d.id is None and d.kind in (tuple, list)
        parts = map(described, d.children) if is_sequence else map(str, d.keys)
        return f"{d.kind.__name__}({', '.join(parts)})"
    if type(d) is VariableDef:
        return d.kind.__name__
    return "an array or number" if isinstance(d, Leaf | ArrayDef) else "an object of the caller"


def carried(d: Element, spec: Any, path: Path) -> Iterator[tuple[Path, Element]]:
    """The parts of a structure whose spec is Carry."""
    if spec is Carry:
        yield path, d
    elif type(spec) in (tuple, list, dict) and type(d) is Node:
        specs = spec if type(spec) is dict else dict(enumerate(spec))
        for key, child in zip(d.keys, d.children, strict=True):
            yield from carried(child, specs[key], (*path, key))


def route_of(f: Callable[..., Any], graphdef: GraphDef, after: After) -> Route:
    """How the one positional argument of `f` goes from step to step.

    Raises:
      StructureError: if `f` did not return it in the form it was given.
    """
    [carry] = arguments_of(graphdef).children
    return route(f, graphdef, after, [(("carry",), carry, after.result.root)], 0)


def route(
    f: Callable[..., Any], graphdef: GraphDef, after: After, parts: list[tuple[Path, Element, Element]], group: int
) -> Route:
    """How the parts of a carry go from step to step: each with its path, as it was given and as it was returned.

    Raises:
      StructureError: if one did not come back in the form it was given.
    """
    following, before = Following(f), [given for _, given, _ in parts]
    following.follow_attributes(after, before)
    for path, given, returned in parts:
        following.follow(given, returned, path)
    following.require_everywhere(before)
    return Route(graphdef, after, group, following.new)


def _changed(f: Callable[..., Any], after: After) -> StructureError:
    return StructureError(
        f"{name_of(f)} set or removed the attributes {after.changed_keys} of an object in its carry, whose"
        " structure must stay the same in every step.\nSet them before the loop, or keep the value in a Variable."
    )
