# SPDX-License-Identifier: Apache-2.0
"""The error bound of all tests, computed from the sizes of the terms that a kernel adds up.

:mod:`.error_analysis` computes for each element the standard deviation of the rounding error of a correct kernel, for
any order of summation. Errors against the reference in fp64 must stay within two limits:

- 8 deviations for each element. The largest of ten million independent errors is 5.3 deviations; the rest leaves room
  for errors that are not quite independent.
- 1.5 (1 + 4 / sqrt(n)) deviations for the root mean square over a tensor. The root mean square of n independent
  errors varies by 1 / sqrt(2 n) of its size, and 4 / sqrt(n) is 5.7 times that. Elements of one row share errors, so
  n is an effective number of rows: (sum of variances)^2 / sum of squared variances.

The first limit finds single wrong elements. The second finds kernels that compute in a lower precision than promised.
Correct results of the backends stay within two thirds of both limits; tests/testing/test_bounds.py asserts this and
plants faults.

The bound does not use the error of eager PyTorch in the same dtype. That error is one sample of the distribution that
is computed here, and it depends on the summation order of the library: a bound derived from it is tight after a small
sample and loose after a large one. The deviations are close to eager's errors nevertheless. In half precision they
are at most twice as large forward and three times as large backward, which tests/testing/test_bounds.py asserts. In
fp32 they describe sums from the first term to the last, whose errors are two to five times those of a library that
sums in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from ..arguments import HINTS, AttentionGradients
from .error_analysis import deviations
from .rounding import DEFAULT_ROUNDINGS, Roundings, storage_variance

#: q, k, v, prefix_k, prefix_v and options as keyword arguments -> (out, lse)
Attention = Callable[..., tuple[Tensor, Tensor]]

#: The arguments of :func:`peftkern.prefix_attention` that have gradients.
DIFFERENTIABLE = tuple(name.removeprefix("d") for name in AttentionGradients._fields)
#: The limits in standard deviations: for one element, and for the root mean square of many rows.
ELEMENT_LIMIT, RMS_LIMIT = 8.0, 1.5
#: Backends whose roundings differ from the default. ``reference`` and ``cpu`` recompute the softmax in backward, and
#: round neither it nor the terms of the prefix's gradients.
ROUNDINGS = {
    "reference": Roundings(softmax=False, prefix_terms=False),
    "cpu": Roundings(softmax=False, prefix_terms=False),
    "merge": Roundings(torch_kernel=True),
    "concat": Roundings(torch_kernel=True, prefix_samples=True),
}


def roundings_of(plan: str) -> Roundings:
    """The roundings of a backend or a plan, by its name."""
    backend, *kernels = plan.split("/")
    found = ROUNDINGS.get(backend, DEFAULT_ROUNDINGS)
    # a kernel of torch on the prefix returns its gradients in q's dtype
    return replace(found, prefix_samples=True) if kernels and "+" in kernels[-1] else found


@dataclass
class Results:
    """The results of one forward and backward pass.

    Attributes:
        out: [B, Hq, S, D_v] in q's dtype.
        lse: [B, Hq, S].
        gradients: gradient by the name of the argument ("q", "prefix_k", ...), in its shape; empty without backward.
    """

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]


def run(
    attention: Attention, tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None,
    dlse: Tensor | None,
) -> Results:  # fmt: skip
    """Run ``attention`` forward and, unless ``dout`` is None, backward.

    Gradients are computed for ``tensors`` and for biases, sinks and gate among ``options``, on detached copies.
    ``dout`` and ``dlse`` are the gradients of out and lse; they are cast to the dtypes of the results.
    """
    given = {**tensors, **{name: x for name, x in options.items() if name in DIFFERENTIABLE and x is not None}}
    leaves = {name: x.detach().requires_grad_(dout is not None) for name, x in given.items()}
    others = {name: x for name, x in options.items() if name not in leaves}
    out, lse = attention(**leaves, **others)
    if dout is None:
        return Results(out.detach(), lse.detach(), {})
    outputs, grads = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, grads = [out, lse], [dout.to(out.dtype), dlse.to(lse.dtype)]
    values = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return Results(out.detach(), lse.detach(), dict(zip(leaves, values, strict=True)))


def exact_attention(**inputs: Any) -> tuple[Tensor, Tensor]:
    """:func:`peftkern.reference.prefix_attention`, also with an int as ``dropout_seed``, and with hints."""
    seed = inputs.pop("dropout_seed", None)
    inputs = {name: x for name, x in inputs.items() if name not in HINTS}
    return reference.prefix_attention(**inputs, dropout_seed=None if seed is None else torch.as_tensor(seed))


@dataclass
class Ratio:
    """An error relative to its limits: 1 is the largest error that passes.

    Attributes:
        element: largest ratio of an element's error to its limit.
        rms: ratio of the root mean square error to its limit.
        message: both errors with their limits, as text.
    """

    element: float
    rms: float
    message: str

    @property
    def worst(self) -> float:
        """The larger ratio, or NaN if the error is NaN."""
        return max(self.element, self.rms) if self.element == self.element else self.element


def ratio(name: str, got: Tensor, true: Tensor, deviation: Tensor) -> Ratio:
    """The error of ``got`` against ``true``, relative to the limits that ``deviation`` gives.

    Args:
        name: name of the result in messages.
        got: result of any float dtype.
        true: exact result in ``got``'s shape.
        deviation: standard deviation of each element, in ``got``'s shape; see :func:`peftkern.testing.deviations`.

    Raises:
        AssertionError: if the shapes differ.
    """
    shapes = {got.shape, true.shape, deviation.shape}
    assert len(shapes) == 1, f"{name}: shape {list(got.shape)}, expected {list(true.shape)}"
    if got.numel() == 0:
        return Ratio(0.0, 0.0, "")
    error = (got.double() - true.double()).abs()
    relative = torch.where(error == 0, 0.0, error / (ELEMENT_LIMIT * deviation))
    at = int(relative.nan_to_num(nan=torch.inf).argmax())
    element, worst, allowed = (x.flatten()[at].item() for x in (relative, error, ELEMENT_LIMIT * deviation))
    where = [int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)]
    limit = RMS_LIMIT * (1 + 4 * _effective_rows(deviation) ** -0.5) * _rms(deviation)
    rms = _rms(error) / limit if limit > 0 else element
    message = f"{name}: error {worst:.3e} at {where} is {element:.3g} of the {allowed:.3e} allowed there"
    message += f"; rms error {_rms(error):.3e} is {rms:.3g} of the {limit:.3e} allowed"
    return Ratio(element, rms, message)


def _effective_rows(deviation: Tensor) -> float:
    rows = deviation.square()
    if deviation.dim() > 1:
        rows = rows.flatten(0, -2).sum(-1)
    largest = rows.max()
    return ((rows / largest).sum() ** 2 / (rows / largest).square().sum()).item() if largest > 0 else 1.0


def assert_bound(name: str, got: Tensor, true: Tensor, deviation: Tensor) -> None:
    """Assert that ``got`` differs from ``true`` by no more than rounding explains.

    Args:
        name: name of the result in messages.
        got: result of any float dtype.
        true: exact result in ``got``'s shape.
        deviation: standard deviation of each element, in ``got``'s shape; see :func:`peftkern.testing.deviations`.

    Raises:
        AssertionError: if an element or the root mean square exceeds its limit, or if the shapes differ.
    """
    assert_within(ratio(name, got, true, deviation))


def assert_within(result: Ratio) -> None:
    """Assert that an error is within its limits; the message names both."""
    assert result.worst <= 1, f"{result.message}, and exceeds it"


def ratios(
    attention: Attention, tensors: dict[str, Tensor], options: dict[str, Any], *, backward: bool = True,
    dlse: bool = False, roundings: Roundings = DEFAULT_ROUNDINGS,
) -> tuple[Results, dict[str, Ratio]]:  # fmt: skip
    """Run any attention function and measure its errors relative to the bound.

    Args:
        attention: takes the tensors and options as keyword arguments and returns (out, lse).
        tensors: q, k, v, prefix_k and prefix_v by name, on the CPU, as :func:`peftkern.testing.tensors` makes them.
        options: other keyword arguments of :func:`peftkern.prefix_attention`, tensors on the CPU.
        backward: also compute gradients, for a random gradient of out.
        dlse: use a random gradient of lse as well.
        roundings: roundings of ``attention`` that not every backend performs.

    Returns:
        (results, error of each by name: "out", "lse", "dq", "dprefix_k", ...).

    Raises:
        AssertionError: if a shape is wrong, or lse is -inf in other rows than the reference's.
    """
    q = tensors["q"]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(*q.shape[:3], tensors["v"].shape[3], generator=generator).to(q.dtype) if backward else None
    lse_grad = torch.randn(q.shape[:3], generator=generator) if backward and dlse else None
    got = run(attention, tensors, options, dout, lse_grad)
    return got, errors(got, tensors, options, dout, lse_grad, roundings)


def errors(
    got: Results, tensors: dict[str, Tensor], options: dict[str, Any], dout: Tensor | None, dlse: Tensor | None,
    roundings: Roundings = DEFAULT_ROUNDINGS,
) -> dict[str, Ratio]:  # fmt: skip
    """The errors of results that :func:`run` returned for these arguments, relative to the bound.

    Raises:
        AssertionError: if a shape is wrong, or lse is -inf in other rows than the reference's.
    """
    # rounding an fp32 prefix to q's dtype belongs to the operation, so it is no error
    exact = {n: x.to(tensors["q"].dtype).double() for n, x in tensors.items()}
    true = run(exact_attention, exact, _double(options), dout, dlse)
    allowed = deviations(tensors, options, dout, dlse, roundings)
    finite = torch.isfinite(true.lse)
    assert torch.equal(torch.isfinite(got.lse), finite), "lse: -inf in other rows than the reference"
    result = {
        "out": ratio("out", got.out, true.out, allowed["out"]),
        "lse": ratio("lse", got.lse[finite], true.lse[finite], allowed["lse"][finite]),
    }
    for name, value in got.gradients.items():
        exact_value, deviation = true.gradients[name], allowed[f"d{name}"]
        if name not in tensors and value.dtype in (torch.bfloat16, torch.float16):  # of a bias that is not fp32
            deviation = (deviation.square() + storage_variance(exact_value, value.dtype)).sqrt()
        result[f"d{name}"] = ratio(f"d{name}", value, exact_value, deviation)
    return result


def check_backend(
    backend: str, tensors: dict[str, Tensor], options: dict[str, Any], *, backward: bool = True, dlse: bool = False,
    device: str = "cpu", **kwargs: Any,
) -> Results:  # fmt: skip
    """Run a backend forward and backward, and assert that every result is within the error bound.

    Only the backend runs on ``device``, on copies with the same strides. The fp64 results it is compared with are
    computed on the CPU, where they hold all scores in memory. Checking a few hundred tokens takes seconds; see
    :class:`peftkern.testing.Oracle` for larger calls.

    Args:
        backend: name of a backend, see :func:`peftkern.available_backends`, or of a plan.
        tensors: q, k, v, prefix_k and prefix_v by name, on the CPU, as :func:`peftkern.testing.tensors` makes them.
        options: other keyword arguments of :func:`peftkern.prefix_attention`, tensors on the CPU.
        backward: also check the gradients, for a random gradient of out.
        dlse: use a random gradient of lse as well.
        device: where the backend runs, for example ``"cuda"``.
        kwargs: passed to :func:`peftkern.prefix_attention` unchanged.

    Returns:
        The backend's results, on the CPU.

    Raises:
        AssertionError: if a result is further from fp64 than rounding explains; the message names the result, the
            element and the limits.
        BackendUnavailable: if the backend cannot run the call.

    >>> from peftkern.testing import Shape, tensors
    >>> results = check_backend("reference", tensors(Shape(S=9, P=4, D=16), torch.bfloat16), {"window": 5})
    >>> results.gradients["prefix_k"].shape
    torch.Size([2, 4, 16])
    """

    def kernel(**inputs: Any) -> tuple[Tensor, Tensor]:
        if device != "cpu":
            inputs = {name: moved(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        out, lse = functional.prefix_attention(**inputs, return_lse=True, backend=backend, **kwargs)
        return out.cpu(), lse.cpu()

    roundings = roundings_of(backend)
    got, result = ratios(kernel, tensors, options, backward=backward, dlse=dlse, roundings=roundings)
    for one in result.values():
        assert_within(one)
    return got


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}


def moved(x: Tensor, device: str) -> Tensor:
    """A differentiable copy on ``device`` that has x's strides."""
    if x.numel() == 0:
        return x.to(device)
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.empty(size, dtype=x.dtype, device=device).as_strided(x.shape, x.stride()).copy_(x)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
