"""ToNNX: tables, interceptors, captured intermediates and sown collections see through the wrapper."""

import pathlib
import pickle
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from bridge import ToLinen, ToNNX, variables_of
from tests.support.linen_models import CNN, Counter, X, both, same, variables_in
from tests.tolerance import assert_trees_equal

PLAIN = {"force_terminal": False, "width": 200}


def rows(table):
    """(path, type) of each row of a table."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[:1] == "│"]
    return [(line[0], line[1]) for line in lines if line[1]]


def test_tabulate_shows_linen_submodules_row_24():
    model = nnx.Sequential(ToNNX(CNN(), nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    bridge.lazy_init(model, X)
    before = variables_in(model), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    table = nnx.tabulate(model, X, console_kwargs=PLAIN)
    assert rows(table) == [
        ("", "Sequential"),
        ("layers/0", "ToNNX"),
        ("layers/0/Conv_0", "Conv"),
        ("layers/0/BatchNorm_0", "BatchNorm"),
        ("layers/0/Dropout_0", "Dropout"),  # has no variables
        ("layers/0/Dense_0", "Dense"),
        ("layers/1", "Linear"),
    ]
    [dense] = [line for line in table.splitlines() if "layers/0/Dense_0" in line]
    assert all(text in dense for text in ("float32[4,24]", "float32[4,3]", "bias: float32[3]"))
    assert same(before[0], model)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))), before[1])


def test_tabulate_shows_lifted_and_nested_modules_row_24():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(6)(x), None

    class Model(nn.Module):
        def setup(self):
            self.stack = nn.scan(Inner, {"params": 0}, split_rngs={"params": True}, length=3)()
            self.nested = ToLinen(nnx.Linear, args=(6, 3))

        def __call__(self, x):
            return self.nested(self.stack(x, None)[0])

        def encode(self, x):
            return self.stack(x, None)[0]

    model = ToNNX(Model(), nnx.Rngs(0)).lazy_init(X)
    expected = [("", "ToNNX"), ("stack", "Inner"), ("stack/Dense_0", "Dense"), ("nested", "ToLinen")]
    assert rows(nnx.tabulate(model, X, console_kwargs=PLAIN)) == expected
    assert rows(nnx.tabulate(model, X, console_kwargs=PLAIN, depth=1)) == [expected[0], expected[1], expected[3]]
    with_flops = nnx.tabulate(model, X, console_kwargs=PLAIN, compute_flops=True, compute_vjp_flops=True)
    assert rows(with_flops) == expected
    assert model(X).shape == (4, 3)  # and nothing is recorded any more


def test_interceptors_see_the_linen_modules_row_24():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    seen = []

    def intercept(f, args, kwargs, context):
        seen.append("/".join(context.module.path))
        return f(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model(X)
    assert seen == ["", "Conv_0", "BatchNorm_0", "Dropout_0", "Dense_0"]


def test_intermediates_are_captured_row_24():
    model, module, variables = both(CNN)
    _, updates = module.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    model(X, capture_intermediates=True, mutable=["intermediates"])
    captured = nnx.to_pure_dict(nnx.pop(model, nnx.Intermediate))
    assert_trees_equal(captured, updates["intermediates"])


class Losses(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "seen", x)
        self.sow("mtp_losses", "loss", x.sum())
        return x


def test_pop_takes_one_collection_row_48():
    model = ToNNX(Losses())
    model(X, mutable=["intermediates", "mtp_losses"])
    assert list(nnx.pop(model, nnx.Intermediate)) == ["seen"]
    popped = nnx.pop(model, nnx.variable_type_from_name("mtp_losses"))
    assert_trees_equal(popped["loss"].get_value(), (X.sum(),))
    assert variables_of(model) == {}


@pytest.mark.slow
def test_collections_can_be_registered_again_and_pickled_row_49():
    def cell():
        class Losses(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x + self.variable("row_49", "n", lambda: jnp.ones(())).value

        return ToNNX(Losses(), nnx.Rngs(0)).lazy_init(X)

    first, second = cell(), cell()
    assert type(first.n) is type(second.n)
    model = ToNNX(Counter(), nnx.Rngs(0)).lazy_init(X)
    model(X)
    code = (
        "import sys, pickle; m = pickle.load(sys.stdin.buffer); import bridge, nnx_core as nnx;"
        "print(type(m.n) is nnx.variable_type_from_name('counts'), float(m.n[...]), list(bridge.variables_of(m)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True, cwd=ROOT, check=False
    )
    assert run.stdout.decode().split("\n")[0] == "True 1.0 ['counts']", run.stderr.decode()


ROOT = pathlib.Path(__file__).parents[3]


def test_a_stale_graphdef_names_the_paths_row_50():
    model = ToNNX(CNN(), nnx.Rngs(0))
    stale = nnx.graphdef(model)
    state = nnx.state(model.lazy_init(X))
    with pytest.raises(nnx.NnxError, match=r"(?s)In the state, but not in the graph:.*Dense_0\.bias.*Conv_0\.kernel"):
        nnx.merge(stale, state)
    del state["Conv_0"]["kernel"]
    with pytest.raises(nnx.NnxError, match=r"Missing from the state:\n  Conv_0\.kernel\n"):
        nnx.merge(nnx.graphdef(model), state)


def test_paths_are_chosen_by_regular_expression_row_50():
    model = ToNNX(CNN(), nnx.Rngs(0)).lazy_init(X)
    _, norm, kernels, _rest = nnx.split(model, re.compile("BatchNorm_0/.*"), re.compile(".*/kernel"), ...)
    assert {path for path, _ in nnx.to_flat_state(kernels)} == {("Conv_0", "kernel"), ("Dense_0", "kernel")}
    assert sorted(norm["BatchNorm_0"]) == ["bias", "mean", "scale", "var"]
