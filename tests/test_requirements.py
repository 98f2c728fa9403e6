"""Every requirement from the field (REQUIREMENTS.md, rows 1-68) has a test that carries its number, or is named here.

Law: a row is met when a test shows it. A test says so by the number in its name: `test_row_24_...`,
`test_rows_2_26_33_...`, `..._row9`. Tests whose names say something else are in `ELSEWHERE`. Rename or remove a
test, and the row that it proved fails here.
Knows the names of tests; whether they pass is their own business.
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ROWS = {
    1: "ToLinen.apply: a missing parameter or a wrong shape is an error",
    2: "NNXMeta.add_axis and remove_axis",
    3: "ToNNX updates Variables in place",
    4: "ToNNX draws a key only when Linen asks for one",
    5: "ToLinen.apply without rngs raises as Linen does",
    6: "the sharded-init recipe; specs from metadata alone",
    7: "annotated parameters need no mesh",
    8: "ToNNX of BatchNorm trains without `mutable=`",
    9: "to_linen_class works, and pickles",
    10: "Linen <-> NNX checkpoint conversion",
    11: "strict loading lists all that does not fit",
    12: "a ToLinen that sows, called twice",
    13: "state created in a call is there in the next",
    14: "a ToNNX inside a ToLinen is initialised",
    15: "a new axis is unnamed by default",
    16: "converting never changes the input",
    17: "names that collide with methods",
    18: "the same name in two collections",
    19: "ToLinen is copied and pickled",
    20: "plain attributes on a ToNNX",
    21: "integer keys, both ways",
    22: "train() and eval() reach the wrapped module",
    23: "fields, properties and submodules are reached",
    24: "interceptors, capture_intermediates and tabulate see inside",
    25: "apply runs no initializer",
    26: "a negative mapped axis",
    27: "RNG state apart from what a checkpoint must have",
    28: "optimizer state of any optax chain",
    29: "lazy_init runs no forward pass and overwrites nothing",
    30: "layers whose trees differ between Linen and NNX",
    31: "any Mapping: FrozenDict",
    32: "same keys, same numbers: init and dropout",
    33: "empty axis names",
    34: "old names of the sharding key",
    35: "arguments are passed through untouched",
    36: "list fields under jit",
    37: "names of scan axes, one a stack",
    38: "boxes restore without a target",
    39: "sharded, abstract restore",
    40: "plain lists of layers; a small stable surface",
    41: "every block of the docs runs",
    42: "a bridged step does not walk in Python",
    43: "a write that nothing hands back is named",
    44: "errors that name the mistake",
    45: "trace errors name the path",
    46: "no retraces",
    47: "scan returns only what was written",
    48: "pop by exact type",
    49: "the registry of Variable types",
    50: "a stale graphdef names the paths; filters by path",
    51: "to_linen_class(X)(...) works directly",
    52: "the class is named after X; module_class",
    53: "metadata through nn.scan and nn.vmap of a ToLinen",
    54: "a parameter missing from variables is an error",
    55: "unknown paths in variables",
    56: "ToNNX inside ToLinen initializes",
    57: "attributes that are no Variables are left alone",
    58: "the default of ToNNX's `mutable`",
    59: "rngs only to who takes them",
    60: "conversion functions are public",
    61: "no stale tracers in what is written back",
    62: "a hook before state is loaded",
    63: "the module path while a submodule runs",
    64: "is_linen_initializing()",
    65: "static and random state survive apply",
    66: "merge and apply do not alias their input",
    67: "state fit for checkpoints: no typed keys",
    68: "logical names without a mesh",
}

#: Rows proved by tests that are named by what they show.
ELSEWHERE = {
    10: (
        "test_training_goes_on_to_the_last_bit",  # Linen's checkpoint into NNX, model and optimizer, renamed
        "test_into_a_wrapped_model",
        "test_checkpoints_go_across_and_back",  # of networks that nobody here wrote
        "test_linen_in_every_format_resumes_in_nnx",  # whole checkpoints on disk
        "test_nnx_in_every_format_resumes_in_linen",
        "test_what_would_be_lost_is_refused_and_what_rules_drop_is_not",
    ),
    27: (
        "test_random_streams_are_dropped_kept_or_made_anew",
        "test_random_streams_come_from_the_target",
        "test_a_real_model_keeps_its_streams",
    ),
    28: (
        "test_nnx_layout_and_back_is_identity",
        "test_next_update_is_equal_under_new_names",
        "test_a_wrapped_model_trains_on_with_its_optimizer",
        "test_another_optimizer_is_an_error_that_names_paths",
    ),
    30: (
        "test_variables_of_linen_give_its_numbers",
        "test_round_trips_are_exact",
        "test_layers_without_a_counterpart",
        "test_every_layer_there_and_back",  # as trees of checkpoints
        "test_gates_that_are_fused",  # from a file
    ),
    39: ("test_shards", "test_some_of_the_devices", "test_memory_is_that_of_the_model"),
    41: ("test_every_block_runs", "test_a_block_that_would_never_run_is_refused"),
    60: ("test_every_public_name_is_here", "test_module_paths_hold_the_same_names"),
}

_NUMBERS = re.compile(r"rows?_?(\d+(?:_(?:and_)?\d+)*)")


def numbers(name: str) -> set[int]:
    """The rows that the name of a test carries."""
    return {int(n) for found in _NUMBERS.findall(name) for n in re.findall(r"\d+", found)}


def all_tests() -> dict[str, list[str]]:
    """Name of each test function -> the files that have it."""
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(str(file.relative_to(TESTS)))
    return found


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    return all_tests()


def test_numbers_are_read_from_names():
    assert numbers("test_rows_2_26_33_so_it_is") == {2, 26, 33}
    assert numbers("test_row_4_and_25_apply_draws") == {4, 25}
    assert numbers("test_empty_names_row33") == {33}
    assert numbers("test_rows45_66_merge") == {45, 66}
    assert numbers("test_a_row_for_each_of_3") == set()


def test_the_table_has_all_rows():
    assert list(ROWS) == list(range(1, 69))
    assert set(ELSEWHERE) <= set(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row}: {ROWS[row]}")
def test_the_row_has_a_test(row, names):
    named = [name for name in names if row in numbers(name)]
    assert named or row in ELSEWHERE, f"no test carries the number of row {row} ({ROWS[row]})"
    gone = [name for name in ELSEWHERE.get(row, ()) if name not in names]
    assert not gone, f"row {row} ({ROWS[row]}) names tests that are not there: {gone}"


def test_no_test_carries_a_number_that_is_no_row(names):
    wrong = {name: sorted(numbers(name) - set(ROWS)) for name in names if numbers(name) - set(ROWS)}
    assert not wrong
