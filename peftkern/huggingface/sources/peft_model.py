# SPDX-License-Identifier: Apache-2.0
"""What patches of PEFT models share: methods that stand in for PEFT's, and PEFT's own way as a fallback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...model_info import rename_cache
from ..calls import running
from ..model_patch import PATCH
from ..wiring import Wiring

__all__ = [
    "FallbackPatch",
    "GenerationInputs",
    "PeftCalls",
    "PeftMethod",
    "has_prompt",
    "is_disabled",
    "is_peft_model",
]


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``; imports nothing."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def has_prompt(model: Any) -> bool:
    """Whether a ``PeftModel`` has an adapter that is a prompt or a prefix."""
    return any(config.is_prompt_learning for config in model.peft_config.values())


def is_disabled(model: Any) -> bool:
    """Whether a ``PeftModel`` runs in ``disable_adapter()``, which makes the base model's forward its own."""
    return getattr(model.forward, "__self__", model) is not model


class PeftMethod:
    """Stands in for a method of a ``PeftModel`` instance.

    ``disable_adapter()`` puts back at its end what it found at its start. If the model was unpatched in between, this
    object is put back. It then calls PEFT's method.

    Args:
        model: a ``PeftModel``.
        name: of the method.
        function: called with PEFT's method and the arguments.
    """

    def __init__(self, model: Any, name: str, function: Callable[..., Any]) -> None:
        self.model = model
        self.name = name
        self.function = function
        self.previous = model.__dict__.get(name)
        self.installed = False

    def __call__(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the function, or PEFT's method once the patch is gone."""
        model = running.module(self.model, self.model)
        method = partial(getattr(type(model), self.name), model) if self.previous is None else self.previous
        if task_ids is not None:
            kwargs["task_ids"] = task_ids
        if not self.installed or is_disabled(self.model):
            return method(*args, **kwargs)
        return self.function(method, *args, **kwargs)

    def install(self, wiring: Wiring) -> None:
        """Put it in place of the method, if the model's class has one."""
        if hasattr(type(self.model), self.name):
            wiring.set_attribute(self.model, self.name, self)
            self.installed = True
            wiring.on_undo(self.retire)

    def retire(self) -> None:
        """Be PEFT's method from now on."""
        self.installed = False


class PeftCalls:
    """Hooks by which the methods that stand in for PEFT's know the module that runs, which may be a replica.

    Args:
        model: a ``PeftModel``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def install(self, wiring: Wiring) -> None:
        """Add the hooks."""
        wiring.add_hooks(
            self.model.register_forward_pre_hook(self.before),
            self.model.register_forward_hook(self.after, always_call=True),
        )

    def before(self, module: nn.Module, args: Any) -> None:
        """Hook: a call begins."""
        running.enter(self.model, module)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: a call has ended, or raised."""
        if not torch.compiler.is_compiling():
            running.leave(self.model)


class GenerationInputs:
    """The base model's ``prepare_inputs_for_generation``, with the cache under the name by which PEFT looks for it.

    PEFT knows ``past_key_values`` only. Where a model calls its cache ``cache``, PEFT takes every step of
    ``generate`` for the first, and passes a second cache or the prompt again.

    Args:
        model: a ``PeftModel``, of any task.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prepare = model.__dict__.get("base_model_prepare_inputs_for_generation")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs of the next step."""
        assert self.prepare is not None
        inputs = self.prepare(*args, **kwargs)
        rename_cache(inputs, "past_key_values")
        return inputs

    def install(self, wiring: Wiring) -> None:
        """Change the model, if its task has ``generate``."""
        if self.prepare is not None:
            wiring.set_attribute(self.model, "base_model_prepare_inputs_for_generation", self)
            wiring.on_undo(self.leave)

    def leave(self) -> None:
        """PEFT's ``generate`` leaves what it used on the base model."""
        left = self.model.base_model.__dict__
        if left.get("prepare_inputs_for_generation") is self:
            left["prepare_inputs_for_generation"] = self.prepare


class FallbackPatch:
    """A ``PeftModel`` that runs PEFT's own code, since it cannot be sped up.

    Args:
        model: a ``PeftModel``.
        way: what PEFT does.
        reason: why nothing faster can be done.
        keeps_bugs: do not pad TOKEN_CLS labels; PEFT then raises.
    """

    def __init__(self, model: Any, way: str, reason: str, *, keeps_bugs: bool = False) -> None:
        self.model = model
        self.keeps_bugs = keeps_bugs
        self.way = way
        self.reason = reason
        self.wiring = Wiring()

    def explain(self) -> str:
        """How batches run, and why not otherwise."""
        name = type(self.model.get_base_model()).__name__
        return f"{name}: {self.way}, by PEFT's own code: {self.reason}"

    def install(self) -> None:
        """Mark the model, and say once that it is no faster."""
        GenerationInputs(self.model).install(self.wiring)
        self.wiring.add_hooks(self.model.base_model.register_forward_pre_hook(self.before_call, with_kwargs=True))
        self.wiring.set_attribute(self.model, PATCH, self)
        warnings.warn(f"peftkern: {self.explain()}", stacklevel=4)

    def before_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Hook on the base model: labels of tokens for the prompt's rows, without which PEFT's TOKEN_CLS raises."""
        labels, embeddings = kwargs.get("labels"), kwargs.get("inputs_embeds")
        task = self.model.active_peft_config.task_type
        if getattr(task, "value", task) != "TOKEN_CLS" or self.keeps_bugs or labels is None or embeddings is None:
            return None
        kwargs["labels"] = pad_labels(labels, embeddings.shape[1] - labels.shape[1])
        return args, kwargs

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.wiring.undo()


def pad_labels(labels: Tensor, prompt_len: int) -> Tensor:
    """[B, S] -> [B, P + S], -100 for the prompt."""
    return torch.nn.functional.pad(labels, (prompt_len, 0), value=-100)
