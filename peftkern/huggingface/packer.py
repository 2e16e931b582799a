# SPDX-License-Identifier: Apache-2.0
"""Decides whether, and how, the calls of a model are packed (:mod:`.packing`)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .around_text import AroundText, has_tensor, text_positions
from .call_arguments import BOUNDARIES, forward_arguments, tokens_of
from .head_trial import try_head
from .layout import IGNORED, HostNumbers, Layout, LayoutBuilder, next_labels
from .positions import PositionTable
from .survey import PrefixLayerInfo
from .trial import Trial

__all__ = ["Packer", "innermost"]

_PACKABLE = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "start_positions", "end_positions",
    "logits_to_keep", "num_items_in_batch", "prefix_ids", "prompt_ids",
)  # fmt: skip

#: Packages whose wrappers around a forward keep shapes (autocast, casts of outputs).
_TRANSPARENT = ("accelerate.", "torch.")


class Packer:
    """Decides how calls of one model are packed.

    Args:
        base: the Hugging Face model.
        backbone: the model in it that runs the layers.
        prefix_layers: its attention modules that read the prefix.
        tables: its tables of learned positions.
        recurrent: its layers with a state.

    Attributes:
        reasons: why the model cannot run packed batches; empty if it can.
        head_forward, head: the forward of the base model and its output layer, if the trial has shown that they work
            on packed rows; None if they need the unpacked batch.
        around: the parts of the model around the backbone.
        accepts_logits_to_keep: whether the base model takes ``logits_to_keep``, as causal language models do.
        packs_tokens: whether packed batches give the backbone tokens and not their embeddings, because it looks up
            other embeddings of the tokens too.
        has_windows: whether a layer has a sliding window.
        count_mask: whether positions count the tokens of the mask.
        unpacks_routers: whether the router logits of packed rows are unpacked for the auxiliary loss, which counts
            the tokens of the mask. It would count prompts too.
    """

    def __init__(
        self, base: PreTrainedModel, backbone: PreTrainedModel, prefix_layers: dict[nn.Module, PrefixLayerInfo],
        tables: list[PositionTable], recurrent: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.base = base
        self.backbone = backbone
        self.prefix_layers = prefix_layers
        self.around = AroundText(base, backbone)
        self.accepts_logits_to_keep = "logits_to_keep" in forward_arguments(base)
        self._tables = tables
        self._first_layer = _first_layer(backbone, prefix_layers)
        patterns = [info.pattern for info in prefix_layers.values()]
        self.has_windows = any(pattern is not None and pattern[1] is not None for pattern in patterns)
        self.count_mask = any(table.reads_mask for table in tables)
        self.unpacks_routers = False
        self.packs_tokens = False
        self.reasons = _reasons_against(base, backbone, prefix_layers)
        if recurrent:
            layers = f"layer{'s' * (len(recurrent) > 1)} {', '.join(map(str, recurrent))}"
            kind = type(backbone).__name__
            self.reasons.insert(0, f"{kind} is recurrent in {layers}, whose state would run across packed sequences")
        self.head_forward: Callable[..., Any] | None = None
        self.head: nn.Module | None = None

    def try_out(self, trial: Trial, *, prompts: bool = False, shared: bool = False) -> None:
        """Run packed batches of a few rows. Sets :attr:`reasons`, :attr:`head_forward` and :attr:`head`.

        Args:
            trial: a trial that has tried the prefix.
            prompts: also try packed batches that start with a prompt.
            shared: also try packed batches with text that rows share.
        """
        if self.reasons:
            return
        if (reason := self.around.why_unpackable()) is not None:
            self.reasons = [reason]
            return
        self.packs_tokens = trial.reads_tokens and not prompts
        inputs = {"as_tokens": self.packs_tokens, "replaces_tokens": not prompts}
        reason = trial.try_packed(self._layout_of, **inputs)
        if reason is not None and self.count_mask:  # a table may accept the mask without reading it
            self.count_mask = False
            reason = trial.try_packed(self._layout_of, **inputs)
        for table in self._tables:
            table.reads_mask &= self.count_mask
        if reason is None and prompts:
            reason = trial.try_prompt(self._layout_of)
        if reason is None and shared:
            reason = trial.try_shared(self._layout_of)
        if reason is not None:
            self.reasons = [reason]
            return
        shifts_labels = self.base.loss_function is ForCausalLMLoss
        if self.accepts_logits_to_keep and shifts_labels and try_head(self.base, trial):
            self.head_forward, self.head = type(self.base).forward, self.base.get_output_embeddings()

    def _layout_of(self, tokens: Tensor, mask: Tensor, from_first: bool) -> Layout:
        return Layout.of(
            (tokens.shape[0], tokens.shape[1]), tokens.device, mask=mask, keep_gaps=self.has_windows,
            from_first=from_first, count_mask=self.count_mask,
        )  # fmt: skip

    def head_runs_on_rows(self) -> bool:
        """Whether the output layer of the current call can run on packed rows.

        It can where the base model's own forward and loss run, which were tried at patch time. A replaced forward or
        loss, or hooks on the output layer, need the unpacked batch.
        """
        if self.head_forward is None or self.base.loss_function is not ForCausalLMLoss:
            return False
        head: Any = self.base.get_output_embeddings()
        if head is None or head._forward_hooks or head._forward_pre_hooks or head is not self.head:
            return False
        if type(self.base).forward is not self.head_forward or _has_foreign_hooks(self.backbone):
            return False
        return "forward" not in self.base.__dict__ or innermost(self.base.forward) is self.head_forward

    def why_head_needs_batch(self) -> str:
        """Why the output layer cannot run on packed rows."""
        kind = type(self.base).__name__
        return (
            f"{kind} computes its loss from the whole batch"
            if self.accepts_logits_to_keep
            else f"{kind} has no logits per token"
        )

    def why_unpackable(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why a call of the base model cannot be packed; None if it can.

        Args:
            kwargs: its arguments, which describe the sequence alone.
        """
        if self.reasons:
            return "; ".join(self.reasons)
        mask, position_ids, labels = (kwargs.get(name) for name in ("attention_mask", "position_ids", "labels"))
        told_by_positions = BOUNDARIES if mask is None and position_ids is not None else ()
        known = {*_PACKABLE, *told_by_positions, *self.around.inputs}
        for name, argument in kwargs.items():
            if has_tensor(argument) and name not in known:
                return f"{name} cannot be packed"
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "attention_mask is not [B, S]"
        if position_ids is not None and position_ids.dim() not in ((2, 3) if self.around.reads_more else (2,)):
            return "position_ids are not [B, S]"
        keep = kwargs.get("logits_to_keep")
        if labels is not None and self.accepts_logits_to_keep and labels.shape != tokens_of(kwargs).shape[:2]:
            return "labels are not [B, S]"
        if labels is not None and self.accepts_logits_to_keep and (isinstance(keep, Tensor) or keep):
            return "logits_to_keep is given together with labels"
        if kwargs.get("output_attentions", getattr(self.base.config, "output_attentions", False)):
            return "output_attentions are requested"
        wants_routers = kwargs.get("output_router_logits", getattr(self.base.config, "output_router_logits", False))
        if wants_routers and not self.unpacks_routers:
            return "output_router_logits are requested, whose loss counts prompts and padding"
        if self.packs_tokens and kwargs.get("inputs_embeds") is None and self._embedding_is_watched():
            return "hooks on the token embeddings would see packed tokens"
        return self.around.why_layers_need_samples(kwargs) or _why_layers_need_samples(self._first_layer)

    def _embedding_is_watched(self) -> bool:
        embedding: Any = self.backbone.get_input_embeddings()
        return bool(embedding._forward_hooks or embedding._forward_pre_hooks)

    def _has_trl_head(self) -> bool:
        """Whether TRL's fused output layer has replaced the base model's forward. It masks rows without a label."""
        forward = getattr(self.base.forward, "__func__", self.base.forward)
        return str(getattr(forward, "__globals__", {}).get("__name__", "")).startswith("trl.")

    def layout_builder(
        self,
        kwargs: Mapping[str, Any],
        numbers: HostNumbers,
        *,
        from_first: bool = False,
        pools_last_column: bool = False,
        count_labels: bool = False,
        without_padding: bool = False,
        behind_prefix: bool = True,
    ) -> LayoutBuilder:
        """Prepares the layout of a call's batch.

        Padding is removed where labels or ``logits_to_keep`` show that its outputs are not used.

        Args:
            kwargs: arguments of a call of the base model, which describe the sequence alone.
            numbers: collects the numbers that the host needs.
            from_first: a sequence starts at its first token instead of at column 0.
            pools_last_column: a classification head reads the last column.
            count_labels: also request the number of labels.
            without_padding: remove padding that has no label, even if nothing shows that its outputs are not used.
            behind_prefix: whether a prefix or prompt lies before the sequences.
        """
        tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        labels = kwargs.get("labels")
        keep_padding, needed = self._padding(kwargs, tokens, pools_last_column, without_padding)
        return LayoutBuilder(
            (tokens.shape[0], tokens.shape[1]), tokens.device, numbers, mask=mask,
            position_ids=text_positions(kwargs.get("position_ids"), mask), needed=needed, keep_padding=keep_padding,
            keep_gaps=self.has_windows, keep_lead=behind_prefix, from_first=from_first, count_mask=self.count_mask,
            pool_last=pools_last_column, labels=labels if count_labels else None,
        )  # fmt: skip

    def _padding(
        self, kwargs: Mapping[str, Any], tokens: Tensor, pools_last_column: bool, without_padding: bool
    ) -> tuple[bool, Tensor | None]:
        """(whether all padding is kept, bool [B, S] of padding that is kept otherwise)."""
        labels, loss_type = kwargs.get("labels"), getattr(self.base, "loss_type", None)
        shows_hidden = kwargs.get("output_hidden_states", getattr(self.base.config, "output_hidden_states", False))
        if tokens.shape[1] == 0 or (shows_hidden and not without_padding):
            return True, None
        if pools_last_column:
            return False, None
        if self.accepts_logits_to_keep and labels is not None:
            if not (without_padding or self.head_runs_on_rows() or self._has_trl_head()):
                return True, None
            return False, next_labels(labels) != IGNORED
        keep = kwargs.get("logits_to_keep")
        if self.accepts_logits_to_keep and isinstance(keep, int) and keep > 0 and not without_padding:
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            return False, (columns >= tokens.shape[1] - keep).expand(tokens.shape[:2])
        if loss_type == "ForTokenClassification" and labels is not None:
            return False, labels != IGNORED
        if loss_type == "ForSequenceClassification":  # pools the last token other than pad_token_id
            ids, pad = kwargs.get("input_ids"), self.base.config.get_text_config().pad_token_id
            if ids is not None and pad is not None:
                return False, ids != pad
        return not without_padding, None


def _reasons_against(
    base: PreTrainedModel, backbone: PreTrainedModel, prefix_layers: Mapping[nn.Module, PrefixLayerInfo]
) -> list[str]:
    """Why the model cannot run packed batches, as far as its code and config tell."""
    kind, reasons = type(backbone).__name__, []
    if backbone.config.is_encoder_decoder or base.config.is_encoder_decoder:
        reasons.append(f"{kind} reads a second sequence")
    if backbone.config.get_text_config() is not backbone.config:
        reasons.append(f"{kind} has inputs other than text")
    for name, model in ((kind, backbone), (type(base).__name__, base)):
        parameters = inspect.signature(type(model).forward).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            reasons.append(f"{name} does not accept additional keyword arguments")
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        reasons.append(f"{kind} takes no position_ids")
    for module, info in prefix_layers.items():
        if hasattr(module, "compute_bias"):
            reasons.append(f"{info.name} has relative position biases")
        elif info.pattern is None or not info.pattern[0]:
            reasons.append(f"{info.name} has a mask other than a causal one with at most a window")
        elif info.counts_rows:
            reasons.append(f"{info.name} counts positions itself")
        else:
            continue
        break
    return reasons


def _first_layer(backbone: nn.Module, readers: Mapping[nn.Module, PrefixLayerInfo]) -> nn.Module:
    """The first layer with an attention module that reads the prefix; the backbone if there is none."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) and any(m in readers for m in module[0].modules()):
            return module[0]
    return backbone


def _why_layers_need_samples(layer: nn.Module) -> str | None:
    """Why hooks of PEFT on a layer need the unpacked batch; None if there are none.

    Such hooks choose an adapter, or an offset, per sample. PEFT adds them to all of its layers, so checking one layer
    of the model is enough. If that layer has none, those of other layers raise on a packed batch.
    """
    if "peft" not in sys.modules or torch.compiler.is_compiling():
        return None
    for module in layer.modules():
        for hook in module._forward_pre_hooks.values():
            function = getattr(hook, "func", hook)
            if getattr(function, "__module__", "").startswith("peft."):
                return "adapter_names (or offsets) are given per sample, so layers need the unpacked batch"
    return None


def _has_foreign_hooks(backbone: nn.Module) -> bool:
    """Whether the backbone has forward hooks of other packages, which would see packed outputs."""
    if torch.compiler.is_compiling():
        return False
    homes = [getattr(hook, "__module__", "") or "" for hook in backbone._forward_hooks.values()]
    return any(not home.startswith(("peftkern.", "torch.")) for home in homes)


def innermost(function: Any) -> Any:
    """The function that wrappers which keep shapes finally call; any other wrapper itself."""
    while True:
        function = getattr(function, "__func__", function)
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return function
        # functools.wraps copies __module__, but not the globals in which the wrapper was defined.
        home = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
        if not home.startswith(_TRANSPARENT):
            return function
        function = wrapped
