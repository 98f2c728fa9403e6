"""The kinds of Variable, and names for them.

Law: a name belongs to one type and back; registering the same pair again changes nothing, and a class that is
defined again (a notebook cell run twice) takes its name over. Knows Variables only.
"""

from typing import Any, TypeVar
from urllib.parse import quote, unquote

from nnx_core._errors import RegistryError
from nnx_core.variables import A, Variable

T = TypeVar("T", bound=type[Variable[Any]])


class Param(Variable[A]):
    """A trainable parameter (Linen collection `params`)."""

    __slots__ = ()


class BatchStat(Variable[A]):
    """Running statistics of normalisation layers (Linen collection `batch_stats`)."""

    __slots__ = ()


class Cache(Variable[A]):
    """Decoding caches of attention (Linen collection `cache`)."""

    __slots__ = ()


class Intermediate(Variable[A]):
    """Values that `sow` and `capture` collect (Linen collection `intermediates`)."""

    __slots__ = ()


class Perturbation(Intermediate[A]):
    """Zeros added by `perturb`, to differentiate with respect to intermediates (`perturbations`)."""

    __slots__ = ()


class RngState(Variable[A]):
    """State of random streams."""

    __slots__ = ()


class RngKey(RngState[A]):
    """The key of a random stream."""

    __slots__ = ()


class RngCount(RngState[A]):
    """How many keys a random stream has given out."""

    __slots__ = ()


class OptState(Variable[A]):
    """State of an optimizer."""

    __slots__ = ()


class OptArray(OptState[A]):
    """An array of an optimizer that belongs to no parameter, such as a step count."""

    __slots__ = ()


class OptVariable(OptState[A]):
    """An array of an optimizer that belongs to one parameter, such as its momentum."""

    __slots__ = ()


_types: dict[str, type[Variable[Any]]] = {}
_names: dict[type[Variable[Any]], str] = {}


def _same_class(a: type, b: type) -> bool:
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def register_variable_name(name: str, typ: T | None = None, *, overwrite: bool = False) -> Any:
    """Give a Variable type a (collection) name; also a decorator.

    Raises:
      RegistryError: if `name` belongs to another type, or `typ` has another name, and not `overwrite`.

    Example:
      >>> import nnx_core as nnx
      >>> @nnx.register_variable_name("doc_stats")
      ... class DocStats(nnx.Variable): ...
      >>> nnx.variable_type_from_name("doc_stats") is DocStats
      True
    """
    if typ is None:
        return lambda cls: register_variable_name(name, cls, overwrite=overwrite)
    known = _types.get(name)
    if known is not None and known is not typ and not overwrite and not _same_class(known, typ):
        raise RegistryError(
            f"The name {name!r} is already registered for {known.__module__}.{known.__qualname__}, found"
            f" {typ.__module__}.{typ.__qualname__}. Choose another name, or pass overwrite=True."
        )
    _types[name], _names[typ] = typ, name
    return typ


def variable_type_from_name(name: str, /, *, base: type[Any] = Variable, allow_register: bool = False) -> type[Any]:
    """The Variable type called `name`; with `allow_register` a new subclass of `base` if there is none.

    Raises:
      RegistryError: if there is none and `allow_register` is not set.
    """
    if name not in _types:
        if not allow_register:
            raise RegistryError(
                f"No Variable type is registered for the name {name!r}; known are {sorted(_types)}."
                " Register one with nnx.register_variable_name, or pass allow_register=True."
            )
        register_variable_name(name, _make_type(name, base))
    return _types[name]


def variable_name_from_type(typ: type[Variable[Any]], /, *, allow_register: bool = False) -> str:
    """The (collection) name of a Variable type; its own, or with `allow_register` its class name.

    Raises:
      RegistryError: if it has none and `allow_register` is not set.
    """
    if typ not in _names:
        if not allow_register:
            raise RegistryError(
                f"{typ.__module__}.{typ.__qualname__} has no registered name; known are {sorted(_types)}."
                " Register one with nnx.register_variable_name, or pass allow_register=True."
            )
        register_variable_name(typ.__name__, typ)
    return _names[typ]


_NAMED = "named_"  # begins the qualified name of a type that variable_type_from_name made


def _make_type(name: str, base: type[Any]) -> type[Any]:
    # pickle looks a class up by its qualified name, in which dots separate: `__getattr__` below finds it again.
    qualname = _NAMED + quote(name, safe="").replace(".", "%2E")
    shown = name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return type(shown, (base,), {"__slots__": (), "__module__": __name__, "__qualname__": qualname})


def __getattr__(name: str) -> type[Any]:
    if not name.startswith(_NAMED):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return variable_type_from_name(unquote(name.removeprefix(_NAMED)), allow_register=True)


for _name, _kind in {
    "params": Param,
    "batch_stats": BatchStat,
    "cache": Cache,
    "intermediates": Intermediate,
    "perturbations": Perturbation,
}.items():
    register_variable_name(_name, _kind)
