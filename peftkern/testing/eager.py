# SPDX-License-Identifier: Apache-2.0
"""Prefix attention as a model's eager code computes it: the alternative whose errors the tests compare with ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention with products in q's dtype, softmax in fp32, and weights rounded to q's dtype.

    As in PEFT, the prefix is expanded over the batch and concatenated with the sequence. Arguments whose gradients
    are sums over the batch (prefix, biases, sinks, gate) may be fp64. They are rounded after the expansion, so that
    their gradients are exact sums of rounded terms. A sum in fp32 comes close to that.

    Args:
        q, k, v, prefix_k, prefix_v: as in :func:`peftkern.prefix_attention`.
        options: its other keyword arguments, except ``return_lse`` and ``backend``.

    Returns:
        (out [B, Hq, S, D_v] in q's dtype, lse [B, Hq, S] fp32).
    """
    dtype, fp = q.dtype, torch.float32
    numbers = {name: options.get(name) for name in ("scale", "softcap", "window", "gate", "sinks")}
    scale = q.shape[-1] ** -0.5 if numbers["scale"] is None else numbers["scale"]
    group = q.shape[1] // k.shape[1]
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    ids, lens, starts = (options.get(f"prefix_{name}") for name in ("ids", "lens", "starts"))
    if ids is not None and (ids.dim() == 2 or starts is not None):
        prefix_k, prefix_v, ids, lens = reference.one_prefix_each(prefix_k, prefix_v, k, v, ids, lens, starts)
    bank, _, prefix_len, _ = prefix_k.shape
    batch, num_heads, q_len, _ = q.shape
    kv_len = k.shape[2]

    def joined(prefix: Tensor, sequence: Tensor) -> Tensor:
        prefix = prefix.transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0).expand(batch, -1, -1, -1)
        return torch.cat([prefix.to(dtype), sequence.repeat_interleave(group, 1)], 2)

    scores = q @ joined(prefix_k, k).transpose(-1, -2) * scale
    if numbers["softcap"]:
        scores = torch.tanh(scores / numbers["softcap"]) * numbers["softcap"]
    prefix_scores, seq_scores = scores.split([bank * prefix_len, kv_len], -1)
    if options.get("bias") is not None:
        seq_scores = seq_scores + options["bias"].expand_as(seq_scores).to(dtype)
    if options.get("prefix_bias") is not None:
        prefix_bias = options["prefix_bias"].expand(-1, prefix_len).repeat(1, bank)
        prefix_scores = prefix_scores + prefix_bias[:, None, :].expand_as(prefix_scores).to(dtype)
    seq_visible, prefix_visible = reference.visibility(
        (batch, q_len, kv_len, bank, prefix_len), q.device, options.get("causal", True), options.get("key_mask"),
        options.get("cu_seqlens"), ids, lens, numbers["window"], options.get("prefix_in_window", True),
    )  # fmt: skip
    seq_scores = seq_scores.masked_fill(~seq_visible, -torch.inf)
    prefix_scores = prefix_scores.masked_fill(~prefix_visible.flatten(3), -torch.inf)
    none = torch.full((batch, num_heads, q_len, 1), -torch.inf)
    sinks = none if numbers["sinks"] is None else numbers["sinks"][:, None, None].expand_as(none).to(fp)

    def weights_of(scores: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = reference.softmax_with_sink(scores.to(fp), extra)
        return weights[..., :-1].to(dtype), lse

    if numbers["gate"] is None:
        weights, lse = weights_of(torch.cat([prefix_scores, seq_scores], -1), sinks)
    else:
        seq_weights, lse = weights_of(seq_scores, sinks)
        prefix_weights, _ = weights_of(prefix_scores, none)
        gate = torch.tanh(numbers["gate"])[:, None, None].expand_as(prefix_weights).to(dtype)
        weights = torch.cat([prefix_weights * gate, seq_weights], -1)
    p = options.get("dropout_p", 0.0)
    if p:
        shape, seed = (batch, num_heads, q_len), torch.as_tensor(options["dropout_seed"])
        prefix_keep = reference.dropout_keep(seed, (*shape, prefix_len), p, 1).repeat(1, 1, 1, bank)
        keep = torch.cat([prefix_keep, reference.dropout_keep(seed, (*shape, kv_len), p, 0)], -1)
        weights = weights * keep / (1 - p)
    return weights @ joined(prefix_v, v), lse
