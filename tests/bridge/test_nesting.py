"""ToLinen inside Linen, under every Linen transform, with ToNNX inside: the same numbers in any nesting."""

import cloudpickle
import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from bridge.linen_in_nnx.wrapper import ToNNX, lazy_init
from bridge.nnx_in_linen._errors import UnexpectedVariablesError
from bridge.nnx_in_linen.host import current_linen_module
from bridge.nnx_in_linen.wrapper import to_linen, to_linen_class
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY, RNGS = jax.random.key(0), {"dropout": jax.random.key(1)}
X = jnp.asarray(normal(7, 6, 3) + 1)


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


class Block(nnx.Module):
    """Linear, BatchNorm, Dropout: parameters, statistics, keys."""

    def __init__(self, width, rate=0.5, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.norm(self.linear(x))))


BlockToLinen = to_linen_class(Block)


class LinenBlock(nn.Module):
    """The same in Linen, with the same names."""

    width: int
    rate: float = 0.5

    def setup(self):
        self.linear = nn.Dense(self.width)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.dropout = nn.Dropout(self.rate, deterministic=False)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.norm(self.linear(x))))


def step(model, x=X, rngs=RNGS):
    """params, stats -> output, gradients, updated statistics; compiled."""

    @jax.jit
    def run(variables):
        def loss(params):
            y, updates = model.apply({**variables, "params": params}, x, rngs=rngs, mutable=["batch_stats"])
            weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return (y * weights).sum(), (y, updates)

        grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
        return {"output": y, "gradients": grads, "updates": updates}

    return run


# ---- under Linen's transforms: whatever Linen does to its own block, it does to ours ----


def scanned(block):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return block(3, name="block")(carry), None

    axes = {"params": 0, "batch_stats": 0}
    scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True, "dropout": True}, length=4)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(name="layers")(x, None)[0]

    return Model()


def vmapped(block):
    axes = {"params": 0, "batch_stats": 0}
    mapped = nn.vmap(block, in_axes=None, variable_axes=axes, split_rngs={"params": True, "dropout": True}, axis_size=5)
    return mapped(3)


def shared(block):
    class Model(nn.Module):
        def setup(self):
            self.block = block(3)

        def __call__(self, x):
            return self.block(self.block(x))

    return Model()


def compact(block):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(block(3, name="b")(block(3, name="a")(x)))

    return Model()


def listed(block):
    class Model(nn.Module):
        def setup(self):
            self.blocks = [block(3) for _ in range(2)]

        def __call__(self, x):
            for b in self.blocks:
                x = b(x)
            return x

    return Model()


def under_jit(block):
    return nn.jit(block)(3)


def under_remat(block):
    return nn.remat(block)(3)


PLACES = [scanned, vmapped, shared, compact, listed, under_jit, under_remat]


class NoDropoutBlock(Block):
    def __init__(self, width, *, rngs):
        super().__init__(width, 0.0, rngs=rngs)


class LinenNoDropoutBlock(LinenBlock):
    rate: float = 0.0


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_in_every_place_the_linen_block_has(place):
    """Without dropout: masks depend on the Linen path of the Dropout, everything else does not."""
    ours, theirs = place(to_linen_class(NoDropoutBlock)), place(LinenNoDropoutBlock)
    variables = theirs.init(KEY, X)
    assert jax.tree.map(jnp.shape, ours.init(KEY, X)) == jax.tree.map(jnp.shape, variables)
    variables = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), variables)
    equal(step(ours)(variables), step(theirs)(variables))


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_dropout_and_structure_checks_in_every_place(place):
    model = place(BlockToLinen)
    variables = model.init(KEY, X)
    y, _ = model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"])
    other, _ = model.apply(variables, X, rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"])
    assert not (y == other).all()
    again, _ = jax.jit(lambda v: model.apply(v, X, rngs=RNGS, mutable=["batch_stats"]))(variables)
    assert_trees_close(y, again)
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(flax.errors.ModifyScopeVariableError, match='"batch_stats" is immutable'):
        model.apply(variables, X, rngs=RNGS)
    flat = flatten_dict(variables)
    path = next(p for p in flat if p[-1] == "kernel" and "linear" in p)
    del flat[path]
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match='"kernel" in scope'):
        model.apply(unflatten_dict(flat), X, rngs=RNGS, mutable=["batch_stats"])


def test_split_rngs_give_each_layer_its_own_weights_and_mask():
    class Mask(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(rngs.params.normal((3,)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(jnp.ones_like(x))

    rngs = {"params": True, "dropout": True}
    model = nn.vmap(to_linen_class(Mask), in_axes=None, variable_axes={"params": 0}, split_rngs=rngs, axis_size=3)()
    variables = model.init(KEY, X)
    assert len(set(variables["params"]["w"][:, 0].tolist())) == 3
    masks = model.apply(variables, X, rngs=RNGS)
    assert not (masks[0] == masks[1]).all()
    same = nn.vmap(
        to_linen_class(Mask), in_axes=None, variable_axes={"params": 0}, split_rngs={"dropout": False}, axis_size=3
    )()
    masks = same.apply(variables, X, rngs=RNGS)
    assert_trees_equal(masks[0], masks[1])


def test_cache_carried_through_scan():
    class Sum(nnx.Module):
        def __init__(self):
            self.total = nnx.Cache(jnp.zeros(3))

        def __call__(self, x):
            self.total[...] += x
            return self.total[...]

    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, to_linen(Sum, name="sum")(x)

    scan = nn.scan(Body, variable_carry="cache", split_rngs={})
    variables = {"cache": {"sum": {"total": jnp.zeros(3)}}}  # Linen's scan carries what is there before
    (_, ys), updates = scan().apply(variables, None, X, mutable=["cache"])
    assert_trees_close(ys, jnp.cumsum(X, axis=0))
    assert_trees_equal(updates["cache"]["sum"]["total"], ys[-1])


def test_while_loop_and_cond():
    class Count(nnx.Module):
        def __init__(self):
            self.n = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.n[...] += 1
            return x + self.n

    class Model(nn.Module):
        def setup(self):
            self.count = to_linen(Count)

        def __call__(self, x):
            self.count(x)
            x = nn.while_loop(lambda m, x: x < 20.0, lambda m, x: m.count(x), self, x, carry_variables="batch_stats")
            return nn.cond(x > 0, lambda m, x: m.count(x), lambda m, x: x, self, x)

    variables = Model().init(KEY, 0.0)
    y, updates = Model().apply(variables, 0.0, mutable=["batch_stats"])
    # 1 lost, then 2 + 3 + 4 + 5 + 6 = 20, then 7
    assert (float(y), float(updates["batch_stats"]["count"]["n"])) == (27.0, 7.0)


def test_shared_scopes_and_mapped_variables():
    class Shares(nn.Module):
        def setup(self):
            self.linear, self.dense = to_linen(nnx.Linear, 3, 3), nn.Dense(2)
            nn.share_scope(self, self.linear)

        def __call__(self, x):
            return self.dense(self.linear(x))

    variables = Shares().init(KEY, X)
    assert set(variables["params"]) == {"kernel", "bias", "dense"}
    params = variables["params"]
    y = nn.Dense(2).apply(
        {"params": params["dense"]}, X @ params["kernel"] + params["bias"][None]
    )  # the other module's variables are no mistake
    assert_trees_close(Shares().apply(variables, X), y)

    double = nn.map_variables(
        to_linen_class(nnx.Linear), "params", lambda p: jax.tree.map(lambda x: 2 * x, p), init=True
    )(3, 4)
    variables = double.init(KEY, X)
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    assert_trees_equal(double.apply(variables, X), to_linen(nnx.Linear, 3, 4).apply(doubled, X))


# ---- ToNNX inside ToLinen ----


class Mixed(nnx.Module):
    """NNX that owns a Linen block."""

    def __init__(self, rngs):
        self.inner = ToNNX(LinenBlock(3), rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.inner(x))

    def first(self, x):
        return self.head(x)


def test_rows_14_and_56_a_linen_module_inside_is_initialised_by_init():
    model = to_linen(Mixed)
    variables = model.init(KEY, X)
    assert set(flatten_dict(variables, sep="/")) == {
        *(f"params/inner/{path}" for path in ("linear/kernel", "linear/bias", "norm/scale", "norm/bias")),
        *(f"batch_stats/inner/norm/{name}" for name in ("mean", "var")),
        "params/head/kernel",
        "params/head/bias",
    }


def test_l_n_l_equals_linen_alone():
    class Linen(nn.Module):
        def setup(self):
            self.inner, self.head = LinenBlock(3, 0.0), nn.Dense(2)

        def __call__(self, x):
            return self.head(self.inner(x))

    class NoDropout(Mixed):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.inner = ToNNX(LinenBlock(3, 0.0), rngs=rngs)

    variables = Linen().init(KEY, X)
    equal(step(to_linen(NoDropout))(variables), step(Linen())(variables))


def test_l_n_l_is_strict_too():
    model = to_linen(Mixed)
    variables = model.init(KEY, X)

    def run(variables, **options):
        return model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"], **options)

    without = {"params": {**variables["params"], "inner": {"norm": variables["params"]["inner"]["norm"]}}}
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        run({**variables, **without})
    more = {"params": {**variables["params"], "inner2": variables["params"]["inner"]}}
    with pytest.raises(UnexpectedVariablesError, match="params/inner2/linear/kernel"):
        run({**variables, **more})
    with pytest.raises(flax.errors.InvalidRngError):
        model.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, X, rngs=RNGS)
    # Variables that only another method needs are no mistake.
    assert_trees_equal(model.apply(variables, X, method="first"), nn.Dense(2).apply(
        {"params": variables["params"]["head"]}, X
    ))  # fmt: skip


class Deep(nn.Module):
    """Linen > NNX > Linen > NNX."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        class Inner(nn.Module):
            rate: float

            @nn.compact
            def __call__(self, x):
                return BlockToLinen(3, rate=self.rate, name="block")(nn.Dense(3, name="dense")(x))

        class Middle(nnx.Module):
            def __init__(self, rate, rngs):
                self.linen = ToNNX(Inner(rate), rngs=rngs)
                self.linear = nnx.Linear(3, 3, rngs=rngs)

            def __call__(self, x):
                x = self.linear(self.linen(x))
                self.sow(nnx.Intermediate, "h", x)
                return x

        return nn.Dense(2, name="head")(to_linen(Middle, self.rate, name="middle")(x))


def test_l_n_l_is_traced_once_for_each_form_of_a_call():
    made = []

    class Counts(Mixed):
        def __init__(self, rngs):
            made.append(1)
            super().__init__(rngs)

    model = to_linen(Counts)
    variables = model.init(KEY, X)
    y, _ = model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"])
    made.clear()
    again, _ = model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"])
    assert not made
    assert_trees_equal(again, y)
    by_function, _ = model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"], nnx_method=Counts.__call__)
    assert_trees_equal(by_function, y)


def test_captured_intermediates_of_a_shared_module():
    model = shared(to_linen_class(NoDropoutBlock))
    variables = model.init(KEY, X)
    y, updates = model.apply(variables, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
    captured = updates["intermediates"]["block"]["__call__"]
    assert len(captured) == 2
    assert_trees_equal(captured[1], y)


def test_l_n_l_n():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = LinenBlock(3, 0.0, name="block")(nn.Dense(3, name="dense")(x))
            return nn.Dense(2, name="head")(nn.Dense(3, name="linear")(x))

    model = Deep()
    variables = model.init(KEY, X)
    params, stats = variables["params"], variables["batch_stats"]["middle"]["linen"]["block"]
    flat = {
        "params": {"head": params["head"], "linear": params["middle"]["linear"], **params["middle"]["linen"]},
        "batch_stats": {"block": stats},
    }
    ours, theirs = step(model)(variables), step(Flat())(flat)
    equal(ours["output"], theirs["output"])
    equal(ours["gradients"]["middle"]["linen"], {k: theirs["gradients"][k] for k in ("block", "dense")})
    equal(ours["updates"]["batch_stats"]["middle"]["linen"], theirs["updates"]["batch_stats"])
    _, updates = model.apply(variables, X, mutable=["batch_stats", "intermediates"])
    assert [x.shape for x in updates["intermediates"]["middle"]["h"]] == [(6, 3)]


def test_l_n_l_n_with_dropout_trains():
    model = Deep(0.5)
    variables = model.init({"params": KEY, **RNGS}, X)
    first = step(model)(variables)["output"]
    assert not (first == step(model, rngs={"dropout": jax.random.key(3)})(variables)["output"]).all()
    assert_trees_equal(first, step(model)(variables)["output"])
    with pytest.raises(flax.errors.InvalidRngError, match="needs PRNG"):
        model.apply(variables, X, mutable=["batch_stats"])


def test_linen_modules_made_by_nnx_code_belong_to_nnx():
    parents = []

    class Makes(nnx.Module):
        def __init__(self, rngs):
            dense = nn.Dense(4)
            parents.append(dense.parent)
            self.inner = ToNNX(dense, rngs=rngs)

        def __call__(self, x):
            parents.append(nn.Dense(1).parent)
            return self.inner(x), current_linen_module().name

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return to_linen(Makes, name="makes")(x)

    variables = Outer().init(KEY, X)
    y, name = Outer().apply(variables, X)
    assert (set(parents), name) == ({None}, "makes")
    assert_trees_equal(y, nn.Dense(4).apply({"params": variables["params"]["makes"]["inner"]}, X))


def test_a_linen_model_with_nnx_inside_pickles():
    model = nn.Sequential([to_linen(nnx.Linear, 3, 4), BlockToLinen(4), nn.Dense(1)])
    new = cloudpickle.loads(cloudpickle.dumps(model))  # pickle cannot: nn.Dense holds a local function
    assert_trees_equal(new.init(KEY, X), model.init(KEY, X))


def test_to_linen_in_to_nnx():
    """NNX > Linen > NNX: with the weights of the inner variables the wrapper computes what Linen does."""
    inner = nn.Sequential([BlockToLinen(3, rate=0.0), nn.Dense(2)])
    variables = inner.init(KEY, X)
    model = ToNNX(inner, rngs=nnx.Rngs(0))
    lazy_init(model, X)
    nnx.update(model, jax.tree.map(lambda x: x, variables["params"]))
    y = model(X)
    assert_trees_equal(y, inner.apply(variables, X, mutable=["batch_stats"])[0])


def test_row14_linen_init_leaves_the_averages_of_an_inner_linen_module_alone():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.bn = ToNNX(nn.BatchNorm(use_running_average=False), rngs=rngs)

        def __call__(self, x):
            return self.bn(x)

    x = jnp.arange(6.0).reshape(2, 3)
    found = to_linen(Holder).init(jax.random.key(0), x)["batch_stats"]["bn"]
    wanted = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)["batch_stats"]
    assert_trees_equal(dict(found), dict(wanted))


@pytest.mark.parametrize("guarded", [False, True], ids=["writes in init", "waits"])
def test_init_gives_the_output_and_the_state_of_linens_init(guarded):
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            n = self.variable("state", "n", jnp.zeros, ())
            if not (guarded and self.is_initializing()):
                n.value += 1
            return x * n.value

    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.inner = ToNNX(Counter(), rngs=rngs)

        def __call__(self, x):
            return self.inner(x)

    found, wanted = to_linen(Holder).init_with_output(KEY, X), Counter().init_with_output(KEY, X)
    assert_trees_equal(found[0], wanted[0])
    assert_trees_equal(found[1]["state"]["inner"], wanted[1]["state"])
