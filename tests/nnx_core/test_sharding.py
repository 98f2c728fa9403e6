"""Axis names, logical rules, specs, abstract models: nnx_core.sharding, against flax.nnx where the two agree.

What depends on several devices is in test_sharding_devices.py.
"""

import contextvars
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core import logical_rules, sharding
from tests.support.arrays import ones

MESH = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
RULES = [("embed", "x"), ("mlp", ("x", "y")), ("heads", None)]
X = ones(2, 4)


@pytest.fixture(autouse=True)
def flax_without_eager_sharding():
    with flax_nnx.use_eager_sharding(False):
        yield


def spec_of(library, names, rules=None, **metadata):
    functions = sharding if library is nnx else flax_nnx
    v = library.Param(X, out_sharding=names, **metadata)
    with functions.logical_axis_rules(rules):
        return functions.get_partition_spec(v).get_value()


# ---- specs ----


NAMES = [
    ("x", "y"),
    ("x",),
    (),
    None,
    (None, "y"),
    (("x", "y"), None),
    ["x", "y"],
    P("x", None),
    "x",
    ("embed", "mlp"),
    ("heads", "embed"),
    ("unknown", "embed"),
    ("x", "embed", None),
]


@pytest.mark.parametrize("rules", [None, (), RULES, tuple(RULES), [("embed", "x"), ("embed", "y")]], ids=repr)
@pytest.mark.parametrize("names", NAMES, ids=repr)
def test_specs_are_those_of_flax(names, rules):
    assert spec_of(nnx, names, rules) == spec_of(flax_nnx, names, rules)


@pytest.mark.parametrize("rules", [(("embed", "x"),), (("embed", "x"), ("embed", "y")), (("embed", None),)], ids=repr)
def test_a_variable_has_rules_of_its_own(rules):
    once = len(dict(rules)) == len(rules)  # flax.nnx compares a repeated name with itself once there are ambient rules
    for ambient in (None, [("mlp", "y")]) if once else (None,):
        ours = spec_of(nnx, ("embed", "mlp"), ambient, sharding_rules=rules)
        assert ours == spec_of(flax_nnx, ("embed", "mlp"), ambient, sharding_rules=rules)


@pytest.mark.parametrize("key", ["sharding", "sharding_names", "out_sharding"])
def test_old_metadata_keys_are_read(key):
    """Row 34: one key, whatever it was called when it was written."""
    v = nnx.Param.__new__(nnx.Param)
    v.__setstate__({"_raw_value": X, "_var_metadata": {key: ("x",)}})  # an old pickle
    assert v.get_metadata() == {"out_sharding": ("x",)}
    assert sharding.get_var_pspec(v) == P("x")
    assert sharding.get_var_pspec(nnx.Param(X, **{key: ("x",)})) == P("x")
    assert sharding.get_var_pspec(nnx.Param.from_metadata(X, {key: ("x",)})) == P("x")


def test_without_names_a_spec_says_what_is_known():
    assert sharding.get_var_pspec(nnx.Param(X)) == P()
    assert sharding.get_var_pspec(nnx.Variable(3)) is None
    assert sharding.get_var_pspec(nnx.Variable({"a": X})) is None
    assert sharding.get_var_pspec(nnx.Variable({"a": X}, out_sharding=("x",))) == P("x")


def test_a_named_sharding_in_metadata_gives_its_spec():
    assert sharding.get_var_pspec(nnx.Param(X, out_sharding=NamedSharding(MESH, P("x")))) == P("x")


def test_names_in_a_tuple_are_translated_too():
    v = nnx.Param(X, out_sharding=(("embed", "heads", "z"), "mlp"))
    with sharding.logical_axis_rules([("embed", ("x", "y")), ("heads", None), ("mlp", ["a", "b"])]):
        assert sharding.get_var_pspec(v) == P(("x", "y", "z"), ("a", "b"))


def test_rules_may_be_a_mapping():
    with sharding.logical_axis_rules({"embed": "x"}):
        assert sharding.get_var_pspec(nnx.Param(X, out_sharding=("embed",))) == P("x")


def test_a_spec_needs_no_value():
    """The sharded-init recipe reads specs of abstract models; nothing may look at the value (row 6)."""

    def read(*_):
        raise AssertionError

    v = nnx.Param.from_metadata(X, {"out_sharding": ("x",), "on_get_value": read, "on_create_value": read})
    assert sharding.get_partition_spec(v).get_raw_value() == P("x")


def make(library):
    functions = sharding if library is nnx else flax_nnx
    ones = library.initializers.ones

    class Model(library.Module):
        def __init__(self):
            rngs = library.Rngs(0)
            init = functions.with_partitioning(ones, ("x", "y"))
            self.first = library.Linear(2, 4, kernel_init=init, rngs=rngs)
            self.norm = library.BatchNorm(4, rngs=rngs)
            self.drop = library.Dropout(0.5, rngs=rngs)
            self.plain = library.data(jnp.ones(3))

    return Model()


def flat_values(state):
    library = nnx if isinstance(state, nnx.State) else flax_nnx
    pairs = library.to_flat_state(state)
    return {path: x.get_raw_value() if isinstance(x, library.Variable) else x for path, x in pairs}


def test_the_specs_of_a_model_are_those_of_flax():
    ours, theirs = nnx.state(make(nnx)), flax_nnx.state(make(flax_nnx))
    assert flat_values(sharding.get_partition_spec(ours)) == flat_values(flax_nnx.get_partition_spec(theirs))
    named, expected = sharding.get_named_sharding(ours, MESH), flax_nnx.get_named_sharding(theirs, MESH)
    assert flat_values(named) == flat_values(expected)


def test_modules_and_pytrees_keep_their_structure():
    model = make(nnx)
    specs = sharding.get_partition_spec(model)
    assert type(specs) is type(model)
    assert specs.first.kernel.get_value() == P("x", "y")
    assert specs.first.in_features == 2
    assert specs.plain == P()
    assert model.first.kernel.shape == (2, 4)
    tree = {"a": [nnx.Param(X, out_sharding=("x",)), 1, None], "b": np.ones(3), "c": jax.ShapeDtypeStruct((2,), int)}
    ours = sharding.get_partition_spec(tree)
    assert ours["a"][0].get_value() == P("x")
    assert ours["a"][1:] == [None, None]
    assert (ours["b"], ours["c"]) == (P(), P())
    assert jax.tree.structure(sharding.get_partition_spec(nnx.state(model))) == jax.tree.structure(nnx.state(model))


# ---- with_partitioning ----


def test_with_partitioning_is_metadata_alone():
    more = {"unit": "m", "sharding_rules": (("embed", "x"),)}
    for mesh in (None, MESH):
        init = sharding.with_partitioning(nnx.initializers.ones, ("embed", None), mesh=mesh, **more)
        theirs = flax_nnx.with_partitioning(flax_nnx.initializers.ones, ("embed", None), mesh=mesh, **more)
        v, w = (lib.Param(f(jax.random.key(0), (2, 4))) for lib, f in ((nnx, init), (flax_nnx, theirs)))
        wanted = {k: x for k, x in w.get_metadata().items() if k not in ("hijax", "ref", "eager_sharding")}
        assert v.get_metadata() == wanted
        assert (v[...] == w[...]).all()


def test_with_partitioning_takes_hooks():
    calls = []
    hook = lambda v, axis, name: calls.append((axis, name))  # noqa: E731
    init = sharding.with_partitioning(nnx.initializers.ones, ("x",), on_add_axis=hook)
    v = nnx.Param(init(jax.random.key(0), (2, 4)))
    v.add_axis(0, "layers")
    assert calls == [(0, "layers")]
    assert sharding.get_var_pspec(v) == P("layers", "x")


# ---- optimizers ----


def test_optimizer_state_follows_its_parameters_after_vmap():
    """Row 15: without transform_metadata the stacked axis has no name, and is not missing."""
    init = sharding.with_partitioning(nnx.initializers.ones, ("x", "y"))
    model = nnx.vmap(lambda key: nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    specs = flat_values(sharding.get_partition_spec(nnx.state((model, optimizer))))
    assert {path: s for path, s in specs.items() if "kernel" in path} == {
        (0, "kernel"): P(None, "x", "y"),
        (1, "opt_state", 0, "mu", "kernel"): P(None, "x", "y"),
        (1, "opt_state", 0, "nu", "kernel"): P(None, "x", "y"),
    }
    assert all(s == P() for path, s in specs.items() if "kernel" not in path)


def test_the_specs_of_adam_are_those_of_flax():
    def state(library):
        return library.state(library.Optimizer(make(library), optax.adam(1e-3), wrt=library.Param))

    ours = sharding.get_partition_spec(state(nnx))
    assert flat_values(ours) == flat_values(flax_nnx.get_partition_spec(state(flax_nnx)))


def test_factored_moments_are_not_split_over_axes_they_have_not_got():
    model = nnx.Linear(128, 256, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("x", "y")})
    specs = flat_values(sharding.get_partition_spec(nnx.state(nnx.Optimizer(model, optax.adafactor(), wrt=nnx.Param))))
    assert {path[-2]: s for path, s in specs.items() if path[-1] == "kernel"} == {"v": P(), "v_col": P(), "v_row": P()}


# ---- logical rules ----


def test_rules_hold_in_their_block_and_thread():
    seen = []
    with sharding.logical_axis_rules([("a", "x")]):
        with sharding.logical_axis_rules([("b", "y")]):
            assert sharding.get_logical_axis_rules() == (("b", "y"),)
        assert sharding.get_logical_axis_rules() == (("a", "x"),)
        thread = threading.Thread(target=lambda: seen.append(sharding.get_logical_axis_rules()))
        thread.start()
        thread.join()
    assert seen == [()]
    with pytest.raises(KeyError), sharding.logical_axis_rules([("a", "x")]):
        raise KeyError
    assert sharding.get_logical_axis_rules() == ()


def test_rules_can_be_set_for_good():
    try:
        sharding.set_logical_axis_rules([("a", "x")])
        assert sharding.get_logical_axis_rules() == (("a", "x"),)
    finally:
        sharding.set_logical_axis_rules(None)
    assert sharding.get_logical_axis_rules() == ()


def test_rules_can_be_kept_where_another_library_keeps_its_own(monkeypatch):
    """As bridge does with Linen's: what holds is handed over, and a block of either holds in both."""
    kept = []
    monkeypatch.setattr(logical_rules, "_store", logical_rules._store)
    with sharding.logical_axis_rules([("a", "x")]):
        sharding.keep_rules_in(lambda: kept[-1] if kept else (), kept.append)
        assert kept == [(("a", "x"),)]
        kept.append([("a", "y")])  # the other library's own block
        assert sharding.get_var_pspec(nnx.Param(X, out_sharding=("a",))) == P("y")
        with sharding.logical_axis_rules([("a", "z")]):
            assert kept[-1] == (("a", "z"),)
        assert kept[-1] == (("a", "y"),)
        kept.append(["ay"])
        with pytest.raises(ValueError, match="Logical axis rule 'ay' is not a pair"):
            sharding.get_logical_axis_rules()
        kept.clear()
    monkeypatch.undo()
    sharding.set_logical_axis_rules(None)
    assert sharding.get_logical_axis_rules() == ()


@pytest.mark.parametrize("rule", ["ax", ("a",), ("a", "x", "y"), (1, "x"), 3])
def test_a_rule_is_a_pair(rule):
    text = r"Logical axis rule .* is not a pair\. Expected \(name, mesh axis\)"
    with pytest.raises(nnx.NnxError, match=text), sharding.logical_axis_rules([rule]):
        pass
    with pytest.raises(ValueError, match=text):
        sharding.set_logical_axis_rules([rule])


def test_rules_of_its_own_may_not_contradict():
    state = nnx.State({"a": nnx.Param(X, out_sharding=("embed",), sharding_rules=(("embed", "z"),))})
    text = r"Param at a with axis names \('embed',\): its own sharding_rules send 'embed' to 'z'.*send it to 'x'"
    with sharding.logical_axis_rules([("embed", "x")]), pytest.raises(ValueError, match=text):
        sharding.get_partition_spec(state)


# ---- named shardings: errors ----


def test_a_name_that_is_no_mesh_axis_is_named_with_its_path():
    model = {"layers": [nnx.Linear(2, 4, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("embed", "y")})]}
    text = r"(?s)Param at layers\[0\]\.kernel with axis names \('embed', 'y'\) stands for .*"
    text += r": no axis 'embed' on a mesh with axes \('x', 'y'\)"
    with pytest.raises(nnx.NnxError, match=text + ".*nnx.logical_axis_rules"):
        sharding.get_named_sharding(model, MESH)
    with sharding.logical_axis_rules([("embed", None)]):
        named = sharding.get_named_sharding(model, MESH)
    assert named["layers"][0].kernel.get_value().spec == P(None, "y")


def test_one_mesh_axis_for_two_names():
    with (
        sharding.logical_axis_rules([("a", "x"), ("b", "x")]),
        pytest.raises(
            ValueError, match=r"Param with axis names \('a', 'b'\) stands for P\('x', 'x'\): one axis for two"
        ),
    ):
        sharding.get_named_sharding(nnx.Param(X, out_sharding=("a", "b")), MESH)


def test_more_names_than_axes():
    v = nnx.Param(X, out_sharding=("x", None, "y"))
    text = r"Param with axis names \('x', None, 'y'\) has more names than axes: its shape is \(2, 4\)"
    with pytest.raises(ValueError, match=text):
        sharding.get_named_sharding(v, MESH)


# ---- abstract models ----


def test_abstract_models_are_those_of_flax():
    graphdef, state = sharding.get_abstract_model(lambda: make(nnx), MESH)
    _, expected = flax_nnx.get_abstract_model(lambda: make(flax_nnx), MESH)
    assert flat_values(state) == flat_values(expected)
    model = nnx.merge(graphdef, state)
    assert model.first.kernel.get_value() == jax.ShapeDtypeStruct(
        (2, 4), jnp.float32, sharding=NamedSharding(MESH, P("x", "y"))
    )


def test_an_abstract_model_may_forbid_sharing():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = self.b = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    graphdef, state = sharding.get_abstract_model(Tied, MESH)
    assert [*state] == ["a"]
    assert (lambda m: m.a is m.b)(nnx.merge(graphdef, state))
    with pytest.raises(ValueError, match="graph=False forbids sharing"):
        sharding.get_abstract_model(Tied, MESH, graph=False)
    with pytest.raises(ValueError, match="graph=False forbids sharing"):
        sharding.as_abstract(Tied(), graph=False)


def abstract(mesh, value, **metadata):
    with jax.set_mesh(mesh):
        return sharding.as_abstract(nnx.Param(value, **metadata)).get_raw_value()


def test_as_abstract_shards_as_flax_does():
    with jax.set_mesh(MESH):
        ours = flat_values(nnx.state(sharding.as_abstract(nnx.eval_shape(lambda: make(nnx)))))
        model = flax_nnx.eval_shape(lambda: make(flax_nnx))
        theirs = flat_values(flax_nnx.state(flax_nnx.as_abstract(model)))
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert (x.shape, x.dtype) == (theirs[path].shape, theirs[path].dtype)
        expected = theirs[path].sharding
        assert (x.sharding and x.sharding.spec) == (expected and expected.spec), path


def test_as_abstract_makes_a_new_tree_and_keeps_sharing_and_cycles():
    class Model(nnx.Module):
        def __init__(self):
            self.a = self.b = nnx.Linear(2, 4, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("x",)})
            self.me = self

    before = nnx.eval_shape(Model)
    with jax.set_mesh(MESH):
        after = sharding.as_abstract(before)
    assert before.a.kernel.get_value().sharding is None
    assert after.a is after.b
    assert after.me is after
    assert after.a.kernel.get_value().sharding.spec == P("x")


def test_as_abstract_leaves_what_has_a_sharding():
    assert abstract(MESH, X, out_sharding=("x",)) is X
    given = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(MESH, P()))
    assert abstract(MESH, given, out_sharding=("x",)) is given
    assert abstract(MESH, 3, out_sharding=("x",)) == 3
    assert sharding.as_abstract(nnx.Param(jax.ShapeDtypeStruct((2,), int))).get_raw_value().sharding is None
    on_host = abstract(MESH, np.ones((2, 4), np.float32), out_sharding=("x",))
    assert on_host == jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=NamedSharding(MESH, P("x")))


def test_as_abstract_takes_the_mesh_of_the_metadata():
    v = nnx.Param(jax.ShapeDtypeStruct((2,), jnp.float32), out_sharding=("x",), mesh=MESH)
    assert sharding.as_abstract(v).get_value().sharding == NamedSharding(MESH, P("x"))
    w = nnx.Param(jax.ShapeDtypeStruct((2,), jnp.float32), out_sharding=NamedSharding(MESH, P("x")))
    assert sharding.as_abstract(w).get_value().sharding == NamedSharding(MESH, P("x"))


def test_as_abstract_of_a_value_that_is_a_pytree():
    kernel, scale = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4), (4,)))
    found = abstract(MESH, {"kernel": kernel, "scale": scale, "zero": None}, out_sharding=("x", "y"))
    assert found["kernel"].sharding.spec == P("x", "y")
    assert found["scale"].sharding.spec == P()


def test_as_abstract_in_a_trace_and_under_explicit_axes():
    seen = []
    init = sharding.with_partitioning(nnx.initializers.ones, ("x", "y"))
    make_layer = lambda: nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0))  # noqa: E731
    with jax.set_mesh(MESH):
        jax.jit(lambda: seen.append(sharding.as_abstract(nnx.eval_shape(make_layer)).kernel.get_value()))()
    assert seen[0].sharding == NamedSharding(MESH.abstract_mesh, P("x", "y"))
    explicit = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(explicit):  # tracing says P(None, None) of everything: that is no decision
        value = sharding.as_abstract(nnx.eval_shape(make_layer)).kernel.get_value()
    assert value.sharding == NamedSharding(explicit, P("x", "y"))


def test_as_abstract_without_a_mesh_says_so():
    model = nnx.eval_shape(lambda: make(nnx))
    text = r"(?s)Param at first\.kernel with axis names \('x', 'y'\) needs a mesh.*found none\..*jax\.set_mesh"
    with pytest.raises(ValueError, match=text):
        sharding.as_abstract(model)


def test_the_older_name_warns():
    with pytest.warns(DeprecationWarning, match="abstract_with_sharding is deprecated. Use as_abstract instead."):
        assert sharding.abstract_with_sharding({}) == {}


# ---- eager sharding ----


def test_eager_sharding_is_on_unless_switched_off():
    assert not sharding.using_eager_sharding()  # here, where flax's switch is off (see above)
    with sharding.use_eager_sharding(True):
        assert sharding.using_eager_sharding()
        with sharding.use_eager_sharding(False):
            assert not sharding.using_eager_sharding()
        assert sharding.using_eager_sharding()
    switched = contextvars.copy_context()
    switched.run(sharding.use_eager_sharding, True)
    assert switched.run(sharding.using_eager_sharding)
    switched.run(sharding.use_eager_sharding, False)
    assert not switched.run(sharding.using_eager_sharding)


def test_names_never_need_a_mesh():
    """Rows 7 and 68: nothing has to be turned off."""
    with sharding.use_eager_sharding(True):
        v = nnx.Param(X, out_sharding=("no", "mesh"), eager_sharding=True)
        assert sharding.place_eagerly(v, X) is X
    assert v[...] is X


def test_eager_placement_names_what_does_not_fit():
    twice = nnx.Param(X, out_sharding=("x", "x"), mesh=MESH)
    with pytest.raises(
        ValueError, match=r"Param with axis names \('x', 'x'\) stands for P\('x', 'x'\): one axis for two of them"
    ):
        sharding.place_eagerly(twice, X, asked=True)
    assert sharding.place_eagerly(twice, X) is X
    assert sharding.place_eagerly(twice, X, asked=False) is X
    unknown = nnx.Param(X, out_sharding=("embed",), mesh=MESH)
    assert sharding.place_eagerly(unknown, X, asked=True) is X
