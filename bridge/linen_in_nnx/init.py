"""Which wrapped Linen modules a call reaches that have no variables yet, and what they are called with.

Law: the model runs abstractly and on a copy, so no forward pass is computed and nothing of it changes. Random keys
and inputs that must be known to make variables are computed alone, from the values that were given.
A wrapper on the copy is found by a mark, which is part of its structure: so it is found inside of nnx.jit,
nnx.remat and others too, and no function that was compiled before is taken to know the call. Where nnx.vmap or
nnx.scan gives new variables an axis, they are computed as it makes them. A transform that takes no new variables
(nnx.while_loop, a module that nnx.scan shares among its steps) runs once more, with variables made before.
Knows wrappers as objects that make variables and take them; knows nothing of Linen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bridge.linen_in_nnx.as_graph import Level, sync
from bridge.variables.mapping import nest
from bridge.variables.metadata import to_nnx_variable
from nnx_core._changes import touch
from nnx_core._trace import current_trace
from nnx_core.graph.objects import is_array

_MARK = "lazy_init:"  # no identifier: no attribute of a user's has such a name
_Literal = jax.extend.core.Literal
#: Variables as Linen returned them, boxed or not, or their shapes.
Made = dict[Location, Any]
_tokens = itertools.count()


class Output(NamedTuple):
    """A value that the abstract run knew: which of its outputs it is (None: no output can be), and its shape."""

    index: int | None
    spec: jax.ShapeDtypeStruct


class Recorder:
    """Notes calls of wrappers without variables while a model runs abstractly."""

    def __init__(self) -> None:
        self.token = next(_tokens)
        self.trace = current_trace()
        self.wrappers: list[Any] = []
        self.found: list[tuple[int, Any, Any, Any]] = []  # place, (args, kwargs), method, keys
        self.made: dict[int, Made] = {}
        self.inside: set[int] = set()  # the places of those that made variables in an inner transform
        self.outputs: list[Any] = []

    def mark(self, wrappers: Sequence[Any], premade: Mapping[int, Made]) -> None:
        """Know these wrappers, copies that nobody else has, by their place, and give them variables."""
        self.wrappers = list(wrappers)
        for place, wrapper in enumerate(wrappers):
            object.__setattr__(wrapper, "_nnx_marks", {**wrapper._nnx_marks, _MARK: f"{self.token} {place}"})
            for at, value in premade.get(place, {}).items():
                wrapper._nnx_take(at, to_nnx_variable(at[0], value))

    def place_of(self, wrapper: nnx.Object) -> int | None:
        """Where `wrapper` is among those that were marked; None if it is none of them."""
        token, _, place = wrapper._nnx_marks.get(_MARK, "").partition(" ")
        return int(place) if token == str(self.token) else None

    def add(self, place: int, made: Made, call: tuple[Any, Any], method: Any, keys: Mapping[str, Any] | None) -> None:
        """Note a call, (args, kwargs), that made variables; `keys`: what it was given as `rngs`, if anything."""
        reachable = current_trace() == self.trace  # what an inner transform computes is no output of the run
        if not reachable:
            self.inside.add(place)
        self.made.setdefault(place, {}).update({at: jax.tree.map(_spec, x) for at, x in made.items()})
        call, keys = _noted((call, keys), self.outputs if reachable else None)
        self.found.append((place, call, keys, method))

    def keeps(self, wrapper: nnx.Object) -> bool:
        """Whether the variables of `wrapper` have to stay as they were made: nobody could tell what they were."""
        return self.place_of(wrapper) in self.inside and current_trace() != self.trace

    def stacks(self) -> list[tuple[int, Any]]:
        """(place, (variables, counts)) of the wrappers whose variables got other shapes than they were made with."""
        found = []
        for place in sorted(self.inside):
            wrapper, made = self.wrappers[place], self.made[place]
            now = {at: v for at, v in wrapper._view().variables.items() if at in made}
            raw = {at: v.get_raw_value() for at, v in now.items()}
            shapes = {at: jax.tree.map(jnp.shape, x) for at, x in raw.items()}
            if shapes != {at: jax.tree.map(jnp.shape, to_nnx_variable(at[0], made[at]).get_raw_value()) for at in raw}:
                kinds = {at: (type(v), v.get_metadata()) for at, v in now.items()}
                counts = {name: wrapper.rngs[name].count.get_raw_value() for name in wrapper.rngs or ()}
                found.append((place, (kinds, *_noted((raw, counts), self.outputs))))
        return found


def _noted(tree: Any, outputs: list[Any] | None) -> Any:
    """`tree` with an Output for each value that is traced; the values are added to `outputs`."""

    def note(x: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return x
        if outputs is not None:
            outputs.append(x)
        return Output(None if outputs is None else len(outputs) - 1, _spec(x))

    return jax.tree.map(note, tree)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


_recorder: ContextVar[Recorder | None] = ContextVar("bridge_recorder", default=None)


def recorder() -> Recorder | None:
    """The Recorder of the `lazy_init` that is running, if one is."""
    return _recorder.get()


@contextmanager
def _recording() -> Iterator[Recorder]:
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


class _Noted:
    """What the abstract run has noted of one wrapper.

    Args:
      place: which wrapper.
      known: computes what the abstract run knew.
      wrapper: its name, for messages.
    """

    def __init__(self, place: int, known: Known, wrapper: str):
        self.place, self._known, self._wrapper = place, known, wrapper

    def _computed(self, tree: Any, what: str) -> Any:
        wanted = [x.index for x in jax.tree.leaves(tree, is_leaf=_is_output) if _is_output(x)]
        if not wanted:
            return tree
        if None in wanted:
            raise UnknownValueError(self._wrapper, what, "they are computed inside a JAX transform in the model's call")
        values = self._known.values(wanted)
        if values is None:
            raise UnknownValueError(self._wrapper, what, "they depend on a ShapeDtypeStruct")
        return _map(tree, lambda _: values.pop(0))


class Call(_Noted):
    """A call that needs variables: of which wrapper, by its place, and with what."""

    def __init__(self, found: tuple[int, Any, Any, Any], known: Known, wrapper: str):
        place, self._given, self._keys, self.method = found
        super().__init__(place, known, wrapper)

    def keys(self) -> Mapping[str, Any] | None:
        """The random keys that the call itself gave; None where it gave none.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        return self._computed(self._keys, "random keys")

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), with ShapeDtypeStructs for what the abstract run computed."""
        return _map(self._given, lambda x: x.spec)

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), computed.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        return self._computed(self._given, "inputs")


class Stack(_Noted):
    """Variables of a wrapper that nnx.vmap or nnx.scan in the model's call gives an axis."""

    def __init__(self, found: tuple[int, Any], known: Known, wrapper: str):
        super().__init__(found[0], known, wrapper)
        self._kinds, self._raw, self._counts = found[1]

    def values(self) -> tuple[dict[Location, nnx.Variable[Any]], dict[str, Any]]:
        """The Variables, computed, and the counts of the wrapper's random streams once they are made.

        Raises:
          UnknownValueError: if nothing outside of the call can tell them.
        """
        raw, counts = self._computed((self._raw, self._counts), "inputs")
        return {at: kind(raw[at], **metadata) for at, (kind, metadata) in self._kinds.items()}, counts


def _is_output(x: Any) -> bool:
    return type(x) is Output


def _map(tree: Any, f: Callable[[Output], Any]) -> Any:
    return jax.tree.map(lambda x: f(x) if _is_output(x) else x, tree, is_leaf=_is_output)


class Known(NamedTuple):
    """What an abstract run computes, and from what."""

    program: jax.extend.core.ClosedJaxpr
    inputs: list[Any]

    def values(self, indices: Sequence[int]) -> list[Any] | None:
        """These outputs, computed from what they depend on and nothing else; None if that is not all known."""
        used_outputs = [i in indices for i in range(len(self.program.jaxpr.outvars))]
        jaxpr, used = partial_eval.dce_jaxpr(_without_effects(self.program.jaxpr, indices), used_outputs)
        inputs = [x for x, is_used in zip(self.inputs, used, strict=True) if is_used]
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
            return None
        outputs = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, self.program.consts))(*inputs)
        by_index = dict(zip([i for i, wanted in enumerate(used_outputs) if wanted], outputs, strict=True))
        return [by_index[i] for i in indices]


def _without_effects(jaxpr: jax.extend.core.Jaxpr, indices: Sequence[int]) -> jax.extend.core.Jaxpr:
    """`jaxpr` without what only prints or calls back on the way to these outputs: JAX would keep it."""
    live, eqns = {jaxpr.outvars[i] for i in indices if not isinstance(jaxpr.outvars[i], _Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        inputs = [x for x in eqn.invars if not isinstance(x, _Literal)]
        if not live.isdisjoint(eqn.outvars) or any(hasattr(x.aval, "inner_aval") for x in inputs):  # of a Ref
            live.update(inputs)
            eqns.append(eqn)
    return jaxpr.replace(eqns=eqns[::-1])


def from_shapes(wrapper: str, init: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`init(*args, **kwargs)`, where some arrays are ShapeDtypeStructs: what depends on none of them is computed.

    Raises:
      UnknownValueError: if a value of the result depends on them.
    """
    # Not Linen's own lazy_init: since flax 0.12.12 it runs the whole module, on zeros.
    flat, treedef = jax.tree.flatten((args, kwargs))
    unknown = {i: x for i, x in enumerate(flat) if isinstance(x, jax.ShapeDtypeStruct)}
    noted: list[Any] = []

    def run(unknown: dict[int, Any]) -> list[Any]:
        outputs: list[Any] = []
        args, kwargs = treedef.unflatten({**dict(enumerate(flat)), **unknown}.values())
        noted.append(_noted(init(*args, **kwargs), outputs))
        return outputs

    program = jax.make_jaxpr(run)(unknown)
    values = Known(program, list(unknown.values())).values(range(len(program.jaxpr.outvars)))
    if values is None:
        raise UnknownValueError(wrapper, "inputs", "variables are computed from them")
    return _map(noted[0], lambda x: values[x.index])


def calls_in(
    owner: nnx.Object,
    wrappers_in: Callable[[Any], list[Any]],
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[list[Call], list[Stack]]:
    """What `method(owner, *args, **kwargs)` needs of wrappers without variables, in the order of its calls.

    A wrapper is in the calls, or its variables are a Stack.
    """
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Object | nnx.Variable))
    arrays = {i: x for i, x in enumerate(flat) if is_array(x)}
    objects = {i: x for i, x in enumerate(flat) if isinstance(x, nnx.Object)}
    graphdef, state = nnx.split({"owner": owner, "objects": objects})
    recorders: list[Recorder] = []
    stacks: list[Any] = []

    def run(state: Any, arrays: dict[int, Any], premade: dict[int, Made]) -> list[Any]:
        copy = nnx.merge(graphdef, state)
        args, kwargs = treedef.unflatten({**dict(enumerate(flat)), **copy["objects"], **arrays}.values())
        with _recording() as recorder:
            recorders.append(recorder)
            recorder.mark(wrappers_in(copy["owner"]), premade)
            method(copy["owner"], *args, **kwargs)
        stacks[:] = recorder.stacks()
        return recorder.outputs

    program, premade = _traced(run, (state, arrays), recorders)
    known = Known(program, jax.tree.leaves((state, arrays, premade)))
    names = [type(wrapper.module).__name__ for wrapper in wrappers_in(owner)]
    stacked = {place for place, _ in stacks}
    found = [x for recorder in recorders for x in recorder.found if x[0] in premade or recorder is recorders[-1]]
    calls = [Call(x, known, names[x[0]]) for x in found if x[0] not in stacked]
    return calls, [Stack(x, known, names[x[0]]) for x in stacks]


def _traced(run: Callable[..., Any], inputs: tuple[Any, ...], recorders: list[Recorder]) -> tuple[Any, dict[int, Made]]:
    """`run(*inputs, premade)` traced, and what was made beforehand: what a transform in it could not take otherwise."""
    premade: dict[int, Made] = {}
    reason: Exception | None = None
    while True:
        try:
            return jax.make_jaxpr(run)(*inputs, premade), premade
        except Exception as error:  # noqa: BLE001  # whatever a transform says of variables that it cannot take
            reason = reason or error
            made = {place: recorders[-1].made[place] for place in recorders[-1].inside} if recorders else {}
            if not made:
                raise error if isinstance(reason, nnx.NnxError) else reason from None  # ours asked for the second run
            premade = {**premade, **{place: {**premade.get(place, {}), **made[place]} for place in made}}


@contextmanager
def all_or_nothing(wrappers: list[Any]) -> Iterator[None]:
    """Undo what was made of the variables of `wrappers`, if the last of them fails."""
    before = [(wrapper, wrapper._view().variables) for wrapper in wrappers]
    counts = [wrapper.rngs[name].count for wrapper in wrappers for name in wrapper.rngs or ()]
    raw = [count.get_raw_value() for count in counts]
    try:
        yield
    except Exception:
        for wrapper, variables in before:
            sync(wrapper._nnx_variables, nest(variables, Level))
            wrapper._arrange()
            touch(wrapper)
        for count, value in zip(counts, raw, strict=True):
            count.set_raw_value(value)
        raise
