"""Which optimizers commute with stacking: the probe against what was measured on optax (CHECKPOINTS.md 4.3)."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

from bridge.checkpoint.plan.commute import probe, stacks, warning_without_tx
from bridge.checkpoint.tree.ops import Block, Cast, Fill, Join, Pick, Read, Reshape, Transpose
from tests.support.optimizers import OPTIMIZERS, each_optimizer

LAYERS = 3
SINGLE = {("head", "kernel"): (16, 10)}
SINGLE |= {(f"layers_{n}", "kernel"): (16, 16) for n in range(LAYERS)}
SINGLE |= {(f"layers_{n}", "bias"): (16,) for n in range(LAYERS)}


def read(shapes, *path):
    return Read(path, shapes[path], "float32")


STACK = {
    ("layers", leaf): Join(tuple(read(SINGLE, f"layers_{n}", leaf) for n in range(LAYERS)), axis=0, stack=True)
    for leaf in ("kernel", "bias")
} | {("head", "kernel"): read(SINGLE, "head", "kernel")}
STACKED = {path: op.shape for path, op in STACK.items()}
UNSTACK = {
    (f"layers_{n}", leaf): Pick(read(STACKED, "layers", leaf), axis=0, index=n)
    for n in range(LAYERS)
    for leaf in ("kernel", "bias")
} | {("head", "kernel"): read(STACKED, "head", "kernel")}

#: Those whose state has no counterpart.
OTHER_STATE = {
    *("adafactor", "adafactor_momentum", "sm3", "novograd", "muon", "lbfgs"),
    *("masked", "multi_transform", "multi_transform_unused"),  # by ndim
}
#: Those whose state fits, and whose next update is another one.
OTHER_UPDATE = {
    *("lamb", "lars", "fromage", "adamw_masked_decay", "adaptive_clip"),
    *("flatten", "noisy_sgd", "noise"),  # by the order of the params
}
WARNINGS = {"keeps another state once": OTHER_STATE, "the next update of this optimizer is another one": OTHER_UPDATE}


@pytest.mark.sample(4)
@pytest.mark.slow
@each_optimizer
def test_probe_finds_what_was_measured(name):
    found = probe(OPTIMIZERS[name](), SINGLE, STACK)
    expected = [text for text, names in WARNINGS.items() if name in names]
    assert len(found) == len(expected), found
    assert all(text in warning for text, warning in zip(expected, found, strict=True)), found


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ["adamw_clip", "multi_steps", "prodigy", *sorted(OTHER_STATE), "lamb", "flatten"])
def test_probe_finds_it_when_layers_are_taken_apart(name):
    found = probe(OPTIMIZERS[name](), STACKED, UNSTACK)
    expected = [text for text, names in WARNINGS.items() if name in names]
    assert len(found) == len(expected), found
    assert all(text in warning for text, warning in zip(expected, found, strict=True)), found


def test_a_plain_adafactor_is_found_though_it_factors_large_matrices_only():
    assert "v_row" in probe(optax.adafactor(1e-3), SINGLE, STACK)[0]


def test_a_small_decay_of_stacked_biases_is_found():
    """In float32 the difference would drown: 1e-5 of an update that is 1e-5 of the params."""
    tx = optax.adamw(1e-5, weight_decay=1e-5, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    (warning,) = probe(tx, SINGLE, STACK)
    assert "layers/bias differs by 1e-" in warning
    assert probe(optax.adamw(1e-5, weight_decay=1e-5), SINGLE, STACK) == []


def test_renames_and_transposes_commute_with_norms_of_tensors():
    ops = {("fc", "kernel"): Transpose(read(SINGLE, "head", "kernel"), (1, 0))}
    assert probe(optax.lamb(1e-2), {("head", "kernel"): (16, 10)}, ops) == []


GATES = tuple(Read(("cell", gate), (256, 512), "float32") for gate in "ifgo")
FUSED = Read(("cell", "dense"), (256, 2048), "float32")


@pytest.mark.parametrize(
    ("params", "ops"),
    [
        ({gate.path: gate.shape for gate in GATES}, {("cell", "dense"): Join(GATES, axis=-1)}),
        (
            {FUSED.path: FUSED.shape},
            {("cell", g): Block(FUSED, -1, 512 * n, 512 * (n + 1)) for n, g in enumerate("ifgo")},
        ),
        (
            {FUSED.path: FUSED.shape},
            {("cell", g): Block(FUSED, -1, *cut) for g, cut in {"i": (0, 5), "o": (5, 2048)}.items()},
        ),
    ],
    ids=["joined", "cut", "cut unevenly"],
)
def test_gates(params, ops):
    assert probe(optax.adam(1e-2), params, ops) == []
    assert "the next update" in probe(optax.lamb(1e-2), params, ops)[0]


@pytest.mark.slow
def test_reshapes_casts_and_new_params():
    query = Read(("query",), (12, 4, 3), "float32")
    ops = {("query",): Cast(Reshape(query, (12, 12)), "bfloat16"), ("new",): Fill(jnp.zeros((2, 2)))}
    ops[("none",)] = Read(("none",), (0, 3), "float32")
    params = {("query",): query.shape, ("none",): (0, 3)}
    assert probe(optax.adam(1e-2), params, ops) == []
    assert probe(optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)), params, ops) == []
    assert "keeps another state" in probe(optax.sm3(1e-2), params, ops)[0]


def test_a_large_model_is_tried_small():
    """48 layers of 400 MiB each."""
    shapes = {(f"h_{n}", "kernel"): (8192, 12800) for n in range(48)}
    ops = {("h", "kernel"): Join(tuple(read(shapes, *path) for path in shapes), axis=0, stack=True)}
    assert probe(optax.adam(1e-2), shapes, ops) == []
    assert "the next update" in probe(optax.lars(1e-2), shapes, ops)[0]
    back = {path: Pick(Read(("h", "kernel"), (48, 8192, 12800), "float32"), 0, n) for n, path in enumerate(shapes)}
    assert probe(optax.adam(1e-2), {("h", "kernel"): (48, 8192, 12800)}, back) == []


def test_what_is_too_large_to_be_tried_is_said():
    whole = Read(("kernel",), (8192, 8192), "float32")
    (warning,) = probe(optax.adam(1e-2), {("kernel",): whole.shape}, {("kernel",): Reshape(whole, (8192, 64, 128))})
    assert "was not tried: 67108864 numbers" in warning


def test_an_optimizer_that_fails_is_a_warning():
    tx = optax.masked(optax.adam(1e-2), {"layers_0": True})  # a tree, which fits one layout only
    (warning,) = probe(tx, SINGLE, STACK)
    assert "could not be tried: " in warning


def test_the_probe_leaves_64_bit_off():
    probe(optax.adam(1e-2), SINGLE, STACK)
    assert jnp.ones(1).dtype == jnp.float32


def test_stacks():
    plain = Read(("a",), (4, 4), "float32")
    assert not stacks([plain, Transpose(plain, (1, 0)), Cast(plain, "bfloat16"), Fill(jnp.zeros(1))])
    for op in (Join((plain, plain), 0), Pick(plain, 0, 0), Block(plain, 0, 0, 1), Reshape(plain, (-1,))):
        assert stacks([plain, Cast(op, "bfloat16")])
    assert "lamb" in warning_without_tx()
