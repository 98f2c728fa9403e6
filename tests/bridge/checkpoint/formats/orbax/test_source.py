"""Orbax checkpoints as sources: leaf by leaf, region by region, both of Orbax's layouts, what the writer added."""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training import orbax_utils
from orbax.checkpoint.experimental import v1 as orbax_v1

from bridge._errors import CheckpointCorruptError, CheckpointLayoutError, CheckpointTooLargeError
from bridge.checkpoint.formats.orbax.read import open_orbax, read_tree
from bridge.checkpoint.tree import layout
from tests.tolerance import assert_trees_equal


@functools.cache
def whole_tree():
    """Every kind of leaf."""
    return {
        "params": {
            "Dense_0": {"kernel": np.arange(24.0, dtype="float32").reshape(4, 6), "bias": jnp.ones(6, jnp.bfloat16)}
        },
        "opt_state": [{"count": jnp.array(3, jnp.int32)}, None, {}],
        "stack": jnp.arange(30, dtype=jnp.int32).reshape(3, 2, 5),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        "step": 12,
        "name": "run/7",
    }


def save(path, tree, **options):
    ocp.PyTreeCheckpointer().save(path, tree, **options)
    return path


def save_chunked(path, tree, nbytes):
    """Files of their own for each chunk of at most `nbytes`."""
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=nbytes), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, tree, save_args=args)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ck") / "all", whole_tree())


def host(value):
    """Keys as the integers they are made of."""
    is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value)) if is_key else np.asarray(value)


def regions(shape, rng, count=8):
    """Random regions of an array, empty ones among them."""
    for _ in range(count):
        starts = [int(rng.integers(0, size + 1)) for size in shape]
        yield tuple(slice(a, int(rng.integers(a, size + 1))) for a, size in zip(starts, shape, strict=True))


# --- leaves and regions -------------------------------------------------------------------------------------


def test_leaves_are_those_that_were_saved(saved):
    with open_orbax(saved) as source:
        wanted = {path: leaf for path, leaf in layout.flatten(whole_tree()).items() if not layout.is_empty(leaf)}
        assert source.tree.leaves.keys() == wanted.keys()
        for path, leaf in wanted.items():
            read = source.read(path)
            told = source.tree.leaves[path]
            assert layout.describe(read) == layout.describe(leaf) == (told.shape, told.dtype), path
            assert isinstance(leaf, str) or host(read).tobytes() == host(leaf).tobytes(), path
        assert source.read(("name",)) == "run/7"
        assert type(source.read(("step",))) is int
        assert source.tree.empty == {("opt_state", "1"): "None", ("opt_state", "2"): "Dict"}
        assert source.tree.sequences == {("opt_state",)}


def test_leaves_stand_in_the_order_of_the_file(saved):
    rows = json.loads((saved / "_METADATA").read_text())["tree_metadata"].values()
    order = [tuple(key["key"] for key in row["key_metadata"]) for row in rows]
    with open_orbax(saved) as source:
        assert [*source.tree.leaves] == [path for path in order if path in source.tree.leaves]


@pytest.mark.parametrize("nbytes", [None, 16])
def test_a_region_is_that_part_of_the_leaf(nbytes, tmp_path):
    tree = {name: whole_tree()[name] for name in ("params", "stack", "key", "keys")}
    path = save_chunked(tmp_path / "ck", tree, nbytes) if nbytes else save(tmp_path / "ck", tree)
    rng = np.random.default_rng(0)
    with open_orbax(path) as source:
        for leaf in source.tree.leaves.values():
            whole = source.read(leaf.path)
            for region in regions(leaf.shape, rng):
                assert_trees_equal(source.read(leaf.path, region), whole[region])


def test_a_region_of_a_number_or_a_text_is_all_of_it(saved):
    with open_orbax(saved) as source:
        assert (source.read(("step",), ()), source.read(("name",), ())) == (12, "run/7")


def test_a_region_reads_its_own_chunks_alone(tmp_path):
    array = np.arange(64.0, dtype="float32").reshape(8, 8)
    path = save_chunked(tmp_path / "ck", {"w": array}, 64)
    chunks = sorted(file for file in (path / "w").iterdir() if file.name[0].isdigit())
    assert len(chunks) == 4
    with open_orbax(path) as source:
        shape = source._arrays["w",].chunk_layout.read_chunk.shape
    for file in chunks[1:]:
        file.unlink()
    with open_orbax(path) as source:
        first = tuple(slice(0, size) for size in shape)
        np.testing.assert_array_equal(source.read(("w",), first), array[first])
        with pytest.raises(CheckpointCorruptError, match=r"(?s)expected: w: float32\[8, 8\].*found: "):
            source.read(("w",))


def test_a_chunk_is_read_once_for_all_its_parts(tmp_path):
    stack = np.arange(40.0, dtype="float32").reshape(4, 10)
    path = save_chunked(tmp_path / "ck", {"w": stack}, 1 << 20)
    (chunk,) = [file for file in (path / "w").iterdir() if file.name[0].isdigit()]
    with open_orbax(path) as source:
        layers = [source.read(("w",), (slice(0, 1), slice(0, 10)))]
        chunk.unlink()
        layers += [source.read(("w",), (slice(n, n + 1), slice(0, 10))) for n in (1, 2, 3)]
    np.testing.assert_array_equal(np.concatenate(layers), stack)


def test_many_threads_read_at_once(saved):
    def read(number):
        path = paths[number % len(paths)]
        region = next(regions(source.tree.leaves[path].shape, np.random.default_rng(number), 1)) if number % 3 else None
        return path, region, source.read(path, region)

    with open_orbax(saved) as source, ThreadPoolExecutor(8) as pool:
        paths = [path for path in source.tree.leaves if path not in (("name",), ("step",))]
        for path, region, value in pool.map(read, range(200)):
            whole = source.read(path)
            assert_trees_equal(value, whole if region is None else whole[region])


# --- who wrote it -------------------------------------------------------------------------------------------


@functools.cache
def plain_tree():
    return {"params": {"w": jnp.arange(3.0)}, "opt_state": [None, {"count": jnp.zeros((), jnp.int32)}]}


ADDED = {"who": "me", "hashes": {"params/w": "abc"}}


def standard(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, plain_tree(), custom_metadata=ADDED)


def legacy(path):
    save(path, plain_tree(), save_args=orbax_utils.save_args_from_target(plain_tree()), custom_metadata=ADDED)


def manager(path):
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(plain_tree()), custom_metadata=ADDED)
        manager.wait_until_finished()


def in_the_table(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(plain_tree(), custom_metadata=ADDED))


def version_1(path):
    orbax_v1.save(path, plain_tree(), custom_metadata=ADDED)


def version_1_steps(path):
    with orbax_v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(3, plain_tree(), custom_metadata=ADDED)


def version_1_named(path):
    with ocp.CheckpointManager(path / "v0") as manager:  # a folder beside it changes nothing
        manager.save(1, args=ocp.args.StandardSave(plain_tree()))
        manager.wait_until_finished()
    orbax_v1.save_checkpointables(path / "7", {"weights": plain_tree()}, custom_metadata=ADDED)


WRITERS = {
    standard: ("orbax", None, None),
    legacy: ("orbax", None, None),
    manager: ("orbax", 3, "default"),
    in_the_table: ("orbax", None, None),
    version_1: ("orbax-v1", None, "state"),
    version_1_steps: ("orbax-v1", 3, "state"),
    version_1_named: ("orbax-v1", 7, "weights"),
}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_format_item_and_metadata_are_found(writer, tmp_path):
    writer(tmp_path / "ck")
    with open_orbax(tmp_path / "ck") as source:
        assert (source.format, source.step, source.item) == WRITERS[writer]
        assert source.metadata == ADDED
        assert source.reason
        assert_trees_equal(source.read_all(), jax.tree.map(np.asarray, plain_tree()))
    with open_orbax(source.path) as inner:  # the item's own folder
        assert (inner.format, inner.metadata) == (source.format, ADDED)


def test_partial_saves_are_read(tmp_path):
    partial = orbax_v1.partial
    partial.save(tmp_path / "ck", {"a": jnp.ones(2)})
    with pytest.raises(CheckpointCorruptError, match="never finished"):
        open_orbax(next(tmp_path.iterdir()))
    partial.save(tmp_path / "ck", {"b": {"c": jnp.zeros(3)}})
    partial.finalize(tmp_path / "ck")
    with open_orbax(tmp_path / "ck") as source:
        assert source.format == "orbax-v1"
        assert_trees_equal(source.read_all(), {"a": np.ones(2, "float32"), "b": {"c": np.zeros(3, "float32")}})


# --- damage -------------------------------------------------------------------------------------------------


def test_an_unfinished_save_is_not_read(saved, tmp_path):
    unfinished = tmp_path / "ck.orbax-checkpoint-tmp-123"
    save(tmp_path / "ck", plain_tree())
    os.rename(tmp_path / "ck", unfinished)
    with pytest.raises(CheckpointCorruptError, match=r"never finished: .*ck\.orbax-checkpoint-tmp-123"):
        open_orbax(unfinished)
    (tmp_path / "step").mkdir()
    os.rename(unfinished, tmp_path / "step" / "state.orbax-checkpoint-tmp-123")
    with pytest.raises(CheckpointCorruptError, match=r"never finished: .*step"):
        open_orbax(tmp_path / "step")


def test_a_path_that_is_no_leaf(saved):
    with open_orbax(saved) as source:
        with pytest.raises(CheckpointLayoutError, match=r"(?s)expected: params/Dense_0/kernal.*params/Dense_0/kernel"):
            source.read(("params", "Dense_0", "kernal"))
        with pytest.raises(CheckpointLayoutError, match=r"(?s)expected: opt_state/1\n.*opt_state/0/count"):
            source.read(("opt_state", "1"))  # empty
        with pytest.raises(CheckpointLayoutError, match="found: nothing like it"):
            source.read(("zzz",))


@pytest.mark.parametrize("content", ["[]", "", '{"custom_metadata": 3}', "[" * 100_000, "\x00"])
def test_hostile_save_metadata(content, tmp_path):
    path = save(tmp_path / "ck", plain_tree())
    (path / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(CheckpointCorruptError, match="_CHECKPOINT_METADATA"):
        open_orbax(path)


def test_a_path_of_more_keys_than_a_tree_can_be_deep(tmp_path):
    path = save(tmp_path / "ck", {"w": np.ones(1, "float32"), "none": None})
    table = json.loads((path / "_METADATA").read_text())
    row = table["tree_metadata"]["('none',)"]
    row["key_metadata"] = [{"key": "k", "key_type": 2}] * 501
    (path / "_METADATA").write_text(json.dumps(table))
    with pytest.raises(CheckpointLayoutError, match=r"(?s)paths of at most 500 keys.*one of 501: k/k/k/k/k/\.\.\."):
        open_orbax(path)


def test_a_hostile_key_generator(tmp_path):
    path = save(tmp_path / "ck", {"key": jax.random.key(0)})
    file = path / "array_metadatas" / "process_0"
    file.write_text(file.read_text().replace("threefry2x32", "nonsense"))
    with pytest.raises(CheckpointCorruptError, match=r"(?s)expected: shape and number type of key\n.*nonsense"):
        open_orbax(path)


def test_a_chunk_beyond_memory_is_refused(tmp_path):
    path = save_chunked(tmp_path / "ck", {"w": jnp.ones((2, 2))}, 1 << 20)
    array = json.loads((path / "w" / ".zarray").read_text())
    (path / "w" / ".zarray").write_text(json.dumps(array | {"chunks": [10**7, 10**7]}))
    with open_orbax(path) as source, pytest.raises(CheckpointTooLargeError, match="does not fit into memory"):
        source.read(("w",), (slice(0, 1), slice(0, 1)))


def test_a_damaged_chunk_is_named(tmp_path):
    path = save_chunked(tmp_path / "ck", {"params": {"w": jnp.arange(100.0)}}, 1 << 20)
    chunk = path / "params.w" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with open_orbax(path) as source, pytest.raises(CheckpointCorruptError, match=r"expected: params/w: float32\[100\]"):
        source.read(("params", "w"))


def test_a_closed_source_has_let_go(saved):
    source = open_orbax(saved)
    source.close()
    assert read_tree(saved)["step"] == 12  # the files are as they were
    assert not source._arrays
