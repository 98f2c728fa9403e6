"""Optimizer with everything optax offers: extra arguments, hyperparameters, wrappers, shardings, wrong gradients."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from tests.strategies import Tied, portrait
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_close, assert_trees_equal

X = ramp(2, 3, over=6)


class Layer(nnx.Module):
    def __init__(self, seed=0, **metadata):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(seed), (3, 4)), **metadata)
        self.bias = nnx.Param(jnp.zeros(4))
        self.stat = nnx.BatchStat(jnp.zeros(4))

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel + self.bias)


def loss_fn(model):
    return ((model(X) - 0.5) ** 2).mean()


def pure_loss(params):
    return ((jnp.tanh(X @ params["kernel"] + params["bias"]) - 0.5) ** 2).mean()


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def of_state(state):
    return pure_loss(nnx.to_pure_dict(state))


def only_value(value, grads, value_fn):
    return {"value": value}


def for_line_search(value, grads, value_fn):
    return {"value": value, "grad": grads, "value_fn": value_fn}


def nothing(value, grads, value_fn):
    return {}


def names(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "b" if "bias" in str(path) else "k", params)


CASES = {
    "reduce_on_plateau": (
        lambda: optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)),
        only_value,
    ),
    "polyak_sgd": (lambda: optax.polyak_sgd(max_learning_rate=0.3), only_value),
    "backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)),
        for_line_search,
    ),
    "lbfgs": (lambda: optax.lbfgs(memory_size=2), for_line_search),
    "ema of updates": (lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)), nothing),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(0.1), 2), nothing),
    "MultiSteps of a chain on a schedule": (
        lambda: optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.linear_schedule(0.1, 0.0, 3))),
            every_k_schedule=2,
        ),
        nothing,
    ),
    "frozen part": (
        lambda: optax.multi_transform({"k": optax.set_to_zero(), "b": optax.sgd(0.1)}, names),
        nothing,
    ),
    "freeze without a state": (
        lambda: optax.multi_transform({"k": optax.sgd(0.1), "b": optax.sgd(0.2)}, names),
        nothing,
    ),
    "hyperparameters on a schedule": (
        lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 3), weight_decay=0.1),
        nothing,
    ),
    "named_chain": (
        lambda: optax.named_chain(("adam", optax.scale_by_adam()), ("rate", optax.scale_by_learning_rate(0.1))),
        nothing,
    ),
    "schedule_free": (lambda: optax.contrib.schedule_free_adamw(0.1, weight_decay=0.01), nothing),
    "noise": (lambda: optax.noisy_sgd(0.1, key=0), nothing),
}


def bits(tree):
    def plain(x):
        is_key = jax.dtypes.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else jnp.asarray(x))

    return sorted((str(x.dtype), x.shape, x.tobytes()) for x in map(plain, jax.tree.leaves(tree)))


@pytest.mark.sample(5)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_four_compiled_steps_equal_pure_optax(case):
    make, extra = case
    tx = make()
    model = Layer()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = params_of(model)
    opt_state = tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        return loss, optimizer.update(model, grads, **extra(loss, grads, of_state))

    @jax.jit
    def pure_step(params, opt_state):
        loss, grads = jax.value_and_grad(pure_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params, **extra(loss, grads, pure_loss))
        return loss, updates, optax.apply_updates(params, updates), opt_state

    for _ in range(4):
        loss, updates = step(model, optimizer)
        want, pure_updates, params, opt_state = pure_step(params, opt_state)
        assert_trees_equal(loss, want)
        assert_trees_equal(nnx.to_pure_dict(updates), pure_updates)
        assert_trees_equal(params_of(model), params)
        assert bits(optimizer.opt_state) == bits(opt_state)


def test_a_hyperparameter_changes_between_steps_without_a_new_trace():
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    traces = []
    model = Layer()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = params_of(model)
    opt_state = tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss_fn)(model))

    @jax.jit
    def pure_step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(pure_loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for rate in (0.1, 0.5, 0.01):
        optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.float32(rate)
        opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        step(model, optimizer)
        params, opt_state = pure_step(params, opt_state)
        assert_trees_equal(params_of(model), params)
    assert len(traces) == 1


@pytest.mark.parametrize("rate", [0.5, jax.device_put(np.float32(0.5))], ids=["number", "array"])
def test_a_hyperparameter_may_be_replaced(rate):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    model, twin = Layer(), Layer()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.opt_state.hyperparams["learning_rate"] = rate
    grads = nnx.grad(loss_fn)(model)
    nnx.jit(lambda m, o, g: o.update(m, g))(model, optimizer, grads)
    nnx.Optimizer(twin, optax.sgd(0.5), wrt=nnx.Param).update(twin, grads)
    assert_trees_equal(params_of(model), params_of(twin))
    assert type(optimizer.opt_state.hyperparams["learning_rate"]) is nnx.OptArray


# ---- the forms that gradients and models may have ----


def test_what_update_returns_is_what_flax_returns():
    def updates(library):
        model = library.Linear(2, 3, rngs=library.Rngs(0))
        optimizer = library.Optimizer(model, optax.adam(0.1), wrt=library.Param)
        out = optimizer.update(model, library.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model))
        assert isinstance(out, library.State)
        return dict(out), library.to_pure_dict(library.state(model))

    assert_trees_equal(updates(nnx), updates(flax_nnx))
    both = nnx.ModelAndOptimizer(Layer(), optax.sgd(0.1))
    assert_trees_equal(dict(both.update(nnx.grad(loss_fn)(both.model))), dict(both.update(nnx.grad(loss_fn)(Layer()))))


def test_gradients_beyond_wrt_are_not_used():
    model, twin = Layer(), Layer()
    nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.PathContains("bias")).update(model, nnx.grad(loss_fn)(model))
    nnx.Optimizer(twin, optax.sgd(0.1), wrt=nnx.Param).update(twin, nnx.grad(loss_fn)(twin))
    assert_trees_equal(model.bias[...], twin.bias[...])
    assert_trees_equal(model.kernel[...], Layer().kernel[...])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_gradients_in_every_form(compiled):
    def tuple_loss(layers):
        return loss_fn(layers[0]) + loss_fn(layers[1])

    def after(form):
        layers = (Layer(0), Layer(1))
        optimizer = nnx.Optimizer(layers, optax.adam(0.1), wrt=nnx.Param)

        def step(layers, optimizer):
            optimizer.update(layers, form(layers))

        (nnx.jit(step) if compiled else step)(layers, optimizer)
        return params_of(layers)

    of_tuple = after(lambda layers: nnx.grad(tuple_loss)(layers))
    for form in (
        lambda layers: nnx.grad(lambda a, b: tuple_loss((a, b)), argnums=(0, 1))(*layers),
        lambda layers: nnx.state(nnx.grad(tuple_loss)(layers)),
        lambda layers: jax.grad(tuple_loss)(layers),
        lambda layers: nnx.pure(nnx.state(nnx.grad(tuple_loss)(layers))),
    ):
        assert_trees_equal(after(form), of_tuple)


def test_gradients_of_another_dtype_are_taken():
    model = Layer()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(lambda g: g.astype(jnp.bfloat16), nnx.grad(loss_fn)(model)))
    assert model.kernel.dtype == jnp.float32


def test_line_search_arguments_may_be_plain_arrays():
    tx = optax.lbfgs(memory_size=2)

    def after(as_given):
        model = Layer()
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, grads, value=loss, grad=as_given(grads), value_fn=of_state)
        return params_of(model)

    assert_trees_equal(after(nnx.pure), after(lambda grads: grads))


@pytest.mark.parametrize(
    "mask", [lambda s: s.map(lambda p, v: v.ndim > 1), lambda s: jax.tree.map(lambda x: x.ndim > 1, s)]
)
def test_a_mask_made_from_the_state(mask):
    model, twin = Layer(note="kept"), Layer(note="kept")
    grads = nnx.grad(loss_fn)(model)
    tx = optax.adamw(0.1, weight_decay=0.5, mask=mask(nnx.state(model, nnx.Param)))
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads)
    tx = optax.adamw(0.1, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    nnx.Optimizer(twin, tx, wrt=nnx.Param).update(twin, grads)
    assert_trees_equal(params_of(model), params_of(twin))


def test_metadata_may_change_after_the_optimizer_was_made():
    model, twin = Layer(), Layer()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    model.kernel.set_metadata(out_sharding=("a", "b"))
    optimizer.update(model, nnx.grad(loss_fn)(model))
    nnx.Optimizer(twin, optax.adam(0.1), wrt=nnx.Param).update(twin, nnx.grad(loss_fn)(twin))
    assert_trees_equal(params_of(model), params_of(twin))


class Odd(nnx.Module):
    """Values in a Ref, in a dict, and an array that is no Variable."""

    def __init__(self, ref):
        self.w = nnx.Param(jnp.arange(3.0), ref=ref)
        self.tree = nnx.Param({"a": jnp.ones(2), "b": jnp.ones(())})
        self.plain = jnp.ones(2)


def test_refs_trees_and_plain_arrays_are_optimized():
    model = Odd(ref=True)
    ref = model.w.get_raw_value()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=...)
    start = {"w": jnp.arange(3.0), "tree": {"a": jnp.ones(2), "b": jnp.ones(())}, "plain": jnp.ones(2)}
    grads = jax.tree.map(lambda x: x + 1, start)
    optimizer.update(model, nnx.State({k: nnx.Param(v) if k != "plain" else v for k, v in grads.items()}))
    tx = optax.adam(0.1)
    updates, _ = tx.update(grads, tx.init(start), start)
    want = optax.apply_updates(start, updates)
    assert model.w.get_raw_value() is ref
    got = {"w": ref[...], "tree": model.tree.get_value(), "plain": model.plain}
    assert_trees_equal(got, want)


# ---- errors, and nothing half-updated ----


BAD = {
    "missing": (lambda g: g.filter(nnx.PathContains("bias")), r"(?s)nothing was updated.*No gradient for:\n  kernel"),
    "unexpected": (
        lambda g: nnx.State.merge(g, nnx.State({"extra": nnx.Param(jnp.ones(1))})),
        r"(?s)no such Variable in the model:\n  extra",
    ),
    "shape": (
        lambda g: g.map(lambda path, v: v.replace(v[...][:2])),
        r"(?s)bias: expected shape \(4,\), found shape \(2,\)\n  kernel: expected shape \(3, 4\), found shape \(2, 4\)",
    ),
    "tree": (
        lambda g: g.map(lambda path, v: v.replace({"a": v[...]})),
        r"kernel: expected shape \(3, 4\), found PyTreeDef\(\{'a': \*\}\) of shapes \[\(3, 4\)\]",
    ),
    "array": (lambda g: jnp.ones(3), r"a State; found (ArrayImpl|DynamicJaxprTracer).*update\(model, grads\)"),
    "None": (lambda g: None, r"a State; found NoneType|No gradient for"),
    "Variable": (lambda g: nnx.Param(jnp.ones(3)), r"a State; found Param"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_wrong_gradients_list_every_path_and_update_nothing(case, compiled):
    spoil, message = case
    model = Layer()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = portrait((model, optimizer))
    update = nnx.jit(lambda m, o, g: o.update(m, g)) if compiled else lambda m, o, g: o.update(m, g)
    with pytest.raises((TypeError, ValueError), match=message):
        update(model, optimizer, spoil(nnx.grad(loss_fn)(model)))
    assert portrait((model, optimizer)) == before


def test_half_a_gradient_of_a_tied_parameter_is_an_error():
    model = Tied()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.grad(lambda m: (m(X) ** 2).mean())(model)
    grads["encode"] = {"kernel": grads["decode"]["kernel"]}  # as a tree, the model has this kernel twice
    with pytest.raises(ValueError, match=r"no such Variable in the model:\n  encode\.kernel"):
        optimizer.update(model, grads)


def test_a_transformation_that_fails_updates_nothing():
    def fail(updates, state, params=None):
        raise RuntimeError("on purpose")

    model = Layer()
    tx = optax.chain(optax.trace(0.9), optax.GradientTransformation(lambda p: optax.EmptyState(), fail))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = portrait((model, optimizer))
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.update(model, nnx.grad(loss_fn)(model))
    assert portrait((model, optimizer)) == before


def test_a_transformation_that_changes_its_state_is_an_error():
    tx = optax.GradientTransformation(
        lambda p: {"a": jnp.zeros(())}, lambda g, s, p=None: (g, {**s, "b": jnp.ones(())})
    )
    model = Layer()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = portrait((model, optimizer))
    with pytest.raises(TypeError, match=r"structure of 1 arrays, found 2.*Nothing was updated"):
        optimizer.update(model, nnx.grad(loss_fn)(model))
    assert portrait((model, optimizer)) == before


def test_an_optimizer_of_another_trace_leaves_the_model_alone():
    model = Layer()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = portrait((model, optimizer))

    @nnx.jit
    def step(model):
        with pytest.raises(ValueError, match="Cannot write"):
            optimizer.update(model, nnx.grad(loss_fn)(model))

    step(model)
    assert portrait((model, optimizer)) == before


def test_a_lone_variable_has_no_path():
    with pytest.raises(TypeError, match=r"a single Param, which has no path"):
        nnx.Optimizer(nnx.Param(jnp.ones(2)), optax.sgd(0.1), wrt=nnx.Param)


def test_the_model_of_the_older_form():
    optimizer = nnx.Optimizer(Layer(), optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(AttributeError, match=r"Optimizer has no attribute 'model'.*ModelAndOptimizer"):
        _ = optimizer.model
    with pytest.raises(AttributeError, match=r"no attribute 'nosuch'\.$"):
        _ = optimizer.nosuch


def test_graph_false_forbids_sharing():
    with pytest.raises(ValueError, match="graph=False"):
        nnx.Optimizer(Tied(), optax.sgd(0.1), wrt=nnx.Param, graph=False)


@pytest.mark.parametrize("name", ["Optimizer.__init__", "Optimizer.update", "ModelAndOptimizer.__init__"])
def test_signatures_are_those_of_flax(name):
    def parameters(library):
        owner, method = name.split(".")
        signature = inspect.signature(getattr(getattr(library, owner), method))
        return [(p.name, p.kind, p.default is p.empty) for p in signature.parameters.values()]

    assert parameters(nnx) == parameters(flax_nnx)
    assert nnx.Optimizer[Layer] is not None


# ---- saving, copying, mapping, sharding ----


STATEFUL = {
    "adamw": lambda: optax.adamw(0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
    "multi_transform": lambda: optax.multi_transform({"k": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, names),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


def by_state(source, target):
    nnx.update(target, nnx.state(source), strict=True)
    return target


def by_pure_dict(source, target):
    state = nnx.state(target)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(source)))
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(target, state)
    return target


COPIES = {
    "state and update": by_state,
    "pure dict": by_pure_dict,
    "clone": lambda source, target: nnx.clone(source),
    "split and merge": lambda source, target: nnx.merge(*nnx.split(source)),
}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_training_goes_on_from_a_copy(make, copied):
    tx = make()

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    model = Layer()
    both = (model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    step(*both)
    fresh = Layer(seed=7)
    twin = copied(both, (fresh, nnx.Optimizer(fresh, tx, wrt=nnx.Param)))
    for pair in (both, twin):
        step(*pair)
        step(*pair)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(twin)), nnx.to_pure_dict(nnx.state(both)))


def test_row46_an_equal_filter_and_the_same_transformation_are_one_structure():
    traces = []
    tx = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(0.1))

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss_fn)(model))

    for _ in range(3):
        model = Layer()
        step(model, nnx.Optimizer(model, tx, wrt=nnx.All(nnx.Param, nnx.PathContains("kernel"))))
    assert len(traces) == 1


@pytest.mark.slow
def test_an_ensemble_trains_as_its_members_would():
    tx = optax.adam(0.1)

    def make(seed):
        model = Layer(out_sharding=("in", "out"))
        model.kernel[...] += seed
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    seeds = jnp.arange(3.0)
    ensemble = nnx.vmap(make)(seeds)
    assert ensemble[1].opt_state[0].mu["kernel"].out_sharding == (None, "in", "out")
    for _ in range(2):
        nnx.vmap(step)(*ensemble)
    for i, seed in enumerate(seeds):
        alone = make(seed)
        for _ in range(2):
            step(*alone)
        member = jax.tree.map(lambda x, i=i: x[i], nnx.to_pure_dict(nnx.state(ensemble)))
        assert_trees_close(member, nnx.to_pure_dict(nnx.state(alone)))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_row15_moments_of_placed_parameters_are_placed_like_them(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    tx = optax.chain(optax.adam(0.1), optax.ema(0.9))
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    twin = nnx.clone(model)
    specs = {"kernel": P("data"), "bias": P()}
    for name, spec in specs.items():
        variable = getattr(model, name)
        variable[...] = jax.device_put(variable[...], NamedSharding(mesh, spec))
    optimizer, plain = (nnx.Optimizer(m, tx, wrt=nnx.Param) for m in (model, twin))
    moments = [(p[-1], v) for p, v in nnx.to_flat_state(nnx.state(optimizer, nnx.OptVariable))]
    assert len(moments) == 6
    for name, v in moments:
        value = v.get_value()
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), value.ndim), name

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    x = jnp.arange(16.0).reshape(2, 8) / 16
    with jax.set_mesh(mesh):
        for _ in range(2):
            step(model, optimizer, jax.device_put(x, NamedSharding(mesh, P())))
    for _ in range(2):
        step(twin, plain, x)
    assert_trees_close(nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(plain)))
    assert_trees_close(params_of(model), params_of(twin))
