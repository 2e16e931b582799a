# SPDX-License-Identifier: Apache-2.0
"""A stock model beside a patched one: what stock computes, what the patched model does, and what to make of it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.huggingface.families.limits import attempt, message_of
from tests.huggingface.families.runs import Step

__all__ = ["AGREE", "FAILURES", "Cell", "Run", "Trial", "refusal", "relative", "runs_peft"]

TOLERANCE = 1e-5
"""Largest difference over largest value. fp32's rounding stays well below; what does not is decided in fp64."""

AGREE = ("equal", "PEFT's way")
FAILURES = ("DIFFERENT", "RAISES")

Run = Callable[[], Any]


@dataclasses.dataclass
class Cell:
    """What came out.

    Attributes:
        outcome: ``"equal"``; ``"PEFT's way"``, equal, but by PEFT's own code; ``"PEFT cannot"`` or, in the plain
            model, ``"stock cannot"``, where no stock training step runs or its prefix has no effect; ``"refused"``
            by ``patch`` or a module's constructor, with a ValueError; ``"DIFFERENT"``; ``"RAISES"`` where stock runs.
        detail: the message, which checks differ, or what stock has to be told.
        how: how batches run, as ``peftkern.explain`` has it.
        difference: the largest relative difference of a check that is equal.
        checks: result of each check.
    """

    outcome: str
    detail: str = ""
    how: str = ""
    difference: float | None = None
    checks: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_clear(self) -> bool:
        """Whether a refusal speaks of the model and not of what happens to be inside."""
        return self.outcome != "refused" or _INSIDE.search(self.detail) is None

    @property
    def way(self) -> str:
        """In a few words, how batches run."""
        if runs_peft(self.how):
            return "concatenated (PEFT's way)"
        if "once per batch" in self.how:
            return "padding-free, prompt once"
        if "text that rows share runs once" in self.how:
            return "shared text once"
        return "padding-free" if "without their padding" in self.how else "with padding" if self.how else ""


_INSIDE = re.compile(r"LazyMask|_Survey|object has no attribute|not subscriptable|index out of range|\(\) got an")


def runs_peft(explanation: str) -> bool:
    """Whether a patched model says that PEFT's own code, or what it does, runs in some of its calls."""
    return re.search(r"before every sample|PEFT's (own )?(code|way|forward)|concatenat", explanation) is not None


class Trial:
    """A stock model beside a patched one. Subclasses say which.

    Args:
        family: of the models.
        dtype: of the models.
    """

    #: What stock has to be told where its own reading of the model fails; a second trial then tells it.
    hint = ""
    cannot = "PEFT cannot"

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        self.family, self.dtype = family, dtype
        self.told = False
        self.how = ""

    def build(self) -> None:
        """Make the stock model and what :meth:`patch` puts into the other. Raises as their classes do."""
        raise NotImplementedError

    def truths(self) -> dict[str, Run]:
        """By name, what stock computes."""
        raise NotImplementedError

    def acts(self, known: dict[str, Any]) -> bool:
        """Whether stock's prefix or prompt has an effect."""
        steps = [result for result in known.values() if isinstance(result, Step)]
        return any(g is not None and bool(g.any()) for step in steps for g in step.gradients.values())

    def patch(self) -> None:
        """Make the patched model."""
        raise NotImplementedError

    def calls(self) -> dict[str, Run]:
        """By name of the check, what the patched model computes. Run in their order."""
        raise NotImplementedError

    def truths_of(self, check: str) -> list[str]:
        """Names of the truths of which a check has to equal one."""
        return [check]

    def run(self) -> Cell:
        """All checks."""
        cell = self._run()
        if cell.outcome == self.cannot and self.hint:
            self.told = True
            second = self._run()
            if second.outcome in AGREE:
                second.detail = self.hint
            if second.outcome != self.cannot:
                return second
        return cell

    def _run(self) -> Cell:
        _, error = attempt(self.build)
        if error is not None:
            return self.unbuilt(error)
        known, errors = {}, {}
        for name, truth in self.truths().items():
            result, error = attempt(functools.partial(_finite, truth))
            if error is None:
                known[name] = result
            else:
                errors[name] = message_of(error)
        reason = ""
        if not any(isinstance(result, Step) for result in known.values()):
            reason = next(iter(errors.values()))
        elif not self.acts(known):
            reason = "the stock model computes the same without it"
        _, error = attempt(self.patch)
        if reason:
            return Cell(self.cannot, reason, checks={} if error is None else {"patch": message_of(error)})
        return self._compared(known, errors) if error is None else refusal(error)

    def unbuilt(self, error: BaseException) -> Cell:
        """For a stock model that cannot be made."""
        return Cell(self.cannot, message_of(error))

    def _compared(self, known: dict[str, Any], errors: dict[str, str]) -> Cell:
        cell = Cell("equal", how=self.how)
        raised, different, largest = [], [], 0.0
        for name, call in self.calls().items():
            got, error = attempt(call)
            wanted = [known[key] for key in self.truths_of(name) if key in known]
            if not wanted or (error is not None and name in errors and runs_peft(self.how)):
                reasons = [errors[key] for key in self.truths_of(name) if key in errors]
                cell.checks[name] = f"{self.cannot}: {'; '.join(reasons)}"
            elif error is not None:
                cell.checks[name] = message_of(error)
                raised.append(f"{name}: {cell.checks[name]}")
            else:
                parts = min((_differences(got, want) for want in wanted), key=lambda parts: max(parts.values()))
                cell.checks[name] = ", ".join(f"{part} {value:.1e}" for part, value in parts.items())
                worst = max(parts.values())
                if worst > (0.0 if name == "unpatched" else TOLERANCE):
                    different.append(f"{name}: {cell.checks[name]}")
                else:
                    largest = max(largest, worst)
        cell.difference = largest
        if raised or different:
            cell.outcome = "DIFFERENT" if different else "RAISES"
            cell.detail = "; ".join(different + raised)
        elif runs_peft(self.how):
            cell.outcome = "PEFT's way"
        return cell


def refusal(error: BaseException) -> Cell:
    """A ValueError is an answer to the user, anything else a fault."""
    return Cell("refused" if isinstance(error, ValueError) else "RAISES", message_of(error))


def _finite(run: Run) -> Any:
    result = run()
    if isinstance(result, Step) and not result.loss.isfinite():
        raise ArithmeticError(f"the loss is {result.loss.item()}")
    return result


def _differences(got: Any, want: Any) -> dict[str, float]:
    """By part of the result, the largest difference over the largest value. Tokens differ by 0 or infinity."""
    if isinstance(want, Tensor) and want.is_floating_point():
        return {"logits": relative(got, want)}
    if isinstance(want, Tensor):
        return {"tokens": 0.0 if torch.equal(got, want) else float("inf")}
    names = want.gradients.keys() | got.gradients.keys()
    gradients = (relative(got.gradients.get(name), want.gradients.get(name)) for name in names)
    return {
        "loss": relative(got.loss, want.loss),
        "logits": relative(got.logits, want.logits),
        "gradients": max(gradients, default=0.0),
    }


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """Largest difference over the largest wanted value; infinite where only one has a value, or a finite one."""
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.double().nan_to_num(0.0, 0.0, 0.0), want.double().nan_to_num(0.0, 0.0, 0.0)
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
