"""What differs between two checkpoints: leaf by leaf, across formats and layouts; and the command that tells it."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import nnx_core as nnx
from bridge._errors import CheckpointLayoutError, CheckpointNotFoundError
from bridge.checkpoint import comparison
from bridge.checkpoint.comparison import Difference, diff
from bridge.checkpoint.conversion import convert
from bridge.checkpoint.rules.apply import read_rules
from bridge.checkpoint.verification import VerificationError, verify
from tests.support import checkpoint_run

# ---- numbers -----------------------------------------------------------------------------------------------

FLOATS = st.sampled_from([np.dtype(name) for name in ("float16", "float32", "float64")])
PAIRS = FLOATS.flatmap(
    lambda dtype: arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5).flatmap(
        lambda shape: st.tuples(
            *[arrays.arrays(dtype, shape, elements=st.sampled_from([0.0, -0.0, 1.0, 1.01, math.inf, math.nan]))] * 2
        )
    )
)


@given(PAIRS, st.sampled_from([0.0, 0.005, 0.5]), st.sampled_from([0.0, 0.005, 0.5]))
def test_floats_are_compared_as_numpy_does(pair, atol, rtol):
    a, b = pair
    differs = ~np.isclose(a.astype("float64"), b.astype("float64"), atol=atol, rtol=rtol, equal_nan=True)
    found = comparison._compare(("w",), a, b, atol, rtol)
    if not differs.any():
        assert found == []
        return
    with np.errstate(invalid="ignore"):
        size = np.abs(a.astype("float64") - b.astype("float64"))[differs]
    (row,) = found
    assert (row.what, row.count) == ("values", differs.sum())
    assert row.first == tuple(np.argwhere(differs)[0])
    assert row.max_abs == np.where(np.isnan(size), np.inf, size).max()


def test_large_leaves_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(comparison, "_AT_ONCE", 7)
    for shape in ((100,), (3, 50), (5, 4, 6), (2, 1, 30)):
        a = np.zeros(shape, np.float32)
        for at in ((0,) * len(shape), tuple(size - 1 for size in shape), tuple(size // 2 for size in shape)):
            b = a.copy()
            b[at] = 2.0
            assert comparison._compare(("w",), a, b, 0, 0) == [
                Difference(("w",), "values", f"float32{list(shape)}", f"float32{list(shape)}", 1, 2.0, at)
            ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.int64(2**62), np.int64(2**62 + 1), "values"),  # equal once they are floats
        (np.uint8(1), np.uint8(2), "values"),
        (np.array([True, False]), np.array([True, True]), "values"),
        (np.zeros(2), np.zeros(3), "shape"),
        (np.zeros(2, np.float32), np.zeros(2, np.float64), "dtype"),
        (np.zeros(2, ml_dtypes.bfloat16), np.ones(2, ml_dtypes.bfloat16), "values"),
        (np.complex64(1j), np.complex64(2j), "values"),
        (jax.random.key(0), jax.random.key(1), "values"),
        ("a", "b", "values"),
        ("a", np.zeros(2), "shape"),
        ("a", np.float32(0), "dtype"),
    ],
    ids=repr,
)
def test_other_leaves_are_compared_exactly(a, b, expected):
    assert [row.what for row in comparison._compare(("w",), a, b, 10.0 if isinstance(a, np.integer) else 0.0, 0.0)] == [
        expected
    ]
    assert comparison._compare(("w",), a, a, 0.0, 0.0) == []


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run after three steps in Linen, in Orbax and msgpack; its conversion to NNX; and the run after four."""
    path = tmp_path_factory.mktemp("diff")
    (path / "rules.toml").write_text(checkpoint_run.RULES)
    checkpoint_run.save(checkpoint_run.linen_state(3), path / "linen", "orbax")
    checkpoint_run.save(checkpoint_run.linen_state(3), path / "linen", "msgpack")
    checkpoint_run.save(checkpoint_run.linen_state(4), path / "later", "orbax")
    convert(path / "linen", path / "nnx", to="nnx", rules=read_rules(path / "rules.toml"))
    return path


def test_a_checkpoint_equals_itself_in_another_format(folder):
    report = diff(folder / "linen", folder / "linen.msgpack")
    assert report.same
    assert report.compared == 23


@pytest.mark.parametrize("order", [("linen", "nnx"), ("nnx", "linen"), ("nnx", "linen.msgpack")])
@pytest.mark.parametrize("max_memory", [1, 1 << 30])
def test_a_checkpoint_equals_its_conversion(order, max_memory, folder):
    a, b = (folder / name for name in order)
    report = diff(a, b, rules=read_rules(folder / "rules.toml"), max_memory=max_memory)
    assert report.same, report.differences
    assert report.compared == 23
    assert "by NNX's names" in report.how
    assert not diff(a, b, raw=True).same
    assert diff(a, b, raw=True).compared == 0


def test_differences_are_where_the_numbers_differ(folder):
    report = diff(folder / "later", folder / "nnx", rules=read_rules(folder / "rules.toml"))
    found = {row.path: row for row in report.differences}
    ours, theirs = (checkpoint_run.flat(checkpoint_run.linen_state(steps)) for steps in (4, 3))
    a, b = (np.asarray(tree["params", "dense", "kernel"]) for tree in (ours, theirs))
    row = found["model", "first", "kernel", "value"]
    assert (row.what, row.count) == ("values", int((a != b).sum()))
    assert row.max_abs == np.abs(a.astype("float64") - b.astype("float64")).max()
    assert found["optimizer", "step", "value"].max_abs == 1
    assert diff(
        folder / "later", folder / "nnx", atol=10, rules=read_rules(folder / "rules.toml")
    ).differences == tuple(row for row in report.differences if "int" in row.a)


def test_names_of_model_and_optimizer_do_not_count(tmp_path):
    state = checkpoint_run.native_state(1)
    a = checkpoint_run.save(state, tmp_path / "a", "orbax")
    b = checkpoint_run.save(nnx.state(tuple(checkpoint_run.native())), tmp_path / "b", "orbax")
    c = checkpoint_run.save({name: nnx.to_pure_dict(part) for name, part in state.items()}, tmp_path / "c", "orbax")
    assert diff(a, c).same
    assert not diff(a, c, raw=True).same
    assert {row.what for row in diff(a, b).differences} == {"values"}


def test_what_is_on_one_side_only(tmp_path):
    both = {"params": {"w": jnp.ones(2)}}
    a = checkpoint_run.save({**both, "step": jnp.int32(1)}, tmp_path / "a", "orbax")
    b = checkpoint_run.save({**both, "batch_stats": {"m": jnp.ones(3)}}, tmp_path / "b", "orbax")
    assert diff(a, b).differences == (
        Difference(("step",), "only in a", a="int32[]"),
        Difference(("batch_stats", "m"), "only in b", b="float32[3]"),
    )


def test_what_cannot_be_read_is_an_error(folder, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        diff(folder / "linen", tmp_path / "no")


# ---- verify ------------------------------------------------------------------------------------------------


def test_verify_needs_hashes(folder):
    assert verify(folder / "nnx").leaves == 23
    with pytest.raises(CheckpointLayoutError, match=r"(?s)nothing to verify.*expected: hashes.*linen-nnx diff"):
        verify(folder / "linen")


def test_verify_finds_a_damaged_file(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder / "nnx", tmp_path / "copy")
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    for at in range(0, len(raw), 7):
        raw[at] ^= 1
    largest.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"verification failed: .*copy"):
        verify(copy)


def test_hashes_that_are_not_hashes(folder, tmp_path):
    path = tmp_path / "a.msgpack"
    convert(folder / "linen", path, to="nnx", target_format="msgpack")
    beside = path.with_name(path.name + ".metadata.json")
    content = json.loads(beside.read_text())
    (key,) = [name for name in ("metadata", "hashes") if name in content]
    (content[key] if key == "metadata" else content)["hashes"] = 3
    beside.write_text(json.dumps(content))
    with pytest.raises(Exception, match="hashes are damaged"):
        verify(path)


# ---- the commands ------------------------------------------------------------------------------------------


def test_the_command_diff(folder, run):
    rules = ("--rules", folder / "rules.toml")
    code, out, err = run("diff", folder / "linen", folder / "nnx", *rules)
    assert (code, err) == (0, "")
    assert "no difference; 23 leaves in both" in out
    code, out, _ = run("diff", folder / "later", folder / "nnx", *rules)
    rows = [line.split() for line in out.splitlines()]
    assert code == 1
    assert ["optimizer/step/value", "values", "uint32[]", "uint32[]", "1", "1", "[]"] in rows
    assert run("diff", folder / "later", folder / "nnx", "--atol", "-1")[0] == 2


def test_the_command_diff_as_json(folder, run):
    code, out, err = run("diff", folder / "later", folder / "linen", "--json")
    found = json.loads(out)
    assert (code, err, found["exit_code"], found["same"], found["compared"]) == (1, "", 1, False, 23)
    step = {"path": ["step"], "what": "values", "a": "int32[]", "b": "int32[]", "count": 1, "max_abs": 1.0, "first": []}
    assert step in found["differences"]
    code, out, _ = run("diff", folder / "linen", folder / "linen", "--json", "--raw")
    assert (code, json.loads(out)["differences"]) == (0, [])


def test_a_difference_to_nan_is_still_json(tmp_path, run):
    paths = [
        checkpoint_run.save({"params": {"w": jnp.float32(value)}}, tmp_path / str(value), "orbax")
        for value in (1.0, math.nan)
    ]
    code, out, _ = run("diff", *paths, "--json")
    assert code == 1
    assert [row["max_abs"] for row in json.loads(out)["differences"]] == [None]


def test_the_command_verify(folder, tmp_path, run):
    code, out, err = run("verify", folder / "nnx")
    assert (code, err) == (0, "")
    assert out.startswith("verified: 23 leaves, ")
    assert json.loads(run("verify", folder / "nnx", "--json")[1])["verified"] is True
    assert run("verify", folder / "linen")[0] == 1
    convert(folder / "linen", tmp_path / "a.safetensors", to="nnx", target_format="safetensors")
    raw = bytearray((tmp_path / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(raw)
    code, out, err = run("verify", tmp_path / "a.safetensors")
    assert (code, out) == (3, "")
    assert "1 other bits" in err
    code, out, _ = run("verify", tmp_path / "a.safetensors", "--json")
    assert (code, json.loads(out)["exit_code"]) == (3, 3)
    (tmp_path / "a.safetensors").write_bytes(raw[:-1])
    assert run("verify", tmp_path / "a.safetensors")[0] == 3
