"""Which layers a model has, in the order of their calls, and which variables each of them owns: both APIs in one form.

Law: nothing is computed and nothing of the caller's is changed: both models run under `jax.eval_shape`. Every variable
of a model belongs to exactly one unit, under the name that Linen has for it in a layer of that kind (a fused kernel has
one name for each gate). Axes that a lifted transform stacked are told by the transform itself; by sizes, where they
leave no doubt, only for transforms of JAX's own.
Knows modules and calls; knows nothing of the other model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import core, struct
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._errors import show_path
from bridge._types import Location, Path, Shape
from bridge.variables.kinds import collection_of
from bridge.variables.layouts import layout_for, layout_of
from bridge.variables.mapping import EMPTY, leaves, tree_of
from nnx_core.inspect.census import ObjectInfo, census
from nnx_core.inspect.recording import Recorder

Method = str | Callable[..., Any]

#: Rebuilt by every call, in no checkpoint; in Linen and in NNX.
TRANSIENT = ("intermediates", "perturbations")
TRANSIENT_TYPES = (nnx.RngState, nnx.Intermediate, nnx.Perturbation)

# Linen's layers and their counterparts: what is not listed is a module of the user's own.
_SAME_NAME = (
    *("Einsum", "Conv", "ConvTranspose", "ConvLocal", "Embed", "PReLU", "MultiHeadAttention"),
    *("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm", "WeightNorm", "SpectralNorm"),
    *("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell", "ConvLSTMCell"),
)
_LINEN: dict[type, type] = {getattr(nn, name): getattr(nnx, name) for name in _SAME_NAME}
_LINEN |= {
    nn.Dense: nnx.Linear,
    nn.DenseGeneral: nnx.LinearGeneral,
    nn.SelfAttention: nnx.MultiHeadAttention,
    nn.MultiHeadDotProductAttention: nnx.MultiHeadAttention,
}
_NNX = frozenset(_LINEN.values())
_REMOVED = "axes removed"  # no identifier: no metadata of a user's has such a name


@dataclass(frozen=True)
class Part:
    """One variable.

    Attributes:
      axes: of the axes that transforms stacked, the outermost first; each as it counts once those before it are gone.
    """

    location: Location
    shape: Shape
    dtype: str
    axes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{show_path(self.location)} {self.dtype}{list(self.shape)}"

    @property
    def sizes(self) -> Shape:
        """Of the stacked axes."""
        return self._taken_apart()[0]

    @property
    def inner(self) -> Shape:
        """The shape that the layer sees."""
        return self._taken_apart()[1]

    def _taken_apart(self) -> tuple[Shape, Shape]:
        inner = list(self.shape)
        sizes = tuple(inner.pop(axis) for axis in self.axes)
        return sizes, tuple(inner)


@dataclass(frozen=True)
class Slot:
    """A variable, or the block `index` of `count` equal ones of it along `axis`, as the layer sees it."""

    part: Part
    index: int = 0
    count: int = 1
    axis: int = -1

    @property
    def shape(self) -> Shape:
        """Without stacked axes."""
        shape = list(self.part.inner)
        if self.count > 1:
            shape[self.axis] //= self.count
        return tuple(shape)


@dataclass(frozen=True)
class Unit:
    """A module and the variables that it owns itself; of a recurrent cell, also those of its parts.

    Attributes:
      kind: its class, as its author named it; `family` is the layer of nnx_core that it is, or None: a user's own.
      order: when it was called first, counted in calls of any module; None if it never was.
      slots: (collection, *name in Linen) -> variable.
      frames: for each stacked axis, when the module that the transform was applied to was called first.
    """

    path: Path
    kind: str
    family: type | None
    order: int | None
    slots: Mapping[Location, Slot]
    frames: tuple[int, ...] = ()

    @property
    def sizes(self) -> Shape:
        """How often the transforms repeat it, the outermost first."""
        return max((slot.part.sizes for slot in self.slots.values()), key=len, default=())

    def only(self, chosen: Iterable[Location]) -> Unit:
        """The same with some of its variables."""
        return replace(self, slots={name: self.slots[name] for name in chosen})


# ---- Linen ----


def trace_linen(module: nn.Module, method: Method, rngs: Any, args: Any, kwargs: Any) -> list[Unit]:
    """The units of a Linen module, as `module.init(rngs, *args, **kwargs, method=method)` makes and calls them.

    >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
    >>> units = trace_linen(nn.Sequential([nn.Dense(4), nn.LayerNorm()]), "__call__", None, (x,), {})
    >>> [(unit.path, unit.kind, unit.order) for unit in units]
    [(('layers_0',), 'Dense', 1), (('layers_1',), 'LayerNorm', 2)]
    """
    rngs = jax.random.key(0) if rngs is None else rngs
    call = getattr(type(module), method) if isinstance(method, str) else method
    log = _Log()

    def init(args: Any, kwargs: Any) -> Any:
        return nn.Module.init(module, rngs, *args, method=call, **kwargs)

    with nn.intercept_methods(_listener(log, _rank)):
        variables = _abstractly(init, args, kwargs)
    lasting = [(at, x) for at, x in leaves(variables) if x is not EMPTY and at[0] not in TRANSIENT]
    values = {at: meta.unbox(x) for at, x in lasting}
    streams = rngs if isinstance(rngs, Mapping) else {"params": rngs}

    def run(values: Any, args: Any, kwargs: Any) -> None:
        _init_from(module, call, values, streams, args, kwargs)

    return _linen_units(log, values, run, args, kwargs)


def trace_linen_on(
    module: nn.Module, method: Method, values: Mapping[Location, Any], streams: Any, args: Any, kwargs: Any
) -> list[Unit]:
    """The units of a Linen module that has these variables, in the order in which `module.apply` calls them.

    >>> values = {("params", name): jax.ShapeDtypeStruct((3,), "float32") for name in ("scale", "bias")}
    >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
    >>> [unit.kind for unit in trace_linen_on(nn.LayerNorm(), "__call__", values, None, (x,), {})]
    ['LayerNorm']
    """
    call = getattr(type(module), method) if isinstance(method, str) else method

    def run(values: Any, args: Any, kwargs: Any) -> None:
        mutable = core.DenyList(("params", *TRANSIENT))
        nn.Module.apply(module, tree_of(values.items()), *args, method=call, mutable=mutable, rngs=streams, **kwargs)

    log = _Log()
    with nn.intercept_methods(_listener(log, _rank)):
        _abstractly(run, dict(values), args, kwargs)
    return _linen_units(log, values, run, args, kwargs)


def _linen_units(
    log: _Log, values: Mapping[Location, Any], run: Callable[[Any, Any, Any], None], args: Any, kwargs: Any
) -> list[Unit]:
    """The units of what `log` has seen of a call; `run` is that call, on variables by location."""
    seen, log.inside = log.inside, {}
    if any(at in values and rank != _rank(values[at]) for (_, at), rank in seen.items()):
        # Some variable has another rank inside than outside: a transform has stacked it. A rank does not tell along
        # which axis, so the module runs again, on variables in boxes, which Linen's transforms tell.
        boxed = _Log()
        with nn.intercept_methods(_listener(boxed, _removed_from_box)):
            _abstractly(run, {at: _Probe(value) for at, value in values.items()}, args, kwargs)
        log.inside = boxed.inside
    return _units([_part(at, value, log) for at, value in values.items()], log, _linen_slots)


def _init_from(module: nn.Module, call: Any, values: Any, streams: Any, args: Any, kwargs: Any) -> None:
    """Run the module as `init` does, on variables that are there.

    `Module.apply` would not do: it makes no variables, and has no flag that says that the module is initializing. So
    this is what `Module.init` itself does, one floor below: `flax.core.apply` with that flag. `_deep_clone` is Linen's
    own word for a clone whose submodules are clones too, so that the caller's are not bound.
    """

    def run(scope: Any) -> None:
        call(module.clone(parent=scope, _deep_clone=True), *args, **kwargs)

    core.apply(run, mutable=core.DenyList("intermediates"), flags={"initializing": True})(
        tree_of(values.items()), rngs=streams
    )


class _Probe(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A box that is told by Linen's transforms which axes they take away.

    `nn.scan` and `nn.vmap` call `remove_axis` of each box on the way into their body and `add_axis` on the way out;
    that is the protocol by which `nn.Partitioned` keeps its names, and here counts what is gone.
    """

    value: Any
    removed: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> _Probe:
        return self.replace(value=value)

    def add_axis(self, index: int, params: Any) -> _Probe:
        return self.replace(removed=self.removed[:-1])

    def remove_axis(self, index: int, params: Any) -> _Probe:
        return self.replace(removed=(*self.removed, index))


def _rank(x: Any) -> int:
    return len(getattr(meta.unbox(x), "shape", ()))


def _removed_from_box(x: Any) -> tuple[int, ...]:
    return x.removed if isinstance(x, _Probe) else ()


def _listener(log: _Log, seen: Callable[[Any], Any]) -> Callable[..., Any]:
    def listen(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is None:  # the outside of a lifted transform
            return method(*args, **kwargs)
        path = tuple(module.scope.path)
        log.begin(path, type(module))
        output = method(*args, **kwargs)
        for at, value in leaves(module.variables):
            log.see(path, (at[0], *path, *at[1:]), seen(value))
        return output

    return listen


def _linen_slots(owner: Path, kind: type | None, parts: Sequence[Part]) -> Mapping[Location, Slot]:
    depth = len(owner) + 1
    slots = {(part.location[0], *part.location[depth:]): Slot(part) for part in parts}
    if family_of(kind) not in _KEYED:
        return slots
    return {_without_layer(name): slot for name, slot in slots.items()}


def _without_layer(name: Location) -> Location:
    """WeightNorm and SpectralNorm join keys to one, the wrapped layer's name first: `Dense_0/kernel/scale`."""
    if len(name) != 2:
        return name
    collection, joined = name
    return (collection, *joined.split("/")[1:])


# ---- NNX ----


def trace_nnx(module: nnx.Module, method: Method, args: Any, kwargs: Any) -> list[Unit]:
    """The units of an NNX module, in the order in which `module.method(*args, **kwargs)` calls them.

    >>> net = nnx.eval_shape(
    ...     lambda: nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    ... )
    >>> units = trace_nnx(net, "__call__", (jax.ShapeDtypeStruct((1, 3), "float32"),), {})
    >>> [(unit.path, unit.kind, unit.order) for unit in units]
    [(('layers', '0'), 'Linear', 1), (('layers', '1'), 'LayerNorm', 2)]
    """
    root = _Call(nnx.recursive_map(_with_hooks, module), method)
    graph = {tuple(map(str, path)): x for path, x in nnx.iter_graph(module)}
    values: dict[Location, Any] = {}
    modules: dict[Path, nnx.Module] = {}
    for path, x in graph.items():
        if isinstance(x, nnx.Variable) and not isinstance(x, TRANSIENT_TYPES):
            values[(collection_of(type(x)), *path)] = x.get_raw_value()
        elif isinstance(x, nnx.Module) and not isinstance(x, nnx.List | nnx.Dict):
            modules[path] = x
    watcher = _Watcher(census(root), {at: tuple(getattr(x, "shape", ())) for at, x in values.items()})
    watcher.run("__call__", (root, *args), kwargs)
    log = watcher.log
    log.kinds |= {path: type(x) for path, x in modules.items()}
    parts = [_part(at, value, log) for at, value in values.items()]

    def slots(owner: Path, kind: type | None, own: Sequence[Part]) -> Mapping[Location, Slot]:
        return _nnx_slots(modules[owner], owner, own) if owner in modules else _linen_slots(owner, kind, own)

    return _units(parts, log, slots)


class _Call(nnx.Module):
    """Something to be called, whatever the method is: its name, or a function of the module."""

    def __init__(self, module: nnx.Module, method: Method):
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self.method
        if isinstance(method, str):
            return getattr(self.module, method)(*args, **kwargs)
        return method(self.module, *args, **kwargs)


class _Watcher(Recorder):
    """Takes down when each object was called first, and which axes its Variables had lost then."""

    def __init__(self, infos: list[ObjectInfo], shapes: Mapping[Location, Shape]):
        super().__init__(infos, count=False)
        self.log, self.shapes = _Log(), shapes

    def record(self, index: int, name: str, method: Any, args: Any, kwargs: Any, part: Any = None) -> Any:
        path = tuple(map(str, self.infos[index].path))
        if path[:1] != ("module",):  # what holds the module that is called
            return method(*args, **kwargs)
        path = path[1:]
        if part is not None:  # a Linen module in a wrapped one
            self.log.begin((*path, *map(str, part[0])), part[1])
            return method(*args, **kwargs)
        self.log.begin(path, self.infos[index].kind)
        for below, x in nnx.iter_graph(args[0]):
            if isinstance(x, nnx.Variable):
                at = (collection_of(type(x)), *path, *map(str, below))
                removed = x.get_metadata().get(_REMOVED) or _lost(self.shapes.get(at, x.shape), tuple(x.shape))
                self.log.see(path, at, removed)
        return method(*args, **kwargs)


def _lost(outside: Shape, inside: Shape) -> tuple[int, ...]:
    """The axis that a transform of JAX's own has taken, where the sizes leave no doubt."""
    axes = [axis for axis in range(len(outside)) if (*outside[:axis], *outside[axis + 1 :]) == inside]
    return tuple(axes) if len(axes) == 1 else ()


def _with_hooks(path: Any, x: Any) -> Any:
    """A Variable with hooks of ours behind its own: nnx's transforms call them as Linen's do a box."""
    if not isinstance(x, nnx.Variable):
        return x
    return x.replace(**{name: (*_hooks(x, name), hook) for name, hook in _HOOKS.items()})


def _hooks(x: nnx.Variable[Any], name: str) -> tuple[Any, ...]:
    own = x.get_metadata().get(name, ())
    return tuple(own) if isinstance(own, list | tuple) else (own,)


def _axis_removed(x: nnx.Variable[Any], index: int, name: Any) -> None:
    x.set_metadata(_REMOVED, (*x.get_metadata().get(_REMOVED, ()), index))


def _axis_added(x: nnx.Variable[Any], index: int, name: Any) -> None:
    left = x.get_metadata().get(_REMOVED, ())[:-1]
    if left:
        x.set_metadata(_REMOVED, left)
    elif x.has_metadata(_REMOVED):
        x.del_metadata(_REMOVED)


_HOOKS = {"on_remove_axis": _axis_removed, "on_add_axis": _axis_added}


def _nnx_slots(module: nnx.Module, owner: Path, parts: Sequence[Part]) -> Mapping[Location, Slot]:
    """Each variable under its name in Linen, a fused one under the names of its parts."""
    depth = len(owner) + 1
    named = {part.location[depth:]: part for part in parts}
    slots: dict[Location, Slot] = {}
    is_keyed = family_of(type(module)) in _KEYED  # the keys of its layout follow from what it wraps
    layout = layout_for(module) if is_keyed else layout_of(type(module))
    for entry in () if layout is None else layout.entries:
        part = named.pop(tuple(map(str, entry.nnx)), None)
        if part is None:
            continue
        for index, linen in enumerate(entry.linen):
            name = _without_layer(linen) if is_keyed else (part.location[0], *linen[1:])
            slots[name] = Slot(part, index, len(entry.linen), entry.axis)
    for path, part in named.items():
        slots[(part.location[0], *path)] = Slot(part)
    return slots


# ---- both ----


@dataclass
class _Log:
    """What a run has shown: calls in order, and what was seen of each variable from each module."""

    orders: dict[Path, int] = field(default_factory=dict)
    kinds: dict[Path, type] = field(default_factory=dict)
    inside: dict[tuple[Path, Location], Any] = field(default_factory=dict)

    def begin(self, path: Path, kind: type) -> None:
        self.orders.setdefault(path, len(self.orders))
        if path not in self.kinds or issubclass(self.kinds[path], kind):  # `CheckpointDense`, and Dense inside of it
            self.kinds[path] = kind

    def see(self, path: Path, at: Location, what: Any) -> None:
        """`what` is a rank, of which the smallest counts, or the axes that are gone, of which the most do."""
        before = self.inside.get((path, at))
        if before is None:
            deeper = True
        elif isinstance(what, tuple):
            deeper = len(what) > len(before)
        else:
            deeper = what < before
        if deeper:
            self.inside[path, at] = what


def family_of(kind: type | None) -> type | None:
    """The layer of nnx_core that a class of either API is, or is a kind of; None for a module of the user's own.

    >>> family_of(nn.Dense) is family_of(nnx.Linear) is nnx.Linear, family_of(nn.Module)
    (True, None)
    """
    if kind is None:
        return None
    for base in kind.__mro__:
        if base in _LINEN or base in _NNX:
            return _LINEN.get(base, base)
    return None


_KEYED = (nnx.WeightNorm, nnx.SpectralNorm)


def _part(at: Location, value: Any, log: _Log) -> Part:
    removed = (log.inside.get((path, at), ()) for path in _prefixes(at[1:]))
    axes = max(removed, key=len, default=())
    shape, dtype = tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", type(value).__name__))
    return Part(at, shape, dtype, tuple(axis % (len(shape) - gone) for gone, axis in enumerate(axes)))


def _units(parts: Iterable[Part], log: _Log, slots_of: Callable[..., Mapping[Location, Slot]]) -> list[Unit]:
    owned: dict[Path, list[Part]] = {}
    for part in parts:
        owned.setdefault(_owner(part.location, log), []).append(part)
    units = []
    for owner, own in owned.items():
        kind = log.kinds.get(owner)
        slots = slots_of(owner, kind, own)
        name = "variable" if kind is None else kind.__name__
        units.append(Unit(owner, name, family_of(kind), log.orders.get(owner), slots, _frames(own, log)))
    return sorted(units, key=lambda unit: (unit.order is None, unit.order or 0))


def _owner(at: Location, log: _Log) -> Path:
    """The module that a variable belongs to: the innermost, but the cell for what is in a recurrent cell."""
    above = [path for path in _prefixes(at[1:]) if path in log.kinds and len(path) < len(at) - 1]
    for path in above:
        if layout_of(family_of(log.kinds[path]) or nnx.Module) is not None:
            return path
    return above[-1] if above else at[1:-1]


def _frames(parts: Sequence[Part], log: _Log) -> tuple[int, ...]:
    """For each stacked axis: the first call in the module from which on the axis is gone."""
    part = max(parts, key=lambda part: len(part.axes))
    frames: list[int] = []
    for level in range(len(part.axes)):
        modules = _prefixes(part.location[1:])
        frame = next(path for path in modules if len(log.inside.get((path, part.location), ())) > level)
        while len(frame) > 1 and frame[:-1] in log.kinds and frame[:-1] not in log.orders:
            frame = frame[:-1]  # the body calls parts of what is stacked, and never the whole
        frames.append(min(order for path, order in log.orders.items() if path[: len(frame)] == frame))
    return tuple(frames)


def _prefixes(path: Path) -> Iterator[Path]:
    return (path[:n] for n in range(len(path) + 1))


def parted(f: Callable[..., Any], *trees: Any) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """`f(*trees)` as a function of the arrays in `trees`, and those arrays; what is no array stays what it is.

    >>> call, arrays = parted(lambda x, flag: -x if flag else x, jax.ShapeDtypeStruct((2,), "float32"), True)
    >>> len(arrays), jax.eval_shape(call, arrays).shape
    (1, (2,))
    """
    values, treedef = jax.tree.flatten(trees)
    arrays = {number: x for number, x in enumerate(values) if is_array(x)}

    def call(traced: list[Any]) -> Any:
        filled = list(values)
        for number, x in zip(arrays, traced, strict=True):
            filled[number] = x
        return f(*treedef.unflatten(filled))

    return call, list(arrays.values())


def is_array(x: Any) -> bool:
    """Whether `x` is an array, real or abstract."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _abstractly(f: Callable[..., Any], *trees: Any) -> Any:
    return jax.eval_shape(*parted(f, *trees))
