"""ModuleDef: what a module is besides its State.

Law: `moduledef.merge(state)` is isomorphic to the module both were split from. A ModuleDef is a place in a
GraphDef and holds nothing else: hashable, equal by content, a JAX pytree without leaves.
"""

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax

from nnx_core._errors import Path
from nnx_core.graph import api
from nnx_core.graph.pack import Refs
from nnx_core.graph.structure import Element, GraphDef, Node, Ref, Static, nodes
from nnx_core.graph.unpack import Unpacker
from nnx_core.legacy._errors import SubmoduleDefError
from nnx_core.legacy._text import fields_text
from nnx_core.legacy.state import as_core

M = TypeVar("M")


@jax.tree_util.register_static
@dataclass(frozen=True, repr=False)
class ModuleDef(Generic[M]):
    """The structure of a module, or of a submodule in it: type, index, submodules and static fields.

    Modules are numbered in the order in which they are first reached, the root is 0; a module that is reached
    again, or that refers to itself, appears as that number.

    Args:
      graphdef: the structure of the whole.
      path: where in it this module is.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> shared = nnx.Map(w=nnx.param(1.0), size=3)
      >>> state, moduledef = nnx.Map(a=shared, b=shared).split()
      >>> moduledef
      ModuleDef(
        type=Map,
        index=0,
        submodules=(('a', ModuleDef(
          type=Map,
          index=1,
          submodules=(),
          static_fields=(('size', 3),)
        )), ('b', 1)),
        static_fields=()
      )
      >>> module = moduledef.merge(state)
      >>> module["a"] is module["b"]
      True
    """

    graphdef: GraphDef
    path: Path = ()

    @property
    def type(self) -> type[M]:
        """The class of the module."""
        return self._node.kind

    @property
    def index(self) -> int | None:
        """Its number; None for a plain list, tuple or dict with modules or Variables in it."""
        return self._numbers().get(self._node.id)

    @property
    def submodules(self) -> tuple[tuple[Hashable, "ModuleDef[Any] | int"], ...]:
        """(name, ModuleDef) of each submodule that is reached here first; (name, index) of the others."""
        numbers = self._numbers()
        found: list[tuple[Hashable, ModuleDef[Any] | int]] = []
        for name, child in self._children():
            if type(child) is Ref and child.id in numbers:
                found.append((name, numbers[child.id]))
            elif type(child) is Node and not _is_static(child):
                found.append((name, ModuleDef(self.graphdef, (*self.path, name))))
        return tuple(found)

    @property
    def static_fields(self) -> tuple[tuple[Hashable, Any], ...]:
        """(name, value) of every attribute that is configuration."""
        rebuild = Unpacker((), Refs()).build
        return tuple((name, rebuild(child, None)) for name, child in self._children() if _is_static(child))

    def merge(self, state: Any, /, *states: Any) -> M:
        """The module with the values in the States; new objects each time.

        Args:
          state, *states: together they have every path of the module, and no other.

        Raises:
          StateMismatchError: listing all paths that are missing or that the module has not.
          NotAStateError: if one is no State.
          SubmoduleDefError: if this is the ModuleDef of a submodule.
        """
        if self.path:
            raise SubmoduleDefError(self.type, self.path)
        return api.merge(self.graphdef, *(as_core(s, "moduledef.merge") for s in (state, *states)))

    def apply(self, state: Any, /, *states: Any) -> "Applied":
        """The module as a pure function: `out, (state, moduledef) = moduledef.apply(state)(x)`.

        A method is called in the same way, also one of a submodule: `moduledef.apply(state).encoder.embed(x)`.

        Args:
          state, *states: as for `merge`.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> class Counter(nnx.Module):
          ...     def __init__(self):
          ...         self.n = nnx.var("counts", 0)
          ...
          ...     def add(self, step):
          ...         self.n = self.n + step
          ...         return "added"
          >>> state, moduledef = Counter().split()
          >>> out, (new, moduledef) = moduledef.apply(state).add(2)
          >>> out, state["n"].value, new["n"].value
          ('added', 0, 2)
        """
        return Applied(self, (state, *states))

    @property
    def _node(self) -> Any:
        node: Any = self.graphdef.root
        for key in self.path:
            node = node.children[node.keys.index(key)]
        return node

    def _children(self) -> list[tuple[Hashable, Element]]:
        node = self._node
        keys = node.keys if node.order is None else node.order
        children = dict(zip(node.keys, node.children, strict=True))
        return [(key, children[key]) for key in keys]

    def _numbers(self) -> dict[int | None, int]:
        objects = (e for _, e in nodes(self.graphdef.root) if type(e) is Node and e.id is not None)
        return {element.id: number for number, element in enumerate(objects)}

    def __repr__(self) -> str:
        fields = [(f"{name}=", repr(getattr(self, name))) for name in ("index", "submodules", "static_fields")]
        return fields_text("ModuleDef", [("type=", self.type.__name__), *fields])


def _is_static(element: Element) -> bool:
    """Whether nothing in `element` has a value that travels, or identity: configuration, such as a tuple of sizes."""
    return all(type(e) is Static or (type(e) is Node and e.id is None) for _, e in nodes(element))


@dataclass(frozen=True)
class Applied:
    """A module, or something in it, as a function that returns (its result, (State, ModuleDef) afterwards)."""

    _moduledef: ModuleDef[Any]
    _states: tuple[Any, ...]
    _steps: tuple[tuple[Callable[[Any, Any], Any], Any], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ModuleDef[Any]]]:
        module = f = self._moduledef.merge(*self._states)
        for get, key in self._steps:
            f = get(f, key)
        out = f(*args, **kwargs)
        return out, module.split()

    def __getattr__(self, name: str) -> "Applied":
        if name.startswith("__"):
            raise AttributeError(name)  # a protocol of Python or JAX, not an attribute of the module
        return self._then(getattr, name)

    def __getitem__(self, key: Any) -> "Applied":
        return self._then(operator.getitem, key)

    def _then(self, get: Callable[[Any, Any], Any], key: Any) -> "Applied":
        return Applied(self._moduledef, self._states, (*self._steps, (get, key)))
