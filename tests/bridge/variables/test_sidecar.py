"""Row 38: boxes become plain arrays and metadata beside them, and come back from what a checkpoint kept of both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import freeze
from hypothesis import given
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from bridge import NNXMeta, to_linen, to_linen_value, to_nnx_variable
from bridge.variables._errors import SidecarError, UnsayableMetadataError
from bridge.variables.sidecar import join_metadata, split_metadata
from tests.support.variable_trees import dict_of, variables
from tests.tolerance import assert_trees_equal

X = np.ones((2, 3), "float32")
VALUE = np.arange(6, dtype="float32").reshape(2, 3)
KERNEL = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
MESH = Mesh(np.array(jax.devices()[:1]), ("x",))


def of_two_boxes():
    variable = to_nnx_variable("params", nn.LogicallyPartitioned(VALUE, ("a", None), rules=(("a", ("x", "y")),)))
    variable.set_metadata(unit="m")
    return to_linen_value(variable)  # an NNXMeta that remembers the Linen box


BOXES = {
    "Partitioned": nn.Partitioned(VALUE, ("in", None)),
    "LogicallyPartitioned": nn.LogicallyPartitioned(VALUE, ["in", "out"], rules=[["in", ["x", "y"]]]),
    "NNXMeta": NNXMeta(
        nnx.BatchStat, VALUE, {"out_sharding": P("in", ("a", "b")), "unit": "m", "n": 1.5, "flag": True}
    ),
    "NNXMeta of a LogicallyPartitioned": of_two_boxes(),
    "box in a box": nn.Partitioned(nn.Partitioned(VALUE, ("a",)), ("b",)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_row38_a_box_survives_json_and_its_value_msgpack(box):
    tree = {"params": {"a/b": {"w": box, "plain": jnp.ones(2)}}}
    plain, sidecar = split_metadata(tree)
    assert_trees_equal(plain, {"params": {"a/b": {"w": VALUE, "plain": jnp.ones(2)}}})
    restored = jax.tree.map(jnp.asarray, serialization.msgpack_restore(serialization.to_bytes(plain)))
    assert_trees_equal(join_metadata(restored, json.loads(json.dumps(sidecar))), tree)


@pytest.mark.slow
@given(variables)
def test_row38_any_tree_survives(tree):
    before = dict_of(tree)
    plain, sidecar = split_metadata(freeze(tree))
    assert dict_of(join_metadata(plain, json.loads(json.dumps(sidecar)))) == before == dict_of(tree)


def test_row38_saved_and_restored_without_a_target_it_can_be_applied():
    """In flax 0.12.8 a restored NNXMeta is a dict that nothing can apply."""
    model = to_linen(nnx.Linear, 3, 4, kernel_init=KERNEL)
    variables = model.init(jax.random.key(0), X)
    restored = serialization.msgpack_restore(serialization.to_bytes(variables))
    assert_trees_equal(model.apply(restored, X), model.apply(variables, X))
    _, sidecar = split_metadata(variables)
    again = join_metadata(jax.tree.map(jnp.asarray, restored), sidecar)
    assert_trees_equal(again, variables)
    assert again["params"]["kernel"].get_partition_spec() == P("in", "out")


def test_row38_boxes_of_linen_that_were_saved_as_dicts():
    tree = {"params": {"w": BOXES["Partitioned"], "value": jnp.ones(1)}}
    restored = serialization.msgpack_restore(serialization.to_bytes(tree))
    assert list(restored["params"]["w"]) == ["value"]
    _, sidecar = split_metadata(tree)
    assert_trees_equal(join_metadata(jax.tree.map(jnp.asarray, restored), sidecar), tree)


def hook(variable, index, name):
    """Nothing."""


@pytest.mark.parametrize(
    ("box", "key"),
    [
        (NNXMeta(nnx.Param, VALUE, {"out_sharding": ("a",), "on_add_axis": hook}), "on_add_axis"),
        (nn.Partitioned(VALUE, ("a",), mesh=MESH), "mesh"),
    ],
    ids=["hook", "mesh"],
)
def test_what_json_cannot_say_is_named_and_may_be_left_out(box, key):
    tree = {"params": {"layer": {"w": box}}}
    text = rf"'{key}' of params/layer/w cannot be written(?s:.)*expected: names(?s:.)*leave_out=\['{key}'\]"
    with pytest.raises(UnsayableMetadataError, match=text):
        split_metadata(tree)
    plain, sidecar = split_metadata(tree, leave_out=[key])
    back = join_metadata(plain, sidecar)["params"]["layer"]["w"]
    assert type(back) is type(box)
    metadata = to_nnx_variable("params", box).get_metadata()
    assert to_nnx_variable("params", back).out_sharding == metadata["out_sharding"]


class Mine(nn.Partitioned):
    """A user's box."""


def test_a_box_of_another_type_is_named():
    text = r"the box of params/w cannot be written(?s:.)*expected: a Partitioned, Logically(?s:.)*found: Mine"
    with pytest.raises(UnsayableMetadataError, match=text):
        split_metadata({"params": {"w": Mine(VALUE, ("a",))}})


def test_metadata_of_another_checkpoint():
    plain, sidecar = split_metadata({"params": {"w": BOXES["Partitioned"]}})
    with pytest.raises(SidecarError, match=r"metadata of params/w does not fit(?s:.)*expected: a value\n  found: none"):
        join_metadata({"params": {"v": VALUE}}, sidecar)
    sidecar[0]["boxes"][0]["box"] = "Quantized"
    with pytest.raises(SidecarError, match=r"one of \['NNXMeta', 'Partitioned'(?s:.)*found: 'Quantized'"):
        join_metadata(plain, sidecar)
