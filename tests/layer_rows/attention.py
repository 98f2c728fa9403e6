"""Rows of the layer table: MultiHeadAttention. Decoding is in tests/nnx_core/nn/test_attention.py."""

from flax import linen

from tests.twins import KEY, Layer

PRODUCTS = {
    f"{product}/{name}": f"params/{product}/{name}"
    for product in ("query", "key", "value", "out")
    for name in ("kernel", "bias")
}
NORMS = {f"{norm}/scale": f"params/{norm}/scale" for norm in ("query_ln", "key_ln")}

ROWS = (
    Layer(
        "MultiHeadAttention",
        make=lambda lib, rngs, **d: lib.MultiHeadAttention(2, 4, 6, 5, dropout_rate=0.3, decode=False, rngs=rngs, **d),
        twin=lambda **d: linen.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5, dropout_rate=0.3, **d),
        shape=(2, 3, 4),
        params=PRODUCTS,
        modes={train: {"deterministic": not train, "rngs": KEY} for train in (True, False)},
        twin_modes={train: {"deterministic": not train, "dropout_rng": KEY} for train in (True, False)},
    ),
    Layer(
        "MultiHeadAttention.normalize_qk",
        make=lambda lib, rngs, **d: lib.MultiHeadAttention(2, 4, 6, normalize_qk=True, decode=False, rngs=rngs, **d),
        twin=lambda **d: linen.MultiHeadDotProductAttention(2, qkv_features=6, out_features=4, normalize_qk=True, **d),
        shape=(2, 3, 4),
        params=PRODUCTS | NORMS,
    ),
)
