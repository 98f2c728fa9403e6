"""The page of errors is what the error classes say."""

import pytest

from tests import error_page


@pytest.mark.slow
def test_the_page_is_the_one_that_would_be_written():
    assert error_page.PAGE.read_text() == error_page.page(), "python -m tests.error_page"


def test_an_entry_has_the_builtin_class_the_meaning_and_an_example():
    class OwnError(ValueError):
        """It went wrong.

        Args:
          nothing.
        """

    text = error_page.entry(OwnError, "at a/b: expected 1, found 2")
    assert text == "### OwnError\n\nIt went wrong. Also: `ValueError`.\n\n```text\nat a/b: expected 1, found 2\n```"
