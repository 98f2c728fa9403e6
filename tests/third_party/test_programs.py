"""Programs written in flax.nnx, on flax.nnx and on nnx_core: the same arrays, bit for bit.

Both sides get the same weights by path, the same inputs and keys. Needs packages that the ordinary environment
lacks: `nox -s models`.
"""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from bridge.flax_nnx import AsFlax, FromFlax
from tests.third_party.programs import MODELS, TRAINERS, arrays_of, plain
from tests.tolerance import assert_trees_close, assert_trees_equal

if not any(importlib.util.find_spec(row.package) for row in MODELS + TRAINERS):
    pytest.skip("no package written in flax.nnx is installed: nox -s models", allow_module_level=True)

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


def loss_of(outputs):
    """A number that depends on every inexact output, with a different weight for each."""
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.real(x) * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)).sum() for x in leaves)


def shifted(arrays):
    """Other values, by path: biases and statistics start as constants, which would hide a mix-up."""
    floats = {path: x for path, x in arrays.items() if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)}
    return {path: x + 0.01 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for path, x in floats.items()}


def write(nnx, module, arrays):
    """Copy these arrays into the Variables at their paths."""
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        name = "/".join(map(str, path))
        if name in arrays and hasattr(leaf, "set_value"):
            leaf.set_value(arrays[name])


def types_of(nnx, module):
    return {"/".join(map(str, path)): type(leaf).__name__ for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.fixture(scope="module", params=MODELS, ids=lambda row: row.name)
def models(request):
    """(world, model) on nnx_core and on flax.nnx."""
    made = []
    for world in request.param.worlds():
        with world:
            made.append((world, request.param.make(world)))
    return made


def test_a_model_is_made_called_and_trained_as_on_flax_nnx(models):
    _, (theirs, reference) = models
    with theirs:
        weights = shifted(arrays_of(theirs.nnx, reference.module))
    ours, expected = (run(world, model, weights) for world, model in models)
    equal(ours, expected)
    gradients = jax.tree.leaves(expected["steps"][0]["gradients"])
    assert any((x != 0).any() for x in gradients), "nothing was trained"


def run(world, model, weights):
    """What a program sees: what is made, one eager call, three compiled steps."""
    nnx, module = world.nnx, model.module
    with world:
        made = arrays_of(nnx, module)
        seen = {"made": made if model.same_draws else jax.eval_shape(lambda: made), "types": types_of(nnx, module)}
        write(nnx, module, weights)
        copy = nnx.merge(*nnx.split(nnx.clone(module)))
        seen["eager"] = jax.tree.map(plain, jax.tree.leaves(model.call(copy, *model.args)))
        seen["after"] = arrays_of(nnx, copy)
        seen["steps"] = list(three_steps(nnx, model))
    return seen


def three_steps(nnx, model):
    module, optimizer = model.module, nnx.Optimizer(model.module, TX, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, *args):
        def loss_fn(module):
            outputs = model.call(module, *args)
            return loss_of(outputs), outputs

        (loss, outputs), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(module)
        optimizer.update(module, gradients)
        return loss, outputs, gradients

    for _ in range(3):
        loss, outputs, gradients = step(module, optimizer, *model.args)
        yield {
            "loss": loss,
            "outputs": jax.tree.map(plain, jax.tree.leaves(outputs)),
            "gradients": arrays_of(nnx, gradients),
            "model": of_jax(arrays_of(nnx, module)),
            "optimizer": of_jax(arrays_of(nnx, optimizer)),
        }


def of_jax(arrays):
    """flax.nnx's `jit` hands JAX's arrays back for numpy's that it only read: int32 for int64. Ours does not: law 4."""
    return jax.tree.map(jnp.asarray, arrays)


@pytest.mark.parametrize("wrap", [FromFlax, AsFlax])
def test_a_model_is_trained_in_the_other_librarys_hands_as_alone(models, wrap):
    (ours, our_model), (theirs, their_model) = models
    world, model, hands = (theirs, their_model, ours.nnx) if wrap is FromFlax else (ours, our_model, theirs.nnx)
    with world:
        alone = replace(model, module=world.nnx.clone(model.module))
        wrapped = replace(model, module=wrap(model.module))
        expected, actual = list(three_steps(world.nnx, alone)), list(three_steps(hands, wrapped))
    equal(actual, expected)


@pytest.mark.parametrize("program", TRAINERS, ids=lambda row: row.name)
def test_a_trainer_ends_where_it_ends_on_flax_nnx(program):
    results = []
    for world in program.worlds():
        with world:
            results.append(program.make(world))
    equal(*results)
