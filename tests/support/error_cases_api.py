"""Mistakes in what walks a graph, updates it, or says how its leaves are treated; a part of `error_cases`.

Knows users' mistakes and the words for them, as that does.
"""

import jax
import jax.numpy as jnp

import nnx_core as nnx
from nnx_core.graph._errors import LeafCountError, ReadOnlyError
from tests.strategies import Affine, Tied
from tests.support.arrays import ones

X = ones(2, 3)


class Mixed(nnx.Module):
    """A Variable that can be mapped, and one that cannot."""

    def __init__(self, shape=()):
        self.w = nnx.Param(jnp.ones((3, 2)))
        self.count = nnx.BatchStat(jnp.ones(shape))


def numbers():
    return {"n": 1, "w": nnx.Param(jnp.ones(2))}


def prefix_of_a_model(graph):
    model = Affine()
    nnx.vmap(lambda m: None, in_axes=(model,), graph=graph)


def renamed_axis(metadata):
    v = nnx.Param(jnp.ones((4, 2)), labels=("x", "y"))
    nnx.vmap(lambda v: None, transform_metadata={nnx.PARTITION_NAME: "l", **metadata})(v)


def pmap_of_what_fails():
    def fail(x):
        raise ValueError("mine")

    nnx.pmap(fail)(jnp.ones((1, 2)))


CASES = {
    "sharing where a walk forbids it": (
        lambda: list(nnx.iter_graph(Tied(), graph=False)),
        "SharedReferenceError",
        r"^Found a shared Affine where graph=False forbids sharing:\n  decode\n  encode\nPass graph=True",
    ),
    "update by position": (
        lambda: nnx.update([nnx.Param(1.0)], [2.0]),
        TypeError,
        r"^nnx\.update needs States or mappings, found 1 list\. Give each value its path\.",
    ),
    "update of what is not there": (
        lambda: nnx.update(Affine(), {"z": 1.0}),
        "StateMismatchError",
        r"In the state, but not in the graph:\n  z",
    ),
    "update of nothing but arrays": (
        lambda: nnx.update({"w": nnx.Param(jnp.ones(2))}, {"z": 1.0}),
        "StateMismatchError",
        r"In the state, but not in the graph:\n  z",
    ),
    "strict update of a number alone": (
        lambda: nnx.update(numbers(), {"n": 2}, strict=True),
        "StateMismatchError",
        r"Missing from the state:\n  w",
    ),
    "update inside of a tuple": (
        lambda: nnx.update((X,), {0: X}),
        ReadOnlyError,
        r"^\[0\] cannot be written in place: it is in a tuple, which cannot be changed\.\nExpected a module, list",
    ),
    "too few leaves": (
        lambda: nnx.merge(nnx.graphdef(Affine()), [X]),
        LeafCountError,
        r"^Incorrect number of leaves: expected 2, found 1\.",
    ),
    "clone of arrays without Variables": (
        lambda: nnx.clone(Affine(), variables=False, copy_arrays=True),
        ValueError,
        r"^nnx\.clone: copy_arrays=True with variables=False asks for new arrays.*Leave one of the two out",
    ),
    "model as a prefix": (
        lambda: prefix_of_a_model(True),
        "SpecError",
        r"^in_axes\[0\] is a Affine, expected a treatment of it\.\nGive one for the whole, nnx\.StateAxes",
    ),
    "model as a prefix without sharing": (
        lambda: prefix_of_a_model(False),
        "SpecError",
        r"^in_axes\[0\]\.calls: expected a treatment, found a Count\.\nGive nnx\.prefix\(model",
    ),
    "prefix without a rule": (
        lambda: nnx.prefix(Mixed(), {nnx.Param: 0}),
        "FilterError",
        r"^No filter of .* matches count \(BatchStat\)\. End with",
    ),
    "gradient of integers": (
        lambda: nnx.grad(lambda m: m.kernel.sum(), graph=False)(Affine()),
        "NotDifferentiableError",
        r"^grad requires real- or complex-valued inputs, found\n  args\[0\]\.calls: int32\nName what to",
    ),
    "argnums that are no positions": (
        lambda: nnx.grad(lambda m: 0.0, argnums=Affine()),
        "SpecError",
        r"^argnums: expected positions of arguments or DiffStates, found a Affine\.\nName the argument",
    ),
    "vmap of a scalar": (
        lambda: nnx.vmap(lambda m: None)(Mixed()),
        "SpecError",
        r"^vmap of .*: the BatchStat at args\[0\]\.count is mapped over axis 0, and has the shape \(\)\.\nGive it",
    ),
    "vmap of sizes that differ": (
        lambda: nnx.vmap(lambda m: None)(Mixed((4,))),
        "SpecError",
        r"^vmap of .*: expected one size, found inconsistent sizes of the mapped axes\n  args\[0\]\.count: 4\n",
    ),
    "another name under another key": (
        lambda: renamed_axis({"labels": "L"}),
        "MetadataError",
        r"^Axis 0 of a Param with labels \('x', 'y'\) is mapped under the name 'L', found 'x'\.",
    ),
    "pmap of a function that fails": (pmap_of_what_fails, ValueError, r"mine"),
    "array in a tree of treatments": (
        lambda: nnx.vmap(lambda m: None, in_axes=(jax.tree.map(lambda x: x, Mixed()),), graph=False),
        "SpecError",
        r"^in_axes\[0\]\.count: expected a treatment, found a BatchStat",
    ),
}
