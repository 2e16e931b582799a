# SPDX-License-Identifier: Apache-2.0
"""Runs a model on two tokens to find the attention modules that read the prefix, and the layer that each computes.

This needs no list of models or module names. In a model with a cache, a module reads the prefix if it attends to keys
that the cache has returned. Cross-attention and encoders do not; layers that share the keys of another layer do. In a
model without a cache (BERT's relatives), every attention module reads the prefix, and its calls are counted.
"""

from __future__ import annotations

import inspect
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
from .probing import beside_encoder, is_transient, some_tokens

__all__ = ["CallRecord", "PrefixLayerInfo", "find_backbone", "needs_encoder", "survey", "survey_without_cache"]

#: Tokens that the model runs on.
_NUM_TOKENS = 2


@dataclass(frozen=True)
class PrefixLayerInfo:
    """An attention module that reads the prefix.

    Attributes:
        name: the module's path in the model.
        layers: the cache layer whose keys it reads. In a model without a cache, the layers that the module computes,
            in the order of its calls: several if layers share their weights (ALBERT).
        shape: of the keys [B, Hkv, T, D] and values [B, Hkv, T, D_v] that it attends to.
        pattern: (causal, window) of its mask; None for any other mask.
        compressed: whether the cache stores compressed keys and values, which the module expands.
        counts_rows: whether the model derives positions from the cache while its layers run.
        part: the part of an encoder-decoder that the module belongs to, with layers of its own: ``"encoder"``,
            ``"cross"`` or ``"decoder"``.
    """

    name: str
    layers: tuple[int, ...]
    shape: LayerShape
    pattern: tuple[bool, int | None] | None = None
    compressed: bool = False
    counts_rows: bool = False
    part: str = "decoder"

    @property
    def layer(self) -> int:
        """The first of the layers."""
        return self.layers[0]


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model within ``model`` that runs the layers and passes its keyword arguments to them.

    Raises:
        ValueError: if it does not dispatch its attention through ``AttentionInterface``.
    """
    backbone = model.get_decoder()
    if not isinstance(backbone, PreTrainedModel):  # some models name their output layer "decoder"
        backbone = model.base_model
    backbone = _without_head(backbone)
    kind = type(backbone).__name__
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
            info = PrefixLayerInfo(self.names[module], (layer,), shape, pattern, compressed)
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


def needs_encoder(backbone: PreTrainedModel) -> bool:
    """Whether a decoder runs only with the output of an encoder and a cache for it, which not all need."""
    if not backbone.config.is_encoder_decoder and not getattr(backbone.config, "is_decoder", False):
        return False
    if "encoder_hidden_states" not in inspect.signature(type(backbone).forward).parameters:
        return False
    ids = some_tokens(backbone, 1).expand(1, 2)
    try:
        backbone(input_ids=ids, attention_mask=torch.ones_like(ids), **{cache_argument(backbone): DynamicCache()})
    except Exception as error:
        if is_transient(error):
            raise
        return True
    return False


def survey(
    backbone: PreTrainedModel, names: dict[nn.Module, str], layers: Sequence[Any] = (), *, encoded: bool = False
) -> tuple[dict[nn.Module, PrefixLayerInfo], dict[int, KeyValue]]:
    """The attention modules of ``backbone`` that read the prefix.

    Args:
        backbone: the model that runs the layers, with peftkern's attention implementation and in eval mode
            (:func:`.probing.quiet`).
        names: path of each module, for messages.
        layers: those of a stock cache of the model; empty if all layers attend.
        encoded: see :func:`needs_encoder`.

    Returns:
        (the modules; per layer of the cache, keys and values [1, Hkv, 2, D] of two equal tokens, as it stores them)

    Raises:
        ValueError: if the model cannot be run with a cache, or attention that is not dispatched reads the cache.
    """
    record = _Survey(names, layers)
    arguments = {"peftkern_prefix": record, cache_argument(backbone): record}
    _run(backbone, "with a cache", encoded=encoded, **arguments)
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


class CallRecord:
    """Records the calls of attention; used like a :class:`.cache.PrefixCache` that holds no prefix.

    Attributes:
        calls: (module, key, value) of each call, [B, Hkv, T, D].
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.packed = None
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._patterns: dict[nn.Module, tuple[bool, int | None] | None] = {}

    def prefix_for(self, module: nn.Module, key: Tensor, value: Tensor, mask: Any) -> None:
        """Record a call."""
        self.calls.append((module, key, value))
        self._patterns[module] = mask.pattern if isinstance(mask, LazyMask) else None

    def infos(self, part: str = "decoder") -> dict[nn.Module, PrefixLayerInfo]:
        """The modules of the calls. Layers are numbered in the order of the calls."""
        layers: dict[nn.Module, list[int]] = {}
        for layer, (module, _, _) in enumerate(self.calls):
            layers.setdefault(module, []).append(layer)
        found = {}
        for module, key, value in self.calls:
            shape, pattern = LayerShape.of((key, value)), self._patterns[module]
            found[module] = PrefixLayerInfo(self.names[module], tuple(layers[module]), shape, pattern, part=part)
        return found


def survey_without_cache(
    backbone: PreTrainedModel, names: dict[nn.Module, str]
) -> tuple[dict[nn.Module, PrefixLayerInfo], dict[int, KeyValue]]:
    """The attention modules of a ``backbone`` that takes no cache. Layers are numbered in the order of their calls.

    Args, returns and raises: see :func:`survey`.
    """
    kind = type(backbone).__name__
    parameters = inspect.signature(type(backbone).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"model: {kind} takes no cache and no additional keyword arguments, by which a prefix reaches its layers"
        )
    record = CallRecord(names)
    _run(backbone, "with a prefix", peftkern_prefix=record)
    num_layers = getattr(backbone.config.get_text_config(), "num_hidden_layers", len(record.calls))
    if not record.calls or len(record.calls) != num_layers:
        raise ValueError(
            f"model: a prefix reaches {len(record.calls)} of {num_layers} layers of {kind}; the others do not call "
            "attention through transformers' AttentionInterface with the keyword arguments of the model"
        )
    for module, key, _ in record.calls:
        if key.shape[2] != _NUM_TOKENS:
            raise ValueError(f"model: {names[module]} attends to {key.shape[2]} keys for {_NUM_TOKENS} tokens")
    return record.infos(), {layer: (key, value) for layer, (_, key, value) in enumerate(record.calls)}


def _run(backbone: PreTrainedModel, how: str, *, encoded: bool = False, **arguments: Any) -> None:
    """Run the backbone on equal tokens. ``how`` names the run in an error."""
    input_ids = some_tokens(backbone, 1).expand(1, _NUM_TOKENS)
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **arguments}
    arguments = beside_encoder(backbone, arguments) if encoded else arguments
    try:
        backbone(**arguments)
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f"model: {type(backbone).__name__} could not be run {how}: {error}") from error
