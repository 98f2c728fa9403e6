"""Trees and files for the tests of checkpoint formats.

Law: `describe` gives the Tree that a converter would hand to a sink for a live tree of dicts, lists and leaves.
Knows plain containers, sources and sinks; knows nothing of models.
"""

import functools
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from bridge._errors import BridgeError
from bridge.checkpoint.formats.open import open_sink, open_source
from bridge.checkpoint.formats.protocol import Source
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.tree import Tree
from tests.support.forked import run_forked

DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "uint32",
    "int64",
    "bool",
)
KEYS = ("kernel", "a.b", "a/b", "0", "1", "10", "", ".", "/", "value", "é", "__metadata__", "bridge.paths", "~", "a~")


def describe(tree) -> tuple[Tree, dict]:
    """The Tree of a live tree and its leaves by path."""
    flat = layout.flatten(tree)
    marks = {dict: "Dict", list: "List", tuple: "Tuple", type(None): "None"}
    empty = {path: marks[type(leaf)] for path, leaf in flat.items() if layout.is_empty(leaf)}
    values = {path: leaf for path, leaf in flat.items() if path not in empty}
    leaves = {}
    for path, value in values.items():
        shape, dtype = layout.describe(value)
        size = len(value.encode()) if isinstance(value, str) else getattr(value, "nbytes", 8)
        leaves[path] = Leaf(path, shape, dtype, size)
    return Tree(leaves, empty, frozenset(_sequences(tree))), values


def _sequences(node, path=()) -> Iterator[tuple[str, ...]]:
    if isinstance(node, list | tuple) and node:
        yield path
    for key, child in layout.children(node) or ():
        yield from _sequences(child, (*path, key))


def save(path, format: str, tree, metadata=None, batch: int = 2) -> None:
    """Write a live tree, `batch` leaves at a time."""
    shape, values = describe(tree)
    order = list(shape.order)
    with open_sink(path, format, shape) as sink:
        for start in range(0, len(order), batch):
            sink.write({place: values[place] for place in order[start : start + batch]})
        sink.finish(metadata or {})


def load(path, **options):
    """The live tree of a file."""
    with closing(open_source(path, **options)) as source:
        return live(source)


def live(source: Source):
    """The live tree of a source."""
    made = {"None": None, "Dict": {}, "List": [], "Tuple": []}
    leaves = {path: source.read(path) for path in source.tree.leaves}
    return layout.nest({**leaves, **{p: made[m] for p, m in source.tree.empty.items()}}, source.tree.sequences)


def as_dicts(tree):
    """Lists and tuples as dicts of '0', '1', ...: what flax writes of them."""
    if isinstance(tree, list | tuple):
        tree = {str(index): child for index, child in enumerate(tree)}
    return {key: as_dicts(child) for key, child in tree.items()} if isinstance(tree, dict) else tree


def survives(content: bytes, path: Path, **options) -> bool:
    """Whether a file of these bytes is read. Any error but bridge's own passes through."""
    path.write_bytes(content)
    try:
        load(path, **options)
    except BridgeError:
        return False
    return True


def run_limited(script: str, *arguments: object) -> str:
    """What a Python program prints that may not write files of more than 64 KiB, as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
    done = run_forked(limit + textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- trees that hypothesis draws ----------------------------------------------------------------------------

_shapes = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0, 3), (1, 2, 1)])


# Once each: to make a strategy takes longer than to draw from it.
_one_of = functools.cache(st.sampled_from)
_booleans = functools.cache(lambda count: st.lists(st.booleans(), min_size=count, max_size=count))
_binary = functools.cache(lambda size: st.binary(min_size=size, max_size=size))


@st.composite
def arrays(draw, dtypes=DTYPES):
    """Arrays of any bits: NaNs with payloads too."""
    shape, dtype = draw(_shapes), jnp.dtype(draw(_one_of(dtypes)))
    count = int(np.prod(shape))
    if dtype.kind == "b":
        return np.array(draw(_booleans(count)), bool).reshape(shape)
    content = draw(_binary(count * dtype.itemsize))
    return np.frombuffer(content, dtype).reshape(shape).copy()


def trees(dtypes=DTYPES):
    """Trees of dicts and lists with hostile keys, empty entries, numbers and strings."""
    numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(width=64))
    leaf = st.one_of(arrays(dtypes), numbers, st.text(max_size=5), st.none(), st.just({}))
    keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=3))

    def inner(child):
        return st.one_of(st.dictionaries(keys, child, max_size=4), st.lists(child, max_size=3))

    return st.dictionaries(keys, st.recursive(leaf, inner, max_leaves=8), min_size=1, max_size=4)
