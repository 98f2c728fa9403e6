"""What a test has let go of, freed at once."""

import gc


def collect() -> None:
    """Free cycles that were made and dropped just now.

    They are in the two young generations, see the thresholds in tests/conftest.py: to look through the third one,
    with all that the suite has traced, takes a second.
    """
    gc.collect(1)
