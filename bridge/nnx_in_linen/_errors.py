"""What can go wrong when an NNX class becomes a Linen module, one class for each mistake.

Law: as in `_errors`: every class is a `BridgeError` and a builtin, every message names where it happened, what
was expected, what was found and what to do. Knows text and paths; knows no modules.
"""

from collections.abc import Iterable

from bridge._errors import BridgeError, near_misses, show_path
from bridge._types import Location


class NotAFactoryError(BridgeError, TypeError):
    """ToLinen was given something that makes no module: most often an instance instead of its class."""

    def __init__(self, found: object, *, instance: bool):
        name = type(found).__name__
        text = (
            "ToLinen builds the NNX module itself, with keys from Linen.\n"
            "  expected: a class, or a function that returns a module\n"
        )
        if instance:
            text += (
                f"  found: an instance of {name}\n"
                f"Write ToLinen({name}, args=(...), kwargs=...), or to_linen({name}, ...). To carry the weights of"
                " the instance over, pass them to apply as variables."
            )
        else:
            text += f"  found: {found!r}, a {name}, which cannot be called\nPass the class of the module."
        super().__init__(text)


class NotAnNnxModuleError(BridgeError, TypeError):
    """What the class or function given to ToLinen returned is no module of nnx_core."""

    def __init__(self, factory: object, found: object):
        kind = type(found)
        hint = "Return an nnx_core.Module."
        if kind.__module__.startswith("flax.nnx"):
            hint = "Of flax.nnx, return an nnx.Module."
        if any(base.__module__.startswith("flax.linen") for base in kind.__mro__):
            hint = "It is a Linen module already: use it as it is."
        super().__init__(
            f"{getattr(factory, '__name__', factory)!s} in ToLinen made no NNX module.\n"
            f"  expected: an nnx_core.Module\n  found: {kind.__module__}.{kind.__qualname__}\n{hint}"
        )


class UnexpectedVariablesError(BridgeError, ValueError):
    """The variables given to Linen hold some that the NNX module has no place for.

    Args:
        module: what they were given to, in words.
        unexpected: where they are, each a collection and the keys in it.
        known: where the module has variables, for a hint.
    """

    def __init__(self, module: str, unexpected: Iterable[Location], known: Iterable[Location]):
        self.unexpected = sorted(unexpected)
        have = [show_path(location) for location in known]
        lines = []
        for location in self.unexpected:
            close = near_misses(show_path(location), have, 1)
            lines.append(f"  {show_path(location)}" + (f"   (did you mean {close[0]}?)" if close else ""))
        super().__init__(
            f"{module} got variables that it has no place for:\n" + "\n".join(lines) + "\n"
            "  expected: the variables that init returns\n"
            "Remove them, rename them, or check that they belong to this model and these arguments."
        )


class KeyClashError(BridgeError, ValueError):
    """Two keys of an NNX module are one key in Linen, where all keys are strings."""

    def __init__(self, location: Location, first: tuple[object, ...], second: tuple[object, ...]):
        super().__init__(
            f"two variables of the NNX module are one in Linen, whose keys are strings:\n  {first} and {second}\n"
            "  expected: a path of its own for each\n"
            f"  found: {show_path(location)} for both\nRename one of the keys."
        )


class ConstructorChangedError(BridgeError, RuntimeError):
    """A constructor made another structure when it ran for real than when it was traced."""

    def __init__(self, module: str, path: tuple[object, ...]):
        super().__init__(
            f"the constructor of {module} does not always make the same variables.\n"
            f"  expected: one at {path}, as when its shapes were found\n  found: none there\n"
            "Let the structure depend on the arguments only; pass abstract_init=False if the constructor has to"
            " see real numbers."
        )


class KeptGraphDefError(BridgeError, TypeError):
    """What the variables hold as the structure of an NNX module is none."""

    def __init__(self, module: str, found: object):
        super().__init__(
            f"ToLinen({module}) has keep_graphdef=True and cannot use variables['nnx']['graphdef'].\n"
            f"  expected: an nnx_core.GraphDef, as init returns it\n  found: {type(found).__name__}\n"
            "Take the collection 'nnx' from init; a checkpoint that holds arrays only does not keep it. Without it,"
            " the structure is the one that the constructor makes."
        )
