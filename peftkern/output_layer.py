# SPDX-License-Identifier: Apache-2.0
"""The softmax over the vocabulary of an output layer, in blocks: the logits [N, V] are never whole.

::

                    vocabulary V
               +----+----+----+----+        A block of rows goes through the blocks of the vocabulary. Per row it
        rows   | -> | -> | -> | -> |        keeps the maximum, the sum of the exponentials and, for a gradient, the
         N     +----+----+----+----+        sum of the output embeddings weighted by them. When the maximum grows,
               | -> | -> | -> | -> |        both sums are scaled. So each logit is computed once.
               +----+----+----+----+

This is the recurrence of FlashAttention (Dao et al. 2022), with the hidden states as queries and the output
embeddings as keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockSizes", "OutputLayer", "Softmax"]

#: Memory for blocks, in bytes: 1 / 32 of the logits, but not less than the first and not more than the second.
_SHARE, _MIN_BYTES, _MAX_BYTES = 32, 4 << 20, 256 << 20
#: Columns between the rows of a block of logits. Ids outside the block are written to the first of them.
_MARGIN = 16


class BlockSizes(NamedTuple):
    """How many rows and columns of the logits are computed at once, and how many output embeddings are gathered."""

    rows: int
    columns: int
    gathered: int

    @classmethod
    def of(cls, num_rows: int, weight: Tensor, itemsize: int, *, per_row: int = 0) -> BlockSizes:
        """Sizes for which all blocks together take about 1 / 32 of the bytes of the logits.

        Args:
            num_rows: N.
            weight: [V, E].
            itemsize: bytes of a logit in the dtype of the hidden states.
            per_row: further elements that the caller needs per row.
        """
        vocabulary, width = weight.shape
        budget = min(max(num_rows * vocabulary * itemsize // _SHARE, _MIN_BYTES), _MAX_BYTES) // 4
        # A row needs its hidden state, its sum of output embeddings and a product that is added to it.
        most_rows = max(budget // 2 // (3 * width + per_row + 1), 16)
        rows = math.ceil(num_rows / max(math.ceil(num_rows / most_rows), 1))
        columns = max(budget // 3 // (rows + width + 1) // 64 * 64, 64)
        return cls(max(rows, 1), min(columns, vocabulary), max(budget // 8 // (width + 1), 1))


class Softmax(NamedTuple):
    """The softmax of some rows, divided into chosen logits and all others.

    Attributes:
        chosen: fp32 [R, K], the chosen logits.
        lse: fp32 [R], the logarithm of the sum of the exponentials of all logits.
        others_lse: fp32 [R], of all but the chosen ones; -inf if all are chosen.
        others_mean: fp32 [R, E], the derivative of ``others_lse`` by the hidden states: the mean of the others'
            output embeddings under the softmax of the others. None if it was not requested.
    """

    chosen: Tensor
    lse: Tensor
    others_lse: Tensor
    others_mean: Tensor | None


@dataclass(frozen=True)
class OutputLayer:
    """logits = softcap(scale * (hidden @ weight.T + bias)) / temperature, with softcap(x) = c tanh(x / c).

    Attributes:
        weight: [V, E].
        bias: [V] or None.
        scale: factor of the logits (Cohere, Granite).
        softcap: c (Gemma 2), or None to disable it.
        temperature: divisor of the logits.
        dtype: in which the vendor's kernel multiplies. Products are summed in fp32, or fp64 if this is fp64.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of the logits and of all sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [R, V] of ``hidden`` [R, E]."""
        sizes = BlockSizes(len(hidden), len(self.weight), 1)
        return next(block[:, : len(weight)] for _, weight, block in self._blocks(hidden.to(self.dtype), sizes))

    def softmax(self, hidden: Tensor, ids: Tensor, sizes: BlockSizes, *, needs_mean: bool) -> Softmax:
        """The softmax of the logits of ``hidden`` [R, E], in which ``ids`` [R, K] are chosen: distinct per row."""
        hidden = hidden.to(self.dtype)
        chosen = self.chosen_logits(hidden, ids, sizes)
        largest = chosen.new_full((len(hidden), 1), torch.finfo(chosen.dtype).min)
        total = torch.zeros_like(largest)
        mean = hidden.new_zeros(hidden.shape, dtype=self.sum_dtype) if needs_mean else None
        for first, weight, block in self._blocks(hidden, sizes):
            logits = block[:, : len(weight)]
            slope = self._slope(logits) if needs_mean else None
            _hide(block, ids - first, len(weight))
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            decay = (before - largest).exp_()
            total.mul_(decay).add_(logits.sub_(largest).exp_().sum(1, keepdim=True))
            if mean is not None:
                mean.mul_(decay)
                _add_product(mean, logits if slope is None else logits.mul_(slope), weight)
        if mean is not None:  # the total is at least 1, as it contains the largest logit; 0 if all are chosen
            mean.div_(total.clamp(min=1)).mul_(self.scale / self.temperature)
        others = total.log_().add_(largest).squeeze(1)
        return Softmax(chosen, torch.logaddexp(others, chosen.logsumexp(1)), others, mean)

    def chosen_logits(self, hidden: Tensor, ids: Tensor, sizes: BlockSizes) -> Tensor:
        """The logits [R, K] of ``ids`` for ``hidden`` [R, E], in :attr:`sum_dtype`."""
        logits = hidden.new_empty(ids.shape, dtype=self.sum_dtype)
        for rows, columns in _tiles(ids, sizes.gathered):
            weight = self._gathered(ids[rows, columns])
            product = torch.bmm(weight, hidden[rows, :, None].to(self.sum_dtype)).squeeze(2)
            logits[rows, columns] = self._finish(
                product, None if self.bias is None else self.bias[ids[rows, columns]]
            )
        return logits

    def add_gradient(self, mean: Tensor, factors: Tensor, logits: Tensor, ids: Tensor, sizes: BlockSizes) -> None:
        """Add the gradient of a loss by the hidden states to ``mean`` [R, E].

        Args:
            mean: changed in place.
            factors: [R, K], the derivatives of the loss by the logits.
            logits: [R, K], of :meth:`chosen_logits`.
            ids: [R, K].
            sizes: of blocks.
        """
        slope = self._slope(logits)
        factors = factors * (self.scale / self.temperature)
        factors = factors if slope is None else factors * slope
        for rows, columns in _tiles(ids, sizes.gathered):
            mean[rows] += torch.bmm(factors[rows, None, columns], self._gathered(ids[rows, columns])).squeeze(1)

    def top_k(self, hidden: Tensor, k: int, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
        """The k largest log-probabilities [R, k] of ``hidden`` [R, E] and their ids, largest first."""
        hidden = hidden.to(self.dtype)
        values = hidden.new_empty((len(hidden), 0), dtype=self.sum_dtype)
        ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64)
        lse = values.new_full((len(hidden),), -math.inf)
        for first, weight, block in self._blocks(hidden, sizes):
            logits = block[:, : len(weight)]
            best, places = logits.topk(min(k, len(weight)), dim=1)
            values, ids = torch.cat((values, best), 1), torch.cat((ids, places + first), 1)
            if values.shape[1] > k:
                values, places = values.topk(k, dim=1)
                ids = ids.gather(1, places)
            largest = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)  # all may be -inf
            lse = torch.logaddexp(lse, logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
        values, places = values.sort(dim=1, descending=True, stable=True)
        return values.sub_(lse[:, None]), ids.gather(1, places)

    def _blocks(self, hidden: Tensor, sizes: BlockSizes) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first id, weight [C, E] in :attr:`dtype`, logits [R, C] with a margin) of the blocks of the vocabulary.

        All blocks of logits lie in one buffer, which the caller may change.
        """
        buffer = hidden.new_empty((len(hidden), sizes.columns + _MARGIN), dtype=self.sum_dtype)
        for first in range(0, len(self.weight), sizes.columns):
            weight = self.weight[first : first + sizes.columns].to(self.dtype)
            block = buffer[:, : len(weight) + _MARGIN]
            _multiply(hidden, weight, block[:, : len(weight)])
            bias = None if self.bias is None else self.bias[first : first + sizes.columns]
            self._finish(block[:, : len(weight)], bias)
            yield first, weight, block

    def _gathered(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.sum_dtype)

    def _finish(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Logits from ``hidden @ weight.T``, in place."""
        if bias is not None:
            logits.add_(bias)
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return logits if factor == 1 else logits.mul_(factor)

    def _slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of the softcap at finished logits: 1 - tanh^2. None without a softcap."""
        if self.softcap is None:
            return None
        slope = logits * (self.temperature / self.softcap)
        return slope.square_().neg_().add_(1)


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T"""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(hidden @ weight.t())


def _add_product(total: Tensor, probabilities: Tensor, weight: Tensor) -> None:
    """total += probabilities @ weight"""
    if weight.dtype == total.dtype:
        total.addmm_(probabilities, weight)
    elif total.is_cuda:
        total.add_(torch.mm(probabilities.to(weight.dtype), weight, out_dtype=total.dtype))
    else:
        total.add_(probabilities.to(weight.dtype) @ weight)


def _hide(block: Tensor, places: Tensor, width: int) -> None:
    """Set the logits in ``places`` [R, K] of a block to -inf. Places outside of it go to the margin."""
    is_outside = (places < 0) | (places >= width)
    block.scatter_(1, places.masked_fill_(is_outside, width), -math.inf)


def _tiles(ids: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles of ``ids`` [R, K] with at most ``size`` elements."""
    num_rows, num_columns = ids.shape
    columns = min(num_columns, size)
    rows = max(size // max(columns, 1), 1)
    for i in range(0, num_rows, rows):
        for j in range(0, num_columns, columns):
            yield slice(i, i + rows), slice(j, j + columns)
