"""What a loop carries, and the check that it comes back in the form it had.

Law: a carry keeps its structure: the same objects, in the same containers; only values change.
"""

from collections.abc import Callable
from typing import Any

from nnx_core._errors import Path, StructureError, show_path
from nnx_core.graph.effects import After
from nnx_core.graph.structure import ArrayDef, Element, GraphDef, Leaf, Node, Ref, Static, VariableDef
from nnx_core.transforms.groups import Carry
from nnx_core.transforms.lift import arguments_of, name_of


def same_form(before: Element, after: Element, path: Path, f: Callable[..., Any]) -> None:
    """Raise StructureError unless a carry came back with the structure it had."""
    if isinstance(before, Node | VariableDef | Ref) and type(after) is Ref and before.id == after.id:
        return  # the object itself: in a result it is a Ref, since the arguments introduced it
    if type(before) is Node and type(after) is Node and before.id is None is after.id:
        if (before.kind, before.keys, before.extra) == (after.kind, after.keys, after.extra):
            for key, given, returned in zip(before.keys, before.children, after.children, strict=True):
                same_form(given, returned, (*path, key), f)
            return
    elif type(before) is type(after) and before == after:
        return
    raise StructureError(
        f"{name_of(f)} must return its carry with the structure it was given; {show_path(path)} differs:\n"
        f"  given:    {described(before)}\n  returned: {described(after)}\n"
        "Update modules in place and return the same objects."
    )


def described(d: Element) -> str:
    """A structure in words, for errors."""
    if type(d) is Static:
        return repr(d.value)
    if type(d) is Node:
        is_sequence = d.id is None and d.kind in (tuple, list)
        parts = map(described, d.children) if is_sequence else map(str, d.keys)
        return f"{d.kind.__name__}({', '.join(parts)})"
    if type(d) is VariableDef:
        return d.kind.__name__
    return "an array or number" if isinstance(d, Leaf | ArrayDef) else "an object of the caller"


def carried(d: Element, spec: Any, path: Path) -> list[tuple[Path, Element]]:
    """The parts of a structure whose spec is Carry."""
    if spec is Carry:
        return [(path, d)]
    if type(spec) in (tuple, list, dict) and type(d) is Node:
        specs = spec if type(spec) is dict else dict(enumerate(spec))
        parts: list[tuple[Path, Element]] = []
        for key, child in zip(d.keys, d.children, strict=True):
            parts += carried(child, specs[key], (*path, key))
        return parts
    return []


def require_same_carry(f: Callable[..., Any], graphdef: GraphDef, after: After) -> None:
    """Raise StructureError unless `f` returned its one positional argument in the form it was given."""
    [carry] = arguments_of(graphdef).children
    same_form(carry, after.result.root, ("carry",), f)
    require_no_changes(f, after, "carry")


def require_no_changes(f: Callable[..., Any], after: After, what: str) -> None:
    """Raise StructureError if `f` set or removed attributes of an object."""
    if after.objects:
        raise StructureError(
            f"{name_of(f)} set or removed the attributes {after.changed_keys} of an object in its {what}, whose"
            " structure must stay the same in every step.\nSet them before the loop, or keep the value in a Variable."
        )
