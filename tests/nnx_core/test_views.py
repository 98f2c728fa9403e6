"""view, view_info, with_attributes: other static attributes, the same Variables."""

import jax.numpy as jnp
import pytest

import nnx_core as nnx
from nnx_core import modes
from nnx_core._errors import AttributeNotFoundError, SharedReferenceError
from nnx_core.module import iter_module_children
from nnx_core.views import UnusedKeysError, view, view_info, with_attributes
from tests.strategies import Affine, Tied, portrait, variables_of

flax_nnx = pytest.importorskip("flax.nnx", reason="the oracle of this file")


def block(n):
    class Block(n.Module):
        def __init__(self):
            self.linear = n.Linear(2, 3, rngs=n.Rngs(0))
            self.dropout = n.Dropout(0.5)
            self.bn = n.BatchNorm(3, rngs=n.Rngs(0))

    return Block()


N = pytest.mark.parametrize(
    ("n", "view", "with_attributes"),
    [(nnx, view, with_attributes), (flax_nnx, flax_nnx.view, flax_nnx.with_attributes)],
    ids=["nnx_core", "flax"],
)


@N
def test_documented_behaviour(n, view, with_attributes):
    b = block(n)
    for f in (view, with_attributes):
        new = f(b, deterministic=True, use_running_average=True)
        assert (new.dropout.deterministic, new.bn.use_running_average) == (True, True)
        assert (b.dropout.deterministic, b.bn.use_running_average) == (False, False)
        assert new.linear.kernel is b.linear.kernel
        assert new.linear is not b.linear
        some = f(b, only=n.Dropout, deterministic=True)
        assert some.dropout.deterministic
        first, again = f([b, b], deterministic=True)
        assert first is again
        f(b, nope=1, raise_if_not_found=False)
    with pytest.raises(ValueError, match=r"Unused keys found in nnx.view: \['nope'\]"):
        view(b, nope=1, deterministic=True)
    with pytest.raises(ValueError, match=r"Could not find at least one instance .*: \['nada', 'nope'\]"):
        with_attributes(b, nope=1, nada=2, deterministic=True)
    with pytest.raises(ValueError, match="features"):
        with_attributes(b, only=n.Dropout, num_features=7)


def test_errors_say_what_to_do():
    with pytest.raises(UnusedKeysError, match=r"the modules take \['deterministic', 'use_running_average'\]"):
        view(block(nnx), nope=1)
    with pytest.raises(AttributeNotFoundError, match="raise_if_not_found=False"):
        with_attributes(block(nnx), nope=1)
    for f in (view, with_attributes):
        with pytest.raises(SharedReferenceError, match="graph=False"):
            f(Tied(), graph=False, raise_if_not_found=False)
        with modes.set_graph_mode(False), pytest.raises(SharedReferenceError, match="graph=False"):
            f(Tied(), raise_if_not_found=False)
    with pytest.raises(SharedReferenceError, match="graph=False"):
        view_info(Tied(), graph=False)


def test_a_view_shares_variables_and_touches_nothing():
    model = Tied()
    before = portrait(model)
    new = with_attributes(model, n_out=7)
    assert new.encode is new.decode is new.layers[0] is not model.encode
    assert [id(v) for v in variables_of(new)] == [id(v) for v in variables_of(model)]
    assert new.encode.n_out == 7
    assert portrait(model) == before
    new(jnp.ones((1, 3)))
    assert int(model.encode.calls[...]) == 2


def test_set_view_gets_what_it_takes():
    seen = []

    class Plain(nnx.Module):
        def set_view(self, mode=None):
            seen.append(mode)

    class Greedy(nnx.Module):
        def __init__(self):
            self.inner = Plain()

        def set_view(self, **kwargs):
            seen.append(kwargs)
            return {k: v for k, v in kwargs.items() if k != "mine"}

    view(Greedy(), mode=1, mine=2)
    assert seen == [1, {"mode": 1, "mine": 2}]
    with pytest.raises(UnusedKeysError, match=r"\['other'\]"):
        view(Greedy(), other=3)


def views(n):
    class Undocumented(n.Module):
        def set_view(self, mode: str | None = None, **kwargs): ...

    class Documented(n.Module):
        def __init__(self):
            self.sub = Undocumented()
            self.again = Undocumented()

        def set_view(self, mode: str | None = None, **kwargs):
            """Sets.

            Args:
              mode: the mode,
                longer.
            """

    return Documented()


def test_view_info_as_flax_nnx():
    assert view_info(views(nnx)) == flax_nnx.view_info(views(flax_nnx))
    assert "Undocumented" not in view_info(views(nnx), only=lambda path, x: not path)
    assert view_info(Affine()) == ""


def test_iter_module_children():
    for n, children in ((nnx, iter_module_children), (flax_nnx, flax_nnx.iter_module_children)):
        assert [key for key, _ in children(block(n))] == ["bn", "dropout", "linear"]
        assert [key for key, _ in children([block(n), block(n)])] == [0, 1]
        assert list(children(n.Linear(2, 3, rngs=n.Rngs(0)))) == []
