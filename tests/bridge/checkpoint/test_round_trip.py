"""There and back is the identity, to the bit: layers, optimizers, boxes, stacks, trees that hypothesis draws."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import nnx_core as nnx
from bridge.checkpoint.in_memory import state_to_variables, variables_to_state
from bridge.checkpoint.plan.plan import make_plan
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.tree import layout
from bridge.checkpoint.tree.from_objects import of_object
from tests.layers import LAYERS
from tests.support.checkpoint_trees import clean, converted, on_disk, row_rules, same_objects
from tests.support.optimizers import OPTIMIZERS, RENAMEABLE, filled, make_params, random_bits
from tests.tolerance import assert_trees_equal

# The params of `make_params` in a model of NNX, and its optimizer, which is the oracle for NNX's layout.
NAMES = {"Dense_0": "inp", "layers_0/Dense_0": "layers/0/linear", "Norm_0": "norm"}


class Block(nnx.Module):
    def __init__(self):
        self.linear = nnx.data(Leaves(kernel=(4, 4), bias=(4,)))


class Leaves(nnx.Module):
    def __init__(self, **shapes):
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))


class Model(nnx.Module):
    def __init__(self):
        self.inp = Leaves(kernel=(3, 4), bias=(4,))
        self.layers = nnx.List([Block()])
        self.norm = Leaves(**{"a/b.c": (4,), "count": (4,)})
        self.norm.mean = nnx.BatchStat(jnp.zeros(4))


def forms(tree):
    live = of_object(tree)
    return {path: (leaf.shape, leaf.dtype) for path, leaf in live.tree.leaves.items()}, dict(live.tree.empty)


class Run:
    """A training state in Linen with this optimizer, and the NNX checkpoint that it becomes."""

    def __init__(self, name):
        self.tx, params, opt_state = filled(name)
        self.live = {"step": jnp.int32(3), "params": params, "opt_state": opt_state}
        self.tree = on_disk({**self.live, "batch_stats": {"Norm_0": {"mean": np.arange(4, dtype="float32")}}})
        self.there, self.plan, self.metadata = converted(self.tree, "nnx")


@pytest.mark.parametrize("name", RENAMEABLE)
def test_every_optimizer_there_and_back(name):
    """Five laws on one state."""
    run = Run(name)
    there_and_back_is_the_same_tree(run)
    tx_tells_what_an_nnx_checkpoint_does_not(run)
    what_flax_serialization_writes_is_the_same_state(run)
    model = Model()
    optimizer = nnx.Optimizer(model, run.tx, wrt=nnx.Param)
    the_nnx_layout_is_that_of_an_nnx_optimizer(run, model, optimizer)
    nnx_linen_nnx_is_the_same_tree(run, model, optimizer)


def test_an_optimizer_of_one_flat_vector_there_and_back():
    """Without renames: the vector's order is that of the names."""
    run = Run("flatten")
    there_and_back_is_the_same_tree(run)
    tx_tells_what_an_nnx_checkpoint_does_not(run)
    what_flax_serialization_writes_is_the_same_state(run)


def there_and_back_is_the_same_tree(run):
    back, plan_back, metadata_back = converted(run.there, "linen", metadata=run.metadata)
    assert_trees_equal(back, run.tree)
    again, _, _ = converted(back, "nnx", metadata=metadata_back)
    assert_trees_equal(again, run.there)
    assert clean(run.plan)
    assert clean(plan_back)


def tx_tells_what_an_nnx_checkpoint_does_not(run):
    metadata = copy.deepcopy(run.metadata)
    del metadata["linen_nnx_bridge"]["linen"]
    back, plan, _ = converted(run.there, "linen", metadata=metadata, tx=run.tx)
    assert_trees_equal(back, run.tree)
    assert clean(plan)


def the_nnx_layout_is_that_of_an_nnx_optimizer(run, model, optimizer):
    """The oracle: leaves, dtypes and masked params of `nnx.state(optimizer)` for a model of these names."""
    oracle = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    there, _, _ = converted(run.tree, "nnx", rules=Rules.from_rename(NAMES))
    assert forms(there) == forms(oracle)
    make_plan(of_object(run.tree).tree, to="nnx", rules=Rules.from_rename(NAMES), target=oracle)


def nnx_linen_nnx_is_the_same_tree(run, model, optimizer):
    live = of_object({"model": model, "optimizer": optimizer})
    draw = np.random.default_rng(0)
    values = {path: random_bits(draw, x) for path, x in live.values.items()}
    tree = layout.nest({**values, **dict.fromkeys(live.tree.empty)})
    rules = Rules.from_rename(NAMES)
    there, plan, metadata = converted(tree, "linen", rules=rules.inverse(), known=live.known, tx=run.tx)
    template = {
        "step": jnp.int32(0),
        "params": make_params(),
        "opt_state": jax.eval_shape(run.tx.init, make_params()),
        "batch_stats": {"Norm_0": {"mean": jnp.zeros(4)}},
    }
    assert forms(there) == forms(template)
    back, _, _ = converted(there, "nnx", rules=rules, metadata=metadata)
    assert_trees_equal(on_disk(back), on_disk(tree))
    assert not plan.lost


def what_flax_serialization_writes_is_the_same_state(run):
    """msgpack has digits for lists and {} for None: the same NNX tree, and back for either format."""
    msgpack = serialization.to_state_dict(run.live)
    there, _, metadata = converted(msgpack, "nnx")
    assert_trees_equal(there, converted(on_disk(run.live), "nnx")[0])
    back, _, _ = converted(there, "linen", metadata=metadata, empty="Dict")
    assert_trees_equal(serialization.from_state_dict(run.live, without_lists(back)), run.live)
    assert_trees_equal(without_lists(back), msgpack)
    assert_trees_equal(converted(there, "linen", metadata=metadata, tx=run.tx, empty="None")[0], on_disk(run.live))


def without_lists(tree):
    if isinstance(tree, list):
        return {str(index): without_lists(child) for index, child in enumerate(tree)}
    return {key: without_lists(child) for key, child in tree.items()} if isinstance(tree, dict) else tree


# ---- layers -----------------------------------------------------------------------------------------------------


def nested(flat):
    return unflatten_dict({tuple(key.replace("|", "/") for key in at.split("/")): x for at, x in flat.items()})


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_every_layer_there_and_back(row):
    values, rules = row.variables(), row_rules(row)
    variables = nested(values)
    model = row.module(jax.tree.map(np.zeros_like, values))  # its values show if they are taken for the variables'
    state, report = variables_to_state(variables, rules=rules, target=model)
    back, report_back = state_to_variables(state, rules=rules.inverse())
    assert_trees_equal(back, variables)
    again, _ = variables_to_state(back, rules=rules, target=model)
    assert_trees_equal(again, state)
    assert len(report_back.rows) == len(jax.tree.leaves(variables))
    assert not [row for row in report.dropped if not row["asked"]]


WITH_PARAMS = [row for row in LAYERS if row.params]  # all but Dropout


@pytest.mark.parametrize("row", WITH_PARAMS, ids=lambda row: row.name)
def test_every_layer_with_its_optimizer_there_and_back(row):
    variables, rules = nested(row.variables()), row_rules(row)
    draw = np.random.default_rng(0)
    params, rest = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    opt_state = jax.tree.map(lambda x: random_bits(draw, x), jax.eval_shape(optax.adamw(0.1).init, params))
    tree = on_disk({"step": jnp.int32(3), "params": params, "opt_state": opt_state, **rest})
    there, plan, metadata = converted(tree, "nnx", rules=rules, tx=optax.adamw(0.1))
    back, plan_back, _ = converted(there, "linen", rules=rules.inverse(), metadata=metadata, tx=optax.adamw(0.1))
    assert_trees_equal(back, tree)
    assert clean(plan)
    assert clean(plan_back)


# ---- boxes, stacks, frozen dicts --------------------------------------------------------------------------------


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(4, kernel_init=nn.with_partitioning(init, ("in", "out")), name="a")(x)
        x = nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")), name="b")(x)
        return nn.BatchNorm(use_running_average=True, name="c")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)), None

        axes = {"params": 1, "batch_stats": 0}
        return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[0]


class State(TrainState):
    batch_stats: dict


@functools.cache
def initial(make):
    return make().init(jax.random.key(0), jnp.ones((2, 4)))


def linen_state(make, tx, wrap=lambda tree: tree):
    variables = initial(make)
    params, stats = wrap(variables["params"]), wrap(variables["batch_stats"])
    return State.create(apply_fn=None, params=params, tx=tx, batch_stats=stats).replace(step=jnp.int32(5))


@pytest.mark.parametrize("make", [Boxed, Scanned])
@pytest.mark.parametrize("wrap", [lambda tree: tree, freeze], ids=["dict", "FrozenDict"])
@pytest.mark.parametrize("name", ["adamw_clip", "masked", "sm3", "adafactor"])
def test_boxes_stacks_and_frozen_dicts(make, wrap, name):
    tree = on_disk(linen_state(make, OPTIMIZERS[name](), wrap))
    there, plan, metadata = converted(tree, "nnx")
    back, plan_back, _ = converted(there, "linen", metadata=metadata)
    assert_trees_equal(back, tree)
    assert clean(plan)
    assert clean(plan_back)
    assert not any("value" in path[:-1] and path[-1] == "value" for path in plan.made)  # one level, not two


def test_variables_as_params():
    variables = initial(Scanned)
    state = TrainState.create(apply_fn=None, params=variables, tx=optax.adam(0.1)).replace(step=jnp.int32(5))
    tree = on_disk(state)
    there, _, metadata = converted(tree, "nnx")
    assert there["optimizer"]["opt_state"]["0"]["mu"].keys() == there["model"].keys()
    back, _, _ = converted(there, "linen", metadata=metadata)
    assert_trees_equal(back, tree)


def test_boxes_and_frozen_dicts_in_memory():
    variables = initial(Boxed)
    state, _ = variables_to_state(freeze(variables))
    back, _ = state_to_variables(state)
    assert_trees_equal(back, variables)
    assert same_objects(back, variables)
    assert type(back["params"]["b"]["kernel"]) is nn.LogicallyPartitioned
    assert state["a"]["kernel"].out_sharding == ("in", "out")


# ---- trees that hypothesis draws --------------------------------------------------------------------------------

KEYS = st.text(alphabet="ab/.01", min_size=1, max_size=3)
SHAPES = st.sampled_from([(), (1,), (2,), (2, 3)])
TREES = st.dictionaries(
    KEYS,
    st.recursive(SHAPES, lambda sub: st.dictionaries(KEYS, sub, min_size=1, max_size=3), max_leaves=4),
    min_size=1,
    max_size=3,
)


def arrays(shapes, first=0):
    return jax.tree.map(
        lambda s: np.arange(first, first + np.prod(s, dtype=int), dtype=np.float32).reshape(s),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def boxed(tree, draw):
    return jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim) if draw(st.booleans()) else x, tree)


@pytest.mark.slow
@settings(max_examples=60)
@given(TREES, TREES, st.sampled_from(["adam", "adafactor", "masked", "multi_transform", "novograd"]), st.data())
def test_drawn_training_states(shapes, others, name, data):
    params = boxed({"Layer_0": arrays(shapes)}, data.draw)
    stats = {"Stats_0": arrays(others, 7)}  # in a module of its own, so that no two variables clash
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda x: random_bits(draw, x), jax.eval_shape(OPTIMIZERS[name]().init, params))
    extras = {"ema_params": jax.tree.map(lambda x: x + 1, params), "dropout_rng": np.uint32([1, 2])}
    live = of_object({"step": np.int64(3), "params": params, "opt_state": state, "batch_stats": stats, **extras})
    there, _, metadata = converted(live, "nnx", known=live.known, layout=live.layout)
    back, _, _ = converted(there, "linen", metadata=metadata)
    tree = on_disk({"step": np.int64(3), "params": params, "opt_state": state, "batch_stats": stats, **extras})
    assert_trees_equal(back, tree)


@settings(max_examples=60)
@given(TREES, TREES)
def test_drawn_variables_in_memory(params, stats):
    variables = {"params": {"a": arrays(params)}, "stats": {"b": arrays(stats)}}
    state, _ = variables_to_state(variables)
    back, _ = state_to_variables(state)
    assert same_objects(back, variables)


def test_a_flat_tree_of_linen_has_one_place_for_each_variable():
    """The names of the rows are those of Linen itself."""
    row = next(row for row in LAYERS if row.name == "BatchNorm")
    assert set(flatten_dict(nested(row.variables()))) == {
        ("params", "scale"),
        ("params", "bias"),
        ("batch_stats", "mean"),
        ("batch_stats", "var"),
    }
