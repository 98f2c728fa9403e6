"""ToLinen: Linen's rules outside, the NNX module's numbers inside. `row N` is a row of REQUIREMENTS.md."""

import copy
import functools
import pickle

import cloudpickle
import flax.errors
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict

import nnx_core as nnx
from bridge._to_linen_errors import (
    ConstructorChangedError,
    KeyClashError,
    NotAFactoryError,
    NotAnNnxModuleError,
    UnexpectedVariablesError,
)
from bridge.context import current_linen_module, is_linen_initializing
from bridge.to_linen import LinenClass, ToLinen, to_linen, to_linen_class
from tests.layers import LAYERS
from tests.tolerance import assert_trees_close, assert_trees_equal

KEY, DROPOUT = jax.random.key(0), {"dropout": jax.random.key(1)}
X = jax.random.normal(jax.random.key(7), (8, 3)) + 1


def equal(actual, expected):
    """Bit for bit on CPU, where both sides compile to the same program."""
    (assert_trees_equal if jax.default_backend() == "cpu" else assert_trees_close)(actual, expected)


class Block(nnx.Module):
    def __init__(self, width, rate=0.0, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


class Net(nnx.Module):
    def __init__(self, width, depth, classes=2, rate=0.0, *, rngs):
        self.blocks = [Block(width, rate, rngs=rngs) for _ in range(depth)]
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x, train=True):
        if not train:
            self.eval()
        x = self.features(x)
        self.sow(nnx.Intermediate, "h", x)
        return self.head(x)


def native(make, variables):
    """The NNX module itself, with the weights of `variables`."""
    module = make()
    for path, x in list(nnx.iter_graph(module)):
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState):
            leaf = variables[nnx.variable_name_from_type(type(x))]
            for key in path:
                leaf = leaf[str(key)]
            x.set_value(leaf)
    return module


def jaxpr_names(f, *args):
    """Names of all primitives, inner jaxprs included."""
    found = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(sub)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found


# ---- numbers ----


# Linen keeps the keyword `rngs` of apply for itself; Dropout has a test of its own.
ROWS = [layer for layer in LAYERS if layer.name != "Dropout"]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", ROWS, ids=lambda layer: layer.name)
def test_every_layer_equals_the_native_call(layer, train):
    model = ToLinen(lambda rngs: layer.make(nnx, rngs))
    values, x = layer.variables(), layer.example()
    nested = {}
    for path, linen_path in layer.params.items():
        nested[f"{linen_path.split('/')[0]}/{path}"] = values[linen_path]
    variables = unflatten_dict(nested, sep="/")

    @jax.jit
    def ours(variables, x):
        y, updates = model.apply(variables, x, nnx_method=layer.method, mutable=["batch_stats"], **layer.modes[train])
        return y, {**flatten_dict(variables, sep="/"), **flatten_dict(updates, sep="/")}

    y, updated = jax.jit(layer.functional(train=train))(values, x)
    named = {f"{at.split('/')[0]}/{path}": updated[at] for path, at in layer.params.items()}
    equal(ours(variables, x), (y, named))


@pytest.mark.parametrize("layer", ROWS, ids=lambda layer: layer.name)
def test_row_32_same_key_same_initial_values_as_the_linen_layer(layer):
    x, model = layer.example(), ToLinen(lambda rngs: layer.make(nnx, rngs))
    ours = model.init(KEY, x, nnx_method=layer.method, **layer.modes[False])
    method = {} if layer.method == "__call__" else {"method": layer.method}
    theirs = layer.twin().init(KEY, x, **method, **layer.twin_modes[False])
    assert_trees_equal(jax.tree.map(lambda a: a, ours), theirs)


def test_outputs_gradients_and_statistics_equal_the_native_model():
    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    module = native(lambda: Net(3, 2, rngs=nnx.Rngs(5)), variables)

    @jax.jit
    def linen_step(params, stats):
        def loss(params):
            y, updates = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
            return (y**2).mean(), (y, updates)

        grads, (y, updates) = jax.grad(loss, has_aux=True)(params)
        return y, grads, updates["batch_stats"]

    @nnx.jit
    def native_step(module):
        def loss(module):
            y = module(X)
            return (y**2).mean(), y

        grads, y = nnx.grad(loss, has_aux=True)(module)
        nnx.pop(module, nnx.Intermediate)
        return y, grads, nnx.state(module, nnx.BatchStat)

    y, grads, stats = native_step(module)
    pure = jax.tree.map(lambda x: x, (nnx.to_pure_dict(grads), nnx.to_pure_dict(stats)))
    as_linen = [flatten_dict(tree, sep="/") for tree in map(_with_string_keys, pure)]
    ours = linen_step(variables["params"], variables["batch_stats"])
    equal((ours[0], *(flatten_dict(t, sep="/") for t in ours[1:])), (y, *as_linen))
    assert float(jnp.abs(as_linen[0]["head/kernel"]).sum()) > 0


def _with_string_keys(tree):
    return {str(k): _with_string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_row_32_dropout_draws_the_mask_that_linen_draws():
    model = to_linen(nnx.Dropout, 0.5)
    theirs = nn.Dropout(0.5, deterministic=False).apply({}, X, rngs=DROPOUT)
    assert_trees_equal(model.apply({}, X, rngs=DROPOUT), theirs)
    legacy = {"dropout": jax.random.PRNGKey(1)}
    assert_trees_equal(model.apply({}, X, rngs=legacy), theirs)


def test_row_65_each_stream_gets_its_own_key_at_each_apply():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(x), self.b(x), self.a(x)

    model = to_linen(Two)
    assert model.init(KEY, X) == {}  # random state is not stored
    first, second, third = model.apply({}, X, rngs=DROPOUT)
    assert not (first == second).all()
    assert not (first == third).all()
    assert_trees_equal(model.apply({}, X, rngs=DROPOUT), (first, second, third))
    other = model.apply({}, X, rngs={"dropout": jax.random.key(2)})
    assert not (other[0] == first).all()


def test_init_leaves_state_as_it_was_made():
    variables = to_linen(Net, 3, 1).init(KEY, X)
    norm = variables["batch_stats"]["blocks"]["0"]["norm"]
    assert_trees_equal(norm, nn.BatchNorm(use_running_average=False).init(KEY, X)["batch_stats"])


# ---- layout ----


def test_row_21_all_keys_are_strings():
    variables = to_linen(Net, 3, 2).init(KEY, X)
    block = ("linear/bias", "linear/kernel", "norm/bias", "norm/scale")
    assert set(flatten_dict(variables, sep="/")) == {
        *(f"params/blocks/{i}/{path}" for i in "01" for path in block),
        *(f"batch_stats/blocks/{i}/norm/{name}" for i in "01" for name in ("mean", "var")),
        "params/head/bias",
        "params/head/kernel",
    }


def test_unknown_variable_types_are_collections_of_their_name():
    @nnx.register_variable_name("moving")
    class Moving(nnx.Variable): ...

    class Counter(nnx.Module):
        def __init__(self):
            self.count = Moving(jnp.zeros(()))
            self.table = jnp.arange(3.0)

        def __call__(self):
            self.count[...] += 1
            return self.count + self.table

    model = to_linen(Counter)
    variables = model.init(KEY)
    assert_trees_equal(variables, {"moving": {"count": jnp.zeros(())}, "arrays": {"table": jnp.arange(3.0)}})
    y, updates = model.apply(variables, mutable=["moving"])
    assert_trees_equal((y, updates), (jnp.arange(3.0) + 1, {"moving": {"count": jnp.ones(())}}))


def test_a_plain_array_is_state_of_the_collection_arrays():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.basis = rngs.params.normal((3,))

        def __call__(self):
            self.basis = self.basis + 1
            return self.basis

    model = to_linen(Noise)
    variables = model.init(KEY)
    y, updates = model.apply(variables, mutable=["arrays"])
    assert_trees_equal(updates["arrays"]["basis"], y)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match=r'"basis".*"arrays" is immutable'):
        model.apply(variables)


def test_what_the_caller_passed_in_is_not_changed():
    model, module = to_linen(Net, 3, 1), Net(3, 1, rngs=nnx.Rngs(0))
    variables = freeze(model.init(KEY, X))
    before = jax.tree.map(np.array, variables)
    model.apply(variables, X, mutable=["batch_stats"])
    assert_trees_equal(jax.tree.map(np.array, variables), before)

    class Around(nnx.Module):  # row 66: an instance among the arguments stays the caller's
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    def numbers():
        return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))

    graphdef, state = nnx.graphdef(module), numbers()
    around = to_linen(Around, module)
    variables = around.init(KEY, X)
    around.apply(variables, X, mutable=["batch_stats"])
    assert nnx.graphdef(module) == graphdef
    assert_trees_equal(numbers(), state)
    assert_trees_equal(variables["params"]["inner"]["head"]["kernel"], module.head.kernel[...])


# ---- apply is strict, and runs no initializer ----


def test_row_25_apply_runs_no_initializer():
    runs = []

    def init(key, shape, dtype):
        runs.append(shape)
        return jax.random.normal(key, shape, dtype)

    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    names = jaxpr_names(lambda v: model.apply(v, X, train=False), variables)
    assert not [n for n in names if "random" in n or "threefry" in n or n in ("erf_inv", "shift_right_logical")]
    linear = to_linen(nnx.Linear, 3, 4, kernel_init=init)
    variables = linear.init(KEY, X)
    linear.apply(variables, X)
    runs.clear()
    linear.apply(variables, X)  # not even traced again
    assert not runs


def test_the_jaxpr_of_apply_is_that_of_the_native_call():
    model = to_linen(Net, 3, 2)
    variables = model.init(KEY, X)
    module = native(lambda: Net(3, 2, rngs=nnx.Rngs(0)), variables)
    module.eval()
    ours = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, X)
    graphdef, state = nnx.split(module)
    theirs = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    assert len(ours.eqns) == len(theirs.eqns)


def test_dropout_in_apply_costs_no_more_than_natively():
    model, module = to_linen(nnx.Dropout, 0.5), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    ours = jax.make_jaxpr(lambda k: model.apply({}, X, rngs={"dropout": k}))(KEY)
    graphdef, state = nnx.split(module)
    theirs = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(X))(state)
    assert len(ours.eqns) <= len(theirs.eqns)


def changed(variables, path, value=None):
    flat = flatten_dict(variables, sep="/")
    flat[path] = value
    return unflatten_dict({k: v for k, v in flat.items() if v is not None}, sep="/")


def test_rows_1_and_54_a_missing_param_is_an_error():
    model = to_linen(Net, 3, 1)
    variables = model.init(KEY, X)
    missing = changed(variables, "params/blocks/0/linear/kernel")
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match='"kernel" in scope "/blocks/0/linear"') as info:
        model.apply(missing, X, train=False)
    assert "Missing are:\n  params/blocks/0/linear/kernel" in info.value.__notes__
    with pytest.raises(flax.errors.ScopeVariableNotFoundError, match='"var" for collection "batch_stats"'):
        model.apply(changed(variables, "batch_stats/blocks/0/norm/var"), X, train=False)
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="the collection is empty"):
        model.apply({"params": variables["params"]}, X, train=False)


def test_row_1_a_wrong_shape_is_an_error():
    model = to_linen(Net, 3, 1)
    variables = changed(model.init(KEY, X), "params/head/kernel", jnp.ones((3, 5)))
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r'"kernel" in "/head".*\(3, 2\).*\(3, 5\)'):
        model.apply(variables, X, train=False)


def test_errors_say_the_path_in_the_linen_model():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return to_linen(nnx.Linear, 3, 4, name="inner")(x)

    variables = Outer().init(KEY, X)
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match='"bias" in scope "/inner"'):
        Outer().apply(changed(variables, "params/inner/bias"), X)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("params/hed/kernel", r"(?s)ToLinen\(Net\).*params/hed/kernel   \(did you mean params/head/kernel\?\)"),
        ("params/head/kernel2", "params/head/kernel2"),
        ("params/blocks/7/linear/kernel", "params/blocks/7/linear/kernel"),
        ("batch_stats/other/mean", "batch_stats/other/mean"),
        ("batch_stats/head/in_features", "batch_stats/head/in_features"),
    ],
)
def test_row_55_an_unexpected_variable_is_an_error(path, text):
    model = to_linen(Net, 3, 1)
    variables = changed(model.init(KEY, X), path, jnp.ones((3, 2)))
    with pytest.raises(UnexpectedVariablesError, match=text):
        model.apply(variables, X, train=False)


def test_a_param_that_the_model_was_told_not_to_have_is_unexpected():
    variables = to_linen(nnx.Linear, 3, 4).init(KEY, X)
    with pytest.raises(UnexpectedVariablesError, match="params/bias"):
        to_linen(nnx.Linear, 3, 4, use_bias=False).apply(variables, X)


def test_row_5_a_missing_rng_is_an_error_once_a_key_is_asked_for():
    model = to_linen(Net, 3, 1, rate=0.5)
    variables = model.init(KEY, X)
    model.apply(variables, X, train=False)
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "params"'):
        model.init({"dropout": KEY}, X)


def test_row_5_also_where_the_stream_crossed_a_transform():
    class Inside(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return nnx.jit(lambda dropout, x: dropout(x))(self.dropout, x)

    model = to_linen(Inside)
    y = model.apply({}, X, rngs=DROPOUT)
    assert 0 < int((y == 0).sum()) < y.size
    assert not (y == model.apply({}, X, rngs={"dropout": jax.random.key(2)})).all()
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply({}, X)


def test_a_stream_captured_by_an_inner_transform_is_an_error():
    class Captured(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jax.grad(lambda x: self.dropout(x).sum())(x)

    with pytest.raises(nnx.NnxError, match="Cannot write the random stream 'dropout'"):
        to_linen(Captured).apply({}, X, rngs=DROPOUT)


# ---- writing ----


def test_a_write_to_an_immutable_collection_raises_as_linens_batchnorm_does():
    ours, theirs = to_linen(nnx.BatchNorm, 3), nn.BatchNorm(use_running_average=False)
    for model in (ours, theirs):
        variables = model.init(KEY, X)
        with pytest.raises(flax.errors.ModifyScopeVariableError, match=r'"mean" in "/" because.*"batch_stats"'):
            model.apply(variables, X)


def test_row_12_sow_appends_like_linen_in_a_shared_submodule():
    class Sows(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "h", x)
            self.sow("losses", "l", x.sum())
            return x + 1

    class Twice(nn.Module):
        def setup(self):
            self.inner = to_linen(Sows)

        def __call__(self, x):
            return self.inner(self.inner(x))

    y, updates = Twice().apply({}, X, mutable=["intermediates", "losses"])
    expected = {"intermediates": {"inner": {"h": (X, X + 1)}}, "losses": {"inner": {"l": (X.sum(), (X + 1).sum())}}}
    assert_trees_equal((y, updates), (X + 2, expected))
    again = Twice().apply(updates, X, mutable=["intermediates"])[1]
    assert_trees_equal(again["intermediates"]["inner"]["h"], (X, X + 1, X, X + 1))
    assert_trees_equal(Twice().apply({}, X), X + 2)  # like Linen's sow, dropped where it may not be stored
    assert "intermediates" not in Twice().init(KEY, X)


class Cached(nnx.Module):
    """Creates its state in the call, as decoding does."""

    def __init__(self):
        self.index = nnx.data(None)

    def __call__(self, x):
        if self.index is None:
            self.index = nnx.Cache(jnp.zeros((), jnp.int32))
            self.total = nnx.Cache(jnp.zeros_like(x))
        self.index[...] += 1
        self.total[...] += x
        return self.total[...]

    def read(self):
        return self.total[...]


def test_row_13_state_created_in_a_call_is_there_in_the_next():
    model = to_linen(Cached)
    state = {}
    for step in range(1, 4):
        y, state = model.apply(state, X, mutable=["cache"])
        assert_trees_equal(state, {"cache": {"index": jnp.asarray(step, jnp.int32), "total": y}})
    assert_trees_equal(y, X + X + X)
    assert_trees_equal(model.apply(state, method="read"), y)
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match='"index" from collection "cache"'):
        model.apply({}, X)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match='"cache" is immutable'):
        model.apply(state, X)
    state.pop("cache")


def test_row_13_a_submodule_created_in_a_call_is_there_in_the_next():
    class Late(nnx.Module):
        def __call__(self, x):
            if not hasattr(self, "inner"):
                self.inner = Cached()
                self.scale = nnx.Param(jnp.full((3,), 2.0))
            return self.inner(x) * self.scale

    model = to_linen(Late)
    y, variables = model.init_with_output(KEY, X)
    assert set(flatten_dict(variables, sep="/")) == {"cache/inner/index", "cache/inner/total", "params/scale"}
    y, updates = model.apply(variables, X, mutable=["cache"])
    assert_trees_equal((y, updates["cache"]["inner"]["total"]), (4 * X, X + X))
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match='"scale" from collection "params"'):
        model.apply({"cache": updates["cache"]}, X, mutable=["cache"])


def test_perturbations_have_gradients():
    class Perturbed(nnx.Module):
        def __call__(self, x):
            return (self.perturb("h", x * 2) ** 2).sum()

    model = to_linen(Perturbed)
    variables = model.init(KEY, X)
    grads = jax.grad(lambda v: model.apply(v, X))(variables)
    assert_trees_equal(grads, {"perturbations": {"h": 4 * X}})
    assert_trees_equal(model.apply({}, X), model.apply(variables, X))


# ---- arguments ----


class Configured(nnx.Module):
    seen = None

    def __init__(self, sizes, config, name="none"):
        type(self).seen = (sizes, config, name)

    def __call__(self):
        return 0


def test_row_35_arguments_reach_the_class_untouched():
    sizes, config = [1, [2, 3]], {"a": {"b": 1}, 2: (3,)}

    class Outer(nn.Module):
        def setup(self):
            self.inner = ToLinen(Configured, args=(sizes,), kwargs={"config": config, "name": "x"})

        def __call__(self):
            return self.inner()

    Outer().init(KEY)
    assert Configured.seen[0] is sizes
    assert Configured.seen[1] is config
    assert Configured.seen[2] == "x"


def test_row_59_rngs_are_passed_only_to_who_takes_them():
    class Plain(nnx.Module):
        def __call__(self):
            return 1

    class Optional(nnx.Module):
        def __init__(self, rngs=None, **options):
            self.has_rngs = rngs is not None

        def __call__(self):
            return int(self.has_rngs)

    class Forwards(Optional):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    results = [to_linen(c, skip_rng=s).apply({}) for c in (Plain, Optional, Forwards) for s in (False, True)]
    assert results == [1, 1, 1, 0, 1, 0]
    assert ToLinen(Optional, args=(nnx.Rngs(0),)).apply({}) == 1
    assert ToLinen(functools.partial(Optional, rngs=nnx.Rngs(0))).apply({}) == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), r"(?s)an instance of Linear\nWrite ToLinen\(Linear, args="),
        (lambda: nn.Dense(3), "found: an instance of Dense"),
        (lambda: "Linear", "found: 'Linear', a str, which cannot be called"),
    ],
)
def test_row_44_an_instance_is_not_a_class(given, text):
    for make in (ToLinen, to_linen_class):
        with pytest.raises(NotAFactoryError, match=text):
            make(given())


def test_row_44_what_a_factory_returns_has_to_be_a_module():
    from flax import nnx as flax_nnx

    with pytest.raises(NotAnNnxModuleError, match=r"(?s)Dense in ToLinen.*It is a Linen module already"):
        to_linen(nn.Dense, 3).init(KEY, X)
    with pytest.raises(NotAnNnxModuleError, match=r"write `import nnx_core as nnx` instead"):
        to_linen(flax_nnx.Dropout, 0.5, skip_rng=True).init(KEY, X)
    with pytest.raises(NotAnNnxModuleError, match=r"(?s)expected: an nnx_core.Module\n  found: builtins.int"):
        to_linen(lambda: 3).init(KEY, X)


def test_keys_that_are_one_in_linen():
    class Clash(nnx.Module):
        def __init__(self):
            self.d = nnx.Dict({1: nnx.Param(jnp.ones(1)), "1": nnx.Param(jnp.ones(1))})

    with pytest.raises(KeyClashError, match=r"(?s)\('d', 1\) and \('d', '1'\).*params/d/1 for both"):
        to_linen(Clash).init(KEY)


def test_a_constructor_that_changes_its_mind():
    made = []

    class Fickle(nnx.Module):
        def __init__(self):
            made.append(1)
            if len(made) == 1:
                self.w = nnx.Param(jnp.ones(1))

        def __call__(self):
            return 0

    with pytest.raises(ConstructorChangedError, match=r"(?s)Fickle.*one at \('w',\).*abstract_init=False"):
        to_linen(Fickle).init(KEY)


def test_abstract_init_false_is_for_constructors_that_need_numbers():
    class Needs(nnx.Module):
        def __init__(self, rngs):
            self.scale = float(jnp.ones(()).sum())
            self.w = nnx.Param(rngs.params.normal((3,)))

        def __call__(self, x):
            return x * self.w * self.scale

    with pytest.raises(jax.errors.ConcretizationTypeError):
        to_linen(Needs).init(KEY, X)
    model = to_linen(Needs, abstract_init=False)
    variables = model.init(KEY, X)
    names = jaxpr_names(lambda v: model.apply(v, X), variables)
    assert not [n for n in names if "random" in n]
    assert_trees_equal(jax.jit(model.apply)(variables, X), X * variables["params"]["w"])


def test_structures_are_told_apart_by_type_and_found_again_by_value():
    calls = []

    class Traced(nnx.Module):
        def __init__(self, value, options=None):
            calls.append(value)
            self.value = value

        def __call__(self):
            return self.value

    for _ in range(3):
        assert [repr(to_linen(Traced, v).apply({})) for v in (1, 1.0, True)] == ["1", "1.0", "True"]
        to_linen(Traced, 5, options={"a": [1, 2]}).apply({})
    assert calls == [1, 1.0, True, 5]
    array = to_linen(Traced, np.arange(3, dtype=np.int32))  # cannot be compared: traced each time, never wrong
    variables = array.init(KEY)
    assert_trees_equal(jnp.asarray(array.apply(variables)), jnp.arange(3))


def test_tracers_as_arguments():
    class Scaled(nnx.Module):
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, x):
            return x * self.scale

    @jax.jit
    def f(scale, x):
        return to_linen(Scaled, scale).init_with_output(KEY, x)[0]

    assert_trees_equal(f(2.0, X), 2 * X)


# ---- methods ----


def test_methods_by_name_and_as_attributes():
    model = to_linen(Net, 3, 1)
    variables = model.init(KEY, X)
    run = functools.partial(model.apply, variables, X, mutable=["batch_stats"])
    y = run(method="features")[0]
    assert_trees_equal(run(method=model.features)[0], y)
    assert_trees_equal(run(nnx_method="features")[0], y)
    assert_trees_equal(run(nnx_method=Net.features)[0], y)
    assert_trees_equal(run(method=lambda m, x: m.features(x) * 2)[0], y * 2)
    assert_trees_equal(model.bind(variables, mutable=["batch_stats"]).features(X), y)
    assert model.module_class is Net
    assert to_linen(lambda rngs: Net(3, 1, rngs=rngs)).module_class is Net
    with pytest.raises(AttributeError, match='"ToLinen" object has no attribute "nothing"'):
        _ = model.nothing
    with pytest.raises(flax.errors.CallCompactUnboundModuleError):
        model(X)


def test_interceptors_and_captured_intermediates_see_the_calls():
    model, seen = to_linen(Net, 3, 1), []
    variables = model.init(KEY, X)

    def interceptor(call, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        model.apply(variables, X, method="features", mutable=["batch_stats"])
    assert seen == [("ToLinen", "features")]
    y, updates = model.apply(variables, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
    assert_trees_equal(updates["intermediates"]["__call__"], (y,))
    assert "Net" in nn.tabulate(to_linen_class(Net)(3, 1), KEY)(X)


# ---- context ----


class Asks(nnx.Module):
    seen = ()

    def __call__(self):
        type(self).seen = (current_linen_module(), is_linen_initializing())
        return 0


def test_row_64_nnx_code_can_ask_where_it_runs():
    assert (current_linen_module(), is_linen_initializing()) == (None, False)
    model = to_linen(Asks, name="asks")
    model.init(KEY)
    assert isinstance(Asks.seen[0], ToLinen)
    assert Asks.seen[1] is True
    model.apply({})
    assert Asks.seen[0].name == "asks"
    assert Asks.seen[1] is False


def test_linen_modules_know_too_where_they_run():
    class Outer(nn.Module):
        def __call__(self):
            return current_linen_module() is self, is_linen_initializing()

    assert Outer().apply({}) == (True, False)
    assert Outer().init_with_output(KEY)[0] == (True, True)


def test_streams_in_constructors():
    class Draws(nnx.Module):
        def __init__(self, rngs):
            forked = rngs.fork()
            self.rngs = rngs
            self.a = nnx.Param(forked.params.normal((2,)))
            self.b = nnx.Param(rngs.anything.normal((2,)))
            self.c = nnx.Param(rngs.normal((2,)))

        def __call__(self):
            return self.rngs.noise(), self.rngs["noise"].key[...], hasattr(self.rngs, "_private")

    model = to_linen(Draws)
    params = model.init(KEY)["params"]
    assert len({float(v[0]) for v in params.values()}) == 3
    key, own, private = model.apply({"params": params}, rngs={"noise": jax.random.key(1)})
    assert not (jax.random.key_data(key) == jax.random.key_data(own)).all()
    assert private is False


def test_a_stream_of_linen_has_what_streams_have():
    class Looks(nnx.Module):
        def __init__(self, rngs):
            self.stream = rngs.dropout

        def __call__(self):
            return self.stream.key[...], self.stream.count[...], self.stream.nothing

    with pytest.raises(AttributeError, match="LinenStream has no attribute 'nothing'"):
        to_linen(Looks).apply({}, rngs=DROPOUT)


def test_stacked_layers_inside_the_nnx_module():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=4)
            @nnx.vmap
            def make(rngs):
                return Block(3, 0.5, rngs=rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return layer(x)

            return run(self.layers, x)

    model = to_linen(Stack)
    variables = model.init({"params": KEY, **DROPOUT}, X)
    assert variables["params"]["layers"]["linear"]["kernel"].shape == (4, 3, 3)
    y, _ = model.apply(variables, X, rngs=DROPOUT, mutable=["batch_stats"])
    assert 0 < int((y == 0).sum()) < y.size
    with pytest.raises(flax.errors.InvalidRngError, match="needs PRNG"):
        model.apply(variables, X, mutable=["batch_stats"])


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


# ---- classes, copies, pickles ----


def test_rows_9_51_52_a_class_that_works_directly():
    cls = to_linen_class(nnx.Linear, use_bias=False)
    assert (cls.__name__, isinstance(cls, LinenClass)) == ("LinearToLinen", True)
    assert to_linen_class(nnx.Linear, use_bias=False) is cls

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cls(3, out_features=4)(cls(in_features=3, out_features=3, name="first")(x))

    variables = Outer().init(KEY, X)
    assert set(flatten_dict(variables, sep="/")) == {"params/first/kernel", "params/LinearToLinen_0/kernel"}
    model = cls(in_features=3, out_features=4, use_bias=True)
    assert set(model.init(KEY, X)["params"]) == {"kernel", "bias"}
    assert model.module_class is nnx.Linear
    assert to_linen_class(functools.partial(Net, 3)).__name__ == "NetToLinen"
    assert to_linen_class(functools.partial(Net, 3))(depth=1).module_class is Net
    assert ToLinen(nnx.Linear, kwargs=cls(1, 2).kwargs).kwargs == {"use_bias": False}


def test_a_class_derived_from_a_linen_class():
    class Mine(to_linen_class(nnx.Linear, use_bias=False)):
        extra: int = 0

    model = Mine(3, 4, extra=2)
    assert (model.extra, model.args, model.kwargs) == (2, (3, 4), {"use_bias": False})
    assert model.clone() == model
    assert model.init_with_output(KEY, X)[0].shape == (8, 4)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, *(
    lambda x, lib=lib: lib.loads(lib.dumps(x)) for lib in (pickle, cloudpickle)
)], ids=["copy", "deepcopy", "pickle", "cloudpickle"])  # fmt: skip
def test_row_19_copies_and_pickles(how):
    cls = to_linen_class(Net, classes=5)
    for model in (to_linen(Net, 3, depth=1, classes=5), cls(3, depth=1)):
        new = how(model)
        assert new == model
        assert (new.args, new.kwargs, hash(new)) == (model.args, model.kwargs, hash(model))
        assert_trees_equal(new.init(KEY, X), model.init(KEY, X))
    assert how(cls) is cls
    assert how(ToLinen) is ToLinen


def test_an_empty_shell_has_no_attributes():
    shell = object.__new__(ToLinen)  # what copy and pickle make first
    with pytest.raises(AttributeError):
        shell.features  # noqa: B018  # the access is the test


def test_fields_read_like_the_arguments():
    model = ToLinen(nnx.Linear, [3], {"out_features": 4})
    assert (model.args, model.kwargs) == ((3,), {"out_features": 4})
    assert (list(model.args), dict(model.kwargs), len(model.args)) == ([3], {"out_features": 4}, 1)
    assert "out_features" in model.kwargs
    assert model == ToLinen(nnx.Linear, (3,), {"out_features": 4})
    assert model != ToLinen(nnx.Linear, (4,), {"out_features": 4})
    assert "args = (3,)" in repr(model)
    with pytest.raises(TypeError, match="not iterable"):
        iter(model.kwargs)
