"""Axis metadata crosses both ways unchanged, inert, and follows the axes that transforms add and remove."""

import copy
import pickle

import cloudpickle
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from flax import serialization
from flax.core import meta
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nnx_core as nnx
from bridge._errors import BridgeError
from bridge.variables.hashable import with_tuples
from bridge.variables.metadata import BOX, NNXMeta, to_linen_value, to_nnx_variable
from nnx_core.sharding import get_logical_axis_rules
from tests.tolerance import assert_trees_equal

P = PartitionSpec
LAYERS = {meta.PARTITION_NAME: "layers"}
RULES = (("embed", "x"), ("mlp", None))


def box_of(names, shape=(4, 2, 3), **metadata):
    return NNXMeta(nnx.Param, jnp.zeros(shape), {"out_sharding": names, **metadata})


# ---- crossing ----------------------------------------------------------------------------------------------

VALUE = jnp.asarray(np.arange(6, dtype="float32").reshape(2, 3))
BOXES = {
    "Partitioned": nn.Partitioned(VALUE, ("embed", "mlp")),
    "short": nn.Partitioned(VALUE, ("embed",)),
    "empty": nn.Partitioned(VALUE, ()),
    "list of names": nn.Partitioned(VALUE, ["embed", None]),
    "mesh": nn.Partitioned(VALUE, ("x", None), mesh=Mesh(np.array(jax.devices()[:2]), ("x",))),
    "Logically": nn.LogicallyPartitioned(VALUE, ("embed", "mlp")),
    "rules": nn.LogicallyPartitioned(VALUE, ("embed", "mlp"), rules=RULES),
    "list of rules": nn.LogicallyPartitioned(VALUE, ("embed", "mlp"), rules=[["embed", ["x", "y"]]]),
    "NNXMeta": NNXMeta(nnx.Param, VALUE, {"out_sharding": ("embed", "mlp"), "unit": "m"}),
    "NNXMeta, no metadata": NNXMeta(nnx.Param, VALUE, {}),
    "NNXMeta, other type": NNXMeta(nnx.BatchStat, VALUE, {"unit": "m"}),
    "box in a box": nn.Partitioned(nn.Partitioned(VALUE, ("a",)), ("b",)),
    "no value": nn.Partitioned(None, ("a",)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_box_crosses_both_ways_unchanged(box):
    variable = to_nnx_variable("params", box)
    assert type(variable) is nnx.Param
    back = to_linen_value(variable)
    assert type(back) is type(box)
    assert_trees_equal(back, box)
    hash(nnx.graphdef(nnx.List([variable])))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_converting_does_not_touch_the_box_row16(box):
    before = {name: copy.copy(vars(box)[name]) for name in vars(box)}
    to_nnx_variable("params", box)
    assert list(vars(box)) == list(before)
    assert [f is vars(box)[name] or f == vars(box)[name] for name, f in before.items() if name != "value"].count(
        False
    ) == 0


def test_axis_names_are_out_sharding_row34():
    for box in (BOXES["Partitioned"], BOXES["Logically"]):
        assert to_nnx_variable("params", box).out_sharding == ("embed", "mlp")
    for old in ("sharding", "sharding_names"):
        assert NNXMeta(nnx.Param, VALUE, {old: ("a", "b")}).metadata == {"out_sharding": ("a", "b")}


def test_old_keys_are_read_on_load_row34():
    """From metadata, and out of a pickle or a State that was written when the key had another name."""
    for old in ("sharding", "sharding_names"):
        made = nnx.Param.from_metadata(VALUE, {old: ("a", "b"), "unit": "m"})
        assert made.get_metadata() == {"out_sharding": ("a", "b"), "unit": "m"}
        unpickled = nnx.Param.__new__(nnx.Param)
        unpickled.__setstate__({"_raw_value": VALUE, "_var_metadata": {old: ("a", "b")}})
        assert unpickled.get_metadata() == {"out_sharding": ("a", "b")}
        assert to_linen_value(unpickled) == NNXMeta(nnx.Param, VALUE, {"out_sharding": ("a", "b")})
    several = {"sharding": ("old",), "out_sharding": ("new",), "sharding_names": None}
    assert nnx.Param.from_metadata(VALUE, several).get_metadata() == {"out_sharding": ("new",)}
    assert NNXMeta(nnx.Param, VALUE, several).metadata == {"out_sharding": ("new",)}
    assert NNXMeta(nnx.Param, VALUE, {"sharding": ("old",), "out_sharding": None}).metadata["out_sharding"] == ("old",)


def test_no_mesh_is_needed_row7():
    variable = to_nnx_variable("params", nn.LogicallyPartitioned(VALUE, ("no such axis", None)))
    assert variable.get_value() is VALUE
    assert NNXMeta(nnx.Param, VALUE, {"out_sharding": ("no such axis",)}).unbox() is VALUE


def test_new_axis_names_go_into_the_box_that_was():
    variable = to_nnx_variable("params", nn.LogicallyPartitioned(VALUE, ("a", "b"), rules=RULES))
    variable.add_axis(0, "layers")
    back = to_linen_value(variable)
    assert type(back) is nn.LogicallyPartitioned
    assert (back.names, back.rules) == (("layers", "a", "b"), RULES)


def test_metadata_that_no_linen_box_can_hold_is_kept():
    variable = to_nnx_variable("params", BOXES["Partitioned"])
    variable.set_metadata(unit="m")
    back = to_linen_value(variable)
    assert type(back) is NNXMeta
    assert back.metadata["unit"] == "m"
    again = to_nnx_variable("params", back)
    again.del_metadata("unit")
    assert_trees_equal(to_linen_value(again), BOXES["Partitioned"])


def test_plain_values_have_no_metadata():
    variable = to_nnx_variable("batch_stats", VALUE)
    assert (type(variable), variable.get_metadata()) == (nnx.BatchStat, {})
    assert to_linen_value(variable) is VALUE


def test_a_ref_is_read():
    assert_trees_equal(to_linen_value(nnx.Param(VALUE, ref=True)), VALUE)


class Quantized(meta.AxisMetadata):
    """A user's box that JAX does not know."""

    def __init__(self, value):
        self.value = value

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return Quantized(val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def test_a_box_that_jax_does_not_know_is_a_value():
    box = Quantized(VALUE)
    variable = to_nnx_variable("params", box)
    assert to_linen_value(variable) is box
    assert not variable.has_metadata(BOX)


# ---- NNXMeta: axes -----------------------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(["a", "b", None, ("a", "b")]), max_size=3).map(tuple)


@given(
    NAMES,
    st.integers(0, 4),
    st.integers(-5, 5),
    st.sampled_from(["layers", None]),
    st.sampled_from([tuple, list, lambda names: P(*names)]),
)
def test_law7_add_axis_then_remove_axis_is_the_identity_rows_2_26_33(names, rank, index, name, container):
    box = box_of(container(names), (2,) * rank)
    params = {meta.PARTITION_NAME: name}
    if index < -max(rank, len(names) + 1):
        with pytest.raises(IndexError, match="or more"):
            box.add_axis(index, params)
        return
    added = box.add_axis(index, params)
    assert added.remove_axis(index, params) == box
    assert type(added.metadata["out_sharding"]) is type(box.metadata["out_sharding"])


@given(NAMES, st.integers(0, 3), st.sampled_from([tuple, list, lambda names: P(*names)]))
def test_law7_remove_axis_then_add_axis_is_the_identity_rows_2_26(names, index, container):
    """The other way round, as Linen's transforms do in apply; by the index from the end too."""
    stacked = box_of(container((*names[:index], "layers", *names[index:])), (2,) * 4)
    at = min(index, len(names))
    for i in (at, at - 4):
        assert stacked.remove_axis(i, LAYERS).add_axis(i if i >= 0 else at, LAYERS) == stacked


@given(NAMES, st.lists(st.tuples(st.integers(0, 4), st.sampled_from("xyz")), max_size=4))
def test_law7_nested(names, axes):
    box = start = box_of(names)
    for index, name in axes:
        box = box.add_axis(index, {meta.PARTITION_NAME: name})
    for index, name in reversed(axes):
        box = box.remove_axis(index, {meta.PARTITION_NAME: name})
    assert box == start


@pytest.mark.parametrize(
    ("index", "spec"),
    [(0, P("layers", "in", "out")), (1, P("in", "layers", "out")), (2, P("in", "out", "layers"))],
)
def test_spec_of_a_stacked_value_rows_2_26_53(index, spec):
    for i in (index, index - 3):
        stacked = box_of(("in", "out")).add_axis(i, LAYERS)
        assert stacked.get_partition_spec() == spec
        assert stacked.remove_axis(i, LAYERS) == box_of(("in", "out"))


def test_negative_axis_counts_in_the_value_not_in_the_names_row26():
    assert box_of(("in",), (4, 2, 3)).add_axis(-1, LAYERS).get_partition_spec() == P("in", None, "layers")


def test_empty_names_row33():
    box = box_of((), (4,))
    assert box.add_axis(0, LAYERS).get_partition_spec() == P("layers")
    assert box.add_axis(0, LAYERS).remove_axis(0, LAYERS) == box


def test_missing_stack_name_is_an_error_row37():
    with pytest.raises(flax.errors.PartitioningUnspecifiedError, match=r"axis 0 of a Param of shape.*\n.*a name"):
        box_of(("in", "out")).add_axis(0, {})
    with pytest.raises(BridgeError, match=r"(?s)expected: the name 'layers'.*found: 'in'.*PARTITION_NAME"):
        box_of(("in", "out")).remove_axis(0, LAYERS)


def test_without_axis_names_nothing_has_to_be_named():
    box = NNXMeta(nnx.Param, VALUE, {"unit": "m"})
    assert box.add_axis(0, {}) == box
    assert box.remove_axis(0, {}) == box


def test_hooks_of_the_metadata_run_row2():
    seen = []
    box = box_of(
        ("in", "out"),
        on_add_axis=lambda v, i, name: seen.append(("add", i, name, v.out_sharding)),
        on_remove_axis=lambda v, i, name: seen.append(("remove", i, name, v.out_sharding)),
    )
    box.add_axis(-1, LAYERS).remove_axis(-1, LAYERS)
    assert seen == [("add", 2, "layers", ("in", "out", "layers")), ("remove", 2, "layers", ("in", "out"))]


def test_named_sharding_as_names():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    box = box_of(NamedSharding(mesh, P("x")))
    stacked = box.add_axis(0, {meta.PARTITION_NAME: None})
    assert stacked.metadata["out_sharding"] == NamedSharding(mesh, P(None, "x"))
    assert stacked.get_partition_spec() == P(None, "x")
    assert stacked.remove_axis(0, {meta.PARTITION_NAME: None}) == box


# ---- NNXMeta: spec, pytree, serialisation ------------------------------------------------------------------


def test_spec_from_metadata_alone_row6():
    assert box_of(("in", None)).get_partition_spec() == P("in", None)
    assert NNXMeta(nnx.Param, VALUE, {}).get_partition_spec() == P()
    translated = box_of(("embed", "mlp", "other"), sharding_rules=RULES)
    assert translated.get_partition_spec() == P("x", None, "other")
    assert nn.get_partition_spec({"w": box_of(("in",))}) == {"w": P("in")}


AXIS_RULES = {
    "one each": (("e", "x"), ("m", "y")),
    "repeated": (("e", "x"), ("e", "y")),
    "a list": [["e", ["x", "y"]]],
    "one mesh axis for two": (("e", "x"), ("m", "x"), ("m", "y")),
    "all taken": (("e", "x"), ("m", "x")),
    "None first": (("e", None), ("e", "x")),
    "none": (),
}
AXIS_NAMES = [
    ("e", "m"),
    ("m", "e"),
    ("e",),
    ("x", "e"),
    (None, "e"),
    ("u", "m"),
    (),
    ["e", "m"],
    P("e", "m"),
    ("e", "e"),
]


@pytest.mark.parametrize("rules", AXIS_RULES.values(), ids=AXIS_RULES)
@pytest.mark.parametrize("names", AXIS_NAMES, ids=str)
def test_logical_rules_are_read_as_flax_does(names, rules):
    """NNXMeta as flax.nnx.bridge's: the last rule for a name counts, a name without one is a mesh axis."""
    own = tuple((name, with_tuples(axis)) for name, axis in rules)
    with flax_nnx.use_eager_sharding(False):
        theirs = flax_nnx.bridge.NNXMeta(flax_nnx.Param, VALUE, {"out_sharding": names})
        with nn.logical_axis_rules(rules):
            assert box_of(names).get_partition_spec() == theirs.get_partition_spec()
        theirs = flax_nnx.bridge.NNXMeta(flax_nnx.Param, VALUE, {"out_sharding": names, "sharding_rules": own})
        assert box_of(names, sharding_rules=own).get_partition_spec() == theirs.get_partition_spec()


@pytest.mark.parametrize("rules", AXIS_RULES.values(), ids=AXIS_RULES)
@pytest.mark.parametrize("names", [names for names in AXIS_NAMES if names != ("e", "e")], ids=str)
def test_rules_of_a_linen_box_are_read_as_linen_does(names, rules):
    """The first rule counts whose mesh axes are free; without one an axis is not split. NNX reads the same."""
    box = nn.LogicallyPartitioned(VALUE, names, rules=rules)
    variable = to_nnx_variable("params", box)
    if rules:
        assert nnx.get_partition_spec(variable).get_value() == nn.logical_to_mesh_axes(tuple(names), rules)
    assert_trees_equal(to_linen_value(variable), box)
    variable.add_axis(0, "layers")
    stacked = to_linen_value(variable)
    assert (stacked.names, stacked.rules) == (("layers", *names), rules)


def test_a_name_for_two_axes_has_no_reading_in_linen():
    box = nn.LogicallyPartitioned(VALUE, ("e", "e"), rules=AXIS_RULES["repeated"])
    with pytest.raises(ValueError, match="occur more than once"):
        nn.logical_to_mesh_axes(box.names, box.rules)
    variable = to_nnx_variable("params", box)  # which reads nothing: metadata is inert
    assert variable.sharding_rules == box.rules
    assert_trees_equal(to_linen_value(variable), box)


def test_rules_are_the_same_wherever_they_were_set_row68():
    """As in flax: a block of Linen's holds in NNX, and the other way round; the inner one counts."""
    box = box_of(("e", "m"))
    with nn.logical_axis_rules((("e", "x"),)):
        assert box.get_partition_spec() == P("x", "m")
        assert nnx.get_partition_spec(nnx.Param(VALUE, out_sharding=("e",))).get_value() == P("x")
        with nnx.logical_axis_rules((("e", "y"),)):
            assert nn.logical_to_mesh_axes(("e",)) == P("y")
            with nn.logical_axis_rules((("e", "z"),)):
                assert box.get_partition_spec() == P("z", "m")
            assert box.get_partition_spec() == P("y", "m")
        assert box.get_partition_spec() == P("x", "m")
    assert nn.get_logical_axis_rules() == get_logical_axis_rules() == ()


def test_rules_that_contradict_are_an_error():
    box = box_of(("embed",), sharding_rules=RULES)
    with nn.logical_axis_rules((("embed", "y"),)), pytest.raises(ValueError, match=r"sharding_rules send 'embed'"):
        box.get_partition_spec()


def test_get_sharding_is_the_spec_on_a_mesh_row6():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    assert box_of((None, "x")).get_sharding(mesh) == NamedSharding(mesh, P(None, "x"))
    assert box_of(None).get_sharding(mesh) == NamedSharding(mesh, P())
    whole = NNXMeta(nnx.Param, {"a": VALUE, "b": 1}, {"unit": "m"})
    assert whole.get_sharding(mesh) == NamedSharding(mesh, P())
    assert nn.get_sharding({"w": box_of(("x",))}, mesh) == {"w": NamedSharding(mesh, P("x"))}
    abstract = jax.sharding.AbstractMesh((2,), ("x",))
    assert box_of(("x",)).get_sharding(abstract).spec == P("x")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("embed",), r"(?s)names \('embed',\) stands for .*no axis 'embed' on a mesh.*nnx\.logical_axis_rules"),
        (("x", "x"), r"one axis for two of them"),
        (("x", None, None, None), r"more names than axes: its shape is \(4, 2, 3\)"),
    ],
    ids=["unknown", "twice", "too many"],
)
def test_names_that_do_not_fit_the_mesh_say_so_row6(names, text):
    with pytest.raises(ValueError, match=text):
        box_of(names).get_sharding(Mesh(np.array(jax.devices()[:2]), ("x",)))


def test_sharded_init_recipe_row6():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def init(key):
        return {"w": NNXMeta(nnx.Param, jax.random.normal(key, (4, 2)), {"out_sharding": ("x", None)})}

    sharding = nn.get_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)
    made = jax.jit(init, out_shardings=sharding)(jax.random.key(0))
    assert made["w"].value.sharding == NamedSharding(mesh, P("x", None))


def test_pytree_with_keys():
    box = box_of(("in", "out"))
    [(path, leaf)], _ = jax.tree_util.tree_flatten_with_path(box)
    assert (jax.tree_util.keystr(path), leaf is box.value) == (".value", True)
    assert jax.jit(lambda b: b.replace_boxed(b.unbox() + 1))(box).metadata == box.metadata
    assert_trees_equal(meta.unbox({"w": box}), {"w": box.value})
    assert jax.eval_shape(lambda b: b, box).value.shape == (4, 2, 3)


@pytest.mark.parametrize(
    "names", [("a", None), ["a", None], P("a"), ("a", ("b", "c")), [["a", "b"]], None, "a"], ids=repr
)
def test_flattening_keeps_the_metadata_as_it_is(names):
    box = box_of(names, sharding_rules=[("a", "x")])
    back = jax.jit(lambda b: b)(box)
    assert type(back.metadata["out_sharding"]) is type(box.metadata["out_sharding"])
    assert back.get_partition_spec() == box.get_partition_spec()
    assert list(back.metadata) == sorted(box.metadata)
    hash(jax.tree.structure(box))


def test_names_that_were_padded_stay_so_in_a_box_rows_26_33():
    """A Variable's names, filled up to reach the stacked axis, lose that again on the way back: also through jit."""
    variable = nnx.Param(jnp.zeros((4, 2, 3)), out_sharding=("in",))
    variable.add_axis(2, "layers")
    box = jax.jit(lambda b: b)(to_linen_value(variable))
    back = to_nnx_variable("params", box)
    assert back.out_sharding == ("in", None, "layers")
    back.remove_axis(2, "layers")
    assert back.out_sharding == ("in",)


def test_equality_and_immutability():
    box = box_of(("in",))
    assert box == box_of(("in",))
    assert box != box_of(("out",))
    assert box != box.replace_boxed(box.value + 1)
    assert box != box.value.shape
    with pytest.raises(AttributeError, match=r"box\.replace\(value="):
        box.value = 1
    assert "NNXMeta(Param" in repr(box)


@pytest.mark.parametrize("through", [pickle, cloudpickle, copy], ids=lambda m: m.__name__)
def test_copies(through):
    for box in (box_of(("in",)), NNXMeta(nnx.variable_type_from_name("x y", allow_register=True), VALUE, {"a": 1})):
        back = copy.deepcopy(box) if through is copy else through.loads(through.dumps(box))
        assert back == box
        assert back.var_type is box.var_type


def test_serialised_as_its_value_row38():
    tree = {"w": box_of(("in",))}
    data = serialization.to_bytes(tree)
    assert_trees_equal(jax.tree.map(jnp.asarray, serialization.msgpack_restore(data)), {"w": tree["w"].value})
    back = serialization.from_bytes(tree, data)["w"]
    assert back.metadata == tree["w"].metadata
    assert_trees_equal(jnp.asarray(back.value), tree["w"].value)


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_linen_transforms_name_the_new_axis_rows_2_53(transform):
    def init(key, shape):
        return NNXMeta(nnx.Param, nn.initializers.lecun_normal()(key, shape), {"out_sharding": ("in", "out")})

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = x @ self.param("w", init, (3, 3))
            return (x, None) if transform == "scan" else x

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "metadata_params": LAYERS}
    if transform == "scan":
        lifted, x = nn.scan(Block, length=4, **options), jnp.ones((2, 3))
    else:
        lifted, x = nn.vmap(Block, in_axes=0, **options), jnp.ones((4, 2, 3))
    variables = lifted().init(jax.random.key(0), x)
    [box] = jax.tree.leaves(variables, is_leaf=lambda b: isinstance(b, NNXMeta))
    assert box.value.shape == (4, 3, 3)
    assert box.get_partition_spec() == P("layers", "in", "out")
    plain = lifted().apply(meta.unbox(variables), x)
    assert_trees_equal(lifted().apply(variables, x), plain)
    _, updated = lifted().apply(variables, x, mutable=["params"])
    assert_trees_equal(updated, variables)
