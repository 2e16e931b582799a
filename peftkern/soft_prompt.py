# SPDX-License-Identifier: Apache-2.0
"""Learned input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .argument_types import EMBEDDING, MODEL, TOKENIZER, checks_arguments
from .functional import soft_prompt_embedding
from .model_info import Origin, embed, embed_dim_of, text_config, text_tokens

__all__ = ["SoftPrompt"]


class SoftPrompt(nn.Module):
    """Learned input embeddings that precede those of the tokens (prompt tuning, Lester et al. 2021).

    Args:
        model_or_embedding: a Hugging Face model or config, the weight [V, E] of the token embeddings, or None if
            ``embed_dim`` is given.
        length: tokens of the prompt, P.
        num_prompts: None for one prompt, weight [P, E]; A for a bank, weight [A, P, E].
        embed_dim: E; overrides the model's.
        init: ``"random"``, normal with ``std``; ``"vocab"``, the embeddings of random tokens of the vocabulary (needs
            a model or weight); or a tensor that expands to the weight's shape.
        std: standard deviation of the random initial values.
        dtype: of the parameter. With fp32, half-precision embeddings read a rounded copy of the fp32 master.
        device: default: the model's.

    Attributes:
        weight: [P, E] or [A, P, E].
        origin: :class:`Origin`, the model that the prompt was made for.

    Raises:
        ValueError: naming the argument, what was expected and what was given.

    >>> embedding = torch.randn(100, 8)
    >>> prompt = SoftPrompt(embedding, 3)
    >>> prompt(torch.tensor([[1, 2]]), embedding).shape
    torch.Size([1, 5, 8])
    """

    @checks_arguments(model_or_embedding=EMBEDDING)
    def __init__(
        self,
        model_or_embedding: Any,
        length: int,
        *,
        num_prompts: int | None = None,
        embed_dim: int | None = None,
        init: str | Tensor = "random",
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        source = model_or_embedding
        if embed_dim is None and source is None:
            raise ValueError("model_or_embedding: expected a model, config or weight, or embed_dim, got None")
        if embed_dim is None:
            embed_dim = _width(source)
        if embed_dim < 1:
            raise ValueError(f"embed_dim: expected at least 1, got {embed_dim}")
        if not std >= 0:  # NaN too
            raise ValueError(f"std: expected at least 0, got {std}")
        if length < 0 or (num_prompts is not None and num_prompts < 1):
            raise ValueError(
                f"length, num_prompts: expected length >= 0 and num_prompts None or >= 1, got {length}, {num_prompts}"
            )
        self.origin = Origin() if isinstance(model_or_embedding, Tensor) else Origin.of(model_or_embedding)
        shape = (length, embed_dim) if num_prompts is None else (num_prompts, length, embed_dim)
        if device is None:
            device = getattr(source.get_input_embeddings().weight if _is_model(source) else source, "device", None)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        with torch.no_grad():
            if isinstance(init, Tensor):
                if init.dim() > len(shape) or any(
                    n not in (1, m) for n, m in zip(init.shape[::-1], shape[::-1], strict=False)
                ):
                    raise ValueError(f"init: expected a tensor that expands to {list(shape)}, got {list(init.shape)}")
                self.weight.copy_(init)
            elif init == "random":
                self.weight.normal_(std=std)
            elif init == "vocab" and isinstance(source, Tensor):
                self.weight.copy_(source[torch.randint(source.shape[0], shape[:-1], device=source.device)])
            elif init == "vocab" and _is_model(source):
                self.weight.copy_(embed(source, torch.randint(text_config(source).vocab_size, shape[:-1])))
            else:
                raise ValueError(
                    f"init: expected 'random', 'vocab' (with a model or embedding weight) or a tensor, got {init!r}"
                )

    @classmethod
    @checks_arguments(model=MODEL, tokenizer=TOKENIZER)
    def from_text(
        cls, model: Any, tokenizer: Any, text: str | Sequence[int], length: int, **options: Any
    ) -> SoftPrompt:
        """A prompt initialised with the embeddings of a text's tokens, repeated or truncated to ``length``.

        Args:
            model: a Hugging Face model.
            tokenizer: called on the text; special tokens that it adds are kept.
            text: for example an instruction; or the ids of its tokens, which need no tokenizer.
            length: as for :class:`SoftPrompt`.
            options: as for :class:`SoftPrompt`.
        """
        return cls(model, length, init=embed(model, text_tokens(tokenizer, text, length)), **options)

    @property
    def length(self) -> int:
        """P."""
        return self.weight.shape[-2]

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.weight.shape[-1]

    @checks_arguments()
    def forward(
        self, input_ids: Tensor, embedding_weight: Tensor, prompt_ids: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """The prompt followed by the embeddings of [B, S] tokens: [B, P+S, E] in the dtype of the embedding weight.

        See :func:`peftkern.soft_prompt_embedding`; a bank needs ``prompt_ids`` [B].
        """
        return soft_prompt_embedding(input_ids, embedding_weight, self.weight, prompt_ids=prompt_ids, backend=backend)

    def extra_repr(self) -> str:
        """The shape of the weight."""
        bank = f"num_prompts={self.weight.shape[0]}, " if self.weight.dim() == 3 else ""
        return f"{bank}length={self.length}, embed_dim={self.embed_dim}"


def _is_model(source: Any) -> bool:
    return hasattr(source, "get_input_embeddings")


def _width(source: Any) -> int:
    """E of a model, config or weight [V, E]."""
    if _is_model(source):
        return embed(source, [0]).shape[-1]
    return source.shape[1] if isinstance(source, Tensor) else embed_dim_of(source)
