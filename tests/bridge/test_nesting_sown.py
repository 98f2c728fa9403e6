"""What is sown at any depth of a module that is called twice in one apply: what Linen keeps, in Linen's order."""

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.linen_in_nnx.wrapper import ToNNX
from bridge.nnx_in_linen.wrapper import to_linen
from tests.support.numbers import normal
from tests.tolerance import assert_trees_equal

KEY = jax.random.key(0)
X = jnp.asarray(normal(7, 2, 3))


class Sower(nn.Module):
    """Sows at two depths, and a sum in a collection of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(Below(name="below")(x))
        self.sow("intermediates", "h", x)
        self.sow("log", "sum", x.sum(), init_fn=lambda: jnp.zeros(()), reduce_fn=lambda a, b: a + b)
        return x


class Below(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        self.sow("intermediates", "h", {"doubled": 2 * x}, init_fn=dict, reduce_fn=lambda old, new: {**old, **new})
        self.sow("intermediates", "all", x)
        return x


class Silent(nn.Module):
    """Has no parameters, and sows."""

    def __call__(self, x):
        self.sow("intermediates", "h", x)
        return x + 1


class Holder(nnx.Module):
    def __init__(self, module, rngs):
        self.inner = ToNNX(module, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class LinenHolder(nn.Module):
    module: nn.Module

    def setup(self):
        self.inner = self.module.clone()

    def __call__(self, x):
        return self.inner(x)


class InList(nnx.Module):
    def __init__(self, module, rngs):
        self.parts = nnx.List([ToNNX(module, rngs=rngs)])

    def __call__(self, x):
        return self.parts[0](x)


def deep(module):
    """Linen > NNX > Linen > NNX > Linen."""
    return to_linen(Holder, LinenOfNnx(module))


class LinenOfNnx(nn.Module):
    module: nn.Module

    @nn.compact
    def __call__(self, x):
        return to_linen(Holder, self.module.clone(parent=None), name="nnx")(x)


class Twice(nn.Module):
    part: nn.Module

    def __call__(self, x):
        return self.part(self.part(x))


@pytest.mark.parametrize("module", [Sower(), Silent()], ids=["params", "none"])
@pytest.mark.parametrize("mutable", [["intermediates"], ["intermediates", "log"], True], ids=str)
def test_a_shared_module_keeps_what_each_call_sowed_row12(module, mutable):
    theirs, ours = Twice(LinenHolder(module)), Twice(to_linen(Holder, module))
    variables = {"params": theirs.init(KEY, X).get("params", {})}
    (y, found), (wanted_y, wanted) = (model.apply(variables, X, mutable=mutable) for model in (ours, theirs))
    assert len(jax.tree.leaves(wanted["intermediates"])) >= 2
    assert_trees_equal((y, found), (wanted_y, wanted))


@pytest.mark.parametrize("module", [Sower(), Silent()], ids=["params", "none"])
def test_init_returns_what_each_call_sowed_row12(module):
    theirs, ours = Twice(LinenHolder(module)), Twice(to_linen(Holder, module))
    found, wanted = (model.init_with_output(KEY, X, mutable=True)[1] for model in (ours, theirs))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)  # weights have other keys


@pytest.mark.parametrize("wrap", [lambda m: to_linen(InList, m), deep], ids=["list", "deep"])
def test_a_shared_module_keeps_what_each_call_sowed_at_any_depth_row12(wrap):
    model = Twice(wrap(Sower()))
    variables = model.init(KEY, X)
    y, updates = model.apply({"params": variables["params"]}, X, mutable=["intermediates", "log"])
    [params] = [x["below"] for x in _dicts(variables["params"]) if "below" in x]
    [sown] = [x for x in _dicts(updates["intermediates"]) if "below" in x]
    [log] = [x["sum"] for x in _dicts(updates["log"]) if "sum" in x]
    wanted, theirs = Twice(Sower()).apply({"params": {"part": {"below": params}}}, X, mutable=True)
    assert_trees_equal(y, wanted)
    assert_trees_equal(sown, theirs["intermediates"]["part"])
    assert_trees_equal(log, theirs["log"]["part"]["sum"])


def _dicts(tree):
    if isinstance(tree, dict):
        yield tree
        for child in tree.values():
            yield from _dicts(child)


def test_each_apply_begins_anew():
    model = Twice(to_linen(Holder, Sower()))
    variables = model.init(KEY, X)
    first = model.apply({"params": variables["params"]}, X, mutable=["intermediates"])[1]
    again = jax.jit(lambda v: model.apply(v, X, mutable=["intermediates"])[1])({"params": variables["params"]})
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, first)


WANTED = {"all": True, "methods": lambda module, method: isinstance(module, nn.Dense) or method == "other"}


@pytest.mark.parametrize("filter_", WANTED)
@pytest.mark.parametrize("mutable", [["intermediates"], ["intermediates", "log"], True], ids=str)
def test_what_linen_captures_inside_a_wrapped_module_row24(mutable, filter_):
    theirs, ours = Twice(LinenHolder(Sower())), Twice(to_linen(Holder, Sower()))
    variables = {"params": theirs.init(KEY, X)["params"]}
    options = {"mutable": mutable, "capture_intermediates": WANTED[filter_]}
    found, wanted = (model.apply(variables, X, **options) for model in (ours, theirs))
    assert len(wanted[1]["intermediates"]["part"]["inner"]["below"]["Dense_0"]["__call__"]) == 2
    assert_trees_equal(found, wanted)


@pytest.mark.parametrize("run", ["apply", "init"])
def test_interceptors_see_layers_under_their_whole_path_rows24_63(run):
    def seen(model, variables):
        found = []

        def note(method, args, kwargs, context):
            if context.method_name == "__call__":
                found.append(context.module.path)
            return method(*args, **kwargs)

        with nn.intercept_methods(note):
            model.init(KEY, X) if run == "init" else model.apply(variables, X)
        return found

    theirs = Twice(LinenHolder(Sower()))
    variables = {"params": theirs.init(KEY, X)["params"]}
    layer = ("part", "inner", "below", "Dense_0")
    ours = Twice(to_linen(Holder, Sower()))
    # Interceptors see the abstract run that finds the structure, too: once a process, in whichever test comes first.
    ours.apply(variables, X)
    ours.init(KEY, X)
    found, wanted = seen(ours, variables), seen(theirs, variables)
    assert set(found) == set(wanted)
    assert found.count(layer) == wanted.count(layer) == 2


def test_an_error_inside_a_wrapped_module_names_the_whole_path():
    model = Twice(to_linen(Holder, Sower()))
    params = model.init(KEY, X)["params"]
    wrong = jax.tree.map(lambda x: jnp.zeros((5, *x.shape[1:])), params)
    with pytest.raises(flax.errors.ScopeParamShapeError) as ours:
        model.apply({"params": wrong}, X)
    with pytest.raises(flax.errors.ScopeParamShapeError) as theirs:
        Twice(LinenHolder(Sower())).apply({"params": wrong}, X)
    assert "/part/inner/below/Dense_0" in str(theirs.value)
    assert "/part/inner/below/Dense_0" in str(ours.value)


def test_a_call_that_may_write_nothing_captures_nothing():
    class Closed(Holder):
        def __call__(self, x):
            return self.inner(x, mutable=False)

    module = nn.Dense(3)
    model = to_linen(Closed, module)
    variables = model.init(KEY, X)
    y, updates = model.apply(variables, X, capture_intermediates=True)
    assert_trees_equal(y, module.apply({"params": variables["params"]["inner"]}, X))
    assert set(updates["intermediates"]) == {"__call__", "inner"}
