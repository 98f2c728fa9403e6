"""Which wrapped Linen modules a call reaches that have no variables yet, and what they are called with.

Law: the model runs abstractly and on a copy, so no forward pass is computed and nothing of it changes. Random keys
and inputs that must be known to make variables are computed alone, from the values that were given.
A wrapper on the copy is found by a mark, which is part of its structure: so it is found inside of nnx.jit,
nnx.remat and others too, and no function that was compiled before is taken to know the call. Where nnx.vmap or
nnx.scan gives new variables an axis, they are computed as it makes them. A transform that takes no new variables
(nnx.while_loop, a module that nnx.scan shares among its steps) runs once more, with variables made before.
Knows wrappers as nodes that take variables; knows nothing of Linen, nor how variables are made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import partial_eval

import nnx_core as nnx
from bridge._types import Location
from bridge.linen_in_nnx._errors import UnknownValueError
from bridge.linen_in_nnx.as_graph import LinenNode, nodes_in
from bridge.variables.mapping import variables_from
from nnx_core._trace import current_trace
from nnx_core.graph.objects import is_array

_MARK = "lazy_init:"  # no identifier: no attribute of a user's has such a name
_Literal = jax.extend.core.Literal
#: Variables as Linen returned them, boxed or not, or their shapes.
Made = dict[Location, Any]
#: (args, kwargs) of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_tokens = itertools.count()


# ---- what the run has traced, and its values ----


class Output(NamedTuple):
    """A value that the abstract run knew: which of its outputs it is (None: no output can be), and its shape."""

    index: int | None
    spec: jax.ShapeDtypeStruct


def _with_outputs(tree: Any, outputs: list[Any] | None) -> Any:
    """`tree` with an Output for each value that is traced; the values are added to `outputs`."""

    def output_of(x: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return x
        if outputs is None:
            return Output(None, _spec(x))
        outputs.append(x)
        return Output(len(outputs) - 1, _spec(x))

    return jax.tree.map(output_of, tree)


def _is_output(x: Any) -> bool:
    return type(x) is Output


def _map_outputs(f: Callable[[Output], Any], tree: Any) -> Any:
    return jax.tree.map(lambda x: f(x) if _is_output(x) else x, tree, is_leaf=_is_output)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


class Computation(NamedTuple):
    """What an abstract run computes, and from what: arrays, or ShapeDtypeStructs where the values are not known."""

    program: jax.extend.core.ClosedJaxpr
    inputs: list[Any]

    def in_place_of_outputs(self, tree: Any, wrapper: str, what: str) -> Any:
        """`tree` with values where it has Outputs.

        Args:
          wrapper, what: whose they are and what they are, for the message.

        Raises:
          UnknownValueError: if the values that were given do not tell them.
        """
        outputs = [x for x in jax.tree.leaves(tree, is_leaf=_is_output) if _is_output(x)]
        indices = [output.index for output in outputs if output.index is not None]
        if len(indices) < len(outputs):
            raise UnknownValueError(wrapper, what, "they are computed inside a JAX transform in the model's call")
        values = self.values(indices)
        if values is None:
            raise UnknownValueError(wrapper, what, "they depend on a ShapeDtypeStruct")
        return _map_outputs(lambda output: values[output.index], tree)

    def values(self, indices: Sequence[int]) -> dict[int | None, Any] | None:
        """These outputs, computed from what they depend on and nothing else; None if that is not all known."""
        if not indices:
            return {}
        is_wanted = [index in indices for index in range(len(self.program.jaxpr.outvars))]
        # `dce_jaxpr` is JAX's own, and keeps effects: hence `_without_effects`.
        jaxpr, is_used = partial_eval.dce_jaxpr(_without_effects(self.program.jaxpr, indices), is_wanted)
        inputs = list(itertools.compress(self.inputs, is_used))
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
            return None
        pruned = jax.extend.core.ClosedJaxpr(jaxpr, self.program.consts)
        computed = jax.extend.core.jaxpr_as_fun(pruned)(*inputs)
        return dict(zip(itertools.compress(itertools.count(), is_wanted), computed, strict=True))


def _without_effects(jaxpr: jax.extend.core.Jaxpr, indices: Iterable[int]) -> jax.extend.core.Jaxpr:
    """`jaxpr` without what only prints or calls back on the way to these outputs: JAX would keep it."""
    wanted = [jaxpr.outvars[index] for index in indices]
    live = {var for var in wanted if not isinstance(var, _Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        inputs = [var for var in eqn.invars if not isinstance(var, _Literal)]
        # Who writes a Ref has no output; `inner_aval` is JAX's mark of one.
        touches_ref = any(hasattr(var.aval, "inner_aval") for var in inputs)
        if touches_ref or not live.isdisjoint(eqn.outvars):
            live.update(inputs)
            eqns.append(eqn)
    return jaxpr.replace(eqns=eqns[::-1])


def from_shapes(wrapper: str, init: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`init(*args, **kwargs)`, where some arrays are ShapeDtypeStructs: what depends on none of them is computed.

    Raises:
      UnknownValueError: if a value of the result depends on them.
    """
    # Not Linen's own lazy_init: since flax 0.12.12 it runs the whole module, on zeros.
    leaves, treedef = jax.tree.flatten((args, kwargs))
    unknown = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    results: list[Any] = []

    def run(unknown: dict[int, Any]) -> list[Any]:
        outputs: list[Any] = []
        args, kwargs = treedef.unflatten({**dict(enumerate(leaves)), **unknown}.values())
        results.append(_with_outputs(init(*args, **kwargs), outputs))
        return outputs

    program = jax.make_jaxpr(run)(unknown)
    values = Computation(program, list(unknown.values())).values(range(len(program.jaxpr.outvars)))
    if values is None:
        raise UnknownValueError(wrapper, "inputs", "variables are computed from them")
    return _map_outputs(lambda output: values[output.index], results[0])


# ---- the run ----


class CallNote(NamedTuple):
    """A call that made variables, as the run saw it, with Outputs for what was traced.

    Attributes:
      place: of which wrapper.
      arguments: (args, kwargs).
      keys: what it was given as `rngs`, if anything.
      method: as for ToNNX.
    """

    place: int
    arguments: Arguments
    keys: Mapping[str, Any] | None
    method: Any


class StackNote(NamedTuple):
    """Variables that got an axis, as the run saw them, with Outputs for what was traced.

    Attributes:
      place: of which wrapper.
      kinds: type and metadata of each.
      raw: their values.
      counts: of the wrapper's random streams, by name.
    """

    place: int
    kinds: dict[Location, tuple[type[nnx.Variable[Any]], dict[str, Any]]]
    raw: dict[Location, Any]
    counts: dict[str, Any]


class AbstractRun:
    """Notes calls of wrappers without variables while a model runs abstractly."""

    def __init__(self) -> None:
        self.token = next(_tokens)
        self.trace = current_trace()
        self.wrappers: list[LinenNode] = []
        self.calls: list[CallNote] = []
        self.made: dict[int, Made] = {}
        # The places of those that made variables in an inner transform.
        self.inside: set[int] = set()
        self.outputs: list[Any] = []

    def mark(self, wrappers: Sequence[LinenNode], premade: Mapping[int, Made]) -> None:
        """Know these wrappers, copies that nobody else has, by their place, and give them variables."""
        self.wrappers = list(wrappers)
        for place, wrapper in enumerate(wrappers):
            object.__setattr__(wrapper, "_nnx_marks", {**wrapper._nnx_marks, _MARK: f"{self.token} {place}"})
            for location, variable in variables_from(premade.get(place, {}).items()).items():
                wrapper._nnx_take(location, variable)

    def place_of(self, wrapper: nnx.Object) -> int | None:
        """Where `wrapper` is among those that were marked; None if it is none of them."""
        token, _, place = wrapper._nnx_marks.get(_MARK, "").partition(" ")
        return int(place) if token == str(self.token) else None

    def note(self, place: int, made: Made, arguments: Arguments, method: Any, keys: Mapping[str, Any] | None) -> None:
        """Note a call that made variables; `keys`: what it was given as `rngs`, if anything."""
        # What an inner transform computes is no output of the run.
        in_this_trace = current_trace() == self.trace
        if not in_this_trace:
            self.inside.add(place)
        shapes = {location: jax.tree.map(_spec, value) for location, value in made.items()}
        self.made.setdefault(place, {}).update(shapes)
        arguments, keys = _with_outputs((arguments, keys), self.outputs if in_this_trace else None)
        self.calls.append(CallNote(place, arguments, keys, method))

    def keeps(self, wrapper: nnx.Object) -> bool:
        """Whether the variables of `wrapper` have to stay as they were made: nobody could tell what they were."""
        return self.place_of(wrapper) in self.inside and current_trace() != self.trace

    def stacks(self) -> list[StackNote]:
        """The wrappers whose variables got other shapes than they were made with."""
        notes = [self._stack_at(place) for place in sorted(self.inside)]
        return [note for note in notes if note is not None]

    def _stack_at(self, place: int) -> StackNote | None:
        wrapper, made = self.wrappers[place], self.made[place]
        there = wrapper._nnx_inventory().variables
        variables = {location: there[location] for location in made if location in there}
        as_made = variables_from((location, made[location]) for location in variables)
        raw = _raw_values(variables)
        if _shapes(raw) == _shapes(_raw_values(as_made)):
            return None
        kinds = {location: (type(v), v.get_metadata()) for location, v in variables.items()}
        counts = {name: wrapper.rngs[name].count.get_raw_value() for name in wrapper.rngs or ()}
        return StackNote(place, kinds, *_with_outputs((raw, counts), self.outputs))


def _raw_values(variables: Mapping[Location, nnx.Variable[Any]]) -> dict[Location, Any]:
    return {location: variable.get_raw_value() for location, variable in variables.items()}


# The run cannot be an argument: the model's own code stands between `lazy_init` and the wrappers.
_running: ContextVar[AbstractRun | None] = ContextVar("bridge_abstract_run", default=None)


def abstract_run() -> AbstractRun | None:
    """That of the `lazy_init` that is running, if one is."""
    return _running.get()


@contextmanager
def _new_run() -> Iterator[AbstractRun]:
    run = AbstractRun()
    token = _running.set(run)
    try:
        yield run
    finally:
        _running.reset(token)


# ---- what it has found ----


class FirstCall(NamedTuple):
    """A call that needs variables: of which wrapper, by its place, and with what; `wrapper`: its name."""

    note: CallNote
    computation: Computation
    wrapper: str

    @property
    def place(self) -> int:
        """Of which wrapper."""
        return self.note.place

    def keys(self) -> Mapping[str, Any] | None:
        """The random keys that the call itself gave; None where it gave none.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        return self.computation.in_place_of_outputs(self.note.keys, self.wrapper, "random keys")

    def shapes(self) -> Arguments:
        """(args, kwargs), with ShapeDtypeStructs for what the abstract run computed."""
        return _map_outputs(lambda output: output.spec, self.note.arguments)

    def values(self) -> Arguments:
        """(args, kwargs), computed.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        return self.computation.in_place_of_outputs(self.note.arguments, self.wrapper, "inputs")


class Stack(NamedTuple):
    """Variables of a wrapper that nnx.vmap or nnx.scan in the model's call gives an axis; `wrapper`: its name."""

    note: StackNote
    computation: Computation
    wrapper: str

    @property
    def place(self) -> int:
        """Of which wrapper."""
        return self.note.place

    def values(self) -> tuple[dict[Location, nnx.Variable[Any]], dict[str, Any]]:
        """The Variables, computed, and the counts of the wrapper's random streams once they are made.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        noted = self.note.raw, self.note.counts
        raw, counts = self.computation.in_place_of_outputs(noted, self.wrapper, "inputs")
        variables: dict[Location, nnx.Variable[Any]] = {}
        for location, (kind, metadata) in self.note.kinds.items():
            variables[location] = kind(raw[location], **metadata)
        return variables, counts


def calls_in(
    owner: nnx.Object, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[FirstCall], list[Stack]]:
    """What `method(owner, *args, **kwargs)` needs of wrappers without variables, in the order of its calls.

    A wrapper is in the calls, or its variables are a Stack. Places count `nodes_in(owner)`.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    arrays = {i: x for i, x in enumerate(leaves) if is_array(x)}
    objects = {i: x for i, x in enumerate(leaves) if isinstance(x, nnx.Object)}
    graphdef, state = nnx.split({"owner": owner, "objects": objects})
    runs: list[AbstractRun] = []
    stack_notes: list[StackNote] = []

    def traced(state: Any, arrays: dict[int, Any], premade: dict[int, Made]) -> list[Any]:
        copy = nnx.merge(graphdef, state)
        args, kwargs = treedef.unflatten({**dict(enumerate(leaves)), **copy["objects"], **arrays}.values())
        with _new_run() as run:
            runs.append(run)
            run.mark(nodes_in(copy["owner"]), premade)
            method(copy["owner"], *args, **kwargs)
        stack_notes[:] = run.stacks()
        return run.outputs

    program, premade = _trace_until_taken(traced, (state, arrays), runs)
    computation = Computation(program, jax.tree.leaves((state, arrays, premade)))
    names = [type(wrapper.module).__name__ for wrapper in nodes_in(owner)]
    stacks = [Stack(note, computation, names[note.place]) for note in stack_notes]
    stacked = {stack.place for stack in stacks}
    # What was made beforehand has variables in the last run, which notes nothing of it; an earlier one did.
    notes = [note for run in runs for note in run.calls if run is runs[-1] or note.place in premade]
    calls = [FirstCall(note, computation, names[note.place]) for note in notes if note.place not in stacked]
    return calls, stacks


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Object | nnx.Variable)


def _trace_until_taken(
    traced: Callable[..., Any], inputs: tuple[Any, ...], runs: list[AbstractRun]
) -> tuple[jax.extend.core.ClosedJaxpr, dict[int, Made]]:
    """`traced(*inputs, premade)` as a program, and what was made beforehand: what a transform could not take else.

    It is traced again with what inner transforms made, which exists before them then, until nothing fails or
    nothing new was made. The first error is the one to show: the user's, unless it was ours from the start.
    """
    premade: dict[int, Made] = {}
    first_error: Exception | None = None
    while True:
        try:
            return jax.make_jaxpr(traced)(*inputs, premade), premade
        except Exception as error:  # noqa: BLE001  # whatever a transform says of variables that it cannot take
            first_error = first_error or error
            run = runs[-1] if runs else None
            if run is None or not run.inside:
                # Our own error asked for the second run: what that one says is what is wrong.
                raise error if isinstance(first_error, nnx.NnxError) else first_error from None
            premade = dict(premade)
            for place in run.inside:
                premade[place] = {**premade.get(place, {}), **run.made[place]}
