"""grad, value_and_grad and remat.

Law: gradients are those of jax.grad with respect to the chosen leaves, each Variable once, however often it is
reached; everything else the function writes to its arguments is written. Of an argument that holds objects these are
the Params, as a State; where the user forbids sharing or structure changes they are all leaves, and the gradient is
what the argument is: `jax.tree.map(step, model, gradient)`.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core._errors import NotDifferentiableError, Path, SpecError
from nnx_core.graph.pack import Leaves, Refs, reader
from nnx_core.graph.structure import GraphDef, leaf_defs
from nnx_core.graph.unpack import Unpacker
from nnx_core.kinds import Param
from nnx_core.transforms.carry import described
from nnx_core.transforms.compile import plainly, static_at
from nnx_core.transforms.gradients import (
    as_states,
    holds_object,
    no_leaves,
    position_of,
    shape_and_dtype,
    variables_matching,
    with_aux,
)
from nnx_core.transforms.groups import Diff, DiffState, Out, Rest
from nnx_core.transforms.lift import (
    Form,
    Forms,
    Lifted,
    Modes,
    arguments_of,
    by_count,
    dressed,
    name_of,
    optional_decorator,
    positional,
    positions,
    unbound,
)
from nnx_core.variables import Variable

_GROUPS: tuple[Hashable, ...] = (Diff, Rest, Out)
_Argnums = int | DiffState | Sequence[int | DiffState]


class _Gradient(Forms[tuple[Any, ...], Lifted]):
    """value_and_grad of one function: for the specs of each argument a Lifted.

    Args:
      argnums: as the user gave them, not counting the owner.
      options: for `jax.value_and_grad`.
    """

    def __init__(self, f: Callable[..., Any], argnums: _Argnums, has_aux: bool, options: dict[str, Any], modes: Modes):
        super().__init__()
        self.f, self.owner = unbound(f)
        self.has_aux, self.options, self.modes = has_aux, options, modes
        self.is_whole = modes != Modes()
        self.single = not isinstance(argnums, list | tuple)
        several: Sequence[int | DiffState] = argnums if isinstance(argnums, list | tuple) else (argnums,)
        _require_positions(several)
        self.argnums = [_shifted(argnum, len(self.owner)) for argnum in several]

    def make(self, specs: tuple[Any, ...]) -> Lifted:
        """f with these specs of its arguments."""
        f, has_aux = self.f, self.has_aux

        def loss(*args: Any) -> Any:
            out = f(*args)
            if has_aux:
                return with_aux(f, out, "loss")
            return out.get_value() if isinstance(out, Variable) else out

        functools.update_wrapper(loss, f, updated=())
        outputs = (Out, Rest) if has_aux else Out
        return Lifted(loss, _GROUPS, specs, outputs, first_decides=True, modes=self.modes)

    def specs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The spec of each argument: see the law above; of what holds no objects all leaves are differentiated."""
        specs: list[Any] = [Rest] * len(args)
        for argnum in self.argnums:
            number = position_of(argnum)
            if not -len(args) <= number < len(args):
                raise SpecError(
                    f"argnums {number} is out of range: {name_of(self.f)} was called with {len(args)} arguments by"
                    f" position. Expected {-len(args)} to {len(args) - 1}."
                )
            if isinstance(argnum, DiffState):
                specs[number] = variables_matching(argnum.filter)
            elif not self.is_whole and holds_object(args[number]):
                specs[number] = variables_matching(Param)
            else:
                specs[number] = Diff
        return tuple(specs)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args = positional(self.f, (*self.owner, *args), kwargs)
        lifted = self[self.specs(args)]
        gradients: list[Any] = []  # what `run` has beside what it returns

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            def loss_of(diff: Leaves) -> tuple[Any, tuple[Any, ...]]:
                after, diff, rest_after, (values, loose) = lifted.pure(graphdef, diff, rest, ([], []))
                if values or len(loose) != 1:
                    raise SpecError(
                        f"{name_of(self.f)} must return a scalar loss, found {described(after.result.root)}.\n"
                        "Return one number, or (loss, aux) with has_aux=True."
                    )
                return loose[0], (after, diff, rest_after)

            try:
                (loss, after), cotangents = jax.value_and_grad(loss_of, has_aux=True, **self.options)(diff)
            except TypeError as error:
                raise self.not_differentiable(graphdef, diff) or error from None
            gradients.extend(self.chosen(graphdef, cotangents))
            return *after, ([], [loss])

        value = lifted.call(run, args, {})
        return value, gradients[0] if self.single else tuple(gradients)

    def chosen(self, graphdef: GraphDef, cotangents: Leaves) -> list[Any]:
        """The gradient for each of `argnums`."""
        parts = _by_argument(graphdef, cotangents)
        wholes: tuple[Any, ...] = ()
        if self.is_whole:
            wholes = Unpacker((cotangents, *no_leaves(2)), Refs()).build(arguments_of(graphdef), None)
        gradients: list[Any] = []
        for argnum in self.argnums:
            is_part = isinstance(argnum, DiffState) or not self.is_whole
            gradients.append((parts if is_part else wholes)[position_of(argnum)])
        return gradients

    def not_differentiable(self, graphdef: GraphDef, diff: Leaves) -> NotDifferentiableError | None:
        """What JAX means if it refuses integers among the leaves: it does so before it calls f."""
        if self.options["allow_int"]:
            return None
        read, group = reader(diff), _GROUPS.index(Diff)
        dtypes: list[tuple[Path, str]] = []
        for path, leaf in leaf_defs(arguments_of(graphdef)):
            for x in jax.tree.leaves(read(leaf)) if leaf.group == group else ():
                _, dtype = shape_and_dtype(x)
                if not jnp.issubdtype(dtype, jnp.inexact):
                    dtypes.append((("args", *path), str(dtype)))
        return NotDifferentiableError(dtypes) if dtypes else None


def _require_positions(argnums: Sequence[Any]) -> None:
    for argnum in argnums:
        is_position = hasattr(argnum, "__index__") and not isinstance(argnum, Variable)
        if not is_position and not isinstance(argnum, DiffState):
            raise SpecError(
                f"argnums: expected positions of arguments or DiffStates, found a {type(argnum).__name__}.\n"
                "Name the argument by its position, and a part of it by nnx.DiffState(position, filter)."
            )


def _shifted(argnum: int | DiffState, by: int) -> int | DiffState:
    """`argnum` among all arguments, where the user does not count the first `by`; negative ones count from the end."""
    number = position_of(argnum)
    if number >= 0:
        number += by
    return DiffState(number, argnum.filter) if isinstance(argnum, DiffState) else number


def _by_argument(graphdef: GraphDef, cotangents: Leaves) -> list[Any]:
    """The gradient of each positional argument, None where none was asked for."""
    read, diff = reader(cotangents), _GROUPS.index(Diff)
    return [as_states(d, read, lambda leaf: leaf.group == diff) for d in arguments_of(graphdef).children]


@optional_decorator
def value_and_grad(
    f: Callable[..., Any],
    *,
    argnums: int | DiffState | Sequence[int | DiffState] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` for functions of modules.

    Args:
      f: returns a scalar loss, or (loss, aux) with `has_aux`.
      argnums: which arguments: a position, or a `DiffState` with the Variables of it (Param by default).
      graph, graph_updates: False forbids sharing; structure changes. Then gradients are taken of all leaves of an
        argument, not of its Params alone, and have its own type; a `DiffState` names a part, as ever.

    Returns:
      A function that returns (value of f, gradient): a State of Variables for a module, else as jax.grad.

    Raises:
      NotDifferentiableError: naming the leaves that are integers or keys, without `allow_int`.
      SpecError: if `argnums` names no argument, or f returns no scalar.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss, grads = nnx.value_and_grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
      >>> grads["kernel"][...].tolist()
      [[1.0], [1.0]]
    """
    options = {"holomorphic": holomorphic, "allow_int": allow_int}
    gradient = _Gradient(f, argnums, has_aux, options, Modes.of(graph, graph_updates))

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return gradient(*args, **kwargs)

    return dressed(call, f)


@optional_decorator
def grad(
    f: Callable[..., Any],
    *,
    argnums: int | DiffState | Sequence[int | DiffState] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.grad` for functions of modules: like `value_and_grad`, without the value.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> nnx.grad(lambda m, x: m(x).sum())(model, jnp.ones((1, 2)))
      State({'bias': Param(float32[1] [1.]), 'kernel': Param(float32[2,1] [[1.], [1.]])})
      >>> gradient = nnx.grad(lambda m, x: m(x).sum(), graph=False)(model, jnp.ones((1, 2)))
      >>> type(gradient).__name__, gradient.kernel[...].tolist()
      ('Linear', [[1.0], [1.0]])
    """
    options = {"holomorphic": holomorphic, "allow_int": allow_int}
    gradient = _Gradient(f, argnums, has_aux, options, Modes.of(graph, graph_updates))

    def call(*args: Any, **kwargs: Any) -> Any:
        value, gradients = gradient(*args, **kwargs)
        if not has_aux:
            return gradients
        _, aux = value
        return gradients, aux

    return dressed(call, f)


@optional_decorator
def remat(
    f: Callable[..., Any],
    *,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.checkpoint` for functions of modules: activations of `f` are recomputed in the backward pass.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> nnx.remat(lambda m, x: m(x))(model, jnp.ones((1, 2))).shape
      (1, 1)
    """
    function, owner = unbound(f)
    modes = Modes.of(graph, graph_updates)

    def make(count: int) -> Form:
        static = positions(static_argnums, count, len(owner))
        lifted = plainly(function, modes, static_at(static, count))

        def run(*packed: Any) -> Any:
            # A new function each time: JAX keeps the trace of one it has seen, and with it what that closed over.
            result = jax.checkpoint(lifted.named, prevent_cse=prevent_cse, policy=policy)(*packed)
            return jax.tree.map(_no_literal, result)

        return Form(lifted, run)

    return by_count(f, make)


def _no_literal(x: Any) -> Any:
    """`x` as an array of JAX where `jax.checkpoint` hands back a constant as it stands in the program: a class of
    JAX's own, derived from numpy's, which has no `.at` and may be written to."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) and type(x) is not np.ndarray else x
