"""One session a check, each in an environment of its own. The gate is `.ci/run`; this runs one check.

nox            every check on the Python at hand
nox -s tests   the suite on Python 3.11, 3.12 and 3.13, as far as they are installed
nox -s oldest  the suite on the lowest versions that pyproject.toml allows; `newest` on the highest
nox -s grids   the suite with the full grids of dtypes, optimizers and pairs, of which it otherwise runs the diagonal
nox -s models  what packages on PyPI ship: Linen networks through the bridge, programs in flax.nnx on nnx_core
nox -s fuzz    random programs over random graphs: `nox -s fuzz -- --fuzz-minutes 60 --fuzz-seed 1`
nox -s docs    the site, the guide and the API reference, into build/site
"""

import re

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "doctest", "newest"]
nox.options.default_venv_backend = "venv"
nox.options.error_on_external_run = True

SUITE = ("python", "-m", "pytest", "-n", "2")
OPTIMIZED = {"TESTS_OPTIMIZED": "1"}  # compiled as for users, see tests/support/compiler.py

# What `models` installs without its dependencies, which would hold the other packages back.
BESIDE = (
    "blaxbird>=0.2,<0.3",  # jax-ai-stack pins an older jax
    "canvit-nnx>=0.2,<0.3; python_version >= '3.12'",  # it needs Python 3.12, and jax 0.11.2, which does too
    "canvit-core>=0.2.1,<0.3; python_version >= '3.12'",  # asks for huggingface-hub 1.3, transformers 4.57 for < 1
)


@nox.session
def lint(session):
    """Lint, format, and the rooms of the house."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session):
    """Types of nnx_core/graph and nnx_core/transforms, strictly."""
    session.install("-e", ".[lint]")
    session.run("mypy")


@nox.session
def doctest(session):
    """Every example in a docstring."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "--doctest-modules", "nnx_core", "bridge")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session):
    """The suite, on each Python."""
    session.install("-e", ".[test]")
    session.run(*SUITE, *session.posargs)


@nox.session
def newest(session):
    """The suite on the newest releases within pyproject.toml's ranges."""
    session.install("--upgrade", "-e", ".[test]")
    session.run(*SUITE, *session.posargs)


@nox.session(python="3.11")
def oldest(session):
    """The suite on the lower end of every range."""
    session.install("-e", ".[test]", *lowest())
    session.run(*SUITE, *session.posargs, env=OPTIMIZED)


@nox.session
def grids(session):
    """The suite with every combination that `grid` marks: what the diagonal stands for."""
    session.install("-e", ".[test]")
    session.run(*SUITE, "--grids", *session.posargs, env=OPTIMIZED)


@nox.session
def models(session):
    """Networks and programs that nobody here wrote, bit for bit. Not in the gate: heavy to install and compile."""
    session.install("-e", ".[test,models]")
    session.install("--no-deps", *BESIDE)
    session.run("python", "-m", "pytest", "tests/third_party", *session.posargs, env=OPTIMIZED)


@nox.session
def fuzz(session):
    """Random programs, for ten minutes a test or `-- --fuzz-minutes M`; the seed is printed."""
    session.install("-e", ".[test]")
    posargs = session.posargs
    if not any(argument.startswith("--fuzz-minutes") for argument in posargs):
        posargs = ["--fuzz-minutes", "10", *posargs]
    # Compiled, XLA may leave out a rounding to half precision, which Python does: here both are to agree bit for bit.
    env = {"XLA_FLAGS": "--xla_allow_excess_precision=false", **OPTIMIZED}
    session.run("python", "-m", "pytest", "tests/fuzz", "-k", "nnx_core_does_what", *posargs, env=env)


@nox.session
def docs(session):
    """The site: a dead link, or a name that is not found, is an error."""
    session.install("-e", ".[docs]")
    env = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    session.run("mkdocs", "build", "--strict", env=env)


def lowest() -> list[str]:
    """`name==version` for every `name>=version` that users install: not test, lint or docs."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    ranges = [*project["dependencies"], *extras["orbax"], *extras["demo"], *extras["plot"], *extras["treescope"]]
    matches = [re.match(r"([\w-]+)>=([\d.]+)", entry) for entry in ranges]
    return [f"{found[1]}=={found[2]}" for found in matches if found]
