"""Modules that look at their own class while they run, and what must hold once they have: whoever watches them.

A case is a function of `run`, which makes a module (a class without arguments) and calls it once, watched.
"""

import abc
import functools
import pickle
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import nnx_core as nnx

Run = Callable[[type[nnx.Module]], Any]
T = TypeVar("T")


def class_attributes_are_set(run: Run) -> None:
    class Counts(nnx.Module):
        calls = 0

        def __call__(self):
            type(self).calls += 1
            self.__class__.last = "call"
            assert (type(self).calls, type(self).last) == (1, "call")

    run(Counts)
    assert (Counts.calls, Counts.last) == (1, "call")


def class_attributes_are_deleted(run: Run) -> None:
    class Deletes(nnx.Module):
        first, left = True, 1

        def __call__(self):
            del type(self).first
            assert not hasattr(self, "first")

    run(Deletes)
    assert "first" not in vars(Deletes)
    assert Deletes.left == 1


def submodules_count_on_their_own_class(run: Run) -> None:
    class Counts(nnx.Module):
        calls = 0

        def __call__(self):
            type(self).calls += 1

    class Holds(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([Counts(), Counts()])
            self.named = nnx.Dict(part=Counts())

        def __call__(self):
            for part in self.parts:
                part()
            self.named.part()

    run(Holds)
    assert Counts.calls == 3


def inherited_classes_keep_apart(run: Run) -> None:
    class Base(nnx.Module):
        calls = 0

        def __call__(self):
            type(self).calls += 1
            return self.twice()

        def twice(self):
            return 2

    class Sub(Base):
        def __call__(self):
            Base.seen = True
            assert super().__call__() == super().twice() + 1 == 3
            return 0

        def twice(self):
            return super().twice() + 1

    run(Sub)
    assert (Sub.calls, Base.calls, Sub.seen) == (1, 0, True)
    assert "seen" in vars(Base)
    assert "seen" not in vars(Sub)


def a_metaclass_sees_writes_and_no_new_class(run: Run) -> None:
    class Registry(type):
        def __new__(cls, name, bases, members, *, title):
            made = super().__new__(cls, name, bases, members)
            cls.made = (*getattr(cls, "made", ()), title)
            return made

        def __init__(cls, name, bases, members, *, title):
            super().__init__(name, bases, members)

        def __setattr__(cls, name, value):
            super().__setattr__(name, (cls.__name__, value))

        @property
        def shout(cls):
            return cls.__name__.upper()

    class Counts(nnx.Module, metaclass=Registry, title="counts"):
        def __call__(self):
            type(self).calls = 1
            assert type(self).shout == "COUNTS"
            assert isinstance(type(self), Registry)

    run(Counts)
    assert Counts.calls == ("Counts", 1)
    assert Registry.made == ("counts",)


def abstract_base_classes(run: Run) -> None:
    class Runs(abc.ABC):
        @abc.abstractmethod
        def __call__(self): ...

    class Named(Protocol):
        def name(self): ...

    class Counts(nnx.Module, Runs, Named, Generic[T]):
        calls = 0

        def __call__(self):
            type(self).calls += 1
            assert isinstance(self, Runs)
            assert isinstance(self, Counts)
            assert issubclass(type(self), Counts)
            Runs.register(int)
            return self.name()

        def name(self):
            return "counts"

    run(Counts)
    assert Counts.calls == 1
    assert isinstance(1, Runs)
    assert not isinstance(1, Counts)
    assert isinstance(Counts(), Runs)


def slots(run: Run) -> None:
    class Slotted(nnx.Module):
        __slots__ = ("extra",)
        calls = 0

        def __call__(self):
            type(self).calls += 1
            self.extra = 3
            assert self.extra == 3
            assert "extra" not in vars(self)

    run(Slotted)
    assert Slotted.calls == 1


def an_init_subclass_that_wants_arguments(run: Run) -> None:
    class Base(nnx.Module):
        kinds = ()

        def __init_subclass__(cls, *, kind, **kwargs):
            super().__init_subclass__(**kwargs)
            Base.kinds = (*Base.kinds, kind)

        def __call__(self):
            type(self).called = True
            type("Derived", (type(self),), {}, kind="derived")

    class Sub(Base, kind="sub"):
        pass

    run(Sub)
    assert Sub.called
    assert Base.kinds == ("sub", "derived")


def names(run: Run) -> None:
    class Named(nnx.Module):
        """What it says."""

        def __call__(self):
            """What it does."""
            cls = type(self)
            assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Named", Named.__qualname__, __name__)
            assert (cls.__doc__, cls.__call__.__doc__) == ("What it says.", "What it does.")
            assert (type(cls).__name__, repr(self)) == ("type", "Named()")
            cls.checked = True

    run(Named)
    assert Named.checked


class Pickled(nnx.Module):
    checked = False

    def __init__(self):
        self.width = 3

    def __call__(self):
        assert pickle.loads(pickle.dumps(type(self))) is Pickled
        twin = pickle.loads(pickle.dumps(self))
        assert (type(twin), twin.width) == (Pickled, 3)
        assert pickle.loads(pickle.dumps(Pickled())).width == 3
        type(self).checked = True


def pickles(run: Run) -> None:
    Pickled.checked = False
    run(Pickled)
    assert Pickled.checked


CASES = [
    class_attributes_are_set,
    class_attributes_are_deleted,
    submodules_count_on_their_own_class,
    inherited_classes_keep_apart,
    a_metaclass_sees_writes_and_no_new_class,
    abstract_base_classes,
    slots,
    an_init_subclass_that_wants_arguments,
    names,
    pickles,
]


# ---- methods of all kinds ----


class Mixin:
    """No module."""

    def mixed(self, x):
        return x

    def hidden(self, x):
        return x


class Base(nnx.Module):
    def inherited(self, x):
        return x

    def replaced(self, x):
        return x

    def no_longer(self, x):
        return x


class Methods(Base, Mixin):
    """Has methods of all kinds, and calls each."""

    no_longer = property(lambda self: lambda x: x)
    partial = functools.partialmethod(Mixin.mixed)

    def __call__(self, x):
        for name in ("mixed", "inherited", "replaced", "jitted", "_private", "no_longer", "static", "of_class"):
            x = getattr(self, name)(x)
        self.train()
        self.sow(nnx.Intermediate, "sown", x)
        self.eval()
        return x

    def replaced(self, x):
        return x

    @nnx.jit
    def jitted(self, x):
        return x

    def _private(self, x):
        return x

    hidden = None

    @staticmethod
    def static(x):
        return x

    @classmethod
    def of_class(cls, x):
        return x

    def train(self, **attributes):
        """One of nnx.Module's own, made the user's."""
        super().train(**attributes)


#: What `Methods.__call__` calls that is public, in any order.
CALLED = {"__call__", "mixed", "inherited", "replaced", "jitted", "train"}
