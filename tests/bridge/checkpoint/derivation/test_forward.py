"""Both models on the same random values: layers of one shape that were swapped are found, and said before they are."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge._errors import VariablesMismatchError
from bridge.checkpoint.derivation.derive import UnprovenDerivationError, Unsure, UnsureDerivationWarning, derive
from bridge.checkpoint.derivation.forward import ForwardMismatchError, RandomCallError, compare_forward
from bridge.checkpoint.rules.apply import Rule, Rules
from bridge.tracing.data_flow import DataFlow
from bridge.tracing.pure_call import linen_call
from bridge.tracing.trace import trace_linen
from tests.support.derive_cases import Chain, NestedCalls, X, located
from tests.tolerance import assert_trees_equal


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.Dense(4)(x)
        b = nn.Dense(4)(x)
        return self.join(a, b)

    def join(self, a, b):
        return a - b


class NnxBranches(nnx.Module):
    def __init__(self, rngs):
        self.left, self.right = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        a = self.left(x)
        return self.join(a, self.right(x))

    def join(self, a, b):
        return a - b


class NnxSwapped(NnxBranches):
    """The same function, but the other branch is called first."""

    def __call__(self, x):
        b = self.right(x)
        return self.left(x) - b


UNSURE = Unsure(("Dense_0", "Dense_1"), ("left", "right"))


def quietly(*args, **kwargs):
    """What is derived without a check; that something is unsure is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsureDerivationWarning)
        return derive(*args, check=False, **kwargs)


# ---- derive --------------------------------------------------------------------------------------------------


def test_branches_in_the_other_order_are_found():
    found = derive(Branches(), NnxSwapped, X)
    assert dict(map(reversed, found.pairs()))["params", "left", "kernel"] == ("params", "Dense_0", "kernel")
    assert compare_forward(Branches(), NnxSwapped, found, X).bit_equal
    derived = derive(Branches(), NnxSwapped, X, rename={"Dense_0": "left"}, check=True)
    assert derived.unsure == ()


def test_branches_in_the_same_order_pass_and_are_sure_then():
    derived = derive(Branches(), NnxBranches, jax.ShapeDtypeStruct((2, 4), "float32"))
    assert derived.unsure == ()
    assert str(derived) == str(derive(Branches(), NnxBranches, X))


def test_what_is_not_checked_is_said():
    with pytest.warns(UnsureDerivationWarning, match=r"(?s)Dense_0, Dense_1 -> left, right.*check=False.*rename="):
        derived = derive(Branches(), NnxBranches, X, check=False)
    assert derived.unsure == derived.inverse().unsure == (UNSURE,)
    assert str(derived).endswith(
        "Dense_0, Dense_1 -> left, right: paired by call order alone: check with compare_forward\n"
        "not proven: check=False"
    )


def test_a_large_model_is_not_run(monkeypatch):
    monkeypatch.setitem(derive.__globals__, "_MOST_BYTES", 2**20 - 1)
    derive(Branches(), NnxBranches, X)
    monkeypatch.setitem(derive.__globals__, "_MOST_BYTES", 159)  # two layers of 20 numbers
    with pytest.raises(UnprovenDerivationError, match=r"(?s)were not compared.*more than 0 MiB.*unproven=True"):
        derive(Branches(), NnxSwapped, X)
    with pytest.warns(UnsureDerivationWarning, match="more than 0 MiB"):
        assert "more than 0 MiB" in derive(Branches(), NnxSwapped, X, unproven=True).unproven
    assert derive(Branches(), NnxSwapped, X, check=True).unproven == ""


class Sum(Branches):
    def join(self, a, b):
        return a + b


class NnxSum(NnxBranches):
    def join(self, a, b):
        return a + b


def test_a_swap_that_no_output_shows_stays_unsure():
    with pytest.raises(UnprovenDerivationError, match=r"(?s)as good either way.*rename=\{'Dense_0': 'left'\}"):
        derive(Sum(), NnxSum, X)
    with pytest.warns(UnsureDerivationWarning, match="the outputs are as good either way"):
        assert derive(Sum(), NnxSum, X, unproven=True).unsure == (UNSURE,)
    assert derive(Sum(), NnxSum, X, rename={"Dense_0": "left"}).unproven == ""


class Faint(Branches):
    def join(self, a, b):
        return a + b + 1e-7 * a


class NnxFaint(NnxSum):
    def join(self, a, b):
        return a + b + 1e-7 * a


def test_a_swap_that_costs_no_more_than_rounding_is_not_told_from_none():
    """A sum of three in another order is off by as much."""
    other = type("Other", (NnxFaint,), {"join": lambda self, a, b: NnxFaint.join(self, b, a)})
    for make in (NnxFaint, other):
        with pytest.raises(UnprovenDerivationError, match="as good either way"):
            derive(Faint(), make, X)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(4, name=name)(x) for name in ("query", "key", "value"))
        return nn.softmax(q @ k.mT) @ v


class NnxAttention(nnx.Module):
    names = ("query", "key", "value")

    def __init__(self, rngs):
        for name in self.names:
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x):
        q, k, v = (getattr(self, name)(x) for name in self.names)
        return nnx.softmax(q @ k.mT) @ v


class NnxShortNames(NnxAttention):
    names = ("q", "k", "v")


@pytest.fixture
def nothing_runs(monkeypatch):
    """Any warning is an error, and so is a check."""

    def bench(*args):
        raise AssertionError("a model was run")

    monkeypatch.setitem(derive.__globals__, "Bench", bench)


@pytest.mark.usefixtures("nothing_runs")
def test_names_that_agree_leave_no_doubt():
    assert derive(Attention(), NnxAttention, X, check=False).unsure == ()


def test_names_that_do_not_agree_say_nothing():
    derived = quietly(Attention(), NnxShortNames, X)
    assert derived.unsure == (Unsure(("query", "key", "value"), ("q", "k", "v")),)
    assert derive(Attention(), NnxShortNames, X).unsure == ()


class Numbered(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head_0")(x) - nn.Dense(4, name="head_1")(x)


class NnxNumbered(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.head[0](x) - self.head[1](x)


class NnxOtherNumbers(NnxNumbered):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.tops, self.head = self.head, None

    def __call__(self, x):
        return self.tops[0](x) - self.tops[1](x)


def test_numbers_are_names_behind_the_same_word():
    assert quietly(Numbered(), NnxNumbered, X).unsure == ()
    assert quietly(Numbered(), NnxOtherNumbers, X).unsure == (Unsure(("head_0", "head_1"), ("tops/0", "tops/1")),)


@pytest.mark.usefixtures("nothing_runs")
def test_a_chain_is_in_the_order_of_its_data():
    assert derive(NestedCalls(), Chain, X, check=False).unsure == ()


def test_what_is_dropped_or_fresh_is_not_compared():
    class More(nnx.Module):
        def __init__(self, rngs):
            self.branches, self.head = NnxBranches(rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.branches(x))

    with pytest.raises(UnprovenDerivationError, match=r"dropped or fresh(?s:.*)found:\n.*float32\[2, 5, 2\]"):
        derive(Branches(), More, X, fresh=["head"])
    with pytest.warns(UnsureDerivationWarning, match="dropped or fresh"):
        derived = derive(Branches(), More, X, fresh=["head"], unproven=True)
    assert derived.unsure == (Unsure(("Dense_0", "Dense_1"), ("branches/left", "branches/right")),)
    with pytest.raises(ForwardMismatchError, match=r"expected: float32\[2, 5, 4\]\n  found: float32\[2, 5, 2\]"):
        compare_forward(Branches(), More, derived, X)


class Noisy(Branches):
    def join(self, a, b):
        return nn.Dropout(0.5, deterministic=False)(a - b)


class NnxNoisy(NnxBranches):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def join(self, a, b):
        return self.dropout(a - b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("linen", "make", "which"), [(Noisy, NnxNoisy, "Linen"), (Branches, NnxNoisy, "NNX")], ids=["both", "nnx"]
)
def test_calls_that_draw_random_numbers(linen, make, which):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(UnprovenDerivationError, match=f"the call of the {which} model draws"):
        derive(linen(), make, X, rngs=rngs)
    with pytest.warns(UnsureDerivationWarning, match=f"not confirmed: .*the call of the {which} model draws"):
        derived = derive(linen(), make, X, rngs=rngs, unproven=True)
    with pytest.raises(RandomCallError, match="deterministic=True"):
        derive(linen(), make, X, rngs=rngs, check=True)
    with pytest.raises(RandomCallError):
        compare_forward(linen(), lambda rngs: make(nnx.Rngs(3)), derived, X, rngs=rngs)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_model_with_streams_that_are_not_used(impl):
    def make(rngs):
        return NnxNoisy(nnx.Rngs(jax.random.key(0, impl=impl)))

    methods = ("__call__", lambda model, x: nnx.view(model, deterministic=True)(x))
    assert derive(Branches(), make, X, method=methods).unsure == ()


class Rounds(nn.Module):
    """Branches, and then a layer like them, round for round."""

    reverse: bool = False

    @nn.compact
    def __call__(self, x):
        class Round(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(4)(nn.LayerNorm()(x)) + nn.LayerNorm()(x)), None

        stack = nn.scan(Round, variable_axes={"params": 0}, split_rngs={"params": True}, reverse=self.reverse, length=3)
        return stack()(x, None)[0]


class NnxRound(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.other = nnx.LayerNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.fc(self.norm(x)) + self.other(x))


class NnxRounds(nnx.Module):
    def __init__(self, rngs):
        self.rounds = nnx.List([NnxRound(rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.rounds:
            x = layer(x)
        return x


@pytest.mark.slow
def test_stacks_are_in_the_order_of_their_rounds():
    derived = quietly(Rounds(), NnxRounds, X)
    norms = ("ScanRound_0/LayerNorm_0", "ScanRound_0/LayerNorm_1")
    assert derived.unsure == tuple(
        Unsure(tuple(f"{norm}[{n}]" for norm in norms), (f"rounds/{n}/norm", f"rounds/{n}/other")) for n in range(3)
    )
    assert derive(Rounds(), NnxRounds, X).unsure == ()


@pytest.mark.slow
def test_a_stack_that_runs_backwards_is_found():
    derived = derive(Rounds(reverse=True), NnxRounds, X)
    pairs = {linen: nnx for linen, nnx, _ in derived.table()}
    assert pairs["params/ScanRound_0/Dense_0/kernel[0]"] == "params/rounds/2/fc/kernel"
    assert pairs["params/ScanRound_0/Dense_0/kernel[2]"] == "params/rounds/0/fc/kernel"
    assert compare_forward(Rounds(reverse=True), NnxRounds, derived, X).worst <= 1


# ---- compare_forward -----------------------------------------------------------------------------------------


def rename(**names):
    return Rules.from_rename(names)


def test_written_rules():
    report = compare_forward(Branches(), NnxBranches, rename(Dense_0="left", Dense_1="right"), X)
    assert report.bit_equal
    assert report.differences == {"": 0.0}
    with pytest.raises(ForwardMismatchError, match=r"(?s)output: .*at most.*one of.*may be swapped") as error:
        compare_forward(Branches(), NnxBranches, rename(Dense_1="left", Dense_0="right"), X)
    assert error.value.difference > 100 * error.value.tolerance > 0
    with pytest.raises(VariablesMismatchError, match=r"(?s)unexpected.*params/middle/bias"):
        compare_forward(Branches(), NnxBranches, rename(Dense_0="middle", Dense_1="right"), X)
    transposed = Rules([Rule("params/Dense_0/bias", "params/left/kernel")])
    with pytest.raises(VariablesMismatchError, match=r"wrong shape"):
        compare_forward(Branches(), NnxBranches, transposed, X)


def test_the_way_back_and_a_model_that_is_there():
    model = NnxSwapped(nnx.Rngs(0))
    before = {at: x.get_value() for at, x in located(model).items()}
    derived = derive(Branches(), model, X, rename={"Dense_0": "left"})
    assert compare_forward(Branches(), model, derived.inverse(), X).bit_equal
    assert_trees_equal({at: x.get_value() for at, x in located(model).items()}, before)


class Outputs(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, *, flag):
        x = nn.Embed(5, 4, name="embed", dtype=self.dtype)(tokens)
        x = nn.BatchNorm(use_running_average=flag, name="norm", dtype=self.dtype)(x)
        gain = self.param("gain", nn.initializers.constant(1e-6), (4,))
        self.sow("intermediates", "x", x)
        x = x + gain.astype(self.dtype) * nn.tanh(x)
        return {"ids": jnp.argmax(x, -1), "x": x, "z": x[..., 0] + 1j * x[..., 1].astype(jnp.float32)}


class NnxOutputs(nnx.Module):
    change = staticmethod(lambda x: x)

    def __init__(self, dtype, rngs):
        self.embed = nnx.Embed(5, 4, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, dtype=dtype, rngs=rngs)
        self.gain, self.dtype = nnx.Param(jnp.ones(4)), dtype

    def __call__(self, tokens, *, flag):
        x = self.norm(self.embed(tokens), use_running_average=flag)
        x = self.change(x + self.gain.astype(self.dtype) * nnx.tanh(x))
        return {"ids": jnp.argmax(x, -1), "x": x, "z": x[..., 0] + 1j * x[..., 1].astype(jnp.float32)}


TOKENS = jax.ShapeDtypeStruct((3, 7), "int32")


def compare_outputs(change, dtype=jnp.float32, flag=True):
    kind = type("NnxChanged", (NnxOutputs,), {"change": staticmethod(change)})
    return compare_forward(Outputs(dtype), lambda rngs: kind(dtype, rngs), rename(), TOKENS, flag=flag)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_outputs_of_many_kinds(dtype, flag):
    eps = jnp.array(jnp.finfo(dtype).eps, dtype)
    report = compare_outputs(lambda x: x * (1 + eps), dtype, flag)
    assert list(report.differences) == ["['ids']", "['x']", "['z']"]
    assert not report.bit_equal
    assert report.differences["['ids']"] == report.tolerances["['ids']"] == 0
    assert 0 < report.differences["['x']"] < report.tolerances["['x']"]
    assert 0 < report.differences["['z']"] < report.tolerances["['z']"]  # complex64, of numbers of `dtype`
    assert "output['x']: " in str(report)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x * 1.001, r"output\['[xz]'\]: .*\n  expected: a difference of at most .*\n  found: one of 0\.00"),
        (lambda x: x.at[0, 0, 3].set(jnp.nan), r"output\['x'\]: .*\n.*\n  found: one of inf"),
        (lambda x: x[..., ::-1], "output"),
        (lambda x: x[:2], r"found: int32\[2, 7\], float32\[2, 7, 4\], complex64\[2, 7\]"),
    ],
    ids=["a little", "nan", "mirrored", "shape"],
)
def test_outputs_that_differ(change, text):
    with pytest.raises(ForwardMismatchError, match=text):
        compare_outputs(change)


@pytest.mark.parametrize(
    ("result", "text"), [(lambda x: x / 0, "none: nothing can be compared"), (lambda x: None, "found: nothing")]
)
def test_outputs_that_say_nothing(result, text):
    methods = (lambda m, x: result(m(x)), lambda m, x: result(m(x)))
    with pytest.raises(ForwardMismatchError, match=text):
        compare_forward(Branches(), NnxBranches, rename(Dense_0="left", Dense_1="right"), X * 0, method=methods)


class Scaled(nn.Module):
    """The branches count for nothing in a model as `init` makes it."""

    @nn.compact
    def __call__(self, x):
        zero = nn.initializers.zeros
        branches = nn.Dense(4, kernel_init=zero)(x) - nn.Dense(4, kernel_init=zero)(x)
        return x + self.param("scale", nn.initializers.constant(1e-6), (4,)) * branches


class NnxScaled(NnxSwapped):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.scale = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return x + self.scale * super().__call__(x)


def test_layers_that_init_switches_off():
    derived = derive(Scaled(), NnxScaled, X)
    assert (("params", "Dense_0", "kernel"), ("params", "left", "kernel")) in derived.pairs()


# ---- flow ----------------------------------------------------------------------------------------------------


def in_order(call):
    """Whether `one` is before `two`, and the other way round."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(nn.Dense(4, name="one"), nn.Dense(4, name="two"), x)

    args = (Model(), "__call__", None, (X,), {})
    units = {unit.path[0]: (unit, ()) for unit in trace_linen(*args)}
    flow = DataFlow([unit for unit, _ in units.values()], linen_call(*args), None, (X,), {})
    return flow.in_order(units["one"], units["two"]), flow.in_order(units["two"], units["one"])


def wrapped(inner):
    """`two` after `one`, `two` inside of something else; `one` lets no variable be made inside."""

    def call(one, two, x):
        y, _ = one(x), two(x)
        kernel = two.variables["params"]["kernel"]
        return inner(kernel, y)

    return call


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda one, two, x: two(nn.tanh(one(x))), (True, False)),
        (lambda one, two, x: x + one(two(x)), (False, True)),
        (lambda one, two, x: one(x) - two(x), (False, False)),
        (lambda one, two, x: two(one(two(x))), (False, False)),
        (lambda one, two, x: one(jnp.ones(4)) + two(one(x)), (False, False)),
        (lambda one, two, x: two(jax.lax.stop_gradient(one(x))), (True, False)),
        (wrapped(jax.jit(lambda kernel, y: y @ kernel)), (True, False)),
        (wrapped(jax.checkpoint(lambda kernel, y: y @ kernel)), (True, False)),
        (wrapped(lambda kernel, y: jax.lax.scan(lambda c, _: (c @ kernel, c), y, None, 2)[0]), (True, False)),
        (wrapped(lambda kernel, y: jax.lax.fori_loop(0, jnp.int32(2), lambda _, c: c @ kernel, y)), (True, False)),
        (wrapped(lambda kernel, y: jax.lax.cond(True, lambda k, y: y @ k, lambda k, y: y, kernel, y)), (True, False)),
        (lambda one, two, x: jax.lax.map(lambda x: x, (one(x), two(x))), (False, False)),
    ],
    ids=[
        "chain",
        "back",
        "beside",
        "shared",
        "constant",
        "no gradient",
        *("jit", "remat", "scan", "while", "cond"),
        "map",
    ],
)
def test_the_order_of_the_data(call, expected):
    assert in_order(call) == expected


def test_kernels_that_meet_in_what_cannot_be_followed_are_in_no_order():
    def call(one, two, x):
        one(x), two(x)
        a, b = (layer.variables["params"]["kernel"] for layer in (one, two))
        return jax.lax.cond(x[0, 0, 0] > 0, lambda: x @ a @ b, lambda: x @ b @ a)

    assert in_order(call) == (False, False)
