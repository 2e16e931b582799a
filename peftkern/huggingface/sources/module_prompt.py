# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.SoftPrompt` in a plain Hugging Face model."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...model_info import cache_name, rename_cache
from ..calls import running
from ..concatenation import Concatenated, concatenate, continue_behind
from ..model_patch import PATCH, self_attention_cache
from ..packer import tokens_of
from ..prompt_patch import Prompt, PromptPatch, PromptSource
from ..wiring import Wiring

__all__ = ["ConcatenationPatch", "EmbeddingPrompt", "ModulePrompt", "is_embedding_prompt"]

#: Name of the prompt as a submodule of the model.
SUBMODULE = "peftkern_prompt"


class EmbeddingPrompt(Protocol):
    """What a patch needs of a prompt; :class:`peftkern.SoftPrompt` is one."""

    weight: Tensor
    embed_dim: int


def is_embedding_prompt(value: object) -> TypeGuard[EmbeddingPrompt]:
    """Not by ``isinstance``, which from Python 3.12 on does not see a module's parameters."""
    return hasattr(value, "weight") and hasattr(value, "embed_dim")


class ModulePrompt(PromptSource):
    """The prompt is a submodule of the Hugging Face model; callers speak of the sequence alone.

    Args:
        prompt: with ``weight`` [P, E], or a bank [A, P, E]; calls then say ``prompt_ids`` [B].
        base: the Hugging Face model.
        freeze: switch ``requires_grad`` off for the model's own parameters while patched.
    """

    is_given = False
    concatenates = "such calls have the prompt put before every sample"

    def __init__(self, prompt: EmbeddingPrompt, base: PreTrainedModel, *, freeze: bool) -> None:
        width = base.get_input_embeddings().weight.shape[1]
        if prompt.weight.shape[-1] != width:
            raise ValueError(
                f"prefix: expected a prompt as wide as the token embeddings, {width}, got {prompt.weight.shape[-1]}"
            )
        self.prompt = prompt
        self.freeze = freeze

    def wire(self, patch: PromptPatch | ConcatenationPatch) -> None:
        """Make the prompt a submodule of the Hugging Face model, in which it stays when wrappers are taken off."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, SUBMODULE, cast(nn.Module, self.prompt))

    def find(self, patch: Any, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The module's weight, or its bank and the prompt of each sample."""
        # The module that runs: replicas have a prompt of their own.
        prompt: EmbeddingPrompt = getattr(running.module(patch, patch.base), SUBMODULE)
        weight, ids = prompt.weight, kwargs.pop("prompt_ids", None)
        if continues:
            return None
        if weight.dim() == 2:
            if ids is not None:
                raise ValueError("prompt_ids: expected None, as the prompt is not a bank, got a tensor")
            return Prompt(weight[None])
        if ids is None:
            raise ValueError("prompt_ids: expected the prompt of each sample [B], as the prompt is a bank, got None")
        return Prompt(weight, ids.to(weight.device))


class ConcatenationPatch:
    """A plain model that has the prompt before every sample, since it cannot run it once.

    Args:
        model: what the user patches.
        base: the Hugging Face model in it.
        source: the prompt.
        reason: why it cannot be run once.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel, source: ModulePrompt, reason: str) -> None:
        self.model = model
        self.base = base
        self.source = source
        self.reason = reason
        self.compiled_note: Any = None
        self.wiring = Wiring()
        self.has_encoder = bool(base.config.is_encoder_decoder)
        self.arguments = tuple(inspect.signature(type(base).forward).parameters)[1:]

    def explain(self) -> str:
        """How batches run, and why not otherwise."""
        return f"{type(self.base).__name__}: the prompt is put before every sample: {self.reason}"

    def install(self) -> None:
        """Change the model, and say once that the prompt does not run once."""
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
        for owner in {id(m): m for m in (self.model, self.base)}.values():
            self.wiring.set_attribute(owner, PATCH, self)
        warnings.warn(f"peftkern: {self.explain()}", stacklevel=4)

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.wiring.undo()

    def before_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook: put the prompt before the samples of a call that does not continue a sequence."""
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        name = cache_name(self.arguments)
        if name is not None:
            rename_cache(kwargs, name)
        running.enter(self, module)
        encoded = self.has_encoder and kwargs.get("encoder_outputs") is not None
        continues = encoded or continue_behind(self_attention_cache(kwargs), kwargs)
        prompt = self.source.find(self, kwargs, continues)
        if prompt is not None:
            rows = prompt.expanded().expand(tokens_of(kwargs).shape[0], -1, -1)
            note = concatenate(module, rows, kwargs, pads_labels=not self.has_encoder)
            if not self.has_encoder:
                running.leave_note(self, note)
        elif encoded:  # generate has run the encoder by itself
            _fit_mask(kwargs)
        return (), kwargs

    def before_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook: put the prompt before the samples of a call of the encoder alone, as ``generate`` makes it."""
        if running.has(self):
            return args, kwargs
        kwargs = {
            **dict(zip(inspect.signature(type(module).forward).parameters, (module, *args), strict=False)),
            **kwargs,
        }
        kwargs.pop("self", None)
        prompt = self.source.find(self, kwargs, False)
        assert prompt is not None
        rows = prompt.expanded().expand(tokens_of(kwargs).shape[0], -1, -1)
        concatenate(cast(Any, module), rows, kwargs)
        return (), kwargs

    def after_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: take the prompt's rows out of the outputs. ``output`` is None if the forward has raised."""
        note = running.leave(self)
        return note.strip(output) if isinstance(note, Concatenated) and output is not None else output

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook on what lies in the base model: raise where a call went around the base model's hooks."""
        if not running.has(self):
            raise ValueError(
                f"model: expected a call of {type(self.base).__name__}, whose hooks put the prompt before the "
                "sequence, got one of its forward or of a part of it, which would run without the prompt"
            )


def _fit_mask(kwargs: dict[str, Any]) -> None:
    """Columns for the prompt in the mask of an encoder's output."""
    mask, encoded = kwargs.get("attention_mask"), kwargs["encoder_outputs"][0]
    if mask is not None and mask.dim() == 2 and mask.shape[1] < encoded.shape[1]:
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (encoded.shape[1] - mask.shape[1], 0), value=1)
