"""Recurrent cells: one step of a recurrent network, (carry, inputs) -> (carry, output).

Law: the arithmetic, its order and its dtypes are flax.linen's; names and layouts are flax.nnx's, where the gates of
a cell share one kernel. Knows nothing of time: `recurrent` loops.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from nnx_core.graph.objects import data
from nnx_core.kinds import Param
from nnx_core.nn import dtypes, initializers
from nnx_core.nn._affine import Metadata
from nnx_core.nn._errors import require_rngs
from nnx_core.nn.activations import sigmoid, tanh
from nnx_core.nn.dtypes import Dtype, PromoteDtypeFn
from nnx_core.nn.initializers import Initializer, default_bias_init, default_kernel_init
from nnx_core.nn.recurrent_base import (
    Activation,
    ArrayCell,
    FusedCell,
    MemoryCell,
    Pair,
    Start,
    default_recurrent_init,
    modified_orthogonal,
)
from nnx_core.rngs import Rngs

_NOTHING: Metadata = MappingProxyType({})


class LSTMCell(MemoryCell):
    r"""Long short-term memory (Hochreiter & Schmidhuber 1997), a kernel for each gate.

    i = σ(W_ii x + W_hi h + b_hi),  f = σ(W_if x + W_hf h + b_hf),  g = tanh(W_ig x + W_hg h + b_hg),
    o = σ(W_io x + W_ho h + b_ho),  c' = f * c + i * g,  h' = o * tanh(c').

    The layers `ii`, `if_`, `ig`, `io` have kernels `(in_features, hidden_features)`; `hi`, `hf`, `hg`, `ho` have
    kernels `(hidden_features, hidden_features)` and biases. `OptimizedLSTMCell` is the same in two products.

    Args:
      in_features: size of the last axis of the input.
      hidden_features: size of the last axis of carry and output.
      gate_fn: activation of i, f and o.
      activation_fn: activation of g and of the memory.
      kernel_init: initializer of the kernels of the input.
      recurrent_kernel_init: initializer of the kernels of the state.
      bias_init: initializer of the biases.
      dtype: the dtype of the products (None: promoted from input and parameters); the result is promoted with
        the carry's.
      param_dtype: the dtype of the parameters and of a carry from `initialize_carry`.
      carry_init: initializer of the carry (None: zeros).
      promote_dtype: see Linear.
      keep_rngs: keep a stream of `rngs` for a random carry.
      rngs: source of the initial values; the stream `params`, one key a parameter.
      kernel_metadata: metadata of the kernels of the input.
      recurrent_kernel_metadata: metadata of the kernels of the state.
      bias_metadata: metadata of the biases.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> carry = cell.initialize_carry((2, 3))
    >>> (c, h), y = cell(carry, jnp.ones((2, 3)))
    >>> c.shape, h.shape, y is h
    ((2, 4), (2, 4), True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = sigmoid,
        activation_fn: Activation = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = _NOTHING,
        recurrent_kernel_metadata: Metadata = _NOTHING,
        bias_metadata: Metadata = _NOTHING,
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(in_features, hidden_features, dtype, param_dtype, promote_dtype)
        self._nnx_keep_carry(carry_init, keep_rngs, rngs)
        self.gate_fn, self.activation_fn = gate_fn, activation_fn
        of_input = Start(kernel_init, kernel_metadata)
        of_state = Start(recurrent_kernel_init, recurrent_kernel_metadata)
        bias = Start(bias_init, bias_metadata)
        self.ii, self.if_, self.ig, self.io = (self._nnx_product(rngs, in_features, of_input) for _ in range(4))
        self.hi, self.hf, self.hg, self.ho = (
            self._nnx_product(rngs, hidden_features, of_state, bias) for _ in range(4)
        )

    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        """One step.

        Args:
          carry: (c, h), each `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`, any dtype.

        Returns:
          ((c', h'), h').

        Raises:
          InputShapeError: the last axis of `inputs` or h does not fit.
          CarryError: `carry` is not a pair.
        """
        c, h = self._unpack(carry)
        i = self.gate_fn(self.ii(inputs) + self.hi(h))
        f = self.gate_fn(self.if_(inputs) + self.hf(h))
        g = self.activation_fn(self.ig(inputs) + self.hg(h))
        o = self.gate_fn(self.io(inputs) + self.ho(h))
        c = f * c + i * g
        h = o * self.activation_fn(c)
        return (c, h), h


class OptimizedLSTMCell(FusedCell, MemoryCell):
    """LSTMCell in two matrix products instead of eight; the same function, faster on accelerators.

    `dense_i` has a kernel `(in_features, 4 * hidden_features)`, `dense_h` a kernel `(hidden_features,
    4 * hidden_features)` and a bias; the gates are in the order i, f, g, o. Each gate has its own initial value,
    so the numbers of a seed differ from flax.nnx's, where only the fused kernel is orthogonal.

    Args:
      in_features, hidden_features, gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init, dtype,
        param_dtype, carry_init, promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as in LSTMCell.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> cell.dense_i.kernel.shape, cell.dense_h.kernel.shape
    ((3, 16), (4, 16))
    >>> cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))[1].shape
    (2, 4)
    """

    def _nnx_make_products(self, rngs: Rngs, of_input: Start, of_state: Start, bias: Start) -> None:
        self.dense_i = self._nnx_product(rngs, self.in_features, of_input.fused(4), gates=4)
        self.dense_h = self._nnx_product(rngs, self.hidden_features, of_state.fused(4), bias.fused(4), gates=4)

    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        """One step: see LSTMCell."""
        c, h = self._unpack(carry)
        # Split before the sum, as Linen does: XLA keeps more bits of a bfloat16 product that is added at once.
        h_i, h_f, h_g, h_o = jnp.split(self.dense_h(h), 4, axis=-1)
        i_i, i_f, i_g, i_o = jnp.split(self.dense_i(inputs), 4, axis=-1)
        i, f = self.gate_fn(h_i + i_i), self.gate_fn(h_f + i_f)
        g, o = self.activation_fn(h_g + i_g), self.gate_fn(h_o + i_o)
        c = f * c + i * g
        h = o * self.activation_fn(c)
        return (c, h), h


class GRUCell(FusedCell):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078).

    r = σ(W_ir x + b_ir + W_hr h),  z = σ(W_iz x + b_iz + W_hz h),
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),  h' = (1 - z) * n + z * h.

    `dense_i` has a kernel `(in_features, 3 * hidden_features)` and a bias, `dense_h` a kernel `(hidden_features,
    3 * hidden_features)`; the gates are in the order r, z, n. `hn_bias` is b_hn, a Param of shape
    `(hidden_features,)`. flax.nnx has no b_hn: its checkpoints fit with `hn_bias` at zero or None. Each gate has its
    own initial value, so the numbers of a seed differ from flax.nnx's, where only the fused kernel is orthogonal.

    Args:
      in_features, hidden_features: as in LSTMCell.
      gate_fn: activation of r and z.
      activation_fn: activation of n.
      kernel_init, recurrent_kernel_init, bias_init, dtype, param_dtype, carry_init, promote_dtype, keep_rngs, rngs,
        kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in LSTMCell. One key makes all the biases.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> h, y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
    >>> h.shape, y is h, cell.hn_bias.shape
    ((2, 4), True, (4,))
    """

    def _nnx_make_products(self, rngs: Rngs, of_input: Start, of_state: Start, bias: Start) -> None:
        drawn: list[jax.Array] = []

        def biases(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Any:
            drawn.append(key)
            return bias.fused(3).init(key, shape, dtype)

        of_gates = Start(biases, bias.metadata)
        self.dense_i = self._nnx_product(rngs, self.in_features, of_input.fused(3), of_gates, gates=3)
        self.dense_h = self._nnx_product(rngs, self.hidden_features, of_state.fused(3), gates=3)
        # No key of its own: flax.nnx draws none here, and layers made after this one must get the keys they get there.
        key = jax.random.fold_in(drawn[0], 3)
        value = bias.init(key, (self.hidden_features,), self.param_dtype)
        self.hn_bias: Param | None = data(Param(value, **bias.metadata))

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`, any dtype.

        Returns:
          (h', h').

        Raises:
          InputShapeError: the last axis of `inputs` or h does not fit.
        """
        i_r, i_z, i_n = jnp.split(self.dense_i(inputs), 3, axis=-1)
        h_r, h_z, h_n = jnp.split(self.dense_h(carry), 3, axis=-1)
        r = self.gate_fn(i_r + h_r)
        z = self.gate_fn(i_z + h_z)
        if self.hn_bias is not None:
            # Promoted as the bias of a product is, so that the sum has its dtype: Linen has b_hn in a Dense.
            h_n, bias = self.promote_dtype((h_n, self.hn_bias[...]), dtype=self.dtype)
            h_n = h_n + jnp.reshape(bias, (1,) * (h_n.ndim - 1) + (-1,))
        n = self.activation_fn(i_n + r * h_n)
        h = (1.0 - z) * n + z * carry
        return h, h


class MGUCell(ArrayCell):
    """Minimal gated unit (Zhou et al. 2016, arXiv:1603.09420): a GRU with one gate.

    f = σ(W_if x + b_if + W_hf h),  n = tanh(W_in x + b_in + f * (W_hn h + b_hn)),  h' = (1 - f) * n + f * h;
    without `reset_gate` n = tanh(W_in x + b_in + W_hn h). flax.nnx has none; flax.linen has.

    The layers `if_` and `in_` have kernels `(in_features, hidden_features)` and biases, `hf` and `hn` have kernels
    `(hidden_features, hidden_features)`, and `hn` a bias, unless `reset_gate` is False.

    Args:
      in_features, hidden_features: as in LSTMCell.
      gate_fn: activation of f.
      activation_fn: activation of n.
      kernel_init, recurrent_kernel_init: as in LSTMCell.
      forget_bias_init: initializer of b_if; at one the cell remembers at first (Jozefowicz et al. 2015,
        https://proceedings.mlr.press/v37/jozefowicz15.pdf).
      activation_bias_init: initializer of b_in and b_hn.
      dtype, param_dtype, carry_init: as in LSTMCell.
      reset_gate: whether f gates the state's part of n.
      promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in LSTMCell.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.MGUCell(3, 4, rngs=nnx.Rngs(0))
    >>> cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))[1].shape
    (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = sigmoid,
        activation_fn: Activation = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        forget_bias_init: Initializer = initializers.ones,
        activation_bias_init: Initializer = default_bias_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        reset_gate: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = _NOTHING,
        recurrent_kernel_metadata: Metadata = _NOTHING,
        bias_metadata: Metadata = _NOTHING,
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(in_features, hidden_features, dtype, param_dtype, promote_dtype)
        self._nnx_keep_carry(carry_init, keep_rngs, rngs)
        self.gate_fn, self.activation_fn = gate_fn, activation_fn
        self.reset_gate = reset_gate
        of_input = Start(kernel_init, kernel_metadata)
        of_state = Start(recurrent_kernel_init, recurrent_kernel_metadata)
        forget, activation = Start(forget_bias_init, bias_metadata), Start(activation_bias_init, bias_metadata)
        self.if_ = self._nnx_product(rngs, in_features, of_input, forget)
        self.in_ = self._nnx_product(rngs, in_features, of_input, activation)
        self.hf = self._nnx_product(rngs, hidden_features, of_state)
        self.hn = self._nnx_product(rngs, hidden_features, of_state, activation if reset_gate else None)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: see GRUCell."""
        f = self.gate_fn(self.if_(inputs) + self.hf(carry))
        h_n = self.hn(carry)
        h_n = h_n * f if self.reset_gate else h_n
        n = self.activation_fn(self.in_(inputs) + h_n)
        h = (1.0 - f) * n + f * carry
        return h, h


class SimpleCell(ArrayCell):
    """The recurrent cell of Elman 1990: h' = tanh(W_i x + b_i + W_h h).

    With `residual` h is added inside of tanh as well (arXiv:1801.06105). `dense_i` has a kernel `(in_features,
    hidden_features)` and a bias, `dense_h` a kernel `(hidden_features, hidden_features)`.

    Args:
      in_features, hidden_features: as in LSTMCell.
      dtype: the dtype of the products, and so of the result (None: promoted from input and parameters, as Linen's
        default has it).
      param_dtype, carry_init: as in LSTMCell.
      residual: whether to add h before the activation.
      activation_fn: in place of tanh.
      kernel_init, recurrent_kernel_init, bias_init, promote_dtype, keep_rngs, rngs, kernel_metadata,
        recurrent_kernel_metadata, bias_metadata: as in LSTMCell.

    Raises:
      MissingRngsError: `rngs` is not an Rngs.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    >>> cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))[1].shape
    (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype | None = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Activation = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = default_recurrent_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = _NOTHING,
        recurrent_kernel_metadata: Metadata = _NOTHING,
        bias_metadata: Metadata = _NOTHING,
    ):
        require_rngs(self, rngs)
        self._nnx_keep_options(in_features, hidden_features, dtype, param_dtype, promote_dtype)
        self._nnx_keep_carry(carry_init, keep_rngs, rngs)
        self.activation_fn, self.residual = activation_fn, residual
        of_state = Start(recurrent_kernel_init, recurrent_kernel_metadata)
        self.dense_h = self._nnx_product(rngs, hidden_features, of_state)
        bias = Start(bias_init, bias_metadata)
        self.dense_i = self._nnx_product(rngs, in_features, Start(kernel_init, kernel_metadata), bias)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`, any dtype.

        Returns:
          (h', h').

        Raises:
          InputShapeError: the last axis of `inputs` or h does not fit.
        """
        h = self.dense_i(inputs) + self.dense_h(carry)
        if self.residual:
            h = h + carry
        h = self.activation_fn(h)
        return h, h
