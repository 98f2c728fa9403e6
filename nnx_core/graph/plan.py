"""A plan is a remembered walk: it tells the leaves of some arguments without walking them again.

Law: a plan is used only while everything it saw is unchanged, so a stale plan cannot run. Checked in two
steps: the one global reading of `_changes` (nothing at all has changed: the usual case), then the version of
each object and State it saw. Plain lists and dicts cannot count their changes and are compared, shallowly.
A plan keeps no object alive: it holds objects weakly, and Variables, which refer to none, strongly.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from nnx_core._changes import now
from nnx_core._errors import Path
from nnx_core.graph.cells import Cell
from nnx_core.graph.classify import holds_still
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import Leaves, Packer, Refs
from nnx_core.graph.structure import GraphDef
from nnx_core.state import State
from nnx_core.variables import Variable


class Plan:
    """What a walk found: the structure, where the leaves of each group are, and the versions of all it saw."""

    __slots__ = (
        "_cells",
        "_containers",
        "_fixed",
        "_known",
        "_objects",
        "_places",
        "_seen_at",
        "_variables",
        "graphdef",
        "loose_groups",
        "memo",
    )

    def __init__(self, graphdef: GraphDef, packer: Packer, seen_at: int):
        self._seen_at = seen_at
        self.graphdef = graphdef
        self.memo: dict[Hashable, Any] = {}  # whatever can be derived from an unchanged plan
        self.loose_groups = packer.loose_groups
        self._known = list(map(_held, packer.refs.objects))
        self._places: list[Any] = packer.refs.places  # of a walk, which has a Place for everything
        self._variables = [(x, version) for x, version in packer.versions if isinstance(x, Variable)]
        self._objects = [(weakref.ref(x), version) for x, version in packer.versions if not isinstance(x, Variable)]
        self._containers = [_container(*container) for container in packer.containers]
        self._cells = packer.cells
        self._fixed = packer.fixed

    def holds(self) -> bool:
        """Whether everything this plan saw is unchanged."""
        stamp = now()  # before the versions: a change in between must not be missed
        if stamp != self._seen_at:
            for ref, version in self._objects:
                obj = ref()
                if obj is None or obj._nnx_version != version:
                    return False
            for v, version in self._variables:
                if v._nnx_version != version:
                    return False
            self._seen_at = stamp
        # After the versions: that the owner is unchanged means that there still is a container to look into.
        if self._containers and not all(map(_same_contents, self._containers)):
            return False
        return not self._fixed or all(fixed.is_current for fixed in self._fixed)

    def leaves(self, loose: list[Any]) -> list[Leaves]:
        """The leaves of each group as they are now; `loose` are those that no object owns, in order."""
        # The hot spot of a steady call: Python 3.12 and later specialise the attribute in a comprehension, and
        # have no frame for it. Neither `map` nor a method of the Variable comes near.
        groups: list[Leaves] = [([cell._raw_value for cell in cells], []) for cells in self._cells]
        if len(groups) == 1:
            return [(groups[0][0], loose)]
        for x, group in zip(loose, self.loose_groups, strict=True):
            groups[group][1].append(x)
        return groups

    def known(self, index: int) -> Any:
        """The object or Variable under `index`."""
        x = self._known[index]
        return x() if type(x) is weakref.ReferenceType else x

    def refs(self) -> Refs:
        """The indices of the walk, on objects that are alive."""
        refs = Refs()
        refs.objects = [self.known(i) for i in range(len(self._known))]
        refs.indices = {id(x): i for i, x in enumerate(refs.objects)}
        refs.places = list(self._places)
        return refs

    @property
    def cells(self) -> list[Cell]:
        """The cells of the one group that there is, in walking order."""
        [cells] = self._cells
        return cells

    @property
    def group_count(self) -> int:
        """How many groups the leaves are in."""
        return len(self._cells)

    def path(self, index: int) -> Path:
        """Where the object or Variable under `index` was first reached."""
        return self._places[index].path

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, once for this plan."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def _held(x: Any) -> Any:
    """`x`, or a weak reference to it where holding it would keep a graph alive."""
    return weakref.ref(x) if isinstance(x, Object | State) else x


def _container(owner: Object, key: Hashable, contents: list[Any]) -> tuple[Any, Hashable, list[Any]]:
    return weakref.ref(owner), key, list(map(_held, contents))


def _same_contents(entry: tuple[Any, Hashable, list[Any]]) -> bool:
    ref, key, before = entry
    owner = ref()
    if owner is None:
        return False
    alive = [x() if type(x) is weakref.ReferenceType else x for x in before]  # at every call, as in `leaves`
    return holds_still(owner._nnx_items().get(key), alive, deep=False)
