"""Which objects a graph has, which Variables each of them holds, and how large they are.

Law: every object and Variable counts once, where it is first reached (keys sorted, as all walks go); the sizes
of an object are those of all it holds, further down too, so the root's are the total.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nnx_core._errors import Path
from nnx_core._repr import SizeBytes, kind_name
from nnx_core.graph.objects import Object, is_array
from nnx_core.graph.walk import children
from nnx_core.variables import Variable

ARRAY = "Array"  # the kind of arrays that are attributes themselves


@dataclass
class ObjectInfo:
    """One object: where it is, its own Variables by kind and name, and the size of everything below it by kind."""

    path: Path
    kind: type
    id: int
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, SizeBytes] = field(default_factory=dict)

    def _add(self, path: Path, kind: str, x: Any) -> None:
        name = "/".join(map(str, path[len(self.path) :])) or "value"
        self.own.setdefault(kind, {})[name] = x
        self._grow({kind: SizeBytes.of(x.get_raw_value() if isinstance(x, Variable) else x)})

    def _grow(self, sizes: dict[str, SizeBytes]) -> None:
        for kind, size in sizes.items():
            self.sizes[kind] = self.sizes.get(kind, SizeBytes()) + size


def census(node: Any) -> list[ObjectInfo]:
    """All objects of `node`, itself first (also if it is a list or dict), parents before children."""
    infos = [ObjectInfo((), type(node), id(node))]
    owners = [0]  # for each object the index of the one it is in
    seen: set[int] = {id(node)}
    if is_array(node) or isinstance(node, Variable):
        infos[0]._add((), kind_name(type(node)) if isinstance(node, Variable) else ARRAY, node)
    # A list instead of recursion: models may be deep, and a function that calls itself would hold all of this
    # in a reference cycle.
    stack = _below((), node, 0)
    while stack:
        path, x, owner = stack.pop()
        if isinstance(x, Object | Variable):
            if id(x) in seen:
                continue
            seen.add(id(x))
        if isinstance(x, Variable):
            infos[owner]._add(path, kind_name(type(x)), x)
        elif is_array(x):
            infos[owner]._add(path, ARRAY, x)
        else:
            if isinstance(x, Object):
                infos.append(ObjectInfo(path, type(x), id(x)))
                owners.append(owner)
                owner = len(infos) - 1
            stack += _below(path, x, owner)
    for info, owner in zip(infos[:0:-1], owners[:0:-1], strict=True):  # the innermost first
        infos[owner]._grow(info.sizes)
    return infos


def _below(path: Path, x: Any, owner: int) -> list[tuple[Path, Any, int]]:
    """The children of `x`, the last one first."""
    return [((*path, key), child, owner) for key, child in children(x)][::-1]


def kinds_of(infos: Iterable[ObjectInfo]) -> list[str]:
    """All kinds, by name."""
    return sorted({kind for info in infos for kind in info.sizes})
