"""A checkpoint in memory: what the streaming asks of a file format, and a record of it."""

from pathlib import Path

import numpy as np

from bridge.checkpoint.formats.protocol import Around
from bridge.checkpoint.tree.layout import Leaf, describe
from bridge.checkpoint.tree.tree import Tree


class MemorySource:
    """A source over a dict of leaves; `reads` records `(path, bytes)` of each read."""

    format, reason, step, item, around = "memory", "it is in memory", None, None, Around()

    def __init__(self, leaves, metadata=None):
        self.leaves, self.metadata, self.reads = dict(leaves), metadata or {}, []
        self.path = Path("/memory")
        self.tree = Tree({path: leaf_of(path, value) for path, value in self.leaves.items()})

    def read(self, path, region=None):
        value = self.leaves[path]
        value = value if region is None else value[region]
        self.reads.append((path, value.nbytes if isinstance(value, np.ndarray) else 0))
        return value

    def piece(self, path):
        return 0

    def close(self):
        self.closed = True


def leaf_of(path, value):
    shape, dtype = describe(value)
    return Leaf(path, shape, dtype, getattr(value, "nbytes", 8))
