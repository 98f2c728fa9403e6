"""`linen-nnx demo`: the main job, end to end, on real input.

Law: a trained Linen model and its training checkpoint cross to NNX without changing a number, or the exit
code says so and the output names the number.

`task` is the data and the loss, `linen_model` what a team has, `native_model` what it wants, `cross` the way
between them, `verdict` the demands, `report` what is shown, `outdir` what is written, `run` the order.
"""
