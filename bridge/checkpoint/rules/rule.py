"""One rule: which leaves it takes, what it does to them, where they go; and the rule that undoes it.

Law: a Rule that exists can be used: its patterns, templates and values have been checked against each other.
Knows patterns and numbers; knows nothing of leaves. How rules are written: `apply.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bridge._errors import BridgeError
from bridge.checkpoint.rules.patterns import Pattern, PatternError, Spec, Template, invert
from bridge.checkpoint.rules.rearrange import Rearrangement


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with rules. `rule` counts from 1; None where no single rule is to blame."""

    expected: str
    found: str
    rule: int | None = None
    about: str = ""


class RulesError(BridgeError, ValueError):
    """Rules that are malformed, or do not fit the leaves they are applied to: everything that is wrong at once."""

    def __init__(self, problems: Sequence[Problem], name: str = "the rules"):
        self.problems, self.name = tuple(problems), name
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}"
        lines = [f"{name}: {count}"]
        for problem in self.problems:
            number = "" if problem.rule is None else f"rule {problem.rule}"
            where = ", ".join(part for part in (number, problem.about) if part)
            lines += [f"{where or 'all rules'}:", f"  expected: {problem.expected}", f"  found: {problem.found}"]
        super().__init__("\n".join([*lines, "Nothing was read or written. Mend the rules named above."]))


# --- one rule -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    r"""What becomes of the leaves that match. The fields are those of TOML; `source` is `from`, `target` is `to`.

    Raises:
        RulesError: the fields do not go together, or one of them is malformed.

    >>> print(Rule("params/Dense_(\\d+)/**", r"params/layers/\1/**"))
    from = "params/Dense_(\\d+)/**", to = "params/layers/\\1/**"
    """

    source: Spec | Sequence[Spec] | None = None
    target: Spec | Sequence[Spec] | None = None
    drop: bool = False
    keep: bool = False
    new: Mapping[str, Any] | Literal["target"] | None = None
    concat: int | None = None
    stack: int | None = None
    transpose: Sequence[int] | None = None
    reshape: Sequence[int] | None = None
    rearrange: str | None = None
    lengths: Mapping[str, int] | None = None
    order: Mapping[str, Sequence[int]] | None = None
    add: float | None = None
    cast: str | None = None
    unstack: int | None = None
    split: int | None = None
    sizes: Sequence[int] | None = None
    optional: bool = False
    patterns: tuple[Pattern, ...] = field(init=False, compare=False, repr=False)
    templates: tuple[Template, ...] = field(init=False, compare=False, repr=False)
    index_group: int | None = field(init=False, compare=False, repr=False, default=None)
    rearrangement: Rearrangement | None = field(init=False, compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        try:
            _check_types(self)
            _check_kind(self)
            many_in, many_out = self.concat is not None, self.split is not None
            patterns = () if self.source is None else _specs(self.source, many_in, "from", "concat")
            templates = () if self.target is None else _specs(self.target, many_out, "to", "split")
            object.__setattr__(self, "patterns", tuple(map(Pattern.parse, patterns)))
            if self.new is not None:
                _check_new(self, Pattern.parse(templates[0]))
                object.__setattr__(self, "templates", ())
                return
            object.__setattr__(self, "templates", tuple(map(Template.parse, templates)))
            _check_wildcards(self)
            _check_groups(self)
            _check_sizes(self)
            _check_rearrange(self)
        except PatternError as error:
            raise RulesError([Problem("a rule that can be used", error.problem, about=str(self))], "a rule") from None

    def __str__(self) -> str:
        return ", ".join(field_lines(self)) or "a rule without keys"

    @property
    def new_at(self) -> Pattern | None:
        """The location, or the pattern of locations, of a `new` rule."""
        return Pattern.parse(self.target) if self.new is not None else None  # type: ignore[arg-type]  # checked

    def inverse(self) -> Rule:
        r"""The rule that undoes this one.

        Raises:
            PatternError: it drops, casts, reshapes or makes something new, or forgets part of a name.

        >>> print(Rule("params/layers_(\\d+)/**", "params/layers/**", stack=0).inverse())
        from = "params/layers/**", to = "params/layers_{i}/**", unstack = 0
        """
        for name in ("drop", "new", "reshape", "cast"):
            if getattr(self, name):
                raise PatternError(f"{name!r} cannot be undone")
        transpose = None
        if self.transpose is not None:
            axes = [axis % len(self.transpose) for axis in self.transpose]
            transpose = tuple(int(axis) for axis in np.argsort(axes))
        changes: dict[str, Any] = {"transpose": transpose, "add": None if self.add is None else -self.add}
        if self.rearrangement is not None:
            back = self.rearrangement.inverse()
            order = {name: list(indices) for name, indices in back.order.items()}
            changes |= {"rearrange": str(back), "lengths": self.lengths, "order": order or None}
        if self.keep:
            return replace(self, **changes)
        sources, targets = self._inverted()
        return Rule(
            sources if self.split is not None else sources[0],
            targets if self.concat is not None else targets[0],
            concat=self.split,
            stack=self.unstack,
            unstack=self.stack,
            split=self.concat,
            sizes=self.sizes,
            optional=self.optional,
            **changes,
        )

    def _inverted(self) -> tuple[list[list[str]], list[list[str]]]:
        """Keys of the patterns and the templates of the way back; all parts must say the same of their groups."""
        sources: list[Pattern] = []
        targets: list[Template] = []
        for pattern in self.patterns:
            pairs = [invert(pattern, template, self.index_group) for template in self.templates]
            patterns = [back for back, _ in pairs]
            templates = {back for _, back in pairs}
            sources = sources or patterns
            if patterns != sources or len(templates) != 1:
                raise PatternError("the groups of its parts differ in text or in order")
            targets += templates
        return [list(pattern.keys) for pattern in sources], [list(template.keys) for template in targets]


_BOOLS, _AXES, _NUMBERS = (
    ("drop", "keep", "optional"),
    ("concat", "stack", "unstack", "split"),
    ("transpose", "reshape"),
)
_ON_ONE = ("transpose", "reshape", "rearrange", "lengths", "order", "add", "cast")
_VALUES = (*_AXES, *_ON_ONE, "sizes")
TOML_NAMES = {"source": "from", "target": "to"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_types(rule: Rule) -> None:
    for name in _BOOLS:
        if not isinstance(getattr(rule, name), bool):
            raise PatternError(f"{name} = {getattr(rule, name)!r}, which is neither true nor false")
    for name in _AXES:
        if getattr(rule, name) is not None and not _is_int(getattr(rule, name)):
            raise PatternError(f"{name} = {getattr(rule, name)!r}, which is no axis: a whole number")
    for name in (*_NUMBERS, "sizes"):
        value = getattr(rule, name)
        if value is not None and not (isinstance(value, list | tuple) and value and all(map(_is_int, value))):
            raise PatternError(f"{name} = {value!r}, which is no list of whole numbers")
    for name in ("lengths", "order"):
        if not isinstance(getattr(rule, name), Mapping | None):
            raise PatternError(f"{name} = {getattr(rule, name)!r}, which is no table of names")
    if not isinstance(rule.rearrange, str | None):
        raise PatternError(f"rearrange = {rule.rearrange!r}, which is no text")
    if not isinstance(rule.add, int | float | None) or isinstance(rule.add, bool):
        raise PatternError(f"add = {rule.add!r}, which is no number")
    if rule.cast is not None:
        _dtype(rule.cast)


def _dtype(name: Any) -> Any:
    try:
        return jnp.dtype(name if isinstance(name, str) else "no name")
    except TypeError:
        raise PatternError(f"{name!r} is not the name of a number type, such as 'bfloat16'") from None


def _check_kind(rule: Rule) -> None:
    """A rule is of one kind: to, drop, keep, new."""
    given = [name for name in ("drop", "keep", "new") if getattr(rule, name)]
    if len(given) > 1:
        raise PatternError(f"{given[0]!r} and {given[1]!r} in one rule")
    kind = given[0] if given else "to"
    needs = {"to": (True, True), "drop": (True, False), "keep": (True, False), "new": (False, True)}[kind]
    for name, value, needed in (("from", rule.source, needs[0]), ("to", rule.target, needs[1])):
        if (value is not None) != needed:
            what = "has no" if needed else "has a"
            raise PatternError(f"a rule with {kind!r} {what} {name!r}")
    allowed = {"to": _VALUES, "keep": _ON_ONE}.get(kind, ())
    if odd := [name for name in _VALUES if getattr(rule, name) is not None and name not in allowed]:
        raise PatternError(f"{odd[0]!r} in a rule with {kind!r}, which has no use for it")


def _specs(value: Any, many: bool, name: str, why: str) -> list[Spec]:
    if not many:
        return [value]
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise PatternError(f"{why!r} needs a list of two or more in {name!r}, found {value!r}")
    return list(value)


def _check_new(rule: Rule, at: Pattern) -> None:
    if rule.new == "target":
        return
    if not isinstance(rule.new, Mapping) or set(rule.new) != {"value", "shape", "dtype"}:
        raise PatternError(f"new = {rule.new!r}, where 'target' or value, shape and dtype are expected")
    if at.literal is None:
        raise PatternError(f"a new value at {at}, which is not one location")
    shape, value = rule.new["shape"], rule.new["value"]
    if not isinstance(shape, list | tuple) or not all(_is_int(size) and size >= 0 for size in shape):
        raise PatternError(f"shape = {shape!r} of a new value, which is no list of sizes")
    if not isinstance(value, bool | int | float):
        raise PatternError(f"value = {value!r} of a new value, which is no number")
    _dtype(rule.new["dtype"])


def _check_wildcards(rule: Rule) -> None:
    wildcards = rule.patterns[0].wildcards
    for other in (*rule.patterns[1:], *rule.templates):
        if other.wildcards != wildcards:
            shown = " ".join(wildcards) or "none"
            raise PatternError(f"{other} has other wildcards than {rule.patterns[0]}: {shown}, in this order")


def _check_groups(rule: Rule) -> None:
    count = rule.patterns[0].groups
    if odd := next((p for p in rule.patterns if p.groups != count), None):
        raise PatternError(
            f"{odd} has {odd.groups} groups and {rule.patterns[0]} has {count}: groups bind alike in all"
        )
    for template in rule.templates:
        if beyond := [number for number in template.groups if not 1 <= number <= count]:
            raise PatternError(f"{template} asks for group {min(beyond)}, and {rule.patterns[0]} has {count}")
        if template.indexed != (rule.unstack is not None):
            what = "no {i} for the index of 'unstack'" if rule.unstack is not None else "{i} without 'unstack'"
            raise PatternError(f"{template} has {what}")
    if rule.stack is not None:
        free = set(range(1, count + 1)).difference(*(template.groups for template in rule.templates))
        if len(free) != 1:
            raise PatternError(
                f"'stack' needs exactly one group that 'to' leaves out, the index; {len(free)} of {count} are left out"
            )
        object.__setattr__(rule, "index_group", free.pop())


def _check_sizes(rule: Rule) -> None:
    if rule.sizes is None:
        return
    counts = [len(x) for x in (rule.patterns, rule.templates) if len(x) > 1]
    if counts != [len(rule.sizes)] or min(rule.sizes) < 1:
        parts = " and ".join(map(str, counts)) or "no"
        raise PatternError(f"sizes = {list(rule.sizes)}, for {parts} parts of one 'concat' or 'split'")


def _check_rearrange(rule: Rule) -> None:
    if rule.rearrange is None:
        if rule.lengths is not None or rule.order is not None:
            raise PatternError("'lengths' or 'order' without 'rearrange', whose axes they are about")
        return
    if rule.transpose is not None or rule.reshape is not None:
        raise PatternError("'rearrange' beside 'transpose' or 'reshape': it can say what they say")
    object.__setattr__(rule, "rearrangement", Rearrangement.parse(rule.rearrange, rule.lengths, rule.order))


def field_lines(rule: Rule) -> list[str]:
    """The fields that are set, as in TOML."""
    many = {"source": rule.concat is not None, "target": rule.split is not None}
    shown = []
    for f in fields(Rule):
        value = getattr(rule, f.name) if f.init else None
        if value is not None and value is not False:
            text = _toml_specs(value, many[f.name]) if f.name in many else to_toml(value)
            shown.append(f"{TOML_NAMES.get(f.name, f.name)} = {text}")
    return shown


def _toml_specs(value: Any, many: bool) -> str:
    if many and isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_specs(spec, many=False) for spec in value) + "]"
    is_keys = isinstance(value, list | tuple) and value and all(isinstance(key, str) for key in value)
    return to_toml("/".join(value) if is_keys and not any("/" in key or not key for key in value) else value)


def to_toml(value: Any) -> str:
    """A value as TOML has it, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {to_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, default=repr)
