"""jit and eval_shape.

Law: `jit(f)` equals f with every effect on its arguments, compiled once for each structure of them; only what
was written leaves the compiled function. `eval_shape` changes nothing: it works on abstract copies.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from nnx_core.graph.effects import apply
from nnx_core.graph.pack import AS_STATIC, Refs, Unpacker
from nnx_core.graph.structure import Node
from nnx_core.state import State
from nnx_core.transforms.groups import FilterGroups, distinct
from nnx_core.transforms.lift import Lifted, Modes, dressed, optional_decorator, unbound


class Placement(NamedTuple):
    """How jit treats a leaf: its sharding (None: as it comes), and whether its buffer is given away."""

    sharding: Any = None
    donated: bool = False


PLAIN = Placement()


class _Arguments(NamedTuple):
    """Positions and names that an option names, whichever way the user did."""

    positions: frozenset[int]
    names: frozenset[str]


def _arguments(f: Callable[..., Any], nums: Any, names: Any, offset: int) -> _Arguments:
    nums = () if nums is None else (nums,) if isinstance(nums, int) else tuple(nums)
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not nums and not names:
        return _Arguments(frozenset(), frozenset())
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positions = {n + offset if n >= 0 else len(by_position) + n for n in nums}
    positions |= {i for i, name in enumerate(by_position) if name in names}
    return _Arguments(
        frozenset(positions), frozenset(names) | {by_position[i] for i in positions if i < len(by_position)}
    )


def _placed(spec: Any, donated: bool) -> Any:
    """`spec`, a prefix of shardings, as a prefix of Placements."""
    if isinstance(spec, FilterGroups):
        return FilterGroups((f, Placement(group, donated)) for f, group in spec.rules)
    if type(spec) in (tuple, list):
        return type(spec)(_placed(s, donated) for s in spec)
    if type(spec) is dict:
        return {k: _placed(s, donated) for k, s in spec.items()}
    if isinstance(spec, State):
        return _placed(FilterGroups(spec), donated)
    return Placement(spec, donated)


class _Jit:
    """One jitted function: for each form of the arguments a Lifted and its compiled `pure`."""

    def __init__(self, f: Callable[..., Any], options: dict[str, Any], owner: tuple[Any, ...]):
        self.f, self.owner = f, owner
        self.static = _arguments(f, options.pop("static_argnums"), options.pop("static_argnames"), len(owner))
        self.donated = _arguments(f, options.pop("donate_argnums"), options.pop("donate_argnames"), len(owner))
        self.in_shardings, self.out_shardings = options.pop("in_shardings"), options.pop("out_shardings")
        self.modes = Modes.of(options.pop("graph"), options.pop("graph_updates"))
        self.options = {k: v for k, v in options.items() if v is not None and v is not False}
        self.simple = not any((*self.static, *self.donated)) and self.in_shardings is self.out_shardings is None
        self.forms: dict[Any, tuple[Lifted, Any]] = {}

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Lifted, Any]:
        key = None if self.simple else (len(args), tuple(sorted(kwargs)))
        found = self.forms.get(key)
        if found is None:
            found = self.forms[key] = self.make(args, kwargs)
        return found

    def make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Lifted, Any]:
        if self.simple:
            lifted = Lifted(self.f, (PLAIN,), PLAIN, PLAIN, PLAIN, modes=self.modes)
            return lifted, jax.jit(lifted.named, **self.options)
        inputs = tuple(self.spec(i) for i in range(len(args)))
        keywords = {k: self.keyword(k) for k in kwargs}
        outputs = _placed(self.out_shardings, donated=False)
        groups = tuple(g for g in distinct(PLAIN, inputs, keywords, outputs) if g is not AS_STATIC)
        always = frozenset(g for g in groups if g.donated)  # type: ignore[attr-defined]  # Placements
        lifted = Lifted(self.f, groups, inputs, outputs, keywords, always, modes=self.modes)
        options = dict(self.options, donate_argnums=tuple(i + 1 for i, g in enumerate(groups) if g in always))
        shardings = (None, *(g.sharding for g in groups))  # type: ignore[attr-defined]  # Placements
        if self.in_shardings is not None:
            options["in_shardings"] = shardings
        if self.out_shardings is not None or self.in_shardings is not None:
            options["out_shardings"] = shardings
        return lifted, jax.jit(lifted.named, **options)

    def spec(self, position: int) -> Any:
        if position in self.static.positions:
            return AS_STATIC
        spec = self.in_shardings
        if type(spec) in (tuple, list):
            index = position - len(self.owner)
            spec = spec[index] if 0 <= index < len(spec) else None
        return _placed(spec, position in self.donated.positions)

    def keyword(self, name: str) -> Any:
        return AS_STATIC if name in self.static.names else Placement(None, name in self.donated.names)

    def clear_cache(self) -> None:
        """Forget everything compiled and planned."""
        for lifted, run in self.forms.values():
            run.clear_cache()
            lifted.plans.clear()

    def stage(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Stage":
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
    shardings may be `StateSharding`s. A donated module keeps its Variables, with new buffers.

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
    names = "in_shardings out_shardings static_argnums static_argnames donate_argnums donate_argnames"
    names += " keep_unused device backend inline graph graph_updates"
    given = locals()
    options = {name: given[name] for name in names.split()}
    wrapped = _Jit(function, options, owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        lifted, run = wrapped.form(args, kwargs)
        return lifted.call(run, args, kwargs)

    call = dressed(call, fun, owner)
    for stage in ("lower", "trace"):
        setattr(call, stage, lambda *a, _stage=stage, **k: wrapped.stage(_stage, (*owner, *a), k))
    call.eval_shape = lambda *a, **k: eval_shape(fun, *a, **k)  # type: ignore[attr-defined]  # as jax.jit has it
    call.clear_cache = wrapped.clear_cache  # type: ignore[attr-defined]  # as jax.jit has it
    return call


def eval_shape(
    f: Callable[..., Any], *args: Any, graph: bool | None = None, graph_updates: bool | None = None, **kwargs: Any
) -> Any:
    """The result of `f` with `jax.ShapeDtypeStruct`s for arrays; nothing is computed and nothing changes.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(1000, 1000, rngs=nnx.Rngs(0)))
      >>> model.kernel[...]
      ShapeDtypeStruct(shape=(1000, 1000), dtype=float32)
    """
    function, owner = unbound(f)
    lifted = Lifted(function, (PLAIN,), PLAIN, PLAIN, PLAIN, modes=Modes.of(graph, graph_updates))
    plan, packer = lifted.pack((*owner, *args), kwargs)
    after, *written = jax.eval_shape(lifted.pure, plan.graphdef, *packer.leaves)
    refs = Refs()
    abstract = jax.tree.map(_abstract, tuple(packer.leaves))
    root = plan.graphdef.root
    assert type(root) is Node  # pack made it
    Unpacker(abstract, refs).build(root, None)
    return apply(after, written, refs)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.dtypes.result_type(x)) if not _is_abstract(x) else x


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
