# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the causal families that transformers ships, out of their configs' defaults.

Sizes are recognised by the names of a config's arguments, and layers are kept so that each type of layer stays. What
single families need beside that stands in :data:`OVERRIDES`, each with its reason.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.huggingface.models import VOCAB

__all__ = ["CANNOT", "FAMILIES", "OVERRIDES", "Override", "forget", "tiny_config", "tiny_model"]

_VISION = (
    "aria", "aya_vision", "deepseek_vl", "idefics2", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "lighton_ocr",
    "llava", "llava_next", "llava_onevision", "mistral3", "ovis2", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "smolvlm", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip

FAMILIES: dict[str, str] = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **{name: kind for name, kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if name in _VISION},
}
"""Model class by family (``model_type``), as ``AutoModelForCausalLM`` has them; beside them some that read images and
run on text alone."""

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

#: A config's argument of one of these names is at most this.
_LARGEST: dict[int, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size shape_vocab_size "
    "pronunciation_vocab_size",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim backbone_hidden_size "
    "attention_hidden_size hidden_size_global lru_width audio_vocab_size codebook_size index_topk",
    128: "intermediate_size d_ff ffn_dim n_inner ffn_hidden_size dff dim_ff feed_forward_size decoder_ffn_dim "
    "encoder_ffn_dim d_inner intermediate_size_mlp mlp_dim dense_intermediate_size shared_intermediate_size "
    "block_ff_dim max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length "
    "mamba_d_ssm",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_experts_intermediate_size qk_head_dim kv_lora_rank q_lora_rank o_lora_rank "
    "mamba_headdim",
    16: "head_dim d_kv kv_channels dim_head swa_head_dim attention_head_size d_head global_head_dim v_head_dim "
    "qk_nope_head_dim qk_rope_head_dim query_pre_attn_scalar mamba_d_head mamba_head_dim mamba_d_state "
    "ssm_state_size state_size linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
    "ple_embed_dim router_hidden_size",
    8: "local_attention hidden_size_per_layer_input mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank "
    "mamba_chunk_size adapter_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size attention_chunk_size "
    "attention_window_size laurel_rank linear_num_key_heads linear_num_value_heads linear_num_heads "
    "index_n_heads xlstm_head",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth n_mamba_heads kv_n_heads conf_num_hidden_layers",
    1: "n_group topk_group num_expert_group max_window_layers first_k_dense_replace mamba_n_groups mamba_ngroups "
    "n_groups",
}  # fmt: skip
_LIMITS = {name: size for size, names in _LARGEST.items() for name in names.split()}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types", "attn_layers")
_TOKEN = re.compile(r".*_token_(id|index)")
_NOT_SIZES = (
    "transformers_version", "model_type", "id2label", "label2id", "architectures", "dtype", "torch_dtype",
    "_name_or_path", "per_layer_config", "label_names", "return_dict", "output_hidden_states", "output_attentions",
    "problem_type", "_attn_implementation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Override:
    """What a family needs beside what the names of its arguments tell.

    Attributes:
        reason: why.
        arguments: of the config.
        alone: they and the usual sizes are all that the config is made of; else they replace shrunk defaults.
    """

    reason: str
    arguments: Mapping[str, Any]
    alone: bool = False


_ENCODERS = (
    "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_DECODER = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
_NO_ATTENTION = "none of the first layers by default has attention"
_NO_DEFAULT = "sizes without a default"
_PARTS_OF_A_HEAD = {"rope_parameters": {"mrope_section": [2, 3, 3]}}

OVERRIDES: dict[str, Override] = {
    **{name: Override("an encoder by default", {"is_decoder": True}) for name in _ENCODERS},
    "bamba": Override(
        _NO_ATTENTION,
        {
            **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
            **{"mamba_d_state": 16, "mamba_chunk_size": 8, "max_position_embeddings": 128},
        },
        alone=True,
    ),
    "big_bird": Override(
        "an encoder by default; its sparse attention becomes full with the first short batch",
        {"is_decoder": True, "attention_type": "original_full"},
    ),
    "codegen": Override("rotary dimensions within the head", {"rotary_dim": 8}),
    "cohere_compass_text": Override(
        "rope parameters without a default",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "dbrx": Override(
        "a default without rope_theta, which the model reads",
        {
            **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        alone=True,
    ),
    "deepseek_v2": Override(
        _NO_DEFAULT,
        {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "dory": Override(
        "layers of three stacks",
        {
            **{"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
            "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        },
    ),
    "dots1": Override(
        _NO_DEFAULT,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "head_dim": 16,
            "moe_intermediate_size": 32,
        },
        alone=True,
    ),
    "dots3_note_text": Override("layers of sizes of their own", {"per_layer_config": {}, "head_dim": 32}),
    "falcon_h1": Override(
        "widths that belong together",
        {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    ),
    "gpt_neo": Override(
        "types of layers in a notation of its own",
        {
            **{"num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 4},
            "attention_types": [[["global", "local"], 1]],
        },
        alone=True,
    ),
    "gptj": Override("rotary dimensions within the head", {"rotary_dim": 8}),
    "granitemoehybrid": Override(_NO_ATTENTION, {"layer_types": ["mamba", "attention"], "num_local_experts": 4}),
    "hrm_text": Override(
        "layers are counted once a cycle", {"num_hidden_layers": 2, "num_layers_per_stack": None, "H_cycles": 1}
    ),
    "hunyuan_v1_dense": Override(_NO_DEFAULT, {"head_dim": 16}),
    "hunyuan_v1_moe": Override(_NO_DEFAULT, {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "jamba": Override(
        _NO_ATTENTION,
        {
            **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 2},
            **{"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        },
        alone=True,
    ),
    "lfm2_moe": Override(_NO_DEFAULT, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "longcat_flash": Override("experts that compute nothing", {"zero_expert_num": 4}),
    "mamba2": Override("widths that belong together", {"num_heads": 8, "head_dim": 16}),
    "ministral": Override(_NO_DEFAULT, {"head_dim": 16, "num_key_value_heads": 2}),
    "moshi": Override(
        "its cache has a window that its mask does not have, so its steps in generation see less than its forward",
        {"sliding_window": 128},
    ),
    "nemotron": Override(_NO_DEFAULT, {"head_dim": 16, "num_key_value_heads": 2}),
    "phi4_multimodal": Override("a wide audio tower", {"audio_config": {"nemo_conv_channels": 16}}),
    "qwen2_vl": Override(
        "parts of a head by default; a wide vision tower",
        {"text_config": _PARTS_OF_A_HEAD, "vision_config": {"embed_dim": 64}},
    ),
    "qwen2_5_vl": Override("parts of a head by default", {"text_config": _PARTS_OF_A_HEAD}),
    "qwen4_exp_text": Override(
        _NO_DEFAULT,
        {
            **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64},
            **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 2},
        },
    ),
    "recurrent_gemma": Override(
        _NO_ATTENTION,
        {
            **{"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 64},
            **{"attention_window_size": 16, "head_dim": 16, "num_key_value_heads": 1},
        },
        alone=True,
    ),
    "reformer": Override("an encoder by default", {"is_decoder": True, "axial_pos_embds": False}),
    "xlstm": Override("its states are square", {"qk_dim_factor": 1.0, "num_blocks": 2}),
    "xmod": Override("a language to speak", {"is_decoder": True, "default_language": "en_XX"}),
    "zamba": Override(
        _NO_ATTENTION,
        {
            **{"num_hidden_layers": 6, "num_key_value_heads": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
            **{"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        },
        alone=True,
    ),
    "zamba2": Override(
        _NO_ATTENTION,
        {
            **{"num_hidden_layers": 3, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid", "mamba"]},
            **{"mamba_ngroups": 1, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_d_state": 16, "num_mem_blocks": 1},
            **{"use_mamba_kernels": False, "max_position_embeddings": 128, "chunk_size": 8},
        },
        alone=True,
    ),
}

CANNOT: dict[str, str] = {
    "blt": "its forward asks the config for num_hidden_layers, which the config does not have",
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "it drafts on keys and hidden states of another model, not on tokens",
    "gemma4_unified_assistant": "it drafts on keys and hidden states of another model, not on tokens",
    "git": "its loss counts the tokens of an image",
    "musicgen": "it reads tokens of several codebooks, [4 B, S]",
    "musicgen_melody": "it reads tokens of several codebooks, [4 B, S]",
}
"""Families that cannot be built tiny, or not be run on bare tokens, with the reason."""


def tiny_config(family: str) -> Any:
    """The config of a family, small. Raises whatever the config class does."""
    kind = _config_class(family)
    override = OVERRIDES.get(family, OVERRIDES.get(kind.model_type, Override("", {})))
    defaults = kind().to_dict()
    if override.alone:
        usual = {name: value for name, value in {**_TOKENS, **_DECODER}.items() if name in defaults}
        return kind(**{**usual, **override.arguments})
    values = _merged(_shrunk(defaults), override.arguments)
    for name, token in _TOKENS.items():
        if values.get(name) is None and name != "decoder_start_token_id":
            values[name] = token
    return kind(**values)


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights at every call, without dropout and router noise. Raises whatever the model class does."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(hf, FAMILIES[family])(tiny_config(family))
        for parameter in model.parameters():
            # Of zeros or of uninitialised memory, as some classes leave them, nothing could be told apart.
            if not parameter.isfinite().all() or (parameter.dim() > 1 and parameter.float().std() == 0):
                parameter.normal_(std=0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _is_noise(name):
                setattr(module, name, 0.0)
    blank = [
        (m, name) for m in model.modules() for name, value in vars(m).items() if value is None and name[0] != "_"
    ]
    setattr(model, _BLANK, blank)
    return model.to(dtype)


def _config_class(family: str) -> Any:
    """The family's; of a composite family whose causal model takes the text part, that part's."""
    whole, taken = hf.CONFIG_MAPPING[family], getattr(hf, FAMILIES[family]).config_class
    return taken if taken in whole.sub_configs.values() else whole


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """``others`` in place of values of the same names, in nested configs as well."""
    nested = {
        name: _merged(values[name], other)
        for name, other in others.items()
        if isinstance(other, dict) and isinstance(values.get(name), dict)
    }
    return {**values, **others, **nested}


def forget(model: nn.Module) -> None:
    """Clears what a tiny model keeps from call to call beside its parameters and buffers, as some classes do."""
    for module in model.modules():
        for owner, name in vars(module).get(_BLANK, ()):
            if getattr(owner, name) is not None:
                setattr(owner, name, None)


#: Attribute of a tiny model: (module, name) of attributes that are None before the first call.
_BLANK = "blank_attributes"


def _is_noise(name: str) -> bool:
    return "drop" in name or "jitter" in name


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config, with small sizes and few layers."""
    values = {name: copy.deepcopy(value) for name, value in values.items() if name not in _NOT_SIZES}
    _keep_few_layers(values)
    heads = next((values[name] for name in _HEADS if isinstance(values.get(name), int)), None)
    for name, value in values.items():
        if isinstance(value, dict) and ("config" in name or "model_type" in value):
            kind = {"model_type": value["model_type"]} if "model_type" in value else {}
            values[name] = {**_shrunk(value), **kind}
        elif isinstance(value, float) and _is_noise(name):
            values[name] = 0.0
        elif name == "eos_token_id" and isinstance(value, list):
            values[name] = _TOKENS[name]
        elif isinstance(value, list) and name in _LIMITS:
            values[name] = [min(item, _LIMITS[name]) if isinstance(item, int) else item for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = _small(name, value, heads)
    return values


def _small(name: str, value: float, heads: int | None) -> float:
    if name in _KV_HEADS:
        return 1 if value == 1 else 4 if value == heads else 2
    if name in _TOKENS:
        return _TOKENS[name]
    if _TOKEN.fullmatch(name):
        return min(value, VOCAB - 1)
    return min(value, _LIMITS.get(name, value))


def _keep_few_layers(values: dict[str, Any]) -> None:
    """Two layers, or one of each type, in place of all; twice as many where layers share keys with earlier ones."""
    total = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), 0)
    if not total:
        return
    firsts: set[int] = set()
    for name in _LAYER_TYPES:
        types = values.get(name)
        if isinstance(types, list) and len(types) == total:
            firsts |= {list(map(str, types)).index(kind) for kind in map(str, types)}
    others = (layer for layer in range(total) if layer not in firsts)
    while len(firsts) < min(2, total):
        firsts.add(next(others))
    kept = sorted(firsts)
    if values.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = len(kept)
        kept = kept * 2
    for name, value in list(values.items()):
        if isinstance(value, list) and len(value) == total and total > 4:
            values[name] = [value[layer] for layer in kept]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            del values[name]  # settings of single layers
        elif name in _LAYERS and isinstance(value, int):
            values[name] = len(kept)
