"""Linen networks that packages on PyPI ship, in tiny random configurations: one row a network.

Law: nobody here wrote them; a row only calls their constructors (e3x ships layers, so its row composes them as its
documentation does). A package that is not installed skips its rows. `noxfile.py`, session `models`, installs all.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.third_party.packages import require

os.environ.setdefault("NETKET_ENABLE_X64", "0")  # else importing netket turns on float64 for the whole process
KEY = jax.random.key(0)


@dataclass(frozen=True)
class Case:
    """A network and a call of it.

    Args:
      module: the network.
      args: arguments of the call.
      method: what is called of it, as `apply` takes it.
      streams: the random streams that a call draws from.
    """

    module: nn.Module
    args: tuple[Any, ...]
    method: Any = None
    streams: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, jax.Array]:
        """A key for each stream of a call."""
        return {name: jax.random.key(i + 7) for i, name in enumerate(self.streams)}


@dataclass(frozen=True)
class Model:
    """A row: the package it needs, and how its case is made."""

    name: str
    package: str
    make: Callable[[], Case] = field(repr=False)

    def case(self) -> Case:
        """The case, or the test is skipped."""
        require(self.package)
        return self.make()


MODELS: list[Model] = []


def model(package: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Make a function a row of the table."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        MODELS.append(Model(make.__name__, package, make))
        return make

    return register


# ---- brax: policies and critics of reinforcement learning ----


@model("brax")
def brax_policy():
    """Dense layers under names with indices, LayerNorm, a parameter without inputs."""
    from brax.training import networks

    init = jax.nn.initializers.lecun_uniform()
    policy = networks.PolicyModuleWithStd(3, [8, 8], nn.swish, init, True, "log", 0.5)
    return Case(policy, (jax.random.normal(KEY, (4, 6)),))


@model("brax")
def brax_vision():
    """Convolutions over a dict of images, whose keys have a slash."""
    from brax.training import networks

    module = networks.VisionMLP(
        layer_sizes=[8, 2],
        cnn_output_channels=(4, 4),
        cnn_kernel_size=(3, 3),
        cnn_stride=(2, 1),
        normalise_channels=True,
        state_obs_key="state",
        layer_norm=True,
    )
    observation = {"pixels/view_0": jax.random.normal(KEY, (4, 8, 8, 3)), "state": jax.random.normal(KEY, (4, 6))}
    return Case(module, (observation,))


@model("brax")
def brax_spectral_norm():
    """State in a collection of its own (`sing_vec`), whose stream every call draws from."""
    from brax.training import networks

    return Case(networks.SNMLP([8, 8, 2]), (jax.random.normal(KEY, (4, 6)),), streams=("sing_vec",))


@model("brax")
def brax_critic():
    """Two outputs."""
    from brax.training import networks

    critic = networks.DistributionalCritic([8], nn.relu, jax.nn.initializers.lecun_uniform(), 4)
    return Case(critic, (jax.random.normal(KEY, (4, 6)),))


# ---- e3x: equivariant message passing over molecules ----


class MessagePassing(nn.Module):
    """The energy of a molecule, as e3x's guide builds it from its layers."""

    features: int = 2
    max_degree: int = 1
    iterations: int = 1

    @nn.compact
    def __call__(self, numbers, positions, dst, src):
        import e3x

        basis = e3x.nn.basis(
            positions[src] - positions[dst],
            num=4,
            max_degree=self.max_degree,
            radial_fn=e3x.nn.reciprocal_bernstein,
            cutoff_fn=lambda r: e3x.nn.smooth_cutoff(r, cutoff=4.0),
        )
        x = e3x.nn.Embed(num_embeddings=10, features=self.features)(numbers)
        for _ in range(self.iterations):
            y = e3x.nn.MessagePass()(x, basis, dst_idx=dst, src_idx=src)
            x = x + e3x.nn.Dense(self.features)(e3x.nn.silu(e3x.nn.Dense(self.features)(e3x.nn.add(x, y))))
            x = e3x.nn.TensorDense(features=self.features, max_degree=self.max_degree)(x)
        energies = nn.Dense(1, use_bias=False)(e3x.nn.change_max_degree_or_type(x, max_degree=0))
        bias = self.param("element_bias", lambda _, shape: jnp.zeros(shape), (10,))
        return energies.sum() + bias[numbers].sum()


@model("e3x")
def e3x_message_passing():
    import e3x

    dst, src = e3x.ops.sparse_pairwise_indices(4)
    positions = jax.random.normal(KEY, (4, 3))
    return Case(MessagePassing(), (jnp.array([1, 6, 8, 1]), positions, jnp.asarray(dst), jnp.asarray(src)))


@model("e3x")
def e3x_attention():
    """Tensor products and attention over the neighbours."""
    import e3x

    basis = jax.random.normal(jax.random.key(1), (4, 3, 1, 4, 5))
    adjacent = jnp.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    attention = e3x.nn.SelfAttention(max_degree=1, num_heads=2, use_relative_positional_encoding_qk=True)

    def call(module, x, basis, adjacent):
        return module(x, basis, adj_idx=adjacent)

    return Case(attention, (jax.random.normal(KEY, (4, 1, 4, 4)), basis, adjacent), method=call)


# ---- recurrentgemma: a language model ----


@model("recurrentgemma")
def recurrentgemma():
    """Scans, local attention and remat; names with dots (`blocks.0`), a cache among the outputs."""
    from recurrentgemma import common
    from recurrentgemma.jax import Griffin

    config = common.GriffinConfig(
        vocab_size=13,
        width=16,
        mlp_expanded_width=32,
        num_heads=2,
        block_types=(common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=4,
        logits_soft_cap=30.0,
        lru_width=16,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    tokens = jnp.arange(12).reshape(2, 6)
    return Case(Griffin(config), (tokens, jnp.broadcast_to(jnp.arange(6), (2, 6))))


# ---- netket: wave functions ----


def spins() -> tuple[Any, jax.Array]:
    """(Hilbert space of six spins, three configurations), in single precision."""
    import netket

    space = netket.hilbert.Spin(0.5, 6)
    return space, space.random_state(jax.random.key(1), 3, dtype=jnp.float32)


@model("netket")
def netket_rbm():
    """Complex parameters."""
    _, x = spins()
    from netket import models

    return Case(models.RBM(alpha=2, param_dtype=jnp.complex64), (x,))


@model("netket")
def netket_gcnn():
    """A group of symmetries as a field."""
    _, x = spins()
    from netket import graph, models

    return Case(models.GCNN(symmetries=graph.Chain(6), layers=2, features=3, param_dtype=jnp.float32), (x,))


@model("netket")
def netket_autoregressive():
    """A cache that a method reads and writes; a Hilbert space as a field, layers with a leading underscore."""
    space, x = spins()
    from netket import models

    module = models.FastARNNDense(hilbert=space, layers=2, features=4, param_dtype=jnp.float32)

    def conditionals(module, x):
        return jnp.stack([module.conditional(x, i) for i in range(3)])

    return Case(module, (x,), method=conditionals)


# ---- flaxmodels: a block of ResNet-50 ----


@model("flaxmodels")
def flaxmodels_bottleneck():
    """Convolutions and a BatchNorm of its own; a dict that the call fills."""
    from flaxmodels.resnet.resnet import Bottleneck

    def call(module, x):
        activations = {}
        return module(x, activations), activations

    return Case(
        Bottleneck(4, downsample=True, block_name="block"), (jax.random.normal(KEY, (2, 8, 8, 6)),), method=call
    )
