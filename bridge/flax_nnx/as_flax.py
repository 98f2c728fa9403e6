"""A module of nnx_core, a wrapped Linen module too, as a real module of flax.nnx: AsFlax.

The graph of nnx_core is configuration (its GraphDef); its Variables are Variables of flax.nnx here, under the same
paths. A call puts their values into a module of nnx_core, runs it, and writes back what changed.

Law: as for FromFlax, the other way round: outputs, gradients, updates and random streams are those of the module; a
flax.nnx Variable that exists before a call is the same object after it. flax.nnx's own tools see nothing unusual: this
is a flax.nnx Module with Variables in attributes, and configuration that has a hash.
Knows modules of nnx_core from outside; knows nothing of Linen.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge.flax_nnx._errors import NotAModuleError, PartCallError
from bridge.flax_nnx.kinds import (
    get_theirs,
    metadata_of_ours,
    metadata_of_theirs,
    to_theirs,
    variable_type,
)
from bridge.flax_nnx.streams import Streams, as_ours
from nnx_core._errors import Path
from nnx_core._trace import current_trace
from nnx_core.graph.api import plan_of
from nnx_core.graph.objects import Object
from nnx_core.graph.walk import children
from nnx_core.variables import get_raw, new_variable, set_raw

_CONFIG = "nnx_core_graphdef"
_FLAGS = ("deterministic", "use_running_average")  # what `train()` and `eval()` set


class _Config:
    """The structure of a module of nnx_core; hashable where that is, and equal where it is equal.

    Args:
      graphdef: its GraphDef.
      kinds: path -> type and metadata of each Variable; None for an array.
    """

    __slots__ = ("graphdef", "kinds")

    def __init__(self, graphdef: nnx.GraphDef, kinds: dict[Path, Any]):
        self.graphdef, self.kinds = graphdef, kinds

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Config) and self.graphdef == other.graphdef)

    def __hash__(self) -> int:
        return hash(self.graphdef)

    def __reduce__(self) -> tuple[Any, ...]:
        # As a module without values, since types of configuration (`function`) are found in no module by pickle.
        blanks = {path: new_variable(kind or nnx.Variable, None, {}) for path, kind in self.kinds.items()}
        return _unpickled, (nnx.merge(self.graphdef, nnx.from_flat_state(blanks)), self.kinds)

    def __repr__(self) -> str:
        return str(getattr(getattr(self.graphdef.root, "kind", None), "__name__", "nnx_core module"))


def _unpickled(blank: nnx.Module, kinds: dict[Path, Any]) -> _Config:
    return _Config(nnx.graphdef(blank), kinds)


class AsFlaxLevel(flax_nnx.Module):
    """The Variables of a part of a wrapped module, by name: `model.encoder.kernel`, `model.layers[0].kernel`."""

    _pytree__has_int_keys = True

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise PartCallError: there is no code here."""
        raise PartCallError("AsFlax")

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, str(key))


class _Live:
    """A module of nnx_core of one trace that runs, and the cells here that its Variables stand for."""

    def __init__(self, config: _Config, cells: Mapping[Path, Any]):
        missing = config.kinds.keys() - cells.keys()  # popped or deleted here, so there is none there either
        state = {path: _template(cell, config.kinds[path]) for path, cell in cells.items() if path in config.kinds}
        blanks = {path: new_variable(config.kinds[path] or nnx.Variable, None, {}) for path in missing}
        self.module = nnx.merge(config.graphdef, nnx.from_flat_state({**state, **blanks}))
        if missing:
            nnx.pop(self.module, nnx.PathIn(*missing))
        for path in cells.keys() - config.kinds.keys():  # put in here
            _put(self.module, path, _template(cells[path], None))
        leaves = dict(nnx.to_flat_state(nnx.state(self.module)))
        self.pairs = [(x, leaves[path]) for path, x in cells.items() if isinstance(x, flax_nnx.Variable)]
        self.theirs = [theirs for theirs, _ in self.pairs]
        self.has_arrays = len(self.pairs) < len(cells)
        self.by_id = {id(ours): theirs for theirs, ours in self.pairs}
        self.plan = plan_of(self.module)
        self.lock = threading.Lock()

    def moved(self) -> bool:
        """Whether anything but the values of Variables may have changed."""
        return self.has_arrays or plan_of(self.module) is not self.plan

    def write_in(self) -> list[Any]:
        """Give the Variables of nnx_core the values of now; those values."""
        values = [get_theirs(theirs) for theirs, _ in self.pairs]
        for (_, ours), value in zip(self.pairs, values, strict=True):
            set_raw(ours, value)
        return values

    def write_out(self, values: list[Any]) -> None:
        """Write what changed since `write_in` into the Variables here."""
        for (theirs, ours), value in zip(self.pairs, values, strict=True):
            new = get_raw(ours)
            if new is not value:
                theirs.set_raw_value(new)

    def clear(self) -> None:
        """Hold no arrays between calls."""
        for _, ours in self.pairs:
            set_raw(ours, None)


def _template(cell: Any, kind: type[nnx.Variable[Any]] | None) -> Any:
    if not isinstance(cell, flax_nnx.Variable):
        return cell
    kind = kind or variable_type(type(cell))
    return new_variable(kind, get_theirs(cell), metadata_of_theirs(cell))


def _put(module: Any, path: Path, value: Any) -> None:
    *above, last = path
    for key in above:
        module = dict(children(module))[key]
    if isinstance(module, Object):
        module._nnx_assign({last: value}, ())
    else:
        module[last] = value


class AsFlax(flax_nnx.Module):
    """A module of nnx_core, `bridge.ToNNX` included, as a module of flax.nnx, for its transforms, optimizers and tools.

    Its Variables have the paths that they have in nnx_core, and types of the same names. Attributes and methods of the
    module are reached as attributes. `flax.nnx.Rngs` among the arguments of a call are nnx_core's there.

    Args:
      module: a module of nnx_core. It is copied, and stays as it is: `to_nnx_core()` gives it back with the values
        of now.

    Raises:
      NotAModuleError: if `module` is something else.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> from flax import nnx as flax_nnx
    >>> model = AsFlax(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> grads = flax_nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
    >>> model.in_features, grads["kernel"][...].shape
    (2, (2, 3))
    """

    _pytree__has_int_keys = True

    def __init__(self, module: nnx.Module):
        if not isinstance(module, nnx.Module):
            raise NotAModuleError("AsFlax", "nnx_core", module)
        self._as_flax_take(module, {})

    # ---- calls ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; what it writes is written here."""
        return self._as_flax_run(lambda module, *args, **kwargs: module(*args, **kwargs), args, kwargs)

    def to_nnx_core(self) -> Any:
        """A new module of nnx_core with the structure and the values of now."""
        live = _Live(vars(self)[_CONFIG], dict(_cells(self)))
        live.write_in()
        return live.module

    def _as_flax_run(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        live = self._as_flax_module()
        if not live.lock.acquire(blocking=False):  # another thread is in it, or this one: a callback, a recursion
            live = _Live(vars(self)[_CONFIG], dict(_cells(self)))
            live.lock.acquire()
        try:
            out = self._as_flax_run_on(live, run, args, kwargs)
        except BaseException:
            _lives.pop(self, None)  # half a call: built anew for the next one
            raise
        finally:
            live.clear()
            live.lock.release()
        return out

    def _as_flax_run_on(self, live: _Live, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        streams = Streams()
        args, kwargs = as_ours(args, streams), as_ours(kwargs, streams)
        values = live.write_in()
        out = run(live.module, *args, **kwargs)
        live.write_out(values)
        if live.moved():
            self._as_flax_take(live.module, live.by_id)
            _lives.pop(self, None)
        streams.settle()
        return out

    def _as_flax_module(self) -> _Live:
        """The module of nnx_core of this trace; remembered while nothing here has changed but values."""
        trace, config, cells = current_trace(), vars(self)[_CONFIG], dict(_cells(self))
        remembered = _lives.get(self)
        if remembered is not None and remembered[0] is config and remembered[1] == trace:
            live: _Live = remembered[2]
            if len(cells) == len(live.theirs) and all(map(operator.is_, cells.values(), live.theirs)):
                return live
        live = _Live(config, cells)
        if self._pytree__state.trace_state.is_valid():  # else it would keep tracers
            _lives[self] = config, trace, live
        return live

    def _as_flax_take(self, module: nnx.Module, known: Mapping[int, Any]) -> None:
        """Be what `module` is; Variables that are known by the id of nnx_core's stay the objects they are."""
        graphdef, state = nnx.split(module)
        kinds: dict[Path, Any] = {}
        wanted: dict[Any, Any] = {}
        for path, leaf in nnx.to_flat_state(state):
            cell = leaf
            kinds[path] = None
            if isinstance(leaf, nnx.Variable):
                kinds[path] = type(leaf)
                cell = known.get(id(leaf))
                if cell is None:
                    cell = to_theirs(leaf)
                elif metadata_of_theirs(cell) != leaf._var_metadata:
                    cell.set_metadata(metadata_of_ours(leaf))
            _nest(wanted, path, cell)
        tags = {path: x.tag for path, x in nnx.iter_graph(module) if isinstance(x, nnx.RngStream)}
        config = _Config(graphdef, kinds)
        if vars(self).get(_CONFIG) != config:
            super().__setattr__(_CONFIG, flax_nnx.static(config))
        _sync(self, wanted, (), tags)

    # ---- attributes ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_as_flax", "_pytree", "_graph")) or _CONFIG not in vars(self):
            raise AttributeError(name)  # not filled yet, or a protocol of Python or of flax.nnx
        live = self._as_flax_module()
        attribute = inspect.getattr_static(type(live.module), name, None)
        if isinstance(attribute, property | functools.cached_property):
            return self._as_flax_run(lambda module: getattr(module, name), (), {})
        if inspect.isfunction(attribute):
            return functools.partial(self._as_flax_method, name)
        try:
            value = getattr(live.module, name)
        except AttributeError:
            if name in _FLAGS:
                return _flag(live.module, name)
            raise AttributeError(f"AsFlax({vars(self)[_CONFIG]}) has no attribute {name!r}.") from None
        if isinstance(value, nnx.Variable):  # shared, and met before under another path
            return live.by_id[id(value)]
        if isinstance(value, nnx.Object):
            return _at(self, next(path for path, x in nnx.iter_graph(live.module) if x is value))
        if isinstance(value, functools.partial) or inspect.ismethod(value):  # a method of a wrapped Linen module
            return functools.partial(self._as_flax_method, name)
        return value

    def _as_flax_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._as_flax_run(lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs), args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name.startswith("_") or name == _CONFIG or name in vars(self)
        if is_own or _CONFIG not in vars(self) or flax_nnx.is_data(value):
            super().__setattr__(name, value)
            return

        def change(module: nnx.Module) -> None:
            if name in _FLAGS and not hasattr(module, name):
                module.set_attributes(**{name: value}, raise_if_not_found=False)
            else:
                setattr(module, name, value)

        self._as_flax_run(change, (), {})

    def set_view(self, **flags: Any) -> dict[str, Any]:
        """Set flags for `flax.nnx.view`, which calls this on a copy; those that nothing in here has are returned."""
        module = self._as_flax_module().module
        known = {name: x for name, x in flags.items() if any(hasattr(m, name) for _, m in nnx.iter_modules(module))}

        def change(module: nnx.Module) -> None:
            chosen = {name: x for name, x in known.items() if x is not None}
            module.set_attributes(**chosen, raise_if_not_found=False)

        self._as_flax_run(change, (), {})
        return {name: x for name, x in flags.items() if name not in known}


# No attribute, which flax.nnx would make part of the graph, and no slot, which it does not allow.
_lives: weakref.WeakKeyDictionary[AsFlax, Any] = weakref.WeakKeyDictionary()


# ---- levels ----


def _nest(tree: dict[Any, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _items(level: Any) -> dict[Any, Any]:
    """Key -> cell or level, keys of lists as integers."""
    items = {}
    for name, x in vars(level).items():
        if not name.startswith("_pytree") and name != _CONFIG:
            items[int(name) if name.isdecimal() else name] = x
    return items


def _sync(level: Any, wanted: dict[Any, Any], path: Path, tags: Mapping[Path, str]) -> None:
    """Make `level` hold what is wanted; levels that exist stay the same objects."""
    items = _items(level)
    set_attribute = functools.partial(flax_nnx.Module.__setattr__, level)
    for key in items.keys() - wanted.keys():
        if not (path in tags and key == "tag"):
            delattr(level, str(key))
    for key, new in wanted.items():
        old, below = items.get(key), (*path, key)
        if type(new) is not dict:
            if old is not new:
                set_attribute(str(key), new if isinstance(new, flax_nnx.Variable) else flax_nnx.data(new))
        elif below in tags:
            if not isinstance(old, flax_nnx.RngStream):
                old = flax_nnx.RngStream(0, tag=tags[below])
                set_attribute(str(key), old)
            _sync_stream(old, new)
        else:
            if type(old) is not AsFlaxLevel:
                old = AsFlaxLevel()
                set_attribute(str(key), old)
            _sync(old, new, below, tags)


def _sync_stream(stream: Any, wanted: Mapping[str, Any]) -> None:
    for name, cell in wanted.items():
        if getattr(stream, name, None) is not cell:
            setattr(stream, name, cell)


def _cells(level: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, Variable or array) of what stands for a leaf of the module."""
    for key, x in _items(level).items():
        if isinstance(x, AsFlaxLevel | flax_nnx.RngStream):
            yield from _cells(x, (*path, key))
        elif isinstance(x, flax_nnx.Variable) or hasattr(x, "dtype"):
            yield (*path, key), x


def _at(level: Any, path: Path) -> Any:
    for key in path:
        level = getattr(level, str(key))
    return level


def _flag(module: nnx.Module, name: str) -> Any:
    """The flag `name` of the first module inside that has it: `train()` of a model around asks whether there is one."""
    for _, part in nnx.iter_modules(module):
        if hasattr(part, name):
            return getattr(part, name)
    raise AttributeError(f"no module in here has {name!r}.")
