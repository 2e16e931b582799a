# SPDX-License-Identifier: Apache-2.0
"""CPU stand-ins for the ops of torch that only a GPU has, with the conventions that set them apart.

Each has the signature of the op whose name it bears, refuses what the op refuses, and computes in fp64, so that what
is left of the error is the rounding of its outputs. ``ROWS`` are the rows of ``torch_attention.KERNELS`` on top of
them.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
from torch import Tensor

from peftkern.backends import torch_attention


def _visible(q_len: int, kv_len: int, causal: bool, top_left: bool, left: int | None, right: int | None) -> Tensor:
    distance = torch.arange(q_len)[:, None] + (0 if top_left else kv_len - q_len) - torch.arange(kv_len)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= distance >= -right
    return visible


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, softcap: float) -> Tensor:
    """[B, H, S, T] in fp64 of q, k [B, H, S or T, D]; key heads may be fewer."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return scores if bias is None else scores + bias.double()


def _forward(q, k, v, scale, visible, bias=None, softcap=0.0) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64, with NaN and +inf where nothing is visible."""
    scores = _scores(q, k, scale, bias, softcap).masked_fill(~visible, -torch.inf)
    out = torch.softmax(scores, -1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    lse = torch.logsumexp(scores, -1)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def _backward(dout, q, k, v, out, lse, scale, visible, bias=None, softcap=0.0) -> tuple[Tensor, Tensor, Tensor]:
    """From the given out and lse alone, as every flash attention does."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    scores = _scores(q, k, scale, bias, softcap)
    p = torch.exp(scores.masked_fill(~visible, -torch.inf) - lse.double()[..., None])
    dp = dout.double() @ v.double().repeat_interleave(group, 1).transpose(-1, -2)
    ds = p * (dp - (dout.double() * out.double()).sum(-1, keepdim=True)) * scale
    if softcap:
        ds = ds * (1 - (scores / softcap) ** 2)
    dq = ds @ k.double().repeat_interleave(group, 1)
    dk, dv = ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ dout.double()
    return dq, *(x.unflatten(1, (heads, group)).sum(2) for x in (dk, dv))


def _as(x: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(x)


def _check_dense(*xs: Tensor, dtypes: tuple[torch.dtype, ...], multiple: int) -> None:
    for x in xs:
        assert x.dtype in dtypes, f"dtype {x.dtype}"
        assert x.stride(-1) == 1, "the last dim is not dense"
        assert x.shape[-1] % multiple == 0, f"head dim {x.shape[-1]}"
        assert x.numel(), "an empty tensor"


#: The blocks of 128 rows that variable-length kernels have launched per head, and those that hold rows.
blocks = {"launched": 0, "needed": 0}


def _sequences(
    cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[slice, slice, slice]]:
    """(batch entries, rows, keys) that one dense attention covers, of q [B, S, H, D], or of packed q [S, H, D]."""
    if cum_q is None:
        return [(slice(None), slice(None), slice(None))]
    assert cum_q.dtype == cum_k.dtype == torch.int32
    (starts, ends), (first_keys, last_keys) = ((x[:-1].tolist(), x[1:].tolist()) for x in (cum_q, cum_k))
    blocks["launched"] += len(starts) * math.ceil(max_q / 128)
    blocks["needed"] += sum(math.ceil((b - a) / 128) for a, b in zip(starts, ends, strict=True))
    assert all(b - a <= max_q for a, b in zip(starts, ends, strict=True)), "a sequence is longer than max_q"
    assert all(b - a <= max_k for a, b in zip(first_keys, last_keys, strict=True)), "keys beyond max_k"
    ranges = zip(starts, ends, first_keys, last_keys, strict=True)
    return [(slice(None), slice(a, b), slice(c, d)) for a, b, c, d in ranges if a < b]


def flash_forward(q, k, v, lengths, scale, causal, left, right, softcap=0.0) -> tuple[Tensor, Tensor]:
    """(out, lse) of every FlashAttention: [B, S, H, D] and [B, H, S], or [S, H, D] and [H, S] if packed.

    ``lengths`` are the offsets of queries and of keys, or None, and the largest lengths of both.
    """
    _check_dense(q, k, v, dtypes=(torch.float16, torch.bfloat16), multiple=8)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "the kernel has one head dim"
    packed, out = lengths[0] is not None, torch.empty(q.shape, dtype=q.dtype)
    q, k, v, o = (x[None] if packed else x for x in (q, k, v, out))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.inf)
    for entries, rows, keys in _sequences(*lengths):
        qs, ks, vs = (x[entries, n].transpose(1, 2) for x, n in ((q, rows), (k, keys), (v, keys)))
        visible = _visible(qs.shape[2], ks.shape[2], causal, False, left, right)
        result, statistics = _forward(qs, ks, vs, scale, visible, softcap=softcap)
        o[entries, rows] = result.transpose(1, 2).to(o.dtype)
        lse[entries, :, rows] = statistics.float()
    return out, lse[0] if packed else lse


def flash_backward(dout, q, k, v, out, lse, lengths, scale, causal, left, right, softcap=0.0) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of every FlashAttention, laid out as its inputs are."""
    assert lse.is_contiguous(), "the kernel reads a raw pointer"
    assert lse.dtype == torch.float32
    assert len({x.dtype for x in (dout, q, k, v, out)}) == 1
    assert len({x.shape[-1] for x in (dout, q, k, v, out)}) == 1, "the kernel has one head dim"
    packed = lengths[0] is not None
    q, k, v, o, do = (x[None] if packed else x for x in (q, k, v, out, dout))
    lse = lse[None] if packed else lse
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for entries, rows, keys in _sequences(*lengths):
        parts = [x[entries, n].transpose(1, 2) for x, n in ((q, rows), (k, keys), (v, keys), (o, rows), (do, rows))]
        visible = _visible(parts[0].shape[2], parts[1].shape[2], causal, False, left, right)
        values = _backward(parts[4], *parts[:4], lse[entries, :, rows], scale, visible, softcap=softcap)
        for target, n, x in zip(gradients, (rows, keys, keys), values, strict=True):
            target[entries, n] = x.transpose(1, 2).to(target.dtype)
    return tuple(x[0] if packed else x for x in gradients)


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert dropout_p == 0.0
    assert not return_debug_mask
    window = window_size_left, window_size_right
    lengths = cum_seq_q, cum_seq_k, max_q, max_k
    out, lse = flash_forward(query, key, value, lengths, scale, is_causal, *window)
    return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)


def flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert rng_state.dtype == torch.uint64
    window = window_size_left, window_size_right
    lengths = cum_seq_q, cum_seq_k, max_q, max_k
    return flash_backward(grad_out, query, key, value, out, logsumexp, lengths, scale, is_causal, *window)


def cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    _check_dense(query, key, value, dtypes=(torch.float16, torch.bfloat16), multiple=8)
    assert compute_log_sumexp
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype
        assert attn_bias.shape[1] == 1 or attn_bias.stride(1) > 0, "heads are broadcast by size"
    visible = _visible(query.shape[2], key.shape[2], is_causal, True, None, None)
    out, lse = _forward(query, key, value, scale, visible, attn_bias)
    result = query.new_empty(*query.shape[:3], value.shape[-1]) if value.shape[-1] != query.shape[-1] else query
    return _as(out, result), lse.float()[..., None], None, None, *query.shape[2:3], *key.shape[2:3], None, None, None


def cudnn_attention_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale,
):  # fmt: skip
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert (cum_seq_q, cum_seq_k, max_q, max_k) == (None, None, query.shape[2], key.shape[2])
    visible = _visible(query.shape[2], key.shape[2], is_causal, True, None, None)
    values = _backward(grad_out, query, key, value, out, logsumexp[..., 0], scale, visible, attn_bias)
    return tuple(_as(x, like) for x, like in zip(values, (query, key, value), strict=True))


def _check_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    _check_dense(q, k, v, dtypes=(torch.float32, torch.float16, torch.bfloat16), multiple=8)
    assert q.shape[1] == k.shape[1] == v.shape[1], "the kernel knows no grouped heads"
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.dtype == q.dtype
        assert all(s % 8 == 0 for s in bias.stride()[:3]), "bias is not correctly aligned"


def efficient_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale):
    _check_efficient(query, key, value, attn_bias)
    visible = _visible(query.shape[2], key.shape[2], is_causal, True, None, None)
    out, lse = _forward(query, key, value, scale, visible, attn_bias)
    batch, heads, q_len, _ = query.shape
    padded = torch.full((batch, heads, math.ceil(q_len / 32) * 32), torch.nan)
    padded[..., :q_len] = lse
    result = query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    return result.copy_(out), padded, torch.zeros(()), torch.zeros(())


def efficient_attention_backward(
    grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,
    is_causal=False, *, scale,
):  # fmt: skip
    _check_efficient(query, key, value, attn_bias)
    q_len = query.shape[2]
    assert logsumexp.shape[2] == math.ceil(q_len / 32) * 32
    assert all(s % 8 == 0 for s in logsumexp.stride()[:2]), "LSE is not correctly aligned"
    assert (logsumexp[..., q_len:] == torch.inf).all(), "rows that do not exist must have p = 0"
    assert grad_input_mask == [True, True, True, False]
    visible = _visible(q_len, key.shape[2], is_causal, True, None, None)
    values = _backward(grad_out_, query, key, value, out, logsumexp[..., :q_len], scale, visible, attn_bias)
    return *(
        like.new_empty(x.transpose(1, 2).shape).transpose(1, 2).copy_(x)
        for x, like in zip(values, (query, key, value), strict=True)
    ), None


OPS = SimpleNamespace(
    _flash_attention_forward=flash_attention_forward,
    _flash_attention_backward=flash_attention_backward,
    _scaled_dot_product_cudnn_attention=cudnn_attention,
    _scaled_dot_product_cudnn_attention_backward=cudnn_attention_backward,
    _scaled_dot_product_efficient_attention=efficient_attention,
    _scaled_dot_product_efficient_attention_backward=efficient_attention_backward,
    _scaled_dot_product_flash_attention_for_cpu=torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    _scaled_dot_product_flash_attention_for_cpu_backward=(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    ),
)

_TABLE = {row.name: row for row in torch_attention.KERNELS}

ROWS = {
    **{name: dataclasses.replace(row.on_any_machine(), device="cpu") for name, row in _TABLE.items()},
}


def install(monkeypatch, name: str) -> torch_attention.AttentionKernel:
    """Make the row called ``name`` the only one there is."""
    monkeypatch.setattr(torch_attention, "_aten", OPS)
    monkeypatch.setattr(torch_attention, "KERNELS", [ROWS[name]])
    return ROWS[name]
