# SPDX-License-Identifier: Apache-2.0
"""Sequences with several prefixes, or with prefixes in k and v, for plans that take one prefix each.

The prefixes that a sequence sees are its chain. Each chain that occurs becomes an entry of a ragged bank: its rows
are copied out of ``prefix_k`` and k, of ``prefix_v`` and v. The plan runs with this bank, except for a
:class:`.RowPlan`, which reads the rows where they lie. The gradients of the chains are then added up where the rows
came from.

A row may lie in several chains, as the beginning of a document does that many questions share. The chains are
therefore cut into pieces so that two pieces are the same rows or have none in common. The gradients of a piece are
summed in fp32 over the chains that contain it, in a fixed order and without atomic operations, so that they are
bitwise repeatable.

All indices are computed on the host, once for all layers and the backward if the tensors are
:func:`~peftkern.arguments.constant`.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, constant, host_values
from .base import Plan, RowPlan
from .derived import derived

__all__ = ["gathered", "prefix_attention", "prefix_attention_backward"]


def prefix_attention(plan: Plan, args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """:meth:`.Plan.prefix_attention`, with the prefixes gathered if the plan needs that."""
    if not args.has_chains or plan.reads_chains:
        return plan.prefix_attention(args)
    rows = _rows_of(args)
    if isinstance(plan, RowPlan):
        return plan.attention_of_rows(_with_ids(args, rows), rows.places)
    return plan.prefix_attention(_with_bank(args, rows))


def prefix_attention_backward(
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    args: AttentionArgs,
    needs: list[bool],
) -> AttentionGradients:
    """:meth:`.Plan.prefix_attention_backward`, with the prefixes gathered if the plan needs that."""
    if not args.has_chains or plan.reads_chains:
        return plan.prefix_attention_backward(dout, dlse, out, lse, args, needs)
    rows = _rows_of(args)
    _, dk, dv, dprefix_k, dprefix_v, *_ = needs
    in_sequence = rows.reads_sequence
    inner = [*needs[:3], dprefix_k or (in_sequence and dk), dprefix_v or (in_sequence and dv), *needs[5:]]
    if isinstance(plan, RowPlan):
        found = plan.attention_of_rows_backward(dout, dlse, out, lse, _with_ids(args, rows), inner, rows.places)
    else:
        found = plan.prefix_attention_backward(dout, dlse, out, lse, _with_bank(args, rows), inner)
    for dgathered in (found.dprefix_k, found.dprefix_v):
        if dgathered.numel():
            rows.fold(dgathered)
    if in_sequence and dk:
        rows.add_to_sequence(found.dprefix_k, found.dk)
    if in_sequence and dv:
        rows.add_to_sequence(found.dprefix_v, found.dv)
    return found._replace(
        dprefix_k=rows.to_bank(found.dprefix_k, args.prefix_k) if dprefix_k else out.new_empty(0),
        dprefix_v=rows.to_bank(found.dprefix_v, args.prefix_v) if dprefix_v else out.new_empty(0),
    )


def gathered(args: AttentionArgs) -> AttentionArgs:
    """A call that has chains as one with a bank of these: one prefix per sequence, and none in k and v."""
    return _with_bank(args, _rows_of(args))


def _with_bank(args: AttentionArgs, rows: _Rows) -> AttentionArgs:
    return _with_ids(args, rows)._replace(
        prefix_k=rows.gather(args.prefix_k, args.k), prefix_v=rows.gather(args.prefix_v, args.v)
    )


def _with_ids(args: AttentionArgs, rows: _Rows) -> AttentionArgs:
    return args._replace(prefix_ids=rows.ids, prefix_lens=rows.lens, prefix_starts=None, max_prefix_len=None)


class _Piece(NamedTuple):
    """``length`` rows from row ``first`` on: of an entry of the bank or, if ``entry`` is None, of k and v."""

    entry: int | None
    first: int
    length: int


class _Place(NamedTuple):
    """Where a piece begins in the gathered bank."""

    chain: int
    token: int


class _Copies(NamedTuple):
    """Rows of a source and their places in the gathered bank. All are int64 on the device, one number per row.

    Attributes:
        entries: of the bank; 0 for k and v, whose batch size is 1.
        rows: of that entry.
        chains: of the gathered bank.
        tokens: of that chain.
    """

    entries: Tensor
    rows: Tensor
    chains: Tensor
    tokens: Tensor


class _Source(NamedTuple):
    """What comes from the bank, or from k and v.

    Attributes:
        all_copies: of each row, in the order of the gathered bank.
        first_copies: the first one of each row, in the order of the rows.
    """

    all_copies: _Copies
    first_copies: _Copies


class _Fold(NamedTuple):
    """One piece, and the chains that repeat it at the same token.

    Attributes:
        chains: the chains, int64 on the device.
        tokens: the piece's tokens in them.
        first: the chain that contains the piece first.
        first_tokens: the piece's tokens in that chain.
    """

    chains: Tensor
    tokens: slice
    first: int
    first_tokens: slice


@dataclass(frozen=True)
class _Rows:
    """The rows of a gathered bank of C chains.

    Attributes:
        chains: the pieces of each chain.
        ids: int32 [n], the chain of each sequence, -1 for none.
        lens: int32 [C].
        longest: the largest of ``lens``.
        is_full: whether all chains have this length.

    The rest is computed when it is first used: a forward needs no sums, and a :class:`.RowPlan` copies nothing.
    """

    chains: Sequence[tuple[_Piece, ...]]
    ids: Tensor
    lens: Tensor
    longest: int
    is_full: bool

    @functools.cached_property
    def _piece_places(self) -> dict[_Piece, list[_Place]]:
        """The places of each piece, in order."""
        places: dict[_Piece, list[_Place]] = {}
        for number, chain in enumerate(self.chains):
            token = 0
            for piece in chain:
                places.setdefault(piece, []).append(_Place(number, token))
                token += piece.length
        return places

    @functools.cached_property
    def view(self) -> _Piece | None:
        """All rows, if they lie behind each other and need no copy."""
        return _as_view(self.chains)

    @functools.cached_property
    def of_bank(self) -> _Source | None:
        """What comes from the bank, None if nothing does."""
        return _source(self._piece_places, False, self.ids.device)

    @functools.cached_property
    def of_sequence(self) -> _Source | None:
        """What comes from k and v, None if nothing does."""
        return _source(self._piece_places, True, self.ids.device)

    @functools.cached_property
    def folds(self) -> list[_Fold]:
        """The pieces of k and v that occur more than once."""
        places = {piece: at for piece, at in self._piece_places.items() if piece.entry is None}
        return _folds(places, self.ids.device)

    @functools.cached_property
    def reads_sequence(self) -> bool:
        """Whether anything comes from k and v."""
        return any(piece.entry is None for chain in self.chains for piece in chain)

    @functools.cached_property
    def places(self) -> Tensor:
        """int64 [C, longest, 2] on the CPU: the (entry, row) of each token, with entry -1 for k and v."""
        places = torch.zeros(self.lens.shape[0], self.longest, 2, dtype=torch.long)
        for of_chain, chain in zip(places, self.chains, strict=False):  # without any chain, lens is [0]
            token = 0
            for entry, first, length in chain:
                entries, rows = of_chain[token : token + length].unbind(1)
                entries.fill_(-1 if entry is None else entry)
                torch.arange(first, first + length, out=rows)
                token += length
        return places

    def gather(self, prefix: Tensor, sequence: Tensor) -> Tensor:
        """Keys or values [C, Hkv, longest, D] of the chains in the dtype of k, zeros behind shorter chains.

        Args:
            prefix: those of the bank [A, Hkv, P, D].
            sequence: those of the packed sequences [1, Hkv, T, D].
        """
        if self.view is not None:
            entry, first, length = self.view
            source = sequence if entry is None else prefix[entry, None]
            return source[:, :, first : first + length]
        sources = [
            (x, found.all_copies) for x, found in ((prefix, self.of_bank), (sequence, self.of_sequence)) if found
        ]
        shape = (self.lens.shape[0], self.longest, sequence.shape[1], sequence.shape[3])
        if self.is_full and len(sources) == 1:
            ((x, copies),) = sources
            taken = _taken(x, copies.entries, copies.rows)
            return taken.to(sequence.dtype).view(shape).transpose(1, 2)
        gathered = sequence.new_zeros(shape)  # kernels read the rows behind a chain too, so they must be finite
        for x, copies in sources:
            taken = _taken(x, copies.entries, copies.rows)
            gathered[copies.chains, copies.tokens] = taken.to(sequence.dtype)
        return gathered.transpose(1, 2)

    def fold(self, dgathered: Tensor) -> None:
        """Add up the gradients of the copies of each piece of k and v in the first one.

        Args:
            dgathered: the gradient of what :meth:`gather` returns, [C, Hkv, longest, D] in fp32. Changed in place.
        """
        for fold in self.folds:
            dgathered[fold.first, :, fold.first_tokens] += dgathered[fold.chains, :, fold.tokens].sum(0)

    def add_to_sequence(self, dgathered: Tensor, dsequence: Tensor) -> None:
        """Add the folded gradient's rows to the gradient of k or v, which is rounded once more."""
        assert self.of_sequence is not None
        copies, target = self.of_sequence.first_copies, _by_row(dsequence)
        terms = _taken(dgathered, copies.chains, copies.tokens)
        total = _taken(dsequence, copies.entries, copies.rows).to(terms.dtype) + terms
        target[copies.entries, copies.rows] = total.to(target.dtype)

    def to_bank(self, dgathered: Tensor, prefix: Tensor) -> Tensor:
        """The gradient of ``prefix`` [A, Hkv, P, D], contiguous, in the dtype of the gathered one.

        The copies of a row are summed in their order, without atomic operations.
        """
        if self.of_bank is None:
            return dgathered.new_zeros(prefix.shape)
        (entries, num_heads, length, head_dim), first = prefix.shape, self.of_bank.first_copies
        copies = self.of_bank.all_copies
        if first.rows.shape[0] == copies.rows.shape[0] == entries * length:  # every row once: a permutation
            index = _flat_index(dgathered, first.chains, first.tokens)
            by_head = index.view(entries, length, num_heads).transpose(1, 2).flatten()
            return dgathered.view(-1, head_dim).index_select(0, by_head).view(prefix.shape)
        index = _flat_index(prefix, copies.entries, copies.rows)
        if self.is_full and not self.reads_sequence:  # every token, in order
            terms, index = dgathered, index.view(*dgathered.transpose(1, 2).shape[:3]).transpose(1, 2).flatten()
        else:
            terms = _taken(dgathered, copies.chains, copies.tokens)
        summed = torch.ops.aten.embedding_dense_backward(
            terms.reshape(-1, head_dim), index, prefix.shape[:3].numel(), -1, False
        )
        return summed.view(prefix.shape)  # type: ignore[no-any-return]


def _taken(x: Tensor, entries: Tensor, rows: Tensor) -> Tensor:
    """The rows [R, H, D] of x [N, H, L, D], by index_select where x allows it, which is several times faster."""
    if x.is_contiguous():
        taken = x.view(-1, x.shape[3]).index_select(0, _flat_index(x, entries, rows))
        return taken.view(-1, x.shape[1], x.shape[3])
    if x.shape[0] == 1:
        return _by_row(x)[0].index_select(0, rows)
    return _by_row(x)[entries, rows]


def _flat_index(x: Tensor, entries: Tensor, rows: Tensor) -> Tensor:
    """Where the rows of x [N, H, L, D], each with all H heads, lie among its N * H * L rows of D elements."""
    heads = torch.arange(x.shape[1], device=x.device)
    return ((entries[:, None] * x.shape[1] + heads) * x.shape[2] + rows[:, None]).flatten()


def _by_row(x: Tensor) -> Tensor:
    """[N, H, L, D] as [N, L, H, D], a view."""
    return x.transpose(1, 2)


def _rows_of(args: AttentionArgs) -> _Rows:
    ids, lens, starts = args.prefix_ids, args.prefix_lens, args.prefix_starts
    assert ids is not None
    bank, _, prefix_len, _ = args.prefix_k.shape

    def compute() -> _Rows:
        prefixes = _prefixes(bank, prefix_len, lens, starts)
        by_sequence = host_values(ids).reshape(ids.shape[0], ids.shape[1:].numel())
        return _rows(by_sequence.tolist(), prefixes, ids.device)

    return derived("gathered prefixes", (ids, lens, starts), (bank, prefix_len), compute)


def _prefixes(bank: int, prefix_len: int, lens: Tensor | None, starts: Tensor | None) -> list[list[_Piece]]:
    """The pieces of each prefix: those in k and v are cut where another one of them begins or ends."""
    lengths = [prefix_len] * bank if lens is None else host_values(lens).tolist()
    firsts = [] if starts is None else host_values(starts).tolist()
    spans = [(first, first + length) for first, length in zip(firsts, lengths[bank:], strict=True)]
    cuts = sorted({end for span in spans for end in span})
    prefixes = [[_Piece(entry, 0, length)] if length else [] for entry, length in enumerate(lengths[:bank])]
    for first, end in spans:
        ends = cuts[bisect_left(cuts, first) : bisect_right(cuts, end)]
        prefixes.append([_Piece(None, a, b - a) for a, b in itertools.pairwise(ends)])
    return prefixes


def _rows(ids: list[list[int]], prefixes: list[list[_Piece]], device: torch.device) -> _Rows:
    chains: dict[tuple[_Piece, ...], int] = {}
    numbers = []
    for row in ids:
        chain = tuple(piece for i in row if i >= 0 for piece in prefixes[i])
        numbers.append(chains.setdefault(chain, len(chains)) if chain else -1)
    lens = [sum(piece.length for piece in chain) for chain in chains] or [0]
    return _Rows(
        list(chains),
        constant(torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)),
        constant(torch.tensor(lens, dtype=torch.int32).to(device, non_blocking=True)),
        max(lens), min(lens) == max(lens),
    )  # fmt: skip


def _as_view(chains: Sequence[tuple[_Piece, ...]]) -> _Piece | None:
    """The rows of the only chain, if its pieces lie behind each other."""
    if len(chains) != 1:
        return None
    first, *others = chains[0]
    length = first.length
    for piece in others:
        if (piece.entry, piece.first) != (first.entry, first.first + length):
            return None
        length += piece.length
    return first._replace(length=length)


def _source(places: dict[_Piece, list[_Place]], in_sequence: bool, device: torch.device) -> _Source | None:
    """The copies from k and v if ``in_sequence``, else those from the bank."""
    found = {piece: at for piece, at in places.items() if (piece.entry is None) == in_sequence}
    if not found:
        return None
    all_copies = sorted((place, piece) for piece, at in found.items() for place in at)
    first_copies = [
        (at[0], piece) for piece, at in sorted(found.items(), key=lambda x: (x[0].entry or 0, x[0].first))
    ]
    return _Source(_copies(all_copies, device), _copies(first_copies, device))


def _copies(placed: list[tuple[_Place, _Piece]], device: torch.device) -> _Copies:
    """One number per row of the pieces."""
    pieces = torch.tensor([(piece.entry or 0, piece.first, *place, piece.length) for place, piece in placed])
    *starts, lengths = pieces.unbind(1)
    index = torch.repeat_interleave(lengths)  # the piece of each row
    within = torch.arange(index.shape[0]) - (lengths.cumsum(0) - lengths)[index]
    entries, rows, chains, tokens = (x[index] for x in starts)
    return _Copies(*torch.stack([entries, rows + within, chains, tokens + within]).to(device, non_blocking=True))


def _folds(places: dict[_Piece, list[_Place]], device: torch.device) -> list[_Fold]:
    found: list[tuple[list[int], tuple[slice, int, slice]]] = []
    for piece, (first, *others) in places.items():
        by_token: dict[int, list[int]] = {}
        for place in others:
            by_token.setdefault(place.token, []).append(place.chain)
        for token, chains in by_token.items():
            tokens, first_tokens = (slice(start, start + piece.length) for start in (token, first.token))
            found.append((chains, (tokens, first.chain, first_tokens)))
    lengths = [len(chains) for chains, _ in found]
    numbers = torch.tensor([chain for chains, _ in found for chain in chains], dtype=torch.long)
    parts = numbers.to(device, non_blocking=True).split(lengths)
    return [_Fold(part, *rest) for part, (_, rest) in zip(parts, found, strict=True)]
