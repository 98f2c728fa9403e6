"""Two models compared: whether they compute the same, how far they are apart, and where they part.

Law: what is called equal was run and compared; nothing of the caller's is changed.
Knows modules of both kinds, their variables and calls; knows no files and no checkpoints.
"""

from bridge.equivalence.compare import NotEquivalentError as NotEquivalentError
from bridge.equivalence.compare import assert_equivalent as assert_equivalent
from bridge.equivalence.compare import compare as compare
from bridge.equivalence.numbers import Difference as Difference
from bridge.equivalence.report import Finding as Finding
from bridge.equivalence.report import Parting as Parting
from bridge.equivalence.report import Report as Report
from bridge.equivalence.report import Row as Row
from bridge.equivalence.subjects import ComparisonError as ComparisonError

__all__ = [
    "ComparisonError", "Difference", "Finding", "NotEquivalentError", "Parting", "Report", "Row", "assert_equivalent",
    "compare",
]  # fmt: skip
