# SPDX-License-Identifier: Apache-2.0
"""What the teacher predicts at each token of the answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import replace_file
from ..huggingface.distilling import capture_top_k
from ..huggingface.fingerprint import fingerprint
from ..huggingface.probing import quiet
from ..huggingface.switch import switched
from ..modules import PrefixKV
from .batches import check_batches, check_positions, longest_of, padded_batch
from .conversations import Conversation
from .identity import digest_of, digest_of_conversations

__all__ = ["Targets", "capture"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Targets:
    """The teacher's most likely tokens at each token of the answers.

    Attributes:
        conversations: B of them, with N tokens in their answers.
        ids: [N, K] int32, the most likely tokens.
        log_probs: [N, K] fp32, their log-probabilities among all tokens.
    """

    conversations: Sequence[Conversation]
    ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.conversations)

    def rows(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids, log_probs) of some conversations, [N, K] each, one conversation after the other."""
        lengths = [len(conversation.answer_ids) for conversation in self.conversations]
        parts = (self.ids.split(lengths), self.log_probs.split(lengths))
        ids, log_probs = (torch.cat([part[number] for number in numbers]) for part in parts)
        return ids, log_probs


def capture(
    model: Any,
    document: PrefixKV,
    conversations: Sequence[Conversation],
    k: int = 20,
    path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Run the teacher over conversations, and keep its ``k`` most likely tokens at each token of the answers.

    The document is not run again: its keys and values are the prefix.

    Args:
        model: patched with a :class:`peftkern.PrefixKV` for the same layers.
        document: what the teacher reads, the prefix of the whole document.
        conversations: their answers need not be the teacher's own.
        k: tokens that are kept. The share of the others is not learned.
        path: of a safetensors file, which is read if it was made by the same model from the same document and
            conversations, and written in one piece otherwise.
        batch_size: conversations in a forward.
        progress: called with the number of conversations done, and of all.

    Raises:
        ValueError: for a file made from something else, conversations without tokens or beyond the model's positions,
            or a model whose logits do not follow from its output layer.
    """
    check_batches(model, conversations, batch_size)
    check_positions(model, document, longest_of(conversations), "document")
    made_with = {
        "k": k, "conversations": digest_of_conversations(conversations), "document": digest_of(document),
        "model": fingerprint(model),
    }  # fmt: skip
    if path is not None and Path(path).exists():
        return Targets(conversations, *_load(Path(path), made_with))
    ids: list[Tensor] = []
    log_probs: list[Tensor] = []
    order = sorted(range(len(conversations)), key=lambda number: len(conversations[number].prompt_ids))
    places = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with switched(model, document), quiet(model):
        device = model.get_input_embeddings().weight.device
        for done, numbers in enumerate(places):
            if progress is not None:
                progress(done * batch_size, len(order))
            chosen = [conversations[number] for number in numbers]
            batch = padded_batch(chosen, device)
            found = capture_top_k(model, batch.inputs, k, rows=batch.rows)
            lengths = [len(conversation.answer_ids) for conversation in chosen]
            for rows, parts in zip((ids, log_probs), found, strict=True):
                rows += parts.cpu().split(lengths)
    if progress is not None:
        progress(len(order), len(order))
    back = torch.tensor([number for numbers in places for number in numbers]).argsort().tolist()
    top = torch.cat([ids[place] for place in back]).int(), torch.cat([log_probs[place] for place in back]).float()
    if path is not None:
        metadata = {"peftkern_targets": json.dumps({"format": FORMAT_VERSION, **made_with}, sort_keys=True)}
        replace_file(Path(path), save({"ids": top[0], "log_probs": top[1]}, metadata))
    return Targets(conversations, *top)


def _load(path: Path, made_with: dict[str, Any]) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("peftkern_targets", "{}"))
            ids, log_probs = file.get_tensor("ids"), file.get_tensor("log_probs")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"path: expected targets in {path}, got {error}; remove it to make them again") from error
    expected = {"format": FORMAT_VERSION, **made_with}
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"path: expected targets made with the same {', '.join(names)}, got {path}; remove it, or choose another "
            "one"
        )
    return ids, log_probs
