"""Flags of a layer: whether it trains or evaluates, and whether it decodes.

Law: the flag of a call goes before the layer's own; None is no answer, in either. Knows no particular layer.
"""

from nnx_core.module import Module
from nnx_core.nn._errors import MissingFlagError


def choose_flag(layer: Module, flag: str, call: bool | None, own: bool | None) -> bool:
    """The flag of the call if there is one, else the layer's own; MissingFlagError if there is neither."""
    chosen = own if call is None else call
    if chosen is None:
        raise MissingFlagError(layer, flag)
    return chosen


def set_flags(layer: Module, **flags: bool | None) -> None:
    """Set these attributes of the layer; None leaves one as it is."""
    for name, flag in flags.items():
        if flag is not None:
            setattr(layer, name, flag)
