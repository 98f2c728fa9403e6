"""The optimizers of optax, by kind of state, and states of theirs: for the tests of what a checkpoint keeps of them.

Law: every optimizer of optax whose state has a structure of its own has a row; REPRESENTATIVES has one of each kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from bridge.checkpoint.tree import layout


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def schedule():
    return optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adam_bf16": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adamw_clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "adamw_schedule": lambda: optax.adamw(schedule()),
    "adamw_masked_decay": lambda: optax.adamw(1e-2, mask=matrices),
    "adamax": lambda: optax.adamax(1e-2),
    "adamaxw": lambda: optax.adamaxw(1e-2),
    "nadamw": lambda: optax.nadamw(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "adan": lambda: optax.adan(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adadelta": lambda: optax.adadelta(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "adafactor_momentum": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1e-2),
    "fromage": lambda: optax.fromage(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "rprop": lambda: optax.rprop(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "sm3": lambda: optax.sm3(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=jax.random.key(0)),
    "optimistic_adam": lambda: optax.optimistic_adam_v2(1e-2),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "lbfgs": lambda: optax.scale_by_lbfgs(memory_size=3),
    "ema": lambda: optax.ema(0.9),
    "masked": lambda: optax.masked(optax.adam(1e-2), matrices),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adamw(schedule()), "vector": optax.sgd(0.1, momentum=0.9)}, labels
    ),
    "multi_transform_unused": lambda: optax.multi_transform(
        {"matrix": optax.adam(0.1), "vector": optax.adam(0.1), "never": optax.adam(0.1)}, labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule()),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "lookahead_free": lambda: optax.chain(optax.add_decayed_weights(1e-4), optax.trace(0.9), optax.scale(-0.1)),
    "adaptive_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(1e-2)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "prodigy": lambda: optax.contrib.prodigy(),
    "dadapt": lambda: optax.contrib.dadapt_adamw(),
    "cocob": lambda: optax.contrib.cocob(),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
    "dog": lambda: optax.contrib.dog(),
    "muon": lambda: optax.contrib.muon(1e-2),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "flatten": lambda: optax.flatten(optax.adam(1e-2)),
}
# One of each kind of state: two moments, another dtype, factored, rows and columns, masks, labels, hyperparameters,
# accumulated, vectors of a line search, a key, a scale that is learned, and one flat vector. All 51 stand in
# tests/bridge/checkpoint/test_round_trip.py and, for the rest of the tests, in `nox -s grids`.
REPRESENTATIVES = (
    *("adamw_clip", "adam_bf16", "adafactor", "sm3", "masked", "multi_transform"),
    *("inject_hyperparams", "multi_steps", "lbfgs", "noisy_sgd", "mechanize", "flatten"),
)


def each_of(names):
    """Parametrizes `name`; those that are no representatives are left to the grid."""
    grid = [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.grid) for name in names]
    return pytest.mark.parametrize("name", grid)


each_optimizer = each_of(OPTIMIZERS)
# optax.flatten keeps vectors in the order of the names: see test_flat_vectors_are_refused.
RENAMEABLE = [name for name in OPTIMIZERS if name != "flatten"]
each_renameable = each_of(RENAMEABLE)
# These two draw noise in the order of the names, so their next update differs though their state does not.
each_deterministic = each_of([name for name in RENAMEABLE if name not in ("noisy_sgd", "noise")])

RENAMED = {
    ("Dense_0", "kernel"): ("inp", "kernel"),
    ("Dense_0", "bias"): ("inp", "bias"),
    ("layers_0", "Dense_0", "kernel"): ("layers", "0", "linear", "kernel"),
    ("layers_0", "Dense_0", "bias"): ("layers", "0", "linear", "bias"),
    ("Norm_0", "a/b.c"): ("norm", "scale"),
    ("Norm_0", "count"): ("norm", "mu"),
}
BACK = {new: old for old, new in RENAMED.items()}


def make_params():
    shapes = {
        ("Dense_0", "kernel"): (3, 4),
        ("Dense_0", "bias"): (4,),
        ("layers_0", "Dense_0", "kernel"): (4, 4),
        ("layers_0", "Dense_0", "bias"): (4,),
        ("Norm_0", "a/b.c"): (4,),
        ("Norm_0", "count"): (4,),
    }
    draw = np.random.default_rng(1)
    return layout.nest({path: jnp.asarray(draw.normal(size=shape), "float32") for path, shape in shapes.items()})


def rename_tree(tree, table):
    return layout.nest({table[path]: leaf for path, leaf in layout.flatten(tree).items()})


def random_bits(draw, leaf):
    """An array of this shape and dtype, of any bits: NaNs too."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(5)
    raw = draw.integers(0, 2 if leaf.dtype == bool else 256, leaf.size * leaf.dtype.itemsize, dtype=np.uint8)
    return raw.view(leaf.dtype).reshape(leaf.shape)


def filled(name):
    """Optimizer, params, and a state of the optimizer's structure full of random bits: nothing has to be compiled."""
    tx, params = OPTIMIZERS[name](), make_params()
    draw = np.random.default_rng(0)
    return tx, params, jax.tree.map(lambda leaf: random_bits(draw, leaf), jax.eval_shape(tx.init, params))


def trained(name):
    """Optimizer, params and state after an update on fixed gradients."""
    tx, params = OPTIMIZERS[name](), make_params()
    updates, state = update(tx, jax.tree.map(jnp.sin, params), tx.init(params), params)
    return tx, optax.apply_updates(params, updates), state


def update(tx, grads, state, params):
    value = jnp.float32(1.5)  # what polyak_sgd, reduce_on_plateau and the line searches ask for
    return optax.with_extra_args_support(tx).update(
        grads, state, params, value=value, grad=grads, value_fn=lambda p: jnp.float32(1.0)
    )
