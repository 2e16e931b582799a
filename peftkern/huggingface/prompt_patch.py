# SPDX-License-Identifier: Apache-2.0
"""Patches for a prompt at the embedding: PEFT's prompt tuning and its relatives, and :class:`peftkern.SoftPrompt`.

A causal model runs a prompt once per batch, as the first rows of a packed batch (:mod:`.packing`). Generation then
continues with the prompt's keys as a prefix that all rows share. Calls that cannot be packed concatenate the prompt
with every sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from ..arguments import constant
from .around_text import rope_positions
from .cache import PrefixCache
from .call_arguments import check_replaceable, self_attention_cache, tokens_of
from .calls import running
from .concatenation import Concatenated, concatenate, count_concatenated_prompt, pad_positions, shows_prompt
from .layout import HostNumbers, pad_labels
from .model_patch import ModelPatch
from .packed_cache import PackedCache
from .packing import PackedBatch
from .prompts import Prompt, PromptSource, bypassed_hooks
from .trial import Trial

__all__ = ["PromptPatch"]


class PromptPatch(ModelPatch):
    """Puts a prompt into one model, which runs it once per batch."""

    source: PromptSource

    def check(self, trial: Trial) -> None:
        """Raise ValueError unless the model can run packed batches and decode with the prompt's keys as a prefix."""
        if not self.packer.reasons and (reason := trial.try_prefix()) is not None:
            self.packer.reasons = [reason]
        self.packer.try_out(trial, prompts=True, shared=self.calls.share)
        if self.packer.reasons:
            raise ValueError("; ".join(self.packer.reasons))

    def explain(self) -> str:
        """One line: how batches run."""
        shared = ("" if self.sharer is None else f"; {self.sharer.explain()}") + self.calls.logits_note
        how = f"the prompt runs once per batch, before the sequences without their padding{shared}"
        return f"{type(self.base).__name__}: {how}"

    def selects_labels(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call computes only the logits that predict a label."""
        return not self.source.needs_all_logits and super().selects_labels(kwargs)

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Pack every call with a prompt that does not continue a sequence."""
        groups, cache = kwargs.pop("group_ids", None) if self.calls.share else None, self_attention_cache(kwargs)
        continues = isinstance(cache, PrefixCache) or (
            not self.source.is_given and count_concatenated_prompt(cache, kwargs)
        )
        prompt = self.source.find(self, kwargs, continues)
        if continues or prompt is None:
            return None
        if (reason := self.packer.why_unpackable(kwargs)) is not None:
            if prompt.lens is not None:
                raise ValueError(f"adapter_names: expected None, because {reason}, got names")
            self._concatenate(prompt, kwargs, reason)
            return None
        check_replaceable(cache, plain=self.is_training_step)
        return self._pack(prompt, groups, kwargs, numbers)

    def _concatenate(self, prompt: Prompt, kwargs: dict[str, Any], reason: str) -> None:
        """Put the prompt before every sample."""
        positions = rope_positions(self.base, kwargs)
        if prompt.given is not None:
            self.fall_back(reason, self.source.concatenates)
            kwargs.clear()
            kwargs.update(prompt.given)
            if positions is not None:
                kwargs["position_ids"] = pad_positions(positions, prompt.rows.shape[1])
            return
        kwargs["position_ids"] = kwargs.get("position_ids") if positions is None else positions
        tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and kwargs.get("position_ids") is None:
            # The sequence's positions continue those of the prompt, even with padding between them.
            steps, first = torch.arange(tokens.shape[1], device=mask.device), (mask != 0).to(torch.int8).argmax(1)
            kwargs["position_ids"] = (steps - first[:, None]).clamp(min=0)
        rows = prompt.expanded().expand(tokens.shape[0], -1, -1)
        running.leave_note(self, concatenate(running.module(self, self.base), rows, kwargs))
        self.fall_back(reason, self.source.concatenates)

    def _pack(
        self, prompt: Prompt, groups: Tensor | None, kwargs: dict[str, Any], numbers: HostNumbers
    ) -> PackedBatch:
        labels = kwargs.get("labels")
        stores = self.stores(kwargs)
        # A cache keeps padding, and windows count it when the sequence continues, so the first call counts it too.
        from_first = not (stores and self.packer.has_windows)
        sharer, host = self.sharer, None
        if sharer is not None and prompt.lens is not None:
            sharer.skip("samples have prompts of different lengths")
        elif sharer is not None:
            sequence = kwargs if prompt.input_ids is None else {**kwargs, "input_ids": prompt.input_ids}
            host = sharer.on_host(sequence, group_ids=groups, prompt_ids=prompt.ids)
        if host is not None:
            prompt = replace(prompt, ids=host.pop("prompt_ids", None))
        builder = self.packer.layout_builder(
            host or kwargs, numbers, from_first=from_first, pools_last_column=self.source.pools_last_column,
            count_labels=self.selects_labels(kwargs), without_padding=host is not None,
        )  # fmt: skip
        mask = (host or kwargs).get("attention_mask")
        if mask is not None and mask.shape[1] and not is_tracing(mask):
            numbers.request("left padding", (mask[:, 0] == 0).any())
            numbers.request("padding", (mask == 0).any())
        prompt.request(numbers)
        numbers.fetch()
        self.source.notice_differences(numbers)
        layout = builder.build() if sharer is None or host is None else sharer.build(builder, host)
        layout = layout.to(tokens_of(kwargs).device)
        kwargs["use_cache"] = stores and not layout.several_per_row
        rows, ids = prompt.used(numbers)
        if ids is not None and prompt.ids is not None and layout.segments is not None:  # the sharer has read them
            constant(ids, host=prompt.ids.unique(return_inverse=True)[1])
        packs_head = self.packer.head_runs_on_rows()
        # A loss that shifts labels needs the prompt's last row, which predicts the first token.
        for_loss = not packs_head and shows_prompt(self.base, labels)
        if for_loss and prompt.lens is not None:
            raise ValueError(f"adapter_names: expected None, because {self.packer.why_head_needs_batch()}, got names")
        packed = PackedBatch(layout, rows, ids, show_prompts=prompt.shown or for_loss, prompt_lens=prompt.lens)
        if packs_head:
            self.pack_logits(packed, kwargs, numbers)
        elif labels is not None and labels.dim() == 2 and packed.show_prompts:
            kwargs["labels"] = pad_labels(labels, packed.prompt_len)
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor) and packed.show_prompts:
            kwargs["logits_to_keep"] = keep + packed.prompt_len
        if for_loss and not prompt.shown:
            rows_shown = packed.prompt_len + layout.shape[1]
            running.leave_note(self, Concatenated(packed.prompt_len, rows_shown))
        return packed

    def clean_output(self, note: Any, output: Any) -> Any:
        """The base model's output in the form that the caller expects."""
        return note.strip(output) if isinstance(note, Concatenated) else output

    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The cache of a packed batch, or of a sequence that continues."""
        if packed is not None:
            num_layers = 1 + max(info.layer for info in self.prefix_layers.values())
            new = PackedCache(num_layers, packed, stores=bool(kwargs.get("use_cache")), options=self.options)
            new.given = self_attention_cache(kwargs)
            return new
        cache = self_attention_cache(kwargs)
        if isinstance(cache, PrefixCache):
            return cache
        if not self.source.is_given and not running.has(self):
            raise bypassed_hooks(self.base)
        return None

    def unpack_cache(self, cache: PrefixCache) -> PrefixCache | None:
        """The cache of a packed batch, unpacked."""
        if not isinstance(cache, PackedCache) or not cache.stores:
            return None
        unpacked = cache.unpacked()
        unpacked.from_first = not self.packer.has_windows
        return unpacked
