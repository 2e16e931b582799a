# SPDX-License-Identifier: Apache-2.0
"""Finds text with which several sequences of a batch begin, and lays it out once.

::

    sequences                 segments                       rows of the packed batch

    a b c d e                 a b ─┬─ c ─┬─ d e              a b | c | d e | f | g h
    a b c f                        │     └─ f
    a b g h                        └─ g h

The sequences form a tree. Each of its segments is a sequence of the packed batch that sees its ancestors as prefixes,
so that a row is computed once however many sequences contain it. This is exact under causal attention: the hidden
state of a token depends only on the tokens before it.

This module knows nothing about models; it maps tensors on the CPU to tensors on the CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .layout import IGNORED, Layout, Segments

__all__ = ["most_saved", "share_rows"]

#: A segment has to save at least this many rows: attention to one more prefix costs about as much as a few rows.
MIN_SAVED_ROWS = 16

#: It also has to save this part of the text up to its end, which some backends copy for each text behind it.
MIN_SAVED_PART = 1 / 32


@dataclass(eq=False)
class _Node:
    """A text with which at least one sequence begins.

    Attributes:
        end: its length.
        example: the number of a sequence that begins with it.
        children: the longer texts that continue it.
        sequences: the numbers of the sequences that end here.
    """

    end: int
    example: int
    children: list[_Node] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)


@dataclass
class _Segment:
    """A segment of the tree: rows ``begin`` to ``end`` of the sequence ``example``, behind its ancestors."""

    begin: int
    end: int
    example: int
    ancestors: tuple[int, ...]


def share_rows(
    layout: Layout,
    input_ids: Tensor,
    groups: Tensor | None = None,
    labels: Tensor | None = None,
    min_saved: int | None = None,
) -> Layout | None:
    """The layout in which text that sequences share lies once; None if no text is worth sharing.

    Sequences share tokens at equal positions. Rows that the mask hides are not shared.

    Args:
        layout: of the batch without sharing, on the CPU.
        input_ids: [B, S], on the CPU.
        groups: [B], samples of different groups share nothing; None for one group.
        labels: [B, S]; if given, the layout says which tokens have a label but no row of their own.
        min_saved: rows that a segment has to save; default :data:`MIN_SAVED_ROWS`.
    """
    lengths = layout.cu_seqlens.diff().tolist()
    if len(lengths) < 2:
        return None
    root = _tree(layout, input_ids, groups, lengths)
    segments, paths = _segments(root, len(lengths), MIN_SAVED_ROWS if min_saved is None else min_saved)
    if sum(x.end - x.begin for x in segments) == layout.num_rows:
        return None
    return _lay_out(layout, segments, paths, labels)


def most_saved(input_ids: Tensor, mask: Tensor | None) -> int:
    """An upper bound of the rows that sharing saves, found in a fraction of the time of :func:`share_rows`.

    Args:
        input_ids: [B, S], one sequence per row, on the CPU.
        mask: [B, S], 0 for padding, on the CPU.
    """
    keys = (input_ids if mask is None else torch.where(mask != 0, input_ids, -1)).numpy()
    if keys.size == 0:
        return 0
    first = (keys != -1).argmax(1)[:, None]  # rows share by position, not by column
    keys = np.take_along_axis(keys, (np.arange(keys.shape[1]) + first) % keys.shape[1], 1)
    order = sorted(range(len(keys)), key=lambda i: keys[i].tobytes())
    equal = keys[order[1:]] == keys[order[:-1]]
    return int(np.where(equal.all(1), keys.shape[1], equal.argmin(1)).sum())


def _tree(layout: Layout, input_ids: Tensor, groups: Tensor | None, lengths: list[int]) -> _Node:
    """The tree of all sequences: they are sorted, so that those with a common beginning are neighbours."""
    tokens = layout.pack(input_ids)[0].long()
    keys = (tokens << 32 | layout.positions.long() & 0xFFFFFFFF).numpy()  # positions may be negative
    starts = layout.cu_seqlens.tolist()
    visible = lengths if layout.key_mask is None else _lengths_before_hidden(layout.key_mask, starts)
    group = [0] * len(lengths)
    if groups is not None:
        group = (groups if layout.owners is None else groups[layout.owners]).tolist()
    rows = [keys[start : start + length] for start, length in zip(starts, visible, strict=False)]
    order = sorted(range(len(rows)), key=lambda i: (group[i], rows[i].tobytes()))
    root = _Node(0, order[0])
    path = [root]
    for previous, i in itertools.pairwise([-1, *order]):
        shares = previous >= 0 and group[previous] == group[i]
        common = _common_length(rows[previous], rows[i]) if shares else 0
        behind = None
        while path[-1].end > common:
            behind = path.pop()
        if path[-1].end < common:  # the common text ends within a node
            assert behind is not None
            path[-1].children[-1] = middle = _Node(common, i, [behind])
            path.append(middle)
        for end in (len(rows[i]), lengths[i]):  # hidden rows follow the visible ones, and are not shared
            if end > path[-1].end:
                child = _Node(end, i)
                path[-1].children.append(child)
                path.append(child)
        path[-1].sequences.append(i)
        while path[-1].end > len(rows[i]):
            path.pop()
    return root


def _lengths_before_hidden(key_mask: Tensor, starts: list[int]) -> list[int]:
    """Per sequence, the number of rows before its first hidden one."""
    ends, hidden = np.array(starts[1:]), (~key_mask).numpy().nonzero()[0]
    np.minimum.at(ends, np.searchsorted(starts, hidden, side="right") - 1, hidden)
    return (ends - np.array(starts[:-1])).tolist()  # type: ignore[no-any-return]


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal elements with which two arrays begin."""
    shorter = min(len(a), len(b))
    different = (a[:shorter] != b[:shorter]).nonzero()[0]
    return int(different[0]) if len(different) else shorter


def _segments(root: _Node, num_sequences: int, min_saved: int) -> tuple[list[_Segment], list[list[int]]]:
    """(the segments, those of each sequence in order). Ancestors come before their descendants.

    A text that saves too few rows is repeated in the segments of the texts that continue it.
    """
    segments: list[_Segment] = []
    paths: list[list[int]] = [[] for _ in range(num_sequences)]
    stack: list[tuple[_Node, int, tuple[int, ...]]] = [(root, 0, ())]
    while stack:
        node, begin, ancestors = stack.pop()
        behind, length = node.children, node.end - begin
        uses = len(behind) + bool(node.sequences)
        if length and behind and (uses - 1) * length < max(min_saved, MIN_SAVED_PART * node.end):
            if node.sequences:
                behind = [*behind, _Node(node.end, node.example, [], node.sequences)]
        else:
            if length:
                segments.append(_Segment(begin, node.end, node.example, ancestors))
                begin, ancestors = node.end, (*ancestors, len(segments) - 1)
            for i in node.sequences:
                paths[i] = list(ancestors)
        stack += [(child, begin, ancestors) for child in reversed(behind)]
    return segments, paths


def _lay_out(layout: Layout, segments: list[_Segment], paths: list[list[int]], labels: Tensor | None) -> Layout:
    """The layout of the segments, from that of the sequences."""
    starts, sizes = layout.cu_seqlens.tolist(), [x.end - x.begin for x in segments]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    source = np.concatenate([np.arange(starts[x.example] + x.begin, starts[x.example] + x.end) for x in segments])
    target = np.empty(layout.num_rows, dtype=np.int64)  # the new row of each row
    for i, path in enumerate(paths):
        for j in path:
            begin = starts[i] + segments[j].begin
            target[begin : begin + sizes[j]] = np.arange(offsets[j], offsets[j + 1])
    old, rows = torch.from_numpy(source), torch.from_numpy(target)[layout.rows]
    tokens = old if layout.tokens is None else layout.tokens[old]
    depth = max(len(x.ancestors) for x in segments)
    padded = [[*x.ancestors, *[-1] * (depth - len(x.ancestors))] for x in segments]
    ancestors = torch.tensor(padded, dtype=torch.long).view(len(segments), depth)
    owners = torch.tensor([x.example for x in segments])
    owners = owners if layout.owners is None else layout.owners[owners]
    last = torch.tensor([path[-1] if path else -1 for path in paths])
    cu_seqlens = torch.from_numpy(offsets)
    return replace(
        layout, tokens=tokens, rows=rows, positions=layout.positions[old],
        cu_seqlens=cu_seqlens.to(torch.int32), longest=max(sizes),
        key_mask=None if layout.key_mask is None else layout.key_mask[old],
        segments=Segments(cu_seqlens, ancestors, owners, last, _repeated(layout, tokens, labels), _aligned(layout)),
    )  # fmt: skip


def _aligned(layout: Layout) -> bool:
    """Whether all sequences that are not empty end in the last column of the batch."""
    ends = layout.cu_seqlens[1:][layout.cu_seqlens.diff() > 0].long() - 1
    ends = ends if layout.tokens is None else layout.tokens[ends]
    return bool(((ends + 1) % layout.shape[1] == 0).all())


def _repeated(layout: Layout, tokens: Tensor, labels: Tensor | None) -> Tensor:
    """[X], the flat indices of the tokens whose row predicts a label and is that of another token."""
    if labels is None:
        return tokens[:0]
    predicts = layout.targets(labels).flatten() != IGNORED
    predicts[tokens] = False
    return predicts.nonzero().flatten()
