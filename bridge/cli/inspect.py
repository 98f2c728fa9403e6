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
from bridge.cli.words import SourceFormat

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
    item: Annotated[str | None, typer.Option(help="The item of a composite checkpoint.")] = None,
    source_format: _Format = None,
    as_json: Json = False,
) -> None:
    """Show path, shape, dtype, bytes and collection of every leaf of a checkpoint. Reads no array.

    Exit codes: 0 shown, 1 an error, 2 wrong usage.
    """
    from bridge.checkpoint.formats.open import open_source

    format = source_format and source_format.value
    with closing(open_source(checkpoint, format=format, step=step, item=item)) as source:
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
        "item": source.item,
        "layout": found.kind.value,
        "reason": found.reason,
    }


def print_source(screen: Any, source: Source, found: Layout) -> None:
    """The same as lines of text."""
    screen.print(plain(f"checkpoint: {source.path}"), soft_wrap=True)
    screen.print(plain(f"format: {source.format} ({source.reason})"), soft_wrap=True)
    if source.step is not None:
        screen.print(f"step: {source.step}")
    screen.print(plain(f"layout: {found.kind.value} ({found.reason})"), soft_wrap=True)
    if found.boxed:
        screen.print(f"boxes: {len(found.boxed)} paths end in a lone 'value' (nn.Partitioned or the like)")


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
        "boxed": [list(path) for path in sorted(found.boxed)],
        "collections": {name: {"leaves": n, "nbytes": size} for name, (n, size) in _totals(leaves, found).items()},
    }
