# SPDX-License-Identifier: Apache-2.0
"""The one error bound of all tests, from the sizes of what is added up and not from another computation's luck.

:mod:`.error_analysis` gives each element the standard deviation that rounding gives it in a right kernel, in whatever
order that adds up. Errors against the reference in fp64 must stay within

- 8 deviations, each element by itself: the largest of ten million independent errors is 5.3 deviations, and the rest
  is room for what is not quite independent;
- 1.5 (1 + 4 / sqrt(n)) deviations, the root mean square of a tensor's elements. The root mean square of n independent
  errors is right to 1 / sqrt(2 n), and 4 / sqrt(n) is 5.7 times that. Elements of one row share errors, so n counts
  rows, and of them those that matter: (sum of variances)^2 / sum of their squares.

The first sees one wrong element, the second a precision that was promised and not kept. Right results of the backends
stay within two thirds of both; tests/test_bounds.py shows that and plants faults.

Eager PyTorch in the same dtype is no part of the bound. Its error is one draw from the distribution that is computed
here, and depends on the order in which a processor's library adds up: a bound made of it is tight where that draw is
lucky and loose where it is not. What it stood for, that a kernel be not much worse than eager, holds for the
deviations. In half precision they are at most twice eager's errors forward and three times backward, which
tests/test_bounds.py asserts. In fp32 they are those of sums from the first term to the last, which are two to five
times the errors of a library that sums in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from ..arguments import AttentionGradients
from .error_analysis import deviations
from .rounding import DEFAULT, Rounds

DIFFERENTIABLE = tuple(name.removeprefix("d") for name in AttentionGradients._fields)
ELEMENT, MEAN = 8.0, 1.5
#: A function of the arguments of :func:`peftkern.prefix_attention` that returns out and lse.
Attention = Callable[..., tuple[Tensor, Tensor]]
#: What the backends promise beyond the default. Those that compute the softmax again round neither it nor the prefix.
ROUNDS = {
    "reference": Rounds(softmax=False, prefix_terms=False),
    "cpu": Rounds(softmax=False, prefix_terms=False),
    "merge": Rounds(vendor=True),
    "concat": Rounds(vendor=True, prefix_samples=True),
}


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
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

    scores = q @ joined(prefix_k, k).transpose(-1, -2) * scale
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


def run(
    attention: Attention,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    dout: Tensor | None,
    dlse: Tensor | None,
) -> Results:
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


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}


def exact_attention(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The reference, whose seed of dropout is a tensor."""
    seed = inputs.pop("dropout_seed", None)
    return reference.prefix_attention(**inputs, dropout_seed=None if seed is None else torch.as_tensor(seed))


@dataclass
class Ratio:
    """An error relative to its bounds: of the element that is worst, and of the root mean square of all elements."""

    element: float
    mean: float
    message: str

    @property
    def worst(self) -> float:
        """NaN if the error is."""
        return max(self.element, self.mean) if self.element == self.element else self.element


def ratio(name: str, got: Tensor, true: Tensor, deviation: Tensor) -> Ratio:
    """The error of ``got`` relative to what the ``deviation`` of its elements allows."""
    shapes = {got.shape, true.shape, deviation.shape}
    assert len(shapes) == 1, f"{name}: shape {list(got.shape)}, expected {list(true.shape)}"
    if got.numel() == 0:
        return Ratio(0.0, 0.0, "")
    error = (got.double() - true.double()).abs()
    relative = torch.where(error == 0, 0.0, error / (ELEMENT * deviation))
    at = int(relative.nan_to_num(nan=torch.inf).argmax())
    element, worst, allowed = (x.flatten()[at].item() for x in (relative, error, ELEMENT * deviation))
    where = [int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)]
    limit = MEAN * (1 + 4 * _rows_that_matter(deviation) ** -0.5) * _rms(deviation)
    mean = _rms(error) / limit if limit > 0 else element
    message = f"{name}: error {worst:.3e} at {where} is {element:.3g} of the {allowed:.3e} allowed there"
    message += f"; rms error {_rms(error):.3e} is {mean:.3g} of the {limit:.3e} allowed"
    return Ratio(element, mean, message)


def _rows_that_matter(deviation: Tensor) -> float:
    rows = deviation.square()
    if deviation.dim() > 1:
        rows = rows.flatten(0, -2).sum(-1)
    largest = rows.max()
    return ((rows / largest).sum() ** 2 / (rows / largest).square().sum()).item() if largest > 0 else 1.0


def assert_bound(name: str, got: Tensor, true: Tensor, deviation: Tensor) -> None:
    """``got`` differs from ``true`` by no more than ``deviation`` allows, in every element and in the mean."""
    _assert_within(ratio(name, got, true, deviation))


def _assert_within(result: Ratio) -> None:
    assert result.worst <= 1, f"{result.message}, and exceeds it"


def ratios(
    attention: Attention, tensors: dict[str, Tensor], options: dict[str, Any], *, backward: bool = True,
    dlse: bool = False, rounds: Rounds = DEFAULT,
) -> tuple[Results, dict[str, Ratio]]:  # fmt: skip
    """Run ``attention`` forward and backward: its results, and the errors of "out", "lse", "dq", … in them."""
    q = tensors["q"]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(q.shape, generator=generator).to(q.dtype) if backward else None
    lse_grad = torch.randn(q.shape[:3], generator=generator) if backward and dlse else None
    # the rounding of an fp32 prefix to q's dtype belongs to the operation and not to the error
    exact = {n: x.to(q.dtype).double() for n, x in tensors.items()}
    got = run(attention, tensors, options, dout, lse_grad)
    true = run(exact_attention, exact, _double(options), dout, lse_grad)
    allowed = deviations(tensors, options, dout, lse_grad, rounds)
    finite = torch.isfinite(true.lse)
    assert torch.equal(torch.isfinite(got.lse), finite), "lse: -inf in other rows than the reference"
    result = {
        "out": ratio("out", got.out, true.out, allowed["out"]),
        "lse": ratio("lse", got.lse[finite], true.lse[finite], allowed["lse"][finite]),
    }
    for name, value in got.gradients.items():
        result[f"d{name}"] = ratio(f"d{name}", value, true.gradients[name], allowed[f"d{name}"])
    return got, result


def check_backend(
    backend: str, tensors: dict[str, Tensor], options: dict[str, Any], *, backward: bool = True, dlse: bool = False,
    device: str = "cpu", **kwargs: Any,
) -> Results:  # fmt: skip
    """Run ``backend`` on ``tensors`` (q, k, v, prefix_k, prefix_v) and ``options``; assert the bound on every output.

    Returns the backend's results. The backend alone runs on ``device``, on copies with the same strides. ``kwargs``
    go to :func:`peftkern.prefix_attention`.
    """

    def kernel(**inputs: Any) -> Any:
        if device == "cpu":
            return functional.prefix_attention(**inputs, return_lse=True, backend=backend, **kwargs)
        inputs = {name: _moved(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        outputs = functional.prefix_attention(**inputs, return_lse=True, backend=backend, **kwargs)
        return tuple(x.cpu() for x in outputs)

    rounds = ROUNDS.get(backend, DEFAULT)
    got, result = ratios(kernel, tensors, options, backward=backward, dlse=dlse, rounds=rounds)
    for one in result.values():
        _assert_within(one)
    return got


def _moved(x: Tensor, device: str) -> Tensor:
    """A differentiable copy on ``device`` that has x's strides."""
    if x.numel() == 0:
        return x.to(device)
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.empty(size, dtype=x.dtype, device=device).as_strided(x.shape, x.stride()).copy_(x)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
