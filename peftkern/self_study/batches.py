# SPDX-License-Identifier: Apache-2.0
"""Batches of conversations, and the checks of what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model_info import text_config
from ..modules import PrefixKV
from .conversations import Conversation

__all__ = ["Batch", "check_batches", "check_positions", "longest_of", "packed_batch", "padded_batch"]


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


def check_positions(
    model: Any, prefix: PrefixKV, longest: int, name: str, prefix_ids: Sequence[int] | None = None
) -> None:
    """Raise ValueError for texts that end beyond the positions for which the model was made.

    Args:
        model: with the number of its positions in its config, or without.
        prefix: what each text follows.
        longest: tokens of the longest text.
        name: of the argument to blame.
        prefix_ids: the prefixes of a bank that are read at once.
    """
    most = getattr(text_config(model), "max_position_embeddings", None)
    taken = prefix.positions
    if prefix_ids is not None and prefix.prefix_lens is not None:
        taken = sum(int(prefix.prefix_lens[number]) for number in prefix_ids if number >= 0)
    if most is not None and taken + longest > most:
        raise ValueError(
            f"{name}: expected a prefix and a text of at most the model's {most} positions together, got {taken} and "
            f"{longest}"
        )


def longest_of(conversations: Sequence[Conversation]) -> int:
    """Tokens of the longest conversation that a model reads."""
    return max(len(_read_tokens(conversation)) for conversation in conversations)


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
