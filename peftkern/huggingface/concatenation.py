# SPDX-License-Identifier: Apache-2.0
"""Puts a prompt before every sample, for models and calls that cannot run the prompt once per batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..model_info import given_cache
from .call_arguments import tokens_of
from .layout import pad_labels

__all__ = ["Concatenated", "concatenate", "count_concatenated_prompt", "pad_positions", "shows_prompt"]

#: Attribute of a cache that contains a concatenated prompt: the length of the prompt.
_LENGTH = "_peftkern_prompt_len"

#: Outputs with one entry per token.
_PER_TOKEN = ("logits", "hidden_states", "last_hidden_state")

#: Arguments [B, S, ...] that say which images a token sees.
_IMAGE_MASKS = ("cross_attention_mask", "image_attention_mask")

#: Arguments of models without a cache that hold the state of a sequence.
_STATES = ("state", "cache_params", "rnn_state")


@dataclass
class Concatenated:
    """A call with a concatenated prompt, whose outputs contain rows of the prompt.

    Attributes:
        prompt_len: P.
        rows: P + S.
        cache: the cache passed to the model, which its outputs do not always contain.
    """

    prompt_len: int
    rows: int
    cache: Any = None

    def strip(self, output: Any) -> Any:
        """Remove the rows of the prompt from the outputs, and note its length on the cache."""
        if self.cache is not None:
            setattr(self.cache, _LENGTH, self.prompt_len)
        if isinstance(output, tuple):
            return tuple(self._strip(x) for x in output)
        for name in _PER_TOKEN:
            if isinstance(output, ModelOutput) and output.get(name) is not None:
                output[name] = self._strip(output[name])
        cache = given_cache(output) if isinstance(output, ModelOutput) else None
        if cache is not None:
            setattr(cache, _LENGTH, self.prompt_len)
        return output

    def _strip(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self._strip, x))
        per_token = isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] == self.rows
        return x[:, self.prompt_len :] if per_token else x


def shows_prompt(base: PreTrainedModel, labels: Tensor | None) -> bool:
    """Whether the loss compares each row with the next label, so the prompt's last row predicts the first token."""
    return labels is not None and labels.dim() == 2 and getattr(base, "loss_type", None) != "ForTokenClassification"


def concatenate(
    base: PreTrainedModel, prompt: Tensor, kwargs: dict[str, Any], *, pads_labels: bool = True
) -> Concatenated:
    """Put a prompt before every sample of a call whose arguments and outputs describe the sequence alone.

    Args:
        base: the model that is called.
        prompt: [B, P, E].
        kwargs: its arguments, changed in place.
        pads_labels: labels [B, S] belong to the sequence. False for an encoder-decoder, whose labels belong to the
            decoder.

    Returns:
        What :meth:`Concatenated.strip` needs to restore the outputs.
    """
    tokens = tokens_of(kwargs)
    prompt_len = prompt.shape[1]
    for name, x in kwargs.items():
        is_per_token = isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == tokens.shape[:2]
        if is_per_token and name in _IMAGE_MASKS:  # images follow the prompt, so it does not see them
            kwargs[name] = torch.cat([x.new_zeros(x.shape[0], prompt_len, *x.shape[2:]), x], 1)
    if kwargs.pop("input_ids", None) is not None:
        embedding: nn.Module = base.get_input_embeddings()
        tokens = embedding(tokens)
    kwargs["inputs_embeds"] = torch.cat([prompt.to(tokens.device, tokens.dtype), tokens], 1)
    mask, labels, position_ids = (kwargs.get(name) for name in ("attention_mask", "labels", "position_ids"))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            kind = list(mask.shape) if isinstance(mask, Tensor) else "one per kind of layer, as for a static cache"
            raise ValueError(f"attention_mask: expected [B, S] with a prompt, got {kind}")
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (prompt_len, 0), value=1)
    if position_ids is not None:
        moved = pad_positions(position_ids, prompt_len)
        if mask is not None and mask.shape == position_ids.shape:  # generate gives padding position 0
            moved[:, prompt_len:] = torch.where(mask != 0, moved[:, prompt_len:], position_ids)
        kwargs["position_ids"] = moved
    if pads_labels and labels is not None and labels.dim() == 2 and labels.shape[1] == tokens.shape[1]:
        kwargs["labels"] = pad_labels(labels, prompt_len)
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor):
        kwargs["logits_to_keep"] = keep + prompt_len
    types = kwargs.get("token_type_ids")
    if types is not None:
        kwargs["token_type_ids"] = torch.nn.functional.pad(types, (prompt_len, 0))
    return Concatenated(prompt_len, prompt_len + tokens.shape[1], given_cache(kwargs))


def pad_positions(position_ids: Tensor, prompt_len: int) -> Tensor:
    """[..., S] -> [..., P + S]: positions of a prompt, and those of the sequence behind it."""
    before = torch.arange(prompt_len, device=position_ids.device).expand(*position_ids.shape[:-1], -1)
    return torch.cat([before, position_ids + prompt_len], -1)


def count_concatenated_prompt(cache: Any, kwargs: dict[str, Any]) -> bool:
    """Count a prompt that is in ``cache``, or in a recurrent state, in the mask and positions of a call.

    Args:
        cache: of the call.
        kwargs: arguments of the call, changed in place.

    Returns:
        Whether there is such a prompt.
    """
    prompt_len = getattr(cache, _LENGTH, None)
    if prompt_len is not None and _is_empty(cache):  # it has been reset
        delattr(cache, _LENGTH)
        return False
    if prompt_len is None:
        return any(kwargs.get(name) is not None for name in _STATES)
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        expected = seen - prompt_len + tokens_of(kwargs).shape[1]
        if seen and mask.shape[1] != expected:
            raise ValueError(
                f"attention_mask: expected {expected} columns, one per token in the cache and in this call, got "
                f"{mask.shape[1]}; generating from a returned cache needs a model that runs the prompt once per batch"
            )
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (prompt_len, 0), value=1)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids + prompt_len
    return True


def _is_empty(cache: Any) -> bool:
    """Whether a cache contains neither tokens nor a state."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return False
    return not any(getattr(layer, "is_initialized", True) for layer in layers) or (
        hasattr(cache, "is_linear") and not any(cache.is_linear) and int(cache.get_seq_length()) == 0
    )
