"""lazy_init of models that call wrapped modules inside of transforms, and of models it cannot initialise."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToNNX, variables_of
from bridge._errors import UnboundModuleError
from bridge.linen_in_nnx._errors import UnknownValueError
from tests.support.linen_models import KEY
from tests.support.numbers import normal
from tests.tolerance import assert_trees_close, assert_trees_equal

X = jnp.asarray(normal(7, 4, 3) + 1)
SPEC = jax.ShapeDtypeStruct(X.shape, X.dtype)
DROPOUT = jax.random.key(11)
LAYERS = {nn.PARTITION_NAME: "layers"}


class Block(nn.Module):
    """Parameters with axis names, statistics, keys."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dropout(0.5, deterministic=False)(x)


class Model(nnx.Module):
    def __init__(self, how, module=None):
        self.part = ToNNX(module or Block(), {"params": KEY, "dropout": DROPOUT})
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.how = how

    def __call__(self, x):
        return self.how(self.part, self.drop(self.norm(x)))


# ---- an axis for the variables ----


def in_vmap(part, x):
    f = nnx.vmap(lambda m, x: m(x), in_axes=(0, None), axis_size=5, transform_metadata=LAYERS)
    return nnx.split_rngs(splits=5)(f)(part, x)


def in_scan(part, x):
    axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry, "length": 5, "transform_metadata": LAYERS}
    return nnx.split_rngs(splits=5)(nnx.scan(lambda m, x: m(x), **axes))(part, x)


def of_linen(transform):
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "metadata_params": LAYERS}
    rngs = {"params": True, "dropout": True}
    if transform == "vmap":
        return nn.vmap(Block, in_axes=None, axis_size=5, split_rngs=rngs, **axes)()
    body = lambda block, x, _: (block(x), None)  # noqa: E731
    scan = nn.scan(body, length=5, split_rngs=rngs, **axes)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(Block(name="part"), x, None)[0]

    return Stack()


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [X, SPEC], ids=["arrays", "shapes"])
@pytest.mark.parametrize(("transform", "how"), [("vmap", in_vmap), ("scan", in_scan)], ids=["vmap", "scan"])
def test_stacked_variables_are_those_of_linens_transforms_row29(transform, how, inputs):
    model = Model(how)
    before = {path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    bridge.lazy_init(model, inputs)
    after = {path: v.get_raw_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    moved = {path[0] for path, raw in before.items() if after[path] is not raw}
    assert moved == {"part"}  # its own random streams
    assert {name: int(model.part.rngs[name].count[...]) for name in model.part.rngs} == {"params": 1, "dropout": 1}

    linen = of_linen(transform)
    theirs = linen.init({"params": KEY, "dropout": DROPOUT}, X)
    theirs = {collection: tree.get("part", tree) for collection, tree in theirs.items()}
    ours = variables_of(model.part)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)  # boxes, with their names, included
    assert ours["params"]["Dense_0"]["kernel"].names == ("layers", "in", "out")
    for i, key in enumerate(jax.random.split(jax.random.fold_in(KEY, 0), 5)):  # what nnx.split_rngs makes of it
        alone = Block().init({"params": jax.random.fold_in(key, 0), "dropout": DROPOUT}, X)
        assert_trees_equal(jax.tree.map(lambda x, i=i: x[i], nn.unbox(ours)), nn.unbox(alone))
    assert model(X).shape == ((5, 4, 3) if transform == "vmap" else (4, 3))


def test_no_key_is_used_again_after_a_stacked_init():
    model = bridge.lazy_init(Model(in_vmap, nn.Dropout(0.5, deterministic=False)), X)
    first = model(X)
    assert not (first == model(X)).all()
    keyed = Model(in_vmap)
    bridge.lazy_init(keyed, X)
    counts = [int(keyed.part.rngs[name].count[...]) for name in keyed.part.rngs]
    keyed(X)
    assert all(int(keyed.part.rngs[name].count[...]) > n for name, n in zip(keyed.part.rngs, counts, strict=True))


def test_gradients_of_a_stacked_model():
    model = bridge.lazy_init(Model(in_vmap, nn.Dense(3)), X)
    kernels, biases = model.part.kernel[...], model.part.bias[...]
    x = jax.random.normal(KEY, (4, 3))
    grads = nnx.grad(lambda part: (in_vmap(part, x) ** 2).sum())(model.part)
    wanted = jax.grad(lambda k: ((x @ k + biases[:, None]) ** 2).sum())(kernels)
    assert_trees_close(grads["kernel"].get_value(), wanted)


def test_values_that_only_a_mapped_call_knows():
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x - self.variable("stats", "mean", lambda: x.mean(0)).value

    model = bridge.lazy_init(Model(in_vmap, Centred()), X)
    assert model.part.mean.shape == (5, 3)
    other = Model(in_vmap, Centred())
    with pytest.raises(UnknownValueError, match=r"ToNNX\(Centred\)(.|\n)*depend on a ShapeDtypeStruct"):
        bridge.lazy_init(other, SPEC)
    assert variables_of(other.part) == {}


# ---- transforms that take no new variables: they are made before ----

SHARED = {
    "nnx.vmap": lambda part, x: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(part, x),
    "jax.vmap": lambda part, x: jax.vmap(part)(x),
    "jax.lax.scan": lambda part, x: jax.lax.scan(lambda c, _: (part(c), None), x, length=3)[0],
    "nnx.scan": lambda part, x: nnx.scan(lambda m, x: m(x), in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=3)(
        part, x
    ),
    "cond": lambda part, x: nnx.cond(True, lambda m, x: m(x), lambda m, x: x, part, x),
    "while_loop": lambda part, x: nnx.while_loop(lambda c: c[1].sum() < -1e9, lambda c: (c[0], c[0](c[1])), (part, x))[
        1
    ],
    "fori_loop": lambda part, x: nnx.fori_loop(0, 3, lambda i, c: (c[0], c[0](c[1])), (part, x))[1],
}


@pytest.mark.parametrize("inputs", [X, SPEC], ids=["arrays", "shapes"])
@pytest.mark.parametrize("name", SHARED)
def test_variables_that_all_steps_share(name, inputs):
    model = bridge.lazy_init(Model(SHARED[name], nn.Dense(3)), inputs)
    assert_trees_equal(variables_of(model.part), nn.Dense(3).init(jax.random.fold_in(KEY, 0), X))
    assert {name: int(model.part.rngs[name].count[...]) for name in model.part.rngs} == {"params": 1, "dropout": 0}
    assert float(abs(model.norm.mean[...]).sum()) == 0.0
    assert int(model.drop.rngs.count[...]) == 0
    assert model(X).shape == (4, 3)


def test_several_wrapped_modules_in_one_loop():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = (ToNNX(nn.Dense(n), {"params": KEY}) for n in (6, 3))

        def __call__(self, x):
            return nnx.fori_loop(0, 3, lambda i, c: (c[0], c[1], c[1](c[0](c[2]))), (self.a, self.b, x))[2]

    model = bridge.lazy_init(Two(), SPEC)
    assert (model.a.kernel.shape, model.b.kernel.shape) == ((3, 6), (6, 3))
    x = X
    for _ in range(3):
        x = model.b(model.a(x))
    assert_trees_close(model(X), x)


@pytest.mark.parametrize("name", ["jax.vmap", "nnx.vmap", "cond", "nnx.scan"])
def test_the_models_own_error_is_what_is_raised(name):
    def wrong(part, x):
        y = SHARED[name](part, x)
        raise KeyError(f"mine {y.shape}")

    model = Model(wrong, nn.Dense(3))
    with pytest.raises(KeyError, match="mine"):
        bridge.lazy_init(model, X)
    assert variables_of(model.part) == {}


# ---- what cannot be initialised ----


class Plain(bridge.Module):
    @bridge.compact
    def __call__(self, x):
        return x + self.param("bias", nn.initializers.ones, (3,))


def test_a_bridge_module_without_variables_is_named():
    class Holder(nnx.Module):
        def __init__(self, plain):
            self.parts = nnx.List([ToNNX(nn.Dense(3), nnx.Rngs(0)), plain])

        def __call__(self, x):
            return self.parts[1](self.parts[0](x))

    model = Holder(Plain())
    with pytest.raises(UnboundModuleError, match=r"lazy_init, at parts/1, of Plain(.|\n)*\.bind\(variables\)"):
        bridge.lazy_init(model, X)
    assert variables_of(model.parts[0]) == {}
    with pytest.raises(UnboundModuleError, match=r"lazy_init, at \(root\), of Plain"):
        bridge.lazy_init(Plain(), X)
    bound = bridge.lazy_init(Holder(Plain().bind(Plain().init(0, X))), X)
    assert_trees_equal(bound(X), bound.parts[0](X) + 1)


def test_all_or_nothing():
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x - self.variable("stats", "mean", lambda: x.mean(0)).value

    model = nnx.Sequential(ToNNX(nn.Dense(3), nnx.Rngs(0)), ToNNX(Centred(), nnx.Rngs(0)))
    with pytest.raises(UnknownValueError):
        bridge.lazy_init(model, SPEC)
    assert [variables_of(part) for part in model.layers] == [{}, {}]
    assert [int(part.rngs.default.count[...]) for part in model.layers] == [0, 0]
    assert bridge.lazy_init(model, X)(X).shape == (4, 3)


# ---- random keys that the call itself gives ----


def in_jit(part, x):
    return nnx.jit(lambda m, x: m(x, rngs={"params": KEY}))(part, x)


GIVEN = {
    "dict": lambda part, x: part(x, rngs={"params": KEY}),
    "key": lambda part, x: part(x, rngs=KEY),
    "streams": lambda part, x: part(x, rngs=nnx.Rngs(params=KEY)),
    "jit": in_jit,
    "shared by steps": lambda part, x: jax.vmap(lambda x: part(x, rngs={"params": KEY}))(x),
}


@pytest.mark.parametrize("own", [None, 5], ids=["no keys", "own keys"])
@pytest.mark.parametrize("name", GIVEN)
def test_keys_of_the_call_come_first_row29(name, own):
    class Given(nnx.Module):
        def __init__(self):
            self.part = ToNNX(nn.Dense(3), own)

        def __call__(self, x):
            return GIVEN[name](self.part, x)

    model = bridge.lazy_init(Given(), SPEC)
    key = jax.random.fold_in(KEY, 0) if name == "streams" else KEY
    assert_trees_equal(variables_of(model.part), nn.Dense(3).init(key, X))
    if own is not None:
        assert int(model.part.rngs.default.count[...]) == 0


def test_keys_of_a_mapped_call_come_first_row29():
    keys = jax.random.split(KEY, 5)

    class Given(nnx.Module):
        def __init__(self):
            self.part = ToNNX(nn.Dense(3))

        def __call__(self, x):
            f = nnx.vmap(lambda m, key, x: m(x, rngs={"params": key}), in_axes=(0, 0, None))
            return f(self.part, keys, x)

    model = bridge.lazy_init(Given(), SPEC)
    assert_trees_equal(variables_of(model.part), jax.vmap(lambda key: nn.Dense(3).init(key, X))(keys))


def test_keys_of_a_call_of_a_submodule_row29():
    class Two(nn.Module):
        def setup(self):
            self.enc, self.dec = nn.Dense(4), nn.Dense(3)

        def __call__(self, x):
            return self.dec(self.enc(x))

    class Given(nnx.Module):
        def __init__(self):
            self.part = ToNNX(Two(), 5)

        def __call__(self, x):
            return self.part.enc(x, rngs={"params": KEY})

    model = bridge.lazy_init(Given(), X)
    wanted = Two().init(KEY, X, method=lambda module, x: module.enc(x))
    assert_trees_equal(variables_of(model.part), wanted)


def test_a_loaded_module_needs_no_keys():
    class Two(nnx.Module):
        def __init__(self):
            self.loaded, self.new = ToNNX(nn.Dense(3)), ToNNX(nn.Dense(2), 0)

        def __call__(self, x):
            return self.new(self.loaded(x))

    model = Two()
    model.loaded.lazy_init(X, rngs=KEY)
    kernel = model.loaded.kernel
    assert bridge.lazy_init(model, SPEC)(X).shape == (4, 2)
    assert model.loaded.kernel is kernel
