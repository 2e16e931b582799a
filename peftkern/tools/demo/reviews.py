# SPDX-License-Identifier: Apache-2.0
"""The task: movie reviews as prompts whose next token is the sentiment."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .assets import Review
from .options import DemoError

HEAD, TAIL, LABELS = "Review:", "\nSentiment:", (" negative", " positive")
#: The text that initializes the prefix: two made-up reviews with labels, in the format of the task.
EXAMPLES = (
    f"{HEAD} A warm, funny and moving film.{TAIL}{LABELS[1]}\n\n"
    f"{HEAD} Dull, clumsy and far too long.{TAIL}{LABELS[0]}\n\n"
)
SPLIT_SEED = 1234


class Batch(NamedTuple):
    """Right-padded prompts, all [B, S] int64. ``labels`` is -100 everywhere but at the sentiment."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def split(reviews: Sequence[Review], eval_rows: int) -> tuple[list[Review], list[Review]]:
    """Split into (train, evaluation). Both are balanced over labels and sources; train alternates between them.

    The split depends on the arguments only, not on the seed of a run.

    Raises:
        DemoError: if a label has too few rows.
    """
    cells: dict[tuple[int, str], list[Review]] = defaultdict(list)
    for review in reviews:
        cells[review.label, review.source].append(review)
    rng = random.Random(SPLIT_SEED)
    queues: dict[int, list[Review]] = {}
    for label in (0, 1):
        members = [rng.sample(rows, len(rows)) for (y, _), rows in sorted(cells.items()) if y == label]
        queues[label] = _round_robin(members)
        if len(queues[label]) <= eval_rows // 2:
            raise DemoError(
                f"--eval-rows {eval_rows}: the data has {len(queues[label])} reviews with label {label}, too few "
                "to hold out half that many and train on the rest"
            )
    half = eval_rows // 2
    train = _round_robin([queues[0][half:], queues[1][half:]])
    return train, queues[0][:half] + queues[1][:half]


def _round_robin(queues: list[list[Review]]) -> list[Review]:
    """Take one item of each queue in turn until the shortest queue is empty, so that the result is balanced."""
    return [review for row in zip(*queues, strict=False) for review in row]


@dataclass
class Task:
    """Makes batches for one tokenizer. Prompts have at most ``seq`` tokens; long reviews lose their beginning."""

    tokenizer: Any
    seq: int
    label_ids: Tensor = field(init=False)  # [2]: negative, positive

    def __post_init__(self) -> None:
        ids = [self._ids(label) for label in LABELS]
        if any(len(x) != 1 for x in ids):
            raise DemoError(f"--model: its tokenizer must have one token for each of {LABELS}, got {ids}")
        self.label_ids = torch.tensor(ids).flatten()
        self._head, self._tail = self._ids(HEAD), self._ids(TAIL)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def examples(self, length: int) -> Tensor:
        """The last ``length`` token ids of the repeated examples, [1, length]."""
        ids = self._ids(EXAMPLES)
        return torch.tensor([(ids * math.ceil(length / len(ids)))[-length:]])

    def prompt(self, review: Review) -> list[int]:
        """Token ids of the prompt, without the sentiment."""
        room = self.seq - len(self._head) - len(self._tail)
        return self._head + self._ids(" " + review.text)[-room:] + self._tail

    def batch(self, reviews: Sequence[Review]) -> Batch:
        """A batch for training, [B, S]: each prompt with its sentiment."""
        rows = [[*self.prompt(review), int(self.label_ids[review.label])] for review in reviews]
        input_ids, attention_mask = self._pad(rows)
        labels = torch.full_like(input_ids, -100)
        last = torch.tensor([[len(row) - 1] for row in rows])
        return Batch(input_ids, attention_mask, labels.scatter_(1, last, input_ids.gather(1, last)))

    def eval_batches(self, reviews: Sequence[Review], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (input_ids, attention_mask, labels [B]) of ``size`` prompts of similar length."""
        rows = sorted(((self.prompt(review), review.label) for review in reviews), key=lambda row: len(row[0]))
        for start in range(0, len(rows), size):
            prompts, labels = zip(*rows[start : start + size], strict=True)
            yield *self._pad(prompts), torch.tensor(labels)

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([[len(row)] for row in rows])
        attention_mask = (torch.arange(int(lengths.max())) < lengths).long()
        input_ids = torch.zeros_like(attention_mask)  # padding is masked, so its token does not matter
        input_ids[attention_mask.bool()] = torch.tensor([token for row in rows for token in row])
        return input_ids, attention_mask


def training_rows(train: Sequence[Review], step: int, batch_size: int, seed: int) -> list[Review]:
    """The reviews of a step, counted from 0. A pure function, so that a resumed run sees the same reviews."""
    rows = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(i, len(train))
        rows.append(train[_order(len(train), seed, epoch)[position]])
    return rows


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(size: int, seed: int, epoch: int) -> list[int]:
    key = size, seed, epoch
    if key not in _orders:
        _orders.clear()
        _orders[key] = random.Random(f"{seed}/{epoch}").sample(range(size), size)
    return _orders[key]
