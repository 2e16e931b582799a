# SPDX-License-Identifier: Apache-2.0
"""Shapes of the keys and values that the layers of a model attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .model_info import KeyValue, layers_of, takes_cache, text_cache, text_config

__all__ = ["LayerShape", "cached_layers", "expanded", "lengths_of", "shapes_of", "stores_compressed"]


class LayerShape(NamedTuple):
    """Keys [Hkv, P, D] and values [Hkv, P, D_v] of one layer."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    @property
    def width(self) -> int:
        """Numbers per token: Hkv * (D + D_v)."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)

    def __str__(self) -> str:
        heads, dim, value_dim = self
        return f"{heads} key-value heads of {dim}" + (f" (values of {value_dim})" if value_dim != dim else "")

    @classmethod
    def of(cls, pair: KeyValue) -> LayerShape:
        """The shape of keys [..., Hkv, P, D] and values [..., Hkv, P, D_v]."""
        key, value = pair
        return cls(key.shape[-3], key.shape[-1], value.shape[-1])


def shapes_of(
    model_or_config: Any,
    num_layers: int | None = None,
    num_kv_heads: int | Sequence[int] | None = None,
    head_dim: int | Sequence[int] | None = None,
    value_head_dim: int | Sequence[int] | None = None,
) -> tuple[LayerShape | None, ...]:
    """The shape of each layer; None for a layer without keys and values (recurrent, convolution, experts alone).

    A config determines them where all layers attend to keys of one shape. A model whose layers differ, or that
    compresses keys and values, runs on two tokens.

    Args:
        model_or_config: None if the other arguments determine the shapes.
        num_layers: overrides the number of layers.
        num_kv_heads, head_dim, value_head_dim: override those of all layers, or of each; 0 heads stand for a layer
            without keys and values.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    found: tuple[LayerShape | None, ...] = ()
    if num_layers is None or num_kv_heads is None or head_dim is None:
        if model_or_config is None:
            raise ValueError(
                "model_or_config: expected a model or config, or num_layers, num_kv_heads and head_dim, got None and "
                f"{num_layers}, {num_kv_heads}, {head_dim}"
            )
        found = _shapes_of_model(model_or_config)
    if num_layers is None:
        num_layers = len(found)
    _check_at_least_one("num_layers", num_layers)
    # Layers beyond those of the model, which only `num_layers` asks for, are like the last.
    like = [found[min(layer, len(found) - 1)] if found else None for layer in range(num_layers)]
    if value_head_dim is None:
        value_head_dim = head_dim
    heads = _per_layer("num_kv_heads", num_kv_heads, [s.num_kv_heads if s else 0 for s in like])
    dims = _per_layer("head_dim", head_dim, [s.head_dim if s else 0 for s in like])
    value_dims = _per_layer("value_head_dim", value_head_dim, [s.value_head_dim if s else 0 for s in like])
    return tuple(_shape(*sizes) for sizes in zip(heads, dims, value_dims, strict=True))


def lengths_of(
    length: int | Sequence[int], shapes: Sequence[LayerShape | None], name: str = "length"
) -> tuple[int, ...]:
    """Tokens of each layer; 0 where a layer has no keys."""
    one = isinstance(length, int)
    lengths: list[Any] = [length if shape else 0 for shape in shapes] if one else list(length)  # type: ignore[arg-type]
    if len(lengths) != len(shapes) or any(not isinstance(n, int) or n < 0 for n in lengths):
        raise ValueError(f"{name}: expected an int >= 0, or one for each of {len(shapes)} layers, got {length!r}")
    for layer, (n, shape) in enumerate(zip(lengths, shapes, strict=True)):
        if n and shape is None:
            raise ValueError(f"{name}: expected 0 in layer {layer}, which has no keys and values, got {n}")
    if not any(shapes):
        raise ValueError("model_or_config: expected a model with attention, whose keys and values a prefix extends")
    return tuple(lengths)


def _per_layer(name: str, given: int | Sequence[int] | None, default: Sequence[int]) -> list[int]:
    """One int for each layer: the given ones, the given one, or the default."""
    if given is None:
        return list(default)
    if isinstance(given, int):
        _check_at_least_one(name, given)
        return [given] * len(default)
    if len(given) != len(default) or any(not isinstance(n, int) or n < 0 for n in given):
        raise ValueError(f"{name}: expected an int, or one for each of {len(default)} layers, got {given!r}")
    return list(given)


def _shape(num_kv_heads: int, head_dim: int, value_head_dim: int) -> LayerShape | None:
    if num_kv_heads == 0:
        return None
    _check_at_least_one("head_dim", head_dim)
    _check_at_least_one("value_head_dim", value_head_dim)
    return LayerShape(num_kv_heads, head_dim, value_head_dim)


def _check_at_least_one(name: str, n: Any) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {n!r}")


def _shapes_of_model(model_or_config: Any) -> tuple[LayerShape | None, ...]:
    config = text_config(model_or_config)
    attends = _attending_layers(config)
    if hasattr(model_or_config, "forward") and _is_materialised(model_or_config):
        if shapes := _shapes_of_encoder(model_or_config):
            return shapes
        if not all(attends) or getattr(config, "kv_lora_rank", None):
            ids = torch.zeros(1, 2, dtype=torch.long, device=model_or_config.get_input_embeddings().weight.device)
            return tuple(pair and LayerShape.of(pair) for pair in cached_layers(model_or_config, ids))
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config] * len(attends)
    return tuple(_config_shape(layer) if a else None for layer, a in zip(layers, attends, strict=True))


def _shapes_of_encoder(model: Any) -> tuple[LayerShape, ...]:
    """The shapes of a model that takes no cache, whose config may have its own names for them.

    Empty for other models, and for one whose attention cannot be observed.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if takes_cache(model) or not model._can_set_attn_implementation():
        return ()
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return ()
    ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    return tuple(LayerShape.of(pair) for pair in text_cache(model, ids))


def _is_materialised(model: Any) -> bool:
    return all(x.device.type != "meta" for x in model.parameters())


def _attending_layers(config: Any) -> list[bool]:
    """Whether each layer has keys and values, by the layers of the cache that transformers creates for the config.

    Layers that share the keys of another layer have none of their own. A prefix has parameters for them nevertheless,
    which nothing reads, as in PEFT.
    """
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache, DynamicLayer

    num_layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    if not getattr(config, "layer_types", None):
        return [True] * num_layers
    kinds: tuple[type, ...] = (DynamicLayer,)
    if getattr(config, "kv_sharing_modes", None):
        kinds = (DynamicLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))  # transformers 5.21 and later
    layers = DynamicCache(config=config).layers
    return [isinstance(layer, kinds) for layer in layers] if len(layers) == num_layers else [True] * num_layers


def _config_shape(config: Any) -> LayerShape:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError(
            "model_or_config: expected a model with attention, whose keys and values a prefix extends, got "
            f"{config.model_type}, whose config has no num_attention_heads"
        )
    if getattr(
        config, "kv_lora_rank", None
    ):  # multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434), section 2.1
        return LayerShape(heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return LayerShape(getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)


def cached_layers(model: Any, input_ids: torch.Tensor) -> list[KeyValue | None]:
    """(key, value) [Hkv, T, D], [Hkv, T, D_v] that the queries after the given tokens attend to, for each layer.

    Args:
        model: a Hugging Face model. It runs once, in eval mode and without gradients, and is not changed.
        input_ids: [1, T].
    """
    layers = layers_of(text_cache(model, input_ids))
    readers = {module.layer_idx: module for module in model.modules() if stores_compressed(module)}
    with torch.no_grad():
        return [pair and expanded(readers.get(layer), pair) for layer, pair in enumerate(layers)]


def stores_compressed(module: Any) -> bool:
    """Whether an attention module stores compressed keys and values in the cache, and expands them when it attends.

    ``transformers`` names the method ``expand_kv`` in every model with multi-head latent attention.
    """
    return hasattr(module, "expand_kv") and isinstance(getattr(module, "layer_idx", None), int)


def expanded(module: Any, pair: KeyValue) -> KeyValue:
    """Keys and values [(A,) Hkv, T, D] as an attention module attends to them, of those that its cache stores."""
    if not stores_compressed(module):
        return pair
    if pair[0].dim() == 4:
        return module.expand_kv(*pair)  # type: ignore[no-any-return]
    key, value = module.expand_kv(*(x[None] for x in pair))
    return key[0], value[0]
