"""A leaf that is larger than the memory allowed: the same bits and hash block by block, whatever is done to it."""

import errno
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bridge._errors import CheckpointWriteError
from bridge.checkpoint import blocks as subject
from bridge.checkpoint.blocks import InBlocks, hash_in_blocks, too_large
from bridge.checkpoint.conversion import convert, open_conversion
from bridge.checkpoint.formats.open import SINK_FORMATS, open_sink, open_source
from bridge.checkpoint.formats.orbax import tables
from bridge.checkpoint.rules.apply import read_rules
from bridge.checkpoint.stream import LeafHash, batches, leaf_hash
from bridge.checkpoint.tree.ops import Add, Block, Cast, Fill, Join, Pick, Read, Reshape, Transpose
from bridge.checkpoint.tree.regions import blocks
from bridge.checkpoint.tree.tree import Tree
from tests.support import checkpoint_run as run
from tests.support.checkpoint_fakes import MemorySource, leaf_of
from tests.tolerance import assert_trees_equal

DRAW = np.random.default_rng(0)
A, B = (DRAW.normal(size=(64, 48)).astype(np.float32) for _ in range(2))
STACK = DRAW.normal(size=(4, 32, 24)).astype(np.float32)
LEAVES = {("a",): A, ("b",): B, ("s",): STACK}
READS = {path[0]: Read(path, value.shape, "float32") for path, value in LEAVES.items()}
BUDGET = 3 << 10  # bytes; a and b have twelve thousand

OPS = {
    "as it is": (READS["a"], A),
    "cast": (Cast(READS["a"], "bfloat16"), A.astype(jnp.bfloat16)),
    "add": (Add(READS["a"], 1.0), A + np.float32(1)),
    "concat along rows": (Join((READS["a"], READS["b"]), 0), np.concatenate([A, B], 0)),
    "concat along columns": (Join((READS["a"], READS["b"]), 1), np.concatenate([A, B], 1)),
    "stack": (Join((READS["a"], READS["b"]), 1, stack=True), np.stack([A, B], 1)),
    "halves exchanged": (Join((Block(READS["a"], 1, 24, 48), Block(READS["a"], 1, 0, 24)), 1), np.roll(A, 24, 1)),
    "layer": (Pick(READS["s"], 1, 3), STACK[:, 3]),
    "reshape": (Reshape(READS["a"], (48, 64)), A.reshape(48, 64)),
    "reshape of a transpose": (Reshape(Transpose(READS["a"], (1, 0)), (96, 32)), A.T.reshape(96, 32)),
    "transpose": (Transpose(READS["a"], (1, 0)), A.T),
    "transpose of the last axes": (Transpose(READS["s"], (0, 2, 1)), STACK.transpose(0, 2, 1)),
    "transpose, twice": (
        Transpose(Add(Transpose(READS["s"], (2, 0, 1)), 1.0), (2, 1, 0)),
        STACK.transpose(1, 0, 2) + 1,
    ),
    "transposes joined": (
        Join(tuple(Transpose(READS[name], (1, 0)) for name in "ab"), 0),
        np.concatenate([A.T, B.T], 0),
    ),
    "new": (Fill(A), A),
}
each_op = pytest.mark.parametrize("name", OPS)


@each_op
@pytest.mark.parametrize("rows", [None, 2])
def test_blocks_are_the_leaf_in_order_with_its_hash(name, rows, tmp_path):
    op, wanted = OPS[name]
    chunk = rows and (*(1,) * (len(op.shape) - 2), rows, op.shape[-1])
    source, digest = MemorySource(LEAVES), LeafHash(op.shape, op.dtype)
    with InBlocks(op, source.read, BUDGET, chunk, tmp_path).hashed(digest) as made:
        parts = [(region, np.array(value)) for region, value in made]
    assert len(parts) > 3 or wanted.nbytes < BUDGET
    for region, value in parts:
        assert value.tobytes() == wanted[region].tobytes()
        assert value.nbytes <= max(BUDGET / 3, 2 * wanted[0].nbytes)
    assert b"".join(value.tobytes() for _, value in parts) == wanted.tobytes()
    assert digest.hexdigest() == leaf_hash(wanted)
    assert max(size for _, size in source.reads) < BUDGET if source.reads else name == "new"
    assert list(tmp_path.iterdir()) == []


def test_parts_that_change_places_are_read_once_a_block():
    op, _ = OPS["halves exchanged"]
    source = MemorySource(LEAVES)
    with InBlocks(op, source.read, BUDGET).made() as made:
        count = len(list(made))
    assert len(source.reads) == count
    assert sum(size for _, size in source.reads) == A.nbytes


def test_only_one_array_alone_is_too_large():
    source = MemorySource({**LEAVES, ("text",): "a" * 99})
    made = {("a",): READS["a"], ("b",): READS["b"], ("text",): Read(("text",), (), "str")}
    target = {path: leaf_of(path, source.leaves[path]) for path in made}
    small, large = (list(batches(made, target, source.tree.leaves, budget)) for budget in (10**6, 8))
    assert [too_large(batch, 10**6) for batch in small] == [None]
    assert [too_large(batch, 8) for batch in large] == [(("a",), READS["a"]), (("b",), READS["b"]), None]


def test_a_temporary_file_that_does_not_fit_is_told(tmp_path, monkeypatch):
    def full(opened, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(subject, "_write", full)
    parts = InBlocks(OPS["transpose"][0], MemorySource(LEAVES).read, BUDGET, None, tmp_path)
    text = r"(?s)a temporary file could not be written: .*12288 bytes, for a, .*found: No space left.*--max-memory"
    with pytest.raises(CheckpointWriteError, match=text), parts.made() as made:
        next(made)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_comes_out():
    class Broken(MemorySource):
        def read(self, path, region=None):
            raise ValueError("cut short")

    with pytest.raises(ValueError, match="cut short"):
        hash_in_blocks(READS["a"], Broken(LEAVES).read, BUDGET)


# ---- sinks --------------------------------------------------------------------------------------------------

TREE = Tree({path: leaf_of(path, value) for path, value in LEAVES.items()})
each_format = pytest.mark.parametrize("format", SINK_FORMATS)


def in_runs(value, most=100, chunk=None):
    return [(region, value[region]) for region in blocks(value.shape, most, chunk)]


def bytes_of(path: Path):
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path): file.read_bytes() for file in files}


@each_format
def test_blocks_make_the_same_checkpoint(format, tmp_path):
    for name in ("whole", "blocks"):
        with open_sink(tmp_path / name, format, TREE) as sink:
            for path, value in LEAVES.items():
                if name == "whole":
                    sink.write({path: value})
                else:
                    sink.write_blocks(path, in_runs(value, chunk=sink.chunk(path)))
            sink.finish({"made": "here"})
    found = open_source(tmp_path / "blocks", format=format)
    for path, value in LEAVES.items():
        assert found.read(path).tobytes() == value.tobytes()
    if not format.startswith("orbax"):
        assert bytes_of(tmp_path / "blocks") == bytes_of(tmp_path / "whole")


def test_flaxs_chunks_are_the_same_in_blocks(tmp_path):
    from bridge.checkpoint.formats.msgpack import MsgpackSink

    for name in ("whole", "blocks"):
        with MsgpackSink(tmp_path / name, TREE, chunk_bytes=1000) as sink:
            for path, value in LEAVES.items():
                if name == "whole":
                    sink.write({path: value})
                else:
                    sink.write_blocks(path, in_runs(value, most=77))
            sink.finish({})
    assert bytes_of(tmp_path / "blocks") == bytes_of(tmp_path / "whole")


@each_format
def test_a_leaf_of_which_some_blocks_came_is_begun_anew(format, tmp_path):
    def broken():
        yield from in_runs(A, chunk=sink.chunk(("a",)))[:1]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"), open_sink(tmp_path / "out", format, TREE) as sink:
        sink.write_blocks(("a",), broken())
    assert not (tmp_path / "out").exists()
    with open_sink(tmp_path / "out", format, TREE, resume=True) as sink:
        assert sink.done == frozenset()
        sink.write_blocks(("a",), in_runs(A, chunk=sink.chunk(("a",))))
        sink.write({("b",): B})
    with open_sink(tmp_path / "out", format, TREE, resume=True) as sink:
        assert sink.done == {("a",), ("b",)}
        sink.write({("s",): STACK})
        sink.finish({})
    found = open_source(tmp_path / "out", format=format)
    assert all(found.read(path).tobytes() == value.tobytes() for path, value in LEAVES.items())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (in_runs(A)[:-1], "no more blocks"),
        ([], "no more blocks"),
        (in_runs(A)[1:], r"\(slice\(2, 4.*float32\[2, 48\]"),
        ([((slice(0, 64), slice(0, 2)), A[:, :2])], r"\(slice\(0, 64"),
        (in_runs(A.astype("float64")), r"\(slice.*float64\[2, 48\]"),
    ],
    ids=["the last is missing", "none", "the first is missing", "no run", "another type"],
)
def test_blocks_that_are_not_the_leaf(given, found, tmp_path):
    text = rf"(?s)the blocks of a leaf are not the leaf.*a: float32\[64, 48\].*found: {found}"
    with (
        open_sink(tmp_path / "out", "safetensors", TREE) as sink,
        pytest.raises(CheckpointWriteError, match=text),
    ):
        sink.write_blocks(("a",), given)


def test_msgpack_takes_blocks_of_the_next_leaf_only(tmp_path):
    with (
        open_sink(tmp_path / "out", "msgpack", TREE) as sink,
        pytest.raises(CheckpointWriteError, match=r"(?s)in the order of tree.order: a\n.*found: b"),
    ):
        sink.write_blocks(("b",), in_runs(B))


# ---- conversions --------------------------------------------------------------------------------------------

SOURCES = ("orbax", "orbax-v1", "msgpack", "safetensors", "npz")
PAIRS = [
    pytest.param(source, target, marks=[] if target == SINK_FORMATS[i % 4] else pytest.mark.grid)
    for i, source in enumerate(SOURCES)
    for target in SINK_FORMATS
]
RULES = """
[[rule]]
from = "params/Dense_0/kernel"
to = "params/out/kernel"
transpose = [1, 0]

[[rule]]
from = "params/Dense_0/bias"
to = "params/out/bias"
"""


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_conversion_in_little_memory_is_the_same(source, target, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK", 1000)
    (tmp_path / "rules.toml").write_text(RULES)
    params = {"Dense_0": {"kernel": A, "bias": B[0]}, "Dense_1": {"kernel": STACK}}
    path = run.save({"params": params}, tmp_path / "source", source)
    options = {"to": "nnx", "rules": read_rules(tmp_path / "rules.toml"), "target_format": target}
    told = []
    report = convert(
        path, tmp_path / "out", **options, max_memory=4 * BUDGET, progress=lambda *done: told.append(done[1])
    )
    assert report.verified
    converting = told[: told.index(max(told)) + 1]
    assert converting == sorted(set(converting))
    assert len(converting) > 12
    convert(path, tmp_path / "much", **options)
    assert_trees_equal(run.load(tmp_path / "out", target), run.load(tmp_path / "much", target))


def test_what_is_read_whole_is_noted(tmp_path):
    np.savez(tmp_path / "model.npz", **{"params/kernel": np.asfortranarray(A), "params/bias": B[0]})
    note = (
        "params/kernel is stored in parts of 12288 bytes, each of which is read whole: memory may exceed the 9000 bytes"
    )
    with open_conversion(tmp_path / "model.npz", to="nnx", max_memory=9000) as conversion:
        assert any(line.startswith(note) for line in conversion.plan.notes)
        conversion.run(tmp_path / "out")
    with open_conversion(tmp_path / "model.npz", to="nnx") as conversion:
        assert not any("read whole" in line for line in conversion.plan.notes)
