"""`linen-nnx` as a whole: versions, help, completion, wrong usage, hints, the process itself."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge._errors import BridgeError
from bridge.checkpoint.options import OptionError
from bridge.cli import app as command_line
from bridge.cli.app import app, options, versions

ROOT = Path(__file__).parents[3]
COMMANDS = ("inspect", "convert", "compare", "diff", "verify", "demo")


def helped(width, *words, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="linen-nnx")
    assert done.exit_code == 0
    return done.output


# ---- versions ----------------------------------------------------------------------------------------------


def test_versions_of_all_it_stands_on(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        f"jax {metadata.version('jax')}",
        f"flax {metadata.version('flax')}",
        f"python {sys.version.split()[0]}",
    ]
    assert out.startswith("linen-nnx-bridge ")


def test_a_package_that_is_not_installed_has_an_unknown_version(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert versions()["linen-nnx-bridge"] == "unknown"
    assert versions()["python"] == sys.version.split()[0]


# ---- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_option_and_no_choice_breaks(width, monkeypatch):
    for command in COMMANDS:
        words = set(re.split(r"[\s,│]+", helped(width, command, monkeypatch=monkeypatch)))
        assert options()[command] <= words
    words = set(re.split(r"[\s,│.]+", helped(width, "convert", monkeypatch=monkeypatch)))
    assert {"linen-nested-train-state", "params-only", "nnx-training", "orbax-v1", "msgpack", "seed=N"} <= words
    assert "…" not in helped(width, "convert", monkeypatch=monkeypatch)


def test_no_line_of_narrow_help_is_too_wide(monkeypatch):
    for command in COMMANDS:
        assert max(map(len, helped(60, command, monkeypatch=monkeypatch).splitlines())) <= 60


def test_every_command_knows_json_and_its_exit_codes(monkeypatch):
    assert set(options()) == set(COMMANDS)
    for command in COMMANDS:
        assert "--json" in options()[command]
        assert "Exit codes: 0 " in " ".join(helped(60, command, monkeypatch=monkeypatch).split())


def test_quiet_has_a_short_form():
    having = [name for name, words in options().items() if "--quiet" in words]
    assert having == ["convert", "compare", "diff", "verify", "demo"]
    assert all("-q" in options()[name] for name in having)


# ---- completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_a_shell_is_shown(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = CliRunner().invoke(app, ["--show-completion", shell], prog_name="linen-nnx")
    assert done.exit_code == 0
    assert "_LINEN_NNX_COMPLETE=" in done.output


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("linen-nnx conv", {"convert"}),
        ("linen-nnx convert --dry", {"--dry-run"}),
        ("linen-nnx convert --to ", {"nnx", "linen"}),
        ("linen-nnx convert --format orb", {"orbax", "orbax-v1"}),
    ],
)
def test_completion_offers_commands_options_and_choices(words, offered, monkeypatch):
    monkeypatch.setenv("_LINEN_NNX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    done = CliRunner().invoke(app, [], prog_name="linen-nnx")
    assert set(done.output.split()) == offered


# ---- wrong usage and errors --------------------------------------------------------------------------------

WRONG = {
    "no such command": ("no",),
    "no such option": ("inspect", "x", "--no"),
    "no number": ("inspect", "x", "--step", "one"),
    "no such format": ("inspect", "x", "--source-format", "pickle"),
    "no such rules": ("convert", "x", "y", "--to", "nnx", "--rules", "/no/such/file.toml"),
    "nothing to check": ("convert", "x", "y", "--to", "nnx", "--dry-run", "--verify-forward", "math:pi"),
    "no rules to compare by": ("diff", "x", "y", "--rules", "/no/such/file.toml"),
    "rules of no use": ("diff", "x", "y", "--raw", "--rules", __file__),
    "negative": ("diff", "x", "y", "--atol", "-1"),
    "no tolerance": ("diff", "x", "y", "--rtol", "nan"),
    "words": ("diff", "x", "y", "--rtol", "small"),
    "too few": ("diff", "x"),
    "no seed": ("demo", "--seed", "x"),
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_wrong_usage_is_exit_code_2_in_words_and_in_json(words, run):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Usage: linen-nnx" in err
    code, out, err = run(*words, "--json")
    document = json.loads(out)
    assert (code, document["exit_code"], document["error"]) == (2, 2, "UsageError")
    assert document["message"]
    assert err


def test_texts_of_wrong_usage(run):
    def said(*words):
        return json.loads(run(*words, "--json")[1])["message"]

    assert "--verify-forward has nothing to check with --dry-run" in said(*WRONG["nothing to check"])
    assert "--rules has no use with --raw" in said(*WRONG["rules of no use"])
    assert "'nan' is not a tolerance, such as 0 or 1e-6" in said(*WRONG["no tolerance"])


@pytest.mark.parametrize("words", [("inspect", "/no"), ("diff", "/no", "/no"), ("verify", "/no")])
def test_errors_are_json_for_every_command(words, run):
    code, out, err = run(*words, "--json")
    document = json.loads(out)
    assert (code, document["exit_code"]) == (1, 1)
    assert err == f"error: {document['message']}\n"


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_option_without_meaning_is_wrong_usage(monkeypatch, run):
    monkeypatch.setattr("bridge.checkpoint.formats.open.open_source", raising(OptionError("to", "'nnx'", "torch")))
    assert run("inspect", "x")[0] == 2


def test_a_hint_for_another_command_says_whose_option_it_is(monkeypatch, run):
    error = BridgeError("several items. Choose one: (--item NAME), or (--resume)")
    monkeypatch.setattr("bridge.checkpoint.comparison.open_source", raising(error))
    _, _, err = run("diff", "x", "y")
    assert err.splitlines()[1:] == [
        "--item is an option of inspect and convert and verify, not of diff.",
        "--resume is an option of convert, not of diff.",
    ]


def texts(file):
    """The string literals of a file, those inside f-strings too, without docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if is_documented(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def is_documented(node):
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None


def test_every_option_that_a_text_names_is_there():
    known = {word for words in options().values() for word in words} | {"--version"}
    unknown = {}
    for file in (ROOT / "bridge").rglob("*.py"):
        named = {option for text in texts(file) for option in command_line._OPTION.findall(text)}
        if named - known:
            unknown[str(file.relative_to(ROOT))] = sorted(named - known)
    assert unknown == {}


def test_the_hint_for_a_file_of_no_format_can_be_followed(tmp_path, run):
    (tmp_path / "file").write_bytes(b"\\x00" * 40)
    code, _, err = run("inspect", tmp_path / "file")
    assert code == 1
    option = re.search(r"format=\.\.\. \((--[a-z-]+)\)", err)[1]
    assert option in options()["inspect"]
    assert option in options()["convert"]


# ---- the process -------------------------------------------------------------------------------------------


def test_ctrl_c_while_packages_are_imported_is_exit_code_130():
    """The child says that it is in its imports when it looks for flax, and waits there."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'flax':\n"
        "            import time; print('importing', flush=True); time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "import linen_nnx; linen_nnx.main()"
    )
    words = [sys.executable, "-c", code, "inspect", "x"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted: nothing was read or written.\n")


def test_ctrl_c_while_a_command_runs_is_exit_code_130(monkeypatch, run):
    monkeypatch.setattr("bridge.checkpoint.formats.open.open_source", raising(KeyboardInterrupt()))
    assert run("inspect", "x")[0] == 130
    code, out, _ = run("inspect", "x", "--json")
    document = json.loads(out)
    assert (code, document["exit_code"], document["error"]) == (130, 130, "KeyboardInterrupt")
