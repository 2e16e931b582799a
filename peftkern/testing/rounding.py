# SPDX-License-Identifier: Apache-2.0
"""The variances that rounding gives to sums, scores and a softmax, computed in fp64 before any kernel runs.

Every operation is taken to round at random, independently of the others. An error reaches the results through the
derivative of what follows, and variances add (Higham and Mary, "A new approach to probabilistic rounding error
analysis", 2019). With u = 2^-24, half of fp32's epsilon, the variances are::

    rounding x          u^2 x^2 / 3                                  evenly spread over +- u |x|
    summing n products  u^2 (n S^2 / 3 + (1 + n / 6) Q) / 3          S the sum, Q the sum of the squared terms

A sum rounds n - 1 partial sums. If its terms come in any order, partial sum k is k / n of S give or take what chance
makes of it, and the mean of the squares over all k is S^2 / 3 + Q / 6. The 1 stands for the rounding of the products.
n Q is at least the square of the sum of the terms' magnitudes. This is the error of a sum from the first term to the
last; sums in blocks, in pairs, or by fused multiply-add have less. So no library's order of summation matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference

UNIT = 2.0**-24
ROUNDING = UNIT**2 / 3  # relative variance of one rounding to fp32
LAST_PLACES = (4 * UNIT) ** 2 / 3  # that of tanh and the like, right to some units of the last place
SUBNORMAL = (2.0**-149) ** 2 / 3  # variance of two roundings of a subnormal number


def rounded(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The variance of rounding x to ``dtype``. Instructions on bf16 take its subnormal numbers for 0."""
    info = torch.finfo(dtype)
    absolute = info.tiny * (1.0 if dtype == torch.bfloat16 else info.eps / 2)
    return x.square().mul_((info.eps / 2) ** 2 / 3).add_(absolute**2 / 3)


def stored(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`rounded`, but 0 for the numbers that ``dtype`` has: what one key alone gives, sums of few bits."""
    error = x.to(dtype).double().sub_(x).abs_()
    return rounded(x, dtype).masked_fill_(error <= x.abs().mul_(2.0**-40), 0.0)


def summed(total: Tensor, squares: Tensor, terms: Tensor | float) -> Tensor:
    """The variance of an fp32 sum of products in any order."""
    of_total, of_squares = ROUNDING / 3 * terms, ROUNDING * (1 + terms / 6)
    return (total.square().mul_(of_total) + squares * of_squares).add_(SUBNORMAL * terms)


def slope_of_tanh(t: Tensor) -> tuple[Tensor, Tensor]:
    """1 - t^2 and its variance. 1 - t * t cancels where t is near 1, and is 0 where t rounds to 1."""
    slope, in_fp64 = 1 - t**2, 2.0**-52  # the latter for the truth that results are held against
    return slope, LAST_PLACES * slope**2 + ((4 * slope).clamp(max=4 * UNIT) + in_fp64) ** 2 / 3


@dataclass(frozen=True)
class Rounds:
    """What a backend rounds beyond what all backends do."""

    #: The backward takes delta = sum(out * dout) from the rounded out and the weights from the rounded lse.
    softmax: bool = True
    #: The terms of the prefix's gradients are made of weights and of gradients of scores in q's dtype.
    prefix_terms: bool = True
    #: The prefix's gradients are fp32 sums of what is in q's dtype for each sample and query head.
    prefix_samples: bool = False
    #: Another library's kernel runs. In half precision it reads biases in q's dtype, and exp may be right to 2^-14.
    vendor: bool = False


DEFAULT = Rounds()


@dataclass
class Scores:
    """Over N keys [prefix | sequence | sink]: k, v [B, Hq, N, D]; all others [B, Hq, S, N].

    ``variance`` is that of a score, ``keep`` the factor of dropout. The sink is a key whose k and v are 0.
    """

    k: Tensor
    v: Tensor
    scores: Tensor
    variance: Tensor
    slope: Tensor
    slope_variance: Tensor
    visible: Tensor
    keep: Tensor

    def of(self, columns: slice) -> Scores:
        """Those of some keys."""
        k, v, *others = vars(self).values()
        return Scores(k[:, :, columns], v[:, :, columns], *(x[..., columns] for x in others))


def scores_of(tensors: dict[str, Tensor], options: dict[str, Any], bias_dtype: torch.dtype) -> Scores:
    """The chain of scale * q.k, softcap and bias; ``tensors`` and ``options`` in fp64, the prefix a bank."""
    q, k, v, prefix_k, prefix_v = tensors.values()
    batch, num_heads, _, head_dim = q.shape
    group = num_heads // k.shape[1]

    def keys(prefix: Tensor, sequence: Tensor) -> Tensor:
        prefix = prefix.transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0).expand(batch, -1, -1, -1)
        sink = q.new_zeros(batch, num_heads, 1, head_dim)
        return torch.cat([prefix, sequence.repeat_interleave(group, 1), sink], 2)

    k, v = keys(prefix_k, k), keys(prefix_v, v)
    scale = head_dim**-0.5 if options.get("scale") is None else options["scale"]
    products = q @ k.mT
    exact = products.float().double() == products  # of few bits: exact in any order
    scores = products * scale
    variance = summed(scores, (q * scale) ** 2 @ k.mT**2, head_dim).masked_fill(exact, 0.0) + 2 * stored(scores)
    slope, slope_variance = torch.ones_like(scores), torch.zeros_like(scores)
    if options.get("softcap"):
        cap, variance = options["softcap"], variance + 2 * rounded(scores)
        t = torch.tanh(scores / cap)
        slope, slope_variance = slope_of_tanh(t)
        slope_variance = slope_variance + (2 * t * slope / cap) ** 2 * variance
        scores, variance = cap * t, slope**2 * variance + LAST_PLACES * (cap * t) ** 2
    visible, keep, added = _visible_keep_added(tensors, options)
    scores = scores + added
    of_added = rounded(added)
    of_added[..., :-1] += stored(added[..., :-1], bias_dtype)
    variance = variance + of_added + 2 * stored(scores) * (added != 0)
    return Scores(k, v, scores, variance, slope, slope_variance, visible, keep)


def _visible_keep_added(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Which keys a row sees, the factors of dropout, and biases and sinks: [B, Hq, S, N] each, the latter finite."""
    (batch, num_heads, q_len, _), kv_len = tensors["q"].shape, tensors["k"].shape[2]
    bank, _, prefix_len, _ = tensors["prefix_k"].shape
    sizes, joint = (batch, num_heads, q_len), bank * prefix_len
    added = tensors["q"].new_zeros(*sizes, joint + kv_len + 1)
    if options.get("prefix_bias") is not None:
        added[..., :joint] += options["prefix_bias"].expand(-1, prefix_len).repeat(1, bank)[:, None]
    if options.get("bias") is not None:
        added[..., joint:-1] += options["bias"]
    added[..., -1] = -torch.inf if options.get("sinks") is None else options["sinks"][:, None]
    seq_visible, prefix_visible = reference.visibility(
        (batch, q_len, kv_len, bank, prefix_len), added.device, options.get("causal", True), options.get("key_mask"),
        options.get("cu_seqlens"), options.get("prefix_ids"), options.get("prefix_lens"), options.get("window"),
        options.get("prefix_in_window", True),
    )  # fmt: skip
    visible = added != -torch.inf
    visible[..., :joint] &= prefix_visible.flatten(3)
    visible[..., joint:-1] &= seq_visible
    keep = torch.ones_like(added)
    if options.get("dropout_p"):
        p, seed = options["dropout_p"], torch.as_tensor(options["dropout_seed"])
        keep[..., :joint] = reference.dropout_keep(seed, (*sizes, prefix_len), p, 1).repeat(1, 1, 1, bank) / (1 - p)
        keep[..., joint:-1] = reference.dropout_keep(seed, (*sizes, kv_len), p, 0) / (1 - p)
    return visible, keep, added.masked_fill(~visible, 0.0)


class Softmax:
    """One softmax, forward and backward. A gated prefix has one of its own.

    Per key [B, Hq, S, N]: the weights ``p``, and ``own``, their relative variance. Per row [B, Hq, S, 1]: ``terms``
    counts its keys, ``common`` is the relative variance of what its weights share: the sum they are divided by, or
    a rounded lse. ``out`` [B, Hq, S, D] has the variance ``spread`` from the scores and ``rounding`` from its own
    products; ``fp32_rounding`` is the part of the latter that is there in any dtype.
    """

    def __init__(self, x: Scores, dtype: torch.dtype, rounds: Rounds):
        self.x, self.rounds = x, rounds
        self.terms = terms = x.visible.sum(-1, keepdim=True, dtype=torch.float64)
        hidden = torch.nn.functional.pad(x.scores.masked_fill(~x.visible, -torch.inf), (0, 1), value=-torch.inf)
        p, lse = reference.softmax(hidden)  # padded, for there may be no keys
        self.p = p = p[..., :-1]
        largest, lse = (y.masked_fill(y == -torch.inf, 0.0) for y in (hidden.amax(-1, keepdim=True), lse[..., None]))

        # Scores times log2 e, minus the largest: those equal to it are rounded as it is. A subnormal weight may be 0.
        shift = (rounded(x.scores) + rounded(largest)).mul_(2 * (x.scores != largest))
        flushed = (torch.finfo(torch.float32).tiny / p).clamp_(max=1).square_()
        of_weight = shift.add_(x.variance).add_(flushed).add_(LAST_PLACES / 4).mul_(x.visible)
        self.moved = moved = p**2 * of_weight
        of_row = moved.sum(-1, keepdim=True)
        # equal terms of a sum are not rounded at random, but all alike
        equal = (p > p.amax(-1, keepdim=True) * (1 - 2.0**-12)) if p.shape[-1] else p > 0
        alike = equal.sum(-1, keepdim=True) * (p * equal).sum(-1, keepdim=True) / 4
        self.total = total = ROUNDING * (2 + terms / 3 + terms / 6 * (p**2).sum(-1, keepdim=True) + alike**2)
        of_lse = 2 * ROUNDING * (lse**2 + largest**2)
        self.lse = of_row + total + of_lse + LAST_PLACES / 4
        if rounds.softmax:
            self.own, self.common = of_weight, of_row + total + of_lse
        else:  # weights that sum to 1: where one of them is 1, no score's error moves it
            self.own, self.common = (of_weight * (1 - 2 * p) + of_row).clamp(min=0), total

        weight, v2 = p * x.keep, x.v**2
        self.out = out = weight @ x.v
        spread = (moved * x.keep**2) @ v2 - 2 * out * ((moved * x.keep) @ x.v) + out**2 * of_row
        self.spread = spread.clamp(min=0)
        of_products = ROUNDING * (3 + terms / 6) * weight**2
        of_sums = (ROUNDING * (2 + terms / 3) + total) * out**2
        self.fp32_rounding = of_products @ v2 + of_sums
        # the weight of a lone key is 1; others are rounded relative to some pivot
        self.rounding = (rounded(weight, dtype) * x.visible * (terms > 1) + of_products) @ v2 + of_sums

    def backward(
        self, dout: Tensor, dlse: Tensor | float, gain: Tensor | float, rounding: Tensor, fp32_rounding: Tensor
    ) -> None:
        """Sets ``delta`` and ds = gain p (g - delta + dlse), where g = keep * dout.v, and their variances.

        ``rounding`` and ``fp32_rounding`` are those of the out that delta may be taken from. ``delta_variance`` is
        common to the keys of a row, ``ds_variance`` each key's own. ``fp32_delta_variance`` is that of gradients of
        biases, sinks and gates, for which every backend computes delta from fp32.
        """
        x, p, head_dim = self.x, self.p, dout.shape[-1]
        products = dout @ x.v.mT
        g = products * x.keep
        g_variance = x.keep**2 * summed(products, dout**2 @ x.v.mT**2, head_dim) + 2 * rounded(g)
        self.delta = delta = (p * g).sum(-1, keepdim=True)
        common = (self.moved * (g - delta) ** 2 + p**2 * g_variance).sum(-1, keepdim=True) + self.total * delta**2
        common = common + summed(delta, ((p * g) ** 2).sum(-1, keepdim=True), self.terms)  # over keys, or
        common = common + summed(delta, ((self.out * dout) ** 2).sum(-1, keepdim=True), head_dim)  # of out * dout
        self.fp32_delta_variance = common + (dout**2 * fp32_rounding).sum(-1, keepdim=True)
        self.delta_variance = self.fp32_delta_variance
        if self.rounds.softmax:
            self.delta_variance = common + (dout**2 * rounding).sum(-1, keepdim=True)
        difference = g - delta + dlse
        self.gp = gain * p
        self.ds = self.gp * difference
        relative = difference**2 * (self.own + 4 * ROUNDING) + g_variance + ROUNDING * g**2
        self.ds_variance = relative.add_(ROUNDING * (delta - dlse) ** 2).mul_(self.gp**2)
        if isinstance(gain, Tensor):
            self.ds_variance = self.ds_variance + LAST_PLACES * self.ds**2
