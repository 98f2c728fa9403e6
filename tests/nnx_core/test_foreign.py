"""Objects of flax.nnx in the functions of nnx_core: an error that names the path and the wrapper, or a right result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core._errors import FilterError, TraceError
from nnx_core._foreign import ForeignObjectError, is_foreign

X = np.ones((2, 3), np.float32)


def theirs() -> flax_nnx.Linear:
    return flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(0))


def ours() -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def mixed() -> nnx.Module:
    return nnx.Sequential(ours(), {"deep": [theirs()]}["deep"][0])


class Holder(nnx.Module):
    def __init__(self):
        self.parts = [ours(), {"layer": theirs()}]


#: What is done with one, and the path that the error names.
MISTAKES = {
    "split": (lambda: nnx.split(theirs()), "<root>"),
    "state of a part": (lambda: nnx.state(Holder()), r"parts\[1\]\.layer"),
    "jit argument": (lambda: nnx.jit(lambda m, x: m(x))(theirs(), X), r"args\[0\]"),
    "jit of one": (lambda: nnx.jit(theirs()), "<root>"),
    "jit of a method": (lambda: nnx.jit(theirs().__call__), "self"),
    "jit result": (lambda: nnx.jit(theirs)(), "result"),
    "grad": (lambda: nnx.grad(lambda m: m(X).sum())(mixed()), r"args\[0\]\.layers\[1\]"),
    "scan": (lambda: nnx.scan(lambda c, m: (m(c), None), in_axes=(nnx.Carry, 0))(X, theirs()), r"args\[1\]"),
    "cond": (lambda: nnx.cond(True, lambda m: m(X), lambda m: m(X), theirs()), r"args\[0\]"),
    "eval_shape": (lambda: nnx.eval_shape(theirs), "result"),
    "optimizer": (lambda: nnx.Optimizer(Holder(), optax.sgd(0.1), wrt=nnx.Param), r"parts\[1\]\.layer"),
    "update of one": (lambda: nnx.update(theirs(), nnx.state(ours())), "<root>"),
    "update from one": (lambda: nnx.update(ours(), flax_nnx.state(theirs())), "bias"),
    "merge": (lambda: nnx.merge(nnx.graphdef(ours()), flax_nnx.state(theirs())), "bias"),
    "pop": (lambda: nnx.pop(theirs(), nnx.Param), "<root>"),
    "iter_graph": (lambda: list(nnx.iter_graph(Holder())), r"parts\[1\]\.layer"),
    "recursive_map": (lambda: nnx.recursive_map(lambda _, x: x, Holder()), r"parts\[1\]\.layer"),
    "find_duplicates": (lambda: nnx.find_duplicates(Holder()), r"parts\[1\]\.layer"),
    "train": (lambda: Holder().train(), r"parts\[1\]\.layer"),
    "tabulate": (lambda: nnx.tabulate(theirs(), X), "<root>"),
    "Param of one": (lambda: nnx.Param(theirs().kernel), "Param"),
    "value of a Variable": (lambda: setattr(ours().kernel, "value", theirs()), "value"),
    "to_pure_dict": (lambda: nnx.to_pure_dict(flax_nnx.state(theirs())), "bias"),
    "filter_state": (lambda: nnx.filter_state(flax_nnx.state(theirs()), nnx.Param), "bias"),
    "split_rngs": (lambda: nnx.split_rngs(theirs(), splits=2), "<root>"),
    "capture": (lambda: nnx.capture(theirs(), nnx.Intermediate), "<root>"),
    "get_partition_spec": (lambda: nnx.get_partition_spec(flax_nnx.state(theirs())), "bias"),
}


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
