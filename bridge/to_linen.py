"""ToLinen: an NNX class as a Linen module.

Linen holds the state, in its collections; each call builds the NNX module around that state, runs it, and puts
back what it wrote. What the module looks like (its structure) is found out once, from shapes alone, and kept.

Law: Linen's rules outside. Apply runs no initializer; a variable that is missing, has a wrong shape or has no place
is an error, and so is a write to a collection that is not mutable. The numbers are those of the NNX module with the
same weights and keys. Nothing that the caller passed in is changed.
Knows structures, locations in collections, and one call; how streams reach Linen is the business of `context`.
"""

import copyreg
import dataclasses
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, meta

import nnx_core as nnx
from bridge._errors import show_path
from bridge._to_linen_errors import ConstructorChangedError, Location, UnexpectedVariablesError
from bridge.context import Host, give_back_streams, hosted, linen_method
from bridge.metadata import to_linen_value, to_nnx_variable
from bridge.structure import (
    Arguments,
    Factory,
    Keywords,
    Recipe,
    Slot,
    Structure,
    distinct,
    location_of,
    require_factory,
    structure_of,
    unwrapped,
)
from nnx_core.graph.walk import children

#: How many structures are remembered for one class and its arguments: one for each form of a call.
MOST_LATER = 64
MetadataFn = Callable[[nnx.Variable[Any]], Any] | None


# ---- one call ----


def _leaves(tree: Any, known: Mapping[Location, Any], at: Location) -> Iterator[tuple[Location, Any]]:
    """(location, value) below `at`; a mapping at a known location is the value of one Variable."""
    if isinstance(tree, Mapping) and at not in known:
        for key, child in tree.items():
            yield from _leaves(child, known, (*at, str(key)))
    else:
        yield at, tree


class Call:
    """One call of a method of the NNX module in the scope of a bound Linen module."""

    def __init__(self, linen: "ToLinen", method: str | Callable[..., Any], args: Any, kwargs: Any):
        assert linen.scope is not None
        self.linen, self.scope, self.host = linen, linen.scope, Host.of(linen)
        self.method, self.args, self.kwargs = method, args, kwargs
        self.recipe = linen._recipe
        self.structure = structure_of(self.recipe, self.host.streams)

    def run(self) -> Any:
        """The result of the method; what it wrote is in the scope."""
        self.found = self._find()
        self._create_missing()
        module = self._module()
        before = _contents(module)
        with hosted(self.host):
            out = _invoke(module, self.method, self.args, self.kwargs)
        for path, (x, value) in _contents(module).items():
            known = before.get(path)
            if known is None or known[1] is not value:
                self._write(path, x, existed=known is not None and known[0] is x)
        return out

    # ---- what Linen has ----

    def _find(self) -> dict[Location, Any]:
        found: dict[Location, Any] = {}
        for collection, tree in self.scope.variables().items():
            if isinstance(tree, Mapping):
                found.update(_leaves(tree, self.structure.slots, (collection,)))
        return found

    def _place(self, location: Location) -> tuple[str, str]:
        """(name, path of its scope) as Linen's errors show them."""
        return location[-1], "/" + "/".join((*self.scope.debug_path, *location[1:-1]))

    def _create_missing(self) -> None:
        missing = [slot for location, slot in self.structure.slots.items() if location not in self.found]
        denied = [at for slot in missing if not self.scope.is_mutable_collection((at := slot.location)[0])]
        if denied:
            error = self._not_found(denied[0])
            error.add_note("Missing are:" + "".join(f"\n  {show_path(at)}" for at in denied))
            raise error
        if not missing:
            return
        made = dict(nnx.to_flat_state(nnx.state(self.recipe.make(self.host))))
        for slot in missing:
            leaf = made.get(slot.path)
            if leaf is None:
                raise ConstructorChangedError(self.recipe.name, slot.path)
            self._store(slot.location, self._boxed(leaf) if isinstance(leaf, nnx.Variable) else leaf)

    def _not_found(self, location: Location) -> Exception:
        collection, (name, path) = location[0], self._place(location)
        if self.scope.is_collection_empty(collection):
            return flax.errors.ScopeCollectionNotFound(collection, name, path)
        if collection == "params":
            return flax.errors.ScopeParamNotFoundError(name, path)
        return flax.errors.ScopeVariableNotFoundError(name, collection, path)

    # ---- the module ----

    def _module(self) -> nnx.Module:
        # In a shared scope (nn.share_scope) there are variables of other Linen modules, under names they reserved.
        mine = {at: x for at, x in self.found.items() if not self.scope.name_reserved(at[1], at[0])}
        unknown = {at: x for at, x in mine.items() if at not in self.structure.slots}
        module = self._merged(self.structure)
        unknown = _attach(module, unknown) if unknown else unknown
        # Linen itself puts some there (capture_intermediates), and a module runs the same without them.
        unknown = {at: x for at, x in unknown.items() if at[0] != "intermediates"}
        if not unknown:
            return module
        later = self._structure_later()
        unexpected = [at for at in unknown if at not in later.slots and not _may_wait(module, at)]
        if unexpected:
            raise UnexpectedVariablesError(f"ToLinen({self.recipe.name})", unexpected, self.structure.slots)
        module = self._merged(later)
        _attach(module, {at: x for at, x in unknown.items() if at not in later.slots})
        return module

    def _merged(self, structure: Structure) -> nnx.Module:
        leaves = [(slot.path, self._leaf(slot)) for slot in structure.slots.values()]
        return nnx.merge(structure.graphdef, nnx.State(leaves))

    @property
    def _may_create_params(self) -> bool:
        return self.scope.is_mutable_collection("params")

    def _leaf(self, slot: Slot) -> Any:
        if slot.location not in self.found:
            raise self._not_found(slot.location)
        value = self.found[slot.location]
        boxed = isinstance(value, meta.AxisMetadata) and slot.kind is not None
        variable = to_nnx_variable(slot.location[0], value) if boxed else None
        raw = value if variable is None else variable.get_raw_value()
        if slot.location[0] == "params" and np.shape(raw) != slot.shape:
            raise flax.errors.ScopeParamShapeError(*self._place(slot.location), np.shape(raw), slot.shape)
        if variable is None or slot.kind is None:
            return raw
        return slot.kind.from_metadata(raw, {**slot.metadata, **variable.get_metadata()})

    def _structure_later(self) -> Structure:
        """The structure with the state that this method creates in a call, as far as Linen has it."""
        known, signature = self.structure.later, jax.tree.map(_abstract, (self.args, self.kwargs))
        if not isinstance(self.method, str):
            return self._trace_later()  # a function may be another one each time
        try:
            key = self.method, distinct(signature), frozenset(self.found), self._may_create_params
            hash(key)
        except TypeError:
            return self._trace_later()
        if key not in known:
            if len(known) >= MOST_LATER:
                known.clear()
            known[key] = self._trace_later()
        return known[key]

    def _trace_later(self) -> Structure:
        def make() -> nnx.Module:
            host = Host.abstract(self.host.streams)
            module = self.recipe.make(host)
            _attach(module, {at: x for at, x in self.found.items() if at not in self.structure.slots})
            with hosted(host):
                _invoke(module, self.method, self.args, self.kwargs)
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
        self._put(location, self._boxed(x) if location not in self.found else raw, sown=sown)

    def _boxed(self, variable: nnx.Variable[Any]) -> Any:
        return self.linen.metadata_fn(variable) if self.linen.metadata_fn else variable.get_raw_value()

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


def _contents(module: nnx.Module) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """path -> (Variable or array, its value) of all state in `module`; its streams are Linen's and have none."""
    walked = list(nnx.iter_graph(module))
    streams = [x for _, x in walked if isinstance(x, nnx.RngStream)]
    passed = {id(x.__dict__.get(name)) for x in streams for name in ("key", "count")}
    found = {}
    for path, x in walked:
        if isinstance(x, nnx.Variable):
            if id(x) not in passed:
                found[path] = x, x.get_raw_value()
        elif isinstance(x, jax.Array | np.ndarray):
            found[path] = x, x
    return found


def _invoke(module: nnx.Module, method: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(method, str):
        return getattr(module, method)(*args, **kwargs)
    return method(module, *args, **kwargs)


def _abstract(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, jax.Array | np.ndarray) else x


def _at(module: Any, keys: tuple[str, ...]) -> Any:
    """What is in `module` under keys that Linen made strings."""
    for key in keys:
        module = next((child for k, child in children(module) if str(k) == key), None)
    return module


def _waits(x: Any) -> bool:
    """Whether `x` gets its state in its first call, as ToNNX does."""
    return hasattr(type(x), "lazy_init")


def _may_wait(module: nnx.Module, location: Location) -> bool:
    """Whether a variable that this call has no place for may belong to another method of a wrapped module."""
    return any(_waits(_at(module, location[1:end])) for end in range(2, len(location)))


def _attach(module: nnx.Module, unknown: Mapping[Location, Any]) -> dict[Location, Any]:
    """Give `module` the state that an earlier call created; returns what it has no place for.

    Parameters are not state: an attribute that may hold one (`bias`, None) is part of what the module computes.
    """
    rest = {}
    for location, value in unknown.items():
        collection, *parents, name = location
        owner = _at(module, tuple(parents))
        fits = isinstance(owner, nnx.Module) and not _waits(owner) and not hasattr(type(owner), name)
        if fits and collection != "params" and owner._nnx_items().get(name) is None:
            owner._nnx_assign({name: to_nnx_variable(collection, value)}, ())
        else:
            rest[location] = value
    return rest


# ---- the Linen module ----


class ToLinen(nn.Module):
    """A Linen module that runs an NNX module: `init`, `apply` and every Linen transform work on it.

    The Variables of the NNX module are in the collections of their types, under its paths, with string keys:
    `variables["params"]["layers"]["0"]["kernel"]`. Random streams have no state in Linen; each draws its keys
    from Linen's stream of its name, or from `params` where there is none. Arrays that are plain attributes are in
    the collection `arrays`. State that a call creates is created in its collection and found there by the next.

    init returns state as the constructor made it: like Linen's BatchNorm, the first call does not move averages.

    Args:
      nnx_class: the NNX class, or any function that returns an `nnx.Module`; not an instance.
      args: its positional arguments, passed on as they are.
      kwargs: its keyword arguments, passed on as they are.
      skip_rng: do not pass `rngs`, although the constructor takes it.
      metadata_fn: Variable -> Linen value; the default boxes values that have metadata. None boxes nothing.
      abstract_init: find out the structure by tracing the constructor. False runs it once, for constructors
        that need real numbers.

    Raises:
      NotAFactoryError: `nnx_class` is an instance, or cannot be called.
      NotAnNnxModuleError: it returned something else than a module.
      UnexpectedVariablesError: the variables hold some that the module has no place for.
      ScopeParamNotFoundError, ScopeVariableNotFoundError, ScopeCollectionNotFound, ScopeParamShapeError,
        ModifyScopeVariableError, InvalidRngError: (flax.errors) where a Linen module raises them.

    Example:
      >>> import jax, jax.numpy as jnp, nnx_core as nnx
      >>> model = ToLinen(nnx.Linear, args=(3, 4))
      >>> y, variables = model.init_with_output(jax.random.key(0), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (4,), 'kernel': (3, 4)}}
      >>> bool((model.apply(variables, jnp.ones((1, 3))) == y).all())
      True
    """

    nnx_class: Factory
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = FrozenDict()
    skip_rng: bool = False
    metadata_fn: MetadataFn = to_linen_value
    abstract_init: bool = True

    def __post_init__(self) -> None:
        require_factory(self.nnx_class)
        for name, kind, plain in (("args", Arguments, tuple), ("kwargs", Keywords, dict)):
            given = getattr(self, name)
            if not isinstance(given, kind):
                object.__setattr__(self, name, kind(plain(given), self.nnx_class))
        super().__post_init__()

    def __call__(self, *args: Any, nnx_method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Any:
        """Call the NNX module.

        Args:
          *args: passed on.
          nnx_method: name of the method to call, or a function of (module, *args, **kwargs).
          **kwargs: passed on.
        """
        return self._run(nnx_method or "__call__", args, kwargs)

    @nn.nowrap
    def _run(self, method: Any, args: Any, kwargs: Any) -> Any:
        if self.scope is None:
            raise flax.errors.CallCompactUnboundModuleError()
        with hosted(None):  # so that a module around this one hands out no keys for our own walks
            return Call(self, method, args, kwargs).run()

    @property
    @nn.nowrap
    def _recipe(self) -> Recipe:
        args, kwargs = self.args, self.kwargs
        assert isinstance(args, Arguments)
        assert isinstance(kwargs, Keywords)
        return Recipe(self.nnx_class, args, kwargs, self.skip_rng, self.abstract_init)

    @property
    def module_class(self) -> type[nnx.Module]:
        """The NNX class; of a function, the class of what it returns.

        >>> import nnx_core as nnx
        >>> ToLinen(nnx.Linear, args=(3, 4)).module_class is nnx.Linear
        True
        """
        target = unwrapped(self.nnx_class)
        if isinstance(target, type):
            return target
        with hosted(None):
            return type(structure_of(self._recipe, ()).module)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        # Nothing may be looked up while copy or pickle fill the fields.
        if not name.startswith("_") and "nnx_class" in self.__dict__:
            method = getattr(self.module_class, name, None)
            is_method = callable(method) and not isinstance(method, type)
            if is_method and method is not getattr(nnx.Module, name, None):
                return types.MethodType(linen_method(name), self)
        return super().__getattr__(name)


def to_linen(
    nnx_class: Factory,
    *args: Any,
    metadata_fn: MetadataFn = to_linen_value,
    name: str | None = None,
    skip_rng: bool = False,
    abstract_init: bool = True,
    **kwargs: Any,
) -> ToLinen:
    """`ToLinen` with the arguments of the NNX class written as in a call of it.

    Example:
      >>> import nnx_core as nnx
      >>> to_linen(nnx.Linear, 3, out_features=4).kwargs
      {'out_features': 4}
    """
    return ToLinen(
        nnx_class,
        args=args,
        kwargs=kwargs,
        metadata_fn=metadata_fn,
        skip_rng=skip_rng,
        abstract_init=abstract_init,
        name=name,
    )


# ---- Linen classes ----


class LinenClass(type):
    """The type of the classes that `to_linen_class` makes: calling one takes the arguments of the NNX class.

    Linen derives classes from these (nn.scan, nn.remat) and calls them with fields, so both have to work.
    """

    _made_from: dict[str, Any]  # what _class_of made it from; a class derived from it inherits this

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module; keywords that are fields of ToLinen are fields, everything else goes to the NNX class."""
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        fields = {k: v for k, v in kwargs.items() if k in names}
        rest = {k: v for k, v in kwargs.items() if k not in names}
        given = fields.get("kwargs", {})
        fields["kwargs"] = {**cls._made_from["kwargs"], **dict(given), **rest}
        given = fields.get("args", ())
        fields["args"] = (*given, *args)
        return super().__call__(**fields)


def _reduce_class(cls: LinenClass) -> Any:
    made_from = cls.__dict__.get("_made_from")
    return cls.__qualname__ if made_from is None else (_class_of, (made_from,))


copyreg.pickle(LinenClass, _reduce_class)


def _restore(made_from: dict[str, Any], state: dict[str, Any]) -> ToLinen:
    module = object.__new__(_class_of(made_from))
    module.__dict__.update(state)
    return module


def _reduce(self: ToLinen, protocol: Any) -> Any:
    # The class can be found in no module, so pickle makes it again. A class derived from it is found by name.
    made_from = type(self).__dict__.get("_made_from")
    if made_from is None:
        return object.__reduce_ex__(self, protocol)
    return _restore, (made_from, dict(self.__dict__))


_classes: "weakref.WeakValueDictionary[Any, type[ToLinen]]" = weakref.WeakValueDictionary()


def to_linen_class(
    base_nnx_class: Factory,
    base_metadata_fn: MetadataFn = to_linen_value,
    base_skip_rng: bool = False,
    **partial_kwargs: Any,
) -> type[ToLinen]:
    """A Linen class that is called like the NNX class, and named after it.

    Its modules are equal, copied and pickled like all Linen modules; asked for again, it is the same class.

    Args:
      base_nnx_class: the NNX class, a `functools.partial` of it, or any function that returns an `nnx.Module`.
      base_metadata_fn: the default of `metadata_fn`, see `ToLinen`.
      base_skip_rng: the default of `skip_rng`.
      **partial_kwargs: arguments of the NNX class; a call may replace them.

    Example:
      >>> import nnx_core as nnx
      >>> LinearToLinen = to_linen_class(nnx.Linear, use_bias=False)
      >>> model = LinearToLinen(3, out_features=4)
      >>> type(model).__name__, model.args, model.kwargs
      ('LinearToLinen', (3,), {'use_bias': False, 'out_features': 4})
    """
    require_factory(base_nnx_class)
    fields = {"nnx_class": base_nnx_class, "metadata_fn": base_metadata_fn, "skip_rng": base_skip_rng}
    return _class_of({**fields, "kwargs": partial_kwargs})


def _class_of(fields: dict[str, Any]) -> type[ToLinen]:
    try:
        key = distinct(fields)
        found = _classes.get(key)
    except TypeError:
        return _new_class(fields)
    if found is None:
        found = _classes[key] = _new_class(fields)
    return found


def _new_class(fields: dict[str, Any]) -> type[ToLinen]:
    target = unwrapped(fields["nnx_class"])
    name = f"{getattr(target, '__name__', type(target).__name__)}ToLinen"
    body = {
        "__doc__": f"`{getattr(target, '__name__', target)}` as a Linen module.",
        "__module__": __name__,
        "__qualname__": name,
        "__annotations__": {"nnx_class": Factory, "skip_rng": bool, "metadata_fn": MetadataFn},
        "__reduce_ex__": nn.nowrap(_reduce),
        "_made_from": fields,
        **{field: fields[field] for field in ("nnx_class", "skip_rng", "metadata_fn")},
    }
    return LinenClass(name, (ToLinen,), body)
