# SPDX-License-Identifier: Apache-2.0
"""Batches of conversations, and the checks of what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversations import Conversation

__all__ = ["Batch", "check_batches", "packed_batch", "padded_batch"]


class Batch(NamedTuple):
    """Conversations as arguments of a model.

    Attributes:
        inputs: arguments of its forward, with B rows.
        rows: bool [B, S], the tokens whose successors are tokens of an answer.
    """

    inputs: dict[str, Tensor]
    rows: Tensor

    def reading(self, prefix_ids: Sequence[int] | None) -> dict[str, Tensor]:
        """The arguments if every sample reads these prefixes of a bank; None without a bank."""
        if prefix_ids is None:
            return self.inputs
        ids = torch.tensor(prefix_ids, device=self.rows.device)
        return {**self.inputs, "prefix_ids": ids.expand(len(self.rows), -1)}


def check_batches(
    model: Any, conversations: Sequence[Conversation], batch_size: int = 1, name: str = "conversations"
) -> None:
    """Raise ValueError for conversations that no model, or not this one, can read and predict.

    Args:
        model: whose tokens they are.
        conversations: from the caller.
        batch_size: from the caller.
        name: of the argument ``conversations``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if not conversations:
        raise ValueError(f"{name}: expected at least one, got none")
    count = model.get_input_embeddings().weight.shape[0]
    for index, conversation in enumerate(conversations):
        for field in ("prompt_ids", "answer_ids"):
            ids = getattr(conversation, field)
            if not ids:
                raise ValueError(f"{name}[{index}].{field}: expected at least one token, got none")
            if not 0 <= min(ids) <= max(ids) < count:
                raise ValueError(
                    f"{name}[{index}].{field}: expected tokens from 0 to {count - 1}, got {min(ids)} to {max(ids)}"
                )


def padded_batch(conversations: Sequence[Conversation], device: torch.device) -> Batch:
    """One row per conversation, padded on the right."""
    texts = [_read_tokens(conversation) for conversation in conversations]
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    rows = torch.zeros_like(ids, dtype=torch.bool)
    for row, conversation in zip(rows, conversations, strict=True):
        row[_predicting(conversation)] = True
    return Batch({"input_ids": ids.to(device), "attention_mask": mask.to(device)}, rows.to(device))


def packed_batch(conversations: Sequence[Conversation], device: torch.device) -> Batch:
    """All conversations in one row; the positions tell where each begins."""
    texts = [_read_tokens(conversation) for conversation in conversations]
    ids = torch.tensor([[token for text in texts for token in text]])
    places = torch.tensor([[place for text in texts for place in range(len(text))]])
    rows = torch.zeros_like(ids, dtype=torch.bool)
    lengths = [len(text) for text in texts]
    for part, conversation in zip(rows[0].split(lengths), conversations, strict=True):
        part[_predicting(conversation)] = True
    return Batch({"input_ids": ids.to(device), "position_ids": places.to(device)}, rows.to(device))


def _read_tokens(conversation: Conversation) -> list[int]:
    """The tokens that a model reads: no token follows the last one."""
    return [*conversation.prompt_ids, *conversation.answer_ids[:-1]]


def _predicting(conversation: Conversation) -> slice:
    """The tokens whose successors are those of the answer."""
    start = len(conversation.prompt_ids) - 1
    return slice(start, start + len(conversation.answer_ids))
