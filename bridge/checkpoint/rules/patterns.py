r"""Patterns of locations, and templates that make a new location from what a pattern has matched.

  pattern   "params/layers_(\d+)/**"      each key is a regex for a whole key; `*` is any one key, `**` any number
  template  "params/layers/\1/**"         `\1`: a group, counted over all keys; `*`, `**`: as matched, in order
Keys are separated by `/`; a key that holds one itself is written in a list: `["params", "Dense_0/kernel/scale"]`. Of
several ways to match, each `**` takes as few keys as it can. A backslash takes its meaning from any other sign.

Law: keys are never joined, so no regex sees two of them; where `invert` gives a pair, `template.fill(pattern.match(x))`
of the one pair undoes that of the other, unless the texts of two neighbouring groups can be told apart in several ways.
Knows tuples of strings; knows nothing of arrays, of rules or of files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from bridge._errors import BridgeError, show_path
from bridge._types import Location

#: How a pattern or template is written: keys with `/` between them, or the keys.
Spec = str | Sequence[str]

ONE, MANY = "*", "**"
INDEX = "{i}"
_SPECIAL = frozenset(r"\.^$*+?{}[]|()")


class PatternError(BridgeError, ValueError):
    """A pattern or template that cannot be used. `problem` says why, in words."""

    def __init__(self, problem: str):
        self.problem = problem
        super().__init__(problem)


@dataclass(frozen=True)
class Match:
    """What the groups and the wildcards of a pattern stand for in one location."""

    groups: tuple[str, ...]
    wild: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Group:
    """A group of a regex, as it is written, or (`number`) one that a template asks for; INDEX has no number."""

    text: str
    number: int = 0


# --- patterns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    r"""Which locations are meant.

    >>> Pattern.parse(r"*/layers_(\d+)/**").match(("params", "layers_3", "Dense_0", "bias"))
    Match(groups=('3',), wild=(('params',), ('Dense_0', 'bias')))
    """

    keys: tuple[str, ...]
    groups: int = field(init=False, compare=False)
    literal: Location | None = field(init=False, compare=False)  #: the one location it matches, if there is but one
    _segments: tuple[tuple[_Key, ...], ...] = field(init=False, compare=False, repr=False)
    _fewest: int = field(init=False, compare=False, repr=False)  # keys that a location needs

    @classmethod
    def parse(cls, spec: Spec) -> Pattern:
        """From its text.

        Raises:
            PatternError: no keys, an empty one, or one that is no regex.
        """
        return cls(_keys(spec))

    def __post_init__(self) -> None:
        segments: list[list[_Key]] = [[]]  # what stands between two `**`
        for text in self.keys:
            if text == MANY:
                segments.append([])
            else:
                segments[-1].append(_Key.parse(text))
        if any(first == second == MANY for first, second in itertools.pairwise(self.keys)):
            raise PatternError(f"'**' stands twice in a row in {self}: once is enough")
        keys = list(itertools.chain.from_iterable(segments))
        literals = [key.literal for key in keys]
        is_literal = len(segments) == 1 and None not in literals
        object.__setattr__(self, "groups", sum(key.groups for key in keys))
        object.__setattr__(self, "literal", tuple(literals) if is_literal else None)
        object.__setattr__(self, "_segments", tuple(map(tuple, segments)))
        object.__setattr__(self, "_fewest", len(literals))

    def __str__(self) -> str:
        return show_path(self.keys)

    @property
    def wildcards(self) -> tuple[str, ...]:
        """Its `*` and `**`, in order."""
        return tuple(key for key in self.keys if key in (ONE, MANY))

    def match(self, location: Location) -> Match | None:
        """What the parts of the pattern stand for in `location`, None if it is not meant."""
        head, *rest = self._segments
        if len(location) < self._fewest or (not rest and len(location) > self._fewest):
            return None
        tail = rest.pop() if rest else ()
        end = len(location) - len(tail)
        if not _fits(head, location, 0) or not _fits(tail, location, end):
            return None
        found = _Found(location)
        found.take(head, 0)
        if len(self._segments) == 1:
            return found.match
        at = len(head)
        for segment in rest:
            starts = range(at, end - len(segment) + 1)
            start = next((n for n in starts if _fits(segment, location, n)), None)
            if start is None:
                return None
            found.wild.append(location[at:start])
            found.take(segment, start)
            at = start + len(segment)
        found.wild.append(location[at:end])
        found.take(tail, end)
        return found.match

    def literals(self) -> list[tuple[int | None, str]]:
        """Keys that a location has if it matches: `(position, key)`; from the end if negative, None anywhere."""
        head, *middle = self._segments
        tail = middle.pop() if middle else ()
        placed: list[tuple[int | None, str | None]] = [(n, key.literal) for n, key in enumerate(head)]
        placed += [(n - len(tail), key.literal) for n, key in enumerate(tail)]
        for segment in middle:
            placed += [(None, key.literal) for key in segment]
        return [(position, literal) for position, literal in placed if literal is not None]


@dataclass(frozen=True)
class _Key:
    """One key of a pattern: a text, any key (neither text nor regex), or a regex."""

    literal: str | None = None
    regex: re.Pattern[str] | None = None
    groups: int = 0

    @classmethod
    def parse(cls, text: str) -> _Key:
        if text == ONE:
            return cls()
        pieces = _pieces(text)
        if pieces is not None and all(isinstance(piece, str) for piece in pieces):
            return cls(literal="".join(map(str, pieces)))
        try:
            regex = re.compile(text)
        except re.error as error:
            raise PatternError(
                f"{text!r} is no regex: {error} (a pattern is cut at each '/'; keys that hold one go in a list)"
            ) from None
        return cls(regex=regex, groups=regex.groups)


@dataclass
class _Found:
    location: Location
    groups: list[str] = field(default_factory=list)
    wild: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def match(self) -> Match:
        return Match(tuple(self.groups), tuple(self.wild))

    def take(self, keys: Sequence[_Key], at: int) -> None:
        """Note what `keys`, which fit at that place, capture."""
        for key, text in zip(keys, self.location[at : at + len(keys)], strict=True):
            if key.regex is not None:
                self.groups += key.regex.fullmatch(text).groups("")  # type: ignore[union-attr]  # it fits
            elif key.literal is None:
                self.wild.append((text,))


def _fits(keys: Sequence[_Key], location: Location, at: int) -> bool:
    """Whether `keys` match those of the location from `at` on."""
    for offset, key in enumerate(keys):  # a loop: a million of these are the time that rules take
        text = location[at + offset]
        if key.literal is not None:
            if key.literal != text:
                return False
        elif key.regex is not None and key.regex.fullmatch(text) is None:
            return False
    return True


# --- templates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    r"""Where what a pattern has matched goes.

    >>> pattern, template = Pattern.parse(r"params/layers_(\d+)/**"), Template.parse(r"params/layers/\1/**")
    >>> template.fill(pattern.match(("params", "layers_3", "bias")))
    ('params', 'layers', '3', 'bias')
    """

    keys: tuple[str, ...]
    groups: frozenset[int] = field(init=False, compare=False)
    indexed: bool = field(init=False, compare=False)  #: whether it has a place for the index of an unstacked part
    _parts: tuple[tuple[str | _Group, ...] | None, ...] = field(init=False, compare=False, repr=False)

    @classmethod
    def parse(cls, spec: Spec) -> Template:
        """From its text.

        Raises:
            PatternError: no keys, an empty one, or a backslash at the end of one.
        """
        return cls(_keys(spec))

    def __post_init__(self) -> None:
        parts = tuple(map(_template_pieces, self.keys))
        asked = _groups(parts)
        indices = sum(piece.text == INDEX for piece in asked)
        if indices > 1:
            raise PatternError(f"{INDEX} stands {indices} times in {self}: once is enough")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "indexed", indices == 1)
        object.__setattr__(self, "groups", frozenset(piece.number for piece in asked if piece.text != INDEX))

    def __str__(self) -> str:
        return show_path(self.keys)

    @property
    def wildcards(self) -> tuple[str, ...]:
        """Its `*` and `**`, in order."""
        return tuple(key for key in self.keys if key in (ONE, MANY))

    def fill(self, match: Match, index: int = 0) -> Location:
        """The location for what a pattern has matched; `index` is that of an unstacked part."""
        wild = iter(match.wild)
        keys: list[str] = []
        for part in self._parts:
            if part is None:
                keys += next(wild)
            else:
                keys.append("".join(_filled(piece, match, index) for piece in part))
        return tuple(keys)


def _filled(piece: str | _Group, match: Match, index: int) -> str:
    if isinstance(piece, str):
        return piece
    return str(index) if piece.text == INDEX else match.groups[piece.number - 1]


# --- the way back -------------------------------------------------------------------------------------------


def invert(pattern: Pattern, template: Template, index: int | None = None) -> tuple[Pattern, Template]:
    r"""The pair that goes from what `template` fills in to what `pattern` matches.

    Args:
        pattern, template: the way there; both have the same wildcards.
        index: the number of the group that is left out since its parts are stacked; it becomes `{i}`.

    Raises:
        PatternError: a regex stands outside of groups, or a group is not asked for exactly once.

    >>> back = invert(Pattern.parse(r"params/(\w+)_(\d+)/bias"), Template.parse(r"params/\2/\1/b"))
    >>> print(*back)
    params/(\d+)/(\w+)/b params/\2_\1/bias
    """
    there: list[Sequence[str | _Group] | None] = []
    for key in pattern.keys:
        pieces = None if key in (ONE, MANY) else _pieces(key)
        if pieces is None and key not in (ONE, MANY):
            raise PatternError(f"what {key!r} matches outside of groups is not kept")
        there.append(pieces)
    texts = [group.text for group in _groups(there)]
    asked = _groups(template._parts)
    numbers_asked = sorted(group.number for group in asked if group.text != INDEX)
    if numbers_asked != [n for n in range(1, len(texts) + 1) if n != index]:
        raise PatternError(f"{template} does not ask for each group of {pattern} exactly once")
    new_number = {piece.number: n for n, piece in enumerate(asked, start=1)}

    def as_regex(piece: str | _Group) -> str:
        if isinstance(piece, str):
            return escape(piece)
        return r"(\d+)" if piece.text == INDEX else texts[piece.number - 1]

    numbers = itertools.count(1)

    def as_template(piece: str | _Group) -> str:
        if isinstance(piece, str):
            return escape_template(piece)
        number = next(numbers)
        return INDEX if number == index else rf"\{new_number[number]}"

    back = _map_pieces(template.keys, template._parts, as_regex)
    return Pattern(back), Template(_map_pieces(pattern.keys, there, as_template))


def _map_pieces(
    keys: Sequence[str],
    parts: Sequence[Sequence[str | _Group] | None],
    text: Callable[[str | _Group], str],
) -> tuple[str, ...]:
    mapped: list[str] = []
    for key, pieces in zip(keys, parts, strict=True):
        mapped.append(key if pieces is None else _joined(list(map(text, pieces))))
    return tuple(mapped)


def _groups(parts: Iterable[Sequence[str | _Group] | None]) -> list[_Group]:
    pieces = itertools.chain.from_iterable(part for part in parts if part is not None)
    return [piece for piece in pieces if isinstance(piece, _Group)]


def _joined(texts: list[str]) -> str:
    r"""`\1` before a digit is written `\g<1>`."""
    for at, (text, following) in enumerate(itertools.pairwise(texts)):
        if re.fullmatch(r"\\\d+", text) and following[:1].isdecimal():
            texts[at] = rf"\g<{text[1:]}>"
    return "".join(texts)


# --- texts --------------------------------------------------------------------------------------------------


def escape(key: str) -> str:
    """A pattern's key that matches this one only."""
    return re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", key)


def escape_template(key: str) -> str:
    """A template's key that becomes this one."""
    return re.sub(r"([\\{*])", r"\\\1", key)


def _keys(spec: Spec) -> tuple[str, ...]:
    if isinstance(spec, str):
        keys = tuple(spec.split("/"))
        if "" in keys:
            raise PatternError(f"an empty key in {spec!r}: no '/' at the start, at the end, or twice")
        return keys
    if not isinstance(spec, list | tuple) or not spec or not all(isinstance(key, str) for key in spec):
        raise PatternError(f"a text with '/' between keys, or a list of keys, is expected; found {spec!r}")
    return tuple(spec)


def _pieces(key: str) -> list[str | _Group] | None:
    """The texts and the groups that a regex is a row of; None if there is more to it."""
    pieces: list[str | _Group] = []
    at = 0
    while at < len(key):
        sign = key[at]
        if sign == "\\" and at + 1 < len(key) and not key[at + 1].isalnum():
            text: str | _Group = key[at + 1]
            at += 2
        elif sign == "(" and (end := _closing(key, at)):
            text = _Group(key[at:end])
            if not _is_plain_group(text.text):
                return None
            at = end
        elif sign in _SPECIAL:
            return None
        else:
            text = sign
            at += 1
        if isinstance(text, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += text
        else:
            pieces.append(text)
    return pieces


def _closing(key: str, start: int) -> int | None:
    """Where the group that opens at `start` is over."""
    depth, at = 0, start
    while at < len(key):
        sign = key[at]
        if sign == "\\":
            at += 1
        elif sign == "[":
            at += 2 if key[at + 1 : at + 2] == "^" else 1
            at = max(key.find("]", at + 1), at)  # `]` as the first of a set is one of its signs
        depth += (sign == "(") - (sign == ")")
        at += 1
        if depth == 0:
            return at
    return None


def _is_plain_group(text: str) -> bool:
    if text.startswith("(?") and not text.startswith("(?P<"):
        return False
    try:
        return re.compile(text).groups == 1
    except re.error:
        return False


_TEMPLATE_SIGNS = re.compile(r"\\g<(?P<named>\d+)>|\\(?P<group>\d+)|\\(?P<sign>\D)|(?P<index>\{i\})|(?P<text>[^\\])")


def _template_pieces(key: str) -> tuple[str | _Group, ...] | None:
    """The texts and the groups that a template's key is a row of; None for a wildcard."""
    if key in (ONE, MANY):
        return None
    pieces: list[str | _Group] = []
    at = 0
    while at < len(key):
        found = _TEMPLATE_SIGNS.match(key, at)
        if found is None:
            raise PatternError(f"a lone backslash at the end of {key!r}; two of them stand for one")
        at = found.end()
        if found["index"]:
            pieces.append(_Group(INDEX))
        elif number := found["named"] or found["group"]:
            pieces.append(_Group(found[0], int(number)))
        else:
            pieces.append(found["sign"] or found["text"])
    return tuple(pieces)
