"""Metrics: flax.nnx and numpy in float64 as oracles; half precision, masks, merging over devices."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_core as nnx
from nnx_core.optim.metrics import MetricState, all_reduce, merge, reduce
from tests.strategies import portrait
from tests.support.arrays import noise, ones
from tests.tolerance import assert_trees_close, assert_trees_equal

BATCHES = [noise(seed, 2, 5, mean=3) for seed in range(3)]
LOGITS = [noise(seed, 6, 4) for seed in range(3)]
LABELS = [jax.device_put(np.random.default_rng(seed).integers(4, size=6, dtype=np.int32)) for seed in range(3)]
BATCH_OF = [{"values": v, "logits": x, "labels": y} for v, x, y in zip(BATCHES, LOGITS, LABELS, strict=True)]
MASK = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]], np.int32)


METRICS = {
    "Average": lambda library: library.metrics.Average(),
    "Accuracy": lambda library: library.metrics.Accuracy(),
    "Welford": lambda library: library.metrics.Welford(),
    "MultiMetric": lambda library: library.MultiMetric(
        accuracy=library.metrics.Accuracy(),
        loss=library.metrics.Average("values"),
        parts=library.MultiMetric(spread=library.metrics.Welford("values")),
    ),
}


def values_of(metric):
    """compute() as plain dicts and arrays."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if dataclasses.is_dataclass(x):
            return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return x

    return plain(metric.compute())


def state_of(metric, library=nnx):
    return library.to_pure_dict(library.state(metric))


# ---- against flax.nnx ----


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_updates_and_values_equal_flax(make, compiled):
    ours, theirs = make(nnx), make(flax_nnx)

    def run(library, metric):
        def step(metric, batch):
            metric.update(**batch)
            return values_of(metric)

        step = library.jit(step) if compiled else step
        assert_trees_equal(values_of(metric), values_of(make(library)))
        return [(step(metric, batch), state_of(metric, library)) for batch in BATCH_OF]

    assert_trees_equal(run(nnx, ours), run(flax_nnx, theirs))
    ours.reset(), theirs.reset()
    assert_trees_equal(state_of(ours), state_of(theirs, flax_nnx))


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_attributes_and_state_are_those_of_flax(make):
    ours, theirs = make(nnx), make(flax_nnx)
    public = [{k for k in vars(m) if not k.startswith("_pytree")} for m in (ours, theirs)]
    assert public[0] == public[1]
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(ours))} == {nnx.metrics.MetricState}
    variables = [v for _, v in nnx.to_flat_state(nnx.state(ours))]
    ours.update(**BATCH_OF[0])
    ours.reset()
    assert all(a is b for a, (_, b) in zip(variables, nnx.to_flat_state(nnx.state(ours)), strict=True))


@pytest.mark.parametrize("name", ["Metric", "Average", "Accuracy", "Welford", "MultiMetric", "Statistics"])
def test_names_and_signatures_are_those_of_flax(name):
    def parameters(library, method):
        signature = inspect.signature(getattr(getattr(library.metrics, name), method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    methods = ["__init__", "replace"] if name == "Statistics" else ["__init__", "reset", "update", "compute"]
    for method in methods:
        assert parameters(nnx, method) == parameters(flax_nnx, method)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(bool), MASK.astype(np.float32)], ids=["int", "bool", "float"])
def test_a_mask_equals_flax(mask):
    def run(library):
        metrics = library.MultiMetric(a=library.metrics.Average(), b=library.metrics.Average())
        metrics.update(values=BATCHES[0], mask=mask)
        metrics.update(values=BATCHES[1], mask={"b": mask})
        accuracy = library.metrics.Accuracy()
        accuracy.update(logits=LOGITS[0][:5], labels=LABELS[0][:5], mask=mask[0])
        return state_of(metrics, library), state_of(accuracy, library)

    assert_trees_equal(run(nnx), run(flax_nnx))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1])
def test_binary_accuracy_equals_flax_and_numpy(threshold):
    logits, labels = BATCHES[0] - 3, MASK
    metric, flax_metric = nnx.metrics.Accuracy(threshold), flax_nnx.metrics.Accuracy(float(threshold))
    metric.update(logits=logits, labels=labels), flax_metric.update(logits=logits, labels=labels)
    assert_trees_equal(metric.compute(), flax_metric.compute())
    assert_trees_close(metric.compute(), jnp.float32(((np.asarray(logits) >= threshold) == np.asarray(labels)).mean()))


# ---- against numpy in float64, where flax.nnx is wrong too ----


def moments(values):
    values = np.asarray(values, np.float64)
    deviation = values.std()
    return {
        "mean": values.mean(),
        "standard_error_of_mean": deviation / values.size**0.5,
        "standard_deviation": deviation,
    }


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_sums_are_not_taken_in_the_dtype_of_the_values(dtype):
    values = jnp.full((5000,), 100, dtype).at[::2].set(50)  # sums to 375,000: infinite in float16
    if dtype == jnp.int32:
        values = values * 20_000_000  # wraps around
    mean, spread, masked = nnx.metrics.Average(), nnx.metrics.Welford(), nnx.metrics.Average()
    mean.update(values=values), spread.update(values=values)
    masked.update(values=values, mask=jnp.ones(5000, jnp.bfloat16))  # a bfloat16 count stops at 256
    want = moments(np.asarray(values).astype(np.float64))
    assert_trees_close(mean.compute(), want["mean"])
    assert_trees_close(masked.compute(), want["mean"])
    assert int(masked.count[...]) == 5000
    assert_trees_close(values_of(spread), want)
    assert {v.dtype.name for _, v in nnx.to_flat_state(nnx.state((mean, spread)))} == {"float32", "int32"}


def test_welford_does_not_cancel():
    values = np.linspace(0, 1, 64, dtype=np.float32) + 1e4
    metric = nnx.metrics.Welford()
    for part in np.split(values, [1, 9, 30]):
        metric.update(values=part)
    error = abs(float(metric.compute().standard_deviation) - values.astype(np.float64).std())
    assert error < np.spacing(values.mean())  # a mean in float32 is no nearer than this
    naive = float(np.float32(values**2).mean(dtype=np.float32) - np.float32(values.mean()) ** 2)
    assert not 0.05 < naive < 0.12  # 0.088 is right: the one-pass formula loses it


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_masked_does_not_count_whatever_it_is(bad):
    values = jnp.where(MASK == 0, bad, BATCHES[0])
    kept = np.asarray(BATCHES[0])[np.asarray(MASK) == 1]
    metrics = nnx.MultiMetric(mean=nnx.metrics.Average(), spread=nnx.metrics.Welford())
    metrics.update(values=values, mask=MASK)
    assert_trees_close(values_of(metrics), {"mean": kept.mean(dtype=np.float64), "spread": moments(kept)})
    metrics.update(values=values, mask=jnp.zeros_like(MASK))  # nothing at all
    assert_trees_close(values_of(metrics), {"mean": kept.mean(dtype=np.float64), "spread": moments(kept)})


def test_nothing_but_masked_values_yet():
    metric = nnx.metrics.Welford()
    metric.update(values=jnp.ones(3), mask=jnp.zeros(3))
    metric.update(values=jnp.ones((0,)))
    assert_trees_equal(state_of(metric), state_of(nnx.metrics.Welford()))


@pytest.mark.parametrize("mask", [np.array([1, 0, 1, 1, 0]), np.array([[1], [0]]), np.array(1)], ids=str)
def test_a_mask_that_broadcasts_counts_every_value(mask):
    kept = np.asarray(BATCHES[0])[np.broadcast_to(np.asarray(mask), (2, 5)) == 1]
    metric = nnx.metrics.Average()
    metric.update(values=BATCHES[0], mask=mask)
    assert int(metric.count[...]) == kept.size
    assert_trees_close(metric.compute(), kept.mean(dtype=np.float64))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32])
def test_labels_of_every_integer_dtype(dtype):
    metric, want = nnx.metrics.Accuracy(), nnx.metrics.Accuracy()
    metric.update(logits=LOGITS[0], labels=LABELS[0].astype(dtype))
    want.update(logits=LOGITS[0], labels=LABELS[0])
    assert_trees_equal(metric.compute(), want.compute())


def test_plain_numbers_lists_and_numpy():
    metric = nnx.metrics.Average("loss")
    metric.update(loss=3, other="ignored")
    metric.update(loss=[1.0, 2.0])
    metric.update(loss=np.float64(6), mask=True)
    assert_trees_equal(metric.compute(), jnp.float32(3))
    accuracy = nnx.metrics.Accuracy(argname="unused", threshold=0.0)
    accuracy.update(logits=[1.0, -1.0], labels=np.array([True, True]))
    assert float(accuracy.compute()) == 0.5


# ---- errors ----


def test_arguments_that_are_missing_or_of_another_type():
    for metric in (nnx.metrics.Average("loss"), nnx.metrics.Welford("loss")):
        with pytest.raises(TypeError, match=r"Expected keyword argument 'loss', found \['values'\]"):
            metric.update(values=jnp.ones(2))
        with pytest.raises(ValueError, match=r"(?s)update\(loss=\.\.\.\).*real numbers.*complex64"):
            metric.update(loss=jnp.ones(2, jnp.complex64))
    for threshold in ("loss", True):
        with pytest.raises(TypeError, match=r"Expected threshold to be a float or None, got (str|bool)"):
            nnx.metrics.Accuracy(threshold)
    with pytest.raises(TypeError, match=r"MultiMetric\(a=\.\.\.\): Expected a Metric, found int"):
        nnx.MultiMetric(a=3)
    for name in ("update", "_metric_names"):
        with pytest.raises(TypeError, match=rf"'{name}' is taken by the class"):
            nnx.MultiMetric(**{name: nnx.metrics.Average()})
    with pytest.raises(TypeError, match=r"names among \['a'\], found \['b'\]"):
        nnx.MultiMetric(a=nnx.metrics.Average()).update(values=jnp.ones(2), mask={"b": jnp.ones(2)})


@pytest.mark.parametrize("mask", [ones(3), ones(2, 2, 5)], ids=str)
def test_masks_that_do_not_broadcast_to_the_values(mask):
    for metric in (nnx.metrics.Average(), nnx.metrics.Welford()):
        before = portrait(metric)
        with pytest.raises(ValueError, match=r"(?s)broadcasts to the values, of shape \(2, 5\).*found    shape \("):
            metric.update(values=BATCHES[0], mask=mask)
        assert portrait(metric) == before


def test_logits_and_labels_that_do_not_fit():
    plain, binary = nnx.metrics.Accuracy(), nnx.metrics.Accuracy(0.5)
    fit = {"logits": LOGITS[0], "labels": LABELS[0]}
    for metric, change in (
        (plain, {"logits": LOGITS[0][:, 0]}),
        (plain, {"logits": LOGITS[0][None]}),
        (plain, {"logits": jnp.float32(1), "labels": jnp.int32(1)}),
        (plain, {"labels": LABELS[0][:1]}),  # would broadcast
        (plain, {"labels": jnp.ones((6, 4), int)}),
        (binary, {}),
    ):
        with pytest.raises(ValueError, match=r"(?s)Accuracy\.update\(logits=\.\.\.\).*labels of shape.*found    shape"):
            metric.update(**{**fit, **change})
    with pytest.raises(ValueError, match=r"(?s)integer labels.*found    float32.*argmax"):
        plain.update(logits=LOGITS[0], labels=LABELS[0].astype(jnp.float32))


class Empty(nnx.Metric):
    def __init__(self):
        pass


def test_a_subclass_has_to_have_every_method():
    with pytest.raises(NotImplementedError, match=r"Metric: Must override `__init__\(\)` method"):
        nnx.Metric()
    for method in ("reset", "update", "compute"):
        with pytest.raises(NotImplementedError, match=rf"Empty: Must override `{method}\(\)` method"):
            getattr(Empty(), method)()
    with pytest.raises(NotImplementedError, match=r"Empty: Must override `combine\(\)`.*cannot be merged"):
        all_reduce(Empty(), "i")


# ---- several metrics into one ----


def of(make, batches):
    metric = make(nnx)
    for batch in batches:
        metric.update(**batch)
    return metric


def sharded(n):
    """The batches, cut into n shards of whole rows: 6 rows of logits and labels, 6 rows of values."""
    values = jnp.concatenate(BATCHES)
    whole = {"values": values, "logits": LOGITS[0], "labels": LABELS[0]}
    return whole, jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), whole)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_merged_metrics_are_the_metric_of_all(make):
    whole = of(make, BATCH_OF)
    first, *others = [of(make, [batch]) for batch in BATCH_OF]
    before = portrait(others)
    variables = [v for _, v in nnx.to_flat_state(nnx.state(first))]
    merge(first, *others, make(nnx))  # the last saw nothing
    assert_trees_close(state_of(first), state_of(whole))
    assert portrait(others) == before
    assert all(a is b for a, (_, b) in zip(variables, nnx.to_flat_state(nnx.state(first)), strict=True))
    empty = make(nnx)
    merge(empty, make(nnx))
    assert_trees_equal(state_of(empty), state_of(make(nnx)))


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("axis", [0, -1])
def test_a_vmapped_metric_reduces_to_that_of_all(make, axis):
    whole, parts = sharded(3)
    metric = nnx.vmap(lambda batch: of(make, [batch]))(parts)
    reduce(metric, axis)
    assert_trees_close(state_of(metric), state_of(of(make, [whole])))


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("transform", ["vmap", "nnx.vmap", "shard_map"])
def test_all_reduce_makes_it_that_of_all_devices(make, transform):
    whole, parts = sharded(2)
    running = of(make, BATCH_OF[:1])
    want = of(make, [BATCH_OF[0], whole])

    def step(running, batch):
        metric = of(make, [batch])
        all_reduce(metric, "devices")
        merge(running, metric)
        return running

    if transform == "shard_map":
        if jax.device_count() < 2:
            pytest.skip("needs two devices")
        mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
        # out_specs P() says, and shard_map checks, that all devices agree
        mapped = nnx.shard_map(step, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
        assert nnx.jit(mapped)(running, whole) is running
        assert_trees_close(state_of(running), state_of(want))
        return
    if transform == "vmap":
        graphdef, state = nnx.split(running)
        out = jax.vmap(lambda b: nnx.state(step(nnx.merge(graphdef, state), b)), axis_name="devices")(parts)
    else:
        out = nnx.state(nnx.vmap(lambda b: step(nnx.clone(running), b), axis_name="devices")(parts))
    for i in range(2):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], nnx.to_pure_dict(out)), state_of(want))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_sharded_arrays_under_jit_need_no_merging():
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    whole, _ = sharded(2)
    make = METRICS["MultiMetric"]
    metric = make(nnx)
    nnx.jit(lambda m, batch: m.update(**batch))(metric, jax.device_put(whole, sharding))
    assert_trees_close(state_of(metric), state_of(of(make, [whole])))


def test_metrics_that_do_not_merge():
    with pytest.raises(TypeError, match=r"(?s)metric of the structure of\nAverage.*'a'.*found\nAverage.*'b'"):
        merge(nnx.metrics.Average("a"), nnx.metrics.Average("b"))
    with pytest.raises(TypeError, match=r"(?s)found\n3"):
        merge(nnx.metrics.Average(), 3)
    metric = nnx.metrics.Average()
    with pytest.raises(TypeError, match=r"an axis 0, found one of shape \(\).*all_reduce"):
        reduce(metric)
    assert_trees_equal(state_of(metric), state_of(nnx.metrics.Average()))


class Total(nnx.Metric):
    """A metric of the user's own."""

    def __init__(self):
        self.total = MetricState(jnp.float32(0))

    def update(self, *, values, **_):
        self.total[...] += values.sum()

    def combine(self, total):
        self.total[...] = total(self.total[...])


def test_a_metric_of_ones_own_merges_too():
    a, b = Total(), Total()
    a.update(values=jnp.ones(3)), b.update(values=jnp.ones(4))
    both = nnx.MultiMetric(t=a)
    merge(both, nnx.MultiMetric(t=b))
    assert float(a.total[...]) == 7.0


# ---- as objects ----


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_it_is_copied_saved_and_split(make):
    metric = of(make, BATCH_OF[:2])
    graphdef, state, rest = metric.split(MetricState, ...)
    assert not rest
    for twin in (nnx.clone(metric), nnx.merge(graphdef, state), jax.tree.map(lambda x: x, metric)):
        assert_trees_equal(state_of(twin), state_of(metric))
        twin.reset()
    fresh = make(nnx)
    nnx.update(fresh, nnx.state(metric), strict=True)
    fresh.update(**BATCH_OF[2]), metric.update(**BATCH_OF[2])
    assert_trees_equal(values_of(fresh), values_of(metric))


def test_a_compiled_update_is_traced_once():
    traces = []

    @nnx.jit
    def update(metric, batch):
        traces.append(1)
        metric.update(**batch)
        return metric.compute()

    metric = METRICS["MultiMetric"](nnx)
    for batch in (*BATCH_OF, *BATCH_OF):
        out = update(metric, batch)
    metric.reset()
    update(metric, BATCH_OF[0])
    assert len(traces) == 1
    assert isinstance(out["parts"]["spread"], nnx.metrics.Statistics)


def test_statistics_are_a_frozen_pytree():
    statistics = nnx.metrics.Statistics(1.0, 2.0, 3.0)
    assert jax.tree.map(lambda x: 2 * x, statistics) == nnx.metrics.Statistics(2.0, 4.0, 6.0)
    assert statistics.replace(mean=5.0).mean == 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.mean = 4.0
