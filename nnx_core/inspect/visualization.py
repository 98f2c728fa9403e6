"""display: models and states as interactive trees, through treescope where it is installed.

The only file that knows treescope, an optional dependency that is imported at the first use: treescope itself calls
`__treescope_repr__`, which modules, Variables, States and GraphDefs get here.
Law: what cannot be drawn is printed; showing something never raises.
"""

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from nnx_core._repr import SizeBytes, show_value, size_note
from nnx_core.graph.containers import DictStorage, ListStorage
from nnx_core.graph.objects import Object
from nnx_core.graph.structure import GraphDef
from nnx_core.inspect.summary import in_ipython
from nnx_core.state import FlatState, State
from nnx_core.variables import Variable


def display(*args: Any) -> None:
    """Show each argument as a tree that can be unfolded, in a notebook with treescope; else print it.

    Install it with `pip install 'linen-nnx-bridge[treescope]'`.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> nnx.display(nnx.state({"a": nnx.Param(jnp.ones(2))}))
      State({'a': Param(float32[2] [1., 1.])})
    """
    treescope = _treescope() if in_ipython() else None
    for x in args:
        if treescope is None:
            print(_text(x))
        else:
            with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
                treescope.display(x, ignore_exceptions=True, autovisualize=True)


def _text(x: Any) -> str:
    try:
        return str(x)
    except Exception:  # noqa: BLE001  # somebody's `__str__`; what went wrong is in what is printed instead
        return show_value(x)


def _treescope() -> Any:
    try:
        return importlib.import_module("treescope")
    except ModuleNotFoundError as error:
        if error.name != "treescope":
            _warn(error)
    except ImportError as error:
        _warn(error)
    return None


def _warn(error: ImportError) -> None:
    warnings.warn(f"treescope is installed, but cannot be imported ({error}); printing instead.", stacklevel=4)


# ---- what treescope asks of us -----------------------------------------------------------------------------

_CALL, _LIST, _DICT = ("(", "=", ")"), ("([", "", "])"), ("({", ": ", "})")


def _constructor(
    kind: type, children: Mapping[Any, Any], note: str, path: Any, subtree: Any, shape: tuple[str, str, str] = _CALL
) -> Any:
    """`Kind(a=..., b=...)`, the children rendered by treescope, sizes behind the first line.

    `shape` is what comes before, between key and child, and after.
    """
    from treescope import formatting_util
    from treescope import rendering_parts as parts

    before, between, after = shape
    shown = []
    for key, x in children.items():
        step = f".{key}" if shape is _CALL else f"[{key!r}]"
        name = "" if shape is _LIST else f"{key if shape is _CALL else repr(key)}{between}"
        child = subtree(x, path=None if path is None else f"{path}{step}")
        shown.append(parts.siblings_with_annotations(name, child))
    return parts.build_foldable_tree_node_from_children(
        prefix=parts.siblings(parts.maybe_qualified_type_name(kind), before),
        children=shown,
        suffix=after,
        comma_separated=True,
        path=path,
        background_color=formatting_util.color_from_string(kind.__name__),
        first_line_annotation=parts.comment_color(parts.text(f" # {note}")) if note else None,
    )


def _render_object(self: Object, path: Any, subtree_renderer: Any) -> Any:
    shape = _LIST if isinstance(self, ListStorage) else _DICT if isinstance(self, DictStorage) else _CALL
    return _constructor(type(self), self._nnx_items(), size_note([self]), path, subtree_renderer, shape)


def _render_variable(self: Variable[Any], path: Any, subtree_renderer: Any) -> Any:
    shown = {"value": self.get_raw_value(), **self.get_metadata()}
    return _constructor(type(self), shown, str(SizeBytes.of(self.get_raw_value())), path, subtree_renderer)


def _render_state(self: State, path: Any, subtree_renderer: Any) -> Any:
    from treescope import rendering_parts as parts

    return parts.siblings_with_annotations(
        f"{type(self).__name__}(", subtree_renderer({key: self[key] for key in self}, path=path), ")"
    )


def _render_flat(self: FlatState, path: Any, subtree_renderer: Any) -> Any:
    from treescope import rendering_parts as parts

    return parts.siblings_with_annotations("FlatState(", subtree_renderer(dict(self), path=path), ")")


def _render_graphdef(self: GraphDef, path: Any, subtree_renderer: Any) -> Any:
    return _constructor(GraphDef, {"root": self.root}, "", path, subtree_renderer)


for _kind, _render in (
    (Object, _render_object),
    (Variable, _render_variable),
    (State, _render_state),
    (FlatState, _render_flat),
    (GraphDef, _render_graphdef),
):
    setattr(_kind, "__treescope_repr__", _render)  # noqa: B010  # a type checker would ask for it in the class
