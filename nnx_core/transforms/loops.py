"""scan, while_loop and fori_loop.

Law: `scan(f)` equals the Python loop over f, with every effect on the arguments. Leaves of the group Carry go
from step to step; leaves with an axis are sliced and what is written to them stacked; leaves without axis
(None) are the same in every step, and those that f writes go from step to step as well. Nothing else is
carried, and of what is sliced only what was written is stacked again.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import SpecError, StructureError
from nnx_core.graph.effects import After
from nnx_core.graph.pack import Leaves
from nnx_core.graph.structure import GraphDef, Leaf, Node, VariableDef, nodes
from nnx_core.transforms.batch import AxisMetadata, axis_options
from nnx_core.transforms.carry import carried, require_same_carry, same_form
from nnx_core.transforms.groups import Carry, distinct
from nnx_core.transforms.lift import (
    Lifted,
    Modes,
    by_position,
    dressed,
    name_of,
    optional_decorator,
    remembered,
    unbound,
)


class _SharedWritten(Exception):
    """Signal to trace again: these positions of the group None are written, so they must be carried."""

    def __init__(self, positions: frozenset[int]):
        self.positions = positions


def shared_positions(graphdef: GraphDef, group: int) -> dict[int, int]:
    """Index of each Variable of a group -> its position among the group's values."""
    at: dict[int, int] = {}
    position = 0
    for _, d in nodes(graphdef.root):
        if type(d) is VariableDef and d.group == group:
            at[d.id] = position
            position += 1
        elif type(d) is Leaf and d.owned and d.group == group:
            position += 1
    return at


class _Scan:
    """One scanned function, for one number of arguments."""

    def __init__(self, lifted: Lifted, options: dict[str, Any]):
        self.lifted, self.options = lifted, options
        # jit, so that a second call outside of any jit traces and compiles nothing; inlined inside of one
        self.compiled = jax.jit(self.run, static_argnums=0, inline=True)
        self.moving: dict[GraphDef, frozenset[int]] = {}
        self.axes: tuple[int, ...] = lifted.groups[2:]  # type: ignore[assignment]  # after Carry and None come axes

    def __call__(self, graphdef: GraphDef, carry: Leaves, shared: Leaves, *mapped: Leaves) -> tuple[Any, ...]:
        moving = self.moving.get(graphdef, frozenset())
        try:
            return self.compiled(moving, graphdef, carry, shared, mapped)
        except _SharedWritten as written:
            self.moving[graphdef] = written.positions
            return self.compiled(written.positions, graphdef, carry, shared, mapped)

    def run(
        self, moving: frozenset[int], graphdef: GraphDef, carry: Leaves, shared: Leaves, mapped: tuple[Leaves, ...]
    ) -> tuple[Any, ...]:
        order = sorted(moving)
        at = shared_positions(graphdef, group=1)

        def step(carried: Any, xs: Any) -> Any:
            carry, threaded = carried
            values = list(shared[0])
            for position, value in zip(order, threaded, strict=True):
                values[position] = value
            after, carry_after, (new, loose), *ys = self.lifted.pure(graphdef, carry, (values, shared[1]), *xs)
            written = frozenset(at[i] for i, _, group in after.variables if group == 1)
            if not written <= moving:
                raise _SharedWritten(moving | written)
            self.check(graphdef, after, new, loose, written)
            latest = dict(zip([at[i] for i, _, g in after.variables if g == 1], new, strict=True))
            return (carry_after, [latest.get(p, values[p]) for p in order]), (after, tuple(ys))

        xs = tuple(_moved(leaves, axis, 0) for leaves, axis in zip(mapped, self.axes, strict=True))
        start = carry, [shared[0][p] for p in order]
        (carry, threaded), (after, ys) = jax.lax.scan(step, start, xs, **self.options)
        back = dict(zip(order, threaded, strict=True))
        news = [back[at[i]] for i, _, group in after.variables if group == 1]
        return after, carry, (news, []), *(_moved(y, 0, axis) for y, axis in zip(ys, self.axes, strict=True))

    def check(
        self, graphdef: GraphDef, after: After, new: list[Any], loose: list[Any], written: frozenset[int]
    ) -> None:
        f = self.lifted.f
        root = graphdef.root
        assert type(root) is Node  # pack made it
        before = carried(root.children[0], self.lifted.inputs, ("args",))
        result = carried(after.result.root, self.lifted.outputs, ("result",))
        if len(before) != len(result):
            raise SpecError(f"scan: in_axes has {len(before)} Carry and out_axes has {len(result)}; give both as many.")
        for (path, b), (_, a) in zip(before, result, strict=True):
            same_form(b, a, path, f)
        if len(new) != len(written) or loose:
            raise StructureError(
                f"scan: {name_of(f)} returned or created something without axis (None). Give it an axis or Carry."
            )


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
        None (the same in every step), or StateAxes of these for a module.
      out_axes: likewise for the result; as many Carry as in `in_axes`, in the same order.
      length, reverse, unroll: as in `jax.lax.scan`.
      transform_metadata: {nnx.PARTITION_NAME: name} names the scanned axis in the Variables' axis names.

    Raises:
      StructureError: if a carry comes back with another structure.
      SpecError: if the number of Carry differs.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> make = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))
      >>> layers = make(jax.random.split(jax.random.key(0), 5))
      >>> forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      >>> forward(jnp.ones((2, 3)), layers).shape
      (2, 3)
    """
    function, owner = unbound(f)
    metadata = AxisMetadata(axis_options(f, transform_metadata))
    modes = Modes.of(graph, graph_updates)
    options = {"length": length, "reverse": reverse, "unroll": unroll, "_split_transpose": _split_transpose}
    forms: dict[int, tuple[Lifted, _Scan]] = {}

    def make(count: int) -> tuple[Lifted, _Scan]:
        axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * (count - len(owner))
        inputs = (*(None for _ in owner), *axes)
        named: tuple[Hashable, ...] = tuple(g for g in distinct(inputs, out_axes) if g is not Carry and g is not None)
        lifted = Lifted(
            function,
            (Carry, None, *named),
            inputs,
            out_axes,
            carried=frozenset({Carry}),
            enter=metadata.enter,
            leave=metadata.leave,
            strict=True,
            modes=modes,
        )
        return lifted, _Scan(lifted, options)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = by_position(function, (*owner, *args), kwargs)
        if len(args) not in forms:
            forms[len(args)] = make(len(args))
        lifted, run = forms[len(args)]
        return lifted.call(run, args, kwargs)

    return dressed(call, f)


class _While:
    """A while loop over one carry; made once for each pair of functions."""

    def __init__(self, cond: Callable[..., Any], body: Callable[..., Any], modes: Modes):
        self.cond = Lifted(cond, (Carry,), (Carry,), Carry, modes=modes)
        self.body = Lifted(body, (Carry,), (Carry,), Carry, carried=frozenset({Carry}), modes=modes)
        self.compiled = jax.jit(self.run, inline=True)

    def run(self, graphdef: GraphDef, carry: Leaves) -> tuple[Any, ...]:
        afters: list[After] = []

        def test(carry: Leaves) -> Any:
            after, (_, (result, *_)) = self.cond.pure(graphdef, carry)
            if after.variables or after.objects:
                raise StructureError(
                    f"while_loop: {name_of(self.cond.f)}, the condition, must not write anything. Write in the body."
                )
            return result

        def step(carry: Leaves) -> Leaves:
            after, carry = self.body.pure(graphdef, carry)
            require_same_carry(self.body.f, graphdef, after)
            afters.append(after)
            return carry

        carry = jax.lax.while_loop(test, step, carry)
        return afters[-1], carry


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
    functions = body_fun, cond_fun
    loop = remembered(functions, ("while", modes), lambda: _While(cond_fun, body_fun, modes))
    return loop.body.call(loop.compiled, (init_val,), {})


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

    given = {"unroll": 1 if unroll is None else unroll, "length": upper - lower}
    return scan(
        step,
        in_axes=(Carry, 0),
        out_axes=Carry,
        graph=modes.sharing,
        graph_updates=modes.updates,
        **given,
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
        options = lower, upper, unroll, Modes.of(graph, graph_updates)
        run = remembered((body_fun,), ("scan", *options), lambda: _fori_scan(body_fun, *options))
        return run(init_val, jnp.arange(lower, upper))
    if unroll is not None:
        raise ValueError("fori_loop can be unrolled only if lower and upper are Python numbers.")
    start = jnp.asarray(lower), jnp.asarray(upper), init_val
    body = remembered((body_fun,), "fori", lambda: _fori_body(body_fun))
    return while_loop(_fori_cond, body, start, graph=graph, graph_updates=graph_updates)[2]
