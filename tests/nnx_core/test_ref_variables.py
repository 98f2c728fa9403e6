"""Variables whose value lives in a `jax.Ref`: JAX mutates it in place, under every transform, also when captured.

Programs in the table give what they give with flax.nnx. Where flax.nnx loses a write (grad, remat and cond of a
module, `nnx.vmap`), what is expected is what the function does without the transform.
"""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

import nnx_core as nnx
from tests.oracle import same
from tests.support.arrays import ramp
from tests.tolerance import assert_trees_equal

X = ramp(3)
PROGRAMS = {}


def program(f):
    """Into the table, under its name."""
    PROGRAMS[f.__name__] = f
    return f


def make(lib):
    """A weight in an array, a count in a Ref."""

    class Net(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.ones(3))
            self.n = lib.BatchStat(jnp.int32(0), ref=True)

        def __call__(self, x):
            self.n[...] += 1
            return self.w * x

    return Net()


def is_ref(v):
    return isinstance(v.get_raw_value(), jax.Ref)


# ---- as with flax.nnx ----------------------------------------------------------------------------------------------


@program
def read_and_write(lib):
    v = lib.Param(X, ref=True)
    ref, before = v.get_raw_value(), v[...]
    v[...] = X + 1
    v[0] = 5.0
    v.set_value(v[...] * 2)
    v.set_value(jnp.float32(9.0), index=2)
    v[1:] += 1
    return before, v[...], v.get_value(), v[0], v.get_value(index=1), v.get_raw_value() is ref, ref[...], is_ref(v)


@program
def the_ways_to_ask_for_one(lib):
    with lib.var_defaults(ref=True):
        linear = lib.Linear(2, 3, rngs=lib.Rngs(0))
        plain = lib.Param(X, ref=False)
    refs, arrays = lib.with_vars(make(lib), ref=True), lib.with_vars(make(lib), ref=False)
    return (
        [is_ref(linear.kernel), is_ref(plain), is_ref(lib.Param(X)), linear(jnp.ones((1, 2)))],
        [is_ref(refs.w), is_ref(refs.n), is_ref(arrays.w), is_ref(arrays.n), refs.w[...], arrays.n[...]],
        lib.var_defaults().ref,
    )


@program
def jit_of_jax_as_an_argument_and_captured(lib):
    v = lib.Param(X, ref=True)

    @jax.jit
    def given(v):
        v[...] += 1
        return v[...].sum()

    @jax.jit
    def captured():
        v[0] *= 2
        return v[...].sum()

    return given(v), given(v), captured(), captured(), v[...]


@program
def jit_of_a_module(lib):
    m = make(lib)
    ref = m.n.get_raw_value()
    f = lib.jit(lambda m, x: m(x))
    captured = lib.jit(lambda x: m(x))
    return f(m, X), f(m, X), captured(X), m.n[...], m.n.get_raw_value() is ref, jax.jit(lambda m: m(X))(m), m.n[...]


@program
def vmap_of_jax(lib):
    v = lib.Param(X, ref=True)

    def f(v, x):
        v[...] = v[...] + x
        return v[...] * 2

    return jax.vmap(f)(v, X), v[...]


@program
def grad_beside_a_captured_ref(lib):
    m = make(lib)

    def loss(w):
        m.n[...] += 1
        return (w**2).sum()

    return jax.grad(loss)(X), lib.grad(loss)(X), m.n[...]


@program
def scan_beside_a_captured_ref(lib):
    m = make(lib)

    @lib.scan(in_axes=(lib.Carry, 0))
    def f(c, x):
        return c + m(x).sum(), c

    return f(jnp.float32(0), jnp.stack([X, X + 1])), m.n[...]


@program
def split_and_merge_keep_the_ref(lib):
    m = make(lib)
    graphdef, state = lib.split(m)
    again = lib.merge(graphdef, state)
    again(X)
    return m.n[...], again.n[...], state["n"][...], again.n.get_raw_value() is m.n.get_raw_value()


@program
def clone_has_a_ref_of_its_own(lib):
    m = make(lib)
    twin = lib.clone(m)
    twin(X)
    return m.n[...], twin.n[...], is_ref(twin.n)


@program
def update_writes_into_the_ref(lib):
    m = make(lib)
    ref = m.n.get_raw_value()
    lib.update(m, {"n": jnp.int32(9)})
    return ref[...], m.n[...], m.n.get_raw_value() is ref


@program
def a_pure_dict_holds_arrays(lib):
    return lib.to_pure_dict(lib.state(make(lib)))


@program
def copies(lib):
    v = lib.Param(X, ref=True)
    shallow, deep, unpickled = copy.copy(v), copy.deepcopy(v), pickle.loads(pickle.dumps(v))
    v[...] = X * 2
    return shallow[...], deep[...], unpickled[...], is_ref(deep), is_ref(unpickled)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_it_gives_with_flax(name):
    if name == "copies" and jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12 refuses to write to a Ref once its array was copied, in both libraries")
    same(PROGRAMS[name])


# ---- where flax.nnx loses the write --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda m: nnx.remat(lambda m: m(X))(m),
        lambda m: nnx.value_and_grad(lambda m: m(X).sum())(m)[1]["w"][...],
        lambda m: nnx.vjp(lambda m: m(X), m)[0],
        lambda m: nnx.cond(True, lambda m: m(X), lambda m: m.w * X, m),
        lambda m: nnx.switch(1, [lambda m: m.w * X, lambda m: m(X)], m),
        lambda m: nnx.jit(lambda m: nnx.remat(lambda m: m(X))(m))(m),
    ],
    ids=["remat", "grad", "vjp", "cond", "switch", "remat in jit"],
)
def test_a_write_into_a_ref_of_an_argument_is_there(call):
    m = make(nnx)
    ref = m.n.get_raw_value()
    assert_trees_equal(call(m), X)
    call(m)
    assert m.n.get_raw_value() is ref
    assert int(m.n[...]) == int(ref[...]) == 2


def test_vmap_maps_a_ref():
    v = nnx.Param(X, ref=True)

    @nnx.vmap
    def f(v, x):
        v[...] = v[...] + x
        return v[...] * 2

    assert_trees_equal(f(v, X), X * 4)
    assert_trees_equal(v[...], X * 2)
    assert is_ref(v)


def test_a_ref_behaves_like_its_array():
    v = nnx.Param(X, ref=True)
    assert_trees_equal([v + 1, 1 - v, v * v, v == v, v.sum()], [X + 1, 1 - X, X * X, X == X, X.sum()])
    assert (v.shape, v.dtype, len(v), v.ndim) == ((3,), jnp.float32, 3, 1)
    assert_trees_equal(jnp.sin(v), jnp.sin(X))
    assert v.has_ref
    assert not nnx.Param(X).has_ref


def test_a_second_call_does_not_retrace():
    traces = []
    m = make(nnx)

    @nnx.jit
    def f(m, x):
        traces.append(1)
        return m(x)

    for _ in range(3):
        f(m, X)
    assert len(traces) == 1
    assert int(m.n[...]) == 3


def test_hooks_run_around_a_ref():
    v = nnx.Param(
        X,
        ref=True,
        on_get_value=lambda v, x: x + 10,
        on_set_value=lambda v, x: x * 2,
        on_create_value=lambda v, x: x + 1,
    )
    assert_trees_equal(v.get_raw_value()[...], X + 1)
    assert_trees_equal(v[...], X + 11)
    v[...] = X
    assert_trees_equal(v.get_raw_value()[...], X * 2)


NOT_DIFFERENTIATED = (ValueError, r"Ref\{float32\[3\]\}")  # JAX's own error
if jax.__version_info__ >= (0, 12):
    NOT_DIFFERENTIATED = (TypeError, r"^grad cannot differentiate with respect to a Ref-typed argument")


@pytest.mark.parametrize("transform", [nnx.grad, jax.grad])
def test_a_ref_itself_is_not_differentiated(transform):
    error, text = NOT_DIFFERENTIATED
    with pytest.raises(error, match=text):
        transform(lambda v: (v[...] ** 2).sum())(nnx.Param(X, ref=True))


def test_a_write_of_another_shape_is_refused():
    v = nnx.Param(X, ref=True)
    with pytest.raises(
        ValueError, match=r"Param of shape \(3,\): expected what broadcasts to shape \(3,\).*found float32\[4\]"
    ):
        v[...] = jnp.ones(4)
    assert_trees_equal(v[...], X)


def test_a_ref_made_inside_of_jit_comes_out():
    ref = nnx.jit(jax.new_ref)(jnp.ones(2))
    ref[...] = ref[...] + 1
    assert ref[...].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat, lambda f: nnx.jit(nnx.remat(f))], ids=["jit", "remat", "both"])
def test_a_model_turned_to_refs_inside_of_a_transform(wrap):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    made = wrap(lambda m: nnx.with_vars(m, ref=True))(model)
    assert made.kernel.has_ref
    assert not model.kernel.has_ref
    assert_trees_equal(made.kernel[...], model.kernel[...])


def test_an_attribute_that_is_turned_to_a_ref_inside_of_jit():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    @nnx.jit
    def turn(m):
        m.bias = nnx.with_vars(m.bias, ref=True)

    turn(model)
    assert model.bias.has_ref
    nnx.jit(lambda m: m.bias.set_value(m.bias[...] + 1))(model)
    assert model.bias[...].tolist() == [1.0, 1.0, 1.0]


def test_one_ref_made_inside_of_jit_comes_out_at_one_place():
    def twice(x):
        ref = jax.new_ref(x)
        return ref, [ref]

    with pytest.raises(nnx.NnxError, match=r"result\[0\] and result\[1\]\[0\] hold one jax\.Ref that was made inside"):
        nnx.jit(twice)(jnp.ones(2))
