# SPDX-License-Identifier: Apache-2.0
"""The specification run as a backend: eager PyTorch on any device; the backward recomputes the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .protocol import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs, lse_dtype

_NUM_DIFFERENTIABLE = len(AttentionGradients._fields)


def why_not(call: Call) -> list[str]:
    """Nothing is beyond the reference."""
    return []


def _run(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    return reference.prefix_attention(**args._asdict())


@torch.no_grad()
def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    out, lse = allocate_outputs(args)
    values = _run(args)
    out.copy_(values[0])
    lse.copy_(values[1])
    return out, lse


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    fp = lse_dtype(args.q.dtype)
    prefix = {"prefix_k": args.prefix_k.to(args.q.dtype), "prefix_v": args.prefix_v.to(args.q.dtype)}
    inputs = args._replace(**prefix)
    leaves = [None if x is None else x.detach().to(fp) for x in inputs[:_NUM_DIFFERENTIABLE]]
    wanted = [need and leaf is not None for need, leaf in zip(needs, leaves, strict=True)]
    gradients = allocate_gradients(args, wanted)
    with torch.enable_grad():
        for leaf, want in zip(leaves, wanted, strict=True):
            if leaf is not None:
                leaf.requires_grad_(want)
        outputs = _run(AttentionArgs(*leaves, *inputs[_NUM_DIFFERENTIABLE:]))  # type: ignore[arg-type]
    values = torch.autograd.grad(
        outputs,
        [leaf for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want],
        (dout.to(fp), torch.zeros_like(lse) if dlse is None else dlse),
        allow_unused=True,
        materialize_grads=True,
    )
    for gradient, value in zip([g for g, want in zip(gradients, wanted, strict=True) if want], values, strict=True):
        gradient.copy_(value)
    return gradients


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
