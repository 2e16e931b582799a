# SPDX-License-Identifier: Apache-2.0
"""The ops that the compiler and the profiler see: schema, shape function, and the call into a plan.

There is one op per direction. The ops have no derivative; :mod:`peftkern.functional` adds it. The plan's name is an
argument, resolved once in Python: a constant of the graph, the same in forward and backward.

:func:`attention` and :func:`attention_backward` run the ops, past torch's dispatcher where nobody would notice
(:mod:`peftkern.dispatcher`).
"""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch import Tensor

from . import dispatcher
from .arguments import AttentionArgs, AttentionGradients, allocate_gradients, allocate_outputs, lse_dtype
from .backends import gather
from .backends.base import Plan
from .backends.registry import plan_named
from .op_checks import ForwardResults, check_attention_op, check_embedding_op

NAMESPACE = "peftkern"
_lib = torch.library.Library(NAMESPACE, "DEF")

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", int | None: "SymInt?"}
_ATTENTION_ARGS = ", ".join(f"{_SCHEMA_TYPES[t]} {name}" for name, t in get_type_hints(AttentionArgs).items())
_EMBEDDING_ARGS = "Tensor input_ids, Tensor weight, Tensor prompt, Tensor? prompt_ids"
_GRADIENTS = ", ".join(f"Tensor {name}" for name in AttentionGradients._fields)

_lib.define(f"prefix_attention({_ATTENTION_ARGS}, str plan) -> (Tensor out, Tensor lse)")
_lib.define(
    f"prefix_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ATTENTION_ARGS}, bool[] needs, "
    f"str plan) -> ({_GRADIENTS})"
)
_lib.define(f"soft_prompt_embedding({_EMBEDDING_ARGS}, str plan) -> Tensor")
_lib.define(
    f"soft_prompt_embedding_backward(Tensor dout, {_EMBEDDING_ARGS}, bool[] needs, str plan) "
    "-> (Tensor dweight, Tensor dprompt)"
)


def _check_index(name: str, index: Tensor | None, low: int, high: int) -> None:
    """Raise if an index is outside [low, high). CPU only, to avoid a device synchronisation."""
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(index))
    if lowest < low or highest >= high:
        raise ValueError(f"{name}: expected values from {low} to {high - 1}, got values from {lowest} to {highest}")


def _check_values(args: AttentionArgs) -> None:
    if args.has_chains:
        _check_chains(args)
    elif args.prefix_ids is not None:
        _check_index("prefix_ids", args.prefix_ids, -1, args.prefix_k.shape[0])
        _check_index("prefix_lens", args.prefix_lens, 0, args.prefix_k.shape[-2] + 1)
    cu_seqlens = args.cu_seqlens
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        total = args.q.shape[2]
        starts_and_ends = bool(cu_seqlens[0] == 0) and bool(cu_seqlens[-1] == total)
        if not starts_and_ends or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected non-decreasing offsets from 0 to S = {total}, got {cu_seqlens.tolist()}"
            )
        _check_hints(args, cu_seqlens)


def _check_chains(args: AttentionArgs) -> None:
    """Raise if prefixes do not exist, or do not lie in the bank or in k and v. CPU only."""
    ids, lens, starts = args.prefix_ids, args.prefix_lens, args.prefix_starts
    assert ids is not None
    if ids.device.type != "cpu":
        return
    bank, prefix_len, kv_len = args.prefix_k.shape[0], args.prefix_k.shape[2], args.k.shape[2]
    num_prefixes = bank + (0 if starts is None else starts.shape[0])
    _check_index("prefix_ids", ids, -1, num_prefixes)
    lengths = torch.full((bank,), prefix_len) if lens is None else lens.long()
    _check_index("prefix_lens", lengths[:bank], 0, prefix_len + 1)
    if starts is not None:
        _check_index("prefix_lens", lengths[bank:], 0, kv_len + 1)
        _check_index("prefix_starts", starts, 0, kv_len + 1)
        ends = starts + lengths[bank:]
        if bool((ends > kv_len).any()):
            raise ValueError(f"prefix_starts: expected prefixes that end by T = {kv_len}, got ends {ends.tolist()}")
    if args.max_prefix_len is not None and ids.numel() and num_prefixes:
        seen = torch.where(ids >= 0, lengths[ids.clamp(min=0)], 0)
        longest = int(seen.sum(1).max() if ids.dim() == 2 else seen.max())
        if args.max_prefix_len < longest:
            raise ValueError(
                f"max_prefix_len: expected at least what a sequence sees, {longest}, got {args.max_prefix_len}"
            )


def _check_hints(args: AttentionArgs, cu_seqlens: Tensor) -> None:
    """Raise if ``max_seqlen`` or ``prefix_start`` contradicts the tensors, which lie on the CPU."""
    if args.max_seqlen is not None and cu_seqlens.numel() > 1:
        longest = int(cu_seqlens.diff().max())
        if args.max_seqlen < longest:
            raise ValueError(f"max_seqlen: expected at least the longest sequence, {longest}, got {args.max_seqlen}")
    if args.prefix_start is not None and args.prefix_ids is not None and cu_seqlens.numel() > 1:
        lengths, behind = cu_seqlens.diff(), cu_seqlens[:-1] >= args.prefix_start
        right = args.prefix_ids == torch.where(behind, 0, -1)
        if not bool(right[lengths > 0].all()) or args.prefix_start not in cu_seqlens:
            raise ValueError(
                f"prefix_start: expected the first row of the sequences with prefix_ids 0, got {args.prefix_start} "
                f"with prefix_ids {args.prefix_ids.tolist()} and cu_seqlens {cu_seqlens.tolist()}"
            )


def attention(args: AttentionArgs, plan: Plan | str) -> tuple[Tensor, Tensor]:
    """Run the op ``prefix_attention``: (out [B, Hq, S, D_v], lse [B, Hq, S]).

    ``plan`` is its name while compiling.
    """
    if isinstance(plan, str) or dispatcher.is_needed(args.tensors):
        return prefix_attention(*args, plan if isinstance(plan, str) else plan.name)  # type: ignore[no-any-return]
    _check_values(args)
    return gather.prefix_attention(plan, args)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    args: AttentionArgs,
    needs: list[bool],
    plan: Plan | str,
) -> tuple[Tensor, ...]:
    """Run the op ``prefix_attention_backward``: the nine gradients. ``plan`` is its name while compiling."""
    if isinstance(plan, str) or dispatcher.is_needed((dout, dlse, out, lse, *args.tensors)):
        name = plan if isinstance(plan, str) else plan.name
        return prefix_attention_backward(dout, dlse, out, lse, *args, needs, name)  # type: ignore[no-any-return]
    return gather.prefix_attention_backward(plan, dout, dlse, out, lse, args, needs)


def _prefix_attention(*inputs):  # type: ignore[no-untyped-def]
    *values, plan = inputs
    args = AttentionArgs(*values)
    check_attention_op(args, plan)
    _check_values(args)
    return gather.prefix_attention(plan_named(plan), args)


def _prefix_attention_fake(*inputs):  # type: ignore[no-untyped-def]
    *values, _ = inputs
    args = AttentionArgs(*values)
    check_attention_op(args, None)
    return allocate_outputs(args)


def _prefix_attention_backward(dout, dlse, out, lse, *inputs):  # type: ignore[no-untyped-def]
    *values, needs, plan = inputs
    args = AttentionArgs(*values)
    check_attention_op(args, plan, ForwardResults(dout, dlse, out, lse), needs)
    _check_values(args)
    gradients = gather.prefix_attention_backward(plan_named(plan), dout, dlse, out, lse, args, needs)
    return _distinct(gradients)


def _prefix_attention_backward_fake(dout, dlse, out, lse, *inputs):  # type: ignore[no-untyped-def]
    *values, needs, _ = inputs
    args = AttentionArgs(*values)
    check_attention_op(args, None, ForwardResults(dout, dlse, out, lse), needs)
    return _distinct(allocate_gradients(args, needs))


def _distinct(gradients: AttentionGradients) -> tuple[Tensor, ...]:
    """The gradients with a tensor of its own for each that has no elements: outputs of an op must not be the same."""
    ids = [id(g) for g in gradients]
    return tuple(g.new_empty(0) if id(g) in ids[:i] else g for i, g in enumerate(gradients))


def _check_embedding_values(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> None:
    _check_index("input_ids", input_ids, 0, weight.shape[0])
    _check_index("prompt_ids", prompt_ids, 0, prompt.shape[0])


def _soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, plan: str
) -> Tensor:
    check_embedding_op(input_ids, weight, prompt, prompt_ids, plan)
    _check_embedding_values(input_ids, weight, prompt, prompt_ids)
    return plan_named(plan).soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)


def _soft_prompt_embedding_fake(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, plan: str
) -> Tensor:
    check_embedding_op(input_ids, weight, prompt, prompt_ids, None)
    batch, length = input_ids.shape
    return weight.new_empty(batch, prompt.shape[-2] + length, weight.shape[1])


def _soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
    plan: str,
) -> tuple[Tensor, Tensor]:
    check_embedding_op(input_ids, weight, prompt, prompt_ids, plan, dout, needs)
    _check_embedding_values(input_ids, weight, prompt, prompt_ids)
    return plan_named(plan).soft_prompt_embedding_backward(dout, input_ids, weight, prompt, prompt_ids, needs)


def _soft_prompt_embedding_backward_fake(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
    plan: str,
) -> tuple[Tensor, Tensor]:
    check_embedding_op(input_ids, weight, prompt, prompt_ids, None, dout, needs)
    fp = lse_dtype(weight.dtype)
    dweight, dprompt = (
        x.new_empty(x.shape if need else 0, dtype=fp) for x, need in zip((weight, prompt), needs, strict=True)
    )
    return dweight, dprompt


for _name, _implementation, _fake in (
    ("prefix_attention", _prefix_attention, _prefix_attention_fake),
    ("prefix_attention_backward", _prefix_attention_backward, _prefix_attention_backward_fake),
    ("soft_prompt_embedding", _soft_prompt_embedding, _soft_prompt_embedding_fake),
    ("soft_prompt_embedding_backward", _soft_prompt_embedding_backward, _soft_prompt_embedding_backward_fake),
):
    _lib.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_lib)

prefix_attention = torch.ops.peftkern.prefix_attention.default
prefix_attention_backward = torch.ops.peftkern.prefix_attention_backward.default
soft_prompt_embedding = torch.ops.peftkern.soft_prompt_embedding.default
soft_prompt_embedding_backward = torch.ops.peftkern.soft_prompt_embedding_backward.default
