# SPDX-License-Identifier: Apache-2.0
"""The prompt of a call, and the interface of what provides it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .layout import HostNumbers, indices_of
from .wiring import Patch, Source

__all__ = ["Prompt", "PromptSource", "bypassed_hooks", "used_prompts"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The prompt of one call of the base model.

    Attributes:
        rows: [A, P, E]; with ``per_sample``, [B, P, E].
        ids: [B], which prompt a sample has; None for the one prompt of all.
        per_sample: ``rows`` holds the prompt of each sample, of which those with equal ids are equal.
        shown: whether outputs have rows for the prompt, as PEFT's do.
        given: the arguments as the caller made them, if they count the prompt. They are put back for a call in which
            the prompt stands before every sample.
    """

    rows: Tensor
    ids: Tensor | None = None
    per_sample: bool = False
    shown: bool = False
    given: dict[str, Any] | None = None

    def ask(self, numbers: HostNumbers) -> None:
        """Ask which prompts the batch uses."""
        if self.ids is not None and not is_tracing(self.ids):
            numbers.ask("prompts", first_of_each(self.ids.sort().values).sum())

    def used(self, numbers: HostNumbers) -> tuple[Tensor, Tensor | None]:
        """([A, P, E] of the prompts in use, [B] which of them each sample has)."""
        if self.ids is None:
            return self.rows, None
        if is_tracing(self.ids):  # all as they come
            rows = self.rows if self.per_sample else self.rows[self.ids]
            return rows, torch.arange(self.ids.shape[0], device=self.ids.device)
        return used_prompts(self.rows, self.ids, numbers.get("prompts"), self.per_sample)

    def expanded(self) -> Tensor:
        """[B or 1, P, E], the prompt of each sample."""
        return self.rows if self.ids is None or self.per_sample else self.rows[self.ids]


def first_of_each(ids: Tensor) -> Tensor:
    """Sorted integers [B] -> bool [B], whether each is the first of its value."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids.diff() != 0
    return first


def used_prompts(rows: Tensor, ids: Tensor, count: int, per_sample: bool) -> tuple[Tensor, Tensor]:
    """The different prompts among ``ids``, on the device.

    Args:
        rows: [A, P, E]; with ``per_sample``, [B, P, E].
        ids: [B].
        count: how many different ones there are.
        per_sample: whether ``rows`` are those of the samples.

    Returns:
        ([count, P, E] in the order of their ids, [B] which of them each sample has)
    """
    ids = ids.to(rows.device)
    order = ids.sort()
    firsts = indices_of(first_of_each(order.values), count)
    used = order.values[firsts]
    return rows[order.indices[firsts] if per_sample else used], torch.searchsorted(used, ids)


class PromptSource(Source):
    """Provides the prompt of each call.

    Attributes:
        concatenates: how the notice on a call that cannot be packed goes on.
        pools_last_column: a classification head reads the last column, padding or not.
        needs_all_logits: the caller computes a loss from the logits.
    """

    concatenates: str
    pools_last_column: bool = False
    needs_all_logits: bool = False

    @abstractmethod
    def find(self, patch: Patch, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The prompt of a call of the base model, whose arguments then speak of the sequence alone."""

    def notice_differences(self, kwargs: dict[str, Any], numbers: HostNumbers) -> None:
        """Give notice of what is worth one, when ``numbers`` have been fetched."""
        return


def bypassed_hooks(base: nn.Module) -> ValueError:
    """The error for a call that did not go through the hooks of the base model."""
    return ValueError(
        f"model: expected a call of {type(base).__name__}, whose hooks put the prompt before the sequence, got a "
        "call of its forward or of one of its parts, which would run without the prompt"
    )
