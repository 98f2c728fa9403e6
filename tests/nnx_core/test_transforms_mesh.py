"""shard_map and pmap over functions of objects, on eight devices: against jax on arrays."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core.transforms.mesh import pmap, shard_map
from tests.strategies import Affine, Count, Node, Tied, assert_no_tracer, reachable, stack_of_affine
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(8, 3)

if len(jax.devices()) < 8:
    pytest.skip("needs eight devices", allow_module_level=True)
MESH = Mesh(jax.devices()[:8], ("d",))


def table(rows=8):
    m = Node()
    m.w, m.n = nnx.Param(jnp.arange(2.0 * rows).reshape(rows, 2)), Count(jnp.array(0))
    return m


def laid_out(x, *spec):
    return x.sharding.is_equivalent_to(NamedSharding(MESH, P(*spec)), x.ndim)


# ---- shard_map -----------------------------------------------------------------------------------------------------


def test_shard_map_data_parallel():
    m = Affine()
    members = reachable(m)

    @shard_map(mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"))
    def f(m, x):
        assert x.shape == (1, 3)
        return m(x)

    y = f(m, X)
    assert_trees_close(y, X @ m.kernel[...])
    assert laid_out(y, "d")
    assert_trees_close(f(m, x=X), y)
    assert int(m.calls[...]) == 2
    assert [id(x) for x in reachable(m)] == [id(x) for x in members]
    assert_no_tracer(m)


@pytest.mark.parametrize("spec", ["filters", "state", "sharding of state"])
def test_shard_map_by_variable_writes_back(spec):
    state = nnx.State({"w": P("d"), "n": P()})
    specs = {
        "filters": nnx.StateSharding({nnx.Param: P("d"), ...: P()}),
        "state": nnx.StateSharding({nnx.PathContains("w"): P("d"), ...: None}),
        "sharding of state": nnx.StateSharding(state),
    }
    m = table()
    w = m.w[...]

    def f(m, x):
        assert m.w.shape == (1, 2)
        m.w[...] = m.w + x[:, None]
        m.n[...] += 1
        return {"sum": jax.lax.psum(m.w[...].sum(), "d"), "x": x}

    out = shard_map(f, mesh=MESH, in_specs=(specs[spec], P("d")), out_specs={"sum": P(), "x": P("d")})(m, jnp.ones(8))
    assert_trees_equal(m.w[...], w + 1)
    assert laid_out(m.w.get_value(), "d")
    assert_trees_close(out["sum"], (w + 1).sum())
    assert int(m.n[...]) == 1


@pytest.mark.slow
def test_shard_map_tensor_parallel_gradient_equals_one_device():
    m = Node()
    m.up, m.down = nnx.Param(jax.random.normal(jax.random.key(0), (3, 16))), nnx.Param(jnp.ones((16, 2)))
    spec = nnx.StateSharding({nnx.PathContains("up"): P(None, "d"), nnx.PathContains("down"): P("d", None)})

    def whole(m, x):
        return jnp.tanh(x @ m.up[...]) @ m.down[...]

    split = shard_map(
        lambda m, x: jax.lax.psum(whole(m, x), "d"), mesh=MESH, in_specs=(spec, P(None)), out_specs=P(None)
    )
    assert_trees_close(split(m, X), whole(m, X))
    mine = nnx.grad(lambda m: split(m, X / 24).sum())(m)
    theirs = nnx.grad(lambda m: whole(m, X / 24).sum())(m)
    assert_trees_close(dict(nnx.to_pure_dict(mine)), dict(nnx.to_pure_dict(theirs)))


def test_shard_map_makes_and_changes_structure():
    def f(m, x):
        m.extra = nnx.Param(jax.lax.psum(x, "d"))
        return Node(), nnx.Param(x * 2)

    m = Node()
    _, v = shard_map(f, mesh=MESH, in_specs=(P(), P("d")), out_specs=(P(), P("d")))(m, jnp.arange(8.0))
    assert_trees_equal(v[...], jnp.arange(8.0) * 2)
    assert_trees_equal(m.extra[...], jnp.array([28.0]))
    with pytest.raises(ValueError, match=r"(?s)graph_updates=False.*extra"):
        shard_map(f, mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"), graph_updates=False)(Node(), jnp.ones(8))
    with pytest.raises(ValueError, match="graph=False"):
        shard_map(lambda m: m(X), mesh=MESH, in_specs=P(), out_specs=P(), graph=False)(Tied())


def test_shard_map_takes_methods_and_jit():
    class Scaled(Affine):
        def loss(self, x, scale=1.0):
            return self(x) * scale

    m = Scaled()
    f = shard_map(m.loss, mesh=MESH, in_specs=(P("d"), None), out_specs=P("d"), check_vma=False, axis_names={"d"})
    f(X, 1.0)
    f(X + 1, 1.0)
    assert_trees_close(f(X + 2, scale=2.0), (X + 2) @ m.kernel[...] * 2)
    assert int(m.calls[...]) == 3
    g = nnx.jit(shard_map(lambda m, x: m(x), mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d")))
    assert_trees_close(g(m, X), X @ m.kernel[...])
    assert int(m.calls[...]) == 4


def traces_of(step):
    """How often `step(f)` traces in three calls that feed a state back; in bare JAX and with a module."""
    counts = []

    def pure(n, x):
        counts[-1] += 1
        return n + 1, x + 1

    def lifted(m, x):
        counts[-1] += 1
        m.n[...] += 1
        return x + 1

    bare, ours, m, n = step(pure, True), step(lifted, False), table(), jnp.array(0)
    counts.append(0)
    for _ in range(3):
        n, _ = bare(n, jnp.ones(8))
    counts.append(0)
    for _ in range(3):
        ours(m, jnp.ones(8))
    return counts


def test_shard_map_traces_as_often_as_jax():
    def step(f, bare):
        if bare:
            return jax.jit(jax.shard_map(f, mesh=MESH, in_specs=(P(), P("d")), out_specs=(P(), P("d"))))
        return nnx.jit(shard_map(f, mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d")))

    bare, ours = traces_of(step)
    assert ours == bare


def test_shard_map_errors():
    m = Affine()
    with pytest.raises(ValueError, match=r"in_specs has 1 items, and .* was called with 2 arguments"):
        shard_map(lambda m, x: m(x), mesh=MESH, in_specs=(P(),), out_specs=P())(m, X)
    with pytest.raises(ValueError, match=r"(?s)Param is reached twice.*args\[0\]\.kernel.*args\[1\]"):
        shard_map(lambda m, k: None, mesh=MESH, in_specs=(P(), P("d")), out_specs=P())(m, m.kernel)
    with pytest.raises(TypeError, match=r"\['y'\] are keyword-only, and specs are given by position"):
        shard_map(lambda x, *, y: x, mesh=MESH, in_specs=P(), out_specs=P())(X, y=X)
    assert_no_tracer(m)


# ---- pmap ----------------------------------------------------------------------------------------------------------


def test_pmap_over_a_stack():
    stack = stack_of_affine(8)
    members = reachable(stack)
    xs = X.reshape(8, 1, 3)
    out = pmap(lambda m, x: m(x))(stack, xs)
    assert_trees_close(out, jnp.einsum("nij,njk->nik", xs, stack.kernel[...]))
    assert_trees_equal(stack.calls[...], jnp.ones(8, jnp.int32))
    assert [id(x) for x in reachable(stack)] == [id(x) for x in members]
    assert_no_tracer(stack)


def test_pmap_makes_modules_and_uses_axis_names():
    @pmap(axis_name="d", axis_size=4, devices=jax.devices()[:4])
    def make(key):
        m = Affine()
        m.mean = Count(jax.lax.pmean(jax.random.uniform(key), "d"))
        return m

    m = make(jax.random.split(jax.random.key(0), 4))
    assert m.kernel.shape == (4, 3, 3)
    assert_trees_equal(m.mean[...], jnp.full(4, m.mean[...][0]))


def test_pmap_state_axes_write_each_variable_in_its_place():
    m = table(2)
    m.w.set_value(jnp.arange(16.0).reshape(2, 8))
    axes = nnx.StateAxes({nnx.Param: 1, ...: None})

    def f(m, x):
        assert m.w.shape == (2,)
        m.w[...] += x
        m.n[...] += 1
        return m.w[...].sum()

    out = pmap(f, in_axes=(axes, 0))(m, jnp.arange(8.0))
    expected = jnp.arange(16.0).reshape(2, 8) + jnp.arange(8.0)
    assert_trees_equal(m.w[...], expected)
    assert_trees_equal(out, expected.sum(0))
    assert int(m.n[...]) == 1


def test_pmap_axis_metadata():
    def f(m):
        assert m.w.get_metadata("out_sharding") == ("a",)
        m.extra = nnx.Param(jnp.ones((2, 3)), out_sharding=("a", "b"))

    m = Node()
    m.w = nnx.Param(jnp.ones((8, 2)), out_sharding=("stack", "a"))
    pmap(f, transform_metadata={nnx.PARTITION_NAME: "stack"})(m)
    assert m.w.get_metadata("out_sharding") == ("stack", "a")
    assert m.extra.get_metadata("out_sharding") == ("stack", "a", "b")
    assert m.extra.shape == (8, 2, 3)


@pytest.mark.parametrize("number", [2, (2,), -1])
def test_pmap_static_arguments_methods_and_keywords(number):
    m = Affine()
    f = pmap(lambda m, x, n: m(x) * len(n), in_axes=(None, 0, None), static_broadcasted_argnums=number)
    assert_trees_close(f(m, X, n="abc"), X @ m.kernel[...] * 3)
    assert_trees_close(pmap(m)(X), X @ m.kernel[...])
    assert_trees_close(pmap(m.__call__)(x=X), X @ m.kernel[...])
    assert int(m.calls[...]) == 3


def test_pmap_keyword_only_arguments_have_axis_0():
    def f(x, *, y):
        return x + y

    assert_trees_equal(pmap(f)(jnp.arange(8.0), y=jnp.ones(8)), jnp.arange(8.0) + 1)


@pytest.mark.parametrize("number", [0, (0,), -2])
def test_pmap_donation_gives_new_buffers(number):
    m = table()
    old = jax.device_put(m.w[...], NamedSharding(MESH, P("d")))
    m.w.set_value(old)
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    f = pmap(lambda m, x: m.w[...] * x, in_axes=(axes, 0), donate_argnums=number)
    out = f(m, jnp.ones(8))
    assert_trees_equal(m.w[...], jnp.arange(16.0).reshape(8, 2))
    assert_trees_equal(out, m.w[...])
    assert m.w.get_value() is not old


def test_pmap_donation_keeps_axis_metadata():
    m = Node()
    m.w = nnx.Param(jnp.ones((8, 2)), out_sharding=(None, "a"))

    def f(m):
        assert m.w.get_metadata("out_sharding") == ("a",)
        m.w[...] *= 2

    pmap(f, donate_argnums=0)(m)
    assert m.w.get_metadata("out_sharding") == (None, "a")
    assert_trees_equal(m.w[...], jnp.full((8, 2), 2.0))


def test_pmap_traces_as_often_as_jax():
    def step(f, bare):
        return jax.pmap(f, in_axes=(None, 0), out_axes=(None, 0)) if bare else pmap(f, in_axes=(None, 0))

    bare, ours = traces_of(step)
    assert ours == bare


def test_pmap_errors():
    m = Affine()
    with pytest.raises(ValueError, match=r"in_axes has 1 items, and .* was called with 2 arguments"):
        pmap(lambda m, x: m(x), in_axes=(None,))(m, X)
    with pytest.raises(ValueError, match=r"donate_argnums \[2\] is out of range: .* with 2 arguments"):
        pmap(lambda m, x: m(x), in_axes=(None, 0), donate_argnums=2)(m, X)
    with pytest.raises(ValueError, match=r"static_broadcasted_argnums \[-3\] is out of range"):
        pmap(lambda m, x: m(x), in_axes=(None, 0), static_broadcasted_argnums=(-3,))(m, X)
    with pytest.raises(ValueError, match=r"(?s)Param is reached twice.*kernel: not mapped.*args\[1\]: axis 0"):
        pmap(lambda m, k: None, in_axes=(None, 0))(m, m.kernel)
    with pytest.raises(ValueError, match=r"(?s)graph_updates=False.*extra"):
        pmap(lambda m, x: setattr(m, "extra", 1), in_axes=(None, 0), graph_updates=False)(m, X)
    with pytest.raises(ValueError, match="graph=False"):
        pmap(lambda m, x: m(x), in_axes=(None, 0), graph=False)(Tied(), X)
    assert_no_tracer(m)
