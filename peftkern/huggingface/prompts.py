# SPDX-License-Identifier: Apache-2.0
"""The prompt of a call, and the interface of the classes that provide it."""

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
        ids: [B], the prompt of each sample; None if all samples have the same prompt.
        per_sample: ``rows`` contains the prompt of each sample; samples with equal ids have equal prompts.
        shown: whether outputs have rows for the prompt, as in PEFT.
        given: the caller's arguments, if they count the prompt. They are restored for a call that concatenates the
            prompt with every sample.
        input_ids: [B, S], if the caller's arguments contain their embeddings instead.
        lens: [A], the number of tokens of each prompt; ``rows`` contains the prompts in use, and an id of -1 stands
            for none. None if all have P tokens.
    """

    rows: Tensor
    ids: Tensor | None = None
    per_sample: bool = False
    shown: bool = False
    given: dict[str, Any] | None = None
    input_ids: Tensor | None = None
    lens: Tensor | None = None

    def request(self, numbers: HostNumbers) -> None:
        """Request the number of different prompts in the batch."""
        if self.ids is not None and self.lens is None and not is_tracing(self.ids):
            numbers.request("prompts", first_of_each(self.ids.sort().values).sum())

    def used(self, numbers: HostNumbers) -> tuple[Tensor, Tensor | None]:
        """([A, P, E], the prompts in use; [B], the index of each sample's prompt)."""
        if self.ids is None or self.lens is not None:
            return self.rows, self.ids
        if is_tracing(self.ids):  # one prompt per sample, as the number of different ones depends on values
            rows = self.rows if self.per_sample else self.rows[self.ids]
            return rows, torch.arange(self.ids.shape[0], device=self.ids.device)
        return used_prompts(self.rows, self.ids, numbers.get("prompts"), self.per_sample)

    def expanded(self) -> Tensor:
        """[B or 1, P, E], the prompt of each sample."""
        return self.rows if self.ids is None or self.per_sample else self.rows[self.ids]


def first_of_each(ids: Tensor) -> Tensor:
    """Sorted integers [B] -> bool [B], true at the first occurrence of each value."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids.diff() != 0
    return first


def used_prompts(rows: Tensor, ids: Tensor, count: int, per_sample: bool) -> tuple[Tensor, Tensor]:
    """The different prompts among ``ids``, computed without a host synchronisation.

    Args:
        rows: [A, P, E]; with ``per_sample``, [B, P, E].
        ids: [B].
        count: number of different ids.
        per_sample: ``rows`` contains the prompt of each sample.

    Returns:
        ([count, P, E] in the order of their ids, [B] the index of each sample's prompt)
    """
    ids = ids.to(rows.device)
    order = ids.sort()
    firsts = indices_of(first_of_each(order.values), count)
    used = order.values[firsts]
    chosen = rows[order.indices[firsts] if per_sample else used]
    return chosen, torch.searchsorted(used, ids)


class PromptSource(Source):
    """Provides the prompt of each call.

    Attributes:
        concatenates: the second half of the notice on a call that cannot be packed.
        pools_last_column: whether a classification head reads the last column, even if it is padding.
        needs_all_logits: whether the caller computes a loss from the logits.
    """

    concatenates: str
    pools_last_column: bool = False
    needs_all_logits: bool = False

    @abstractmethod
    def find(self, patch: Patch, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The prompt of a call of the base model; None if it gets none.

        Removes the prompt from ``kwargs``, which then describe the sequence alone.

        Args:
            patch: the patch that runs the call.
            kwargs: arguments of the call, changed in place.
            continues: whether the call continues a sequence.
        """

    def notice_differences(self, numbers: HostNumbers) -> None:
        """Warn of results that differ from PEFT's. ``numbers`` have been fetched."""
        return


def bypassed_hooks(base: nn.Module) -> ValueError:
    """The error for a call that did not go through the hooks of the base model."""
    return ValueError(
        f"model: expected a call of {type(base).__name__}, whose hooks put the prompt before the sequence, got a "
        "call of its forward or of one of its parts, which would run without the prompt"
    )
