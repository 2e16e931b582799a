# SPDX-License-Identifier: Apache-2.0
"""Runs a model on two tokens to find which attention modules read which layer of its cache.

This needs no list of models or module names: a module reads the prefix if it attends to keys that the cache has
returned. Cross-attention and encoders do not; layers that share the keys of another layer do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..layer_shapes import LayerShape, stores_compressed
from ..model_info import KeyValue, cache_argument
from .masks import LazyMask
from .probing import is_transient, some_tokens

__all__ = ["PrefixLayerInfo", "find_backbone", "survey"]


@dataclass(frozen=True)
class PrefixLayerInfo:
    """An attention module that reads the prefix.

    Attributes:
        name: the module's path in the model.
        layer: the cache layer whose keys it reads.
        shape: of the keys [B, Hkv, T, D] and values [B, Hkv, T, D_v] that it attends to.
        pattern: (causal, window) of its mask; None for any other mask.
        compressed: whether the cache stores compressed keys and values, which the module expands.
        counts_rows: whether the model derives positions from the cache while its layers run.
    """

    name: str
    layer: int
    shape: LayerShape
    pattern: tuple[bool, int | None] | None = None
    compressed: bool = False
    counts_rows: bool = False


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model within ``model`` that runs the layers and passes its keyword arguments to them.

    Raises:
        ValueError: if it takes no cache, or does not dispatch its attention through ``AttentionInterface``.
    """
    backbone = model.get_decoder()
    if not isinstance(backbone, PreTrainedModel):  # some models name their output layer "decoder"
        backbone = model.base_model
    backbone = _without_head(backbone)
    kind = type(backbone).__name__
    cache_argument(backbone)
    if not backbone._can_set_attn_implementation():
        modules = [
            f"{name} ({type(m).__name__})" for name, m in model.named_modules() if "Attention" in type(m).__name__
        ]
        raise ValueError(
            f"model: {kind} does not dispatch its attention through transformers' AttentionInterface, so a prefix "
            f"cannot reach {', '.join(modules)}"
        )
    return backbone


def _without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model without an output layer; a decoder may itself be a language model."""
    while model.get_output_embeddings() is not None:
        parts: list[Any] = [model.base_model, *model.children()]
        inner = next((part for part in parts if part is not model and isinstance(part, PreTrainedModel)), None)
        if inner is None:
            break
        model = inner
    return model


class _Survey(DynamicCache):  # type: ignore[misc]
    """A cache that stores no keys and records which modules read them; used like a :class:`.cache.PrefixCache`.

    Recurrent layers find their own kind of layer in it.
    """

    def __init__(self, names: dict[nn.Module, str], layers: Sequence[Any]) -> None:
        Cache.__init__(self, layers=list(layers))
        self.names = names
        self.prefix_layers: dict[nn.Module, PrefixLayerInfo] = {}
        self.counts_rows = False
        self.packed = None
        # Keeps references to the tensors, so that no later tensor can reuse the address of an earlier one.
        self.returned: list[tuple[int, Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.returned.append((layer_idx, key_states, value_states))
        return key_states, value_states

    def update_indexer(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("an indexer selects the keys that a query sees, and a prefix has no index")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.counts_rows |= bool(self.returned)
        return super().get_seq_length(layer_idx)  # type: ignore[no-any-return]

    def prefix_for(self, module: nn.Module, key: Tensor, value: Tensor, mask: Any) -> None:
        pattern = mask.pattern if isinstance(mask, LazyMask) else None
        shape, compressed = LayerShape.of((key, value)), stores_compressed(module)
        for layer in self._layers_read(module, key):
            info = PrefixLayerInfo(self.names[module], layer, shape, pattern, compressed)
            if self.prefix_layers.setdefault(module, info) != info:
                raise ValueError(
                    f"{info.name} is layers {self.prefix_layers[module].layer} and {layer} in one module"
                )

    def _layers_read(self, module: Any, key: Tensor) -> list[int]:
        """The layers of the cache that have returned ``key``, or the compressed keys that it was made of."""
        if stores_compressed(module):
            return [layer for layer, *_ in self.returned if layer == module.layer_idx]
        address = key.untyped_storage().data_ptr()
        return [layer for layer, keys, _ in self.returned if keys.untyped_storage().data_ptr() == address]


def survey(
    backbone: PreTrainedModel, names: dict[nn.Module, str], layers: Sequence[Any] = ()
) -> tuple[dict[nn.Module, PrefixLayerInfo], dict[int, KeyValue]]:
    """The attention modules of ``backbone`` that read the prefix.

    Args:
        backbone: the model that runs the layers, with peftkern's attention implementation and in eval mode
            (:func:`.probing.quiet`).
        names: path of each module, for messages.
        layers: those of a stock cache of the model; empty if all layers attend.

    Returns:
        (the modules; per layer of the cache, keys and values [1, Hkv, 2, D] of two equal tokens, as it stores them)

    Raises:
        ValueError: if the model cannot be run with a cache, or attention that is not dispatched reads the cache.
    """
    record = _Survey(names, layers)
    input_ids = some_tokens(backbone, 1).expand(1, 2)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs[cache_argument(backbone)] = record
    try:
        backbone(**inputs, peftkern_prefix=record)
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f"model: {type(backbone).__name__} could not be run with a cache: {error}") from error
    unseen = {layer for layer, _, _ in record.returned} - {info.layer for info in record.prefix_layers.values()}
    if unseen or not record.prefix_layers:
        layers = f"layers {sorted(unseen)}" if unseen else "all layers"
        raise ValueError(
            f"model: in {layers} of {type(backbone).__name__} attention does not read the keys that the cache "
            "returns; it is not dispatched through transformers' AttentionInterface"
        )
    prefix_layers = {
        module: replace(info, counts_rows=record.counts_rows) for module, info in record.prefix_layers.items()
    }
    return prefix_layers, {layer: (keys, values) for layer, keys, values in record.returned}
