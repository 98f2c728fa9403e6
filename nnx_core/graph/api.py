"""split, merge, update, state, pop, clone, graphdef: a graph as structure and State, and back.

Law: `merge(*split(g))` is isomorphic to g, with new objects and new Variables; `split` and `state` hand out
the graph's own Variables. On an unchanged object none of them walks: they share one plan, kept with the object.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from nnx_core import filters as filterlib
from nnx_core._changes import now
from nnx_core._errors import FilterError, Path, StateMismatchError
from nnx_core._foreign import require_own
from nnx_core._trace import Handed, is_handed
from nnx_core.graph._errors import LeafCountError, PopError, ReadOnlyError
from nnx_core.graph.cells import ArrayCell, Cell, require_writable
from nnx_core.graph.classify import ARRAY, NUMBER, children, is_container, kind_of
from nnx_core.graph.objects import Object, set_plan
from nnx_core.graph.pack import Leaves, Packer, Place, Refs, apart, in_order, require_graph
from nnx_core.graph.plan import Plan
from nnx_core.graph.structure import GraphDef, GraphState, Layout, Leaf, LeafPlace, Static, nodes
from nnx_core.graph.unpack import Unpacker
from nnx_core.graph.walk import rebuilt, recursive_map
from nnx_core.modes import sharing_allowed
from nnx_core.state import FlatState, State, split_pairs, state_or_leaf
from nnx_core.variables import Variable, is_ref

A = TypeVar("A")
ABSENT: Any = object()


def plan_of(node: Any, *, allow_sharing: bool = True) -> Plan:
    """The plan of one object: remembered while the object is unchanged. Anything else is walked."""
    if isinstance(node, Object) and allow_sharing:
        plan: Plan | None = node._nnx_plan
        if plan is None or not plan.holds():
            plan = _walk(node)[0]
            set_plan(node, plan)
        return plan
    return _walk(node, allow_sharing)[0]


def _walk(node: Any, allow_sharing: bool = True) -> tuple[Plan, Packer]:
    stamp = now()
    packer = Packer((None,), Refs(), allow_sharing=allow_sharing, trace_numbers=False)
    root = packer.pack(node, Place((), None, 0))
    return Plan(GraphDef(root), packer, stamp), packer


def is_bare(x: Any) -> bool:
    """Whether `x` is a leaf by itself: an array, a number, a `jax.Ref`."""
    return kind_of(x) in (ARRAY, NUMBER)


#: The structure of a bare leaf; a number in a container is part of the structure, but there is nothing around this one.
BARE = GraphDef(Leaf(0))


def _parts(node: Any, graph: bool | None, function: str) -> tuple[GraphDef, list[tuple[Path, Any]]]:
    """Structure of `node`, and (path, Variable or array) of its leaves."""
    if is_bare(node):
        return BARE, [((), node)]
    require_graph(node, function)
    sharing = sharing_allowed(graph)
    if isinstance(node, Object) and sharing:
        plan = plan_of(node)
        [leaves] = plan.leaves([])
        return plan.graphdef, _pairs(plan, leaves)
    plan, packer = _walk(node, sharing)
    [leaves] = packer.leaves
    return plan.graphdef, _pairs(plan, leaves)


def _pairs(plan: Plan, leaves: Leaves) -> list[tuple[Path, Any]]:
    layout = plan.graphdef.layout
    values = zip(layout, in_order(plan.graphdef, leaves), strict=True)
    # One comprehension, since every split and state of an unchanged object comes by here.
    return [(path, value if index is None else plan.known(index)) for (path, index, _), value in values]


def split(node: Any, *filters: filterlib.Filter, graph: bool | None = None) -> tuple[Any, ...]:
    """The structure of `node`, and its Variables and arrays as one State a filter (one in all for none).

    Args:
      node: a module, any pytree of modules, Variables and arrays, or one leaf: its State is then the leaf itself.
      *filters: every leaf goes to the first that matches; `...` matches all that is left.
      graph: False forbids shared references.

    Returns:
      (graphdef, state, ...). The States hold the Variables of `node` themselves.

    Raises:
      FilterError: if a leaf matches no filter.
      SharedReferenceError: with `graph=False`, if something is reached twice.

    Example:
      >>> import nnx_core as nnx
      >>> graphdef, params, rest = nnx.split(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param, ...)
      >>> list(params), list(rest)
      (['bias', 'scale'], ['mean', 'var'])
    """
    graphdef, pairs = _parts(node, graph, "split")
    return graphdef, *split_pairs(pairs, filters)


def unpack(node: Any, *filters: filterlib.Filter, graph: bool | None = None) -> Any:
    """`split`, with the structure kept in each State: one GraphState, or one a filter where there are several.

    Example:
      >>> import nnx_core as nnx
      >>> params, stats = nnx.unpack(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
      >>> sorted(params), type(nnx.merge(params, stats)).__name__
      (['bias', 'scale'], 'BatchNorm')
    """
    graphdef, *states = split(node, *filters, graph=graph)
    return _one_or_all([GraphState(graphdef, state) for state in states])


def _one_or_all(states: list[Any]) -> Any:
    """One State for one filter or none, a tuple for several."""
    return states[0] if len(states) == 1 else tuple(states)


def merge(
    graphdef_or_graphstate: GraphDef | GraphState,
    /,
    *states: Mapping[Any, Any],
    copy: bool | None = None,
    recreate_variables: bool | None = None,
) -> Any:
    """The inverse of `split` and `unpack`: new objects, and new Variables with the values in the States.

    Writing to the result does not write to the Variables in the States. But inside a transform of this package, the
    States that it handed to the function are the call's own: their Variables themselves become part of the result,
    so that what is written to it reaches the caller's States.

    Args:
      copy: False puts the Variables in the States into the result themselves, True never does.
      recreate_variables: flax.nnx's other name for `copy`.

    Raises:
      StateMismatchError: listing all paths that are missing from the States, or that the graph has not.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> copy = nnx.merge(*nnx.split(model))
      >>> copy is model, bool((copy.kernel == model.kernel).all())
      (False, True)
    """
    graphdef = graphdef_or_graphstate
    if isinstance(graphdef, GraphState):
        states, graphdef = (graphdef, *states), graphdef._graphdef
    if not isinstance(graphdef, GraphDef):
        raise TypeError(f"nnx.merge needs a GraphDef first, as nnx.split returns it; found {_library_name(graphdef)}.")
    leaves = by_path(graphdef.paths, tuple(map(_state_of, states)), require_all=True)
    refs = Refs()
    # As `raw_value_of`, without its call: this is what a merge of many Variables does most.
    values = [
        leaf._raw_value if isinstance(leaf, Variable) else require_own(leaf, path)
        for path, leaf in zip(graphdef.paths, leaves, strict=True)
    ]
    variables = variables_by_index(graphdef, leaves)
    adopted = _adopted(variables, recreate_variables if copy is None else copy)
    unpacker = Unpacker((apart(graphdef, values),), refs, templates=graphdef.templates, adopted=adopted)
    merged = unpacker.unpack(graphdef.root, None)
    objects = refs.objects
    for index, leaf in variables.items():
        # What a State says of a Variable is newer than the structure.
        if objects[index]._var_metadata != leaf._var_metadata:
            objects[index].set_metadata(leaf._var_metadata)
    return merged


def _library_name(x: Any) -> str:
    """The name of the class of `x`; that of another library's GraphDef would say nothing."""
    name = type(x).__name__
    if name != "GraphDef":
        return name
    return f"{name} of {type(x).__module__} (for a module of flax.nnx: bridge.flax_nnx.FromFlax)"


def variables_by_index(graphdef: GraphDef, leaves: list[Any]) -> dict[int, Variable[Any]]:
    """The Variables among the leaves of a structure, which may be raw values instead, by their index in it."""
    variables: dict[int, Variable[Any]] = {}
    for place, leaf in zip(graphdef.layout, leaves, strict=True):
        if place.id is not None and isinstance(leaf, Variable):
            variables[place.id] = leaf
    return variables


def _adopted(variables: dict[int, Variable[Any]], copy: bool | None) -> dict[int, Variable[Any]]:
    """The Variables that become part of the merged graph themselves."""
    if copy is not None:
        return {} if copy else variables
    # Of the running transform, or of another one: outside of all, which is asked for most, nothing is handed.
    handed = {index: v for index, v in variables.items() if type(v._trace_state) is Handed}
    return {index: v for index, v in handed.items() if is_handed(v._trace_state)}


def _state_of(state: Any) -> Any:
    return state._state if isinstance(state, GraphState) else state


def raw_value_of(leaf: Any) -> Any:
    """The value of a leaf, which may be a Variable."""
    return leaf._raw_value if isinstance(leaf, Variable) else leaf


def by_path(paths: list[Path], states: tuple[Any, ...], *, require_all: bool) -> list[Any]:
    """The leaf of `states` for each of `paths` (or ABSENT); keys may be digit strings for ints.

    A FlatState is a State like any other; one list is all leaves in walking order, as `flatten` gives them.
    """
    if len(states) == 1:
        if type(states[0]) is list:
            if len(states[0]) != len(paths):
                raise LeafCountError(len(paths), len(states[0]))
            return states[0]
        exact = _exactly_at(paths, states[0])
        if exact is not None:
            return exact
    wanted = set(paths)
    spelled: dict[tuple[str, ...], Path] = {}  # filled at the first path that is not there as it stands
    leaves: dict[Path, Any] = {}
    unexpected: list[Path] = []
    for state in states:
        for path, leaf in _leaves_at(state, wanted):
            if path in wanted:
                leaves[path] = leaf
                continue
            spelled = spelled or {tuple(map(str, wanted_path)): wanted_path for wanted_path in paths}
            respelled = spelled.get(tuple(map(str, path)))
            if respelled is None:
                unexpected.append(path)
            else:
                leaves[respelled] = leaf
    missing: list[Path] = []
    if require_all:
        missing = [path for path in paths if path not in leaves]
    if missing or unexpected:
        raise StateMismatchError(missing, unexpected)
    return [leaves.get(path, ABSENT) for path in paths]


def _exactly_at(paths: list[Path], state: Any) -> list[Any] | None:
    """The leaf for each of `paths` if `state` has these paths and no others (the usual case), else None."""
    if not isinstance(state, State):
        return None
    leaves: list[Any] = []
    try:
        for path in paths:
            level: Any = state._mapping
            for key in path:
                level = level[key]
            leaves.append(level)
    except (KeyError, TypeError, IndexError):
        return None
    return leaves if _count(state._mapping) == len(paths) else None


def _count(mapping: dict[Any, Any]) -> int:
    total = 0
    pending = [mapping]
    while pending:
        for x in pending.pop().values():
            if type(x) is dict:
                pending.append(x)
            else:
                total += 1
    return total


def _leaves_at(state: Any, wanted: Container[Path]) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of nested mappings; a mapping at a wanted path is a leaf: the value of a Variable."""
    if isinstance(state, FlatState):
        yield from state
        return
    if not isinstance(state, Mapping):
        yield (), state  # the State of a lone Variable or array
        return
    stack: list[tuple[Path, Any]] = [((), state)]
    while stack:
        path, x = stack.pop()
        if isinstance(x, Mapping) and (not path or path not in wanted):
            inner = x._mapping if isinstance(x, State) else x
            stack.extend(((*path, key), child) for key, child in inner.items())
        else:
            yield path, x


def update(node: Any, state: Any, /, *states: Any, strict: bool = False) -> None:
    """Write the values of the States into `node`, in place.

    Args:
      node: what is written to.
      state, *states: States or nested mappings of Variables or arrays.
      strict: every path of `node` must be there, with its shape and dtype. Otherwise the States may hold a part
        of the paths, and values may have another shape or dtype (casting a model writes it that way).

    A number in a container or on a module is part of the structure, so no State has it; a mapping that names it
    replaces it.

    Raises:
      StateMismatchError: listing all paths that `node` has not, and with `strict` all that are missing or have
        another shape or dtype; nothing is written then.
      TraceError, ReadOnlyError: if something cannot be written from here, or at all; nothing is written then.

    Example:
      >>> import nnx_core as nnx, jax
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.update(model, jax.tree.map(lambda x: x * 0, nnx.state(model)))
      >>> float(abs(model.kernel).sum())
      0.0
    """
    require_graph(node, "update")
    if by_order := [s for s in (state, *states) if isinstance(s, list)]:
        raise TypeError(f"nnx.update needs States or mappings, found {len(by_order)} list. Give each value its path.")
    plan = plan_of(node)
    layout: Layout = plan.graphdef.layout
    numbers: Layout = plan.remember("numbers", lambda: _numbers(plan.graphdef))
    leaves = _leaves_to_write(plan.graphdef, numbers, (state, *states), strict)
    if strict:
        _require_same_types(plan, layout, leaves[: len(layout)])
    cells = iter(plan.cells)
    writes: list[tuple[Path, Cell | None, Any]] = []  # without a cell: a number, or a leaf that no object holds
    for place, leaf in zip((*layout, *numbers), leaves, strict=True):
        require_own(leaf, place.path)
        cell = next(cells) if place.owned else None
        if leaf is not ABSENT:
            writes.append((place.path, cell, leaf))
    for path, cell, _ in writes:  # all of them first, so that a call that raises has written nothing
        if cell is None:
            _check_can_put(node, path)
        else:
            require_writable(cell)
    for path, cell, leaf in writes:
        if cell is None:
            _put(node, path, leaf)
        elif isinstance(cell, ArrayCell):
            cell.put(raw_value_of(leaf))
        elif not isinstance(leaf, Variable):
            cell.overwrite(leaf)
        elif leaf is not cell:  # `state` hands out the graph's own Variables
            cell.update_from_state(leaf)


def _numbers(graphdef: GraphDef) -> Layout:
    """The places of the numbers that are part of a structure."""
    places: list[LeafPlace] = []
    for path, d in nodes(graphdef.root):
        if type(d) is Static and path and kind_of(d.value) == NUMBER:
            places.append(LeafPlace(path, None, False))
    return tuple(places)


def _leaves_to_write(graphdef: GraphDef, numbers: Layout, states: tuple[Any, ...], strict: bool) -> list[Any]:
    """What `states` have for each leaf and then for each number, or ABSENT."""
    try:
        return by_path(graphdef.paths, states, require_all=strict) + [ABSENT] * len(numbers)
    except StateMismatchError:
        if not numbers:
            raise
    paths = [*graphdef.paths, *(place.path for place in numbers)]
    leaves = by_path(paths, states, require_all=False)
    count = len(graphdef.paths)
    missing: list[Path] = []
    if strict:
        missing = [path for path, leaf in zip(paths[:count], leaves[:count], strict=True) if leaf is ABSENT]
    if missing:
        raise StateMismatchError(missing)
    return leaves


def _check_can_put(node: Any, path: Path) -> None:
    """Raise unless a leaf that is no Variable can be written at `path`, in place and from this trace."""
    storage: Any = None
    x, below = node, path
    for i, key in enumerate(path):
        if isinstance(x, Object | State | dict | list):
            storage, below = x, path[i:]
        x = dict(children(x))[key]
    if storage is None:
        raise ReadOnlyError(path, type(node).__name__)
    if isinstance(storage, Object):
        storage._nnx_check_can_write(str(below[0]))


def _require_same_types(plan: Plan, layout: Layout, leaves: list[Any]) -> None:
    [(values, _)] = plan.leaves([])
    different = []
    for (path, _, _), old, new in zip(layout, values, leaves, strict=True):
        expected, found = _type_text(old), _type_text(raw_value_of(new))
        if expected != found:
            different.append((path, expected, found))
    if different:
        raise StateMismatchError(mismatched=different)


def _type_text(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if jax.tree_util.all_leaves([value]):
        return type(value).__name__
    return str(jax.tree.structure(value))


def set_metadata(node: Any, /, *, only: filterlib.Filter = Variable, **metadata: Any) -> None:
    """Set metadata on every Variable of `node` that the filter matches."""
    predicate = filterlib.to_predicate(only)
    for path, x in _parts(node, None, "set_metadata")[1]:
        if isinstance(x, Variable) and predicate(path, x):
            x.set_metadata(**metadata)


def _put(node: Any, path: Path, leaf: Any) -> Any:
    """`node` with `leaf` at `path`: written in place where that is possible, else a new one."""
    if not path:
        return leaf
    key, rest = path[0], path[1:]
    pairs = dict(children(node))
    new = _put(pairs[key], rest, leaf)
    if new is pairs[key]:
        return node
    if isinstance(node, Object):
        node._nnx_assign({key: new}, ())
    elif isinstance(node, State | dict | list):
        storage: Any = node
        storage[key] = new
    else:
        return rebuilt(node, list(pairs), list((pairs | {key: new}).values()))
    return node


def _selected(pairs: list[tuple[Path, Any]], filters: tuple[filterlib.Filter, ...]) -> Any:
    if not filters:
        return state_or_leaf(pairs)
    return _one_or_all(list(map(state_or_leaf, _by_filter(pairs, filters))))


def _by_filter(
    pairs: Iterable[tuple[Path, Any]], filters: tuple[filterlib.Filter, ...]
) -> list[list[tuple[Path, Any]]]:
    """For each filter the pairs that it is the first to match."""
    predicates = filterlib.to_predicates(filters)
    parts: list[list[tuple[Path, Any]]] = [[] for _ in filters]
    for path, value in pairs:
        i = filterlib.first_match(predicates, path, value)
        if i is not None:
            parts[i].append((path, value))
    return parts


def state(node: Any, *filters: filterlib.Filter, graph: bool | None = None) -> Any:
    """The Variables and arrays of `node` as one State a filter; what matches none is left out.

    Example:
      >>> import nnx_core as nnx
      >>> nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
      State({'bias': Param(float32[3] [0., 0., 0.]), 'kernel': Param(float32[4,3])})
    """
    return _selected(_parts(node, graph, "state")[1], filters)


def variables(node: Any, *filters: filterlib.Filter, graph: bool | None = None) -> Any:
    """Another name for `state`."""
    return state(node, *filters, graph=graph)


def graphdef(node: Any, /, *, graph: bool | None = None) -> GraphDef:
    """The structure of `node`, as `split` returns it."""
    return _parts(node, graph, "graphdef")[0]


def pop(node: Any, *filters: filterlib.Filter) -> Any:
    """Remove the Variables that match from `node` and return them, as one State a filter.

    A shared Variable is removed from every place it is at, and returned under the first; flax.nnx leaves it at the
    others.

    Raises:
      FilterError: without a filter.
      PopError: if one is in a plain list, a tuple or a pytree of the user's; nothing is removed then.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> class Model(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "x", x)
      >>> model = Model()
      >>> model(jnp.ones(2))
      >>> nnx.pop(model, nnx.Intermediate)
      State({'x': Intermediate((Array([1., 1.], dtype=float32),))})
      >>> hasattr(model, "x")
      False
    """
    if not filters:
        raise FilterError("nnx.pop expects at least one filter, such as nnx.Intermediate.")
    require_graph(node, "pop")
    plan = plan_of(node)
    variables = [(path, plan.known(index)) for path, index, _ in plan.graphdef.layout if index is not None]
    parts = _by_filter(variables, filters)
    popped = {id(v): path for part in parts for path, v in part}  # a shared one goes from every place it is at
    objects = plan.refs().objects
    owners = objects if isinstance(node, Object) else [node, *objects]
    for mapping, key in _popped_from_dicts(owners, popped):  # raises before anything is removed
        del mapping[key]
    for obj in objects:
        if isinstance(obj, Object):
            keys = tuple(key for key, x in obj._nnx_items().items() if id(x) in popped)
            if keys:
                obj._nnx_assign({}, keys)
    return _one_or_all(list(map(State, parts)))


def _popped_from_dicts(owners: Iterable[Any], popped: Mapping[int, Path]) -> list[tuple[Any, Any]]:
    """(dict or State, key) of each popped Variable that is in one, in plain containers that `owners` hold.

    Raises:
      PopError: if one is in another plain container.
    """
    places: list[tuple[Any, Any]] = []
    stack = [x for owner in owners for x in _plain_containers(owner)]
    while stack:
        container = stack.pop()
        for key, x in children(container):
            if id(x) not in popped:
                stack += [x] if is_container(x) else []
            elif isinstance(container, dict | State):
                places.append((container, key))
            else:
                raise PopError(popped[id(x)], type(x).__name__, type(container).__name__)
    return places


def _plain_containers(owner: Any) -> list[Any]:
    """The containers without identity in an object, or `owner` itself if it is one."""
    items = owner._nnx_items().values() if isinstance(owner, Object) else [owner]
    return list(filter(is_container, items))


def clone(
    node: A,
    variables: bool = True,
    *,
    arrays: bool = False,
    copy_arrays: bool = False,
    graph: bool | None = None,
) -> A:
    """A copy of `node`: new objects, new Variables (the same ones with `variables=False`), the same arrays.

    Sharing within `node` is kept. Arrays are immutable, so original and clone share their buffers. Donating one of
    the two (`donate_argnums`) frees the buffers of both: what is to outlive the other needs `copy_arrays=True`.

    Args:
      node: a module, any pytree of modules, Variables and arrays, or one leaf.
      variables: False keeps the Variables themselves.
      arrays, copy_arrays: copy the arrays too; two names of one option, of which the first is flax.nnx's.
      graph: False forbids shared references.

    Raises:
      ValueError: if arrays are to be copied and Variables are not, which hold them.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.clone(model).kernel is model.kernel, nnx.clone(model, variables=False).kernel is model.kernel
      (False, True)
    """
    copies_arrays = arrays or copy_arrays
    if not variables:
        if copies_arrays:
            raise ValueError(
                "nnx.clone: copy_arrays=True with variables=False asks for new arrays in the Variables of the"
                " original. Leave one of the two out."
            )
        return recursive_map(lambda _, x: x, node, graph=graph)
    structure, pairs = _parts(node, graph, "clone")
    copies: list[Any] = []
    for _, leaf in pairs:
        value = raw_value_of(leaf)
        if is_ref(value):
            value = jax.new_ref(value[...])
        elif copies_arrays and hasattr(value, "copy"):
            value = value.copy()
        copies.append(value)
    unpacker = Unpacker((apart(structure, copies),), Refs(), templates=structure.templates)
    return unpacker.unpack(structure.root, None)
