# SPDX-License-Identifier: Apache-2.0
"""Exact results of large calls: the reference in fp64, computed block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference

__all__ = ["Oracle"]

#: Elements of the score matrix in one block of queries.
BLOCK = 1 << 22
#: Up to this number of scores the oracle computes all heads, beyond it the first and the last kv head.
ALL_HEADS = 1 << 24


class Oracle:
    """The results of a causal :func:`peftkern.prefix_attention` call in fp64, and errors against them.

    :func:`peftkern.testing.check_backend` holds every score in memory. The oracle computes a block of queries at a
    time, and of a large call only the heads that belong to the first and the last kv head. It runs on the device of
    its inputs, and keeps its results.

    Args:
        q: [B, Hq, S, D], any float dtype.
        k: [B, Hkv, T, D]; the last S keys belong to the queries, as in decoding.
        v: [B, Hkv, T, D_v].
        prefix_k: [Hkv, P, D].
        prefix_v: [Hkv, P, D_v].
        dout: gradient of out, [B, Hq, S, D_v].
        options: ``window`` and ``softcap`` of :func:`peftkern.prefix_attention`, or ``scale``.

    >>> import peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
    >>> oracle = Oracle(q, q, q, prefix, prefix, dout=torch.ones_like(q))
    >>> out = peftkern.prefix_attention(q, q, q, prefix, prefix)
    >>> max(oracle.errors(out, oracle.out())) < 1e-6
    True
    >>> oracle.gradients()[3].shape  # of prefix_k
    torch.Size([2, 4, 8])
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, dout: Tensor, **options: Any
    ) -> None:
        self.inputs = (q, k, v, prefix_k, prefix_v)
        self.dout = dout
        self.options = options
        kv_heads = k.shape[1]
        scores = q.shape[0] * q.shape[1] * q.shape[2] * (prefix_k.shape[1] + k.shape[2])
        #: Indices of the kv heads that are compared.
        self.kv_heads = list(range(kv_heads)) if scores <= ALL_HEADS else sorted({0, kv_heads - 1})
        self._out: Tensor | None = None
        self._gradients: list[Tensor] | None = None

    def out(self) -> Tensor:
        """out of the compared heads, fp64 [B, compared query heads, S, D_v]."""
        if self._out is None:
            self._out, _ = self._compute(backward=False)
        return self._out

    def gradients(self) -> list[Tensor]:
        """Gradients of q, k, v, prefix_k and prefix_v in the compared heads, fp64, else in the inputs' shapes."""
        if self._gradients is None:
            self._out, self._gradients = self._compute(backward=True)
        return self._gradients

    def errors(self, got: Tensor, true: Tensor) -> tuple[float, float]:
        """Relative errors of a result in the compared heads.

        Args:
            got: out or a gradient, with all heads.
            true: the same of :meth:`out` or :meth:`gradients`.

        Returns:
            ``||got - true|| / ||true||`` (Frobenius norms), and the largest absolute difference relative to the
            largest absolute element of ``true``.
        """
        difference = self.compared(got.detach()).double() - true
        if not difference.numel():
            return 0.0, 0.0
        norm, largest = true.norm().item(), true.abs().max().item()
        return difference.norm().item() / (norm or 1.0), difference.abs().max().item() / (largest or 1.0)

    def compared(self, x: Tensor) -> Tensor:
        """Select the compared heads of x [B, H, N, D], where H is Hq or Hkv, or of a prefix [Hkv, P, D]."""
        if x.dim() == 3:
            return x[self.kv_heads]
        groups: Tensor = x.unflatten(1, (self.inputs[1].shape[1], -1))
        return groups[:, self.kv_heads].flatten(1, 2)

    def _compute(self, backward: bool) -> tuple[Tensor, list[Tensor]]:
        q, k, v, prefix_k, prefix_v, dout = (self.compared(x.detach()).double() for x in (*self.inputs, self.dout))
        leaves = [x.requires_grad_(backward) for x in (q, k, v, prefix_k, prefix_v)]
        gradients = [torch.zeros_like(x) for x in leaves] if backward else []
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        batch, heads, queries, _ = q.shape
        cached = k.shape[2] - queries
        block = max(1, BLOCK // max(1, heads * (prefix_k.shape[1] + k.shape[2])))
        for sample in range(batch):
            for first in range(0, queries, block):
                last = min(first + block, queries)
                keys = cached + last  # later keys are hidden from this block
                part = (k[sample, None, :, :keys], v[sample, None, :, :keys], prefix_k, prefix_v)
                result, _ = reference.prefix_attention(q[sample, None, :, first:last], *part, **self.options)
                out[sample, :, first:last] = result[0].detach()
                if backward:
                    grads = torch.autograd.grad(result, leaves, dout[sample, None, :, first:last])
                    for total, gradient in zip(gradients, grads, strict=True):
                        total += gradient
        return out, gradients
