# SPDX-License-Identifier: Apache-2.0
"""The variances that rounding gives to sums, scores and a softmax, computed in fp64.

The model: every operation rounds at random, independently of all others. An error reaches the results through the
derivative of the operations that follow, and variances add (Higham and Mary, "A new approach to probabilistic
rounding error analysis", SIAM Journal on Scientific Computing 41, 2019). With u = 2^-24, half of fp32's epsilon, the
variances are::

    rounding x          u^2 x^2 / 3                                  the error is uniform in +- u |x|
    summing n products  u^2 (n S^2 / 3 + (1 + n / 6) Q) / 3          S: the sum, Q: the sum of the squared terms

A sum of n terms rounds n - 1 partial sums. In a random order of the terms, partial sum k is k S / n plus a random
deviation; the mean of its square over all k is S^2 / 3 + Q / 6. The 1 stands for the rounding of the products. Terms
that cancel count as well, because n Q is at least the square of the sum of their magnitudes. The formula holds for a
sum from the first term to the last. Sums in blocks, in pairs or by fused multiply-add have smaller errors, so the
variance is large enough for the summation order of any library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference

#: Half of fp32's epsilon: the largest relative error of one rounding.
UNIT = 2.0**-24
#: Relative variance of one rounding to fp32.
ROUNDING = UNIT**2 / 3
#: Relative variance of tanh and similar functions, which are accurate to some units in the last place.
LAST_PLACES = (4 * UNIT) ** 2 / 3
#: Variance of two roundings of a subnormal number.
SUBNORMAL = (2.0**-149) ** 2 / 3


def rounding_variance(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The variance of rounding x to ``dtype``, in x's shape and dtype (fp64)."""
    info = torch.finfo(dtype)
    # bf16 instructions treat subnormal numbers as 0
    absolute = info.tiny * (1.0 if dtype == torch.bfloat16 else info.eps / 2)
    return x.square().mul_((info.eps / 2) ** 2 / 3).add_(absolute**2 / 3)


def storage_variance(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`rounding_variance`, but 0 for numbers that ``dtype`` represents exactly.

    Such numbers are common: the output of a row that sees one key, and sums of a few short terms.
    """
    error = x.to(dtype).double().sub_(x).abs_()
    return rounding_variance(x, dtype).masked_fill_(error <= x.abs().mul_(2.0**-40), 0.0)


def sum_variance(total: Tensor, squares: Tensor, terms: Tensor | float) -> Tensor:
    """The variance of an fp32 sum of ``terms`` products in any order.

    ``total`` is the sum and ``squares`` the sum of the squared terms, both fp64 of one shape.
    """
    by_total, by_squares = ROUNDING / 3 * terms, ROUNDING * (1 + terms / 6)
    return (total.square().mul_(by_total) + squares * by_squares).add_(SUBNORMAL * terms)


def tanh_slope(t: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - t^2, its variance) for t = tanh(x). The difference cancels near t = 1, and is 0 if t rounds to 1."""
    slope, fp64_error = 1 - t**2, 2.0**-52  # the fp64 results that backends are compared with err as well
    return slope, LAST_PLACES * slope**2 + ((4 * slope).clamp(max=4 * UNIT) + fp64_error) ** 2 / 3


@dataclass(frozen=True)
class Roundings:
    """The roundings of a backend that not every backend performs. Each one that is true widens the bound."""

    #: Backward computes delta = sum(out * dout) from the rounded out, and the weights from the rounded lse.
    softmax: bool = True
    #: Weights and gradients of scores are rounded to q's dtype before they enter the prefix's gradients.
    prefix_terms: bool = True
    #: The prefix's gradients are fp32 sums of a gradient in q's dtype per sample and query head.
    prefix_samples: bool = False
    #: torch's attention kernel runs. In half precision it reads biases in q's dtype, and its exp may err by 2^-14.
    torch_kernel: bool = False


DEFAULT_ROUNDINGS = Roundings()


@dataclass
class Scores:
    """Scores over the N keys [prefix | sequence | sink], fp64. The sink is a key whose k and v are 0.

    ``k`` is [B, Hq, N, D], ``v`` [B, Hq, N, D_v], all others [B, Hq, S, N].
    """

    k: Tensor
    v: Tensor
    scores: Tensor
    #: Variance of ``scores``.
    variance: Tensor
    #: Derivative of the scores by scale * q.k: that of the softcap.
    slope: Tensor
    slope_variance: Tensor
    #: bool: whether the query sees the key.
    visible: Tensor
    #: The factor of dropout: 0 or 1 / (1 - dropout_p).
    keep: Tensor

    def select(self, columns: slice) -> Scores:
        """The scores of some keys."""
        k, v, *others = vars(self).values()
        return Scores(k[:, :, columns], v[:, :, columns], *(x[..., columns] for x in others))


def scores_of(tensors: dict[str, Tensor], options: dict[str, Any], bias_dtype: torch.dtype) -> Scores:
    """Scores and their variances through scale * q.k, softcap and bias.

    ``tensors`` and ``options`` are fp64, the prefix a bank [A, Hkv, P, D]. Biases are rounded to ``bias_dtype``.
    """
    q, k, v, prefix_k, prefix_v = tensors.values()
    batch, num_heads, _, head_dim = q.shape
    group = num_heads // k.shape[1]

    def keys(prefix: Tensor, sequence: Tensor) -> Tensor:
        prefix = prefix.transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0).expand(batch, -1, -1, -1)
        sink = q.new_zeros(batch, num_heads, 1, sequence.shape[3])
        return torch.cat([prefix, sequence.repeat_interleave(group, 1), sink], 2)

    k, v = keys(prefix_k, k), keys(prefix_v, v)
    scale = head_dim**-0.5 if options.get("scale") is None else options["scale"]
    products = q @ k.mT
    exact = products.float().double() == products  # sums of short terms are exact in any order
    scores = products * scale
    variance = sum_variance(scores, (q * scale) ** 2 @ k.mT**2, head_dim).masked_fill(exact, 0.0)
    variance = variance + 2 * storage_variance(scores)
    slope, slope_variance = torch.ones_like(scores), torch.zeros_like(scores)
    if options.get("softcap"):
        cap, variance = options["softcap"], variance + 2 * rounding_variance(scores)
        t = torch.tanh(scores / cap)
        slope, slope_variance = tanh_slope(t)
        slope_variance = slope_variance + (2 * t * slope / cap) ** 2 * variance
        scores, variance = cap * t, slope**2 * variance + LAST_PLACES * (cap * t) ** 2
    visible, keep, added = _visible_keep_added(tensors, options)
    scores = scores + added
    added_variance = rounding_variance(added)
    added_variance[..., :-1] += storage_variance(added[..., :-1], bias_dtype)
    variance = variance + added_variance + 2 * storage_variance(scores) * (added != 0)
    return Scores(k, v, scores, variance, slope, slope_variance, visible, keep)


def _visible_keep_added(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(visibility, factors of dropout, biases and sinks), each [B, Hq, S, N]; the last is finite."""
    (batch, num_heads, q_len, _), kv_len = tensors["q"].shape, tensors["k"].shape[2]
    bank, _, prefix_len, _ = tensors["prefix_k"].shape
    sizes, num_prefix_keys = (batch, num_heads, q_len), bank * prefix_len
    added = tensors["q"].new_zeros(*sizes, num_prefix_keys + kv_len + 1)
    if options.get("prefix_bias") is not None:
        added[..., :num_prefix_keys] += options["prefix_bias"].expand(-1, prefix_len).repeat(1, bank)[:, None]
    if options.get("bias") is not None:
        added[..., num_prefix_keys:-1] += options["bias"]
    added[..., -1] = -torch.inf if options.get("sinks") is None else options["sinks"][:, None]
    seq_visible, prefix_visible = reference.visibility(
        (batch, q_len, kv_len, bank, prefix_len), added.device, options.get("causal", True), options.get("key_mask"),
        options.get("cu_seqlens"), options.get("prefix_ids"), options.get("prefix_lens"), options.get("window"),
        options.get("prefix_in_window", True),
    )  # fmt: skip
    visible = added != -torch.inf
    visible[..., :num_prefix_keys] &= prefix_visible.flatten(3)
    visible[..., num_prefix_keys:-1] &= seq_visible
    keep = torch.ones_like(added)
    if options.get("dropout_p"):
        p, seed = options["dropout_p"], torch.as_tensor(options["dropout_seed"])
        prefix_keep = reference.dropout_keep(seed, (*sizes, prefix_len), p, 1).repeat(1, 1, 1, bank)
        keep[..., :num_prefix_keys] = prefix_keep / (1 - p)
        keep[..., num_prefix_keys:-1] = reference.dropout_keep(seed, (*sizes, kv_len), p, 0) / (1 - p)
    return visible, keep, added.masked_fill(~visible, 0.0)


class Softmax:
    """The variances of one softmax, forward and backward. A gated prefix has a softmax of its own.

    An error of a weight has two parts: one is the key's own, the other is common to the keys of a row, such as the
    error of the sum by which the weights are divided. Only errors of the first kind are independent between keys.

    Attributes:
        p: weights [B, Hq, S, N].
        weight_variance: variance of ``p`` that comes from the scores [B, Hq, S, N].
        own_variance: relative variance of each weight's own error [B, Hq, S, N].
        common_variance: relative variance of the error that the weights of a row share [B, Hq, S, 1].
        denominator_variance: relative variance of the sum by which the weights are divided [B, Hq, S, 1].
        lse_variance: variance of lse [B, Hq, S, 1].
        terms: number of keys that a row sees [B, Hq, S, 1].
        out: the softmax's output [B, Hq, S, D_v], whose variance is ``spread + rounding``.
        spread: variance of ``out`` that comes from the scores.
        rounding: variance of ``out`` that comes from the roundings of weights and products.
        fp32_rounding: the part of ``rounding`` that remains when weights are fp32.
    """

    delta: Tensor
    delta_variance: Tensor
    fp32_delta_variance: Tensor
    gp: Tensor
    ds: Tensor
    ds_variance: Tensor

    def __init__(self, x: Scores, dtype: torch.dtype, roundings: Roundings):
        self.x, self.roundings = x, roundings
        self.terms = terms = x.visible.sum(-1, keepdim=True, dtype=torch.float64)
        # one hidden key more, because there may be no keys at all
        hidden = torch.nn.functional.pad(x.scores.masked_fill(~x.visible, -torch.inf), (0, 1), value=-torch.inf)
        p, lse = reference.softmax(hidden)
        self.p = p = p[..., :-1]
        largest, lse = (y.masked_fill(y == -torch.inf, 0.0) for y in (hidden.amax(-1, keepdim=True), lse[..., None]))

        # The exponent is a score times log2 e minus the largest one. Scores that equal the largest are rounded as it
        # is, so their difference is exact. A weight that is subnormal in fp32 may become 0.
        shift = (rounding_variance(x.scores) + rounding_variance(largest)).mul_(2 * (x.scores != largest))
        flushed = (torch.finfo(torch.float32).tiny / p).clamp_(max=1).square_()
        relative = shift.add_(x.variance).add_(flushed).add_(LAST_PLACES / 4).mul_(x.visible)
        self.weight_variance = p**2 * relative
        row_variance = self.weight_variance.sum(-1, keepdim=True)
        # equal terms of a sum are all rounded in the same direction, not at random
        equal = (p > p.amax(-1, keepdim=True) * (1 - 2.0**-12)) if p.shape[-1] else p > 0
        alike = equal.sum(-1, keepdim=True) * (p * equal).sum(-1, keepdim=True) / 4
        squares = (p**2).sum(-1, keepdim=True)
        self.denominator_variance = ROUNDING * (2 + terms / 3 + terms / 6 * squares + alike**2)
        lse_rounding = 2 * ROUNDING * (lse**2 + largest**2)
        self.lse_variance = row_variance + self.denominator_variance + lse_rounding + LAST_PLACES / 4
        if roundings.softmax:
            self.own_variance = relative
            self.common_variance = row_variance + self.denominator_variance + lse_rounding
        else:  # the weights sum to 1, so a score's error does not move a weight that is 1
            self.own_variance = (relative * (1 - 2 * p) + row_variance).clamp(min=0)
            self.common_variance = self.denominator_variance
        self._set_out(row_variance, dtype)

    def _set_out(self, row_variance: Tensor, dtype: torch.dtype) -> None:
        x, terms = self.x, self.terms
        weight, v2 = self.p * x.keep, x.v**2
        self.out = out = weight @ x.v
        spread = (self.weight_variance * x.keep**2) @ v2
        spread = spread - 2 * out * ((self.weight_variance * x.keep) @ x.v) + out**2 * row_variance
        self.spread = spread.clamp(min=0)
        product_variance = ROUNDING * (3 + terms / 6) * weight**2
        sums_variance = (ROUNDING * (2 + terms / 3) + self.denominator_variance) * out**2
        self.fp32_rounding = product_variance @ v2 + sums_variance
        # the weight of a single key is exactly 1; other weights are rounded relative to a pivot
        rounded_weights = rounding_variance(weight, dtype) * x.visible * (terms > 1)
        self.rounding = (rounded_weights + product_variance) @ v2 + sums_variance

    def backward(
        self, dout: Tensor, dlse: Tensor | float, gain: Tensor | float, rounding: Tensor, fp32_rounding: Tensor
    ) -> None:
        """Compute ``delta`` and ds = gain p (g - delta + dlse), where g = keep * dout.v, with their variances.

        Sets ``delta`` [B, Hq, S, 1], and ``gp`` = gain p and ``ds`` [B, Hq, S, N]. ``delta_variance`` is common to
        the keys of a row, ``ds_variance`` is each key's own. ``fp32_delta_variance`` holds for the gradients of
        biases, sinks and gates, for which every backend computes delta in fp32.

        Args:
            dout: gradient of the call's output [B, Hq, S, D_v].
            dlse: gradient of lse [B, Hq, S, 1], or 0.0.
            gain: tanh(gate) [Hq, 1, 1] for a gated prefix, else 1.0.
            rounding: rounding variance of the out from which delta may be computed.
            fp32_rounding: the same for an out in fp32.
        """
        x, p, value_dim = self.x, self.p, dout.shape[-1]
        products = dout @ x.v.mT
        g = products * x.keep
        product_variance = sum_variance(products, dout**2 @ x.v.mT**2, value_dim)
        g_variance = x.keep**2 * product_variance + 2 * rounding_variance(g)
        self.delta = delta = (p * g).sum(-1, keepdim=True)
        common = (self.weight_variance * (g - delta) ** 2 + p**2 * g_variance).sum(-1, keepdim=True)
        common = common + self.denominator_variance * delta**2
        # delta is a sum of p g over keys, or of out * dout over the head's elements
        common = common + sum_variance(delta, ((p * g) ** 2).sum(-1, keepdim=True), self.terms)
        common = common + sum_variance(delta, ((self.out * dout) ** 2).sum(-1, keepdim=True), value_dim)
        self.fp32_delta_variance = common + (dout**2 * fp32_rounding).sum(-1, keepdim=True)
        self.delta_variance = self.fp32_delta_variance
        if self.roundings.softmax:
            self.delta_variance = common + (dout**2 * rounding).sum(-1, keepdim=True)
        difference = g - delta + dlse
        self.gp = gain * p
        self.ds = self.gp * difference
        relative = difference**2 * (self.own_variance + 4 * ROUNDING) + g_variance + ROUNDING * g**2
        self.ds_variance = relative.add_(ROUNDING * (delta - dlse) ** 2).mul_(self.gp**2)
        if isinstance(gain, Tensor):
            self.ds_variance = self.ds_variance + LAST_PLACES * self.ds**2
