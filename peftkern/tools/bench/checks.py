# SPDX-License-Identifier: Apache-2.0
"""Whether a provider computes the right thing: its errors against fp64, beside those of PEFT's way.

An error is ||got - true|| / ||true|| (Frobenius norms), of out or of the worst gradient. A provider may err twice
(gradients: three times) as much as PEFT's way in the same dtype, and one rounding; its largest element twice as much
again, so that a few wrong elements do not hide in a norm. What leaves the prefix out is compared with PEFT's way
without it. The truth is the reference in fp64, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import reference
from .providers import Calls, Problem, Unavailable, prepare

OUTPUTS = ("out",)
GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")
_BLOCK = 1 << 22  # elements of the score matrix of a block
_ALL_HEADS = 1 << 24  # up to so many scores every kv head is compared, beyond it the first and the last


@dataclass(frozen=True)
class Verdict:
    """What comparing a provider with fp64 gave.

    Attributes:
        error: of the worst output.
        baseline: of the worst output of PEFT's way.
        wrong: what is wrong, empty if nothing is.
    """

    error: float
    baseline: float
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """error / baseline."""
        return self.error / self.baseline if self.baseline else 1.0


class Truth:
    """The true results of a problem, and PEFT's errors; computed once, with or without a prefix."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        shape = problem.shape
        scores = shape.B * shape.Hq * shape.S * (shape.P + shape.T)
        self.heads = list(range(shape.Hkv)) if scores <= _ALL_HEADS else sorted({0, shape.Hkv - 1})
        self._true: dict[tuple[bool, bool], list[Tensor]] = {}
        self._errors: dict[tuple[bool, bool], list[tuple[float, float]]] = {}

    def judge(self, calls: Calls, backward: bool, uses_prefix: bool = True) -> Verdict:
        """Of out, or of the gradients."""
        call = calls.both if backward else calls.forward
        assert call is not None
        result: Any = call()
        got: list[Tensor] = list(result) if backward else [result]
        true = self.results(backward, uses_prefix)
        names, allowed = GRADIENTS if backward else OUTPUTS, self.baseline(backward, uses_prefix)
        factor, eps = 3 if backward else 2, torch.finfo(self.problem.dtype).eps
        errors, wrong = [], []
        for name, x, y, (norm, largest) in zip(names, got, true, allowed, strict=False):
            mine = self._error(x, y)
            errors.append(mine[0])
            if not bool(torch.isfinite(x).all()):
                wrong.append(f"{name} is not finite")
            elif not (mine[0] <= factor * norm + eps and mine[1] <= 2 * factor * largest + eps):
                wrong.append(
                    f"{name} errs by {mine[0]:.1e} (largest {mine[1]:.1e}), PEFT by {norm:.1e} ({largest:.1e})"
                )
        return Verdict(max(errors, default=0.0), max((a for a, _ in allowed), default=0.0), "; ".join(wrong))

    def baseline(self, backward: bool, uses_prefix: bool = True) -> list[tuple[float, float]]:
        """PEFT's errors per output: (by norm, by the largest element); eager attention's where SDPA cannot."""
        key = (backward, uses_prefix)
        if key not in self._errors:
            problem = self.problem if uses_prefix else self._without_prefix()
            calls = prepare("peft", problem)
            calls = prepare("peft-eager", problem) if isinstance(calls, Unavailable) else calls
            assert isinstance(calls, Calls)
            assert calls.both is not None
            got = list(calls.both()) if backward else [calls.forward()]
            true = self.results(backward, uses_prefix)
            self._errors[key] = [self._error(x, y) for x, y in zip(got, true, strict=uses_prefix)]
        return self._errors[key]

    def _without_prefix(self) -> Problem:
        *sequence, prefix_k, prefix_v = self.problem.inputs
        inputs = (*sequence, prefix_k[:, :0], prefix_v[:, :0])
        return replace(self.problem, shape=replace(self.problem.shape, P=0), inputs=inputs)

    def results(self, backward: bool, uses_prefix: bool) -> list[Tensor]:
        """[out], or the five gradients (three without a prefix), in fp64, of the heads that are compared."""
        key = (backward, uses_prefix)
        if key not in self._true:
            out, gradients = self._compute(backward, uses_prefix)
            self._true[False, uses_prefix] = [out]
            if backward:
                self._true[key] = gradients if uses_prefix else gradients[:3]
        return self._true[key]

    def _compute(self, backward: bool, uses_prefix: bool) -> tuple[Tensor, list[Tensor]]:
        problem = self.problem if uses_prefix else self._without_prefix()
        shape, (q, k, v, *prefix) = problem.shape, problem.inputs
        q, k, v, dout = (self._heads(x).double() for x in (q, k, v, self.problem.dout))
        prefix_k, prefix_v = (x[self.heads].double() for x in prefix)
        leaves = [x.requires_grad_(backward) for x in (q, k, v, prefix_k, prefix_v)]
        gradients = [torch.zeros_like(x) for x in leaves] if backward else []
        out = torch.zeros_like(q.detach())
        block = max(1, _BLOCK // max(1, q.shape[1] * (shape.P + shape.T)))
        for sample in range(shape.B):
            for first in range(0, shape.S, block):
                last = min(first + block, shape.S)
                keys = shape.cached + last
                part = (k[sample, None, :, :keys], v[sample, None, :, :keys], prefix_k, prefix_v)
                result, _ = reference.prefix_attention(q[sample, None, :, first:last], *part, **shape.options)
                out[sample, :, first:last] = result[0].detach()
                if backward:
                    grads = torch.autograd.grad(result, leaves, dout[sample, None, :, first:last])
                    for total, gradient in zip(gradients, grads, strict=True):
                        total += gradient
        return out, gradients

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, N, D] restricted to the heads that belong to the compared kv heads; a prefix [H, P, D] too."""
        if x.dim() == 3:
            return x[self.heads]
        groups: Tensor = x.unflatten(1, (self.problem.shape.Hkv, -1))
        return groups[:, self.heads].flatten(1, 2)

    def _error(self, got: Tensor, true: Tensor) -> tuple[float, float]:
        difference = self._heads(got.detach()).double() - true
        if not difference.numel():
            return 0.0, 0.0
        norm, largest = true.norm().item(), true.abs().max().item()
        return difference.norm().item() / (norm or 1.0), difference.abs().max().item() / (largest or 1.0)
