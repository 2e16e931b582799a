# SPDX-License-Identifier: Apache-2.0
"""The parts of an encoder-decoder whose layers have a prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .eager_attention import record_keys
from .layer_shapes import LayerShape, cached_layers, shapes_of
from .model_info import KeyValue, encoder_inputs, in_eval_mode, layers_of, text_cache

__all__ = ["DECODER", "PARTS", "check_parts", "parts_of", "positions_of", "text_layers"]

#: The layers of a prefix are in this order.
PARTS = ("encoder", "cross", "decoder")
DECODER = ("decoder",)


def parts_of(
    model_or_config: Any, parts: Sequence[str] | Mapping[str, int], num_layers: int | None = None, *sizes: Any
) -> tuple[dict[str, range], tuple[LayerShape | None, ...]]:
    """The layers of each part, and the shape of each layer.

    Args:
        model_or_config: a model runs on two tokens, unless the decoder is the only part.
        parts: names of :data:`PARTS`, or the number of layers of each.
        num_layers, sizes: see :func:`.layer_shapes.shapes_of`.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    unknown = [name for name in parts if name not in PARTS]
    if isinstance(parts, str) or unknown or not parts or len(set(parts)) != len(parts):
        raise ValueError(f"parts: expected different names of {PARTS}, got {parts!r}")
    counts: dict[str, int]
    shapes: tuple[LayerShape | None, ...]
    if isinstance(parts, Mapping):
        counts, total = dict(parts), sum(parts.values())
        if num_layers not in (None, total):
            raise ValueError(f"num_layers: expected {total}, the layers of parts={dict(parts)}, got {num_layers}")
        shapes = shapes_of(model_or_config, total, *sizes)
    elif tuple(parts) == DECODER:
        shapes = shapes_of(model_or_config, num_layers, *sizes)
        counts = {"decoder": len(shapes)}
    else:
        if num_layers is not None or any(size is not None for size in sizes):
            raise ValueError(
                f"num_layers, num_kv_heads, head_dim: expected None, because the model determines those of {parts}, "
                "or parts with the number of layers of each"
            )
        layers = _layers_of_parts(model_or_config, parts, None)
        shapes = tuple(pair and LayerShape.of(pair) for name in PARTS for pair in layers.get(name, ()))
        counts = {name: len(pairs) for name, pairs in layers.items()}
    ranges, first = {}, 0
    for name in PARTS:
        if name in counts:
            ranges[name] = range(first, first + counts[name])
            first += counts[name]
    return ranges, shapes


def positions_of(parts: Mapping[str, range], lengths: Sequence[int]) -> int:
    """Positions that a prefix takes: those of its longest layer in the decoder."""
    return max([0, *(lengths[layer] for layer in parts.get("decoder", ()))])


def check_parts(parts: Mapping[str, Any], **options: Any) -> None:
    """Raise ValueError for an option that only a prefix of the decoder alone can have."""
    for name, value in options.items():
        if value and tuple(parts) != DECODER:
            raise ValueError(f"{name}: expected its default, or parts=('decoder',), got {value} with {tuple(parts)}")


def text_layers(model: Any, input_ids: Tensor, parts: Sequence[str] | Mapping[str, int]) -> list[KeyValue | None]:
    """(key, value) of a text for each layer of the parts.

    The encoder's are those of its run on the text, the cross-attention's those of the encoded text, and the decoder's
    those of its run on the text behind the encoded text.

    Args:
        model: a Hugging Face model. It runs in eval mode and without gradients, and is not changed.
        input_ids: [1, T].
        parts: names of :data:`PARTS`.
    """
    layers = _layers_of_parts(model, parts, input_ids)
    return [pair for name in PARTS for pair in layers.get(name, ())]


def _layers_of_parts(
    model: Any, parts: Sequence[str] | Mapping[str, int], input_ids: Tensor | None
) -> dict[str, list[KeyValue | None]]:
    """(key, value) [Hkv, T, D] of each layer of each part, of a text; of two tokens of any value for None."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if input_ids is not None and tuple(parts) == DECODER:
        return {"decoder": cached_layers(model, input_ids)}
    if not hasattr(model, "forward") or not model.config.is_encoder_decoder:
        raise ValueError(
            f"parts: expected ('decoder',) for {type(model).__name__}, which is not a model with an encoder and a "
            f"decoder, got {tuple(parts)}"
        )
    encoder, ids = model.get_encoder(), input_ids
    if ids is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    elif encoder.main_input_name != "input_ids":
        raise ValueError(
            f"parts: expected ('decoder',), because {type(encoder).__name__} reads {encoder.main_input_name} instead "
            f"of text, got {tuple(parts)}"
        )
    found: dict[str, list[KeyValue | None]] = {}
    if "encoder" in parts:
        with in_eval_mode(encoder):
            found["encoder"] = layers_of(record_keys(encoder, **encoder_inputs(model, ids)))
    if "cross" in parts:
        found["cross"] = layers_of(text_cache(model, ids).cross_attention_cache)
    if "decoder" in parts:
        found["decoder"] = cached_layers(model, ids)
    return found
