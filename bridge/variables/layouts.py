"""Where flax.linen keeps what a layer of nnx_core holds: the exact map between their parameter trees, both ways.

Most layers have the same names on both sides. These have not:

  nnx_core (as flax.nnx)                          Linen
  LSTMCell        if_                             if
  OptimizedLSTMCell  dense_i/kernel               ii, if, ig, io /kernel, joined along the last axis
                  dense_h/kernel, dense_h/bias    hi, hf, hg, ho /kernel, /bias
  GRUCell         dense_i/kernel, dense_i/bias    ir, iz, in /kernel, /bias
                  dense_h/kernel, hn_bias         hr, hz, hn /kernel; hn/bias
  SimpleCell      dense_i, dense_h                i, h
  MGUCell         if_, in_                        if, in
  Sequential      layers/0                        layers_0
  List, Dict      a/0, d/x                        a_0, d_x
  WeightNorm      scales/<path>                   '<layer_instance>/<path>/scale', one key
  SpectralNorm    batch_stats/<path>/u            '<layer_instance>/<path>/u', one key

Law: `from_linen(to_linen(x)) == x` and `to_linen(from_linen(y)) == y`, bit for bit; every path is taken exactly
once, and one that is missing or unexpected is an error. Knows classes, paths and arrays; knows no
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx_core as nnx
from bridge._errors import BridgeError, VariablesMismatchError, show_path
from bridge._types import Location, Path
from bridge.variables.kinds import collection_of
from nnx_core.graph.walk import data_children

#: A path in an NNX state: attribute names, and keys or indices of containers.
NnxPath = tuple[Any, ...]


class LayoutError(BridgeError, ValueError):
    """A value, or a layer, has no counterpart in the other layout."""

    def __init__(self, path: Sequence[object], expected: str, found: object, fix: str):
        self.path = tuple(path)
        super().__init__(f"{show_path(self.path)}:\n  expected {expected}\n  found    {found}\n{fix}")


@dataclass(frozen=True)
class Entry:
    """One Variable, and what Linen has in its place.

    Attributes:
        nnx: its path in the state.
        linen: its location in Linen; of several, the values are joined along `axis`, in this order and of equal size.
        axis: see there.
        optional: whether both sides may lack it.
        in_flax_nnx: False for what nnx_core has and flax.nnx has not: zero there.
    """

    nnx: NnxPath
    linen: tuple[Location, ...]
    axis: int = -1
    optional: bool = False
    in_flax_nnx: bool = True

    def at(self, nnx_path: NnxPath, linen_path: Location) -> Entry:
        """The same of a layer at `nnx_path` of a model, which is at `linen_path` in each of Linen's collections."""
        linen = tuple((collection, *linen_path, *names) for collection, *names in self.linen)
        return replace(self, nnx=(*nnx_path, *self.nnx), linen=linen)


@dataclass(frozen=True)
class Layout:
    """The map between two flat trees, path -> array, of one layer or one model.

    Values are arrays of JAX or numpy, or `jax.ShapeDtypeStruct`s; a value that is neither joined nor split may be
    anything. Keys of NNX paths may be strings where they are integers, as checkpoints have them.

    >>> import numpy as np
    >>> layout = layout_of(nnx.SimpleCell)
    >>> flat = {("dense_h", "kernel"): 1, ("dense_i", "bias"): 2, ("dense_i", "kernel"): 3}
    >>> layout.to_linen(flat)
    {('params', 'h', 'kernel'): 1, ('params', 'i', 'bias'): 2, ('params', 'i', 'kernel'): 3}
    >>> layout.from_linen(layout.to_linen(flat)) == flat
    True
    """

    entries: tuple[Entry, ...]

    def to_linen(self, flat: Mapping[NnxPath, Any]) -> dict[Location, Any]:
        """Linen's flat tree from that of an `nnx.State`.

        Raises:
            VariablesMismatchError: paths are missing or unexpected.
            LayoutError: a value that is to be split has no axis of a fitting size.
        """
        values = {_strings(path): value for path, value in flat.items()}
        entries = {_strings(entry.nnx): entry for entry in self.entries}
        _require_paths(entries, values, "the NNX state")
        linen: dict[Location, Any] = {}
        for path, value in values.items():
            entry = entries[path]
            parts = [value] if len(entry.linen) == 1 else _split(entry, value)
            linen.update(zip(entry.linen, parts, strict=True))
        return linen

    def from_linen(self, flat: Mapping[Location, Any]) -> dict[NnxPath, Any]:
        """The flat tree of an `nnx.State` from Linen's.

        Raises:
            VariablesMismatchError: paths are missing or unexpected.
            LayoutError: values that are to be joined differ in shape or dtype.
        """
        entries = {location: entry for entry in self.entries for location in entry.linen}
        _require_paths(entries, flat, "the Linen variables")
        state: dict[NnxPath, Any] = {}
        for entry in self.entries:
            if entry.linen[0] in flat:  # else it is optional
                parts = [flat[location] for location in entry.linen]
                state[entry.nnx] = parts[0] if len(parts) == 1 else _join(entry, parts)
        return state

    def at(self, nnx_path: NnxPath, linen_path: Location) -> Layout:
        """The same for a layer at `nnx_path` of a model, which is at `linen_path` in each of Linen's collections.

        >>> layout_of(nnx.LSTMCell).at(("cell",), ("cell",)).entries[0].linen
        (('params', 'cell', 'hf', 'bias'),)
        """
        return Layout(tuple(entry.at(nnx_path, linen_path) for entry in self.entries))

    def to_flax_nnx(self, flat: Mapping[NnxPath, Any]) -> dict[NnxPath, Any]:
        """`flat` without what flax.nnx has no place for: GRUCell's `hn_bias`.

        Raises:
            LayoutError: there is an `hn_bias` that is not zero, or is abstract so that nobody knows.
        """
        only_here = self._only_here()
        for path, value in flat.items():
            if _strings(path) not in only_here:
                continue
            is_abstract = isinstance(value, jax.ShapeDtypeStruct)
            if is_abstract or np.any(np.asarray(value)):
                raise LayoutError(
                    path,
                    "zeros: the GRUCell of flax.nnx has no bias there",
                    f"an abstract {value}" if is_abstract else "other values",
                    "Keep the model in nnx_core, or train it with this bias at zero.",
                )
        return {path: value for path, value in flat.items() if _strings(path) not in only_here}

    def from_flax_nnx(self, flat: Mapping[NnxPath, Any]) -> dict[NnxPath, Any]:
        """`flat`, from a model of flax.nnx, with an `hn_bias` of zeros for each GRUCell.

        Raises:
            VariablesMismatchError: a GRUCell has no `dense_h/kernel`, whose size and dtype the bias has.
        """
        values = {_strings(path): value for path, value in flat.items()}
        kernels = {path: (*path[:-1], "dense_h", "kernel") for path in self._only_here()}
        missing = [kernel for kernel in kernels.values() if kernel not in values]
        if missing:
            raise VariablesMismatchError(missing=missing, source="the flax.nnx state", target="the layout")
        state = dict(flat)
        for path, entry in self._only_here().items():
            if path not in values:
                state[entry.nnx] = _zeros_for(values[kernels[path]])
        return state

    def _only_here(self) -> dict[Location, Entry]:
        return {_strings(entry.nnx): entry for entry in self.entries if not entry.in_flax_nnx}


# ---- arrays ----


def _split(entry: Entry, value: Any) -> list[Any]:
    count, shape = len(entry.linen), np.shape(value)
    if not shape or shape[entry.axis] % count:
        parts = ", ".join(show_path(location) for location in entry.linen)
        raise LayoutError(
            entry.nnx,
            f"an axis {entry.axis} of {count} equal parts: {parts}",
            f"shape {shape}",
            "This is no parameter of the layer it was taken for.",
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        part = list(shape)
        part[entry.axis] //= count
        return [_abstract(part, value) for _ in range(count)]
    return list((np if isinstance(value, np.ndarray) else jnp).split(value, count, axis=entry.axis))


def _join(entry: Entry, parts: list[Any]) -> Any:
    forms = [(np.shape(part), getattr(part, "dtype", type(part))) for part in parts]
    for location, form in zip(entry.linen, forms, strict=True):
        if form != forms[0] or not form[0]:
            raise LayoutError(
                location,
                f"shape and dtype of {show_path(entry.linen[0])}, {forms[0]}, with which it is joined",
                form,
                f"Together they are {show_path(entry.nnx)}. Cast or reshape them before.",
            )
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
        shape = list(forms[0][0])
        shape[entry.axis] *= len(parts)
        return _abstract(shape, parts[0])
    on_host = all(isinstance(part, np.ndarray) for part in parts)
    return (np if on_host else jnp).concatenate(parts, axis=entry.axis)


def _abstract(shape: Sequence[int], like: Any) -> jax.ShapeDtypeStruct:
    # Of the same rank, so that its axes keep their meaning.
    sharding = getattr(like, "sharding", None)
    return jax.ShapeDtypeStruct(tuple(shape), like.dtype, sharding=sharding)


def _zeros_for(kernel: Any) -> Any:
    size, dtype = kernel.shape[:1], kernel.dtype
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(size, dtype)
    return (np if isinstance(kernel, np.ndarray) else jnp).zeros(size, dtype)


def _strings(path: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(str, path))


def _require_paths(entries: Mapping[Path, Entry], values: Mapping[Path, Any], source: str) -> None:
    optional = {path for path, entry in entries.items() if entry.optional}
    missing = entries.keys() - values.keys() - optional
    unexpected = values.keys() - entries.keys()
    if missing or unexpected:
        raise VariablesMismatchError(missing, unexpected, source=source, target="the layout")


# ---- the layers that differ ----


def _entry(nnx_path: str, linen: str, **options: Any) -> Entry:
    """`_entry("dense_i/kernel", "ir/kernel iz/kernel")`."""
    locations = tuple(("params", *path.split("/")) for path in linen.split())
    return Entry(tuple(nnx_path.split("/")), locations, **options)


_LAYOUTS: dict[type, Layout] = {
    nnx.LSTMCell: Layout(
        (
            *(_entry(f"h{gate}/{leaf}", f"h{gate}/{leaf}") for gate in "fgio" for leaf in ("bias", "kernel")),
            _entry("if_/kernel", "if/kernel"),
            *(_entry(f"i{gate}/kernel", f"i{gate}/kernel") for gate in "gio"),
        )
    ),
    nnx.OptimizedLSTMCell: Layout(
        (
            _entry("dense_h/bias", "hi/bias hf/bias hg/bias ho/bias"),
            _entry("dense_h/kernel", "hi/kernel hf/kernel hg/kernel ho/kernel"),
            _entry("dense_i/kernel", "ii/kernel if/kernel ig/kernel io/kernel"),
        )
    ),
    nnx.GRUCell: Layout(
        (
            _entry("dense_h/kernel", "hr/kernel hz/kernel hn/kernel"),
            _entry("dense_i/bias", "ir/bias iz/bias in/bias"),
            _entry("dense_i/kernel", "ir/kernel iz/kernel in/kernel"),
            _entry("hn_bias", "hn/bias", in_flax_nnx=False),
        )
    ),
    nnx.SimpleCell: Layout(
        (
            _entry("dense_h/kernel", "h/kernel"),
            _entry("dense_i/bias", "i/bias"),
            _entry("dense_i/kernel", "i/kernel"),
        )
    ),
    nnx.MGUCell: Layout(
        (
            _entry("hf/kernel", "hf/kernel"),
            _entry("hn/bias", "hn/bias", optional=True),
            _entry("hn/kernel", "hn/kernel"),
            _entry("if_/bias", "if/bias"),
            _entry("if_/kernel", "if/kernel"),
            _entry("in_/bias", "in/bias"),
            _entry("in_/kernel", "in/kernel"),
        )
    ),
}


def layout_of(cls: type[nnx.Module]) -> Layout | None:
    """The layout of one layer class, or of the nearest class it inherits from; None if both sides agree.

    Only for layers whose paths are known from the class alone; `layout_for` takes any module.

    >>> class MyCell(nnx.GRUCell):
    ...     pass
    >>> layout_of(MyCell) is layout_of(nnx.GRUCell), layout_of(nnx.Linear)
    (True, None)
    """
    return next((_LAYOUTS[base] for base in cls.__mro__ if base in _LAYOUTS), None)


# ---- whole models ----


def layout_for(module: nnx.Module) -> Layout:
    """The layout of a whole module, of every Variable in it, against a Linen module with the same attribute names.

    Linen names a submodule of `setup` after its attribute, and one of a list or dict after attribute and key; so does
    this. The cell of an RNN is `cell`, the two of a Bidirectional `forward_rnn` and `backward_rnn`, the layer of a
    WeightNorm `layer_instance`: what Linen calls them unless a `@compact` parent has named them (rename those first).
    Random streams (RngState) are left out, as Linen keeps none: give `nnx.state(module, nnx.Not(nnx.RngState))`.

    Args:
        module: with values or abstract; none is read.

    Raises:
        LayoutError: a WeightNorm or SpectralNorm whose statistics Linen splits otherwise, or of a shared layer; or a
            GRUCell without `hn_bias`, which Linen requires.

    >>> model = nnx.eval_shape(lambda: nnx.Sequential(nnx.RNN(nnx.SimpleCell(2, 3, rngs=nnx.Rngs(0)))))
    >>> for entry in layout_for(model).entries:
    ...     print(show_path(entry.nnx), "<->", *map(show_path, entry.linen))
    layers/0/cell/dense_h/kernel <-> params/layers_0/cell/h/kernel
    layers/0/cell/dense_i/bias <-> params/layers_0/cell/i/bias
    layers/0/cell/dense_i/kernel <-> params/layers_0/cell/i/kernel
    """
    return Layout(tuple(_entries(module, (), (), set())))


def _entries(node: Any, nnx_path: NnxPath, linen_path: Location, seen: set[int]) -> Iterator[Entry]:
    """An entry for each Variable below `node` that is not in `seen`, under the path where it is first reached."""
    if isinstance(node, nnx.Variable | nnx.Object):
        if id(node) in seen:
            return
        seen.add(id(node))
    if isinstance(node, nnx.Variable):
        if not isinstance(node, nnx.RngState):
            yield Entry(nnx_path, ((collection_of(type(node)), *linen_path),))
        return
    special = next((_WRAPPERS[base] for base in type(node).__mro__ if base in _WRAPPERS), None)
    if special is not None:
        yield from special(node, nnx_path, linen_path, seen)
    elif (layout := layout_of(type(node))) is not None:
        yield from _own_entries(node, layout, nnx_path, linen_path, seen)
    for key, child in data_children(node):
        yield from _entries(child, (*nnx_path, key), _linen_path(node, linen_path, key, child), seen)


def _linen_path(node: Any, path: Location, key: Any, child: Any) -> Location:
    in_container = isinstance(node, nnx.List | nnx.Dict | list | tuple | dict) and path
    if in_container and not isinstance(child, nnx.Variable):
        return (*path[:-1], f"{path[-1]}_{key}")
    return (*path, str(key))


def _own_entries(node: Any, layout: Layout, nnx_path: NnxPath, linen_path: Location, seen: set[int]) -> Iterator[Entry]:
    variables = {path: x for path, x in nnx.iter_graph(node) if isinstance(x, nnx.Variable)}
    for entry, here in zip(layout.entries, layout.at(nnx_path, linen_path).entries, strict=True):
        variable = variables.get(entry.nnx)
        if variable is None:
            if entry.optional:
                continue
            raise LayoutError(
                here.nnx,
                f"a Variable, which is {', '.join(map(show_path, here.linen))} in Linen",
                "none",
                "Give the layer its parameter (zeros, say, for the hn_bias that flax.nnx has not).",
            )
        if id(variable) not in seen:
            seen.add(id(variable))
            # `params` in the table, unless the model says otherwise.
            collection = collection_of(type(variable))
            yield replace(here, linen=tuple((collection, *location[1:]) for location in here.linen), optional=False)


# ---- layers that wrap a layer ----


def _weight_norm(node: Any, nnx_path: NnxPath, linen_path: Location, seen: set[int]) -> Iterator[Entry]:
    inner = yield from _wrapped(node, nnx_path, linen_path, seen)
    for path, variable in _variables_in(node.scales, seen):
        scale = (*nnx_path, "scales", *path)
        target = _target(inner, scale, path)
        if len(target.linen) > 1 and node.feature_axes not in (-1, (-1,)):
            raise LayoutError(
                scale,
                "feature_axes=-1: each gate has scales of its own in Linen",
                f"feature_axes={node.feature_axes}",
                "Wrap a cell with one kernel for each gate, such as LSTMCell.",
            )
        yield _keyed(variable, scale, linen_path, target, "scale")


def _spectral_norm(node: Any, nnx_path: NnxPath, linen_path: Location, seen: set[int]) -> Iterator[Entry]:
    inner = yield from _wrapped(node, nnx_path, linen_path, seen)
    for path, variable in _variables_in(node.batch_stats, seen):
        statistic = (*nnx_path, "batch_stats", *path)
        target = _target(inner, statistic, path[:-1])
        if len(target.linen) > 1:
            raise LayoutError(
                statistic,
                "one kernel for each gate: each has a spectral norm of its own in Linen",
                f"one for {', '.join(map(show_path, target.linen))}",
                "Wrap a cell with one kernel for each gate, such as LSTMCell.",
            )
        yield _keyed(variable, statistic, linen_path, target, str(path[-1]))


def _wrapped(node: Any, nnx_path: NnxPath, linen_path: Location, seen: set[int]) -> Any:
    """The entries of the wrapped layer, which are also returned: by path below it, with locations below it."""
    layer = "layer_instance"
    inner = list(_entries(node.layer_instance, (*nnx_path, layer), (*linen_path, layer), seen))
    yield from inner
    depth = len(linen_path) + 1  # the collection goes before
    below: dict[NnxPath, Entry] = {}
    for entry in inner:
        linen = tuple(location[depth:] for location in entry.linen)
        below[entry.nnx[len(nnx_path) + 1 :]] = replace(entry, linen=linen)
    return below


def _variables_in(tree: Any, seen: set[int]) -> Iterator[tuple[NnxPath, nnx.Variable[Any]]]:
    for path, x in [] if tree is None else nnx.iter_graph(tree):
        if isinstance(x, nnx.Variable) and id(x) not in seen:
            seen.add(id(x))
            yield path, x


def _target(inner: Mapping[NnxPath, Entry], statistic: NnxPath, path: NnxPath) -> Entry:
    """The entry, at `path` in the wrapped layer, of what the Variable at `statistic` belongs to."""
    if path not in inner:
        raise LayoutError(
            statistic,
            f"the parameter {show_path(path)} in the wrapped layer, and in no other module before it",
            "none: the layer is shared, and Linen names the key after another place",
            "Let the wrapper be the only one that holds the layer.",
        )
    return inner[path]


def _keyed(variable: Any, nnx_path: NnxPath, linen_path: Location, target: Entry, name: str) -> Entry:
    """The entry of a Variable that Linen keeps under one key, named after the path of what it belongs to."""
    collection = collection_of(type(variable))
    keys = ["/".join((*path, name)) for path in target.linen]
    return Entry(nnx_path, tuple((collection, *linen_path, key) for key in keys))


_WRAPPERS: dict[type, Callable[[Any, NnxPath, Location, set[int]], Iterator[Entry]]] = {
    nnx.WeightNorm: _weight_norm,
    nnx.SpectralNorm: _spectral_norm,
}
