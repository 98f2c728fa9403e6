"""What ToLinen watches is what it was, and a public method is what it is for `nnx.capture` and `nnx.tabulate`."""

import jax
import pytest
from flax import linen as nn

from bridge.nnx_in_linen.wrapper import to_linen, to_linen_class
from nnx_core.graph.watched import public_methods
from tests.support.to_linen_models import X
from tests.support.watched_models import CALLED, CASES, Methods


def applied(cls):
    to_linen(cls).apply({})


def seen(cls):
    to_linen(cls).apply({}, capture_intermediates=True, mutable=["intermediates"])


def traced(cls):
    jax.eval_shape(lambda: to_linen(cls).apply({}) and None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("watch", [applied, seen, traced], ids=lambda watch: watch.__name__)
def test_a_module_in_linen_is_what_it_was(watch, case):
    case(watch)


def test_linen_sees_the_public_methods():
    names = []

    def interceptor(call, args, kwargs, context):
        names.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        to_linen(Methods).apply({}, X, mutable=["intermediates"])
    assert set(names) == CALLED
    # `train` is a method of ToLinen's own: it says in which mode the module is to be.
    own = vars(to_linen_class(Methods))
    assert set(public_methods(Methods)) - own.keys() == {"__call__", "train"}
