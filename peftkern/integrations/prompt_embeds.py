# SPDX-License-Identifier: Apache-2.0
"""Prompts as embeddings, the ``prompt_embeds`` of vLLM.

The rows are what ``transformers`` takes as ``inputs_embeds``: behind the embedding layer, and behind its scale where
it has one (Gemma).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..model_info import Origin, embed
from ..modules import SoftPrompt
from .kv_file import check_finite

__all__ = ["encode", "prompt_embeds", "prompt_embeds_bytes"]

FORMAT, VERSION = "peftkern.prompt_embeds", "1"


def prompt_embeds(prompt: SoftPrompt | Tensor, input_ids: Sequence[int] | Tensor, embedding: Any) -> Tensor:
    """The prompt followed by the embedded text, a request of its own for vLLM.

        llm.generate([{"prompt_embeds": prompt_embeds(prompt, tokenizer(text)["input_ids"], model)}])

    Args:
        prompt: a prompt [P, E], or one of a bank, ``bank.weight[i]``.
        input_ids: [S], the tokens of the text.
        embedding: a Hugging Face model, its embedding layer, or the weight [V, E] of a layer that does not scale.

    Returns:
        [P + S, E], in the dtype of the embeddings, without gradient.

    Raises:
        ValueError: naming the argument, what was expected and what was given.

    >>> prompt_embeds(SoftPrompt(None, 3, embed_dim=8), [1, 2], torch.randn(100, 8)).shape
    torch.Size([5, 8])
    """
    weight = prompt.weight if isinstance(prompt, SoftPrompt) else prompt
    ids = torch.as_tensor(input_ids)
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"input_ids: expected integers [tokens], got {ids.dtype} {list(ids.shape)}")
    text = _embedded(embedding, ids.long())
    if weight.dim() != 2 or weight.shape[1] != text.shape[1]:
        raise ValueError(f"prompt: expected [tokens, {text.shape[1]}], as the embeddings, got {list(weight.shape)}")
    rows = weight.detach().to(text)
    check_finite(f"prompt in {text.dtype}", rows)
    return torch.cat([rows, text])


@torch.no_grad()
def _embedded(embedding: Any, ids: Tensor) -> Tensor:
    """[S, E], the embeddings of token ids [S]."""
    if hasattr(embedding, "get_input_embeddings"):
        return embed(embedding, ids)
    if isinstance(embedding, nn.Module):
        rows: Tensor = embedding(ids.to(next(embedding.parameters()).device)[None])[0]
        return rows
    if not isinstance(embedding, Tensor) or embedding.dim() != 2:
        got = list(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise ValueError(f"embedding: expected a model, its embedding layer or a weight [V, E], got {got}")
    return nn.functional.embedding(ids.to(embedding.device), embedding)


def encode(embeds: Tensor) -> str:
    """The base64 text that vLLM's HTTP server takes as ``prompt_embeds``."""
    return base64.b64encode(_saved(embeds)).decode("ascii")


def prompt_embeds_bytes(rows: Tensor, origin: Origin) -> dict[str, bytes]:
    """The files of rows [P, E] by their suffixes: one for ``torch.load``, one of safetensors."""
    metadata = {"format": FORMAT, "version": VERSION, "tokens": str(rows.shape[0])}
    metadata |= {name: value for name, value in origin._asdict().items() if value is not None}
    return {".pt": _saved(rows), ".safetensors": save({"prompt_embeds": rows}, metadata)}


def _saved(x: Tensor) -> bytes:
    data = io.BytesIO()
    torch.save(x.detach().cpu().clone(memory_format=torch.contiguous_format), data)
    return data.getvalue()
