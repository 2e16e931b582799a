# SPDX-License-Identifier: Apache-2.0
"""Patches for a gated prefix in attention modules: PEFT's LLaMA-Adapter."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_tracing

from .call_arguments import self_attention_cache, tokens_of
from .layout import HostNumbers
from .packing import PackedBatch
from .share_patch import SharePatch
from .trial import Trial
from .wiring import Source

__all__ = ["GatedPatch", "GatedSource"]


class GatedSource(Source):
    """Provides the gated prefixes of attention modules, which pass them to the attention function themselves."""

    is_given = True

    @abstractmethod
    def adopt(self, patch: GatedPatch) -> None:
        """Have the attention modules of the active adapter pass their prefixes to the attention function."""

    @abstractmethod
    def open_gates(self) -> AbstractContextManager[None]:
        """Within the block, the gates of the active adapter are 1; an adapter begins with closed ones."""


class GatedPatch(SharePatch):
    """Runs attention modules with a gated prefix.

    The prefix takes no positions, and every row reads it alike. Caches, masks and ``generate`` are therefore those of
    the stock model.
    """

    source: GatedSource

    def check(self, trial: Trial) -> None:
        """Raise ValueError unless the patched adapter agrees with the stock one, and try packed batches."""
        with self.source.open_gates():
            reason = trial.guarded(lambda: self._try_adapter(trial), "with its adapter") or trial.try_prefix()
            if reason is not None:
                raise ValueError(f"model: {reason}")
            if self.calls.share:
                super().check(trial)
            elif self.calls.packing:
                self.packer.try_out(trial)
            else:
                self.packer.reasons = ["packing=False"]

    def _try_adapter(self, trial: Trial) -> str | None:
        """Adopt the adapter. Returns how this changes the last hidden states; None if it does not."""
        tokens = trial.backbone.get_input_embeddings()(trial.ids)
        options: dict[str, Any] = {"attention_mask": trial.mask, "use_cache": False}
        want = trial.recorded(inputs_embeds=tokens, **options)[-1:]
        moved = trial.recorded(inputs_embeds=trial.round_otherwise(tokens), **options)[-1:]
        self.source.adopt(self)
        got = trial.recorded(inputs_embeds=tokens, **options)[-1:]
        rounding = trial.measure_rounding(moved, want, trial.mask)
        return trial.compare(f"{trial.kind} with its adapter", got, want, trial.mask, rounding)

    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""
        because = "; ".join(self.packer.reasons)
        how = f"with their padding: {because}" if because else "without their padding"
        shared = (f"; {self.sharer.explain()}" if self.calls.share else "") + self.calls.logits_note
        kind = type(self.base).__name__
        return f"{kind}: the adapter is computed together with attention; training batches run {how}{shared}"

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Pack a training step whose batch has padding.

        Several sequences in one row stay there: whether they see each other, and count the first token of each as a
        label, is up to the model.
        """
        if self.calls.share:
            return super().pack_call(kwargs, numbers)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        selects = self.selects_labels(kwargs)
        if not self.is_training_step or self_attention_cache(kwargs) is not None:
            return None
        if (mask is None and position_ids is None and not selects) or self.packer.why_unpackable(kwargs) is not None:
            return None
        if mask is not None and is_tracing(mask):  # the number of packed rows depends on values
            return None
        builder = self.packer.layout_builder(kwargs, numbers, count_labels=selects, behind_prefix=False)
        numbers.fetch()
        if builder.several_per_row or not (selects or builder.saves_rows):
            if builder.several_per_row and selects:
                self.notice("position_ids", "rows contain several sequences; all logits are computed")
            return None
        kwargs["use_cache"] = False
        packed = PackedBatch(builder.build().to(tokens_of(kwargs).device))
        if self.packer.head_runs_on_rows():
            self.pack_logits(packed, kwargs, numbers)
        return packed

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: also adopt an adapter that was added since the last call."""
        self.source.adopt(self)
        return super().before_forward(module, args, kwargs)
