"""What can go wrong between models of nnx_core and of flax.nnx, one class for each mistake.

Law: as in `_errors`: a `BridgeError` and a builtin, saying where, what was expected, what was found, what to do.
Knows text and paths; knows nothing of modules or arrays.
"""

from collections.abc import Sequence

from bridge._errors import BridgeError, show_path
from nnx_core._errors import Path


class NotAVariableTypeError(BridgeError, TypeError):
    """A type that is no Variable type was to be translated."""

    def __init__(self, found: object):
        super().__init__(
            "a Variable type has a counterpart in the other library, and this is none.\n"
            f"  expected: a subclass of nnx_core.Variable or of flax.nnx.Variable\n  found: {found!r}\n"
            "Pass the class of a Variable, as flax.nnx.Param."
        )


class NotAModuleError(BridgeError, TypeError):
    """FromFlax or AsFlax was given something else than a module of the library that it wraps."""

    def __init__(self, wrapper: str, library: str, found: object):
        other = {"FromFlax": "AsFlax", "AsFlax": "FromFlax"}.get(wrapper, "FromFlax(module), AsFlax")
        kind = type(found)
        hint = f"A module of the other library: {other}(module)."
        if isinstance(found, type):
            hint = f"Make one first: {wrapper}({found.__name__}(...))."
        elif kind.__module__.startswith("flax.linen") or any(b.__module__ == "flax.linen.module" for b in kind.__mro__):
            hint = "A module of flax.linen: bridge.ToNNX(module, rngs=...)."
        super().__init__(
            f"{wrapper} wraps modules of {library}.\n"
            f"  expected: an instance of {library}.Module\n  found: {kind.__module__}.{kind.__qualname__}\n{hint}"
        )


class PartCallError(BridgeError, TypeError):
    """A part of a wrapped module was called, of which the wrapper has the Variables only."""

    def __init__(self, wrapper: str):
        super().__init__(
            f"a part of a {wrapper} cannot be called: it holds the Variables of a module, and no code.\n"
            f"  expected: a call of the {wrapper}, or of one of its methods\n  found: a call of a part\n"
            "Write bridge.flax_nnx.run(model, lambda module, x: module.part(x), x)."
        )


class StateMismatchError(BridgeError, ValueError):
    """Two models, States or optimizers do not have the same leaves.

    Args:
      missing: what the target has and the source lacks.
      unexpected: what the source has and the target lacks.
      different: (path, expected, found) of what has another shape or dtype.
    """

    def __init__(
        self, missing: Sequence[Path], unexpected: Sequence[Path], different: Sequence[tuple[Path, object, object]]
    ):
        self.missing, self.unexpected, self.different = list(missing), list(unexpected), list(different)
        lines = [f"source and target do not match: {len(missing)} missing, {len(unexpected)} unexpected,"]
        lines[0] += f" {len(different)} of another shape or dtype. Nothing was written."
        for title, paths in (("missing (expected, not in the source)", missing), ("unexpected (found)", unexpected)):
            lines += [f"{title}:", *(f"  {show_path(path)}" for path in paths)] if paths else []
        rows = [f"  {show_path(path)}: expected {expected}, found {found}" for path, expected, found in different]
        lines += ["of another shape or dtype:", *rows] if rows else []
        lines.append(
            "Load between models of one architecture; rename=... maps paths of the source, strict=False a part."
        )
        super().__init__("\n".join(lines))


class NotLoadableError(BridgeError, TypeError):
    """`load` was given something that has no state."""

    def __init__(self, role: str, found: object):
        super().__init__(
            f"load takes a module, a State or an optimizer as {role}.\n"
            "  expected: one of nnx_core or of flax.nnx\n"
            f"  found: {type(found).__module__}.{type(found).__qualname__}\n"
            "Of a Linen module's variables: bridge.load_variables."
        )
