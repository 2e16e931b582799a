# SPDX-License-Identifier: Apache-2.0
"""Questions about a ``PeftModel``, and replacements for its methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model_info import rename_cache
from .calls import running
from .wiring import Wiring

__all__ = [
    "BASE",
    "AdapterNames",
    "GenerationInputs",
    "PeftCalls",
    "PeftMethod",
    "drop_token_types",
    "has_prompt",
    "is_disabled",
    "is_peft_model",
]


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``. Does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def has_prompt(model: Any) -> bool:
    """Whether a ``PeftModel`` has a prompt or prefix adapter."""
    return any(config.is_prompt_learning for config in model.peft_config.values())


def is_disabled(model: Any) -> bool:
    """Whether a ``PeftModel`` is in ``disable_adapter()``, which replaces its forward by the base model's."""
    return getattr(model.forward, "__self__", model) is not model


class PeftMethod:
    """Replaces a method of an instance, of a ``PeftModel`` or of a model that ``transformers`` adds adapters to.

    ``disable_adapter()`` saves the method when it starts and restores it when it ends. If the model is unpatched in
    between, it restores this object, which then calls PEFT's method.

    Args:
        model: the instance.
        name: of the method.
        function: called with the class's method, followed by the arguments.
    """

    def __init__(self, model: Any, name: str, function: Callable[..., Any]) -> None:
        self.model = model
        self.name = name
        self.function = function
        self.previous = model.__dict__.get(name)
        self.installed = False

    def __call__(
        self, *args: Any, task_ids: Tensor | None = None, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Call the function, or PEFT's method after the patch has been undone.

        ``generate`` only passes on arguments that have a name here.
        """
        model = running.module(self.model, self.model)
        method = partial(getattr(type(model), self.name), model) if self.previous is None else self.previous
        if task_ids is not None:
            kwargs["task_ids"] = task_ids
        if not self.installed or is_disabled(self.model):
            return method(*args, **kwargs)
        if adapter_names is not None:
            kwargs["adapter_names"] = adapter_names
        return self.function(method, *args, **kwargs)

    def install(self, wiring: Wiring) -> None:
        """Replace the method, if the model's class has it."""
        if hasattr(type(self.model), self.name):
            wiring.set_attribute(self.model, self.name, self)
            self.installed = True
            wiring.on_undo(self.retire)

    def retire(self) -> None:
        """Call PEFT's method from now on."""
        self.installed = False


class PeftCalls:
    """Hooks that record which module runs, possibly a replica, for :class:`PeftMethod`.

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
        """Hook: a call starts."""
        running.enter(self.model, module)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: a call has returned or raised."""
        if not torch.compiler.is_compiling():
            running.leave(self.model)


#: PEFT's name for a sample without an adapter.
BASE = "__base__"


class AdapterNames:
    """The argument ``adapter_names`` of calls of a ``PeftModel``: one name per sample, as for PEFT's LoRA.

    Args:
        model: a ``PeftModel``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def install(self, wiring: Wiring) -> None:
        """Add the hook. Install it after :class:`PeftCalls`, which records the calls."""
        wiring.add_hooks(self.model.register_forward_pre_hook(self.before, with_kwargs=True))

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Hook: keep the names for ``get_prompt``. PEFT's forward passes them to the model, which ignores them."""
        if "adapter_names" not in kwargs or is_disabled(module):
            return None
        names = kwargs.pop("adapter_names")
        if names is not None and torch.compiler.is_compiling():
            raise ValueError("adapter_names: expected None under torch.compile, got names")
        running.leave_note(self.model, names)
        return args, kwargs

    def of_call(self, num_rows: int) -> list[str] | None:
        """The names of the rows of the running call; None if it has none."""
        names = None if torch.compiler.is_compiling() else running.note(self.model)
        return None if names is None else self.of_rows(names, num_rows)

    def of_rows(self, names: Sequence[str], num_rows: int) -> list[str]:
        """One name per row; every sample has the same number of rows, which follow each other (beams).

        Raises:
            ValueError: for a wrong number of names, or an unknown one.
        """
        known = [*self.model.peft_config, BASE]
        unknown = sorted({name for name in names if name not in known})
        if unknown:
            raise ValueError(
                f"adapter_names: expected names among {', '.join(known)}, got {', '.join(map(str, unknown))}"
            )
        for name in sorted(set(names) - {BASE}):
            if getattr(self.model.peft_config[name], "modules_to_save", None):
                raise ValueError(
                    f"adapter_names: expected adapters without modules_to_save, got {name!r}, which has a head"
                )
        if getattr(self.model, "modules_to_save", None):
            raise ValueError("adapter_names: expected None, because every adapter has a head of its own, got names")
        if not names or num_rows % len(names):
            raise ValueError(f"adapter_names: expected one name for each of {num_rows} samples, got {len(names)}")
        return [name for name in names for _ in range(num_rows // len(names))]


def drop_token_types(inputs: dict[str, Any]) -> None:
    """Leave ``token_type_ids`` out of the inputs of a step of ``generate``, as PEFT does in each call."""
    if inputs.get("token_type_ids") is not None:
        inputs["token_type_ids"] = None


class GenerationInputs:
    """The base model's ``prepare_inputs_for_generation``, with the cache under the name that PEFT reads.

    PEFT only reads ``past_key_values``. If a model names its cache ``cache``, PEFT takes every step of ``generate``
    for the first one, and passes a second cache or the prompt again.

    Args:
        model: a ``PeftModel``, of any task.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prepare = model.__dict__.get("base_model_prepare_inputs_for_generation")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs of the next step."""
        assert self.prepare is not None
        inputs = self.prepare(*args, **kwargs)
        rename_cache(inputs, "past_key_values")
        return inputs

    def install(self, wiring: Wiring) -> None:
        """Change the model, if its task supports ``generate``."""
        if self.prepare is not None:
            wiring.set_attribute(self.model, "base_model_prepare_inputs_for_generation", self)
            wiring.on_undo(self.leave)

    def leave(self) -> None:
        """Remove this object from the base model, where PEFT's ``generate`` leaves it."""
        left = self.model.base_model.__dict__
        if left.get("prepare_inputs_for_generation") is self:
            left["prepare_inputs_for_generation"] = self.prepare
