"""Calling a method abstractly, on copies, and writing down every call of every object on the way.

Law: nothing is computed and nothing of the caller's is changed, nor any class, whether the call returns or
raises: it runs under `jax.eval_shape` on fresh copies, whose classes are subclasses that report to the Recorder
named in the copies' marks. A mark is part of the structure, so it survives transforms inside the call, and no
function that was compiled before is taken to know the answer.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nnx_core._errors import Path
from nnx_core.graph.objects import Object
from nnx_core.graph.pack import Packer, Place, Refs, Unpacker
from nnx_core.graph.walk import iter_graph
from nnx_core.inspect.census import ObjectInfo
from nnx_core.inspect.describe import describe, describe_arguments
from nnx_core.module import Dict, List, Module

Part = tuple[Path, type]  # of an object that is no object itself: where it is below that one, and what
_MARK = "recorded:"  # no identifier: no attribute of a user's has such a name
_OWN = (Object, Module, List, Dict)  # their methods are nnx_core's own business: sow, train, set_attributes, ...
_ROOT = Place((), None, 0)
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


@dataclass(frozen=True)
class Packed:
    """A call taken apart: `arrays` go through JAX, the rest is `rest`; `thaw` puts a call together again."""

    root: Any
    arrays: tuple[Any, ...]
    rest: tuple[Any, ...]
    treedef: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Packed":
        """Pack a call; numbers stay what they are, as when a function is called without a transform."""
        packer = Packer((None,), Refs(), trace_numbers=False)
        root = packer.walk({"args": args, "kwargs": kwargs}, _ROOT)
        leaves, treedef = jax.tree.flatten(packer.leaves[0])
        arrays = tuple(_abstract(x) for x in leaves if _is_traced(x))
        return cls(
            root,
            arrays,
            tuple(_Ref if isinstance(x, jax.Ref) else _Array if _is_traced(x) else x for x in leaves),
            treedef,
        )

    def thaw(self, arrays: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with fresh copies of all objects, and these arrays."""
        given = iter(arrays)
        leaves = [jax.new_ref(next(given)) if x is _Ref else next(given) if x is _Array else x for x in self.rest]
        values, loose = jax.tree.unflatten(self.treedef, leaves)
        call = Unpacker(((values, loose),), Refs()).build(self.root, None)
        return call["args"], call["kwargs"]


_Array, _Ref = object(), object()


def _is_traced(x: Any) -> bool:
    """Whether JAX traces `x`; numpy's scalars are numbers, and may well be somebody's shape."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct | jax.Ref):
        return True
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype: also of donated arrays, and of tracers that outlive their trace."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


class Recorder:
    """Takes down calls: one row for each (object, method, inputs), in the order in which calls begin."""

    def __init__(self, infos: list[ObjectInfo], *, keep: bool):
        self.infos, self.keep = infos, keep
        self.token = next(_tokens)
        self.rows: list[CallInfo] = []
        self.calls: list[tuple[str, Packed] | None] = []  # what flops are counted of, if `keep`
        self._seen: set[tuple[Path, str, tuple[str, ...]]] = set()

    def record(
        self, index: int, name: str, method: Callable[..., Any], args: Any, kwargs: Any, part: Part | None = None
    ) -> Any:
        """Run `method` of an object, or of a part of it, and add a row unless there is one like it."""
        info = self.infos[index] if part is None else self._info_of(index, *part)
        inputs = tuple(describe_arguments(args[1:], kwargs))
        if (info.path, name, inputs) in self._seen:
            return method(*args, **kwargs)
        self._seen.add((info.path, name, inputs))
        order = len(self.rows)
        self.rows.append(None)  # type: ignore[arg-type]  # its place among the rows; filled below
        self.calls.append((name, Packed.of(args, kwargs)) if self.keep and part is None else None)
        output = method(*args, **kwargs)
        path = info.path if name == "__call__" else (*info.path, name)
        self.rows[order] = CallInfo(
            order, info.id, info.kind, path, "\n".join(inputs), describe(output), flops=None, vjp_flops=None
        )
        return output

    def _info_of(self, index: int, path: Path, kind: type) -> ObjectInfo:
        path = (*self.infos[index].path, *path)
        return ObjectInfo(path, kind, next((info.id for info in self.infos if info.path == path), 0))

    def run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the method `name` of the first of `args` with the others; nothing is computed."""
        packed = Packed.of(args, kwargs)

        def call(arrays: tuple[Any, ...]) -> None:
            (root, *rest), keywords = packed.thaw(arrays)
            self._watch(root)
            method = functools.partial(_plain(root, name), root)
            self.record(0, name, lambda _, *a, **k: method(*a, **k), (root, *rest), keywords)

        _running[self.token] = self
        try:
            jax.eval_shape(call, packed.arrays)
        finally:
            del _running[self.token]

    def _watch(self, root: Any) -> None:
        at = {info.path: index for index, info in enumerate(self.infos)}
        for path, x in list(iter_graph(root)):
            if isinstance(x, Object):
                object.__setattr__(x, "__class__", _recorded_class(type(x)))
                object.__setattr__(x, "_nnx_marks", {**x._nnx_marks, _MARK: f"{self.token} {at[path]}"})


def _plain(x: Any, name: str) -> Callable[..., Any]:
    """The method of the class as it was before it was watched, as a function."""
    return getattr(getattr(type(x), "_nnx_plain", type(x)), name)


class _Recorded:
    """In front of an object's class: reports its calls."""

    __slots__ = ()
    _nnx_plain: type

    def __init_subclass__(cls, **kwargs: Any):
        # Not the user's own __init_subclass__, which may want arguments or keep a list of classes.
        Object.__init_subclass__.__func__(cls)  # type: ignore[attr-defined]  # a classmethod has it


@functools.lru_cache(maxsize=1024)  # JAX keeps every class it has been told of: the same one for every table
def _recorded_class(cls: type) -> type:
    members: dict[str, Any] = {"__slots__": (), "_nnx_plain": cls}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members |= {name: _reporting(name, method) for name, method in methods(cls)}
    return type(cls)(cls.__name__, (_Recorded, cls), members)


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """`__call__` and the public methods of a class, but those that every module has."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if base.__module__ not in ("typing", "collections.abc") and base not in (*_OWN, *_storage(), object):
            names |= dict.fromkeys(n for n, f in vars(base).items() if inspect.isfunction(f))
    for name in names:
        method = getattr(cls, name, None)
        if (name == "__call__" or not name.startswith("_")) and inspect.isfunction(method):
            yield name, method


@functools.cache
def _storage() -> tuple[type, ...]:
    """What List and Dict are made of: their methods are those of a list and a dict."""
    return tuple({base for kind in (List, Dict) for base in kind.__mro__} - {object})


def part_recorder(x: Object) -> Callable[..., Any] | None:
    """For an object that runs code of its own kind, such as another library's: what records calls of its parts.

    It takes (name, method, args, kwargs, (path below x, type)), where the first of `args` is the part, and returns
    `method(*args, **kwargs)`. None unless calls of `x` are being recorded.
    """
    token, _, index = x._nnx_marks.get(_MARK, "").partition(" ")
    recorder = _running.get(int(token)) if token else None
    return None if recorder is None else functools.partial(recorder.record, int(index))


def _reporting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        token, _, index = self._nnx_marks.get(_MARK, "").partition(" ")
        recorder = _running.get(int(token)) if token else None
        if recorder is None:  # made during the call, or the recording is over
            return method(self, *args, **kwargs)
        return recorder.record(int(index), name, method, (self, *args), kwargs)

    return call
