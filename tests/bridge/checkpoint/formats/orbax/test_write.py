"""Orbax checkpoints that we write: Orbax restores them as if it had saved them itself, in both of its layouts."""

import base64
import functools
import json
import os
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from orbax.checkpoint.experimental import v1 as orbax_v1

from bridge._errors import CheckpointExistsError, CheckpointWriteError
from bridge.checkpoint.formats.orbax import tables as orbax_tables
from bridge.checkpoint.formats.orbax import write as orbax_write
from bridge.checkpoint.formats.orbax.read import open_orbax, read_tree
from bridge.checkpoint.formats.orbax.write import OrbaxSink
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.tree import Tree
from tests.support.checkpoint_files import describe, live, trees
from tests.tolerance import assert_trees_equal

# Orbax says so whenever it restores without a target.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Couldn't find sharding info")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4)(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack()(x, None)
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=kernel_init)(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def matrices(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def labels(params):
    return jax.tree.map(lambda x: "decay" if jnp.ndim(x) > 1 else "rest", params)


TX = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "masked": optax.masked(optax.adam(1e-2), matrices),
    "multi_transform": optax.multi_transform(
        {"decay": optax.adamw(1e-2), "rest": optax.sgd(0.1, momentum=0.9)}, labels
    ),
}


def train_state(tx):
    x = jnp.ones((2, 4))
    state = TrainState.create(apply_fn=None, params=Net().init(jax.random.key(0), x)["params"], tx=TX[tx])
    grads = jax.grad(lambda params: jnp.sum(Net().apply({"params": params}, x) ** 2))(state.params)
    return state.apply_gradients(grads=grads)


def nnx_state(tx):
    model = Model(nnx.Rngs(0, dropout=jax.random.key(1)))
    optimizer = nnx.Optimizer(model, TX[tx], wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    return nnx.State({"model": nnx.state(model), "optimizer": nnx.state(optimizer)})


def kinds():
    """Every kind of leaf that StandardCheckpointer takes, as jitted training leaves them: on the device."""
    return {
        "numbers": {"int": 3, "float": 2.5, "flag": True},
        "arrays": {
            name: jnp.ones((2, 3), name)
            for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int4", "uint8", "bool")
        },
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "wide": {"i": np.array([2**40]), "f": np.arange(3.0), "scalar": np.array(0.5)},
        "specials": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "scalar": jnp.array(4, jnp.uint32),
        "keys": {"one": jax.random.key(3), "four": jax.random.split(jax.random.key(3, impl="rbg"), 4)},
        "a/b": {"c.d": jnp.ones(2), "7": jnp.zeros((2, 2))},
        "lists": [jnp.ones(1), [None, {}, [], ()], (jnp.zeros(2), {"x": jnp.ones(1)})],
        "nothing": None,
    }


TREES = {
    "kinds": kinds,
    **{f"TrainState {tx}": lambda tx=tx: train_state(tx) for tx in TX},
    **{f"nnx {tx}": lambda tx=tx: nnx_state(tx) for tx in TX},
    "root list": lambda: [jnp.ones(2), None, {"a": jnp.zeros(3)}],
}


def standard(path, tree, **options):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, **options)
    return path


def restored(path, target=None):
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")
        return checkpointer.restore(path, target)


def write(path, tree, values, metadata=None, batch=3, **options):
    """Write `values`, by path, through a sink, `batch` leaves at a time."""
    with OrbaxSink(path, tree, **options) as sink:
        places = [place for place in tree.leaves if place not in sink.done]
        for start in range(0, len(places), batch):
            sink.write({place: values[place] for place in places[start : start + batch]})
        sink.finish(metadata or {})
    return path


def copied(source_path, path, **options):
    """What a conversion does, less the converting: leaves read from one checkpoint, written to another."""
    with open_orbax(source_path) as source:
        return write(path, source.tree, {place: source.read(place) for place in source.tree.leaves}, **options)


def table(path):
    return json.loads((path / "_METADATA").read_text())


def arrays_table(path):
    rows = json.loads((path / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    return {row["array_metadata"]["param_name"]: row for row in rows}


# --- Orbax restores it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree_of():
    """Each tree, made once."""
    return functools.cache(lambda name: TREES[name]())


@pytest.fixture(scope="module")
def theirs_of(tree_of, tmp_path_factory):
    """The checkpoint of each tree that Orbax writes, once."""
    folder = tmp_path_factory.mktemp("theirs")
    return functools.cache(lambda name: standard(folder / name, tree_of(name)))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TREES)
def test_standard_checkpointer_restores_what_it_would_have_saved(name, tree_of, theirs_of, tmp_path):
    tree, theirs = tree_of(name), theirs_of(name)
    ours = copied(theirs, tmp_path / "ours")
    assert_trees_equal(restored(ours), restored(theirs))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    assert_trees_equal(restored(ours, abstract), restored(theirs, abstract))
    assert_trees_equal(ocp.PyTreeCheckpointer().restore(ours), ocp.PyTreeCheckpointer().restore(theirs))


@pytest.mark.parametrize("name", TREES)
def test_the_tables_are_those_that_orbax_writes(name, theirs_of, tmp_path):
    theirs = theirs_of(name)
    ours = copied(theirs, tmp_path / "ours")
    assert table(ours) == table(theirs)
    assert arrays_table(ours) == arrays_table(theirs)
    assert json.loads((ours / "_sharding").read_text()) == json.loads((theirs / "_sharding").read_text())
    saved = [json.loads((path / "_CHECKPOINT_METADATA").read_text()) for path in (ours, theirs)]
    assert saved[0].keys() == saved[1].keys()
    assert saved[0]["item_handlers"] == saved[1]["item_handlers"]


@pytest.mark.parametrize("name", TREES)
def test_version_1_loads_what_it_would_have_saved(name, tree_of, tmp_path):
    tree = tree_of(name)
    orbax_v1.save(tmp_path / "theirs", tree)
    ours = copied(tmp_path / "theirs", tmp_path / "ours", version="v1")
    assert_trees_equal(orbax_v1.load(ours), orbax_v1.load(tmp_path / "theirs"))
    assert table(ours / "state") == table(tmp_path / "theirs" / "state")
    names = [{file.name for file in path.iterdir()} for path in (ours, tmp_path / "theirs")]
    assert names[0] == names[1] | {"commit_success.txt"}  # Orbax 0.12.0 did not write it yet
    assert_trees_equal(restored(ours / "state"), restored(tmp_path / "theirs" / "state"))


def test_it_restores_into_the_train_state_itself(tmp_path):
    state = train_state("multi_transform")
    ours = copied(standard(tmp_path / "theirs", state), tmp_path / "ours")
    target = jax.tree.map(lambda leaf: leaf * 0, state)
    assert_trees_equal(restored(ours, target), state)


def test_leaves_of_a_live_state_are_written_as_they_are(tmp_path):
    state = nnx_state("adamw")
    with open_orbax(standard(tmp_path / "theirs", state)) as source:
        tree = source.tree
    values = {path: leaf for path, leaf in layout.flatten(state).items() if path in tree.leaves}
    ours = write(tmp_path / "ours", tree, values)
    assert table(ours) == table(tmp_path / "theirs")
    assert_trees_equal(restored(ours, jax.tree.map(jnp.zeros_like, state)), state)


def test_texts_and_numbers_of_numpy(tmp_path):
    tree = {"text": "hello/you", "a": {"b/c": "deep", "n": np.float32(2.5), "b": np.int8(-3)}, "w": jnp.ones(1)}
    ocp.PyTreeCheckpointer().save(tmp_path / "theirs", tree)
    ours = copied(tmp_path / "theirs", tmp_path / "ours")
    assert table(ours) == table(tmp_path / "theirs")
    texts = [json.loads((path / "_strings.json").read_text()) for path in (ours, tmp_path / "theirs")]
    assert texts[0] == texts[1]
    read = read_tree(ours)
    assert (read["text"], read["a"]["b/c"]) == ("hello/you", "deep")
    assert (type(read["a"]["n"]), type(read["a"]["b"])) == (np.float32, np.int8)
    theirs = ocp.PyTreeCheckpointer().restore(tmp_path / "theirs")
    assert ocp.PyTreeCheckpointer().restore(ours)["a"] == theirs["a"]


def test_arrays_without_elements(tmp_path):
    """Orbax refuses to save them and restores them well."""
    tree, values = describe({"e": np.zeros((0, 3), "float32"), "f": np.zeros((2, 0), "int8"), "w": np.ones(1)})
    for version in ("v0", "v1"):
        ours = write(tmp_path / version, tree, values, version=version)
        root = ours / "state" if version == "v1" else ours
        assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), restored(root)) == {
            "e": ((0, 3), "float32"),
            "f": ((2, 0), "int8"),
            "w": ((1,), "float64"),
        }


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_large_arrays_are_stored_in_chunks(version, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_tables, "_CHUNK", 256)
    monkeypatch.setattr(orbax_write, "_IN_FLIGHT", 600)
    rng = np.random.default_rng(0)
    shapes = {"row": (1000,), "matrix": (30, 50), "stack": (3, 20, 7), "wide": (2, 400), "cube": (1, 1, 999), "s": ()}
    arrays = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    arrays["transposed"] = arrays["matrix"].T
    arrays["big_endian"] = arrays["matrix"].astype(">f4")
    tree, values = describe(arrays)
    ours = write(tmp_path / "ck", tree, values, version=version)
    root = ours / "state" if version == "v1" else ours
    wanted = arrays | {"big_endian": arrays["matrix"]}
    assert_trees_equal(restored(root), wanted)
    for name, row in arrays_table(root).items():
        assert 4 * np.prod(row["array_metadata"]["chunk_shape"]) <= 256, name
    with open_orbax(ours) as source:
        assert all(np.prod(store.chunk_layout.read_chunk.shape or ()) <= 64 for store in source._arrays.values())
        region = (slice(1, 3), slice(2, 20), slice(0, 7))
        np.testing.assert_array_equal(source.read(("stack",), region), arrays["stack"][region])


@given(trees())
@settings(max_examples=30, deadline=None)
def test_whatever_tree_comes_back(tmp_path_factory, tree):
    shape, values = describe(tree)
    path = tmp_path_factory.mktemp("drawn") / "ck"
    names = [".".join(place) for place in values]
    storable = all(name and name[0] != "/" and ".." not in name.split("/") for name in names)
    if not storable or len(set(names)) < len(names):
        with pytest.raises(CheckpointWriteError, match="Orbax cannot"):
            write(path, shape, values)
        return
    write(path, shape, values)
    with open_orbax(path) as source:
        assert_trees_equal(live(source), live_again(shape, values))


def live_again(shape: Tree, values):
    made = {"None": None, "Dict": {}, "List": [], "Tuple": []}
    return layout.nest({**values, **{path: made[mark] for path, mark in shape.empty.items()}}, shape.sequences)


# --- metadata, steps ----------------------------------------------------------------------------------------

ADDED = {"hashes": {"params/w": "0" * 64}, "made by": ["linen-nnx", 1, None, 0.5]}


def one(value=1.0):
    return describe({"params": {"w": np.full(4, value, "float32")}})


def test_metadata_is_read_by_orbax_too(tmp_path):
    tree, values = one()
    write(tmp_path / "v0", tree, values, ADDED)
    write(tmp_path / "v1", tree, values, ADDED, version="v1")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(tmp_path / "v0")
    assert found.custom_metadata == ADDED
    assert found.commit_timestamp_nsecs > found.init_timestamp_nsecs > 0
    assert orbax_v1.metadata(tmp_path / "v1").custom_metadata == ADDED
    for version, format in (("v0", "orbax"), ("v1", "orbax-v1")):
        with open_orbax(tmp_path / version) as source:
            assert (source.metadata, source.format) == (ADDED, format)


def test_a_manager_sees_the_step(tmp_path):
    standard(tmp_path / "theirs", {"params": {"w": jnp.ones(4)}})
    for step in (5, 10):
        write(tmp_path / "run" / str(step), *one(step), ADDED)
    tree, values = one()
    with OrbaxSink(tmp_path / "run" / "12", tree) as sink:
        sink.write(values)  # and is never finished
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == [5, 10]
        assert manager.metadata(5).custom_metadata == ADDED
        for step in (5, 10):
            read = manager.restore(step, args=ocp.args.StandardRestore())
            np.testing.assert_array_equal(read["params"]["w"], np.full(4, step, "float32"))
        manager.save(11, args=ocp.args.StandardSave({"params": {"w": jnp.full(4, 11.0)}}))
        manager.wait_until_finished()
    assert read_tree(tmp_path / "run")["params"]["w"][0] == 11
    with open_orbax(tmp_path / "run", step=5) as source:
        assert (source.step, source.item, source.metadata) == (5, "default", ADDED)


def test_a_checkpointer_of_version_1_sees_the_step(tmp_path):
    write(tmp_path / "run" / "5", *one(5), ADDED, version="v1")
    with orbax_v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert [found.step for found in checkpointer.checkpoints] == [5]
        np.testing.assert_array_equal(checkpointer.load(5)["params"]["w"], np.full(4, 5, "float32"))


def test_an_item_of_another_name(tmp_path):
    write(tmp_path / "ck", *one(), item="train_state")
    with open_orbax(tmp_path / "ck") as source:
        assert source.item == "train_state"
    read = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(
        tmp_path / "ck", args=ocp.args.Composite(train_state=ocp.args.StandardRestore())
    )
    np.testing.assert_array_equal(read["train_state"]["params"]["w"], np.ones(4, "float32"))


def test_nothing_is_left_beside_it(tmp_path, capfd):
    threads = set(threading.enumerate())
    write(tmp_path / "run" / "ck", *one())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["ck"]
    names = {str(file.relative_to(tmp_path / "run" / "ck")) for file in (tmp_path / "run" / "ck").rglob("*")}
    assert {name for name in names if not name.startswith("d/")} == {
        "_CHECKPOINT_METADATA",
        "_METADATA",
        "_sharding",
        "array_metadatas",
        "array_metadatas/process_0",
        "commit_success.txt",
        "d",
        "manifest.ocdbt",
    }
    assert set(threading.enumerate()) <= threads
    assert capfd.readouterr() == ("", "")


def test_shardings_name_the_arrays_on_the_device(tmp_path):
    write(tmp_path / "ck", *describe({"a/b": {"c.d": np.ones(1, "float32")}, "wide": np.ones(1), "n": 1}))
    names = [base64.b64decode(key).decode() for key in json.loads((tmp_path / "ck" / "_sharding").read_text())]
    assert names == ["a/b.c.d"]


# --- refused ------------------------------------------------------------------------------------------------


def test_what_is_there_is_never_written_over(tmp_path):
    tree, values = one()
    (tmp_path / "ck").write_text("mine")
    for make in (lambda: None, lambda: ((tmp_path / "ck").unlink(), (tmp_path / "ck").mkdir())):
        make()
        with pytest.raises(
            CheckpointExistsError, match=r"(?s)in the way: .*ck.*expected: nothing.*Choose another path"
        ):
            OrbaxSink(tmp_path / "ck", tree)
    (tmp_path / "ck").rmdir()
    os.symlink(tmp_path / "nowhere", tmp_path / "ck")
    with pytest.raises(CheckpointExistsError):
        OrbaxSink(tmp_path / "ck", tree, resume=True)
    (tmp_path / "ck").unlink()
    with OrbaxSink(tmp_path / "ck", tree) as sink:
        sink.write(values)
        (tmp_path / "ck").mkdir()  # someone else was quicker
        with pytest.raises(CheckpointExistsError):
            sink.finish({})
    assert not [*(tmp_path / "ck").iterdir()]


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, r"(?s)tell two leaves apart.*a\.b and a/b are both 'a\.b'"),
        ({"..": {"x": np.ones(1)}, "../etc": np.ones(1)}, r"(?s)of this name: .*found: \('\.\./etc',\)"),
        ({"/etc": np.ones(1)}, r"(?s)of this name: .*found: \('/etc',\)"),
    ],
)
def test_names_that_orbax_cannot_store(tree, text, tmp_path):
    with pytest.raises(CheckpointWriteError, match=text):
        OrbaxSink(tmp_path / "ck", describe(tree)[0])
    assert not [*tmp_path.iterdir()]


def test_leaves_that_are_not_the_trees(tmp_path):
    tree, values = describe({"a": np.ones((2, 3), "float32"), "b": np.ones(1, "int8")})
    with OrbaxSink(tmp_path / "ck", tree) as sink:
        for wrong in (np.ones((3, 2), "float32"), np.ones((2, 3), "float16"), 3.0):
            with pytest.raises(
                CheckpointWriteError, match=r"(?s)not what the tree tells.*expected: a: float32\[2, 3\]"
            ):
                sink.write({("b",): values["b",], ("a",): wrong})
        with pytest.raises(CheckpointWriteError, match=r"(?s)does not belong.*found: c"):
            sink.write({("c",): np.ones(1)})
        sink.write({("b",): values["b",]})  # nothing of the refused batches was written
        with pytest.raises(CheckpointWriteError, match=r"(?s)written twice.*found: b"):
            sink.write({("b",): values["b",]})
        with pytest.raises(CheckpointWriteError, match=r"(?s)leaves are missing.*expected: all 2.*found: 1 missing: a"):
            sink.finish({})
        sink.write({("a",): values["a",]})
        sink.finish({})
    assert_trees_equal(read_tree(tmp_path / "ck"), {"a": values["a",], "b": values["b",]})


def test_a_number_type_that_orbax_cannot_hold(tmp_path):
    tree, values = describe({"when": np.array(["2020-01-01"], "datetime64[D]"), "w": np.ones(1)})
    wanted = r"(?s)cannot store a leaf.*when: a number type.*datetime64"
    with OrbaxSink(tmp_path / "ck", tree) as sink, pytest.raises(CheckpointWriteError, match=wanted):
        sink.write(values)
    assert not (tmp_path / "ck").exists()


def test_an_unknown_version_and_a_closed_sink(tmp_path):
    tree, values = one()
    with pytest.raises(CheckpointWriteError, match=r"(?s)no such version.*expected: v0 or v1.*found: v2"):
        OrbaxSink(tmp_path / "ck", tree, version="v2")
    with OrbaxSink(tmp_path / "ck", tree) as sink:
        pass
    with pytest.raises(CheckpointWriteError, match="the sink is closed"):
        sink.write(values)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointWriteError, match=r"(?s)could not be written: .*file/ck.*right to write.*Not a directory"
    ):
        OrbaxSink(tmp_path / "file" / "ck", one()[0])


def test_metadata_that_is_not_json_changes_nothing(tmp_path):
    tree, values = one()
    with OrbaxSink(tmp_path / "ck", tree) as sink:
        sink.write(values)
        with pytest.raises(TypeError, match="not JSON serializable"):
            sink.finish({"x": object()})
        sink.finish({"x": 1})
    with open_orbax(tmp_path / "ck") as source:
        assert source.metadata == {"x": 1}
