"""Module: an object with the conventions of a neural network layer.

Law: `train`, `eval` and `set_attributes` reach every submodule once, however it is stored; `sow` collects into
Variables of the given type and never changes the numbers of a call.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import jax.numpy as jnp

from nnx_core import filters as filterlib
from nnx_core._errors import AttributeNotFoundError, NnxError, Path
from nnx_core._late_names import late_names
from nnx_core.graph.api import update
from nnx_core.graph.containers import DictStorage, ListStorage
from nnx_core.graph.functional import blank
from nnx_core.graph.objects import Object
from nnx_core.graph.replay import replay
from nnx_core.graph.walk import children, iter_graph
from nnx_core.graph.watched import unwatched
from nnx_core.kinds import Perturbation, variable_type_from_name
from nnx_core.modes import sowing_needs_capture
from nnx_core.variables import Variable

A = TypeVar("A")
take_names = late_names(globals())  # a hook: `_compat_paths` adds `view` and what else flax.nnx has in this file


@unwatched
class Module(Object):
    """Base of all layers and models.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.layers = [nnx.Linear(2, 2, rngs=rngs) for _ in range(3)]
      ...
      ...     def __call__(self, x):
      ...         for layer in self.layers:
      ...             x = layer(x)
      ...         return x
      >>> Model(nnx.Rngs(0))(jnp.ones((1, 2))).shape
      (1, 2)
    """

    def sow(
        self,
        variable_type: type[Variable[Any]] | str,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = lambda xs, x: (*xs, x),
        init_fn: Callable[[], Any] = lambda: (),
        capture_noop: bool | None = None,
    ) -> bool:
        """Add `value` to the Variable `name` of this module, which is created where there is none.

        Args:
          variable_type: its type, such as nnx.Intermediate, or the name of one.
          name: its attribute name.
          value: any pytree.
          reduce_fn: (collected so far, value) -> collected; by default a tuple grows.
          init_fn: what to begin with.
          capture_noop: do nothing outside of `nnx.capture`; None for what `nnx.set_sow_capture_noop` says, which
            at first is False.

        Returns:
          Whether the value was added.

        Raises:
          ValueError: if the attribute exists and is no Variable of that type.
        """
        if sowing_needs_capture(capture_noop):
            return False
        kind = variable_class(variable_type)
        variable = getattr(self, name, None)
        if variable is None:
            setattr(self, name, kind(reduce_fn(init_fn(), value)))
        elif isinstance(variable, kind):
            variable.set_raw_value(reduce_fn(variable.get_raw_value(), value))
        else:
            raise ValueError(_taken(self, name, kind, variable))
        return True

    def perturb(
        self,
        name: str,
        value: A,
        variable_type: type[Variable[Any]] | str = Perturbation,
        capture_noop: bool | None = None,
    ) -> A:
        """`value` plus the Variable `name`, which is created as zeros where there is none.

        The gradient with respect to that Variable is the gradient with respect to `value`. `capture_noop` is that of
        `sow`: `value` is returned as it is then.
        """
        if sowing_needs_capture(capture_noop):
            return value
        kind = variable_class(variable_type)
        if not hasattr(self, name):
            setattr(self, name, kind(jnp.zeros_like(value)))  # not value * 0: NaN * 0 is NaN, -1.0 * 0 is -0.0
        variable = getattr(self, name)
        if not isinstance(variable, kind):
            raise ValueError(_taken(self, name, kind, variable))
        return value + variable.get_value()  # type: ignore[no-any-return]

    def train(self, **attributes: Any) -> None:
        """Set training mode on all submodules: deterministic=False, use_running_average=False."""
        self.set_attributes(deterministic=False, use_running_average=False, **attributes, raise_if_not_found=False)

    def eval(self, **attributes: Any) -> None:
        """Set evaluation mode on all submodules: deterministic=True, use_running_average=True."""
        self.set_attributes(deterministic=True, use_running_average=True, **attributes, raise_if_not_found=False)

    def set_attributes(
        self,
        *filters: filterlib.Filter,
        raise_if_not_found: bool = True,
        graph: bool | None = None,
        **attributes: Any,
    ) -> None:
        """Set attributes on every submodule that has them and that a filter matches (all for no filter).

        Raises:
          AttributeNotFoundError: naming the attributes that no such module has.
        """
        assign_attributes(self, filters or (...,), attributes, raise_if_not_found, graph)

    @classmethod
    def partial_init(cls, state: Any, /, *states: Any) -> Callable[..., Self]:
        """A constructor of this class that takes the values in the States instead of making them.

        `cls.partial_init(state)(*args, **kwargs)` equals `cls(*args, **kwargs)` followed by
        `nnx.update(module, state)`, but no initializer runs for what the States have: the constructor is
        compiled, and returns only the rest. Numbers and arrays among the arguments reach it as they are.

        Args:
          state, *states: States or nested mappings of Variables or arrays; they may be a part of the module's.

        Raises:
          StateMismatchError: listing all paths that the module has not.

        Example:
          >>> import nnx_core as nnx, jax.numpy as jnp
          >>> state = nnx.State({"kernel": nnx.Param(jnp.ones((2, 3)))})
          >>> layer = nnx.Linear.partial_init(state)(2, 3, rngs=nnx.Rngs(0))
          >>> float(layer.kernel.sum()), layer.bias.shape
          (6.0, (3,))
        """

        def make(*args: Any, **kwargs: Any) -> Self:
            module = cls(*args, **kwargs)
            blank(module, state, *states)
            return module

        @functools.wraps(cls, updated=())
        def construct(*args: Any, **kwargs: Any) -> Self:
            module = replay(make, args, kwargs, compiled=True)
            update(module, state, *states)
            return module  # type: ignore[no-any-return]  # what `make` returned

        return construct

    def iter_modules(self) -> Iterator[tuple[Path, "Module"]]:
        """(path, module) of this module and all below, children first."""
        return iter_modules(self)

    def iter_children(self) -> Iterator[tuple[Any, "Module"]]:
        """(key, module) of the direct children that are modules."""
        return iter_module_children(self)


def iter_modules(module: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Path, Module]]:
    """(path, module) of every module in `module`, itself included, children first."""
    return ((path, x) for path, x in iter_graph(module, graph=graph) if isinstance(x, Module))


def iter_module_children(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Any, Module]]:
    """(key, module) of the direct children of `node` that are modules.

    Example:
      >>> import nnx_core as nnx
      >>> [key for key, _ in iter_module_children(nnx.Sequential(nnx.relu))]
      ['layers']
    """
    return ((key, child) for key, child in children(node) if isinstance(child, Module))


def assign_attributes(
    node: Any,
    filters: tuple[filterlib.Filter, ...],
    attributes: dict[str, Any],
    raise_if_not_found: bool,
    graph: bool | None = None,
) -> None:
    """Set attributes on every module in `node` that has them and that a filter matches.

    A flag is never written over state: a Variable that is called `deterministic`, say, stays.
    """
    predicates = filterlib.to_predicates(filters)
    missing = set(attributes)
    writes: list[tuple[Module, str, Any]] = []  # all of them before the first: a failed call changes nothing
    for path, module in iter_modules(node, graph=graph):
        if filterlib.first_match(predicates, path, module) is None:
            continue
        for name, value in attributes.items():
            is_flag = value is None or isinstance(value, bool)
            if hasattr(module, name) and not (is_flag and isinstance(vars(module).get(name), Variable | Module)):
                missing.discard(name)
                if getattr(module, name) is not value:
                    writes.append((module, name, value))
    if missing and raise_if_not_found:
        raise AttributeNotFoundError(missing)
    for module, name, value in writes:
        setattr(module, name, value)


def _taken(module: Module, name: str, kind: type[Variable[Any]], found: Any) -> str:
    return (
        f"Expected {name!r} of {type(module).__name__} to be a Variable of type {kind.__name__}, found"
        f" {type(found).__name__}. Use another name."
    )


def variable_class(kind: type[Variable[Any]] | str) -> type[Variable[Any]]:
    """The Variable type `kind`, or the one registered under that name; an unknown name is registered."""
    return variable_type_from_name(kind, allow_register=True) if isinstance(kind, str) else kind


@unwatched
class List(ListStorage[A], Module):
    """A list of modules, Variables or anything else; its changes are seen by compiled functions.

    Example:
      >>> import nnx_core as nnx
      >>> layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
      >>> layers.append(nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
      >>> [layer.out_features for layer in layers]
      [3, 4]
    """


@unwatched
class Dict(DictStorage[A], Module):
    """A dict of modules, Variables or anything else; its changes are seen by compiled functions.

    Example:
      >>> import nnx_core as nnx
      >>> heads = nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> heads["a"].out_features, heads.a is heads["a"]
      (3, True)
    """


class KeywordTwiceError(NnxError, TypeError):
    """A layer of a Sequential gets one keyword from two sides."""

    def __init__(self, index: int, names: Iterable[str]):
        super().__init__(
            f"Sequential.layers[{index}] gets {', '.join(map(repr, sorted(names)))} twice:\n"
            "  expected each keyword once\n  found    it in the call of the Sequential, and in the dict that the layer"
            " before returned\nLeave it out of one of the two, or give it another name there."
        )


class Sequential(Module):
    """Calls its layers one after another: a tuple is passed on as arguments, a dict as keywords.

    Keywords of the call, `rngs=` among them, go to every layer that has a parameter of that name. Iterating over it
    gives its layers.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model(jnp.ones((1, 2))).shape
      (1, 3)
      >>> [type(layer).__name__ for layer in model][0]
      'Linear'
      >>> layers = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
      >>> bool((layers(jnp.ones((1, 2)), deterministic=True) == layers.layers[0](jnp.ones((1, 2)))).all())
      True
    """

    def __init__(self, *fns: Callable[..., Any]):
        self.layers = List(fns)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the last layer; without layers, the arguments.

        Raises:
          TypeError: a layer cannot be called.
          KeywordTwiceError: a layer gets one keyword from the call and from the layer before it.
        """
        output: Any = None
        handed_on: dict[str, Any] = {}
        for i, f in enumerate(self.layers):
            if not callable(f):
                raise TypeError(f"Sequential.layers[{i}] must be callable, found {type(f).__name__}.")
            own = _taken_by(f, kwargs, is_first=i == 0) if kwargs else {}
            if twice := own.keys() & handed_on.keys():
                raise KeywordTwiceError(i, twice)
            output = f(*args, **handed_on, **own)
            args, handed_on = _as_arguments(output)
        if self.layers:
            return output
        return (args if len(args) > 1 else args[0]) if args else kwargs or None


def _taken_by(f: Callable[..., Any], keywords: dict[str, Any], *, is_first: bool) -> dict[str, Any]:
    """Those of `keywords` that `f` has parameters for; of a builtin that does not tell, all if it is called first."""
    try:
        parameters = inspect.signature(f).parameters
    except ValueError:
        return keywords if is_first else {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    named = {name for name, p in parameters.items() if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)}
    return {name: value for name, value in keywords.items() if name in named}


def _as_arguments(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(output, tuple):
        return output, {}
    return ((), output) if isinstance(output, dict) else ((output,), {})
