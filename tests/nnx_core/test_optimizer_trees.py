"""Labels and masks that are trees, in an Optimizer: optax over plain dicts is the oracle, to the bit."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_core as nnx
from nnx_core._errors import OptimizerError
from tests.tolerance import assert_trees_equal


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x):
        return self.last(nnx.tanh(self.blocks[0](self.first(x))))


LABELS = {
    "first": {"kernel": "slow", "bias": "fast"},
    "blocks": {0: {"kernel": "slow", "bias": "none"}},
    "last": {"kernel": "fast", "bias": "fast"},
}
PREFIXES = {"first": "slow", "blocks": {0: "none"}, "last": {"kernel": "fast", "bias": "slow"}}
PARTS = {"slow": optax.sgd(0.1, momentum=0.9), "fast": optax.adamw(0.1), "none": optax.set_to_zero()}


def is_slow(labels):
    return jax.tree.map(lambda label: label == "slow", labels)


TRANSFORMS = {
    "multi_transform": lambda labels: optax.multi_transform(PARTS, labels),
    "masked": lambda labels: optax.masked(optax.adam(0.1), is_slow(labels)),
    "adamw(mask)": lambda labels: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.2, mask=is_slow(labels))
    ),
    "lamb(mask)": lambda labels: optax.lamb(0.1, weight_decay=0.2, mask=is_slow(labels)),
    "freeze": lambda labels: optax.chain(optax.transforms.freeze(is_slow(labels)), optax.rmsprop(0.1)),
    "line search": lambda labels: optax.chain(
        optax.masked(optax.adam(0.1), is_slow(labels)), optax.scale_by_backtracking_linesearch(5)
    ),
}


def loss(model):
    return jnp.square(model(jnp.linspace(-1, 1, 6).reshape(2, 3)) - 1).mean()


def plain(tree):
    """Dicts in dicts of arrays."""
    return {key: plain(x) for key, x in tree.items()} if isinstance(tree, nnx.State | dict) else jnp.asarray(tree)


def by_optax(tx, steps):
    """The params after these steps of optax over plain dicts."""
    graphdef, params, rest = nnx.split(Net(), nnx.Param, ...)
    params = plain(params)

    def value(params):
        return loss(nnx.merge(graphdef, nnx.State(params), rest))

    state = tx.init(params)
    for _ in range(steps):
        now, grads = jax.value_and_grad(value)(params)
        extra = {"value": now, "grad": grads, "value_fn": value}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def by_optimizer(tx, steps):
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def value(params):
        assert isinstance(params, nnx.State)
        return loss(nnx.merge(graphdef, params, rest))

    for _ in range(steps):
        now, grads = nnx.value_and_grad(loss)(model)
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            updates = optimizer.update(model, grads, value=now, grad=grads, value_fn=value)
        else:
            updates = optimizer.update(model, grads)
        assert isinstance(updates, nnx.State)
    return model, optimizer


@pytest.mark.sample(5)
@pytest.mark.parametrize("labels", [LABELS, PREFIXES], ids=["labels", "prefixes"])
@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_dicts_do_what_optax_does_with_them(make, labels):
    params, state = by_optax(make(labels), 3)
    model, optimizer = by_optimizer(make(labels), 3)
    assert_trees_equal(plain(nnx.state(model, nnx.Param)), params)
    ours = [np.asarray(x) for x in jax.tree.leaves(nnx.state(optimizer).opt_state)]
    assert sorted(x.tobytes() for x in ours) == sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_states_do_what_dicts_do_and_are_kept_under_the_same_paths(make):
    model, optimizer = by_optimizer(make(LABELS), 3)
    other, second = by_optimizer(make(nnx.State(LABELS)), 3)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(other)))
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each))) for each in (optimizer, second))
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert type(x) is type(theirs[path])
        np.testing.assert_array_equal(x[...], theirs[path][...])


def test_under_jit_and_through_a_checkpoint():
    model = Net()
    optimizer = nnx.Optimizer(model, TRANSFORMS["multi_transform"](LABELS), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer)
    again = Net(1)
    fresh = nnx.Optimizer(again, optimizer.tx, wrt=nnx.Param)
    nnx.update(again, nnx.state(model))
    nnx.update(fresh, nnx.state(optimizer))
    step(model, optimizer)
    step(again, fresh)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(again)))
    abstract = nnx.eval_shape(lambda: nnx.Optimizer(Net(), optimizer.tx, wrt=nnx.Param))
    assert dict(nnx.to_flat_state(nnx.state(abstract))).keys() == dict(nnx.to_flat_state(nnx.state(fresh))).keys()


def test_a_function_that_asks_for_dicts_is_given_dicts():
    def labels(params):
        return flax.traverse_util.path_aware_map(lambda path, _: "slow" if "kernel" in path else "fast", params)

    by_name = {"kernel": "slow", "bias": "fast"}
    wanted, _ = by_optax(
        optax.multi_transform(PARTS, {"first": by_name, "last": by_name, "blocks": {0: by_name}}), steps=2
    )
    model, _ = by_optimizer(optax.multi_transform(PARTS, labels), 2)
    assert_trees_equal(plain(nnx.state(model, nnx.Param)), wanted)


@pytest.mark.parametrize("container", [dict, nnx.State])
def test_labels_that_do_not_fit_are_named_with_the_paths_that_would(container):
    labels = container({"first": "slow", "second": "fast"})
    with pytest.raises(OptimizerError, match=r"(?s)neither as a State nor.*  blocks\[0\].kernel\n.*second"):
        nnx.Optimizer(Net(), optax.multi_transform(PARTS, labels), wrt=nnx.Param)


def test_a_message_lists_no_more_than_twenty_paths():
    model = nnx.Dict({f"layer_{i}": nnx.Param(jnp.ones(1)) for i in range(25)})
    with pytest.raises(OptimizerError, match=r"layer_\d+\n  and 5 more\nFound with a State"):
        nnx.Optimizer(model, optax.masked(optax.adam(0.1), {"layer_0": True}), wrt=nnx.Param)


def test_trees_of_both_kinds_in_one_transformation():
    masks = is_slow(LABELS)
    tx = optax.chain(optax.masked(optax.adam(0.1), masks), optax.masked(optax.sgd(0.1), nnx.State(masks)))
    with pytest.raises(OptimizerError, match="all States or all dicts"):
        nnx.Optimizer(Net(), tx, wrt=nnx.Param)


def test_what_has_nothing_to_do_with_containers_is_raised_as_it_is():
    def init(params):
        raise ValueError("no such optimizer today")

    tx = optax.GradientTransformation(init, optax.sgd(0.1).update)
    with pytest.raises(ValueError, match=r"^no such optimizer today$"):
        nnx.Optimizer(Net(), tx, wrt=nnx.Param)
