"""Linen sees into ToLinen: paths, interceptors, intermediates, tables. `row N` is a row of REQUIREMENTS.md."""

import abc
import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.linen import module as linen_module

import nnx_core as nnx
from bridge import ToNNX, current_linen_module, is_linen_initializing
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class
from tests.support.to_linen_models import DROPOUT, KEY, Net, X
from tests.tolerance import assert_trees_equal

INNER = ("blocks/0/linear", "blocks/0/norm", "blocks/0/dropout")


def seen_calls(model, *args, **kwargs):
    """(path, class, method) of each call that an interceptor sees, in order, and what apply returned."""
    seen = []

    def interceptor(call, args, kwargs, context):
        seen.append(("/".join(context.module.path), type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        out = model.apply(*args, **kwargs)
    return seen, out


def test_row_24_interceptors_see_every_call_with_its_path():
    model = to_linen(Net, 3, 1)
    variables = model.init(KEY, X)
    seen, out = seen_calls(model, variables, X, mutable=["batch_stats"])
    classes = ("Linear", "BatchNorm", "Dropout")
    assert seen == [
        ("", "ToLinen", "__call__"),
        ("", "ToLinen", "features"),
        ("blocks/0", "Block", "__call__"),
        *((path, name, "__call__") for path, name in zip(INNER, classes, strict=True)),
        ("head", "Linear", "__call__"),
    ]
    assert_trees_equal(out, model.apply(variables, X, mutable=["batch_stats"]))
    seen, _ = seen_calls(model, variables, X, method="features", mutable=["batch_stats"])
    assert [call for call in seen if not call[0]] == [("", "ToLinen", "features")]


def test_row_24_interceptors_change_arguments_and_results():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return to_linen(Net, 3, 1, name="net")(x, train=False)

    def without_relu_or_head(call, args, kwargs, context):
        if context.module.path == ("net", "head"):
            return args[0] * 2
        if context.module.path == ("net", "blocks", "0"):
            return call(args[0] * 0, **kwargs)
        return call(*args, **kwargs)

    variables = Outer().init(KEY, X)
    zeros = Outer().apply(variables, X * 0)
    with nn.intercept_methods(without_relu_or_head):
        y = Outer().apply(variables, X)
    assert y.shape == (8, 3)  # what went into the head, doubled
    assert_trees_equal(y @ variables["params"]["net"]["head"]["kernel"] / 2 + 0, zeros)


def test_row_24_captured_intermediates_are_under_their_paths():
    model = to_linen(Net, 3, 1)
    variables = model.init(KEY, X)
    plain, _ = model.apply(variables, X, mutable=["batch_stats"])
    y, updates = model.apply(variables, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
    found = updates["intermediates"]
    assert_trees_equal((y, found["__call__"][0]), (plain, plain))
    block = found["blocks"]["0"]
    assert_trees_equal(found["h"], block["__call__"])  # what the model sows itself is there too
    assert set(block) == {"__call__", "linear", "norm", "dropout"}
    assert_trees_equal(nnx.relu(block["norm"]["__call__"][0]), found["h"][0])
    # As in Linen, what was captured may stay among the variables, and grows.
    again = model.apply({**variables, **updates}, X, mutable=True, capture_intermediates=True)[1]
    assert len(again["intermediates"]["head"]["__call__"]) == 2
    only = lambda module, name: isinstance(module, nn.Module) and module.path[-1:] == ("head",)  # noqa: E731
    updates = model.apply(variables, X, mutable=True, capture_intermediates=only)[1]
    assert jax.tree.map(jnp.shape, updates["intermediates"]) == {"head": {"__call__": ((8, 2),)}, "h": ((8, 3),)}


def test_row_24_a_shared_layer_is_captured_once_for_each_call():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = to_linen(Tied)
    variables = model.init(KEY, X)
    y, updates = model.apply(variables, X, mutable=True, capture_intermediates=True)
    assert len(updates["intermediates"]["a"]["__call__"]) == 2
    assert_trees_equal(updates["intermediates"]["a"]["__call__"][1], y)
    assert "b" not in updates["intermediates"]


def test_row_24_tabulate_has_a_row_for_each_submodule():
    table = nn.tabulate(to_linen_class(Net)(3, 1), KEY, console_kwargs={"width": 200, "force_terminal": False})(X)
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
    named = {row[1]: row[2] for row in rows if len(row) > 3 and row[2]}
    assert named == {
        "": "NetToLinen",
        "blocks": "list",
        "blocks/0": "Block",
        **dict(zip(INNER, ("Linear", "BatchNorm", "Dropout"), strict=True)),
        "head": "Linear",
    }
    assert "Total Parameters: 32" in table  # 2 * 3 of the statistics, 12 + 6 + 8 of the parameters
    short = nn.tabulate(to_linen(Net, 3, 1), KEY, depth=1)(X)
    assert "blocks/0" not in short
    assert "Total Parameters: 32" in short


def test_row_24_tabulate_counts_operations_as_for_linen_modules():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    class LinenTwo(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(4), nn.Dense(5)

        def __call__(self, x):
            return self.second(self.first(x))

    def counts(model):
        options = {"compute_flops": True, "compute_vjp_flops": True}
        table = nn.tabulate(model, KEY, **options, console_kwargs={"width": 200})(X)
        rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
        return {row[1]: row[5:7] for row in rows if len(row) > 6 and row[5].isdecimal()}

    ours = counts(to_linen(Two))
    assert ours == counts(LinenTwo())
    assert set(ours) == {"", "first", "second"}
    assert all(int(flops) > 0 for row in ours.values() for flops in row)


class Where(nnx.Module):
    """Notes where Linen thinks that it runs."""

    places = ()

    def __call__(self, x):
        here = linen_module._context.module_stack[-1]  # what quantization libraries read
        assert here is current_linen_module()
        type(self).places = (*type(self).places, "/".join(here.path))
        self.note(x)
        return x

    def note(self, x):
        self.name = current_linen_module().name


class Deep(nnx.Module):
    def __init__(self):
        self.layers = [Where(), Where()]
        self.named = nnx.Dict({"last": Where()})

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.named["last"](x)


def test_row_63_the_path_says_which_nnx_submodule_runs():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            assert current_linen_module() is self
            y = to_linen(Deep, name="deep")(x)
            assert linen_module._context.module_stack[-1] is self
            return y

    Where.places = ()
    Outer().apply({}, X)
    assert Where.places == ("deep/layers/0", "deep/layers/1", "deep/named/last")
    assert linen_module._context.module_stack == [None]
    Where.places = ()
    jax.jit(lambda x: nn.vmap(Outer, variable_axes={})().apply({}, x))(X[None])
    assert Where.places == ("deep/layers/0", "deep/layers/1", "deep/named/last")


def test_row_63_the_path_in_inner_jax_transforms():
    class Scales(nnx.Module):
        def __call__(self, x):
            return (x * len(current_linen_module().path)).sum()

    class Inside(nnx.Module):
        def __init__(self):
            self.scales = Scales()

        def __call__(self, x):
            return jax.grad(self.scales)(x), jax.jit(lambda x: self.scales(x))(x)

    grads, y = to_linen(Inside).apply({}, X)
    assert_trees_equal((grads, y), (jnp.ones_like(X), jax.jit(jnp.sum)(X)))
    # Linen may not be told of values of the inner trace.
    _, updates = to_linen(Inside).apply({}, X, capture_intermediates=True, mutable=["intermediates"])
    assert_trees_equal(updates["intermediates"], {"__call__": ((grads, y),)})


def test_row_63_the_stand_in_is_a_linen_module_of_its_scope():
    class Looks(nnx.Module):
        def __call__(self, x):
            here = current_linen_module()
            assert isinstance(here, nn.Module)
            return here.name, here.path, here.is_initializing(), here.scope.path, type(here).__name__

    class Holds(nnx.Module):
        def __init__(self):
            self.inner = Looks()

        def __call__(self, x):
            return self.inner(x)

    model = to_linen(Holds)
    assert model.apply({}, X) == ("inner", ("inner",), False, ("inner",), "Looks")
    assert model.init_with_output(KEY, X)[0] == ("inner", ("inner",), True, ("inner",), "Looks")


def test_linen_modules_made_by_a_running_submodule_belong_to_nobody():
    class Makes(nnx.Module):
        def __call__(self, x):
            made = nn.Dense(3), nn.Dense(3, name="mine"), nn.Dense(3)
            return [(m.name, m.parent, m.scope) for m in made], made[0] == nn.Dense(3, parent=None)

    class Holds(nnx.Module):
        def __init__(self):
            self.mine = Makes()

        def __call__(self, x):
            return self.mine(x), Makes.__call__(self, x)

    alone = [(None, None, None), ("mine", None, None), (None, None, None)]
    assert to_linen(Holds).apply({}, X) == ((alone, True), (alone, True))


def test_a_wrapper_made_in_a_call_is_one_that_the_call_made():
    class Makes(nnx.Module):
        def __call__(self, x):
            if not hasattr(self, "dense"):
                self.dense = ToNNX(nn.Dense(2, name="d"), rngs=nnx.Rngs(0))
                self.dense.lazy_init(x)
            return self.dense(x)

    class Holds(nnx.Module):
        def __init__(self):
            self.inner = Makes()

        def __call__(self, x):
            return self.inner(x)

    y, variables = to_linen(Holds).init_with_output(KEY, X)
    assert set(variables["params"]["inner"]["dense"]) == {"kernel", "bias"}
    assert_trees_equal(to_linen(Holds).apply(variables, X), y)


def test_modules_keep_what_python_knows_of_their_class():
    class Registry(abc.ABCMeta):
        pass

    class Counts(nnx.Module, metaclass=Registry):
        calls = 0
        kinds = ()

        def __init_subclass__(cls, *, kind, **kwargs):  # wants an argument, and keeps a list
            super().__init_subclass__(**kwargs)
            Counts.kinds = (*Counts.kinds, kind)

        def __call__(self):
            type(self).calls += 1
            assert isinstance(self, Counts)
            assert (type(self).__name__, type(self).__qualname__) == (Sub.__name__, Sub.__qualname__)
            return self

    class Sub(Counts, kind="sub"):
        def __call__(self):
            return super().__call__()

    class Holds(nnx.Module):
        def __init__(self):
            self.sub = Sub()

        def __call__(self):
            self.sub()
            return self.sub()

    out = to_linen(Holds).apply({})
    assert type(out) is Sub  # what leaves the call is what it was
    assert (Sub.calls, Counts.calls, Counts.kinds) == (2, 0, ("sub",))
    assert nnx.graphdef(out) == nnx.graphdef(Sub())


def test_modules_under_nnx_transforms_inside_are_not_looked_into():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs)), splits=2)
            self.layers = make(rngs)

        def __call__(self, x):
            return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)

    model = to_linen(Stack)
    variables = model.init(KEY, X)
    y, updates = model.apply(variables, X, mutable=True, capture_intermediates=True)
    assert_trees_equal(updates["intermediates"], {"__call__": (y,)})  # and no tracer of the loop
    assert_trees_equal(model.apply(variables, X), y)


@pytest.mark.slow
def test_captured_under_linen_transforms():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
            stacked = nn.vmap(to_linen_class(Net), variable_axes=axes, split_rngs={"params": True})
            return stacked(3, 1, name="net")(x)

    x = jnp.stack([X, -X])
    variables = Outer().init(KEY, x)
    y, updates = jax.jit(lambda v: Outer().apply(v, x, mutable=True, capture_intermediates=True))(variables)
    assert updates["intermediates"]["net"]["head"]["__call__"][0].shape == (2, 8, 2)
    assert_trees_equal(updates["intermediates"]["net"]["head"]["__call__"][0], y)


def test_a_failing_submodule_leaves_no_trace():
    class Fails(nnx.Module):
        def __call__(self, x):
            raise KeyError("mine")

    class Holds(nnx.Module):
        def __init__(self):
            self.inner = Fails()

        def __call__(self, x):
            return self.inner(x)

    for watch in (False, True):
        with pytest.raises(KeyError, match="mine"):
            to_linen(Holds).apply({}, X, capture_intermediates=watch, mutable=["intermediates"])
        assert linen_module._context.module_stack == [None]
        assert (current_linen_module(), is_linen_initializing()) == (None, False)


def test_stand_ins_do_not_reach_pickles_of_the_module():
    class Outside(nnx.Module):
        def __call__(self, x):
            return pickle.dumps(Where)

    assert pickle.loads(ToLinen(Outside).apply({}, X)) is Where
    assert DROPOUT.keys() == {"dropout"}
