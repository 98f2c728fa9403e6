"""Variables by collection: 'params', 'batch_stats', or any other name.

Law: a collection is a Variable type of `kinds`, one for one; the type is the only place that says it, so a Param
of nnx_core is in 'params' however it was made. Knows Variables and filters; knows no modules.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnx_core import filters as filterlib
from nnx_core._errors import Path, RegistryError
from nnx_core.kinds import variable_name_from_type, variable_type_from_name
from nnx_core.legacy._errors import CollectionError
from nnx_core.variables import Variable as CoreVariable
from nnx_core.variables import late_answers

Sharding = Sequence[str | None]


class Variable(abc.ABC):  # noqa: B024  # for `register` below: instances are those of nnx_core's Variable
    """A Variable of a collection; the Variable type of that name is made where there is none.

    Every Variable of nnx_core is an instance, and answers `v.collection`. Read axis names back as `v.sharding_names`:
    `v.sharding` is where the array lies.

    Args:
      collection: its name.
      value: an array of any shape and dtype, or a pytree of arrays.
      sharding: names of the value's axes.

    Raises:
      CollectionError: if `collection` is no string.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> import jax.numpy as jnp
      >>> mean = nnx.Variable("batch_stats", jnp.zeros((2, 3)), sharding=("batch", None))
      >>> type(mean).__name__, mean.collection, mean.sharding_names, isinstance(mean, nnx.Variable)
      ('BatchStat', 'batch_stats', ('batch', None), True)
    """

    def __new__(cls, collection: str, value: Any, sharding: Sharding | None = None) -> Any:
        if not isinstance(collection, str):
            raise CollectionError(collection)
        kind = variable_type_from_name(collection, allow_register=True)
        return kind(value) if sharding is None else kind(value, sharding=tuple(sharding))


Variable.register(CoreVariable)


def var(collection: str, value: Any, sharding: Sharding | None = None) -> Any:
    """A Variable of a collection; see `Variable`.

    Raises:
      CollectionError: if `collection` is no string.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> nnx.var("batch_stats", 0.5) * 2
      1.0
    """
    return Variable(collection, value, sharding)


def param(value: Any, sharding: Sharding | None = None) -> Any:
    """A Variable of the collection 'params'.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> import jax.numpy as jnp
      >>> nnx.param(jnp.zeros(2)) + 1
      Array([1., 1.], dtype=float32)
    """
    return Variable("params", value, sharding)


def collection_of(variable: Any) -> str | None:
    """The collection of a Variable; None for anything else, such as an array that is a plain attribute.

    A type that was given no name is in the collection of its nearest base that has one; without such a base its
    class name is the collection.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> nnx.collection_of(nnx.param(1.0)), nnx.collection_of(nnx.var("losses", 0.0)), nnx.collection_of(2)
      ('params', 'losses', None)
    """
    if not isinstance(variable, CoreVariable):
        return None
    for kind in type(variable).__mro__:
        if kind is CoreVariable:
            break
        try:
            return variable_name_from_type(kind)
        except RegistryError:
            continue
    return type(variable).__name__


late_answers["collection"] = collection_of


@dataclass(frozen=True)
class InCollection:
    """A filter: the Variables of one collection, without those of subclasses that have a collection of their own."""

    name: str

    def __call__(self, path: Path, value: Any) -> bool:
        return collection_of(value) == self.name


def to_filter(filter: filterlib.Filter) -> filterlib.Filter:
    """The filter of nnx_core that a first-generation one stands for: strings name collections, not tags."""
    if isinstance(filter, str):
        return InCollection(filter)
    if isinstance(filter, list | tuple):
        return filterlib.Any(*map(to_filter, filter))
    return filter
