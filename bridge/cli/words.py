"""What users write on the command line, taken apart: sizes, shapes, `package.module:attribute`, `--rng seed=3`.

Law: what cannot be understood is wrong usage (exit code 2), with the word itself and one that would do; a module of
the user's that fails on import is named, without a traceback.
Knows words; knows nothing of checkpoints.
"""

from __future__ import annotations

import ast
import enum
import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from bridge._errors import BridgeError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if unit not in ("", "B")}
_UNITS |= {f"{unit}iB": 2 ** (10 * power) for power, unit in enumerate("KMGT", start=1)}
_BRACKETED = re.compile(r"(\w+)\[([^\]]*)\]")
_INTEGERS = {"i": "int", "s": "int", "u": "uint"}
# As JAX prints types in its programs.
_DTYPES = {"bf16": "bfloat16", "pred": "bool", "c64": "complex64", "c128": "complex128"}
_DTYPES |= {f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}
_DTYPES |= {f"{sign}{bits}": f"{name}{bits}" for sign, name in _INTEGERS.items() for bits in (8, 16, 32, 64)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", re.IGNORECASE)


ITEM_HELP = "An item of a composite checkpoint; several are joined; FIELD=NAME calls one FIELD in the tree."


def parse_items(words: list[str]) -> str | dict[str, str] | None:
    """The items that were chosen: none, one, or several as field -> item.

    >>> parse_items([]), parse_items(["state"]), parse_items(["params", "opt_state=optimizer"])
    (None, 'state', {'params': 'params', 'opt_state': 'optimizer'})
    """
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    chosen: dict[str, str] = {}
    for word in words:
        field, is_renamed, name = word.partition("=")
        if not field or (is_renamed and not name) or field in chosen:
            raise typer.BadParameter(f"{word!r} is not a new item, such as params or opt_state=optimizer")
        chosen[field] = name or field
    return chosen


def parse_bytes(text: str) -> int:
    """A number of bytes with a unit: decimal (`kB`, `MB`, `G`) or binary (`KiB`, `MiB`, `GiB`).

    >>> parse_bytes("2GiB"), parse_bytes("1.5 kB"), parse_bytes("4096")
    (2147483648, 1500, 4096)
    """
    match = _SIZE.fullmatch(text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    size = int(float(match[1]) * units[match[2].lower()]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a number of bytes, such as 512MiB or 2GiB")
    return size


def parse_job(text: str) -> tuple[str, int, int]:
    """The address of process 0, which process this is, and how many there are; alone without a text.

    >>> parse_job("10.0.0.1:4321,1,4"), parse_job("")
    (('10.0.0.1:4321', 1, 4), ('', 0, 1))
    """
    if not text:
        return "", 0, 1
    match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text.strip())
    if match is None or int(match[2]) >= int(match[3]):
        raise typer.BadParameter(f"{text!r} is no process of a job, such as 10.0.0.1:4321,0,4 for the first of four")
    return match[1], int(match[2]), int(match[3])


def parse_tolerance(text: str) -> float:
    """How far numbers may be apart: zero or more, and not NaN, to which nothing compares.

    >>> parse_tolerance("1e-6")
    1e-06
    """
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = math.nan
    if not tolerance >= 0:
        raise typer.BadParameter(f"{text!r} is not a tolerance, such as 0 or 1e-6")
    return tolerance


def parse_input(text: str) -> Any:
    """An abstract array from `f32[2,28,28,1]` or `2,28,28,1:float32`; float32 without a type, a scalar without numbers.

    >>> parse_input("bf16[2,28,28,1]"), parse_input("4").shape
    (ShapeDtypeStruct(shape=(2, 28, 28, 1), dtype=bfloat16), (4,))
    >>> parse_input("2,3:int32") == parse_input("i32[2,3]")
    True
    """
    import jax

    bracketed = _BRACKETED.fullmatch(text.strip())
    if bracketed is None:
        shape, _, dtype = text.partition(":")
    else:
        shape, dtype = bracketed[2], _DTYPES.get(bracketed[1], bracketed[1])  # to numpy, "i8" is of eight bytes
    try:
        sizes = tuple(int(size) for size in shape.split(",") if size.strip())
        if any(size < 0 for size in sizes):
            raise ValueError("a negative size")
        return jax.ShapeDtypeStruct(sizes, jax.numpy.dtype(dtype or "float32"))
    except (ValueError, TypeError) as error:
        such_as = "such as f32[2,28,28,1] or 2,28,28,1:float32"
        raise typer.BadParameter(f"{text!r} is not an input, {such_as} ({error})") from None


def parse_keyword(text: str) -> tuple[str, Any]:
    """Name and value of `train=False`, `mode="eval"` or `scale=0.5`: what the models are called with.

    >>> parse_keyword("train=False"), parse_keyword("deterministic=true"), parse_keyword("mode=eval")
    (('train', False), ('deterministic', True), ('mode', 'eval'))
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise typer.BadParameter(f"{text!r} is no keyword argument, such as train=False")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_rng(text: str) -> str | int:
    """`drop`, `keep`, or the number of `seed=N`.

    >>> parse_rng("drop"), parse_rng("seed=7")
    ('drop', 7)
    """
    if text in ("drop", "keep"):
        return text
    match = re.fullmatch(r"seed=(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is none of drop, keep, seed=N")
    return int(match[1])


def load_attribute(reference: str) -> Any:
    """What `package.module:attribute` names; modules in the working directory are found too.

    >>> load_attribute("math:pi")
    3.141592653589793
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise typer.BadParameter(f"{reference!r} is not of the form package.module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with users_code(f"{reference!r}: cannot import {module_name!r}"):
        found: Any = importlib.import_module(module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = ", ".join(sorted(key for key in vars(found) if not key.startswith("_"))[:12])
            raise typer.BadParameter(f"{reference!r}: no {name!r} in {module_name!r}; it has {public or 'nothing'}")
        found = getattr(found, name)
    return found


@contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Whatever modules and models of the user's raise in here is wrong usage, told after `doing`, no traceback."""
    try:
        yield
    except (BridgeError, typer.BadParameter):
        raise
    except SystemExit as error:  # of the user's, at import or in a call: it must not become our exit code
        raise typer.BadParameter(f"{doing}: it ends the process, sys.exit({error.code!r})") from None
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        raise typer.BadParameter(f"{doing}: {type(error).__name__}: {error}") from None


class SourceFormat(enum.StrEnum):
    """The formats that can be read."""

    ORBAX = "orbax"
    ORBAX_V1 = "orbax-v1"
    SAFETENSORS = "safetensors"
    MSGPACK = "msgpack"
    NPZ = "npz"
