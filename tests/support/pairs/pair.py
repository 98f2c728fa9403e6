"""What a pair of equal models is, and a fault planted into one of them.

Law: both sides of a pair were written by hand from one description, or one wraps the other; every
variable is random, so that nothing that was swapped or forgotten hides; values cross by rules
of the bridge alone.
Knows `compare` by its signature; knows nothing of how it works. The models stand beside this file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx_core as nnx
from bridge import ToNNX
from bridge.checkpoint.rules.apply import Rules
from bridge.checkpoint.rules.rule import Rule
from bridge.variables.kinds import collection_of
from bridge.variables.load import load_variables
from bridge.variables.mapping import leaves, tree_of
from tests.support.arrays import key

Location = tuple[str, ...]


@dataclass
class Sides:
    """One call of `compare`: what is compared, on which inputs, and with which options."""

    a: Any
    b: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def compare(self, **more: Any) -> Any:
        from bridge.equivalence.compare import compare

        return compare(self.a, self.b, *self.inputs, **self.options | more)


@dataclass(frozen=True)
class Pair:
    """Two models that are the same one.

    Attributes:
      sides: (factory of the native model, or None for the right one) -> what to compare.
      layers: path in a -> path in b of layers that must be among the rows, paired.
      left_out: words in what `report.not_compared` may list; nothing else may be left out.
    """

    name: str
    sides: Callable[..., Sides]
    layers: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A pair of which the second model was made wrong.

    Attributes:
      plant: changes the native model in place, or returns another.
      model: in place of the pair's factory of the native model.
      a, b: paths of the layer that is wrong; "" for the model as a whole, where no layer of it is.
      causes: the causes that are right to name.
      options: more for `compare`.
      also: further layers (paths in a) that are wrong by themselves.
      finding: what at least one finding that is not equal must be of.
      behind: paths in a of layers that are right and must be "fed wrong".
    """

    name: str
    pair: str
    a: str
    b: str
    causes: str
    plant: Callable[[Any], Any] | None = None
    model: Callable[[nnx.Rngs], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    finding: str = "output"
    behind: tuple[str, ...] = ()

    def sides(self, pairs: Mapping[str, Pair]) -> Sides:
        make = pairs[self.pair].sides
        sides = make() if self.model is None else make(self.model)
        if self.plant is not None:
            sides.b = self.plant(sides.b) or sides.b
        sides.options |= self.options
        return sides


# ---- values --------------------------------------------------------------------------------------


def drawn(module: Any, *inputs: Any, seed: int = 3, **kwargs: Any) -> dict[str, Any]:
    """Linen's variables with random contents of sensible sizes; caches and counters at zero."""
    streams = {name: key(n) for n, name in enumerate(("params", "dropout", "noise"))}
    shapes = jax.eval_shape(lambda *inputs: module.init(streams, *inputs, **kwargs), *inputs)
    draw = np.random.default_rng(seed)
    values = [(at, _random(draw, at, x)) for at, x in leaves(shapes) if at[0] != "intermediates"]
    return tree_of(values)


def _random(draw: np.random.Generator, at: Location, x: Any) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact) or at[0] == "cache":
        return jnp.zeros(x.shape, x.dtype)
    if at[-1].endswith(("var", "sigma", "scale")):
        return jnp.asarray(draw.uniform(0.5, 1.5, x.shape).astype(x.dtype))
    if len(x.shape) < 2:
        return jnp.asarray(draw.uniform(-0.5, 0.5, x.shape).astype(x.dtype))
    numbers = draw.normal(size=x.shape)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        numbers = numbers + 1j * draw.normal(size=x.shape)
    return jnp.asarray((numbers / np.prod(x.shape[:-1]) ** 0.5).astype(x.dtype))


def rules(*table: tuple[Any, Any] | Rule) -> Rules:
    r"""`("Dense_0", "first")` renames what is below; a Rule stands for itself."""
    return Rules([row if isinstance(row, Rule) else renamed(*row) for row in table])


def renamed(source: str, target: str) -> Rule:
    return Rule(["*", *source.split("/"), "**"], ["*", *target.split("/"), "**"])


def converted(how: Any, variables: Mapping[str, Any]) -> dict[Location, Any]:
    """Linen's values by the locations of NNX; `how` is Rules, or what `derive` returns."""
    return how.convert(dict(leaves(variables)))


def native(make: Callable[[nnx.Rngs], Any], how: Any, variables: Mapping[str, Any]) -> Any:
    """The native model with Linen's values; every one of them, and no other."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    values = converted(how, variables)
    located = _located(model)
    assert located.keys() == values.keys(), located.keys() ^ values.keys()
    for at, variable in located.items():
        assert variable.shape == values[at].shape, at
        variable.set_value(jnp.asarray(values[at]))
    _fill_streams(model)
    return model


def _located(model: nnx.Module) -> dict[Location, Any]:
    return {
        (collection_of(type(x)), *map(str, path)): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState)
    }


def _fill_streams(model: nnx.Module) -> None:
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.RngKey):
            x.set_value(jnp.broadcast_to(key(5), x.shape))
        elif isinstance(x, nnx.RngCount):
            x.set_value(jnp.zeros(x.shape, x.dtype))


def wrapped(module: Any, variables: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> ToNNX:
    """The ToNNX of a Linen module, with these values."""
    streams = dict.fromkeys(("params", "dropout", "noise"), 0)

    def make() -> ToNNX:
        return ToNNX(module, rngs=nnx.Rngs(**streams), parity=True).lazy_init(*inputs, **kwargs)

    model = nnx.eval_shape(make)
    _fill_streams(model)
    assert load_variables(model, variables).complete
    return model


# ---- ways to make a pair -------------------------------------------------------------------------


def twins(
    name: str,
    linen: Callable[[], Any],
    make: Callable[[nnx.Rngs], Any],
    inputs: Callable[[], Sequence[Any]],
    *table: Any,
    layers: Mapping[str, str] | None = None,
    init: Mapping[str, Any] | None = None,
    given: bool = True,
    left_out: tuple[str, ...] = (),
    **options: Any,
) -> Pair:
    """Linen against a native twin.

    Args:
      inputs: makes the inputs, since nothing is computed while tests are collected.
      table: rows of `rules`.
      init: keywords of `init` alone; those of the call are among `options`, and serve `init` too.
      given: whether `compare` gets the rules too, or finds the pairs of layers by itself.
    """
    how = rules(*table)

    def sides(factory: Any = None) -> Sides:
        module, arguments = linen(), tuple(inputs())
        called = {k: v for k, v in options.items() if k in ("train", "method")}
        variables = drawn(module, *arguments, **called | dict(init or {}))
        model = native(factory or make, how, variables)
        extra = {"rules": how} if given else {}
        return Sides((module, variables), model, arguments, dict(options) | extra)

    return Pair(name, sides, layers or {}, left_out)
