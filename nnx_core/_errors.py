"""Every error this package raises on purpose.

Law: one class per mistake; each is an `NnxError` and also the builtin a caller would expect; each
message says where (the path, both paths if two are involved), what was expected, what was found and
what to do. Knows nothing of the rooms above: it formats what it is given.
"""

from collections.abc import Hashable, Iterable

Path = tuple[Hashable, ...]


def show_path(path: Path) -> str:
    """A path as one would type it: `args[0].layers[1].kernel`.

    >>> show_path(("args", 0, "layers", 1, "kernel"))
    'args[0].layers[1].kernel'
    >>> show_path(())
    '<root>'
    """
    parts: list[str] = []
    for key in path:
        if isinstance(key, str) and key.isidentifier():
            parts.append(f".{key}" if parts else key)
        else:
            parts.append(f"[{key!r}]")
    return "".join(parts) or "<root>"


def show_paths(paths: Iterable[Path]) -> str:
    """One indented line a path, for messages that list several."""
    return "".join(f"\n  {show_path(path)}" for path in paths)


class NnxError(Exception):
    """Base of every error this package raises on purpose."""


class AliasError(NnxError, ValueError):
    """One Variable or object was given two treatments in a single call."""

    def __init__(self, kind: str, first: tuple[Path, object], second: tuple[Path, object]):
        where = "".join(f"\n  {show_path(path)}: {treatment}" for path, treatment in (first, second))
        super().__init__(
            f"{kind} is reached twice with different treatment:{where}\n"
            "Give both paths the same treatment, or pass nnx.clone(...) of one of them."
        )


class SharedReferenceError(NnxError, ValueError):
    """A shared object was found where the caller forbade sharing (`graph=False`)."""

    def __init__(self, kind: str, first: Path, second: Path):
        super().__init__(
            f"Found a shared {kind} where graph=False forbids sharing:"
            f"\n  {show_path(first)}\n  {show_path(second)}\n"
            "Pass graph=True (the default), or nnx.clone(...) one of them."
        )


class StructureUpdateError(NnxError, ValueError):
    """The structure of an argument changed where the caller forbade it (`graph_updates=False`)."""

    def __init__(self, function: str, paths: Iterable[Path]):
        super().__init__(
            f"{function} changed the structure of its arguments where graph_updates=False forbids it:"
            f"{show_paths(paths)}\nPass graph_updates=True (the default), or set the attributes before the call."
        )


class TraceError(NnxError, ValueError):
    """An object or Variable was written inside a transform that does not own it."""

    def __init__(self, what: str, path: str | None = None, created: str = ""):
        where = what if path is None else f"{what} at {path}"
        super().__init__(
            f"Cannot write {where} here: it was created outside this JAX transform{created}, so the write would be"
            " lost or leak a tracer.\nPass the module that owns it as an argument of the transformed function"
            " (nnx.jit, nnx.grad, ... write it back), or create it inside."
        )


class StructureError(NnxError, ValueError):
    """Structure that must stay the same (a loop carry, the branches of a cond) changed."""


class SpecError(NnxError, ValueError):
    """A prefix (in_axes, in_shardings, argnums, ...) does not fit the arguments."""


class FilterError(NnxError, ValueError):
    """Filters that do not cover a value, or something that is no filter."""


class DepthError(NnxError, RecursionError):
    """Something without end was found where a graph was expected: a container that holds itself."""

    def __init__(self, path: Path, kind: str):
        self.path = path
        super().__init__(
            f"{show_path(path)}, a {kind}, is nested without end, or more than 10,000 levels deep.\n"
            "Expected objects and containers with an end; found, most likely, a list or dict that holds itself."
            " Objects may refer to each other in cycles, plain containers may not: use nnx.List or nnx.Dict."
        )


class StateMismatchError(NnxError, ValueError):
    """A state does not fit the graph it was given to; lists every path at once."""

    def __init__(
        self,
        missing: Iterable[Path] = (),
        unexpected: Iterable[Path] = (),
        mismatched: Iterable[tuple[Path, object, object]] = (),
    ):
        text = "The state does not fit."
        if missing := list(missing):
            text += f"\nMissing from the state:{show_paths(missing)}"
        if unexpected := list(unexpected):
            text += f"\nIn the state, but not in the graph:{show_paths(unexpected)}"
        if mismatched := list(mismatched):
            rows = "".join(f"\n  {show_path(p)}: expected {want}, found {got}" for p, want, got in mismatched)
            text += f"\nDifferent:{rows}"
        super().__init__(f"{text}\nBuild the state from the same module, or convert its paths first.")
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched


class AttributeNotFoundError(NnxError, ValueError):
    """`set_attributes` named attributes that no module has."""

    def __init__(self, names: Iterable[str]):
        names = sorted(names)
        super().__init__(
            f"Could not find at least one instance of the following attributes: {names}.\n"
            "Check the spelling, or pass raise_if_not_found=False."
        )


class MissingRngError(NnxError, AttributeError, KeyError):
    """An Rngs has neither the stream asked for nor a default stream."""

    def __init__(self, name: object, streams: Iterable[str]):
        self.text = (
            f"No RngStream named {name!r} and no default stream; found {sorted(streams)}.\n"
            f"Create it with nnx.Rngs(..., {name}=seed), or nnx.Rngs(seed) for a default."
        )
        super().__init__(self.text)

    def __str__(self) -> str:  # KeyError would show repr(text)
        return self.text


class MetadataError(NnxError, ValueError):
    """Axis metadata that does not fit: no such name, or no such axis."""


class NotDifferentiableError(NnxError, TypeError):
    """A gradient is asked for with respect to integers or random keys; `leaves` are (path, dtype)."""

    def __init__(self, leaves: Iterable[tuple[Path, str]]):
        rows = "".join(f"\n  {show_path(path)}: {dtype}" for path, dtype in leaves)
        super().__init__(
            f"grad requires real- or complex-valued inputs, found{rows}\n"
            "Name what to differentiate (argnums=nnx.DiffState(0, nnx.Param)), split the rest off, or pass"
            " allow_int=True for gradients of type float0."
        )


class NotAGraphError(NnxError, TypeError):
    """Something that is no module, container or Variable was given where a graph is needed."""


class OptimizerError(NnxError, TypeError):
    """Gradients or arguments that an Optimizer cannot use."""


class InPlaceError(NnxError, NotImplementedError):
    """`variable += x` would put an array where the Variable is."""

    def __init__(self, kind: str, operator: str):
        super().__init__(
            f"`variable {operator}= x` would replace the {kind} by an array. Write `variable[...] {operator}= x`."
        )


class WriteError(NnxError, ValueError, TypeError):
    """What is written into the value of a Variable does not fit it."""

    def __init__(self, where: str, expected: object, found: object):
        super().__init__(
            f"Cannot write into {where}: expected {expected}, found {found}.\n"
            "`v[...] = x` and `v[i] = x` keep the shape, dtype and devices of what is there. `v.value = x` replaces it,"
            " unless it is a jax.Ref."
        )


class RegistryError(NnxError, ValueError):
    """Two different Variable types under one name."""
