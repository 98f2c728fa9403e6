"""Variables and modules of flax.nnx in the functions of bridge: an error that names the path and the wrapper."""

import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import bridge
import nnx_core as nnx
from nnx_core._foreign import ForeignObjectError


def theirs() -> flax_nnx.Linear:
    return flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(0))


MISTAKES = {
    "variables_of": (lambda: bridge.variables_of(theirs()), "<root>"),
    "load_variables": (lambda: bridge.load_variables(theirs(), {"params": {}}), "<root>"),
    "attributes to variables": (
        lambda: bridge.nnx_attrs_to_linen_vars({"layer": flax_nnx.state(theirs())}),
        "layer.bias",
    ),
    "variables to attributes": (lambda: bridge.linen_vars_to_nnx_attrs({"params": {"w": theirs().kernel}}), "params"),
    "lazy_init": (lambda: bridge.lazy_init(nnx.Sequential(theirs()), jnp.ones((1, 3))), r"layers\[0\]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_that_is_given_is_an_error_that_says_where(mistake):
    run, path = MISTAKES[mistake]
    with pytest.raises(ForeignObjectError, match=rf"(?s){path} is a .*FromFlax"):
        run()


def test_one_in_the_place_of_a_linen_module_or_class():
    with pytest.raises(TypeError, match=r"It is a module of flax\.nnx: bridge\.flax_nnx\.FromFlax"):
        bridge.ToNNX(theirs())
    with pytest.raises(TypeError, match=r"an instance of Linear"):
        bridge.to_linen(theirs())
    with pytest.raises(TypeError, match=r"(?s)A module of flax\.nnx:.*FromFlax"):
        bridge.lazy_init(theirs(), jnp.ones((1, 3)))
