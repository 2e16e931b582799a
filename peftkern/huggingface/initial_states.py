# SPDX-License-Identifier: Apache-2.0
"""Initial states of recurrent layers in the calls of a patched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from transformers.utils.import_utils import is_tracing

from ..recurrent_state import LayerState, shapes_of_states
from .call_arguments import tokens_of
from .model_patch import ModelPatch
from .recurrent_trial import try_state
from .trial import Trial

__all__ = ["check_states", "initial_states", "refuse_padding_before_states"]


def check_states(patch: ModelPatch, states: Sequence[Sequence[LayerState]], trial: Trial) -> None:
    """Raise ValueError unless states have the shapes of the model's, and its layers continue from them."""
    shapes, expected = map(shapes_of_states, (states, patch.state_like))
    for layer, (want, got) in enumerate(zip_longest(expected, shapes)):
        if want != got:
            raise ValueError(f"state: expected states {want} in layer {layer}, got {got}")
    if (reason := try_state(trial, [*patch.recurrent])) is not None:
        raise ValueError(f"state: expected False, because {reason}, got True")


def initial_states(patch: ModelPatch, states: Sequence[Sequence[LayerState]], batch: int) -> list[list[LayerState]]:
    """The states [B, ...] before the first token, in the dtypes and on the devices of the layers.

    Args:
        patch: of the model.
        states: [1, ...] for each layer; empty for fresh ones.
        batch: B.

    Raises:
        ValueError: for activation checkpointing in a model whose recurrent layers then do not get the cache.
    """
    if not states:
        return []
    if patch.checkpoints:
        for info in patch.recurrent.values():
            if not info.gets_prefix:
                raise ValueError(
                    "gradient_checkpointing: expected it to be off, because it removes the cache with the states of "
                    f"{info.name}, got True"
                )
    devices = {info.layer: next(module.parameters()).device for module, info in patch.recurrent.items()}

    def expand(x: Tensor | None, like: Tensor | None, layer: int) -> Tensor | None:
        if x is None or like is None:
            return None
        # The model may have been cast since it was patched. A layer may keep its states in a dtype of their own.
        dtype = patch.backbone.dtype if like.dtype == patch.patched_dtype else like.dtype
        return x.to(devices[layer], dtype).expand(batch, *x.shape[1:])

    return [
        [
            (expand(conv, conv_like, layer), expand(recurrent, recurrent_like, layer))
            for (conv, recurrent), (conv_like, recurrent_like) in zip(own, likes, strict=True)
        ]
        for layer, (own, likes) in enumerate(zip(states, patch.state_like, strict=True))
    ]


def refuse_padding_before_states(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for padding between initial states and the sequence of a call.

    Models set the inputs of recurrent layers to 0 at padding, over which a state decays.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.shape[1]:
        return
    if is_tracing(mask):
        raise ValueError(
            "attention_mask: expected None under torch.compile, because padding on the left changes the states of "
            "recurrent layers (state=True) and cannot be detected there, got a tensor"
        )
    if bool((mask[:, -tokens_of(kwargs).shape[1]] == 0).any()):
        raise ValueError(
            "attention_mask: expected padding on the right only, because states of recurrent layers (state=True) "
            "decay over padding before the sequence, got padding on the left; batch prompts of one length"
        )
