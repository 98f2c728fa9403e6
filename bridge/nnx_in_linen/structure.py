"""What an NNX class makes inside Linen: a structure without numbers, and where Linen keeps the numbers.

Law: equal recipes make equal structures, so a structure is found out once; arguments reach the constructor as the
very objects that were passed, and what was passed is never changed. Keys in Linen are strings.
Knows constructors, paths and locations; knows no scopes, and no numbers.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

import nnx_core as nnx
from bridge._types import Location
from bridge.nnx_in_linen._errors import KeyClashError, NotAFactoryError, NotAnNnxModuleError
from bridge.nnx_in_linen.host import Host, LinenRngs, give_back_streams, hosted, keep_streams, made_by
from bridge.nnx_in_linen.stand_ins import visible_class
from bridge.variables.mapping import location_of as location_of_variable
from nnx_core._errors import Path
from nnx_core._foreign import is_foreign
from nnx_core.graph.pack import Refs
from nnx_core.graph.structure import GraphDef, Node, nodes
from nnx_core.graph.unpack import Unpacker

Factory = Callable[..., nnx.Module]
#: (module, name of the Linen module) -> the module to use, or None for the module itself, which may be changed.
AugmentFn = Callable[[nnx.Module, str | None], nnx.Module | None]
#: (method of the module, its keyword arguments), called in this order once the module is made.
Modes = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
#: The collection of arrays that are plain attributes: state that has no Variable type to name it.
ARRAYS = "arrays"


# ---- the arguments of a constructor ----


class _Untouched:
    """Arguments on their way through Linen, which would freeze lists and dicts in a field.

    Not iterable on purpose: Linen's fingerprints would take an iterable apart, and lose the values of a mapping.
    """

    __slots__ = ("__weakref__", "_owner", "_value")

    def __init__(self, value: Any, owner: Any = None):
        self._value, self._owner = value, owner

    def key(self) -> Any:
        """The content as something hashable. Raises TypeError if it holds something that is not."""
        return distinct(self._value)

    def __hash__(self) -> int:
        try:
            return hash((self._owner, self.key()))  # Linen's fingerprint of a dataclass type leaves out which
        except TypeError:
            return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if isinstance(other, _Untouched) else other))

    def __len__(self) -> int:
        return len(self._value)

    def __getitem__(self, key: Any) -> Any:
        return self._value[key]

    def __repr__(self) -> str:
        return repr(self._value)

    def __reduce__(self) -> Any:
        return type(self), (self._value, self._owner)


class Arguments(_Untouched):
    """Positional arguments; a sequence, equal to the tuple of them."""

    __slots__ = ()


class Keywords(_Untouched):
    """Keyword arguments; a mapping, equal to the dict of them."""

    __slots__ = ()

    def keys(self) -> Any:
        """The names."""
        return self._value.keys()

    def values(self) -> Any:
        """What is given for them."""
        return self._value.values()

    def items(self) -> Any:
        """(name, value) of each."""
        return self._value.items()

    def get(self, name: str, default: Any = None) -> Any:
        """What is given for `name`, or the default."""
        return self._value.get(name, default)

    def copy(self) -> dict[str, Any]:
        """A dict of them."""
        return dict(self._value)

    def __contains__(self, name: object) -> bool:
        return name in self._value

    __iter__ = None


def distinct(x: Any) -> Any:
    """`x` as a hashable value that keeps 1, 1.0 and True, lists and tuples apart."""
    if isinstance(x, Mapping):
        return type(x), tuple((k, distinct(v)) for k, v in x.items())
    if isinstance(x, list | tuple):
        return type(x), tuple(map(distinct, x))
    if isinstance(x, nnx.Object):
        raise TypeError("a module may change")  # hashes by identity, which says nothing of its content
    hash(x)
    return type(x), x


# ---- building ----


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that an NNX module is made from but its random keys; equal if it makes the same structure.

    Args:
      factory, args, kwargs: what is called.
      skip_rng: whether `rngs` is kept from it.
      abstract: whether it may be traced.
      keep_rngs: whether its streams keep keys and counts of their own.
      modes: `train` or `eval`, ..., to be called on what it made.
      augment, name: what changes it then, and the name that this is told.
    """

    factory: Factory
    args: Arguments
    kwargs: Keywords
    skip_rng: bool = False
    abstract: bool = True
    keep_rngs: bool = False
    modes: Modes = ()
    augment: AugmentFn | None = None
    name: str | None = None

    @functools.cached_property
    def key(self) -> Any:
        """What it is compared by, or None if the arguments cannot be compared."""
        options = (self.skip_rng, self.abstract, self.keep_rngs, self.augment, self.name)
        try:
            key = self.factory, self.args.key(), self.kwargs.key(), options, distinct(self.modes)
            hash(key)
        except TypeError:
            return None
        return key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key is not None and self.key == other.key

    @property
    def title(self) -> str:
        """The name of the class."""
        target = unwrapped(self.factory)
        return str(getattr(target, "__name__", target))

    def make(self, host: Host) -> nnx.Module:
        """A new module, with keys from `host`, whose streams are then Linen's."""
        with hosted(host):
            kwargs, rngs = dict(self.kwargs), None
            if not self.skip_rng and _takes_rngs(self.factory, self.args, kwargs):
                # What is kept must not depend on which streams Linen has this time.
                rngs = LinenRngs.of(host, only_common=self.keep_rngs)
            module = self._checked(made_by(self.factory, self.args, kwargs, rngs), self.factory)
            module = nnx.clone(module)  # what was passed in as an argument stays the caller's
            set_modes(module, self.modes)
            if self.augment is not None:
                changed = self.augment(module, self.name)
                module = module if changed is None else self._checked(changed, self.augment)
        if self.keep_rngs:
            keep_streams(module, host)
        else:
            give_back_streams(module)
        return module

    @staticmethod
    def _checked(module: Any, maker: Any) -> nnx.Module:
        if not isinstance(module, nnx.Module):
            raise NotAnNnxModuleError(unwrapped(maker), module)
        return module


def set_modes(module: nnx.Module, modes: Modes) -> None:
    """Call what `modes` says on `module`."""
    for method, arguments in modes:
        getattr(module, method)(**dict(arguments))


def unwrapped(factory: Any) -> Any:
    """The class or function in a `functools.partial`."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


def _signature(factory: Any) -> inspect.Signature:
    """The parameters of a class or function. Of a class of flax.nnx, whose metaclass hides them, its constructor's."""
    target, given = factory, factory
    while isinstance(target, functools.partial):
        target = target.func
    if isinstance(target, type) and is_foreign(target):
        given = functools.partial(target.__init__, None)  # type: ignore[misc]  # only its parameters are asked for
        if isinstance(factory, functools.partial):
            given = functools.partial(given, *factory.args, **factory.keywords)
    return inspect.signature(given)


def _takes_rngs(factory: Factory, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        signature = _signature(factory)
    except (TypeError, ValueError):  # written in C
        return True
    parameters = signature.parameters.values()
    if "rngs" not in signature.parameters:
        return any(p.kind is p.VAR_KEYWORD for p in parameters) and "rngs" not in kwargs
    if isinstance(factory, functools.partial) and "rngs" in factory.keywords:
        return False
    try:
        return "rngs" not in signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return True  # the call itself will say what is wrong with the arguments


def has_parameter(factory: Any, name: str) -> bool:
    """Whether `factory` says that it takes this argument."""
    try:
        return name in _signature(factory).parameters
    except (TypeError, ValueError):  # not callable, or written in C
        return False


def require_factory(factory: Any) -> None:
    """Raise NotAFactoryError unless `factory` is a class or function."""
    if isinstance(factory, nnx.Object | nn.Module) or is_foreign(type(factory)):
        raise NotAFactoryError(factory, instance=True)
    if not callable(factory):
        raise NotAFactoryError(factory, instance=False)


# ---- structures ----


@dataclass(frozen=True, eq=False)
class Slot:
    """One Variable (or, `kind` None, plain array) of a structure, and where Linen keeps it; `shape` None if unknown."""

    location: Location
    path: Path
    kind: type[nnx.Variable[Any]] | None
    shape: tuple[int, ...] | None
    metadata: dict[str, Any]


class Structure:
    """An NNX module without numbers, and where Linen keeps the numbers.

    Args:
      module: the module; it may be abstract, and is the structure's own from now on.
      shapes: the shapes where `module` has no numbers at all.
    """

    def __init__(self, module: nnx.Module, shapes: "Structure | None" = None):
        # Collected by the call, not kept by Linen unless it asks: the module has to do without what a call sowed, and
        # gets what its constructor made anew.
        self.intermediates = dict(nnx.to_flat_state(nnx.pop(module, nnx.Intermediate)))
        self.module = module
        self.graphdef, state = nnx.split(module)
        self.slots: dict[Location, Slot] = {}
        for path, leaf in nnx.to_flat_state(state):
            slot = _slot(path, leaf, shapes)
            other = self.slots.setdefault(slot.location, slot)
            if other is not slot:
                raise KeyClashError(slot.location, other.path, path)
        self.later: dict[Any, Structure] = {}  # as it is after a call that created state
        self.memo: dict[Any, Any] = {}  # whatever else follows from the structure alone
        self._find_places()

    def _find_places(self) -> None:
        by_path = {slot.path: slot for slot in self.slots.values()}
        layout = self.graphdef.layout
        self.order = [by_path[path] for path, _, _ in layout]  # the slots in the order of the graph
        self.indices = [index for _, index, _ in layout]
        self._owned = [owned for _, _, owned in layout]
        self.objects: list[int] = []  # the indices of all objects
        self.visible: list[tuple[Path, int, type]] = []  # modules whose calls Linen may see, and their classes then
        self.containers: list[tuple[int, Any]] = []  # attributes that are pytrees, which do not count their changes
        has_states = False
        for path, node in nodes(self.graphdef.root):
            if type(node) is not Node:
                continue
            has_states = has_states or issubclass(node.kind, nnx.State)
            if node.id is not None:
                self._find_object(path, node, node.id)
        #: Whether all that a call may write without anybody noticing is in Variables and `containers`.
        self.countable = not has_states and all(index is not None for index in self.indices)

    def _find_object(self, path: Path, node: Node, index: int) -> None:
        self.objects.append(index)
        seen_as = visible_class(node.kind) if issubclass(node.kind, nnx.Module) else None
        if seen_as is not None:
            self.visible.append((path, index, seen_as))
        for key, child in zip(node.keys, node.children, strict=True):
            if type(child) is Node and child.id is None:
                self.containers.append((index, key))

    def build(self, leaves: list[Any]) -> tuple[nnx.Module, list[Any]]:
        """A new module with these values, in the order of `order`, and its objects and Variables by index."""
        values = [x for x, owned in zip(leaves, self._owned, strict=True) if owned]
        loose = [x for x, owned in zip(leaves, self._owned, strict=True) if not owned]
        refs = Refs()
        unpacker = Unpacker(((values, loose),), refs, templates=self.graphdef.templates)
        return unpacker.build(self.graphdef.root, None), refs.objects

    def like(self, graphdef: GraphDef, recipe: Recipe) -> "Structure":
        """The structure with this GraphDef, in the modes of `recipe`, and the shapes of this one."""

        def make() -> Structure:
            blank = Unpacker((([None] * len(graphdef.layout),) * 2,), Refs(), templates=graphdef.templates)
            module = blank.build(graphdef.root, None)
            set_modes(module, recipe.modes)
            if not recipe.keep_rngs:
                give_back_streams(module)
            return Structure(module, shapes=self)

        return remember(self.later, (graphdef, recipe.modes), make)  # type: ignore[no-any-return]  # a Structure


#: How many structures are remembered for one class and its arguments: one for each form of a call.
MOST_LATER = 64


def remember(memory: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """`memory[key]`, made if it is not there; threads may do so at once."""
    value = memory.get(key)
    if value is None:
        value = make()
        if len(memory) >= MOST_LATER:
            memory.clear()
        memory[key] = value
    return value


def location_of(path: Path, leaf: Any) -> Location:
    """Where Linen keeps the Variable or array at `path`."""
    if not isinstance(leaf, nnx.Variable):
        return ARRAYS, *map(str, path)
    return location_of_variable(path, leaf)


def _slot(path: Path, leaf: Any, shapes: Structure | None) -> Slot:
    location = location_of(path, leaf)
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    shape = tuple(getattr(value, "shape", ()))
    if shapes is not None:
        shape = shapes.slots[location].shape if location in shapes.slots else None
    if not isinstance(leaf, nnx.Variable):
        return Slot(location, path, None, shape, {})
    return Slot(location, path, type(leaf), shape, leaf.get_metadata())


@functools.lru_cache(maxsize=512)
def _remembered(recipe: Recipe, streams: tuple[str, ...]) -> Structure:
    if recipe.abstract:
        return Structure(nnx.eval_shape(lambda: recipe.make(Host.abstract(streams))))
    with jax.ensure_compile_time_eval():  # the constructor wants real numbers, whatever is traced around us
        return Structure(recipe.make(Host.abstract(streams)))


def structure_of(recipe: Recipe, streams: tuple[str, ...]) -> Structure:
    """The structure of what `recipe` makes; the constructor is traced (or run) the first time only."""
    if recipe.keep_rngs:
        streams = ()
    if recipe.key is None:
        return _remembered.__wrapped__(recipe, streams)
    return _remembered(recipe, streams)
