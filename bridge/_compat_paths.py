"""Module paths that users reach for, as aliases: flax.nnx.bridge's `bridge.wrappers`, and where files of 0.1.0 stood.

Law: nothing is implemented here but one name of flax.nnx's; every name is the object that its own room defines.
Importing this file makes `from bridge.wrappers import ToNNX` and `from bridge.layouts import layout_for` work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import nnx_core as nnx
from bridge.functional import Functional, functional
from bridge.linen_in_nnx.wrapper import ToNNX, lazy_init
from bridge.modules import module
from bridge.nnx_in_linen.host import current_linen_module
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class


def linen_rngs_dict(linen_module: Any, add_default: bool = False) -> dict[str, Any]:
    """A key from each random stream of a bound Linen module, by name; `default` only if asked for."""
    names = [name for name in linen_module.scope.rngs if add_default or name != "default"]
    return {name: linen_module.make_rng(name) for name in names}


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
    current_linen_module=current_linen_module,
    functional=functional,
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


__getattr__ = moved_in("bridge")
