"""load_variables is strict, in place and reversible, for wrapped and native models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import freeze

import nnx_core as nnx
from bridge import LoadReport, ToNNX, load_variables, variables_of
from bridge._errors import RenameClashError, VariablesMismatchError
from bridge.variables.load import renaming
from nnx_core._errors import TraceError
from tests.tolerance import assert_trees_equal

X = jnp.asarray(np.ones((2, 3), "float32"))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"blocks_{i}")(x)
        return nn.Dense(2)(nn.Dropout(0.1, deterministic=True)(x))


class NativeBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class Native(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NativeBlock(rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


RENAME = {
    "blocks_0": "blocks/0",
    "blocks_1": ("blocks", 1),
    "blocks_0/Dense_0": "blocks/0/dense",
    ("blocks_1", "Dense_0"): "blocks/1/dense",
    "blocks_0/BatchNorm_0": "blocks/0/norm",
    "blocks_1/BatchNorm_0": "blocks/1/norm",
    "Dense_0": "head",
}


@pytest.fixture
def variables():
    made = Net().init(jax.random.key(0), X)
    leaves, treedef = jax.tree.flatten(made)
    return treedef.unflatten([x + i for i, x in enumerate(leaves)])


def wrapped():
    return ToNNX(Net(), rngs=nnx.Rngs(1)).lazy_init(X)


def native():
    return Native(nnx.Rngs(1))


MODELS = {"wrapped": (wrapped, None), "native": (native, RENAME)}
models = pytest.mark.parametrize(("make", "rename"), MODELS.values(), ids=MODELS)


def edited(variables, path, value):
    """`variables` with one path set, or removed for None; a copy."""
    tree = jax.tree.map(lambda x: x, variables)
    level = tree
    for key in path[:-1]:
        level = level[key]
    if value is None:
        del level[path[-1]]
    else:
        level[path[-1]] = value
    return tree


@models
def test_outputs_are_linens(make, rename, variables):
    model = make()
    report = load_variables(model, variables, rename=rename)
    assert report.complete
    assert len(report.loaded) == len(jax.tree.leaves(variables))
    assert_trees_equal(model(X), Net().apply(variables, X))


@models
def test_variables_of_is_the_inverse(make, rename, variables):
    model = make()
    load_variables(model, variables, rename=rename)
    back = variables_of(model, rename=rename)
    assert {c: set(tree) for c, tree in back.items()} == {c: set(tree) for c, tree in variables.items()}
    assert_trees_equal(back, variables)


@models
def test_variables_keep_identity_and_ties_row3(make, rename, variables):
    model = make()
    before = [v for _, v in nnx.to_flat_state(nnx.state(model))]
    load_variables(model, variables, rename=rename)
    after = [v for _, v in nnx.to_flat_state(nnx.state(model))]
    assert all(a is b for a, b in zip(after, before, strict=True))


@models
def test_every_fault_in_one_error_and_nothing_written_rows_1_11(make, rename, variables):
    model = make()
    before = nnx.to_pure_dict(nnx.state(model))
    bad = edited(variables, ("params", "Dense_0", "kernel"), jnp.zeros((3, 7)))
    bad = edited(bad, ("batch_stats", "blocks_0", "BatchNorm_0", "mean"), np.zeros(3, np.float16))
    bad = edited(bad, ("params", "blocks_1", "Dense_0", "bias"), None)
    bad = edited(bad, ("params", "extra"), {"w": jnp.zeros(1)})
    with pytest.raises(VariablesMismatchError) as caught:
        load_variables(model, bad, rename=rename)
    error = caught.value
    at = ("blocks", "1", "dense") if rename else ("blocks_1", "Dense_0")
    assert error.missing == [("params", *at, "bias")]
    assert error.unexpected == [("params", "extra", "w")]
    assert error.wrong_shape == [(("params", "Dense_0", "kernel"), (3, 2), (3, 7))]
    assert error.wrong_dtype == [
        (("batch_stats", "blocks_0", "BatchNorm_0", "mean"), "float32", "float16"),
    ]
    for line in ("params/Dense_0/kernel: expected (3, 2), found (3, 7)", "Nothing was changed"):
        assert line in str(error)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), before)


@models
def test_lenient_loads_what_fits_and_reports_the_rest_row11(make, rename, variables):
    model = make()
    bad = edited(variables, ("params", "Dense_0", "kernel"), jnp.zeros((3, 7)))
    bad = edited(bad, ("params", "extra"), jnp.zeros(1))
    report = load_variables(model, bad, strict=False, rename=rename)
    assert not report.complete
    assert report.unexpected == (("params", "extra"),)
    assert report.wrong_shape == ((("params", "Dense_0", "kernel"), (3, 2), (3, 7)),)
    assert len(report.loaded) == len(jax.tree.leaves(variables)) - 1
    found = variables_of(model, rename=rename)
    assert found["params"]["Dense_0"]["kernel"].shape == (3, 2)
    assert_trees_equal(found["batch_stats"], variables["batch_stats"])


@models
def test_frozen_dicts_and_numpy_row31(make, rename, variables):
    model = make()
    given = freeze(jax.tree.map(np.asarray, variables))
    load_variables(model, given, rename=rename)
    assert_trees_equal(variables_of(model, rename=rename), variables)
    assert all(isinstance(v.get_raw_value(), jax.Array) for _, v in nnx.to_flat_state(nnx.state(model)))


def test_rename_by_function(variables):
    table = renaming(RENAME)
    model = native()
    load_variables(model, variables, rename=table)
    back = {table(("blocks_0", "Dense_0", "kernel")): ("blocks_0", "Dense_0", "kernel")}
    found = variables_of(model, rename=lambda path: back.get(path, path))
    assert_trees_equal(
        found["params"]["blocks_0"]["Dense_0"]["kernel"], variables["params"]["blocks_0"]["Dense_0"]["kernel"]
    )
    assert "blocks" in found["params"]


def test_integer_keys_and_digits_are_one_row21():
    model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
    for key in (0, "0"):
        tree = {"params": {"0": {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.zeros(3)}}}
        load_variables(model, tree, rename={("0",): (key,)})
        assert float(model[0].kernel[0, 0]) == 5.0


def test_longest_prefix_wins():
    rename = renaming({"a": "x", "a/b": "y", ("s/t",): "z"})
    assert rename(("a", "b", "c")) == ("y", "c")
    assert rename(("a", "c")) == ("x", "c")
    assert rename(("s/t", "c")) == ("z", "c")
    assert rename(("a b",)) == ("a b",)
    assert renaming({"": "root"})(("a",)) == ("root", "a")


def test_two_variables_under_one_name(variables):
    with pytest.raises(RenameClashError, match="batch_stats/blocks_0/BatchNorm_0/mean -> batch_stats/x"):
        load_variables(native(), variables, rename=lambda path: ("x",))
    with pytest.raises(RenameClashError, match="a -> x"):
        variables_of(native(), rename={"a": "x", "b": "x"})
    with pytest.raises(RenameClashError, match=r"params/w -> params/x\n  params/v -> params/x/y"):
        load_variables(native(), {"params": {"w": X, "v": X}}, rename={"w": "x", "v": "x/y"})


def test_rng_state_and_intermediates_are_not_required_rows_27_67(variables):
    model = wrapped()
    load_variables(model, variables)
    model(X, mutable=["intermediates"], capture_intermediates=True)
    assert "intermediates" not in variables_of(model)
    assert load_variables(model, variables).complete
    assert not any("Rng" in collection for collection in variables_of(model))


def test_empty_collections_are_no_fault(variables):
    assert load_variables(wrapped(), {**variables, "cache": {}, "batch_stats": variables["batch_stats"]}).complete


def test_before_lazy_init_row44(variables):
    with pytest.raises(VariablesMismatchError, match="it has no variables yet: lazy_init makes them"):
        load_variables(ToNNX(Net(), rngs=nnx.Rngs(0)), variables)


def test_boxes_are_opened_and_metadata_is_kept_row16():
    kernel = nn.LogicallyPartitioned(jnp.ones((3, 2)), ("in", "out"))
    tree = {"params": {"kernel": kernel, "bias": jnp.zeros(2)}}
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.bias.set_metadata(unit="m")
    load_variables(model, tree)
    assert model.kernel.out_sharding == ("in", "out")
    assert model.bias.unit == "m"
    assert kernel.names == ("in", "out")
    assert type(variables_of(model)["params"]["kernel"]) is nn.LogicallyPartitioned
    model.kernel.set_metadata(out_sharding=("mine", None))
    load_variables(model, tree)
    assert model.kernel.out_sharding == ("mine", None)


class Adapter(nnx.Param):
    """A trainable of a type of its own."""


def test_a_subtype_takes_what_its_base_collection_has():
    class Model(nnx.Module):
        def __init__(self):
            self.w, self.a = nnx.Param(jnp.zeros(2)), Adapter(jnp.zeros(2))

    model = Model()
    load_variables(model, {"params": {"w": jnp.ones(2), "a": jnp.ones(2)}})
    assert float(model.a.sum()) == 2.0
    load_variables(model, variables_of(model))


def test_same_name_in_two_collections_row18():
    class Ema(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (3,))
            ema = self.variable("ema", "w", lambda: jnp.zeros(3))
            return x * w + ema.value

    tree = {"params": {"w": jnp.full(3, 2.0)}, "ema": {"w": jnp.full(3, 5.0)}}
    model = ToNNX(Ema(), rngs=nnx.Rngs(0)).lazy_init(X)
    load_variables(model, tree)
    assert_trees_equal(variables_of(model), tree)
    assert_trees_equal(model(X), Ema().apply(tree, X))


def test_into_an_abstract_model_row39(variables):
    model = nnx.eval_shape(native)
    load_variables(model, variables, rename=RENAME)
    assert_trees_equal(variables_of(model, rename=RENAME), variables)


def sharded_native():
    names = {"out_sharding": (None, "x")}
    return nnx.Linear(3, 8, rngs=nnx.Rngs(1), kernel_metadata=names, bias_metadata={"out_sharding": ("x",)})


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("where", ["abstract", "on devices"])
def test_values_go_where_their_places_are_sharded_to_row39(where):
    """From numpy straight to the devices of the target, which keeps its sharding and identity."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nnx.merge(*nnx.get_abstract_model(sharded_native, mesh))
    if where == "on devices":
        model = jax.jit(sharded_native, out_shardings=nnx.get_named_sharding(model, mesh))()
    targets = {name: getattr(model, name).get_raw_value().sharding for name in ("kernel", "bias")}
    tree = {"params": {"kernel": np.arange(24.0, dtype=np.float32).reshape(3, 8), "bias": np.ones(8, np.float32)}}
    load_variables(model, tree)
    for name, sharding in targets.items():
        value = getattr(model, name).get_raw_value()
        assert (value.sharding, value.committed) == (sharding, True)
        assert len({str(shard.index) for shard in value.addressable_shards}) == 2
    assert_trees_equal(variables_of(model)["params"]["kernel"].value, tree["params"]["kernel"])


def test_a_ref_is_written_to_row3():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.zeros((3, 2)), ref=True)
    ref = model.kernel.get_raw_value()
    load_variables(model, {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}})
    assert model.kernel.get_raw_value() is ref
    assert_trees_equal(ref[...], jnp.ones((3, 2)))


def test_boxes_that_were_saved_as_dicts_are_opened_row38():
    """What flax.serialization makes of Linen's own boxes, restored without a target."""
    layer = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = layer.init(jax.random.key(0), X)
    restored = serialization.msgpack_restore(serialization.to_bytes(variables))
    assert list(restored["params"]["kernel"]) == ["value"]
    model = ToNNX(layer, rngs=nnx.Rngs(1)).lazy_init(X)
    load_variables(model, jax.tree.map(lambda x: x + 1, restored))
    assert_trees_equal(variables_of(model), jax.tree.map(lambda x: x + 1, variables))
    beside = {"params": {**restored["params"], "bias": {"value": jnp.zeros(2), "other": jnp.zeros(2)}}}
    with pytest.raises(VariablesMismatchError, match=r"unexpected.*\n  params/bias/other"):
        load_variables(model, beside)


def test_inside_a_transform_that_does_not_own_the_model(variables):
    model = native()

    @jax.jit
    def f(variables):
        load_variables(model, variables, rename=RENAME)

    with pytest.raises(TraceError, match="BatchStat at batch_stats/blocks_0/BatchNorm_0/mean"):
        f(variables)


def test_report_is_small_and_frozen():
    report = LoadReport()
    assert report.complete
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loaded = ()


def test_the_text_of_a_report_is_a_short_table_by_kind():
    names = tuple(("params", f"layer_{i}", "kernel") for i in range(500))
    report = LoadReport(loaded=names, missing=names[:30], wrong_shape=((("params", "bias"), (3,), (4,)),))
    assert str(report) == repr(report)
    lines = repr(report).splitlines()
    assert lines[0] == "LoadReport: 500 loaded, 30 missing, 0 unexpected, 1 of another shape, 0 of another dtype"
    assert lines[1] == "  missing: params/layer_0/kernel"
    assert lines[11:] == ["  missing: and 20 more", "  of another shape: params/bias: expected (3,), found (4,)"]
    assert report.missing == names[:30]  # whole, beside the text
