"""Recurrent layers: a cell applied step by step to a sequence, in one direction or in both.

Law: equal to calling the cell in a Python loop, with every effect on it; the numbers are flax.linen's. A Variable
that no step writes is not carried from step to step. Knows how to loop; what one step does is the cell's.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from nnx_core import filters as filterlib
from nnx_core.graph.objects import data
from nnx_core.kinds import RngState
from nnx_core.module import Module
from nnx_core.nn._errors import InputShapeError, OptionError
from nnx_core.nn.recurrent_base import CarryError as CarryError
from nnx_core.nn.recurrent_base import RngSource, carry_stream
from nnx_core.nn.recurrent_base import RNNCellBase as RNNCellBase
from nnx_core.nn.recurrent_base import modified_orthogonal as modified_orthogonal
from nnx_core.nn.recurrent_cells import GRUCell as GRUCell
from nnx_core.nn.recurrent_cells import LSTMCell as LSTMCell
from nnx_core.nn.recurrent_cells import MGUCell as MGUCell
from nnx_core.nn.recurrent_cells import OptimizedLSTMCell as OptimizedLSTMCell
from nnx_core.nn.recurrent_cells import SimpleCell as SimpleCell
from nnx_core.nn.recurrent_conv import ConvLSTMCell as ConvLSTMCell
from nnx_core.rngs import Rngs, RngStream, restore_rngs, split_rngs, streams_of
from nnx_core.transforms.groups import Carry, StateAxes
from nnx_core.transforms.loops import scan

_LOGGER = logging.getLogger("nnx_core")


class RNNBase(Protocol):
    """What Bidirectional calls: an RNN, or a module with the same call."""

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any | None = None,
        rngs: RngSource = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any: ...


def flip_sequences(
    inputs: jax.Array, seq_lengths: jax.Array | None, num_batch_dims: int, time_major: bool
) -> jax.Array:
    """`inputs` with time reversed; padding stays at the end.

    Args:
      inputs: `[*batch, time, ...]`, or `[time, *batch, ...]` with `time_major`.
      seq_lengths: integers `[*batch]` in 1..time; 0 counts as time, as in Linen. None: no padding.
      num_batch_dims: how many axes `*batch` has.
      time_major: where the axis of time is.

    Returns:
      Shape and dtype of `inputs`.

    >>> import jax.numpy as jnp
    >>> flip_sequences(jnp.array([[1, 2, 0], [4, 5, 6]]), jnp.array([2, 3]), 1, False).tolist()
    [[2, 1, 0], [6, 5, 4]]
    """
    axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, axis)
    steps = jnp.arange(inputs.shape[axis], dtype=jnp.int32)
    last = jnp.expand_dims(jnp.asarray(seq_lengths, jnp.int32) - 1, axis)
    # Padding has negative indices here: they count from the end, where padding is.
    index = last - jnp.expand_dims(steps, [i for i in range(num_batch_dims + 1) if i != axis])
    index = jnp.expand_dims(index, range(num_batch_dims + 1, inputs.ndim))
    return jnp.take_along_axis(inputs, index, axis=axis)


class RNN(Module):
    """Applies a cell to each step of a sequence, by `nnx.scan`.

    Args:
      cell: any RNNCellBase.
      time_major: the axis of time is the first, not the one after the batch axes.
      return_carry: return (carry, outputs), not just outputs.
      reverse: begin with the last step; outputs are in the order in which they were computed.
      keep_order: with `reverse`, return the outputs in the order of the inputs.
      unroll: how many steps are one iteration of the compiled loop.
      state_axes: {filter: treatment} or StateAxes: an axis for Variables of the cell with one slice for each step;
        nnx.Carry (what no filter matches, and all of them by default) or None, which are one here: a Variable goes
        from step to step if a step writes it, and is the same in all of them if none does.
      broadcast_rngs: which random streams of the cell give each step the same keys (the dropout of Gal &
        Ghahramani 2016, arXiv:1512.05287). None: none, each step draws its own.
      rngs: for initial carries that are random: an Rngs, a stream, True (the seed 0) or False (none). Its stream
        `carry`, or `default`, is forked if it has one. Carries of zeros draw no key.

    Raises:
      MissingRngsError: `rngs` is none of the above.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> rnn = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
    >>> rnn(jnp.ones((2, 7, 3))).shape
    (2, 7, 4)
    >>> (c, h), y = rnn(jnp.ones((2, 7, 3)), seq_lengths=jnp.array([5, 7]), return_carry=True)
    >>> bool((h[0] == y[0, 4]).all()), bool((h[1] == y[1, 6]).all())
    (True, True)
    """

    def __init__(
        self,
        cell: RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[str, int | type[Carry] | None] | StateAxes | None = None,
        broadcast_rngs: filterlib.Filter = None,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.cell, self.unroll = cell, unroll
        self.time_major, self.return_carry = time_major, return_carry
        self.reverse, self.keep_order = reverse, keep_order
        self.rngs = data(carry_stream(self, rngs))
        rules: list[tuple[Any, Any]] = [] if state_axes is None else list(state_axes.items())
        if all(filterlib.to_predicate(f) != filterlib.Everything() for f, _ in rules):
            rules.append((..., Carry))
        self.state_axes = StateAxes(rules)
        self.broadcast_rngs = broadcast_rngs

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: RngSource = None,
    ) -> Any:
        """Apply the layer. Flags that are given go before those of the constructor.

        Args:
          inputs: `[*batch, time, *features]`, or `[time, *batch, *features]` with `time_major`; `*features` are
            as many axes as the cell's `num_feature_axes`.
          initial_carry: what the first step gets; by default the cell's `initialize_carry`.
          seq_lengths: integers `[*batch]` in 1..time, the steps that are no padding; 0 counts as time, as in
            Linen. Outputs of padding are computed like all others. The carry returned is the one after the last
            step that is no padding, for any number of batch axes (Linen: for one).
          return_carry, time_major, reverse, keep_order: see the class.
          rngs: for a random initial carry, in place of the layer's own.

        Returns:
          The outputs, stacked along the axis of time, or (carry, outputs).

        Raises:
          InputShapeError: too few axes.
          OptionError: `seq_lengths` do not fit the batch, or a step changes the carry's shapes or dtypes.
        """
        time_major, return_carry, reverse, keep_order = (
            own if given is None else given
            for given, own in (
                (time_major, self.time_major),
                (return_carry, self.return_carry),
                (reverse, self.reverse),
                (keep_order, self.keep_order),
            )
        )
        batch_axes = jnp.ndim(inputs) - 1 - self.cell.num_feature_axes
        if batch_axes < 0:
            raise InputShapeError(
                self, _layout(self.cell, time_major), jnp.shape(inputs), "A single sequence has an axis of time too."
            )
        axis = 0 if time_major else batch_axes
        step_shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
        lengths = None if seq_lengths is None else self._lengths(seq_lengths, step_shape[:batch_axes])
        if initial_carry is None:
            initial_carry = self.cell.initialize_carry(step_shape, self.rngs if rngs is None else rngs)
        if reverse:
            inputs = flip_sequences(inputs, lengths, batch_axes, time_major)
        carry, outputs = self._loop(initial_carry, inputs, axis, lengths if return_carry else None)
        if reverse and keep_order:
            outputs = flip_sequences(outputs, lengths, batch_axes, time_major)
        return (carry, outputs) if return_carry else outputs

    def _lengths(self, lengths: jax.Array, batch: tuple[int, ...]) -> jax.Array:
        lengths = jnp.asarray(lengths, jnp.int32)  # not unsigned: 0 - 1 counts from the end
        pairs = zip(lengths.shape[::-1], batch[::-1], strict=False)
        if lengths.ndim > len(batch) or any(n not in (1, m) for n, m in pairs):
            raise OptionError(
                self,
                "seq_lengths",
                f"shape {batch}, one length for each sequence of the batch",
                f"shape {lengths.shape}",
                "seq_lengths has the batch axes of the input, and neither time nor features.",
            )
        return jnp.broadcast_to(lengths, batch)

    def _loop(self, carry: Any, inputs: jax.Array, axis: int, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
        """The final carry, or with `lengths` the one after the last step of each sequence, and the outputs."""
        chosen = filterlib.to_predicate(self.broadcast_rngs)
        options = self.state_axes, chosen, axis, self.unroll
        backups = split_rngs(self.cell, splits=1, only=_streams(chosen), squeeze=True)
        try:
            if lengths is None:
                return _loop(*options)(carry, self.cell, inputs)
            steps = jnp.arange(inputs.shape[axis], dtype=jnp.int32)
            lengths = jnp.where(lengths == 0, inputs.shape[axis], lengths)
            run = _loop_with_lengths(*options)
            (_, last), outputs = run((carry, carry), self.cell, inputs, steps, lengths)
            return last, outputs
        except TypeError as error:
            if "carry" in str(error) and "equal types" in str(error):
                raise self._changing_carry(carry) from error
            raise
        finally:
            restore_rngs(backups)

    def _changing_carry(self, carry: Any) -> OptionError:
        found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in map(jnp.asarray, jax.tree.leaves(carry)))
        return OptionError(
            self,
            "initial_carry",
            "a carry that keeps its shapes and dtypes in every step",
            f"one that begins as {found} and is something else after a step (the cause above says what)",
            "A carry by default has the cell's param_dtype: for inputs of a wider dtype, cast them, or pass an"
            " initial_carry in the dtype of the outputs.",
        )


def _layout(cell: RNNCellBase, time_major: bool) -> str:
    features = ["features"] if cell.num_feature_axes == 1 else [f"feature_{i}" for i in range(cell.num_feature_axes)]
    return f"({', '.join(['time', '*batch', *features] if time_major else ['*batch', 'time', *features])})"


# ---- the loops ----


def _in_axes(axes: StateAxes) -> StateAxes:
    """None for Carry: scan then carries what is written, and parameters stay outside of the loop.

    Not for random state, which under None would be the same in each step.
    """
    rules: list[tuple[Any, Any]] = []
    for filter_, axis in axes.items():
        if axis is Carry:
            rules += [(filterlib.All(RngState, filter_), Carry), (filter_, None)]
        else:
            rules.append((filter_, axis))
    return StateAxes(rules)


def _streams(chosen: filterlib.Predicate) -> filterlib.Predicate:
    """The streams that a filter means by their own path or tag, or by the type of what they count."""
    return lambda path, stream: chosen(path, stream) or chosen((*path, "count"), stream.count)


def _step(cell: RNNCellBase, chosen: filterlib.Predicate, carry: Any, x: jax.Array) -> Any:
    """One step, after which the chosen random streams are where they were."""
    is_chosen = _streams(chosen)
    before = [
        (stream, stream.key.get_raw_value(), stream.count.get_raw_value())
        for path, stream in streams_of(cell)
        if is_chosen(path, stream)
    ]
    result = cell(carry, x)
    restore_rngs(before)
    return result


def _loop(axes: StateAxes, chosen: filterlib.Predicate, axis: int, unroll: int) -> Callable[..., Any]:
    """(carry, cell, inputs) -> (carry, outputs)."""

    def rnn_step(carry: Any, cell: RNNCellBase, x: jax.Array) -> Any:
        return _step(cell, chosen, carry, x)

    return scan(rnn_step, in_axes=(Carry, _in_axes(axes), axis), out_axes=(Carry, axis), unroll=unroll)


def _loop_with_lengths(axes: StateAxes, chosen: filterlib.Predicate, axis: int, unroll: int) -> Callable[..., Any]:
    """((carry, last), cell, inputs, steps, lengths) -> ((carry, last), outputs); `last` stops at the lengths."""

    def rnn_step(carries: Any, cell: RNNCellBase, x: jax.Array, step: jax.Array, lengths: jax.Array) -> Any:
        carry, last = carries
        carry, y = _step(cell, chosen, carry, x)
        valid = step < lengths

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return lax.select(lax.broadcast_in_dim(valid, new.shape, range(valid.ndim)), new, old)

        return (carry, jax.tree.map(choose, carry, last)), y

    in_axes = (Carry, _in_axes(axes), axis, 0, None)
    return scan(rnn_step, in_axes=in_axes, out_axes=(Carry, axis), unroll=unroll)


# ---- both directions ----


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
    """Two RNNs over the same sequence, one from each end; their outputs are merged step by step.

    Args:
      forward_rnn: gets the sequence as it is.
      backward_rnn: gets it reversed; its outputs are put in the order of the inputs.
      merge_fn: (forward outputs, backward outputs) -> outputs; by default side by side on the last axis.
      time_major: as in RNN; goes before that of the two.
      return_carry: return ((forward carry, backward carry), outputs), not just outputs.
      rngs: as in RNN; goes before that of the two.

    Raises:
      MissingRngsError: `rngs` is not an Rngs, a stream or a bool.

    >>> import jax.numpy as jnp
    >>> import nnx_core as nnx
    >>> rngs = nnx.Rngs(0)
    >>> forward, backward = (nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)) for _ in range(2))
    >>> nnx.Bidirectional(forward, backward)(jnp.ones((2, 7, 3))).shape
    (2, 7, 8)
    """

    def __init__(
        self,
        forward_rnn: RNNBase,
        backward_rnn: RNNBase,
        *,
        merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = _concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.forward_rnn, self.backward_rnn, self.merge_fn = forward_rnn, backward_rnn, merge_fn
        self.time_major, self.return_carry = time_major, return_carry
        self.rngs = data(carry_stream(self, rngs))

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        rngs: RngSource = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Apply the layer. Flags that are given go before those of the constructor.

        Args:
          inputs, rngs, seq_lengths, return_carry, time_major: as in RNN.
          initial_carry: a pair, for the forward and the backward RNN.
          reverse, keep_order: without effect, as in Linen: both directions are taken anyway.

        Returns:
          The merged outputs, or ((forward carry, backward carry), outputs).
        """
        del reverse, keep_order
        return_carry = self.return_carry if return_carry is None else return_carry
        if self.forward_rnn is self.backward_rnn:
            _LOGGER.warning("forward_rnn and backward_rnn are one object: both directions share their parameters.")
        options: dict[str, Any] = {
            "rngs": self.rngs if rngs is None else rngs,
            "seq_lengths": seq_lengths,
            "return_carry": True,
            "time_major": self.time_major if time_major is None else time_major,
        }
        first, second = (None, None) if initial_carry is None else initial_carry
        forward, there = self.forward_rnn(inputs, initial_carry=first, reverse=False, **options)
        backward, back = self.backward_rnn(inputs, initial_carry=second, reverse=True, keep_order=True, **options)
        outputs = self.merge_fn(there, back)
        return ((forward, backward), outputs) if return_carry else outputs
