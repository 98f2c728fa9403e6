"""The laws of FromFlax and AsFlax: what is wrapped does what it does alone, in each library's hands."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from hypothesis import given, settings

import bridge
import nnx_core as nnx
from bridge.flax_nnx import AsFlax, FromFlax, run, variable_type
from tests.support.both_libraries import OurBlock, TheirBlock, graphs, inputs, make_graph, plain
from tests.tolerance import assert_trees_close, assert_trees_equal

#: Of flax.nnx, whose `sow` wants `nnx.capture` around it.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


class Side:
    """One direction: a module of one library, wrapped for the other."""

    def __init__(self, name, wrap, inner, outer, block):
        self.name, self.wrap, self.inner, self.outer, self.block = name, wrap, inner, outer, block

    def pair(self):
        """The block alone, and wrapped."""
        alone = self.block(self.inner.Rngs(0))
        return alone, self.wrap(self.inner.clone(alone))

    def assert_same_state(self, alone, wrapped):
        assert_trees_equal(plain(self.outer, wrapped), plain(self.inner, alone))


SIDES = [
    Side("FromFlax", FromFlax, flax_nnx, nnx, TheirBlock),
    Side("AsFlax", AsFlax, nnx, flax_nnx, OurBlock),
]
each_side = pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)


@each_side
def test_outputs_and_effects_are_those_of_the_module_alone(side):
    alone, wrapped = side.pair()
    x = inputs()
    kernel = wrapped.layers[0].kernel
    for _ in range(2):
        assert_trees_equal(wrapped(x), alone(x))
    side.assert_same_state(alone, wrapped)
    assert wrapped.layers[0].kernel is wrapped.tied.kernel is kernel
    assert "h" in side.outer.state(wrapped)


@each_side
def test_training_is_equal_to_the_last_bit(side):
    alone, wrapped = side.pair()
    x = inputs()

    def trained(lib, model):
        optimizer = lib.Optimizer(model, optax.adam(1e-2), wrt=lib.Param)

        @lib.jit
        def step(model, optimizer, x):
            loss, grads = lib.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
            optimizer.update(model, grads)
            return loss

        losses = [step(model, optimizer, x) for _ in range(3)]
        return losses, plain(lib, optimizer, lib.OptState)

    losses, moments = trained(side.inner, alone)
    assert_trees_equal(trained(side.outer, wrapped), (losses, moments))
    side.assert_same_state(alone, wrapped)


@each_side
def test_split_merge_clone_pop_and_pickle(side):
    alone, wrapped = side.pair()
    lib, x = side.outer, inputs()
    wrapped(x)
    sown = lib.pop(wrapped, lib.Intermediate)
    assert list(sown) == ["h"]
    wrapped.eval()
    want = wrapped(x)
    for copy in (lib.clone(wrapped), lib.merge(*lib.split(wrapped)), pickle.loads(pickle.dumps(wrapped))):
        assert_trees_equal(copy(x), want)
    lib.update(wrapped, jax.tree.map(jnp.zeros_like, lib.state(wrapped, lib.Param)))
    assert not wrapped(x).any()
    assert_trees_equal(alone.layers[0].kernel[...] != 0, np.ones((4, 4), bool))


@each_side
def test_modes_and_attributes_are_those_of_the_parts(side):
    alone, wrapped = side.pair()
    x = inputs()
    around = side.outer.List([wrapped])
    around.eval()
    alone.eval()
    assert wrapped.deterministic is True
    assert_trees_equal((wrapped(x), wrapped.encode(x), wrapped.weight), (alone(x), alone.encode(x), alone.weight))
    around.train()
    assert wrapped.drop is not None
    assert wrapped.use_running_average is False
    view = side.outer.view(wrapped, deterministic=True, use_running_average=True)
    assert_trees_equal(view(x), alone(x))
    assert wrapped.deterministic is False
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = wrapped.nothing


@each_side
def test_vmap_makes_an_ensemble_and_scan_runs_it(side):
    lib, inner, x = side.outer, side.inner, inputs()

    @lib.vmap
    def make(key):
        return side.wrap(inner.Linear(4, 4, rngs=inner.Rngs(key)))

    stack = make(jax.random.split(jax.random.key(0), 3))
    assert stack.kernel.shape == (3, 4, 4)
    y = lib.scan(lambda x, layer: layer(x), in_axes=(lib.Carry, 0), out_axes=lib.Carry)(x, stack)
    for i in range(3):
        x = x @ stack.kernel[i] + stack.bias[i]
    assert_trees_close(y, x)


@each_side
def test_streams_are_split_given_and_go_on(side):
    lib, inner, x = side.outer, side.inner, inputs()
    wrapped, alone = (f(inner.Dropout(0.5, rngs=inner.Rngs(0))) for f in (side.wrap, lambda m: m))
    key = jax.random.key(3)
    rngs, own = lib.Rngs(dropout=key), inner.Rngs(dropout=key)
    for _ in range(2):
        assert_trees_equal(wrapped(x, rngs=rngs), alone(x, rngs=own))
    assert int(rngs.dropout.count[...]) == 2
    assert_trees_equal((wrapped(x), lib.jit(lambda m, x: m(x))(wrapped, x)), (alone(x), alone(x)))

    @lib.split_rngs(splits=2)
    @lib.vmap(in_axes=(lib.StateAxes({lib.RngState: 0, ...: None}), None))
    def masks(model, x):
        return model(x)

    first, second = masks(wrapped, jnp.ones((64,)))
    assert not np.array_equal(first, second)


@each_side
def test_metadata_crosses_and_axis_names_follow_transforms(side):
    lib, inner = side.outer, side.inner
    init = inner.with_partitioning(inner.initializers.ones_init(), ("in", "out"), eager_sharding=False)

    def make(key):
        return side.wrap(inner.Linear(2, 3, kernel_init=init, rngs=inner.Rngs(key)))

    assert make(0).kernel.get_metadata("out_sharding") == ("in", "out")
    stack = lib.vmap(make, transform_metadata={lib.PARTITION_NAME: "stack"})(jax.random.split(jax.random.key(0), 2))
    assert stack.kernel.get_metadata("out_sharding") == ("stack", "in", "out")


@each_side
@settings(max_examples=15, deadline=None)
@given(recipe=graphs)
def test_random_graphs_with_sharing_and_cycles(side, recipe):
    alone = make_graph(side.inner, recipe)
    wrapped = side.wrap(make_graph(side.inner, recipe))
    x = jnp.ones((2,))
    run = side.outer.jit(lambda model, x: model(x))
    for call in (wrapped, lambda x: run(wrapped, x)):
        assert_trees_equal(call(x), alone(x))
    side.assert_same_state(alone, wrapped)


@each_side
def test_an_attribute_set_in_a_call_is_there_afterwards(side):
    class Lazy(side.inner.Module):
        def __call__(self, x):
            if not hasattr(self, "w"):
                self.w = lib.Param(jnp.ones(x.shape[-1]))
            self.calls = getattr(self, "calls", 0) + 1
            return x * self.w

    lib = side.inner
    wrapped = side.wrap(Lazy())
    assert_trees_equal(wrapped(inputs()), inputs())
    assert type(wrapped.w) is side.outer.Param
    assert wrapped.calls == 1
    assert_trees_equal(side.outer.jit(lambda m, x: m(x))(wrapped, inputs()), inputs())
    assert wrapped.calls == 2


@each_side
def test_a_call_that_fails_changes_nothing(side):
    class Failing(side.inner.Module):
        def __init__(self):
            self.count = side.inner.BatchStat(jnp.zeros(()))

        def __call__(self, fails):
            self.count[...] += 1
            if fails:
                raise KeyError("on purpose")
            return self.count[...]

    wrapped = side.wrap(Failing())
    with pytest.raises(KeyError, match="on purpose"):
        wrapped(True)
    assert float(wrapped.count[...]) == 0.0
    assert float(wrapped(False)) == 1.0


@each_side
def test_plain_arrays_are_state_and_threads_do_not_meet(side):
    class Shift(side.inner.Module):
        def __init__(self):
            self.by = jnp.ones(2)
            self.nested = side.inner.data({"w": side.inner.Param(jnp.ones(2))})

        def __call__(self, x):
            y = x + self.by * self.nested["w"]
            self.by = y
            return y

    wrapped = side.wrap(Shift())
    assert_trees_equal(wrapped(jnp.zeros(2)), jnp.ones(2))
    side.outer.update(wrapped, side.outer.from_flat_state([(("by",), jnp.full(2, 5.0))]))
    assert_trees_equal(wrapped(jnp.zeros(2)), jnp.full(2, 5.0))
    run = side.outer.jit(lambda m, x: m(x))
    assert_trees_equal([run(wrapped, jnp.ones(2)), run(wrapped, jnp.ones(2))], [jnp.full(2, 6.0), jnp.full(2, 7.0)])
    layer = side.wrap(side.inner.Linear(4, 4, rngs=side.inner.Rngs(0)))
    want = layer(inputs())
    with ThreadPoolExecutor(8) as pool:
        assert_trees_equal(list(pool.map(lambda _: layer(inputs()), range(40))), [want] * 40)


def test_a_linen_module_in_a_flax_nnx_trainer():
    x = inputs()
    linen = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
    model = AsFlax(bridge.lazy_init(bridge.ToNNX(linen, rngs=nnx.Rngs(0)), x))
    variables = bridge.variables_of(model.to_nnx_core())
    y, updates = linen.apply(variables, x, mutable="batch_stats")
    assert_trees_close(flax_nnx.jit(lambda m, x: m(x))(model, x), y)
    assert_trees_close(model.layers_1.mean[...], updates["batch_stats"]["layers_1"]["mean"])
    grads = flax_nnx.grad(lambda m: (m(x) ** 2).sum())(model)
    want = jax.grad(lambda p: (linen.apply({**variables, "params": p}, x, mutable=True)[0] ** 2).sum())(
        variables["params"]
    )
    assert_trees_close(flax_nnx.to_pure_dict(grads), want)


@pytest.mark.parametrize("graph", [True, False])
def test_the_modes_of_flax_nnx(graph):
    model = AsFlax(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    y = flax_nnx.jit(lambda m, x: m(x), graph=graph)(model, inputs())
    assert_trees_close(y, model(inputs()))
    grads = flax_nnx.grad(lambda m: m(inputs()).sum(), graph=graph)(model)
    assert_trees_close(grads.bias[...] if hasattr(grads, "bias") else grads["bias"][...], np.full(2, 3.0))


def test_a_wrapped_wrapper_is_the_module():
    layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    there_and_back = FromFlax(AsFlax(layer))
    assert_trees_equal(there_and_back(inputs()), layer(inputs()))
    assert_trees_equal(plain(nnx, there_and_back), plain(nnx, layer))
    assert_trees_equal(plain(nnx, AsFlax(layer).to_nnx_core()), plain(nnx, layer))
    theirs = FromFlax(flax_nnx.Linear(4, 2, rngs=flax_nnx.Rngs(0))).to_flax()
    assert type(theirs) is flax_nnx.Linear


def test_types_of_variables_keep_their_bases():
    class Mask(flax_nnx.Param):
        pass

    ours = variable_type(Mask)
    assert issubclass(ours, nnx.Param)
    assert variable_type(ours) is Mask
    model = FromFlax(flax_nnx.Dict(mask=Mask(jnp.ones(2)), w=flax_nnx.Param(jnp.ones(2))))
    assert list(nnx.state(model, ours)) == ["mask"]
    assert sorted(nnx.state(model, nnx.Param)) == ["mask", "w"]
    with pytest.raises(TypeError, match=r"(?s)expected: a subclass of nnx_core\.Variable.*found: <class 'int'>"):
        variable_type(int)


@each_side
def test_parts_are_called_through_the_module(side):
    alone, wrapped = side.pair()
    x = inputs()
    assert_trees_equal(run(wrapped, lambda module, x: module.layers[1](x), x), alone.layers[1](x))
    side.assert_same_state(alone, wrapped)
    with pytest.raises(TypeError, match=rf"(?s)a part of a {side.name} cannot be called.*bridge\.flax_nnx\.run"):
        wrapped.layers[0](x)
    with pytest.raises(TypeError, match="run wraps modules of either library"):
        run(alone, lambda module: module)


def test_what_is_no_module_of_the_other_library():
    with pytest.raises(TypeError, match=r"(?s)FromFlax wraps modules of flax\.nnx.*AsFlax\(module\)"):
        FromFlax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"(?s)FromFlax wraps.*Make one first: FromFlax\(Linear\(\.\.\.\)\)"):
        FromFlax(flax_nnx.Linear)
    with pytest.raises(TypeError, match=r"(?s)AsFlax wraps modules of nnx_core.*FromFlax\(module\)"):
        AsFlax(flax_nnx.Linear(2, 2, rngs=flax_nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"(?s)AsFlax wraps.*bridge\.ToNNX\(module, rngs"):
        AsFlax(nn.Dense(3))
