# SPDX-License-Identifier: Apache-2.0
"""How far the predictions behind a prefix are from the teacher's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distillation import logits_of
from ..huggingface.output_rows import OutputRows, read_rows
from ..huggingface.probing import quiet
from ..huggingface.switch import switched
from ..modules import PrefixKV
from .batches import check_batches, check_positions, longest_of, padded_batch
from .conversations import Conversation

__all__ = ["Comparison", "compare"]

_ROWS = 256  # of logits [ROWS, V] at a time


class Comparison(NamedTuple):
    """A student beside its teacher, on each of B conversations.

    Attributes:
        kl: the mean over the tokens of the answer of KL(teacher || student) over the whole vocabulary, in nats.
        agreement: the share of tokens at which both have the same most likely token.
    """

    kl: list[float]
    agreement: list[float]

    def interval(self, name: str = "kl", *, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """The mean over the conversations, and the ends of its 95 % interval by bootstrap over the conversations."""
        values: list[float] = getattr(self, name)
        rng = random.Random(seed)
        means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(samples))
        return fmean(values), means[round(0.025 * (samples - 1))], means[round(0.975 * (samples - 1))]


def compare(
    model: Any,
    document: PrefixKV,
    students: Mapping[str, PrefixKV | tuple[PrefixKV, tuple[int, ...]]],
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Comparison]:
    """Compare what the model predicts at the tokens of answers, behind each student and behind the document.

    Args:
        model: patched with a :class:`peftkern.PrefixKV` for the same layers, a bank if a student is one.
        document: what the teacher reads.
        students: prefixes by name; or a bank, and the numbers of those that every sample reads. One of length 0
            shows the model without the document.
        conversations: of questions that no student was trained on.
        batch_size: conversations in a forward.
        progress: called with the number of forwards done, and of all.

    Returns:
        For each student, its divergence on each conversation.

    Raises:
        ValueError: for conversations without tokens, with others than the model's, or beyond its positions.
    """
    check_batches(model, conversations, batch_size)
    for name, (prefix, ids) in {"document": (document, None), **_pairs(students)}.items():
        check_positions(model, prefix, longest_of(conversations), name, ids)
    batches = [conversations[start : start + batch_size] for start in range(0, len(conversations), batch_size)]
    found = {name: Comparison([], []) for name in students}
    total, done = len(batches) * (1 + len(students)), 0

    def states(prefix: PrefixKV, ids: tuple[int, ...] | None, chosen: Sequence[Conversation]) -> OutputRows:
        nonlocal done
        batch = padded_batch(chosen, model.device)
        with switched(model, prefix):
            result = read_rows(model, batch.reading(ids))
        done += 1
        if progress is not None:
            progress(done, total)
        return OutputRows(result.hidden[batch.rows], result.head)

    with quiet(model):
        for chosen in batches:
            teacher = states(document, None, chosen)
            lengths = [len(conversation.answer_ids) for conversation in chosen]
            for name, (prefix, ids) in _pairs(students).items():
                kl, same = _divergence(teacher, states(prefix, ids, chosen))
                found[name].kl.extend(float(x.mean()) for x in kl.split(lengths))
                found[name].agreement.extend(float(x.mean()) for x in same.split(lengths))
    return found


def _pairs(
    students: Mapping[str, PrefixKV | tuple[PrefixKV, tuple[int, ...]]],
) -> dict[str, tuple[PrefixKV, tuple[int, ...] | None]]:
    """Each student's prefix or bank, and the numbers of those that are read."""
    return {name: x if isinstance(x, tuple) else (x, None) for name, x in students.items()}


def _divergence(teacher: OutputRows, student: OutputRows) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and agreement at hidden states [N, E], each [N] fp32."""
    kl, same = [], []
    head = teacher.head
    for pair in zip(teacher.hidden.split(_ROWS), student.hidden.split(_ROWS), strict=True):
        p, q = (logits_of(x, head.lm_head, **head.options()).log_softmax(-1) for x in pair)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    return torch.cat(kl), torch.cat(same)
