"""Objects of flax.nnx where one of nnx_core is expected: what is done with one, and the path that the error names."""

import numpy as np
import optax
from flax import nnx as flax_nnx

import nnx_core as nnx

X = np.ones((2, 3), np.float32)


def theirs() -> flax_nnx.Linear:
    return flax_nnx.Linear(3, 2, rngs=flax_nnx.Rngs(0))


def ours() -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def mixed() -> nnx.Module:
    return nnx.Sequential(ours(), {"deep": [theirs()]}["deep"][0])


class Holder(nnx.Module):
    def __init__(self):
        self.parts = [ours(), {"layer": theirs()}]


#: What is done with one, and the path that the error names.
MISTAKES = {
    "split": (lambda: nnx.split(theirs()), "<root>"),
    "state of a part": (lambda: nnx.state(Holder()), r"parts\[1\]\.layer"),
    "jit argument": (lambda: nnx.jit(lambda m, x: m(x))(theirs(), X), r"args\[0\]"),
    "jit of one": (lambda: nnx.jit(theirs()), "<root>"),
    "jit of a method": (lambda: nnx.jit(theirs().__call__), "self"),
    "jit result": (lambda: nnx.jit(theirs)(), "result"),
    "grad": (lambda: nnx.grad(lambda m: m(X).sum())(mixed()), r"args\[0\]\.layers\[1\]"),
    "scan": (lambda: nnx.scan(lambda c, m: (m(c), None), in_axes=(nnx.Carry, 0))(X, theirs()), r"args\[1\]"),
    "cond": (lambda: nnx.cond(True, lambda m: m(X), lambda m: m(X), theirs()), r"args\[0\]"),
    "eval_shape": (lambda: nnx.eval_shape(theirs), "result"),
    "optimizer": (lambda: nnx.Optimizer(Holder(), optax.sgd(0.1), wrt=nnx.Param), r"parts\[1\]\.layer"),
    "update of one": (lambda: nnx.update(theirs(), nnx.state(ours())), "<root>"),
    "update from one": (lambda: nnx.update(ours(), flax_nnx.state(theirs())), "bias"),
    "merge": (lambda: nnx.merge(nnx.graphdef(ours()), flax_nnx.state(theirs())), "bias"),
    "pop": (lambda: nnx.pop(theirs(), nnx.Param), "<root>"),
    "iter_graph": (lambda: list(nnx.iter_graph(Holder())), r"parts\[1\]\.layer"),
    "recursive_map": (lambda: nnx.recursive_map(lambda _, x: x, Holder()), r"parts\[1\]\.layer"),
    "find_duplicates": (lambda: nnx.find_duplicates(Holder()), r"parts\[1\]\.layer"),
    "train": (lambda: Holder().train(), r"parts\[1\]\.layer"),
    "tabulate": (lambda: nnx.tabulate(theirs(), X), "<root>"),
    "Param of one": (lambda: nnx.Param(theirs().kernel), "Param"),
    "value of a Variable": (lambda: setattr(ours().kernel, "value", theirs()), "value"),
    "to_pure_dict": (lambda: nnx.to_pure_dict(flax_nnx.state(theirs())), "bias"),
    "filter_state": (lambda: nnx.filter_state(flax_nnx.state(theirs()), nnx.Param), "bias"),
    "split_rngs": (lambda: nnx.split_rngs(theirs(), splits=2), "<root>"),
    "capture": (lambda: nnx.capture(theirs(), nnx.Intermediate), "<root>"),
    "get_partition_spec": (lambda: nnx.get_partition_spec(flax_nnx.state(theirs())), "bias"),
}
