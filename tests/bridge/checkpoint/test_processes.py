"""load_into and save_as_linen in a job of two processes, with eight devices: each reads and writes its own shards."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import nnx_core as nnx
from bridge.checkpoint.in_memory import train_state_to_nnx
from tests.support.processes import run_processes
from tests.support.sharded_job import MESHES, RULES, Net, linen_state, make
from tests.support.training import saved
from tests.tolerance import assert_trees_equal

JOB = "tests.support.sharded_job"


@jax.jit
def linen_step(state):
    x = jax.random.normal(jax.random.key(5), (8, 16))

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = Net().apply(variables, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)).mean(), updated

    grads, updated = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updated)


@pytest.fixture(scope="module")
def trained():
    state = linen_state()
    for _ in range(3):
        state = linen_step(state)
    return state


def known_arrays(file, state):
    """The same state in a model in memory, by path."""
    model, optimizer = make()
    train_state_to_nnx(state, model, optimizer, rules=RULES)
    both = [("model", model), ("optimizer", optimizer)]
    flat = [(root, path, v) for root, thing in both for path, v in nnx.to_flat_state(nnx.state(thing))]
    values = {
        "/".join([root, *map(str, path)]): np.asarray(v.get_raw_value())
        for root, path, v in flat
        if not isinstance(v, nnx.RngState)
    }
    np.savez(file, **values)
    return file


@pytest.fixture(scope="module")
def job(trained, tmp_path_factory):
    """What the processes read: the checkpoint, and the arrays that the model must get of it."""
    folder = tmp_path_factory.mktemp("job")
    return saved(folder / "linen", trained), known_arrays(folder / "known.npz", trained)


@pytest.mark.slow
def test_two_processes_load_and_save(tmp_path, trained, job):
    run_processes(JOB, *job, tmp_path / "back")
    for name in MESHES:
        with ocp.StandardCheckpointer() as saver:
            back = saver.restore(tmp_path / f"back-{name}", target=linen_state(seed=2))
        back = back.replace(tx=trained.tx)
        assert_trees_equal(plain(back), plain(trained))
        assert_trees_equal(plain(linen_step(back)), plain(linen_step(trained)))


def plain(state):
    """On the host; the step as a number, which it is in a TrainState that never went through jit."""
    return jax.tree.map(np.asarray, state.replace(step=int(state.step), tx=None))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_job_of_which_a_process_dies_fails_and_does_not_hang(tmp_path, job, dies):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"process {dies} ended with 7"):
        run_processes(JOB, *job, tmp_path / "back", dies)
    assert time.monotonic() - start < 120


def test_a_job_that_takes_too_long_is_killed(tmp_path, job):
    with pytest.raises(AssertionError, match=r"still running after 0\.1 seconds"):
        run_processes(JOB, *job, tmp_path / "back", timeout=0.1)
    assert list(tmp_path.iterdir()) == []
