# SPDX-License-Identifier: Apache-2.0
"""A padded batch as one stream of rows: prompts once, then the sequences without their padding.

::

    batch [B, S]                        stream [1, N], N = A * P + T

    a a a . .                           prompt 0 | ... | prompt A-1 | a a a | b b b b b | c c
    b b b b b          ──────►          └── causal, by themselves ─┘ └─ each sees its own prompt's keys and itself ─┘
    c c . . .

Under causal attention the hidden states of a prompt do not depend on what follows it, so they are computed once and
not once a sample. Every layer of the model runs on the stream; embeddings are laid into it before the first, and
hidden states or logits are laid back into the batch behind the last. A prefix of keys and values needs no rows: there
A is 0.

Nothing here knows of models: tensors in, tensors out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

__all__ = ["Head", "Layout", "Stream", "next_labels"]

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a batch [B, S] lie in a stream of T rows (prompts aside).

    Attributes:
        shape: (B, S).
        tokens: [T] flat index of each row's token in the batch; None if all B * S are there, in order.
        slots: [B, S] the row of each token. Of padding that has no row, the nearest row of its sequence before it, or
            its first one.
        positions: [T] of each row within its sequence, from 0.
        cu_seqlens: int32 [n + 1], where the n sequences begin, and T.
        owners: [n], the sample of each sequence; None if there is one sequence a sample, in order.
        firsts: [n] flat index of each sequence's first token in the batch.
        key_mask: bool [T], false for rows of padding, kept for the sake of their loss; None if there are none.
        unlabelled: bool [T], true for padding before a sequence, whose labels are no labels; None if there is none.
    """

    shape: tuple[int, int]
    tokens: Tensor | None
    slots: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    owners: Tensor | None
    firsts: Tensor
    key_mask: Tensor | None
    unlabelled: Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        needed: Tensor | None = None,
        keep_padding: bool = False,
        keep_gaps: bool = False,
        from_first: bool = False,
        count_mask: bool = False,
    ) -> Layout:
        """The layout of a batch.

        Args:
            shape: (B, S).
            device: of the layout.
            mask: [B, S], 0 for padding.
            position_ids: [B or 1, S]. Without a mask, a position that does not follow the one before it begins
                another sequence, as in ``transformers``.
            needed: bool [B, S], padding whose rows are kept all the same, unseen by others.
            keep_padding: keep all rows; so it is always while tracing, where T may not depend on values.
            keep_gaps: keep what lies between kept rows, as sliding windows count it.
            from_first: a sequence begins at its first token and not at column 0.
            count_mask: positions count tokens of the mask, and padding is at -1 whatever lies before it (OPT).

        Raises:
            ValueError: for several sequences a row while tracing.
        """
        rows, length = shape
        steps = torch.arange(length, device=device)
        if position_ids is not None:
            position_ids = position_ids.to(device).expand(rows, length)
        if mask is None and position_ids is not None:
            return cls._of_packed_rows(shape, position_ids)
        begin = torch.arange(rows, device=device)[:, None] * length
        every = begin + steps
        starts = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        if mask is None:
            return cls(shape, None, every, steps.repeat(rows), starts, None, begin.flatten(), None)

        real = mask.to(device=device, dtype=torch.bool)
        tracing = is_tracing(real)
        # argmax: the first of equal values; 0 for a row without tokens. Empty rows have no argmax.
        if from_first and length:
            first = real.to(torch.int8).argmax(1)
        else:
            first = torch.zeros(rows, dtype=torch.long, device=device)
        if count_mask:
            position = torch.where(real, real.long().cumsum(1) - 1, -1)
        elif position_ids is not None:
            position = position_ids
        else:
            position = (steps - first[:, None]).clamp(min=0)
        firsts = begin.flatten() + first

        if keep_padding or tracing:
            # Padding before a sequence goes behind it, where windows and causality do not count it.
            turned = begin + (steps + first[:, None]) % max(length, 1)
            slots = begin + (steps - first[:, None]) % max(length, 1)
            tokens = turned.flatten()
            before = (steps < first[:, None]).flatten()[tokens]
            return cls(
                shape, tokens, slots, position.flatten()[tokens], starts, None, firsts, real.flatten()[tokens], before
            )

        keep = (real if needed is None else real | needed) & (steps >= first[:, None])
        if keep_gaps:
            last = torch.where(keep, steps, -1).amax(1, keepdim=True) if length else first[:, None]
            keep = (steps >= first[:, None]) & (steps <= last)
        hidden = keep & ~real
        counts = keep.sum(1)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        last_row = (cu_seqlens[1:, None].long() - 1).clamp(min=0)
        ranks = (keep.long().cumsum(1) - 1).clamp(min=0)
        slots = torch.minimum(cu_seqlens[:-1, None].long() + ranks, last_row)
        key_mask = real.flatten() if bool(hidden.any()) else None
        if bool(keep.all()):
            return cls(shape, None, every, position.flatten(), starts, None, firsts, key_mask)
        kept = keep.flatten().nonzero().squeeze(1)
        key_mask = None if key_mask is None else key_mask[kept]
        return cls(shape, kept, slots, position.flatten()[kept], cu_seqlens, None, firsts, key_mask)

    @classmethod
    def _of_packed_rows(cls, shape: tuple[int, int], position_ids: Tensor) -> Layout:
        """Several sequences a row, told apart by their positions."""
        rows, length = shape
        if is_tracing(position_ids):
            raise ValueError(
                "position_ids: expected an attention_mask beside them under torch.compile, as the number of packed "
                "sequences depends on their values, got None"
            )
        begins = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        firsts = begins.flatten().nonzero().squeeze(1)
        ends = torch.nn.functional.pad(firsts, (0, 1), value=rows * length).to(torch.int32)
        slots = torch.arange(rows * length, device=position_ids.device).view(shape)
        owners = firsts // max(length, 1)
        return cls(shape, None, slots, position_ids.flatten(), ends, owners, firsts, None)

    @property
    def packed_rows(self) -> bool:
        """Whether a row of the batch held several sequences."""
        return self.owners is not None and self.owners.shape[0] > self.shape[0]

    @property
    def leaves_out(self) -> bool:
        """Whether rows of the batch are not in the stream."""
        return self.positions.shape[0] < self.shape[0] * self.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]."""
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x[self.tokens.to(x.device)]).unsqueeze(0)


class Stream:
    """A packed batch with its prompts: N = A * P + T rows.

    Args:
        layout: of the sequences.
        prompts: [A, P, E], run once each; None for a prefix that has no rows.
        prompt_ids: [B], which prompt a sample has; None for the one prompt of all.
        show_prompts: whether outputs of the batch are [B, P + S], as if each sample had carried its prompt.

    Attributes:
        cu_seqlens, prefix_ids, key_mask: arguments of :func:`peftkern.prefix_attention` for the stream; prompts are
            sequences without a prefix.
        used: whether the model has run on it.
    """

    def __init__(
        self,
        layout: Layout,
        prompts: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        *,
        show_prompts: bool = False,
    ) -> None:
        self.layout = layout
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.show_prompts = show_prompts
        self.used = False
        self.head: Head | None = None
        self.cu_seqlens, self.prefix_ids = layout.cu_seqlens, None
        self.key_mask = None if layout.key_mask is None else layout.key_mask[None]
        self.num_prompts, self.prompt_len = (0, 0) if prompts is None else (prompts.shape[0], prompts.shape[1])
        self.prompt_rows = self.num_prompts * self.prompt_len
        if prompts is None:
            return
        device = layout.cu_seqlens.device
        begins = torch.arange(self.num_prompts, device=device, dtype=torch.int32) * self.prompt_len
        self.cu_seqlens = torch.cat([begins, self.prompt_rows + layout.cu_seqlens])
        self.prefix_ids = torch.cat([begins.new_full((self.num_prompts,), -1), self.sequence_prompts().int()])
        if self.key_mask is not None:
            self.key_mask = torch.nn.functional.pad(self.key_mask, (self.prompt_rows, 0), value=True)

    def sequence_prompts(self) -> Tensor:
        """[n], the prompt of each sequence."""
        owners = self.layout.owners
        if self.prompt_ids is None:
            return torch.zeros_like(self.layout.firsts)
        return self.prompt_ids if owners is None else self.prompt_ids[owners]

    def embeddings(self, sequences: Tensor) -> Tensor:
        """[1, T, E] of the sequences' tokens -> [1, N, E], the prompts' before them."""
        if self.prompts is None:
            return sequences
        rows = self.prompts.flatten(0, 1)[None].to(sequences.device, sequences.dtype)
        return torch.cat([rows, sequences], 1)

    def positions(self, offset: int) -> Tensor:
        """[1, N]: prompts from 0, sequences behind the prompt and ``offset``."""
        positions = self.layout.positions
        positions = torch.where(positions < 0, positions, positions + (offset + self.prompt_len))
        prompt = torch.arange(self.prompt_len, device=positions.device).repeat(self.num_prompts)
        return torch.cat([prompt, positions])[None]

    def bank(self, x: Tensor) -> Tensor:
        """[1, Hkv, N, D] -> [A, Hkv, P, D], a view of the prompts' rows."""
        rows = x[0, :, : self.prompt_rows]
        return rows.view(x.shape[1], self.num_prompts, self.prompt_len, x.shape[3]).transpose(0, 1)

    def padded_heads(self, x: Tensor) -> Tensor:
        """[1, Hkv, N, D] -> [B, Hkv, S, D] of the sequences."""
        rows = x[0].index_select(1, (self.prompt_rows + self.layout.slots.flatten()).to(x.device))
        return rows.view(x.shape[1], *self.layout.shape, x.shape[3]).transpose(0, 1)

    def slots(self) -> Tensor:
        """[B, S] or, with ``show_prompts``, [B, P + S]: the row of the stream that each place of the batch shows."""
        slots = self.prompt_rows + self.layout.slots
        if not self.show_prompts:
            return slots
        steps = torch.arange(self.prompt_len, device=slots.device)
        if self.prompt_ids is None:
            return torch.cat([steps.expand(slots.shape[0], -1), slots], 1)
        return torch.cat([self.prompt_ids[:, None] * self.prompt_len + steps, slots], 1)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, E] -> [B, S or P + S, E]; padding shows the row before it."""
        if self.prompts is None and self.layout.tokens is None:
            return x.view(*self.layout.shape, x.shape[-1])
        slots = self.slots().to(x.device)
        return x[0].index_select(0, slots.flatten()).view(*slots.shape, x.shape[-1])


def next_labels(labels: Tensor) -> Tensor:
    """[B, S] -> [B, S]: the label that each row predicts, the one after it."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Head:
    """Which rows the output layer runs on, and what each of them predicts.

    Models compare row i with label i + 1, and the last row with nothing. In a stream the last row of a prompt
    predicts the first token of every sequence, so it is there once a sequence, before all others; and any row is
    there once more at the end.

    Args:
        stream: the packed batch.
        labels: [B, S] or None.
        labelled: run on the rows that predict a label alone.
        keep: with no labels, the last so many places of the batch, or their indices; 0 for all.

    Attributes:
        rows: [M] of the stream; None for all N.
        labels: [1, M] for the model's own shifted loss.
    """

    def __init__(self, stream: Stream, labels: Tensor | None, *, labelled: bool, keep: int | Tensor = 0) -> None:
        self.rows: Tensor | None = None
        self.labels: Tensor | None = None
        self._slots: Tensor | None = None
        if labels is not None:
            self._supervise(stream, labels.to(stream.cu_seqlens.device), labelled)
            return
        slots = stream.slots()
        if isinstance(keep, Tensor) or keep != 0:
            slots = slots[:, keep.to(slots.device)] if isinstance(keep, Tensor) else slots[:, -keep:]
            self.rows = slots.flatten()
            self._slots = torch.arange(self.rows.shape[0], device=slots.device).view(slots.shape)
        elif stream.prompts is not None and not stream.show_prompts:
            self.rows = stream.prompt_rows + torch.arange(stream.layout.positions.shape[0], device=slots.device)
            self._slots = slots - stream.prompt_rows
        else:
            self._slots = slots

    def _supervise(self, stream: Stream, labels: Tensor, labelled: bool) -> None:
        layout, shown = stream.layout, stream.prompt_rows if stream.show_prompts else 0
        targets = layout.pack(next_labels(labels))[0]
        if layout.owners is not None:  # the next token is another sequence's
            targets = targets.index_fill(0, layout.cu_seqlens[1:].long() - 1, IGNORED)
        if layout.unlabelled is not None:
            targets = targets.masked_fill(layout.unlabelled, IGNORED)
        rows = stream.prompt_rows + torch.arange(targets.shape[0], device=targets.device)
        num_before = 0
        if stream.prompts is not None:
            last = (stream.sequence_prompts() + 1) * stream.prompt_len - 1
            rows = torch.cat([last, torch.arange(shown, device=rows.device), rows])
            targets = torch.cat([labels.flatten()[layout.firsts], targets.new_full((shown,), IGNORED), targets])
            num_before = last.shape[0] + shown
        if labelled:
            rows, targets = rows[targets != IGNORED], targets[targets != IGNORED]
        else:
            self._slots = stream.slots() + (num_before - stream.prompt_rows)
        self.rows = torch.nn.functional.pad(rows, (0, 1))
        self.labels = torch.nn.functional.pad(targets, (1, 0), value=IGNORED)[None]

    def select(self, hidden: Tensor) -> Tensor:
        """[1, N, E] -> [1, M, E]."""
        return hidden if self.rows is None else hidden.index_select(1, self.rows.to(hidden.device))

    def unpack(self, logits: Tensor) -> Tensor:
        """[1, M, V] -> [B, S or P + S, V]; with ``labelled``, [1, M - 1, V], one row a label, in order."""
        if self._slots is None:
            return logits[:, :-1]
        slots = self._slots.to(logits.device)
        return logits[0].index_select(0, slots.flatten()).view(*slots.shape, logits.shape[-1])
