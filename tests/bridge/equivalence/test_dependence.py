"""What half precision reaches, and how far integers may be drawn: read off programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.equivalence import compare
from bridge.equivalence.compiled import Compiled
from bridge.equivalence.dependence import CAUTIOUS, ranges_of
from bridge.equivalence.inputs import inputs_of
from bridge.equivalence.tolerance import tolerance_of
from tests.support.compared_models import X

BF16, F16 = (tolerance_of(name).model for name in ("bfloat16", "float16"))
IDS = jax.ShapeDtypeStruct((2, 5), "int32")


def test_half_precision_reaches_what_is_made_of_it_and_no_more():
    def program(x, y):
        h = x.astype("bfloat16").astype("float32")

        def swap(carry, _):
            return (carry[1] * 1.0, carry[0] * 2), carry[0]

        (even, odd), rounds = jax.lax.scan(swap, (h, y), None, length=2)
        loop = jax.lax.while_loop(lambda c: c[0].sum() < 3, lambda c: (c[0] + 1, c[1] + 1), (y, h))
        return {
            "alone": y * 2,
            "beside": jax.remat(jax.nn.gelu)(y),
            "loop": loop,
            "scan": (even, odd, rounds),
            "gradient": jax.grad(lambda y: (jax.nn.relu(y) * h).sum())(y),
            "chosen": jax.lax.cond(h.sum() > 0, lambda y: y, lambda y: -y, y),
            "half": jax.lax.cond(y.sum() > 0, lambda y: y.astype("float16").astype("float32"), lambda y: y, y),
        }

    compiled = Compiled(program)
    compiled.prepare(jnp.ones(3), jnp.ones(3))
    assert compiled.least == {
        "alone": 0.0,
        "beside": 0.0,
        "loop": (0.0, BF16),
        "scan": (BF16, BF16, BF16),
        "gradient": BF16,
        "chosen": BF16,
        "half": F16,
    }


def test_what_half_precision_does_not_reach_is_held_to_float32():
    def both(factor):
        def model(x):
            return x * factor, (x.astype("bfloat16") * x.astype("bfloat16")).astype("float32") * factor

        return model

    report = compare(both(1.0), both(1.001), X, seeds=(0,))
    equal = {(finding.what, finding.path): finding.equal for finding in report.findings}
    assert equal == {("output", "0"): False, ("output", "1"): True, ("gradient", "inputs/0/0"): True}


def test_integers_are_drawn_as_far_as_their_tables_reach():
    table, positions = jnp.ones((50, 4)), jnp.ones((9, 4))

    def program(ids, mask, numbers, labels, place, fields):
        at = jnp.cumsum(mask, -1) * mask - 1
        embedded = table[ids] + jnp.take(positions, at, axis=0) + table[fields + jnp.arange(5)]
        chosen = jax.lax.switch(place[0, 0], [lambda: 1.0, lambda: 2.0, lambda: 3.0])
        return embedded, (1.0 - numbers) * -1e9, jax.nn.one_hot(labels, 7), labels * labels, chosen

    def scattered(ids, weights):
        return jax.grad(lambda table: (table[ids] * weights).sum())(table)

    assert ranges_of(jax.make_jaxpr(scattered)(IDS, jnp.ones((2, 5, 4))), (), [IDS]) == {0: (50, 50)}
    ranges = ranges_of(jax.make_jaxpr(program)(*[IDS] * 6), (), [IDS] * 6)
    assert ranges == {0: (50, 50), 1: CAUTIOUS, 2: (2, 4), 3: (4, 4), 4: (3, 3), 5: CAUTIOUS}


@pytest.mark.parametrize(("below", "count"), [(2, 2), (3, 3), (1000, 10)])
def test_draws_are_spread_evenly(below, count):
    batch = inputs_of([IDS], {}).within([{0: (below, below)}, {0: (1000, 1000)}])
    for seed in (0, 1):
        [ids], _ = batch.drawn(seed)
        assert len(np.unique(ids)) == count
        assert 0 <= ids.min() <= ids.max() < below


def test_an_embedding_that_is_wrong_in_a_late_row_is_found():
    table = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    wrong = table.copy()
    wrong[4] += 1
    report = compare(lambda ids: jnp.asarray(table)[ids], lambda ids: jnp.asarray(wrong)[ids], IDS, seeds=(0,))
    assert not report.equal
    assert not compare(lambda x: x * x, lambda x: x, IDS, seeds=(0,)).equal
