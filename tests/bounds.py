# SPDX-License-Identifier: Apache-2.0
"""The one error bound of all tests: a kernel may not be much worse than eager PyTorch in the same dtype.

    forward            err(kernel) <= 2 err(eager) + floor
    backward           err(kernel) <= 3 err(eager) + floor
    sums over rows     err(kernel) <=   err(eager whose sums are exact) + fp32 floor, in half precision

Errors are against the reference in fp64. Forward and backward errors are maxima. Sums over rows (the gradients of the
prefix, sinks, gate and biases) are compared by root mean square, which a lucky element does not move; in fp32, where
eager adds up in fp32 too, with the factor 3. In fp32 the error of large scores is the luck of the order in which a
product is summed, and libraries sum differently on different processors: eager's error is the worst of the library's
in three orders and that of adding up one after the other.

The floor is one rounding of the largest value in the dtype and, for a gradient, what one fp32 rounding of delta makes
of it. delta_i = sum_d out_id dout_id is taken from all gradients of row i's scores, ds_ij = p_ij (dp_ij - delta_i).
Where a row sees one key nothing else is left of them: eager's softmax, which sums p_ij dp_ij, gets the true 0, while
FlashAttention and all that take delta from out get its rounding. To change delta_i is to change -dlse_i, so the
reference's own gradient says how much that is. A gated prefix is a softmax of its own, with a delta of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern import functional, reference
from peftkern.backends import AttentionGradients

DIFFERENTIABLE = tuple(name.removeprefix("d") for name in AttentionGradients._fields)
FP32_SUMS = ("prefix_k", "prefix_v", "sinks", "bias", "prefix_bias", "gate")


def one_after_the_other(a: Tensor, b: Tensor) -> Tensor:
    """a @ b whose sums run through the summed dimension in order, as no library promises to."""
    total = a.new_zeros(())
    for d in range(a.shape[-1]):
        total = total + a[..., d : d + 1] * b[..., d : d + 1, :]
    return total


def eager_attention(q, k, v, prefix_k, prefix_v, *, product=torch.matmul, **options) -> tuple[Tensor, Tensor]:
    """As a model's eager attention computes it: all products in q's dtype, softmax in fp32, weights rounded.

    The prefix is expanded over the batch and concatenated, as PEFT does, but what is summed in backward (the prefix,
    biases, sinks, gate) may come in fp64: it is expanded before it is rounded, so its gradient is an exact sum of
    rounded terms, which is what an fp32 accumulation comes close to.
    """
    dtype, fp = q.dtype, torch.float32
    numbers = {name: options.get(name) for name in ("scale", "softcap", "window", "gate", "sinks")}
    scale = q.shape[-1] ** -0.5 if numbers["scale"] is None else numbers["scale"]
    group = q.shape[1] // k.shape[1]
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    bank, _, prefix_len, _ = prefix_k.shape
    batch, num_heads, q_len, _ = q.shape
    kv_len = k.shape[2]

    def joined(prefix: Tensor, sequence: Tensor) -> Tensor:
        prefix = prefix.transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0).expand(batch, -1, -1, -1)
        return torch.cat([prefix.to(dtype), sequence.repeat_interleave(group, 1)], 2)

    scores = product(q, joined(prefix_k, k).transpose(-1, -2)) * scale
    if numbers["softcap"]:
        scores = torch.tanh(scores / numbers["softcap"]) * numbers["softcap"]
    prefix_scores, seq_scores = scores.split([bank * prefix_len, kv_len], -1)
    if options.get("bias") is not None:
        seq_scores = seq_scores + options["bias"].expand_as(seq_scores).to(dtype)
    if options.get("prefix_bias") is not None:
        prefix_bias = options["prefix_bias"].expand(-1, prefix_len).repeat(1, bank)
        prefix_scores = prefix_scores + prefix_bias[:, None, :].expand_as(prefix_scores).to(dtype)
    seq_visible, prefix_visible = reference.visibility(
        (batch, q_len, kv_len, bank, prefix_len), q.device, options.get("causal", True), options.get("key_mask"),
        options.get("cu_seqlens"), options.get("prefix_ids"), options.get("prefix_lens"), numbers["window"],
        options.get("prefix_in_window", True),
    )  # fmt: skip
    seq_scores = seq_scores.masked_fill(~seq_visible, -torch.inf)
    prefix_scores = prefix_scores.masked_fill(~prefix_visible.flatten(3), -torch.inf)
    none = torch.full((batch, num_heads, q_len, 1), -torch.inf)
    sinks = none if numbers["sinks"] is None else numbers["sinks"][:, None, None].expand_as(none).to(fp)

    def weights_of(scores: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = reference.softmax(torch.cat([scores.to(fp), extra], -1))
        return weights[..., :-1].to(dtype), lse

    if numbers["gate"] is None:
        weights, lse = weights_of(torch.cat([prefix_scores, seq_scores], -1), sinks)
    else:
        seq_weights, lse = weights_of(seq_scores, sinks)
        prefix_weights, _ = weights_of(prefix_scores, none)
        gate = torch.tanh(numbers["gate"])[:, None, None].expand_as(prefix_weights).to(dtype)
        weights = torch.cat([prefix_weights * gate, seq_weights], -1)
    p = options.get("dropout_p", 0.0)
    if p:
        shape, seed = (batch, num_heads, q_len), torch.as_tensor(options["dropout_seed"])
        prefix_keep = reference.dropout_keep(seed, (*shape, prefix_len), p, 1).repeat(1, 1, 1, bank)
        keep = torch.cat([prefix_keep, reference.dropout_keep(seed, (*shape, kv_len), p, 0)], -1)
        weights = weights * keep / (1 - p)
    return weights @ joined(prefix_v, v), lse


@dataclass
class Results:
    """out, lse, and the gradients by the name of the argument."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]


def run(attention, tensors: dict[str, Tensor], options: dict, dout: Tensor | None, dlse: Tensor | None) -> Results:
    """Forward, and backward unless ``dout`` is None, on fresh leaves. Floats among ``options`` are leaves too."""
    given = {**tensors, **{name: x for name, x in options.items() if name in DIFFERENTIABLE and x is not None}}
    leaves = {name: x.detach().requires_grad_(dout is not None) for name, x in given.items()}
    numbers = {name: x for name, x in options.items() if name not in leaves}
    out, lse = attention(**leaves, **numbers)
    if dout is None:
        return Results(out.detach(), lse.detach(), {})
    outputs, grads = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, grads = [out, lse], [dout.to(out.dtype), dlse.to(lse.dtype)]
    values = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return Results(out.detach(), lse.detach(), dict(zip(leaves, values, strict=True)))


def _double(options: dict) -> dict:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}


def check_backend(
    backend: str, tensors: dict[str, Tensor], options: dict, *, backward: bool = True, dlse: bool = False,
    sum_factor: float = 1, device: str = "cpu", **kwargs,
) -> Results:  # fmt: skip
    """Run ``backend`` on ``tensors`` (q, k, v, prefix_k, prefix_v) and ``options``; assert the bound on every output.

    Returns the backend's results. ``sum_factor`` is that of sums over rows in half precision. The backend alone runs
    on ``device``, on copies with the same strides. ``kwargs`` go to :func:`peftkern.prefix_attention`.
    """
    q = tensors["q"]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(q.shape, generator=generator).to(q.dtype) if backward else None
    lse_grad = torch.randn(q.shape[:3], generator=generator) if backward and dlse else None

    def kernel(**inputs):
        if device == "cpu":
            return functional.prefix_attention(**inputs, return_lse=True, backend=backend, **kwargs)
        inputs = {name: _moved(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        outputs = functional.prefix_attention(**inputs, return_lse=True, backend=backend, **kwargs)
        return tuple(x.cpu() for x in outputs)

    def exact(**inputs):
        seed = inputs.pop("dropout_seed", None)
        return reference.prefix_attention(**inputs, dropout_seed=None if seed is None else torch.as_tensor(seed))

    # the rounding of an fp32 prefix to q's dtype belongs to the operation and not to the error
    rounded = {n: x.to(q.dtype) if n.startswith("prefix") else x for n, x in tensors.items()}
    got = run(kernel, tensors, options, dout, lse_grad)
    true = run(exact, _double(rounded), _double(options), dout, lse_grad)
    exact_sums = {n: x.double() if n.startswith("prefix") else x for n, x in rounded.items()}
    eager = [
        _in_order(order, eager_attention, exact_sums, _double(options), dout, lse_grad)
        for order in _orders(q.shape[-1] if q.dtype == torch.float32 else 0)
    ]
    if q.dtype == torch.float32:
        plain = functools.partial(eager_attention, product=one_after_the_other)
        eager.append(run(plain, exact_sums, _double(options), dout, lse_grad))
    floors = {}
    if dout is not None:
        delta_rounding = torch.finfo(torch.float32).eps * (true.out * dout.double()).abs().sum(-1)
        zeros = torch.zeros_like(dout)
        floors = run(exact, _double(rounded), _double(options), zeros, delta_rounding).gradients
        if options.get("gate") is not None:
            own = _own_floors(exact, _double(rounded), _double(options), dout.double())
            floors = {name: x.abs() + own[name].abs() if name in own else x for name, x in floors.items()}

    assert_bound("out", got.out, true.out, _worst(true.out, [e.out for e in eager]), factor=2, dtype=q.dtype)
    finite = torch.isfinite(true.lse)
    assert torch.equal(torch.isfinite(got.lse), finite), "lse: -inf in other rows than the reference"
    eager_lse = _worst(true.lse[finite], [e.lse[finite] for e in eager])
    assert_bound("lse", got.lse[finite], true.lse[finite], eager_lse, factor=2, dtype=torch.float32)
    for name, value in got.gradients.items():
        reference_value = true.gradients[name]
        allowed = _worst(reference_value, [e.gradients[name] for e in eager])
        if name in FP32_SUMS:
            factor = 3 if q.dtype == torch.float32 else sum_factor
            assert_fp32_sum(f"d{name}", value, reference_value, allowed, factor=factor, floor=_rms(floors[name]))
        else:
            floor = _largest(floors[name])
            assert_bound(f"d{name}", value, reference_value, allowed, factor=3, dtype=q.dtype, floor=floor)
    return got


def _own_floors(exact, tensors: dict[str, Tensor], options: dict, dout: Tensor) -> dict[str, Tensor]:
    """What one rounding of delta makes of a gated prefix' gradients, whose softmax is that of a hidden sequence."""
    alone = {**options, "gate": None, "sinks": None}
    alone["bias"] = torch.full((1, 1, 1, tensors["k"].shape[2]), -torch.inf, dtype=torch.float64)
    out = run(exact, tensors, alone, None, None).out * torch.tanh(options["gate"])[:, None, None]
    delta_rounding = torch.finfo(torch.float32).eps * (out * dout).abs().sum(-1)
    gradients = run(exact, tensors, alone, torch.zeros_like(dout), delta_rounding).gradients
    return {name: gradients[name] for name in ("q", "prefix_k", "prefix_bias") if name in gradients}


def _moved(x: Tensor, device: str) -> Tensor:
    """A differentiable copy on ``device`` that has x's strides."""
    if x.numel() == 0:
        return x.to(device)
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.empty(size, dtype=x.dtype, device=device).as_strided(x.shape, x.stride()).copy_(x)


def _orders(head_dim: int) -> list[Tensor]:
    """Orders in which to sum over the head's dimension; of none, the one there is."""
    order = torch.arange(head_dim)
    return [order, order.flip(0), order.roll(head_dim // 2)] if head_dim else [order]


def _in_order(order: Tensor, attention, tensors: dict[str, Tensor], options: dict, *gradients) -> Results:
    """:func:`run` with the head's dimension of queries and keys in another order."""
    keys = ("q", "k", "prefix_k")
    if order.numel() == 0:
        return run(attention, tensors, options, *gradients)
    results = run(attention, {n: x[..., order] if n in keys else x for n, x in tensors.items()}, options, *gradients)
    for name in keys:
        if name in results.gradients:
            results.gradients[name] = results.gradients[name][..., order.argsort()]
    return results


def _worst(true: Tensor, candidates: list[Tensor]) -> Tensor:
    return max(candidates, key=lambda x: _largest(x.double() - true.double()))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_bound(
    name: str, got: Tensor, true: Tensor, eager: Tensor, *, factor: float, dtype: torch.dtype, floor: float = 0.0
) -> None:
    """max |got - true| <= factor * max |eager - true| + floor + one rounding of the largest true value."""
    assert got.shape == true.shape, f"{name}: shape {list(got.shape)}, expected {list(true.shape)}"
    if got.numel() == 0:
        return
    error, allowed = ((x.double() - true.double()).abs() for x in (got, eager))
    floor += torch.finfo(dtype).eps * _largest(true)
    limit = factor * allowed.max().item() + floor
    worst = error.max().item()
    assert worst <= limit, (
        f"{name}: error {worst:.3e} at {_where(error)} exceeds {factor} x eager's {allowed.max().item():.3e} "
        f"+ floor {floor:.1e} = {limit:.3e}"
    )


def assert_fp32_sum(
    name: str, got: Tensor, true: Tensor, eager: Tensor, *, factor: float, floor: float = 0.0
) -> None:
    """rms(got - true) <= factor * rms(eager - true) + floor + 8 roundings of fp32."""
    assert got.shape == true.shape, f"{name}: shape {list(got.shape)}, expected {list(true.shape)}"
    if got.numel() == 0:
        return
    error, allowed = ((x.double() - true.double()) for x in (got, eager))
    floor += max(8 * torch.finfo(torch.float32).eps, torch.finfo(got.dtype).eps) * _rms(true)
    assert _rms(error) <= factor * _rms(allowed) + floor, (
        f"{name}: rms error {_rms(error):.3e} exceeds {factor} x eager's {_rms(allowed):.3e} + floor {floor:.1e}; "
        f"worst at {_where(error.abs())}"
    )


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _where(error: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), error.shape)]
