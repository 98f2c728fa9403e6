"""Metrics: running statistics of what a training or evaluation loop sees.

Law: a metric updated with the parts of some values computes what one update with all of them would, in any
order; so do the metrics of several devices once `merge`, `reduce` or `all_reduce` made them one. Their state is
made of MetricState Variables, float32 sums and int32 counts, whatever the dtype of the values.

Several devices. Under `nnx.jit` with sharded arrays nothing is needed: values are global, so are sums. A metric
that was vmapped has a leading axis: `reduce` folds it. Inside `vmap`, `pmap` or `shard_map` with a named axis, a
metric made there saw one shard: `all_reduce` makes it that of all. Metrics of several hosts or runs: `merge`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_core import filters as filterlib
from nnx_core.graph.api import clone, graphdef, split
from nnx_core.graph.api import state as state_of
from nnx_core.graph.objects import Object
from nnx_core.optim._errors import AbstractMetricError, MetricArgumentError, MetricInputError
from nnx_core.optim._records import Record
from nnx_core.state import to_flat_state
from nnx_core.variables import A, Variable

Total = Callable[[jax.Array], jax.Array]


class MetricState(Variable[A]):
    """The state of a metric."""

    __slots__ = ()


class Metric(Object):
    """Base of metrics: a subclass has `__init__`, `reset`, `update` and `compute`, and `combine` if it is to be merged.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> class Largest(nnx.Metric):
      ...     def __init__(self):
      ...         self.value = nnx.metrics.MetricState(jnp.float32(-jnp.inf))
      ...
      ...     def reset(self):
      ...         self.value[...] = jnp.float32(-jnp.inf)
      ...
      ...     def update(self, *, values, **_):
      ...         self.value[...] = jnp.maximum(self.value, values.max())
      ...
      ...     def compute(self):
      ...         return self.value[...]
      >>> largest = Largest()
      >>> largest.update(values=jnp.arange(3.0))
      >>> largest.compute()
      Array(2., dtype=float32)
    """

    def __init__(self) -> None:
        raise AbstractMetricError(self, "__init__", "It creates the MetricStates.")

    def reset(self) -> None:
        """Forget all values, in place."""
        raise AbstractMetricError(self, "reset", "It puts the MetricStates back to where __init__ left them.")

    def update(self, **kwargs: Any) -> None:
        """Take in values, in place."""
        raise AbstractMetricError(self, "update", "It takes the values it needs, and **_ for those of others.")

    def compute(self) -> Any:
        """The statistic of all values since the last reset."""
        raise AbstractMetricError(self, "compute", "It returns the value of the metric.")

    def combine(self, total: Total) -> None:
        """Become the metric of several, in place.

        Args:
          total: sum over the metrics: it takes what is computed from the own MetricStates, and returns the sum
            of what each of the metrics computes so.

        Example:
          >>> import nnx_core as nnx
          >>> class Count(nnx.Metric):
          ...     def __init__(self):
          ...         self.count = nnx.metrics.MetricState(jnp.int32(0))
          ...
          ...     def update(self, **_):
          ...         self.count[...] += 1
          ...
          ...     def combine(self, total):
          ...         self.count[...] = total(self.count[...])
        """
        raise AbstractMetricError(self, "combine", "Without it the metric cannot be merged, reduced or all_reduced.")

    def split(self, *filters: filterlib.Filter) -> tuple[Any, ...]:
        """`nnx.split` of this metric."""
        return split(self, *filters)


def _argument(metric: Metric, name: str, kwargs: Mapping[str, Any]) -> jax.Array:
    if name not in kwargs:
        raise MetricArgumentError(
            f"{type(metric).__name__}.update: Expected keyword argument {name!r}, found {sorted(kwargs)}."
            f" Pass {name}=..., or construct the metric with argname= of one that is passed."
        )
    values = jnp.asarray(kwargs[name])
    if not _is_real(values):
        raise MetricInputError(
            metric, name, "real numbers", values.dtype, "Take the part or the absolute value that is meant."
        )
    return values


def _is_real(x: jax.Array) -> bool:
    return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _spread(metric: Metric, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """`mask` in the shape of the values, so that it counts each of them."""
    mask = jnp.asarray(mask)
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise MetricInputError(
            metric,
            "mask",
            f"a mask that broadcasts to the values, of shape {shape}",
            f"shape {mask.shape}",
            "Give it one entry for each value (or 1), with the axes aligned at the end: mask[:, None] for rows.",
        )
    return jnp.broadcast_to(mask, shape)


def _count(mask: jax.Array) -> jax.Array:
    # bfloat16 counts to 256 only
    wide = jnp.float32 if jnp.issubdtype(mask.dtype, jnp.floating) else jnp.int32
    return mask.sum(dtype=wide).astype(jnp.int32)


def _masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    product = values.astype(jnp.float32) * mask.astype(jnp.float32)  # int32 * bfloat16 is bfloat16
    return jnp.where(mask != 0, product, 0)  # 0 * nan is nan


def _sum(values: jax.Array) -> jax.Array:
    # Not in the dtype of the values: float16 overflows at 65504, bfloat16 keeps 8 bits, int32 wraps around.
    return values.sum(dtype=jnp.int32 if values.dtype == jnp.bool_ else jnp.float32)


def _no_sum() -> jax.Array:
    return jnp.zeros((), jnp.float32)


def _no_count() -> jax.Array:
    return jnp.zeros((), jnp.int32)


class Average(Metric):
    """Mean of values.

    Args:
      argname: the keyword argument of `update` that has the values.

    Attributes:
      total: MetricState, float32 scalar: the sum.
      count: MetricState, int32 scalar: how many.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> loss = nnx.metrics.Average("loss")
      >>> loss.update(loss=jnp.array([0.5, 1.5, 4.0]))
      >>> loss.update(loss=jnp.array([6.0, jnp.nan]), mask=jnp.array([True, False]))
      >>> loss.compute()
      Array(3., dtype=float32)
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.total, self.count = MetricState(_no_sum()), MetricState(_no_count())

    def reset(self) -> None:
        """Forget all values, in place."""
        self.total[...], self.count[...] = _no_sum(), _no_count()

    def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
        """Take in values, in place.

        Args:
          mask: 0 or False where a value shall be left out (NaN too), else 1 or True; its shape broadcasts to that
            of the values.
          **kwargs: `argname`: values, any shape, real. Others are ignored.

        Raises:
          MetricArgumentError: if `argname` is missing.
          MetricInputError: if the values are not real, or the mask does not fit.
        """
        self._take_in(_argument(self, self.argname, kwargs), mask)

    def _take_in(self, values: jax.Array, mask: jax.Array | None) -> None:
        if mask is None:
            total, count = _sum(values), values.size
        else:
            mask = _spread(self, mask, values.shape)
            total, count = _sum(_masked(values, mask)), _count(mask)
        self.total[...] += total.astype(jnp.float32)
        self.count[...] += count

    def compute(self) -> jax.Array:
        """The mean, a float32 scalar; NaN if there were no values."""
        return self.total[...] / self.count[...]

    def combine(self, total: Total) -> None:
        """Become the metric of several; see `Metric.combine`."""
        self.total[...] = total(self.total[...])
        self.count[...] = total(self.count[...])


class Accuracy(Average):
    """Fraction of predictions that are right.

    Args:
      threshold: for binary predictions: a logit of at least this is class 1. Without it the classes are the last
        axis of the logits and the largest logit wins.
      *args, **kwargs: as for Average.

    Raises:
      MetricArgumentError: if `threshold` is no number.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> top = nnx.metrics.Accuracy()
      >>> top.update(logits=jnp.eye(4), labels=jnp.array([0, 1, 2, 0]))
      >>> spam = nnx.metrics.Accuracy(threshold=0.0)
      >>> spam.update(logits=jnp.array([-3.0, 2.0]), labels=jnp.array([False, True]))
      >>> top.compute(), spam.compute()
      (Array(0.75, dtype=float32), Array(1., dtype=float32))
    """

    def __init__(self, threshold: float | None = None, *args: Any, **kwargs: Any):
        if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
            raise MetricArgumentError(
                f"Accuracy(threshold=...): Expected threshold to be a float or None, got {type(threshold).__name__}."
                " For binary predictions pass the logit from which on the class is 1."
            )
        self.threshold = threshold
        super().__init__(*args, **kwargs)

    def update(  # type: ignore[override]  # flax.nnx's signature
        self, *, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, **_: Any
    ) -> None:
        """Take in predictions and labels, in place.

        Args:
          logits: (..., classes), or with a threshold (...).
          labels: (...), of an integer dtype, or bool.
          mask: as for Average; its shape broadcasts to that of the labels.

        Raises:
          MetricInputError: if shapes or dtypes do not fit.
        """
        logits, labels = jnp.asarray(logits), jnp.asarray(labels)
        if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_):
            raise MetricInputError(
                self, "labels", "integer labels", labels.dtype, "For one-hot labels pass labels.argmax(-1)."
            )
        predicted = logits.argmax(axis=-1) if self.threshold is None and logits.ndim else logits
        if predicted.shape != labels.shape or (self.threshold is None and not logits.ndim):
            kind = "(*labels.shape, classes)" if self.threshold is None else "labels.shape: there is a threshold"
            raise MetricInputError(
                self,
                "logits",
                f"shape {kind}, with labels of shape {labels.shape}",
                f"shape {logits.shape}",
                "Multi-class logits have one axis more than labels; binary ones have none, and need threshold=.",
            )
        right = (predicted if self.threshold is None else predicted >= self.threshold) == labels
        self._take_in(right, mask)


class Statistics(Record):
    """What Welford computes: float32 scalars.

    Attributes:
      mean: of all values; 0 if there were none.
      standard_error_of_mean: the standard deviation divided by the square root of the count.
      standard_deviation: of the values (not of a population they are drawn from: divided by the count).
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Metric):
    """Mean and variance of a stream of values, without cancellation.

    Each update merges the moments of the new values into the running ones (Chan, Golub & LeVeque 1983, which
    for one value is Welford 1962).

    Args:
      argname: the keyword argument of `update` that has the values.

    Attributes:
      count: MetricState, int32 scalar: how many values.
      mean: MetricState, float32 scalar.
      m2: MetricState, float32 scalar: sum of squared differences from the mean.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> spread = nnx.metrics.Welford()
      >>> for batch in ([2, 4, 4, 4], [5, 5], [7, 9]):
      ...     spread.update(values=jnp.array(batch))
      >>> found = spread.compute()
      >>> found.mean, found.standard_deviation.round(5)
      (Array(5., dtype=float32), Array(2., dtype=float32))
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.count = MetricState(_no_count())
        self.mean, self.m2 = MetricState(_no_sum()), MetricState(_no_sum())

    def reset(self) -> None:
        """Forget all values, in place."""
        self.count[...] = _no_count()
        self.mean[...], self.m2[...] = _no_sum(), _no_sum()

    def update(self, **kwargs: Any) -> None:
        """Take in values, in place.

        Args:
          **kwargs: `argname`: values, any shape, real. `mask`: as for Average. Others are ignored.

        Raises:
          MetricArgumentError: if `argname` is missing.
          MetricInputError: if the values are not real, or the mask does not fit.
        """
        values = _argument(self, self.argname, kwargs).astype(jnp.float32)
        mask = kwargs.get("mask")
        if values.size == 0:
            return  # their mean would be NaN, and stay
        if mask is None:
            self._merge(values.size, values.mean(), values.var() * values.size)
            return
        mask = _spread(self, mask, values.shape)
        count = _count(mask)
        mean = _sum(_masked(values, mask)) / jnp.maximum(count, 1)
        self._merge(count, mean, _sum(_masked((values - mean) ** 2, mask)))

    def _merge(self, n: jax.Array | int, mean: jax.Array, m2: jax.Array) -> None:
        before = self.count[...]
        count = before + n
        some = count if isinstance(n, int) else jnp.maximum(count, 1)  # a mask may leave nothing
        delta = mean - self.mean[...]
        self.count[...] = count
        self.mean[...] += delta * n / some
        self.m2[...] += m2 + delta * delta * n * before / some

    def compute(self) -> Statistics:
        """Mean, standard error of the mean and standard deviation; the latter two NaN if there were no values."""
        variance = self.m2[...] / self.count[...]
        deviation = variance**0.5
        return Statistics(
            mean=self.mean[...],
            standard_error_of_mean=deviation / self.count[...] ** 0.5,
            standard_deviation=deviation,
        )

    def combine(self, total: Total) -> None:
        """Become the metric of several; see `Metric.combine`."""
        n, each = self.count[...], self.mean[...]
        count = total(n)
        mean = total(n * each) / jnp.maximum(count, 1)
        self.m2[...] = total(self.m2[...] + n * (each - mean) ** 2)
        self.count[...], self.mean[...] = count, mean


class MultiMetric(Metric):
    """Several metrics that are updated and computed together.

    Args:
      **metrics: metrics by name; each is an attribute.

    Raises:
      MetricArgumentError: if one is no Metric, or has the name of a method.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> epoch = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), right=nnx.metrics.Accuracy())
      >>> epoch.update(loss=jnp.float32(1.5), logits=jnp.eye(4), labels=jnp.array([0, 1, 2, 0]))
      >>> epoch.compute()
      {'loss': Array(1.5, dtype=float32), 'right': Array(0.75, dtype=float32)}
    """

    def __init__(self, **metrics: Metric):
        self._metric_names = tuple(metrics)
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise MetricArgumentError(
                    f"MultiMetric({name}=...): Expected a Metric, found {type(metric).__name__}."
                    " Pass an instance, such as nnx.metrics.Average()."
                )
            if hasattr(type(self), name) or name == "_metric_names":
                raise MetricArgumentError(
                    f"MultiMetric({name}=...): Expected another name, {name!r} is taken by the class. Choose another."
                )
            setattr(self, name, metric)

    def _metrics(self) -> dict[str, Metric]:
        return {name: getattr(self, name) for name in self._metric_names}

    def reset(self) -> None:
        """Reset each metric."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, **updates: Any) -> None:
        """Update each metric with all of the arguments.

        Args:
          **updates: `mask` may be a mask for all metrics, or a dict of masks by the name of the metric.

        Raises:
          MetricArgumentError: if `mask` is a dict and has a name that no metric has.
        """
        metrics = self._metrics()
        mask = updates.get("mask")
        if not isinstance(mask, dict):
            masks = {} if mask is None else dict.fromkeys(metrics, mask)
        elif unknown := sorted(set(mask) - set(metrics)):
            raise MetricArgumentError(
                f"MultiMetric.update(mask=...): Expected names among {sorted(metrics)}, found {unknown}."
                " A dict of masks has them by the name of the metric."
            )
        else:
            masks = mask
        updates.pop("mask", None)
        for name, metric in metrics.items():
            metric.update(**updates, **({"mask": masks[name]} if name in masks else {}))

    def compute(self) -> dict[str, Any]:
        """The value of each metric, by name."""
        return {name: metric.compute() for name, metric in self._metrics().items()}

    def combine(self, total: Total) -> None:
        """Become the metrics of several; see `Metric.combine`."""
        for metric in self._metrics().values():
            metric.combine(total)


# ---- several metrics into one ----


def merge(metric: Metric, *others: Metric) -> None:
    """Make `metric` that of its own values and those of `others`, which stay as they are.

    Raises:
      MetricArgumentError: if one is of another structure than `metric`.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> a, b = nnx.metrics.Average(), nnx.metrics.Average()
      >>> a.update(values=jnp.array([1.0, 2.0])), b.update(values=jnp.array([6.0]))
      (None, None)
      >>> nnx.metrics.merge(a, b)
      >>> a.compute()
      Array(3., dtype=float32)
    """
    for other in others:
        if not isinstance(other, Metric) or graphdef(other) != graphdef(metric):
            raise MetricArgumentError(
                f"metrics.merge: Expected a metric of the structure of\n{metric!r}\nfound\n{other!r}\n"
                "Construct all of them in the same way."
            )
    each = zip(*map(_states, (metric, *others)), strict=True)
    _become(metric, [jnp.stack([v[...] for v in states]) for states in each], 0)


def reduce(metric: Metric, axis: int = 0) -> None:
    """Fold an axis that every MetricState of `metric` has, as after a `vmap` over metrics.

    Raises:
      MetricArgumentError: if a MetricState has no such axis.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> def average(values):
      ...     metric = nnx.metrics.Average()
      ...     metric.update(values=values)
      ...     return metric
      >>> metric = nnx.vmap(average)(jnp.arange(6.0).reshape(3, 2))
      >>> nnx.metrics.reduce(metric)
      >>> metric.compute()
      Array(2.5, dtype=float32)
    """
    states = _states(metric)
    for v in states:
        if not -v.ndim <= axis < v.ndim:
            raise MetricArgumentError(
                f"metrics.reduce: Expected MetricStates with an axis {axis}, found one of shape {v.shape}."
                " reduce folds the axis that a vmap over metrics has added; inside of one use metrics.all_reduce."
            )
    _become(metric, [v[...] for v in states], axis)


def _become(metric: Metric, stacked: list[jax.Array], axis: int) -> None:
    """Make `metric` that of several, whose MetricStates have these values, stacked along `axis`."""

    def combined(number: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
        one = clone(metric)
        for v, x in zip(_states(one), values, strict=True):
            v.set_raw_value(x)
        one.combine(lambda x: _sum_over_metrics(x, number))
        return [v[...] for v in _states(one)]

    count = stacked[0].shape[axis] if stacked else 1
    totals = jax.vmap(combined, in_axes=(0, axis))(jnp.arange(count), stacked)
    for v, x in zip(_states(metric), totals, strict=True):
        v.value = x[0]  # all are the same


@jax.custom_batching.custom_vmap
def _sum_over_metrics(x: jax.Array, number: jax.Array) -> jax.Array:
    """Sum of `x` over the vmap that `number` is mapped by; `psum` does not work there inside of shard_map."""
    del number
    return x


@_sum_over_metrics.def_vmap  # type: ignore[untyped-decorator]  # JAX's
def _sum_of_all(count: int, mapped: list[bool], x: jax.Array, number: jax.Array) -> tuple[jax.Array, bool]:
    del number
    return x.sum(axis=0) if mapped[0] else x * count, False


def all_reduce(metric: Metric, axis_name: Any) -> None:
    """Inside `vmap`, `pmap` or `shard_map`: make `metric` on each device that of the values of all devices.

    What `metric` held before the transform is on every device, and would be counted once for each: update a
    new metric inside, all_reduce it, and `merge` it into the running one.

    Example:
      >>> import nnx_core as nnx, jax, jax.numpy as jnp
      >>> def step(running, values):
      ...     batch = nnx.metrics.Average()
      ...     batch.update(values=values)
      ...     nnx.metrics.all_reduce(batch, "devices")
      ...     nnx.metrics.merge(running, batch)
      ...     return running.compute()
      >>> jax.vmap(lambda x: step(nnx.metrics.Average(), x), axis_name="devices")(jnp.arange(6.0).reshape(3, 2))
      Array([2.5, 2.5, 2.5], dtype=float32)
    """
    metric.combine(lambda x: jax.lax.psum(x, axis_name))


def _states(metric: Metric) -> list[Variable[Any]]:
    return [v for _, v in to_flat_state(state_of(metric)) if isinstance(v, Variable)]
