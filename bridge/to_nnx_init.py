"""Which wrapped Linen modules a call reaches that have no variables yet, and what they are called with.

Law: the model runs abstractly and on a copy, so no forward pass is computed and nothing of it changes. Random keys
and inputs that must be known to make variables are computed alone, from the values that were given.
A wrapper on the copy is found by a mark, which is part of its structure: so it is found inside of nnx.jit,
nnx.remat and others too, and no function that was compiled before is taken to know the call.
Knows wrappers as objects that make variables; knows nothing of Linen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.extend.core
from jax.interpreters import partial_eval

import nnx_core as nnx
from bridge._wrapper_errors import UnknownValueError
from nnx_core._trace import current_trace
from nnx_core.graph.objects import is_array

_MARK = "lazy_init:"  # no identifier: no attribute of a user's has such a name
_Literal = jax.extend.core.Literal
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
        self.found: list[tuple[int, Any, Any, Any]] = []  # place, (args, kwargs), method, keys
        self.outputs: list[Any] = []

    def mark(self, wrappers: Sequence[nnx.Object]) -> None:
        """Know these wrappers, copies that nobody else has, by their place."""
        for place, wrapper in enumerate(wrappers):
            object.__setattr__(wrapper, "_nnx_marks", {**wrapper._nnx_marks, _MARK: f"{self.token} {place}"})

    def place_of(self, wrapper: nnx.Object) -> int | None:
        """Where `wrapper` is among those that were marked; None if it is none of them."""
        token, _, place = wrapper._nnx_marks.get(_MARK, "").partition(" ")
        return int(place) if token == str(self.token) else None

    def add(self, place: int, args: Any, kwargs: Any, method: Any, keys: Mapping[str, Any] | None) -> None:
        """Note a call that made variables; `keys` are what it was given as `rngs`, if it was given any."""
        reachable = current_trace() == self.trace  # what an inner transform computes is no output of the run
        call, keys = _noted(((args, kwargs), keys), self.outputs if reachable else None)
        self.found.append((place, call, keys, method))


def _noted(tree: Any, outputs: list[Any] | None) -> Any:
    """`tree` with an Output for each value that is traced; the values are added to `outputs`."""

    def note(x: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return x
        if outputs is not None:
            outputs.append(x)
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
        return Output(None if outputs is None else len(outputs) - 1, spec)

    return jax.tree.map(note, tree)


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


class Call:
    """A call that needs variables: of which wrapper, by its place, and with what.

    Args:
      found: the call as it was recorded.
      known: computes what the abstract run knew.
      wrapper: the name of the wrapper, for messages.
    """

    def __init__(self, found: tuple[int, Any, Any, Any], known: Known, wrapper: str):
        self.place, self._given, self._keys, self.method = found
        self._known, self._wrapper = known, wrapper

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
) -> list[Call]:
    """The calls that `method(owner, *args, **kwargs)` makes of wrappers without variables, in their order."""
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Object | nnx.Variable))
    arrays = {i: x for i, x in enumerate(flat) if is_array(x)}
    objects = {i: x for i, x in enumerate(flat) if isinstance(x, nnx.Object)}
    graphdef, state = nnx.split({"owner": owner, "objects": objects})
    found: list[Any] = []

    def run(state: Any, arrays: dict[int, Any]) -> list[Any]:
        copy = nnx.merge(graphdef, state)
        args, kwargs = treedef.unflatten({**dict(enumerate(flat)), **copy["objects"], **arrays}.values())
        with _recording() as recorder:
            recorder.mark(wrappers_in(copy["owner"]))
            method(copy["owner"], *args, **kwargs)
        found.extend(recorder.found)
        return recorder.outputs

    known = Known(jax.make_jaxpr(run)(state, arrays), jax.tree.leaves((state, arrays)))
    wrappers = wrappers_in(owner)
    return [Call(x, known, type(wrappers[x[0]].module).__name__) for x in found]
