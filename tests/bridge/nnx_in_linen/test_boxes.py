"""ToLinen: axis metadata. `row N` is a row of REQUIREMENTS.md."""

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import linen as nn

import nnx_core as nnx
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class
from tests.support.to_linen_models import KEY, X
from tests.tolerance import assert_trees_equal

# ---- axis metadata ----


def annotated(**kwargs):
    init = nnx.with_metadata(nnx.initializers.ones, out_sharding=("in", "out"))
    return {"kernel_init": init, **kwargs}


def test_metadata_is_boxed_and_survives_apply():
    def specs(variables):
        return nn.get_partition_spec(variables)["params"]["kernel"]

    model = to_linen(nnx.Linear, 3, 4, **annotated())
    variables = model.init(KEY, X)
    assert tuple(specs(variables)) == ("in", "out")
    seen = []
    model.apply(variables, X, nnx_method=lambda m, x: seen.append(m.kernel.get_metadata()))
    assert seen[0]["out_sharding"] == ("in", "out")
    plain = ToLinen(nnx.Linear, (3, 4), annotated(), metadata_fn=None).init(KEY, X)
    assert isinstance(plain["params"]["kernel"], jax.Array)
    assert_trees_equal(model.apply(plain, X), model.apply(variables, X))


def test_row_53_a_new_axis_enters_the_spec():
    def logical(variable):
        names = variable.get_metadata("out_sharding", None)
        value = variable.get_raw_value()
        return value if names is None else nn.LogicallyPartitioned(value, names)

    for metadata_fn in ({}, {"base_metadata_fn": logical}):
        cls = to_linen_class(nnx.Linear, **metadata_fn)
        stacked = nn.vmap(
            cls,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = jnp.ones((5, 2, 3))
        model = stacked(3, 4, **annotated(use_bias=False))
        variables = model.init(KEY, x)
        kernel = variables["params"]["kernel"]
        assert tuple(kernel.get_partition_spec()) == ("layers", "in", "out")
        assert kernel.unbox().shape == (5, 3, 4)
        assert_trees_equal(model.apply(variables, x), jnp.full((5, 2, 4), 3.0))


def test_a_box_around_written_state_stays():
    class Counts(nnx.Module):
        def __init__(self):
            self.n = nnx.BatchStat(jnp.zeros(3), out_sharding=("data",))

        def __call__(self):
            self.n[...] += 1

    model = to_linen(Counts)
    variables = model.init(KEY)
    _, updates = model.apply(variables, mutable=["batch_stats"])
    box = updates["batch_stats"]["n"]
    assert tuple(box.get_partition_spec()) == ("data",)
    assert_trees_equal(box.unbox(), jnp.ones(3))
