"""Configuration as part of a structure: whatever it is, it can be hashed and compared.

Law: two values are the same configuration if they have one type and `==` says so (numpy arrays by their bits); where
`==` raises, or answers with an array, only if they are one object, or dataclasses whose fields are the same. A hash
is used where there is one; else the type stands in. What has no hash can mostly be changed in place, so it is compared
as it was when it was read: a change is seen (but JAX takes a numpy array that a function uses as a constant for what
it was when it first saw it).
Knows nothing of graphs.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type, type(lambda: None)})


class Fixed:
    """A value that is configuration.

    Args:
      value: itself, which a function gets to see.
      content: what is hashed and compared: itself, or a copy of how it was.
    """

    __slots__ = ("content", "value")

    def __init__(self, value: Any, content: Any):
        self.value, self.content = value, content

    @property
    def is_current(self) -> bool:
        """Whether the value still is as it was read."""
        return _same(self.value, self.content)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Fixed and _same(self.content, other.content))

    def __hash__(self) -> int:
        try:
            return hash(self.content)
        except TypeError:
            return hash(type(self.content))

    def __repr__(self) -> str:
        return repr(self.value)


def fixed(value: Any) -> Any:
    """`value` as a part of something that is hashed and compared; `unfixed` gives it back."""
    if type(value) in _PLAIN:
        return value
    try:
        hash(value)
    except TypeError:
        return Fixed(value, _snapshot(value))
    return Fixed(value, value)


def unfixed(part: Any) -> Any:
    """The value that `fixed` was given."""
    return part.value if type(part) is Fixed else part


def _snapshot(value: Any) -> Any:
    """A copy of `value` that equals it; itself where there is none."""
    try:
        copied = copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # whatever the user's class raises when it is copied, such as TypeError of a lock
        return value
    return copied if _same(copied, value) else value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) in (tuple, list):  # item by item: == says that (1,) and (1.0,) are equal
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is dict:
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    try:
        answer = a == b
    except Exception:  # noqa: BLE001  # whatever the class raises; arrays in a tuple raise ValueError
        return dataclasses.is_dataclass(a) and _same(vars(a), vars(b))  # which compare their fields as a tuple
    return isinstance(answer, bool | np.bool_) and bool(answer)


# ---- metadata of a Variable, as a part of a structure ----


def freeze_metadata(metadata: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Metadata as a hashable, order-free tuple; lists in it come back as lists."""
    if not metadata:
        return ()
    return tuple((k, _frozen(v)) for k, v in sorted(metadata.items()))


def thaw_metadata(frozen: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The inverse of `freeze_metadata`."""
    return {k: _thawed(v) for k, v in frozen}


def _frozen(value: Any) -> Any:
    if type(value) is list:
        return _FrozenList(map(_frozen, value))
    part = fixed(value)
    # What compares well is left as it is: there are readers of frozen metadata beside `thaw_metadata`.
    return value if type(part) is Fixed and part.content is value else part


def _thawed(part: Any) -> Any:
    return list(map(_thawed, part)) if type(part) is _FrozenList else unfixed(part)


class _FrozenList(tuple[Any, ...]):
    """A list among metadata, while it is part of a structure."""
