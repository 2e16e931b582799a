# SPDX-License-Identifier: Apache-2.0
"""Standard deviations of the rounding errors of prefix attention, computed from its arguments in fp64.

Each element has a deviation of its own, computed from the sizes of its terms by the rules of :mod:`.rounding`::

    s = scale q.k (softcap, bias)    p = softmax(s)      out = p v
    g = dout.v    delta = sum p g    ds = p (g - delta)  dq = scale ds k    dk = scale ds q    dv = p dout

The variance of out, for example, is the sum of four: errors of s that reach out through p, the rounding of p before
the product, the rounding of the product, and the rounding of the result. These are the roundings that a backend may
perform:

- Scores, softmax, lse, delta and all sums are fp32. Eager attention in half precision rounds the scores; a backend
  must not.
- In half precision, weights and gradients of scores are rounded once before they are multiplied. Results are rounded
  to their dtype. Backends that join two kernels also round out and dq per part (prefix and sequence), and dk and dv
  per query head.
- A quantity that all keys of a row share (delta, the softmax's denominator) has the same error for all of them. Such
  errors are summed over the keys before they are squared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .rounding import (
    DEFAULT_ROUNDINGS,
    LAST_PLACES,
    ROUNDING,
    SUBNORMAL,
    Roundings,
    Scores,
    Softmax,
    rounding_variance,
    scores_of,
    storage_variance,
    sum_variance,
    tanh_slope,
)


def deviations(
    tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None = None, dlse: Tensor | None = None,
    roundings: Roundings = DEFAULT_ROUNDINGS,
) -> dict[str, Tensor]:  # fmt: skip
    """The standard deviation that rounding gives to each element of a correct kernel's results.

    Args:
        tensors: q, k, v, prefix_k and prefix_v by name, in the shapes of :func:`peftkern.prefix_attention`. Their
            dtypes decide what is rounded; a prefix in fp32 counts as rounded to q's dtype.
        options: keyword arguments of :func:`peftkern.prefix_attention`.
        dout: gradient of out [B, Hq, S, D_v]; None for forward only.
        dlse: gradient of lse [B, Hq, S]; None if lse is not differentiated.
        roundings: roundings of the backend that not every backend performs.

    Returns:
        fp64 tensors by name, in the shapes of the results: "out", "lse" and, with ``dout``, the gradients "dq", "dk",
        "dv", "dprefix_k", "dprefix_v", and those of the biases, sinks and gate among the options.

    >>> from peftkern.testing import Shape, tensors
    >>> inputs = tensors(Shape(), torch.bfloat16)
    >>> expected = deviations(inputs, {"window": 4}, dout=torch.ones_like(inputs["q"]))
    >>> expected["dprefix_k"].shape == inputs["prefix_k"].shape
    True
    """
    if options.get("prefix_starts") is not None or getattr(options.get("prefix_ids"), "ndim", 1) == 2:
        variances = _chain_variances(tensors, options, dout, dlse, roundings)
    else:
        variances, _ = _variances(tensors, options, dout, dlse, roundings)
    return {name: variance.sqrt() for name, variance in variances.items()}


def _variances(
    tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None, dlse: Tensor | None,
    roundings: Roundings,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """The variances of the results, and the exact gradients of keys and values, both by name."""
    dtype = tensors["q"].dtype
    exact = {name: tensors[name].to(dtype).double() for name in ("q", "k", "v", "prefix_k", "prefix_v")}
    if exact["prefix_k"].dim() == 3:
        exact |= {n: x[None] for n, x in exact.items() if n.startswith("prefix")}
    options = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    half_torch_kernel = roundings.torch_kernel and dtype != torch.float32
    x = scores_of(exact, options, dtype if half_torch_kernel else torch.float32)
    bank, num_kv_heads, prefix_len, _ = exact["prefix_k"].shape
    num_prefix_keys, gate = bank * prefix_len, options.get("gate")
    gains: list[Tensor | float]
    if gate is None:
        parts, gains = [Softmax(x, dtype, roundings)], [1.0]
    else:
        columns = (slice(0, num_prefix_keys), slice(num_prefix_keys, None))
        parts = [Softmax(x.select(part), dtype, roundings) for part in columns]
        gains = [torch.tanh(gate)[:, None, None], 1.0]
    rounding, fp32_rounding, spread = _out_variances(x, parts, gains, num_prefix_keys, dtype)
    lse = parts[-1].lse_variance.squeeze(-1)
    result = {"out": rounding + spread, "lse": lse + 2.0**-28 / 3 if half_torch_kernel else lse}
    totals: dict[str, Tensor] = {}
    if dout is not None:
        dout = dout.double()
        lse_grad = 0.0 if dlse is None else dlse.double()[..., None]
        if len(parts) == 2:
            prefix = parts[0]
            prefix_rounding = prefix.rounding + storage_variance(prefix.out, dtype)
            prefix.backward(dout, 0.0, gains[0], prefix_rounding, prefix.fp32_rounding)
        parts[-1].backward(dout, lse_grad, 1.0, rounding, fp32_rounding)
        sizes = (bank, num_kv_heads, prefix_len)
        backward = _Backward(x, parts, exact["q"], dout, options, dtype, roundings, sizes)
        result |= backward.variances({name: x.dtype for name, x in tensors.items()})
        totals = backward.totals
        if tensors["prefix_k"].dim() == 3:
            result |= {name: result[name][0] for name in ("dprefix_k", "dprefix_v")}
    return result, totals


def _chain_variances(
    tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None, dlse: Tensor | None,
    roundings: Roundings,
) -> dict[str, Tensor]:  # fmt: skip
    """The variances of the results where sequences see several prefixes, or prefixes in k and v.

    They are those of a call with the concatenated prefixes of each sequence, whose gradients are then summed in fp32
    where the prefixes lie, and rounded.
    """
    dtype, sums = tensors["q"].dtype, torch.float32
    chains = reference.prefix_chains(
        options["prefix_ids"], options.get("prefix_lens"), options.get("prefix_starts"), tensors["prefix_k"].shape
    )
    ids, lens = reference.chain_ids_and_lens(chains, tensors["q"].device)
    joined = {
        f"prefix_{x}": reference.join_prefixes(chains, tensors[f"prefix_{x}"].to(dtype).to(sums), tensors[x])
        for x in "kv"
    }
    options = {**options, "prefix_ids": ids, "prefix_lens": lens, "prefix_starts": None}
    variances, totals = _variances({**tensors, **joined}, options, dout, dlse, roundings)
    if dout is None:
        return variances
    for x in "kv":
        by_token, terms, prefix = variances[f"dprefix_{x}"], totals[f"dprefix_{x}"], tensors[f"prefix_{x}"]
        bank = [torch.zeros(prefix.shape, dtype=torch.float64) for _ in range(4)]
        own = totals[f"d{x}"]
        sequence = [variances[f"d{x}"].clone(), own.clone(), own**2, torch.ones_like(own)]
        for i, chain in enumerate(chains):
            for piece in chain:
                values = (y[i, :, piece.place] for y in (by_token, terms, terms**2, torch.ones_like(terms)))
                for total, value in zip(sequence if piece.entry is None else bank, values, strict=True):
                    total[piece.entry or 0, :, piece.rows] += value
        for name, (variance, total, squares, count), stored in (
            (f"dprefix_{x}", bank, prefix.dtype), (f"d{x}", sequence, dtype)
        ):  # fmt: skip
            variances[name] = variance + sum_variance(total, squares, count) + storage_variance(total, stored)
    return variances


def _out_variances(
    x: Scores, parts: list[Softmax], gains: list[Tensor | float], num_prefix_keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Three variances of out [B, Hq, S, D_v]: by rounding, the part of it that is there in fp32, by the scores."""
    out, rounding, fp32_rounding, spread = (
        sum(gain**power * getattr(part, name) for gain, part in zip(gains, parts, strict=True))
        for name, power in (("out", 1), ("rounding", 2), ("fp32_rounding", 2), ("spread", 2))
    )
    if len(parts) == 1:
        prefix_out = (parts[0].p * x.keep)[..., :num_prefix_keys] @ x.v[:, :, :num_prefix_keys]
        gate_variance = 0.0
    else:
        prefix_out, gate_variance = gains[0] * parts[0].out, LAST_PLACES
    # a sum in the order of the keys passes through the prefix's share, which may be larger than the result
    terms = x.visible.sum(-1, keepdim=True)
    further = 2 * rounding_variance(out) + (ROUNDING / 3 * terms + gate_variance) * prefix_out**2
    by_part = sum(storage_variance(y, dtype) for y in (out, prefix_out, out - prefix_out))
    return rounding + further + by_part, fp32_rounding + further, spread


class _Backward:
    """Variances of the arguments' gradients, from those of the scores' gradients.

    As in :class:`.rounding.Softmax`, ``own_variance`` is independent between keys, and ``common_variance`` and
    ``delta_variance`` are shared by the keys of a row.
    """

    own_variance: Tensor
    gp: Tensor
    ds: Tensor
    ds_variance: Tensor
    common_variance: Tensor
    delta_variance: Tensor

    def __init__(
        self, x: Scores, parts: list[Softmax], q: Tensor, dout: Tensor, options: dict[str, Any], dtype: torch.dtype,
        roundings: Roundings, sizes: tuple[int, int, int],
    ):  # fmt: skip
        self.x, self.parts, self.q, self.dout, self.options = x, parts, q, dout, options
        self.dtype, self.roundings = dtype, roundings
        self.bank, self.num_kv_heads, self.prefix_len = sizes
        self.num_prefix_keys = self.bank * self.prefix_len
        split = [slice(0, self.num_prefix_keys), slice(self.num_prefix_keys, None)]
        self.columns = [slice(None)] if len(parts) == 1 else split
        self.scale: float = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
        # relative; a scale may be 0 or subnormal
        scale_variance = rounding_variance(torch.tensor(self.scale, dtype=torch.float64))
        self.scale_variance = float(scale_variance / (self.scale**2 or 1.0))
        for name in ("own_variance", "gp", "ds", "ds_variance", "common_variance", "delta_variance"):
            values = [getattr(part, name) for part in parts]
            if len(parts) == 2:  # one value per row becomes one per key
                values = [torch.cat([y.expand_as(part.p) for y, part in zip(values, parts, strict=True)], -1)]
            setattr(self, name, values[0])
        # gradients of the products q.k, without the factor scale
        self.dproducts = self.ds * x.slope
        variance = x.slope**2 * self.ds_variance + self.ds**2 * x.slope_variance + rounding_variance(self.dproducts)
        self.dproducts_variance = variance * x.visible
        self.dproducts_rounding = storage_variance(self.dproducts, dtype) * x.visible

    def variances(self, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """The variances of the gradients by name ("dq", ...); ``dtypes`` are those of the arguments."""
        x, square = self.x, self.scale**2
        common = (self.gp * x.slope) ** 2 * self.delta_variance + self.dproducts**2 * self.common_variance
        weights = self.gp * x.keep
        weights_variance = weights**2 * (self.own_variance + self.common_variance + 2 * ROUNDING)
        weights_rounding = storage_variance(weights, self.dtype) * x.visible
        dscores, dscores_variance = self.dproducts * self.scale, square * (self.dproducts_variance + common)
        dscores_rounding = square * self.dproducts_rounding
        self.totals: dict[str, Tensor] = {}
        result = {"dq": self._dq()}
        result |= self._dkv("k", dscores, dscores_variance, dscores_rounding, self.q, self.scale_variance, dtypes)
        result |= self._dkv("v", weights, weights_variance, weights_rounding, self.dout, 0.0, dtypes)
        for name in ("bias", "prefix_bias", "sinks"):
            if self.options.get(name) is not None:
                result[f"d{name}"] = self._dbias(name)
        if self.options.get("gate") is not None:
            result["dgate"] = self._dgate()
        return result

    def _dq(self) -> Tensor:
        x, prefix_keys = self.x, slice(0, self.num_prefix_keys)
        terms = x.visible.sum(-1, keepdim=True, dtype=torch.float64)
        own = self.dproducts_variance + self.dproducts_rounding + ROUNDING * (1 + terms / 6) * self.dproducts**2
        variance = own @ x.k**2
        for part, columns in zip(self.parts, self.columns, strict=True):
            k = x.k[:, :, columns]
            variance = variance + ((self.gp * x.slope)[..., columns] @ k) ** 2 * part.delta_variance
            variance = variance + (self.dproducts[..., columns] @ k) ** 2 * part.common_variance
        prefix_dq = self.dproducts[..., prefix_keys] @ x.k[:, :, prefix_keys] * self.scale
        dq = self.dproducts @ x.k * self.scale
        variance = self.scale**2 * variance + (ROUNDING * (terms / 3 + 2) + self.scale_variance) * dq**2
        variance = variance + terms * (ROUNDING / 3 * prefix_dq**2 + SUBNORMAL)  # see _out_variances
        return variance + sum(storage_variance(y, self.dtype) for y in (dq, prefix_dq, dq - prefix_dq))

    def _dkv(
        self, name: str, factors: Tensor, variance: Tensor, rounding: Tensor, rows: Tensor, relative: float,
        dtypes: dict[str, torch.dtype],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Variances of dk or dv and of the prefix's: sums of ``factors`` [B, Hq, S, N] times ``rows`` [B, Hq, S, D].

        For dv, D is D_v.

        ``variance`` is that of the factors in fp32, ``rounding`` the addition in half precision, ``relative`` the
        relative variance of a constant that multiplies the sum.
        """
        by_sum, by_heads, total = self._over_rows(slice(self.num_prefix_keys, -1), factors, variance + rounding, rows)
        self.totals[f"d{name}"] = total
        sequence = by_sum + by_heads + relative * total**2 + storage_variance(total, self.dtype)
        if self.roundings.prefix_terms:
            variance = variance + rounding
        prefix_keys = slice(0, self.num_prefix_keys)
        by_sum, by_heads, total = self._over_rows(prefix_keys, factors, variance, rows, over_batch=True)
        by_prefix = (self.bank, self.prefix_len)
        self.totals[f"dprefix_{name}"] = total.unflatten(1, by_prefix).transpose(0, 1)
        prefix = by_sum + relative * total**2 + storage_variance(total, dtypes[f"prefix_{name}"])
        prefix = prefix + 2 * rounding_variance(total)
        if self.roundings.prefix_samples:
            prefix = prefix + by_heads
        return {
            f"d{name}": sequence,
            f"dprefix_{name}": prefix.unflatten(1, by_prefix).transpose(0, 1),
        }

    def _over_rows(
        self, columns: slice, factors: Tensor, variance: Tensor, rows: Tensor, over_batch: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the rows and query heads of each kv head: [B, Hkv, N, D], or [Hkv, N, D] ``over_batch``.

        Returns:
            (variance of the fp32 sum, variance of rounding the sum of each sample and query head, the sum).
        """

        def added(y: Tensor) -> Tensor:
            y = y.unflatten(1, (self.num_kv_heads, -1)).sum(2)
            return y.sum(0) if over_batch else y

        terms = added(self.x.visible[..., columns].sum(-2, dtype=torch.float64))[..., None]
        factors, variance = factors[..., columns].mT, variance[..., columns].mT
        by_head = factors @ rows
        total = added(by_head)
        by_sum = added(variance @ rows**2) + sum_variance(total, added(factors**2 @ rows**2), terms)
        return by_sum, added(storage_variance(by_head, self.dtype)), total

    def _dbias(self, name: str) -> Tensor:
        """The variance of the gradient of a bias or of sinks: a sum of ds over the dims that were broadcast."""
        argument, part = self.options[name], self.parts[-1]
        columns, shape = slice(self.num_prefix_keys, -1), argument.shape
        if name == "sinks":
            columns, shape = slice(-1, None), (1, *shape, 1, 1)
        elif name == "prefix_bias":
            columns, part, shape = slice(0, self.num_prefix_keys), self.parts[0], (1, shape[0], 1, shape[1])
        values = [y[..., columns] for y in (self.gp, self.ds, self.ds_variance, self.ds**2)]
        if name == "prefix_bias":  # a row sees one prefix of the bank
            values = [y.unflatten(3, (self.bank, self.prefix_len)).sum(3) for y in values]
        if shape[3] == 1:
            values = [y.sum(3, keepdim=True) for y in values]
        gp, ds, own, squares = values
        terms = self.x.visible[..., columns].sum(dtype=torch.float64) / max(1, argument.numel())
        variance = own + gp**2 * part.fp32_delta_variance + ds**2 * part.common_variance
        variance, total, squares = (y.sum_to_size(shape) for y in (variance, ds, squares))
        variance = variance + sum_variance(total, squares, terms) + 2 * rounding_variance(total)
        return variance.reshape(argument.shape)

    def _dgate(self) -> Tensor:
        """The variance of dgate: (1 - tanh^2) times the sum of the prefix's delta over rows."""
        slope, slope_variance = tanh_slope(torch.tanh(self.options["gate"]))
        part = self.parts[0]
        total, squares, variance = (y.sum((0, 2, 3)) for y in (part.delta, part.delta**2, part.fp32_delta_variance))
        terms = part.delta.shape[0] * part.delta.shape[2]
        return slope**2 * (variance + sum_variance(total, squares, terms)) + slope_variance * total**2
