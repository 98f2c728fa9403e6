"""List and Dict storage: containers with identity, whose changes are counted.

Law: what is put in comes out, under any key: items live apart from attributes and methods, so a key such as
`items` or `pop` hides nothing. Plain lists, tuples and dicts are allowed as attributes too; they have no
identity and are compared shallowly instead.
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, TypeVar

from nnx_core._changes import touch
from nnx_core._repr import show_fields
from nnx_core.graph.objects import Marked, Object, require_fitting_mark
from nnx_core.graph.watched import unwatched

A = TypeVar("A")
_ITEMS = "_nnx_stored"


def _unmarked(x: Any) -> Any:
    return x.value if type(x) is Marked else x


class _Storage(Object, pytree=False):
    """What both have in common: items are marked under names of their own, which no attribute has."""

    def _nnx_mark_name(self, key: Any) -> str:
        return f"[{key!r}]"

    def _nnx_mark(self, key: Any) -> str | None:
        return self._nnx_marks.get(self._nnx_mark_name(key)) if self._nnx_marks else None

    def _nnx_taken(self, key: Any, value: Any) -> Any:
        """`value`, which is to be stored under `key`, its mark noted."""
        if type(value) is Marked:
            return self._nnx_set_marked(key, value)
        if self._nnx_marks:
            self._nnx_require_mark(key, value)
        return value

    def _nnx_renew_marks(self, pairs: Iterable[tuple[Any, Any]], old_keys: Iterable[Any]) -> None:
        """Note the marks of all items, (key, value) as they were put in, in the place of those of `old_keys`."""
        marked = [(key, x) for key, x in pairs if type(x) is Marked]
        for key, x in marked:  # before anything is changed
            require_fitting_mark(self, key, x)
        self._nnx_drop_marks(old_keys)
        for key, x in marked:
            self._nnx_set_mark(key, x.mark)


@unwatched
class ListStorage(_Storage, MutableSequence[A], pytree=False):
    """A list whose items are part of the graph, under the keys 0, 1, ...

    Args:
      items: any iterable.
    """

    def __init__(self, items: Iterable[A] = (), /):
        self.__dict__[_ITEMS] = []
        self._nnx_renew(list(items))

    def __getitem__(self, index: Any) -> Any:
        items = self.__dict__[_ITEMS]
        return items[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._nnx_check_can_write(None)
        items = self.__dict__[_ITEMS]
        if isinstance(index, slice):
            items = self._nnx_with_marks()
            items[index] = value
            self._nnx_renew(items)
        else:
            position = range(len(items))[index]
            items[position] = self._nnx_taken(position, value)
        touch(self)

    def __delitem__(self, index: Any) -> None:
        self._nnx_check_can_write(None)
        items = self._nnx_with_marks()
        del items[index]
        self._nnx_renew(items)
        touch(self)

    def insert(self, index: int, value: A) -> None:
        """Insert `value` before `index`."""
        self._nnx_check_can_write(None)
        if self._nnx_marks or type(value) is Marked:
            items = self._nnx_with_marks()
            items.insert(index, value)
            self._nnx_renew(items)
        else:
            self.__dict__[_ITEMS].insert(index, value)
        touch(self)

    def _nnx_with_marks(self) -> list[Any]:
        """The items as they were put in, with their marks."""
        items = list(self.__dict__[_ITEMS])
        for i, x in enumerate(items if self._nnx_marks else ()):
            if mark := self._nnx_mark(i):
                items[i] = Marked(x, mark)
        return items

    def _nnx_renew(self, items: list[Any]) -> None:
        """Hold these items, which come with their marks."""
        self._nnx_renew_marks(enumerate(items), range(len(self.__dict__[_ITEMS])))
        self.__dict__[_ITEMS] = [_unmarked(x) for x in items]

    def __len__(self) -> int:
        return len(self.__dict__[_ITEMS])

    def __iter__(self) -> Iterator[A]:
        return iter(self.__dict__[_ITEMS])

    def __add__(self, other: Iterable[A]) -> Any:
        return type(self)([*self, *other])

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _nnx_items(self) -> dict[Any, Any]:
        return dict(enumerate(self.__dict__[_ITEMS]))

    def _nnx_storage(self) -> Any:
        return self.__dict__[_ITEMS]

    def _nnx_fill(self, items: dict[Any, Any], marks: Any) -> None:
        self.__dict__[_ITEMS] = [items[i] for i in range(len(items))]
        super()._nnx_fill({}, marks)

    def _nnx_assign(self, changed: dict[Any, Any], removed: tuple[Any, ...]) -> None:
        self._nnx_drop_static(changed)
        marks = {k: mark for k in changed if (mark := self._nnx_mark(k))}
        items = {k: v for k, v in enumerate(self._nnx_with_marks()) if k not in removed}
        items |= changed | {k: Marked(changed[k], mark) for k, mark in marks.items()}
        self._nnx_renew([items[i] for i in sorted(items)])
        touch(self)

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        items = self.__dict__.get(_ITEMS, ())  # none before `__init__` has run
        return show_fields(type(self).__name__, [("", x) for x in items], "[]")


@unwatched
class DictStorage(_Storage, MutableMapping[Any, A], pytree=False):
    """A dict whose values are part of the graph; `d.key` reads and writes `d["key"]` where no method has that name.

    Args:
      mapping: a mapping or (key, value) pairs.
      **items: more items.
    """

    def __init__(self, mapping: Mapping[Any, A] | Iterable[tuple[Any, A]] = (), /, **items: A):
        new = {**dict(mapping), **items}
        self._nnx_renew_marks(new.items(), ())
        self.__dict__[_ITEMS] = {k: _unmarked(x) for k, x in new.items()}

    def __getitem__(self, key: Any) -> A:
        return self.__dict__[_ITEMS][key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._nnx_check_can_write(None)
        self.__dict__[_ITEMS][key] = self._nnx_taken(key, value)
        touch(self)

    def __delitem__(self, key: Any) -> None:
        self._nnx_check_can_write(None)
        del self.__dict__[_ITEMS][key]
        self._nnx_drop_marks((key,))
        touch(self)

    def __len__(self) -> int:
        return len(self.__dict__[_ITEMS])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__[_ITEMS])

    def __getattr__(self, name: str) -> Any:
        items = self.__dict__.get(_ITEMS, {})
        if name in items:
            return items[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or key {name!r}; it has {list(items)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _nnx_items(self) -> dict[Any, Any]:
        return self.__dict__[_ITEMS]

    def _nnx_storage(self) -> Any:
        return self.__dict__[_ITEMS]

    def _nnx_fill(self, items: dict[Any, Any], marks: Any) -> None:
        self.__dict__[_ITEMS] = dict(items)
        super()._nnx_fill({}, marks)

    def _nnx_assign(self, changed: dict[Any, Any], removed: tuple[Any, ...]) -> None:
        items = self.__dict__[_ITEMS]
        for key in removed:
            items.pop(key, None)
        self._nnx_drop_marks(removed)
        self._nnx_drop_static(changed)
        items.update(changed)
        touch(self)

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        items = self.__dict__.get(_ITEMS, {})  # as above
        return show_fields(type(self).__name__, [(f"{k!r}: ", v) for k, v in items.items()], "{}")
