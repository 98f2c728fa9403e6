"""Every raise of the core has a case in `message_cases` or `error_cases`; each message says where, what and what to do.

The cases run under a tracer that notes which `raise` they reach: one that none reaches fails the last test.
"""

import ast
import sys
from pathlib import Path

import pytest

import nnx_core as nnx
from tests.support.error_cases import CASES as ERROR_CASES
from tests.support.foreign_cases import MISTAKES
from tests.support.message_cases import CASES

ROOT = Path(nnx.__file__).parent
# What no case has to reach, and why.
NOT_MESSAGES = {
    "raise": "the same error again",
    "raise NotImplementedError": "a method that subclasses define",
    "raise NotPlannable": "a signal, caught where it is called",
    "raise _AnotherWrites(after.travelling | first_after.travelling)": "a signal, caught where it is called",
    "raise Incomparable": "a signal, caught where it is called",
    "raise RecursionError": "becomes the DepthError of the walk",
    "raise _SharedWritten(positions.union(written))": "a signal, caught where it is called",
    "raise AttributeError(name)": "protocols of Python ask for names and go without them",
}


@pytest.mark.parametrize(("act", "kind", "text"), CASES.values(), ids=CASES)
def test_message(act, kind, text):
    expected = nnx.NnxError if isinstance(kind, str) else kind
    with pytest.raises(expected, match=f"(?s){text}") as caught:
        act()
    if isinstance(kind, str):
        assert type(caught.value).__name__ == kind


# ---- no raise without a case ---------------------------------------------------------------------------------------


def raises_of(path):
    """Line -> statement of each `raise` in a file that has to have a case."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    return {n.lineno: ast.unparse(n) for n in found if ast.unparse(n) not in NOT_MESSAGES}


def reached(files, acts):
    """(file, line) of every raise that some act runs."""
    lines = {str(path): set(raises_of(path)) for path in files}
    hit = set()

    def each_line(frame, event, _):
        if event == "line" and frame.f_lineno in lines[frame.f_code.co_filename]:
            hit.add((frame.f_code.co_filename, frame.f_lineno))
        return each_line

    def each_call(frame, event, _):
        return each_line if frame.f_code.co_filename in lines else None

    before = sys.gettrace()
    for act in acts:
        sys.settrace(each_call)
        try:
            with pytest.raises(Exception):  # noqa: B017, PT011  # the tests above say which
                act()
        finally:
            sys.settrace(before)
    return hit


@pytest.mark.slow
def test_every_raise_of_the_core_has_a_case():
    files = [*ROOT.glob("*.py"), *ROOT.glob("graph/*.py"), *ROOT.glob("transforms/*.py")]
    hit = reached(files, [act for act, *_ in (*ERROR_CASES.values(), *CASES.values(), *MISTAKES.values())])
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {statement[:100]}"
        for path in files
        for line, statement in raises_of(path).items()
        if (str(path), line) not in hit
    ]
    assert missing == [], "\n".join(missing)
