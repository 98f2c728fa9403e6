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
    found: list[ObjectInfo] = []
    seen: set[int] = {id(node)}

    def visit(x: Any, path: Path, owner: ObjectInfo) -> None:
        if isinstance(x, Object | Variable):
            if id(x) in seen:
                return
            seen.add(id(x))
        if isinstance(x, Variable):
            owner._add(path, kind_name(type(x)), x)
        elif is_array(x):
            owner._add(path, ARRAY, x)
        elif isinstance(x, Object):
            enter(x, path)
            owner._grow(found[index_of[id(x)]].sizes)
        else:
            for key, child in children(x):
                visit(child, (*path, key), owner)

    index_of: dict[int, int] = {}

    def enter(x: Any, path: Path) -> None:
        info = ObjectInfo(path, type(x), id(x))
        index_of[id(x)] = len(found)
        found.append(info)
        if is_array(x) or isinstance(x, Variable):
            info._add(path, kind_name(type(x)) if isinstance(x, Variable) else ARRAY, x)
        for key, child in children(x):
            visit(child, (*path, key), info)

    enter(node, ())
    return found


def kinds_of(infos: Iterable[ObjectInfo]) -> list[str]:
    """All kinds, by name."""
    return sorted({kind for info in infos for kind in info.sizes})
