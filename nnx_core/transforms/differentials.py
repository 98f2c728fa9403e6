"""vjp, jvp and custom_vjp.

Law: on arrays they are JAX's own; a module among the arguments is differentiated with respect to every Variable
of it, each once, and tangents and cotangents of it are modules (or States) of the same form. What f writes to
its arguments is written. Integers and keys have no gradient: theirs is `float0`, and what is given for them is
ignored.

The value that is differentiated crosses JAX *detached*: packed under indices of its own, so that a result that
contains the arguments themselves has a cotangent too.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core._errors import NnxError, Path, SpecError, StructureError, show_path
from nnx_core.graph.classify import ARRAY, NUMBER, PYTREE, kind_of, one_level
from nnx_core.graph.effects import After, apply
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import AS_STATIC, Leaves, Packer, Place, Refs, Unpacker
from nnx_core.graph.structure import Element, GraphDef, Leaf, Node, VariableDef, nodes
from nnx_core.state import State
from nnx_core.transforms.autodiff import holds_object
from nnx_core.transforms.carry import described
from nnx_core.transforms.groups import Diff, DiffState, FilterGroups, Named, Out, Rest
from nnx_core.transforms.lift import Lifted, Modes, dressed, name_of, optional_decorator, positional, unbound
from nnx_core.variables import Variable, new_variable, thaw_metadata

Residual = Named("residual")
_ABSENT: Any = object()
_FORM = "Give it the form of the value it belongs to; None stands for zero."


class NoRuleError(NnxError, AttributeError):
    """A custom_vjp function was called before its rule was given."""


# ---- values on their own, and trees of the same form -----------------------------------------------------------------


def detached(x: Any, spec: Any = Rest) -> tuple[GraphDef, Leaves]:
    """`x` packed under indices of its own: what of it is shared with other values is copied."""
    packer = Packer((Rest,), Refs())
    root = packer.walk(x, Place(("result",), spec, 1))
    return GraphDef(root), packer.leaves[0]


def attached(graphdef: GraphDef, leaves: Leaves) -> Any:
    """The inverse of `detached`."""
    return Unpacker((leaves,), Refs()).build(graphdef.root, None)


def empty(groups: int) -> tuple[Any, ...]:
    """Leaves that are all None, as many as anybody asks for."""
    return tuple((itertools.repeat(None), itertools.repeat(None)) for _ in range(groups))


def arguments_of(graphdef: GraphDef) -> Node:
    """The structure of the positional arguments of a call."""
    root = graphdef.root
    assert type(root) is Node and type(root.children[0]) is Node  # noqa: PT018  # pack made it
    return root.children[0]


def matched(d: Element, tree: Any, path: Path) -> Iterator[tuple[Path, VariableDef | Leaf, Any]]:
    """(path, leaf, what `tree` has there) for each leaf of `d`; None stands for anything below it."""
    if type(d) is VariableDef or type(d) is Leaf:
        yield path, d, tree._raw_value if isinstance(tree, Variable) else tree
    elif type(d) is Node:
        for key, child in zip(d.keys, d.children, strict=True):
            yield from matched(child, _member(d, key, tree, path), (*path, key))


def _member(d: Node, key: Hashable, tree: Any, path: Path) -> Any:
    if tree is None or tree is _ABSENT:
        return tree
    if isinstance(tree, Object):
        return tree._nnx_items().get(key, _ABSENT)
    if isinstance(tree, dict | State):
        return tree.get(key, _ABSENT)
    if isinstance(tree, list | tuple) and len(tree) == len(d.keys):
        return tree[d.keys.index(key)]
    if kind_of(tree) == PYTREE and not isinstance(tree, tuple):
        keys, children, _ = one_level(tree)
        return dict(zip(keys, children, strict=True)).get(key, _ABSENT)
    found = f"{len(tree)} items" if isinstance(tree, list | tuple) else f"a {type(tree).__name__}"
    raise SpecError(
        f"{show_path(path)}: expected the form of a {d.kind.__name__} with {len(d.keys)} items, found {found}. {_FORM}"
    )


def fitted(d: Element, tree: Any, path: Path, primals: Leaves, group: int = 0) -> Leaves:
    """The tangents or cotangents that `tree` has for the leaves of `d` in one group, checked against `primals`."""
    values, loose = map(iter, primals)
    found: Leaves = ([], [])
    for at, leaf, given in matched(d, tree, path):
        if leaf.group == group:
            owned = type(leaf) is VariableDef or leaf.owned  # type: ignore[union-attr]  # a Leaf has it
            found[not owned].append(_fit(at, next(values if owned else loose), given))
    return found


def _fit(path: Path, primal: Any, given: Any) -> Any:
    flat: tuple[list[Any], Any] = jax.tree.flatten(primal)
    leaves, treedef = flat
    if given is _ABSENT:
        raise SpecError(f"{show_path(path)} is missing. Give a tangent, or None for zero.")
    try:
        parts = [None] * len(leaves) if given is None else treedef.flatten_up_to(given)
    except ValueError:
        raise SpecError(
            f"{show_path(path)}: expected the form {treedef}, found {jax.tree.structure(given)}. {_FORM}"
        ) from None
    return treedef.unflatten([_fit_leaf(path, p, part) for p, part in zip(leaves, parts, strict=True)])


def _fit_leaf(path: Path, primal: Any, given: Any) -> Any:
    shape, dtype = jnp.shape(primal), getattr(primal, "dtype", None) or jnp.result_type(primal)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.zeros(shape, jax.dtypes.float0)
    if given is None:
        return jnp.zeros(shape, dtype)
    if kind_of(given) not in (ARRAY, NUMBER):
        found = type(given).__name__
        raise SpecError(f"{show_path(path)}: expected an array of shape {shape}, found a {found}. {_FORM}")
    if jnp.shape(given) != shape:
        raise SpecError(f"{show_path(path)}: expected shape {shape}, found {jnp.shape(given)}. {_FORM}")
    if getattr(given, "dtype", None) == jax.dtypes.float0:
        return jnp.zeros(shape, dtype)
    return given if kind_of(given) == ARRAY else jnp.asarray(given, dtype)


# ---- vjp and jvp -----------------------------------------------------------------------------------------------------


class _Differential:
    """f lifted for vjp and jvp; a bound method's object is not differentiated, but written."""

    def __init__(self, f: Callable[..., Any], has_aux: bool, modes: Modes):
        self.f, self.owner = unbound(f)
        self.has_aux, self.modes = has_aux, modes
        self.forms: dict[int, Lifted] = {}

    def of(self, *args: Any) -> tuple[Any, Any, Any]:
        """(value, aux, detached value) of f."""
        out = self.f(*args)
        if not self.has_aux:
            return out, None, detached(out)
        if not isinstance(out, tuple) or len(out) != 2:
            raise SpecError(
                f"{name_of(self.f)} has_aux=True: expected (value, aux), found {type(out).__name__}."
                " Return a pair, or leave has_aux out."
            )
        return *out, detached(out[0])

    def lifted(self, count: int) -> Lifted:
        if count not in self.forms:
            inputs = (*(Rest for _ in self.owner), *(Diff for _ in range(count)))
            self.forms[count] = Lifted(self.of, (Diff, Rest, Out), inputs, (Rest, Rest, Out), modes=self.modes)
        return self.forms[count]

    def vjp(self, primals: tuple[Any, ...]) -> tuple[Any, ...]:
        lifted = self.lifted(len(primals))
        kept: list[Any] = []

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            value, pullback, after = jax.vjp(_pure(lifted, graphdef, rest), diff, has_aux=True)
            kept.extend((graphdef, pullback))
            return *after, ([], value)

        value, aux, (form, leaves) = lifted.call(run, (*self.owner, *primals), {})
        graphdef, pullback = kept

        def vjp_fn(cotangent: Any) -> tuple[Any, ...]:
            given = fitted(form.root, cotangent, ("cotangent",), leaves)
            (gradient,) = pullback(jax.tree.leaves(given))
            args = Unpacker((gradient, *empty(2)), Refs()).build(arguments_of(graphdef), None)
            return tuple(args[len(self.owner) :])

        return (value, vjp_fn, aux) if self.has_aux else (value, vjp_fn)

    def jvp(self, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, ...]:
        lifted = self.lifted(len(primals))
        kept: list[Any] = []

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, _: Leaves) -> tuple[Any, ...]:
            d = arguments_of(graphdef)
            below = d._replace(keys=d.keys[: len(primals)], children=d.children[len(self.owner) :])
            given = fitted(below, tuple(tangents), ("tangents",), diff)
            value, tangent, after = jax.jvp(_pure(lifted, graphdef, rest), (diff,), (given,), has_aux=True)
            kept.extend(tangent)
            return *after, ([], value)

        value, aux, (form, leaves) = lifted.call(run, (*self.owner, *primals), {})
        tangent = attached(form, jax.tree.unflatten(jax.tree.structure(leaves), kept))
        return (value, tangent, aux) if self.has_aux else (value, tangent)


def _pure(lifted: Lifted, graphdef: GraphDef, rest: Leaves) -> Callable[[Leaves], Any]:
    def value_of(diff: Leaves) -> tuple[Any, Any]:
        after, diff, rest_after, (_, value) = lifted.pure(graphdef, diff, rest, ([], []))
        return value, (after, diff, rest_after)

    return value_of


def vjp(
    f: Any = None,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.vjp` for functions of modules; without primals a decorator.

    Args:
      f: returns a value, or (value, aux) with `has_aux`. If it is a method of a module, the module is written
        but not differentiated.
      *primals: arrays, numbers, modules, Variables, and pytrees of these; every leaf is differentiated.
      reduce_axes: deprecated, must be empty.
      graph, graph_updates: False forbids sharing; structure changes.

    Returns:
      (value, vjp_fn), and aux with `has_aux`. `vjp_fn` takes a cotangent of the form of the value, where None
      is zero, and returns one gradient for each primal: for a module a module of gradients.

    Raises:
      SpecError: if the cotangent has another form; it names the path.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core.transforms.differentials import vjp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> value, vjp_fn = vjp(lambda m, x: m(x).sum(), model, jnp.ones((1, 2)))
      >>> m_grad, x_grad = vjp_fn(1.0)
      >>> m_grad.kernel[...].tolist(), x_grad.shape
      ([[1.0], [1.0]], (1, 2))
    """
    if reduce_axes:
        raise NotImplementedError("vjp: reduce_axes is deprecated in JAX and does nothing; leave it out.")
    modes = Modes.of(graph, graph_updates)
    if f is None or f is ...:
        return functools.partial(vjp, has_aux=has_aux, graph=graph, graph_updates=graph_updates)
    differential = _Differential(f, has_aux, modes)
    if primals:
        return differential.vjp(primals)

    def call(*args: Any, **kwargs: Any) -> Any:
        own = differential.owner
        return differential.vjp(positional(differential.f, (*own, *args), kwargs)[len(own) :])

    return dressed(call, f)


def jvp(
    f: Any = None,
    primals: tuple[Any, ...] | None = None,
    tangents: tuple[Any, ...] | None = None,
    *,
    has_aux: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """`jax.jvp` for functions of modules; without primals a decorator, whose result takes (primals, tangents).

    Args:
      f: returns a value, or (value, aux) with `has_aux`.
      primals: the arguments of `f`.
      tangents: of the form of the primals; for a module a module or State of tangents. None is zero.
      graph, graph_updates: False forbids sharing; structure changes.

    Returns:
      (value, tangent of the value), and aux with `has_aux`.

    Raises:
      SpecError: if the tangents have another form; it names the path.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> from nnx_core.transforms.differentials import jvp
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tangents = jax.tree.map(jnp.ones_like, model), None
      >>> value, tangent = jvp(lambda m, x: m(x).sum(), (model, jnp.ones((1, 2))), tangents)
      >>> float(tangent)
      3.0
    """
    if f is None or f is ...:
        return functools.partial(jvp, has_aux=has_aux, graph=graph, graph_updates=graph_updates)
    differential = _Differential(f, has_aux, Modes.of(graph, graph_updates))
    if primals is not None:
        if tangents is None:
            raise TypeError(
                f"jvp of {name_of(f)}: expected tangents beside the primals, found none. Give one for each primal;"
                " None is zero."
            )
        return differential.jvp(tuple(primals), tangents)

    def call(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return differential.jvp(tuple(primals), tangents)

    return dressed(call, f)


# ---- custom_vjp ------------------------------------------------------------------------------------------------------

_CUSTOM: tuple[Hashable, ...] = (Diff, Rest, Out, Residual)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass has to know beside arrays."""

    graphdef: GraphDef
    after: After
    residual: GraphDef
    shapes: Any  # of the leaves in Diff and Rest


def _shapes(leaves: Any) -> Any:
    flat, treedef = jax.tree.flatten(leaves)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x)) for x in flat)
    return treedef, tuple(shapes)


class _CustomVjp:
    """f with a backward pass of its own: for each treatment of the arguments a Lifted and a `jax.custom_vjp`."""

    def __init__(self, f: Callable[..., Any], nondiff: tuple[Any, ...], modes: Modes):
        self.f, self.owner = unbound(f)
        self.nondiff, self.modes = nondiff, modes
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.wants_updates = False
        self.forms: dict[Any, tuple[Lifted, Any]] = {}
        self.seen: dict[Any, After] = {}  # what f did, so that what fwd does can be compared

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False) -> None:
        """Set the rule: `fwd(*args) -> (out, res)`, `bwd(*nondiff, res, g) -> cotangents`."""
        if symbolic_zeros:
            raise NotImplementedError("custom_vjp: symbolic_zeros is not supported; None stands for a zero cotangent.")
        self.fwd, self.bwd = unbound(fwd)[0] if self.owner else fwd, bwd
        try:
            self.wants_updates = "updates_g" in inspect.signature(bwd).parameters
        except (TypeError, ValueError):  # a function without signature
            self.wants_updates = False
        self.forms.clear()
        self.seen.clear()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fwd is None:
            raise NoRuleError(f"{name_of(self.f)} has no backward pass yet. Call {name_of(self.f)}.defvjp(fwd, bwd).")
        args = positional(self.f, (*self.owner, *args), kwargs)
        fixed, specs = self.treatment(args)
        if (fixed, specs) not in self.forms:
            self.forms[fixed, specs] = self.make(fixed, specs)
        lifted, pure = self.forms[fixed, specs]

        def run(graphdef: GraphDef, diff: Leaves, rest: Leaves, *_: Leaves) -> tuple[Any, ...]:
            return *pure(graphdef, diff, rest), ([], [])

        return lifted.call(run, args, {})

    def treatment(self, args: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """(positions that `bwd` gets first, spec of each argument)."""
        specs: list[Any] = [Diff] * len(args)
        fixed = []
        for argnum in self.nondiff:
            number = argnum.argnum if isinstance(argnum, DiffState) else argnum
            number += len(self.owner) if number >= 0 else len(args)
            if not 0 <= number < len(args):
                raise SpecError(
                    f"nondiff_argnums {argnum} is out of range: {name_of(self.f)} was called with {len(args)}"
                    f" arguments. Expected 0 to {len(args) - 1}."
                )
            if isinstance(argnum, DiffState):
                specs[number] = FilterGroups(((argnum.filter, Diff), (..., Rest)))
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

    def make(self, fixed: tuple[int, ...], specs: tuple[Any, ...]) -> tuple[Lifted, Any]:
        plain = Lifted(self.f, _CUSTOM, specs, Out, modes=self.modes)
        kept_specs = [specs[i] for i in fixed], Rest

        def ahead(*args: Any) -> tuple[Any, Any]:
            assert self.fwd is not None  # see call
            pair = self.fwd(*args)
            if not isinstance(pair, tuple) or len(pair) != 2:
                found = type(pair).__name__
                raise SpecError(f"{name_of(self.fwd)} must return (out, residual), found {found}. Return a pair.")
            return pair[0], detached(([args[i] for i in fixed], pair[1]), kept_specs)

        lifted = Lifted(ahead, _CUSTOM, specs, (Out, Residual), modes=self.modes)

        def pure(graphdef: GraphDef, diff: Leaves, rest: Leaves) -> tuple[Any, ...]:
            after, *leaves, _ = plain.pure(graphdef, diff, rest, ([], []), ([], []))
            self.seen[graphdef, _shapes((diff, rest))] = after
            return after, *leaves

        def forward(graphdef: GraphDef, diff: Leaves, rest: Leaves) -> tuple[Any, Any]:
            shapes = _shapes((diff, rest))
            known = self.seen.get((graphdef, shapes))
            written = frozenset() if known is None else frozenset(i for i, _, g in known.variables if g is not None)
            after, *leaves, (_, residual) = lifted.pure(graphdef, diff, rest, ([], []), ([], []), written=written)
            assert type(after.result.root) is Node  # ahead returns a pair
            out, packed = after.result.root.children
            after = dataclasses.replace(after, result=GraphDef(out))
            if known is not None and known != after:
                raise _differ(self.f, known, self.fwd, after)
            return (after, *leaves), (_Saved(graphdef, after, GraphDef(packed), shapes), residual)

        def backward(saved: tuple[_Saved, list[Any]], cotangents: Any) -> tuple[Any, ...]:
            return None, self.pull(fixed, *saved, cotangents), None

        pure.__name__ = getattr(self.f, "__name__", None) or type(self.f).__name__  # profiles and jaxprs show it
        function = jax.custom_vjp(pure)
        function.defvjp(forward, backward)
        return plain, function

    def pull(self, fixed: tuple[int, ...], saved: _Saved, residual: list[Any], cotangents: Any) -> Leaves:
        """The cotangents of the differentiated leaves."""
        assert self.bwd is not None  # see call
        nondiff, res = attached(*Unpacker((*empty(3), ([], residual)), Refs()).build(saved.residual.root, None))
        treedef, flat = saved.shapes
        primals: tuple[Leaves, Leaves] = jax.tree.unflatten(treedef, flat)
        form = arguments_of(saved.graphdef)
        refs = Refs()
        updates = Unpacker(empty(4), refs).build(form, None)
        g = apply(saved.after, [*cotangents[1:], ([], [])], refs)
        if self.modes == Modes():
            states = _states(form, updates, refs, primals)
            g = tuple(s for i, s in enumerate(states) if i not in fixed), g
        more = {"updates_g": _only_written(updates, refs, fixed)} if self.wants_updates else {}
        given = self.bwd(*nondiff, res, g, **more)
        wanted = [i for i in range(len(form.keys)) if i not in fixed]
        if not isinstance(given, tuple | list) or len(given) != len(wanted):
            found = f"{len(given)}" if isinstance(given, tuple | list) else f"a {type(given).__name__}"
            raise SpecError(
                f"{name_of(self.bwd)} must return a tuple of {len(wanted)} cotangents, one for each argument of"
                f" {name_of(self.f)} that is differentiated, found {found}."
            )
        trees = dict(zip(wanted, given, strict=True))
        return fitted(form, [trees.get(i) for i in range(len(form.keys))], ("cotangents",), primals[0])


def _is_static(x: Any) -> bool:
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
    keys = [k for change in after.objects for k in (*dict(change.set), *change.removed)]
    return f"returns {described(after.result.root)}, writes {len(after.variables)} Variables, sets or removes {keys}"


def _states(form: Node, updates: Any, refs: Refs, primals: tuple[Leaves, Leaves]) -> list[Any]:
    """For each argument the cotangents of what was written to it: States for modules, else None."""
    sources = [(iter(values), iter(loose)) for values, loose in primals]
    found = []
    for path, leaf, given in matched(form, updates, ("updates",)):
        values, loose = sources[leaf.group]
        if type(leaf) is VariableDef:
            found.append(_fit(path, next(values), refs.objects[leaf.id]._raw_value))
        elif leaf.owned:  # type: ignore[union-attr]  # a Leaf has it
            found.append(_fit(path, next(values), given if kind_of(given) == ARRAY else None))
        else:
            next(loose)
    left = iter(found)
    return [_state(child, left) for child in form.children]


def _state(d: Element, values: Iterator[Any]) -> Any:
    if type(d) is VariableDef:
        return new_variable(d.kind, next(values), thaw_metadata(d.metadata))
    if type(d) is not Node:
        return None
    if d.id is not None or issubclass(d.kind, State):
        return State([(path, _leaf(e, values)) for path, e in nodes(d) if _is_owned(e)])
    children = [_state(child, values) for child in d.children]
    return dict(zip(d.keys, children, strict=True)) if d.kind is dict else d.rebuild(children)


def _is_owned(d: Element) -> bool:
    return type(d) is VariableDef or (type(d) is Leaf and d.owned)


def _leaf(d: Element, values: Iterator[Any]) -> Any:
    return new_variable(d.kind, next(values), thaw_metadata(d.metadata)) if type(d) is VariableDef else next(values)


def _only_written(updates: tuple[Any, ...], refs: Refs, fixed: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments with cotangents where something was written and None elsewhere."""
    for x in refs.objects:
        if isinstance(x, Object):
            for key, v in list(x._nnx_items().items()):
                if isinstance(v, Variable) and v._raw_value is None:
                    x._nnx_storage()[key] = None
    return tuple(None if i in fixed else x for i, x in enumerate(updates))


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
      >>> from nnx_core.transforms.differentials import custom_vjp
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
