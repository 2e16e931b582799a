# SPDX-License-Identifier: Apache-2.0
"""A padded batch packed into one sequence of rows: each prompt once, then the sequences without their padding.

::

    batch [B, S]                        packed batch [1, N], N = A * P + T

    a a a . .                           prompt 0 | ... | prompt A-1 | a a a | b b b b b | c c
    b b b b b          ──────►          └─ attend to themselves  ─┘ └─ attend to their prompt and to themselves ─┘
    c c . . .

Under causal attention the hidden states of a prompt do not depend on the tokens after it. They are therefore computed
once instead of once per sample. Embeddings are packed before the first layer, all layers run on the packed batch, and
hidden states or logits are unpacked after the last layer. A prefix of keys and values needs no rows; A is 0 then.

Text that sequences share lies in the packed batch once, if the layout has segments (:mod:`.sharing`). Each segment
attends to its ancestors, which are rows of the packed batch, and to itself.

This module knows nothing about models; it maps tensors to tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import constant, host_values
from .deferred import deferred_rows
from .layout import IGNORED, Layout, Segments, indices_of

__all__ = ["LogitRows", "PackedBatch"]

#: The most that the fp32 copies of a gradient in half precision may take, unless one column takes more.
_CHUNK_BYTES = 16 * 2**20


class PackedBatch:
    """A packed batch with its prompts: N = A * P + T rows.

    Args:
        layout: of the sequences.
        prompts: [A, P, E], each run once; None for a prefix that has no rows.
        prompt_ids: [B], the prompt of each sample; None if all samples have the same prompt.
        prompt_lens: [A], the number of tokens of each prompt, and an id of -1 stands for none; None if all have P.
        show_prompts: whether unpacked outputs are [B, P + S], as if each sample had contained its prompt.

    Attributes:
        cu_seqlens, prefix_ids, key_mask, max_seqlen, prefix_start: arguments of :func:`peftkern.prefix_attention` for
            the packed batch; prompts are sequences without a prefix. With segments, :meth:`chains` replaces the last.
        used: whether the model has run on it.
        numbered_from: the position of the first token of a prompt, and of a sequence whose caller gave no positions.
        logit_rows: the rows that the output layer runs on; None if it sees the unpacked batch.
    """

    def __init__(
        self,
        layout: Layout,
        prompts: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        *,
        prompt_lens: Tensor | None = None,
        show_prompts: bool = False,
    ) -> None:
        self.layout = layout
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.prompt_lens = prompt_lens
        self.show_prompts = show_prompts
        self.used = False
        self.numbered_from = (0, 0)
        self.logit_rows: LogitRows | None = None
        self.cu_seqlens, self.prefix_ids = layout.cu_seqlens, None
        self.key_mask = None if layout.key_mask is None else layout.key_mask[None]
        self.num_prompts, self.prompt_len = (0, 0) if prompts is None else (prompts.shape[0], prompts.shape[1])
        self.prompt_rows = self.num_prompts * self.prompt_len
        self.max_seqlen = max(layout.longest, self.prompt_len)
        has_segments = layout.segments is not None
        has_one = self.num_prompts == 1 and prompt_lens is None
        self.prefix_start = self.prompt_len if has_one and not has_segments else None
        self._chains: dict[tuple[int, torch.device], dict[str, Any]] = {}
        if prompts is None:
            self._mark_constants()
            return
        device = layout.cu_seqlens.device
        begins = torch.arange(self.num_prompts, device=device, dtype=torch.int32) * self.prompt_len
        self.cu_seqlens = torch.cat([begins, self.prompt_rows + layout.cu_seqlens])
        if not has_segments:
            self.prefix_ids = torch.cat([begins.new_full((self.num_prompts,), -1), self.sequence_prompts().int()])
        if self.key_mask is not None:
            self.key_mask = torch.nn.functional.pad(self.key_mask, (self.prompt_rows, 0), value=True)
        self._mark_constants()

    def _mark_constants(self) -> None:
        """Let the layers share what backends compute from the offsets and masks, which belong to this batch."""
        if not torch.compiler.is_compiling():
            for x in (self.cu_seqlens, self.prefix_ids, self.key_mask):
                if x is not None:
                    constant(x)

    def sequence_prompts(self) -> Tensor:
        """[n], the prompt of each sequence."""
        owners = self.layout.owners
        if self.prompt_ids is None:
            return torch.zeros_like(self.layout.firsts)
        return self.prompt_ids if owners is None else self.prompt_ids[owners]

    def prompt_end(self, sequences: Tensor) -> tuple[Tensor, Tensor | int]:
        """(the last row of the prompt of each sequence, the number of its tokens).

        Args:
            sequences: [n], the prompt of each sequence; without a prompt, the row is any.
        """
        if self.prompt_lens is None:
            return (sequences + 1) * self.prompt_len - 1, self.prompt_len
        lens = torch.where(sequences < 0, 0, self.prompt_lens.to(sequences.device)[sequences.long()])
        return (sequences * self.prompt_len + lens - 1).clamp(min=0), lens

    def chains(self, prefix_len: int, device: torch.device) -> dict[str, Any]:
        """Arguments of :func:`peftkern.prefix_attention` for a layout with segments.

        Prefix 0 is the learned one of ``prefix_len`` tokens. The others are the prompts and then the segments, which
        lie in the rows of the packed batch.
        """
        segments, key = self.layout.segments, (prefix_len, device)
        assert segments is not None
        if key not in self._chains:
            prompts = torch.arange(self.num_prompts)
            offsets = self.prompt_rows + segments.offsets
            starts = torch.cat([prompts * self.prompt_len, offsets[:-1]])
            lens = torch.cat([torch.tensor([prefix_len]), torch.full_like(prompts, self.prompt_len), offsets.diff()])
            ids = self._chain_ids(segments)
            lengths = torch.where(ids < 0, 0, lens[ids]).sum(1)
            tensors = {"prefix_ids": ids.int(), "prefix_starts": starts.int(), "prefix_lens": lens.int()}
            self._chains[key] = {**_constants(tensors, device), "max_prefix_len": int(lengths.max())}
        return self._chains[key]

    def _chain_ids(self, segments: Segments) -> Tensor:
        """[A + m, K] the prefixes of the prompts, which have none, and of the segments."""
        chain = [torch.zeros_like(segments.owners)]
        if self.num_prompts:
            ids = chain[0] if self.prompt_ids is None else host_values(self.prompt_ids)
            chain.append(1 + (ids if self.prompt_ids is None else ids[segments.owners]))
        ancestors = torch.where(segments.ancestors < 0, -1, segments.ancestors + (1 + self.num_prompts))
        ids = torch.cat([torch.stack(chain, 1), ancestors], 1)
        return torch.cat([ids.new_full((self.num_prompts, ids.shape[1]), -1), ids])

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The different texts of a batch with segments and one sequence per sample.

        Returns:
            ([C, longest] the rows of each text, [C] their lengths, [B] the text of each sample, -1 for an empty one);
            behind shorter texts stands row ``prompt_rows``.
        """
        segments = self.layout.segments
        assert segments is not None
        used = segments.last[segments.last >= 0].unique()
        offsets = segments.offsets.tolist()
        chains = [segments.chain(last) for last in used.tolist()]
        texts = [torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in chain]) for chain in chains]
        rows = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        ids = torch.where(segments.last < 0, -1, torch.searchsorted(used, segments.last))
        return rows + self.prompt_rows, torch.tensor([len(text) for text in texts]), ids

    def text_places(self) -> Tensor:
        """[B, S], the token of its sample's text (:meth:`texts`) at each place; padding has that of a neighbour."""
        rows = self.layout.rows
        return torch.nn.functional.pad(rows.diff(dim=1) != 0, (1, 0)).cumsum(1)

    def embeddings(self, sequences: Tensor) -> Tensor:
        """[1, T, E], the embeddings of the sequences -> [1, N, E], with those of the prompts before them."""
        if self.prompts is None:
            return sequences
        rows = self.prompts.flatten(0, 1)[None].to(sequences.device, sequences.dtype)
        return torch.cat([rows, sequences], 1)

    def positions(self, offset: int | Tensor) -> Tensor:
        """[1, N], position ids: prompts start at 0, sequences at ``offset`` plus the length of the prompt.

        Args:
            offset: of all sequences, or [n].
        """
        positions, (prompt, sequence) = self.layout.positions, self.numbered_from
        positions = torch.where(positions < 0, positions, positions + (self._before(offset) + sequence))
        return torch.cat([self._prompt_positions(positions.device) + prompt, positions])[None]

    def positions_of(self, given: Tensor, offset: int | Tensor) -> Tensor:
        """[K, B or 1, S], position ids of the sequences in K dimensions -> [K, 1, N]: see :meth:`positions`."""
        given = given.expand(-1, self.layout.shape[0], -1)
        positions = self.layout.pack(given.movedim(0, -1)).movedim(-1, 0) + self._before(offset)
        prompts = self._prompt_positions(given.device) + self.numbered_from[0]
        return torch.cat([prompts.expand(given.shape[0], 1, -1), positions], -1)

    def _before(self, offset: int | Tensor) -> int | Tensor:
        """The number of positions before a sequence, or before that of each row [T]."""
        before = offset + (
            self.prompt_len if self.prompt_lens is None else self.prompt_end(self.sequence_prompts())[1]
        )
        if not isinstance(before, Tensor):
            return before
        rows, lengths = self.layout.positions, self.layout.cu_seqlens.diff()
        return before.to(rows.device).repeat_interleave(lengths, output_size=rows.shape[0])

    def _prompt_positions(self, device: torch.device) -> Tensor:
        """[A * P]."""
        return torch.arange(self.prompt_len, device=device).repeat(self.num_prompts)

    def bank(self, x: Tensor) -> Tensor:
        """[1, Hkv, N, D] -> [A, Hkv, P, D], a view of the prompts' rows."""
        return self._as_bank(x[0, :, : self.prompt_rows])

    def with_bank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [1, Hkv, N, D] and its :meth:`bank`, for an attention that reads both.

        Returns:
            (``x`` for the rows, [A, Hkv, P, D]), views of which the gradients are added in place.
        """
        if not x.requires_grad or torch.compiler.is_compiling():
            return x, self.bank(x)
        x, rows = _WithFirstRows.apply(x, self.prompt_rows)
        return x, self._as_bank(rows)

    def _as_bank(self, rows: Tensor) -> Tensor:
        """[Hkv, A * P, D] -> [A, Hkv, P, D]."""
        return rows.view(rows.shape[0], self.num_prompts, self.prompt_len, rows.shape[2]).transpose(0, 1)

    def padded_heads(self, x: Tensor) -> Tensor:
        """[1, Hkv, N, D] -> [B, Hkv, S, D] of the sequences."""
        rows = x[0].index_select(1, (self.prompt_rows + self.layout.rows.flatten()).to(x.device))
        return rows.view(x.shape[1], *self.layout.shape, x.shape[3]).transpose(0, 1)

    def shown_rows(self) -> Tensor:
        """[B, S], or [B, P + S] with ``show_prompts``: the packed row that each place of the batch shows."""
        rows = self.prompt_rows + self.layout.rows
        if not self.show_prompts:
            return rows
        prompts = torch.arange(self.prompt_len, device=rows.device).expand(rows.shape[0], -1)
        if self.prompt_ids is not None:
            prompts = prompts + self.prompt_ids[:, None] * self.prompt_len
        if self.prompt_len and not self.layout.several_per_row:
            # Padding before a sequence shows the prompt's last row, from which a loss predicts the first token.
            places = torch.arange(rows.numel(), device=rows.device).view(rows.shape)
            rows = torch.where(places < self.layout.firsts.to(rows.device)[:, None], prompts[:, -1:], rows)
        return torch.cat([prompts, rows], 1)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, E] -> [B, S or P + S, E]; padding shows the row before it."""
        if self.prompts is None and self.layout.tokens is None:
            return x.view(*self.layout.shape, x.shape[-1])
        return take_rows(x[0], self.shown_rows(), repeat=self.layout.segments is not None)


def _constants(host: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of one dtype as :func:`.constant` ones on ``device``: one transfer that nobody waits for."""
    moved = torch.cat([x.flatten() for x in host.values()]).to(device, non_blocking=True)
    parts = moved.split([x.numel() for x in host.values()])
    return {name: constant(part.view(x.shape), host=x) for (name, x), part in zip(host.items(), parts, strict=True)}


def take_rows(x: Tensor, rows: Tensor, *, repeat: bool) -> Tensor:
    """``x[rows]``.

    Args:
        x: [N, E].
        rows: [...], from 0 to N - 1.
        repeat: whether a row is likely to occur many times. Its gradient is then summed in fp32.

    Returns:
        [..., E].
    """
    rows = rows.to(x.device)
    if repeat and x.requires_grad and x.dtype != torch.float64:
        return _RepeatedRows.apply(x, rows)  # type: ignore[no-any-return]
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


class _RepeatedRows(torch.autograd.Function):
    """:func:`take_rows` with a gradient that is summed in fp32.

    In half precision it is summed a few columns at a time. An fp32 copy of logits would take gigabytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return torch.embedding(x, rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        if dout.dtype == torch.float32:
            return _sum_by_row(dout, rows, ctx.num_rows), None
        dx = dout.new_empty(ctx.num_rows, dout.shape[-1])
        width = max(1, _CHUNK_BYTES // (4 * max(1, rows.numel() + ctx.num_rows)))
        for chunk, dx_chunk in zip(dout.split(width, -1), dx.split(width, -1), strict=True):
            dx_chunk.copy_(_sum_by_row(chunk.float(), rows, ctx.num_rows))
        return dx, None


def _sum_by_row(dout: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The gradient [N, E] of ``x[rows]`` from that of its result [..., E], summed in the dtype of ``dout``."""
    return torch.ops.aten.embedding_dense_backward(dout, rows, num_rows, -1, False)  # type: ignore[no-any-return]


class _WithFirstRows(torch.autograd.Function):
    """x [1, Hkv, N, D] -> (x, its first rows [Hkv, num_rows, D]), both views.

    Both are read by one attention, which allocates its gradient of x; the rows' gradient is added to it in place.
    Autograd itself would fill two tensors of x's size with zeros and add the second one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.num_rows = x.shape, num_rows
        return x.view_as(x), x[0, :, :num_rows]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dx: Tensor | None, drows: Tensor | None) -> tuple[Tensor | None, None]:
        if drows is not None:
            if dx is None:
                dx = drows.new_zeros(ctx.shape)
            elif 0 in dx.stride():  # expanded
                dx = dx.clone()
            dx[0, :, : ctx.num_rows].add_(drows)
        return dx, None


class LogitRows:
    """The rows that the output layer runs on, and the label that each of them predicts.

    The loss of a causal language model compares row i with label i + 1, and ignores the last row. In a packed batch
    the last row of a prompt predicts the first token of every sequence. The selection therefore begins with that row,
    once per sequence, and ends with one more row, which the loss ignores.

    Args:
        packed: the packed batch.
        labels: [B, S] or None.
        labelled: select only the rows that predict a label.
        keep: without labels, the number of last places of the batch to select, or their indices; 0 selects all.
        num_labelled: the number of rows that predict a label, if the host knows it.

    Attributes:
        rows: [M], indices into the packed batch; None for all N rows.
        labels: [1, M], for the model's own shifted loss.
    """

    def __init__(
        self,
        packed: PackedBatch,
        labels: Tensor | None,
        *,
        labelled: bool,
        keep: int | Tensor = 0,
        num_labelled: int | None = None,
    ) -> None:
        self.rows: Tensor | None = None
        self.labels: Tensor | None = None
        #: [B, S or P + S], index into ``rows`` of the row shown at each place; None if outputs stay packed.
        self._shown: Tensor | None = None
        #: [B, keep] if the rows are those shown, in order.
        self._shape: torch.Size | None = None
        self._repeat = packed.layout.segments is not None
        if labels is not None:
            self._select_labelled(packed, labels.to(packed.cu_seqlens.device), labelled, num_labelled)
            return
        shown = packed.shown_rows()
        if isinstance(keep, Tensor) or keep != 0:
            shown = shown[:, keep.to(shown.device)] if isinstance(keep, Tensor) else shown[:, -keep:]
            self.rows, self._shape = shown.flatten(), shown.shape
        elif packed.prompts is not None and not packed.show_prompts:
            self.rows = packed.prompt_rows + torch.arange(packed.layout.positions.shape[0], device=shown.device)
            self._shown = shown - packed.prompt_rows
        else:
            self._shown = shown

    def _select_labelled(self, packed: PackedBatch, labels: Tensor, labelled: bool, count: int | None) -> None:
        layout, num_shown = packed.layout, packed.prompt_rows if packed.show_prompts else 0
        if labelled:  # each label, even if several tokens share a row
            targets = layout.targets(labels).flatten()
            rows = packed.prompt_rows + layout.rows.flatten()
        else:
            targets = layout.pack(layout.targets(labels))[0]
            rows = packed.prompt_rows + torch.arange(targets.shape[0], device=targets.device)
        if layout.segments is not None and not labelled:
            repeated = layout.segments.repeated.to(rows.device, non_blocking=True)
            rows = torch.cat([rows, packed.prompt_rows + layout.rows.flatten()[repeated]])
            targets = torch.cat([targets, layout.targets(labels).flatten()[repeated]])
        num_before = 0
        if packed.prompts is not None:
            prompts, firsts = packed.sequence_prompts(), labels.flatten()[layout.firsts]
            last, _ = packed.prompt_end(prompts)
            rows = torch.cat([last, torch.arange(num_shown, device=rows.device), rows])
            firsts = firsts.masked_fill(prompts < 0, IGNORED)  # without a prompt, nothing predicts the first token
            targets = torch.cat([firsts, targets.new_full((num_shown,), IGNORED), targets])
            num_before = last.shape[0] + num_shown
        if labelled:
            chosen = targets != IGNORED
            chosen_rows = indices_of(chosen, int(chosen.sum()) if count is None else count)
            rows, targets = rows[chosen_rows], targets[chosen_rows]
        else:
            self._shown = packed.shown_rows() + (num_before - packed.prompt_rows)
        self.rows = torch.nn.functional.pad(rows, (0, 1))
        self.labels = torch.nn.functional.pad(targets, (1, 0), value=IGNORED)[None]

    def select(self, hidden: Tensor) -> Tensor:
        """[1, N, E] -> [1, M, E]."""
        return hidden if self.rows is None else take_rows(hidden[0], self.rows, repeat=self._repeat)[None]

    def unpack(self, logits: Tensor, *, deferred: bool = False) -> Tensor:
        """[1, M, V] -> [B, S or P + S, V]; with ``labelled``, [1, M - 1, V], one row per label, in order.

        Args:
            logits: of the rows that the output layer has run on.
            deferred: copy rows when an operation first reads them (:mod:`.deferred`).
        """
        if self._shape is not None:
            return logits.view(*self._shape, logits.shape[-1])
        if self._shown is None:
            return logits[:, :-1]
        shown = self._shown.to(logits.device)
        if deferred:
            return deferred_rows(logits[0], shown)
        return take_rows(logits[0], shown, repeat=self._repeat)
