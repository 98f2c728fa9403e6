"""safetensors files, read and written without the package, which is the oracle in both directions."""

import json
import random
import struct
import tracemalloc
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from bridge._errors import CheckpointCorruptError, CheckpointExistsError, CheckpointLayoutError, CheckpointWriteError
from bridge.checkpoint.formats.open import open_sink, open_source
from bridge.checkpoint.formats.safetensors import open_safetensors
from tests.support.checkpoint_files import DTYPES, describe, load, run_limited, save, survives, trees
from tests.tolerance import assert_trees_equal

ALL_DTYPES = (*DTYPES, "complex64", "uint16")
TREE = {
    "params": {"Dense_0": {"kernel": np.arange(6, dtype="float32").reshape(2, 3), "bias": np.zeros(3, jnp.bfloat16)}},
    "opt_state": [{"count": np.int32(3), "mu": np.ones((2, 2), "float16")}, {}, None, []],
    "step": 300,
    "note": 'é"\n',
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def zero_d(tree):
    """numpy's scalars as arrays without axes, which they are in this format."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, tree)


# --- against the package ------------------------------------------------------------------------------------


@given(trees(ALL_DTYPES))
@example(TREE)
@example({"a.b": 1, "a": {"b": 2}, "__metadata__": {"": "x"}, "a/b": {"c": np.ones(2)}})
@example({"a": {}})
def test_what_we_write_comes_back_and_the_package_reads_the_same_bytes(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("m") / "a.safetensors"
    save(path, "safetensors", tree, metadata={"hashes": {"x": "y"}})
    assert_trees_equal(load(path), zero_d(tree))
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    with closing(open_source(path)) as source:
        assert source.metadata == {"hashes": {"x": "y"}}
        for place, name in source.names.items():
            ours, row = np.asarray(source.read(place)), theirs.pop(name)
            assert (list(ours.shape), ours.tobytes()) == (row["shape"], bytes(row["data"]))
    assert not theirs


def test_numpy_and_jax_read_what_we_write(path):
    tree = {"a": {"f32": np.arange(6, dtype="float32").reshape(2, 3), "bf16": jnp.arange(3, dtype="bfloat16")}, "n": 7}
    save(path, "safetensors", tree)
    found = safetensors.flax.load_file(path)
    assert_trees_equal(found["a.bf16"], tree["a"]["bf16"])
    assert_trees_equal(found["a.f32"], jnp.asarray(tree["a"]["f32"]))
    del tree["a"]["bf16"]
    save(path.with_name("b.safetensors"), "safetensors", tree)
    wanted = {"a.f32": tree["a"]["f32"], "n": np.array(7)}
    assert_trees_equal(safetensors.numpy.load_file(path.with_name("b.safetensors")), wanted)


@given(
    st.dictionaries(st.sampled_from(["w", "layers.0.w", "layers.1.w", "h.b"]), st.sampled_from(ALL_DTYPES), min_size=1)
)
def test_what_the_package_writes_we_read(tmp_path_factory, dtypes):
    path = tmp_path_factory.mktemp("m") / "model.safetensors"
    arrays = {name: np.ones((2, 3)).astype(dtype) for name, dtype in dtypes.items() if "float8" not in dtype}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    with closing(open_source(path.parent)) as source:
        assert source.format == "safetensors"
        assert source.metadata == {"format": "pt"}
        assert_trees_equal({".".join(p): source.read(p) for p in source.tree.leaves}, arrays)


def test_metadata_of_another_program_is_kept_whatever_its_names(path):
    metadata = {"format": "pt", "metadata": "theirs", "paths": "a", "bridge.other": "b"}
    safetensors.numpy.save_file({"w": np.ones(1)}, path, metadata=metadata)
    with closing(open_source(path)) as source:
        assert source.metadata == metadata


def test_names_are_split_at_slashes_if_there_are_any_or_where_one_says(path):
    safetensors.numpy.save_file({"params/Dense_0/a.b": np.ones(1), "step": np.ones(1)}, path)
    for separator, wanted in ((None, ("params", "Dense_0", "a.b")), (".", ("params/Dense_0/a", "b"))):
        with closing(open_source(path, separator=separator)) as source:
            assert [*source.tree.leaves] == [wanted, ("step",)]
    safetensors.numpy.save_file({"a.b": np.ones(1), "a": np.ones(1)}, path)
    with pytest.raises(CheckpointCorruptError, match=r"(?s)split where keys are joined.*a: is a leaf"):
        open_source(path)
    with closing(open_source(path, separator="/")) as source:
        assert sorted(source.tree.leaves) == [("a",), ("a.b",)]


def test_an_index_of_several_files(tmp_path):
    parts = {
        "1.safetensors": {"a.0": np.ones(2, "int8"), "a.1": np.ones(3)},
        "2.safetensors": {"b/c": np.zeros((2, 2))},
    }
    for name, arrays in parts.items():
        safetensors.numpy.save_file(arrays, tmp_path / name)
    table = {leaf: name for name, arrays in parts.items() for leaf in arrays}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 58}, "weight_map": table}))
    for place in (tmp_path, index):
        with closing(open_source(place)) as source:
            assert (source.format, source.reason) == ("safetensors", "an index of 2 safetensors files")
            assert source.metadata == {"total_size": 58}
            # split as one: the file with `a.0` alone would be split at the dot
            assert sorted(source.tree.leaves) == [("a.0",), ("a.1",), ("b", "c")]
            assert_trees_equal(source.read(("a.1",), (slice(1, 3),)), np.ones(2))
    for content, text in [
        ({"weight_map": table | {"a.1": "2.safetensors"}}, "'a.1' in the"),
        ({"weight_map": {leaf: name for leaf, name in table.items() if leaf != "a.0"}}, "'a.0' in the file alone"),
        ({"weight_map": {}}, "a 'weight_map' from leaves to files"),
        ({"weight_map": {"a": ".."}}, "names of files beside the index"),
        ({"weight_map": {"a": "3.safetensors"}}, "no such file"),
        ([], "a JSON object"),
    ]:
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointCorruptError, match=text):
            open_source(tmp_path)


def test_a_leaf_in_two_files_is_an_error(tmp_path):
    for name in "xy":
        header = {"__metadata__": {"bridge.paths": json.dumps({name: ["a"]})}, name: row()}
        (tmp_path / f"{name}.safetensors").write_bytes(file_of(header, FOUR))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "x.safetensors", "y": "y.safetensors"}}))
    with pytest.raises(CheckpointCorruptError, match=r"(?s)each leaf in one file.*a in two"):
        open_source(index)


# --- reading ------------------------------------------------------------------------------------------------


def test_opening_reads_no_array_and_large_ones_are_aligned(path):
    tree = {
        "a": np.ones(3, "int8"),
        "big": np.arange(1 << 22, dtype="float32").reshape(1024, 4096),
        "b": np.ones(1 << 17),
    }
    save(path, "safetensors", tree)
    tracemalloc.start()
    with closing(open_source(path)) as source:
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        whole, part = source.read(("big",)), source.read(("big",), (slice(3, 900), slice(5, 6)))
        assert whole.flags.aligned
        assert source.read(("b",)).flags.aligned
        assert_trees_equal(part, tree["big"][3:900, 5:6])
    assert_trees_equal(whole, tree["big"])


# --- hostile files ------------------------------------------------------------------------------------------


def file_of(header, content=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def row(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"\0\0\0\0"
HOSTILE = {
    "seven bytes": (b"\0" * 7, "-1, of 7 bytes"),
    "header beyond the file": (file_of({}, length=2**63), "9223372036854775808, of"),
    "huge header": (file_of({}, length=3), "3, of 10 bytes"),
    "no JSON": (file_of(b"{x"), "a header in JSON"),
    "no text": (file_of(b'{"\xff":1}'), "a header in JSON.*UnicodeDecodeError"),
    "list": (file_of([]), "a JSON object as header"),
    "depth bomb": (file_of(b"[" * 100_000), "a header in JSON.*RecursionError"),
    "one name twice": (file_of(b'{"a":1,"a":2}'), "twice"),
    "row of another form": (file_of({"a": {"dtype": "F32"}}), "a: dtype, shape and data_offsets"),
    "no such dtype": (file_of({"a": row("F33")}, FOUR), "a: a dtype of BOOL.*'F33'"),
    "dtype that is none": (file_of({"a": row(["F32"])}, FOUR), "a: a dtype of"),
    "negative shape": (file_of({"a": row(shape=[-1])}, FOUR), "a: a shape"),
    "huge shape": (file_of({"a": row(shape=[2**40, 2**40])}, FOUR), "a: a shape"),
    "shape of booleans": (file_of({"a": row(shape=[True])}, FOUR), "a: a shape"),
    "wrong size": (file_of({"a": row(shape=[2])}, FOUR), "a: 8 bytes for"),
    "offsets of text": (file_of({"a": row(offsets=["0", "4"])}, FOUR), "a: where it begins and ends"),
    "before the file": (file_of({"a": row(offsets=[-4, 0])}, FOUR), r"a: 4 bytes for.*-4"),
    "overlap": (file_of({"a": row(), "b": row(offsets=[2, 6])}, FOUR * 2), "b: to begin at 4"),
    "same place": (file_of({"a": row(), "b": row()}, FOUR), "b: to begin at 4"),
    "hole": (file_of({"a": row(), "b": row(offsets=[5, 9])}, FOUR * 3), "b: to begin at 4"),
    "beyond the file": (file_of({"a": row()}, b"\0\0"), "bytes, as the header says"),
    "bytes behind": (file_of({"a": row()}, FOUR * 2), "bytes, as the header says"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "texts in __metadata__"),
    "metadata that is a list": (file_of({"__metadata__": []}), "texts in __metadata__"),
    **{
        f"bridge.{key} is {value}": (
            file_of({"__metadata__": {f"bridge.{key}": value}, "a": row()}, FOUR),
            rf"bridge.{key}",
        )
        for key, value in [
            *[("paths", "{"), ("paths", "[]"), ("paths", '{"a": "b"}'), ("paths", '{"b": ["a"]}')],
            *[("paths", "[" * 9999), ("numbers", "5"), ("numbers", '["b"]'), ("numbers", '["a"]')],
            *[("strings", '[["a"]]'), ("empty", '[[["x"], 1]]'), ("empty", '[[["x"], "Set"]]')],
            *[("sequences", '["x"]'), ("metadata", "[]")],
        ]
    },
    "a string where an array is": (
        file_of({"__metadata__": {"bridge.strings": '[[["a"], "x"]]'}, "a": row()}, FOUR),
        "a string where an array is",
    ),
    "a list with a gap": (
        file_of({"__metadata__": {"bridge.sequences": "[[]]"}, "a": row()}, FOUR),
        "is a list with the indices a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_that_says_what(path, name):
    content, text = HOSTILE[name]
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=f"(?s){text}"):
        open_source(path)


def test_a_name_of_more_parts_than_a_tree_can_be_deep(path):
    for parts in (500, 501, 3000):
        path.write_bytes(file_of({".".join("k" * parts): row()}, FOUR))
        if parts == 500:
            assert_trees_equal(jax.tree.leaves(load(path)), [np.zeros(1, "float32")])
            continue
        text = rf"(?s)paths of at most 500 keys.*one of {parts}: k/k/k/k/k/\.\.\."
        with pytest.raises(CheckpointLayoutError, match=text):
            open_source(path)


def test_a_hostile_file_takes_no_memory(path):
    tracemalloc.start()
    for content, _ in HOSTILE.values():
        path.write_bytes(content)
        with pytest.raises(CheckpointCorruptError):
            open_source(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()


def places(content):
    """Offsets in the header and in the arrays, without those of the spaces between."""
    end = 8 + int.from_bytes(content[:8], "little")
    return [*range(len(content[:end].rstrip(b" ")) + 2), *range(end, len(content))]


def test_a_file_cut_short_anywhere_is_an_error(path, tmp_path):
    save(path, "safetensors", TREE)
    whole, other = path.read_bytes(), tmp_path / "b.safetensors"
    assert survives(whole, other)
    assert not any(survives(whole[:size], other) for size in places(whole))


@pytest.mark.slow
def test_a_file_with_any_byte_changed_is_an_error_or_a_tree(path, tmp_path):
    save(path, "safetensors", TREE, metadata={"a": 1})
    whole, other, read = bytearray(path.read_bytes()), tmp_path / "b.safetensors", 0
    for place in places(whole):
        for change in (0xFF, 0x01, 0x10):
            whole[place] ^= change
            read += survives(bytes(whole), other)
            whole[place] ^= change
    assert 0 < read < 3 * len(places(whole))


@given(st.binary(max_size=60))
def test_any_bytes_are_an_error_or_a_tree(tmp_path_factory, content):
    survives(content, tmp_path_factory.mktemp("m") / "a.safetensors")


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_killed_and_resumed_in_any_order_it_is_the_same_file(path, tmp_path, seed):
    shape, values = describe(TREE)
    save(tmp_path / "whole.safetensors", "safetensors", TREE, metadata={"m": 1})
    order = random.Random(seed).sample(list(values), len(values))
    for start in range(0, len(order), 2):
        with open_sink(path, "safetensors", shape, resume=True) as sink:
            assert sink.done == set(order[:start])
            sink.write({place: values[place] for place in order[start : start + 2]})
        with open(path.with_name(path.name + ".unfinished.json"), "ab") as file:
            file.write(b'{"done": [')
        with pytest.raises(CheckpointCorruptError, match="never finished"):
            open_source(path.with_name(path.name + ".unfinished"))
    with open_sink(path, "safetensors", shape, resume=True) as sink:
        sink.finish({"m": 1})
    assert_trees_equal(load(path), zero_d(TREE))
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(child.name for child in tmp_path.iterdir()) == [path.name, "whole.safetensors"]


def test_metadata_larger_than_the_room_kept_for_it(path, tmp_path):
    metadata = {"history": "é" * 50_000}
    save(path, "safetensors", TREE, metadata=metadata)
    with closing(open_source(path)) as source:
        assert source.metadata == metadata
    assert_trees_equal(load(path), zero_d(TREE))
    assert dict(safetensors.deserialize(path.read_bytes())).keys() >= {"params.Dense_0.kernel"}
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_a_header_larger_than_the_package_reads_is_refused(path):
    shape, values = describe({"a": np.ones(2)})
    with open_sink(path, "safetensors", shape) as sink:
        sink.write(values)
        with pytest.raises(CheckpointWriteError, match=r"(?s)a header of at most 100000000 bytes.*with its metadata"):
            sink.finish({"a": "x" * 100_000_000})
        sink.finish({})
    assert_trees_equal(load(path), {"a": np.ones(2)})


def test_what_safetensors_cannot_hold_is_refused_before_a_byte_is_written(path):
    for tree, text in [
        ({"rngs": {"key": jax.random.key(0)}}, r"cannot hold random keys.*rngs/key: key<fry>\[\].*--rng drop"),
        ({"a": {"b": np.ones(2, "complex128")}}, r"no such number type.*a/b: complex128\[2\].*Cast it by a rule"),
        ({"a": jnp.ones(2, "int4")}, "no such number type.*int4"),
        ({"\ud800": np.ones(2)}, "keys that are text"),
    ]:
        with pytest.raises(CheckpointWriteError, match=f"(?s){text}"):
            open_sink(path, "safetensors", describe(tree)[0])
        assert not list(path.parent.iterdir())


def test_what_is_there_is_not_written_over(path):
    path.mkdir()
    with pytest.raises(CheckpointExistsError, match=r"(?s)the target exists.*found: a folder"):
        open_sink(path, "safetensors", describe(TREE)[0])


def test_a_full_disk_is_an_error_before_anything_is_written(path):
    script = """
import sys
from bridge._errors import CheckpointWriteError
from bridge.checkpoint.formats.open import open_sink
from bridge.checkpoint.tree.tree import Tree
from bridge.checkpoint.tree.layout import Leaf
try:
    open_sink(sys.argv[1], "safetensors", Tree({("a",): Leaf(("a",), (80_000,), "uint8", 80_000)}))
except CheckpointWriteError as error:
    print(error)
"""
    text = run_limited(script, path)
    assert "could not be written" in text
    assert "found: File too large" in text
    assert not list(path.parent.iterdir())


def test_an_index_says_its_own_separator(tmp_path):
    safetensors.numpy.save_file({"a.b": np.ones(1)}, tmp_path / "1.safetensors")
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.b": "1.safetensors"}}))
    with closing(open_safetensors(index, separator="/")) as source:
        assert [*source.tree.leaves] == [("a.b",)]
