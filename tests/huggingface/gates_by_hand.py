# SPDX-License-Identifier: Apache-2.0
"""A stock model whose attention multiplies the exponentials of prefix tokens by their gates, written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peftkern import PrefixKV
from tests.huggingface import models
from tests.huggingface.models import Family

NAME = "gates by hand"


class GatesByHand:
    """Runs a stock model of a family with the gates of a prefix. Layers may have different lengths.

    Args:
        family: a causal model whose attention modules have a ``layer_idx``.
        prefix: its gates, keys and values are read at each call, with gradients.
        positions: of the first token of a sequence.
    """

    def __init__(self, family: Family, prefix: PrefixKV, positions: int) -> None:
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.model = models.base_model(family, torch.float64).requires_grad_(False)
        self.model.set_attn_implementation(NAME)
        self.prefix, self.positions = prefix, positions

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Any:
        """The output of a forward without a cache; positions count real tokens."""
        mask = torch.ones_like(ids) if mask is None else mask
        places = (mask.cumsum(1) - 1).clamp(min=0) + self.positions
        self.kv, self.gates = self.prefix.layer_kv(), self.prefix.gates()
        AttentionInterface.register(NAME, self._attention)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **inputs)

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        (prefix_k, prefix_v), gates = self.kv[module.layer_idx], self.gates[module.layer_idx]
        batch, heads, queries, dim = query.shape
        keys = torch.cat([prefix_k.expand(batch, -1, -1, -1), key], 2).repeat_interleave(heads // key.shape[1], 1)
        values = torch.cat([prefix_v.expand(batch, -1, -1, -1), value], 2).repeat_interleave(heads // key.shape[1], 1)
        scores = query @ keys.mT * (options.get("scaling") or dim**-0.5)
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        visible = (attention_mask.expand(batch, 1, -1, -1) == 0).to(scores.dtype)
        factors = torch.cat([gates.expand(batch, 1, queries, -1), visible], -1)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * factors
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        return (weights @ values).transpose(1, 2).contiguous(), None
