# SPDX-License-Identifier: Apache-2.0
"""A backend that merges the CUDA prefix kernels into an exact attention; arguments for direct calls of kernels."""

from __future__ import annotations

import torch

from peftkern import backends, reference
from peftkern.arguments import AttentionArgs, allocate_gradients
from peftkern.backends import Plan
from peftkern.backends.base import OnePlanBackend
from peftkern.backends.cuda import CudaPrefixKernels
from peftkern.testing.cases import Shape, feature

from .shim import Shim


def sizes_of(name: str, **sizes) -> tuple[Shape, dict]:
    sizes = {"S": 9 if name == "kv_cache" else 19, "P": 7, "D": 64, **sizes}
    return feature(name, Shape(**sizes))


def args_of(given: dict, **options) -> AttentionArgs:
    values = dict.fromkeys(AttentionArgs._fields[5:15]) | given
    values |= {
        "scale": 0.125,
        "causal": True,
        "window": None,
        "prefix_in_window": True,
        "softcap": 0.0,
        "dropout_p": 0.0,
    }
    return AttentionArgs(**{**values, **options})


def _split_queries(q_seq, q_prefix, k, v, prefix_k, prefix_v, options):
    """reference.prefix_attention with one q for the sequence and another, of the same values, for the prefix."""
    group = q_seq.shape[1] // k.shape[1]
    batch, _, q_len, head_dim = q_seq.shape
    prefix_k, prefix_v = (x if x.dim() == 4 else x[None] for x in (prefix_k, prefix_v))
    bank, _, prefix_len, _ = prefix_k.shape
    scale, softcap = options.get("scale", head_dim**-0.5), options.get("softcap")
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    prefix_k, prefix_v = (x.repeat_interleave(group, 1) for x in (prefix_k, prefix_v))
    names = ("key_mask", "cu_seqlens", "prefix_ids", "prefix_lens", "window")
    visible = reference.visibility(
        (batch, q_len, k.shape[2], bank, prefix_len), k.device, options.get("causal", True),
        *(options.get(name) for name in names), options.get("prefix_in_window", True),
    )  # fmt: skip
    scores = [q_seq @ k.transpose(-1, -2), torch.einsum("bhsd,ahpd->bhsap", q_prefix, prefix_k)]
    scores = [x * scale for x in scores]
    if softcap:
        scores = [softcap * torch.tanh(x / softcap) for x in scores]
    seq, prefix = (x.masked_fill(~y, -torch.inf) for x, y in zip(scores, visible, strict=True))
    return seq, prefix.flatten(3), v, prefix_v.transpose(0, 1).flatten(1, 2)


class MergingPlan(Plan):
    """The sequence in fp64, rounded as another library's result is, and the CUDA prefix kernels."""

    name = "merging"

    def __init__(self, shim: Shim, in_place: bool) -> None:
        self.shim, self.in_place = shim, in_place

    def _options(self, args: AttentionArgs) -> dict:
        return {**args.without_hints(), "softcap": args.softcap or None}

    def prefix_attention(self, args: AttentionArgs):
        q, k, v, prefix_k, prefix_v = (x.double() for x in args[:5])
        seq, _, values, _ = _split_queries(q, q, k, v, prefix_k, prefix_v, self._options(args))
        weights, lse = reference.softmax(seq)
        part_out = (weights @ values).to(args.q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        lse = torch.where(lse == -torch.inf, torch.inf, lse).float()  # as some kernels say that there is no key
        if not self.in_place:
            part_out, lse = part_out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)
            return CudaPrefixKernels().merge_prefix(args, part_out, lse)
        self.shim.writable(part_out, lse)
        out, out_lse = CudaPrefixKernels().merge_prefix(args, part_out, lse)
        assert out is part_out
        assert out_lse is lse
        return out, out_lse

    def prefix_attention_backward(self, dout, dlse, out, lse, args, needs):
        leaves = [x.double().requires_grad_() for x in (args.q, args.q, *args[1:5])]
        with torch.enable_grad():
            seq, prefix, seq_v, prefix_v = _split_queries(*leaves, self._options(args))
            sinks = torch.full((*seq.shape[:3], 1), -torch.inf, dtype=torch.float64)
            if args.sinks is not None:
                sinks = args.sinks.double()[:, None, None].expand_as(sinks)
            weights, _ = reference.softmax(torch.cat([prefix, seq, sinks], -1))
            both = weights[..., :-1] @ torch.cat([prefix_v.expand(len(seq_v), -1, -1, -1), seq_v], 2)
            parts = torch.autograd.grad(both, leaves, dout.double())
        gradients = allocate_gradients(args, [need and i < 5 for i, need in enumerate(needs)])
        for target, source in zip(gradients[1:3], parts[2:4], strict=True):
            target.copy_(source)
        part_dq = parts[0].to(args.q.dtype)
        if self.in_place:
            gradients.dq.copy_(part_dq)
            part_dq = gradients.dq
        CudaPrefixKernels().merge_prefix_backward(dout, out, lse, args, part_dq, gradients)
        return gradients

    def soft_prompt_embedding(self, *inputs):
        raise NotImplementedError

    def soft_prompt_embedding_backward(self, *inputs):
        raise NotImplementedError


class Merging(OnePlanBackend):
    """A backend with one plan, :class:`MergingPlan`; :func:`install` registers it as "merging"."""

    name = "merging"

    def __init__(self, plan: MergingPlan) -> None:
        self._plan = plan

    def limits(self, call):
        return []

    def plan(self, call):
        return self._plan

    def restore(self, choices):
        return self._plan

    def cost(self, call, machine):
        return None


def install(monkeypatch, shim: Shim, in_place: bool = True) -> None:
    """Register the backend "merging" for a test."""
    monkeypatch.setitem(backends.BACKENDS, "merging", Merging(MergingPlan(shim, in_place)))
    backends.forget()
