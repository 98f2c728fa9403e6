"""Logical rules: which mesh axis, or axes, a logical axis name stands for.

Law: a name that no rule mentions stands for itself. Rules are per context, as JAX's meshes: a thread that was not
told anything has none. Knows metadata; knows no meshes and no values.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

from nnx_core._errors import MetadataError

#: (logical name, mesh axis or several or None for replicated) pairs; of two for one name the later counts.
LogicalRules: TypeAlias = Sequence[tuple[str, str | tuple[str, ...] | None]]

RULES = "sharding_rules"  # metadata key: logical rules of one Variable's own

_rules: ContextVar[LogicalRules] = ContextVar("logical_axis_rules", default=())
_store: tuple[Callable[[], Any], Callable[[Any], Any]] = (_rules.get, _rules.set)  # where the rules are kept


def get_logical_axis_rules() -> LogicalRules:
    """The logical rules that hold here."""
    return _checked(_store[0]())


def set_logical_axis_rules(rules: LogicalRules | None) -> None:
    """Let `rules` hold from here on, in this thread; `logical_axis_rules` does so for a block.

    Raises:
      MetadataError: if a rule is not a pair of a name and a mesh axis, several, or None.
    """
    _store[1](_checked(rules))


def keep_rules_in(get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
    """Keep logical rules where another library keeps its own: what is set in one of the two then holds in both.

    Rules that hold here are handed over. Outside the new place's contexts, what was set here before is gone.
    """
    global _store
    if rules := get_logical_axis_rules():
        set_(rules)
    _store = get, set_


@contextlib.contextmanager
def logical_axis_rules(rules: LogicalRules | None) -> Iterator[None]:
    """Within this block axis names are logical: `rules` say which mesh axis, or axes, each stands for.

    Names that no rule mentions stay as they are. An inner block replaces the rules of the outer one. They are read
    when specs are computed, and under a mesh when Variables are made, whose values go where they say.

    Args:
      rules: (logical name, mesh axis | tuple of mesh axes | None) pairs; of two for one name the later counts.

    Raises:
      MetadataError: if a rule is no such pair.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> from nnx_core import sharding
      >>> w = nnx.Param(jnp.ones((2, 4)), out_sharding=("embed", "mlp"))
      >>> with sharding.logical_axis_rules([("embed", None), ("mlp", "model")]):
      ...     sharding.get_var_pspec(w)
      P(None, 'model')
      >>> sharding.get_var_pspec(w)
      P('embed', 'mlp')
    """
    before = get_logical_axis_rules()
    set_logical_axis_rules(rules)
    try:
        yield
    finally:
        set_logical_axis_rules(before)


def _checked(rules: Any) -> LogicalRules:
    pairs = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(rules or ())
    for rule in pairs:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            raise MetadataError(
                f"Logical axis rule {rule!r} is not a pair. Expected (name, mesh axis), (name, (mesh axis, ...)) or"
                " (name, None), such as ('embed', 'model')."
            )
    return pairs


def rules_for(metadata: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The ambient rules and those of a Variable's own, which may not contradict them."""
    ambient, own = dict(get_logical_axis_rules()), dict(_checked(metadata.get(RULES)))
    for name, axis in own.items():
        if name in ambient and ambient[name] != axis:
            raise MetadataError(
                f"{place}: its own sharding_rules send {name!r} to {axis!r}, logical_axis_rules send it to"
                f" {ambient[name]!r}. Change one of them."
            )
    return {**ambient, **own}


def translated(name: Any, rules: Mapping[str, Any]) -> Any:
    """The mesh axis, axes or None that a name, or a tuple of names, stands for."""
    if isinstance(name, list | tuple):
        axes = [translated(part, rules) for part in name]
        return tuple(
            axis for part in axes if part is not None for axis in (part if isinstance(part, tuple) else (part,))
        )
    axis = rules.get(name, name) if isinstance(name, str) else name
    return tuple(axis) if isinstance(axis, list) else axis
