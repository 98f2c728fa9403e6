"""flax's msgpack files, read and written without flax: `flax.serialization` is the oracle, in both directions."""

import json
import struct
import tracemalloc
from contextlib import closing

import flax
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.training import checkpoints, train_state
from hypothesis import example, given
from hypothesis import strategies as st

from bridge._errors import (
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointLayoutError,
    CheckpointWriteError,
)
from bridge.checkpoint.formats.msgpack import MsgpackSink
from bridge.checkpoint.formats.open import open_sink, open_source
from bridge.checkpoint.formats.stored import ArrayFile, pieces
from bridge.checkpoint.tree.layout import Leaf, collection_of
from bridge.checkpoint.tree.tree import Tree
from tests.support.checkpoint_files import DTYPES, as_dicts, describe, load, run_limited, save, survives, trees
from tests.tolerance import assert_trees_equal

ALL_DTYPES = (*DTYPES, "complex64", "complex128", "int4")
TREE = {
    "params": {"Dense_0": {"kernel": np.arange(6, dtype="float32").reshape(2, 3), "bias": np.zeros(3, jnp.bfloat16)}},
    "opt_state": [{"count": np.int32(3), "mu": np.ones((2, 2), "float16")}, {}, None],
    "step": 300,
    "note": "é" * 40,
    "z": 1 + 2j,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flax_model.msgpack"


def write(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    return path


# --- against flax -------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(trees(ALL_DTYPES))
@example(TREE)
def test_what_we_write_flax_reads_and_so_do_we(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("m") / "a.msgpack"
    save(path, "msgpack", tree)
    assert_trees_equal(load(path), as_dicts(tree))
    if "float8" not in repr(serialization.to_bytes(tree)):  # flax writes them and cannot read them again
        assert_trees_equal(serialization.msgpack_restore(path.read_bytes()), as_dicts(tree))


@given(trees(ALL_DTYPES))
@example({"a": {"x": np.zeros((), "float32")}, "b": {}})
def test_what_flax_writes_we_read(tmp_path_factory, tree):
    path = write(tmp_path_factory.mktemp("m") / "a.msgpack", tree)
    assert_trees_equal(load(path), as_dicts(tree))


@pytest.mark.parametrize(
    "tree",
    [
        TREE,
        {"a": np.zeros((), "float32"), "b": np.zeros((), bool), "c": np.zeros(300, "int8"), "d": np.zeros((0, 2))},
        {"big": np.zeros(70_000, "uint8"), "k" * 300: {str(i): i for i in range(20)}},
        {"ints": {str(n): n for n in (0, 127, 128, 255, 256, 65536, 2**32, 2**63 - 1, -1, -32, -33, -129, -(2**63))}},
        {"s": {str(n): "x" * n for n in (0, 31, 32, 255, 256, 65536)}, "f": 0.1, "t": True, "n": None},
        {"generic": np.float64(1.5), "bf": jnp.bfloat16(2), "z": np.complex64(1j), "jax": jnp.ones(3)},
        {"many": {f"k{i:05}": i for i in range(70_000)}},
        np.ones((2, 2)),
        {},
    ],
    ids=lambda tree: "-".join(tree)[:20] if isinstance(tree, dict) else "array",
)
def test_the_file_is_to_bytes_byte_for_byte(path, tree):
    save(path, "msgpack", tree, batch=100_000)
    assert path.read_bytes() == serialization.to_bytes(tree)


def test_arrays_above_the_limit_are_cut_as_flax_cuts_them(path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    tree = {"a": {"big": np.arange(90, dtype="float32").reshape(5, 18), "small": np.arange(25, dtype="float32")}}
    tree["view"] = np.arange(200, dtype="int16").reshape(10, 20).T
    shape, values = describe(tree)
    with MsgpackSink(path, shape, chunk_bytes=100) as sink:
        sink.write(values)
        sink.finish({})
    assert path.read_bytes() == serialization.to_bytes(tree)
    with closing(open_source(path)) as source:
        assert source.tree.leaves["a", "big"].shape == (5, 18)
        assert_trees_equal(source.read(("a", "big")), tree["a"]["big"])
        for region in [(slice(1, 3), slice(4, 9)), (slice(4, 5), slice(0, 18)), (slice(2, 2), slice(0, 18))]:
            assert_trees_equal(source.read(("a", "big"), region), tree["a"]["big"][region])


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated:DeprecationWarning")
def test_a_train_state_and_a_legacy_folder_of_steps(tmp_path):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3))
    with flax.config.temp_flip_flag("use_orbax_checkpointing", False):
        for step in (7, 12):
            checkpoints.save_checkpoint(str(tmp_path), state.replace(step=step), step, keep=5)
    for step, wanted in ((None, 12), (7, 7)):
        with closing(open_source(tmp_path, step=step)) as source:
            assert (source.step, source.format, source.read(("step",))) == (wanted, "msgpack", wanted)
            assert source.tree.empty == {("opt_state", "1"): "Dict", ("opt_state", "2"): "Dict"}
            assert collection_of(("opt_state", "0", "mu", "kernel"), source.tree.layout.kind) == "opt_state"
            assert_trees_equal(source.read(("params", "kernel")), np.asarray(params["kernel"]))


def test_an_index_of_several_files_as_hugging_face_writes_them(tmp_path):
    table = {}
    for number, name in enumerate(["encoder", "decoder"]):
        write(tmp_path / f"flax_model-{number}.msgpack", {"model": {name: {"kernel": np.full((2, 2), number)}}})
        table[f"model/{name}/kernel"] = f"flax_model-{number}.msgpack"
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": table}))
    wanted = {
        "model": {name: {"kernel": np.full((2, 2), number)} for number, name in enumerate(["encoder", "decoder"])}
    }
    assert_trees_equal(load(tmp_path), wanted)
    with closing(open_source(index)) as source:
        assert source.metadata == {"total_size": 64}
    for change, found in [
        ({"model/extra/kernel": "flax_model-0.msgpack"}, "'model/extra/kernel' in the index alone"),
        ({"model/decoder/kernel": "../flax_model-1.msgpack"}, "'../flax_model-1.msgpack'"),
        ({"model/decoder/kernel": "flax_model-2.msgpack"}, "no such file"),
        ({"model/decoder/kernel": "flax_model-0.msgpack"}, "'model/decoder/kernel' in the index alone"),
    ]:
        index.write_text(json.dumps({"weight_map": table | change}))
        with pytest.raises(CheckpointCorruptError) as caught:
            open_source(index)
        assert found in str(caught.value)


# --- reading ------------------------------------------------------------------------------------------------


def test_opening_reads_no_array_and_a_read_allocates_it_once(path):
    tree = {"big": np.arange(1 << 22, dtype="float32").reshape(1024, 4096), "odd": np.arange(1 << 17, dtype="int16")}
    write(path, {"x": tree["odd"], **tree})
    tracemalloc.start()
    try:
        with closing(open_source(path)) as source:
            assert tracemalloc.get_traced_memory()[1] < 1 << 20  # of 16 MiB
            whole = source.read(("big",))
            assert tracemalloc.get_traced_memory()[1] < 17 << 20
            part = source.read(("big",), (slice(3, 9), slice(5, 6)))
            assert tracemalloc.get_traced_memory()[1] < 18 << 20
    finally:
        tracemalloc.stop()
    assert_trees_equal(part, tree["big"][3:9, 5:6])
    assert_trees_equal(whole, tree["big"])  # good after close
    assert_trees_equal(jnp.asarray(whole) + 1, jnp.asarray(tree["big"]) + 1)


def test_arrays_that_are_read_and_let_go_do_not_add_up(path):
    size = 1 << 22
    write(path, {str(i): np.full(size, i, "uint8") for i in range(8)})
    with closing(open_source(path)) as source:
        tracemalloc.start()
        try:
            held = source.read(("0",))
            assert tracemalloc.get_traced_memory()[0] >= size
            del held
            assert tracemalloc.get_traced_memory()[0] < size // 4
            for i in range(8):
                assert int(source.read((str(i),))[::4096].max()) == i
            assert tracemalloc.get_traced_memory()[1] < size + size // 4
        finally:
            tracemalloc.stop()


@given(st.data())
def test_a_region_is_that_part_of_the_array(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "a.msgpack"
    shape = data.draw(st.sampled_from([(), (5,), (3, 4), (1, 3, 4), (2, 1, 3), (2, 0)]))
    array = np.arange(np.prod(shape), dtype="int32").reshape(shape)
    write(path, {"a": array})
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    region = tuple(slice(*pair) for pair in bounds)
    with closing(open_source(path)) as source:
        assert_trees_equal(source.read(("a",), region), array[region])


def test_numbers_and_strings_come_back_as_saved(path):
    tree = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "text": "x",
        "complex": 1j,
        "generic": np.float32(2),
        "zero_d": np.ones(()),
    }
    write(path, tree)
    assert_trees_equal(load(path), tree)
    assert [type(value) for value in load(path).values()] == [type(value) for value in tree.values()]
    with closing(open_source(path)) as source:
        assert [(leaf.dtype, leaf.nbytes) for leaf in source.tree.leaves.values()] == [
            *[("int64", 8), ("float64", 8), ("bool", 1), ("str", 1), ("complex128", 16), ("float32", 4), ("float64", 8)]
        ]


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_crash(path):
    write(path, {"a": np.zeros(1 << 20, "uint8")})
    with closing(open_source(path)) as source:
        with open(path, "r+b") as file:
            file.truncate(1000)
        with pytest.raises(CheckpointChangedError, match=r"(?s)changed while it was read.*, 1000 bytes, .*a copy"):
            source.read(("a",))
    file = ArrayFile(path)
    with pytest.raises(CheckpointCorruptError, match=r"(?s)600 bytes at 500.*500 bytes"):
        file.copy(500, 600)
    file.close()


# --- hostile files ------------------------------------------------------------------------------------------


def array_of(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


def chunked(shape, *chunks):
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": dict(zip("012", chunks, strict=False))}


FOUR = b"\0\0\0\0"
HOSTILE = {
    "empty file": (b"", "a file of 0 bytes"),
    "length beyond the file": (b"\xdf\xff\xff\xff\xff", "4294967295 entries"),
    "string beyond the file": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "a: 4294967295 bytes"),
    "depth bomb": (b"\x81\xa1a" * 500 + b"\xc0", "128 deep"),
    "list bomb": (b"\x91" * 5000 + b"\xc0", "128 deep"),
    "too many entries": (b"\xdd" + struct.pack(">I", 1_100_000) + b"\xc0" * 1_100_000, "at most 1000000 entries"),
    "trailing bytes": (b"\x81\xa1a\x01\x00", "1 more bytes, at byte 4"),
    "no such byte": (b"\x81\xa1a\xc1", "a: msgpack.*the byte 0xc1, which begins nothing, at byte 3"),
    "number as key": (msgpack.packb({1: 2}), "a key, which is text.*number"),
    "one key twice": (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
    "text that is none": (b"\x81\xa1a\xa1\xff", "not UTF-8"),
    "raw bytes": (msgpack.packb({"a": b"xyz"}), "3 raw bytes"),
    "extension of another program": (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "1 to 3.*5"),
    "timestamp": (b"\x81\xa1a\xd6\xff" + FOUR, "1 to 3.*-1"),
    "objects": (
        msgpack.packb({"a": {"b": array_of([1], "object", FOUR * 2)}}),
        "a/b: the name of a number type.*object",
    ),
    "structs": (msgpack.packb({"a": array_of([1], "i4,i4", FOUR * 2)}), "'i4,i4'"),
    "dates": (msgpack.packb({"a": array_of([1], "datetime64[ns]", FOUR * 2)}), "datetime64"),
    "long dtype": (msgpack.packb({"a": array_of([1], "i4," * 10_000, FOUR * 2)}), "the name of a number type"),
    "shape too large": (msgpack.packb({"a": array_of([2**40, 2**40], "float32", FOUR)}), "None bytes"),
    "shape too small": (msgpack.packb({"a": array_of([], "float32", FOUR * 2)}), "4 bytes for float32.*bin of 8"),
    "negative shape": (msgpack.packb({"a": array_of([-1], "float32", FOUR)}), "None bytes"),
    "shape of text": (msgpack.packb({"a": array_of(["1"], "float32", FOUR)}), "a number"),
    "65 dimensions": (msgpack.packb({"a": array_of([1] * 65, "float32", FOUR)}), "None bytes"),
    "array of two": (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "float32")))}), "array of 2"),
    "array without content": (msgpack.packb({"a": msgpack.ExtType(1, b"")}), "1 bytes.*0"),
    "bytes behind an array": (
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "float32", FOUR)) + b"\0")}),
        "with 5 left",
    ),
    "scalar with a shape": (
        msgpack.packb({"a": msgpack.ExtType(3, msgpack.packb(([1], "float32", FOUR)))}),
        "a scalar",
    ),
    "complex of three": (msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0, 3.0]))}), "2 numbers"),
    "bytes behind a complex": (
        msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]) + b"\0")}),
        "two numbers",
    ),
    "chunks that are none": (msgpack.packb(chunked({"0": 1}, 5)), "shape and chunks of one array"),
    "chunks of two types": (
        msgpack.packb(chunked({"0": 2}, array_of([1], "float32", FOUR), array_of([1], "int32", FOUR))),
        "shape and chunks",
    ),
    "too few chunks": (msgpack.packb(chunked({"0": 3}, array_of([1], "float32", FOUR))), "chunks for float32"),
    "no chunks": (msgpack.packb({"a": chunked({"0": 0})}), "a: shape and chunks"),
    "chunks and more": (
        msgpack.packb({**chunked({"0": 1}, array_of([1], "float32", FOUR)), "x": 1}),
        "shape and chunks",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_that_says_where(path, name):
    content, text = HOSTILE[name]
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=f"(?s){text}"):
        open_source(path)


def test_a_hostile_file_takes_no_memory(path):
    tracemalloc.start()
    for name, (content, _) in HOSTILE.items():
        if name != "too many entries":
            path.write_bytes(content)
            with pytest.raises(CheckpointCorruptError):
                open_source(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_file_cut_short_anywhere_is_an_error(path):
    whole = serialization.to_bytes(TREE)
    assert survives(whole, path)
    assert not any(survives(whole[:size], path) for size in range(len(whole)))


def test_a_file_with_any_byte_changed_is_an_error_or_a_tree(path):
    whole = bytearray(serialization.to_bytes(TREE))
    read = 0
    for place in range(len(whole)):
        for change in (0xFF, 0x01, 0x80):
            whole[place] ^= change
            read += survives(bytes(whole), path)
            whole[place] ^= change
    assert 0 < read < 3 * len(whole)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_error_or_a_tree(tmp_path_factory, content):
    survives(content, tmp_path_factory.mktemp("m") / "a.msgpack")


def test_arrays_in_another_folder_are_said_to_be(path):
    write(path, {"params": {"w": "//GDAPlaceholder:params/w"}})
    with pytest.raises(CheckpointLayoutError, match=r"(?s)params/w: it is in the folder flax_model.msgpack_gda.*Orbax"):
        open_source(path)


# --- metadata -----------------------------------------------------------------------------------------------


def test_metadata_lies_beside_the_file_and_belongs_to_it(path):
    save(path, "msgpack", TREE, metadata={"hashes": {"a": "0f"}, "n": [1, None]})
    with closing(open_source(path)) as source:
        assert source.metadata == {"hashes": {"a": "0f"}, "n": [1, None]}
    write(path, {"other": 1})
    with closing(open_source(path)) as source:
        assert source.metadata == {}
        assert "flax_model.msgpack.metadata.json is of another file" in source.reason
    for content, text in [("[1]", "a JSON object"), ('{"size": 1}', "an object 'metadata'"), ("{", "a JSON object")]:
        path.with_name("flax_model.msgpack.metadata.json").write_text(content)
        with pytest.raises(CheckpointCorruptError, match=text):
            open_source(path)


# --- writing ------------------------------------------------------------------------------------------------


def test_killed_and_resumed_it_is_the_same_file(path, tmp_path):
    shape, values = describe(TREE)
    order, wanted = shape.order, serialization.to_bytes(TREE)
    for stop in range(len(order)):
        with open_sink(path, "msgpack", shape) as sink:
            sink.write({place: values[place] for place in order[:stop]})
        with open(path.with_name(path.name + ".unfinished"), "ab") as file:
            file.write(b"half a leaf")  # what was on its way when it was killed
        with open(path.with_name(path.name + ".unfinished.json"), "ab") as file:
            file.write(b'{"count": 9')
        assert not path.exists()
        with open_sink(path, "msgpack", shape, resume=True) as sink:
            assert sink.done == set(order[:stop])
            sink.write({place: values[place] for place in order[stop:]})
            sink.finish({})
        assert path.read_bytes() == wanted
        assert sorted(child.name for child in tmp_path.iterdir()) == [path.name, path.name + ".metadata.json"]
        path.unlink()


def test_what_is_unfinished_is_continued_by_the_same_tree_only(path):
    shape, values = describe(TREE)
    with open_sink(path, "msgpack", shape) as sink:
        sink.write({shape.order[0]: values[shape.order[0]]})
        with pytest.raises(CheckpointWriteError, match=r"(?s)is being written.*another process or sink"):
            open_sink(path, "msgpack", shape, resume=True)
    with pytest.raises(
        CheckpointWriteError, match=r"(?s)in the way.*resume=True.*flax_model\.msgpack\.unfinished\.json"
    ):
        open_sink(path, "msgpack", shape)
    other, _ = describe({**TREE, "step": np.int32(3)})
    with pytest.raises(CheckpointWriteError, match=r"(?s)of another conversion.*the same format, paths, shapes"):
        open_sink(path, "msgpack", other, resume=True)
    with pytest.raises(CheckpointWriteError, match="of another conversion"):
        open_sink(path, "safetensors", describe({"a": 1})[0], resume=True)
    path.with_name(path.name + ".unfinished.json").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointWriteError, match="a damaged journal"):
        open_sink(path, "msgpack", shape, resume=True)
    with pytest.raises(CheckpointCorruptError, match="never finished"):
        open_source(path.with_name(path.name + ".unfinished"))


def test_killed_between_its_name_and_the_cleaning_up_it_is_finished(path, tmp_path):
    shape, values = describe(TREE)
    journal = path.with_name(path.name + ".unfinished.json")
    with open_sink(path, "msgpack", shape) as sink:
        sink.write(values)
        kept = journal.read_bytes()
        sink.finish({"m": 1})
    journal.write_bytes(kept + json.dumps({"finished": path.stat().st_size}).encode() + b"\n")
    with pytest.raises(CheckpointExistsError, match="the target exists"):
        open_sink(path, "msgpack", shape)
    with open_sink(path, "msgpack", shape, resume=True) as sink:
        assert sink.done == set(shape.order)
        sink.finish({"m": 1})
    assert sorted(child.name for child in tmp_path.iterdir()) == [path.name, path.name + ".metadata.json"]
    assert_trees_equal(load(path), as_dicts(TREE))
    journal.write_bytes(kept)  # of another run, that was killed earlier: the target is not its own
    with pytest.raises(CheckpointExistsError, match="the target exists"):
        open_sink(path, "msgpack", shape, resume=True)


def test_a_run_that_was_killed_before_its_first_leaf_is_not_in_the_way(path):
    shape, values = describe(TREE)
    with open_sink(path, "msgpack", shape):
        pass
    with open_sink(path, "msgpack", describe({"other": 1})[0]):
        pass
    with open_sink(path, "msgpack", shape) as sink:
        sink.write(values)
        sink.finish({})
    assert path.read_bytes() == serialization.to_bytes(TREE)


def test_what_is_there_is_not_written_over(path):
    path.write_bytes(b"mine")
    with pytest.raises(CheckpointExistsError, match=r"(?s)the target exists.*a file of 4 bytes"):
        open_sink(path, "msgpack", describe(TREE)[0])
    assert path.read_bytes() == b"mine"
    path.unlink()
    shape, values = describe({"a": 1})
    with open_sink(path, "msgpack", shape) as sink:
        sink.write(values)
        path.write_bytes(b"mine")
        with pytest.raises(CheckpointExistsError, match=r"(?s)the target exists.*a file of 4 bytes"):
            sink.finish({})
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("leaves", "text"),
    [
        ({("b",): np.zeros(2, "int8")}, "leaves in the order of tree.order: a.*found: b"),
        ({("x",): 1}, "x, which is not one"),
        ({("a",): np.zeros(3, "int8")}, r"a: int8\[2\], as its tree says.*int8\[3\]"),
        ({("a",): np.zeros(2, "int16")}, r"a: int8\[2\], as its tree says.*int16\[2\]"),
    ],
)
def test_what_does_not_fit_the_tree_is_not_written(path, leaves, text):
    shape, values = describe({"a": np.zeros(2, "int8"), "b": np.zeros(2, "int8")})
    with open_sink(path, "msgpack", shape) as sink:
        with pytest.raises(CheckpointWriteError, match=f"(?s){text}"):
            sink.write(leaves)
        with pytest.raises(CheckpointWriteError, match=r"(?s)all 2 leaves written.*2 missing: a, b"):
            sink.finish({})
        sink.write(values)
        with pytest.raises(CheckpointWriteError, match="a a second time"):
            sink.write(values)
        sink.finish({})
    assert_trees_equal(load(path), {"a": np.zeros(2, "int8"), "b": np.zeros(2, "int8")})


def test_what_msgpack_cannot_hold_is_refused(path):
    with pytest.raises(CheckpointWriteError, match=r"(?s)cannot hold random keys.*rngs/key: key<fry>\[\].*--rng drop"):
        open_sink(path, "msgpack", describe({"rngs": {"key": jax.random.key(0)}})[0])
    with pytest.raises(CheckpointWriteError, match="keys that are text"):
        open_sink(path, "msgpack", describe({"\ud800": 1})[0])
    deep = Tree({("k",) * 129: Leaf(("k",) * 129, (), "int8", 1)})
    with pytest.raises(CheckpointWriteError, match=r"(?s)keys nested at most 128 deep.*k/k/k/k/k/\.\.\., 129 deep"):
        open_sink(path, "msgpack", deep)
    assert not list(path.parent.iterdir())
    shape, _ = describe({"a": "x"})
    with open_sink(path, "msgpack", shape) as sink, pytest.raises(CheckpointWriteError, match="what msgpack can hold"):
        sink.write({("a",): "\ud800"})


def test_a_full_disk_is_an_error_and_leaves_nothing_that_looks_finished(path):
    script = """
import sys, numpy as np
from bridge._errors import CheckpointWriteError
from bridge.checkpoint.formats.open import open_sink
from bridge.checkpoint.tree.tree import Tree
from bridge.checkpoint.tree.layout import Leaf
leaves = {(n,): Leaf((n,), (40_000,), "uint8", 40_000) for n in "ab"}
try:
    with open_sink(sys.argv[1], "msgpack", Tree(leaves)) as sink:
        for path in leaves:
            sink.write({path: np.full(40_000, ord(path[0]), "uint8")})
        sink.finish({})
except CheckpointWriteError as error:
    print(error, type(error.__cause__).__name__)
"""
    text = run_limited(script, path)
    assert "could not be written" in text
    assert "found: File too large" in text
    assert "resume=True" in text
    assert not path.exists()
    tree = {name: np.full(40_000, ord(name), "uint8") for name in "ab"}
    shape, values = describe(tree)
    with open_sink(path, "msgpack", shape, resume=True) as sink:  # there is room now
        assert sink.done == {("a",)}
        sink.write({("b",): values["b",]})
        sink.finish({})
    assert path.read_bytes() == serialization.to_bytes(tree)


def test_folders_above_the_target_are_made(tmp_path):
    save(tmp_path / "no" / "such" / "a.msgpack", "msgpack", {"a": 1})
    with closing(open_source(tmp_path / "no" / "such" / "a.msgpack")) as source:
        assert source.read(("a",)) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"(?s)could not be written.*Not a directory"):
        open_sink(tmp_path / "file" / "a.msgpack", "msgpack", describe({"a": 1})[0])


def test_arrays_that_are_not_contiguous_are_written_in_small_pieces(path, monkeypatch):
    monkeypatch.setattr("bridge.checkpoint.formats.stored._PIECE_BYTES", 64)
    tree = {
        "transposed": np.arange(120, dtype="float32").reshape(4, 5, 6).transpose(2, 0, 1),
        "strided": np.arange(99, dtype="int16")[::3],
        "one_row": np.arange(120, dtype="int64").reshape(60, 2).T[:1],
    }
    save(path, "msgpack", tree)
    assert path.read_bytes() == serialization.to_bytes(tree)
    for array in (*tree.values(), np.arange(100, dtype=">i2"), np.array(3.5, ">f8")):
        native = array.astype(array.dtype.newbyteorder("="))
        found = [bytes(piece) for piece in pieces(array)]
        assert b"".join(found) == native.tobytes()
        assert max(map(len, found)) <= 64
