# SPDX-License-Identifier: Apache-2.0
"""Compare a provider's results with fp64 and with the errors of PEFT's way.

An error is ||got - true|| / ||true|| (Frobenius norms), of out or of the worst gradient. A provider may err twice
(gradients: three times) as much as PEFT's way in the same dtype, plus one rounding. Its largest element may err
twice that, so that a few wrong elements cannot hide in a norm. A provider that leaves the prefix out is compared with
PEFT's way without a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...testing.oracle import Oracle
from .providers import Calls, Problem, Unavailable, prepare

OUTPUTS = ("out",)
GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a provider with fp64.

    Attributes:
        error: error of the worst output.
        baseline: error of the worst output of PEFT's way.
        wrong: description of what is wrong, empty if nothing is.
    """

    error: float
    baseline: float
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """error / baseline."""
        return self.error / self.baseline if self.baseline else 1.0


class Judge:
    """Judges providers on one problem. The exact results and PEFT's errors are computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._problems = {True: problem, False: _without_prefix(problem)}
        self._oracles = {uses_prefix: _oracle(p) for uses_prefix, p in self._problems.items()}
        self._errors: dict[tuple[bool, bool], list[tuple[float, float]]] = {}

    def judge(self, calls: Calls, backward: bool, uses_prefix: bool = True) -> Verdict:
        """Check out, or with ``backward`` the gradients."""
        got, oracle = _outputs(calls, backward), self._oracles[uses_prefix]
        names, allowed = GRADIENTS if backward else OUTPUTS, self.baseline(backward, uses_prefix)
        factor, eps = 3 if backward else 2, torch.finfo(self.problem.dtype).eps
        errors, wrong = [], []
        for name, x, y, (norm, largest) in zip(
            names, got, self.results(backward, uses_prefix), allowed, strict=False
        ):
            mine = oracle.errors(x, y)
            errors.append(mine[0])
            if not bool(torch.isfinite(x).all()):
                wrong.append(f"{name} is not finite")
            elif not (mine[0] <= factor * norm + eps and mine[1] <= 2 * factor * largest + eps):
                wrong.append(
                    f"{name} errs by {mine[0]:.1e} (largest {mine[1]:.1e}), PEFT by {norm:.1e} ({largest:.1e})"
                )
        return Verdict(max(errors, default=0.0), max((a for a, _ in allowed), default=0.0), "; ".join(wrong))

    def baseline(self, backward: bool, uses_prefix: bool = True) -> list[tuple[float, float]]:
        """Errors of PEFT's way per output, see :meth:`Oracle.errors`. Eager attention's where SDPA cannot run."""
        key = (backward, uses_prefix)
        if key not in self._errors:
            calls = prepare("peft", self._problems[uses_prefix])
            if isinstance(calls, Unavailable):
                calls = prepare("peft-eager", self._problems[uses_prefix])
            assert isinstance(calls, Calls)
            pairs = zip(_outputs(calls, backward), self.results(backward, uses_prefix), strict=uses_prefix)
            self._errors[key] = [self._oracles[uses_prefix].errors(x, y) for x, y in pairs]
        return self._errors[key]

    def results(self, backward: bool, uses_prefix: bool) -> list[Tensor]:
        """[out], or the five gradients (three without a prefix), in fp64, of the compared heads."""
        oracle = self._oracles[uses_prefix]
        if not backward:
            return [oracle.out()]
        return oracle.gradients() if uses_prefix else oracle.gradients()[:3]


def _oracle(problem: Problem) -> Oracle:
    q, k, v, prefix_k, prefix_v = problem.inputs
    return Oracle(q, k, v, prefix_k, prefix_v, problem.dout, **problem.shape.options)


def _without_prefix(problem: Problem) -> Problem:
    *sequence, prefix_k, prefix_v = problem.inputs
    inputs = (*sequence, prefix_k[:, :0], prefix_v[:, :0])
    return replace(problem, shape=replace(problem.shape, P=0), inputs=inputs)


def _outputs(calls: Calls, backward: bool) -> list[Tensor]:
    call = calls.both if backward else calls.forward
    assert call is not None
    result: Any = call()
    return list(result) if backward else [result]
