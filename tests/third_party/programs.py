"""Programs that packages on PyPI ship, written in flax.nnx: one row a program, tiny, with random weights.

Law: nobody here wrote them; a row only calls their constructors and, where the package has one, its trainer. It knows
no library: `world.nnx` is flax.nnx or nnx_core, and what the package imports is the same. A package that is not
installed skips its rows. `noxfile.py`, session `models`, installs all.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tests.support.worlds import World
from tests.third_party.packages import require

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Model:
    """A model, what it is called with, and how.

    Args:
      module: the model.
      args: arguments of the call.
      call: `call(module, *args)` gives a tree of arrays.
      same_draws: whether nnx_core draws the first weights that flax.nnx does; where it draws Linen's, it does not.
    """

    module: Any
    args: tuple[Any, ...]
    call: Callable[..., Any] = lambda module, *args: module(*args)
    same_draws: bool = True


@dataclass(frozen=True)
class Program:
    """A row: the package it needs, and `make(world)`: a Model, or for a trainer the arrays that it ends with."""

    name: str
    package: str
    make: Callable[[World], Any] = field(repr=False)

    def worlds(self) -> tuple[World, World]:
        """The package on nnx_core and on flax.nnx, or the test is skipped."""
        require(self.package)
        return World("nnx_core", self.package), World("flax.nnx", self.package)


MODELS: list[Program] = []
TRAINERS: list[Program] = []


def row(table: list[Program], package: str) -> Callable[[Callable[[World], Any]], Callable[[World], Any]]:
    """Make a function a row of the table."""

    def register(make: Callable[[World], Any]) -> Callable[[World], Any]:
        table.append(Program(make.__name__, package, make))
        return make

    return register


def arrays_of(nnx: Any, x: Any) -> dict[str, Any]:
    """The arrays of an object or of a State by path; of a key the integers it is made of."""
    state = x if isinstance(x, nnx.State) else nnx.state(x)
    values = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return {path: plain(leaf) for path, leaf in values.items()}


def plain(leaf: Any) -> Any:
    """The value of a Variable; of a key its data."""
    value = leaf.get_value() if hasattr(leaf, "get_value") else leaf
    is_key = hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value


# ---- jraphx: graph neural networks ----

NODES = jax.random.normal(KEY, (6, 4))
EDGES = jnp.array([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
FEATURES = jax.random.normal(KEY, (8, 3))


@row(MODELS, "jraphx")
def jraphx_gcn(world):
    """Batch norms of its own, dropout, residuals."""
    gnn, rngs = world.load("jraphx.nn.models.gnn"), world.nnx.Rngs(0, dropout=1)
    model = gnn.GCN(4, 8, 3, 2, norm="batch_norm", dropout_rate=0.3, residual=True, rngs=rngs)
    return Model(model, (NODES, EDGES))


@row(MODELS, "jraphx")
def jraphx_gat(world):
    gnn, rngs = world.load("jraphx.nn.models.gnn"), world.nnx.Rngs(0, dropout=1)
    model = gnn.GAT(4, 8, 2, 2, heads=2, norm="layer_norm", jk="max", dropout_rate=0.2, rngs=rngs)
    return Model(model, (NODES, EDGES))


@row(MODELS, "jraphx")
def jraphx_gat_with_lstm(world):
    """Two GRU cells. nnx_core's are Linen's: a key a gate, and a b_hn, which flax.nnx's lack; here it is left out."""
    gnn, rngs = world.load("jraphx.nn.models.gnn"), world.nnx.Rngs(0)
    model = gnn.GAT(4, 8, 2, 2, heads=2, v2=True, jk="lstm", rngs=rngs)
    for cell in (model.jk.rnn_forward, model.jk.rnn_backward):
        if hasattr(cell, "hn_bias"):
            cell.hn_bias = world.nnx.data(None)
    return Model(model, (NODES, EDGES), same_draws=False)


@row(MODELS, "jraphx")
def jraphx_sage_and_gin(world):
    gnn, nnx = world.load("jraphx.nn.models.gnn"), world.nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.sage = gnn.GraphSAGE(4, 8, 2, 4, norm="batch_norm", rngs=rngs)
            self.gin = gnn.GIN(4, 8, 2, 2, norm="graph_norm", rngs=rngs)

        def __call__(self, x, edges):
            return self.gin(self.sage(x, edges), edges)

    return Model(Net(nnx.Rngs(0)), (NODES, EDGES))


@row(MODELS, "jraphx")
def jraphx_convolutions(world):
    """A learnt epsilon, a network given as an argument, and a cache that is written before training."""
    conv, nnx = world.load("jraphx.nn.conv"), world.nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            inner = nnx.Sequential(nnx.Linear(32, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
            self.attention = conv.TransformerConv(4, 8, heads=2, dropout_rate=0.2, edge_dim=3, beta=True, rngs=rngs)
            self.edge = conv.EdgeConv(inner)
            self.gin = conv.GINConv(nnx.Linear(3, 2, rngs=rngs), train_eps=True, rngs=rngs)
            self.gcn = conv.GCNConv(2, 2, cached=True, rngs=rngs)
            self.gcn.precompute_norm(EDGES, None, 6)

        def __call__(self, x, edges, features):
            x = self.edge(self.attention(x, edges, features), edges)
            return self.gcn(self.gin(x, edges), edges)

    return Model(Net(nnx.Rngs(0)), (NODES, EDGES, FEATURES))


# ---- mamba2-jax and mamba3-jax: state space models ----

TOKENS = jnp.arange(16).reshape(2, 8) % 13


def language_model(world: World, number: int) -> Any:
    module = world.load(f"mamba{number}_jax.modeling")
    options = {"vocab_size": 13, "hidden_size": 16, "state_size": 8, "head_dim": 8, "num_hidden_layers": 2}
    config = getattr(module, f"Mamba{number}Config")(**options, chunk_size=4)
    return getattr(module, f"Mamba{number}ForCausalLM")(config, rngs=world.nnx.Rngs(0))


def logits_and_loss(model, tokens):
    result = model(tokens, tokens)
    return result["logits"], result["loss"]


@row(MODELS, "mamba2_jax")
def mamba2(world):
    return Model(language_model(world, 2), (TOKENS,), logits_and_loss)


@row(MODELS, "mamba2_jax")
def mamba2_under_jax_jit(world):
    """The package compiles a call with plain `jax.jit`, whose argument is the model; its caches come out."""
    forward = world.load("mamba2_jax.modeling").forward

    def call(model, tokens):
        result = forward(model, tokens, tokens)
        return result["logits"], result["loss"], result["cache"]

    return Model(language_model(world, 2), (TOKENS,), call)


@row(MODELS, "mamba2_jax")
def mamba2_forecaster(world):
    module = world.load("mamba2_jax.modeling")
    options = {"d_model": 16, "n_layers": 1, "forecast_horizon": 4, "d_state": 8, "headdim": 8, "chunk_size": 4}
    model = module.Mamba2Forecaster(3, **options, rngs=world.nnx.Rngs(0))
    return Model(model, (jax.random.normal(KEY, (2, 8, 3)),))


@row(MODELS, "mamba3_jax")
def mamba3(world):
    return Model(language_model(world, 3), (TOKENS,), logits_and_loss)


# ---- bijx: normalizing flows ----


def flow_model(world: World, flow: Callable[[Any, Any], Any], shape: tuple[int, ...]) -> Model:
    """A flow and a prior: there and back, the densities, and samples that advance the prior's own keys."""
    bijx, nnx = world.load("bijx"), world.nnx

    class Flow(nnx.Module):
        def __init__(self, rngs):
            self.flow = flow(bijx, rngs)
            self.prior = bijx.IndependentNormal(event_shape=shape, rngs=rngs)

        def __call__(self, x):
            y, density = self.flow.forward(x, jnp.zeros(x.shape[: x.ndim - len(shape)]))
            return y, density, self.flow.reverse(y, density), self.prior.sample((2,)), self.prior.log_density(y)

    return Model(Flow(nnx.Rngs(0)), (jax.random.normal(KEY, (3, *shape)),))


@row(MODELS, "bijx")
def bijx_realnvp(world):
    """Coupling layers: a module rebuilt in each call from its graph and the outputs of another; static lists."""
    return flow_model(world, lambda b, rngs: b.realnvp_flow(4, n_coupling_layers=2, width=8, depth=1, rngs=rngs), (4,))


@row(MODELS, "bijx")
def bijx_convolutional(world):
    def flow(bijx, rngs):
        return bijx.realnvp_conv_flow((4, 4), n_coupling_layers=2, hidden_channels=[4], rngs=rngs)

    return flow_model(world, flow, (4, 4))


@row(MODELS, "bijx")
def bijx_splines(world):
    """numpy numbers on the left of Variables, under the vmap that the package writes for itself."""

    def flow(bijx, rngs):
        def spline(rngs):
            return bijx.MonotoneRQSpline(5, (), rngs=rngs)

        return bijx.coupling_flow(4, spline, n_coupling_layers=2, width=8, depth=1, rngs=rngs)

    return flow_model(world, flow, (4,))


@row(MODELS, "bijx")
def bijx_stack(world):
    """`split_rngs` and `vmap` make a stack of modules, scanned over its States."""

    def flow(bijx, rngs):
        return bijx.stack_bijections(lambda rngs: bijx.AffineLinear(rngs=rngs), transform=bijx.ScanChain, copies=3)(
            rngs
        )

    return flow_model(world, flow, (4,))


@row(MODELS, "bijx")
def bijx_chain(world):
    def flow(bijx, rngs):
        return bijx.Chain(bijx.AffineLinear(rngs=rngs), bijx.Tanh(), bijx.Inverse(bijx.Tanh()))

    return flow_model(world, flow, (4,))


@row(MODELS, "bijx")
def bijx_networks(world):
    nets, nnx = world.load("bijx.nn.nets"), world.nnx

    class Nets(nnx.Module):
        def __init__(self, rngs):
            self.convolutional = nets.ConvNet(2, 3, rngs=rngs)
            self.residual = nets.ResNet(3, 2, 8, 2, dropout=0.4, rngs=rngs)

        def __call__(self, x):
            return self.residual(self.convolutional(x))

    return Model(Nets(nnx.Rngs(0)), (jax.random.normal(KEY, (3, 4, 4, 2)),))


# ---- synecdoche: networks that make the weights of others ----


@row(MODELS, "synecdoche")
def synecdoche(world):
    """A State's tree is rebuilt from other arrays, and merged inside the call."""
    package, nnx = world.load("synecdoche"), world.nnx

    class Hypernets(nnx.Module):
        def __init__(self, rngs):
            target = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
            weights = nnx.state(target, nnx.Param)
            self.low_rank = package.LowRank(weights, 2, rngs=rngs)
            self.network = package.MLPHyper(weights, 3, 4, rngs=rngs)
            self.cosines = package.DCT(weights, 2, rngs=rngs)
            self.projection = package.RandomProjection(weights, 3, rngs=rngs)
            self.apply = package.functional(target)

        def __call__(self, x):
            makers = (self.low_rank, self.network, self.cosines, self.projection)
            return [self.apply(maker, x) for maker in makers]

    return Model(Hypernets(nnx.Rngs(0)), (jax.random.normal(KEY, (5, 3)),))


# ---- lpips-nnx: a perceptual metric on VGG16 ----


@row(MODELS, "lpips_nnx")
def lpips(world):
    """The package downloads its weights: here they are random, written where its loaders would have."""
    module, vgg = world.load("lpips_nnx.lpips"), world.load("lpips_nnx.vgg")
    module.LPIPS._load_weights = vgg.VGG16Features._load_weights = lambda self: None
    images = jax.random.normal(KEY, (2, 1, 16, 16, 3))
    return Model(module.LPIPS(rngs=world.nnx.Rngs(0)), tuple(images))


# ---- canvit-nnx: a vision transformer; needs Python 3.12 and jax 0.11.2 ----


@row(MODELS, "canvit_nnx")
def canvit(world):
    """Two glimpses at a scene, with a recurrent canvas between them, and a probe with batch statistics on it."""
    package, backbones = world.load("canvit_nnx"), world.load("canvit_core.backbone")
    backbones.BACKBONES["tiny"] = backbones.ViTSpec(embed_dim=16, num_heads=2, num_blocks=2, patch_size=4)
    sizes = {"canvas_num_heads": 2, "canvas_head_dim": 4, "num_canvas_registers": 2, "rw_stride": 1}
    config, rngs = package.CanViTConfig("tiny", **sizes), world.nnx.Rngs(0)
    probe = package.SegmentationProbe(embed_dim=8, num_classes=3, dropout=0.1, use_ln=True, rngs=rngs)
    model = package.CanViTForSemanticSegmentation(canvit=package.CanViT(config, rngs=rngs), probe=probe)

    def call(model, image, close, key):
        state, logits = model.init_state(batch_size=2, canvas_grid_size=4), []
        for viewpoint in (package.Viewpoint.full_scene(batch_size=2), package.Viewpoint(*close)):
            glimpse = package.sample_at_viewpoint(spatial=image, viewpoint=viewpoint, glimpse_size_px=8)
            seen, state = model(glimpse=glimpse, state=state, viewpoint=viewpoint, rngs=key)
            logits.append(seen)
        return logits, state

    image, close = jax.random.normal(KEY, (2, 16, 16, 3)), (jnp.full((2, 2), 0.25), jnp.full(2, 0.5))
    return Model(model, (image, close, KEY), call)


# ---- nnx-ppo, gpjax, blaxbird: trainers ----


def mujoco_playground() -> ModuleType:
    """The one class of mujoco_playground that nnx_ppo's environments use; the rest of it needs MuJoCo."""

    @struct.dataclass
    class State:
        data: Any
        obs: Any
        reward: Any
        done: Any
        metrics: Any
        info: Any

    module = ModuleType("mujoco_playground")
    module.State = State
    return module


def without_throughput(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in metrics.items() if "throughput" not in name}


@row(TRAINERS, "nnx_ppo")
def nnx_ppo(world):
    """PPO as the package trains: rollouts, advantages and minibatches in nested scans of modules, an optimizer too."""
    sys.modules.setdefault("mujoco_playground", mujoco_playground())
    ppo, config = world.load("nnx_ppo.algorithms.ppo"), world.load("nnx_ppo.algorithms.config")
    levels = world.load("nnx_ppo.algorithms.types").LoggingLevel
    sizes = {"actor_hidden_sizes": [8, 8], "critic_hidden_sizes": [8], "normalize_obs": True}
    networks = world.load("nnx_ppo.networks.factories").make_mlp_actor_critic(2, 2, **sizes, rngs=world.nnx.Rngs(0))
    environment = world.load("nnx_ppo.test_dummies.move_to_center_env").MoveToCenterEnv()
    options = {"n_envs": 4, "rollout_length": 4, "total_steps": 48, "n_epochs": 2, "n_minibatches": 2}
    training = config.PPOConfig(**options, learning_rate=1e-2, logging_level=levels.ALL, logging_percentiles=(0, 50))
    evaluation = config.EvalConfig(every_steps=16, n_envs=2, max_episode_length=5)
    log = []
    result = ppo.train_ppo(
        environment,
        networks,
        config.TrainConfig(ppo=training, eval=evaluation),
        log_fn=lambda metrics, step: log.append(without_throughput(metrics)),
    )
    state = result.training_state
    trained = {"networks": state.networks, "optimizer": state.optimizer}
    return {"log": log, **{name: arrays_of(world.nnx, x) for name, x in trained.items()}}


POINTS = jnp.linspace(-1, 1, 12)[:, None]
VALUES = jnp.sin(3 * POINTS) + 0.1 * jax.random.normal(KEY, POINTS.shape)


def fit(world: World, model: Any, objective: Callable[..., Any], values: jax.Array, **options: Any) -> dict[str, Any]:
    gpjax = world.load("gpjax")
    data = gpjax.Dataset(X=POINTS, y=values)
    loop = {"optim": optax.adam(1e-2), "num_iters": 3, "key": KEY, "verbose": False}
    fitted, losses = gpjax.fit(model=model, objective=objective, train_data=data, **loop, **options)
    return {"losses": losses, "model": arrays_of(world.nnx, fitted)}


@row(TRAINERS, "gpjax")
def gpjax_conjugate(world):
    """Products and sums of kernels, constrained parameters, the package's own loop over States."""
    gpjax = world.load("gpjax")
    kernel = gpjax.kernels.RBF() * gpjax.kernels.Matern32() + gpjax.kernels.Linear()
    prior = gpjax.gps.Prior(mean_function=gpjax.mean_functions.Constant(), kernel=kernel)
    posterior = prior * gpjax.likelihoods.Gaussian(num_datapoints=12)
    return fit(world, posterior, lambda p, d: -gpjax.objectives.conjugate_mll(p, d), VALUES)


@row(TRAINERS, "gpjax")
def gpjax_variational(world):
    """Inducing points, in minibatches."""
    gpjax = world.load("gpjax")
    prior = gpjax.gps.Prior(mean_function=gpjax.mean_functions.Zero(), kernel=gpjax.kernels.RBF())
    posterior = prior * gpjax.likelihoods.Bernoulli(num_datapoints=12)
    family = gpjax.variational_families.VariationalGaussian(posterior=posterior, inducing_inputs=POINTS[::3])
    labels = (VALUES > 0).astype(jnp.float32)
    return fit(world, family, lambda q, d: -gpjax.objectives.elbo(q, d), labels, batch_size=4)


@row(TRAINERS, "blaxbird")
def blaxbird(world):
    """A loop with evaluation and hooks, around a model with dropout and batch norm."""
    trainer, nnx = world.load("blaxbird"), world.nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def loss(model, key, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    def step(model, key, batch):
        return nnx.value_and_grad(lambda model: loss(model, key, batch))(model)

    keys = jax.random.split(KEY, 12)
    batches = [{"x": jax.random.normal(key, (4, 3)), "y": jnp.ones((4, 1))} for key in keys]
    optimizer = nnx.ModelAndOptimizer(Net(nnx.Rngs(0)), optax.adam(1e-2))
    loop = {"n_steps": 3, "eval_every_n_steps": 1, "n_eval_batches": 2}
    trainer.train_fn(fns=(step, loss), **loop)(KEY, optimizer, iter(batches), iter(batches))
    return arrays_of(nnx, optimizer)
