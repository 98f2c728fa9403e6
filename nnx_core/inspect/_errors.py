"""Errors of the inspection room. Knows names and numbers, nothing of graphs."""

from collections.abc import Iterable

from nnx_core._errors import NnxError


class MethodError(NnxError, AttributeError):
    """`tabulate` was asked to call a method that the object does not have."""

    def __init__(self, kind: str, method: str, found: Iterable[str]):
        super().__init__(
            f"{kind} has no method {method!r} to call; it has {sorted(found)}.\n"
            "Pass method='...' and the arguments of that method. Without a method and without arguments, a list,"
            " tuple or dict of modules is listed as it is."
        )


class ToleranceError(NnxError, ValueError):
    """A tolerance that nothing, or everything, would pass."""

    def __init__(self, name: str, value: object):
        super().__init__(
            f"diff: expected {name} to be a number >= 0, found {value!r}. Leave it out to compare exactly."
        )
