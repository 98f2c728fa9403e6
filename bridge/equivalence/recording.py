"""What each layer of a model was fed and returned in one call, layer by layer, also inside of transforms.

The model runs as one program in which scans are written out. What cannot be that (a branch whose value decides, numpy,
a transform that traces all the same, as vmap and remat do, a scan that is too long) runs operation by operation,
without `jit`: there a scan is a loop, a branch is taken, and values come out of traces by a callback, once for each
lane of a vmap.

Law: the numbers are those of a call that nobody looks at; what was traced and never ran is in no record.
In a *fed* run each layer is given what the layer of another record was fed, so that what it makes of it is its own.
Knows calls of layers and arrays; knows nothing of either API, or of pairs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge._types import Path
from bridge.equivalence.compiled import options_for
from bridge.equivalence.numbers import is_key, on_host
from bridge.equivalence.subjects import Keys, Layer, Subject, Values
from bridge.linen_in_nnx.config import WHEN_TRAINING
from bridge.tracing.trace import is_array, parted

#: XLA's option: what a layer returns in half precision is rounded to it before the next one has it.
_AS_WRITTEN = {"xla_allow_excess_precision": False}

#: Of a longer program compiling takes longer than running each operation by itself.
_MOST_EQUATIONS = 4096

#: Path of a layer, name of its method, and how often that was called before, traces included.
Place = tuple[Path, str, int]


@dataclass
class Event:
    """One call of a layer.

    Attributes:
      inputs, outputs: arrays, each with one value a lane; outputs are empty for a call that was traced and never ran.
      trains: what the layer's flag said, whichever it has: None if it has none, or it is open.
      parent: the call that it was made in.
      is_rehearsal: whether Linen only tries the body of a scan, before the scan itself.
      call: 1 for the layer's first call that ran.
      begin, end: when, counted in beginnings and ends of all calls.
      own: the layer's own variables in this call; none where they are mapped or traced.
      is_fed: whether it was fed what another layer was fed; `inputs` are what it would have been fed otherwise.
    """

    place: Place
    kind: type
    layer: Any
    parent: Event | None
    trains: bool | None
    inputs: list[list[np.ndarray]] = field(default_factory=list)
    outputs: list[list[np.ndarray]] = field(default_factory=list)
    is_rehearsal: bool = False
    call: int = 0
    begin: int = 0
    end: int = 0
    own: list[Any] = field(default_factory=list)
    is_fed: bool = False

    @property
    def path(self) -> Path:
        return self.place[0]

    @property
    def method(self) -> str:
        return self.place[1]

    def around(self) -> Iterator[Event]:
        """The calls that it was made in, the innermost first."""
        above = self.parent
        while above is not None:
            yield above
            above = above.parent

    @property
    def lanes(self) -> int:
        """How many values each array has; one that is the same in all lanes of a vmap has one."""
        return max(map(len, (*self.inputs, *self.outputs)), default=0)

    @property
    def ran(self) -> bool:
        return all(self.outputs) and not self.is_rehearsal


def stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """The value of all lanes; of one lane its own."""
    return values[0] if len(values) == 1 else np.stack(values)


class Recording:
    """Takes down events; a Listener.

    Args:
      feed: place -> arrays to be fed instead of the layer's own.
    """

    def __init__(self, feed: Mapping[Place, Sequence[Any]] | None = None, *, is_whole: bool = False):
        self.events: list[Event] = []
        self._feed, self._is_whole = feed or {}, is_whole
        self._counts: Counter[tuple[Path, str]] = Counter()
        self._open: list[Event] = []
        self._clock = 0

    def call(self, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the layer, and take down what it was fed and what it returned."""
        place = (layer.path, layer.method, self._counts[layer.path, layer.method])
        self._counts[layer.path, layer.method] += 1
        parent = self._open[-1] if self._open else None
        event = Event(place, layer.kind, layer.itself, parent, _trains(layer.itself, kwargs), begin=self._clock)
        self._clock += 1
        event.is_rehearsal = _is_rehearsal()
        self.events.append(event)
        if event.is_rehearsal:
            return run(*args, **kwargs)
        own = layer.own_arrays()
        is_traced = any(isinstance(x, jax.core.Tracer) for x in own)
        event.own = [] if is_traced and not self._is_whole else own
        self._take((args, kwargs), event.inputs)
        if place in self._feed:
            args, kwargs = self._fed(event, args, kwargs)
        self._open.append(event)
        try:
            output = run(*args, **kwargs)
        finally:
            self._open.pop()
        self._take(output, event.outputs)
        event.end = self._clock
        self._clock += 1
        return output

    def _take(self, tree: Any, columns: list[list[np.ndarray]]) -> None:
        for x in map(_numbers, filter(is_array, jax.tree.leaves(tree))):
            column: list[np.ndarray] = []
            columns.append(column)
            if not isinstance(x, jax.core.Tracer):
                column.append(on_host(x))
            elif self._is_whole:
                column.append(x)
            else:
                jax.debug.callback(_appending(column), x)

    def _fed(self, event: Event, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with the arrays to be fed; as they are, where the two have not the same form."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        positions = [n for n, x in enumerate(leaves) if is_array(x)]
        values = self._feed[event.place]
        own = [leaves[n] for n in positions]
        shapes = [np.shape(_numbers(x)) for x in own]
        # One value is none for all lanes of a vmap. JAX tells its tracers by no public name.
        mapped = any(type(x).__name__ == "BatchTracer" for x in own)
        if mapped or shapes != [np.shape(value) for value in values]:
            return args, kwargs
        for n, value in zip(positions, values, strict=True):
            leaves[n] = _like(leaves[n], value)
        event.is_fed = True
        args, kwargs = treedef.unflatten(leaves)
        return args, kwargs


def record(
    subject: Subject,
    values: Values,
    keys: Keys,
    args: Any,
    kwargs: Any,
    feed: Mapping[Place, Sequence[np.ndarray]] | None = None,
) -> list[Event]:
    """The calls of one run, in the order in which they began."""
    events = _as_one_program(subject, (dict(values), keys, args, kwargs), feed)
    if events is None:
        recording = Recording(feed)
        with jax.disable_jit(), jax.default_matmul_precision("float32"):
            subject.listened(values, keys, args, kwargs, recording)
        jax.effects_barrier()
        events = recording.events
    calls: Counter[tuple[Path, str]] = Counter()
    events = [event for event in events if event.ran]
    for event in events:
        calls[event.path, event.method] += 1
        event.call = calls[event.path, event.method]
    return events


def _as_one_program(
    subject: Subject, call: Any, feed: Mapping[Place, Sequence[np.ndarray]] | None
) -> list[Event] | None:
    """The calls of one run, compiled with all that they are fed and return as its results; None if it cannot be."""
    events: list[Event] = []

    def run(call: Any, fed: Any) -> list[list[Any]]:
        values, keys, args, kwargs = call
        recording = Recording(dict(zip(feed or (), fed, strict=True)), is_whole=True)
        with jax.disable_jit():
            subject.listened(values, keys, args, kwargs, recording)
        events[:] = recording.events
        return [list(column) for column in _columns(events)]

    traced, arrays = parted(run, call, list((feed or {}).values()))
    try:
        with jax.default_matmul_precision("float32"):
            program = jax.jit(traced).trace(arrays)
            if len(program.jaxpr.eqns) > _MOST_EQUATIONS:
                return None
            results = program.lower().compile({**(options_for(call[0]) or {}), **_AS_WRITTEN})(arrays)
    except Exception:  # noqa: BLE001  numpy, an `if` on a value, a vmap or a branch: it is run step by step
        return None
    for column, values in zip(_columns(events), results, strict=True):
        column[:] = [on_host(x) for x in values]
    return events


def _columns(events: Sequence[Event]) -> Iterator[list[Any]]:
    """Everywhere arrays are; of their own variables, those of layers that are called several times."""
    counts = Counter((event.path, event.method) for event in events)
    for event in events:
        yield from event.inputs
        yield from event.outputs
        if counts[event.path, event.method] > 1:
            yield event.own
        else:
            event.own = []


def fields_of(layer: Any) -> dict[str, Any]:
    """Options of a layer that both APIs may call alike: numbers, flags, names of functions and dtypes."""
    options: dict[str, Any] = {}
    for name, x in vars(layer).items():
        if name.startswith("_") or name in ("name", "parent", "scope", *WHEN_TRAINING):
            continue
        if x is None or isinstance(x, bool | int | float | str):
            options[name] = x
        elif isinstance(x, tuple | list) and all(isinstance(item, int | str) for item in x):
            options[name] = x[0] if len(x) == 1 else tuple(x)
        elif isinstance(x, type | np.dtype) and name.endswith("dtype"):
            options[name] = jnp.dtype(x).name
        elif inspect.isfunction(x) or isinstance(x, jax.custom_jvp):
            options[name] = getattr(x, "__name__", str(x))
    return options


def _is_rehearsal() -> bool:
    """Whether this runs in the trace in which `nn.scan` looks which outputs depend on the carry.

    What has an effect there, such as a callback, would depend on it. Nothing but the call stack tells that trace.
    """
    frame = inspect.currentframe()
    while frame is not None:
        is_body = frame.f_code.co_name == "body_fn" and frame.f_globals.get("__name__") == "flax.core.axes_scan"
        if is_body and frame.f_locals.get("init_mode"):
            return True
        frame = frame.f_back
    return False


def _numbers(x: Any) -> Any:
    """Of random keys, those that they are made of."""
    return jax.random.key_data(x) if is_key(x) else x


def _like(x: Any, value: np.ndarray) -> Any:
    # In the value's own dtype: a layer behind one in half precision is to be fed what it would be otherwise.
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(x)) if is_key(x) else jnp.asarray(value)


def _appending(column: list[np.ndarray]) -> Callable[[Any], None]:
    def append(x: Any) -> None:
        column.append(np.asarray(x))

    return append


def _trains(layer: Any, kwargs: Any) -> bool | None:
    """Whether the layer is in training mode, by its own flag or that of the call."""
    for name, when_training in WHEN_TRAINING.items():
        value = kwargs.get(name)
        if value is None:
            value = vars(layer).get(name) if hasattr(layer, "__dict__") else None
        if isinstance(value, bool | np.bool_):
            return bool(value) is when_training
    return None
