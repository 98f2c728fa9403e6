"""Real Linen networks through the bridge: the same bits as Linen alone gives.

Both sides are compiled, from the same variables and keys. Needs packages that the ordinary environment lacks:
`nox -s models`.
"""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import bridge
import nnx_core as nnx
from bridge import checkpoint
from tests.third_party.models import KEY, MODELS
from tests.tolerance import assert_trees_close, assert_trees_equal

if not any(importlib.util.find_spec(row.package) for row in MODELS):
    pytest.skip("no package with Linen networks is installed: nox -s models", allow_module_level=True)

# What these packages and what they import warn about is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TX = optax.adam(1e-2)


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


@pytest.fixture(scope="module", params=MODELS, ids=lambda row: row.name)
def case(request):
    return request.param.case()


@pytest.fixture(scope="module")
def made(case):
    """What Linen's `init` makes."""
    return jax.jit(lambda: case.module.init({"params": KEY, **case.keys}, *case.args, method=case.method))()


@pytest.fixture(scope="module")
def variables(made):
    """Other values: biases and statistics start as constants, which would hide a mix-up."""
    return jax.tree.map(lambda x: x + 0.01 * jnp.arange(x.size).reshape(x.shape).astype(x.dtype), made)


@pytest.fixture(scope="module")
def wrapped(case):
    """A function that gives a new ToNNX of the network, which hands Linen exactly the keys given."""

    @nnx.jit
    def make():
        model = bridge.ToNNX(case.module, rngs={"params": KEY, **case.keys}, parity=True)
        return bridge.lazy_init(model, *case.args, method=case.method)

    first = make()

    def copy(variables=None):
        model = nnx.clone(first)
        if variables is not None:
            assert bridge.load_variables(model, variables).complete
        return model

    return copy


def written(variables):
    return sorted(set(variables) - {"params"})


def loss_of(outputs):
    """A number that depends on every inexact output, with a different weight for each."""
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.real(x) * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)).sum() for x in leaves)


@pytest.fixture(scope="module")
def linen_step(case):
    """(params, the rest, optimizer state) -> the same after a step, and what the step saw; compiled."""

    @jax.jit
    def step(params, rest, opt_state):
        def loss_fn(params):
            mutable = sorted(rest) or False
            out = case.module.apply(
                {"params": params, **rest}, *case.args, rngs=case.keys or None, method=case.method, mutable=mutable
            )
            outputs, updates = out if mutable else (out, {})
            return loss_of(outputs), (outputs, updates)

        (loss, (outputs, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, opt_state = TX.update(grads, opt_state, params)
        seen = {"loss": loss, "outputs": outputs, "grads": grads}
        return (optax.apply_updates(params, changes), {**rest, **updates}, opt_state), seen

    return step


@pytest.fixture(scope="module")
def nnx_step(case):
    """The same step of a wrapped model and its optimizer."""

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            outputs = model(*case.args, rngs=case.keys or None, method=case.method)
            return loss_of(outputs), outputs

        (loss, outputs), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return {"loss": loss, "outputs": outputs, "grads": grads}

    return step


def params_of(grads):
    return bridge.nnx_attrs_to_linen_vars(grads)["params"]


def test_init_is_linens(made, wrapped):
    """Row 32: the keys given are the keys used."""
    equal(bridge.variables_of(wrapped()), made)


def test_outputs_gradients_and_training_are_linens(variables, wrapped, linen_step, nnx_step):
    rest = {name: variables[name] for name in written(variables)}
    state, model = (variables["params"], rest, TX.init(variables["params"])), wrapped(variables)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for _ in range(3):
        state, seen = linen_step(*state)
        found = nnx_step(model, optimizer)
        equal({**found, "grads": params_of(found["grads"])}, seen)
        equal(bridge.variables_of(model), {"params": state[0], **state[1]})
    moved = jax.tree.map(lambda a, b: (a != b).any(), state[0], variables["params"])
    assert any(jax.tree.leaves(moved)), "nothing was trained"


def test_variables_round_trip(variables, wrapped):
    """Law 6, and rows 18, 31: through attributes, through a model and through split and merge."""
    assert_trees_equal(bridge.nnx_attrs_to_linen_vars(bridge.linen_vars_to_nnx_attrs(variables)), variables)
    model = wrapped(variables)
    assert_trees_equal(bridge.variables_of(model), variables)
    copy = nnx.merge(*nnx.split(model))
    assert_trees_equal(bridge.variables_of(copy), variables)
    assert_trees_equal(bridge.variables_of(nnx.clone(model)), variables)


def test_checkpoints_go_across_and_back(variables, wrapped, linen_step, nnx_step, tmp_path):
    """Linen saves, NNX goes on; NNX saves, Linen goes on: as if Linen had done it all."""
    rest = {name: variables[name] for name in written(variables)}
    state, _ = linen_step(variables["params"], rest, TX.init(variables["params"]))
    save(tmp_path / "linen", {"step": 1, "params": state[0], "opt_state": state[2], **state[1]})

    model = wrapped()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    report = checkpoint.load_into(model, tmp_path / "linen", optimizer=optimizer)
    assert (int(optimizer.step[...]), report.dropped, report.warnings) == (1, [], [])
    assert_trees_equal(bridge.variables_of(model), {"params": state[0], **state[1]})
    nnx_step(model, optimizer)
    state, _ = linen_step(*state)

    opt_state = nnx.to_pure_dict(nnx.state(optimizer, nnx.OptState))["opt_state"]
    template = jax.eval_shape(TX.init, state[0])
    linen = checkpoint.to_linen_layout(opt_state, template)
    save(tmp_path / "nnx", {**bridge.variables_of(model), "opt_state": linen, "step": int(optimizer.step[...])})
    target = {"params": state[0], **state[1], "opt_state": state[2], "step": 0}
    back = checkpoint.restore_into_structure(target, checkpoint.read_tree(tmp_path / "nnx"))
    assert back["step"] == 2
    loaded = (back["params"], {name: back[name] for name in rest}, back["opt_state"])
    equal(jax.tree.map(jnp.asarray, loaded), state)
    equal(linen_step(*loaded), linen_step(*state))


def save(path, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)


def test_in_nnx_in_linen_again(case, made, variables):
    """Rows 14, 56: the network in ToNNX, owned by an NNX module, in ToLinen."""

    class Owner(nnx.Module):
        def __init__(self, rngs):
            self.inner = bridge.ToNNX(case.module, rngs=rngs)

        def __call__(self, *args):
            return self.inner(*args, method=case.method)

    model = bridge.to_linen(Owner)
    inside = {name: {"inner": tree} for name, tree in variables.items()}
    abstract = jax.eval_shape(lambda: model.init({"params": KEY, **case.keys}, *case.args))
    assert abstract == {name: {"inner": jax.eval_shape(lambda tree=tree: tree)} for name, tree in made.items()}
    mutable = written(variables) or False

    def linen(variables):
        return case.module.apply(variables, *case.args, rngs=case.keys or None, method=case.method, mutable=mutable)

    def nested(variables):
        return model.apply(variables, *case.args, rngs=case.keys or None, mutable=mutable)

    expected, found = jax.jit(linen)(variables), jax.jit(nested)(inside)
    if mutable:
        expected = expected[0], {name: {"inner": tree} for name, tree in expected[1].items()}
    if not case.streams:  # keys inside depend on Linen's path, by design
        equal(found, expected)
    else:
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
