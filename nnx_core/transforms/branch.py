"""cond and switch.

Law: `cond(p, f, g, *args)` equals `f(*args) if p else g(*args)`, with every effect on the arguments. All branches
must leave the same structure behind; which values they write may differ.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core._errors import StructureError
from nnx_core.graph.classify import same_things
from nnx_core.graph.effects import After
from nnx_core.graph.pack import Leaves
from nnx_core.graph.structure import GraphDef
from nnx_core.transforms.carry import described
from nnx_core.transforms.compile import plainly
from nnx_core.transforms.lift import Lifted, Modes, name_of, unbound
from nnx_core.transforms.programs import traced_anew
from nnx_core.variables import Variable


class _Switch:
    """Some branches over the same operands, for one call: what they close over may be another thing at the next."""

    def __init__(self, branches: tuple[Callable[..., Any], ...], modes: Modes):
        self.branches = [plainly(f, modes) for f in branches]

    def __call__(self, index: Any, graphdef: GraphDef, leaves: Leaves) -> tuple[Any, ...]:
        written: frozenset[int] = frozenset()
        # JAX wants the same leaves from every branch, but which one writes what shows only when it is traced. So
        # trace again with more, until every branch returns what any of them writes.
        while True:
            try:
                return traced_anew(functools.partial(self.run, written), index, graphdef, leaves)
            except _AnotherWrites as more:
                written |= more.cells

    def run(self, written: frozenset[int], index: Any, graphdef: GraphDef, leaves: Leaves) -> tuple[Any, ...]:
        """`jax.lax.switch`, where every branch returns the cells in `written`."""
        traced: list[tuple[Lifted, After]] = []
        renewed: dict[tuple[int, Hashable], None] = {}  # in any branch: a new list of the same things harms nobody

        def branch(lifted: Lifted, leaves: Leaves) -> Leaves:
            after, values = lifted.pure(graphdef, leaves, written=written)
            renewed.update(dict.fromkeys(after.renewed))
            after = dataclasses.replace(after, renewed=())
            traced.append((lifted, after))
            first, first_after = traced[0]
            if after != first_after:
                if after.travelling != first_after.travelling:
                    raise _AnotherWrites(after.travelling | first_after.travelling)
                raise _differ(first.f, first_after, lifted.f, after)
            return values

        out = jax.lax.switch(index, [functools.partial(branch, lifted) for lifted in self.branches], leaves)
        _, after = traced[0]
        return dataclasses.replace(after, renewed=tuple(renewed)), out


class _AnotherWrites(Exception):
    """Signal to trace again: some branch writes these cells, so every one must return them."""

    def __init__(self, cells: frozenset[int]):
        self.cells = cells


def _differ(first: Callable[..., Any], a: After, second: Callable[..., Any], b: After) -> StructureError:
    if a.result != b.result:
        here, there = described(a.result.root), described(b.result.root)
        what = f"  {name_of(first)} returned:  {here}\n  {name_of(second)} returned:  {there}"
    else:
        what = f"  {name_of(first)} changed:  {_changes(a)}\n  {name_of(second)} changed:  {_changes(b)}"
    return StructureError(
        f"cond and switch need branches that leave the same structure behind:\n{what}\n"
        "Return the same containers, and set the same attributes, in every branch."
    )


def _changes(after: After) -> str:
    if after.changed_keys:
        return f"the attributes {after.changed_keys}"
    return "metadata only" if after.cells else "nothing"


def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.lax.cond` for functions of modules.

    Args:
      pred: bool scalar.
      true_fun, false_fun: take the operands.
      *operands: modules, Variables, arrays, and pytrees of these.

    Raises:
      StructureError: if the branches leave different structures behind.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> def double(v):
      ...     v[...] *= 2
      >>> v = nnx.Variable(jnp.array(3))
      >>> nnx.cond(True, double, lambda v: None, v)
      >>> int(v[...])
      6
    """
    if isinstance(pred, Variable):
        pred = pred.get_value()
    index = jnp.asarray(pred, bool).astype(jnp.int32)
    return switch(index, (false_fun, true_fun), *operands, graph=graph, graph_updates=graph_updates)


def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    *operands: Any,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.lax.switch` for functions of modules; see `cond`.

    Args:
      index: integer scalar, clamped to the number of branches.
      branches: functions of the operands.

    Raises:
      StructureError: if the branches leave different structures behind.
    """
    if isinstance(index, Variable):
        index = index.get_value()
    functions, owner = _unbound_alike(branches)
    modes = Modes.of(graph, graph_updates)
    branching = _Switch(functions, modes)
    run = functools.partial(branching, index)
    return branching.branches[0].call(run, (*owner, *operands), {})


def _unbound_alike(branches: Sequence[Callable[..., Any]]) -> tuple[tuple[Callable[..., Any], ...], tuple[Any, ...]]:
    """(functions, (object,)) of methods of one object, which is an operand then; else the branches as they are."""
    functions, owners = zip(*map(unbound, branches), strict=True)
    owner = owners[0]
    if all(same_things(owner, other) for other in owners):
        return functions, owner
    return tuple(branches), ()
