# SPDX-License-Identifier: Apache-2.0
"""The four ways to put a prefix or a prompt before a model, and shared text without either, each as a trial."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.huggingface import sharer, sharing
from tests.huggingface.families import runs, tiny
from tests.huggingface.families.limits import attempt
from tests.huggingface.families.runs import MASKS, Step
from tests.huggingface.families.trials import Cell, Run, Trial, refusal, relative, runs_peft
from tests.huggingface.models import LEFT, ONES, PREFIX, RIGHT, patch_of

__all__ = ["NativePrefix", "NativePrompt", "PeftPrefix", "PeftPrompt", "SharedText"]


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
        return error is not None or relative(result.logits, bare) > 1e-6


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
            plain = runs.language_model(tiny.tiny_model(self.family, self.dtype))
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
        return super().unbuilt(error) if self.told else refusal(error)

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
            "tokens padded": lambda: runs.generate_behind_prompt(stock, prompt.weight, ONES, alone=False),
            "left tokens padded": lambda: runs.generate_behind_prompt(stock, prompt.weight, LEFT, alone=False),
        }
        return truths

    def truths_of(self, check: str) -> list[str]:
        """Padding between prompt and text counts where the prompt is put before every sample, and in windows.

        RWKV decodes a batch to other tokens than each of its samples.
        """
        counts = runs_peft(self.how) or (check == "left tokens" and runs.has_window(self.stock))
        return [check, f"{check} padded"] if check in ("left", "left tokens", "tokens") and counts else [check]


class SharedText(Trial):
    """Text that rows share runs once, in the plain model. Compared are the gradients of all its parameters."""

    cannot = "stock cannot"

    def build(self) -> None:
        self.stock = tiny.tiny_model(self.family, self.dtype)

    def _runs(self, model: Any) -> dict[str, Run]:
        return {
            name: functools.partial(runs.sharing_step, model, mask) for name, mask in runs.SHARING_MASKS.items()
        } | {
            "tokens": lambda: runs.generate(model, ONES, runs.SHARING_IDS),
            "left tokens": lambda: runs.generate(model, runs.SHARING_LEFT, runs.SHARING_IDS),
        }

    def truths(self) -> dict[str, Run]:
        return {**self._runs(self.stock), "unpatched": lambda: runs.bare(self.stock, RIGHT)}

    def patch(self) -> None:
        self.model = peftkern.patch(tiny.tiny_model(self.family, self.dtype), share="prefixes")
        self.how = str(peftkern.explain(self.model))

    def _sharing(self, run: Run) -> Any:
        """The result of a run, all of whose calls that start sequences share what they can."""
        with mock.patch.object(sharing, "MIN_SAVED_ROWS", 1), mock.patch.object(sharer, "MAX_ROWS", 0.99):
            result = run()
        assert patch_of(self.model).shared_rows is not None, peftkern.explain(self.model)
        return result

    def calls(self) -> dict[str, Run]:
        sharing_runs = {name: functools.partial(self._sharing, run) for name, run in self._runs(self.model).items()}
        return {**sharing_runs, "unpatched": lambda: runs.bare(peftkern.unpatch(self.model), RIGHT)}
