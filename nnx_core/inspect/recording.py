"""Calling a method abstractly, on copies, and writing down every call of every object on the way.

Law: nothing is computed and nothing of the caller's is changed, whether the call returns or raises: it runs under
`jax.eval_shape` on fresh copies, which are watched and report to the Recorder that their marks name. (What the
model's own code sets outside of them, on its class say, it sets, as in any trace.) A mark is part of the structure, so
it survives transforms inside the call, and no function that was compiled before is taken to know the answer.
To be counted, a call is kept as it began and traced once more, alone, when the whole call is over: the model runs as
it always does, whichever way values leave its calls.
Knows objects and calls; knows nothing of how they are drawn.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from nnx_core._errors import Path
from nnx_core.graph.objects import Object
from nnx_core.graph.structure import Node, nodes
from nnx_core.graph.walk import iter_graph
from nnx_core.graph.watched import Method, set_class, watched_class
from nnx_core.inspect.census import ObjectInfo
from nnx_core.inspect.describe import describe, describe_arguments
from nnx_core.inspect.packed import Equations, Packed

Part = tuple[Path, type]  # of an object that is no object itself: where it is below that one, and what
_MARK = "recorded:"  # no identifier: no attribute of a user's has such a name
_MISSING = object()
_tokens = itertools.count()
_running: dict[int, "Recorder"] = {}


@dataclass(frozen=True)
class CallInfo:
    """One row of `tabulate`: a call of one object's method.

    `path` ends in the method's name unless that is `__call__`; `object_id` is the `id` of the caller's object;
    `outputs` holds arrays as `ArrayRepr`; flops are None unless asked for, or if they cannot be known.
    """

    call_order: int
    object_id: int
    type: type
    path: Path
    inputs_repr: str
    outputs: Any
    flops: int | None
    vjp_flops: int | None


class Recorder:
    """Takes down calls: one row for each (object, method, inputs), in the order in which calls begin.

    Args:
      infos: the objects there are.
      count: whether to keep the equations of each call, for its operations to be counted. Its code then runs once
        more, unless it is equal to a call whose equations are known.
    """

    def __init__(self, infos: list[ObjectInfo], *, count: bool):
        self.infos, self.count = infos, count
        self.token = next(_tokens)
        self.equations: dict[int, Equations] = {}  # by the number of the call; none of one that cannot run alone
        self._begun: dict[int, tuple[str, Method, Packed]] = {}  # how each call began, by its number
        self._rows: dict[int, CallInfo] = {}
        self._numbers = itertools.count()
        self._seen: set[tuple[Path, str, tuple[str, ...]]] = set()

    @property
    def rows(self) -> list[CallInfo]:
        """The calls that returned."""
        return [self._rows[order] for order in sorted(self._rows)]

    def record(self, index: int, name: str, method: Method, args: Any, kwargs: Any, part: Part | None = None) -> Any:
        """Run `method` of an object, or of a part of it, and add a row unless there is one like it."""
        info = self.infos[index] if part is None else self._info_of(index, *part)
        inputs = tuple(describe_arguments(args[1:], kwargs))
        question = info.path, name, inputs
        if question in self._seen:
            return method(*args, **kwargs)
        self._seen.add(question)
        order = next(self._numbers)
        if self.count and part is None:
            self._begun[order] = name, method, Packed.of(args, kwargs)
        try:
            output = method(*args, **kwargs)
        except BaseException:
            self._seen.discard(question)  # whoever catches this may call again, and that call has a row
            raise
        path = info.path if name == "__call__" else (*info.path, name)
        text = "\n".join(inputs)
        self._rows[order] = CallInfo(order, info.id, info.kind, path, text, describe(output), None, None)
        return output

    def _info_of(self, index: int, path: Path, kind: type) -> ObjectInfo:
        path = (*self.infos[index].path, *path)
        return ObjectInfo(path, kind, next((info.id for info in self.infos if info.path == path), 0))

    @contextlib.contextmanager
    def watching(self, root: Any) -> Iterator[None]:
        """In here, calls of the objects of `root` are recorded; `root` is a copy, whose classes stay watched."""
        self._watch(root)
        _running[self.token] = self
        try:
            yield
        finally:
            del _running[self.token]

    def run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the method `name` of the first of `args` with the others; nothing is computed."""
        packed = Packed.of(args, kwargs, from_shapes=True)

        def call(arrays: tuple[Any, ...]) -> None:
            (root, *rest), keywords = packed.unpack(arrays)
            # Of the class as it is before it is watched: this call has a row already.
            method = getattr(type(root), name)
            with self.watching(root):
                self.record(0, name, method, (root, *rest), keywords)
            self._trace_alone()  # in here, where an array that a closure holds is still good

        jax.eval_shape(call, packed.arrays)

    def _trace_alone(self) -> None:
        calls = []
        for order, (name, method, packed) in self._begun.items():
            if order in self._rows:  # it returned
                calls.append((order, name, method, packed.map_nodes(_unmarked)))
        known: dict[Any, Equations | None] = {}
        with _classes_kept(packed for *_, packed in calls):
            for order, name, method, packed in calls:
                key = name, packed.key
                if packed.key is None or key not in known:
                    known[key] = _equations(method, packed)
                equations = known[key]
                if equations is not None:
                    self.equations[order] = equations

    def _watch(self, root: Any) -> None:
        index_at = {info.path: index for index, info in enumerate(self.infos)}
        for path, x in list(iter_graph(root, graph=True)):
            if isinstance(x, Object):
                set_class(x, _recorded_class(type(x)))
                object.__setattr__(x, "_nnx_marks", {**x._nnx_marks, _MARK: f"{self.token} {index_at[path]}"})


@functools.lru_cache(maxsize=1024)  # JAX keeps every class it has been told of: the same one for every table
def _recorded_class(cls: type) -> type:
    return watched_class(cls, _reporting, _nnx_recorded=True)


def _unmarked(node: Node) -> Node:
    """What `_watch` did to an object, undone, in its structure: two layers of the same form have equal ones."""
    if node.id is None:
        return node
    kind = node.kind._nnx_plain if "_nnx_recorded" in vars(node.kind) else node.kind
    marks = tuple((name, mark) for name, mark in node.extra if name != _MARK)
    return node._replace(kind=kind, extra=marks)


@contextlib.contextmanager
def _classes_kept(calls: Iterable[Packed]) -> Iterator[None]:
    """What code in here sets on the classes of the objects in `calls` is undone: the model has set it, once."""
    kinds: set[type] = set()
    for packed in calls:
        for _, part in nodes(packed.root):
            if type(part) is Node and part.kind not in kinds:
                kinds.update(part.kind.__mro__)
    before = {kind: dict(vars(kind)) for kind in kinds}
    try:
        yield
    finally:
        for kind, attributes in before.items():
            for name in vars(kind).keys() - attributes.keys():
                type.__delattr__(kind, name)
            for name, value in attributes.items():
                if vars(kind).get(name, _MISSING) is not value:
                    type.__setattr__(kind, name, value)


def _equations(method: Method, packed: Packed) -> Equations | None:
    """None where the call makes sense only where it was made.

    Inside a transform that names an axis, say, or after what another call left in a global list. The model has just
    run, so an error is none of the model's, and whichever it is, all that is lost is a number.
    """
    try:
        return Equations.of(method, packed)
    except Exception:  # noqa: BLE001  the code is the user's, and runs where it never did
        return None


def part_recorder(x: Object) -> Callable[..., Any] | None:
    """For an object that runs code of its own kind, such as another library's: what records calls of its parts.

    It takes (name, method, args, kwargs, (path below x, type)), where the first of `args` is the part, and returns
    `method(*args, **kwargs)`. None unless calls of `x` are being recorded.
    """
    token, _, index = x._nnx_marks.get(_MARK, "").partition(" ")
    recorder = _running.get(int(token)) if token else None
    return None if recorder is None else functools.partial(recorder.record, int(index))


def _reporting(name: str, method: Method) -> Method:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = part_recorder(self)
        if record is None:  # made during the call, or the recording is over
            return method(self, *args, **kwargs)
        return record(name, method, (self, *args), kwargs)

    return call
