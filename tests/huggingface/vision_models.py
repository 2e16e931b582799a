# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that read images, and batches with an image in every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.huggingface.models import BATCH, VOCAB, base_model

__all__ = ["IMAGE_TOKEN", "MASKS", "PADDINGS", "TEXT", "VISION", "Vision", "batch_of", "ids_of", "vision_model"]

IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN = 90, 91, 92, 93
TEXT = 6
"""Tokens of text in a row, beside those of its image."""

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT: dict[str, Any] = {
    **_TOKENS,
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False},
}
_TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8, "num_channels": 3},
}
_ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _images() -> dict[str, Tensor]:
    return {"pixel_values": _random(BATCH, 3, 16, 16)}


def _one_each() -> dict[str, Tensor]:
    return {"pixel_values": _random(BATCH, 1, 3, 16, 16)}


def _with_sizes() -> dict[str, Tensor]:
    return {**_images(), "image_sizes": torch.tensor([[16, 16]] * BATCH)}


def _tiles() -> dict[str, Tensor]:
    """The whole image and its parts."""
    return {"pixel_values": _random(BATCH, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * BATCH)}


def _flat(columns: int) -> Callable[[], dict[str, Tensor]]:
    """Patches of all images in rows, and their grids of 4 x 4 patches, of which 4 give a token."""
    return lambda: {
        "pixel_values": _random(BATCH * 16, columns),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


def _mllama_images() -> dict[str, Tensor]:
    return {
        "pixel_values": _random(BATCH, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 1, dtype=torch.long),
    }


@dataclasses.dataclass(frozen=True)
class Vision:
    """A model that reads images.

    Attributes:
        model, config: how to build it.
        arguments: of the config.
        images: the arguments of a call that hold the images of a batch, one a row.
        image_tokens: tokens of an image in the text.
        types: the name of an argument that says which tokens are an image's.
    """

    model: Callable[..., Any]
    config: Callable[..., Any]
    arguments: dict[str, Any]
    images: Callable[[], dict[str, Tensor]]
    image_tokens: int = 4
    types: str | None = None
    task: str = "CAUSAL_LM"


def _vision(
    name: str,
    text: str,
    tower: str,
    images: Callable[[], dict[str, Tensor]],
    *,
    text_more: dict[str, Any] | None = None,
    tower_more: dict[str, Any] | None = None,
    image_tokens: int = 4,
    types: str | None = None,
    index: str = "image_token_id",
    **more: Any,
) -> Vision:
    arguments = {
        "text_config": {"model_type": text, **_TEXT, **(text_more or {})},
        "vision_config": {"model_type": tower, **_TOWER, **(tower_more or {})},
        index: IMAGE_TOKEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip
    config = getattr(hf, f"{name}Config")
    return Vision(getattr(hf, f"{name}ForConditionalGeneration"), config, arguments, images, image_tokens, types)


_QWEN: dict[str, Any] = {
    "vision_start_token_id": START_TOKEN, "vision_end_token_id": END_TOKEN, "video_token_id": VIDEO_TOKEN,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_QWEN3_TOWER = {
    **{"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4},
    **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
_PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}

VISION: dict[str, Vision] = {
    "llava": _vision(
        "Llava", "llama", "clip_vision_model", _images, index="image_token_index", vision_feature_layer=-1
    ),
    "vipllava": _vision(
        "VipLlava", "llama", "clip_vision_model", _images, index="image_token_index", vision_feature_layers=[-1, -2]
    ),
    "llava_next": _vision(
        "LlavaNext",
        "mistral",
        "clip_vision_model",
        _tiles,
        index="image_token_index",
        image_tokens=10,
        text_more={"sliding_window": None},
        vision_feature_layer=-1,
        **_PINPOINTS,
    ),
    "llava_onevision": _vision(
        "LlavaOnevision",
        "qwen2",
        "siglip_vision_model",
        _tiles,
        index="image_token_index",
        image_tokens=10,
        tower_more={"vision_use_head": False},
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
        video_token_index=VIDEO_TOKEN,
        **_PINPOINTS,
    ),
    "qwen2_vl": _vision(
        "Qwen2VL",
        "qwen2_vl_text",
        "qwen2_vl_vision",
        _flat(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text_more={"rope_parameters": _ROPE_3D},
        tower_more={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        **_QWEN,
    ),
    "qwen2_5_vl": _vision(
        "Qwen2_5_VL",
        "qwen2_5_vl_text",
        "qwen2_5_vl_vision",
        _flat(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text_more={"rope_parameters": _ROPE_3D},
        tower_more={
            "depth": 2,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_QWEN,
    ),
    "qwen3_vl": _vision(
        "Qwen3VL",
        "qwen3_vl_text",
        "qwen3_vl",
        _flat(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text_more={"rope_parameters": {**_ROPE_3D, "mrope_interleaved": True}},
        tower_more=_QWEN3_TOWER,
        **_QWEN,
    ),
    "idefics3": _vision(
        "Idefics3",
        "llama",
        "idefics3_vision",
        _one_each,
        image_tokens=1,
        scale_factor=2,
    ),
    "smolvlm": _vision("SmolVLM", "llama", "smolvlm_vision", _one_each, image_tokens=1, scale_factor=2),
    "internvl": _vision(
        "InternVL",
        "qwen2",
        "internvl_vision",
        _images,
        image_tokens=1,
        tower_more={"image_size": [16, 16], "patch_size": [8, 8]},
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    ),
    "mistral3": _vision(
        "Mistral3",
        "mistral",
        "pixtral",
        _with_sizes,
        index="image_token_index",
        text_more={"sliding_window": None},
        tower_more={"head_dim": 16, "patch_size": 4},
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "gemma3": _vision(
        "Gemma3",
        "gemma3_text",
        "siglip_vision_model",
        _images,
        types="token_type_ids",
        text_more=_GEMMA,
        tower_more={"vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=START_TOKEN,
        eoi_token_index=END_TOKEN,
    ),
    "paligemma": _vision(
        "PaliGemma",
        "gemma",
        "siglip_vision_model",
        _images,
        index="image_token_index",
        types="token_type_ids",
        tower_more={"projection_dim": 64, "vision_use_head": False},
        projection_dim=64,
    ),
    "mllama": _vision(
        "Mllama",
        "mllama_text_model",
        "mllama_vision_model",
        _mllama_images,
        index="image_token_index",
        image_tokens=0,
        text_more={
            "cross_attention_layers": [1],
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tower_more={
            "attention_heads": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 64,
            "norm_eps": 1e-5,
        },
    ),
    "aya_vision": _vision(
        "AyaVision",
        "cohere2",
        "siglip_vision_model",
        _images,
        index="image_token_index",
        image_tokens=1,
        text_more={"sliding_window": 4},
        tower_more={"vision_use_head": False},
        vision_feature_layer=-1,
        downsample_factor=2,
    ),
    "idefics2": _vision(
        "Idefics2",
        "mistral",
        "idefics2_vision",
        _one_each,
        image_tokens=2,
        text_more={"sliding_window": None},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
    ),
}
"""One of each way in which images reach the text: as embeddings, with positions in three dimensions, with features
for several layers, with a bidirectional mask, or through layers of cross attention."""


def vision_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights at every call, without dropout. Parameters that begin as zeros, as gates do, are random."""
    family: Any = VISION[name]
    model = base_model(family, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ids_of(name: str) -> Tensor:
    """[B, S] tokens; the image of each row begins behind 3, 4 or 3 tokens of text."""
    family = VISION[name]
    text = torch.randint(3, IMAGE_TOKEN, (BATCH, TEXT), generator=torch.Generator().manual_seed(0))
    image = torch.full((family.image_tokens,), IMAGE_TOKEN)
    return torch.stack([torch.cat([row[:at], image, row[at:]]) for row, at in zip(text, (3, 4, 3), strict=True)])


PADDINGS = ("none", "right", "left")


def MASKS(name: str, padding: str) -> Tensor | None:
    """[B, S] or None; padding has no image."""
    mask = torch.ones_like(ids_of(name))
    if padding == "right":
        mask[0, -2:] = mask[1, -1:] = 0
    elif padding == "left":
        mask[0, :2] = 0
        mask[1, :3] = 0
    return None if padding == "none" else mask


def batch_of(name: str, padding: str = "none", *, labels: bool = True) -> dict[str, Any]:
    """The arguments of a call with images."""
    family, ids = VISION[name], ids_of(name)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": MASKS(name, padding), **family.images()}
    if family.types is not None:
        types = (ids == IMAGE_TOKEN).long()
        if name == "paligemma":  # 0 for what is bidirectional
            types = ((ids != IMAGE_TOKEN).long().flip(1).cummin(1).values).flip(1)
        batch[family.types] = types
    if name == "mllama":
        batch["cross_attention_mask"] = torch.ones(*ids.shape, 1, 1, dtype=torch.long)
    if labels:
        masked = ids == IMAGE_TOKEN
        if batch["attention_mask"] is not None:
            masked |= batch["attention_mask"] == 0
        batch["labels"] = ids.masked_fill(masked, -100)
    return batch
