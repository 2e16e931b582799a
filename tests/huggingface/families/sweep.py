# SPDX-License-Identifier: Apache-2.0
"""One family: each way to put a prefix or a prompt before its tiny model, patched beside stock.

Four cells: ``prefix`` and ``prompt`` are PEFT's adapters, ``PrefixKV`` and ``SoftPrompt`` the package's modules in
the plain model. A cell has checks: training steps with no padding, on the right and on the left (loss, logits at
tokens, gradients of the prefix or prompt), greedy tokens without padding and with padding on the left, and a step
after ``unpatch``, which has to be equal to the bit.

Behind a prompt, PEFT leaves padding on the left between prompt and text. Patched models have each sample as it is
alone and without padding, and PEFT's numbers with ``peft_bugs=True``; both are checked.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import PrefixKV, SoftPrompt
from tests.huggingface.families import runs, tiny
from tests.huggingface.families.limits import attempt, message_of
from tests.huggingface.families.runs import MASKS, Step
from tests.huggingface.models import IDS, LEFT, ONES, PREFIX, RIGHT

__all__ = ["CELLS", "FAILURES", "Cell", "Family", "sweep"]

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
    def way(self) -> str:
        """In a few words, how batches run."""
        if runs_peft(self.how):
            return "concatenated (PEFT's way)"
        if "once a batch" in self.how:
            return "padding-free, prompt once"
        return "padding-free" if "without their padding" in self.how else "with padding" if self.how else ""


@dataclasses.dataclass
class Family:
    """Cells of a family by name, or why there are none."""

    name: str
    cells: dict[str, Cell]
    not_built: str = ""

    @property
    def failures(self) -> dict[str, Cell]:
        """Cells in which a patched model does not do what stock does."""
        return {name: cell for name, cell in self.cells.items() if cell.outcome in FAILURES}


def runs_peft(explanation: str) -> bool:
    """Whether a patched model says that PEFT's own code, or what it does, runs in some of its calls."""
    return re.search(r"before every sample|PEFT's (own )?(code|way|forward)|concatenat", explanation) is not None


def sweep(family: str) -> Family:
    """Runs all cells of a family. Never raises, but for what ends a program."""
    if family in tiny.CANNOT:
        return Family(family, {}, tiny.CANNOT[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, error = attempt(lambda: tiny.tiny_model(family)(input_ids=IDS, labels=IDS))
        if error is not None:
            return Family(family, {}, message_of(error))
        cells = {}
        for name, kind in CELLS.items():
            cell, error = attempt(functools.partial(_decided, kind, family), seconds=120.0)
            cells[name] = Cell("RAISES", message_of(error)) if error is not None else cell
        gc.collect()
    return Family(family, cells)


def _decided(kind: type[Trial], family: str) -> Cell:
    """The cell; where numbers differ in fp32, as it is in fp64, in which rounding cannot be the reason."""
    cell = kind(family, torch.float32).run()
    if cell.outcome == "DIFFERENT":
        exact = kind(family, torch.float64).run()
        if exact.outcome in (*AGREE, "DIFFERENT"):
            return exact
    return cell


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
        return self._compared(known, errors) if error is None else _refusal(error)

    def unbuilt(self, error: BaseException) -> Cell:
        """For a stock model that cannot be made."""
        return Cell(self.cannot, message_of(error))

    def _compared(self, known: dict[str, Any], errors: dict[str, str]) -> Cell:
        cell = Cell("equal", how=self.how)
        raised, different, largest = [], [], 0.0
        for name, call in self.calls().items():
            got, error = attempt(call)
            wanted = [known[key] for key in self.truths_of(name) if key in known]
            if not wanted:
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


def _refusal(error: BaseException) -> Cell:
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
        return {"logits": _relative(got, want)}
    if isinstance(want, Tensor):
        return {"tokens": 0.0 if torch.equal(got, want) else float("inf")}
    names = want.gradients.keys() | got.gradients.keys()
    gradients = (_relative(got.gradients.get(name), want.gradients.get(name)) for name in names)
    return {
        "loss": _relative(got.loss, want.loss),
        "logits": _relative(got.logits, want.logits),
        "gradients": max(gradients, default=0.0),
    }


def _relative(got: Tensor | None, want: Tensor | None) -> float:
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got.double().nan_to_num(0.0, 0.0, 0.0), want.double().nan_to_num(0.0, 0.0, 0.0)
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def _steps(step: Callable[[Tensor | None], Step]) -> dict[str, Run]:
    return {name: functools.partial(step, mask) for name, mask in MASKS.items()}


class PeftTrial(Trial):
    """A PEFT model beside the same, patched."""

    kind: str
    hint = "PEFT has to be told num_layers, num_attention_heads and token_dim"

    def build(self) -> None:
        self.stock = runs.peft_model(self.family, self.kind, self.dtype, stock=True, told=self.told)

    def _step(self, model: Any, mask: Tensor | None) -> Step:
        return runs.step(model, model.prompt_encoder, mask)

    def truths(self) -> dict[str, Run]:
        stock = self.stock
        return {
            **_steps(functools.partial(self._step, stock)),
            "tokens": lambda: runs.generate(stock, ONES),
            "left tokens": lambda: runs.generate(stock, LEFT),
            # Some models keep states from call to call, so this is asked for behind the same calls.
            "unpatched": lambda: self._step(stock, RIGHT),
        }

    def patch(self) -> None:
        model = runs.peft_model(self.family, self.kind, self.dtype, stock=False, told=self.told)
        self.model = peftkern.patch(model)
        self.how = str(peftkern.explain(model))

    def calls(self) -> dict[str, Run]:
        model = self.model
        return {
            **_steps(functools.partial(self._step, model)),
            "tokens": lambda: runs.generate(model, ONES),
            "left tokens": lambda: runs.generate(model, LEFT),
            "unpatched": lambda: self._step(peftkern.unpatch(model), RIGHT),
        }


class PeftPrefix(PeftTrial):
    """PREFIX_TUNING."""

    kind = "prefix"

    def acts(self, known: dict[str, Any]) -> bool:
        if not super().acts(known):
            return False
        name, result = next((name, result) for name, result in known.items() if isinstance(result, Step))
        bare, error = attempt(lambda: runs.without_adapter(self.stock, MASKS[name]))
        return error is not None or _relative(result.logits, bare) > 1e-6


class PeftPrompt(PeftTrial):
    """PROMPT_TUNING, whose truth for padding on the left is each sample alone, or PEFT's with ``peft_bugs``."""

    kind = "prompt"

    def truths(self) -> dict[str, Run]:
        truths = {
            **super().truths(),
            "left alone": lambda: runs.step_alone(self.stock, LEFT),
            "left tokens alone": lambda: runs.generate_alone(self.stock, LEFT),
        }
        if runs.has_window(self.stock.get_base_model()):
            weight = self.stock.prompt_encoder[self.stock.active_adapter].embedding.weight
            plain = tiny.tiny_model(self.family, self.dtype)
            truths["left tokens in windows"] = lambda: runs.generate_behind_prompt(plain, weight, LEFT, alone=False)
        return truths

    def with_peft_bugs(self, run: Callable[[Any], Any]) -> Any:
        """A run of the model patched with ``peft_bugs=True``."""
        with peftkern.patched(self.model, peft_bugs=True):
            return run(self.model)

    def calls(self) -> dict[str, Run]:
        return {
            **super().calls(),
            "left, peft_bugs": lambda: self.with_peft_bugs(lambda model: self._step(model, LEFT)),
            "left tokens, peft_bugs": lambda: self.with_peft_bugs(lambda model: runs.generate(model, LEFT)),
        }

    def truths_of(self, check: str) -> list[str]:
        if check in ("left", "left tokens"):
            return [f"{check} alone", f"{check} in windows", *([check] if runs_peft(self.how) else [])]
        return [check.removesuffix(", peft_bugs")]


class NativeTrial(Trial):
    """A module of the package in the plain model, beside the plain model with what the module holds put by hand."""

    cannot = "stock cannot"

    def make(self, model: Any) -> Any:
        """The module."""
        raise NotImplementedError

    def build(self) -> None:
        self.stock = tiny.tiny_model(self.family, self.dtype)
        self.held = self.make(self.stock)

    def unbuilt(self, error: BaseException) -> Cell:
        return _refusal(error)

    def patch(self) -> None:
        model = tiny.tiny_model(self.family, self.dtype)
        self.module = self.make(model)
        self.module.load_state_dict(self.held.state_dict())
        self.model = peftkern.patch(model, self.module, freeze=True)
        self.how = str(peftkern.explain(model))

    def calls(self) -> dict[str, Run]:
        model = self.model
        return {
            **_steps(functools.partial(runs.step, model, self.module)),
            "tokens": lambda: runs.generate(model, ONES),
            "left tokens": lambda: runs.generate(model, LEFT),
            "unpatched": lambda: runs.bare(peftkern.unpatch(model), RIGHT),
        }


class NativePrefix(NativeTrial):
    """:class:`peftkern.PrefixKV`."""

    hint = "laid out as the model's own cache is"

    def make(self, model: Any) -> PrefixKV:
        torch.manual_seed(2)
        geometry = runs.cached_geometry(model) if self.told else {}
        return PrefixKV(model, PREFIX, dtype=self.dtype, std=1.0, **geometry)

    def truths(self) -> dict[str, Run]:
        def cache() -> Any:
            return runs.copies(self.stock, self.held, as_configured=self.told)

        return {
            **_steps(lambda mask: runs.prefix_by_hand(self.stock, self.held, cache(), mask)),
            "tokens": lambda: runs.generate_behind_cache(self.stock, cache(), ONES),
            "left tokens": lambda: runs.generate_behind_cache(self.stock, cache(), LEFT),
            "unpatched": lambda: runs.bare(self.stock, RIGHT),
        }


class NativePrompt(NativeTrial):
    """:class:`peftkern.SoftPrompt`."""

    def make(self, model: Any) -> SoftPrompt:
        torch.manual_seed(2)
        return SoftPrompt(model, PREFIX, dtype=self.dtype, std=0.5)

    def truths(self) -> dict[str, Run]:
        stock, prompt = self.stock, self.held
        truths = {
            **_steps(lambda mask: runs.prompt_by_hand(stock, prompt, mask, alone=mask is LEFT)),
            "tokens": lambda: runs.generate_behind_prompt(stock, prompt.weight, ONES),
            "left tokens": lambda: runs.generate_behind_prompt(stock, prompt.weight, LEFT),
            "unpatched": lambda: runs.bare(stock, RIGHT),
            "left padded": lambda: runs.prompt_by_hand(stock, prompt, LEFT),
        }
        if runs.has_window(stock):
            truths["left tokens in windows"] = lambda: runs.generate_behind_prompt(
                stock, prompt.weight, LEFT, alone=False
            )
        return truths

    def truths_of(self, check: str) -> list[str]:
        others = [f"{check} in windows"] if check == "left tokens" else []
        if check == "left" and runs_peft(self.how):
            others.append("left padded")
        return [check, *others]


CELLS: dict[str, type[Trial]] = {
    "prefix": PeftPrefix,
    "prompt": PeftPrompt,
    "PrefixKV": NativePrefix,
    "SoftPrompt": NativePrompt,
}
