# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.SoftPrompt` in a plain Hugging Face model."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint import PROMPT_NAME
from ...model_info import embed
from ..adapter_folders import AdapterFolder
from ..calls import running
from ..prompts import Prompt, PromptSource
from ..wiring import Patch

__all__ = ["EmbeddingPrompt", "ModulePrompt", "is_embedding_prompt"]


class EmbeddingPrompt(Protocol):
    """The interface of a prompt module, which :class:`peftkern.SoftPrompt` implements."""

    weight: Tensor
    embed_dim: int


def is_embedding_prompt(value: object) -> TypeGuard[EmbeddingPrompt]:
    """Whether ``value`` is an :class:`EmbeddingPrompt`. From Python 3.12, ``isinstance`` ignores parameters."""
    return hasattr(value, "weight") and hasattr(value, "embed_dim")


class ModulePrompt(PromptSource):
    """The prompt is a submodule of the Hugging Face model. Callers pass arguments of the sequence alone.

    Args:
        prompt: with ``weight`` [P, E], or a bank [A, P, E]; calls then pass ``prompt_ids`` [B].
        base: the Hugging Face model.
        freeze: clear ``requires_grad`` of the model's own parameters while it is patched.
    """

    is_given = False
    concatenates = "such calls have the prompt put before every sample"

    def __init__(self, prompt: EmbeddingPrompt, base: PreTrainedModel, *, freeze: bool) -> None:
        width = embed(base, [0]).shape[-1]
        if prompt.weight.shape[-1] != width:
            raise ValueError(
                f"prefix: expected a prompt as wide as the token embeddings, {width}, got {prompt.weight.shape[-1]}"
            )
        self.prompt = prompt
        self.freeze = freeze

    def wire(self, patch: Patch) -> None:
        """Make the prompt a submodule of the Hugging Face model, so that it stays when wrappers are removed."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, PROMPT_NAME, cast(nn.Module, self.prompt))
        AdapterFolder.install(patch, PROMPT_NAME)

    def find(self, patch: Patch, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The module's weight, or its bank and the prompt of each sample."""
        # The module that runs may be a replica, which has its own copy of the prompt.
        prompt: EmbeddingPrompt = getattr(running.module(patch, patch.base), PROMPT_NAME)
        weight, ids = prompt.weight, kwargs.pop("prompt_ids", None)
        if continues:
            return None
        if weight.dim() == 2:
            if ids is not None:
                raise ValueError("prompt_ids: expected None, because the prompt is not a bank, got a tensor")
            return Prompt(weight[None])
        if ids is None:
            raise ValueError(
                "prompt_ids: expected the prompt of each sample [B], because the prompt is a bank, got None"
            )
        return Prompt(weight, ids.to(weight.device))
