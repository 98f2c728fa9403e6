"""Looking at models: tables of their calls, trees to unfold, differences between two of them.

`nnx.tabulate` and `nnx.display` are flax.nnx's; `diff` and `census` are ours. rich and treescope are imported when
something is drawn with them.
"""

from nnx_core._repr import SizeBytes
from nnx_core.inspect._errors import MethodError, ToleranceError
from nnx_core.inspect.census import ObjectInfo, census
from nnx_core.inspect.describe import ArrayRepr
from nnx_core.inspect.differences import Diff, Difference, diff
from nnx_core.inspect.recording import CallInfo
from nnx_core.inspect.summary import filter_rng_streams, tabulate
from nnx_core.inspect.visualization import display

__all__ = [
    # tables
    "tabulate",
    "CallInfo",
    "filter_rng_streams",
    "census",
    "ObjectInfo",
    "SizeBytes",
    "ArrayRepr",
    # trees
    "display",
    # differences
    "diff",
    "Diff",
    "Difference",
    # errors
    "MethodError",
    "ToleranceError",
]
