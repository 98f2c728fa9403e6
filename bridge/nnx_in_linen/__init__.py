"""An NNX class as a Linen module: ToLinen, and what Linen sees of the NNX code that runs in it.

Law: Linen's rules outside, NNX's numbers inside.
Knows nothing of the way back, `linen_in_nnx`, nor of `modules`.
"""
