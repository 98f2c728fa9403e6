"""ToLinen is as strict as Linen about variables, rngs and writes. `row N` is a row of REQUIREMENTS.md."""

import flax.errors
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict

import nnx_core as nnx
from bridge.nnx_in_linen._errors import (
    UnexpectedVariablesError,
)
from bridge.nnx_in_linen.wrapper import to_linen
from tests.support.to_linen_models import DROPOUT, KEY, Net, X, changed
from tests.tolerance import assert_trees_equal

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


# ---- apply is strict ----


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
