"""One call of an NNX module in the scope of a Linen module.

Law: what Linen has is what the module gets, and what the module wrote is what Linen gets; in between runs the NNX
method alone. Apply runs no initializer. A call that fails has changed nothing that its caller can see.
Knows a bound ToLinen, its structure and its scope; knows nothing of how modules are configured, copied or named.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.extend.core
import numpy as np
from flax import linen as nn
from flax.core import meta

import nnx_core as nnx
from bridge._errors import linen_not_found, linen_place, show_path
from bridge._types import Location
from bridge.nnx_in_linen._errors import ConstructorChangedError, KeptGraphDefError, UnexpectedVariablesError
from bridge.nnx_in_linen.host import Host, give_back_streams, hosted, intermediates_made, no_key
from bridge.nnx_in_linen.stand_ins import Sight, located, owning_nothing, seen_by
from bridge.nnx_in_linen.structure import Recipe, Slot, Structure, distinct, location_of, remember, structure_of
from bridge.nnx_in_linen.subject import Subject
from bridge.variables.metadata import to_nnx_variable
from bridge.variables.state import attach, hand_over, taker_of
from nnx_core._errors import Path

#: Where the structure of the module is, for who wants it among the variables.
GRAPHDEF: Location = ("nnx", "graphdef")
Method = str | Callable[..., Any]


def _gather(
    tree: Mapping[str, Any], slots: Mapping[Location, Slot], location: Location, values: dict[Location, Any]
) -> None:
    """Add all values below `location`; a mapping in the place of a slot is the value of one Variable."""
    for key, child in tree.items():
        below = (*location, str(key))
        if below not in slots and isinstance(child, Mapping):
            _gather(child, slots, below, values)
        else:
            values[below] = child


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
        self.values: dict[Location, Any] = {}  # what Linen has, boxes included

    def run(self) -> Any:
        """The result of the method; what it wrote is in the scope."""
        self.values = self._values_in_scope()
        self._use_kept_structure()
        self._create_missing()
        subject = self._subject()
        with subject.streams(self.host, self.recipe.keep_rngs):
            subject.show()
            try:
                entry = self.method if isinstance(self.method, str) else None
                sight = Sight(self.linen, subject.modules, entry)
                with hosted(self.host, self.linen), owning_nothing(self.linen), seen_by(sight):
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

    def _values_in_scope(self) -> dict[Location, Any]:
        values: dict[Location, Any] = {}
        for collection, tree in self.scope.variables().items():
            if isinstance(tree, Mapping):
                _gather(tree, self.structure.slots, (collection,), values)
        return values

    def _use_kept_structure(self) -> None:
        if not self.keep_graphdef:
            return
        self.values.pop(GRAPHDEF, None)
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
        return linen_place(location, self.scope.debug_path)

    def _create_missing(self) -> None:
        missing = [slot for location, slot in self.structure.slots.items() if location not in self.values]
        if not missing:
            return
        writable = self.scope.is_mutable_collection
        denied = [s.location for s in missing if not writable(s.location[0]) or s.location not in self.base.slots]
        if denied:
            raise self._all_not_found(denied)
        initial = dict(nnx.to_flat_state(nnx.state(self._made_for(missing))))
        for slot in missing:
            leaf = initial.get(slot.path)
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

        def make_rng(name: str) -> jax.Array:
            return self.host.make_rng(name) if self.host.has_rng(name) else no_key()

        return self.recipe.make(Host(None, True, streams, make_rng))

    def _all_not_found(self, locations: list[Location]) -> Exception:
        error = self._not_found(locations[0])
        error.add_note("Missing are:" + "".join(f"\n  {show_path(location)}" for location in locations))
        return error

    def _not_found(self, location: Location) -> Exception:
        return linen_not_found(location, self.scope.debug_path, empty=self.scope.is_collection_empty(location[0]))

    # ---- the module ----

    def _subject(self) -> Subject:
        unknown = self._unknown(self.structure)
        subject = self._built(self.structure)
        if self.base.intermediates and self._give_intermediates(subject.module):
            subject = Subject(subject.module)
        if not unknown:
            return subject
        rest = _attached(subject.module, unknown)
        # Linen itself puts some there (capture_intermediates), and a module runs the same without them.
        rest = {location: x for location, x in rest.items() if location[0] != "intermediates"}
        if not rest:
            return Subject(subject.module)
        # Only a call tells what an earlier one may have created: it is traced, and the module built anew.
        later = self._structure_later()
        self._require_places(rest, later, subject.module)
        subject = self._built(later)
        unknown = {location: x for location, x in unknown.items() if location not in later.slots}
        _attached(subject.module, unknown)
        return Subject(subject.module) if unknown else subject

    def _unknown(self, structure: Structure) -> dict[Location, Any]:
        """What Linen has and `structure` has no slot for.

        In a shared scope (nn.share_scope) there are variables of other Linen modules, under names they reserved.
        """
        reserved = self.scope.name_reserved
        return {
            location: value
            for location, value in self.values.items()
            if location not in structure.slots and not reserved(location[1], location[0])
        }

    def _give_intermediates(self, module: nnx.Module) -> bool:
        """Give `module` the Intermediates of its constructor that Linen has not, as they were made; whether any."""
        given = False
        for path, x in self._made_intermediates().items():
            if location_of(path, x) not in self.values:
                given = attach(module, location_of(path, x), x.copy()) or given
        return given

    def _made_intermediates(self) -> dict[Path, nnx.Variable[Any]]:
        made, streams = self.base.intermediates, self.host.streams
        if not self.recipe.abstract:
            return made  # the constructor ran for real
        paths = frozenset(made)

        def numbers() -> dict[Path, Any]:
            return intermediates_made(lambda: self.recipe.make(Host.abstract(streams)))

        needed = remember(self.base.memo, (paths, streams), lambda: keys_needed(self.recipe, streams, paths))
        if needed:
            return dict(nnx.to_flat_state(nnx.state(self.recipe.make(self.host), nnx.Intermediate)))
        values = remember(self.base.memo, nnx.Intermediate, numbers)
        return {path: x.replace(values[path]) for path, x in made.items()}

    def _require_places(self, rest: Mapping[Location, Any], later: Structure, module: nnx.Module) -> None:
        """Raise UnexpectedVariablesError if there is a variable that no call can have created.

        One that is in a wrapped module may belong to another method of it.
        """
        homeless = [location for location in rest if location not in later.slots]
        unexpected = [location for location in homeless if taker_of(module, location) is None]
        if unexpected:
            raise UnexpectedVariablesError(f"ToLinen({self.recipe.title})", unexpected, self.structure.slots)

    def _built(self, structure: Structure) -> Subject:
        boxes: list[tuple[int, dict[str, Any]]] = []
        values = [self._leaf(slot, i, boxes) for i, slot in enumerate(structure.order)]
        module, objects = structure.build(values)
        for i, metadata in boxes:
            index = structure.indices[i]
            assert index is not None  # of a Variable
            objects[index].set_metadata(metadata)
        return Subject(module, structure, objects, values)

    def _leaf(self, slot: Slot, i: int, boxes: list[tuple[int, dict[str, Any]]]) -> Any:
        if slot.location not in self.values:
            raise self._not_found(slot.location)
        raw = self.values[slot.location]
        if isinstance(raw, meta.AxisMetadata) and slot.kind is not None:
            variable = to_nnx_variable(slot.location[0], raw)
            raw = variable.get_raw_value()
            boxes.append((i, {**slot.metadata, **variable.get_metadata()}))
        if slot.shape is not None and slot.location[0] == "params" and np.shape(raw) != slot.shape:
            raise flax.errors.ScopeParamShapeError(*self._place(slot.location), np.shape(raw), slot.shape)
        return raw

    def _structure_later(self) -> Structure:
        """The structure with the state that this method creates in a call, as far as Linen has it."""
        if not isinstance(self.method, str):
            return self._trace_later()  # a function may be another one each time
        try:
            signature = distinct(jax.tree.map(_abstract, (self.args, self.kwargs)))
            key = self.method, signature, frozenset(self.values), self._may_create_params
            hash(key)
        except TypeError:
            return self._trace_later()
        return remember(self.structure.later, key, self._trace_later)

    @property
    def _may_create_params(self) -> bool:
        return self.scope.is_mutable_collection("params")

    def _trace_later(self) -> Structure:
        def make() -> nnx.Module:
            host = Host.abstract(self.host.streams)
            module = self.recipe.make(host) if self.structure is self.base else self._built(self.structure).module
            _attached(module, {at: x for at, x in self.values.items() if at not in self.structure.slots})
            with hosted(host), located(module):
                _invoke(module, self.method, self.args, self.kwargs)
            if not self.recipe.keep_rngs:
                give_back_streams(module)
            return module

        def is_due(path: Path, x: Any) -> bool:
            location = location_of(path, x)
            return location not in self.values and (location[0] != "params" or self._may_create_params)

        module = nnx.eval_shape(make)
        # What the call is to create must not be there yet, but params that nobody may create are missing.
        nnx.pop(module, is_due)
        return Structure(module)

    # ---- what the call did ----

    def _write(self, path: Path, x: Any, *, existed: bool) -> None:
        location, kind = location_of(path, x), type(x)
        if not isinstance(x, nnx.Variable):
            if location in self.values:  # an array that was no state before the call is not made state by it
                self._put(location, x, sown=False)
            return
        raw = x.get_raw_value()
        sown = issubclass(kind, nnx.Intermediate) or type(raw) is tuple
        if self.host.initializing and existed and location[0] != "params" and not sown:
            return  # as in Linen's own layers, init returns state as it was before the first step
        box = self.values.get(location)
        if isinstance(box, meta.AxisMetadata):
            raw = box.replace_boxed(raw)
        self._put(location, self.box(x) if location not in self.values else raw, sown=sown)

    def _put(self, location: Location, value: Any, *, sown: bool) -> None:
        if self.scope.is_mutable_collection(location[0]):
            self._store(location, value)
        elif not sown:  # Linen's `sow` does nothing where it may not write; all else is an error
            if location not in self.values:
                raise self._not_found(location)
            raise flax.errors.ModifyScopeVariableError(location[0], *self._place(location))

    def _store(self, location: Location, value: Any) -> None:
        self.values[location] = value
        collection, name, *rest = location
        for key in reversed(rest):
            value = {key: value}
        self.scope.put_variable(collection, name, value)


def _invoke(module: nnx.Module, method: Method, args: Any, kwargs: Any) -> Any:
    if isinstance(method, str):
        return getattr(module, method)(*args, **kwargs)
    return method(module, *args, **kwargs)


def _abstract(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, jax.Array | np.ndarray) else x


def keys_needed(recipe: Recipe, streams: tuple[str, ...], paths: frozenset[Path]) -> tuple[str, ...]:
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


def _attached(module: nnx.Module, unknown: Mapping[Location, Any]) -> dict[Location, Any]:
    """Give `module` the state that an earlier call created; returns what it has no place for."""
    rest = {}
    for location, value in unknown.items():
        variable = to_nnx_variable(location[0], value)
        # What a wrapped module sowed before, for it to append to.
        if location[0] == "intermediates" and hand_over(module, location, variable):
            continue
        if not attach(module, location, variable):
            rest[location] = value
    return rest
