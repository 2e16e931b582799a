# SPDX-License-Identifier: Apache-2.0
"""Ways to compute prefix attention, ours and our peers'. Each takes q, k, v, prefix_k, prefix_v and returns out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern

Provider = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def peftkern_auto(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """This package."""
    return peftkern.prefix_attention(q, k, v, prefix_k, prefix_v)


def peft(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """As PEFT and transformers do it: the prefix expanded over the batch, concatenated, heads repeated, a mask."""
    batch, num_heads, q_len, _ = q.shape
    group, prefix_len, cached = num_heads // k.shape[1], prefix_k.shape[-2], k.shape[2] - q_len
    k, v = (
        torch.cat([prefix.to(q.dtype)[None].expand(batch, -1, -1, -1), x], 2).repeat_interleave(group, 1)
        for prefix, x in ((prefix_k, k), (prefix_v, v))
    )
    mask = torch.ones(q_len, k.shape[2], dtype=torch.bool).tril(prefix_len + cached)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(batch, 1, -1, -1))


def no_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """torch's causal attention of the sequence alone: less work, the price of a model without a prefix."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


#: By the name that tables show. ``no_prefix`` computes something else and is a yardstick only.
PROVIDERS: dict[str, Provider] = {"peftkern": peftkern_auto, "PEFT": peft, "no prefix": no_prefix}
