"""Models written once and made in nnx_core and in flax.nnx, and random graphs of both."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx
from hypothesis import strategies as st

import nnx_core as nnx


def make_block(lib: Any) -> type:
    """A class with shared layers, statistics, dropout and something sown."""

    class Block(lib.Module):
        def __init__(self, rngs):
            self.layers = lib.List([lib.Linear(4, 4, rngs=rngs), lib.BatchNorm(4, rngs=rngs)])
            self.drop = lib.Dropout(0.5, rngs=rngs)
            self.tied = self.layers[0]
            self.me = self

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            x = self.drop(x)
            self.sow(lib.Intermediate, "h", x)
            return self.me.tied(x)

        def encode(self, x):
            return self.layers[0](x)

        @property
        def weight(self):
            return self.layers[0].kernel[...]

    return Block


TheirBlock, OurBlock = make_block(flax_nnx), make_block(nnx)
for _name, _block in {"TheirBlock": TheirBlock, "OurBlock": OurBlock}.items():
    _block.__name__ = _block.__qualname__ = _name  # where pickle looks for it


def plain(lib: Any, node: Any, *filters: Any) -> dict[str, Any]:
    """The state of a module of `lib` as plain dicts, keys of random streams left out."""
    return lib.to_pure_dict(lib.state(node, *(filters or (lib.Not(lib.RngKey),))))


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(9), (3, 4))


# ---- random graphs ----

#: For each node, for each of its children: the number of another node, or None for a Variable, and whether it is new.
graphs = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["node", "param", "stat"])), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


def make_graph(lib: Any, recipe: list[list[tuple[int, str]]]) -> Any:
    """The graph that `recipe` says: nodes and Variables are shared, and there are cycles."""

    class Node(lib.Module):
        pass

    nodes = [Node() for _ in recipe]
    params = [lib.Param(jnp.full((2,), i + 1.0)) for i in range(5)]
    stats = [lib.BatchStat(jnp.zeros(())) for _ in range(5)]
    for i, (node, children) in enumerate(zip(nodes, recipe, strict=True)):
        node.number = i
        for j, (index, kind) in enumerate(children):
            chosen = nodes[index % len(nodes)] if kind == "node" else (params if kind == "param" else stats)[index]
            setattr(node, f"child{j}", chosen)

    class Root(lib.Module):
        def __init__(self):
            self.start = nodes[0]

        def __call__(self, x):
            for _, node in lib.iter_graph(self):
                if isinstance(node, lib.Param):
                    x = x * node[...]
                elif isinstance(node, lib.BatchStat):
                    node[...] += x.sum()
            return x

    return Root()
