"""What a layer was fed and returned, against plain arithmetic; also where a transform traces it."""

import jax
import numpy as np

import nnx_core as nnx
from bridge.equivalence.drawing import Draw
from bridge.equivalence.recording import fields_of, record
from bridge.equivalence.subjects import subject_of
from tests.support.compared_models import LinenStack, X, linen, linen_stack, native


def events_of(model, x, feed=None, **kwargs):
    subject = subject_of(model, "__call__", "a")
    return record(subject, subject.values, None, (x,), kwargs, feed)


def test_steps_and_lanes_hold_the_numbers_of_their_layers():
    x = Draw(0).array(X)
    params = jax.tree.map(np.asarray, linen_stack()[1]["params"])
    events = events_of(linen_stack(), x)
    rounds = [event for event in events if event.path == ("rounds", "fc")]
    assert [event.call for event in rounds] == [1, 2, 3]  # the trace that finds out shapes is in no record
    h = x
    for n, event in enumerate(rounds):
        np.testing.assert_allclose(event.inputs[0][0], h, rtol=1e-5, atol=1e-6)
        h = h @ params["rounds"]["fc"]["kernel"][n] + params["rounds"]["fc"]["bias"][n]
        np.testing.assert_allclose(event.outputs[0][0], h, rtol=1e-5, atol=1e-6)
        h = np.tanh(h)
    [heads] = [event for event in events if event.path == ("heads",)]
    assert heads.lanes == 2
    for n, lane in enumerate(heads.outputs[0]):
        np.testing.assert_allclose(lane, h @ params["heads"]["kernel"][n] + params["heads"]["bias"][n], rtol=1e-5)


class Transformed(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.remat(lambda layer, x: layer(x))(self.fc, x)
        x = nnx.jit(lambda layer, x: layer(x))(self.fc, x)
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(self.fc, x)


def test_transforms_of_nnx():
    model, x = Transformed(nnx.Rngs(0)), Draw(0).array(X)
    kernel = np.asarray(model.fc.kernel.get_value())
    remat, jit, vmap = [event for event in events_of(model, x) if event.path == ("fc",)]
    np.testing.assert_allclose(remat.outputs[0][0], x @ kernel, rtol=1e-5)
    np.testing.assert_allclose(jit.outputs[0][0], x @ kernel @ kernel, rtol=1e-5)
    np.testing.assert_allclose(np.stack(vmap.outputs[0]), x @ kernel @ kernel @ kernel, rtol=1e-4, atol=1e-6)
    assert "recorded:" not in str(nnx.graphdef(model))


def test_a_layer_is_fed_what_it_is_told():
    x = Draw(0).array(X)
    other = np.ones((3, 6), "float32")
    [event] = [event for event in events_of(native(), x, {(("d",), "__call__", 0): [other]}) if event.path == ("d",)]
    kernel = np.asarray(native().d.kernel.get_value())
    assert event.is_fed
    np.testing.assert_allclose(event.outputs[0][0], other @ kernel, rtol=1e-5)
    assert not np.allclose(event.inputs[0][0], other)  # what it would have been fed
    [event] = [event for event in events_of(native(), x, {(("d",), "__call__", 0): [x]}) if event.path == ("d",)]
    assert not event.is_fed  # of another shape


def test_modes_and_options():
    by_path = {event.path: event for event in events_of(linen(), Draw(0).array(X), train=True)}
    assert by_path["bn",].trains is True
    assert by_path["up",].trains is None
    assert by_path[()].trains is True
    assert fields_of(by_path["ln",].layer)["epsilon"] == 1e-6
    assert fields_of(nnx.Conv(1, 1, (3,), padding="VALID", rngs=nnx.Rngs(0)))["padding"] == "VALID"
    assert fields_of(LinenStack()) == {}
