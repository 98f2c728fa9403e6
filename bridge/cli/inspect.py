"""`linen-nnx inspect`: what a checkpoint of any format holds, from its metadata.

Law: no array is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge._errors import show_path
from bridge.cli.help import choices
from bridge.cli.show import Json, console, human_bytes, plain, print_json, print_table
from bridge.cli.words import ITEM_HELP, SourceFormat, parse_items

if TYPE_CHECKING:
    from bridge.checkpoint.formats.protocol import Source
    from bridge.checkpoint.tree.layout import Layout, Leaf

_Format = Annotated[
    SourceFormat | None,
    typer.Option(metavar="FORMAT", help=f"The format, instead of the detected one: {choices(SourceFormat)}."),
]


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or file, step folder or folder of steps.")],
    step: Annotated[int | None, typer.Option(help="The step to look at; the latest by default.")] = None,
    item: Annotated[list[str], typer.Option(metavar="NAME", help=ITEM_HELP)] = [],  # noqa: B006
    source_format: _Format = None,
    as_json: Json = False,
) -> None:
    """Show path, shape, dtype, bytes and collection of every leaf of a checkpoint. Reads no array.

    Exit codes: 0 shown, 1 an error, 2 wrong usage.
    """
    from bridge.checkpoint.formats.open import open_source

    format = source_format and source_format.value
    with closing(open_source(checkpoint, format=format, step=step, item=parse_items(item))) as source:
        found = source.tree.layout
        leaves = sorted(source.tree.leaves.values(), key=lambda leaf: leaf.path)
        if as_json:
            print_json(_as_json(source, found, leaves))
        else:
            _print_tables(source, found, leaves)


def describe_source(source: Source, found: Layout) -> dict[str, Any]:
    """Where a checkpoint is, its format and its layout, each with the reason; JSON types."""
    return {
        "root": str(source.path),
        "format": source.format,
        "format_reason": source.reason,
        "step": source.step,
        "steps": list(source.around.steps),
        "item": source.item,
        "items": dict(source.around.items),
        "left_out": [{"name": item.name, "why": item.why, "asked": item.asked} for item in source.around.left_out],
        "layout": found.kind.value,
        "reason": found.reason,
        "states": [list(place) for place in _states(source)],
    }


def print_source(screen: Any, source: Source, found: Layout) -> None:
    """The same as lines of text."""
    from bridge.checkpoint.tree.inner import below

    screen.print(plain(f"checkpoint: {source.path}"), soft_wrap=True)
    screen.print(plain(f"format: {source.format} ({source.reason})"), soft_wrap=True)
    if source.step is not None:
        screen.print(f"step: {source.step}")
        screen.print(f"steps: {', '.join(map(str, source.around.steps))}{_which(source)}", soft_wrap=True)
    for line in _items(source):
        screen.print(plain(line), soft_wrap=True)
    screen.print(plain(f"layout: {found.kind.value} ({found.reason})"), soft_wrap=True)
    for place in _states(source):
        inner = below(source.tree, place).layout
        screen.print(
            plain(f"training state at {show_path(place)}: {inner.kind.value} ({inner.reason})"), soft_wrap=True
        )
    if found.boxed:
        screen.print(f"boxes: {len(found.boxed)} paths end in a lone 'value' (nn.Partitioned or the like)")


def _states(source: Source) -> list[tuple[str, ...]]:
    """Training states below the root, where it is none itself."""
    from bridge.checkpoint.tree.inner import states_in

    return states_in(source.tree)


def _which(source: Source) -> str:
    """Which of several steps it is."""
    steps = source.around.steps
    return " (the latest)" if len(steps) > 1 and source.step == max(steps) else ""


def _items(source: Source) -> list[str]:
    """A line for each item of a composite checkpoint; none for the only one."""
    if len(source.around.items) < 2:
        return []
    left_out = {item.name: item.why for item in source.around.left_out}
    lines = []
    for name, holds in source.around.items.items():
        lines.append(f"item {name}: {holds}" + (f"; left out: {left_out[name]}" if name in left_out else ""))
    return [*lines, *source.around.notes]


def _print_tables(source: Source, found: Layout, leaves: list[Leaf]) -> None:
    screen = console()
    rows = [
        (show_path(leaf.path), leaf.shape, leaf.dtype, human_bytes(leaf.nbytes), _collection(leaf, found))
        for leaf in leaves
    ]
    totals = [(name, count, human_bytes(size)) for name, (count, size) in _totals(leaves, found).items()]
    totals.append(("total", len(leaves), human_bytes(source.tree.nbytes)))
    print_source(screen, source, found)
    print_table(screen, ("path", "shape", "dtype", "bytes", "collection"), rows, right=("bytes",))
    print_table(screen, ("collection", "leaves", "bytes"), totals, right=("leaves", "bytes"))


def _collection(leaf: Leaf, found: Layout) -> str:
    from bridge.checkpoint.tree.layout import collection_of

    return collection_of(leaf.path, found.kind)


def _totals(leaves: list[Leaf], found: Layout) -> Mapping[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for leaf in leaves:
        name = _collection(leaf, found)
        count, size = totals.get(name, (0, 0))
        totals[name] = count + 1, size + leaf.nbytes
    return totals


def _as_json(source: Source, found: Layout, leaves: list[Leaf]) -> dict[str, Any]:
    return describe_source(source, found) | {
        "nbytes": source.tree.nbytes,
        "leaves": [
            {
                "path": list(leaf.path),
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "nbytes": leaf.nbytes,
                "collection": _collection(leaf, found),
            }
            for leaf in leaves
        ],
        "empty": [list(path) for path in sorted(source.tree.empty)],
        "metadata": {name: value for name, value in source.metadata.items() if name != "hashes"},
        "json_items": dict(source.around.json_items),
        "boxed": [list(path) for path in sorted(found.boxed)],
        "collections": {name: {"leaves": n, "nbytes": size} for name, (n, size) in _totals(leaves, found).items()},
    }
