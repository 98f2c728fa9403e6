"""Hostile trees of Linen variables, which hypothesis draws, and their comparison by identity."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from hypothesis import strategies as st

import nnx_core as nnx
from bridge.variables.metadata import NNXMeta

COLLECTIONS = ("params", "batch_stats", "ema", "cache", "a@b", "@", "")
NAMES = (
    "w", "Dense_0", "module", "rngs", "train", "eval", "sow", "lazy_init", "set_attributes", "items", "0", "12",
    "a/b", "a.b", "", "w@ema", "w@params", "w@ema@", "@", "@ema", "@%", "é", "value",
)  # fmt: skip
names = st.sampled_from(NAMES) | st.text(max_size=3)


def array(seed: int) -> np.ndarray:
    return np.full((seed % 3,), seed, "float32")


arrays = st.integers(0, 99).map(array)
boxes = st.one_of(
    st.builds(nn.Partitioned, arrays, st.sampled_from([("a",), (None,), (), ["a"]])),
    st.builds(nn.LogicallyPartitioned, arrays, st.just(("a",)), rules=st.sampled_from([None, [("a", ["x"])]])),
    st.builds(NNXMeta, st.sampled_from([nnx.Param, nnx.BatchStat]), arrays, st.sampled_from([{}, {"unit": "m"}])),
)
values = st.one_of(
    arrays,
    boxes,
    st.tuples(arrays, arrays),
    st.lists(arrays, max_size=2),
    st.none(),
    st.dictionaries(st.integers(0, 3), arrays, max_size=2),
)
trees = st.recursive(values, lambda child: st.dictionaries(names, child, max_size=4), max_leaves=8)
levels = st.dictionaries(names, trees, max_size=4)
variables = st.dictionaries(st.sampled_from(COLLECTIONS), levels, max_size=4)


def dict_of(tree: Any) -> Any:
    """Order-free, comparable form: arrays by identity, boxes by type, static fields and content."""
    if isinstance(tree, Mapping):
        return {key: dict_of(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree), [dict_of(x) for x in tree]
    if tree is None or isinstance(tree, np.ndarray | jax.Array):
        return id(tree)
    return jax.tree.structure(tree), [id(x) for x in jax.tree.leaves(tree)]
