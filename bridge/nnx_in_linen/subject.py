"""The NNX module of one call, and what the call did to it.

Law: what `written` yields is all that the call changed, and nothing else: a value that is the very object it was before
was not written, so values are compared by identity. Where only values of Variables can have changed, nothing is walked.
Knows an NNX module and its structure; knows neither scopes nor what Linen does with what was written.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

import nnx_core as nnx
from bridge.nnx_in_linen.host import Host, LinenStream, reseeded
from bridge.nnx_in_linen.stand_ins import plain, visible_class
from bridge.nnx_in_linen.structure import Structure
from nnx_core._changes import track
from nnx_core._errors import Path
from nnx_core.graph.classify import contents, holds_still
from nnx_core.graph.watched import Watched, set_class

#: A Variable or an array that is an attribute, and its value.
Leaf = tuple[Any, Any]


class Subject:
    """The NNX module of one call, and what it held when the call began.

    Args:
      module: the module.
      structure: its structure; None if it was changed since it was built from one.
      objects: the objects and Variables in it, by the index that the structure gives them.
      values: its values, in the order of the structure.
    """

    def __init__(
        self,
        module: nnx.Module,
        structure: Structure | None = None,
        objects: list[Any] | None = None,
        values: list[Any] | None = None,
    ):
        self.module, self._structure = module, structure
        self._objects, self._values = objects or [], values or []
        if structure is None:
            self._before = _contents(module, with_streams=True)
            self.modules = [(path, x) for path, x in nnx.iter_modules(module) if visible_class(type(x)) is not None]
            return
        self._before = None
        self.modules = [(path, self._objects[index]) for path, index, _ in structure.visible]
        self._versions = [(x, track(x)) for x in map(self._objects.__getitem__, structure.objects)]
        owners = [(self._objects[index]._nnx_items(), key) for index, key in structure.containers]
        self._containers = [(items, key, list(contents(items[key]))) for items, key in owners]

    def streams(self, host: Host, kept: bool) -> AbstractContextManager[None]:
        """The context of the call: streams that have their own keys, for tags that Linen has none for."""
        if not kept:
            return nullcontext()
        streams = [x for _, x in nnx.iter_graph(self.module) if isinstance(x, nnx.RngStream)]
        return reseeded(x for x in streams if x.tag in host.streams)

    def show(self) -> None:
        """Let Linen see the calls of the submodules."""
        if self._structure is None:
            for _, module in self.modules:
                set_class(module, visible_class(type(module)) or type(module))
            return
        for _, index, cls in self._structure.visible:
            set_class(self._objects[index], cls)

    def hide(self) -> None:
        """Undo `show`."""
        for _, module in self.modules:
            if isinstance(module, Watched):
                set_class(module, type(module)._nnx_plain)

    def moved(self) -> bool:
        """Whether anything but the values of Variables may have changed."""
        if self._structure is None or not self._structure.countable:
            return True
        if any(x._nnx_version != version for x, version in self._versions):
            return True
        return any(not holds_still(items.get(key), before) for items, key, before in self._containers)

    def written(self, moved: bool, with_streams: bool) -> Iterator[tuple[Path, Any, bool]]:
        """(path, Variable or array, whether it was there before) of all that the call wrote."""
        if not moved:
            yield from self._written_in_place()
            return
        plain(self.module)
        before = self._before if self._before is not None else self._before_of_structure()
        for path, (x, value) in _contents(self.module, with_streams=with_streams).items():
            leaf_before = before.get(path)
            if leaf_before is None:
                yield path, x, False
            elif leaf_before[1] is not value:
                yield path, x, leaf_before[0] is x

    def _written_in_place(self) -> Iterator[tuple[Path, Any, bool]]:
        """The same, if nothing but values of Variables changed: no walk finds more than the structure tells."""
        assert self._structure is not None
        order, indices = self._structure.order, self._structure.indices
        for slot, index, value in zip(order, indices, self._values, strict=True):
            assert index is not None  # `countable`
            variable = self._objects[index]
            if variable._raw_value is not value:
                yield slot.path, variable, True

    def _before_of_structure(self) -> dict[Path, Leaf]:
        assert self._structure is not None
        before = {}
        order, indices = self._structure.order, self._structure.indices
        for slot, index, value in zip(order, indices, self._values, strict=True):
            before[slot.path] = (value if index is None else self._objects[index]), value
        return before


def _contents(module: nnx.Module, *, with_streams: bool) -> dict[Path, Leaf]:
    """All state in `module` by path; streams of Linen's have none."""
    walked = list(nnx.iter_graph(module))
    left_out = LinenStream if with_streams else nnx.RngStream
    streams = [x for _, x in walked if isinstance(x, left_out)]
    keys = {id(x.__dict__.get(name)) for x in streams for name in ("key", "count")}
    leaves: dict[Path, Leaf] = {}
    for path, x in walked:
        if isinstance(x, nnx.Variable):
            if id(x) not in keys:
                leaves[path] = x, x.get_raw_value()
        elif isinstance(x, jax.Array | np.ndarray):
            leaves[path] = x, x
    return leaves
