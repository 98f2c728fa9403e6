"""Hashable stand-ins for what has no hash: the fields of Linen modules, whatever they hold; names and rules of axes.

Law: two stand-ins are equal iff what they stand for is, and a stand-in never changes.
Metadata that has to come back as it was is frozen by `nnx_core._statics.freeze_metadata`, which has an inverse.
Knows values and the fields of modules; knows nothing of variables.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn


def frozen(x: Any) -> Any:
    """A hashable stand-in for a field of a Linen module; two are equal iff the fields are.

    >>> frozen([1, {"a": 2}]) == frozen([1, {"a": 2}]), frozen([1]) == frozen((1,)), frozen(1) == frozen(True)
    (True, False, False)
    """
    kind = type(x)
    if isinstance(x, nn.Module):
        return kind, tuple((field.name, frozen(getattr(x, field.name))) for field in fields_of(x))
    if isinstance(x, list | tuple):
        return kind, tuple(map(frozen, x))
    if isinstance(x, set | frozenset):
        return kind, frozenset(map(frozen, x))
    if isinstance(x, Mapping):
        return kind, tuple((frozen(key), frozen(value)) for key, value in x.items())
    if isinstance(x, functools.partial):
        return kind, frozen((x.func, x.args, x.keywords))
    if isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer):
        return kind, x.shape, str(x.dtype), np.asarray(x).tobytes()
    try:
        hash(x)
    except TypeError:
        return kind, id(x)  # whoever holds the module holds `x`, so no other object gets this id
    return kind, x


def with_tuples(x: Any) -> Any:
    """`x`, which can still be read, with tuples for its lists at every depth: names of axes, and rules for them.

    >>> with_tuples([["batch", ["x", "y"]]])
    (('batch', ('x', 'y')),)
    """
    return tuple(map(with_tuples, x)) if type(x) in (list, tuple) else x


def fields_of(module: nn.Module) -> list[dataclasses.Field[Any]]:
    """The fields that a Linen module is made with, but for where it is bound."""
    return [field for field in dataclasses.fields(module) if field.init and field.name != "parent"]
