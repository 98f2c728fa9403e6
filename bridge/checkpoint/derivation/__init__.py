"""Rules that follow from the two models themselves.

Law: what is not certain is said.
Knows both models and what they compute; knows no checkpoint files.
"""

from bridge.checkpoint.derivation.derive import (
    DerivationError,
    Derived,
    UnknownPathError,
    UnsureDerivationWarning,
    derive,
)

__all__ = ["DerivationError", "Derived", "UnknownPathError", "UnsureDerivationWarning", "derive"]
