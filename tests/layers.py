"""The table of layers: one row each, with its twin in Linen and the map between their parameters.

Law: whatever is tested for every layer (Linen equivalence, transforms, layouts) is tested from these rows, so
a new layer is one new row, here or in the file of its family in `tests/layer_rows`. `tests/twins.py` compares;
options that only one layer has are rows that its own test file makes with `dataclasses.replace`.
"""

from flax import linen

from tests.layer_rows import attention, conv, linear_general, norms, recurrent
from tests.twins import KEY, Layer

BASIC = (
    Layer(
        "Linear",
        make=lambda lib, rngs, **d: lib.Linear(4, 5, rngs=rngs, **d),
        twin=lambda **d: linen.Dense(5, **d),
        shape=(2, 3, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
    ),
    Layer(
        "Conv",
        make=lambda lib, rngs, **d: lib.Conv(4, 6, (3, 3), rngs=rngs, **d),
        twin=lambda **d: linen.Conv(6, (3, 3), **d),
        shape=(2, 5, 7, 4),
        params={"kernel": "params/kernel", "bias": "params/bias"},
    ),
    Layer(
        "BatchNorm",
        make=lambda lib, rngs, **d: lib.BatchNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.BatchNorm(**d),
        shape=(6, 3, 4),
        params={
            "scale": "params/scale",
            "bias": "params/bias",
            "mean": "batch_stats/mean",
            "var": "batch_stats/var",
        },
        modes={train: {"use_running_average": not train} for train in (True, False)},
        twin_modes={train: {"use_running_average": not train} for train in (True, False)},
    ),
    Layer(
        "LayerNorm",
        make=lambda lib, rngs, **d: lib.LayerNorm(4, rngs=rngs, **d),
        twin=lambda **d: linen.LayerNorm(**d),
        shape=(2, 3, 4),
        params={"scale": "params/scale", "bias": "params/bias"},
    ),
    Layer(
        "Dropout",  # computes in the dtype of its input and has no parameters
        make=lambda lib, rngs, **_: lib.Dropout(0.3, rngs=rngs),
        twin=lambda **_: linen.Dropout(0.3),
        shape=(8, 16),
        params={},
        modes={train: {"deterministic": not train, "rngs": KEY} for train in (True, False)},
        twin_modes={train: {"deterministic": not train, "rng": KEY} for train in (True, False)},
    ),
    Layer(
        "Embed",
        make=lambda lib, rngs, **d: lib.Embed(7, 4, rngs=rngs, **d),
        twin=lambda **d: linen.Embed(7, 4, **d),
        shape=(2, 3),
        params={"embedding": "params/embedding"},
        integers_below=8,  # 7 is out of range: NaN on both sides
    ),
    Layer(
        "Embed.attend",
        make=lambda lib, rngs, **d: lib.Embed(7, 4, rngs=rngs, **d),
        twin=lambda **d: linen.Embed(7, 4, **d),
        shape=(2, 3, 4),
        params={"embedding": "params/embedding"},
        method="attend",
    ),
    Layer(
        "PReLU",  # Linen's has no dtype: it computes in the dtype of its input
        make=lambda lib, rngs, dtype=None, **d: lib.PReLU(**d),
        twin=lambda dtype=None, **d: linen.PReLU(**d),
        shape=(2, 3, 4),
        params={"negative_slope": "params/negative_slope"},
    ),
)

LAYERS = (*BASIC, *linear_general.ROWS, *conv.ROWS, *norms.ROWS, *attention.ROWS, *recurrent.ROWS)
