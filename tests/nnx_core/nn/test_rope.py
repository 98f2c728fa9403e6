"""RoPE against the formula in float64, against flax.nnx where it has it (from 0.12.12 on), and its errors."""

import functools

import flax.nnx
import jax.numpy as jnp
import numpy as np
import pytest

import nnx_core as nnx
from nnx_core.nn._errors import InputShapeError
from tests.support.arrays import noise
from tests.tolerance import assert_trees_close, assert_trees_equal

X = noise(0, 2, 5, 8)
Q, K, V = noise(1, 2, 5, 4, 8), noise(2, 2, 7, 2, 8), noise(3, 2, 7, 2, 6)
MAKERS = {
    "computed": lambda lib: lib.RoPE(),
    "tables": lambda lib: lib.RoPE(embedding_size=8, max_seq_len=9),
    "theta": lambda lib: lib.RoPE(theta=100.0, embedding_size=8, max_seq_len=9),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
#: flax.nnx has no RoPE before 0.12.12; there, the formula alone is the oracle.
LIBS = [flax.nnx] if hasattr(flax.nnx, "RoPE") else []


def rotated(x, positions, theta=10000.0):
    """The complex numbers (x_i, x_{i + n/2}), turned: in float64."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    angles = np.asarray(positions, np.float64)[..., None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@ALL
def test_the_formula(make):
    rope = make(nnx)
    want = rotated(X, np.arange(5), rope.theta).astype(np.float32)
    assert_trees_close(rope(X), jnp.asarray(want))
    assert_trees_close(nnx.jit(lambda rope, x: rope(x))(rope, X), rope(X))


@pytest.mark.filterwarnings("ignore:'.value' access")  # flax.nnx's own
@ALL
@pytest.mark.parametrize("lib", LIBS)
def test_numbers_of_flax_nnx(make, lib):
    ours, theirs = make(nnx), make(lib)
    assert_trees_equal(ours(X), theirs(X))
    positions = jnp.array([4, 2, 0, 7, 7])
    assert_trees_equal(ours(X, positions), theirs(X, positions))
    assert ours(X.astype(jnp.bfloat16)).dtype == theirs(X.astype(jnp.bfloat16)).dtype
    tables = [(rope.cached_sin, rope.cached_cos) for rope in (ours, theirs)]
    values = [[None if table is None else table.get_value() for table in pair] for pair in tables]
    assert_trees_equal(*values)


@pytest.mark.parametrize("lib", LIBS)
def test_attention_of_flax_nnx(lib):
    keys = noise(4, 2, 7, 4, 8)
    ours = nnx.dot_product_attention_with_rope(Q, keys, keys, rope=nnx.RoPE())
    # Not equal bits: flax.nnx hands over to jax.nn.dot_product_attention, see attention_dot_product.
    assert_trees_close(ours, lib.dot_product_attention_with_rope(Q, keys, keys, rope=lib.RoPE()))


@pytest.mark.slow
def test_attention_turns_query_and_key():
    positions = jnp.arange(7)
    turned = [jnp.swapaxes(nnx.RoPE()(jnp.swapaxes(x, 1, 2), positions[: x.shape[1]]), 1, 2) for x in (Q, K)]
    want = nnx.dot_product_attention(*turned, V, is_causal=True)
    assert_trees_equal(nnx.dot_product_attention_with_rope(Q, K, V, rope=nnx.RoPE(), is_causal=True), want)


def test_only_distances_count():
    rope, keys = nnx.RoPE(), K[:, :5]
    here = nnx.dot_product_attention_with_rope(Q, keys, V[:, :5], rope=rope)
    there = nnx.dot_product_attention_with_rope(Q, keys, V[:, :5], rope=rope, input_positions=jnp.arange(5) + 3)
    assert_trees_close(here, there)


@pytest.mark.slow
def test_each_batch_entry_has_its_own_positions():
    positions = jnp.array([[0, 1, 2, 3, 4], [3, 1, 4, 1, 5]])
    rope = nnx.RoPE()
    for i in range(2):
        assert_trees_equal(rope(X, positions)[i], rope(X[i], positions[i]))
    attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    both = attend(Q, K[:, :5], V[:, :5], input_positions=positions)
    for i in range(2):
        one = attend(Q[i : i + 1], K[i : i + 1, :5], V[i : i + 1, :5], input_positions=positions[i])
        assert_trees_close(both[i : i + 1], one)


@pytest.mark.slow
def test_in_multi_head_attention():
    rope = nnx.RoPE(embedding_size=4, max_seq_len=5)
    attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    query, key, value = layer.query(X), layer.key(X), layer.value(X)
    assert_trees_equal(layer(X), layer.out(attend(query, key, value)))
    positions = jnp.arange(5)[::-1]
    want = layer.out(attend(query, key, value, input_positions=positions))
    assert_trees_equal(layer(X, input_positions=positions), want)


def test_positions_reach_only_functions_that_are_given_some():
    seen = []

    def attention_fn(query, key, value, **options):
        seen.append(options.get("input_positions", "none"))
        return value

    layer = nnx.MultiHeadAttention(2, 8, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    positions = jnp.arange(5)
    layer(X)
    layer(X, input_positions=positions)
    assert seen[0] == "none"
    assert seen[1] is positions


ERRORS = {
    "rank": (lambda: nnx.RoPE()(jnp.ones(4)), r"\(\.\.\., length, size\).*found +shape \(4,\).*in pairs"),
    "odd": (lambda: nnx.RoPE()(jnp.ones((2, 3))), r"an even size.*found +shape \(2, 3\)"),
    "size": (
        lambda: MAKERS["tables"](nnx)(jnp.ones((2, 6))),
        r"\(\.\.\., up to 9, 8\).*\(2, 6\).*or neither",
    ),
    "length": (lambda: MAKERS["tables"](nnx)(jnp.ones((10, 8))), r"up to 9, 8.*found +shape \(10, 8\).*max_seq_len"),
    "positions": (
        lambda: nnx.RoPE()(X, jnp.arange(4)),
        r"fits input_positions of shape \(4,\).*found +shape \(2, 5, 8\).*one entry for each",
    ),
    "positions-larger": (lambda: nnx.RoPE()(X[0], jnp.zeros((2, 5), int)), r"input_positions of shape \(2, 5\)"),
}


@pytest.mark.parametrize(("act", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(act, text):
    with pytest.raises(InputShapeError, match=f"(?s)^RoPE at RoPE:.*{text}"):
        act()
