"""What can go wrong with modules of `bridge.Module` and with `bridge.functional`, one class for each mistake.

Law: as in `_errors`: every class is a `BridgeError` and a builtin, every message names where it happened, what
was expected, what was found and what to do. Knows text; knows no modules.
"""

from flax.errors import NameInUseError

from bridge._errors import BridgeError


class OutsideBridgeModuleError(BridgeError, AssertionError):
    """A submodule of a bridge module was asked for where none is running."""

    def __init__(self, function: str):
        super().__init__(
            f"{function}() makes a submodule of the bridge module that is running.\n"
            "  expected: a call in `setup()` or in a method with `@compact`\n  found: a call outside\n"
            "Outside, use the NNX module itself, or ToNNX(linen_module, rngs=...)."
        )


class NameTwiceError(BridgeError, NameInUseError, ValueError):
    """Two things in one bridge module want the same name."""

    def __init__(self, module: str, path: str, name: str, what: str, first: str):
        Exception.__init__(
            self,
            f"{what} {name!r} of {module} at {path}:\n  expected: a name of its own\n  found: {first}\n"
            "Give one of them another name; to share a submodule, make it once and call it twice.",
        )


class NotReadyError(BridgeError, AssertionError):
    """`Functional.apply` before `Functional.init`."""

    def __init__(self, module: str):
        super().__init__(
            f"functional({module}).apply before init.\n  expected: the structure of the module, which init finds\n"
            "  found: none\nCall state = f.init(rngs=nnx.Rngs(0)) first."
        )
