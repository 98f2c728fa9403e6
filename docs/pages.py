"""The pages of the site that stand nowhere as files: the start, from README.md, and the API reference.

Law: every public class and function of ours is on one page of its package; what is JAX's is in JAX's reference.
Run by mkdocs, see mkdocs.yml.
"""

import importlib
import re
from collections.abc import Iterator
from types import ModuleType

import mkdocs_gen_files

#: Page -> (title, module, where its names are made).
PAGES = {
    "transforms": ("Transforms", "nnx_core", ("nnx_core.transforms",)),
    "layers": ("Layers", "nnx_core", ("nnx_core.nn",)),
    "optim": ("Optimizers and metrics", "nnx_core", ("nnx_core.optim",)),
    "nnx_core": ("Modules, Variables, state and graphs", "nnx_core", ("nnx_core",)),
    "bridge": ("bridge", "bridge", ("bridge",)),
    "checkpoint": ("bridge.checkpoint", "bridge.checkpoint", ("bridge",)),
    "flax_nnx": ("bridge.flax_nnx", "bridge.flax_nnx", ("bridge",)),
    "equivalence": ("bridge.equivalence", "bridge.equivalence", ("bridge",)),
}


def main() -> None:
    """Write all of them."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        with open(name) as file:
            write("index.md" if name == "README.md" else name, as_page(file.read()))
    seen: set[str] = set()
    for page, (title, module, homes) in PAGES.items():
        names = sorted(set(names_of(importlib.import_module(module), homes)) - seen)
        if module == "nnx_core":
            seen.update(names)
        write(f"reference/{page}.md", "\n\n".join((f"# {title}", *(f"::: {module}.{name}" for name in names))))


def write(path: str, text: str) -> None:
    """One virtual page."""
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text + "\n")


def as_page(text: str) -> str:
    """With links as they are on the site: the guide's pages are beside the start, and the license is not on it."""
    text = text.replace("](migration_guide/", "](").replace("](README.md", "](index.md")
    return re.sub(r"\[([^]]*)\]\((?:LICENSE|benchmarks/[^)]*|examples/[^)]*|\.\./[^)]*)\)", r"\1", text)


def names_of(module: ModuleType, homes: tuple[str, ...]) -> Iterator[str]:
    """The public names of classes and functions that are made in one of these packages."""
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", "") or ""
        if isinstance(home, str) and any(home == own or home.startswith(f"{own}.") for own in homes):
            yield name


main()
