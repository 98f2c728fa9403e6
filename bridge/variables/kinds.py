"""Collection names of Linen and Variable types of NNX are two names for one thing.

Law: `collection_of(variable_type(name)) == name` for every string, and `variable_type(collection_of(t)) is t` for
every Variable type. Knows names and types; knows nothing of values, trees or modules.
"""

from typing import Any

import nnx_core as nnx

#: Types whose collection is named after the class, as flax.nnx names them; the rest `nnx_core` names itself.
_NAMED_AFTER_CLASS = (nnx.RngState, nnx.RngKey, nnx.RngCount, nnx.OptState, nnx.OptArray, nnx.OptVariable)
for _kind in _NAMED_AFTER_CLASS:
    nnx.register_variable_name(_kind.__name__, _kind)


#: Linen's own collection names; a checkpoint key with one of these names is a collection whatever is below it.
LINEN_COLLECTIONS = frozenset(
    {
        "params",
        "batch_stats",
        "cache",
        "intermediates",
        "perturbations",
        "losses",
        "spectral_norm",
        "qscale",
        "params_axes",
        "fp8_metas",
        "_overwrite_with_gradient",
    }
)


def variable_type(collection: str) -> type[nnx.Variable[Any]]:
    """The Variable type of a Linen collection; a new one, registered, for a collection nobody has named yet.

    >>> import nnx_core as nnx
    >>> variable_type("params") is nnx.Param, variable_type("batch_stats") is nnx.BatchStat
    (True, True)
    >>> variable_type("ema").__name__, variable_type("ema") is variable_type("ema")
    ('ema', True)
    """
    return nnx.variable_type_from_name(collection, allow_register=True)


def collection_of(typ: type[nnx.Variable[Any]]) -> str:
    """The Linen collection of a Variable type; a type without a name is registered under its class name.

    Raises:
      RegistryError: if another class has that name already.

    >>> import nnx_core as nnx
    >>> collection_of(nnx.Param), collection_of(nnx.BatchStat), collection_of(nnx.RngKey)
    ('params', 'batch_stats', 'RngKey')
    """
    return nnx.variable_name_from_type(typ, allow_register=True)
