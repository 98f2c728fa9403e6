"""grad, value_and_grad and remat.

Law: gradients are those of jax.grad with respect to the chosen leaves, each Variable once, however often it is
reached; everything else the function writes to its arguments is written.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from nnx_core._errors import Path, SpecError
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import AS_STATIC, Leaves
from nnx_core.graph.structure import Element, GraphDef, Leaf, Node, VariableDef, nodes
from nnx_core.kinds import Param
from nnx_core.state import State
from nnx_core.transforms.carry import described
from nnx_core.transforms.compile import PLAIN
from nnx_core.transforms.groups import Diff, DiffState, FilterGroups, Out, Rest
from nnx_core.transforms.lift import Lifted, Modes, dressed, name_of, optional_decorator, positional, unbound
from nnx_core.variables import Variable, new_variable, thaw_metadata

_GROUPS: tuple[Hashable, ...] = (Diff, Rest, Out)


def holds_object(x: Any) -> bool:
    """Whether only the Params in `x` are differentiated; of States, Variables and arrays everything is."""
    return any(isinstance(leaf, Object) for leaf in jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, Object)))


def _wanted(argnums: tuple[int | DiffState, ...], args: tuple[Any, ...], f: Callable[..., Any]) -> tuple[Any, ...]:
    """The spec of each argument."""
    specs: list[Any] = [Rest] * len(args)
    for argnum in argnums:
        number = argnum.argnum if isinstance(argnum, DiffState) else argnum
        if not -len(args) <= number < len(args):
            raise SpecError(
                f"argnums {number} is out of range: {name_of(f)} was called with {len(args)} arguments by position."
                f" Expected {-len(args)} to {len(args) - 1}."
            )
        if isinstance(argnum, DiffState):
            specs[number] = FilterGroups(((argnum.filter, Diff), (..., Rest)))
        elif holds_object(args[number]):
            specs[number] = FilterGroups(((Param, Diff), (..., Rest)))
        else:
            specs[number] = Diff
    return tuple(specs)


class _Gradient:
    """value_and_grad of one function: for each form of the arguments a Lifted."""

    def __init__(self, f: Callable[..., Any], argnums: Any, has_aux: bool, options: dict[str, Any], modes: Modes):
        self.f, self.has_aux, self.options, self.modes = f, has_aux, options, modes
        self.single = not isinstance(argnums, Sequence)
        self.argnums: tuple[int | DiffState, ...] = (argnums,) if self.single else tuple(argnums)
        self.forms: dict[Any, Lifted] = {}

    def form(self, args: tuple[Any, ...]) -> Lifted:
        specs = _wanted(self.argnums, args, self.f)
        if specs not in self.forms:
            outputs = (Out, Rest) if self.has_aux else Out
            self.forms[specs] = Lifted(self.f_of_loss, _GROUPS, specs, outputs, modes=self.modes)
        return self.forms[specs]

    def f_of_loss(self, *args: Any) -> Any:
        out = self.f(*args)
        if not self.has_aux:
            return out.get_value() if isinstance(out, Variable) else out
        if not isinstance(out, tuple) or len(out) != 2:
            raise SpecError(
                f"{name_of(self.f)} has_aux=True: expected (loss, aux), found {type(out).__name__}."
                " Return a pair, or leave has_aux out."
            )
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args = positional(self.f, args, kwargs)
        lifted = self.form(args)
        gradients: list[Any] = []

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            def loss_of(diff: Leaves) -> tuple[Any, tuple[Any, ...]]:
                after, diff, rest_after, (values, loose) = lifted.pure(graphdef, diff, rest, ([], []))
                if values or len(loose) != 1:
                    raise SpecError(
                        f"{name_of(self.f)} must return a scalar loss, found {described(after.result.root)}.\n"
                        "Return one number, or (loss, aux) with has_aux=True."
                    )
                return loose[0], (after, diff, rest_after)

            (loss, after), cotangents = jax.value_and_grad(loss_of, has_aux=True, **self.options)(diff)
            gradients.extend(_by_argument(graphdef, cotangents))
            return *after, ([], [loss])

        value = lifted.call(run, args, {})
        numbers = [a.argnum if isinstance(a, DiffState) else a for a in self.argnums]
        chosen = tuple(gradients[n] for n in numbers)
        return value, chosen[0] if self.single else chosen


def _by_argument(graphdef: GraphDef, cotangents: Leaves) -> Iterator[Any]:
    """The gradient of each positional argument, None where none was asked for."""
    values, loose = map(iter, cotangents)
    root = graphdef.root
    assert type(root) is Node and type(root.children[0]) is Node  # noqa: PT018  # pack made it
    for child in root.children[0].children:
        yield _gradient(child, values, loose)


def _gradient(d: Element, values: Iterator[Any], loose: Iterator[Any]) -> Any:
    if type(d) is VariableDef:
        return new_variable(d.kind, next(values), thaw_metadata(d.metadata)) if d.group == 0 else None
    if type(d) is Leaf:
        return next(values if d.owned else loose) if d.group == 0 else None
    if type(d) is not Node:
        return None
    if d.id is not None or issubclass(d.kind, State):
        return State(_leaf_gradients(d, values))
    children = [_gradient(child, values, loose) for child in d.children]
    if d.kind is dict:
        return dict(zip(d.keys, children, strict=True))
    return d.rebuild(children)


def _leaf_gradients(d: Node, values: Iterator[Any]) -> Iterator[tuple[Path, Any]]:
    for path, leaf in nodes(d):
        if type(leaf) is VariableDef and leaf.group == 0:
            yield path, new_variable(leaf.kind, next(values), thaw_metadata(leaf.metadata))
        elif type(leaf) is Leaf and leaf.group == 0:
            yield path, next(values)


def _make(f: Callable[..., Any], options: dict[str, Any], pick: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    function, owner = unbound(f)
    argnums, has_aux = options.pop("argnums"), options.pop("has_aux")
    if owner:
        argnums = _shift(argnums, len(owner))
    options.pop("reduce_axes")
    modes = Modes.of(options.pop("graph"), options.pop("graph_updates"))
    gradient = _Gradient(function, argnums, has_aux, options, modes)

    def call(*args: Any, **kwargs: Any) -> Any:
        return pick(*gradient(*owner, *args, **kwargs))

    return dressed(call, f)


def _shift(argnums: Any, by: int) -> Any:
    if isinstance(argnums, DiffState):
        return DiffState(argnums.argnum + by, argnums.filter)
    return argnums + by if isinstance(argnums, int) else tuple(_shift(a, by) for a in argnums)


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
      graph, graph_updates: False forbids sharing; structure changes.

    Returns:
      A function that returns (value of f, gradient): a State of Variables for a module, else as jax.grad.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss, grads = nnx.value_and_grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
      >>> grads["kernel"][...].tolist()
      [[1.0], [1.0]]
    """
    given = locals()
    options = {k: given[k] for k in given if k != "f"}
    return _make(f, options, lambda value, grads: (value, grads))


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
    """
    given = locals()
    options = {k: given[k] for k in given if k != "f"}
    if has_aux:
        return _make(f, options, lambda value, grads: (grads, value[1]))
    return _make(f, options, lambda value, grads: grads)


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
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    modes = Modes.of(graph, graph_updates)
    forms: dict[int, tuple[Lifted, Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        args = (*owner, *args)
        if len(args) not in forms:
            fixed = {n + len(owner) if n >= 0 else n + len(args) for n in static}
            inputs = tuple(AS_STATIC if i in fixed else PLAIN for i in range(len(args)))
            lifted = Lifted(function, (PLAIN,), inputs, PLAIN, PLAIN, modes=modes)
            forms[len(args)] = lifted, jax.checkpoint(lifted.pure, prevent_cse=prevent_cse, policy=policy)
        lifted, run = forms[len(args)]
        return lifted.call(run, args, kwargs)

    return dressed(call, f)
