# SPDX-License-Identifier: Apache-2.0
"""Decides whether the rows of a call share text (:mod:`.sharing`), with one host synchronisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .layout import Layout, LayoutBuilder
from .packer import Packer, innermost
from .sharing import most_saved, share_rows

__all__ = ["Sharer"]

#: A batch runs as usual unless sharing leaves at most this part of its rows.
MAX_ROWS = 0.9

#: Arguments of a call whose values decide what is shared.
_READ = ("input_ids", "attention_mask", "position_ids", "labels")

#: Packages whose hooks treat rows one by one.
_BY_ROW = ("transformers.", "peft.", "accelerate.", "torch.", "deepspeed.", "peftkern.")

#: Packages whose hooks on the token embeddings treat equal tokens equally. NEFTune of transformers does not.
_EQUAL = ("transformers.modeling_utils", "peft.", "accelerate.", "torch.", "peftkern.")


class Sharer:
    """Finds the text that the rows of a call share.

    Args:
        packer: of the model.

    Attributes:
        rows: rows that the last call would have run as usual, and those that it ran; None if it shared nothing.
        reason: why the last call shared nothing; empty if it did.
        num_calls, num_shared: the number of calls so far, and of those that shared text.
        saved_rows: rows that these have not run.
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.rows: tuple[int, int] | None = None
        self.reason = "no call yet"
        self.num_calls = self.num_shared = self.saved_rows = 0
        backbone, embedding = packer.backbone, packer.base.get_input_embeddings()
        self._layers = [module for module in backbone.modules() if module is not backbone and module is not embedding]

    def on_host(self, kwargs: Mapping[str, Any], **groups: Tensor | None) -> dict[str, Any] | None:
        """The arguments of a call, those on the CPU whose values decide what is shared; None if it cannot share rows.

        Args:
            kwargs: of the call; they describe the sequence alone.
            groups: names and tensors [B]. Rows share text only where all of these are equal. The result contains them
                and, as ``groups``, [B, G] of all that are given.
        """
        self.skip(self._why_not(kwargs) or "")
        if self.reason:
            return None
        tensors = {name: kwargs[name] for name in _READ if isinstance(kwargs.get(name), Tensor)}
        given = {name: x for name, x in groups.items() if x is not None}
        _check_groups(given.get("group_ids"), kwargs["input_ids"].shape[0])
        host = _to_host(tensors | given)
        host["groups"] = torch.stack([host[name].long() for name in given], 1) if given else None
        return {**kwargs, **host}

    def skip(self, reason: str) -> None:
        """Record a call that shares nothing for this reason; empty if it may share text."""
        self.rows, self.reason = None, reason
        if not torch.compiler.is_compiling():  # a number that changes would be traced again
            self.num_calls += 1

    def _why_not(self, kwargs: Mapping[str, Any]) -> str | None:
        ids: Tensor | None = kwargs.get("input_ids")
        if ids is None:
            return "it was called with inputs_embeds"
        if is_tracing(ids):
            return "torch.compile traced it; compile the layers of the model instead"
        if (reason := self.packer.why_unpackable(kwargs)) is not None:
            return reason
        if self.packer.around.is_given(kwargs):
            return "it has inputs other than text, which are not compared"
        embedding = self.packer.base.get_input_embeddings()
        if _has_hooks(embedding, _EQUAL) or innermost(embedding.forward) is not type(embedding).forward:
            return "hooks on the token embeddings may change equal tokens differently"
        if any(_has_hooks(module, _BY_ROW) for module in self._layers):
            return "hooks on layers may read the batch, which they would not see"
        return None

    def is_hopeless(self, host: Mapping[str, Any]) -> bool:
        """Whether the rows of a call certainly share too little; a fast answer for most batches without shared text.

        Args:
            host: arguments of the call, as :meth:`on_host` returned them.
        """
        ids, mask = host["input_ids"], host.get("attention_mask")
        if mask is None and host.get("position_ids") is not None:  # several sequences in a row
            return False
        num_tokens = ids.numel() if mask is None else int((mask != 0).sum())
        if num_tokens - most_saved(ids, mask) <= MAX_ROWS * ids.numel():
            return False
        self.reason = "its rows share too little text"
        return True

    def build(self, builder: LayoutBuilder, host: Mapping[str, Any], usual_rows: int | None = None) -> Layout:
        """The layout of a call on the CPU, with shared rows where this saves enough.

        Args:
            builder: of the layout, made of ``host``; its numbers have been fetched.
            host: arguments of the call, as :meth:`on_host` returned them.
            usual_rows: rows that the call runs without sharing; default: those of the layout without it.
        """
        layout = builder.build()
        usual_rows = layout.num_rows if usual_rows is None else usual_rows
        ids, labels = host["input_ids"], host.get("labels")
        per_token = labels is not None and labels.shape == ids.shape
        groups = host["groups"]
        if groups is not None:
            groups = groups.unique(dim=0, return_inverse=True)[1]
        shared = share_rows(layout, ids, groups, labels if per_token else None)
        if shared is None:
            self.reason = "its rows share too little text"
            return layout
        if shared.num_rows > MAX_ROWS * usual_rows:
            self.reason = f"sharing would run {shared.num_rows} rows instead of {usual_rows}"
            return layout
        self.rows = usual_rows, shared.num_rows
        self.num_shared += 1
        self.saved_rows += usual_rows - shared.num_rows
        return shared

    def explain(self) -> str:
        """What the last call shared, and all calls together."""
        last = f"shared none: {self.reason}"
        if self.rows is not None:
            last = f"ran {self.rows[1]} rows instead of {self.rows[0]}"
        text = f"text that rows share runs once; the last call {last}"
        if self.num_calls <= 1:
            return text
        return f"{text}; {self.num_shared} of {self.num_calls} calls shared text and saved {self.saved_rows} rows"


def _check_groups(ids: Any, samples: int) -> None:
    """Raise ValueError unless ``group_ids`` are integers [B]."""
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != (samples,):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise ValueError(f"group_ids: expected integers [{samples}], one per row, got {got}")


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Integer tensors on the CPU, with one transfer."""
    if all(x.device.type == "cpu" for x in tensors.values()):
        return {**tensors}
    device = next(x.device for x in tensors.values() if x.device.type != "cpu")
    flat = torch.cat([x.to(device).flatten().long() for x in tensors.values()]).cpu()
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(tensors.items(), parts, strict=True)}


def _has_hooks(module: nn.Module, known: tuple[str, ...]) -> bool:
    """Whether a module has forward hooks of packages other than the known ones."""
    hooks = module._forward_pre_hooks, module._forward_hooks
    if not any(hooks):
        return False
    functions = [getattr(hook, "func", hook) for found in hooks for hook in found.values()]
    return not all((getattr(function, "__module__", None) or "").startswith(known) for function in functions)
