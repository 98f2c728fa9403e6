"""ToLinen: arguments, methods, context, classes and copies. `row N` is a row of REQUIREMENTS.md."""

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
from flax.traverse_util import flatten_dict

import nnx_core as nnx
from bridge.nnx_in_linen._errors import (
    ConstructorChangedError,
    KeyClashError,
    NotAFactoryError,
    NotAnNnxModuleError,
)
from bridge.nnx_in_linen.host import current_linen_module, is_linen_initializing
from bridge.nnx_in_linen.wrapper import LinenClass, ToLinen, to_linen, to_linen_class
from tests.support.to_linen_models import DROPOUT, KEY, Block, Net, X, primitives
from tests.tolerance import assert_trees_equal

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
    with pytest.raises(NotAnNnxModuleError, match=r"(?s)RngStream in ToLinen.*Of flax\.nnx, return an nnx\.Module"):
        to_linen(flax_nnx.RngStream, 0, tag="a").init(KEY, X)
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
    names = primitives(lambda v: model.apply(v, X), variables)
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
