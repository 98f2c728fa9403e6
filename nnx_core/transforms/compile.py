"""jit and eval_shape.

Law: `jit(f)` equals f with every effect on its arguments, compiled once for each structure of them; only what
was written leaves the compiled function. `eval_shape` changes nothing: it works on abstract copies.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format

from nnx_core._errors import TraceError
from nnx_core.graph.effects import apply
from nnx_core.graph.pack import AS_STATIC, Leaves, Refs
from nnx_core.graph.structure import GraphDef
from nnx_core.graph.unpack import Unpacker
from nnx_core.sharding import place_abstractly
from nnx_core.state import State
from nnx_core.transforms.groups import FilterGroups, distinct
from nnx_core.transforms.lift import (
    Args,
    Form,
    Forms,
    Kwargs,
    Lifted,
    Modes,
    Run,
    dressed,
    optional_decorator,
    positions,
    unbound,
)
from nnx_core.transforms.prefix import without_objects


class Placement(NamedTuple):
    """How jit treats a leaf: its sharding (None: as it comes), and whether its buffer is given away."""

    sharding: Any = None
    donated: bool = False


PLAIN = Placement()


class _Arguments(NamedTuple):
    """Positions and names that an option names, whichever way the user did."""

    positions: frozenset[int]
    names: frozenset[str]


def _arguments(
    f: Callable[..., Any], nums: int | Iterable[int] | None, names: str | Iterable[str] | None, own: int
) -> _Arguments:
    """What `nums` and `names` name among the parameters of `f`, of which the user does not count the first `own`."""
    if names is None:
        names = ()
    elif isinstance(names, str):
        names = (names,)
    names = frozenset(names)
    if not names and (nums is None or nums == ()):
        return _Arguments(frozenset(), frozenset())
    by_position = _parameters_by_position(f)
    numbers = positions(nums, len(by_position), own)
    numbers |= {i for i, name in enumerate(by_position) if name in names}
    named = frozenset(by_position[i] for i in numbers if i < len(by_position))  # what `*args` takes has no name
    return _Arguments(numbers, named | names)


def _parameters_by_position(f: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a function without signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def plainly(f: Callable[..., Any], modes: Modes, inputs: Any = PLAIN) -> Lifted:
    """f with all leaves in one group, which is treated as it comes."""
    return Lifted(f, (PLAIN,), inputs, PLAIN, PLAIN, modes=modes)


def static_at(positions: frozenset[int], count: int) -> tuple[Any, ...]:
    """The specs of `count` arguments, of which those at `positions` are part of the structure."""
    inputs: list[Any] = [PLAIN] * count
    for position in positions.intersection(range(count)):  # an argument that has a default may be left out
        inputs[position] = AS_STATIC
    return tuple(inputs)


def placed(spec: Any, donated: bool) -> Any:
    """`spec`, a prefix of shardings, as a prefix of Placements."""
    if isinstance(spec, FilterGroups):
        return FilterGroups((f, Placement(group, donated)) for f, group in spec.rules)
    if type(spec) in (tuple, list):
        return type(spec)(placed(child, donated) for child in spec)
    if type(spec) is dict:
        return {key: placed(child, donated) for key, child in spec.items()}
    if isinstance(spec, State):
        return placed(FilterGroups(spec), donated)
    return Placement(spec, donated)


#: (value as it was, the same where a sharding wants it) by the identity of the first.
_Moved = dict[int, tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class _Placing(Lifted):
    """Lifted, whose arguments are afterwards where their shardings say, also what f only read.

    Else what came from elsewhere would be moved, and f be traced for it, at every call. It is done
    in a second step: a compiled function that returned what it read would return it at each call.
    """

    def call(self, run: Run, args: Args, kwargs: Kwargs) -> Any:
        """As of Lifted; a call that raises has moved nothing."""
        moved: _Moved = {}

        def placing(graphdef: GraphDef, *leaves: Leaves) -> tuple[Any, ...]:
            placed = [_at_group(*pair, moved) for pair in zip(self.groups, leaves, strict=True)]
            out: tuple[Any, ...] = run(graphdef, *placed)
            return out

        result = super().call(placing, args, kwargs)
        if moved:
            with contextlib.suppress(TraceError):  # a model that a traced function closes over
                self._settle(moved, args, kwargs)
        return result

    def _settle(self, moved: _Moved, args: Args, kwargs: Kwargs) -> None:
        """Write what was moved into its objects: a call, on the same arguments, that does only that."""
        always = frozenset(filter(_is_placing, self.groups))
        specs = (self.groups, self.inputs, PLAIN, self.keywords, always)
        mover = Lifted(_nothing, *specs, modes=self.modes)

        def run(graphdef: GraphDef, *leaves: Leaves) -> tuple[Any, ...]:
            return mover.pure(graphdef, *[_replaced(each, moved) for each in leaves])

        mover.call(run, args, kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _replaced(leaves: Leaves, moved: _Moved) -> Leaves:
    return [moved[id(x)][1] if id(x) in moved else x for x in leaves[0]], leaves[1]


def _is_placing(group: Any) -> bool:
    """Whether the group has a sharding, and its values do not travel back anyway."""
    return group.sharding is not None and not group.donated


def _at_group(group: Any, leaves: Leaves, moved: _Moved) -> Leaves:
    """The leaves of a group where its sharding says; what is moved is noted."""
    if not _is_placing(group) or all(_stays(x, group.sharding) for x in leaves[0]):
        return leaves
    elsewhere = [x for x in leaves[0] if not _stays(x, group.sharding)]
    moved.update((id(x), (x, jax.device_put(x, group.sharding))) for x in elsewhere)
    return _replaced(leaves, moved)


def _stays(x: Any, target: Any) -> bool:
    """Whether `x` is there; or was put elsewhere by the user, so that JAX refuses the call."""
    if isinstance(x, jax.core.Tracer) or getattr(x, "committed", False):
        return True
    if not isinstance(target, jax.sharding.Sharding | Format):  # a PartitionSpec, of the mesh there is
        return jax.sharding.get_abstract_mesh().empty
    return bool(x.sharding == target) if hasattr(x, "sharding") else False


#: How many arguments there are by position, and the names of the others.
_Key = tuple[int, tuple[str, ...]]


@dataclass(eq=False, repr=False)
class _Jit(Forms[_Key | None, Form]):
    """One jitted function: for each form of the arguments a Lifted and its compiled `pure`.

    Args:
      f, owner: the function, and the object if it is a bound method's.
      static, donated: arguments, the owner counted.
      in_shardings, out_shardings: as the user gave them.
      options: for `jax.jit`, as they are.
      modes: what the user forbids.
    """

    f: Callable[..., Any]
    owner: tuple[Any, ...]
    static: _Arguments
    donated: _Arguments
    in_shardings: Any
    out_shardings: Any
    options: dict[str, Any]
    modes: Modes

    def __post_init__(self) -> None:
        #: Nothing depends on which argument it is: one form serves all calls.
        self.simple = not any((*self.static, *self.donated)) and self.in_shardings is self.out_shardings is None

    def form(self, args: Args, kwargs: Kwargs) -> Form:
        """What is compiled for such arguments."""
        return self[None if self.simple else (len(args), tuple(sorted(kwargs)))]

    def make(self, key: _Key | None) -> Form:
        """The Form for a number of arguments and names of keywords."""
        if key is None:
            lifted = plainly(self.f, self.modes)
            return Form(lifted, jax.jit(lifted.named, **self.options))
        count, names = key
        inputs = tuple(map(self.spec, range(count)))
        keywords = {name: self.keyword(name) for name in names}
        outputs = placed(self.out_shardings, donated=False)
        groups = tuple(g for g in distinct(PLAIN, inputs, keywords, outputs) if isinstance(g, Placement))
        always = frozenset(group for group in groups if group.donated)
        make = Lifted if self.in_shardings is None else _Placing
        lifted = make(self.f, groups, inputs, outputs, keywords, always, modes=self.modes)
        # The arguments of `pure` are the structure, which is donated to nobody and placed nowhere, and the groups.
        options = dict(self.options, donate_argnums=[i for i, g in enumerate(groups, start=1) if g.donated])
        shardings = (None, *(group.sharding for group in groups))
        if self.in_shardings is not None:
            options["in_shardings"] = shardings
        if self.out_shardings is not None or self.in_shardings is not None:
            options["out_shardings"] = shardings
        return Form(lifted, jax.jit(lifted.named, **options))

    def spec(self, position: int) -> Any:
        """How the argument at this position is treated."""
        if position in self.static.positions:
            return AS_STATIC
        spec = self.in_shardings
        if type(spec) in (tuple, list):
            specs = dict(enumerate(spec, start=len(self.owner)))
            spec = specs.get(position)  # none for the owner, and none for more arguments than there are shardings
        return placed(spec, position in self.donated.positions)

    def keyword(self, name: str) -> Any:
        """How the keyword argument of this name is treated."""
        return AS_STATIC if name in self.static.names else Placement(None, name in self.donated.names)

    def _cache_size(self) -> int:
        """How many programs are compiled, of all forms: JAX's own count, under JAX's own name."""
        compiled: list[Any] = [run for _, run in self.values()]  # of `jax.jit`
        return sum(run._cache_size() for run in compiled)

    def clear_cache(self) -> None:
        """Forget everything compiled and planned."""
        for lifted, run in self.values():
            compiled: Any = run  # of `jax.jit`
            compiled.clear_cache()
            lifted.plans.clear()

    def stage(self, name: str, args: Args, kwargs: Kwargs) -> "Stage":
        """`jax.jit`'s `lower` or `trace` of the compiled function."""
        lifted, run = self.form(args, kwargs)
        plan, packer = lifted.pack(args, kwargs)
        return Stage(lifted, getattr(run, name)(plan.graphdef, *packer.leaves), self.owner)


class Stage:
    """A traced, lowered or compiled function of modules; what it has not itself, the `jax.stages` object has.

    `compile()` gives a Stage that can be called with the arguments it was lowered for.
    """

    def __init__(self, lifted: Lifted, stage: Any, owner: tuple[Any, ...]):
        self._lifted, self._stage, self._owner = lifted, stage, owner

    def lower(self, **options: Any) -> "Stage":
        """`jax.stages.Traced.lower`."""
        return Stage(self._lifted, self._stage.lower(**options), self._owner)

    def compile(self, *args: Any, **options: Any) -> "Stage":
        """`jax.stages.Lowered.compile`."""
        return Stage(self._lifted, self._stage.compile(*args, **options), self._owner)

    def bound(self, *args: Any) -> "Stage":
        """The same with its first arguments given."""
        return Stage(self._lifted, self._stage, (*self._owner, *args))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._lifted.call(self._stage, (*self._owner, *args), kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


@optional_decorator
def jit(
    fun: Callable[..., Any],
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Iterable[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    keep_unused: bool = False,
    device: Any = None,
    backend: str | None = None,
    inline: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.jit` for functions of modules: what `fun` writes to its arguments is written outside too.

    Numbers passed as arguments are traced; numbers stored on modules are static. Options are those of `jax.jit`;
    shardings may be `StateSharding`s. A donated module keeps its Variables, with new buffers. A module with an
    explicit sharding in `in_shardings` is where that says after the call. The result has what
    `jax.jit` gives (`lower`, `trace`, `eval_shape`, `clear_cache`), and `jitted_fn`, whose `_cache_size()` tells how
    many programs were compiled.

    Args:
      graph: False forbids shared references in the arguments.
      graph_updates: False forbids `fun` to change the structure of its arguments.

    Raises:
      TraceError: if `fun` writes to a module that it captured and did not get as an argument.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> @nnx.jit
      ... def double(model):
      ...     model.kernel[...] *= 2
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
      >>> double(model)
      >>> float(model.kernel.sum())
      12.0
    """
    function, owner = unbound(fun)
    options = {"keep_unused": keep_unused, "device": device, "backend": backend, "inline": inline}
    modes = Modes.of(graph, graph_updates)
    jitted = _Jit(
        function,
        owner,
        static=_arguments(function, static_argnums, static_argnames, len(owner)),
        donated=_arguments(function, donate_argnums, donate_argnames, len(owner)),
        in_shardings=without_objects(in_shardings, "in_shardings", modes.sharing, None),
        out_shardings=without_objects(out_shardings, "out_shardings", modes.sharing, None),
        options={name: option for name, option in options.items() if option},
        modes=modes,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        lifted, run = jitted.form(args, kwargs)
        return lifted.call(run, args, kwargs)

    def lower(*args: Any, **kwargs: Any) -> Stage:
        return jitted.stage("lower", (*owner, *args), kwargs)

    def trace(*args: Any, **kwargs: Any) -> Stage:
        return jitted.stage("trace", (*owner, *args), kwargs)

    dressed_call: Any = dressed(call, fun, owner)
    dressed_call.lower, dressed_call.trace = lower, trace  # as jax.jit has them, and the next two
    dressed_call.eval_shape = functools.partial(eval_shape, fun)
    dressed_call.clear_cache = jitted.clear_cache
    dressed_call.jitted_fn = jitted  # as in flax.nnx
    return dressed_call


def eval_shape(
    f: Callable[..., Any], *args: Any, graph: bool | None = None, graph_updates: bool | None = None, **kwargs: Any
) -> Any:
    """The result of `f` with `jax.ShapeDtypeStruct`s for arrays; nothing is computed and nothing changes.

    Under `jax.set_mesh` those of Variables have the shardings that the arrays would have.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(1000, 1000, rngs=nnx.Rngs(0)))
      >>> model.kernel[...]
      ShapeDtypeStruct(shape=(1000, 1000), dtype=float32)
    """
    function, owner = unbound(f)
    lifted = plainly(function, Modes.of(graph, graph_updates))
    plan, packer = lifted.pack((*owner, *args), kwargs)
    after, *written = jax.eval_shape(lifted.pure, plan.graphdef, *packer.leaves)
    refs = Refs()
    abstract = jax.tree.map(_abstract, tuple(packer.leaves))
    # Copies of the arguments, which take the writes.
    Unpacker(abstract, refs, makes_cells=True).unpack(plan.graphdef.root, None)
    return place_abstractly(apply(after, written, refs))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.dtypes.result_type(x))
