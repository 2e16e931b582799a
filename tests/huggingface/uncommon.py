# SPDX-License-Identifier: Apache-2.0
"""Tiny models with unusual features: state spaces, compressed keys, inputs other than text.

They are families as those of :mod:`tests.huggingface.models`, with the inputs that each of them needs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import peftkern
from tests.huggingface.models import BATCH, IDS, PREFIX, SEQ, TARGETS, VOCAB, Family, base_model, find_caches

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    **_TOKENS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GQA = {**_DECODER, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def _linear_attention() -> dict[str, Any]:
    return {
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4,
    }  # fmt: skip


def _encoder_decoder() -> hf.EncoderDecoderConfig:
    bert = {key: value for key, value in _DECODER.items() if key not in ("bos_token_id", "eos_token_id")}
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**bert), hf.BertConfig(**bert))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _paligemma() -> hf.PaliGemmaConfig:
    return hf.PaliGemmaConfig(
        text_config={**_GQA, "model_type": "gemma", "head_dim": 16, "vocab_size": VOCAB + 1},
        vision_config={**_VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_index=VOCAB, projection_dim=64, hidden_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _mllama() -> Any:
    return hf.models.mllama.configuration_mllama.MllamaTextConfig(
        **_GQA, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )


def _t5gemma() -> hf.T5GemmaConfig:
    stack = {
        **_GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    return hf.T5GemmaConfig(encoder=stack, decoder={**stack, "cross_attention_hidden_size": 64}, vocab_size=VOCAB)


def _idefics() -> hf.IdeficsConfig:
    return hf.IdeficsConfig(
        **_DECODER, additional_vocab_size=0, cross_layer_interval=1, use_resampler=False,
        vision_config={"embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "intermediate_size": 64},
    )  # fmt: skip


def _causal(name: str, **arguments: Any) -> Family:
    return Family(getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name}Config"), arguments)


def _constant(config: Any) -> Any:
    return lambda: config()


UNCOMMON: dict[str, Family] = {
    "stablelm": _causal("StableLm", **_GQA),
    "nemotron": _causal("Nemotron", **_GQA, head_dim=16),
    "qwen3.5": Family(
        hf.Qwen3_5ForCausalLM, hf.Qwen3_5TextConfig,
        {**_GQA, **_linear_attention(), "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": _causal("Lfm2", **_GQA, layer_types=["conv", "full_attention"], block_multiple_of=16),
    "jamba": _causal(
        "Jamba", **{k: v for k, v in _GQA.items() if k != "max_position_embeddings"}, attn_layer_offset=1,
        attn_layer_period=2, expert_layer_offset=0, expert_layer_period=2, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
    ),
    "minimax": _causal(
        "MiniMax", **_GQA, head_dim=16, num_local_experts=2, num_experts_per_tok=1, block_size=4,
        layer_types=["linear_attention", "full_attention"], experts_implementation="eager",
    ),
    "deepseek-v3": _causal(
        "DeepseekV3", **{**_GQA, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1, experts_implementation="eager",
    ),
    "longt5": Family(
        hf.LongT5ForConditionalGeneration, hf.LongT5Config,
        {**_TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "local_radius": 3,
         "decoder_start_token_id": 0},
        "SEQ_2_SEQ_LM",
    ),
    "diffllama": _causal("DiffLlama", **_GQA),
    "doge": _causal("Doge", **_GQA, keep_window_size=64),
    "biogpt": _causal("BioGpt", **_DECODER),
    "bigbird-pegasus": Family(
        hf.BigBirdPegasusForConditionalGeneration, hf.BigBirdPegasusConfig,
        {**_TOKENS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
         "attention_type": "original_full", "decoder_start_token_id": 1},
        "SEQ_2_SEQ_LM",
    ),
    "encoder-decoder (bert)": Family(hf.EncoderDecoderModel, _constant(_encoder_decoder), {}, "SEQ_2_SEQ_LM"),
    "paligemma": Family(hf.PaliGemmaForConditionalGeneration, _constant(_paligemma), {}),
    "mllama": Family(hf.MllamaForCausalLM, _constant(_mllama), {}),
    "t5gemma": Family(hf.T5GemmaForConditionalGeneration, _constant(_t5gemma), {}, "SEQ_2_SEQ_LM"),
    "idefics": Family(hf.IdeficsForVisionText2Text, _constant(_idefics), {}),
}  # fmt: skip


# PEFT reads these from most configs; in these models they are in a nested text config.
_GEOMETRY = {"num_layers": 2, "num_attention_heads": 4, "token_dim": 64}
PEFT_GEOMETRY: dict[str, dict[str, int]] = {
    "encoder-decoder (bert)": _GEOMETRY,
    "t5gemma": {"num_layers": 2, "num_attention_heads": 2, "token_dim": 32},
}

STOCK_FAILS = {
    **{
        (name, "prefix"): "their caches are of a kind of their own"
        for name in ("qwen3.5", "lfm2", "jamba", "minimax")
    },
    ("deepseek-v3", "prefix"): "keys and values are compressed",
    ("mllama", "prompt"): "PEFT finds no embedding, as its rows are more than vocab_size",
}
"""(family, kind) that stock PEFT cannot run."""


def tuned(name: str, kind: str, *, patched: bool, **options: Any) -> PeftModel:
    """A model with a prefix or prompt of the same values at every call, stock or patched."""
    family = UNCOMMON[name]
    model = base_model(family)
    config = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        settings = {"task_type": family.task, "num_virtual_tokens": PREFIX, **PEFT_GEOMETRY.get(name, {})}
        if kind == "prompt" and name in PEFT_GEOMETRY:
            settings["token_dim"] = 64
        model = get_peft_model(model, config(**settings))
        nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.5)
    return peftkern.patch(model, **options) if patched else find_caches(model, patched=False)


def inputs_of(name: str, tokens: int = SEQ) -> dict[str, Tensor]:
    """Arguments of the family's forward other than ids and mask."""
    generator = torch.Generator().manual_seed(6)
    if name == "idefics":
        return {
            "pixel_values": torch.randn(BATCH, 1, 3, 16, 16, generator=generator),
            "image_attention_mask": torch.ones(BATCH, tokens, 1, dtype=torch.long),
        }
    return {}


def labels_of(name: str) -> Tensor:
    return TARGETS if UNCOMMON[name].task == "SEQ_2_SEQ_LM" else IDS
