"""What all recurrent cells share: their base classes, carries and initial values.

Law: every initializer is called once for each gate, with the shape of one gate, as flax.linen does: a fused kernel
that is orthogonal as a whole has no orthogonal gate in it. A carry of zeros draws no key. Knows no particular cell.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx_core._errors import NnxError
from nnx_core.graph.objects import data
from nnx_core.module import Module
from nnx_core.nn import dtypes, initializers
from nnx_core.nn._affine import Metadata
from nnx_core.nn._errors import InputShapeError, MissingRngsError, place, require_rngs
from nnx_core.nn._options import sizes
from nnx_core.nn.activations import sigmoid, tanh
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer
from nnx_core.nn.linear import Linear
from nnx_core.rngs import Rngs, RngStream
from nnx_core.variables import VariableMetadata

Activation = Callable[..., Any]
Pair = tuple[jax.Array, jax.Array]
RngSource = Rngs | RngStream | None


class CarryError(NnxError, ValueError, TypeError):
    """A cell was called with a carry that is not of the form its `initialize_carry` makes."""

    def __init__(self, cell: Module, expected: str, found: object):
        super().__init__(
            f"{type(cell).__name__} at {place(cell)}:\n  expected the carry {expected}\n  found    {found}\n"
            "Begin with cell.initialize_carry(inputs.shape), and pass the carry as the first argument."
        )


# ---- initial values ----


def modified_orthogonal(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """`orthogonal()` for every floating dtype: half precision is rounded from float32, as LAPACK knows none.

    Args:
      key: a PRNG key.
      shape: at least two axes.
      dtype: of the result.

    >>> import jax
    >>> modified_orthogonal(jax.random.key(0), (2, 2), "bfloat16").dtype
    dtype(bfloat16)
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.asarray(initializers.orthogonal()(key, shape, wide), dtype)


def _orthogonal() -> Initializer:
    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return modified_orthogonal(key, shape, dtype)

    return init


def per_gate(*inits: Initializer) -> Initializer:
    """The initializer of a fused parameter: one of `inits` for each gate, side by side on the last axis.

    >>> import jax
    >>> fused = per_gate(initializers.ones, initializers.zeros)
    >>> fused(jax.random.key(0), (1, 4), "float32").tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Any:
        shape = (*shape[:-1], shape[-1] // len(inits))
        keys = jax.random.split(key, len(inits))
        values: list[Any] = [start(k, shape, dtype) for start, k in zip(inits, keys, strict=True)]
        if isinstance(values[0], VariableMetadata):
            fused = jnp.concatenate([value.raw_value for value in values], axis=-1)
            return dataclasses.replace(values[0], raw_value=fused)
        return jnp.concatenate(values, axis=-1)

    return init


default_recurrent_init = _orthogonal()


class Start(NamedTuple):
    """How a parameter begins: its initializer and its metadata."""

    init: Initializer
    metadata: Metadata

    def fused(self, gates: int) -> "Start":
        """The start of a parameter of several gates, each of which begins like this."""
        return Start(per_gate(*[self.init] * gates), self.metadata)


def carry_stream(owner: Module, rngs: Rngs | RngStream | bool) -> RngStream | None:
    """A stream of the owner's own for initial carries, or None: few carries are random.

    Args:
      owner: the module that will keep it.
      rngs: forked; its stream `carry`, or `default`, if there is one. True is the seed 0, False is none.

    Raises:
      MissingRngsError: `rngs` is none of the above.
    """
    if isinstance(rngs, bool):
        return RngStream(0, tag="carry") if rngs else None
    if isinstance(rngs, RngStream):
        return rngs.fork()
    if isinstance(rngs, Rngs):
        return rngs.carry.fork() if "carry" in rngs or "default" in rngs else None
    raise MissingRngsError(
        f"{type(owner).__name__}(..., rngs=...)", "an nnx.Rngs, RngStream or bool", rngs, "Write rngs=nnx.Rngs(0)."
    )


def _initial_states(
    cell: "ArrayCell", count: int, input_shape: tuple[int, ...], rngs: RngSource, carry_init: Initializer | None
) -> tuple[jax.Array, ...]:
    """`count` arrays of shape (*input_shape[:-1], hidden_features) in `param_dtype`. Zeros draw no key."""
    if len(input_shape) < cell.num_feature_axes:
        axes = ", ".join([*(f"spatial_{i}" for i in range(cell.num_feature_axes - 1)), "features"])
        raise InputShapeError(cell, f"(*batch, {axes})", input_shape, "Give the shape of one step, without time.")
    shape = (*input_shape[:-1], cell.hidden_features)
    init = carry_init or cell.carry_init or initializers.zeros
    if init is initializers.zeros:
        return tuple(jnp.zeros(shape, cell.param_dtype) for _ in range(count))
    source = cell.rngs if rngs is None else rngs
    if isinstance(source, Rngs):
        source = source.carry
    if not isinstance(source, RngStream):
        raise MissingRngsError(
            f"{type(cell).__name__} at {place(cell)}: initialize_carry with a carry_init",
            "an nnx.Rngs or RngStream",
            source,
            "Pass rngs=nnx.Rngs(0), to initialize_carry or to the nnx.RNN that holds the cell.",
        )
    return tuple(jnp.asarray(init(source(), shape, cell.param_dtype)) for _ in range(count))


# ---- the classes ----


class RNNCellBase(Module):
    """Base of all cells, for `nnx.RNN` and for cells of your own.

    A cell defines `__call__`, `initialize_carry` and `num_feature_axes`.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> class Sum(nnx.RNNCellBase):
    ...     num_feature_axes = 1
    ...
    ...     def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    ...         return jnp.zeros(input_shape)
    ...
    ...     def __call__(self, carry, inputs):
    ...         carry = carry + inputs
    ...         return carry, carry
    >>> nnx.RNN(Sum())(jnp.ones((1, 3, 1))).ravel().tolist()
    [1.0, 2.0, 3.0]
    """

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          carry: the state, any pytree of arrays.
          inputs: `[*batch, features]` of one time step.

        Returns:
          The new carry, of the structure, shapes and dtypes of the old one, and the output.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is a cell: it must define __call__(carry, inputs) -> (carry, output)."
        )

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: RngSource = None, carry_init: Initializer | None = None
    ) -> Any:
        """The carry before the first step.

        Args:
          input_shape: of one step, without time: `(*batch, features)`.
          rngs: its stream `carry`, or `default`, is drawn from if the carry is random.
          carry_init: goes before the cell's own; zeros if there is neither.

        Raises:
          MissingRngsError: the carry is random and there is no source of randomness.
          InputShapeError: `input_shape` has too few axes.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is a cell: it must define initialize_carry(input_shape, rngs, carry_init)."
        )

    @property
    def num_feature_axes(self) -> int:
        """How many of the last axes of an input are not batch."""
        raise NotImplementedError(f"{type(self).__name__} is a cell: it must define the property num_feature_axes.")


class ArrayCell(RNNCellBase):
    """What the cells here share: a carry of arrays with `hidden_features` on the last axis."""

    in_features: int
    hidden_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    promote_dtype: PromoteDtypeFn
    gate_fn: Activation  # of those that have one
    activation_fn: Activation  # of those that have one
    carry_init: Initializer | None
    rngs: RngStream | None

    def _nnx_keep_options(
        self,
        in_features: int,
        hidden_features: int,
        dtype: Dtype | None,
        param_dtype: Dtype,
        promote_dtype: PromoteDtypeFn,
    ) -> None:
        features = sizes(self, in_features=in_features, hidden_features=hidden_features)
        self.in_features, self.hidden_features = features
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype

    def _nnx_keep_carry(self, carry_init: Initializer | None, keep_rngs: bool, rngs: Rngs) -> None:
        """How carries begin. Before the layers: a stream that is kept takes its key before they take theirs."""
        self.carry_init = carry_init
        self.rngs = data(carry_stream(self, rngs) if keep_rngs else None)

    def _nnx_product(
        self, rngs: Rngs, in_features: int, kernel: Start, bias: Start | None = None, *, gates: int = 1
    ) -> Linear:
        """A Linear to `hidden_features` of each gate, side by side; it computes in the dtype of the cell."""
        options: dict[str, Any] = {"kernel_init": kernel.init, "kernel_metadata": kernel.metadata}
        if bias is not None:
            options |= {"bias_init": bias.init, "bias_metadata": bias.metadata}
        return Linear(
            in_features,
            gates * self.hidden_features,
            use_bias=bias is not None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=self.promote_dtype,
            rngs=rngs,
            **options,
        )

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: RngSource = None, carry_init: Initializer | None = None
    ) -> Any:
        """One array of shape `(*input_shape[:-1], hidden_features)` in `param_dtype`: see RNNCellBase."""
        return _initial_states(self, 1, input_shape, rngs, carry_init)[0]

    @property
    def num_feature_axes(self) -> int:
        """1: all axes but the last are batch."""
        return 1


class MemoryCell(ArrayCell):
    """A cell whose carry is a pair (c, h): memory and output."""

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: RngSource = None, carry_init: Initializer | None = None
    ) -> Pair:
        """Two arrays (c, h) of shape `(*input_shape[:-1], hidden_features)` in `param_dtype`: see RNNCellBase."""
        c, h = _initial_states(self, 2, input_shape, rngs, carry_init)
        return c, h

    def _unpack(self, carry: Any) -> Pair:
        # An array with two rows would unpack as well, into something else.
        if not isinstance(carry, tuple | list) or len(carry) != 2:
            found = f"an array of shape {carry.shape}" if hasattr(carry, "shape") else repr(carry)
            raise CarryError(self, f"(c, h), two arrays of shape (*batch, {self.hidden_features})", found)
        return carry[0], carry[1]


class FusedCell(ArrayCell):
    """A cell whose gates share one kernel of the input and one of the state; a subclass makes both."""

    _make_products: Callable[[Rngs, Start, Start, Start], None]  # from the starts of both kernels and of the bias

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = sigmoid,
        activation_fn: Activation = tanh,
        kernel_init: Initializer = initializers.default_kernel_init,
        recurrent_kernel_init: Initializer = default_recurrent_init,
        bias_init: Initializer = initializers.default_bias_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = MappingProxyType({}),
        recurrent_kernel_metadata: Metadata = MappingProxyType({}),
        bias_metadata: Metadata = MappingProxyType({}),
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(in_features, hidden_features, dtype, param_dtype, promote_dtype)
        self._nnx_keep_carry(carry_init, keep_rngs, rngs)
        self.gate_fn, self.activation_fn = gate_fn, activation_fn
        of_input = Start(kernel_init, kernel_metadata)
        of_state = Start(recurrent_kernel_init, recurrent_kernel_metadata)
        self._nnx_make_products(rngs, of_input, of_state, Start(bias_init, bias_metadata))
