"""Two models compared: whether they compute the same, how far they are apart, and where they part.

Law: what is called equal was run and compared; nothing of the caller's is changed.
Knows modules of both kinds, their variables and calls; knows no files and no checkpoints.
"""
