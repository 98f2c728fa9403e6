"""`v[...] = x` and `v[i] = x` write into what is there; `v.value = x` replaces it."""

import re

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core._errors import TraceError, WriteError
from tests.oracle import same
from tests.support.arrays import keys
from tests.tolerance import assert_trees_equal

#: flax.nnx writes by `x.at[...].set`, which warns where it casts down; ours may not, see the test that says so.
pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")


[KEY] = keys(1)


def ones(*shape, dtype=jnp.float32):
    return lambda: jnp.ones(shape, dtype)


# ---- as flax.nnx: what fits --------------------------------------------------------------------------------------

FITS = {
    "scalar": (ones(3), ..., 0.0),
    "int": (ones(3), ..., 2),
    "bool": (ones(3), ..., True),
    "0-d array": (ones(3), ..., np.float32(2)),
    "row": (ones(2, 3), ..., np.arange(3.0, dtype=np.float32)),
    "column": (ones(2, 3), ..., np.arange(2.0, dtype=np.float32)[:, None]),
    "float32 into bfloat16": (ones(3, dtype=jnp.bfloat16), ..., np.full(3, 1.001, np.float32)),
    "bfloat16 into float32": (ones(3), ..., np.arange(3).astype(jnp.bfloat16)),
    "float into int": (ones(3, dtype=jnp.int32), ..., 2.7),
    "floats into int": (ones(3, dtype=jnp.int32), ..., np.float32([2.7, -2.7, 1.0])),
    "int into bool": (ones(3, dtype=bool), ..., 2),
    "into an unsigned count": (ones(dtype=jnp.uint32), ..., 0),
    "float64": (ones(3), ..., np.arange(3.0)),
    "list": (ones(3), ..., [1, 2, 3]),
    "empty": (ones(0, 3), ..., 1.0),
    "key": (lambda: jax.random.key(0), ..., KEY),
    "key into keys": (lambda: jax.random.split(jax.random.key(0), 3), ..., KEY),
    "item": (ones(3), 0, 5),
    "negative item": (ones(3), -1, 5),
    "out of bounds": (ones(3), 10, 5),
    "slice": (ones(4), slice(1, 3), 0.0),
    "all": (ones(4), slice(None), np.arange(4.0)),
    "tuple": (ones(2, 3), (0, slice(1, None)), 0.0),
    "tuple with ellipsis": (ones(2, 3), (..., 0), np.float32([5, 6])),
    "empty tuple": (ones(2, 3), (), 0.0),
    "new axis": (ones(3), None, 0.0),
    "bfloat16 item": (ones(3, dtype=jnp.bfloat16), 0, np.float32(1.001)),
}


@pytest.mark.parametrize("case", FITS)
@pytest.mark.parametrize("staged", [False, True], ids=["eager", "jit"])
def test_what_fits_is_written_as_in_flax(case, staged):
    make, index, x = FITS[case]

    def program(lib):
        def write(v):
            v[index] = x

        v = lib.Param(make())
        (lib.jit(write) if staged else write)(v)
        return v, str(v.get_value().dtype), getattr(v.get_value(), "weak_type", False)

    same(program)


@pytest.mark.parametrize("index", [..., 0])
@pytest.mark.filterwarnings("error")
def test_casting_down_is_silent(index):
    for dtype in (jnp.int32, jnp.bfloat16, bool):
        v = nnx.Variable(jnp.zeros(2, dtype))
        v[index] = jnp.float32(2.7)
        assert_trees_equal(v[0], jnp.float32(2.7).astype(dtype))


@pytest.mark.parametrize("as_array", [np.array, jnp.array])
@pytest.mark.parametrize(("index", "x"), [([True, False, True], 0.0), ([2, 0], np.float32([7, 8]))])
def test_an_array_as_index(index, x, as_array):
    expected = np.ones(3, np.float32)
    expected[np.array(index)] = x
    for value in (jnp.ones(3), np.ones(3, np.float32)):
        v = nnx.Variable(value)
        v[as_array(index)] = x
        assert_trees_equal(np.asarray(v.get_value()), expected)


def test_set_value_with_an_index_is_the_same():
    def program(lib):
        v, w = lib.Param(jnp.ones(3)), lib.Param(jnp.ones(3))
        v.set_value(0.0, index=...)
        w.set_value(5.0, index=1)
        return v, w

    same(program)


def test_what_replaces():
    def program(lib):
        v, w, u = (lib.Param(jnp.ones(3)) for _ in range(3))
        v.set_value(jnp.zeros((2, 2)))
        w.set_raw_value(jnp.zeros(1, jnp.int32))
        u.set_value(0.0)
        return v, w, u.get_value()

    same(program)


def test_the_written_array_itself_is_stored_if_it_fits():
    v, x = nnx.Param(jnp.ones(3)), jnp.zeros(3)
    v[...] = x
    assert v.get_value() is x


def test_a_variable_is_written_by_its_value():
    def program(lib):
        v = lib.Param(jnp.ones((2, 3)))
        v[...] = lib.BatchStat(jnp.arange(3.0))
        v[0] = lib.BatchStat(jnp.float32(7))
        return v

    same(program)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_augmented(dtype):
    def program(lib):
        v = lib.Param(jnp.ones(3, dtype))
        v[...] += jnp.float32(1.5)
        v[...] -= 0.25
        v[0] += 2
        return v

    same(program)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated:UserWarning")  # flax's
def test_the_hook_sees_what_is_written_not_the_whole():
    def program(lib):
        seen = []

        def double(v, x):
            seen.append(np.shape(x))
            return x * 2

        v = lib.Param(jnp.ones(3), on_set_value=double)
        v[...] = 3.0
        v[0] = 1.0
        return v.get_value(), seen

    same(program)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated:UserWarning")  # flax's
def test_reading_hooks_are_not_written_back():
    def program(lib):
        v = lib.Param(jnp.ones(3), on_get_value=lambda v, x: x * 2)
        v[...] = 3.0
        v[0] = 1.0
        return v.get_raw_value()

    same(program)


# ---- as flax.nnx: what does not fit ------------------------------------------------------------------------------

MISFITS = {
    "longer": (ones(3), ..., np.zeros(4, np.float32), r"shape \(3,\) and casts to float32, found float32\[4\]"),
    "more axes": (ones(3), ..., np.zeros((1, 3), np.float32), r"shape \(3,\) .* found float32\[1,3\]"),
    "one into a scalar": (ones(), ..., np.zeros(1, np.float32), r"shape \(\) .* found float32\[1\]"),
    "None": (ones(3), ..., None, "found None"),
    "string": (ones(3), ..., "text", "found 'text'"),
    "dict": (ones(3), ..., {"a": 1}, r"found \{'a': 1\}"),
    "abstract": (ones(3), ..., jax.ShapeDtypeStruct((3,), jnp.float32), r"found float32\[3\]"),
    "a key into numbers": (ones(2), ..., KEY, r"casts to float32, found key<fry>\[\]"),
    "numbers into a key": (lambda: jax.random.key(0), ..., np.zeros(2, np.uint32), r"casts to key<fry>, found uint32"),
    "item": (ones(3), 0, np.ones(2, np.float32), r"shape \(\) and casts to float32, found float32\[2\]"),
    "slice": (ones(3), slice(None), np.ones(4, np.float32), r"shape \(3,\) .* found float32\[4\]"),
    "a string item": (ones(3), 0, "text", "found 'text'"),
    "a number for the array of a list": (
        lambda: [jnp.ones(1), jnp.ones(2)],
        ...,
        0.0,
        r"expected PyTreeDef\(\[\*, \*\]\)",
    ),
    "a longer list": (
        lambda: [1, 2],
        ...,
        [3, 4, 5],
        r"expected PyTreeDef\(\[\*, \*\]\), found PyTreeDef\(\[\*, \*, \*\]",
    ),
    "an item of a tuple": (lambda: (1, 2), 0, 5, r"expected a value with items that can be set, found \(1, 2\)"),
    "None is no array": (lambda: None, ..., np.ones(1), "expected nothing: it holds None, which is no array"),
    "a string is no array": (lambda: "a", ..., "b", "expected nothing: it holds 'a', which is no array"),
    "numpy": (lambda: np.ones(3), ..., np.zeros(4), r"shape \(3,\) and casts to float64, found float64\[4\]"),
    "numpy slice": (lambda: np.ones(3), slice(2), np.zeros(4), r"shape \(2,\) .* found float64\[4\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_as_in_flax_and_changes_nothing(case):
    make, index, x, text = MISFITS[case]
    theirs = flax.nnx.Param(make())
    with pytest.raises((ValueError, TypeError)):
        theirs[index] = x
    ours = nnx.Param(make())
    before = ours.get_value()
    with pytest.raises(WriteError, match=rf"(?s)^Cannot write into Param.*{text}.*`v.value = x` replaces it"):
        ours[index] = x
    assert ours.get_value() is before


def test_the_imaginary_part_is_not_dropped():
    # flax drops it with a warning that says that JAX will refuse it soon; numpy refuses.
    for index in (..., 0):
        for x in (1j, jnp.complex64(1j)):
            v = nnx.Param(jnp.ones(3))
            with pytest.raises(WriteError, match="casts to float32"):
                v[index] = x
    v = nnx.Param(jnp.ones(2, jnp.complex64))
    v[...] = 1j
    assert_trees_equal(v[...], jnp.full(2, 1j, jnp.complex64))


def test_the_error_names_the_path():
    def write(model):
        model.layers[1].kernel[...] = jnp.zeros((5, 5))

    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    expected = re.escape(
        "Param of shape (3, 2) at Sequential.layers[1].kernel: expected what broadcasts to shape (3, 2)"
    )
    with pytest.raises(WriteError, match=expected):
        nnx.jit(write)(model)


def test_too_many_indices_stay_an_index_error():
    with pytest.raises(IndexError, match="Too many indices"):
        nnx.Param(jnp.ones(3))[0, 0] = 1.0


def test_another_trace_is_the_first_thing_that_is_wrong():
    v = nnx.Param(jnp.ones(3))
    with pytest.raises(TraceError, match="Cannot write Param of shape"):
        jax.jit(lambda x: v.__setitem__(..., x))(jnp.ones(4))


# ---- values that are no jax.Array --------------------------------------------------------------------------------


def test_numpy_values_stay_numpy_and_are_never_changed_in_place():
    # flax writes into the caller's array, and so into every clone that shares it.
    x = np.ones(3)
    v = nnx.Variable(x)
    twin = nnx.clone(v)
    v[...] = jnp.zeros(3, jnp.int32)
    v[0] = 5
    assert type(v.get_value()) is np.ndarray
    assert_trees_equal((v.get_value(), twin.get_value(), x), (np.array([5.0, 0, 0]), np.ones(3), np.ones(3)))


def test_tracers_into_numpy():
    def write(v, x):
        v[...] = x
        made = nnx.Variable(np.zeros(3))
        made[...] = x
        made[0] = x
        return made.get_value()

    v = nnx.Variable(np.zeros(3, np.float32))
    assert_trees_equal(nnx.jit(write)(v, 2), jnp.full(3, 2.0))
    assert_trees_equal(v.get_value(), jnp.full(3, 2.0))


def test_items_of_lists_and_dicts():
    def program(lib):
        v, w = lib.Variable([1, 2]), lib.Variable({"a": jnp.ones(2)})
        v[0] = 5
        w["a"] = jnp.zeros(1)
        w["b"] = 3
        return v.get_value(), w.get_value()

    same(program)
    items = [1, 2]
    v = nnx.Variable(items)
    v[0] = 5
    assert items == [1, 2]
    with pytest.raises(IndexError):
        v[7] = 1


def test_a_tree_takes_a_tree_of_its_own_structure():
    v = nnx.Variable({"a": jnp.ones(2, jnp.bfloat16), "b": (jnp.ones((2, 2)),)})
    v[...] = {"a": 3.0, "b": (jnp.arange(2),)}
    expected = {"a": jnp.full(2, 3, jnp.bfloat16), "b": (jnp.array([[0.0, 1], [0, 1]]),)}
    assert_trees_equal(v.get_value(), expected)
    before = v.get_value()
    with pytest.raises(WriteError, match=r"shape \(2,\) and casts to bfloat16, found"):
        v[...] = {"a": jnp.ones(3), "b": (jnp.zeros(2),)}
    assert v.get_value() is before


def test_a_python_number_is_written_like_the_array_it_is_under_jit():
    def count(v):
        v[...] += 1
        v[...] += 0.5

    for start in (1, True, 1.5, np.float32(1.5)):
        eager, staged = nnx.Variable(start), nnx.Variable(start)
        count(eager)
        nnx.jit(count)(staged)
        assert_trees_equal(eager.get_value(), staged.get_value())


def test_abstract_values():
    def abstract():
        return nnx.Param(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))

    v, w = abstract(), abstract()
    v[...] = jnp.arange(3)
    w[...] = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    assert_trees_equal(v.get_value(), jnp.broadcast_to(jnp.arange(3), (2, 3)).astype(jnp.bfloat16))
    assert w.get_value() == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    for wrong in (jnp.ones(4), jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bfloat16)):
        with pytest.raises(WriteError, match=r"shape \(2, 3\) and casts to bfloat16"):
            w[...] = wrong


# ---- jax.Ref -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in FITS if case not in ("new axis", "out of bounds")])
@pytest.mark.parametrize("staged", [False, True], ids=["eager", "jit"])
def test_a_ref_takes_what_an_array_takes(case, staged):
    make, index, x = FITS[case]

    def write(v):
        v[index] = x

    plain, ref = nnx.Param(make(), ref=False), nnx.Param(make(), ref=True)
    cell = ref.get_raw_value()
    for v in (plain, ref):
        (nnx.jit(write) if staged else write)(v)
    assert ref.get_raw_value() is cell
    assert_trees_equal(ref[...], plain[...])


@pytest.mark.parametrize(
    "write", [lambda v, x: v.__setitem__(..., x), lambda v, x: v.set_value(x), lambda v, x: v.overwrite(x)]
)
def test_a_ref_refuses_what_does_not_fit(write):
    v = nnx.Param(jnp.ones(3, jnp.bfloat16), ref=True)
    write(v, np.float32([1, 2, 3]))
    with pytest.raises(WriteError, match=r"(?s)casts to bfloat16, found float32\[4\].*unless it is a jax\.Ref"):
        write(v, np.zeros(4, np.float32))
    assert_trees_equal(v[...], jnp.array([1, 2, 3], jnp.bfloat16))


# ---- where it is -------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


PLACED = {
    "scalar": lambda place: 0.0,
    "uncommitted": lambda place: jnp.zeros(8),
    "numpy": lambda place: np.zeros(8, np.float32),
    "replicated": lambda place: place(jnp.zeros(8), P()),
    "cast": lambda place: jnp.zeros(8, jnp.int32),
}


@pytest.mark.parametrize("case", PLACED)
def test_a_sharded_value_stays_sharded_as_in_flax(case, mesh):
    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def program(lib):
        v = lib.Param(place(jnp.ones(8), P("x")))
        v[...] = PLACED[case](place)
        return v.get_value(), v.get_value().sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 1)

    same(program)
    assert program(nnx)[1]


def test_a_replicated_value_takes_a_sharded_one_as_it_is_as_in_flax(mesh):
    def program(lib):
        v = lib.Param(jax.device_put(jnp.ones(8), NamedSharding(mesh, P())))
        v[...] = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("x")))
        return str(v.get_value().sharding.spec)

    same(program)


def test_a_value_on_other_devices_is_refused_as_in_flax():
    def place(x, i):
        return jax.device_put(x, jax.devices()[i])

    def program(lib):
        v = lib.Param(place(jnp.ones(3), 1))
        v[...] = jnp.zeros(3)  # on device 0, but not put there by anybody
        return v.get_value().devices() == {jax.devices()[1]}

    same(program)
    for lib in (nnx, flax.nnx):
        v = lib.Param(place(jnp.ones(3), 1))
        with pytest.raises(ValueError, match=r"on cpu:1, found an array on cpu:2|incompatible devices"):
            v[...] = place(jnp.zeros(3), 2)


# ---- what this is for --------------------------------------------------------------------------------------------


def test_a_bfloat16_step_stays_bfloat16_and_compiles_once():
    traced = []
    model = nnx.Linear(2, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        traced.append(x)
        grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
        for p, g in ((model.kernel, grads["kernel"]), (model.bias, grads["bias"])):
            p[...] = p[...] - 0.1 * g[...].astype(jnp.float32)

    for _ in range(3):
        step(model, jnp.ones((4, 2)))
        model.bias[...] = 0.0
    assert len(traced) == 1
    assert model.kernel.dtype == model.bias.dtype == jnp.bfloat16
    assert model.bias.shape == (3,)


@pytest.mark.parametrize("loop", ["scan", "fori_loop", "while_loop"])
def test_a_carry_keeps_its_dtype(loop):
    def program(lib):
        average = lib.BatchStat(jnp.zeros(3, jnp.bfloat16))

        def move(v, x):
            v[...] = 0.9 * v[...] + 0.1 * x
            return v

        xs = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
        if loop == "scan":
            lib.scan(lambda v, x: (move(v, x), None), in_axes=(lib.Carry, 0))(average, xs)
        elif loop == "fori_loop":
            lib.fori_loop(0, 4, lambda i, v: move(v, xs[i]), average)
        else:
            lib.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, move(c[1], xs[c[0]])), (0, average))
        return average

    same(program)


@pytest.mark.parametrize("metric", ["Average", "Accuracy", "Welford", "Mean"])
def test_a_metric_under_vmap_keeps_its_axis_when_it_is_reset(metric):
    def program(lib):
        kind = getattr(lib.metrics, metric, None) or lib.metrics.Average
        m = lib.vmap(lambda i: kind())(jnp.arange(3))
        if metric != "Accuracy":
            lib.vmap(lambda m, x: m.update(values=x))(m, jnp.arange(6.0).reshape(3, 2))
        m.reset()
        return m

    same(program)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
def test_statistics_keep_the_dtype_that_the_user_gave_them(dtype):
    """Of BatchNorm; those of SpectralNorm take the dtype of the arithmetic, as in Linen (`test_linen_twin`)."""

    def program(lib):
        made = lib.BatchNorm(3, rngs=lib.Rngs(0))
        lib.update(made, jax.tree.map(lambda x: x.astype(dtype), lib.state(made, lib.BatchStat)))
        made(jnp.arange(12.0).reshape(4, 3))
        return [str(x.dtype) for x in jax.tree.leaves(lib.state(made, lib.BatchStat))]

    same(program)


def test_combine_of_a_metric_still_drops_the_axis():
    metrics = nnx.vmap(lambda x: _updated(x))(jnp.arange(6.0).reshape(3, 2))
    nnx.metrics.reduce(metrics)
    assert_trees_equal((metrics.total.shape, metrics.compute()), ((), jnp.float32(2.5)))


def _updated(x):
    metric = nnx.metrics.Average()
    metric.update(values=x)
    return metric


@pytest.mark.parametrize("options", [{}, {"donate_argnums": 0}], ids=["jit", "donated"])
def test_a_reset_inside_of_jit_stays_on_its_devices(options):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("d"))

    def devices(lib):
        v = lib.Variable(jax.device_put(jnp.ones((8, 2)), place))

        def reset(v):
            v[...] = 0.0

        lib.jit(reset, **options)(v)
        assert float(v[...].sum()) == 0
        return v[...].sharding.device_set

    assert devices(nnx) == devices(flax.nnx)
