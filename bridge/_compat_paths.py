"""Module paths that users reach for, as aliases: flax.nnx.bridge's `bridge.wrappers`, and where files of 0.1.0 stood.

Law: nothing is implemented here but two names of flax.nnx's, `linen_rngs_dict` and `MODULE_CONTEXT`; every other
name is the object that its own room defines.
Importing this file makes `from bridge.wrappers import ToNNX` and `from bridge.layouts import layout_for` work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import nnx_core as nnx
from bridge import variables
from bridge.functional import Functional, functional
from bridge.linen_in_nnx.wrapper import ToNNX, lazy_init
from bridge.modules import module, scope
from bridge.nnx_in_linen.host import current_linen_module
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class


def linen_rngs_dict(linen_module: Any, add_default: bool = False) -> dict[str, Any]:
    """A key from each random stream of a bound Linen module, by name; with `add_default`, the seed 0 if none is so."""
    keys = {name: linen_module.make_rng(name) for name in linen_module.scope.rngs}
    return {"default": 0, **keys} if add_default else keys


class _ModuleStack(MutableSequence[Any]):
    """The runs of bridge modules' methods in this thread as a list that can be written; None stands below them all."""

    def __len__(self) -> int:
        return 1 + len(scope._stack.get())

    def __getitem__(self, index: Any) -> Any:
        return [None, *scope._stack.get()][index]

    def __setitem__(self, index: Any, entry: Any) -> None:
        self._write(lambda entries: entries.__setitem__(index, entry))

    def __delitem__(self, index: Any) -> None:
        self._write(lambda entries: entries.__delitem__(index))

    def insert(self, index: int, value: Any) -> None:
        self._write(lambda entries: entries.insert(index, value))

    def __repr__(self) -> str:
        return repr(list(self))

    def _write(self, change: Callable[[list[Any]], None]) -> None:
        entries = list(self)
        change(entries)
        scope._stack.set(tuple(entries[1:]))


class ModuleContext:
    """Where flax.nnx.bridge keeps what runs: `MODULE_CONTEXT.module_stack[-1]` is `bridge.current_context()`.

    >>> import bridge
    >>> bridge.module.MODULE_CONTEXT.module_stack
    [None]
    """

    @property
    def module_stack(self) -> MutableSequence[Any]:
        """None, and a ModuleStackEntry for each method of a bridge module that runs, outermost first."""
        return _ModuleStack()

    def __repr__(self) -> str:
        return f"ModuleContext(module_stack={self.module_stack})"


module.MODULE_CONTEXT = ModuleContext()  # type: ignore[attr-defined]  # flax.nnx.bridge's place for it


def _alias(name: str, **names: Any) -> ModuleType:
    made = ModuleType(f"bridge.{name}", f"flax.nnx.bridge's path `{name}`; see bridge/_compat_paths.py.")
    vars(made).update(names)
    sys.modules[made.__name__] = made
    return made


wrappers = _alias(
    "wrappers",
    Functional=Functional,
    ToLinen=ToLinen,
    ToNNX=ToNNX,
    bdg_module=module,
    bv=variables,
    current_linen_module=current_linen_module,
    functional=functional,
    get_col_name=variables.get_col_name,
    is_vanilla_variable=variables.is_vanilla_variable,
    lazy_init=lazy_init,
    linen_rngs_dict=linen_rngs_dict,
    to_linen=to_linen,
    to_linen_class=to_linen_class,
)
initializers = nnx.initializers
# At once, not when first asked for: importing a submodule sets an attribute, and `bridge.to_linen` is a function.
sys.modules["bridge.module"] = module
sys.modules["bridge.to_linen"] = sys.modules[ToLinen.__module__]

#: Where the files of 0.1.0 are now: the old path, the new one.
MOVED = {
    f"bridge.{old}": f"bridge.{new}"
    for old, new in (
        line.split()
        for line in """
        layouts variables.layouts
        load variables.load
        mapping variables.mapping
        metadata variables.metadata
        sidecar variables.sidecar
        context nnx_in_linen.host
        to_nnx linen_in_nnx.wrapper
        module_scope modules.scope
        checkpoint.layout checkpoint.tree.layout
        checkpoint.opt_state checkpoint.tree.opt_state
        checkpoint.train_state checkpoint.tree.train_state
        checkpoint.files checkpoint.formats.open
        checkpoint.orbax checkpoint.formats.orbax.read
        checkpoint.rule checkpoint.rules.rule
        checkpoint.derived_rules checkpoint.derivation.to_rules
        checkpoint.forward checkpoint.derivation.forward
        checkpoint.commute checkpoint.plan.commute
        checkpoint.slots checkpoint.plan.slots
        checkpoint.memory checkpoint.in_memory
        """.strip().splitlines()
    )
}


class _MovedFiles(MetaPathFinder, Loader):
    """Finds the module at its new path, and lets the old one name the same object."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_MovedFiles())


def moved_in(package: str) -> Callable[[str], ModuleType]:
    """A `__getattr__` for a package: `bridge.metadata`, a file of 0.1.0, without an import of its own."""

    def find(name: str) -> ModuleType:
        if f"{package}.{name}" not in MOVED:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return find


#: Names without underscore that flax.nnx.bridge's files have and its list has not: public trainers ask for them.
_PRIVATE = {name: getattr(wrappers, name) for name in ("get_col_name", "is_vanilla_variable", "linen_rngs_dict")}
_moved = moved_in("bridge")
#: Found without an import of their own, and imported when they are used: they import much, one of them flax.nnx.
_ROOMS = ("checkpoint", "equivalence", "flax_nnx")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"bridge.{name}")
    return _PRIVATE[name] if name in _PRIVATE else _moved(name)
