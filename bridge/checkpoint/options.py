"""What a user may ask of a conversion: one value, checked once and passed on whole.

Law: options that exist can be used; a wrong one is an error that names it, before anything is opened.
Knows the words for layouts, rules and memory; knows nothing of how a checkpoint is opened, planned or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bridge._errors import BridgeError
from bridge._types import Location, Path
from bridge.checkpoint.formats.protocol import Items
from bridge.checkpoint.job import Job
from bridge.checkpoint.rules.apply import RuleResult
from bridge.checkpoint.stream import Progress
from bridge.checkpoint.tree.canonical import Known
from bridge.checkpoint.tree.layout import Kind
from bridge.checkpoint.tree.ops import Op

if TYPE_CHECKING:
    import optax

#: Bytes of leaves in memory at once, unless said otherwise.
MAX_MEMORY = 2 << 30

#: What a user checks at the end, from the paths of source and target.
Check = Callable[[FilePath, FilePath], object]


class LeafRules(Protocol):
    """What leads from the leaves of one model to those of another: `Rules`, what `derive` gives, or a user's own."""

    def apply(self, leaves: Mapping[Location, Op], /) -> RuleResult:
        """What becomes of `leaves`."""


class UnprovenRulesError(BridgeError, ValueError):
    """Rules that were derived, and that nothing has shown to be right. `why` is what is missing."""

    def __init__(self, why: str):
        self.why = why
        super().__init__(
            "the rules were derived from two models, and nothing has shown that they are right\n"
            f"  expected: a proof, as derive gives one by running both models\n  found: {why}\n"
            "Derive them anew, or allow it: unproven=True (--unproven), and the report says so. Nothing was changed."
        )


class OptionError(BridgeError, ValueError):
    """An option of a conversion has a value that means nothing. `option` is its name."""

    def __init__(self, option: str, expected: str, found: object):
        self.option = option
        super().__init__(
            f"the option {option} has no such value:\n  expected {expected}\n  found {found!r}\n"
            f"Nothing was opened. Give another {option}."
        )


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """The options of a conversion, as `convert` takes them by keyword. `dataclasses.replace` changes some.

    Attributes:
      to: 'nnx' or 'linen'.
      rules: where variables go: `read_rules("file.toml")`, what `derive` gives, `Rules`; slots of the optimizer and
        averages follow.
      target: what the result must fit: a model, `{"model": model, "optimizer": optimizer}` or the pair, a TrainState,
        variables, abstract or not. It also says which collection a variable of NNX belongs to.
      tx: the optax transformation: its state must be what the result has; also tells where Linen keeps empty states.
      rng: random streams: 'drop' (or None), 'keep' (Linen keeps them apart, under 'nnx_rngs'), or a seed for fresh
        ones.
      kind: the source's layout, instead of the detected one.
      known: what is known about the source that it does not tell, such as the collections of NNX variables:
        `of_object(model).known`.
      nested: for Linen: whether `params` holds all collections, as in a TrainState made with variables as params.
      empty: for Linen: what entries without content in the optimizer state are: 'None', as Orbax has them, or 'Dict',
        as flax.serialization has them; by default what they were, and on disk as the format's own tools have them.
      source_format, step, item: which checkpoint, as for `open_source`.
      at: where in it the training state is, as "state" or "a/b", or as a tuple of keys; "" for all of it. By default
        found, if the tree is none itself and holds exactly one.
      outside: what is outside of that place: 'keep', carried unchanged, or 'drop'.
      target_format: 'orbax', 'orbax-v1', 'safetensors' or 'msgpack'.
      target_item: of Orbax's formats: the item that the state is in; by default 'default' for v0 where the target is
        called by a number, as the steps of a CheckpointManager are, and otherwise none; 'state' for v1.
      max_memory: bytes of leaves in memory at once. A leaf that is larger is read, made and written block by block; if
        its axes change places, through a temporary file beside the target. What the source holds in one piece (a chunk
        of Orbax, an array of npz in Fortran's order) is read whole, and a note of the plan says so.
      resume: go on with what a killed run has left.
      verify: read everything again at the end and compare hashes. What an earlier run wrote is always verified.
      check: called last with the paths of source and target, to run both models, say: False or an AssertionError
        means that the target is not to be used.
      unproven: take derived rules that are not proven; every report says so.
      lossy: go on if leaves have no place in the target, or number types change, though no rule says so.
      job: the processes that convert together, each its share; the same call in each. Orbax's formats alone.
      progress: called as `progress("converting" or "verifying", bytes done, bytes in all)`.

    Raises:
      OptionError: `to`, `rng`, `kind`, `empty`, `at`, `outside` or `max_memory` is none of those.

    >>> options = ConversionOptions(to="nnx", rng="keep")
    >>> options.target_format, options.max_memory >> 30
    ('orbax', 2)
    >>> ConversionOptions(to="nnx", rng="fresh")
    Traceback (most recent call last):
    ...
    bridge.checkpoint.options.OptionError: the option rng has no such value:
      expected 'drop', 'keep' or a seed
      found 'fresh'
    Nothing was opened. Give another rng.
    """

    to: Literal["nnx", "linen"]
    rules: LeafRules | None = None
    target: Any = None
    tx: optax.GradientTransformation | None = None
    rng: str | int | None = "drop"
    kind: Kind | None = None
    known: Known | None = None
    nested: bool | None = None
    empty: str | None = None
    source_format: str | None = None
    step: int | None = None
    item: Items | None = None
    at: str | Path | None = None
    outside: Literal["keep", "drop"] = "keep"
    target_format: str = "orbax"
    target_item: str | None = None
    max_memory: int = MAX_MEMORY
    resume: bool = False
    verify: bool = True
    check: Check | None = None
    lossy: bool = False
    unproven: bool = False
    job: Job = field(default_factory=Job)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.to not in ("nnx", "linen"):
            raise OptionError("to", "'nnx' or 'linen'", self.to)
        is_seed = isinstance(self.rng, Integral) and not isinstance(self.rng, bool)
        if not is_seed and self.rng not in (None, "drop", "keep"):
            raise OptionError("rng", "'drop', 'keep' or a seed", self.rng)
        if self.kind is not None and not isinstance(self.kind, Kind):
            raise OptionError("kind", "a bridge.checkpoint.Kind", self.kind)
        if self.empty not in (None, "None", "Dict"):
            raise OptionError("empty", "'None', 'Dict' or nothing", self.empty)
        keys = self.at.split("/") if isinstance(self.at, str) else self.at
        if keys is not None and not (isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)):
            raise OptionError("at", "a path, as 'state' or 'a/b', or a tuple of keys", self.at)
        if self.outside not in ("keep", "drop"):
            raise OptionError("outside", "'keep' or 'drop'", self.outside)
        if self.target_item is not None and not self.target_format.startswith("orbax"):
            raise OptionError("target_item", "none, as only Orbax's formats have items", self.target_item)
        if self.job.count > 1 and not self.target_format.startswith("orbax"):
            formats = "'orbax' or 'orbax-v1', where several processes write"
            raise OptionError("target_format", formats, self.target_format)
        if not isinstance(self.max_memory, Integral) or self.max_memory < 1:
            raise OptionError("max_memory", "a number of bytes", self.max_memory)

    @property
    def place(self) -> Path | None:
        """`at` as keys.

        >>> ConversionOptions(to="nnx", at="a/b").place, ConversionOptions(to="nnx", at="").place
        (('a', 'b'), ())
        """
        if isinstance(self.at, str):
            return tuple(key for key in self.at.split("/") if key)
        return None if self.at is None else tuple(self.at)

    @property
    def doubt(self) -> str:
        """Why the rules are not proven; "" if they are, or if somebody wrote them.

        Raises:
          UnprovenRulesError: they are not, and nobody has said that they may be.
        """
        why = getattr(self.rules, "unproven", "")
        if why and not self.unproven:
            raise UnprovenRulesError(why)
        return why

    @property
    def seed(self) -> int | None:
        """For fresh random streams; None where `rng` asks for none."""
        return None if self.rng is None or isinstance(self.rng, str) else int(self.rng)
