"""Models of flax.nnx and of nnx_core in each other. The only room that imports flax.nnx, and only when it is used.

Law: what is wrapped computes, learns, draws and saves as it does alone; each library's tools see its own Variables.
Knows nothing of Linen, its wrappers or checkpoints.
"""

from bridge.flax_nnx.as_flax import AsFlax
from bridge.flax_nnx.from_flax import FromFlax
from bridge.flax_nnx.kinds import variable_type
from bridge.flax_nnx.load import TransferReport, load
from bridge.flax_nnx.run import run
from bridge.flax_nnx.states import from_state, to_state

__all__ = ["AsFlax", "FromFlax", "TransferReport", "from_state", "load", "run", "to_state", "variable_type"]
