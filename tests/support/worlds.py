"""One program on two libraries: a package written in flax.nnx, imported on flax.nnx and on nnx_core, in one process.

Law: inside a world `flax.nnx`, in every form of import and however late, is that world's library, and the packages
that the world names are imported anew on it; outside all worlds nothing has changed.
Knows modules and imports; knows no package and no model.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import flax
import flax.nnx  # before any world takes its place: flax imports it when it is first asked for

NNX = "flax.nnx"


class World:
    """The packages `roots`, imported on `library`: "flax.nnx" or "nnx_core".

    Everything that runs code of a package belongs inside `with world:`, since its functions import as well.
    """

    def __init__(self, library: str, *roots: str):
        self.library, self.roots = library, roots
        self.nnx: Any = importlib.import_module(library)
        self._modules: dict[str, ModuleType] = {NNX: self.nnx}
        self._outside: dict[str, ModuleType] = {}
        self._depth = 0
        if library == NNX:
            self._modules = {name: module for name, module in sys.modules.items() if self._is_nnx(name)}

    def load(self, name: str) -> Any:
        """The module of this name, as this world has it."""
        with self:
            return importlib.import_module(name)

    def __enter__(self) -> "World":
        self._depth += 1
        if self._depth == 1:
            self._outside = self._swap(self._modules)
            if self.library != NNX:
                sys.meta_path.insert(0, _FINDER)
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            if self.library != NNX:
                sys.meta_path.remove(_FINDER)
            self._modules = self._swap(self._outside)

    def _swap(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        """Put these in place of what `sys.modules` has of this world's names; returns what it had."""
        before = {name: module for name, module in sys.modules.items() if self._is_own(name)}
        for name in before:
            del sys.modules[name]
        sys.modules.update(modules)
        flax.nnx = sys.modules[NNX]  # `from flax import nnx` asks the package, not sys.modules
        return before

    def _is_nnx(self, name: str) -> bool:
        return name == NNX or name.startswith(f"{NNX}.")

    def _is_own(self, name: str) -> bool:
        return self._is_nnx(name) or name.partition(".")[0] in self.roots


class _Finder(MetaPathFinder):
    """`flax.nnx.a.b` is `nnx_core.a.b`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Loader()) if name.startswith(f"{NNX}.") else None


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        """The import system takes what stands in sys.modules afterwards."""
        ours = f"nnx_core{module.__name__.removeprefix(NNX)}"
        sys.modules[module.__name__] = importlib.import_module(ours)


_FINDER = _Finder()
