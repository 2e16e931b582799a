# SPDX-License-Identifier: Apache-2.0
"""The kernels' arguments: tuples of pointers, strides and sizes, built from :class:`AttentionArgs`.

An absent optional argument is ``None``, which Triton treats as a compile-time constant. So each combination of
options is compiled to a kernel of its own, without the branches for absent options.

Triton also compiles a kernel anew when an integer turns 1 or a multiple of 16. For the strides of rows this pays:
loads become wide. For sizes that change from call to call it would stop training and decoding, to compile. Such sizes
are not specialised (``do_not_specialize``) and lie outside of tuples, whose integers Triton always specialises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import AttentionArgs


class Matrices(NamedTuple):
    """A [B, H, N, D] tensor with unit stride along D, which is D_v for values. For a prefix [A, H, P, D], B counts
    the prefixes of a bank.

    The stride of a dim of size 1 is 0, whatever the tensor says.
    """

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_n: int

    @classmethod
    def of(cls, x: Tensor) -> Matrices:
        """Describe x [B, H, N, D] or [H, P, D]; a copy of it if its rows are too far apart."""
        x = x if x.dim() == 4 else x[None]
        if x.stride(2) * _LARGEST_BLOCK >= 2**31:  # the kernels compute offsets within a block in 32 bits
            x = x.contiguous()
        return cls(x, *_broadcast_strides(x)[:3])


_LARGEST_BLOCK = 256


class RowValues(NamedTuple):
    """A [B, H, S] tensor with any strides: one value per row, as another library lays them out.

    Kernels take the fields one by one, because the strides may depend on S. An absent tensor is ``None``.
    """

    ptr: Tensor | None
    stride_b: int
    stride_h: int
    stride_m: int

    @classmethod
    def of(cls, x: Tensor | None) -> RowValues:
        """Describe x [B, H, S]."""
        return cls(None, 0, 0, 0) if x is None else cls(x, *x.stride())


class ModelSizes(NamedTuple):
    """Those of :class:`Sizes` that all calls of a model share."""

    num_heads: int
    group: int
    prefix_len: int


class Sizes(NamedTuple):
    """The sizes of a call.

    ``group`` query heads share a key head. ``num_sequences`` and ``search_steps``, the steps of a binary search among
    the sequences, are 0 unless the input is packed. ``mask_stride`` is the distance of the rows of ``key_mask``.
    """

    batch: int
    num_heads: int
    group: int
    q_len: int
    kv_len: int
    prefix_len: int
    num_sequences: int
    search_steps: int
    mask_stride: int

    def for_kernels(self) -> tuple[Any, ...]:
        """The kernels' arguments: the sizes of the model in a tuple, then those that vary from call to call."""
        varying = (self.batch, self.q_len, self.kv_len, self.num_sequences, self.search_steps, self.mask_stride)
        return ModelSizes(self.num_heads, self.group, self.prefix_len), *varying


class Bias(NamedTuple):
    """A [B, Hq, S, T] tensor with any strides, 0 along broadcast dims."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class PrefixBias(NamedTuple):
    """A [Hq, P] tensor with any strides, 0 along broadcast dims."""

    ptr: Tensor
    stride_h: int
    stride_n: int


class KeyMask(NamedTuple):
    """A [B, T] tensor of bytes with any strides, that of B in :class:`Sizes`. 0 hides a key."""

    ptr: Tensor
    stride_n: int


class Options(NamedTuple):
    """The optional arguments of a call, None where absent.

    ``prefix_window`` is the window if prefix tokens count as positions within it. ``dropout_scale`` is
    1 / (1 - dropout_p). ``ordered`` is 1 if scores increase with q.k, so that the largest score of a row comes from
    its largest product; else None.
    """

    key_mask: KeyMask | None
    cu_seqlens: Tensor | None
    prefix_ids: Tensor | None
    prefix_lens: Tensor | None
    window: int | None
    prefix_window: int | None
    softcap: float | None
    sinks: Tensor | None
    bias: Bias | None
    prefix_bias: PrefixBias | None
    gate: Tensor | None
    seed: Tensor | None
    dropout_scale: float | None
    ordered: int | None


class Stats(NamedTuple):
    """Statistics of each row for the backward, [B, Hq, S] fp32.

    ``lse`` is in log2, and +inf if the row sees no key. ``neg_delta`` is dlse - rowsum(out * dout). A gated prefix
    has a softmax of its own, and therefore its own ``prefix_lse`` and ``prefix_neg_delta``; otherwise these are None.
    """

    lse: Tensor
    neg_delta: Tensor
    prefix_lse: Tensor | None
    prefix_neg_delta: Tensor | None


class Flags(NamedTuple):
    """Compile-time constants of the attention kernels, in addition to the tile."""

    IS_CAUSAL: bool
    DROPOUT_THRESHOLD: int  # a weight is dropped if its 32-bit random word is below this
    HEAD_DIM: int
    BLOCK_D: int  # the power of two, at least 16, that holds HEAD_DIM
    VALUE_DIM: int
    BLOCK_DV: int  # the same for VALUE_DIM

    def dims(self) -> dict[str, int]:
        """The constants of the head dims alone."""
        names = ("HEAD_DIM", "BLOCK_D", "VALUE_DIM", "BLOCK_DV")
        return {name: getattr(self, name) for name in names}


def sizes_of(args: AttentionArgs) -> Sizes:
    """Collect the sizes of a call."""
    batch, num_heads, q_len, _ = args.q.shape
    num_sequences = 0 if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
    return Sizes(
        batch, num_heads, num_heads // args.k.shape[1], q_len, args.k.shape[2], args.prefix_k.shape[-2],
        num_sequences, num_sequences.bit_length(), 0 if args.key_mask is None else args.key_mask.stride(0),
    )  # fmt: skip


def options_of(args: AttentionArgs) -> Options:
    """Collect the optional arguments of a call."""
    key_mask = args.key_mask
    return Options(
        key_mask=None if key_mask is None else KeyMask(key_mask.view(torch.uint8), key_mask.stride(1)),
        cu_seqlens=dense(args.cu_seqlens),
        prefix_ids=dense(args.prefix_ids),
        prefix_lens=dense(args.prefix_lens),
        window=args.window,
        prefix_window=args.window if args.prefix_in_window else None,
        softcap=args.softcap or None,
        sinks=dense(args.sinks),
        bias=None if args.bias is None else Bias(args.bias, *_broadcast_strides(args.bias)),
        prefix_bias=(
            None if args.prefix_bias is None else PrefixBias(args.prefix_bias, *_broadcast_strides(args.prefix_bias))
        ),
        gate=dense(args.gate),
        seed=args.dropout_seed,
        dropout_scale=None if args.dropout_seed is None else 1.0 / (1.0 - args.dropout_p),
        ordered=1 if args.scale > _SMALLEST_SCALE else None,
    )


#: A GPU flushes smaller scales to 0, and 0 times a score of -inf is NaN.
_SMALLEST_SCALE = 2.0**-100


def flags_of(args: AttentionArgs) -> Flags:
    """Collect the compile-time constants of a call."""
    head_dim, value_dim = args.q.shape[3], args.v.shape[3]
    return Flags(
        IS_CAUSAL=args.causal,
        DROPOUT_THRESHOLD=int(args.dropout_p * 2**32),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        VALUE_DIM=value_dim,
        BLOCK_DV=block_d(value_dim),
    )


def block_d(head_dim: int) -> int:
    """The power of two, at least 16, that holds ``head_dim``."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dense(x: Tensor | None) -> Tensor | None:
    """Make x contiguous; None stays None."""
    return None if x is None else x.contiguous()


def _broadcast_strides(x: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
