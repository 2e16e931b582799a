# SPDX-License-Identifier: Apache-2.0
"""The patch for plain models that cannot run a prompt once per batch."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..callers import caller_level
from ..model_info import cache_name, rename_cache
from .around_text import rope_positions
from .call_arguments import forward_arguments, self_attention_cache, tokens_of
from .calls import running
from .concatenation import Concatenated, concatenate, count_concatenated_prompt
from .prompts import PromptSource, bypassed_hooks
from .wiring import Patch

__all__ = ["ConcatenationPatch"]


class ConcatenationPatch(Patch):
    """Puts the prompt before every sample of a plain model.

    Args:
        model: the module that the user patches.
        base: the Hugging Face model in it.
        source: provides the prompt.
        reason: why the prompt cannot run once per batch.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel, source: PromptSource, reason: str) -> None:
        super().__init__(model, base)
        self.source = source
        self.reason = reason
        self.has_encoder = bool(base.config.is_encoder_decoder)
        self.arguments = forward_arguments(base)

    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""
        return f"{type(self.base).__name__}: the prompt is put before every sample: {self.reason}"

    def install(self) -> None:
        """Change the model, and warn that the prompt does not run once per batch."""
        self.wiring.add_hooks(
            self.base.register_forward_pre_hook(self.before_call, with_kwargs=True),
            self.base.register_forward_hook(self.after_call, with_kwargs=True, always_call=True),
        )
        if self.has_encoder:
            encoder = self.base.get_encoder()
            self.wiring.add_hooks(encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True))
        else:
            inner = self.base.base_model
            self.wiring.add_hooks(inner.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        self.source.wire(self)
        self.mark(self.model, self.base)
        warnings.warn(f"peftkern: {self.explain()}", stacklevel=caller_level())

    def before_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook: put the prompt before the samples of a call that starts a sequence."""
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        name = cache_name(self.arguments)
        if name is not None:
            rename_cache(kwargs, name)
        running.enter(self, module)
        encoded = self.has_encoder and kwargs.get("encoder_outputs") is not None
        continues = encoded or count_concatenated_prompt(self_attention_cache(kwargs), kwargs)
        prompt = self.source.find(self, kwargs, continues)
        if prompt is not None:
            if (positions := rope_positions(self.base, kwargs)) is not None:
                kwargs["position_ids"] = positions
            rows = prompt.expanded().expand(tokens_of(kwargs).shape[0], -1, -1)
            note = concatenate(module, rows, kwargs, pads_labels=not self.has_encoder)
            if not self.has_encoder:
                running.leave_note(self, note)
        elif encoded:  # generate has run the encoder separately
            _fit_mask(kwargs)
        return (), kwargs

    def before_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook: put the prompt before the samples of a call of the encoder alone, as in ``generate``."""
        if running.has(self):
            return args, kwargs
        kwargs = {**dict(zip(forward_arguments(module), args, strict=False)), **kwargs}
        prompt = self.source.find(self, kwargs, False)
        assert prompt is not None
        rows = prompt.expanded().expand(tokens_of(kwargs).shape[0], -1, -1)
        concatenate(cast(Any, module), rows, kwargs)
        return (), kwargs

    def after_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: remove the prompt's rows from the outputs. ``output`` is None if the forward has raised."""
        note = running.leave(self)
        return note.strip(output) if isinstance(note, Concatenated) and output is not None else output

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook on the model within the base model: raise for a call that bypassed the base model's hooks."""
        if not running.has(self):
            raise bypassed_hooks(self.base)


def _fit_mask(kwargs: dict[str, Any]) -> None:
    """Add columns for the prompt to the mask of an encoder's output."""
    mask, encoded = kwargs.get("attention_mask"), kwargs["encoder_outputs"][0]
    if mask is not None and mask.dim() == 2 and mask.shape[1] < encoded.shape[1]:
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (encoded.shape[1] - mask.shape[1], 0), value=1)
