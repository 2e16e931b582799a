# SPDX-License-Identifier: Apache-2.0
"""Runs a Hugging Face model with another attention function for the duration of a block.

The functions here end in the model's own eager attention. They see, or change, the keys and values that it gets.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .overrides import overridden

__all__ = ["attention_of", "configs_of", "record_keys", "use_attention"]

KeyValue = tuple[Tensor, Tensor]

#: Name of :func:`_recording_attention` among the implementations of ``transformers``.
_RECORDING = "peftkern_recording"


def attention_of(module: nn.Module, name: str = "eager") -> Callable[..., Any]:
    """The attention function ``name``, looked up as the module does: the eager one is in its modeling file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for cls in type(module).__mro__:
        modeling = sys.modules[cls.__module__]
        eager = getattr(modeling, "eager_attention_forward", None)
        if eager is not None:
            registry = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
            return registry.get_interface(name, eager)  # type: ignore[no-any-return]
    raise ValueError(
        f"model: expected eager_attention_forward in the modeling file of {type(module).__name__}, got none"
    )


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that determine the attention implementation of the model's parts, each once."""
    from transformers import PreTrainedModel

    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


@contextlib.contextmanager
def use_attention(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the layers of ``model`` call ``function``, with masks as eager attention takes them.

    Args:
        model: a Hugging Face model.
        name: under which the function is registered in ``transformers``.
        function: with the signature of ``transformers``' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    with overridden(configs_of(model), "_attn_implementation_internal", name):
        yield


@torch.no_grad()
def record_keys(model: Any, **inputs: Tensor) -> list[KeyValue]:
    """(key, value) [B, Hkv, S, D] of each layer of a model without a cache, in the order of the layers' calls.

    Args:
        model: passes its keyword arguments to its attention modules.
        inputs: its arguments.
    """
    record: list[KeyValue] = []
    with use_attention(model, _RECORDING, _recording_attention):
        model(**inputs, peftkern_record=record)
    return record


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    peftkern_record: list[KeyValue] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Eager attention that records its keys and values."""
    if peftkern_record is not None:
        peftkern_record.append((key, value))
    return attention_of(module)(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
