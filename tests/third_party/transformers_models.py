"""Flax architectures of transformers 4.57, tiny and with random weights: one row an architecture.

Law: only configurations are ours; no weights are loaded. The last release that has them is 4.57; its
T5 calls `jnp.clip` with names that a current jax does not have.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.third_party.models import KEY, Case, Model

ARCHITECTURES: list[Model] = []

# A width of 16 in two heads and layers; dropout is off, since every module is called deterministic.
_TEXT = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def architecture(make: Any) -> Any:
    """Make a function a row of the table."""
    ARCHITECTURES.append(Model(make.__name__, "transformers", lambda: _case(make)))
    return make


def _case(make: Any) -> Case:
    """transformers says that it has no Flax where its own check of versions does not like what is there."""
    import transformers

    if not hasattr(transformers, "FlaxBertModel"):
        pytest.skip("transformers has no Flax models from 5 on")
    return make()


def _plain(module: Any, *inputs: jax.Array) -> Any:
    """Tuples instead of the dataclasses of each architecture."""
    return module(*inputs, return_dict=False)


def _ids(rows: int = 2, length: int = 5) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, a mask that leaves out the end of the last row, and positions."""
    ids = jax.random.randint(KEY, (rows, length), 3, 19)
    mask = jnp.ones((rows, length), jnp.int32).at[-1, -1].set(0)
    return ids, mask, jnp.broadcast_to(jnp.arange(length), (rows, length))


def _encoder(module: Any, ids: jax.Array, mask: jax.Array, positions: jax.Array) -> Any:
    return module(ids, mask, jnp.zeros_like(ids), positions, None, return_dict=False)


@architecture
def bert():
    from transformers import BertConfig
    from transformers.models.bert.modeling_flax_bert import FlaxBertForMaskedLMModule

    return Case(FlaxBertForMaskedLMModule(BertConfig(**_TEXT)), _ids(), method=_encoder)


@architecture
def roberta():
    from transformers import RobertaConfig
    from transformers.models.roberta.modeling_flax_roberta import FlaxRobertaForMaskedLMModule

    config = RobertaConfig(**_TEXT, max_position_embeddings=12)
    return Case(FlaxRobertaForMaskedLMModule(config), _ids(), method=_encoder)


@architecture
def electra():
    from transformers import ElectraConfig
    from transformers.models.electra.modeling_flax_electra import FlaxElectraForMaskedLMModule

    return Case(FlaxElectraForMaskedLMModule(ElectraConfig(**_TEXT, embedding_size=8)), _ids(), method=_encoder)


@architecture
def albert():
    """One layer, called twice."""
    from transformers import AlbertConfig
    from transformers.models.albert.modeling_flax_albert import FlaxAlbertForMaskedLMModule

    config = AlbertConfig(**_TEXT, embedding_size=8, max_position_embeddings=12)
    ids, mask, positions = _ids()
    inputs = (ids, mask, jnp.zeros_like(ids), positions)
    return Case(FlaxAlbertForMaskedLMModule(config), inputs, method=_plain)


@architecture
def distilbert():
    """Sines as positions, which are no parameters."""
    from transformers import DistilBertConfig
    from transformers.models.distilbert.modeling_flax_distilbert import FlaxDistilBertForMaskedLMModule

    sizes = {"vocab_size": 19, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    config = DistilBertConfig(**sizes, max_position_embeddings=12, sinusoidal_pos_embds=True)
    return Case(FlaxDistilBertForMaskedLMModule(config), _ids()[:2], method=_plain)


@architecture
def gpt2():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

    config = GPT2Config(vocab_size=19, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return Case(FlaxGPT2LMHeadModule(config), _ids(), method=_plain)


@architecture
def gpt_neo():
    """Global and local attention."""
    from transformers import GPTNeoConfig
    from transformers.models.gpt_neo.modeling_flax_gpt_neo import FlaxGPTNeoForCausalLMModule

    config = GPTNeoConfig(
        vocab_size=19,
        max_position_embeddings=8,
        hidden_size=16,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        window_size=3,
    )
    return Case(FlaxGPTNeoForCausalLMModule(config), _ids(), method=_plain)


@architecture
def llama():
    """Rotary positions, RMS norms, gates."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule

    # Its table of positions is cut to as many columns as there are positions: 16 are two heads' worth.
    config = LlamaConfig(**_TEXT, max_position_embeddings=32)
    return Case(FlaxLlamaForCausalLMModule(config), _ids(), method=_plain)


@architecture
def bart():
    from transformers import BartConfig
    from transformers.models.bart.modeling_flax_bart import FlaxBartForConditionalGenerationModule

    config = BartConfig(
        vocab_size=19,
        d_model=16,
        max_position_embeddings=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    (ids, mask, positions), (targets, target_mask, target_positions) = _ids(), _ids(2, 4)
    inputs = (ids, mask, targets, target_mask, positions, target_positions)
    return Case(FlaxBartForConditionalGenerationModule(config), inputs, method=_plain)


@architecture
def whisper():
    """Convolutions over frames of sound, before an encoder and a decoder."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_flax_whisper import FlaxWhisperForConditionalGenerationModule

    encoder = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    sizes = {"vocab_size": 19, "d_model": 16, "num_mel_bins": 4}
    lengths = {"max_source_positions": 6, "max_target_positions": 8}
    config = WhisperConfig(**encoder, **decoder, **sizes, **lengths, pad_token_id=0)
    sound, (ids, mask, positions) = jax.random.normal(KEY, (2, 4, 12)), _ids()
    return Case(FlaxWhisperForConditionalGenerationModule(config), (sound, ids, mask, positions), method=_plain)


@architecture
def clip():
    """Two towers, and the scale of their product: a parameter without axes."""
    from transformers import CLIPConfig
    from transformers.models.clip.modeling_flax_clip import FlaxCLIPModule

    sizes = {name: size for name, size in _TEXT.items() if name != "vocab_size"}
    text = {**_TEXT, "max_position_embeddings": 8, "eos_token_id": 2}
    config = CLIPConfig(text, {**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    (ids, mask, positions), images = _ids(), jax.random.normal(KEY, (2, 8, 8, 3))
    return Case(FlaxCLIPModule(config), (ids, images, mask, positions), method=_plain)


@architecture
def vit():
    from transformers import ViTConfig
    from transformers.models.vit.modeling_flax_vit import FlaxViTForImageClassificationModule

    sizes = {name: size for name, size in _TEXT.items() if name != "vocab_size"}
    config = ViTConfig(**sizes, image_size=8, patch_size=4)
    return Case(FlaxViTForImageClassificationModule(config), (jax.random.normal(KEY, (2, 8, 8, 3)),), method=_plain)


@architecture
def resnet():
    """Convolutions, and statistics of BatchNorm."""
    from transformers import ResNetConfig
    from transformers.models.resnet.modeling_flax_resnet import FlaxResNetForImageClassificationModule

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    return Case(FlaxResNetForImageClassificationModule(config), (images,), method=_plain)
