# SPDX-License-Identifier: Apache-2.0
"""Maps the tokens of a padded batch to the rows of a packed batch, with one host synchronisation.

This module knows nothing about models; it maps tensors to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

__all__ = [
    "IGNORED", "HostNumbers", "Layout", "LayoutBuilder", "Segments", "indices_of", "next_labels", "pad_labels",
    "targets_of",
]  # fmt: skip

#: The label that losses ignore.
IGNORED = -100


class HostNumbers:
    """Integers that the host reads from tensors on a device, in one transfer.

    A transfer waits for the device, so a training step should have at most one.
    """

    def __init__(self) -> None:
        self._requested: dict[str, Tensor] = {}
        self._known: dict[str, list[int]] = {}

    def request(self, name: str, value: Tensor) -> None:
        """Request the integers or booleans of ``value``, under a name."""
        self._requested[name] = value.flatten().long()

    def fetch(self) -> None:
        """Read everything that was requested."""
        if self._requested:
            device = next(iter(self._requested.values())).device
            values = torch.cat([value.to(device) for value in self._requested.values()]).tolist()
            for name, value in self._requested.items():
                self._known[name], values = values[: value.numel()], values[value.numel() :]
            self._requested = {}

    def all(self, name: str) -> list[int]:
        """All integers requested under ``name``; empty if there are none."""
        return self._known.get(name, [])

    def get(self, name: str, default: int = 0) -> int:
        """The single integer requested under ``name``."""
        return self._known[name][0] if name in self._known else default


def indices_of(mask: Tensor, count: int) -> Tensor:
    """bool [N] with ``count`` true elements -> [count], their indices in order, without a host synchronisation."""
    ranks = torch.where(mask, mask.long().cumsum(0) - 1, count)
    indices = torch.zeros(count + 1, dtype=torch.long, device=mask.device)
    return indices.scatter(0, ranks, torch.arange(mask.shape[0], device=mask.device))[:count]


class LayoutBuilder:
    """Prepares a :class:`Layout`, which needs numbers from the mask and the positions before it can be built.

    Args:
        shape: (B, S).
        device: of the layout.
        numbers: collects the numbers that the host needs; call :meth:`build` after it has been fetched.
        mask: [B, S], 0 for padding.
        position_ids: [B or 1, S]. Without a mask, a position that does not follow its predecessor starts another
            sequence, as in ``transformers``.
        needed: bool [B, S], padding whose rows are kept although no other row attends to them.
        keep_padding: keep all rows. While tracing all rows are kept, because T must not depend on values.
        keep_gaps: keep the padding between kept rows, because sliding windows count it.
        keep_lead: with ``keep_gaps``, also keep the padding before them, which windows count behind a prefix.
        from_first: a sequence starts at its first token instead of at column 0.
        count_mask: positions count the tokens of the mask, and padding has position -1 everywhere (OPT).
        pool_last: padding shows the last token of its row, for heads that pool the last column.
        labels: [B, S]; if given, the number of labels that a row predicts is requested too.

    Raises:
        ValueError: for several sequences per row while tracing.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        numbers: HostNumbers,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        needed: Tensor | None = None,
        keep_padding: bool = False,
        keep_gaps: bool = False,
        keep_lead: bool = True,
        from_first: bool = False,
        count_mask: bool = False,
        pool_last: bool = False,
        labels: Tensor | None = None,
    ) -> None:
        self.shape, self.numbers = shape, numbers
        self._pool_last = pool_last
        rows, length = shape
        self._steps = torch.arange(length, device=device)
        self._begin = torch.arange(rows, device=device)[:, None] * length
        self._position: Tensor | None = None
        self._real: Tensor | None = None
        self._keep: Tensor | None = None
        self._begins: Tensor | None = None
        self._first = torch.zeros(rows, dtype=torch.long, device=device)
        if position_ids is not None:
            self._position = position_ids.to(device).expand(rows, length)
        if mask is None and self._position is not None:
            self._find_sequences(self._position)
        elif mask is not None:
            self._read_mask(mask.to(device=device, dtype=torch.bool), needed, from_first, count_mask)
            if keep_gaps:
                self._fill_gaps(keep_lead)
            if keep_padding or is_tracing(mask):
                self._keep = None
            elif self._keep is not None:
                numbers.request("kept", self._keep.sum())
                numbers.request("longest", self._keep.sum(1).max() if rows else self._keep.sum())
                numbers.request("hidden", (self._keep & ~self._real).any())  # type: ignore[operator]
        if labels is not None and not is_tracing(labels):
            labels = labels.to(device)
            begins = self._steps == self._first[:, None] if self._begins is None else self._begins
            targets = targets_of(labels, begins, self._begins is not None)
            numbers.request("labelled", (targets != IGNORED).sum())
            numbers.request("labelled first", ((labels != IGNORED) & begins).sum())

    def _find_sequences(self, position_ids: Tensor) -> None:
        """Find the several sequences of each row by their positions."""
        if is_tracing(position_ids):
            raise ValueError(
                "position_ids: expected an attention_mask as well under torch.compile, because the number of packed "
                "sequences depends on the values of position_ids, got None"
            )
        self._begins = torch.ones(self.shape, dtype=torch.bool, device=position_ids.device)
        self._begins[:, 1:] = position_ids.diff(dim=1) != 1
        self.numbers.request("sequences", self._begins.sum())
        starts = torch.where(self._begins, self._steps, 0).cummax(1).values
        self.numbers.request("longest", (self._steps - starts + 1).max() if starts.numel() else starts.sum())

    def _read_mask(self, real: Tensor, needed: Tensor | None, from_first: bool, count_mask: bool) -> None:
        self._real = real
        length, steps = self.shape[1], self._steps
        # argmax: the first of equal values; 0 for a row without tokens. Empty rows have no argmax.
        if from_first and length:
            self._first = real.to(torch.int8).argmax(1)
        if self._position is None and count_mask:
            self._position = torch.where(real, real.long().cumsum(1) - 1, -1)
        elif self._position is None:
            self._position = (steps - self._first[:, None]).clamp(min=0)
        self._keep = (real if needed is None else real | needed.to(real.device)) & (steps >= self._first[:, None])

    def _fill_gaps(self, lead: bool) -> None:
        """Keep the padding between the first and the last kept row, with ``lead`` also what lies before."""
        assert self._keep is not None
        kept, steps = self._keep, self._steps
        if kept.shape[1]:
            last = torch.where(kept, steps, -1).amax(1, keepdim=True)
            first = torch.where(kept, steps, kept.shape[1]).amin(1, keepdim=True)
            self._keep = (steps >= (self._first[:, None] if lead else first)) & (steps <= last)

    @property
    def several_per_row(self) -> bool:
        """Whether a row contains several sequences."""
        return self._begins is not None and self.numbers.get("sequences") > self.shape[0]

    @property
    def saves_rows(self) -> bool:
        """Whether packing removes rows, or separates several sequences of one row."""
        rows, length = self.shape
        if self._begins is not None:
            return self.several_per_row
        return self._keep is not None and self.numbers.get("kept") < rows * length

    @property
    def is_all_real(self) -> bool:
        """Whether the mask is known to contain no padding."""
        known = self._keep is not None and not self.saves_rows
        return known and not self.numbers.get("hidden")

    def build(self) -> Layout:
        """The layout. ``numbers`` must have been fetched."""
        rows, length = self.shape
        begin, steps, numbers = self._begin, self._steps, self.numbers
        every = begin + steps
        if self._begins is not None:
            assert self._position is not None
            firsts = indices_of(self._begins.flatten(), numbers.get("sequences"))
            ends = torch.nn.functional.pad(firsts, (0, 1), value=rows * length).to(torch.int32)
            owners = firsts // max(length, 1)
            longest = numbers.get("longest")
            return Layout(self.shape, None, every, self._position.flatten(), ends, longest, owners, firsts, None)
        starts = torch.arange(rows + 1, device=every.device, dtype=torch.int32) * length
        if self._real is None:
            return Layout(self.shape, None, every, steps.repeat(rows), starts, length, None, begin.flatten(), None)
        assert self._position is not None
        firsts = begin.flatten() + self._first
        if self._keep is None:
            # Padding before a sequence moves behind it, where neither windows nor causality count it.
            turned = (begin + (steps + self._first[:, None]) % max(length, 1)).flatten()
            shown = begin + (steps - self._first[:, None]) % max(length, 1)
            real = self._real.flatten()[turned]
            if self._pool_last and length:
                last = torch.where(self._real, shown, begin).amax(1, keepdim=True)
                shown = torch.where(self._real, shown, last)
            position = self._position.flatten()[turned]
            return Layout(self.shape, turned, shown, position, starts, length, None, firsts, real)
        return self._compact(every, firsts, starts)

    def _compact(self, every: Tensor, firsts: Tensor, starts: Tensor) -> Layout:
        """The layout of the kept rows."""
        keep, real, position, numbers = self._keep, self._real, self._position, self.numbers
        assert keep is not None
        assert real is not None
        assert position is not None
        cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        last_row = (cu_seqlens[1:, None].long() - 1).clamp(min=0)
        ranks = (keep.long().cumsum(1) - 1).clamp(min=0)
        shown = torch.minimum(cu_seqlens[:-1, None].long() + ranks, last_row)
        key_mask, longest = real.flatten() if numbers.get("hidden") else None, numbers.get("longest")
        if numbers.get("kept") == keep.numel():
            return Layout(self.shape, None, every, position.flatten(), starts, longest, None, firsts, key_mask)
        kept = indices_of(keep.flatten(), numbers.get("kept"))
        key_mask = None if key_mask is None else key_mask[kept]
        return Layout(self.shape, kept, shown, position.flatten()[kept], cu_seqlens, longest, None, firsts, key_mask)


@dataclass(frozen=True, eq=False)
class Segments:
    """The tree of the segments of which sequences consist that share text (:mod:`.sharing`).

    Attributes:
        offsets: [m + 1], the first row of each segment, and T.
        ancestors: [m, K] the segments before each one, the outermost first, followed by -1.
        owners: [m] a sample that each segment belongs to.
        last: [n] the segment in which each sequence ends, -1 for an empty one.
        repeated: [X] flat indices of the tokens whose row predicts a label and is that of another token.
        aligned: whether all sequences end in the last column of the batch.

    All tensors are on the CPU.
    """

    offsets: Tensor
    ancestors: Tensor
    owners: Tensor
    last: Tensor
    repeated: Tensor
    aligned: bool

    def chain(self, last: int) -> list[int]:
        """The segments of the text that ends with the segment ``last``."""
        return [*(i for i in self.ancestors[last].tolist() if i >= 0), last]


@dataclass(frozen=True, eq=False)
class Layout:
    """Maps the tokens of a batch [B, S] to the T rows of a packed batch (not counting prompts).

    Attributes:
        shape: (B, S).
        tokens: [T] flat index of each row's token in the batch; None if all B * S are there, in order. Of tokens that
            share a row, one is named.
        rows: [B, S] the row of each token. Padding without a row has the nearest row before it in its sequence, or
            the first one.
        positions: [T] of each row within its sequence, from 0.
        cu_seqlens: int32 [n + 1], the first rows of the n sequences, and T; with segments, int32 [m + 1], theirs.
        longest: the number of rows of the longest sequence, or segment.
        owners: [n], the sample of each sequence; None if there is one sequence per sample, in order.
        firsts: [n] flat index of each sequence's first token in the batch.
        key_mask: bool [T], false for rows of padding that are kept for their loss; None if there are none.
        segments: if sequences share rows, the tree of their segments.
    """

    shape: tuple[int, int]
    tokens: Tensor | None
    rows: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    owners: Tensor | None
    firsts: Tensor
    key_mask: Tensor | None
    segments: Segments | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return self.positions.shape[0]

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device, **facts: Any) -> Layout:
        """The layout of a batch, with one host synchronisation. Arguments as for :class:`LayoutBuilder`."""
        numbers = HostNumbers()
        builder = LayoutBuilder(shape, device, numbers, **facts)
        numbers.fetch()
        return builder.build()

    @property
    def several_per_row(self) -> bool:
        """Whether a row of the batch contains several sequences."""
        return self.owners is not None and self.owners.shape[0] > self.shape[0]

    def to(self, device: torch.device) -> Layout:
        """The layout on ``device``, without waiting for it. The segments stay where they are."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, **moved)

    def targets(self, labels: Tensor) -> Tensor:
        """[B, S] -> [B, S], the label that each row predicts: see :func:`targets_of`."""
        if labels.numel() == 0:
            return labels
        begins = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        begins = begins.index_fill(0, self.firsts.to(labels.device), True).view(labels.shape)
        return targets_of(labels, begins, self.owners is not None)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]."""
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x[self.tokens.to(x.device)]).unsqueeze(0)


def pad_labels(labels: Tensor, prompt_len: int) -> Tensor:
    """[B, S] -> [B, P + S]: no label for the P rows of a prompt."""
    return torch.nn.functional.pad(labels, (prompt_len, 0), value=IGNORED)


def next_labels(labels: Tensor) -> Tensor:
    """[B, S] -> [B, S]: the label that each row predicts, which is the next one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def targets_of(labels: Tensor, begins: Tensor, several_per_row: bool) -> Tensor:
    """The label that each row predicts: the next one of its sequence, or :data:`IGNORED`.

    Args:
        labels: [B, S].
        begins: bool [B, S], true at the first token of a sequence.
        several_per_row: a row contains several sequences, and the last token of each predicts nothing. Otherwise the
            padding before the first token of a row predicts nothing.
    """
    targets = next_labels(labels)
    if several_per_row:
        return targets.masked_fill(torch.nn.functional.pad(begins[:, 1:], (0, 1), value=True), IGNORED)
    return targets.masked_fill(begins.cumsum(1) == 0, IGNORED)
