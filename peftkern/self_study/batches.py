# SPDX-License-Identifier: Apache-2.0
"""Batches of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .conversations import Conversation

__all__ = ["Batch", "packed_batch", "padded_batch"]


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
