# SPDX-License-Identifier: Apache-2.0
"""The kernels for a prefix beside another library's attention over the sequence, in Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...arguments import AttentionArgs, AttentionGradients, Call, allocate_outputs, lse_dtype
from ..base import JoiningKernels, first_row_with_prefix
from ..cost.model import Pass, sizes_of
from . import attention
from .arguments import Matrices, RowValues, block_d, dense
from .backend import TritonPlan
from .launch import LaunchContext, launch_kernel, num_blocks
from .tiles import Direction

#: Keys per program of the kernels that copy.
_COPY_BLOCK = 64
#: Tokens per program of the kernel that sums over the batch: few, because there are few programs.
_SUM_BLOCK = 16
#: Rows per program of the kernel that merges two results.
_MERGE_BLOCK = 32


class TritonPrefixKernels(JoiningKernels):
    """The kernels that ``merge`` and ``concat`` put beside another library's attention."""

    name = "triton"
    title = "Triton"
    attention = TritonPlan()

    def merge_costs(self, call: Call) -> tuple[Pass, Pass]:
        x = sizes_of(call)
        forward = Pass(self.name, 1, x.prefix_flops, x.q + 2 * x.out + 2 * x.lse + x.prefix_once)
        on_chip = x.prefix * max(x.head_dim, call.value_dim) <= 8192  # the prefix fits one tile
        kernels, products, moved = (3, 2.5, 3 * x.q + 2 * x.out) if on_chip else (5, 3.5, 4 * x.q + 4 * x.out)
        return forward, Pass(self.name, kernels, products * x.prefix_flops, moved + 2 * x.lse, True)

    def merge_prefix(
        self, args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Merge the prefix and the sinks into attention over the sequence.

        ``part_out`` [B, Hq, S, D_v] and ``part_lse`` [B, Hq, S], in natural logarithm, are the sequence's result;
        None if there is no sequence. They have any strides (unit along D_v). If they are laid out as the op's outputs
        are, they are overwritten and returned.

        Returns:
            (out [B, Hq, S, D_v], lse [B, Hq, S]).
        """
        from .kernels.prefix_forward import _prefix_merge_fwd_kernel

        out, lse = part_out, part_lse
        if out is None or not out.transpose(1, 2).is_contiguous():
            out, _ = allocate_outputs(args)
        if lse is None or not lse.is_contiguous():
            lse = out.new_empty(out.shape[:3], dtype=lse_dtype(out.dtype))
        context, start = LaunchContext(args), first_row_with_prefix(args)
        resident = start is not None and _fits(context, "merge")
        options = context.options if start is None else context.options._replace(prefix_ids=None, cu_seqlens=None)
        start = start or 0
        _pass_on(part_out, out, start)
        _pass_on(part_lse, lse, start)
        direction: Direction = "merge" if resident else "merge_long"
        sizes, kv_heads = context.sizes, context.kv_heads
        tiles = num_blocks(sizes.q_len - start, context.tile(direction).BLOCK_M) * sizes.group * sizes.batch
        workers = min(tiles, num_blocks(2 * context.processors, kv_heads))
        context.launch(
            _prefix_merge_fwd_kernel, direction, workers * kv_heads,
            context.q, *context.prefix, None if part_out is None else Matrices.of(part_out),
            *RowValues.of(part_lse), Matrices.of(out), lse, options, *context.kernel_sizes,
            context.scale, start, workers, RESIDENT=resident,
        )  # fmt: skip
        return out, lse

    def merge_prefix_backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, args: AttentionArgs, part_dq: Tensor | None,
        gradients: AttentionGradients,
    ) -> None:  # fmt: skip
        """Fill in dq = ``part_dq`` + the prefix's part, dprefix_k and dprefix_v, as far as they are not empty.

        ``out`` and ``lse`` are the merged ones. One pass over the rows does it if the prefix fits one block of keys
        and all rows from one on see it; otherwise the backend's own kernels for rows and for prefix tokens do it.
        """
        context = LaunchContext(args)
        outs, douts = Matrices.of(out), Matrices.of(dout)
        dq = Matrices.of(gradients.dq) if gradients.dq.numel() else None
        part = None if part_dq is None or dq is None else Matrices.of(part_dq)
        needs_prefix = gradients.dprefix_k.numel() or gradients.dprefix_v.numel()
        start = first_row_with_prefix(args)
        if needs_prefix and start is not None and _fits(context, "merge_bwd"):
            if dq is not None:
                _pass_on(part_dq, gradients.dq, start)
            _merge_backward_in_one_pass(context, outs, douts, lse, part, dq, gradients, start)
            return
        context.round_prefix()
        stats = attention.row_statistics(context, outs, douts, lse, None, gated=False)
        if dq is not None:
            attention.query_gradient(context, douts, stats, dq, part, prefix_only=True)
        if needs_prefix:
            attention.prefix_gradients(context, douts, stats, gradients)

    def concat_prefix(self, args: AttentionArgs, cu_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from .kernels import concat as kernels

        context = LaunchContext(args)
        batch, kv_heads, kv_len, _ = args.k.shape
        prefixes = 1 if cu_keys is None else context.sizes.num_sequences
        length = prefixes * context.sizes.prefix_len + kv_len
        joined_k, joined_v = (
            x.new_empty(batch, length, kv_heads, x.shape[3]).transpose(1, 2) for x in (args.k, args.v)
        )
        kernel: Any = kernels._concat_fwd_kernel
        packed: tuple[Any, ...] = ()
        if cu_keys is not None:
            kernel, packed = kernels._concat_packed_fwd_kernel, (dense(cu_keys), length)
        context.launch_untiled(
            kernel, num_blocks(length, _COPY_BLOCK) * kv_heads * batch,
            context.k, context.v, *context.prefix, Matrices.of(joined_k), Matrices.of(joined_v), context.options,
            *context.kernel_sizes, *packed, **context.flags.dims(), BLOCK_N=_COPY_BLOCK,
        )  # fmt: skip
        return joined_k, joined_v

    def sum_prefix_gradient(
        self, args: AttentionArgs, djoined: Tensor, total: Tensor, cu_keys: Tensor | None = None
    ) -> None:
        from .kernels.concat import _concat_bwd_kernel

        context, dim = LaunchContext(args), total.shape[-1]
        blocks = num_blocks(context.sizes.prefix_len, _SUM_BLOCK)
        context.launch_untiled(
            _concat_bwd_kernel, blocks * context.kv_heads * context.bank,
            Matrices.of(djoined), total, dense(cu_keys), context.options, *context.kernel_sizes,
            HEAD_DIM=dim, BLOCK_D=block_d(dim), BLOCK_N=_SUM_BLOCK,
        )  # fmt: skip

    def split_gradient(
        self,
        args: AttentionArgs,
        djoined_k: Tensor,
        djoined_v: Tensor,
        cu_keys: Tensor | None,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        from .kernels.concat import _split_kernel

        context = LaunchContext(args)
        targets = [Matrices.of(x) if x.numel() else None for x in (dk, dv)]
        if any(targets):
            context.launch_untiled(
                _split_kernel,
                num_blocks(context.sizes.kv_len, _COPY_BLOCK) * context.kv_heads * context.sizes.batch,
                Matrices.of(djoined_k), Matrices.of(djoined_v), *targets, dense(cu_keys), context.options,
                *context.kernel_sizes,
                **context.flags.dims(), BLOCK_N=_COPY_BLOCK,
            )  # fmt: skip

    def merge_states(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        from .kernels.prefix_forward import _merge_states_kernel

        batch, heads, q_len, value_dim = out.shape
        launch_kernel(
            _merge_states_kernel, (num_blocks(q_len, _MERGE_BLOCK) * heads * batch,), out.device,
            Matrices.of(out), *RowValues.of(lse), Matrices.of(part_out), *RowValues.of(part_lse), heads, q_len,
            VALUE_DIM=value_dim, BLOCK_DV=block_d(value_dim), BLOCK_M=_MERGE_BLOCK,
        )  # fmt: skip


def _pass_on(source: Tensor | None, target: Tensor, rows: int) -> None:
    """Copy the first ``rows`` rows (dim 2) to another tensor, unless they are there."""
    if rows and source is not None and source.data_ptr() != target.data_ptr():
        target[:, :, :rows].copy_(source[:, :, :rows])


def _fits(context: LaunchContext, direction: Direction) -> bool:
    """Whether a prefix fits one block of keys, and its tokens' visibility does not depend on the row."""
    return context.options.prefix_window is None and context.sizes.prefix_len <= context.tile(direction).BLOCK_N


def _merge_backward_in_one_pass(
    context: LaunchContext, out: Matrices, dout: Matrices, lse: Tensor, part_dq: Matrices | None, dq: Matrices | None,
    gradients: AttentionGradients, start: int,
) -> None:  # fmt: skip
    from .kernels.prefix_backward import _prefix_merge_bwd_kernel

    sizes, kv_heads = context.sizes, context.kv_heads
    flags = context.flags
    tiles = num_blocks(sizes.q_len - start, context.tile("merge_bwd").BLOCK_M) * sizes.group * sizes.batch
    splits = max(1, min(tiles, num_blocks(context.processors, kv_heads)))
    partial_k, partial_v = (
        lse.new_empty(splits, kv_heads, sizes.prefix_len * dim) for dim in (flags.HEAD_DIM, flags.VALUE_DIM)
    )
    context.launch(
        _prefix_merge_bwd_kernel, "merge_bwd", splits * kv_heads,
        context.q, *context.prefix, out, dout, lse.contiguous(), part_dq, dq, partial_k, partial_v, context.options,
        *context.kernel_sizes, context.scale, start, splits, num_blocks(tiles, splits),
    )  # fmt: skip
    for partial, total in ((partial_k, gradients.dprefix_k), (partial_v, gradients.dprefix_v)):
        inner = partial.shape[-1]
        attention.sum_partials(context, partial, total, splits, kv_heads * inner, 1, inner)
