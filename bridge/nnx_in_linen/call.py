"""One call of an NNX module in the scope of a Linen module.

Law: what Linen has is what the module gets, and what the module wrote is what Linen gets; in between runs the NNX
method alone. Apply runs no initializer. A call that fails has changed nothing that its caller can see.
Knows a bound ToLinen, its structure and its scope; knows nothing of how modules are configured, copied or named.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.extend.core
import numpy as np
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._errors import show_path
from bridge.nnx_in_linen._errors import ConstructorChangedError, KeptGraphDefError, Location, UnexpectedVariablesError
from bridge.nnx_in_linen.host import Host, LinenStream, called, give_back_streams, hosted, no_key, reseeded
from bridge.nnx_in_linen.stand_ins import Sight, plain, set_class, visible_class
from bridge.nnx_in_linen.structure import Recipe, Slot, Structure, distinct, location_of, remember, structure_of
from bridge.variables.metadata import to_nnx_variable
from nnx_core._changes import track
from nnx_core.graph.classify import contents
from nnx_core.graph.walk import children

#: Where the structure of the module is, for who wants it among the variables.
GRAPHDEF: Location = ("nnx", "graphdef")
Method = str | Callable[..., Any]


def _gather(tree: Mapping[str, Any], known: Mapping[Location, Any], at: Location, found: dict[Location, Any]) -> None:
    """Add all values below `at` by location; a mapping at a known location is the value of one Variable."""
    for key, child in tree.items():
        location = (*at, str(key))
        if location not in known and isinstance(child, Mapping):
            _gather(child, known, location, found)
        else:
            found[location] = child


class Settings(NamedTuple):
    """What a ToLinen says of its calls.

    Args:
      recipe: what it makes the module from.
      box: Variable -> the value Linen keeps.
      keep_graphdef: whether the structure is among the variables.
    """

    recipe: Recipe
    box: Callable[[nnx.Variable[Any]], Any]
    keep_graphdef: bool


class Call:
    """One call of a method of the NNX module in the scope of a bound Linen module.

    Args:
      linen: the ToLinen.
      settings: what it says of its calls.
      method: the name of the method, or a function of (module, *args, **kwargs).
    """

    def __init__(self, linen: nn.Module, settings: Settings, method: Method, args: Any, kwargs: Any):
        assert linen.scope is not None
        self.linen, self.scope, self.host = linen, linen.scope, Host.of(linen)
        self.recipe, self.box, self.keep_graphdef = settings
        self.method, self.args, self.kwargs = method, args, kwargs
        self.base = self.structure = structure_of(self.recipe, self.host.streams)
        self.found: dict[Location, Any] = {}

    def run(self) -> Any:
        """The result of the method; what it wrote is in the scope."""
        self.found = self._find()
        self._use_kept_structure()
        self._create_missing()
        subject = self._subject()
        with subject.streams(self.host, self.recipe.keep_rngs):
            subject.show()
            try:
                entry = self.method if isinstance(self.method, str) else None
                with called(self.host, Sight(self.linen, subject.modules, entry)):
                    out = _invoke(subject.module, self.method, self.args, self.kwargs)
            finally:
                subject.hide()
        moved = subject.moved()
        for path, x, existed in subject.written(moved, self.recipe.keep_rngs):
            self._write(path, x, existed=existed)
        if moved and self.keep_graphdef and not self.host.initializing:
            self._keep(subject.module)
        return out

    # ---- what Linen has ----

    def _find(self) -> dict[Location, Any]:
        found: dict[Location, Any] = {}
        for collection, tree in self.scope.variables().items():
            if isinstance(tree, Mapping):
                _gather(tree, self.structure.slots, (collection,), found)
        return found

    def _use_kept_structure(self) -> None:
        if not self.keep_graphdef:
            return
        self.found.pop(GRAPHDEF, None)
        if not self.scope.has_variable(*GRAPHDEF):
            if self.scope.is_mutable_collection(GRAPHDEF[0]):
                self.scope.put_variable(*GRAPHDEF, self.base.graphdef)
            return
        kept = self.scope.get_variable(*GRAPHDEF)
        if not isinstance(kept, nnx.GraphDef):
            raise KeptGraphDefError(self.recipe.title, kept)
        self.structure = self.base.like(kept, self.recipe)

    def _keep(self, module: nnx.Module) -> None:
        if not self.scope.is_mutable_collection(GRAPHDEF[0]):
            return  # like what is sown: dropped where it may not be stored
        if not self.recipe.keep_rngs:
            give_back_streams(module)
        module = nnx.clone(module)
        nnx.pop(module, nnx.Intermediate)
        self.scope.put_variable(*GRAPHDEF, nnx.graphdef(module))

    def _place(self, location: Location) -> tuple[str, str]:
        """(name, path of its scope) as Linen's errors show them."""
        return location[-1], "/" + "/".join((*self.scope.debug_path, *location[1:-1]))

    def _create_missing(self) -> None:
        missing = [slot for location, slot in self.structure.slots.items() if location not in self.found]
        if not missing:
            return
        writable = self.scope.is_mutable_collection
        denied = [s.location for s in missing if not writable(s.location[0]) or s.location not in self.base.slots]
        if denied:
            error = self._not_found(denied[0])
            error.add_note("Missing are:" + "".join(f"\n  {show_path(at)}" for at in denied))
            raise error
        made = dict(nnx.to_flat_state(nnx.state(self._made_for(missing))))
        for slot in missing:
            leaf = made.get(slot.path)
            if leaf is None:
                raise ConstructorChangedError(self.recipe.title, slot.path)
            self._store(slot.location, self.box(leaf) if isinstance(leaf, nnx.Variable) else leaf)

    def _made_for(self, missing: list[Slot]) -> nnx.Module:
        """What the recipe makes, for the values of `missing`: a key that none of these needs may be missing too.

        Linen asks for a key for each parameter, and for none for other variables.
        """
        with_params = any(slot.location[0] == "params" for slot in missing)
        if with_params or self.host.has_rng("params") or not self.recipe.abstract:
            return self.recipe.make(self.host)
        paths, streams = frozenset(slot.path for slot in missing), self.host.streams
        key = paths, streams
        for name in remember(self.base.memo, key, lambda: keys_needed(self.recipe, streams, paths)):
            if not self.host.has_rng(name):
                self.host.make_rng(name)  # raises as Linen does
        given = self.host.make_rng
        lenient = Host(None, True, streams, lambda name: given(name) if self.host.has_rng(name) else no_key())
        return self.recipe.make(lenient)

    def _not_found(self, location: Location) -> Exception:
        collection, (name, path) = location[0], self._place(location)
        if self.scope.is_collection_empty(collection):
            return flax.errors.ScopeCollectionNotFound(collection, name, path)
        if collection == "params":
            return flax.errors.ScopeParamNotFoundError(name, path)
        return flax.errors.ScopeVariableNotFoundError(name, collection, path)

    # ---- the module ----

    def _subject(self) -> "Subject":
        slots, reserved = self.structure.slots, self.scope.name_reserved
        # In a shared scope (nn.share_scope) there are variables of other Linen modules, under names they reserved.
        unknown = {at: x for at, x in self.found.items() if at not in slots and not reserved(at[1], at[0])}
        subject = self._built(self.structure)
        if not unknown:
            return subject
        rest = attach(subject.module, unknown)
        # Linen itself puts some there (capture_intermediates), and a module runs the same without them.
        rest = {at: x for at, x in rest.items() if at[0] != "intermediates"}
        if not rest:
            return Subject(subject.module)
        later = self._structure_later()
        unexpected = [at for at in rest if at not in later.slots and not _may_wait(subject.module, at)]
        if unexpected:
            raise UnexpectedVariablesError(f"ToLinen({self.recipe.title})", unexpected, slots)
        subject = self._built(later)
        unknown = {at: x for at, x in unknown.items() if at not in later.slots}
        attach(subject.module, unknown)
        return Subject(subject.module) if unknown else subject

    def _built(self, structure: Structure) -> "Subject":
        boxes: list[tuple[int, dict[str, Any]]] = []
        given = [self._leaf(slot, i, boxes) for i, slot in enumerate(structure.order)]
        module, objects = structure.build(given)
        for i, metadata in boxes:
            index = structure.indices[i]
            assert index is not None  # of a Variable
            objects[index].set_metadata(metadata)
        return Subject(module, structure, objects, given)

    def _leaf(self, slot: Slot, i: int, boxes: list[tuple[int, dict[str, Any]]]) -> Any:
        if slot.location not in self.found:
            raise self._not_found(slot.location)
        raw = self.found[slot.location]
        if isinstance(raw, meta.AxisMetadata) and slot.kind is not None:
            variable = to_nnx_variable(slot.location[0], raw)
            raw = variable.get_raw_value()
            boxes.append((i, {**slot.metadata, **variable.get_metadata()}))
        if slot.shape is not None and slot.location[0] == "params" and np.shape(raw) != slot.shape:
            raise flax.errors.ScopeParamShapeError(*self._place(slot.location), np.shape(raw), slot.shape)
        return raw

    def _structure_later(self) -> Structure:
        """The structure with the state that this method creates in a call, as far as Linen has it."""
        known = self.structure.later
        if not isinstance(self.method, str):
            return self._trace_later()  # a function may be another one each time
        try:
            signature = distinct(jax.tree.map(_abstract, (self.args, self.kwargs)))
            key = self.method, signature, frozenset(self.found), self._may_create_params
            hash(key)
        except TypeError:
            return self._trace_later()
        return remember(known, key, self._trace_later)

    @property
    def _may_create_params(self) -> bool:
        return self.scope.is_mutable_collection("params")

    def _trace_later(self) -> Structure:
        def make() -> nnx.Module:
            host = Host.abstract(self.host.streams)
            module = self.recipe.make(host) if self.structure is self.base else self._built(self.structure).module
            attach(module, {at: x for at, x in self.found.items() if at not in self.structure.slots})
            with hosted(host):
                _invoke(module, self.method, self.args, self.kwargs)
            if not self.recipe.keep_rngs:
                give_back_streams(module)
            return module

        module = nnx.eval_shape(make)
        # What the call is to create must not be there yet, but params that nobody may create are missing.
        gone = lambda at: at not in self.found and (at[0] != "params" or self._may_create_params)  # noqa: E731
        nnx.pop(module, lambda path, x: gone(location_of(path, x)))
        return Structure(module)

    # ---- what the call did ----

    def _write(self, path: tuple[Any, ...], x: Any, *, existed: bool) -> None:
        location, kind = location_of(path, x), type(x)
        if not isinstance(x, nnx.Variable):
            if location in self.found:  # an array that was no state before the call is not made state by it
                self._put(location, x, sown=False)
            return
        raw = x.get_raw_value()
        sown = issubclass(kind, nnx.Intermediate) or type(raw) is tuple
        if self.host.initializing and existed and location[0] != "params" and not sown:
            return  # as in Linen's own layers, init returns state as it was before the first step
        box = self.found.get(location)
        if isinstance(box, meta.AxisMetadata):
            raw = box.replace_boxed(raw)
        self._put(location, self.box(x) if location not in self.found else raw, sown=sown)

    def _put(self, location: Location, value: Any, *, sown: bool) -> None:
        if self.scope.is_mutable_collection(location[0]):
            self._store(location, value)
        elif not sown:  # Linen's `sow` does nothing where it may not write; all else is an error
            if location not in self.found:
                raise self._not_found(location)
            raise flax.errors.ModifyScopeVariableError(location[0], *self._place(location))

    def _store(self, location: Location, value: Any) -> None:
        self.found[location] = value
        collection, name, *rest = location
        for key in reversed(rest):
            value = {key: value}
        self.scope.put_variable(collection, name, value)


# ---- the module of one call ----


class Subject:
    """The NNX module of one call, and what it held when the call began.

    Args:
      module: the module.
      structure, objects, given: its structure, what is in it by index, and its values; unless it was changed since.
    """

    def __init__(
        self,
        module: nnx.Module,
        structure: Structure | None = None,
        objects: list[Any] | None = None,
        given: list[Any] | None = None,
    ):
        self.module, self._structure, self._given = module, structure, given or []
        self._objects = objects or []
        if structure is None:
            self._before = _contents(module, with_streams=True)
            found = list(nnx.iter_modules(module))
            self.modules = [(path, m) for path, m in found if visible_class(type(m)) is not None]
            return
        self._before = None
        self.modules = [(path, self._objects[i]) for path, i, _ in structure.visible]
        self._stamps = [(x, track(x)) for x in map(self._objects.__getitem__, structure.objects)]
        at = [(self._objects[i]._nnx_items(), key) for i, key in structure.containers]
        self._containers = [(items, key, contents(items[key])) for items, key in at]

    def streams(self, host: Host, kept: bool) -> Any:
        """The context of the call: streams that have their own keys, for tags that Linen has none for."""
        if not kept:
            return nullcontext()
        found = [x for _, x in nnx.iter_graph(self.module) if isinstance(x, nnx.RngStream)]
        return reseeded(x for x in found if x.tag in host.streams)

    def show(self) -> None:
        """Let Linen see the calls of the submodules."""
        if self._structure is None:
            for _, module in self.modules:
                set_class(module, visible_class(type(module)) or type(module))
            return
        for _, index, cls in self._structure.visible:
            set_class(self._objects[index], cls)

    def hide(self) -> None:
        """Undo `show`."""
        for _, module in self.modules:
            plain_class = getattr(type(module), "_nnx_plain", None)
            if plain_class is not None:
                set_class(module, plain_class)

    def moved(self) -> bool:
        """Whether anything but the values of Variables may have changed."""
        if self._structure is None or not self._structure.countable:
            return True
        return any(x._nnx_version != stamp for x, stamp in self._stamps) or any(
            _differ(contents(items.get(key)), before) for items, key, before in self._containers
        )

    def written(self, moved: bool, with_streams: bool) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
        """(path, Variable or array, whether it was there before) of all that the call wrote."""
        if not moved:
            assert self._structure is not None
            for slot, index, raw in zip(self._structure.order, self._structure.indices, self._given, strict=True):
                assert index is not None  # `countable`
                if (x := self._objects[index])._raw_value is not raw:
                    yield slot.path, x, True
            return
        plain(self.module)
        before = self._before if self._before is not None else self._before_of_structure()
        for path, (x, value) in _contents(self.module, with_streams=with_streams).items():
            known = before.get(path)
            if known is None or known[1] is not value:
                yield path, x, known is not None and known[0] is x

    def _before_of_structure(self) -> dict[tuple[Any, ...], tuple[Any, Any]]:
        assert self._structure is not None
        parts = zip(self._structure.order, self._structure.indices, self._given, strict=True)
        return {slot.path: (raw if index is None else self._objects[index], raw) for slot, index, raw in parts}


def _differ(now: list[Any], before: list[Any]) -> bool:
    return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))


def _contents(module: nnx.Module, *, with_streams: bool) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """path -> (Variable or array, its value) of all state in `module`; streams of Linen's have none."""
    walked = list(nnx.iter_graph(module))
    streams = [x for _, x in walked if isinstance(x, LinenStream if with_streams else nnx.RngStream)]
    passed = {id(x.__dict__.get(name)) for x in streams for name in ("key", "count")}
    found = {}
    for path, x in walked:
        if isinstance(x, nnx.Variable):
            if id(x) not in passed:
                found[path] = x, x.get_raw_value()
        elif isinstance(x, jax.Array | np.ndarray):
            found[path] = x, x
    return found


def _invoke(module: nnx.Module, method: Method, args: Any, kwargs: Any) -> Any:
    if isinstance(method, str):
        return getattr(module, method)(*args, **kwargs)
    return method(module, *args, **kwargs)


def _abstract(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, jax.Array | np.ndarray) else x


def keys_needed(recipe: Recipe, streams: tuple[str, ...], paths: frozenset[tuple[Any, ...]]) -> tuple[str, ...]:
    """Names of the streams whose keys make a difference to what `recipe` makes at `paths`."""
    names: dict[str, None] = {}

    def values(keys: Mapping[str, jax.Array] | None) -> list[Any]:
        def make_rng(name: str) -> jax.Array:
            names[name] = None
            return no_key() if keys is None else keys[name]

        state = nnx.to_flat_state(nnx.state(recipe.make(Host(None, True, streams, make_rng))))
        return [x.get_raw_value() if isinstance(x, nnx.Variable) else x for path, x in state if path in paths]

    jax.eval_shape(values, None)
    keys = {name: no_key() for name in sorted(names)}
    jaxpr = jax.make_jaxpr(values)(keys).jaxpr
    needed = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            needed |= {v for v in eqn.invars if isinstance(v, jax.extend.core.Var)}
    return tuple(name for name, v in zip(keys, jaxpr.invars, strict=True) if v in needed)


# ---- state that an earlier call created ----


def _at(module: Any, keys: tuple[str, ...]) -> Any:
    """What is in `module` under keys that Linen made strings."""
    for key in keys:
        module = next((child for k, child in children(module) if str(k) == key), None)
    return module


def _waits(x: Any) -> bool:
    """Whether `x` gets its state in its first call, as ToNNX does."""
    return hasattr(type(x), "_nnx_take")


def _waiting_at(module: nnx.Module, location: Location) -> tuple[Any, Location] | None:
    """The wrapped module that `location` is in, and the keys in there."""
    for end in range(1, len(location)):
        if _waits(found := _at(module, location[1:end])):
            return found, location[end:]
    return None


def _may_wait(module: nnx.Module, location: Location) -> bool:
    """Whether a variable that this call has no place for may belong to another method of a wrapped module."""
    return _waiting_at(module, location) is not None


def attach(module: nnx.Module, unknown: Mapping[Location, Any]) -> dict[Location, Any]:
    """Give `module` the state that an earlier call created; returns what it has no place for.

    Parameters are not state: an attribute that may hold one (`bias`, None) is part of what the module computes.
    """
    rest = {}
    for location, value in unknown.items():
        collection, *parents, name = location
        if collection == "intermediates" and (found := _waiting_at(module, location)):
            waiting, below = found  # what a wrapped module sowed before, for it to append to
            waiting._nnx_take((collection, *below), to_nnx_variable(collection, value))
            continue
        owner = _at(module, tuple(parents))
        fits = isinstance(owner, nnx.Module) and not _waits(owner) and not hasattr(type(owner), name)
        if fits and collection != "params" and owner._nnx_items().get(name) is None:
            owner._nnx_assign({name: to_nnx_variable(collection, value)}, ())
        else:
            rest[location] = value
    return rest
