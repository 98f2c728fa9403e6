"""scan.

Law: `scan(f)` equals the Python loop over f, with every effect on the arguments. Leaves of the group Carry go
from step to step; leaves with an axis are sliced and what is written to them stacked; leaves without axis
(None) are the same in every step, and those that f writes go from step to step as well. Nothing else is
carried, and of what is sliced only what was written is stacked again.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import Path, SpecError, StructureError, show_path
from nnx_core.graph.pack import After, Leaves
from nnx_core.graph.structure import Element, GraphDef, Leaf, Node, Ref, Static, VariableDef, nodes
from nnx_core.transforms.batch import AxisMetadata
from nnx_core.transforms.groups import Carry, distinct
from nnx_core.transforms.lift import Lifted, Modes, dressed, name_of, optional_decorator, positional, unbound


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


def same_form(before: Element, after: Element, path: Path, f: Callable[..., Any]) -> None:
    """Raise StructureError unless a carry came back with the structure it had."""
    if type(after) is Ref and type(before) in (Node, VariableDef, Ref) and before.id == after.id:  # type: ignore[union-attr]  # all of these have one
        return
    if type(before) is Node and type(after) is Node and before.id is None is after.id:
        if (before.kind, before.keys, before.extra) == (after.kind, after.keys, after.extra):
            for key, b, a in zip(before.keys, before.children, after.children, strict=True):
                same_form(b, a, (*path, key), f)
            return
    elif (before == after and type(before) in (Leaf, Ref)) or (type(before) is type(after) and before == after):
        return
    raise StructureError(
        f"{name_of(f)} must return its carry with the structure it was given; {show_path(path)} differs:\n"
        f"  given:    {_show(before)}\n  returned: {_show(after)}\n"
        "Update modules in place and return the same objects."
    )


def _show(d: Element) -> str:
    if type(d) is Static:
        return repr(d.value)
    if type(d) is Node:
        return f"{d.kind.__name__}({', '.join(map(str, d.keys))})"
    if type(d) is VariableDef:
        return d.kind.__name__
    return "an array or number" if type(d) is Leaf else "an object of the caller"


def carried(d: Element, spec: Any, path: Path) -> list[tuple[Path, Element]]:
    """The parts of a structure whose spec is Carry."""
    if spec is Carry:
        return [(path, d)]
    if type(spec) in (tuple, list, dict) and type(d) is Node:
        pairs = zip(d.keys, d.children, strict=True)
        specs = spec if type(spec) is dict else dict(enumerate(spec))
        return [part for key, child in pairs for part in carried(child, specs[key], (*path, key))]
    return []


class _Scan:
    """One scanned function, for one number of arguments."""

    def __init__(self, lifted: Lifted, options: dict[str, Any]):
        self.lifted, self.options = lifted, options
        self.axes: tuple[int, ...] = lifted.groups[2:]  # type: ignore[assignment]  # after Carry and None come axes

    def __call__(self, graphdef: GraphDef, carry: Leaves, shared: Leaves, *mapped: Leaves) -> tuple[Any, ...]:
        try:
            return self.run(frozenset(), graphdef, carry, shared, mapped)
        except _SharedWritten as written:
            return self.run(written.positions, graphdef, carry, shared, mapped)

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
    transform_metadata: Mapping[str, Any] | None = None,
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
    metadata = AxisMetadata(transform_metadata or {})
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
            always=frozenset({Carry}),
            enter=metadata.enter,
            leave=metadata.leave,
            strict=True,
            modes=modes,
        )
        return lifted, _Scan(lifted, options)

    def call(*args: Any, **kwargs: Any) -> Any:
        args = (*owner, *positional(function, (*owner, *args), kwargs)[len(owner) :])
        if len(args) not in forms:
            forms[len(args)] = make(len(args))
        lifted, run = forms[len(args)]
        return lifted.call(run, args, {})

    return dressed(call, f)
