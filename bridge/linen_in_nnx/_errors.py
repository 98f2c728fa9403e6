"""What can go wrong where a Linen module is an NNX module: one class for each mistake.

Law: as in `_errors`: a `BridgeError` and a builtin, saying where, what was expected, what was found, what to do.
Knows text and paths; knows nothing of modules or arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax.errors import LazyInitError

from bridge._errors import BridgeError, show_path
from nnx_core._foreign import is_foreign


class NotALinenModuleError(BridgeError, TypeError):
    """ToNNX was given something else than an instance of a Linen module."""

    def __init__(self, found: object):
        hint = "Pass a module of flax.linen."
        if isinstance(found, type):
            hint = f"Make one first: ToNNX({found.__name__}(...), rngs=...)."
        elif is_foreign(type(found)):
            hint = "It is a module of flax.nnx: bridge.flax_nnx.FromFlax(module) makes it one of nnx_core."
        elif type(found).__module__.startswith("nnx_core") or hasattr(found, "_nnx_items"):
            hint = "It is an NNX module already: use it as it is."
        super().__init__(
            f"ToNNX wraps Linen modules.\n  expected: an instance of flax.linen.Module\n  found: {found!r}\n{hint}"
        )


class NotInitializedError(BridgeError, RuntimeError):
    """A wrapped Linen module was called before its variables were made or loaded."""

    def __init__(self, module: str, reason: object):
        super().__init__(
            f"ToNNX({module}) was called before it has variables.\n"
            f"  expected: variables, made by lazy_init\n  found: none ({reason})\n"
            "Call model.lazy_init(x) first, or bridge.lazy_init(outer_model, x) where it is part of another module."
        )


class AlreadyInitializedError(BridgeError, ValueError):
    """`lazy_init` would have overwritten variables that are there."""

    def __init__(self, module: str, count: int):
        super().__init__(
            f"lazy_init of ToNNX({module}) would make nothing new, and never overwrites.\n"
            f"  expected: a module without variables, or a method that needs more of them\n"
            f"  found: {count} variables\n"
            "For fresh weights make a new ToNNX; to load weights use bridge.load_variables(model, variables)."
        )


class NoRngsError(BridgeError, ValueError):
    """`lazy_init` needs random keys, and there are none."""

    def __init__(self, module: str):
        super().__init__(
            f"lazy_init of ToNNX({module}) needs random keys.\n"
            "  expected: rngs=..., here or when the ToNNX was made\n  found: none\n"
            "Write ToNNX(module, rngs=nnx.Rngs(0)), or model.lazy_init(x, rngs=nnx.Rngs(0))."
        )


class UnknownValueError(BridgeError, LazyInitError, ValueError):
    """`lazy_init` was given shapes where it needs values."""

    def __init__(self, module: str, what: str, reason: object):
        Exception.__init__(
            self,
            f"lazy_init of ToNNX({module}) needs the values of its {what}.\n"
            f"  expected: arrays\n  found: shapes only ({reason})\n"
            "Pass arrays instead of ShapeDtypeStructs, or initialise this module by itself before the model around"
            " it: model.part.lazy_init(x, rngs=...).",
        )


class NoOwnerError(BridgeError, TypeError):
    """`lazy_init` was given a function that belongs to no module."""

    def __init__(self, found: object):
        super().__init__(
            "lazy_init finds the modules to initialise in what it is given.\n"
            f"  expected: an NNX module, or a method of one\n  found: {found!r}\n"
            "Pass the module itself, or one of its methods: bridge.lazy_init(model.encode, x). A module of flax.nnx:"
            " bridge.flax_nnx.FromFlax(module)."
        )


class SubmoduleAccessError(BridgeError, AttributeError):
    """A submodule of a wrapped Linen module was called that cannot be reached from outside."""

    def __init__(self, module: str, path: Sequence[str]):
        super().__init__(
            f"{show_path(path)} of {module} cannot be called.\n"
            "  expected: a submodule made in setup, or a field\n"
            "  found: none; submodules of a compact method exist only while that method runs\n"
            "Move it to setup, or give the module a method that calls it."
        )


class StateAttributeError(BridgeError, TypeError):
    """An attribute that is a Linen variable was set to something that is no Variable."""

    def __init__(self, name: str, found: object):
        super().__init__(
            f"{name!r} is part of the wrapped module's variables.\n"
            f"  expected: a Variable in its place\n  found: a {type(found).__name__}\n"
            f"To write its value: model.{name}[...] = value."
        )


class LinenAttributeError(BridgeError, AttributeError):
    """An attribute was set that the Linen module computes."""

    def __init__(self, module: str, name: str):
        super().__init__(
            f"{name!r} of ToNNX({module}) cannot be set.\n"
            f"  expected: a field of {module}, or a name it does not use\n"
            f"  found: what {module} computes itself (in setup, as a property or in the class)\n"
            "Set the fields it is computed from, or wrap another Linen module."
        )


class NoModeWarning(UserWarning):
    """`train()` or `eval()` of a wrapped module that has no flag they could set."""
