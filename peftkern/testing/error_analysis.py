# SPDX-License-Identifier: Apache-2.0
"""How far rounding may move each number that prefix attention gives: standard deviations, from fp64 alone.

Each element has a deviation of its own, made of the sizes of its own terms by the rules of :mod:`.rounding`::

    s = scale q.k (softcap, bias)    p = softmax(s)      out = p v
    g = dout.v    delta = sum p g    ds = p (g - delta)  dq = scale ds k    dk = scale ds q    dv = p dout

Those of out are the errors of s that reach it through p, the rounding of p before the product, of the product, and of
the result; and so on. This is what a backend may do, and what it may not:

- Scores, softmax, lse, delta and every sum are fp32. Eager attention in half precision rounds the scores; backends do
  not.
- In half precision, weights and gradients of scores are rounded to it before they are multiplied, once each. Results
  are rounded to their dtype. Backends that join two kernels also round out and dq by part (the prefix, the sequence),
  dk and dv by query head.
- What is the same for all keys of a row (delta, the softmax's denominator) has the same error for all of them. Sums
  over keys add such errors up before they are squared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rounding import (
    DEFAULT,
    LAST_PLACES,
    ROUNDING,
    SUBNORMAL,
    Rounds,
    Scores,
    Softmax,
    rounded,
    scores_of,
    slope_of_tanh,
    stored,
    summed,
)


def deviations(
    tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None = None, dlse: Tensor | None = None,
    rounds: Rounds = DEFAULT,
) -> dict[str, Tensor]:  # fmt: skip
    """Standard deviations of "out", "lse" and, if ``dout`` is given, of "dq", "dprefix_k", …, in their shapes.

    ``tensors`` (q, k, v, prefix_k, prefix_v) and ``options`` are those of a call, in its dtypes.
    """
    dtype = tensors["q"].dtype
    exact = {name: tensors[name].to(dtype).double() for name in ("q", "k", "v", "prefix_k", "prefix_v")}
    if exact["prefix_k"].dim() == 3:
        exact |= {n: x[None] for n, x in exact.items() if n.startswith("prefix")}
    options = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    of_vendor = rounds.vendor and dtype != torch.float32
    x = scores_of(exact, options, dtype if of_vendor else torch.float32)
    bank, num_kv_heads, prefix_len, _ = exact["prefix_k"].shape
    joint, gate = bank * prefix_len, options.get("gate")
    if gate is None:
        parts, of_gate = [Softmax(x, dtype, rounds)], 0.0
        gains: list[Tensor | float] = [1.0]
        of_prefix = (parts[0].p * x.keep)[..., :joint] @ x.v[:, :, :joint]
    else:
        parts = [Softmax(x.of(columns), dtype, rounds) for columns in (slice(0, joint), slice(joint, None))]
        gains, of_gate = [torch.tanh(gate)[:, None, None], 1.0], LAST_PLACES
        of_prefix = gains[0] * parts[0].out
    out, rounding, fp32_rounding, spread = (
        sum(gain**power * getattr(part, name) for gain, part in zip(gains, parts, strict=True))
        for name, power in (("out", 1), ("rounding", 2), ("fp32_rounding", 2), ("spread", 2))
    )
    # a sum in the order of the keys comes by the prefix's part, however small it ends
    terms = x.visible.sum(-1, keepdim=True)
    further = 2 * rounded(out) + (ROUNDING / 3 * terms + of_gate) * of_prefix**2
    fp32_rounding = fp32_rounding + further
    rounding = rounding + further + sum(stored(y, dtype) for y in (out, of_prefix, out - of_prefix))
    lse = parts[-1].lse.squeeze(-1)
    result = {"out": rounding + spread, "lse": lse + 2.0**-28 / 3 if of_vendor else lse}
    if dout is not None:
        dout = dout.double()
        of_lse = 0.0 if dlse is None else dlse.double()[..., None]
        if gate is not None:
            own = parts[0]
            own.backward(dout, 0.0, gains[0], own.rounding + stored(own.out, dtype), own.fp32_rounding)
        parts[-1].backward(dout, of_lse, 1.0, rounding, fp32_rounding)
        backward = _Backward(x, parts, exact["q"], dout, options, dtype, rounds, (bank, num_kv_heads, prefix_len))
        result |= backward.variances({name: x.dtype for name, x in tensors.items()})
        if tensors["prefix_k"].dim() == 3:
            result |= {name: result[name][0] for name in ("dprefix_k", "dprefix_v")}
    return {name: variance.sqrt() for name, variance in result.items()}


class _Backward:
    """From the gradients of the scores to those of the arguments.

    ``own``: of variances that are independent between keys.
    """

    def __init__(
        self, x: Scores, parts: list[Softmax], q: Tensor, dout: Tensor, options: dict[str, Any], dtype: torch.dtype,
        rounds: Rounds, sizes: tuple[int, int, int],
    ):  # fmt: skip
        self.x, self.parts, self.q, self.dout, self.options = x, parts, q, dout, options
        self.dtype, self.rounds = dtype, rounds
        self.bank, self.num_kv_heads, self.prefix_len = sizes
        self.joint = self.bank * self.prefix_len
        self.columns = [slice(None)] if len(parts) == 1 else [slice(0, self.joint), slice(self.joint, None)]
        self.scale: float = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
        # relative; a scale may be subnormal
        self.of_scale = float(rounded(torch.tensor(self.scale, dtype=torch.float64)) / (self.scale**2 or 1.0))
        self.own, self.gp, self.ds, self.ds_variance, self.common, self.delta_variance = (
            getattr(parts[0], name)  # rows' own are broadcast
            if len(parts) == 1
            else torch.cat([getattr(part, name).expand_as(part.p) for part in parts], -1)
            for name in ("own", "gp", "ds", "ds_variance", "common", "delta_variance")
        )
        # gradients of the products q.k, but for the scale
        self.dproducts = self.ds * x.slope
        own = x.slope**2 * self.ds_variance + self.ds**2 * x.slope_variance + rounded(self.dproducts)
        self.dproducts_variance = own * x.visible
        self.dproducts_rounding = stored(self.dproducts, dtype) * x.visible

    def variances(self, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Of the gradients, by name; ``dtypes`` are those of the arguments."""
        x, square = self.x, self.scale**2
        common = (self.gp * x.slope) ** 2 * self.delta_variance + self.dproducts**2 * self.common
        weights = self.gp * x.keep
        weights_variance = weights**2 * (self.own + self.common + 2 * ROUNDING)
        weights_rounding = stored(weights, self.dtype) * x.visible
        of_k = (self.dproducts * self.scale, square * (self.dproducts_variance + common))
        result = {"dq": self._dq()}
        result |= self._dkv("k", *of_k, square * self.dproducts_rounding, self.q, self.of_scale, dtypes)
        result |= self._dkv("v", weights, weights_variance, weights_rounding, self.dout, 0.0, dtypes)
        for name in ("bias", "prefix_bias", "sinks"):
            if self.options.get(name) is not None:
                result[f"d{name}"] = self._dscores(name)
        if self.options.get("gate") is not None:
            result["dgate"] = self._dgate()
        return result

    def _dq(self) -> Tensor:
        x, joint = self.x, self.joint
        terms = x.visible.sum(-1, keepdim=True, dtype=torch.float64)
        own = self.dproducts_variance + self.dproducts_rounding + ROUNDING * (1 + terms / 6) * self.dproducts**2
        variance = own @ x.k**2
        for part, columns in zip(self.parts, self.columns, strict=True):
            k = x.k[:, :, columns]
            variance = variance + ((self.gp * x.slope)[..., columns] @ k) ** 2 * part.delta_variance
            variance = variance + (self.dproducts[..., columns] @ k) ** 2 * part.common
        of_prefix = self.dproducts[..., :joint] @ x.k[:, :, :joint] * self.scale
        dq = self.dproducts @ x.k * self.scale
        variance = self.scale**2 * variance + (ROUNDING * (terms / 3 + 2) + self.of_scale) * dq**2
        variance = variance + terms * (ROUNDING / 3 * of_prefix**2 + SUBNORMAL)  # as in out
        return variance + sum(stored(y, self.dtype) for y in (dq, of_prefix, dq - of_prefix))

    def _dkv(
        self, name: str, factors: Tensor, variance: Tensor, rounding: Tensor, rows: Tensor, of_all: float,
        dtypes: dict[str, torch.dtype],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of dk or dv and that of the prefix, sums of ``factors`` [B, Hq, S, N] times ``rows`` [B, Hq, S, D].

        ``rounding`` is what half precision adds to the ``variance`` of factors, ``of_all`` relative.
        """
        of_sum, of_heads, total = self._over_rows(slice(self.joint, -1), factors, variance + rounding, rows)
        sequence = of_sum + of_heads + of_all * total**2 + stored(total, self.dtype)
        if self.rounds.prefix_terms:
            variance = variance + rounding
        of_sum, of_heads, total = self._over_rows(slice(0, self.joint), factors, variance, rows, over_batch=True)
        prefix = of_sum + of_all * total**2 + stored(total, dtypes[f"prefix_{name}"]) + 2 * rounded(total)
        if self.rounds.prefix_samples:
            prefix = prefix + of_heads
        return {
            f"d{name}": sequence,
            f"dprefix_{name}": prefix.unflatten(1, (self.bank, self.prefix_len)).transpose(0, 1),
        }

    def _over_rows(
        self, columns: slice, factors: Tensor, variance: Tensor, rows: Tensor, over_batch: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(variance of an fp32 sum over rows, that of rounding each sample's and head's sum, the sum), by key.

        [B, Hkv, N, D], or [Hkv, N, D] ``over_batch``.
        """

        def added(y: Tensor) -> Tensor:
            y = y.unflatten(1, (self.num_kv_heads, -1)).sum(2)
            return y.sum(0) if over_batch else y

        terms = added(self.x.visible[..., columns].sum(-2, dtype=torch.float64))[..., None]
        factors, variance = factors[..., columns].mT, variance[..., columns].mT
        by_head = factors @ rows
        total = added(by_head)
        of_sum = added(variance @ rows**2) + summed(total, added(factors**2 @ rows**2), terms)
        return of_sum, added(stored(by_head, self.dtype)), total

    def _dscores(self, name: str) -> Tensor:
        """Of a gradient of scores, summed over what its argument was broadcast over."""
        argument, part = self.options[name], self.parts[-1]
        columns, shape = slice(self.joint, -1), argument.shape
        if name == "sinks":
            columns, shape = slice(-1, None), (1, *shape, 1, 1)
        elif name == "prefix_bias":
            columns, part, shape = slice(0, self.joint), self.parts[0], (1, shape[0], 1, shape[1])
        values = [y[..., columns] for y in (self.gp, self.ds, self.ds_variance, self.ds**2)]
        if name == "prefix_bias":  # a row sees one prefix of the bank
            values = [y.unflatten(3, (self.bank, self.prefix_len)).sum(3) for y in values]
        if shape[3] == 1:
            values = [y.sum(3, keepdim=True) for y in values]
        gp, ds, own, squares = values
        terms = self.x.visible[..., columns].sum(dtype=torch.float64) / max(1, argument.numel())
        variance = own + gp**2 * part.fp32_delta_variance + ds**2 * part.common
        variance, total, squares = (y.sum_to_size(shape) for y in (variance, ds, squares))
        return (variance + summed(total, squares, terms) + 2 * rounded(total)).reshape(argument.shape)

    def _dgate(self) -> Tensor:
        """Of (1 - tanh^2) times the sum of the prefix's delta over rows."""
        slope, slope_variance = slope_of_tanh(torch.tanh(self.options["gate"]))
        part = self.parts[0]
        total, squares, variance = (y.sum((0, 2, 3)) for y in (part.delta, part.delta**2, part.fp32_delta_variance))
        terms = part.delta.shape[0] * part.delta.shape[2]
        return slope**2 * (variance + summed(total, squares, terms)) + slope_variance * total**2
