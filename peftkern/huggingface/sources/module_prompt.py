# SPDX-License-Identifier: Apache-2.0
"""A :class:`peftkern.SoftPrompt` in a plain Hugging Face model."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calls import running
from ..prompts import Prompt, PromptSource
from ..wiring import Patch

__all__ = ["EmbeddingPrompt", "ModulePrompt", "is_embedding_prompt"]

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

    def wire(self, patch: Patch) -> None:
        """Make the prompt a submodule of the Hugging Face model, in which it stays when wrappers are taken off."""
        if self.freeze:
            patch.wiring.freeze(patch.model.parameters())
        patch.wiring.add_submodule(patch.base, SUBMODULE, cast(nn.Module, self.prompt))

    def find(self, patch: Patch, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
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
