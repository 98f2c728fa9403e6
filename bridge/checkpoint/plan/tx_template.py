"""What `tx.init` says about an optimizer state: its slots, and where Linen keeps entries without content.

Law: nothing is computed; a state that fits has the template's leaves and no others, shapes and dtypes included.
Knows optax's interface and keys; knows nothing of files or conversions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import optax

from bridge._errors import VariablesMismatchError
from bridge._types import Location, Path, Shape
from bridge.checkpoint.plan.target import show
from bridge.checkpoint.tree import layout, opt_state
from bridge.checkpoint.tree.canonical import Form, Key, Role
from bridge.checkpoint.tree.from_objects import of_object
from bridge.checkpoint.tree.ops import Op


@dataclass(frozen=True)
class TxTemplate:
    """An abstract optimizer state.

    Attributes:
      forms: key -> (shape, dtype).
      empty, sequences: entries without content, but for masked params, and lists: paths in a Linen tree.
    """

    forms: Mapping[Key, tuple[Shape, str]]
    empty: Mapping[Path, str]
    sequences: frozenset[Path]

    def require(self, made: Mapping[Key, Op]) -> None:
        """Raise VariablesMismatchError unless the optimizer state that is made is this one."""
        missing: list[Path] = []
        shapes: list[tuple[Path, Shape, Shape]] = []
        dtypes: list[tuple[Path, str, str]] = []
        for key, (shape, dtype) in self.forms.items():
            op = made.get(key)
            if op is None:
                missing.append(show(key))
                continue
            if op.shape != shape:
                shapes.append((show(key), shape, op.shape))
            if op.dtype != dtype:
                dtypes.append((show(key), dtype, op.dtype))
        unexpected = [show(key) for key in made if key.role is Role.OPTIMIZER and key not in self.forms]
        if missing or unexpected or shapes or dtypes:
            raise VariablesMismatchError(
                missing, unexpected, shapes, dtypes, source="the converted optimizer state", target="the state of tx"
            )


def template_of(tx: optax.GradientTransformation, params: Mapping[Location, Op], form: Form) -> TxTemplate:
    """The state of an optax transformation for these params, under the names that `form` has for them.

    >>> import optax
    >>> from bridge.checkpoint.tree.ops import Read
    >>> read = Read(("w",), (3,), "float32")
    >>> template = template_of(optax.adam(0.1), {("params", "w"): read}, Form(layout.Kind.LINEN_TRAIN_STATE))
    >>> sorted(show(key) for key in template.forms), dict(template.empty)
    ([('opt_state', '0', 'count'), ('opt_state', '0', 'mu', 'w'), ('opt_state', '0', 'nu', 'w')], \
{('opt_state', '1'): 'None'})
    """
    locations = {form.variable(location): location for location in params}
    abstract: dict[Path, jax.ShapeDtypeStruct] = {}
    for path, location in locations.items():
        abstract[path] = jax.ShapeDtypeStruct(params[location].shape, params[location].dtype)
    live = of_object(jax.eval_shape(tx.init, layout.nest(abstract)))
    state = layout.nest({**live.values, **dict.fromkeys(live.tree.empty)})
    forms: dict[Key, tuple[Shape, str]] = {}
    empty: dict[Path, str] = {}
    for path, place in opt_state.places(state, {path: x.shape for path, x in abstract.items()}).items():
        location = locations[place.param] if place.param else None
        if path in live.values:
            forms[Key(Role.OPTIMIZER, place.prefix, location, place.tail)] = layout.describe(live.values[path])
        elif location is None:
            empty[("opt_state", *path)] = live.tree.empty[path]
    sequences = frozenset(("opt_state", *path) for path in live.tree.sequences)
    return TxTemplate(forms, empty, sequences)
