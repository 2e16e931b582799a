# SPDX-License-Identifier: Apache-2.0
"""The specification run as a backend: eager PyTorch on any device, with the backward in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs, lse_dtype


def why_not(call: Call) -> list[str]:
    """Nothing is beyond the reference."""
    return []


@torch.no_grad()
def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    out, lse = allocate_outputs(args)
    values = reference.prefix_attention(**args._asdict())
    out.copy_(values[0])
    lse.copy_(values[1])
    return out, lse


@torch.no_grad()
def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    """The closed form, for each part (prefix, sequence) of the keys; all in fp32, or fp64.

    ::

        p  = softmax(s)                w  = p * keep / (1 - dropout_p)      dv = w^T dout
        dp = (dout v^T) * keep / (1 - dropout_p)
        ds = p * (dp - delta + dlse)   delta = sum over all keys of p * dp
        dq = scale * ds k              dk = scale * ds^T q                  dbias = ds

    with ds times 1 - (softcapped score / softcap)^2 before dq and dk. A gated prefix has a softmax of its own: its
    delta, dout times tanh(gate), no dlse. (Dao et al., FlashAttention, 2022, appendix B.4.) The softmax is computed
    again and not read off the saved lse, whose rounding in fp32 would be that of p at large scores.
    """
    fp = lse_dtype(args.q.dtype)
    prefix_k, prefix_v = args.prefix_k, args.prefix_v
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    bank, num_kv_heads, prefix_len, _ = prefix_k.shape
    batch, num_heads, q_len, _ = args.q.shape
    kv_len, heads = args.k.shape[2], (num_kv_heads, num_heads // num_kv_heads)

    def as_keys(x: Tensor) -> Tensor:  # [A, Hkv, P, D] -> [1, Hkv, A*P, D]: visibility keeps the prefixes apart
        return x.to(args.q.dtype).to(fp).transpose(0, 1).flatten(1, 2)[None]

    q, dout = (x.to(fp).unflatten(1, heads) for x in (args.q, dout))  # [B, Hkv, G, S, D]
    seq_visible, prefix_visible = reference.visibility(
        (batch, q_len, kv_len, bank, prefix_len), q.device, args.causal, args.key_mask, args.cu_seqlens,
        args.prefix_ids, args.prefix_lens, args.window, args.prefix_in_window,
    )  # fmt: skip
    prefix_bias = None if args.prefix_bias is None else args.prefix_bias.expand(-1, prefix_len).repeat(1, bank)
    keep = [torch.ones((), dtype=fp, device=q.device)] * 2
    if args.dropout_seed is not None:
        shape = (batch, num_heads, q_len)
        keep = [
            reference.dropout_keep(args.dropout_seed, (*shape, n), args.dropout_p, part) / (1 - args.dropout_p)
            for part, n in enumerate((kv_len, prefix_len))
        ]
        keep[1] = keep[1].repeat(1, 1, 1, bank)
    seq = _Part.of(q, args.k.to(fp), args.v.to(fp), args, args.bias, seq_visible, keep[0])
    prefix = _Part.of(
        q, as_keys(prefix_k), as_keys(prefix_v), args,
        None if prefix_bias is None else prefix_bias[:, None, :], prefix_visible.flatten(3), keep[1],
    )  # fmt: skip

    none = q.new_full((num_heads,), -torch.inf)
    sinks = (none if args.sinks is None else args.sinks)[:, None, None].expand(batch, num_heads, q_len, 1)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    gradients = dict.fromkeys(AttentionGradients._fields, torch.empty(0))
    if args.gate is None:
        p, _ = reference.softmax(torch.cat([prefix.scores, seq.scores, sinks], -1))
        p_prefix, p_seq, p_sink = p.split([bank * prefix_len, kv_len, 1], -1)
        dp_seq, dp_prefix = seq.dp(dout), prefix.dp(dout)
        shift = dlse - (p_seq * dp_seq).sum(-1) - (p_prefix * dp_prefix).sum(-1)
        prefix_dout, prefix_shift = dout, shift
    else:
        gate = torch.tanh(args.gate)
        prefix_dout = dout * gate.unflatten(0, heads)[:, :, None, None]
        p_seq, p_sink = reference.softmax(torch.cat([seq.scores, sinks], -1))[0].split([kv_len, 1], -1)
        p_prefix = reference.softmax(torch.cat([prefix.scores, torch.full_like(sinks, -torch.inf)], -1))[0][..., :-1]
        dp_seq, dp_prefix = seq.dp(dout), prefix.dp(prefix_dout)
        shift, prefix_shift = dlse - (p_seq * dp_seq).sum(-1), -(p_prefix * dp_prefix).sum(-1)
        gradients["dgate"] = (p_prefix * prefix.dp(dout)).sum((0, 2, 3)) * (1 - gate * gate)
    if args.sinks is not None:
        gradients["dsinks"] = (p_sink.squeeze(-1) * shift).sum((0, 2))

    ds_seq, ds_prefix = p_seq * (dp_seq + shift[..., None]), p_prefix * (dp_prefix + prefix_shift[..., None])
    if args.bias is not None:
        gradients["dbias"] = ds_seq.sum_to_size(args.bias.shape)
    if args.prefix_bias is not None:
        by_slot = ds_prefix.unflatten(3, (bank, prefix_len)).sum((0, 2, 3))
        gradients["dprefix_bias"] = by_slot.sum_to_size(args.prefix_bias.shape)
    dq_seq, gradients["dk"], gradients["dv"] = seq.gradients(q, dout, p_seq, ds_seq)
    dq_prefix, *dprefix = prefix.gradients(q, prefix_dout, p_prefix, ds_prefix)
    gradients["dq"] = dq_seq + dq_prefix
    for name, x in zip(("dprefix_k", "dprefix_v"), dprefix, strict=True):
        x = x.sum(0).unflatten(1, (bank, prefix_len)).transpose(0, 1)
        gradients[name] = x if args.prefix_k.dim() == 4 else x[0]

    result = allocate_gradients(args, needs)
    for target, need, name in zip(result, needs, result._fields, strict=True):
        if need and target.numel():
            target.copy_(gradients[name])
    return result


class _Part(NamedTuple):
    """One part of the keys: k, v [B or 1, Hkv, N, D], scores [B, Hq, S, N] (-inf if hidden), d score / d (q k)."""

    k: Tensor
    v: Tensor
    scores: Tensor
    slope: Tensor | float
    keep: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, bias: Tensor | None, visible: Tensor, keep: Tensor
    ) -> _Part:
        scores = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * args.scale
        slope: Tensor | float = args.scale
        if args.softcap:
            capped = torch.tanh(scores / args.softcap)
            scores, slope = capped * args.softcap, (1 - capped * capped) * args.scale
        if bias is not None:
            scores = scores + bias
        return cls(k, v, scores.masked_fill(~visible, -torch.inf), slope, keep)

    def dp(self, dout: Tensor) -> Tensor:
        return (dout @ self.v.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * self.keep

    def gradients(self, q: Tensor, dout: Tensor, p: Tensor, ds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq [B, Hq, S, D]; dk, dv [B, Hkv, N, D], summed over the heads that share them."""
        heads = q.shape[1:3]
        ds, w = (x.unflatten(1, heads) for x in (ds * self.slope, p * self.keep))
        dq = (ds @ self.k.unsqueeze(2)).flatten(1, 2)
        return dq, (ds.transpose(-1, -2) @ q).sum(2), (w.transpose(-1, -2) @ dout).sum(2)


@torch.no_grad()
def soft_prompt_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> Tensor:
    return reference.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    fp, prefix_len = lse_dtype(weight.dtype), prompt.shape[-2]
    dweight, dprompt = (
        x.new_zeros(x.shape if need else 0, dtype=fp) for x, need in zip((weight, prompt), needs, strict=True)
    )
    if needs[0]:
        rows = dout[:, prefix_len:].to(fp).flatten(0, 1)
        dweight.index_put_((input_ids.flatten(),), rows, accumulate=True)
    if needs[1]:
        rows = dout[:, :prefix_len].to(fp)
        if prompt_ids is None:
            dprompt.copy_(rows.sum(0))
        else:
            dprompt.index_put_((prompt_ids,), rows, accumulate=True)
    return dweight, dprompt
