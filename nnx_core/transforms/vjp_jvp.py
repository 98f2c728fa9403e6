"""vjp and jvp.

Law: on arrays they are JAX's own; a module among the arguments is differentiated with respect to every Variable
of it, each once, and tangents and cotangents of it are modules (or States) of the same form. What f writes to
its arguments is written. Integers and keys have no gradient: theirs is `float0`, and what is given for them is
ignored.

The value that is differentiated crosses JAX *detached*: packed under indices of its own, so that a result that
contains the arguments themselves has a cotangent too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from nnx_core.graph.pack import Leaves, Refs
from nnx_core.graph.structure import GraphDef
from nnx_core.graph.unpack import Unpacker
from nnx_core.transforms.gradients import fitted, no_leaves, with_aux
from nnx_core.transforms.groups import Diff, Out, Rest
from nnx_core.transforms.lift import (
    Forms,
    Lifted,
    Modes,
    arguments_of,
    attached,
    detached,
    dressed,
    name_of,
    positional,
    unbound,
)


class _Differential(Forms[int, Lifted]):
    """f lifted for vjp and jvp, for each number of primals.

    The object of a bound method is not differentiated, but written.
    """

    def __init__(self, f: Callable[..., Any], has_aux: bool, modes: Modes):
        super().__init__()
        self.f, self.owner = unbound(f)
        self.has_aux, self.modes = has_aux, modes

    def make(self, count: int) -> Lifted:
        """f of `count` primals: it returns (value, aux, detached value)."""
        f, has_aux = self.f, self.has_aux

        def with_detached(*args: Any) -> tuple[Any, Any, Any]:
            out = f(*args)
            value, aux = with_aux(f, out, "value") if has_aux else (out, None)
            return value, aux, detached(value)

        functools.update_wrapper(with_detached, f, updated=())
        inputs = (Rest,) * len(self.owner) + (Diff,) * count
        return Lifted(with_detached, (Diff, Rest, Out), inputs, (Rest, Rest, Out), modes=self.modes)

    def vjp(self, primals: tuple[Any, ...]) -> tuple[Any, ...]:
        lifted = self[len(primals)]
        kept: list[Any] = []  # what `run` has beside what it returns

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            value, pullback, after = jax.vjp(_pure(lifted, graphdef, rest), diff, has_aux=True)
            kept.extend((graphdef, pullback))
            return *after, ([], value)

        value, aux, (form, leaves) = lifted.call(run, (*self.owner, *primals), {})
        graphdef, pullback = kept

        def vjp_fn(cotangent: Any) -> tuple[Any, ...]:
            cotangents = fitted(form.root, cotangent, ("cotangent",), leaves)
            (gradient,) = pullback(jax.tree.leaves(cotangents))
            args = Unpacker((gradient, *no_leaves(2)), Refs()).unpack(arguments_of(graphdef), None)
            return tuple(args[len(self.owner) :])

        return (value, vjp_fn, aux) if self.has_aux else (value, vjp_fn)

    def jvp(self, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, ...]:
        lifted = self[len(primals)]
        tangent_leaves: list[Any] = []  # what `run` has beside what it returns

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            args = arguments_of(graphdef)
            own = args._replace(keys=args.keys[: len(primals)], children=args.children[len(self.owner) :])
            tangents_in = fitted(own, tuple(tangents), ("tangents",), diff)
            value, tangent, after = jax.jvp(_pure(lifted, graphdef, rest), (diff,), (tangents_in,), has_aux=True)
            tangent_leaves.extend(tangent)
            return *after, ([], value)

        value, aux, (form, leaves) = lifted.call(run, (*self.owner, *primals), {})
        tangent = attached(form, jax.tree.unflatten(jax.tree.structure(leaves), tangent_leaves))
        return (value, tangent, aux) if self.has_aux else (value, tangent)


def _pure(lifted: Lifted, graphdef: GraphDef, rest: Leaves) -> Callable[[Leaves], Any]:
    def value_of(diff: Leaves) -> tuple[Any, Any]:
        after, diff, rest_after, (_, value) = lifted.pure(graphdef, diff, rest, ([], []))
        return value, (after, diff, rest_after)

    return value_of


def vjp(
    f: Any = None,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.vjp` for functions of modules; without primals a decorator.

    Args:
      f: returns a value, or (value, aux) with `has_aux`. If it is a method of a module, the module is written
        but not differentiated.
      *primals: arrays, numbers, modules, Variables, and pytrees of these; every leaf is differentiated.
      reduce_axes: deprecated, must be empty.
      graph, graph_updates: False forbids sharing; structure changes.

    Returns:
      (value, vjp_fn), and aux with `has_aux`. `vjp_fn` takes a cotangent of the form of the value, where None
      is zero, and returns one gradient for each primal: for a module a module of gradients.

    Raises:
      SpecError: if the cotangent has another form; it names the path.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core.transforms.vjp_jvp import vjp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> value, vjp_fn = vjp(lambda m, x: m(x).sum(), model, jnp.ones((1, 2)))
      >>> m_grad, x_grad = vjp_fn(1.0)
      >>> m_grad.kernel[...].tolist(), x_grad.shape
      ([[1.0], [1.0]], (1, 2))
    """
    if reduce_axes:
        raise NotImplementedError("vjp: reduce_axes is deprecated in JAX and does nothing; leave it out.")
    modes = Modes.of(graph, graph_updates)
    if f is None or f is ...:
        return functools.partial(vjp, has_aux=has_aux, graph=graph, graph_updates=graph_updates)
    differential = _Differential(f, has_aux, modes)
    if primals:
        return differential.vjp(primals)

    def call(*args: Any, **kwargs: Any) -> Any:
        owner = differential.owner
        args = positional(differential.f, (*owner, *args), kwargs)
        return differential.vjp(args[len(owner) :])

    return dressed(call, f)


def jvp(
    f: Any = None,
    primals: tuple[Any, ...] | None = None,
    tangents: tuple[Any, ...] | None = None,
    *,
    has_aux: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.jvp` for functions of modules; without primals a decorator, whose result takes (primals, tangents).

    Args:
      f: returns a value, or (value, aux) with `has_aux`.
      primals: the arguments of `f`.
      tangents: of the form of the primals; for a module a module or State of tangents. None is zero.
      graph, graph_updates: False forbids sharing; structure changes.

    Returns:
      (value, tangent of the value), and aux with `has_aux`.

    Raises:
      SpecError: if the tangents have another form; it names the path.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> from nnx_core.transforms.vjp_jvp import jvp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tangents = jax.tree.map(jnp.ones_like, model), None
      >>> value, tangent = jvp(lambda m, x: m(x).sum(), (model, jnp.ones((1, 2))), tangents)
      >>> float(tangent)
      3.0
    """
    if f is None or f is ...:
        return functools.partial(jvp, has_aux=has_aux, graph=graph, graph_updates=graph_updates)
    differential = _Differential(f, has_aux, Modes.of(graph, graph_updates))
    if primals is not None:
        if tangents is None:
            raise TypeError(
                f"jvp of {name_of(f)}: expected tangents beside the primals, found none. Give one for each primal;"
                " None is zero."
            )
        return differential.jvp(tuple(primals), tangents)

    def call(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return differential.jvp(tuple(primals), tangents)

    return dressed(call, f)
