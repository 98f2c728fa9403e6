"""The inputs of a comparison: as they were given, drawn by a seed, or read from a batch file.

Law: the same seed gives the same inputs; what was given as an array is the same for every seed.
Knows arrays and files of arrays; knows nothing of models.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bridge.equivalence.dependence import CAUTIOUS, Range, narrower
from bridge.equivalence.drawing import Draw
from bridge.equivalence.subjects import ComparisonError


@dataclass(frozen=True)
class Inputs:
    """What the two calls are given.

    Attributes:
      args, kwargs: trees of arrays, abstract ones and flags.
      ranges: how far integers may be drawn, by the number of a leaf; by default 0 and 1.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ranges: Mapping[int, Range] = field(default_factory=dict)

    @property
    def is_drawn(self) -> bool:
        """Whether another seed gives other inputs."""
        leaves = jax.tree.leaves((self.args, dict(self.kwargs)))
        return any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)

    def drawn(self, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with arrays of this seed for the abstract ones."""
        return drawn((self.args, dict(self.kwargs)), Draw(seed).array, self.ranges, seed)

    def within(self, ranges: Sequence[Mapping[int, Range]]) -> Inputs:
        """The same with integers that are safe for all of some programs, each of which says so of its own."""
        safe: dict[int, Range] = {}
        for number in set().union(*ranges):
            known = [each.get(number, CAUTIOUS) for each in ranges]
            safe[number] = functools.reduce(narrower, known)
        return replace(self, ranges=safe)


def drawn(tree: Any, array: Callable[[Any, int], Any], ranges: Mapping[int, Range], seed: int) -> Any:
    """The tree with `array(leaf, upper end of its range)` for each leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = [ranges.get(number, CAUTIOUS)[seed % 2] for number in range(len(leaves))]
    return treedef.unflatten(list(map(array, leaves, ends)))


def inputs_of(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Inputs:
    """From what a caller gave; each path of an `.npz` is replaced by the arrays in it.

    Arrays named `arr_0`, `arr_1`, ... stand for positional arguments, others are keywords.

    Raises:
      ComparisonError: there is no such file, or it holds no arrays.

    >>> inputs_of([jax.ShapeDtypeStruct((2,), "int32")], {}).drawn(0)[0][0].dtype.name
    'int32'
    """
    args: list[Any] = []
    kwargs = dict(keywords)
    for x in inputs:
        if isinstance(x, str | os.PathLike) and str(x).endswith(".npz"):
            positional, named = _batch(Path(x))
            args += positional
            kwargs |= named
        else:
            args.append(x)
    return Inputs(tuple(args), kwargs)


def _batch(path: Path) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise _no_batch(path, str(error)) from error
    if not arrays:
        raise _no_batch(path, "no array in it")
    positional = sorted((name for name in arrays if re.fullmatch(r"arr_\d+", name)), key=lambda name: int(name[4:]))
    named = {name: x for name, x in arrays.items() if name not in positional}
    return [arrays[name] for name in positional], named


def _no_batch(path: Path, found: str) -> ComparisonError:
    return ComparisonError(
        f"the batch file {path} cannot be used",
        "an .npz of arrays: arr_0, arr_1, ... for positional arguments, other names for keywords",
        found,
        "Write it with numpy.savez(path, x, name=y).",
    )
