"""A module of flax.nnx as a module of nnx_core: FromFlax.

The flax.nnx graph is configuration (its GraphDef); its Variables are Variables of nnx_core here, under flax.nnx's own
paths. A call puts their values into a flax.nnx module, runs it, and writes back what changed.

Law: outputs, gradients, updates and random streams are those of the flax.nnx module. A Variable that exists before a
call is the same object after it, and a change of structure in a call (what is sown, a new attribute) is one here too.
Sharing and cycles are those of the GraphDef. The module that was given is not changed.
Knows flax.nnx modules from outside; knows nothing of Linen.
"""

from __future__ import annotations

import functools
import operator
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx as flax_nnx

import nnx_core as nnx
from bridge.flax_nnx._errors import NotAModuleError, PartCallError
from bridge.flax_nnx.kinds import (
    get_theirs,
    metadata_of_ours,
    metadata_of_theirs,
    put_ours,
    set_theirs,
    to_ours,
    variable_type,
)
from bridge.flax_nnx.streams import Streams, as_theirs, given_back
from nnx_core._changes import touch
from nnx_core._errors import Path
from nnx_core._trace import current_trace
from nnx_core.graph.api import plan_of
from nnx_core.graph.containers import DictStorage
from nnx_core.graph.objects import create

_CONFIG = "@flax.nnx"  # no identifier: no attribute of a user's has such a name
_FLAGS = ("deterministic", "use_running_average")  # what `train()` and `eval()` set


class FlaxScope(DictStorage[Any]):
    """The Variables of a part of a wrapped flax.nnx module, by name: `model.encoder.kernel`, `model.layers[0]`."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise PartCallError("FromFlax")


class _Config:
    """The structure of a flax.nnx module; hashable where that is, and equal where it is equal.

    Args:
      graphdef: flax.nnx's own.
      metadata: path -> metadata of each Variable, as flax.nnx keeps it.
      kind: the class of the module.
    """

    __slots__ = ("graphdef", "kind", "metadata")

    def __init__(self, graphdef: Any, metadata: dict[Path, dict[str, Any]], kind: type):
        self.graphdef, self.metadata, self.kind = graphdef, metadata, kind

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Config) and self.graphdef == other.graphdef)

    def __hash__(self) -> int:
        try:
            return hash(self.graphdef)
        except TypeError:  # configuration without a hash: equality decides
            return hash(_Config)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Config, (self.graphdef, self.metadata, self.kind)

    def __repr__(self) -> str:
        return self.kind.__name__


class _Live:
    """A flax.nnx module of one trace that runs, and the cells here that its Variables stand for."""

    def __init__(self, config: _Config, cells: Mapping[Path, Any]):
        states = {path: _template(cell, config.metadata.get(path)) for path, cell in cells.items()}
        missing = config.metadata.keys() - states.keys()  # popped or deleted here, so there is none there either
        blanks = {path: flax_nnx.Variable(None) for path in missing}
        state = flax_nnx.from_flat_state({**_known(states, config), **blanks})
        self.module = flax_nnx.merge(config.graphdef, state)
        for path in missing:
            _delete(self.module, path)
        for path in states.keys() - config.metadata.keys():  # put in here
            _put(self.module, path, states[path])
        self.pairs: list[tuple[nnx.Variable[Any], Any]] = []
        self.arrays: dict[Path, Any] = {}
        leaves = dict(flax_nnx.to_flat_state(flax_nnx.state(self.module, graph=True)))
        for path, cell in cells.items():
            if isinstance(cell, nnx.Variable):
                self.pairs.append((cell, leaves[path]))
            else:
                self.arrays[path] = cell
        self.by_id = {id(theirs): ours for ours, theirs in self.pairs}
        self.is_countable = not self.arrays
        self.lock = threading.Lock()
        self.remember()

    def remember(self) -> None:
        """Note how every object in the module is, to see later what a call changed in it."""
        self.before: list[tuple[dict[str, Any], list[Any]]] = []
        for _, x in flax_nnx.iter_graph(self.module, graph=True):
            if isinstance(x, flax_nnx.Pytree):
                attributes = vars(x)
                self.before.append((attributes, list(attributes.values())))
                # Arrays and plain containers of data may change without an attribute being set.
                self.is_countable = self.is_countable and not any(map(_is_plain_data, attributes.items()))

    def moved(self) -> bool:
        """Whether anything but the values of Variables may have changed."""
        if not self.is_countable:
            return True
        for attributes, before in self.before:
            if len(attributes) != len(before) or not all(map(operator.is_, attributes.values(), before)):
                return True
        return False

    def write_in(self) -> list[Any]:
        """Give the flax.nnx Variables the values of now; those values."""
        values = [ours._raw_value for ours, _ in self.pairs]
        for (_, theirs), value in zip(self.pairs, values, strict=True):
            set_theirs(theirs, value)
        return values

    def write_out(self, values: list[Any]) -> None:
        """Write what changed since `write_in` into the Variables here."""
        for (ours, theirs), value in zip(self.pairs, values, strict=True):
            new = get_theirs(theirs)
            if new is not value:
                put_ours(ours, new)

    def clear(self) -> None:
        """Hold no arrays between calls: the Variables here are written meanwhile, and these would be a second copy."""
        for _, theirs in self.pairs:
            set_theirs(theirs, None)


def _is_plain_data(attribute: tuple[str, Any]) -> bool:
    name, x = attribute
    is_own = isinstance(x, flax_nnx.Variable | flax_nnx.Pytree) or name.startswith("_pytree")
    return not is_own and flax_nnx.is_data(x)


def _known(states: Mapping[Path, Any], config: _Config) -> dict[Path, Any]:
    return {path: x for path, x in states.items() if path in config.metadata}


def _template(cell: Any, metadata: dict[str, Any] | None) -> Any:
    """What stands in a flax.nnx State for a Variable or array here."""
    if not isinstance(cell, nnx.Variable):
        return cell
    own = {**metadata_of_ours(cell), **{k: x for k, x in (metadata or {}).items() if k in ("hijax", "ref")}}
    return variable_type(type(cell)).from_metadata(cell._raw_value, own)


def _owner(module: Any, path: Path) -> Any:
    for key in path[:-1]:
        module = module[key] if isinstance(key, int) or isinstance(module, dict) else getattr(module, key)
    return module


def _delete(module: Any, path: Path) -> None:
    owner = _owner(module, path)
    if isinstance(path[-1], int) or isinstance(owner, dict):
        del owner[path[-1]]
    else:
        delattr(owner, path[-1])


def _put(module: Any, path: Path, value: Any) -> None:
    owner = _owner(module, path)
    if isinstance(owner, flax_nnx.List):
        owner.append(value)
    elif isinstance(owner, dict):
        owner[path[-1]] = value
    else:
        setattr(owner, path[-1], value)


class FromFlax(nnx.Module):
    """A module of flax.nnx as one of nnx_core: trained, saved, split, filtered, vmapped, scanned like any other.

    Its Variables have the paths that they have in flax.nnx (`nnx.state(model)` beside `flax.nnx.state(module)`), and
    types of the same names. Attributes and methods of the flax.nnx module are reached as attributes. `nnx.Rngs` among
    the arguments of a call are flax.nnx's there, and go on where that call left them.

    Args:
      module: a module of flax.nnx. It is copied, and stays as it is: `to_flax()` gives it back with the values of now.

    Raises:
      NotAModuleError: if `module` is something else.

    >>> import nnx_core as nnx, jax.numpy as jnp
    >>> from flax import nnx as flax_nnx
    >>> model = FromFlax(flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0)))
    >>> model(jnp.ones((1, 2))).shape, model.in_features, nnx.state(model)["kernel"].shape
    ((1, 3), 2, (2, 3))
    """

    __slots__ = ("_flax_live",)

    def __init__(self, module: Any):
        if not isinstance(module, flax_nnx.Module):
            raise NotAModuleError("FromFlax", "flax.nnx", module)
        self._flax_take(module, {})

    # ---- calls ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the flax.nnx module returns; what it writes is written here."""
        return self._flax_run(lambda module, *args, **kwargs: module(*args, **kwargs), args, kwargs)

    def to_flax(self) -> Any:
        """A new flax.nnx module with the structure and the values of now."""
        live = _Live(self.__dict__[_CONFIG], dict(_cells(self)))
        live.write_in()
        return live.module

    def _flax_run(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        live = self._flax_module()
        if not live.lock.acquire(blocking=False):  # another thread is in it, or this one: a callback, a recursion
            live = _Live(self.__dict__[_CONFIG], dict(_cells(self)))
            live.lock.acquire()
        try:
            out = self._flax_run_on(live, run, args, kwargs)
        except BaseException:
            object.__setattr__(self, "_flax_live", None)  # half a call: built anew for the next one
            raise
        finally:
            live.clear()
            live.lock.release()
        return out

    def _flax_run_on(self, live: _Live, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        streams = Streams()
        args, kwargs = as_theirs(args, streams), as_theirs(kwargs, streams)
        values = live.write_in()
        out = run(live.module, *args, **kwargs)
        live.write_out(values)
        if live.moved():
            self._flax_take(live.module, live.by_id)
            object.__setattr__(self, "_flax_live", None)
        streams.settle()
        return out

    def _flax_module(self) -> _Live:
        """The flax.nnx module of this trace; remembered while nothing here has changed but values."""
        trace, plan = current_trace(), plan_of(self)
        remembered = getattr(self, "_flax_live", None)
        if remembered is not None and remembered[0] is plan and remembered[1] == trace:
            return remembered[2]  # type: ignore[no-any-return]  # a _Live
        live = _Live(self.__dict__[_CONFIG], dict(_cells(self)))
        # In another trace it would keep tracers, and arrays that are no Variables are as they were when it was built.
        if self._nnx_trace == trace and not live.arrays:
            object.__setattr__(self, "_flax_live", (plan, trace, live))
        return live

    def _flax_take(self, module: Any, known: Mapping[int, nnx.Variable[Any]]) -> None:
        """Be what `module` is; Variables that are known by the id of flax.nnx's stay the objects they are."""
        graphdef, state = flax_nnx.split(module, graph=True)
        metadata: dict[Path, dict[str, Any]] = {}
        wanted: dict[str, Any] = {}
        for path, leaf in flax_nnx.to_flat_state(state):
            cell = leaf
            metadata[path] = {}
            if isinstance(leaf, flax_nnx.Variable):
                cell = known.get(id(leaf))
                cell = to_ours(leaf) if cell is None else cell
                new_metadata = metadata_of_theirs(leaf)
                if new_metadata != cell._var_metadata:
                    put_ours(cell, cell._raw_value, new_metadata)
                metadata[path] = dict(leaf._var_metadata)
            _nest(wanted, path, cell)
        config = _Config(graphdef, metadata, type(module))
        streams = {path: x.tag for path, x in _streams(module)}
        self._nnx_check_can_write(None)
        _sync(self.__dict__, wanted, (), streams, {_CONFIG})
        if self.__dict__.get(_CONFIG) != config or not known:
            self.__dict__[_CONFIG] = config
        touch(self)

    @property
    def _flax_kind(self) -> type:
        """The class of the flax.nnx module."""
        kind: type = self.__dict__[_CONFIG].kind
        return kind

    # ---- attributes ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_nnx_", "_flax_", "_pytree")) or _CONFIG not in self.__dict__:
            raise AttributeError(name)  # not filled yet (copy, pickle), or a protocol of Python or its tools
        live = self._flax_module()
        attribute = getattr(type(live.module), name, None)
        if isinstance(attribute, property | functools.cached_property):
            return self._flax_run(lambda module: getattr(module, name), (), {})
        if isinstance(attribute, types.FunctionType) and name not in vars(live.module):
            return functools.partial(self._flax_method, name)
        try:
            value = getattr(live.module, name)
        except AttributeError:
            if name in _FLAGS:
                return _flag(live.module, name, self)
            raise AttributeError(f"FromFlax({self.__dict__[_CONFIG]}) has no attribute {name!r}.") from None
        if isinstance(value, flax_nnx.Variable):  # shared, and met before under another path
            return live.by_id[id(value)]
        if isinstance(value, flax_nnx.Pytree):
            return _at(self, _first_path(live.module, value))
        return value

    def _flax_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._flax_run(lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs), args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        is_static = not nnx.is_data(value)
        if _CONFIG not in self.__dict__ or name in self.__dict__ or not is_static:
            super().__setattr__(name, value)
            return
        self._nnx_check_can_write(name)

        def change(module: Any) -> None:
            if name in _FLAGS and not hasattr(module, name):
                module.set_attributes(**{name: value}, raise_if_not_found=False)
            else:
                setattr(module, name, value)

        self._flax_run(change, (), {})

    def set_attributes(
        self, *filters: Any, raise_if_not_found: bool = True, graph: bool | None = None, **attributes: Any
    ) -> None:
        """Set attributes of the flax.nnx modules inside, as its own `set_attributes` does."""
        del graph

        def change(module: Any) -> None:
            module.set_attributes(*filters, raise_if_not_found=raise_if_not_found, **attributes)

        self._flax_run(change, (), {})

    def set_view(self, **flags: Any) -> dict[str, Any]:
        """Set flags for `nnx.view`, which calls this on a copy; those that nothing in here has are returned."""
        parts = [part for _, part in flax_nnx.iter_modules(self._flax_module().module)]
        known = {name: x for name, x in flags.items() if any(hasattr(part, name) for part in parts)}
        self.set_attributes(**{name: x for name, x in known.items() if x is not None}, raise_if_not_found=False)
        return {name: x for name, x in flags.items() if name not in known}

    def __repr__(self) -> str:
        if _CONFIG not in self.__dict__:
            return "FromFlax()"
        return super().__repr__()


def adopt(module: Any) -> Any:
    """`module` of flax.nnx as one of nnx_core, anything else as it is."""
    return FromFlax(given_back(module)) if isinstance(module, flax_nnx.Module) else module


# ---- levels ----


def _nest(tree: dict[Any, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _sync(items: Any, wanted: dict[Any, Any], path: Path, streams: Mapping[Path, str], keep: set[str]) -> None:
    """Make `items`, a level of cells, hold what is wanted; scopes that exist stay the same objects."""
    for key in [key for key in items if key not in wanted and key not in keep]:
        del items[key]
    for key, new in wanted.items():
        old = items.get(key)
        below = (*path, key)
        if type(new) is not dict:
            if old is not new:
                items[key] = new
        elif below in streams:
            if not isinstance(old, nnx.RngStream):
                old = items[key] = create(nnx.RngStream)
            old._nnx_assign({"tag": streams[below], **new}, ())
        else:
            if type(old) is not FlaxScope:
                old = items[key] = FlaxScope()
            _sync(old, new, below, streams, set())


def _cells(level: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, Variable or array) of what stands for a leaf of the flax.nnx module."""
    items = level._nnx_items()
    for key, x in items.items():
        if isinstance(x, FlaxScope | nnx.RngStream):
            yield from _cells(x, (*path, key))
        elif isinstance(x, nnx.Variable) or (key != _CONFIG and _is_array(x)):
            yield (*path, key), x


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | int | float | complex) or hasattr(x, "dtype")


def _streams(module: Any) -> Iterator[tuple[Path, Any]]:
    for path, x in flax_nnx.iter_graph(module, graph=True):
        if isinstance(x, flax_nnx.RngStream):
            yield path, x


def _first_path(module: Any, part: Any) -> Path:
    return next(path for path, x in flax_nnx.iter_graph(module, graph=True) if x is part)


def _at(level: Any, path: Path) -> Any:
    for key in path:
        level = level._nnx_items()[key]
    return level


def _flag(module: Any, name: str, owner: Any) -> Any:
    """The flag `name` of the first module inside that has it: `train()` of a model around asks whether there is one."""
    for _, part in flax_nnx.iter_modules(module):
        if hasattr(part, name):
            return getattr(part, name)
    raise AttributeError(f"{type(owner).__name__} has no attribute {name!r}.")
