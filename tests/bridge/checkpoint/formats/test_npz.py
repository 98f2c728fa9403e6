""".npz files as a source: `numpy.load(allow_pickle=False)` is the oracle."""

import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge._errors import CheckpointCorruptError, CheckpointLayoutError
from bridge.checkpoint.formats.open import open_sink, open_source
from tests.support.checkpoint_files import arrays, describe, load, survives
from tests.tolerance import assert_trees_equal

TREE = {
    "params/Transformer/encoderblock/MlpBlock_0/kernel": np.arange(24, dtype="float32").reshape(4, 6),
    "params/head/bias": np.arange(5).astype(jnp.bfloat16),
    "opt/0/count": np.array(7, "int32"),
    "opt/0/empty": np.zeros((0, 3), "float16"),
}
NUMPYS = ("float32", "float16", "float64", "int8", "uint32", "int64", "bool", "complex64")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_big_vision(path, save):
    save(path, **TREE)
    with closing(open_source(path)) as source:
        assert (source.format, source.step, source.item) == ("npz", None, None)
        assert "read as bfloat16" in source.reason
        assert {"/".join(place): leaf.dtype for place, leaf in source.tree.leaves.items()} == {
            name: str(array.dtype) for name, array in TREE.items()
        }
        assert source.tree.leaves["params", "head", "bias"].nbytes == 10
        assert_trees_equal({"/".join(place): source.read(place) for place in source.tree.leaves}, TREE)


@given(
    st.dictionaries(st.sampled_from(["a", "b.c", "b.d", "é"]), arrays(NUMPYS), min_size=1), st.booleans(), st.booleans()
)
def test_every_array_that_numpy_loads(tmp_path_factory, tree, fortran, compress):
    path = tmp_path_factory.mktemp("n") / "a.npz"
    tree = {name: np.asfortranarray(x) if fortran else x for name, x in tree.items()}
    (np.savez_compressed if compress else np.savez)(path, **tree)
    oracle = np.load(path, allow_pickle=False)
    with closing(open_source(path)) as source:
        found = {".".join(place): source.read(place) for place in source.tree.leaves}
        assert_trees_equal(found, {name: oracle[name].reshape(tree[name].shape) for name in oracle.files})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(data=st.data())
def test_a_region_is_that_part_of_the_array(tmp_path_factory, save, data):
    path = tmp_path_factory.mktemp("n") / "a.npz"
    array = np.arange(60, dtype=data.draw(st.sampled_from(["int16", ">i4"]))).reshape(3, 4, 5)
    save(path, c=array, fortran=np.asfortranarray(array))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in array.shape]
    region = tuple(slice(*pair) for pair in bounds)
    with closing(open_source(path)) as source:
        for name in ("c", "fortran"):
            assert source.tree.leaves[name,].dtype == array.dtype.name
            assert_trees_equal(source.read((name,), region), array.astype(array.dtype.name)[region])


def test_a_region_takes_the_memory_of_its_rows(path):
    np.savez_compressed(path, a=np.ones((1024, 4096), "float32"))
    with closing(open_source(path)) as source:
        tracemalloc.start()
        source.read(("a",), (slice(0, 8), slice(0, 4096)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_names_are_split_where_one_says(path):
    np.savez(path, **{"a.b": np.ones(1), "c": np.ones(2)})
    with closing(open_source(path, separator="|")) as source:
        assert [*source.tree.leaves] == [("a.b",), ("c",)]


def test_there_is_no_sink(path):
    with pytest.raises(CheckpointLayoutError, match=r"(?s)no such format is written.*safetensors.*'npz'"):
        open_sink(path, "npz", describe({"a": 1})[0])


# --- hostile files ------------------------------------------------------------------------------------------


def npy(header, content=b"", version=(1, 0)):
    header = header.encode().ljust(118 - len(header) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + content


def write(path, *members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


def one(descr, content):
    return [("a.npy", npy((HEADER % 1).replace("'<f4'", descr), content))]


HOSTILE = {
    "objects": (one("'|O'", b"cos\nsystem\n."), "never unpickled.*a.npy: object"),
    "text": (one("'<U2'", b"\0" * 8), "arrays of numbers"),
    "three bytes": (one("'|V3'", b"\0" * 3), "arrays of numbers"),
    "fields": (one("[('x', '<f4')]", b"\0" * 4), "arrays of numbers"),
    "no header": ([("a.npy", b"hello there, nothing here")], "a.npy, whole.*magic string"),
    "a header of code": ([("a.npy", npy("__import__('os').system('true')"))], "a.npy, whole"),
    "a deep header": ([("a.npy", npy("(" * 5000))], "a.npy, whole"),
    "version 3": ([("a.npy", npy(HEADER % 1, b"\0" * 4, (3, 0)))], r"version \(3, 0\)"),
    "too short": ([("a.npy", npy(HEADER % 2, b"\0" * 4))], "a.npy: 8 bytes for float32.*found: 4"),
    "too long": ([("a.npy", npy(HEADER % 1, b"\0" * 8))], "a.npy: 4 bytes.*found: 8"),
    "huge": ([("a.npy", npy(HEADER % 2**61, b"\0" * 8))], "a.npy: None bytes"),
    "negative": ([("a.npy", npy(HEADER % -1, b"\0" * 4))], "a.npy: None bytes"),
    "another file": ([*one("'<f4'", b"\0" * 4), ("readme.txt", b"x")], "end in .npy, each once.*readme.txt"),
    "below a leaf": ([(name, npy(HEADER % 1, b"\0" * 4)) for name in ("a.npy", "a/b.npy")], "a: is a leaf"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_that_says_what(path, name):
    members, text = HOSTILE[name]
    write(path, *members)
    with pytest.raises(CheckpointCorruptError, match=f"(?s){text}"):
        open_source(path)


def test_one_name_twice_is_an_error(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(path, ("a.npy", npy(HEADER % 1, b"\0" * 4)), ("a.npy", npy(HEADER % 1, b"\0" * 4)))
    with pytest.raises(CheckpointCorruptError, match=r"(?s)each once.*a\.npy twice"):
        open_source(path)


def test_a_table_that_promises_more_than_the_file_can_hold(path):
    write(path, ("a.npy", npy(HEADER % 2**34, b"\0" * 8)), method=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02")
    size = len(npy(HEADER % 2**34)) + 2**36
    content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFFF)  # the size is in the zip64 field that follows
    extra = struct.pack("<HHQ", 1, 8, size)
    content[at + 30 : at + 32] = struct.pack("<H", len(extra))
    end = at + 46 + len("a.npy")
    content[end:end] = extra
    tail = content.rfind(b"PK\x05\x06")
    length = struct.unpack("<I", content[tail + 12 : tail + 16])[0]
    content[tail + 12 : tail + 16] = struct.pack("<I", length + len(extra))
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=f"{2**36} bytes for float32"):
        open_source(path)


def test_a_damaged_array_fails_its_checksum(path):
    np.savez(path, a=np.zeros(100_000, "uint8"))
    content = path.read_bytes()
    place = content.index(b"\0" * 100) + 50_000
    path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    with closing(open_source(path)) as source, pytest.raises(CheckpointCorruptError, match=r"(?s)a.npy, whole.*CRC"):
        source.read(("a",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_short_anywhere_or_changed_is_an_error_or_a_tree(path, tmp_path, save):
    save(path, a=np.arange(5), **{"b/c": np.ones((2, 2), "float32")})
    whole, other = bytearray(path.read_bytes()), tmp_path / "b.npz"
    assert survives(whole, other)
    assert not any(survives(whole[:size], other) for size in range(len(whole)))
    for place in range(len(whole)):
        for change in (0xFF, 0x01):
            whole[place] ^= change
            if survives(bytes(whole), other):
                assert load(other)
            whole[place] ^= change


def test_members_are_read_from_several_threads(tmp_path):
    """Python 3.13's zipfile mistakes two members that are opened at once for a bomb."""
    saved = {f"w{i}": np.full((50, 3), i, np.float32) for i in range(40)}
    np.savez(tmp_path / "a.npz", **saved)
    with closing(open_source(tmp_path / "a.npz")) as source, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(lambda name: source.read((name,)), saved)
            assert_trees_equal(dict(zip(saved, found, strict=True)), saved)
