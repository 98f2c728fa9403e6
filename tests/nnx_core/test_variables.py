"""Variables: a named place for one value, with metadata."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx_core as nnx
from tests.strategies import Count
from tests.tolerance import assert_trees_close, assert_trees_equal

KINDS = {
    nnx.Param: "params",
    nnx.BatchStat: "batch_stats",
    nnx.Cache: "cache",
    nnx.Intermediate: "intermediates",
}


@pytest.fixture
def x():
    return nnx.Param(jnp.arange(3.0), tag="a")


# ---- reading and writing ---------------------------------------------------------------------------------------


def test_four_ways_to_read_give_the_same_array(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flax.nnx warns on .value; its users still write it
        by_property = x.value
    assert x[...] is x.get_value()
    assert by_property is x.get_value() is x.get_raw_value()


def test_four_ways_to_write(x):
    x[...] = jnp.ones(3)
    assert_trees_equal(x.get_value(), jnp.ones(3))
    x.set_value(jnp.zeros(3))
    assert_trees_equal(x.get_value(), jnp.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.value = jnp.full(3, 2.0)
    assert_trees_equal(x.get_value(), jnp.full(3, 2.0))
    x.set_raw_value(jnp.full(3, 3.0))
    assert_trees_equal(x.get_value(), jnp.full(3, 3.0))


def test_a_write_may_change_shape_and_dtype(x):
    x.set_value(jnp.zeros((2, 2), jnp.int32))
    assert x.shape == (2, 2)
    assert x.dtype == jnp.int32


def test_indexed_read_and_write(x):
    x[0] = 5.0
    x[1:] = jnp.array([6.0, 7.0])
    assert_trees_equal(x.get_value(), jnp.array([5.0, 6.0, 7.0]))
    assert float(x[2]) == 7.0


def test_indexed_update_leaves_the_old_array_alone(x):
    before = x.get_value()
    x[0] = 5.0
    assert_trees_equal(before, jnp.arange(3.0))


def test_augmented_assignment_goes_through_the_item(x):
    x[...] += 1
    x[...] *= 2
    assert_trees_equal(x.get_value(), jnp.array([2.0, 4.0, 6.0]))


def test_bare_augmented_assignment_is_refused(x):
    with pytest.raises(NotImplementedError, match=r"\[\.\.\.\]"):
        x += 1


def test_a_python_scalar_is_a_value():
    n = nnx.Variable(3)
    assert n.get_value() == 3
    n.set_value(4)
    assert int(n) == 4


def test_a_pytree_is_a_value():
    v = nnx.Variable({"a": jnp.ones(2), "b": (1, jnp.zeros(1))})
    assert_trees_equal(v.get_value(), {"a": jnp.ones(2), "b": (1, jnp.zeros(1))})
    assert v["b"][0] == 1


def test_an_abstract_value_has_shape_and_dtype():
    v = nnx.Param(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    assert v.shape == (2, 3)
    assert v.dtype == jnp.bfloat16


# ---- arithmetic ------------------------------------------------------------------------------------------------

BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "pow": lambda a, b: a**b,
    "matmul": lambda a, b: a @ b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
UNARY = {
    "neg": lambda a: -a,
    "pos": lambda a: +a,
    "abs": abs,
    "sum": lambda a: a.sum(),
    "mean": lambda a: a.mean(),
    "T": lambda a: a.T,
    "reshape": lambda a: a.reshape(1, -1),
    "astype": lambda a: a.astype(jnp.int32),
    "at": lambda a: a.at[0].set(9.0),
    "item": lambda a: a[1],
    "slice": lambda a: a[1:],
    "sin": jnp.sin,
    "stack": lambda a: jnp.stack([a, a]) if isinstance(a, jax.Array) else jnp.stack([a[...], a[...]]),
    "numpy": np.asarray,
}


@pytest.mark.parametrize("f", BINARY.values(), ids=BINARY)
def test_binary_operators_forward_to_the_array(f):
    a, b = jnp.array([1.0, -2.0, 3.0]), jnp.array([2.0, 3.0, 4.0])
    want = f(a, b)
    for got in (f(nnx.Param(a), b), f(a, nnx.Param(b)), f(nnx.Param(a), nnx.Param(b))):
        assert isinstance(got, jax.Array)
        assert_trees_equal(got, want)


@pytest.mark.parametrize("f", BINARY.values(), ids=BINARY)
def test_numpy_on_the_left_leaves_the_operator_to_the_variable(f):
    """numpy's own operator would read `np.asarray(v)`: an ndarray, in numpy's dtype, and an error under a trace."""
    array, b = np.array([2.0, 3.0, 4.0], np.float32), jnp.array([1.0, -2.0, 3.0])
    for left in [array] if f is BINARY["matmul"] else [array, array[0]]:
        for got in (f(left, nnx.Param(b)), jax.jit(lambda b, left=left: f(left, nnx.Param(b)))(b)):
            assert isinstance(got, jax.Array)
            assert_trees_close(got, f(left, b))


@pytest.mark.parametrize("f", UNARY.values(), ids=UNARY)
def test_unary_operators_and_methods_forward_to_the_array(f):
    a = jnp.array([1.0, -2.0, 3.0])
    assert_trees_equal(np.asarray(f(nnx.Param(a))), np.asarray(f(a)))


def test_python_scalars_on_either_side(x):
    assert_trees_equal(1 - x, 1 - x.get_value())
    assert_trees_equal(2 * x + 1, 2 * x.get_value() + 1)


def test_length_iteration_and_attributes(x):
    assert len(x) == 3
    assert [float(v) for v in x] == [0.0, 1.0, 2.0]
    assert (x.shape, x.ndim, x.size, x.dtype) == ((3,), 1, 3, jnp.float32)


def test_conversion_of_scalars():
    assert float(nnx.Param(jnp.float32(1.5))) == 1.5
    assert int(nnx.Param(jnp.int32(2))) == 2
    assert bool(nnx.Param(jnp.array(True)))
    assert not bool(nnx.Param(jnp.array(False)))


def test_a_missing_attribute_is_an_attribute_error(x):
    assert not hasattr(x, "nosuch")
    with pytest.raises(AttributeError, match="nosuch"):
        x.nosuch  # noqa: B018


def test_a_variable_has_no_hash(x):  # `==` compares arrays
    with pytest.raises(TypeError, match="unhashable type: 'Param'"):
        hash(x)


# ---- metadata --------------------------------------------------------------------------------------------------


def test_metadata_is_read_as_attribute_and_by_name(x):
    assert x.tag == "a"
    assert x.get_metadata("tag") == "a"
    assert x.get_metadata()["tag"] == "a"
    assert x.has_metadata("tag")
    assert not x.has_metadata("nosuch")


def test_get_metadata_with_a_default(x):
    assert x.get_metadata("nosuch", 3) == 3


def test_set_metadata_by_keyword_and_by_name(x):
    x.set_metadata(tag="b", extra=1)
    x.set_metadata("extra", 2)
    assert (x.tag, x.extra) == ("b", 2)


def test_set_metadata_by_mapping_replaces_all(x):
    x.set_metadata({"only": 1})
    assert x.only == 1
    assert not x.has_metadata("tag")


def test_del_metadata(x):
    x.del_metadata("tag")
    assert not x.has_metadata("tag")


def test_what_get_metadata_returned_is_a_copy(x):
    x.get_metadata()["tag"] = "changed"
    assert x.tag == "a"


def test_metadata_cannot_be_assigned_as_attribute(x):
    with pytest.raises(AttributeError, match=r"(?s)tag.*set_metadata\(tag="):
        x.tag = "b"
    with pytest.raises(AttributeError, match="tag"):
        del x.tag
    assert x.tag == "a"


def test_row7_annotating_an_axis_needs_no_mesh():
    v = nnx.Param(jnp.ones((2, 3)), out_sharding=("embed", "mlp"))
    assert v.out_sharding == ("embed", "mlp")
    assert_trees_equal(v + 1, jnp.full((2, 3), 2.0))


@pytest.mark.filterwarnings("ignore:'sharding:DeprecationWarning")
@pytest.mark.parametrize("key", ["sharding", "sharding_names", "out_sharding"])
def test_row34_old_names_of_the_sharding_key_are_read(key):
    v = nnx.Param(jnp.ones((2, 3)), **{key: ("embed", "mlp")})
    assert v.get_metadata("out_sharding") == ("embed", "mlp")


# ---- hooks -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")  # so says flax.nnx
def test_hooks_run_on_create_get_and_set():
    v = nnx.Param(
        jnp.ones(2),
        on_create_value=lambda v, x: x + 1,
        on_set_value=lambda v, x: x * 10,
        on_get_value=lambda v, x: x + 0.5,
    )
    assert_trees_equal(v.get_raw_value(), jnp.full(2, 2.0))
    assert_trees_equal(v.get_value(), jnp.full(2, 2.5))
    v.set_value(jnp.ones(2))
    assert_trees_equal(v.get_raw_value(), jnp.full(2, 10.0))


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_several_hooks_run_in_order():
    v = nnx.Param(jnp.ones(1), on_get_value=(lambda v, x: x + 1, lambda v, x: x * 3))
    assert_trees_equal(v.get_value(), jnp.full(1, 6.0))


def test_a_subclass_may_override_get_and_set():
    class Doubled(nnx.Variable):
        def get_value(self, **options):
            return super().get_value(**options) * 2

    v = Doubled(jnp.ones(2))
    assert_trees_equal(v[...], jnp.full(2, 2.0))
    assert_trees_equal(v + 1, jnp.full(2, 3.0))


def test_with_metadata_adds_to_what_an_initializer_makes():
    init = nnx.with_metadata(jax.nn.initializers.ones, tag="z")
    v = nnx.Param(init(jax.random.key(0), (2,)))
    assert v.tag == "z"
    assert_trees_equal(v.get_value(), jnp.ones(2))


# ---- copies ----------------------------------------------------------------------------------------------------


def test_copy_shares_the_array_and_nothing_else(x):
    twin = x.copy()
    assert twin is not x
    assert twin.get_value() is x.get_value()
    twin[...] = jnp.zeros(3)
    twin.set_metadata(tag="twin")
    assert_trees_equal(x.get_value(), jnp.arange(3.0))
    assert x.tag == "a"


def test_replace_keeps_type_and_metadata(x):
    new = x.replace(jnp.ones(2))
    assert (type(new), new.tag, new.shape) == (nnx.Param, "a", (2,))
    assert x.shape == (3,)
    assert x.replace(jnp.ones(2), tag="b").tag == "b"


def test_copy_from_takes_value_and_metadata(x):
    x.copy_from(nnx.Param(jnp.zeros(1), tag="new"))
    assert_trees_equal(x.get_value(), jnp.zeros(1))
    assert x.tag == "new"


def test_copy_from_another_kind_is_refused(x):
    with pytest.raises(ValueError, match=r"(?s)Param.*BatchStat"):
        x.copy_from(nnx.BatchStat(jnp.zeros(1)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_python_copies_are_separate_variables(duplicate):
    v = Count(jnp.arange(3), tag="a")
    twin = duplicate(v)
    assert (type(twin), twin.tag) == (Count, "a")
    assert_trees_equal(twin.get_value(), v.get_value())
    twin.set_value(jnp.zeros(3, jnp.int32))
    assert_trees_equal(v.get_value(), jnp.arange(3))


# ---- as a pytree -----------------------------------------------------------------------------------------------


def test_a_variable_is_a_pytree_of_its_value(x):
    assert_trees_equal(jax.tree.leaves(x), [jnp.arange(3.0)])
    doubled = jax.tree.map(lambda a: a * 2, x)
    assert (type(doubled), doubled.tag) == (nnx.Param, "a")
    assert_trees_equal(doubled.get_value(), jnp.arange(3.0) * 2)
    assert_trees_equal(x.get_value(), jnp.arange(3.0))


def test_the_path_of_its_leaf_is_value(x):
    ((path, _),) = jax.tree_util.tree_leaves_with_path(x)
    assert jax.tree_util.keystr(path) == ".value"


def test_treedefs_are_equal_iff_type_and_metadata_are(x):
    structure = jax.tree.structure
    assert structure(x) == structure(nnx.Param(jnp.ones(5), tag="a"))
    assert hash(structure(x)) == hash(structure(nnx.Param(jnp.ones(5), tag="a")))
    assert structure(x) != structure(nnx.Param(jnp.ones(5), tag="b"))
    assert structure(x) != structure(nnx.BatchStat(jnp.ones(5), tag="a"))


def test_a_variable_crosses_jax_jit(x):
    out = jax.jit(lambda v: v.replace(v + 1))(x)
    assert (type(out), out.tag) == (nnx.Param, "a")
    assert_trees_equal(out.get_value(), jnp.arange(3.0) + 1)


def test_repr_names_kind_value_and_metadata(x):
    text = repr(x)
    assert text.startswith("Param(")
    assert "tag='a'" in text
    assert "float32" in text


# ---- kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, nnx.RngKey, nnx.RngCount, nnx.OptState, Count])
def test_a_kind_is_a_variable_and_knows_its_type(kind):
    v = kind(jnp.ones(2))
    assert isinstance(v, nnx.Variable)
    assert v.type is kind


def test_rng_kinds_share_a_base():
    assert issubclass(nnx.RngKey, nnx.RngState)
    assert issubclass(nnx.RngCount, nnx.RngState)


@pytest.mark.parametrize(("kind", "collection"), KINDS.items())
def test_name_and_type_convert_both_ways(kind, collection):
    assert nnx.variable_name_from_type(kind) == collection
    assert nnx.variable_type_from_name(collection) is kind


def test_an_unknown_name_is_an_error_unless_registration_is_allowed():
    with pytest.raises(ValueError, match=r"unheard_of.*"):
        nnx.variable_type_from_name("unheard_of")
    kind = nnx.variable_type_from_name("made_to_order", allow_register=True)
    assert issubclass(kind, nnx.Variable)
    assert nnx.variable_type_from_name("made_to_order") is kind


def test_a_type_registers_under_a_name():
    @nnx.register_variable_name("tests_of_variables")
    class Mine(nnx.Variable): ...

    assert nnx.variable_type_from_name("tests_of_variables") is Mine
    assert nnx.variable_name_from_type(Mine) == "tests_of_variables"


def test_row49_registering_the_same_class_again_is_allowed():
    def cell():  # a notebook cell that is run twice
        @nnx.register_variable_name("rerun_cell")
        class Rerun(nnx.Variable): ...

        return Rerun

    cell()
    again = cell()
    assert nnx.variable_type_from_name("rerun_cell") is again


def test_row49_a_taken_name_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"params.*Param"):

        @nnx.register_variable_name("params")
        class Other(nnx.Variable): ...


# ---- law 7, and types that were made for a name -----------------------------------------------------------------


@given(st.lists(st.sampled_from([None, "a", "b"]), max_size=4), st.integers(0, 6), st.sampled_from([None, "layers"]))
def test_law7_remove_axis_inverts_add_axis(names, index, name):
    v = nnx.Param(jnp.zeros((1,) * 4), out_sharding=tuple(names))
    v.add_axis(index, name)
    padded = [*names, *[None] * (index - len(names))]
    unnamed_beyond_all_names = name is None and index > len(names)
    assert v.out_sharding == tuple(names if unnamed_beyond_all_names else [*padded[:index], name, *padded[index:]])
    v.remove_axis(index, name)
    assert v.out_sharding == tuple(names)


@given(st.lists(st.sampled_from([None, "a"]), max_size=3))
def test_law7_holds_for_the_last_axis_counted_from_the_end(names):
    v = nnx.Param(jnp.zeros(()), out_sharding=tuple(names))
    v.add_axis(-1, "layers")
    assert v.out_sharding == (*names, "layers")
    v.remove_axis(-1, "layers")
    assert v.out_sharding == tuple(names)


@pytest.mark.parametrize("name", ["ema_x", "a.b", "a/b", "Param", "a\0b", "ä"])
def test_row49_types_made_for_a_name_are_importable(name):
    kind = nnx.variable_type_from_name(name, allow_register=True)
    assert nnx.variable_type_from_name(name) is kind
    assert pickle.loads(pickle.dumps(kind)) is kind
    model = nnx.List([kind(jnp.ones(1))])
    assert pickle.loads(pickle.dumps(nnx.graphdef(model))) == nnx.graphdef(model)
    assert type(pickle.loads(pickle.dumps(model))[0]) is kind


def test_another_class_is_another_structure():
    class Holder(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

    def kind(m):
        return jnp.float32(1 if type(m.w) is nnx.Param else 2)

    m, f = Holder(), nnx.jit(kind)
    assert f(m) == 1
    m.w.__class__ = nnx.BatchStat
    assert f(m) == kind(m) == 2
