# SPDX-License-Identifier: Apache-2.0
"""The specification: what the operations compute, in eager PyTorch. Every backend is compared with it.

It is differentiable and supports every float dtype and device. It is written for readers and forms the whole score
matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "chain_ids_and_lens", "distillation_loss", "dropout_keep", "join_prefixes", "one_prefix_each", "prefix_attention",
    "prefix_chains", "soft_prompt_embedding", "softmax", "softmax_with_sink", "visibility",
]  # fmt: skip

_INF = float("inf")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    prefix_starts: Tensor | None = None,
    window: int | None = None,
    prefix_in_window: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over [prefix | sequence] in one softmax, with the arguments of :func:`peftkern.prefix_attention`.

    Half precision is computed in fp32. A prefix of higher precision than q is rounded to q's dtype first.

    Returns:
        (out [B, Hq, S, D_v] in q's dtype, lse [B, Hq, S], the natural logarithm of the softmax's denominator).
    """
    dtype, fp = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    if prefix_k.dim() == 3:  # a bank of one
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    heads = (num_kv_heads, num_heads // num_kv_heads)  # key head, query head within its group

    q, k, v = q.to(fp).unflatten(1, heads), k.to(fp), v.to(fp)
    prefix_k, prefix_v = (_round_to(x, dtype).to(fp) for x in (prefix_k, prefix_v))
    if prefix_ids is not None and (prefix_ids.dim() == 2 or prefix_starts is not None):
        prefix_k, prefix_v, prefix_ids, prefix_lens = one_prefix_each(
            prefix_k, prefix_v, k, v, prefix_ids, prefix_lens, prefix_starts
        )
    bank, _, prefix_len, _ = prefix_k.shape

    seq_scores = _softcap(torch.einsum("bhgsd,bhtd->bhgst", q, k) * scale, softcap).flatten(1, 2)  # [B, Hq, S, T]
    prefix_scores = _softcap(torch.einsum("bhgsd,ahpd->bhgsap", q, prefix_k) * scale, softcap).flatten(1, 2)
    seq_scores = seq_scores if bias is None else seq_scores + bias.to(fp)
    prefix_scores = prefix_scores if prefix_bias is None else prefix_scores + prefix_bias.to(fp)[:, None, None, :]

    seq_visible, prefix_visible = visibility(
        (batch, q_len, kv_len, bank, prefix_len), q.device, causal, key_mask, cu_seqlens, prefix_ids, prefix_lens,
        window, prefix_in_window,
    )  # fmt: skip
    seq_scores = seq_scores.masked_fill(~seq_visible, -_INF)
    prefix_scores = prefix_scores.masked_fill(~prefix_visible, -_INF).flatten(3)  # [B, Hq, S, A*P]
    prefix_weights, seq_weights, lse = _attention_weights(prefix_scores, seq_scores, sinks, gate)
    prefix_weights = prefix_weights.unflatten(3, (bank, prefix_len))
    if dropout_p > 0.0:
        seq_weights, prefix_weights = _dropout(seq_weights, prefix_weights, dropout_seed, dropout_p)

    seq_weights, prefix_weights = (w.unflatten(1, heads) for w in (seq_weights, prefix_weights))
    out = torch.einsum("bhgst,bhtd->bhgsd", seq_weights, v)
    out = out + torch.einsum("bhgsap,ahpd->bhgsd", prefix_weights, prefix_v)
    return out.flatten(1, 2).to(dtype), lse


def one_prefix_each(
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_ids: Tensor,
    prefix_lens: Tensor | None,
    prefix_starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prefix_k, prefix_v, prefix_ids and prefix_lens of a bank that holds each sequence's prefixes, concatenated."""
    chains = prefix_chains(prefix_ids, prefix_lens, prefix_starts, prefix_k.shape)
    joined = join_prefixes(chains, prefix_k, k), join_prefixes(chains, prefix_v, v)
    return *joined, *chain_ids_and_lens(chains, k.device)


class Piece(NamedTuple):
    """One prefix of a sequence: ``rows`` of an entry of the bank or, if ``entry`` is None, of k and v.

    In the concatenation of the sequence's prefixes it begins at token ``offset``.
    """

    entry: int | None
    rows: slice
    offset: int

    @property
    def place(self) -> slice:
        """The tokens of the concatenation."""
        return slice(self.offset, self.offset + self.rows.stop - self.rows.start)


def prefix_chains(
    prefix_ids: Tensor, prefix_lens: Tensor | None, prefix_starts: Tensor | None, bank_shape: torch.Size
) -> list[list[Piece]]:
    """The prefixes of each sequence in the order in which it sees them. ``bank_shape`` is [A, Hkv, P, D]."""
    bank, prefix_len = bank_shape[0], bank_shape[2]
    lens = [prefix_len] * bank if prefix_lens is None else prefix_lens.tolist()
    starts = [0] * bank + ([] if prefix_starts is None else prefix_starts.tolist())
    chains = []
    for row in prefix_ids.reshape(prefix_ids.shape[0], prefix_ids.shape[1:].numel()).tolist():
        chain, length = [], 0
        for i in row:
            if i >= 0 and lens[i] > 0:
                chain.append(Piece(i if i < bank else None, slice(starts[i], starts[i] + lens[i]), length))
                length += lens[i]
        chains.append(chain)
    return chains


def chain_ids_and_lens(chains: list[list[Piece]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(prefix_ids [n], prefix_lens [n]) for a bank with one entry per sequence, its concatenated prefixes."""
    lens = [chain[-1].place.stop if chain else 0 for chain in chains]
    return torch.arange(len(chains), device=device), torch.tensor(lens, dtype=torch.int64, device=device)


def join_prefixes(chains: list[list[Piece]], prefix: Tensor, sequence: Tensor) -> Tensor:
    """Concatenate the prefixes of each sequence: [n, Hkv, longest, D], zeros behind shorter ones. D_v for values.

    Args:
        chains: the prefixes of the n sequences.
        prefix: keys or values of the bank [A, Hkv, P, D].
        sequence: keys or values of the packed sequences [1, Hkv, T, D].
    """
    longest = max([chain[-1].place.stop for chain in chains if chain], default=0)
    joined = prefix.new_zeros(len(chains), prefix.shape[1], longest, prefix.shape[3])
    for i, chain in enumerate(chains):
        for piece in chain:
            source = sequence[0] if piece.entry is None else prefix[piece.entry]
            joined[i, :, piece.place] = source[:, piece.rows]
    return joined


def _attention_weights(
    prefix_scores: Tensor, seq_scores: Tensor, sinks: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(prefix weights [B, Hq, S, A*P], sequence weights [B, Hq, S, T], lse [B, Hq, S]) of one softmax, or of two if
    the prefix is gated.
    """
    num_prefix_keys, num_keys = prefix_scores.shape[-1], seq_scores.shape[-1]
    fp, shape = seq_scores.dtype, (*seq_scores.shape[:3], 1)
    sink_scores = seq_scores.new_full((seq_scores.shape[1],), -_INF) if sinks is None else sinks.to(fp)
    sink_scores = sink_scores[:, None, None].expand(shape)
    if gate is None:
        weights, lse = softmax_with_sink(torch.cat([prefix_scores, seq_scores], -1), sink_scores)
        prefix_weights, seq_weights, _ = weights.split([num_prefix_keys, num_keys, 1], -1)
        return prefix_weights, seq_weights, lse
    weights, lse = softmax_with_sink(seq_scores, sink_scores)
    prefix_weights, _ = softmax_with_sink(prefix_scores, torch.full_like(sink_scores, -_INF))
    gated = prefix_weights[..., :num_prefix_keys] * torch.tanh(gate.to(fp))[:, None, None]
    return gated, weights[..., :num_keys], lse


def visibility(
    sizes: tuple[int, int, int, int, int],
    device: torch.device,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix_ids: Tensor | None,
    prefix_lens: Tensor | None,
    window: int | None,
    prefix_in_window: bool,
) -> tuple[Tensor, Tensor]:
    """Which query sees which key: two bool tensors, broadcastable to [B, Hq, S, T] and to [B, Hq, S, A, P].

    ``sizes`` is (B, S, T, A, P).
    """
    batch, q_len, kv_len, bank, prefix_len = sizes
    keys = torch.arange(kv_len, device=device)
    rows = torch.arange(q_len, device=device) + kv_len - q_len  # bottom-right: the last query sees the last key
    position, sequence = rows, torch.arange(batch, device=device)[:, None]  # within and of its sequence

    seq_visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    if causal:
        seq_visible = seq_visible & (keys <= rows[:, None])
    if window is not None:
        seq_visible = seq_visible & (rows[:, None] - keys < window)
    if key_mask is not None:
        seq_visible = seq_visible & key_mask[:, None, None, :]
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True)[None] - 1  # [1, S]
        position = rows - cu_seqlens[sequence[0]]
        seq_visible = seq_visible & (sequence[0][:, None] == sequence[0])

    tokens = torch.arange(prefix_len, device=device)
    lens = torch.full((bank,), prefix_len, device=device) if prefix_lens is None else prefix_lens
    prefix_visible = (tokens < lens[:, None])[None, None, None]  # [1, 1, 1, A, P]
    if prefix_ids is not None:
        chosen = prefix_ids[sequence][..., None] == torch.arange(bank, device=device)  # [B, S or 1, A]
        prefix_visible = prefix_visible & chosen[:, None, :, :, None]
    if window is not None and prefix_in_window:
        distance = position[:, None, None] + lens[:, None] - tokens  # [S, A, P]
        prefix_visible = prefix_visible & (distance < window)
    return seq_visible, prefix_visible


def _dropout(seq_weights: Tensor, prefix_weights: Tensor, seed: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Weights [B, Hq, S, T] and [B, Hq, S, A, P] after dropout, the same for every prefix of a bank."""
    assert seed is not None
    batch, num_heads, q_len, _ = seq_weights.shape
    keep = dropout_keep(seed, (batch, num_heads, q_len, seq_weights.shape[-1]), p, part=0)
    prefix_keep = dropout_keep(seed, (batch, num_heads, q_len, prefix_weights.shape[-1]), p, part=1).unsqueeze(3)
    return seq_weights * keep / (1 - p), prefix_weights * prefix_keep / (1 - p)


def _softcap(scores: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, lse) over the last axis. A row of -inf gives zeros, -inf and zero gradients, never NaN."""
    m = scores.detach().amax(-1, keepdim=True)
    empty = m == -_INF
    weights = torch.exp(scores - m.masked_fill(empty, 0.0))
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (torch.log(total) + m.masked_fill(empty, 0.0)).masked_fill(empty, -_INF)
    return weights / total, lse.squeeze(-1)


def softmax_with_sink(scores: Tensor, sink_scores: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`softmax` over ``scores`` and a sink [..., 1], whose weight is the last one.

    A sink of +inf gets the whole weight, the limit for large ones: the others are zero, lse is inf and all gradients
    are zero.
    """
    takes_all = sink_scores == _INF
    finite = sink_scores.masked_fill(takes_all, torch.finfo(scores.dtype).max)
    weights, lse = softmax(torch.cat([scores, finite], -1))
    return weights, lse.masked_fill(takes_all.squeeze(-1) & ~lse.isnan(), _INF)


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of ``x.to(dtype)`` in x's dtype. The gradient passes unrounded."""
    return x if x.dtype == dtype else x + (x.to(dtype).to(x.dtype) - x).detach()


def dropout_keep(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float, part: int) -> Tensor:
    """The mask of attention weights that dropout keeps: bool [B, Hq, S, N], a pure function of the arguments.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key = (low, high word of
    seed) and counter = (j // 4, i, b * Hq + h, part) gives four 32-bit words, for keys j to j + 3; a weight is kept
    iff its word is at least floor(dropout_p * 2^32). ``part`` is 0 for sequence keys and 1 for prefix keys, each
    counted from 0.
    """
    batch, num_heads, q_len, num_keys = shape
    blocks = math.ceil(num_keys / 4)
    index = [torch.arange(n, device=seed.device) for n in (batch * num_heads, q_len, blocks)]
    head, row, block = torch.meshgrid(*index, indexing="ij")
    words = philox4x32((block, row, head, torch.full_like(head, part)), (seed & _WORD, (seed >> 32) & _WORD))
    per_key = torch.stack(words, -1).reshape(batch, num_heads, q_len, 4 * blocks)
    return per_key[..., :num_keys] >= int(dropout_p * 2**32)


_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold unsigned 32-bit words (int64 products wrap, so their bits are exact)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def soft_prompt_embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None = None
) -> Tensor:
    """[prompt | weight[input_ids]] along the sequence: [B, P+S, E] of the weight's dtype.

    Arguments as in :func:`peftkern.soft_prompt_embedding`.
    """
    batch = input_ids.shape[0]
    rows = prompt.expand(batch, -1, -1) if prompt_ids is None else prompt[prompt_ids]
    return torch.cat([rows.to(weight.dtype), weight[input_ids]], 1)


def distillation_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    temperature: float = 1.0,
    objective: str = "cross_entropy",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The losses [N] of the rows, from whole logits [N, V].

    Arguments as in :func:`peftkern.distillation_loss`.
    """
    logits = hidden @ lm_head.transpose(0, 1)
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_q = (logits / temperature).log_softmax(-1)
    ids, p = teacher_ids.long(), teacher_log_probs.exp()
    losses = -torch.where(p > 0, p * log_q.gather(1, ids), 0).sum(1)
    if objective == "cross_entropy":
        return losses
    losses = losses + torch.xlogy(p, p).sum(1)
    if ids.shape[1] == lm_head.shape[0]:
        return losses
    p_rest = (1 - p.sum(1)).clamp(min=0)
    log_q_rest = log_q.scatter(1, ids, -_INF).logsumexp(1)
    return losses + torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
