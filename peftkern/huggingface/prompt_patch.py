# SPDX-License-Identifier: Apache-2.0
"""A prompt at the embedding: PEFT's prompt tuning and its kin, and :class:`peftkern.SoftPrompt`.

A causal model runs a prompt once a batch, as the first rows of a stream (:mod:`.packing`). Generation continues with
the prompt's keys as a prefix that all rows share. Calls that cannot run on a stream have the prompt put before every
sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from .cache import PrefixCache, PrefixOptions, PromptCache
from .calls import running
from .concatenation import Concatenated, concatenate, continue_behind, shows_prompt
from .layout import IGNORED, HostNumbers, indices_of
from .model_patch import ModelPatch, check_replaceable, self_attention_cache
from .packer import tokens_of
from .packing import PackedBatch
from .trial import Trial

__all__ = ["Prompt", "PromptPatch", "PromptSource", "Unpackable", "used_prompts"]


class Unpackable(ValueError):
    """A model that cannot run on a stream."""


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


class PromptSource(ABC):
    """Where a prompt comes from.

    Attributes:
        is_given: whether calls of the base model bring the prompt in their embeddings, as PEFT's do. Otherwise every
            call that does not continue a sequence gets it.
        concatenates: how the notice on a call that cannot be packed goes on.
        pools_last_column: a classification head reads the last column, padding or not.
        needs_all_logits: the caller computes a loss from the logits.
    """

    is_given: bool
    concatenates: str
    pools_last_column: bool = False
    needs_all_logits: bool = False

    @abstractmethod
    def wire(self, patch: PromptPatch) -> None:
        """Install what the source needs in the model."""

    @abstractmethod
    def find(self, patch: Any, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The prompt of a call of the base model, whose arguments then speak of the sequence alone."""

    def notice_differences(self, patch: PromptPatch, kwargs: dict[str, Any], numbers: HostNumbers) -> None:
        """Give notice of what is worth one, when ``numbers`` have been fetched."""
        return


class PromptPatch(ModelPatch):
    """A prompt that runs once a batch.

    Args:
        source: where the prompt comes from.
    """

    def __init__(
        self, model: nn.Module, base: PreTrainedModel, source: PromptSource, options: PrefixOptions, *, logits: str,
        strict: bool,
    ) -> None:  # fmt: skip
        super().__init__(model, base, options, packing=True, logits=logits, strict=strict)
        self.source = source

    def check(self, trial: Trial) -> None:
        """Raise Unpackable if the model cannot run on a stream, or decode behind the prompt's keys as a prefix."""
        if not self.packer.reasons and (reason := trial.try_prefix()) is not None:
            self.packer.reasons = [reason]
        self.packer.try_out(trial, prompts=True)
        if self.packer.reasons:
            raise Unpackable("; ".join(self.packer.reasons))

    @property
    def requires_prefix(self) -> bool:
        """Whether every call must have a prefix: not in a PEFT model, whose adapter may be disabled."""
        return not self.source.is_given

    def wire(self) -> None:
        """Install what depends on where the prompt comes from."""
        self.source.wire(self)

    def explain(self) -> str:
        """How batches run."""
        return f"{type(self.base).__name__}: the prompt runs once a batch, before the sequences without their padding"

    def selects_labels(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call computes only the logits that predict a label."""
        return not self.source.needs_all_logits and super().selects_labels(kwargs)

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Every call with a prompt, unless it continues a sequence."""
        cache = self_attention_cache(kwargs)
        continues = isinstance(cache, PrefixCache) or (not self.source.is_given and continue_behind(cache, kwargs))
        prompt = self.source.find(self, kwargs, continues)
        if continues or prompt is None:
            return None
        if (reason := self.packer.why_unpackable(kwargs)) is not None:
            self._concatenate(prompt, kwargs, reason)
            return None
        check_replaceable(cache)
        return self._pack(prompt, kwargs, numbers)

    def _concatenate(self, prompt: Prompt, kwargs: dict[str, Any], reason: str) -> None:
        """Have the prompt before every sample."""
        if prompt.given is not None:
            self.fall_back(reason, self.source.concatenates)
            kwargs.clear()
            kwargs.update(prompt.given)
            return
        tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and kwargs.get("position_ids") is None:
            # The sequence begins right behind the prompt, also where padding stands between them.
            steps, first = torch.arange(tokens.shape[1], device=mask.device), (mask != 0).to(torch.int8).argmax(1)
            kwargs["position_ids"] = (steps - first[:, None]).clamp(min=0)
        rows = prompt.expanded().expand(tokens.shape[0], -1, -1)
        running.leave_note(self, concatenate(running.module(self, self.base), rows, kwargs))
        self.fall_back(reason, self.source.concatenates)

    def _pack(self, prompt: Prompt, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch:
        labels = kwargs.get("labels")
        uses_cache = kwargs.get("use_cache")
        uses_cache = getattr(self.base.config, "use_cache", False) if uses_cache is None else uses_cache
        stores = bool(uses_cache) and not self.is_training_step
        # A cache keeps the padding, which windows count when the sequence goes on, so the first call counts it too.
        from_first = not (stores and self.packer.has_windows)
        builder = self.packer.layout_builder(
            kwargs, numbers, from_first=from_first, pools_last_column=self.source.pools_last_column,
            count_labels=self.selects_labels(kwargs),
        )  # fmt: skip
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] and not is_tracing(mask):
            numbers.ask("left padding", (mask[:, 0] == 0).any())
            numbers.ask("padding", (mask == 0).any())
        prompt.ask(numbers)
        numbers.fetch()
        self.source.notice_differences(self, kwargs, numbers)
        layout = builder.build()
        kwargs["use_cache"] = stores and not layout.several_per_row
        rows, ids = prompt.used(numbers)
        packs_head = self.packer.head_runs_on_rows()
        # A loss that shifts labels needs the prompt's last row, which predicts the first token.
        for_loss = not packs_head and shows_prompt(self.base, labels)
        packed = PackedBatch(layout, rows, ids, show_prompts=prompt.shown or for_loss)
        if packs_head:
            self.pack_logits(packed, kwargs, numbers)
        elif labels is not None and labels.dim() == 2 and packed.show_prompts:
            kwargs["labels"] = torch.nn.functional.pad(labels, (packed.prompt_len, 0), value=IGNORED)
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor) and packed.show_prompts:
            kwargs["logits_to_keep"] = keep + packed.prompt_len
        if for_loss and not prompt.shown:
            rows_shown = packed.prompt_len + layout.shape[1]
            running.leave_note(self, Concatenated(packed.prompt_len, rows_shown))
        return packed

    def clean_output(self, note: Any, output: Any) -> Any:
        """The base model's output as the caller expects it."""
        return note.strip(output) if isinstance(note, Concatenated) else output

    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The cache of a stream, or of a sequence that goes on."""
        if packed is not None:
            num_layers = 1 + max(info.layer for info in self.prefix_layers.values())
            return PromptCache(num_layers, packed, stores=bool(kwargs.get("use_cache")), options=self.options)
        cache = self_attention_cache(kwargs)
        if isinstance(cache, PrefixCache):
            return cache
        if not self.source.is_given and not running.has(self):
            raise ValueError(
                f"model: expected a call of {type(self.base).__name__}, whose hooks put the prompt before the "
                "sequence, got one of its forward or of a part of it, which would run without the prompt"
            )
        return None

    def unpack_cache(self, cache: PrefixCache) -> PrefixCache | None:
        """The cache of a stream, for the batch."""
        if not isinstance(cache, PromptCache) or not cache.stores:
            return None
        unpacked = cache.unpacked()
        unpacked.from_first = not self.packer.has_windows
        return unpacked
