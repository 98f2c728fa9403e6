"""What a model does, layer by layer: which layers it has, in which order they run, what each needs of the others.

Law: models run abstractly; nothing is computed and nothing of the caller's is changed.
Knows modules of both kinds and their variables; knows no files and no checkpoints.
"""
