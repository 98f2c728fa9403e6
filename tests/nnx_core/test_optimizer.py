"""Optimizer: any optax transformation over the Variables of a model, bit-equal to pure optax."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx_core as nnx
from tests.strategies import Affine, Tied, portrait, reachable
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_equal

X = ramp(2, 3, over=6)


class Pair(nnx.Module):
    """Two layers, one bias, a Variable that is not trained."""

    def __init__(self):
        self.first, self.second = Affine(), Affine(seed=1)
        self.bias = nnx.Param(jnp.zeros((1, 3)))
        self.mean = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x))) + self.bias


def loss_fn(model):
    return ((model(X) - 1.0) ** 2).mean()


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def pure_loss(params):
    h = jnp.tanh(X @ params["first"]["kernel"])
    return ((h @ params["second"]["kernel"] + params["bias"] - 1.0) ** 2).mean()


def label(params):
    return jax.tree_util.tree_map_with_path(lambda p, _: "bias" if "bias" in str(p) else "kernel", params)


def decay_mask(params):
    return jax.tree.map(lambda x: x.shape[0] > 1, params)


CHAINS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped adamw on a schedule": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(1e-2, 5), weight_decay=0.1)
    ),
    "masked": lambda: optax.chain(
        optax.scale_by_adam(), optax.masked(optax.add_decayed_weights(0.1), decay_mask), optax.scale(-0.01)
    ),
    "adamw with mask": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask),
    "multi_transform": lambda: optax.multi_transform(
        {"kernel": optax.adam(1e-2), "bias": optax.sgd(0.1, momentum=0.9)}, label
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lion": lambda: optax.lion(1e-3),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_five_steps_equal_pure_optax(make, compiled):
    model, tx = Pair(), make()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = params_of(model)
    opt_state = tx.init(params)

    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    def pure_step(params, opt_state):
        loss, grads = jax.value_and_grad(pure_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    if compiled:
        step, pure_step = nnx.jit(step), jax.jit(pure_step)
    for _ in range(5):
        loss = step(model, optimizer)
        want, params, opt_state = pure_step(params, opt_state)
        assert_trees_equal(loss, want)
        assert_trees_equal(params_of(model), params)
    assert int(optimizer.step[...]) == 5
    arrays = jax.tree.leaves(nnx.to_pure_dict(nnx.state(optimizer)["opt_state"])) if _has_state(optimizer) else []
    assert _sorted_bytes(arrays) == _sorted_bytes(jax.tree.leaves(opt_state))


def _has_state(optimizer):
    return "opt_state" in nnx.state(optimizer)


def _sorted_bytes(arrays):
    return sorted((str(jnp.asarray(a).dtype), jnp.asarray(a).tobytes()) for a in arrays)


def test_update_writes_the_same_variables():
    model = Pair()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    members, own = reachable(model), reachable(optimizer)
    optimizer.update(model, nnx.grad(loss_fn)(model))
    assert [id(x) for x in reachable(model)] == [id(x) for x in members]
    assert [id(x) for x in reachable(optimizer)] == [id(x) for x in own]


def test_only_wrt_is_written():
    model = Pair()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    mean, calls = model.mean.get_value(), model.first.calls
    optimizer.update(model, nnx.grad(loss_fn)(model))
    assert model.mean.get_value() is mean
    assert int(calls[...]) == 1  # from the loss, not from the update


def test_wrt_chooses_a_part():
    model = Pair()
    wrt = nnx.All(nnx.Param, nnx.PathContains("bias"))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=wrt)
    kernel = model.first.kernel.get_value()
    optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model))
    assert model.first.kernel.get_value() is kernel
    assert float(jnp.abs(model.bias[...]).max()) > 0


def test_a_tied_parameter_is_updated_once():
    model = Tied()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    kernel = model.encode.kernel.get_value()
    grads = nnx.grad(lambda m: (m(X) ** 2).mean())(model)
    want = kernel - 0.1 * jax.grad(lambda k: ((X @ k @ k) ** 2).mean())(kernel)
    optimizer.update(model, grads)
    assert_trees_equal(model.encode.kernel.get_value(), want)
    assert model.encode is model.decode


def test_its_state_is_opt_state_next_to_the_step():
    optimizer = nnx.Optimizer(Affine(), optax.adam(1e-2), wrt=nnx.Param)
    assert isinstance(optimizer.step, nnx.OptState)
    state = nnx.state(optimizer)
    assert set(state) == {"opt_state", "step"}
    leaf_names = {path[-1] for path, _ in nnx.to_flat_state(state["opt_state"])}
    assert leaf_names == {"count", "kernel"}
    assert all(isinstance(v, nnx.Variable) for _, v in nnx.to_flat_state(state))


def test_the_moments_of_a_parameter_carry_its_metadata():
    model = Affine()
    model.kernel.set_metadata(note="mine")
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    moments = [v for path, v in nnx.to_flat_state(nnx.state(optimizer)) if path[-1] == "kernel"]
    assert len(moments) == 2
    assert all(v.note == "mine" for v in moments)


def test_row15_moments_of_a_vmapped_stack_keep_the_axis_names():
    stack = nnx.vmap(lambda key: annotated(key))(jax.random.split(jax.random.key(0), 4))
    assert stack.kernel.out_sharding == (None, "in", "out")
    optimizer = nnx.Optimizer(stack, optax.adam(1e-2), wrt=nnx.Param)
    moments = [v for path, v in nnx.to_flat_state(nnx.state(optimizer)) if path[-1] == "kernel"]
    assert all(v.out_sharding == (None, "in", "out") for v in moments)


def annotated(key):
    m = Affine()
    m.kernel = nnx.Param(jax.random.normal(key, (3, 3)), out_sharding=("in", "out"))
    return m


def test_an_injected_hyperparameter_can_be_set():
    model = Affine()
    optimizer = nnx.Optimizer(model, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), wrt=nnx.Param)
    grads = nnx.grad(lambda m: m(X).sum())(model)
    kernel = model.kernel.get_value()
    optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.float32(0.5)
    optimizer.update(model, grads)
    assert_trees_equal(model.kernel.get_value(), kernel + (-0.5) * grads["kernel"][...])


def test_extra_arguments_reach_the_transformation():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model = Affine()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(X).sum())(model), value=3)
    assert seen == [3]


def test_it_is_saved_and_restored_by_split_and_merge():
    model = Affine()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(X).sum())(model))
    twin = nnx.merge(*nnx.split(optimizer))
    assert portrait(nnx.state(twin).raw_mapping) == portrait(nnx.state(optimizer).raw_mapping)
    grads = nnx.grad(lambda m: m(X).sum())(model)
    other = nnx.clone(model)
    optimizer.update(model, grads)
    twin.update(other, grads)
    assert_trees_equal(params_of(other), params_of(model))


def test_a_training_step_compiles_once():
    traces = []
    model = Affine()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert len(traces) == 1
    assert losses == sorted(losses, reverse=True)


def test_row46_a_new_optimizer_over_the_same_transformation_does_not_retrace():
    traces = []
    tx = optax.adam(1e-2)

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda m: (m(X) ** 2).mean())(model))

    for _ in range(3):
        model = Affine()
        step(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    assert len(traces) == 1


def test_model_and_optimizer_is_the_older_form():
    model, twin = Affine(), Affine()
    old = nnx.ModelAndOptimizer(model, optax.adam(1e-2))
    new = nnx.Optimizer(twin, optax.adam(1e-2), wrt=nnx.Param)
    assert old.model is model
    old.update(nnx.grad(lambda m: m(X).sum())(model))
    new.update(twin, nnx.grad(lambda m: m(X).sum())(twin))
    assert_trees_equal(params_of(model), params_of(twin))


def test_the_older_call_forms_say_what_changed():
    model = Affine()
    with pytest.raises(TypeError, match=r"wrt.*ModelAndOptimizer"):
        nnx.Optimizer(model, optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"\(model, grads\)"):
        optimizer.update(nnx.state(model, nnx.Param))


def test_gradients_that_do_not_fit_the_parameters_are_an_error():
    model = Affine()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = portrait(model)
    with pytest.raises((TypeError, ValueError), match=r"(?s)kernel|nosuch"):
        optimizer.update(model, nnx.State({"nosuch": nnx.Param(jnp.ones(1))}))
    assert portrait(model) == before
