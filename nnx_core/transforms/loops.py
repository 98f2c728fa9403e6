"""scan, while_loop and fori_loop.

Law: `scan(f)` equals the Python loop over f, with every effect on the arguments. Leaves of the group Carry go
from step to step; leaves with an axis are sliced and what is written to them stacked; leaves without axis
(None) are the same in every step, and those that f writes go from step to step as well, but for random state:
that is the same in every step. Nothing else is carried, and of what is sliced only what was written is stacked again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import SpecError, StructureError
from nnx_core.graph.effects import After
from nnx_core.graph.pack import Leaves
from nnx_core.graph.structure import GraphDef, Leaf, VariableDef, leaf_defs
from nnx_core.kinds import RngState
from nnx_core.transforms.batch import AxisMetadata, axes_of_arguments, check_axes, mapping, with_axis_options
from nnx_core.transforms.carry import Route, carried, route, route_of
from nnx_core.transforms.groups import Carry, distinct
from nnx_core.transforms.lift import (
    Form,
    Lifted,
    Modes,
    arguments_of,
    by_count,
    by_position,
    name_of,
    optional_decorator,
    unbound,
)
from nnx_core.transforms.prefix import without_objects
from nnx_core.transforms.programs import traced_anew

#: The groups of a scan, by number; after these come the axes.
_CARRY, _SHARED = 0, 1


class _SharedWritten(Exception):
    """Signal to trace again: these positions of the group None are written, so they must be carried."""

    def __init__(self, positions: frozenset[int]):
        self.positions = positions


def _shared_positions(graphdef: GraphDef) -> dict[int, int]:
    """Index of each cell of the group None -> its position among the values of that group."""
    positions: dict[int, int] = {}
    for _, d in leaf_defs(graphdef.root):
        if d.group == _SHARED and not isinstance(d, Leaf):
            positions[d.id] = len(positions)
    return positions


def _written_shared(after: After) -> list[int]:
    """The cells of the group None that f wrote, in the order in which their values travel."""
    return [write.id for write in after.cells if write.group == _SHARED]


def _without_random_state(graphdef: GraphDef, after: After, news: list[Any]) -> tuple[After, list[Any]]:
    """(after, news) without the random state of the group None: each step draws the same keys, and none is counted."""
    cells = {d.id: d for _, d in leaf_defs(graphdef.root) if isinstance(d, VariableDef) and d.group == _SHARED}
    fixed = {index for index, d in cells.items() if issubclass(d.kind, RngState)}
    written = _written_shared(after)
    kept = tuple(write for write in after.cells if write.id not in fixed)
    made = news[len(written) :]
    values = [value for index, value in zip(written, news, strict=False) if index not in fixed]
    return dataclasses.replace(after, cells=kept), values + made


class _Scan:
    """One scanned function, for one number of arguments.

    What is written without axis has to go from step to step, but which that is shows only when f is traced. So the
    first trace of a structure carries nothing of the group None. If it turns out that f writes there, it is traced
    again with these positions carried, which are remembered: the next call does right at once.
    """

    def __init__(self, lifted: Lifted, options: dict[str, Any]):
        self.lifted, self.options = lifted, options
        self.threaded: dict[GraphDef, frozenset[int]] = {}
        self.axes: tuple[int, ...] = lifted.groups[2:]  # type: ignore[assignment]  # after Carry and None come axes

    def __call__(self, graphdef: GraphDef, carry: Leaves, shared: Leaves, *mapped: Leaves) -> tuple[Any, ...]:
        positions = self.threaded.get(graphdef, frozenset())
        while True:
            try:
                return traced_anew(functools.partial(self.run, positions), graphdef, carry, shared, mapped)
            except _SharedWritten as written:
                positions = self.threaded[graphdef] = written.positions

    def run(
        self, positions: frozenset[int], graphdef: GraphDef, carry: Leaves, shared: Leaves, mapped: tuple[Leaves, ...]
    ) -> tuple[Any, ...]:
        """`jax.lax.scan`, where the shared values at `positions` are carried too."""
        check_axes("scan", self.lifted.f, self.lifted.groups, graphdef, carry, shared, *mapped)
        order = sorted(positions)
        position_of = _shared_positions(graphdef)
        shared_values, shared_loose = shared
        routes: list[Route] = []  # of each trace that JAX makes; all are the same

        def step(carried: Any, xs: Any) -> Any:
            carry, threaded = carried
            values = list(shared_values)
            for position, value in zip(order, threaded, strict=True):
                values[position] = value
            after, returned, (news, loose), *ys = self.lifted.pure(graphdef, carry, (values, shared_loose), *xs)
            after, news = _without_random_state(graphdef, after, news)
            written = [position_of[index] for index in _written_shared(after)]
            if not positions.issuperset(written):
                raise _SharedWritten(positions.union(written))
            routes.append(self.route(graphdef, after))
            if loose or len(news) != len(written):
                raise StructureError(
                    f"scan: {name_of(self.lifted.f)} returned or created something without axis (None)."
                    " Give it an axis or Carry."
                )
            for position, value in zip(written, news, strict=True):
                values[position] = value
            threaded = [values[position] for position in order]
            return (routes[-1].forward(returned), threaded), (after, tuple(ys))

        xs = tuple(map(_moved_to_front, mapped, self.axes))
        start = carry, [shared_values[position] for position in order]
        (carry, threaded), (after, ys) = jax.lax.scan(step, start, xs, **self.options)
        last = dict(zip(order, threaded, strict=True))
        news = [last[position_of[index]] for index in _written_shared(after)]
        after, carry = routes[-1].back(carry, self.lifted.f, after)
        return after, carry, (news, []), *map(_moved_back, ys, self.axes)

    def route(self, graphdef: GraphDef, after: After) -> Route:
        """How the carries go from step to step; raises unless every one comes back with the structure it had."""
        before = list(carried(arguments_of(graphdef), self.lifted.inputs, ("args",)))
        result = list(carried(after.result.root, self.lifted.outputs, ("result",)))
        if len(before) != len(result):
            raise SpecError(f"scan: in_axes has {len(before)} Carry and out_axes has {len(result)}; give both as many.")
        parts = [(path, given, back) for (path, given), (_, back) in zip(before, result, strict=True)]
        return route(self.lifted.f, graphdef, after, parts, _CARRY)


def _moved_to_front(leaves: Leaves, axis: int) -> Leaves:
    return _moved(leaves, axis, 0)


def _moved_back(leaves: Leaves, axis: int) -> Leaves:
    return _moved(leaves, 0, axis)


def _moved(leaves: Leaves, source: int, target: int) -> Leaves:
    if source == target:
        return leaves
    return jax.tree.map(lambda x: jnp.moveaxis(x, source, target), leaves)


@optional_decorator
def scan(
    f: Callable[..., Any],
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    in_axes: Any = (Carry, 0),
    out_axes: Any = (Carry, 0),
    transform_metadata: Mapping[str, Any] = MappingProxyType({}),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.lax.scan` for functions of modules.

    Args:
      in_axes: for each positional argument nnx.Carry (goes from step to step), an axis (one slice a step),
        None, or StateAxes of these for a module. What has axis None is the same in every step: what f writes to
        it goes from step to step and is written at the end, except for random state, of which every step draws
        the same keys and none is counted (as in flax.nnx). Give `nnx.RngState` the axis nnx.Carry for other keys
        in each step, or split it (`nnx.split_rngs`) and give it an axis.
      out_axes: likewise for the result; as many Carry as in `in_axes`, in the same order.
      length, reverse, unroll: as in `jax.lax.scan`.
      transform_metadata: {nnx.PARTITION_NAME: name} names the scanned axis in the Variables' axis names.

    Raises:
      StructureError: if a carry comes back with another structure.
      SpecError: if the number of Carry differs, a leaf has not the axis it is mapped over, or the axes differ in size.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> make = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))
      >>> layers = make(jax.random.split(jax.random.key(0), 5))
      >>> forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      >>> forward(jnp.ones((2, 3)), layers).shape
      (2, 3)
    """
    f, named = with_axis_options(f, transform_metadata)
    function, owner = unbound(f)
    metadata = AxisMetadata(named)
    modes = Modes.of(graph, graph_updates)
    options = {"length": length, "reverse": reverse, "unroll": unroll, "_split_transpose": _split_transpose}

    axes_in = without_objects(in_axes, "in_axes", modes.sharing, 0)
    axes_out = without_objects(out_axes, "out_axes", modes.sharing, 0)

    def make(count: int) -> Form:
        inputs = axes_of_arguments(axes_in, count, len(owner))
        axes = [group for group in distinct(inputs, axes_out) if group is not Carry and group is not None]
        lifted = Lifted(
            function,
            (Carry, None, *axes),
            inputs,
            axes_out,
            carried=frozenset({Carry}),
            enter=metadata.enter,
            leave=metadata.leave,
            strict=True,
            modes=modes,
        )
        return Form(lifted, _Scan(lifted, options))

    return mapping(by_count(f, make, by_position))


class _While:
    """A while loop over one carry, for one call: what the functions close over may be another thing at the next."""

    def __init__(self, cond: Callable[..., Any], body: Callable[..., Any], modes: Modes):
        self.cond = Lifted(cond, (Carry,), (Carry,), Carry, modes=modes)
        self.body = Lifted(body, (Carry,), (Carry,), Carry, carried=frozenset({Carry}), modes=modes)

    def __call__(self, graphdef: GraphDef, carry: Leaves) -> tuple[Any, ...]:
        return traced_anew(self.run, graphdef, carry)

    def run(self, graphdef: GraphDef, carry: Leaves) -> tuple[Any, ...]:
        """`jax.lax.while_loop`."""
        steps: list[tuple[After, Route]] = []  # of each trace that JAX makes; all are the same

        def test(carry: Leaves) -> Any:
            after, (_, (result, *_)) = self.cond.pure(graphdef, carry)
            if after.cells or after.objects or after.renewed:
                raise StructureError(
                    f"while_loop: {name_of(self.cond.f)}, the condition, must not write anything. Write in the body."
                )
            return result

        def step(carry: Leaves) -> Leaves:
            after, returned = self.body.pure(graphdef, carry)
            route = route_of(self.body.f, graphdef, after)
            steps.append((after, route))
            return route.forward(returned)

        carry = jax.lax.while_loop(test, step, carry)
        after, route = steps[-1]
        return route.back(carry, self.body.f, after)


def while_loop(
    cond_fun: Callable[[Any], Any],
    body_fun: Callable[[Any], Any],
    init_val: Any,
    *,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.lax.while_loop` for a carry with modules in it.

    Args:
      cond_fun: carry -> bool scalar; must not write anything.
      body_fun: carry -> carry of the same structure; modules are updated in place and returned.
      init_val: any pytree of modules, Variables, arrays and numbers.

    Raises:
      StructureError: if the carry comes back with another structure.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> count = nnx.Variable(jnp.array(0))
      >>> def body(count):
      ...     count[...] += 1
      ...     return count
      >>> int(nnx.while_loop(lambda count: count[...] < 5, body, count)[...])
      5
    """
    modes = Modes.of(graph, graph_updates)
    loop = _While(cond_fun, body_fun, modes)
    return loop.body.call(loop, (init_val,), {})


def _fori_body(body_fun: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def body(state: Any) -> Any:
        i, upper, carry = state
        return i + 1, upper, body_fun(i, carry)

    return functools.update_wrapper(body, body_fun) if hasattr(body_fun, "__name__") else body


def _fori_cond(state: Any) -> Any:
    return state[0] < state[1]


def _fori_scan(body_fun: Callable[[Any, Any], Any], lower: int, upper: int, unroll: Any, modes: Modes) -> Any:
    def step(carry: Any, i: Any) -> Any:
        return body_fun(i, carry)

    step.__name__ = step.__qualname__ = name_of(body_fun)  # for errors
    return scan(
        step,
        length=upper - lower,
        unroll=1 if unroll is None else unroll,
        in_axes=(Carry, 0),
        out_axes=Carry,
        graph=modes.sharing,
        graph_updates=modes.updates,
    )


def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[Any, Any], Any],
    init_val: Any,
    *,
    unroll: int | bool | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.lax.fori_loop` for a carry with modules in it: carry = body_fun(i, carry) for lower <= i < upper.

    With bounds that are Python numbers it can be differentiated in reverse, as in JAX.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> total = nnx.Variable(jnp.array(0))
      >>> def body(i, total):
      ...     total[...] += i
      ...     return total
      >>> int(nnx.fori_loop(0, 5, body, total)[...])
      10
    """
    if isinstance(lower, int) and isinstance(upper, int):
        if upper <= lower:
            return init_val
        run = _fori_scan(body_fun, lower, upper, unroll, Modes.of(graph, graph_updates))
        return run(init_val, jnp.arange(lower, upper))
    if unroll is not None:
        raise ValueError("fori_loop can be unrolled only if lower and upper are Python numbers.")
    start = jnp.asarray(lower), jnp.asarray(upper), init_val
    return while_loop(_fori_cond, _fori_body(body_fun), start, graph=graph, graph_updates=graph_updates)[2]
