"""The plans of one lifted function: how a call on unchanged arguments skips the walk.

Law: what a quick call does equals what a walking call does. Nothing here keeps an object alive: plans are found
by identity and forgotten when one of the objects dies.

Per call on unchanged arguments: the signature (one step an argument), one comparison of change counters, one
pass over the Variables to read, the compiled function, one pass over those it wrote.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from nnx_core._trace import current_trace
from nnx_core.graph.cells import ArrayCell, Cell, write_cell
from nnx_core.graph.classify import ARRAY, DICT, NUMBER, OBJECT, SEQUENCE, STATIC, kind_of
from nnx_core.graph.effects import After, check_writes
from nnx_core.graph.pack import AS_STATIC, Leaves, Refs
from nnx_core.graph.plan import Plan
from nnx_core.graph.structure import REF_LEAF, Element, Leaf, Node, Static, static
from nnx_core.graph.unpack import Unpacker
from nnx_core.state import sorted_keys
from nnx_core.variables import set_raw

MAX_PLANS = 512
_LEAF = 0


class NotPlannable(Exception):
    """Arguments that are walked on every call, such as bare Variables and States."""


def signature(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any, keywords: Any
) -> tuple[Hashable | None, list[Any], list[Any]]:
    """(key, objects, loose leaves in walking order) of some arguments; the key is None if no plan can serve them."""
    roots: list[Any] = []
    loose: list[Any] = []
    keys: list[Hashable]
    try:
        if type(inputs) is tuple and len(inputs) == len(args) and AS_STATIC in inputs:
            keys = [_sign_as(spec, x, roots, loose) for x, spec in zip(args, inputs, strict=True)]
        else:
            keys = [_sign(x, roots, loose) for x in args]
        for name in sorted(kwargs):
            if type(keywords) is dict and keywords.get(name) is AS_STATIC:
                keys.append((name, _sign_as(AS_STATIC, kwargs[name], roots, loose)))
            else:
                keys.append((name, _sign(kwargs[name], roots, loose)))
    except NotPlannable:
        return None, roots, loose
    return tuple(keys), roots, loose


def _sign_as(spec: Any, x: Any, roots: list[Any], loose: list[Any]) -> Hashable:
    return ("static", static(x)) if spec is AS_STATIC else _sign(x, roots, loose)


def _sign(x: Any, roots: list[Any], loose: list[Any]) -> Hashable:
    kind = kind_of(x)
    if kind in (ARRAY, NUMBER):
        loose.append(x)
        return _LEAF
    if kind == OBJECT:
        roots.append(x)
        return id(x)
    if kind == STATIC:
        return static(x)
    # Tuples of lists and not of generators: a list comprehension has no frame of its own since Python 3.12.
    if kind == SEQUENCE:
        return type(x), tuple([_sign(child, roots, loose) for child in x])
    if kind == DICT:
        return tuple(x), tuple([_sign(x[key], roots, loose) for key in sorted_keys(x)])
    raise NotPlannable


class Plans:
    """Plans by the signature of the arguments they were made for."""

    __slots__ = ("__weakref__", "_plans")

    def __init__(self) -> None:
        self._plans: dict[Hashable, tuple[list[weakref.ref[Any]], Plan]] = {}

    def find(self, key: Hashable | None, roots: list[Any]) -> Plan | None:
        """A plan for these arguments that still holds."""
        if key is None:
            return None
        entry = self._plans.get(key)
        if entry is None:
            return None
        refs, plan = entry
        # By identity: the key has ids, and the id of an object that died may be that of another one by now.
        for ref, root in zip(refs, roots, strict=True):
            if ref() is not root:
                return None
        return plan if plan.holds() else None

    def remember(self, key: Hashable, roots: list[Any], plan: Plan) -> None:
        """Keep `plan` for as long as all of `roots` live."""
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        forget = _Forget(weakref.ref(self), key)
        self._plans[key] = [weakref.ref(root, forget) for root in roots], plan

    def clear(self) -> None:
        """Forget everything."""
        self._plans.clear()

    def __len__(self) -> int:
        return len(self._plans)


class _Forget:
    __slots__ = ("key", "plans")

    def __init__(self, plans: "weakref.ref[Plans]", key: Hashable):
        self.plans, self.key = plans, key

    def __call__(self, _: Any) -> None:
        plans = self.plans()
        if plans is not None:
            plans._plans.pop(self.key, None)


#: The cells of one group that are written, and how one is.
Targets: TypeAlias = tuple[Callable[[Any, Any], None], list[Cell]]


class Outcome:
    """What one compiled function writes, resolved to cells: nothing is looked up any more."""

    __slots__ = ("after", "result", "targets", "trace")

    def __init__(self, after: After, targets: "list[Targets]", trace: object):
        self.after, self.targets, self.trace = after, targets, trace
        self.result = after.result.root

    def write(self, written: list[Leaves]) -> Any:
        for (write, cells), (values, _) in zip(self.targets, written, strict=True):
            if cells:
                # exhausts `map` at C speed: `write` returns None; there are no values beyond the cells (`_is_quick`)
                any(map(write, cells, values))
        if type(self.result) is Leaf:
            return written[self.result.group][1][0]
        return Unpacker(tuple(written), Refs()).build(self.result, None)


class Outcomes:
    """The outcomes of one plan; the last one used is found by identity.

    A compiled function hands out the same `After` at every call, so that is the usual case; one that was compiled
    anew has another one, which is looked up by content.
    """

    __slots__ = ("_by_content", "_last")

    def __init__(self) -> None:
        self._last: Outcome | None = None
        self._by_content: dict[After, Outcome | None] = {}

    def find(self, plan: Plan, after: After) -> Outcome | None:
        """How to write `after` quickly, or None where objects change, or are returned."""
        outcome = self._last
        if outcome is None or outcome.after is not after:
            outcome = self._find_equal(plan, after)
            if outcome is None:
                return None
            self._last = outcome
        if outcome.trace != current_trace():  # checked once for each trace, not at every call
            check_writes(after, plan.refs())
            outcome.trace = current_trace()
        return outcome

    def _find_equal(self, plan: Plan, after: After) -> Outcome | None:
        if after not in self._by_content:
            self._by_content[after] = _resolve(plan, after)
        outcome = self._by_content[after]
        if outcome is not None and outcome.after is not after:
            outcome = self._by_content[after] = Outcome(after, outcome.targets, outcome.trace)
        return outcome


def _resolve(plan: Plan, after: After) -> Outcome | None:
    if not _is_quick(after):
        return None
    cells: list[list[Cell]] = [[] for _ in range(plan.group_count)]
    for index, _, group in after.cells:
        if group is not None:
            cells[group].append(plan.known(index))
    targets: list[Targets] = []
    for group_cells in cells:
        has_arrays = any(isinstance(cell, ArrayCell) for cell in group_cells)
        targets.append((write_cell if has_arrays else set_raw, group_cells))
    return Outcome(after, targets, None)


def _is_quick(after: After) -> bool:
    return (
        not after.objects
        and not after.idle
        and not after.renewed
        and all(write.metadata is None for write in after.cells)
        and _is_plain(after.result.root)
    )


def _is_plain(d: Element) -> bool:
    if type(d) is Node:
        return d.id is None and all(map(_is_plain, d.children))
    return (type(d) is Leaf and d.tag != REF_LEAF) or type(d) is Static
