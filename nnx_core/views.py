"""Views: copies of a graph with other static attributes, sharing its Variables.

Law: a view and its original have the same Variables (what one writes the other reads) and no object in common;
sharing and cycles are kept, and the original is not touched.
"""

import inspect
import re
from typing import Any, TypeVar

from nnx_core import filters as filterlib
from nnx_core._errors import NnxError
from nnx_core.graph.api import clone, graphdef
from nnx_core.modes import sharing_allowed
from nnx_core.module import Module, assign_attributes, iter_modules

A = TypeVar("A")


class UnusedKeysError(NnxError, ValueError):
    """`nnx.view` was given keywords that no module takes."""

    def __init__(self, keys: list[str], known: list[str]):
        super().__init__(
            f"Unused keys found in nnx.view: {keys}; the modules take {known}.\n"
            "Check the spelling against nnx.view_info(node), or pass raise_if_not_found=False."
        )


def _copy(node: A, graph: bool | None) -> A:
    if not sharing_allowed(graph):
        graphdef(node, graph=False)  # raises if something is shared
    return clone(node, variables=False)


def with_attributes(
    node: A,
    /,
    *,
    only: filterlib.Filter = ...,
    raise_if_not_found: bool = True,
    graph: bool | None = None,
    **attributes: Any,
) -> A:
    """A view of `node` with these attributes on every module that has them.

    Args:
      node: a module, or any pytree of modules.
      only: the modules that are changed.
      raise_if_not_found: raise if an attribute is on no such module.
      graph: False forbids shared references.
      **attributes: name and value.

    Raises:
      AttributeNotFoundError: naming the attributes that no such module has.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
      >>> quiet = with_attributes(model, deterministic=True)
      >>> quiet.layers[1].deterministic, model.layers[1].deterministic
      (True, False)
      >>> quiet.layers[0].kernel is model.layers[0].kernel
      True
    """
    new = _copy(node, graph)
    assign_attributes(new, (only,), attributes, raise_if_not_found)
    return new


def view(
    node: A,
    /,
    *,
    only: filterlib.Filter = ...,
    raise_if_not_found: bool = True,
    graph: bool | None = None,
    **kwargs: Any,
) -> A:
    """A view of `node` in which `set_view(**kwargs)` was called on every module that has it.

    A module's `set_view` gets the keywords it has parameters for. One with `**kwargs` gets all, and returns
    those it did not use.

    Args:
      node: a module, or any pytree of modules.
      only: the modules that are changed.
      raise_if_not_found: raise if a keyword was used by no module.
      graph: False forbids shared references.
      **kwargs: see `nnx.view_info(node)`.

    Raises:
      UnusedKeysError: naming the keywords that no such module takes.

    Example:
      >>> import nnx_core as nnx
      >>> model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
      >>> test = view(model, deterministic=True, use_running_average=True)
      >>> test.layers[1].deterministic, model.layers[1].deterministic
      (True, False)
    """
    new = _copy(node, graph)
    used: set[str] = set()
    known: set[str] = set()
    predicate = filterlib.to_predicate(only)
    for path, module in iter_modules(new, graph=True):
        if predicate(path, module) and hasattr(module, "set_view"):
            used |= _set_view(module, kwargs)
            known |= {name for name, p in _parameters(module).items() if p.kind is not p.VAR_KEYWORD}
    if raise_if_not_found and (unused := sorted(set(kwargs) - used)):
        raise UnusedKeysError(unused, sorted(known))
    return new


def _set_view(module: Any, kwargs: dict[str, Any]) -> set[str]:
    """Call `set_view`; the keywords it used."""
    parameters = _parameters(module)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = kwargs if takes_all else {k: v for k, v in kwargs.items() if k in parameters}
    if not given:
        return set()
    unused = module.set_view(**given)
    return set(given) - set(unused or ())


def _parameters(module: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.set_view).parameters)


def view_info(node: Any, /, *, only: filterlib.Filter = ..., graph: bool | None = None) -> str:
    """What `nnx.view` can set in `node`: each class with `set_view`, its keywords and what their docstring says.

    Example:
      >>> import nnx_core as nnx
      >>> print(view_info(nnx.Dropout(0.5)))
      Dropout:
        deterministic: bool | None = None
          True returns inputs as they are, False drops, None leaves it as it is.
    """
    if not sharing_allowed(graph):
        graphdef(node, graph=False)
    predicate = filterlib.to_predicate(only)
    kinds = {type(m) for path, m in iter_modules(node, graph=True) if predicate(path, m) and hasattr(m, "set_view")}
    return "\n".join(_describe(kind) for kind in sorted(kinds, key=lambda kind: kind.__name__))


def _describe(kind: type[Module]) -> str:
    method: Any = kind.set_view  # type: ignore[attr-defined]  # only called for classes that have it
    texts = _documented(inspect.getdoc(method) or "")
    signature = inspect.signature(method)
    lines = [f"{kind.__qualname__}:"]
    if not texts:
        return "\n".join([*lines, f"  set_view{signature}"])
    for name, p in signature.parameters.items():
        if name in texts:
            kind_text = "" if p.annotation is p.empty else f": {inspect.formatannotation(p.annotation)}"
            default = "" if p.default is p.empty else f" = {p.default!r}"
            lines += [f"  {name}{kind_text}{default}", *(f"    {text}" for text in texts[name])]
    return "\n".join(lines)


def _documented(doc: str) -> dict[str, list[str]]:
    """The lines on each argument, from the section `Args:` of a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    texts: dict[str, list[str]] = {}
    if section is None:
        return texts
    lines = [line for line in section[1].splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    name = ""
    for line in lines:
        entry = re.match(r"(\w+)[^:]*:\s*(.*)", line[indent:])
        if entry and not line[indent:].startswith(" "):
            name = entry[1]
            texts[name] = [entry[2]] if entry[2] else []
        elif name:
            texts[name].append(line.strip())
    return texts
