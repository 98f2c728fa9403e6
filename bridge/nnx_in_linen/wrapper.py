"""ToLinen: an NNX class as a Linen module.

Linen holds the state, in its collections; each call builds the NNX module around that state, runs it, and puts
back what it wrote. What the module looks like (its structure) is found out once, from shapes alone, and kept.

Law: Linen's rules outside. Apply runs no initializer; a variable that is missing, has a wrong shape or has no place
is an error, and so is a write to a collection that is not mutable. The numbers are those of the NNX module with the
same weights and keys. Nothing that the caller passed in is changed.
Knows structures, locations in collections, and one call; how streams reach Linen is the business of `host`.
"""

import copyreg
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

import nnx_core as nnx
from bridge.nnx_in_linen.call import Call, Settings
from bridge.nnx_in_linen.host import hosted, named_method
from bridge.nnx_in_linen.stand_ins import Unowning, plain
from bridge.nnx_in_linen.structure import (
    Arguments,
    AugmentFn,
    Factory,
    Keywords,
    Modes,
    Recipe,
    distinct,
    has_parameter,
    require_factory,
    structure_of,
    unwrapped,
)
from bridge.variables.metadata import NAMES, to_linen_value
from nnx_core._foreign import is_foreign
from nnx_core.graph.watched import Method, public_methods

MetadataFn = Callable[[nnx.Variable[Any]], Any] | None


# ---- the Linen module ----


def _boxed_as(kind: type[Any], variable: nnx.Variable[Any]) -> Any:
    """The value of a Variable, in a box of this type if there is something to say."""
    value, metadata = variable.get_raw_value(), variable.get_metadata()
    if not issubclass(kind, nn.Partitioned):
        return kind(type(variable), value, metadata) if metadata else value
    names = metadata.get(NAMES)
    return value if names is None else kind(value, tuple(names))


class ToLinen(nn.Module):
    """A Linen module that runs an NNX module: `init`, `apply` and every Linen transform work on it.

    The Variables of the NNX module are in the collections of their types, under its paths, with string keys:
    `variables["params"]["layers"]["0"]["kernel"]`. Random streams have no state in Linen; each draws its keys
    from Linen's stream of its name, or from `params` where there is none. Arrays that are plain attributes are in
    the collection `arrays`. State that a call creates is created in its collection and found there by the next.

    init returns state as the constructor made it: like Linen's BatchNorm, the first call does not move averages.

    Same keys, same numbers as in Linen: the n-th key that NNX code draws from a stream is the n-th
    `make_rng` of this module, wherever in Linen it is. So what the class itself draws equals, bit for bit, what a
    Linen module in its place draws in the same order: the initial values of nnx.Linear and nn.Dense, the masks of
    both Dropouts. What NNX modules inside it draw does not: a Linen submodule has keys of its own, with its name
    folded in, and a constructor gets one `rngs` and does not say for which part it draws. To begin such a
    model with Linen's values, pass those to `apply`; or wrap the layers one by one, in a Linen module.

    Args:
      nnx_class: the NNX class, or any function that returns an `nnx.Module`; not an instance. A class of flax.nnx
        will do, as it is, and a function whose annotation says that it takes flax.nnx's Rngs.
      args: its positional arguments, passed on as they are.
      kwargs: its keyword arguments, passed on as they are.
      skip_rng: do not pass `rngs`, although the constructor takes it.
      metadata_fn: Variable -> Linen value; the default boxes values that have metadata. None boxes nothing.
      abstract_init: find out the structure by tracing the constructor. False runs it once, for constructors
        that need real numbers.
      metadata_type: an older way to say `metadata_fn`: the class of the boxes, called as NNXMeta is
        (type of the Variable, value, metadata), or as nn.Partitioned is (value, axis names).
      nnx_module_augment_fn: called with (NNX module, name of this module) before any state is loaded, to change the
        module or to return another one: adapters, quantization.
      keep_graphdef: keep the structure of the module, static attributes included, in the variables, as a pytree
        without leaves: `variables["nnx"]["graphdef"]`. Apply uses it, and updates it where "nnx" is mutable.
      keep_rngs: keep keys and counts of the random streams too, in the collections "RngKey" and "RngCount". They
        serve streams that apply gets no rng for; the others get their keys from Linen, by their tags.
      nnx_modes: what `train`, `eval` and `set_attributes` said.

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
    metadata_type: type[Any] | None = None
    nnx_module_augment_fn: AugmentFn | None = None
    keep_graphdef: bool = False
    keep_rngs: bool = False
    nnx_modes: Modes = ()

    def __post_init__(self) -> None:
        require_factory(self.nnx_class)
        for name, kind, container in (("args", Arguments, tuple), ("kwargs", Keywords, dict)):
            arguments = getattr(self, name)
            if not isinstance(arguments, kind):
                object.__setattr__(self, name, kind(container(arguments), self.nnx_class))
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
        box = self.metadata_fn or nnx.Variable.get_raw_value
        if self.metadata_type is not None:
            box = functools.partial(_boxed_as, self.metadata_type)
        with hosted(None):  # so that a module around this one hands out no keys for our own walks
            return Call(self, Settings(self._recipe, box, self.keep_graphdef), method, args, kwargs).run()

    @nn.nowrap
    def _alone(self, module: nnx.Module) -> "ToLinen":
        """A Linen module like this one for a submodule, with the class name of that; its initial values are zeros."""
        module = nnx.clone(module)
        plain(module)
        graphdef, state = nnx.split(module)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return _class_like(type(module))(functools.partial(_blank, graphdef, shapes), parent=None)

    @nn.nowrap
    def _register_submodules(self, name: str, value: Any) -> None:
        # Linen looks for modules in every field, twice a call: the most expensive part of it. There are none in ours.
        if name not in _FIELDS:
            super()._register_submodules(name, value)

    @nn.nowrap
    def _name_taken(self, *args: Any, **kwargs: Any) -> bool:
        return not isinstance(self._state, Unowning) and super()._name_taken(*args, **kwargs)

    @property
    @nn.nowrap
    def _recipe(self) -> Recipe:
        args, kwargs = self.args, self.kwargs
        assert isinstance(args, Arguments)
        assert isinstance(kwargs, Keywords)
        augment = self.nnx_module_augment_fn
        name = None if augment is None else self.name
        options = (self.skip_rng, self.abstract_init, self.keep_rngs, self.nnx_modes, augment, name)
        return Recipe(self.nnx_class, args, kwargs, *options)

    @nn.nowrap
    def train(self, **attributes: Any) -> "ToLinen":
        """This module with the NNX module in training mode, as `nnx.Module.train` sets it; this one stays as it is.

        >>> import nnx_core as nnx
        >>> model = to_linen(nnx.Dropout, 0.5).eval()
        >>> model.nnx_modes, model.train() == to_linen(nnx.Dropout, 0.5).train()
        ((('eval', ()),), True)
        """
        return self._in_mode("train", attributes)

    @nn.nowrap
    def eval(self, **attributes: Any) -> "ToLinen":
        """This module with the NNX module in evaluation mode; see `train`."""
        return self._in_mode("eval", attributes)

    @nn.nowrap
    def set_attributes(self, *, raise_if_not_found: bool = True, **attributes: Any) -> "ToLinen":
        """This module with these attributes set on every NNX submodule that has them; see `train`.

        Raises:
          AttributeNotFoundError: at the next call, if there is none that has one of them.
        """
        return self._in_mode("set_attributes", {"raise_if_not_found": raise_if_not_found, **attributes})

    @nn.nowrap
    def _in_mode(self, method: str, attributes: dict[str, Any]) -> "ToLinen":
        # A mode undoes the mode before it, if that set no more than this one does.
        before = [m for m in self.nnx_modes if m[0] not in ("train", "eval") or dict(m[1]).keys() - attributes.keys()]
        if method == "set_attributes":
            before = list(self.nnx_modes)
        return self.clone(nnx_modes=(*before, (method, tuple(attributes.items()))))

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
            if is_method and method is not getattr(nnx.Module, name, None):  # nnx.Module's own are of no use here
                return types.MethodType(_linen_method(name), self)
        return super().__getattr__(name)


@functools.cache
def _linen_method(name: str) -> Method:
    """A Linen method that calls `self(..., nnx_method=name)`, named `name`."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, args, kwargs)

    return named_method(name, method)


def _methods_of(cls: Any) -> dict[str, Method]:
    """Linen methods for the public methods of an NNX class that ToLinen has not; none for a function."""
    if not (isinstance(cls, type) and (issubclass(cls, nnx.Module) or is_foreign(cls))):
        return {}
    names = [name for name in public_methods(cls) if name == "__call__" or not hasattr(nnx.Module, name)]
    return {name: _linen_method(name) for name in names if not hasattr(ToLinen, name)}


def _blank(graphdef: nnx.GraphDef, shapes: nnx.State) -> nnx.Module:
    module: nnx.Module = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return module


@functools.lru_cache(maxsize=1024)
def _class_like(cls: type) -> type[ToLinen]:
    """ToLinen under the name of an NNX class, with its methods."""
    return type(cls.__name__, (ToLinen,), {"__module__": cls.__module__, **_methods_of(cls)})


_FIELDS = frozenset(f.name for f in dataclasses.fields(ToLinen))
#: Those that `to_linen` has no parameters for.
_OPTIONS = frozenset({"metadata_type", "nnx_module_augment_fn", "keep_graphdef", "keep_rngs", "nnx_modes"})


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

    Keywords that the NNX class has no parameter for and that are further options of `ToLinen` (`keep_rngs`,
    `nnx_module_augment_fn`, ...) are these.

    Example:
      >>> import nnx_core as nnx
      >>> to_linen(nnx.Linear, 3, out_features=4).kwargs
      {'out_features': 4}
    """
    options = {key: kwargs.pop(key) for key in _OPTIONS & kwargs.keys() if not has_parameter(nnx_class, key)}
    return ToLinen(
        nnx_class,
        args=args,
        kwargs=kwargs,
        metadata_fn=metadata_fn,
        skip_rng=skip_rng,
        abstract_init=abstract_init,
        name=name,
        **options,
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
        keywords = dict(fields.get("kwargs", {}))
        fields["kwargs"] = {**cls._made_from["kwargs"], **keywords, **rest}
        fields["args"] = (*fields.get("args", ()), *args)
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
        remembered = _classes.get(key)
    except TypeError:
        return _new_class(fields)
    if remembered is None:
        remembered = _classes[key] = _new_class(fields)
    return remembered


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
        # Found by name, for transforms that are told which methods to lift.
        **_methods_of(target),
        **{field: fields[field] for field in ("nnx_class", "skip_rng", "metadata_fn")},
    }
    return LinenClass(name, (ToLinen,), body)
