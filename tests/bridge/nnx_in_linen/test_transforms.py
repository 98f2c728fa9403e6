"""ToLinen under every Linen transform, beside a Linen module of the same layout. `row N` is a row of REQUIREMENTS.md.

Each case is a Linen network around a block. With the variables that init gave ours, the network around ours and the
one around Linen's block return the same bits: outputs, updated statistics, gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class
from tests.support.to_linen_models import DROPOUT, KEY, Net, X, equal_programs
from tests.tolerance import assert_trees_close, assert_trees_equal


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))

    def project(self, x):
        return self.linear(x)


class LinenBlock(nn.Module):
    def setup(self):
        self.linear = nn.Dense(3)
        self.norm = nn.BatchNorm(use_running_average=False)

    def __call__(self, x):
        return nn.tanh(self.norm(self.linear(x)))

    def project(self, x):
        return self.linear(x)


Ours = to_linen_class(NnxBlock)
EVERYTHING = {"params": 0, "batch_stats": 0}


class Around(nn.Module):
    """A network whose forward is `run(self, block class, x)`, compact."""

    block: type
    run: object

    @nn.compact
    def __call__(self, x):
        return self.run(self, self.block, x)


def lifted(lift, **options):
    return lambda mdl, block, x: lift(block, **options)(name="block")(x)


def over_two(mdl, block, x, **options):
    stacked = nn.vmap(block, variable_axes=options.pop("axes", EVERYTHING), **options)
    return stacked(name="block")(jnp.stack([x, x + 1]))


def over_layers(mdl, block, x):
    """Parameters and statistics have an axis of layers."""

    def body(block, x, _):
        return block(x), None

    scan = nn.scan(body, variable_axes=EVERYTHING, split_rngs={"params": True}, length=3)
    return scan(block(name="block"), x, None)[0]


def over_time(mdl, block, x):
    """Parameters are broadcast, statistics carried, and the output goes in again."""

    def body(block, x, y):
        return (x := block(x + y)), x.sum()

    module = block(name="block")
    if mdl.is_initializing():
        return module(x), jnp.zeros(3)
    scan = nn.scan(body, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False})
    return scan(module, x, jnp.arange(3.0))


def some_branch(mdl, block, x):
    module = block(name="block")
    if mdl.is_initializing():
        return module(x)
    return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, module, x)


def one_of_three(mdl, block, x):
    module = block(name="block")
    branches = [lambda m, x: m(x), lambda m, x: m.project(x), lambda m, x: -x]
    if mdl.is_initializing():
        return module(x)
    return sum(nn.switch(i, branches, module, x) for i in range(3))


def while_small(mdl, block, x):
    module = block(name="block")
    if mdl.is_initializing():
        return module(x)
    step = lambda m, carry: (carry[0] + 1, m(carry[1]))  # noqa: E731
    return nn.while_loop(lambda m, carry: carry[0] < 3, step, module, (0, x), carry_variables="batch_stats")[1]


def own_gradient(mdl, block, x):
    def forward(module, x):
        return nn.vjp(lambda m, x: m.project(x), module, x)

    def backward(vjp, y):
        params, x = vjp(y)
        return jax.tree.map(lambda p: 2 * p, params), x

    module = block(name="block")
    if mdl.is_initializing():
        module(x)
    return nn.custom_vjp(lambda m, x: m.project(x), forward, backward)(module, x)


def mapped(mdl, block, x):
    """The block sees its parameters doubled, and init stores half of what it made."""
    factor = lambda by: lambda v: jax.tree.map(lambda p: p * by, v)  # noqa: E731
    making = mdl.is_initializing()
    doubled = nn.map_variables(block, "params", factor(2), factor(0.5), mutable=making, init=making)
    return doubled(name="block")(x)


def shared(mdl, block, x):
    module = block(name="block")
    return module(module(x)) + module.project(x)


CASES = {
    "jit": lifted(nn.jit),
    "remat": lifted(nn.remat),
    "checkpoint of a method": lambda mdl, block, x: nn.remat(block, methods=["project", "__call__"])(name="block")(x),
    "vmap, an axis of params": functools.partial(over_two, split_rngs={"params": True}),
    "vmap, shared params": functools.partial(
        over_two, axes={"params": None, "batch_stats": 0}, split_rngs={"params": False}
    ),
    "scan over layers": over_layers,
    "scan, carry and broadcast": over_time,
    "cond": some_branch,
    "switch": one_of_three,
    "while_loop": while_small,
    "custom_vjp": own_gradient,
    "map_variables": mapped,
    "called twice, shared": shared,
    "jit of remat of vmap": lambda mdl, block, x: nn.jit(
        nn.remat(nn.vmap(block, variable_axes=EVERYTHING, split_rngs={"params": True}))
    )(name="block")(jnp.stack([x, -x])),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("run", CASES.values(), ids=list(CASES))
def test_every_transform_equals_linens(run):
    ours, theirs = Around(Ours, run), Around(LinenBlock, run)
    variables = ours.init(KEY, X)
    shapes = jax.eval_shape(theirs.init, KEY, X)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)

    def step(model):
        def loss(params, stats):
            y, updates = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
            return sum((leaf**2).mean() for leaf in jax.tree.leaves(y)), (y, updates)

        # no reverse mode through a loop of unknown length
        return loss if run is while_small else jax.value_and_grad(loss, has_aux=True)

    inputs = variables["params"], variables["batch_stats"]
    equal_programs(step(ours), step(theirs), *inputs)
    changed = jax.tree.leaves(ours.apply(variables, X, mutable=["batch_stats"])[1])
    unchanged = all(map(np.array_equal, changed, jax.tree.leaves(variables["batch_stats"])))
    assert unchanged == (run is own_gradient)


def test_row_61_gradients_and_statistics_of_one_apply_hold_no_tracers():
    model = Ours()
    variables = model.init(KEY, X)

    def loss(params, stats):
        y, updates = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
        return y.sum(), updates

    for _ in range(2):  # the second step reads what the first wrote
        grads, updates = jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"])
        variables = {"params": variables["params"], **updates}
    assert not [x for x in jax.tree.leaves((grads, variables)) if isinstance(x, jax.core.Tracer)]
    expected = LinenBlock().apply(variables, X, mutable=["batch_stats"])
    assert_trees_close(model.apply(variables, X, mutable=["batch_stats"]), expected)


def test_row_66_nothing_that_a_call_is_given_is_written_to():
    model = Ours()
    variables = model.init(KEY, X)
    before = jax.tree.map(np.array, variables)
    bound = model.bind(variables, mutable=["batch_stats"])
    bound(X)
    jax.grad(lambda p: model.apply({**variables, "params": p}, X, mutable=True)[0].sum())(variables["params"])
    assert_trees_equal(jax.tree.map(np.array, variables), before)
    after = bound.variables["batch_stats"]["norm"]["mean"]
    assert not np.array_equal(after, before["batch_stats"]["norm"]["mean"])


class SharesScope(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)
        self.extra = nn.Dense(3)

    def __call__(self, x):
        return self.extra(self.inner(x))


def test_share_scope():
    ours, theirs = SharesScope(Ours()), SharesScope(LinenBlock())
    variables = ours.init(KEY, X)
    assert set(variables["params"]) == {"linear", "norm", "extra"}
    again = [model.apply(variables, X, mutable=["batch_stats"]) for model in (ours, theirs)]
    assert_trees_close(*again)


def annotated(model_kwargs):
    init = nnx.with_metadata(nnx.initializers.ones, out_sharding=("in", "out"))
    return {"kernel_init": init, "use_bias": False, **model_kwargs}


def spec(variables):
    return tuple(nn.get_partition_spec(variables)["params"]["inner"]["kernel"])


@pytest.mark.parametrize("metadata_fn", ["default", "logical"])
def test_row_53_scan_and_vmap_put_their_axis_into_the_spec(metadata_fn):
    def logical(variable):
        names = variable.get_metadata("out_sharding", None)
        value = variable.get_raw_value()
        return value if names is None else nn.LogicallyPartitioned(value, names)

    options = {} if metadata_fn == "default" else {"metadata_fn": logical}
    seen = []

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = to_linen(nnx.Linear, 3, 3, name="inner", **options, **annotated({}))
            scan = nn.scan(
                lambda m, x, _: (m(x, nnx_method=lambda m, x: seen.append(m.kernel.out_sharding) or m(x)), None),
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(inner, x, None)[0]

    variables = Outer().init(KEY, X)
    assert spec(variables) == ("in", "layers", "out")
    y = Outer().apply(variables, X)
    assert set(seen) == {("in", "out")}  # inside, the layer has no axis of layers
    assert_trees_equal(y, Outer().apply(nn.unbox(variables), X))


def test_row_53_add_metadata_axis():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            cls = nn.add_metadata_axis(
                to_linen_class(nnx.Linear), variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "stage"}
            )
            return cls(3, 3, name="inner", **annotated({}))(x)

    variables = Outer().init(KEY, X)
    assert spec(variables) == ("stage", "in", "out")
    assert_trees_equal(Outer().apply(variables, X), jnp.broadcast_to(X.sum(1, keepdims=True), (8, 3)))


def test_dropout_under_scan_has_a_mask_for_each_layer_as_linens():
    def body(m, x, _):
        return m(x), None

    def run(mdl, block, x):
        scan = nn.scan(body, split_rngs={"dropout": True}, length=2)
        return scan(block(), x, None)[0]

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

    y = Around(lambda: to_linen(nnx.Dropout, 0.5, name="d"), run).apply({}, X, rngs=DROPOUT)
    z = Around(lambda: nn.Dropout(0.5, deterministic=False, name="d"), run).apply({}, X, rngs=DROPOUT)
    assert_trees_equal(y, z)
    assert 0 < int((y == 0).sum()) < y.size


def test_a_shared_submodule_of_two_parents():
    class Half(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x) * 0.5

    class Outer(nn.Module):
        block: type

        def setup(self):
            self.inner = self.block()
            self.a, self.b = Half(self.inner), Half(self.inner)

        def __call__(self, x):
            return self.a(x) + self.b(x + 1)

    variables = Outer(Ours).init(KEY, X)
    assert set(variables["params"]) == {"inner"}
    runs = [Outer(block).apply(variables, X, mutable=["batch_stats"]) for block in (Ours, LinenBlock)]
    assert_trees_close(*runs)


def test_threads_share_structures_and_nothing_else():
    from concurrent.futures import ThreadPoolExecutor

    models = [ToLinen(Net, (3, 1), {"classes": classes}) for classes in (2, 3)] * 8

    def run(model):
        variables = model.init(KEY, X)
        return model.apply(variables, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, models))
    for model, result in zip(models, results, strict=True):
        assert_trees_equal(result, run(model))
