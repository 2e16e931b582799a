# SPDX-License-Identifier: Apache-2.0
"""The specification as a backend: eager PyTorch on any device, with the backward in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs, lse_dtype
from .base import OnePlanBackend, Plan, Refusal
from .cost.model import Machine, Pass, embedding_passes, sizes_of


class ReferencePlan(Plan):
    """Runs :mod:`peftkern.reference` and differentiates it in closed form."""

    name = "reference"
    reads_chains = True

    @torch.no_grad()
    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        out, lse = allocate_outputs(args)
        values = reference.prefix_attention(**args.without_hints())
        out.copy_(values[0])
        lse.copy_(values[1])
        return out, lse

    @torch.no_grad()
    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        gradients = _attention_gradients(dout, torch.zeros_like(lse) if dlse is None else dlse, args)
        result = allocate_gradients(args, needs)
        for target, need, name in zip(result, needs, result._fields, strict=True):
            if need and target.numel():
                target.copy_(gradients[name])
        return result

    @torch.no_grad()
    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        return reference.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)

    def soft_prompt_embedding_backward(
        self,
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


class ReferenceBackend(OnePlanBackend):
    """Supports every call."""

    name = "reference"
    _plan = ReferencePlan()

    def limits(self, call: Call) -> list[str]:
        return []

    def plan(self, call: Call) -> Plan | Refusal:
        return self._plan

    def restore(self, choices: tuple[str, ...]) -> Plan:
        return self._plan

    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        """Scores of all pairs in fp32 pass through memory some forty times forward and eighty times backward."""
        if call.op == "soft_prompt_embedding":
            return embedding_passes(call, self.name, copies=3)
        x = sizes_of(call)
        scores = 4.0 * x.batch * x.heads * x.queries * (x.keys + x.prefix)
        flops, keys = x.full_flops + x.prefix_flops, 4 / x.element * (x.kv + x.prefix_once)
        passes = [Pass(self.name, 1, flops, 40 * scores + 2 * (x.q + x.out) + 3 * keys)]
        if call.needs_grad:
            passes.append(Pass(self.name, 2, 3.5 * flops, 80 * scores + 20 * keys, True))
        return passes


def _attention_gradients(dout: Tensor, dlse: Tensor, args: AttentionArgs) -> dict[str, Tensor]:
    """All gradients in closed form, in fp32 (fp64 for fp64 activations), for the prefix's and the sequence's keys.

    ::

        p  = softmax(s)                w  = p * keep / (1 - dropout_p)      dv = w^T dout
        dp = (dout v^T) * keep / (1 - dropout_p)
        ds = p * (dp - delta)          delta = (sum over all keys of p * dp) - dlse
        dq = scale * ds k              dk = scale * ds^T q                  dbias = ds

    With a softcap, ds is multiplied by 1 - (capped score / softcap)^2 before dq and dk. A gated prefix has a softmax
    of its own: its own delta without dlse, and dout times tanh(gate). The softmax is computed again: p from the saved
    lse would carry the rounding of a large fp32 lse. (Dao et al., FlashAttention, 2022, appendix B.4.)
    """
    if args.has_chains:
        return _chain_gradients(dout, dlse, args)
    prefix, seq = _key_parts(args)
    heads = (args.k.shape[1], args.q.shape[1] // args.k.shape[1])
    dout = dout.to(seq.scores.dtype).unflatten(1, heads)  # [B, Hkv, G, S, D]
    num_prefix_keys, num_keys = prefix.scores.shape[-1], seq.scores.shape[-1]
    none = seq.scores.new_full((args.q.shape[1],), -torch.inf)
    sinks = (none if args.sinks is None else args.sinks)[:, None, None].expand(*seq.scores.shape[:3], 1)
    gradients = dict.fromkeys(AttentionGradients._fields, torch.empty(0))

    if args.gate is None:
        p, _ = reference.softmax_with_sink(torch.cat([prefix.scores, seq.scores], -1), sinks)
        p_prefix, p_seq, p_sink = p.split([num_prefix_keys, num_keys, 1], -1)
        dp_seq, dp_prefix = seq.dp(dout), prefix.dp(dout)
        delta = (p_seq * dp_seq).sum(-1) - dlse + (p_prefix * dp_prefix).sum(-1)
        prefix_dout, prefix_delta = dout, delta
    else:
        gate = torch.tanh(args.gate)
        prefix_dout = dout * gate.unflatten(0, heads)[:, :, None, None]
        p_seq, p_sink = reference.softmax_with_sink(seq.scores, sinks)[0].split([num_keys, 1], -1)
        p_prefix = reference.softmax_with_sink(prefix.scores, torch.full_like(sinks, -torch.inf))[0][..., :-1]
        dp_seq, dp_prefix = seq.dp(dout), prefix.dp(prefix_dout)
        delta, prefix_delta = (p_seq * dp_seq).sum(-1) - dlse, (p_prefix * dp_prefix).sum(-1)
        gradients["dgate"] = (p_prefix * prefix.dp(dout)).sum((0, 2, 3)) * (1 - gate * gate)
    if args.sinks is not None:
        gradients["dsinks"] = -(p_sink.squeeze(-1) * delta).sum((0, 2)).masked_fill(args.sinks == torch.inf, 0.0)

    ds_seq, ds_prefix = p_seq * (dp_seq - delta[..., None]), p_prefix * (dp_prefix - prefix_delta[..., None])
    q = args.q.to(dout.dtype).unflatten(1, heads)
    dq_seq, gradients["dk"], gradients["dv"] = seq.gradients(q, dout, p_seq, ds_seq)
    dq_prefix, *dprefix = prefix.gradients(q, prefix_dout, p_prefix, ds_prefix)
    gradients["dq"] = dq_seq + dq_prefix
    return gradients | _summed_gradients(args, ds_seq, ds_prefix, dprefix)


def _summed_gradients(
    args: AttentionArgs, ds_seq: Tensor, ds_prefix: Tensor, dprefix: list[Tensor]
) -> dict[str, Tensor]:
    """The gradients that are sums over the batch: of the biases and of the prefix."""
    bank = args.prefix_k.shape[0] if args.prefix_k.dim() == 4 else 1
    by_prefix = (bank, args.prefix_k.shape[-2])
    gradients = {}
    if args.bias is not None:
        gradients["dbias"] = ds_seq.sum_to_size(args.bias.shape)
    if args.prefix_bias is not None:
        by_token = ds_prefix.unflatten(3, by_prefix).sum((0, 2, 3))
        gradients["dprefix_bias"] = by_token.sum_to_size(args.prefix_bias.shape)
    for name, x in zip(("dprefix_k", "dprefix_v"), dprefix, strict=True):
        x = x.sum(0).unflatten(1, by_prefix).transpose(0, 1)
        gradients[name] = x if args.prefix_k.dim() == 4 else x[0]
    return gradients


def _chain_gradients(dout: Tensor, dlse: Tensor, args: AttentionArgs) -> dict[str, Tensor]:
    """All gradients of sequences with several prefixes, or with prefixes in k and v.

    Each sequence gets the concatenation of its prefixes, whose gradient is then added up where the prefixes lie.
    """
    assert args.prefix_ids is not None
    dtype = args.q.dtype
    chains = reference.prefix_chains(args.prefix_ids, args.prefix_lens, args.prefix_starts, args.prefix_k.shape)
    ids, lens = reference.chain_ids_and_lens(chains, args.q.device)
    joined = args._replace(
        prefix_k=reference.join_prefixes(chains, args.prefix_k.to(dtype), args.k),
        prefix_v=reference.join_prefixes(chains, args.prefix_v.to(dtype), args.v),
        prefix_ids=ids, prefix_lens=lens, prefix_starts=None,
    )  # fmt: skip
    gradients = _attention_gradients(dout, dlse, joined)
    for name, prefix in (("k", args.prefix_k), ("v", args.prefix_v)):
        djoined, dsequence = gradients[f"dprefix_{name}"], gradients[f"d{name}"]
        dprefix = djoined.new_zeros(prefix.shape)
        for i, chain in enumerate(chains):
            for piece in chain:
                target = dsequence[0] if piece.entry is None else dprefix[piece.entry]
                target[:, piece.rows] += djoined[i, :, piece.place]
        gradients[f"dprefix_{name}"] = dprefix
    return gradients


class _Keys(NamedTuple):
    """The keys of the prefix or of the sequence, and their scores.

    k is [B or 1, Hkv, N, D], v [B or 1, Hkv, N, D_v]; ``scores`` [B, Hq, S, N] is -inf for hidden keys; ``slope`` is
    the derivative of a score by q.k, and ``keep`` the dropout's factor.
    """

    k: Tensor
    v: Tensor
    scores: Tensor
    slope: Tensor | float
    keep: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, bias: Tensor | None, visible: Tensor, keep: Tensor
    ) -> _Keys:
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
        """dq [B, Hq, S, D], and dk and dv, shaped as k and v, summed over the query heads that share a key head."""
        heads = q.shape[1:3]
        ds, w = (x.unflatten(1, heads) for x in (ds * self.slope, p * self.keep))
        dq = (ds @ self.k.unsqueeze(2)).flatten(1, 2)
        return dq, (ds.transpose(-1, -2) @ q).sum(2), (w.transpose(-1, -2) @ dout).sum(2)


def _key_parts(args: AttentionArgs) -> tuple[_Keys, _Keys]:
    """The prefix's keys, those of all prefixes of a bank side by side, and the sequence's keys."""
    fp = lse_dtype(args.q.dtype)
    prefix_k, prefix_v = args.prefix_k, args.prefix_v
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    bank, num_kv_heads, prefix_len, _ = prefix_k.shape
    batch, num_heads, q_len, _ = args.q.shape
    kv_len, heads = args.k.shape[2], (num_kv_heads, num_heads // num_kv_heads)

    def as_keys(x: Tensor) -> Tensor:  # [A, Hkv, P, D] -> [1, Hkv, A*P, D]: visibility keeps the prefixes apart
        return x.to(args.q.dtype).to(fp).transpose(0, 1).flatten(1, 2)[None]

    q = args.q.to(fp).unflatten(1, heads)
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
    seq = _Keys.of(q, args.k.to(fp), args.v.to(fp), args, args.bias, seq_visible, keep[0])
    prefix = _Keys.of(
        q, as_keys(prefix_k), as_keys(prefix_v), args,
        None if prefix_bias is None else prefix_bias[:, None, :], prefix_visible.flatten(3), keep[1],
    )  # fmt: skip
    return prefix, seq
