# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoder-decoders that hear, and one that reads, with batches and references made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from peftkern import PrefixKV
from tests.huggingface.models import BATCH, PREFIX, VOCAB, base_model

__all__ = ["SPEECH", "Speech", "batch_of", "by_hand", "module_of", "speech_model", "tokens_by_hand"]

LENGTH, NEW = 6, 4
_TOKENS: dict[str, Any] = {
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
_LAYERS: dict[str, Any] = {
    **{"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_target_positions": 64},
}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@dataclasses.dataclass(frozen=True)
class Speech:
    """An encoder-decoder.

    Attributes:
        model, config: how to build it.
        arguments: of the config.
        inputs: the arguments of a call that the encoder reads.
        heads: key-value heads and their width.
    """

    model: Callable[..., Any]
    config: Callable[..., Any]
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    heads: tuple[int, int] = (4, 16)
    task: str = "SEQ_2_SEQ_LM"


def _t5gemma(**arguments: Any) -> hf.T5GemmaConfig:
    stack = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 16, "sliding_window": 4},
        **{"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1},
    }
    return hf.T5GemmaConfig(encoder=stack, decoder={**stack, "cross_attention_hidden_size": 64}, **arguments)


SPEECH: dict[str, Speech] = {
    "whisper": Speech(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        {**_TOKENS, **_LAYERS, "num_mel_bins": 8, "max_source_positions": 10, "init_std": 0.3,
         "suppress_tokens": None,
         "begin_suppress_tokens": None},
        lambda: {"input_features": _random(BATCH, 8, 20)},
    ),
    "speech_to_text": Speech(
        hf.Speech2TextForConditionalGeneration,
        hf.Speech2TextConfig,
        {**_TOKENS, **_LAYERS, "input_feat_per_channel": 8, "conv_channels": 16, "init_std": 0.3,
         "max_source_positions": 40},
        lambda: {"input_features": _random(BATCH, 20, 8)},
    ),
    "moonshine": Speech(
        hf.MoonshineForConditionalGeneration,
        hf.MoonshineConfig,
        {**_TOKENS, "hidden_size": 64, "intermediate_size": 64, "encoder_num_hidden_layers": 1,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4},
        lambda: {"input_values": _random(BATCH, 2000)},
    ),
    "t5gemma": Speech(
        hf.T5GemmaForConditionalGeneration,
        _t5gemma,
        {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1},
        lambda: {"input_ids": torch.arange(3, 3 + BATCH * 5).view(BATCH, 5)},
        (2, 16),
    ),
}  # fmt: skip


def speech_model(name: str) -> Any:
    """The same weights at every call, without dropout."""
    family: Any = SPEECH[name]
    model = base_model(family)
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in attribute:
                setattr(module, attribute, 0.0)
    return model


def module_of(name: str) -> PrefixKV:
    """A prefix of the decoder, with the same values at every call."""
    heads, width = SPEECH[name].heads
    prefix = PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=heads, head_dim=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        nn.init.normal_(prefix.trainable[0], std=0.5)
    return prefix


def batch_of(name: str, padding: str = "none") -> dict[str, Any]:
    """The arguments of a call, with padding of the decoder's tokens."""
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, -2:] = 0
    elif padding == "left":
        mask[0, :2] = 0
    labels = ids.roll(-1, 1).masked_fill(mask == 0, -100)
    return {
        **SPEECH[name].inputs(), "decoder_input_ids": ids, "labels": labels,
        "decoder_attention_mask": None if padding == "none" else mask,
    }  # fmt: skip


def _behind(prefix: PrefixKV, batch: dict[str, Any]) -> dict[str, Any]:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix.layer_kv()):
        cache.update(key.expand(BATCH, -1, -1, -1), value.expand(BATCH, -1, -1, -1), layer)
    mask = batch["decoder_attention_mask"]
    mask = torch.ones_like(batch["decoder_input_ids"]) if mask is None else mask
    return {
        **batch, "past_key_values": EncoderDecoderCache(cache, DynamicCache()),
        "decoder_attention_mask": nn.functional.pad(mask, (PREFIX, 0), value=1),
    }  # fmt: skip


def by_hand(name: str, prefix: PrefixKV, batch: dict[str, Any]) -> Any:
    """The output of the stock model with the prefix in its cache."""
    return speech_model(name).train().requires_grad_(False)(**_behind(prefix, batch))


@torch.no_grad()
def tokens_by_hand(name: str, prefix: PrefixKV, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy tokens [B, NEW], from a forward over the whole sequence for each of them."""
    model = speech_model(name).eval()
    ids = torch.ones(BATCH, 1, dtype=torch.long)
    for _ in range(NEW):
        batch = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": None}
        logits = model(**_behind(prefix, batch)).logits[:, -1:].index_fill(-1, torch.tensor(2), float("-inf"))
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    return ids[:, 1:]
