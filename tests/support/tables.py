"""Tables of `nnx.tabulate`, drawn for a test and taken apart again."""

import re

import flax.nnx

import nnx_core as nnx

PLAIN = {"force_terminal": False, "width": 240}


def table(obj, *args, **kwargs):
    return nnx.tabulate(obj, *args, console_kwargs=PLAIN, **kwargs)


def cells(text):
    """Rows of a drawn table, each a list of cells; a cell is its lines joined by newlines."""
    rows = [[]]
    for line in text.splitlines():
        if line[:1] in "┏┡├└":
            rows.append([])
        elif line[:1] in "│┃":
            rows[-1].append([cell.strip() for cell in re.split("[│┃]", line)[1:-1]])
    return [["\n".join(part).strip() for part in zip(*row, strict=True)] for row in rows if row]


def theirs_table(model, *args, **options):
    """flax.nnx's table. It leaves inherited methods behind as attributes of each class, `sow` too: `flax.nnx.capture`
    of method outputs would then call itself for ever, in whichever test comes next."""
    before = {type(x): set(vars(type(x))) for _, x in flax.nnx.iter_modules(model)}
    try:
        return flax.nnx.tabulate(model, *args, **options)
    finally:
        for kind, names in before.items():
            for name in set(vars(kind)) - names:
                delattr(kind, name)


def paths(text):
    return [row[0] for row in cells(text)[1:-1]]
