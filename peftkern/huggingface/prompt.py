# SPDX-License-Identifier: Apache-2.0
"""Prompts at the embedding: PEFT's prompt tuning and its kin, and :class:`peftkern.SoftPrompt` in a plain model.

A causal model runs a prompt once a batch, as the first rows of a stream (:mod:`.packing`). Generation goes on with
the prompt's keys as a prefix that all rows share. Models that cannot run on a stream have the prompt put before every
sample, as PEFT does it, but in one pass (:func:`peftkern.soft_prompt_embedding`).
"""

from __future__ import annotations

import inspect
import types
import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from ..base_model import given_cache
from ..functional import soft_prompt_embedding
from .cache import PrefixCache, PrefixOptions
from .model_patch import PATCH, ModelPatch, check_replaceable, place_behind, self_attention_cache
from .packing import Stream
from .peft import GenerationInputs

__all__ = [
    "PROMPT_TYPES",
    "EmbeddingPrompt",
    "PeftConcatenation",
    "PeftPromptPatch",
    "SoftPromptPatch",
    "Unpackable",
    "is_embedding_prompt",
]

PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")

#: Name of the prompt as a submodule of the model.
SUBMODULE = "peftkern_prompt"


class EmbeddingPrompt(Protocol):
    """What a patch needs of a prompt; :class:`peftkern.SoftPrompt` is one."""

    weight: Tensor
    embed_dim: int


def is_embedding_prompt(value: object) -> TypeGuard[EmbeddingPrompt]:
    """Not by ``isinstance``, which from Python 3.12 on does not see a module's parameters."""
    return hasattr(value, "weight") and hasattr(value, "embed_dim")


class Unpackable(ValueError):
    """A model that cannot run on a stream."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a call of the base model carries.

    Attributes:
        rows: [A, P, E].
        ids: [B], which prompt a sample has; None for the one prompt of all.
        shown: whether outputs have rows for the prompt, as PEFT's do.
        labels: [B, S] of a loss that the caller takes from the logits.
    """

    rows: Tensor
    ids: Tensor | None = None
    shown: bool = False
    labels: Tensor | None = None


class PromptPatch(ModelPatch):
    """A prompt that runs once a batch. Subclasses say where it comes from."""

    def explain(self) -> str:
        """How batches run."""
        return f"{type(self.base).__name__}: the prompt runs once a batch, before the sequences without their padding"

    def find_prompt(self, kwargs: dict[str, Any]) -> Prompt | None:
        """The prompt for a call of the base model, taken out of ``kwargs``; None if it gets none."""
        raise NotImplementedError

    def check_prefix(self) -> None:
        """Raise Unpackable if the model cannot run on a stream."""
        if self.unpacked_because:
            reasons = "; ".join(self.unpacked_because)
            raise Unpackable(f"model: its batches cannot be packed behind a prompt: {reasons}")

    def open_stream(self, kwargs: dict[str, Any]) -> Stream | None:
        """Every call with a prompt, unless it continues a sequence."""
        cache = self_attention_cache(kwargs)
        if isinstance(cache, PrefixCache):
            for name in ("peftkern_prompt", "prompt_ids"):
                kwargs.pop(name, None)
            return None
        prompt = self.find_prompt(kwargs)
        if prompt is None:
            return None
        check_replaceable(cache)
        if (reason := self.why_not_this(kwargs)) is not None:
            raise ValueError(f"model: a batch behind a prompt cannot be packed: {reason}")
        uses_cache = kwargs.get("use_cache")
        uses_cache = getattr(self.base.config, "use_cache", False) if uses_cache is None else uses_cache
        labels = prompt.labels if kwargs.get("labels") is None else kwargs["labels"]
        stores = bool(uses_cache) and not self.is_training_step and labels is None
        mask = kwargs.get("attention_mask")
        self.look_at(mask)
        # A cache keeps the padding, so that windows count it when the sequence goes on; they had better begin so.
        from_first = not (stores and self.windows)
        layout = self.lay_out({**kwargs, "labels": labels}, mask, kwargs.get("position_ids"), from_first=from_first)
        kwargs["use_cache"] = stores and not layout.packed_rows
        return Stream(layout, prompt.rows, prompt.ids, show_prompts=prompt.shown)

    def look_at(self, mask: Tensor | None) -> None:
        """Note what is worth a notice."""

    def find_cache(self, kwargs: dict[str, Any]) -> PrefixCache | None:
        """The cache of a sequence that goes on."""
        cache = self_attention_cache(kwargs)
        return cache if isinstance(cache, PrefixCache) else None

    def place_sequence(self, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Columns of the mask and positions for the prompt."""
        place_behind(cache, kwargs)


def _used_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the different ones of ``ids`` [B], [B] which of them each is); while tracing, all as they come."""
    if is_tracing(ids):
        return ids, torch.arange(ids.shape[0], device=ids.device)
    used, which = torch.unique(ids, return_inverse=True)
    return used, which


class SoftPromptPatch(PromptPatch):
    """A :class:`peftkern.SoftPrompt` as a submodule of a plain model; callers speak of the sequence alone.

    Args:
        prompt: with ``weight`` [P, E], or a bank [A, P, E]; calls then say ``prompt_ids`` [B].
        freeze: switch ``requires_grad`` off for the model's own parameters while patched.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        prompt: EmbeddingPrompt,
        *,
        freeze: bool,
        options: PrefixOptions,
        logits: str,
    ) -> None:
        super().__init__(model, base, options, packing=True, logits=logits)
        width = base.get_input_embeddings().weight.shape[1]
        if prompt.weight.shape[-1] != width:
            raise ValueError(
                f"prefix: expected a prompt as wide as the token embeddings, {width}, got {prompt.weight.shape[-1]}"
            )
        self.prompt = prompt
        self.frozen = [p for p in model.parameters() if p.requires_grad] if freeze else []

    def install(self) -> None:
        """Change the model, with the prompt as its submodule."""
        super().install()
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.model.add_module(SUBMODULE, self.prompt)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Undo :meth:`install`."""
        super().remove()
        self.model._modules.pop(SUBMODULE, None)
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def find_prompt(self, kwargs: dict[str, Any]) -> Prompt | None:
        """The module's weight, or those of its bank that the batch uses."""
        weight, ids = self.prompt.weight, kwargs.pop("prompt_ids", None)
        if weight.dim() == 2:
            if ids is not None:
                raise ValueError("prompt_ids: expected None, as the prompt is no bank, got a tensor")
            return Prompt(weight[None])
        if ids is None:
            raise ValueError("prompt_ids: expected the prompt of each sample [B], as the prompt is a bank, got None")
        used, which = _used_of(ids.to(weight.device))
        return Prompt(weight[used], which)


class PeftPromptPatch(PromptPatch):
    """The prompt is that of a ``PeftModel``'s active adapter.

    :meth:`forward` stands in for the instance's, which would put the prompt before every sample; outputs have PEFT's
    shapes.

    Args:
        model: a ``PeftModel`` whose adapters are :data:`PROMPT_TYPES`.
        peft_bugs: leave to PEFT what it computes differently: batches with padding on the left or with
            ``position_ids``, and classification.
    """

    model: Any

    def __init__(self, model: Any, *, peft_bugs: bool, options: PrefixOptions, logits: str) -> None:
        try:
            super().__init__(model, model.get_base_model(), options, packing=True, logits=logits)
        except ValueError as error:
            raise Unpackable(str(error)) from error
        self.peft_bugs = peft_bugs
        self.inputs = GenerationInputs(model)
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._noticed: set[str] = set()

    def install(self) -> None:
        """Change the model, with :meth:`forward` and :meth:`prepare_inputs_for_generation` in place of its own."""
        super().install()
        self.inputs.install()
        self.model.forward = self.forward
        self.model.prepare_inputs_for_generation = self.prepare_inputs_for_generation

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.inputs.remove()
        for name in ("forward", "prepare_inputs_for_generation"):
            self.model.__dict__.pop(name, None)
        super().remove()

    def find_prompt(self, kwargs: dict[str, Any]) -> Prompt | None:
        """What :meth:`forward` has put there."""
        return kwargs.pop("peftkern_prompt", None)  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``PeftModel.forward``."""
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call = {name: argument for name, argument in call.items() if argument is not None}
        model, config = self.model, self.model.active_peft_config
        kind, task = config.peft_type.value, getattr(config.task_type, "value", config.task_type)
        if task == "CAUSAL_LM" and call.pop("token_type_ids", None) is not None:
            warnings.warn("token_type_ids: dropped, as PEFT drops them", stacklevel=2)
        if self._is_peft_bug(call, task):
            return type(model).forward(model, **call)
        base_call = {name: call[name] for name in call.keys() - {"task_ids", "input_type_mask"}}
        if (reason := self.why_not_this(base_call)) is not None:
            self._notice(reason, "such calls have the prompt put before every sample, as PEFT does it", remedy="")
            return _concatenate(model, call)
        if kind == "CPT":
            return self._cpt_forward(call)
        if "position_ids" in call:
            self._notice("position_ids", "they are used; PEFT drops them")
        prompt = self._prompt(call.pop("task_ids", None), shown=task != "SEQ_CLS")
        if task == "TOKEN_CLS" and "labels" in call:
            self._notice("TOKEN_CLS", "labels are those of tokens; PEFT raises, as its outputs show the prompt too")
            prompt_len = prompt.rows.shape[1]
            call["labels"] = torch.nn.functional.pad(call["labels"], (prompt_len, 0), value=-100)
        return model.base_model(**call, peftkern_prompt=prompt)

    def _is_peft_bug(self, call: dict[str, Any], task: str | None) -> bool:
        """Whether a call is left to PEFT for the sake of its numbers."""
        if not self.peft_bugs or task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
            return self.peft_bugs
        mask = call.get("attention_mask")
        return "position_ids" in call or (mask is not None and _has_left_padding(mask))

    def _prompt(self, task_ids: Tensor | None, *, shown: bool) -> Prompt:
        """The active adapter's prompt, or those of the tasks in the batch."""
        compute = type(self.model).get_prompt
        if self.model.active_peft_config.peft_type.value != "MULTITASK_PROMPT_TUNING":
            return Prompt(compute(self.model, 1), shown=shown)
        if task_ids is None:
            raise ValueError("task_ids: expected the task of each sample [B], got None")
        used, which = _used_of(task_ids)
        return Prompt(compute(self.model, used.shape[0], used), which, shown)

    def _cpt_forward(self, call: dict[str, Any]) -> Any:
        """CPT's loss, by PEFT's own code, on the logits of a stream."""
        ids = call.get("input_ids")
        batch = (call["inputs_embeds"] if ids is None else ids).shape[:2]
        inputs = {name: call[name] for name in call.keys() - {"labels", "task_ids", "input_type_mask"}}
        prompt = replace(self._prompt(None, shown=True), labels=call.get("labels"))

        def base_model(**_: Any) -> Any:
            return self.model.base_model(**inputs, peftkern_prompt=prompt)

        nothing = prompt.rows.new_empty(*batch, 0)
        view = types.SimpleNamespace(
            base_model=base_model, peft_config=self.model.peft_config,
            get_prompt=lambda **_: nothing[:, :0],
        )  # fmt: skip
        masks = {name: call[name] for name in ("input_type_mask",) if name in call}
        return type(self.model)._cpt_forward(
            view, ids, nothing, self.model.active_peft_config, None, batch[0], labels=call.get("labels"), **masks
        )

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """In place of ``PeftModel``'s: the base model's own inputs, and the prompt until there is a cache."""
        inputs = self.model.base_model_prepare_inputs_for_generation(*args, **kwargs)
        cache, mask = given_cache(inputs), inputs.get("attention_mask")
        if isinstance(cache, PrefixCache):
            return inputs
        begun_by_peft = cache is not None and cache.get_seq_length() > 0
        if begun_by_peft or (self.peft_bugs and isinstance(mask, Tensor) and _has_left_padding(mask)):
            return type(self.model).prepare_inputs_for_generation(self.model, *args, task_ids=task_ids, **kwargs)
        inputs["peftkern_prompt"] = self._prompt(task_ids, shown=False)
        return inputs

    def look_at(self, mask: Tensor | None) -> None:
        """Notices where PEFT's numbers differ."""
        if mask is None or is_tracing(mask) or {"left padding", "SEQ_CLS"} <= self._noticed:
            return
        counts_tokens = any(table.reads_mask for table in self._tables)  # so that padding moves nothing
        if _has_left_padding(mask) and not counts_tokens:
            self._notice(
                "left padding",
                "the sequence begins right behind the prompt; PEFT puts the padding between them, which moves it",
            )
        task = self.model.active_peft_config.task_type
        if getattr(task, "value", task) == "SEQ_CLS" and not bool(mask.all()):
            self._notice("SEQ_CLS", "the last token is pooled; PEFT pools the last column, be it padding or not")

    def _notice(
        self, case: str, difference: str, remedy: str = " patch(model, peft_bugs=True) reproduces PEFT."
    ) -> None:
        """Say it once."""
        if case not in self._noticed and not torch.compiler.is_compiling():
            self._noticed.add(case)
            warnings.warn(f"peftkern: {case}: {difference}.{remedy}", stacklevel=3)


def _has_left_padding(mask: Tensor) -> bool:
    return mask.dim() == 2 and mask.shape[1] > 0 and not bool((mask[:, 0] != 0).all())


class PeftConcatenation:
    """A ``PeftModel`` whose prompt is put before every sample, as its model cannot run on a stream.

    Args:
        model: a ``PeftModel`` whose adapters are :data:`PROMPT_TYPES`.
        reason: why the model cannot.
        peft_bugs: leave labels of TOKEN_CLS as they are, on which PEFT raises.
    """

    def __init__(self, model: Any, reason: str, *, peft_bugs: bool) -> None:
        self.model = model
        self.reason = reason
        self.peft_bugs = peft_bugs
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.inputs = GenerationInputs(model)

    def explain(self) -> str:
        """How batches run, and why not otherwise."""
        name = type(self.model.base_model).__name__
        return f"{name}: the prompt is put before every sample (soft_prompt_embedding): {self.reason}"

    def install(self) -> None:
        """Change the model, with :meth:`forward` in place of its own."""
        self.inputs.install()
        self.model.forward = self.forward
        setattr(self.model, PATCH, self)

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.inputs.remove()
        for name in ("forward", PATCH):
            self.model.__dict__.pop(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``PeftModel.forward``."""
        if self.peft_bugs:
            return type(self.model).forward(self.model, *args, **kwargs)
        return _concatenate(self.model, {**dict(zip(self.names, args, strict=False)), **kwargs})


def _concatenate(model: Any, call: dict[str, Any]) -> Any:
    """What PEFT's forward does with a prompt, but tokens and prompt embedded in one pass.

    PEFT's own forward where the embedding is not a plain table, or the decoder has a prompt too.
    """
    if call.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "cu_seq_lens_q: expected an attention_mask and padded sequences behind this prompt, got packed ones"
        )
    config, embedding = model.active_peft_config, model.word_embeddings
    kind, task = config.peft_type.value, getattr(config.task_type, "value", config.task_type)
    call = {name: argument for name, argument in call.items() if argument is not None}
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding._forward_hooks
    two_prompts = kind == "MULTITASK_PROMPT_TUNING" and config.num_transformer_submodules == 2
    if not plain or two_prompts or kind == "CPT" or "input_ids" not in call:
        return type(model).forward(model, **call)
    ids, task_ids, prompt_len = call.pop("input_ids"), call.pop("task_ids", None), config.num_virtual_tokens
    if kind == "MULTITASK_PROMPT_TUNING":
        prompt = type(model).get_prompt(model, ids.shape[0], task_ids)[:, :prompt_len]
        which = torch.arange(ids.shape[0], device=ids.device)
    else:
        prompt, which = type(model).get_prompt(model, 1)[0, :prompt_len], None
    if prompt.dtype not in (embedding.weight.dtype, torch.float32):
        prompt = prompt.to(embedding.weight.dtype)
    call["inputs_embeds"] = soft_prompt_embedding(ids, embedding.weight, prompt, prompt_ids=which)
    if "attention_mask" in call:
        call["attention_mask"] = torch.nn.functional.pad(call["attention_mask"], (prompt_len, 0), value=1)
    keeps_types = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    model._adjust_prompt_learning_kwargs(config, kwargs=call, remove_token_type_ids=not keeps_types)
    if call.get("token_type_ids") is not None:
        call["token_type_ids"] = torch.nn.functional.pad(call["token_type_ids"], (prompt_len, 0))
    if "labels" in call and task in ("CAUSAL_LM", "TOKEN_CLS"):
        call["labels"] = torch.nn.functional.pad(call["labels"], (prompt_len, 0), value=-100)
    return model.base_model(**call)
