r"""Rules: how leaves are renamed, dropped, made anew and reworked on their way into another layout. In TOML or Python.

  default = "keep"                                    # leaves that no rule matches: "keep" as they are, or "error"

  [[rule]]                                            # any number; the first one that matches a leaf takes it
  from = "params/encoder/layers_(\\d+)/kernel"        # a pattern of locations: the collection first (see patterns.py)
  to = "params/encoder/layers/\\1/linear/kernel"      # a template for the new location
  [[rule]]
  from = ["params/gru/ir/kernel", "params/gru/iz/kernel", "params/gru/in/kernel"]
  to = "params/gru/dense_i/kernel"
  concat = -1                                         # several into one, in this order; groups bind alike in all

A rule has `from` and `to`, or `from` and `drop = true`, or `from` and `keep = true` (same place), or `to` and `new`.
`optional = true`: it may match nothing. What is done to the values, in this order whatever order it is written in:
  concat = AXIS      `from` is a list of patterns, one for each part; the parts are equal, or `sizes` says how large
  stack = AXIS       the leaves that differ in the one group which `to` leaves out, a number 0, 1, ...: a new axis
  rearrange = "in (part dim) -> in (dim part)"   axes by name: see rearrange.py; `lengths = {part = 3}`, and `order =
                     {part = [2, 0, 1]}` for another order along one of them
  transpose = AXES   reshape = SIZES (one may be -1)   add = 1.0 (undone up to rounding)   cast = "bfloat16"
  unstack = AXIS     one leaf for each index along it, which goes; `{i}` in `to` is the index
  split = AXIS       `to` is a list of templates, one for each part; equal ones, or of `sizes`
`new = {value = 0.0, shape = [4], dtype = "float32"}` makes a leaf at the location `to`; `new = "target"` takes those
that the pattern `to` matches from the target model, where no other rule makes them.

Law: every rule takes a leaf (or is optional), every leaf is taken once and whole, every target is made once and none
lies inside another; one error lists whatever breaks that. `rules` undo what `rules.inverse()` makes, or it raises.
Knows locations and expressions; knows nothing of arrays, files, optimizers or modules.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path as FilePath
from typing import Any, Literal

from bridge._errors import listed, near_misses, show_path
from bridge._types import Location
from bridge.checkpoint.rules.patterns import MANY, ONE, Match, Pattern, PatternError, escape, escape_template
from bridge.checkpoint.rules.rework import filled, reworked, split, unstacked
from bridge.checkpoint.rules.rule import TOML_NAMES, Problem, Rule, RulesError, field_lines, to_toml
from bridge.checkpoint.tree.layout import describe
from bridge.checkpoint.tree.ops import (
    Join,
    Op,
    OpError,
    Read,
    values_of,
)

# difflib compares each rule that matches nothing with each path; past this many pairs a hint costs seconds.
_MOST_COMPARISONS = 20_000


# --- a list of rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """Rules in order. `default`: whether leaves that none matches are kept as they are, or an error.

    >>> from bridge.checkpoint.tree.ops import Read
    >>> rules = Rules([Rule("params/Dense_0/**", "params/hidden/**")])
    >>> rules.apply({("params", "Dense_0", "bias"): Read(("x",), (4,), "float32")}).made
    {('params', 'hidden', 'bias'): Read(path=('x',), shape=(4,), dtype='float32')}
    """

    rules: Sequence[Rule] = ()
    default: Literal["keep", "error"] = "keep"
    name: str = field(default="the rules", compare=False)
    undoes: Rules | None = field(default=None, compare=False, repr=False)  #: of which these are the inverse
    unproven: str = field(default="", compare=False, repr=False)  #: derived, and why that is not proven; "" if it is

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.default not in ("keep", "error"):
            raise RulesError([Problem('default = "keep" or "error"', f"default = {self.default!r}")], self.name)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], name: str = "the rules") -> Rules:
        """From what a TOML file holds.

        Raises:
            RulesError: unknown keys, wrong types, rules that cannot be used: all of them, with their numbers.

        >>> Rules.from_table({"rule": [{"from": "params/a", "drop": True}]}).rules[0].drop
        True
        """
        unknown = [key for key in table if key not in ("default", "rule")]
        problems = [Problem("the keys 'default' and 'rule'", repr(key)) for key in unknown]
        rows = table.get("rule", [])
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            problems.append(Problem("rules, each below [[rule]]", f"rule = {rows!r}"))
            rows = []
        rules: list[Rule] = []
        for number, row in enumerate(rows, start=1):
            try:
                rules.append(_rule_from(row))
            except RulesError as error:
                problems += [replace(problem, rule=number) for problem in error.problems]
        if problems:
            raise RulesError(problems, name)
        return cls(rules, table.get("default", "keep"), name)

    @classmethod
    def from_rename(cls, rename: Mapping[str | tuple[Any, ...], str | tuple[Any, ...]]) -> Rules:
        """From path prefixes (without a collection), as `load_variables` takes them: the longest that fits wins.

        >>> print(Rules.from_rename({"Dense_0": "hidden"}).rules[0])
        from = "*/Dense_0/**", to = "*/hidden/**"
        """
        pairs = [(_prefix(old), _prefix(new)) for old, new in rename.items()]
        rules: list[Rule] = []
        for old, new in sorted(pairs, key=lambda pair: -len(pair[0])):
            rules.append(Rule([ONE, *map(escape, old), MANY], [ONE, *map(escape_template, new), MANY]))
        return cls(rules, name="rename")

    def then(self, later: Rules) -> Rules:
        """These rules, and for the leaves that they leave those of `later`, which may match nothing.

        >>> Rules([Rule("a", "b")]).then(Rules([Rule("c", "d")], default="error")).default
        'error'
        """
        optional = [replace(rule, optional=True) for rule in later.rules]
        return Rules([*self.rules, *optional], later.default, self.name, unproven=self.unproven or later.unproven)

    def inverse(self) -> Rules:
        """The rules that lead back, the most literal ones first: one file serves both directions.

        Names of layers are written without leading zeros. What the inverse makes is checked when it is applied.

        Raises:
            RulesError: lists every rule that drops, casts, reshapes, makes something new or forgets part of a name.

        >>> print(Rules([Rule("params/a/kernel", "params/b/kernel", transpose=[1, 0])]).inverse().rules[0])
        from = "params/b/kernel", to = "params/a/kernel", transpose = [1, 0]
        """
        back: list[Rule] = []
        problems: list[Problem] = []
        for number, rule in enumerate(self.rules, start=1):
            try:
                back.append(rule.inverse())
            except PatternError as error:
                problems.append(Problem("a rule that can be undone", error.problem, number, str(rule)))
        if problems:
            raise RulesError(problems, f"{self.name}, inverted")
        return Rules(sorted(back, key=_vagueness), self.default, f"{self.name}, inverted", self, self.unproven)

    def apply(self, leaves: Mapping[Location, Op], target: Iterable[Location] | None = None) -> RuleResult:
        """See `apply_rules`."""
        return apply_rules(self, leaves, target)

    def convert(self, values: Mapping[Location, Any]) -> dict[Location, Any]:
        """What becomes of values: arrays, or what a transformation of JAX puts in their place, so that gradients flow.

        Args:
          values: by location, all of a collection or none of it; not changed.

        Returns:
          What the rules make, without what they take from a target model.

        Raises:
          RulesError: the rules do not fit.

        >>> import numpy as np
        >>> rules = Rules([Rule("params/a/kernel", "params/b/kernel", transpose=[1, 0])])
        >>> rules.convert({("params", "a", "kernel"): np.ones((2, 3))})[("params", "b", "kernel")].shape
        (3, 2)
        """
        return values_of(self.apply(reads_of(values)).made, values)

    def pairs(self, values: Mapping[Location, Any] | None = None) -> list[tuple[Location, Location]]:
        """(location before, location after) of each value and what is made of it.

        Args:
          values: by location, abstract or not; patterns need them to know what there is.

        Raises:
          RulesError: the rules do not fit, or have patterns and there are no values.

        >>> import numpy as np
        >>> rules = Rules.from_rename({"Dense_0": "hidden"})
        >>> rules.pairs({("params", "Dense_0", "bias"): np.ones(2)})
        [(('params', 'Dense_0', 'bias'), ('params', 'hidden', 'bias'))]
        """
        if values is not None:
            return pairs_of(self.apply(reads_of(values)).made)
        pairs: list[tuple[Location, Location]] = []
        for number, rule in enumerate(self.rules, start=1):
            if rule.new is not None or rule.drop:
                continue
            before = [pattern.literal for pattern in rule.patterns]
            if None in before or any(template.indexed for template in rule.templates):
                found = "a pattern, and no values to look it up in: give pairs(values)"
                raise RulesError([Problem("literal locations", found, number, str(rule))], self.name)
            match = rule.patterns[0].match(before[0])
            after = before if rule.keep else [template.fill(match) for template in rule.templates]
            pairs += itertools.product(before, after)
        return pairs

    def to_toml(self) -> str:
        """As a file that `read_rules` takes.

        >>> print(Rules([Rule("params/a", drop=True)]).to_toml())
        default = "keep"
        <BLANKLINE>
        [[rule]]
        from = "params/a"
        drop = true
        <BLANKLINE>
        """
        lines = [f"default = {to_toml(self.default)}", ""]
        for rule in self.rules:
            lines += ["[[rule]]", *field_lines(rule), ""]
        return "\n".join(lines)


@dataclass(frozen=True)
class RuleResult:
    """What rules have made of leaves.

    Attributes:
      made: how each leaf of the target is made, in the order of the leaves it is made from.
      dropped: leaves without a place in the target, and why.
      new: locations whose value is the one that the target model has.
    """

    made: dict[Location, Op] = field(default_factory=dict)
    dropped: dict[Location, str] = field(default_factory=dict)
    new: tuple[Location, ...] = ()


def reads_of(values: Mapping[Location, Any]) -> dict[Location, Op]:
    """Each value as the leaf that it is, for `apply`."""
    return {location: Read(location, *describe(value)) for location, value in values.items()}


def pairs_of(made: Mapping[Location, Op]) -> list[tuple[Location, Location]]:
    """(source, target) of what is made of what."""
    pairs: list[tuple[Location, Location]] = []
    for target, op in made.items():
        pairs += [(source, target) for source in dict.fromkeys(op.sources())]
    return pairs


def read_rules(path: str | FilePath) -> Rules:
    r"""Rules from a TOML file; its form is at the head of this module.

    Args:
        path: of the file.

    Returns:
        The rules, checked as far as they can be without a checkpoint.

    Raises:
        RulesError: the file cannot be read, is no TOML, or holds rules that cannot be used.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rules.toml")
    >>> _ = file.write_text('[[rule]]\nfrom = "params/Dense_0/**"\nto = "params/hidden/**"\n')
    >>> print(*read_rules(file).rules)
    from = "params/Dense_0/**", to = "params/hidden/**"
    """
    try:
        table = tomllib.loads(FilePath(path).read_text("utf-8"))
    except (OSError, ValueError) as error:  # no TOML and no UTF-8 are ValueErrors
        raise RulesError([Problem("a TOML file of rules", str(error))], str(path)) from None
    return Rules.from_table(table, str(path))


def _rule_from(row: Mapping[str, Any]) -> Rule:
    names = {TOML_NAMES.get(field.name, field.name): field.name for field in fields(Rule) if field.init}
    unknown = next((key for key in row if key not in names), None)
    if unknown is not None:
        near = near_misses(unknown, names)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RulesError([Problem(f"the keys {', '.join(names)}", f"{unknown!r}{hint}", about=to_toml(row))])
    return Rule(**{names[key]: value for key, value in row.items()})


def _prefix(keys: str | tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(filter(None, keys.split("/"))) if isinstance(keys, str) else tuple(map(str, keys))


def _vagueness(rule: Rule) -> tuple[int, int]:
    keys = rule.patterns[0].keys
    return keys.count(MANY), sum(Pattern((key,)).literal is None for key in keys)


# --- applying them ------------------------------------------------------------------------------------------


def apply_rules(rules: Rules, leaves: Mapping[Location, Op], target: Iterable[Location] | None = None) -> RuleResult:
    """What becomes of leaves.

    Args:
        rules: in order.
        leaves: how each leaf is made; it is usually just a `Read`, and stays the very same where it is only renamed.
        target: the locations of the target model; a rule with `new = "target"` and a pattern needs them.

    Returns:
        See `RuleResult`.

    Raises:
        RulesError: lists every rule that takes nothing or does not fit what it takes, every leaf that none takes where
            that is an error, every target that is made twice or lies inside another.

    >>> gates = {("params", name): Read((name,), (2, 3), "float32") for name in ("ir", "iz")}
    >>> rule = Rule(["params/ir", "params/iz"], "params/dense_i", concat=-1)
    >>> apply_rules(Rules([rule]), gates).made[("params", "dense_i")].shape
    (2, 6)
    """
    run = _Run(rules, leaves)
    run.take()
    for number, rule in enumerate(rules.rules, start=1):
        try:
            run.apply(number, rule)
        except PatternError as error:
            run.complain(number, "leaves that the rule fits", error.problem)
        except OpError as error:
            *lines, _advice = str(error).splitlines()
            run.complain(number, "leaves that the rule fits", "; ".join(map(str.strip, lines)))
    run.place()
    run.renew(None if target is None else list(target))
    run.require_ways_of_their_own()
    if not run.problems and rules.undoes is not None:
        run.require_way_back(rules.undoes)
    if run.problems:
        raise RulesError(run.problems, rules.name)
    return run.result


@dataclass(frozen=True)
class _Taken:
    """A leaf that a rule has taken, by which of its patterns; `order` is the leaf's place among all."""

    order: int
    part: int
    match: Match
    location: Location
    op: Op


class _Run:
    """One application: what is found, and what is wrong with it."""

    def __init__(self, rules: Rules, leaves: Mapping[Location, Op]):
        self.rules, self.leaves = rules, leaves
        self.taken: list[list[_Taken]] = [[] for _ in rules.rules]
        self.outputs: list[tuple[int, int | None, Location, Op]] = []  # order, rule, target, how
        self.made_by: dict[Location, int | None] = {}
        self.result = RuleResult()
        self.problems: list[Problem] = []

    def complain(self, number: int | None, expected: str, found: str) -> None:
        about = "" if number is None else str(self.rules.rules[number - 1])
        self.problems.append(Problem(expected, found, number, about))

    def take(self) -> None:
        """Give each leaf to the first rule that matches it."""
        find = _finder(self.rules.rules)
        left: list[Location] = []
        for order, (location, op) in enumerate(self.leaves.items()):
            for index, part, pattern in find(location):
                match = pattern.match(location)
                if match is not None:
                    self.taken[index].append(_Taken(order, part, match, location, op))
                    break
            else:
                left.append(location)
                self.outputs.append((order, None, location, op))
        for number, rule in enumerate(self.rules.rules, start=1):
            if rule.patterns and not rule.optional and not self.taken[number - 1]:
                self.complain(number, "at least one leaf that it takes", self._why_nothing(rule))
        if left and self.rules.default == "error":
            shown = ", ".join(map(show_path, left[:10]))
            more = f" and {len(left) - 10} more" if len(left) > 10 else ""
            self.complain(None, 'a rule for each leaf, or default = "keep"', f"none for {shown}{more}")

    def _why_nothing(self, rule: Rule) -> str:
        for number, taken in enumerate(self.taken, start=1):
            for leaf in taken:
                if any(pattern.match(leaf.location) for pattern in rule.patterns):
                    return f"none that is left: rule {number}, which comes before, takes {show_path(leaf.location)}"
        without_collection = [Pattern((ONE, *pattern.keys)) for pattern in rule.patterns]
        if any(pattern.match(location) for pattern, location in itertools.product(without_collection, self.leaves)):
            hint = " (a location begins with its collection: 'params/...', or '*/...' for any)"
        else:
            hint = self._near(rule)
        return f"none of {len(self.leaves)} leaves{hint}"

    def _near(self, rule: Rule) -> str:
        """Leaves that look like what a rule asks for, with one number for all: a layer stands for its like."""
        layers: dict[str, str] = {}
        for location in self.leaves:
            shown = show_path(location)
            layers[re.sub(r"\d+", "0", shown)] = shown
        if len(layers) * len(self.rules.rules) > _MOST_COMPARISONS:
            return ""
        wanted = re.sub(r"\(?\\d[+*]?\)?", "0", str(rule.patterns[0]))
        near = [layers[name] for name in near_misses(wanted, layers)]
        return f" (did you mean {' or '.join(near)}?)" if near else ""

    def apply(self, number: int, rule: Rule) -> None:
        """Outputs of one rule; PatternError or OpError if it does not fit what it has taken."""
        taken = self.taken[number - 1]
        if rule.drop:
            self.result.dropped.update({leaf.location: f"rule {number} drops it" for leaf in taken})
            return
        for first, op in _combined(rule, taken):
            op = reworked(rule, op)
            if rule.keep:
                self.outputs.append((first.order, number, first.location, op))
                continue
            for index, layer in enumerate(unstacked(rule, op)):
                for template, part in zip(rule.templates, split(rule, layer), strict=True):
                    self.outputs.append((first.order, number, template.fill(first.match, index), part))

    def place(self) -> None:
        """Put outputs at their targets, in the order of the leaves."""
        for _, number, location, op in sorted(self.outputs, key=lambda output: output[0]):
            if location in self.made_by:
                one, two = self._says(self.made_by[location], location), self._says(number, location, op)
                self.complain(number, f"one leaf for {show_path(location)}", f"{one} makes it, and {two}")
                continue
            self.made_by[location] = number
            self.result.made[location] = op

    def _says(self, number: int | None, location: Location, op: Op | None = None) -> str:
        who = "a leaf that no rule takes" if number is None else f"rule {number}"
        sources = dict.fromkeys((op or self.result.made[location]).sources())
        return f"{who} (from {listed(list(map(show_path, sources)), 3)})"

    def renew(self, target: list[Location] | None) -> None:
        """Leaves that come from no leaf."""
        made, new = self.result.made, list[Location]()
        for number, rule in enumerate(self.rules.rules, start=1):
            if rule.new is None:
                continue
            pattern = rule.new_at
            location = pattern.literal
            if isinstance(rule.new, Mapping) and location in made:
                other = self._says(self.made_by[location], location)
                self.complain(number, "a location that nothing else makes", other)
            elif isinstance(rule.new, Mapping):
                self.made_by[location] = number
                made[location] = filled(rule.new)
            elif target is None and location is None:
                self.complain(number, "a target model, in which the pattern is looked for", "none")
            else:
                among = [location] if target is None else target
                free = [x for x in among if x not in made and x not in new and pattern.match(x)]
                if not free and not rule.optional:
                    self.complain(number, "leaves of the target that no rule makes", "none that match")
                new += free
        self.result = replace(self.result, new=tuple(new))

    def require_ways_of_their_own(self) -> None:
        """No target lies inside another."""
        everything = {*self.result.made, *self.result.new}
        for location in everything:
            for length in range(1, len(location)):
                outer = location[:length]
                if outer in everything:
                    number = self.made_by.get(location) or self.made_by.get(outer)
                    self.complain(number, "no leaf inside another", f"{show_path(outer)} and {show_path(location)}")

    def require_way_back(self, forward: Rules) -> None:
        """The rules that these undo make of the result the very leaves that were given."""
        made = self.result.made
        reads = {location: Read(location, op.shape, op.dtype) for location, op in made.items()}
        try:
            back = forward.apply(reads).made
        except RulesError as error:
            self.complain(None, f"what {forward.name} can be applied to", str(error.problems[0].found))
            return
        origins: dict[Location, set[Location]] = {}  # where what comes back has come from
        for location, op in back.items():
            origins[location] = set().union(*(made[target].sources() for target in op.sources()))
        for location, op in self.leaves.items():
            sources = set(op.sources())
            if not sources <= origins.get(location, set()):
                others = [show_path(other) for other, its in origins.items() if not sources.isdisjoint(its)]
                expected = f"{show_path(location)} itself when {forward.name} is applied to what it becomes"
                self.complain(None, expected, f"{', '.join(others) or 'nothing'}: it can be read in several ways")


def _finder(rules: Sequence[Rule]) -> Callable[[Location], Iterable[tuple[int, int, Pattern]]]:
    """The patterns that may match a location: `(index of the rule, index of its part, pattern)`, in order.

    Each is filed under the literal key that the fewest have; trying all rules on all leaves costs seconds.
    """
    everything: list[tuple[int, int, Pattern]] = []
    shared: Counter[tuple[int | None, str]] = Counter()
    for index, rule in enumerate(rules):
        for part, pattern in enumerate(rule.patterns):
            everything.append((index, part, pattern))
            shared.update(pattern.literals())
    filed: dict[tuple[int | None, str] | None, list[tuple[int, int, Pattern]]] = {}
    for entry in everything:
        rarest = min(entry[2].literals(), key=lambda literal: shared[literal], default=None)
        filed.setdefault(rarest, []).append(entry)

    def find(location: Location) -> list[tuple[int, int, Pattern]]:
        length = len(location)
        literals: set[tuple[int | None, str] | None] = {None}
        for n, key in enumerate(location):  # from the start, from the end, and wherever it is
            literals |= {(n, key), (n - length, key), (None, key)}
        candidates: list[tuple[int, int, Pattern]] = []
        for literal in literals:
            candidates += filed.get(literal, ())
        return sorted(candidates, key=lambda entry: entry[:2])

    return find


# --- values -------------------------------------------------------------------------------------------------


def _combined(rule: Rule, taken: Sequence[_Taken]) -> Iterator[tuple[_Taken, Op]]:
    """What a rule makes one of: the first leaf of each, and all as one."""
    if rule.concat is None and rule.stack is None:
        yield from ((leaf, leaf.op) for leaf in taken)
        return
    alike: dict[tuple[Any, ...], dict[int, dict[int, _Taken]]] = {}
    for leaf in taken:
        groups, index = list(leaf.match.groups), 0
        if rule.index_group is not None:
            index = _index(leaf, groups.pop(rule.index_group - 1))
        parts = alike.setdefault((tuple(groups), leaf.match.wild), {}).setdefault(index, {})
        if leaf.part in parts:
            both = f"{show_path(parts[leaf.part].location)} and {show_path(leaf.location)}"
            raise PatternError(f"two leaves for one place: {both}")
        parts[leaf.part] = leaf
    for layers in alike.values():
        leaves = itertools.chain.from_iterable(parts.values() for parts in layers.values())
        first = min(leaves, key=lambda leaf: leaf.order)
        gaps = [str(n) for n in range(max(layers) + 1) if n not in layers]
        if gaps:
            raise PatternError(f"no layer {', '.join(gaps[:5])} beside {show_path(first.location)}")
        joined = tuple(_concatenated(rule, layers[index]) for index in range(len(layers)))
        yield first, joined[0] if rule.stack is None else Join(joined, rule.stack, stack=True)


def _index(leaf: _Taken, text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise PatternError(f"the index {text!r} of {show_path(leaf.location)}, which is no number")
    return int(text)


def _concatenated(rule: Rule, parts: Mapping[int, _Taken]) -> Op:
    """The parts of one leaf as one; equal parts, or else whoever splits it again would cut it elsewhere."""
    if rule.concat is None:
        return parts[0].op
    absent = [str(pattern) for part, pattern in enumerate(rule.patterns) if part not in parts]
    if absent:
        other = next(iter(parts.values()))
        raise PatternError(f"no {' and no '.join(absent)} that goes with {show_path(other.location)}")
    ordered = [parts[part] for part in range(len(rule.patterns))]
    whole = Join(tuple(leaf.op for leaf in ordered), rule.concat)
    sizes = [leaf.op.shape[whole.axis] for leaf in ordered]
    if sizes != list(rule.sizes or sizes[:1] * len(sizes)):
        wanted = f"sizes = {list(rule.sizes)}" if rule.sizes else "equal parts, where the rule says no sizes"
        raise PatternError(f"{show_path(ordered[0].location)} and the others have sizes {sizes}: not {wanted}")
    return whole
