"""Rules that follow from the two models themselves.

Law: what is not proven is not handed out, unless the caller says so; then it says so itself.
Knows both models and what they compute; knows no checkpoint files.
"""

from bridge.checkpoint.derivation.derive import (
    DerivationError,
    UnknownPathError,
    UnprovenDerivationError,
    UnsureDerivationWarning,
    derive,
    prove,
)
from bridge.checkpoint.derivation.derived import Derived, Proof

__all__ = [
    "DerivationError", "Derived", "Proof", "UnknownPathError", "UnprovenDerivationError", "UnsureDerivationWarning",
    "derive", "prove",
]  # fmt: skip
