"""What can go wrong between a model and what follows it: gradients, averages, training states, metrics.

Law: a message lists every path that is wrong, what was expected, what was found and what to do.
"""

from collections.abc import Iterable

from nnx_core._errors import NnxError, Path, StateMismatchError, show_path, show_paths

Mismatch = tuple[Path, object, object]


class GradientMismatchError(StateMismatchError):
    """Gradients that are not those of the Variables to optimize; lists every path at once."""

    def __init__(self, missing: Iterable[Path], unexpected: Iterable[Path], mismatched: Iterable[Mismatch]):
        super().__init__(missing, unexpected, mismatched)
        text = "The gradients do not fit the Variables to optimize; nothing was updated."
        if self.missing:
            text += f"\nNo gradient for:{show_paths(self.missing)}"
        if self.unexpected:
            text += f"\nA gradient, but no such Variable in the model:{show_paths(self.unexpected)}"
        if self.mismatched:
            rows = "".join(f"\n  {show_path(p)}: expected {want}, found {got}" for p, want, got in self.mismatched)
            text += f"\nDifferent:{rows}"
        self.args = (f"{text}\nTake them of the same model: nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model).",)


class EmaError(NnxError, TypeError):
    """An EMA was asked to track something that is no Variable, or with a decay that is none."""


class TrainStateError(NnxError, TypeError):
    """`TrainState.apply` was given the name of a field that holds no State."""


class MetricArgumentError(NnxError, TypeError):
    """A metric was made or updated without the argument it needs, or with one of the wrong type."""


class MetricInputError(NnxError, ValueError):
    """Values, labels or a mask whose shape or dtype a metric cannot use."""

    def __init__(self, metric: object, what: str, expected: str, found: object, fix: str):
        super().__init__(
            f"{type(metric).__name__}.update({what}=...):\n  expected {expected}\n  found    {found}\n{fix}"
        )


class AbstractMetricError(NnxError, NotImplementedError):
    """A subclass of Metric lacks a method."""

    def __init__(self, metric: object, method: str, why: str):
        super().__init__(f"{type(metric).__name__}: Must override `{method}()` method. {why}")
