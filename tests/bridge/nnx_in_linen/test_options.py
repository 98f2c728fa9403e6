"""ToLinen: what may be kept, set from outside and changed before state is loaded. `row N` is of REQUIREMENTS.md."""

import copy
import functools
import pickle

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import nnx_core as nnx
from bridge import NNXMeta, ToNNX
from bridge.nnx_in_linen._errors import KeptGraphDefError, NotAnNnxModuleError
from bridge.nnx_in_linen.structure import Keywords
from bridge.nnx_in_linen.wrapper import ToLinen, to_linen, to_linen_class
from tests.support.to_linen_models import DROPOUT, KEY, Net, X, primitives
from tests.tolerance import assert_trees_equal

STATS = ["batch_stats"]

# ---- row 65: the structure in the variables ----


class Steps(nnx.Module):
    """Has static state: how often it ran, and with what."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.steps, self.last = 0, "none"

    def __call__(self, x, name="call"):
        self.steps, self.last = self.steps + 1, name
        self.sow(nnx.Intermediate, "h", x)
        return self.linear(x) * self.steps


def test_row_65_static_state_survives_apply():
    model = ToLinen(Steps, keep_graphdef=True)
    variables = model.init(KEY, X)
    assert isinstance(variables["nnx"]["graphdef"], nnx.GraphDef)
    assert jax.tree.leaves(variables["nnx"]) == []
    y = model.apply(variables, X)
    for step in (1, 2, 3):
        out, updates = model.apply(variables, X, name=f"step {step}", mutable=["nnx", "intermediates"])
        variables = {**variables, "nnx": updates["nnx"]}
        assert_trees_equal(out, y * step)
        assert_trees_equal(updates["intermediates"], {"h": (X,)})  # and popped: the structure has no place for it
    module = nnx.merge(updates["nnx"]["graphdef"], nnx.state(Steps(rngs=nnx.Rngs(0))))
    assert (module.steps, module.last, hasattr(module, "h")) == (3, "step 3", False)
    assert_trees_equal(model.apply(freeze(variables), X), y * 4)  # "nnx" is immutable: nothing is kept
    assert_trees_equal(to_linen(Steps).apply({"params": variables["params"]}, X), y)
    assert set(to_linen(Steps).init(KEY, X)) == {"params"}


def test_row_65_the_kept_structure_is_static_under_transforms():
    model = ToLinen(Steps, keep_graphdef=True)
    variables = model.init(KEY, X)
    traces = []

    @jax.jit
    def step(variables):
        traces.append(1)
        y, updates = model.apply(variables, X, mutable=["nnx"])
        return y, {**variables, **updates}

    for count in (1, 2, 2):
        y, after = step(variables)
        assert_trees_equal(y, jax.jit(lambda v, n: model.apply(v, X) * n)({"params": variables["params"]}, count))
        variables = after if count == 1 else variables
    assert len(traces) == 2  # one for each structure
    stacked = nn.vmap(
        to_linen_class(Steps), variable_axes={"params": 0, "nnx": None}, split_rngs={"params": True}, axis_size=2
    )(keep_graphdef=True)
    variables = stacked.init(KEY, jnp.stack([X, X]))
    assert variables["nnx"]["graphdef"] == model.init(KEY, X)["nnx"]["graphdef"]
    assert stacked.apply(variables, jnp.stack([X, X])).shape == (2, 8, 3)


def test_row_65_the_kept_structure_may_be_another_one():
    model = ToLinen(Net, (3, 1), keep_graphdef=True)
    variables = model.init(KEY, X)
    module = nnx.eval_shape(lambda: Net(3, 1, rngs=nnx.Rngs(0)))
    module.eval()
    module.head = nnx.data(None)
    del module.head
    kept = {**variables, "nnx": {"graphdef": nnx.graphdef(module)}}
    del kept["params"]["head"]
    y = model.apply(kept, X, method="features", rngs=DROPOUT)
    expected = (
        to_linen(Net, 3, 1)
        .eval()
        .apply({"params": model.init(KEY, X)["params"], "batch_stats": variables["batch_stats"]}, X, method="features")
    )
    assert_trees_equal(y, expected)


def test_row_65_variables_without_a_structure_have_the_constructors():
    model = ToLinen(Net, (3, 1), keep_graphdef=True)
    variables = model.init(KEY, X)
    without = {name: tree for name, tree in variables.items() if name != "nnx"}
    assert_trees_equal(model.eval().apply(without, X), model.eval().apply(variables, X))
    updates = model.apply(without, X, mutable=["nnx", "batch_stats"])[1]
    assert updates["nnx"]["graphdef"] == variables["nnx"]["graphdef"]


def test_something_else_in_the_place_of_the_structure():
    model = ToLinen(Steps, keep_graphdef=True)
    params = model.init(KEY, X)["params"]
    with pytest.raises(KeptGraphDefError, match=r"(?s)ToLinen\(Steps\).*expected: an nnx_core.GraphDef.*found: dict"):
        model.apply({"params": params, "nnx": {"graphdef": {}}}, X)
    with pytest.raises(KeptGraphDefError, match="found: ndarray"):
        model.apply({"params": params, "nnx": {"graphdef": np.ones(2)}}, X)


def test_what_a_kept_structure_wants_has_to_be_there():
    class Late(nnx.Module):
        def __call__(self, x):
            if not hasattr(self, "cache"):
                self.cache = nnx.Cache(x * 0)
            self.cache[...] += x
            return self.cache[...]

    model = ToLinen(Late, keep_graphdef=True)
    _, variables = model.apply({}, X, mutable=["nnx", "cache"])
    assert_trees_equal(model.apply(variables, X, mutable=["cache"])[0], X + X)
    for mutable in (False, ["cache"]):
        with pytest.raises(flax.errors.ScopeCollectionNotFound, match='"cache" from collection "cache"'):
            model.apply({"nnx": variables["nnx"]}, X, mutable=mutable)


# ---- row 65: random streams with state ----


class Noisy(nnx.Module):
    def __init__(self, *, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = rngs.fork()

    def __call__(self, x):
        return self.dropout(x), self.rngs.noise()


def test_row_65_rng_state_survives_apply_on_request():
    model = ToLinen(nnx.Dropout, (0.5,), keep_rngs=True, metadata_fn=None)
    variables = model.init(KEY, X)
    assert jax.tree.map(jnp.shape, variables) == {"RngKey": {"rngs": {"key": ()}}, "RngCount": {"rngs": {"count": ()}}}
    first, updates = model.apply(variables, X, mutable=["RngCount"])  # no rngs needed
    assert int(updates["RngCount"]["rngs"]["count"]) == 1
    again, _ = model.apply(variables, X, mutable=["RngCount"])
    second, _ = model.apply({**variables, **updates}, X, mutable=["RngCount"])
    assert_trees_equal(first, again)
    assert not (first == second).all()
    native = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    native.rngs.key.set_value(variables["RngKey"]["rngs"]["key"])
    assert_trees_equal([first, second], [native(X), native(X)])
    with pytest.raises(flax.errors.ModifyScopeVariableError, match='"count" in "/rngs" because collection "RngCount"'):
        model.apply(variables, X)


def test_row_65_streams_are_reseeded_by_tag():
    model = ToLinen(nnx.Dropout, (0.5,), keep_rngs=True)
    variables = model.init(KEY, X)
    y = model.apply(variables, X, rngs=DROPOUT)  # Linen's key: nothing is written, so nothing needs to be mutable
    assert_trees_equal(y, to_linen(nnx.Dropout, 0.5).apply({}, X, rngs=DROPOUT))
    _, updates = model.apply(variables, X, rngs=DROPOUT, mutable=True)
    assert_trees_equal(updates, variables)
    other = model.apply(variables, X, rngs={"noise": KEY}, mutable=["RngCount"])[0]
    assert_trees_equal(other, model.apply(variables, X, mutable=["RngCount"])[0])


def test_row_65_every_stream_of_a_model_is_kept():
    model = ToLinen(Noisy, keep_rngs=True, metadata_fn=None)
    variables = model.init(KEY, X)
    assert set(variables["RngKey"]) == {"dropout", "rngs"}
    assert set(variables["RngKey"]["rngs"]) == {"default", "dropout", "params"}  # those that the constructor had
    with pytest.raises(flax.errors.InvalidRngError, match=r'needs PRNG for "(params|dropout|default)"'):
        model.init({"noise": KEY}, X)
    run = jax.jit(lambda v: model.apply(v, X, mutable=["RngCount"]))
    (y, noise), updates = run(variables)
    assert_trees_equal(noise, jax.random.fold_in(variables["RngKey"]["rngs"]["default"]["key"], 0))
    assert not (run({**variables, **updates})[0][0] == y).all()
    given = {"dropout": KEY, "noise": jax.random.key(5)}  # Linen's, though init knew none of that name
    (_, first), (_, second) = (model.apply(variables, X, rngs=given) for _ in range(2))
    assert_trees_equal(first, second)
    assert not (jax.random.key_data(first) == jax.random.key_data(noise)).all()


# ---- row 65: modes from outside, wrappers as arguments, every method ----


def test_row_65_train_and_eval_from_outside():
    model = to_linen(Net, 3, 1, rate=0.5)
    variables = model.init(KEY, X)
    assert_trees_equal(model.eval().apply(variables, X), model.apply(variables, X, train=False))
    trained = model.eval().train().apply(variables, X, rngs=DROPOUT, mutable=STATS)
    assert_trees_equal(trained, model.apply(variables, X, rngs=DROPOUT, mutable=STATS))
    assert (model.nnx_modes, model.eval() == model.eval(), hash(model.eval()) == hash(model.eval())) == ((), True, True)
    assert model.eval().eval() == model.train().eval() == model.eval()
    assert model.eval() != model
    without = model.set_attributes(rate=0.0).train()
    assert_trees_equal(
        without.apply(variables, X, mutable=STATS), to_linen(Net, 3, 1).apply(variables, X, mutable=STATS)
    )
    for change in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()):
        assert change(without) == without
    with pytest.raises(nnx.NnxError, match="nothing_like_this"):
        model.set_attributes(nothing_like_this=1).apply(variables, X)

    class Outer(nn.Module):
        def setup(self):
            self.inner = to_linen(Net, 3, 1, rate=0.5).eval()

        def __call__(self, x):
            return self.inner(x)

    nested = {name: {"inner": tree} for name, tree in variables.items()}
    assert_trees_equal(Outer().apply(nested, X), model.eval().apply(variables, X))


def test_row_65_a_mode_is_set_on_a_kept_structure_too():
    model = ToLinen(Net, (3, 1), {"rate": 0.5}, keep_graphdef=True)
    variables = model.init(KEY, X)
    plain = to_linen(Net, 3, 1, rate=0.5)
    rest = {name: tree for name, tree in variables.items() if name != "nnx"}
    assert_trees_equal(model.eval().apply(variables, X), plain.eval().apply(rest, X))


class Holds(nnx.Module):
    def __init__(self, inner, options=None, *, rngs):
        self.inner = inner if isinstance(inner, nnx.Module) else ToNNX(inner, rngs=rngs)
        self.scale = nnx.Param(jnp.full((), 2.0))

    def __call__(self, x):
        return self.inner(x) * self.scale

    def twice(self, x):
        return self(self(x))

    @staticmethod
    def helper(x):
        return x + 1

    @classmethod
    def title(cls):
        return cls.__name__


INNER = {
    "a Linen module": lambda: nn.Dense(3),
    "a ToLinen": lambda: to_linen(nnx.Linear, 3, 3),
    "a class made of an NNX class": lambda: to_linen_class(nnx.Linear)(3, 3),
    "a ToNNX": lambda: ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X),
    "an NNX module": lambda: nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("make", INNER.values(), ids=list(INNER))
def test_row_65_wrappers_as_constructor_arguments(make):
    inner = make()
    for model in (to_linen(Holds, inner), ToLinen(Holds, kwargs={"inner": inner, "options": [inner, {"a": inner}]})):
        y, variables = model.init_with_output(KEY, X)
        assert set(variables["params"]) == {"inner", "scale"}
        assert set(variables["params"]["inner"]) == {"kernel", "bias"}
        dense = nn.Dense(3).apply({"params": variables["params"]["inner"]}, X)
        assert_trees_equal((y, model.apply(variables, X)), (dense * 2, dense * 2))
        assert model == model.clone()

    class Outer(nn.Module):
        def setup(self):
            self.model = to_linen(Holds, inner)

        def __call__(self, x):
            return self.model(x)

    assert set(Outer().init(KEY, X)["params"]) == {"model"}


def test_row_65_every_method_of_the_class_is_there():
    for model in (to_linen(Holds, nn.Dense(3)), to_linen_class(Holds)(nn.Dense(3))):
        variables = model.init(KEY, X)
        y = model.apply(variables, X)
        assert_trees_equal(model.apply(variables, X, method="twice"), model.apply(variables, y))
        bound = model.bind(variables)
        assert_trees_equal((bound(X), bound.twice(X), bound.helper(X)), (y, model.apply(variables, y), X + 1))
        assert bound.title() == "Holds"
    cls = to_linen_class(Holds)
    lifted = nn.jit(cls, methods=["__call__", "twice"])(nn.Dense(3))
    assert_trees_equal(lifted.apply(variables, X, method="twice"), jax.jit(model.bind(variables).twice)(X))


# ---- row 62 ----


def with_lora(module, name, *, rank=2):
    module.head = nnx.LoRA(3, rank, 2, base_module=module.head, rngs=nnx.Rngs(0))
    module.title = name


def test_row_62_the_module_may_be_augmented_before_state_is_loaded():
    plain = to_linen(Net, 3, 1)
    model = ToLinen(Net, (3, 1), nnx_module_augment_fn=with_lora, name="net")
    variables = model.init(KEY, X)
    assert set(variables) == {"params", "LoRAParam", "batch_stats"}
    assert set(variables["params"]["head"]["base_module"]) == {"kernel", "bias"}
    titles = []
    model.apply(variables, X, nnx_method=lambda module, x: titles.append(module.title))
    assert titles == ["net"]
    base = plain.init(KEY, X)
    assert_trees_equal(variables["params"]["head"]["base_module"], base["params"]["head"])
    y = model.apply(variables, X, train=False)  # a fresh LoRA adds nothing
    assert_trees_equal(y, plain.apply(base, X, train=False))
    other = jax.tree.map(jnp.ones_like, variables["LoRAParam"])
    changed = model.apply({**variables, "LoRAParam": other}, X, train=False) != y
    reached = (y != 0).any(axis=1)  # relu lets nothing of some rows through to the head
    assert reached.sum() >= 7
    assert_trees_equal(changed.all(axis=1), reached)
    names = primitives(lambda v: model.apply(v, X, train=False), variables)
    assert not [name for name in names if "random" in name]  # the hook runs on shapes, too


def test_row_62_the_hook_may_return_another_module():
    def quantized(module, name):
        return nnx.Sequential(module, nnx.Linear(2, 5, rngs=nnx.Rngs(0)))

    model = to_linen(Net, 3, 1, nnx_module_augment_fn=quantized)
    variables = model.init(KEY, X)
    assert model.apply(variables, X, mutable=STATS)[0].shape == (8, 5)
    assert set(variables["params"]) == {"layers"}
    one, two = (model.clone(nnx_module_augment_fn=functools.partial(with_lora, rank=r)) for r in (1, 2))
    shapes = [m.init(KEY, X)["LoRAParam"]["head"]["lora_a"].shape for m in (one, two)]
    assert shapes == [(3, 1), (3, 2)]
    with pytest.raises(NotAnNnxModuleError, match=r"expected: an nnx_core\.Module"):
        to_linen(Net, 3, 1, nnx_module_augment_fn=lambda module, name: 3).init(KEY, X)


# ---- metadata_type, the older keyword ----


@pytest.mark.parametrize("kind", [NNXMeta, nn.Partitioned, nn.LogicallyPartitioned])
def test_metadata_type_says_the_class_of_the_boxes(kind):
    init = nnx.with_metadata(nnx.initializers.ones, out_sharding=("in", "out"))
    plain = to_linen(nnx.Linear, 3, 4, kernel_init=init, metadata_fn=None)
    for model in (
        to_linen(nnx.Linear, 3, 4, kernel_init=init, metadata_type=kind),
        to_linen_class(nnx.Linear, kernel_init=init)(3, 4, metadata_type=kind),
        ToLinen(nnx.Linear, (3, 4), {"kernel_init": init}, metadata_type=kind),
    ):
        variables = model.init(KEY, X)
        assert type(variables["params"]["kernel"]) is kind
        assert isinstance(variables["params"]["bias"], jax.Array)  # nothing to say
        assert tuple(nn.get_partition_spec(variables)["params"]["kernel"]) == ("in", "out")
        assert_trees_equal(model.apply(variables, X), plain.apply(nn.unbox(variables), X))


def test_an_argument_of_the_class_is_no_option_of_the_wrapper():
    class Takes(nnx.Module):
        def __init__(self, metadata_type, keep_rngs=1):
            self.seen = metadata_type, keep_rngs

        def __call__(self):
            return self.seen

    model = to_linen(Takes, metadata_type="mine", keep_rngs=3)
    assert model.apply({}) == ("mine", 3)
    assert isinstance(model.kwargs, Keywords)
    assert (model.metadata_type, model.keep_rngs) == (None, False)


# ---- a missing collection ----


@pytest.mark.parametrize("mutable", [["batch_stats"], True])
def test_a_missing_collection_asks_for_no_key_where_linen_asks_for_none(mutable):
    ours, theirs = to_linen(nnx.BatchNorm, 3), nn.BatchNorm(use_running_average=False)
    params = {"params": theirs.init(KEY, X)["params"]}
    results = [model.apply(params, X, mutable=mutable) for model in (ours, theirs)]
    assert_trees_equal(results[0][1]["batch_stats"], results[1][1]["batch_stats"])
    for model in (ours, theirs):
        with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "params"'):
            model.apply({}, X, mutable=True)


def test_a_missing_collection_that_needs_a_key_asks_for_it():
    class Codebook(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.codes = nnx.BatchStat(rngs.codes.normal((3,)))
            self.seen = nnx.BatchStat(jnp.zeros(3))

        def __call__(self, x):
            return self.linear(x) + self.codes

    model = to_linen(Codebook)
    variables = model.init({"params": KEY, "codes": KEY}, X)
    params = {"params": variables["params"]}
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "codes"'):
        model.apply(params, X, mutable=STATS)
    y, updates = model.apply(params, X, mutable=STATS, rngs={"codes": KEY})
    assert_trees_equal(updates["batch_stats"], variables["batch_stats"])
    stats = {"batch_stats": {"codes": variables["batch_stats"]["codes"]}}
    assert_trees_equal(model.apply({**params, **stats}, X, mutable=STATS)[0], y)  # only `seen` is missing
