"""Which format a path holds, the trees of sources and sinks, and the errors that both share."""

import importlib
import json
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from bridge._errors import (
    CheckpointAccessError,
    CheckpointChangedError,
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointLayoutError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)
from bridge.checkpoint import convert, read_metadata, save_as_linen
from bridge.checkpoint.formats.open import FORMATS, SINK_FORMATS, open_sink, open_source
from bridge.checkpoint.formats.protocol import Source
from bridge.checkpoint.tree.layout import Leaf
from bridge.checkpoint.tree.tree import Tree
from tests.support.checkpoint_files import describe, load, save
from tests.tolerance import assert_trees_equal

TREE = {"params": {"Dense_0": {"kernel": np.ones((2, 3), "float32")}}, "step": 3}
MSGPACK = serialization.to_bytes(TREE)


def write_npz(path):
    with path.open("wb") as file:
        np.savez(file, **{"params/Dense_0/kernel": np.ones((2, 3), "float32"), "step": 3})


WRITERS = {
    "msgpack": lambda path: path.write_bytes(MSGPACK),
    "safetensors": lambda path: safetensors.numpy.save_file(
        {"params.Dense_0.kernel": np.ones((2, 3), "float32")}, path
    ),
    "npz": write_npz,
}
NAMES = {"msgpack": "flax_model.msgpack", "safetensors": "model.safetensors", "npz": "params.npz"}


# --- which format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WRITERS)
def test_a_file_is_known_by_its_name_by_its_bytes_and_by_what_one_says(tmp_path, format):
    for name, reason, options in [
        (NAMES[format], f"its name ends in {NAMES[format][-4:]}"[:-4], {}),
        ("weights", "it begins|its first byte", {}),
        ("other.npz" if format != "npz" else "other.msgpack", f"format='{format}' was given", {"format": format}),
    ]:
        WRITERS[format](tmp_path / name)
        with closing(open_source(tmp_path / name, **options)) as source:
            assert source.format == format
            assert any(part in source.reason for part in reason.split("|"))
            assert source.path == tmp_path / name
            assert source.tree.leaves["params", "Dense_0", "kernel"] == Leaf(
                ("params", "Dense_0", "kernel"), (2, 3), "float32", 24
            )


@pytest.mark.parametrize("format", WRITERS)
def test_a_folder_with_one_such_file_is_that_file(tmp_path, format):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# a model")
    WRITERS[format](tmp_path / NAMES[format])
    with closing(open_source(tmp_path)) as source:
        assert (source.format, source.path) == (format, tmp_path / NAMES[format])


def test_a_folder_with_several_is_an_error_unless_the_format_says_which(tmp_path):
    for format, write in WRITERS.items():
        write(tmp_path / NAMES[format])
    with pytest.raises(CheckpointLayoutError, match=r"(?s)several checkpoints.*flax_model.msgpack, model.safetensors"):
        open_source(tmp_path)
    for format in WRITERS:
        with closing(open_source(tmp_path, format=format)) as source:
            assert source.format == format


def test_msgpack_files_of_steps(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint_{step}").write_bytes(serialization.to_bytes({"step": step}))
    (tmp_path / "checkpoint_tmp").write_bytes(b"half")
    for asked, found in ((None, 100), (9, 9)):
        with closing(open_source(tmp_path, step=asked)) as source:
            assert (source.step, source.read(("step",))) == (found, found)
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no step 11.*9, 10, 100"):
        open_source(tmp_path, step=11)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(MSGPACK)
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)nothing at this path.*Near it: flax_model.msgpack"):
        open_source(tmp_path / "flax_modell.msgpack")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        open_source(tmp_path / "no" / "such")
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no safetensors file.*found: flax_model.msgpack"):
        open_source(tmp_path, format="safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no step 3.*one file"):
        open_source(tmp_path / "flax_model.msgpack", step=3)
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no item 'state'.*one file"):
        open_source(tmp_path, item="state")


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (b"", CheckpointCorruptError, "a file of 0 bytes"),
        (b"#!/bin/sh\necho", CheckpointLayoutError, "begins with b'#!/bin/sh'.*format="),
        (b"PK\x03\x04 and no zip", CheckpointCorruptError, "the table of the archive"),
        (b"\x80\x04\x95 a pickle", CheckpointCorruptError, "the end of the file"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, error, text):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(error, match=f"(?s){text}"):
        open_source(tmp_path / "weights")


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointLayoutError, match="an empty folder"):
        open_source(tmp_path)


def test_formats_by_name(tmp_path):
    (tmp_path / "a").write_bytes(MSGPACK)
    with pytest.raises(CheckpointLayoutError, match=r"(?s)no such format is read.*msgpack.*Did you mean msgpack?"):
        open_source(tmp_path / "a", format="msgpak")
    with pytest.raises(CheckpointLayoutError, match=r"(?s)not an Orbax checkpoint.*a folder"):
        open_source(tmp_path / "a", format="orbax")
    with pytest.raises(CheckpointLayoutError, match="no such format is written"):
        open_sink(tmp_path / "b", "pickle", describe(TREE)[0])
    assert set(SINK_FORMATS) <= set(FORMATS)


def test_what_orbax_wrote_is_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "7" / "default", TREE)
    for path in (tmp_path, tmp_path / "7", tmp_path / "7" / "default"):
        with closing(open_source(path)) as source:
            assert source.format == "orbax"
            assert_trees_equal(np.asarray(source.read(("params", "Dense_0", "kernel"))), np.ones((2, 3), "float32"))


@pytest.mark.parametrize("format", SINK_FORMATS)
def test_every_format_that_is_written_is_read(tmp_path, format):
    path = tmp_path / "checkpoint"
    save(path, format, TREE, metadata={"hashes": {"a": "b"}})
    with closing(open_source(path)) as source:
        assert source.format == format
        assert source.metadata["hashes"] == {"a": "b"}
    assert_trees_equal(load(path)["params"], TREE["params"])
    with pytest.raises(CheckpointExistsError, match="nothing at this path"):
        open_sink(path, format, describe(TREE)[0])


# --- trees --------------------------------------------------------------------------------------------------


def test_the_order_of_a_tree_is_its_own_node_by_node():
    def order(*paths):
        return ["/".join(path) for path in Tree({p: Leaf(p, (), "int8", 1) for p in paths}).order]

    assert order(("b", "x"), ("a",), ("b", "y")) == ["b/x", "b/y", "a"]
    assert order(("l", "10"), ("l", "9"), ("l", "1", "c")) == ["l/10", "l/9", "l/1/c"]
    assert order(()) == [""]
    assert Tree({("a",): Leaf(("a",), (2,), "int8", 2), ("b",): Leaf(("b",), (), "int8", 1)}).nbytes == 3


@pytest.mark.parametrize(
    "tree",
    [
        {"opt_state": [{"mu": 1}, {}, {"nu": 2}, None]},
        {"params": {"a": None, "b": 1, "c": {}, "d": 2}},
        {"x": 1, "b": 2, "a": {}},
        {"l": {str(i): {} if i % 3 else i for i in range(12)}},
    ],
    ids=json.dumps,
)
def test_empty_entries_stand_where_they_stood(tmp_path, tree):
    save(tmp_path / "a.msgpack", "msgpack", tree)
    assert (tmp_path / "a.msgpack").read_bytes() == serialization.to_bytes(tree)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "builtin"), [(CheckpointWriteError, OSError), (CheckpointExistsError, FileExistsError)]
)
def test_errors_of_writing_are_builtin_ones_and_keep_their_text(kind, builtin):
    error = kind("it broke", "/a/b", expected="bread", found="stone", hint="Bake.")
    assert isinstance(error, builtin)
    assert str(error) == "it broke: /a/b\n  expected: bread\n  found: stone\nBake."
    assert (error.path, error.expected, error.found) == ("/a/b", "bread", "stone")


def test_a_file_that_may_not_be_read(tmp_path):
    path, root = tmp_path / "a.msgpack", os.geteuid() == 0
    path.write_bytes(MSGPACK)
    path.chmod(0)
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointAccessError, match=r"(?s)may not be read.*right to read.*data may be sound"):
            open_source(path)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("az://bucket/run", "Copy it here first, or mount it"),
        ("file:///data/run", "without the scheme: /data/run"),
        ("https://example.org/a.msgpack", "Copy it here first, or mount it"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_an_address_is_no_folder_of_that_name(url, hint, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = Tree({("a",): Leaf(("a",), (), "int32", 4)})
    for use in (
        open_source,
        read_metadata,
        lambda path: open_sink(path, "orbax", tree),
        lambda path: open_sink(path, "msgpack", tree),
        lambda path: convert(path, tmp_path / "out", to="nnx"),
        lambda path: save_as_linen(None, None, path),
    ):
        with pytest.raises(CheckpointAccessError) as caught:
            use(kind(url))
        assert "not a path on this machine" in str(caught.value)
        assert hint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["orbax", "orbax-v1", "msgpack", "safetensors"])
def test_a_path_with_dots_is_the_path_it_leads_to(format, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    tree = Tree({("w",): Leaf(("w",), (2,), "int32", 8)})
    with open_sink(tmp_path / "a" / "b" / ".." / "made", format, tree) as sink:
        sink.write({("w",): np.arange(2, dtype="int32")})
        sink.finish({})
    with closing(open_source(tmp_path / "a" / "b" / ".." / ".." / "a" / "made", format=format)) as source:
        assert source.read(("w",)).tolist() == [0, 1]
        assert ".." not in str(source.path)


@pytest.mark.parametrize("format", ["orbax", "safetensors", "npz"])
def test_what_is_written_to_while_it_is_read_is_an_error(format, tmp_path):
    path = tmp_path / f"a.{format}"
    arrays = {"w": np.arange(4, dtype="int32")}
    if format == "npz":
        np.savez(path, **arrays)
    else:
        with open_sink(path, format, Tree({("w",): Leaf(("w",), (4,), "int32", 16)})) as sink:
            sink.write({("w",): arrays["w"]})
            sink.finish({})
    with closing(open_source(path, format=format)) as source:
        source.read(("w",))
        source.require_unchanged()
        file = path / "_METADATA" if path.is_dir() else path
        os.utime(file, ns=(1, 1))
        with pytest.raises(
            CheckpointChangedError, match=r"(?s)changed while it was read.*modified at 1 ns.*read a copy"
        ):
            source.require_unchanged()
    if path.is_dir():
        with closing(open_source(path, format=format)) as source:
            (path / "more").write_text("")
            with pytest.raises(CheckpointChangedError, match=r"(?s)more.*no such file.*inode"):
                source.require_unchanged()


def test_every_source_has_the_methods_of_the_protocol():
    """A converter that asks one whether it has changed meets each of them."""
    promised = {name for name, member in vars(Source).items() if callable(member) and not name.startswith("_")}
    assert promised == {"read", "piece", "require_unchanged", "close"}
    sources = set()
    for name in ("stored", "npz", "joined", "orbax.read", "orbax.step"):
        members = vars(importlib.import_module(f"bridge.checkpoint.formats.{name}")).values()
        sources |= {kind for kind in members if isinstance(kind, type) and {"read", "close"} <= vars(kind).keys()}
    assert {kind.__name__ for kind in sources} >= {
        "FileSource",
        "NpzSource",
        "JoinedSource",
        "OrbaxSource",
        "_OneArray",
    }
    ours = [kind for kind in sources if kind.__module__.startswith("bridge.")]
    assert all(promised <= vars(kind).keys() for kind in ours)
