"""Real Orbax checkpoints: what is read equals what was saved, and damage is a clear error."""

import json
import os
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.training import orbax_utils, train_state
from orbax.checkpoint.experimental import v1 as orbax_v1

from bridge._errors import (
    CheckpointCorruptError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    CheckpointTooLargeError,
    MissingDependencyError,
    VariablesMismatchError,
)
from bridge.checkpoint import read_metadata, read_train_state, read_tree, restore_into_structure
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.layout import Kind


class TrainState(train_state.TrainState):
    batch_stats: Any = None
    ema_params: Any = None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(nn.relu(x))


def make_tx():
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-2), matrices))


@jax.jit
def train_step(state, x):
    def loss(params):
        out, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(out**2), updated["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats)


NET, TX = Net(), make_tx()


def make_state(steps=2):
    variables = NET.init(jax.random.key(0), jnp.ones((2, 4)))
    state = TrainState.create(
        apply_fn=NET.apply,
        params=variables["params"],
        tx=TX,
        batch_stats=variables["batch_stats"],
        ema_params=variables["params"],
    )
    for step in range(steps):
        state = train_step(state, batch(step))
    return state


def batch(step):
    return jax.random.normal(jax.random.key(step), (8, 4))


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def save_manager(path, tree, steps, item=None):
    with ocp.CheckpointManager(path) as manager:
        for step in steps:
            args = ocp.args.StandardSave(tree)
            manager.save(
                step,
                args=ocp.args.Composite(**{item: args, "notes": ocp.args.JsonSave({"a": 1})}) if item else args,
            )
        manager.wait_until_finished()
    return path


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    return save(tmp_path_factory.mktemp("ck") / "standard", state)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def as_saved(tree):
    """Leaves and empty nodes by path, as a raw tree has them: None for every empty node."""
    return {path: None if layout.is_empty(leaf) else leaf for path, leaf in layout.flatten(tree).items()}


def assert_same(read, tree):
    got, wanted = as_saved(read), as_saved(tree)
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        if leaf is None:
            assert got[path] is None
            continue
        assert not isinstance(got[path], jax.ShapeDtypeStruct)
        assert layout.describe(got[path]) == layout.describe(leaf), path
        assert np.asarray(got[path]).tobytes() == np.asarray(leaf).tobytes(), path


# --- what is read equals what was saved ---------------------------------------------------------------------


def legacy(path, tree):
    ocp.PyTreeCheckpointer().save(path, tree, save_args=orbax_utils.save_args_from_target(tree))
    return path


def pytree_handler(**options):
    def write(path, tree):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, tree)
        return path

    return write


def version_1(path, tree):
    orbax_v1.save(
        path,
        {
            "step": tree.step,
            "params": tree.params,
            "opt_state": tree.opt_state,
            "batch_stats": tree.batch_stats,
            "ema_params": tree.ema_params,
        },
    )
    return path


WRITERS = {
    "standard": save,
    "legacy": legacy,
    "no_ocdbt": pytree_handler(use_ocdbt=False),
    "zarr3": pytree_handler(use_zarr3=True),
    "v1": version_1,
    "manager": lambda path, tree: save_manager(path, tree, [7]),
    "composite": lambda path, tree: save_manager(path, tree, [7], item="state"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_back_what_was_saved(writer, state, tmp_path):
    path = WRITERS[writer](tmp_path / "ck", state)
    read = read_tree(path)
    assert_same(read, state)
    info = read_metadata(path)
    assert info.layout is Kind.LINEN_TRAIN_STATE
    assert "params" in info.reason
    values = {path: leaf for path, leaf in as_saved(read).items() if leaf is not None}
    assert {leaf.path: (leaf.shape, leaf.dtype) for leaf in info.leaves} == {
        path: layout.describe(leaf) for path, leaf in values.items()
    }
    assert info.nbytes == sum(np.asarray(leaf).nbytes for leaf in values.values())
    assert set(info.empty) == {path for path, leaf in as_saved(read).items() if leaf is None}


def test_it_agrees_with_orbax_itself(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore(saved)
    ours = read_tree(saved)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_same(ours, theirs)


def test_lists_stay_lists_and_none_stays(saved):
    tree = read_tree(saved)
    assert isinstance(tree["opt_state"], list)
    assert tree["opt_state"][0] is None
    assert tree["opt_state"][1]["inner_state"][0]["mu"]["Dense_0"]["bias"] is None


def test_every_kind_of_leaf(tmp_path):
    tree = {
        "params": {
            "a/b": {"c.d": jnp.ones(2, jnp.bfloat16)},
            "f64": np.arange(3.0),
            "i64": np.array(2**40),
            "f8": jnp.ones(2, jnp.float8_e4m3fn),
            "i4": jnp.ones(2, jnp.int4),
            "bool": jnp.array([True, False]),
            "complex": jnp.ones(2, jnp.complex64),
            "zeros": jnp.zeros((2, 2)),
            "7": jnp.ones(1),
            "empty": {},
            "nothing": None,
            "pair": (jnp.ones(1), jnp.zeros(2)),
        },
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3), 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "raw_key": jax.random.PRNGKey(1),
        "float": 1.5,
        "int": 3,
        "flag": True,
        "np_float": np.float32(2.5),
        "text": "hello/you",
    }
    path = pytree_handler()(tmp_path / "ck", tree)
    read = read_tree(path)
    assert read["text"] == "hello/you"
    assert (read["float"], read["int"], read["flag"]) == (1.5, 3, True)
    assert [type(read[name]) for name in ("float", "int", "flag", "np_float")] == [
        float,
        int,
        bool,
        np.float32,
    ]
    for name in ("key", "keys", "rbg"):
        assert read[name].dtype == tree[name].dtype
        assert (jax.random.key_data(read[name]) == jax.random.key_data(tree[name])).all()
    assert_same(read["params"], tree["params"])
    assert isinstance(read["params"]["pair"], list)
    leaves = {leaf.path: leaf for leaf in read_metadata(path).leaves}
    assert (leaves[("keys",)].shape, leaves[("keys",)].dtype, leaves[("keys",)].nbytes) == (
        (3,),
        "key<fry>",
        24,
    )
    assert (leaves[("text",)].dtype, leaves[("text",)].nbytes) == ("str", 9)
    assert leaves[("params", "a/b", "c.d")].dtype == "bfloat16"


def test_text_alone_needs_no_arrays(tmp_path):
    path = pytree_handler()(tmp_path / "ck", {"a": {"x/y": "one", "z.w": "two"}})
    assert read_tree(path) == {"a": {"x/y": "one", "z.w": "two"}}


def test_sharded_arrays_come_back_whole(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)
    path = save(tmp_path / "ck", {"params": {"w": array}})
    assert read_metadata(path).leaves[0].shape == (8, 8)  # not the shape of one shard, which is on disk too
    np.testing.assert_array_equal(read_tree(path)["params"]["w"], array)
    target = {"params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}}
    assert read_tree(path, target)["params"]["w"].sharding == sharding


def test_boxes_are_seen(tmp_path):
    params = {"D": {"kernel": nn.Partitioned(jnp.ones((2, 2)), names=("i", "o")), "bias": jnp.ones(2)}}
    path = save(tmp_path / "ck", {"params": params, "step": 0})
    info = read_metadata(path)
    assert info.boxed == {("params", "D", "kernel")}
    assert read_train_state(path).boxed == info.boxed
    assert read_tree(path)["params"]["D"]["kernel"].keys() == {"value"}


def test_reading_changes_nothing_on_disk(saved):
    def snapshot():
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in saved.rglob("*") if file.is_file()}

    before = snapshot()
    read_metadata(saved)
    read_train_state(saved)
    assert snapshot() == before


def test_metadata_reads_no_array(tmp_path):
    """The chunks of a large array are in files of their own: metadata must not need them."""
    path = save(tmp_path / "ck", {"params": {"w": jax.random.normal(jax.random.key(0), (300, 300))}})
    chunks = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 100_000]
    assert chunks
    for file in chunks:
        file.unlink()
    assert read_metadata(path).leaves[0].shape == (300, 300)
    with pytest.raises(CheckpointCorruptError, match=r"(?s)expected: params/w: float32\[300, 300\].*found: "):
        read_tree(path)


# --- TrainState ---------------------------------------------------------------------------------------------


def test_train_state_is_taken_apart(saved, state):
    read = read_train_state(saved)
    assert read.step == 2
    assert_same(read.params, state.params)
    assert set(read.collections) == {"batch_stats"}
    assert set(read.variables) == {"params", "batch_stats"}
    assert set(read.extras) == {"ema_params"}
    assert read.layout is Kind.LINEN_TRAIN_STATE
    x = jnp.ones((2, 4))
    wanted = NET.apply({"params": state.params, "batch_stats": state.batch_stats}, x)
    np.testing.assert_array_equal(NET.apply(read.variables, x), wanted)


def test_training_goes_on_to_the_same_bits(saved, state):
    read = read_train_state(saved)
    fresh = make_state(steps=0)
    resumed = fresh.replace(
        step=read.step,
        params=read.params,
        batch_stats=read.collections["batch_stats"],
        ema_params=read.extras["ema_params"],
        opt_state=restore_into_structure(jax.eval_shape(TX.init, fresh.params), read.opt_state),
    )
    for step in range(2, 5):
        state, resumed = train_step(state, batch(step)), train_step(resumed, batch(step))
    assert_same(resumed, state)


def test_target_gives_the_callers_own_types(saved, state):
    for target in (state, jax.eval_shape(lambda: state)):
        read = read_tree(saved, target)
        assert isinstance(read, TrainState)
        assert_same(read, state)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))


def test_a_step_is_an_int_where_the_target_has_one(saved):
    read = read_tree(saved, make_state(steps=0))
    assert read.step == 2
    assert type(read.step) is int


def test_another_model_as_target_lists_every_difference(saved, state):
    other = state.replace(
        params={
            "Dense_0": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(3, jnp.bfloat16)},
            "Dense0": state.params["Dense_1"],
            "BatchNorm_0": state.params["BatchNorm_0"],
        }
    )
    with pytest.raises(VariablesMismatchError) as caught:
        read_tree(saved, other)
    error, text = caught.value, str(caught.value)
    assert error.missing == [("params", "Dense0", "bias"), ("params", "Dense0", "kernel")]
    assert error.unexpected == [("params", "Dense_1", "bias"), ("params", "Dense_1", "kernel")]
    assert error.wrong_shape == [(("params", "Dense_0", "kernel"), (4, 5), (4, 3))]
    assert error.wrong_dtype == [(("params", "Dense_0", "bias"), "bfloat16", "float32")]
    assert str(saved) in text
    assert "did you mean params/Dense_1/kernel" in text


def test_variables_and_params_alone_are_read(state, tmp_path):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    read = read_train_state(save(tmp_path / "variables", variables))
    assert (read.step, read.opt_state, read.layout) == (None, None, Kind.LINEN_VARIABLES)
    assert_same(read.variables, variables)
    read = read_train_state(save(tmp_path / "params", state.params))
    assert read.layout is Kind.PARAMS_ONLY
    assert_same(read.variables, {"params": state.params})


def test_variables_nested_in_params(state, tmp_path):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    path = save(tmp_path / "ck", {"step": 1, "params": variables, "opt_state": TX.init(variables)})
    read = read_train_state(path)
    assert read.layout is Kind.LINEN_NESTED_TRAIN_STATE
    assert_same(read.variables, variables)
    info = read_metadata(path)
    assert {layout.collection_of(leaf.path, info.layout) for leaf in info.leaves} == {
        "params",
        "batch_stats",
        "opt_state",
        "step",
    }


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (
            {"step": jnp.int32(1), "opt_state": {"mu": {"w": jnp.ones(1)}}},
            "found: unknown: .*no params among them",
        ),
        ({"batch_stats": {"B": {"mean": jnp.ones(1)}}}, "found: params: NoneType without entries"),
        ({"params": {}, "step": 1}, "found: params: dict without entries"),
        ({"layer": {"kernel": {"value": jnp.ones(1)}}}, r"found: nnx.State: all paths end in 'value'"),
        ([jnp.ones(1)], "found: unknown"),
    ],
)
def test_checkpoints_without_linen_params(tree, text, tmp_path):
    path = save(tmp_path / "ck", tree)
    with pytest.raises(CheckpointLayoutError, match=text) as caught:
        read_train_state(path)
    assert str(path) in str(caught.value)


# --- bad input ----------------------------------------------------------------------------------------------


def test_missing_path(saved, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no checkpoint: .*standart.*Near it: standard"):
        read_metadata(saved.parent / "standart")
    with pytest.raises(FileNotFoundError, match="found: nothing at this path"):
        read_tree(tmp_path / "a" / "b")


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(
        CheckpointLayoutError, match=r"(?s)not an Orbax checkpoint: .*expected: a folder.*a file of 5 bytes"
    ):
        read_metadata(tmp_path / "file")
    with pytest.raises(CheckpointLayoutError, match=r"(?s)not an Orbax checkpoint: .*found: file"):
        read_metadata(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointLayoutError, match="found: an empty folder"):
        read_metadata(tmp_path / "empty")
    (tmp_path / "half" / "7.orbax-checkpoint-tmp-3").mkdir(parents=True)
    with pytest.raises(CheckpointCorruptError, match="was never finished"):
        read_metadata(tmp_path / "half")


def damage(path, how):
    if how == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "halve" else 0)


@pytest.mark.parametrize("how", ["delete", "halve", "empty"])
@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_damaged_files(copy, part, how, capfd):
    (file,) = copy.glob(part)
    damage(file, how)
    for read in (read_metadata, read_tree, read_train_state):
        with pytest.raises(CheckpointCorruptError, match=r"(?s)damaged: .*copy.*expected: .*found: \S"):
            read(copy)
    assert capfd.readouterr() == ("", "")  # Orbax would print a traceback for each array


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"tree_metadata": {"a": 1}}', "\xff", "[" * 100_000])
def test_hostile_metadata(copy, content):
    (copy / "_METADATA").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointCorruptError, match="_METADATA"):
        read_tree(copy)


def edit_metadata(path, function):
    metadata = json.loads((path / "_METADATA").read_text())
    function(metadata["tree_metadata"])
    (path / "_METADATA").write_text(json.dumps(metadata))


def test_metadata_that_is_no_tree(copy):
    def add(rows):
        key = {"key": "params", "key_type": 2}
        rows["x"] = {
            "key_metadata": [key],
            "value_metadata": {"value_type": "None", "skip_deserialize": True},
        }

    edit_metadata(copy, add)
    with pytest.raises(CheckpointCorruptError, match="found: params: is a leaf and has leaves below it"):
        read_tree(copy)


def test_metadata_that_points_outside(copy):
    def point_outside(rows):
        for row in rows.values():
            row["key_metadata"][0]["key"] = "../../etc"

    edit_metadata(copy, point_outside)
    with pytest.raises(CheckpointCorruptError, match="points out of the checkpoint"):
        read_tree(copy)


def test_metadata_with_an_array_that_is_not_there(copy):
    def rename(rows):
        rows["('params', 'Dense_0', 'kernel')"]["key_metadata"][1]["key"] = "Dense_9"

    edit_metadata(copy, rename)
    with pytest.raises(
        CheckpointCorruptError, match=r"(?s)expected: the array params/Dense_9/kernel.*found: NOT_FOUND"
    ):
        read_metadata(copy)


def test_names_that_orbax_cannot_tell_apart(tmp_path):
    path = save(tmp_path / "ck", {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)})
    with pytest.raises(CheckpointCorruptError, match=r"a/b and a\.b are both stored as 'a\.b'"):
        read_tree(path)


def test_a_lost_chunk_is_never_read_as_zeros(tmp_path):
    path = pytree_handler(use_ocdbt=False)(tmp_path / "ck", {"params": {"w": jnp.ones((2, 2))}})
    (path / "params.w" / "0.0").unlink()
    with pytest.raises(CheckpointCorruptError, match=r"(?s)expected: params/w: float32\[2, 2\].*found: NOT_FOUND"):
        read_tree(path)


def test_a_shape_beyond_memory_is_refused_before_reading(tmp_path):
    path = pytree_handler(use_ocdbt=False)(tmp_path / "ck", {"params": {"w": jnp.ones((2, 2))}})
    array = json.loads((path / "params.w" / ".zarray").read_text())
    (path / "params.w" / ".zarray").write_text(json.dumps(array | {"shape": [10**7, 10**7]}))
    with pytest.raises(CheckpointTooLargeError, match=r"(?s)expected: at most.*params/w: \(10000000, 10000000\)"):
        read_tree(path)


def test_damaged_side_files(tmp_path):
    path = pytree_handler()(tmp_path / "ck", {"params": {"w": jnp.ones(1)}, "text": "hi"})
    damage(path / "array_metadatas" / "process_0", "halve")
    with pytest.raises(CheckpointCorruptError, match="process_0"):
        read_metadata(path)
    damage(path / "array_metadatas" / "process_0", "delete")
    damage(path / "_strings.json", "delete")
    with pytest.raises(CheckpointCorruptError, match=r"(?s)_strings\.json.*expected: the text of text"):
        read_metadata(path)


def test_without_orbax_the_error_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'linen-nnx-bridge\[orbax\]'"):
        read_metadata(saved)
