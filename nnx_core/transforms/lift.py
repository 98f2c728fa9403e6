"""Lifted: the mechanism behind every transform.

A user's function f of objects is seen by JAX as `pure`, a function of a hashable structure and of groups of
leaves, which returns what f did (`After`) and, in the same groups, the leaves it wrote. A transform says
which leaf goes into which group, and calls one JAX function on `pure`; nothing else.

Law: `bind(run)` equals f in everything it does to its arguments, for every `run` that equals calling `pure`.
A call that raises has changed nothing. On unchanged arguments no call walks them (`dispatch`).
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from nnx_core._changes import now
from nnx_core._errors import StructureUpdateError
from nnx_core._foreign import require_own
from nnx_core.graph.effects import After, Forced, apply, check_writes, collect
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import Describe, Leaves, Packer, Place, Refs, Spec
from nnx_core.graph.plan import Plan
from nnx_core.graph.structure import GraphDef, Node
from nnx_core.graph.unpack import Unpacker, Watch
from nnx_core.modes import sharing_allowed, updates_allowed
from nnx_core.transforms.dispatch import Outcomes, Plans, signature
from nnx_core.transforms.groups import Rest, are_pure
from nnx_core.variables import is_ref

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
#: `Lifted.pure` under some JAX transform: (structure, *groups) -> (After, *groups).
Run = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Modes(NamedTuple):
    """What users may forbid: shared references (`graph=False`), structure changes (`graph_updates=False`)."""

    sharing: bool = True
    updates: bool = True

    @classmethod
    def of(cls, graph: bool | None, graph_updates: bool | None) -> "Modes":
        """From flax.nnx's keywords; None is the default, which forbids nothing unless `modes` was told so."""
        return cls(sharing_allowed(graph), updates_allowed(graph_updates))


@dataclass(frozen=True, eq=False)
class Lifted:
    """f, with the treatment of its leaves.

    Args:
      f: the user's function.
      groups: the treatments there are; leaves cross JAX in this order.
      inputs: spec of the positional arguments (a tuple, or one group for all).
      outputs: spec of the result.
      keywords: spec of the keyword arguments (a dict, or one group for all).
      always: groups whose Variables are written back even when f did not (donated ones).
      carried: groups whose Variables travel back even when f did not write them (loop carries).
      enter, leave: what happens to the metadata of Variables on the way in and out.
      strict: what is returned must be treated as it was when it came in (an axis in is the axis out).
      first_decides: of several paths of one thing below one filter spec the first does; else they must agree.
      modes: what the user forbids.
    """

    f: Callable[..., Any]
    groups: tuple[Hashable, ...]
    inputs: Any
    outputs: Any
    keywords: Any = None
    always: frozenset[Hashable] = frozenset()
    carried: frozenset[Hashable] = frozenset()
    enter: Describe | None = None
    leave: Describe | None = None
    strict: bool = False
    first_decides: bool = False
    modes: Modes = Modes()  # noqa: RUF009  # immutable
    plans: Plans = field(default_factory=Plans)

    def pure(self, graphdef: GraphDef, *leaves: Leaves, written: frozenset[int] = frozenset()) -> tuple[Any, ...]:
        """f on fresh objects: (structure, *groups) -> (After, *groups); `written` counts as written in any case."""
        refs, watch = Refs(), Watch()
        unpacker = Unpacker(leaves, refs, self.groups, watch, self.enter, graphdef.templates)
        args_def, kwargs_def = _root(graphdef).children
        args = unpacker.unpack(args_def, Place(("args",), self.inputs, 1))
        kwargs = unpacker.unpack(kwargs_def, Place(("kwargs",), self.keywords, 1))
        out = self.f(*args, **kwargs)
        refs_in = frozenset(id(x) for values, loose in leaves for x in (*values, *loose) if is_ref(x))
        packer = Packer(self.groups, refs, describe=self.leave, strict=self.strict, refs_in=refs_in)
        always = frozenset(packer.group_index[group] for group in self.always)
        carried = frozenset(packer.group_index[group] for group in self.carried)
        after, news = collect(packer, watch, out, self.outputs, Forced(always, carried, written))
        if not self.modes.updates and after.objects:
            paths = [(*refs.path(change.id), key) for change in after.objects for key in change.keys]
            raise StructureUpdateError(name_of(self.f), paths)
        return after, *news

    @functools.cached_property
    def is_plannable(self) -> bool:
        """Whether a plan may keep the groups that the filters chose: not if they read more than the structure."""
        return are_pure(self.inputs, self.keywords)

    def pack(self, args: Args, kwargs: Kwargs) -> tuple[Plan, Packer]:
        """Walk the arguments."""
        stamp = now()  # before the walk: a change during it must make the plan stale
        packer = Packer(self.groups, Refs(), allow_sharing=self.modes.sharing, first_decides=self.first_decides)
        children = (
            packer.pack(args, Place(("args",), self.inputs, 1)),
            packer.pack(kwargs, Place(("kwargs",), self.keywords, 1)),
        )
        graphdef = GraphDef(Node(tuple, None, (0, 1), children, None, None))
        return Plan(graphdef, packer, stamp), packer

    @property
    def named(self) -> Callable[..., Any]:
        """`pure` under the name of f, which profiles, jaxprs and HLO show, and with its place, which errors show."""

        def pure(*packed: Any) -> tuple[Any, ...]:
            return self.pure(*packed)

        pure.__name__ = pure.__qualname__ = short_name_of(self.f)
        signature = inspect.signature(pure)
        unwrapped: Any = pure  # the attributes are those of `inspect`, which JAX asks where a function is
        unwrapped.__wrapped__, unwrapped.__signature__ = self.f, signature
        return pure

    def bind(self, run: Run) -> Callable[..., Any]:
        """f again, on objects; `run` is `pure` under some JAX transform."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.call(run, args, kwargs)

        return dressed(call, self.f)

    def call(self, run: Run, args: Args, kwargs: Kwargs) -> Any:
        """One call of `run` on these arguments."""
        key, roots, loose = signature(args, kwargs, self.inputs, self.keywords)
        plan = self.plans.find(key, roots)
        if plan is None:
            plan, packer = self.pack(args, kwargs)
            leaves = packer.leaves
            if key is not None and self.is_plannable:
                self.plans.remember(key, roots, plan)
        else:
            leaves = plan.leaves(loose)
        after, *written = run(plan.graphdef, *leaves)
        return finish(plan, after, written)


def _root(graphdef: GraphDef) -> Node:
    """What `Lifted.pack` makes: a pair of the positional arguments and the keyword arguments."""
    assert type(graphdef.root) is Node
    return graphdef.root


def arguments_of(graphdef: GraphDef) -> Node:
    """The structure of the positional arguments of a call."""
    args_def = _root(graphdef).children[0]
    assert type(args_def) is Node  # a tuple
    return args_def


def finish(plan: Plan, after: After, written: list[Leaves]) -> Any:
    """Write what a call did into the objects of `plan`; return its result."""
    outcomes: Outcomes = plan.remember("outcomes", Outcomes)
    quick = outcomes.find(plan, after)
    if quick is not None:
        return quick.write(written)
    refs = plan.refs()
    check_writes(after, refs)
    return apply(after, written, refs)


def detached(x: Any, spec: Spec = Rest) -> tuple[GraphDef, Leaves]:
    """`x` packed under indices of its own, in one group: what of it is shared with other values is copied."""
    packer = Packer((Rest,), Refs())
    root = packer.pack(x, Place(("result",), spec, 1))
    return GraphDef(root), packer.leaves[0]


def attached(graphdef: GraphDef, leaves: Leaves) -> Any:
    """The inverse of `detached`."""
    return Unpacker((leaves,), Refs()).unpack(graphdef.root, None)


# ---- what is made once ----


class Form(NamedTuple):
    """What one form of the arguments needs: f with the treatment of its leaves, and `pure` under a JAX transform."""

    lifted: Lifted
    run: Run


class Forms(dict[K, V]):
    """For each form of the arguments (how many there are, which are static, ...) what `make` makes of it, once.

    A base class, and not a dict beside a bound `make`: that would be a reference cycle, which keeps what the user's
    function closes over.
    """

    def make(self, key: K) -> V:
        """What this form needs."""
        raise NotImplementedError

    def __missing__(self, key: K) -> V:
        new = self[key] = self.make(key)
        return new


def as_given(f: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """(args, kwargs), as the caller wrote them."""
    return args, kwargs


def by_count(
    f: Callable[..., Any],
    make: Callable[[int], Form],
    arrange: Callable[[Callable[..., Any], Args, Kwargs], tuple[Args, Kwargs]] = as_given,
) -> Callable[..., Any]:
    """f under a transform whose treatments go by position: each number of arguments has its own Form.

    Args:
      make: makes the Form for a number of arguments, in which the object of a bound method is counted.
      arrange: (f, args, kwargs) -> (args, kwargs), such as `by_position`.
    """
    function, owner = unbound(f)
    form_of = functools.cache(make)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = arrange(function, (*owner, *args), kwargs)
        lifted, run = form_of(len(args))
        return lifted.call(run, args, kwargs)

    return dressed(call, f)


# ---- the user's function and its arguments ----


def name_of(f: Callable[..., Any]) -> str:
    """The name of a function, for errors."""
    return getattr(f, "__qualname__", None) or repr(f)


def short_name_of(f: Callable[..., Any]) -> str:
    """The name of a function, for profiles, jaxprs and HLO."""
    return getattr(f, "__name__", None) or type(f).__name__


def unbound(f: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Object, ...]]:
    """(f, ()) or, for a method bound to an object, (its function, (the object,)).

    The object is an argument like the others, or what the method writes would be lost.
    """
    callee: Any = f
    require_own(f)
    owner = getattr(callee, "__self__", None)
    if isinstance(owner, Object) and inspect.ismethod(callee):
        return callee.__func__, (owner,)
    if inspect.ismethod(callee):
        require_own(owner, ("self",))
    if isinstance(callee, Object):
        return type(callee).__call__, (callee,)
    return f, ()


def dressed(call: Callable[..., Any], f: Callable[..., Any], owner: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """`call` looking like `f`, with `owner` in front of its arguments."""
    looks = f if hasattr(f, "__name__") else type(f)
    if not owner:
        return functools.update_wrapper(call, looks)

    def bound(*args: Any, **kwargs: Any) -> Any:
        return call(*owner, *args, **kwargs)

    return functools.update_wrapper(bound, looks)


def by_position(f: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """(args, kwargs) with everything by position that can be."""
    if not kwargs:
        return args, kwargs
    bound = inspect.signature(f).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def positional(f: Callable[..., Any], args: Args, kwargs: Kwargs) -> Args:
    """Arguments by position, where specs are given by position."""
    if not kwargs:
        return args
    bound = inspect.signature(f).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"{name_of(f)}: {sorted(bound.kwargs)} are keyword-only, and specs are given by position."
            " Let it take them by position, or bind them with functools.partial."
        )
    return bound.args


def positions(numbers: int | Iterable[int] | None, count: int, own: int) -> frozenset[int]:
    """Positions of the arguments that a user calls `numbers`; negative ones count from the end.

    There are `count` arguments, of which the user does not see the first `own`: the object of a bound method.
    """
    if numbers is None:
        numbers = ()
    elif isinstance(numbers, int):
        numbers = (numbers,)
    return frozenset(n + own if n >= 0 else n + count for n in numbers)


def optional_decorator(make: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a transform be used as `transform(f, ...)`, `@transform` and `@transform(...)`; also `transform(fun=f)`."""
    first, *rest = inspect.signature(make).parameters.values()
    required = [p.name for p in rest if p.default is p.empty]

    @functools.wraps(make)
    def transform(*functions: Any, **options: Any) -> Any:
        f = functions[0] if functions else options.pop(first.name, None)
        if len(functions) > 1 or (f is not None and first.name in options):
            raise TypeError(f"{make.__name__} takes one function by position; its options have names. Write them out.")
        if missing := [f"{name}=" for name in required if name not in options]:
            raise TypeError(f"{make.__name__} needs {', '.join(missing)}.")
        if f is None or f is ...:
            return lambda f: make(f, **options)
        return make(f, **options)

    transform.__signature__ = inspect.Signature([first.replace(default=None), *rest])  # type: ignore[attr-defined]
    return transform
