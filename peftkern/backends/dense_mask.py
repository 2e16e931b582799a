# SPDX-License-Identifier: Apache-2.0
"""Dense masks for kernels that have no argument for a feature: bool visibility and additive masks.

Written independently of :mod:`peftkern.reference`, so that one mistake cannot hide in both; the tests compare it with
a loop over elements.

All layers of a forward pass the same ``key_mask`` and offsets, and the backward as well. Where the caller has marked
them as :func:`~peftkern.arguments.constant`, their masks are built once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import AttentionArgs
from .derived import derived


class Visibility(NamedTuple):
    """Which query sees which key, as bool tensors.

    ``sequence`` is broadcastable to [B, Hq, S, T], ``prefix`` to [B, Hq, S, P]: the tokens of the one prefix that a
    query's sequence has.
    """

    sequence: Tensor
    prefix: Tensor


def visibility(args: AttentionArgs) -> Visibility:
    """The visibility that causality, window, padding, packing and the bank's indices define."""
    starts = _starts(args)
    return Visibility(_sequence_visibility(args, starts), _prefix_visibility(args, starts))


def _starts(args: AttentionArgs) -> Tensor | None:
    """For each of the S packed queries the offset at which its sequence starts [S], or None without packing."""
    if args.cu_seqlens is None:
        return None
    lengths = args.cu_seqlens.diff()
    return args.cu_seqlens[:-1].repeat_interleave(lengths, output_size=args.q.shape[2])


def _sequence_visibility(args: AttentionArgs, starts: Tensor | None) -> Tensor:
    q_len, kv_len, device = args.q.shape[2], args.k.shape[2], args.q.device
    # how many keys a query is behind: 0 for its own, negative for later ones; the last query has the last key
    behind = torch.arange(kv_len - q_len, kv_len, device=device)[:, None] - torch.arange(kv_len, device=device)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if args.causal:
        visible &= behind >= 0
    if args.window is not None:
        visible &= behind < args.window
    if starts is not None:
        visible &= starts[:, None] == starts
    visible = visible[None, None]
    return visible if args.key_mask is None else visible & args.key_mask[:, None, None, :]


def _prefix_visibility(args: AttentionArgs, starts: Tensor | None) -> Tensor:
    q_len, prefix_len, device = args.q.shape[2], args.prefix_k.shape[-2], args.q.device
    ids = args.prefix_ids
    if ids is not None and starts is not None:  # [n] of the packed sequences -> [1, S, 1] of their queries
        assert args.cu_seqlens is not None
        ids = ids.repeat_interleave(args.cu_seqlens.diff(), output_size=q_len)[None, :, None]
    elif ids is not None:
        ids = ids[:, None, None]  # [B, 1, 1]

    length: Tensor | int = prefix_len  # of the query's prefix
    if ids is not None and args.prefix_lens is not None:
        length = args.prefix_lens[ids.clamp(min=0)]
    tokens = torch.arange(prefix_len, device=device)
    if isinstance(length, int):
        visible = torch.ones(1, 1, prefix_len, dtype=torch.bool, device=device)
    else:
        visible = tokens < length
    if ids is not None:
        visible = visible & (ids >= 0)
    if args.window is not None and args.prefix_in_window:
        position = torch.arange(q_len, device=device) + args.k.shape[2] - q_len  # within the query's sequence
        if starts is not None:
            position = position - starts
        visible = visible & (position[:, None] + length - tokens < args.window)
    return visible[:, None]


def sequence_mask(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """The :func:`additive_mask` of the sequence's keys, with its empty rows."""
    return derived("sequence mask", (args.key_mask, args.cu_seqlens, args.bias), _sizes(args), lambda: additive_mask(
        _sequence_visibility(args, _starts(args)), args.bias, args.q, args.k.shape[2]
    ))  # fmt: skip


def joined_mask(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """The :func:`additive_mask` of [prefix | sequence], with its empty rows."""

    def build() -> tuple[Tensor, Tensor]:
        visible = visibility(args)
        keys = args.prefix_k.shape[-2] + args.k.shape[2]
        return additive_mask(_side_by_side(visible.prefix, visible.sequence), _joined_bias(args), args.q, keys)

    tensors = (args.key_mask, args.cu_seqlens, args.prefix_ids, args.prefix_lens, args.bias, args.prefix_bias)
    return derived("joined mask", tensors, (*_sizes(args), args.prefix_k.shape[-2], args.prefix_in_window), build)


def _sizes(args: AttentionArgs) -> tuple[object, ...]:
    """What a mask of the sequence depends on besides tensors."""
    return args.q.shape[2], args.k.shape[2], args.causal, args.window, args.q.dtype, args.q.device


def additive_mask(visible: Tensor, bias: Tensor | None, q: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """An additive mask and its empty rows, from ``visible`` and ``bias``, both broadcastable to [B, Hq, S, T].

    The mask has q's dtype. Its rows are padded in memory to a multiple of 16 elements, as the CUDA ops require.

    Returns:
        (mask [B or 1, Hq or 1, S, T], empty [B or 1, Hq or 1, S]): ``empty`` marks the rows that see no key.
    """
    shape = torch.broadcast_shapes(visible.shape, () if bias is None else bias.shape, (q.shape[2], kv_len))
    mask = q.new_zeros(*shape[:-1], -(-kv_len // 16) * 16)[..., :kv_len]
    if bias is not None:
        mask += bias
    mask.masked_fill_(~visible, -torch.inf)
    return mask, (mask == -torch.inf).all(-1)


def _joined_bias(args: AttentionArgs) -> Tensor | None:
    """The biases of prefix and sequence, broadcastable to [B, Hq, S, P + T]."""
    if args.bias is None and args.prefix_bias is None:
        return None
    kv_len, prefix_len = args.k.shape[2], args.prefix_k.shape[-2]
    seq = args.q.new_zeros(1, 1, 1, kv_len) if args.bias is None else args.bias.expand(-1, -1, -1, kv_len)
    if args.prefix_bias is None:
        prefix = args.q.new_zeros(1, 1, 1, prefix_len)
    else:
        prefix = args.prefix_bias.expand(-1, prefix_len)[None, :, None]
    return _side_by_side(prefix, seq)


def _side_by_side(prefix: Tensor, seq: Tensor) -> Tensor:
    """[..., P + T] from two tensors that are broadcastable to each other except along the keys."""
    shape = torch.broadcast_shapes(prefix.shape[:-1], seq.shape[:-1])
    return torch.cat([x.expand(*shape, x.shape[-1]) for x in (prefix, seq)], -1)
