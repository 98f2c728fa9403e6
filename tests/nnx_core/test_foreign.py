"""Objects of flax.nnx in the functions of nnx_core: an error that names the path and the wrapper, or a right result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core._errors import FilterError, TraceError
from nnx_core._foreign import ForeignObjectError, is_foreign
from tests.support.foreign_cases import MISTAKES, Holder, X, ours, theirs


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_that_is_given_is_an_error_that_says_where(mistake):
    run, path = MISTAKES[mistake]
    with pytest.raises(ForeignObjectError, match=rf"(?s){path} is a .*, of another NNX library \(flax\.nnx.*FromFlax"):
        run()


def test_types_of_flax_nnx_are_no_filters():
    with pytest.raises(FilterError, match=r"flax\.nnx.*Expected nnx_core's: nnx\.Param"):
        nnx.state(ours(), flax_nnx.Param)
    with pytest.raises(FilterError, match=r"bridge\.flax_nnx\.variable_type"):
        nnx.vmap(lambda m: None, in_axes=nnx.StateAxes({flax_nnx.Param: 0}))(ours())


def test_a_graphdef_of_flax_nnx_is_named():
    with pytest.raises(TypeError, match=r"found GraphDef of flax\.nnx.*FromFlax"):
        nnx.merge(*flax_nnx.split(theirs()))


def test_the_value_of_a_variable_of_flax_nnx_is_taken():
    layer, other = ours(), theirs()
    layer.kernel[...] = other.kernel
    layer.bias.value = other.bias
    assert type(layer.bias.raw_value) is type(layer.kernel.raw_value) is type(jnp.ones(1))
    np.testing.assert_array_equal(layer.kernel[...], other.kernel[...])
    np.testing.assert_array_equal(layer.kernel * other.kernel, other.kernel[...] ** 2)


def test_what_is_of_another_library_hides_no_other_error():
    holder = Holder()
    other = ours()

    def write_outside(x):
        other.kernel.value = x
        return x.sum()

    with pytest.raises(TraceError, match="created outside this JAX transform"):
        jax.jit(write_outside)(X)
    assert holder is not None


@pytest.mark.parametrize("kind", [flax_nnx.Module, flax_nnx.Rngs, flax_nnx.List, flax_nnx.Param, flax_nnx.Optimizer])
def test_it_is_recognized_by_its_protocol(kind):
    assert is_foreign(kind)
    assert is_foreign(type("Mine", (kind,), {}))


@pytest.mark.parametrize("kind", [nnx.Module, nnx.Rngs, nnx.List, nnx.Param, nnx.Optimizer, nnx.State, dict, jax.Array])
def test_what_is_ours_or_nobodys_is_not(kind):
    assert not is_foreign(kind)
