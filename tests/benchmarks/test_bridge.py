"""The benchmark of the bridge: its variants agree, its counts are right, its report is whole. Times are not tested."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import bridge
import nnx_core as nnx
from benchmarks import bridge as benchmark
from benchmarks import dispatch
from benchmarks.__main__ import app


@pytest.mark.slow
def test_the_command_prints_every_figure_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new" / "bridge.json"
    app(["bridge", "--repeats", "1", "--layers", "2", "--json", str(out)], standalone_mode=False)
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    figures = {row["figure"]: row for row in written["figures"]}
    goals = {name: row["goal"] for name, row in figures.items() if row["goal"] is not None}
    assert goals == {
        "ToNNX, jit / Linen": 1.2,
        "ToNNX, eager / Linen": 1.05,
        "ToNNX per layer, jit / Linen": 1.2,
        "ToLinen, eager / NNX": 1.3,
        "FromFlax, jit / nnx_core": 1.2,
        "FromFlax, eager / flax.nnx": 1.3,
        "AsFlax, jit / flax.nnx": 1.2,
        "AsFlax, eager / nnx_core": 1.3,
        "ToNNX, training step / Linen": 1.5,
        "ToLinen, equations / NNX's": 1.0,
        "ToLinen per layer, equations / NNX's": 1.0,
        "ToNNX, tracing / Linen": 1.2,
        "ToLinen, tracing / Linen": 1.2,
    }
    assert all(name in printed for name in figures)
    assert all(row["found"] > 0 for row in figures.values())
    assert all(
        row["flax"] > 0 for row in figures.values() if "From" not in row["figure"] and "AsF" not in row["figure"]
    )
    assert all(row["met"] is (None if row["goal"] is None else row["found"] <= row["goal"]) for row in figures.values())


def test_row_25_a_compiled_apply_has_no_more_equations_than_nnx():
    assert all(figure.met for figure in benchmark.compiled_sizes(layers=2))


def test_inner_equations_are_counted():
    def f(x):
        return jax.jit(jnp.sin)(x) + 1.0

    assert benchmark.equations(jax.make_jaxpr(f)(1.0)) == 3  # jit, sin inside, add


def test_variants_that_differ_are_not_timed():
    steps = {"a": lambda: jnp.ones(2), "b": lambda: jnp.zeros(2)}
    with pytest.raises(AssertionError, match="values differ"):
        benchmark.check(steps)


def test_all_variants_compute_the_same():
    task = dispatch.problem(2)
    with dispatch.full_precision():
        benchmark.check(benchmark.in_nnx(benchmark.whole_in_nnx, task, jit=True))
        benchmark.check(benchmark.in_linen(benchmark.whole_in_linen, task, jit=False))


def test_row_42_a_bridged_training_step_runs_no_python_of_the_model():
    """What makes the steady step cheap: from the second call on neither Linen nor the graph is walked."""
    calls = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append("call")
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    x = jnp.arange(6.0).reshape(2, 3)
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(x)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer))]
    calls.clear()
    losses += [float(step(model, optimizer)) for _ in range(3)]
    assert not calls
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4, "nothing was trained"
