"""What a comparison of two models has shown: everything that was compared, layer by layer, and where they part.

Law: what could not be compared stands here too; equal is only what was compared and is equal.
Knows numbers and text; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bridge.equivalence.numbers import Difference

Cause = Literal[
    "parameters", "computation", "dtype", "shape", "mode", "order", "structure", "random", "state", "training"
]
Verdict = Literal["equal", "wrong", "fed wrong", "unpaired"]
What = Literal[
    "output",
    "gradient",
    "state",
    "parameter",
    "structure",
    "loss",
    "trained parameter",
    "optimizer state",
    "random",
]


@dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Attributes:
      path: of the output, or of the variable in `a`; "" if there is only one.
      other: the same in `b`.
      difference: the worst of all seeds; None for structure, of which `text` tells.
      seed: which draw it was found with; None where it does not depend on one.
      step: which training step, from 1; None outside of training.
    """

    what: What
    path: str
    other: str
    difference: Difference | None
    equal: bool
    seed: int | None = None
    step: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Row:
    """A pair of layers at one call; rows stand in the order in which `a` runs.

    Attributes:
      a, b: paths of the layers; "" where unpaired.
      kind: of both, as in "Dense/Linear".
      call: 1 for the first call of that layer; repeats and the steps of a scan count up.
      method: that was called.
      input: how far apart is what the two were fed; None if unpaired, or if nothing is comparable.
      output: the same of what they returned.
      alone: of the output of b's layer when it is fed a's input; None where it could not be run so.
      parameters: the worst of its own variables; None if it has none.
      verdict: "wrong" by itself, "fed wrong" numbers, "equal" or "unpaired".
    """

    a: str
    b: str
    kind: str
    call: int
    method: str
    input: Difference | None
    output: Difference | None
    alone: Difference | None
    parameters: Difference | None
    verdict: Verdict
    text: str = ""


@dataclass(frozen=True)
class Parting:
    """Where two models first part, and why.

    Attributes:
      a, b: paths of layers or variables; "" for the whole model.
      text: what was expected, what was found, what to do.
    """

    a: str
    b: str
    cause: Cause
    text: str


@dataclass(frozen=True)
class Report:
    """What a comparison has shown.

    Attributes:
      a, b: what was compared, in words.
      first: where they first part; None if they are equal.
      seeds: of the draws that inputs were made of.
      not_compared: what was left out, and why.
    """

    a: str
    b: str
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]
    first: Parting | None
    seeds: tuple[int, ...]
    not_compared: tuple[str, ...]
    backend: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether all that was compared is equal."""
        return all(finding.equal for finding in self.findings)

    @property
    def bit_equal(self) -> bool:
        """Whether all that was compared is equal bit by bit."""
        differences = [finding.difference for finding in self.findings if finding.difference is not None]
        return self.equal and all(difference.bit_equal for difference in differences)

    def __str__(self) -> str:
        lines = [f"a: {self.a}", f"b: {self.b}"]
        if self.first is not None:
            lines.append(f"they part at {self.first.a or '(the whole model)'}: {self.first.cause}: {self.first.text}")
        for finding in self.findings:
            if finding.equal:
                continue
            off = finding.difference
            how = "" if off is None else f"{off.absolute:.3g} (up to {off.tolerance:.3g})"
            lines.append(f"{finding.what} {finding.path}: {how} {finding.text}".rstrip())
        lines += [f"not compared: {text}" for text in self.not_compared]
        equal = f"equal: {len(self.findings)} compared"
        return "\n".join([*lines, equal if self.equal else "not equal"])
