"""`linen-nnx compare` as its users meet it: words in, tables or JSON, a page, and an exit code out."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import nnx_core as nnx
from bridge.cli import compare as command
from bridge.cli.words import parse_input
from tests.support import checkpoint_run

HERE = __name__
RUN = "tests.support.checkpoint_run"


class Dense(nn.Module):
    """Two layers and dropout between them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4, name="hidden")(x)))
        return nn.Dense(3, name="out")(nn.LayerNorm(name="norm")(x))

    def encode(self, x):
        return x


class Native(nnx.Module):
    """The same in NNX."""

    epsilon = 1e-6

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(4, epsilon=self.epsilon, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.dropout(nnx.relu(self.first(x)), deterministic=not train)
        return self.last(self.norm(x))


class Wrong(Native):
    """Nearly the same."""

    epsilon = 1e-1


class Deeper(Native):
    """With a layer more."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.more = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, train=False):
        return self.more(super().__call__(x, train))


class Tokens(nn.Module):
    """Of ids."""

    @nn.compact
    def __call__(self, ids):
        return nn.Embed(7, 3)(ids).sum(-2)


class NativeTokens(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.table = nnx.Embed(7, 3, rngs=rngs)

    def __call__(self, ids):
        return self.table(ids).sum(-2)


def twice(x):
    return 2 * x


def doubled(x):
    return x + x


def thrice(x):
    return 3 * x


def breaks(x):
    raise KeyError("not at all")


def leaves(x):
    sys.exit(0)


def talks(x):
    print("in a call", x.shape)
    return 2 * x


def infinite(x):
    return x / 0 + jnp.full(3, math.inf)


def shorter(x):
    return x[1:]


def tx():
    return optax.adam(1e-2)


TEXT = "no model"
PAIR = ("--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:Native", "--input", "f32[8,5]")
TRAINED = ("--steps", "3", "--tx", f"{HERE}:tx")
WRONG = ("--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:Wrong", "--input", "f32[8,5]")


def two(a, b, shape="f32[8,5]"):
    return ("--a", f"{HERE}:{a}", "--b", f"{HERE}:{b}", "--input", shape)


# ---- equal, not equal --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_streams_are_given_by_name(run):
    """Linen's keys are not those of a model in NNX; a ToNNX would draw the same."""
    words = ("compare", *PAIR, "--keyword", "train=True")
    code, _, err = run(*words)
    assert code == 1
    assert "(--rng)" in err
    code, out, _ = run(*words, "--rng", "dropout=0", "--seeds", "1")
    assert code == 3
    assert "they first part at Dropout_0" in out


@pytest.mark.slow
def test_equal_models_are_exit_code_0(run):
    code, out, err = run("compare", *PAIR)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("equal, ")
    for said in (
        "values: random ones near those that init makes, seed 0",
        "rules: derived from both models and proven on random numbers",
    ):
        assert said in lines
    assert any(line.split()[:1] == ["gradient"] for line in lines)
    assert any(line.startswith("compared: the sizes are those of the worst of each row") for line in lines)
    assert lines[-1].startswith("seeds 0, 1, cpu")


@pytest.mark.slow
def test_unequal_models_are_exit_code_3_and_it_and_the_page_say_where(run, tmp_path):
    file = tmp_path / "report.html"
    code, out, err = run("compare", *WRONG, "--html", file)
    assert (code, err) == (3, "")
    assert out.startswith("not equal: ")
    (place,) = [line for line in out.splitlines() if line.startswith("they first part at ")]
    assert place == "they first part at norm: computation"
    assert "rules: derived from both models; not proven: the models do not compute the same" in out
    row = next(line.split() for line in out.splitlines() if line.split()[1:2] == ["norm"])
    assert "wrong" in row
    assert any("fed wrong" in line for line in out.splitlines())
    assert f"page: {file}" in out
    text = file.read_text()
    assert "<svg" in text
    assert "norm: computation" in text


def test_quiet_is_the_verdict_alone(run):
    code, out, err = run("compare", *two("twice", "doubled"), "-q")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    code, out, err = run("compare", *two("twice", "thrice"), "--quiet")
    assert (code, err, len(out.splitlines())) == (3, "", 1)
    assert out.startswith("not equal: ")


@pytest.mark.slow
def test_json_is_one_document(run, tmp_path):
    code, out, err = run("compare", *WRONG, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, err, found["exit_code"], found["equal"], found["html"]) == (3, "", 3, False, None)
    assert (found["first"]["a"], found["first"]["cause"]) == ("norm", "computation")
    assert found["notes"][0] == "values: random ones near those that init makes, seed 0"
    assert {row["verdict"] for row in found["rows"]} >= {"equal", "wrong", "fed wrong"}
    code, out, _ = run("compare", *two("twice", "doubled"), "--json", "--html", tmp_path / "other.html")
    found = json.loads(out)
    assert (code, found["exit_code"], found["first"], found["html"]) == (0, 0, None, str(tmp_path / "other.html"))


def test_json_has_no_infinity(run):
    code, out, _ = run("compare", *two("twice", "shorter"), "--json")
    assert code == 3
    assert "inf" in {json.loads(out, parse_constant=pytest.fail)["findings"][0]["difference"]["absolute"]}


def test_a_page_that_is_there_stops_it_before_anything_runs(run, tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    file.write_text("mine")
    monkeypatch.setattr(command, "_compared", lambda *_: pytest.fail("the models ran"))
    code, _, err = run("compare", *PAIR, "--html", file)
    assert code == 2
    assert "nothing is ever written over" in " ".join(err.replace("│", " ").split())
    assert file.read_text() == "mine"
    code, _, err = run("compare", *PAIR, "--html", tmp_path / "absent" / "report.html")
    assert code == 2
    assert "a folder that exists" in " ".join(err.replace("│", " ").split())


def test_a_page_without_matplotlib_is_exit_code_1(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("compare", *PAIR, "--html", tmp_path / "report.html")
    assert code == 1
    assert "pip install 'linen-nnx-bridge[plot]'" in err


# ---- layers in another order ----


class InOrder(nn.Module):
    """One after the other."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="second")(nn.relu(nn.Dense(4, name="first")(x)))


class OutOfOrder(nnx.Module):
    """The other way round."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.first(nnx.relu(self.second(x)))


class Towers(nn.Module):
    """Side by side."""

    names = ("query", "document")

    @nn.compact
    def __call__(self, x):
        query, document = (nn.Dense(3, name=name)(x) for name in self.names)
        return query - 2 * document


class Unnamed(Towers):
    """With names that say nothing."""

    names = (None, None)


class OtherFirst(nnx.Module):
    """The same, the other one called first."""

    def __init__(self, rngs):
        self.query, self.document = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        document = self.document(x)
        return self.query(x) - 2 * document


def crossed(linen, nnx_class):
    return ("compare", "--linen", f"{HERE}:{linen}", "--nnx", f"{HERE}:{nnx_class}", "--input", "f32[2,4]")


def test_layers_called_in_another_order_are_a_verdict(run, tmp_path):
    page = tmp_path / "report.html"
    code, out, err = run(*crossed("InOrder", "OutOfOrder"), "--json", "--html", page)
    found = json.loads(out)
    assert (code, err, found["equal"], found["exit_code"]) == (3, "", False, 3)
    assert (found["first"]["a"], found["first"]["b"], found["first"]["cause"]) == ("first", "first", "order")
    assert {row["a"] for row in found["rows"]} == {"(root)", "first", "second"}
    notes = " ".join(found["notes"])
    assert "by names against the order of calls (first = first, second = second); not proven" in notes
    assert "only with layers exchanged, by the order of calls: first = second, second = first" in notes
    assert "only with layers exchanged, by the order of calls: first = second" in page.read_text()


def test_towers_called_in_another_order_are_paired_by_their_names(run):
    code, out, err = run(*crossed("Towers", "OtherFirst"))
    assert (code, err) == (0, "")
    expected = "by names against the order of calls (query = query, document = document) and proven on random numbers"
    assert f"rules: derived from both models, {expected}" in out.splitlines()


def test_a_pairing_that_only_exchanged_layers_prove_is_said(run):
    code, out, err = run(*crossed("Unnamed", "OtherFirst"))
    assert (code, err) == (0, "")
    assert "only with layers exchanged, against the order of calls: " in out
    assert "Dense_0 = query" in out


# ---- any two models ----------------------------------------------------------------------------------------


def test_functions_of_other_shapes(run):
    assert run("compare", *two("twice", "shorter"), "--quiet")[0] == 3


@pytest.mark.parametrize(
    ("a", "b", "code"),
    [
        ("Dense", "Native", 0),
        ("Native", "Dense", 0),
        ("Native", "Native", 0),
        ("Dense", "Dense", 0),
        ("Native", "Wrong", 3),
    ],
)
def test_any_two_models(a, b, code, run):
    assert run("compare", *two(a, b), "--quiet")[0] == code


@pytest.mark.slow
def test_ids_are_small(run):
    words = ("--linen", f"{HERE}:Tokens", "--nnx", f"{HERE}:NativeTokens", "--input", "i32[2,6]")
    assert run("compare", *words, "--quiet")[0] == 0


@pytest.mark.slow
def test_a_batch_file_is_an_input(run, tmp_path):
    np.savez(tmp_path / "batch.npz", np.random.default_rng(0).normal(size=(4, 5)).astype("float32"))
    words = ("--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:Native", "--input", tmp_path / "batch.npz")
    assert run("compare", *words, "--quiet")[0] == 0
    code, _, err = run("compare", *words, "--seeds", "3")
    assert code == 2
    assert "--seeds: no input is drawn at random" in " ".join(err.replace("│", " ").split())
    code, _, err = run("compare", *words[:-1], "absent.npz")
    assert code == 2
    assert "--input: there is no file at absent.npz" in " ".join(err.replace("│", " ").split())


# ---- values, training, methods -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_values_of_a_checkpoint(run, tmp_path):
    path = checkpoint_run.save(checkpoint_run.linen_state(2), tmp_path / "ck", "orbax")
    (tmp_path / "rules.toml").write_text(checkpoint_run.RULES)
    words = ("--linen", f"{RUN}:Net", "--nnx", f"{RUN}:Native", "--input", "8,5", "--checkpoint", path)
    for rules in ((), ("--rules", tmp_path / "rules.toml")):
        code, out, _ = run("compare", *words, *rules, "--json")
        found = json.loads(out)
        assert (code, found["notes"][0]) == (0, f"values: those of {path}")
        kinds = [finding["what"] for finding in found["findings"]]
        assert kinds.count("parameter") >= 6, "of rules with patterns too"
        assert kinds.count("gradient") >= 6
    code, out, err = run("compare", *words[:-1], tmp_path / "absent")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")


def test_rules_that_are_wrong_are_found_out(run, tmp_path):
    """q for k: both fit, and only running the models shows it."""
    (tmp_path / "rules.toml").write_text("""
[[rule]]
from = "params/hidden/**"
to = "params/first/**"
[[rule]]
from = "params/out/**"
to = "params/last/**"
[[rule]]
from = "params/norm/scale"
to = "params/norm/bias"
[[rule]]
from = "params/norm/bias"
to = "params/norm/scale"
""")
    assert run("compare", *PAIR, "--rules", tmp_path / "rules.toml", "--quiet")[0] == 3


def test_training_steps(run):
    code, out, _ = run("compare", *PAIR, *TRAINED, "--json")
    kinds = {finding["what"] for finding in json.loads(out)["findings"]}
    assert code == 0
    assert {"loss", "trained parameter", "optimizer state"} <= kinds


def test_seeds_are_counted(run):
    assert json.loads(run("compare", *two("twice", "doubled"), "--seeds", 3, "--json")[1])["seeds"] == [0, 1, 2]


def test_keywords_reach_both_models(run):
    pair = two("Native", "Native")
    assert run("compare", *pair, "--keyword", "train=false", "--quiet")[0] == 0
    code, _, err = run("compare", *PAIR, "--keyword", "trains=false")
    assert code == 2
    assert "cannot be called" in " ".join(err.replace("│", " ").split())


def test_methods(run):
    words = (*two("Dense", "Native"), "--method")
    assert run("compare", *words, "__call__", "--method", "__call__", "--quiet")[0] == 0
    assert run("compare", *words, "encode")[0] == 2  # the NNX model has none


# ---- what is refused ---------------------------------------------------------------------------------------

USAGE = {
    "nothing": ((), "given: none"),
    "half": (("--linen", f"{HERE}:Dense"), "given: --linen"),
    "other half": (("--a", f"{HERE}:Dense"), "given: --a"),
    "mixed": (("--linen", f"{HERE}:Dense", "--b", f"{HERE}:Native"), "given: --linen and --b"),
    "all": ((*PAIR, *two("twice", "thrice")), "given: --linen and --nnx and --a and --b"),
    "no input": (PAIR[:-2], "--input is needed"),
    "input": ((*PAIR[:-1], "f32[8,x]"), "'f32[8,x]' is not an input"),
    "dtype": ((*PAIR[:-1], "f33[8]"), "'f33[8]' is not an input"),
    "wide": ((*PAIR[:-1], "f64[8,5]"), "JAX has no float64 unless it is told"),
    "steps alone": ((*PAIR, "--steps", "2"), "--steps and --tx go together"),
    "tx alone": ((*PAIR, "--tx", f"{HERE}:tx"), "--steps and --tx go together"),
    "no tx": ((*PAIR, "--steps", "2", "--tx", f"{HERE}:TEXT"), "is no optax transformation"),
    "no loss": (
        (*PAIR, "--steps", "2", "--tx", f"{HERE}:tx", "--loss", f"{HERE}:TEXT"),
        "is no function of the output",
    ),
    "loss alone": ((*PAIR, "--loss", f"{HERE}:twice"), "--loss is for --steps"),
    "method of functions": ((*two("twice", "thrice"), "--method", "encode"), "--method is for models"),
    "no seeds": ((*PAIR, "--seeds", "0"), "--seeds"),
    "stream": ((*PAIR, "--rng", "dropout"), "'dropout' is no random stream with its seed"),
    "keyword": ((*PAIR, "--keyword", "train"), "'train' is no keyword argument"),
    "taken": ((*PAIR, "--keyword", "steps=3"), "compare has an option of that name"),
    "methods": ((*PAIR, *("--method", "a") * 3), "--method is given once for both models, or twice"),
    "no rules": ((*PAIR, "--rules", "absent.toml"), "'absent.toml' does not exist"),
    "rules": ((*two("twice", "thrice"), "--rules", __file__), "--rules lead from a Linen model to an NNX model"),
    "checkpoint": ((*two("Native", "Native"), "--checkpoint", "x"), "--checkpoint is for a Linen module"),
    "no model": (two("TEXT", "twice"), "to be compared are Linen modules"),
    "no linen": (("--linen", f"{HERE}:TEXT", "--nnx", f"{HERE}:Native", "--input", "8,5"), "is no Linen module"),
    "no nnx": (("--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:TEXT", "--input", "8,5"), "is no NNX module"),
    "no attribute": (("--a", f"{HERE}:Gone", "--b", f"{HERE}:Dense", "--input", "8,5"), "no 'Gone' in"),
    "shape": ((*PAIR[:-1], "f32[8,6]"), "cannot be called with these inputs"),
}


@pytest.mark.parametrize(("words", "text"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_exit_code_2(words, text, run):
    code, out, err = run("compare", *words)
    assert (code, out) == (2, "")
    assert text in " ".join(err.replace("│", " ").split())


def test_a_model_that_raises_is_exit_code_1(run):
    code, out, err = run("compare", *two("breaks", "twice"))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "not at all" in err


def test_variables_without_a_counterpart_are_exit_code_1(run):
    code, out, err = run("compare", "--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:Deeper", "--input", "8,5")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "more/kernel" in err


def test_a_model_of_the_users_is_left_as_it_was(run, monkeypatch):
    model = Native(nnx.Rngs(3))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    monkeypatch.setattr(sys.modules[HERE], "KEPT", model, raising=False)
    assert run("compare", "--linen", f"{HERE}:Dense", "--nnx", f"{HERE}:KEPT", "--input", "8,5", "--quiet")[0] == 0
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_words_for_shapes():
    pairs = {
        "f32[2,3]": "2,3:float32",
        "bf16[4]": "4:bfloat16",
        "i8[2]": "2:int8",
        "pred[]": ":bool",
        "float16[1]": "1:float16",
    }
    assert all(parse_input(one) == parse_input(other) for one, other in pairs.items())
    assert parse_input("u32[2, 3]") == jax.ShapeDtypeStruct((2, 3), "uint32")


def test_a_model_that_ends_the_process_is_an_error(run):
    code, out, err = run("compare", *two("twice", "leaves"))
    assert code not in (0, 3)
    words = [word for word in (out + err).split() if word != "│"]  # drawn into a box
    assert "it ends the process, sys.exit(0)" in " ".join(words)


def test_what_models_print_is_no_part_of_the_document(run):
    code, out, err = run("compare", *two("talks", "doubled"), "--json")
    assert (code, json.loads(out)["equal"]) == (0, True)
    assert "in a call" in err
