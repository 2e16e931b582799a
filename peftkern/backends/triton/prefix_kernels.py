# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels that ``merge`` and ``slot`` put beside another library's attention."""

from __future__ import annotations

from torch import Tensor

from ...arguments import AttentionArgs, AttentionGradients, allocate_outputs, lse_dtype
from .. import triton as fused
from . import _WIDTH, _Attention, _blocks, _launch, _prefix_gradients
from .arguments import Matrices, Rows, Stats
from .tiles import Direction

_LOG2E = 1.4426950408889634
_SLOT_BLOCK = 64  # keys that a program lays


def merge_prefix(
    args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None, lse_unit: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of prefix, sink and the sequence's ``part_out`` [B, Hq, S, D] and ``part_lse`` [B, Hq, S].

    The parts have any strides (unit along D) and are merged in place where they lie as the op's outputs do.
    ``part_lse * lse_unit`` is in natural logarithm; None: there is no sequence.
    """
    from .kernels.prefix_forward import _prefix_merge_fwd_kernel

    out, lse = part_out, part_lse
    if out is None or not out.transpose(1, 2).is_contiguous():
        out, _ = allocate_outputs(args)
    if lse is None or not lse.is_contiguous():
        lse = out.new_empty(out.shape[:3], dtype=lse_dtype(out.dtype))
    call = _Attention(args)
    resident = _fits(call, "merge")
    direction: Direction = "merge" if resident else "merge_long"
    kv_heads = args.k.shape[1]
    tiles = _blocks(call.sizes.q_len, call.tile(direction).BLOCK_M) * call.sizes.group * call.sizes.batch
    workers = min(tiles, _blocks(2 * fused._processors(call.device), kv_heads))
    call.launch(
        _prefix_merge_fwd_kernel, direction, workers * kv_heads,
        call.q, *call.prefix, None if part_out is None else Matrices.of(part_out),
        None if part_lse is None else Rows.of(part_lse), Matrices.of(out), lse, call.options, call.sizes, call.scale,
        _LOG2E * lse_unit, workers, RESIDENT=resident,
    )  # fmt: skip
    return out, lse


def _fits(call: _Attention, direction: Direction) -> bool:
    """Whether all rows see one and the same prefix, and it fits a block of keys."""
    options = call.options
    shared = options.prefix_ids is None and options.prefix_window is None
    return shared and call.sizes.prefix_len <= call.tile(direction).BLOCK_N


def merge_prefix_backward(
    dout: Tensor, out: Tensor, lse: Tensor, args: AttentionArgs, part_dq: Tensor | None,
    gradients: AttentionGradients,
) -> None:  # fmt: skip
    """Fill in dq = ``part_dq`` + the prefix's part, dprefix_k and dprefix_v; what is empty nobody needs.

    In one pass where the prefix fits one block of keys and all sequences share it; else by the fused backward's
    kernels for rows and for prefix tokens.
    """
    from .kernels import backward
    from .kernels.prefix_backward import _prefix_merge_bwd_kernel

    call = _Attention(args)
    options, sizes, scale = call.options, call.sizes, call.scale
    outs, douts = Matrices.of(out), Matrices.of(dout)
    dq = Matrices.of(gradients.dq) if gradients.dq.numel() else None
    part = None if part_dq is None or dq is None else Matrices.of(part_dq)
    needs_prefix = gradients.dprefix_k.numel() or gradients.dprefix_v.numel()
    if needs_prefix and _fits(call, "merge_bwd"):
        kv_heads, inner = args.k.shape[1], sizes.prefix_len * call.flags.HEAD_DIM
        tiles = _blocks(sizes.q_len, call.tile("merge_bwd").BLOCK_M) * sizes.group * sizes.batch
        splits = max(1, min(tiles, _blocks(fused._processors(call.device), kv_heads)))
        partial_k, partial_v = lse.new_empty(2, splits, kv_heads, inner)
        call.launch(
            _prefix_merge_bwd_kernel, "merge_bwd", splits * kv_heads,
            call.q, *call.prefix, outs, douts, lse.contiguous(), part, dq, partial_k, partial_v, options, sizes,
            scale, splits, _blocks(tiles, splits),
        )  # fmt: skip
        for partial, total in ((partial_k, gradients.dprefix_k), (partial_v, gradients.dprefix_v)):
            _launch(
                backward._sum_partials_kernel, (_blocks(total.numel(), _WIDTH),), call.device,
                partial, total, splits, kv_heads * inner, 1, inner, total.numel(), BLOCK=_WIDTH,
            )  # fmt: skip
        return
    call.round_prefix()
    stats = Stats(lse.new_empty(lse.shape), lse.new_empty(lse.shape), None, None)
    call.launch(
        backward._prefix_attention_bwd_prepare_kernel, "forward", call.row_programs("forward"),
        call.q, call.k, call.v, *call.prefix, outs, douts, lse.contiguous(), None, stats, options, sizes, scale,
    )  # fmt: skip
    if dq is not None:
        call.launch(
            backward._prefix_attention_bwd_dq_kernel, "dq", call.row_programs("dq"),
            call.q, None, None, *call.prefix, douts, part, dq, stats, options, sizes, scale,
        )  # fmt: skip
    if needs_prefix:
        _prefix_gradients(call, douts, stats, gradients)


def lay_slot(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """[prefix | k] and [prefix | v], [B, Hkv, P + T, D] with the memory order [B, P + T, Hkv, D]."""
    from .kernels.concat import _slot_fwd_kernel

    call = _Attention(args)
    batch, kv_heads, kv_len, head_dim = args.k.shape
    length = call.sizes.prefix_len + kv_len
    slot_k, slot_v = (args.k.new_empty(batch, length, kv_heads, head_dim).transpose(1, 2) for _ in "kv")
    _launch(
        _slot_fwd_kernel, (_blocks(length, _SLOT_BLOCK) * kv_heads * batch,), call.device,
        call.k, call.v, *call.prefix, Matrices.of(slot_k), Matrices.of(slot_v), call.options, call.sizes,
        HEAD_DIM=head_dim, BLOCK_D=call.flags.BLOCK_D, BLOCK_N=_SLOT_BLOCK,
    )  # fmt: skip
    return slot_k, slot_v


def sum_slot(args: AttentionArgs, dslot: Tensor, total: Tensor) -> None:
    """total, shaped like the prefix, = sum over the batch, in order, of its part of dslot [B, Hkv, P + T, D]."""
    from .kernels.concat import _slot_bwd_kernel

    call = _Attention(args)
    prefix_blocks = _blocks(call.sizes.prefix_len, _SLOT_BLOCK)
    _launch(
        _slot_bwd_kernel, (prefix_blocks * args.k.shape[1] * call.bank,), call.device,
        Matrices.of(dslot), total, call.options, call.sizes,
        HEAD_DIM=call.flags.HEAD_DIM, BLOCK_D=call.flags.BLOCK_D, BLOCK_N=_SLOT_BLOCK,
    )  # fmt: skip
