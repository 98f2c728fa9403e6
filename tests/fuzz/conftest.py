"""How long to fuzz: a fixed number of fixed programs, or random ones for some minutes."""

import itertools
import random
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz import programs as p

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def pytest_addoption(parser):
    """`--fuzz-minutes M`, `--fuzz-seed N`, `--fuzz-without NAMES`."""
    parser.addoption("--fuzz-minutes", type=float, help="random programs for this long, in each test that fuzzes")
    parser.addoption("--fuzz-seed", type=int, help="where random programs begin; printed where it is drawn")
    parser.addoption("--fuzz-without", default="", help="names to leave out, with commas: to look behind a known fault")


def _seed(config):
    given_seed = config.getoption("--fuzz-seed", None)
    if given_seed is None:
        config.option.fuzz_seed = random.SystemRandom().randrange(1 << 32)
    return config.option.fuzz_seed


def pytest_report_header(config):
    """The seed, so that a run can be repeated."""
    if config.getoption("--fuzz-minutes", None):
        return f"fuzz: {config.getoption('--fuzz-minutes')} minutes a test, --fuzz-seed {_seed(config)}"
    return None


@pytest.fixture
def explore(request):
    """explore(scope, check, examples): check holds for programs of that scope."""
    config = request.config
    minutes = config.getoption("--fuzz-minutes", None)
    without = frozenset(filter(None, config.getoption("--fuzz-without", "").split(",")))

    def explore(scope, check, examples):
        strategy = p.programs(p.dataclasses.replace(scope, without=without))
        run = given(program=strategy)(lambda program: check(program))
        if minutes is None:
            settings(max_examples=examples, suppress_health_check=QUIET)(run)()
            return
        end = time.monotonic() + 60 * minutes
        for number in itertools.count(_seed(config)):
            if time.monotonic() > end:
                return
            some = settings(max_examples=100, derandomize=False, suppress_health_check=QUIET)
            print(f"--fuzz-seed {number}")
            seed(number)(some(given(program=strategy)(lambda program: check(program))))()

    return explore
