"""custom_vjp: a function of modules with a backward pass that the user gives.

Law: outside of derivatives it is the function itself, with every effect on its arguments; the gradient is what
`bwd` returns. Integers and keys have no gradient: theirs is `float0`, and what is given for them is ignored.

What `fwd` keeps for `bwd` crosses JAX *detached*: packed under indices of its own, since it may contain the
arguments themselves.
"""

import dataclasses
import inspect
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any

import jax

from nnx_core._errors import NnxError, SpecError, StructureError
from nnx_core.graph.classify import ARRAY, kind_of
from nnx_core.graph.effects import After, apply
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import AS_STATIC, Leaves, Refs, reader
from nnx_core.graph.structure import GraphDef, LeafDef, Node, VariableDef
from nnx_core.graph.unpack import Unpacker
from nnx_core.transforms.carry import described
from nnx_core.transforms.gradients import (
    as_states,
    fit,
    fitted,
    holds_object,
    matched,
    no_leaves,
    position_of,
    shape_and_dtype,
    variables_matching,
)
from nnx_core.transforms.groups import Diff, DiffState, Named, Out, Rest
from nnx_core.transforms.lift import (
    Form,
    Forms,
    Lifted,
    Modes,
    arguments_of,
    attached,
    detached,
    dressed,
    name_of,
    optional_decorator,
    positional,
    short_name_of,
    unbound,
)
from nnx_core.variables import Variable

Residual = Named("residual")
_GROUPS: tuple[Hashable, ...] = (Diff, Rest, Out, Residual)
_NOTHING: Leaves = ([], [])  # nothing comes in by the groups Out and Residual, and nothing goes out by them


class NoRuleError(NnxError, AttributeError):
    """A custom_vjp function was called before its rule was given."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass has to know beside arrays."""

    graphdef: GraphDef
    after: After
    residual: GraphDef
    shapes: Any  # of the leaves in Diff and Rest


def _shapes(leaves: Any) -> Any:
    """Of the leaves, in a form that can be hashed: (treedef, `jax.ShapeDtypeStruct`s)."""
    flat, treedef = jax.tree.flatten(leaves)
    return treedef, tuple(jax.ShapeDtypeStruct(*shape_and_dtype(x)) for x in flat)


#: Positions of the arguments that `bwd` gets first, and the spec of each argument.
_Treatment = tuple[tuple[int, ...], tuple[Any, ...]]


class _CustomVjp(Forms[_Treatment, Form]):
    """f with a backward pass of its own: for each treatment of the arguments a Lifted and a `jax.custom_vjp`."""

    def __init__(self, f: Callable[..., Any], nondiff: tuple[Any, ...], modes: Modes):
        super().__init__()
        self.f, self.owner = unbound(f)
        self.nondiff, self.modes = nondiff, modes
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.wants_updates = False
        self.seen: dict[Any, After] = {}  # what f did, so that what fwd does can be compared

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False) -> None:
        """Set the rule: `fwd(*args) -> (out, res)`, `bwd(*nondiff, res, g) -> cotangents`."""
        if symbolic_zeros:
            raise NotImplementedError("custom_vjp: symbolic_zeros is not supported; None stands for a zero cotangent.")
        if self.owner:  # what fwd may be bound to is an argument of f already
            fwd, _ = unbound(fwd)
        self.fwd, self.bwd = fwd, bwd
        try:
            self.wants_updates = "updates_g" in inspect.signature(bwd).parameters
        except (TypeError, ValueError):  # a function without signature
            self.wants_updates = False
        self.clear()
        self.seen.clear()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fwd is None:
            raise NoRuleError(f"{name_of(self.f)} has no backward pass yet. Call {name_of(self.f)}.defvjp(fwd, bwd).")
        args = positional(self.f, (*self.owner, *args), kwargs)
        lifted, pure = self[self.treatment(args)]

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, *_: Leaves) -> tuple[Any, ...]:
            return *pure(graphdef, diff, rest), _NOTHING

        return lifted.call(run, args, {})

    def treatment(self, args: tuple[Any, ...]) -> _Treatment:
        """How these arguments are differentiated."""
        specs: list[Any] = [Diff] * len(args)
        fixed: list[int] = []
        for argnum in self.nondiff:
            number = position_of(argnum)
            number += len(self.owner) if number >= 0 else len(args)
            if not 0 <= number < len(args):
                raise SpecError(
                    f"nondiff_argnums {argnum} is out of range: {name_of(self.f)} was called with {len(args)}"
                    f" arguments. Expected 0 to {len(args) - 1}."
                )
            if isinstance(argnum, DiffState):
                specs[number] = variables_matching(argnum.filter)
            elif holds_object(args[number]):
                raise SpecError(
                    f"args[{number}] of {name_of(self.f)} holds a module or Variable, and nondiff_argnums names it by"
                    f" position.\nUse nnx.DiffState({argnum}, filter) with the Variables that are differentiated, or"
                    f" nnx.DiffState({argnum}, False) for none."
                )
            else:
                fixed.append(number)
                specs[number] = AS_STATIC if _is_static(args[number]) else Rest
        return tuple(fixed), tuple(specs)

    def make(self, treatment: _Treatment) -> Form:
        """f lifted, and a `jax.custom_vjp` to run it."""
        fixed, specs = treatment
        plain = Lifted(self.f, _GROUPS, specs, Out, modes=self.modes)
        ahead = self.ahead(fixed, specs)

        def pure(graphdef: GraphDef, diff: Leaves, rest: Leaves) -> tuple[Any, ...]:
            after, *leaves, _ = plain.pure(graphdef, diff, rest, _NOTHING, _NOTHING)
            self.seen[graphdef, _shapes((diff, rest))] = after
            return after, *leaves

        def forward(graphdef: GraphDef, diff: Leaves, rest: Leaves) -> tuple[Any, Any]:
            # JAX may trace `pure` before, for what it returns, and takes it for granted that `forward` returns the
            # same. So fwd, which may write less than f, returns whatever f was seen to write.
            shapes = _shapes((diff, rest))
            seen = self.seen.get((graphdef, shapes))
            written = frozenset() if seen is None else seen.travelling
            after, *leaves, (_, residual) = ahead.pure(graphdef, diff, rest, _NOTHING, _NOTHING, written=written)
            assert type(after.result.root) is Node  # a pair
            out_def, residual_def = after.result.root.children
            after = dataclasses.replace(after, result=GraphDef(out_def))
            if seen is not None and seen != after:
                raise _differ(self.f, seen, self.fwd, after)
            return (after, *leaves), (_Saved(graphdef, after, GraphDef(residual_def), shapes), residual)

        def backward(saved: tuple[_Saved, list[Any]], cotangents: Any) -> tuple[Any, ...]:
            return None, self.pull(fixed, *saved, cotangents), None

        pure.__name__ = short_name_of(self.f)
        function = jax.custom_vjp(pure)
        function.defvjp(forward, backward)
        return Form(plain, function)

    def ahead(self, fixed: tuple[int, ...], specs: tuple[Any, ...]) -> Lifted:
        """fwd lifted: it returns (out, what is kept for bwd, detached)."""
        kept_specs = [specs[i] for i in fixed], Rest

        def ahead(*args: Any) -> tuple[Any, Any]:
            assert self.fwd is not None  # see call
            pair = self.fwd(*args)
            if not isinstance(pair, tuple) or len(pair) != 2:
                kind = type(pair).__name__
                raise SpecError(f"{name_of(self.fwd)} must return (out, residual), found {kind}. Return a pair.")
            out, residual = pair
            return out, detached(([args[i] for i in fixed], residual), kept_specs)

        return Lifted(ahead, _GROUPS, specs, (Out, Residual), modes=self.modes)

    def pull(self, fixed: tuple[int, ...], saved: _Saved, residual: list[Any], cotangents: Any) -> Leaves:
        """The cotangents of the differentiated leaves."""
        assert self.bwd is not None  # see call
        kept = Unpacker((*no_leaves(3), ([], residual)), Refs()).unpack(saved.residual.root, None)
        nondiff, res = attached(*kept)
        treedef, flat = saved.shapes
        primals: tuple[Leaves, Leaves] = jax.tree.unflatten(treedef, flat)
        args_def = arguments_of(saved.graphdef)
        # Arguments without values, to which what f wrote is written: the cotangents in place of the values.
        refs = Refs()
        updates = Unpacker(no_leaves(len(_GROUPS)), refs, makes_cells=True).unpack(args_def, None)
        g = apply(saved.after, [*cotangents[1:], _NOTHING], refs)
        wanted = [i for i in range(len(args_def.keys)) if i not in fixed]
        if self.modes == Modes():
            states = _written(args_def, updates, refs, primals)
            g = tuple([states[i] for i in wanted]), g
        more: dict[str, Any] = {}
        if self.wants_updates:
            more["updates_g"] = _only_written(updates, refs, fixed)
        trees = self.bwd(*nondiff, res, g, **more)
        if not isinstance(trees, tuple | list) or len(trees) != len(wanted):
            number = f"{len(trees)}" if isinstance(trees, tuple | list) else f"a {type(trees).__name__}"
            raise SpecError(
                f"{name_of(self.bwd)} must return a tuple of {len(wanted)} cotangents, one for each argument of"
                f" {name_of(self.f)} that is differentiated, found {number}."
            )
        all_trees: list[Any] = [None] * len(args_def.keys)
        for i, tree in zip(wanted, trees, strict=True):
            all_trees[i] = tree
        return fitted(args_def, all_trees, ("cotangents",), primals[0])


def _is_static(x: Any) -> bool:
    """Whether `x` can be part of the structure: configuration, not data."""
    if kind_of(x) == ARRAY:
        return False
    try:
        hash(x)
    except TypeError:
        return False
    return not any(kind_of(leaf) == ARRAY for leaf in jax.tree.leaves(x))


def _differ(f: Callable[..., Any], a: After, fwd: Any, b: After) -> StructureError:
    what = "result differs" if a.result != b.result else "effects on the arguments differ"
    return StructureError(
        f"{name_of(fwd)} must do what {name_of(f)} does, and return (out, residual); the {what}:\n"
        f"  {name_of(f)}: {_show(a)}\n  {name_of(fwd)}: {_show(b)}\n"
        f"Let it call {name_of(f)} itself."
    )


def _show(after: After) -> str:
    result, keys = described(after.result.root), after.changed_keys
    return f"returns {result}, writes {len(after.cells)} values, sets or removes {keys}"


_is_owned: Callable[[LeafDef], bool] = attrgetter("owned")


def _written(args_def: Node, updates: Any, refs: Refs, primals: tuple[Leaves, Leaves]) -> list[Any]:
    """For each argument the cotangents of what was written to it: States for modules, else None."""
    primal_of = [reader(leaves) for leaves in primals]
    cotangents: list[Any] = []
    for path, leaf, value in matched(args_def, updates, ("updates",)):
        primal = primal_of[leaf.group](leaf)
        if type(leaf) is VariableDef:  # found by index: f may have put another Variable at its path
            cotangents.append(fit(path, primal, refs.objects[leaf.id]._raw_value))
        elif leaf.owned:
            cotangents.append(fit(path, primal, value if kind_of(value) == ARRAY else None))
    in_order = iter(cotangents)
    return [as_states(child, lambda _: next(in_order), _is_owned) for child in args_def.children]


def _only_written(updates: tuple[Any, ...], refs: Refs, fixed: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments with cotangents where something was written and None elsewhere."""
    for x in refs.objects:
        if not isinstance(x, Object):
            continue
        for key, v in list(x._nnx_items().items()):
            if isinstance(v, Variable) and v._raw_value is None:
                x._nnx_storage()[key] = None
    trees = list(updates)
    for i in fixed:
        trees[i] = None
    return tuple(trees)


@optional_decorator
def custom_vjp(
    fun: Callable[..., Any],
    *,
    nondiff_argnums: tuple[int | DiffState, ...] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """`jax.custom_vjp` for functions of modules: a function whose gradient is given by `f.defvjp(fwd, bwd)`.

    `fwd(*args)` does what the function does and returns (out, res); `bwd(res, g)` returns a tuple with one
    cotangent for each argument: for a module a State or module; None is zero. `g` is a pair (updates_g, out_g):
    for each module in the arguments a State with the cotangents of what was written to it, zero elsewhere, and
    the cotangent of the result. With graph=False or graph_updates=False `g` is out_g alone. A `bwd` that takes
    the keyword `updates_g` gets the arguments with cotangents in place of what was written, and None elsewhere.

    Args:
      fun: takes modules, Variables, arrays, and pytrees of these. If it is a method of a module, the module is
        its first argument, for `fwd` and `bwd` too.
      nondiff_argnums: positions of arguments that are not differentiated: `bwd` gets them in front of `res`. A
        `DiffState` names the Variables of a module that *are* differentiated.
      graph, graph_updates: False forbids sharing; structure changes; and changes `g`, see above.

    Raises:
      NoRuleError: if the function is called before `defvjp`.
      SpecError: if `bwd` returns something of another form; it names the path.
      StructureError: if `fwd` does something else than the function.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> from nnx_core.transforms.custom_vjp import custom_vjp
      >>> @custom_vjp
      ... def f(m, x):
      ...     return jnp.sin(x) * m.kernel
      >>> def fwd(m, x):
      ...     return f(m, x), (jnp.cos(x), jnp.sin(x), m)
      >>> def bwd(res, g):
      ...     (m_g, _), out_g = g
      ...     cos, sin, m = res
      ...     m_g["kernel"][...] = 10 * sin * out_g  # ten times too much
      ...     return m_g, cos * m.kernel * out_g
      >>> f.defvjp(fwd, bwd)
      >>> m = nnx.Dict(kernel=nnx.Param(jnp.array(2.0)))
      >>> grads = nnx.grad(f)(m, jnp.array(0.5))
      >>> round(float(grads["kernel"][...] / jnp.sin(0.5)))
      10
    """
    custom = _CustomVjp(fun, tuple(nondiff_argnums), Modes.of(graph, graph_updates))

    def call(*args: Any, **kwargs: Any) -> Any:
        return custom.call(args, kwargs)

    wrapped = dressed(call, fun)
    wrapped.defvjp = custom.defvjp  # type: ignore[attr-defined]  # as jax.custom_vjp has it
    return wrapped
