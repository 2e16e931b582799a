# SPDX-License-Identifier: Apache-2.0
"""The patch for PEFT models that keep running PEFT's own code."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..callers import caller_level
from .layout import pad_labels
from .peft_model import GenerationInputs
from .wiring import Patch

__all__ = ["FallbackPatch"]


class FallbackPatch(Patch):
    """Marks a ``PeftModel`` that runs PEFT's own code, because it cannot run ours.

    Args:
        model: a ``PeftModel``.
        way: how PEFT runs it, for :meth:`explain`.
        reason: why it cannot run faster.
        keeps_bugs: do not pad TOKEN_CLS labels, so that PEFT raises.
    """

    model: Any

    def __init__(self, model: Any, way: str, reason: str, *, keeps_bugs: bool = False) -> None:
        super().__init__(model, model.get_base_model())
        self.keeps_bugs = keeps_bugs
        self.way = way
        self.reason = reason

    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""
        return f"{type(self.base).__name__}: {self.way}, by PEFT's own code: {self.reason}"

    def install(self) -> None:
        """Mark the model, and warn that it is not faster."""
        GenerationInputs(self.model).install(self.wiring)
        self.wiring.add_hooks(self.model.base_model.register_forward_pre_hook(self.before_call, with_kwargs=True))
        self.mark(self.model)
        warnings.warn(f"peftkern: {self.explain()}", stacklevel=caller_level())

    def before_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Hook on the base model: pad TOKEN_CLS labels for the prompt's rows, where PEFT would raise.

        Raises:
            ValueError: for ``adapter_names``, which PEFT passes to the model, and the model ignores.
        """
        if kwargs.get("adapter_names") is not None and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(f"adapter_names: expected None, because {self.reason}, got names")
        labels, embeddings = kwargs.get("labels"), kwargs.get("inputs_embeds")
        task = self.model.active_peft_config.task_type
        if getattr(task, "value", task) != "TOKEN_CLS" or self.keeps_bugs or labels is None or embeddings is None:
            return None
        kwargs["labels"] = pad_labels(labels, embeddings.shape[1] - labels.shape[1])
        return args, kwargs
