"""Rows of the layer table: LinearGeneral and Einsum."""

from flax import linen

from tests.twins import Layer

BOTH = {"kernel": "params/kernel", "bias": "params/bias"}

ROWS = (
    Layer(
        "LinearGeneral",
        make=lambda lib, rngs, **d: lib.LinearGeneral((3, 4), (5, 2), axis=(1, -1), rngs=rngs, **d),
        twin=lambda **d: linen.DenseGeneral((5, 2), axis=(1, -1), **d),
        shape=(2, 3, 4),
        params=BOTH,
    ),
    Layer(
        "LinearGeneral.batch_axis",
        make=lambda lib, rngs, **d: lib.LinearGeneral(4, (5, 2), batch_axis={0: 2}, rngs=rngs, **d),
        twin=lambda **d: linen.DenseGeneral((5, 2), batch_dims=(0,), **d),
        shape=(2, 3, 4),
        params=BOTH,
    ),
    Layer(
        "Einsum",
        make=lambda lib, rngs, **d: lib.Einsum("nta,hab->nthb", (5, 4, 2), (5, 2), rngs=rngs, **d),
        twin=lambda **d: linen.Einsum((5, 4, 2), "nta,hab->nthb", **d),
        shape=(2, 3, 4),
        params=BOTH,
    ),
)
