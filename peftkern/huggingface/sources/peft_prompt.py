# SPDX-License-Identifier: Apache-2.0
"""PEFT's prompt tuning, P-tuning, multitask prompt tuning and CPT.

PEFT's own forward runs: it calls ``get_prompt`` for the prompt of every sample, concatenates it with the embeddings,
and calls the base model. Here ``get_prompt`` returns one prompt expanded over the batch, in a tensor subclass that
remembers the prompt. So does the concatenation, from which the hook on the base model reads the prompt. In a call
that bypasses the hook, both have the values of PEFT's tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...model_info import given_cache
from ..around_text import has_rope, rope_positions
from ..cache import PrefixCache
from ..call_arguments import bind, forward_arguments, tokens_of
from ..calls import running
from ..layout import HostNumbers
from ..masks import unmade
from ..peft_model import BASE, AdapterNames, GenerationInputs, PeftCalls, PeftMethod, drop_token_types, is_disabled
from ..prompt_patch import PromptPatch
from ..prompts import Prompt, PromptSource
from ..wiring import Patch

__all__ = ["PROMPT_TYPES", "PeftPrompt"]

#: Those whose prompts depend on nothing but the adapter.
_PLAIN_TYPES = ("PROMPT_TUNING", "P_TUNING")

PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")

_BUGS = " patch(model, peft_bugs=True) reproduces PEFT."


class _WithPrompt(Tensor):
    """A tensor that remembers the prompt it was made from. Results of most operations on it are plain tensors.

    Attributes:
        prompt: the prompt's rows and ids.
    """

    prompt: Prompt

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; only those in :meth:`_keep` keep the prompt."""
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **(kwargs or {}))
            kept = cls._keep(output, func, args, kwargs or {})
        if kept is not None:
            return kept
        return plain(output) if type(output) is cls else output

    @classmethod
    def _keep(cls, output: Any, func: Any, args: Any, kwargs: Any) -> _WithPrompt | None:
        """``output`` as a tensor with a prompt, after a cast; None after any other operation."""
        if func is not Tensor.to or type(args[0]) is not cls:
            return None
        cast: _WithPrompt = output.as_subclass(cls)
        cast.prompt = args[0].prompt
        return cast


class PromptTensor(_WithPrompt):
    """[B, P, E], the prompt of each sample."""

    @classmethod
    def _keep(cls, output: Any, func: Any, args: Any, kwargs: Any) -> _WithPrompt | None:
        """Concatenating a prompt and embeddings gives :class:`PromptedEmbeddings`."""
        if func is torch.cat and len(args[0]) == 2 and type(args[0][0]) is cls:
            embeddings: PromptedEmbeddings = output.as_subclass(PromptedEmbeddings)
            embeddings.prompt, embeddings.tokens = args[0][0].prompt, args[0][1]
            return embeddings
        return super()._keep(output, func, args, kwargs)


class PromptedEmbeddings(_WithPrompt):
    """[B, P + S, E], the prompt of each sample followed by the embeddings of its tokens.

    Attributes:
        tokens: [B, S, E], the embeddings.
    """

    tokens: Tensor

    @classmethod
    def _keep(cls, output: Any, func: Any, args: Any, kwargs: Any) -> _WithPrompt | None:
        cast = super()._keep(output, func, args, kwargs)
        if isinstance(cast, PromptedEmbeddings):
            cast.tokens = func(args[0].tokens, *args[1:], **kwargs)
        return cast


def plain(x: Any) -> Any:
    """The same values as a plain tensor."""
    return x.as_subclass(Tensor) if isinstance(x, _WithPrompt) else x


@dataclass(frozen=True, eq=False)
class OuterCall:
    """Information about a call of the ``PeftModel`` that PEFT does not pass to the base model.

    Attributes:
        position_ids: [B, S], which PEFT drops.
        peft_way: run PEFT's own code for the call.
        input_ids: [B, S], of which PEFT passes the embeddings; None unless rows may share text, or there are images.
    """

    position_ids: Tensor | None
    peft_way: bool
    input_ids: Tensor | None = None


class PeftPrompt(PromptSource):
    """The prompt is that of a ``PeftModel``'s active adapter; outputs have PEFT's shapes.

    Args:
        model: a ``PeftModel`` whose adapters are :data:`PROMPT_TYPES`.
        peft_bugs: run PEFT's own code where its results differ: for batches with padding on the left or with
            ``position_ids``, and for classification.
    """

    is_given = True
    concatenates = "such calls have the prompt put before every sample, as PEFT does it"

    def __init__(self, model: Any, *, peft_bugs: bool) -> None:
        self.model = model
        self.peft_bugs = peft_bugs
        self.names = forward_arguments(model)
        self.adapters = AdapterNames(model)
        self._get_prompt = model.get_prompt
        #: The prompt between PEFT's two calls while torch.compile traces, which does not support tensor attributes.
        self.traced: Prompt | None = None

    @property
    def kind(self) -> str:
        """PEFT's name of the active adapter's method."""
        return str(self.model.active_peft_config.peft_type.value)

    @property
    def task(self) -> str | None:
        """PEFT's name of the active adapter's task."""
        task = self.model.active_peft_config.task_type
        return None if task is None else str(getattr(task, "value", task))

    @property
    def needs_all_logits(self) -> bool:  # type: ignore[override]
        """CPT computes its loss from the logits."""
        return self.kind == "CPT"

    @property
    def pools_last_column(self) -> bool:  # type: ignore[override]
        """A classification head gets embeddings instead of ids, and cannot tell where padding is."""
        return self.task == "SEQ_CLS"

    def wire(self, patch: Patch) -> None:
        """Replace PEFT's ``get_prompt`` and the inputs of ``generate``, and hook calls of the ``PeftModel``."""
        assert isinstance(patch, PromptPatch)
        self.patch = patch
        PeftMethod(self.model, "get_prompt", self.get_prompt).install(patch.wiring)
        PeftCalls(self.model).install(patch.wiring)
        self.adapters.install(patch.wiring)
        GenerationInputs(self.model).install(patch.wiring)
        PeftMethod(self.model, "prepare_inputs_for_generation", self.prepare_inputs).install(patch.wiring)
        patch.wiring.add_hooks(self.model.register_forward_pre_hook(self.before_peft, with_kwargs=True))

    def before_peft(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Hook on the ``PeftModel``: pass on the arguments that PEFT drops."""
        if is_disabled(module):
            return None
        bound = bind(module, self.names, args, kwargs)
        if bound is None:
            return None
        kwargs = bound
        peft_way = self._is_peft_bug(kwargs)
        position_ids = None if peft_way else kwargs.pop("position_ids", None)
        if position_ids is not None:
            self.patch.notice("position_ids", "they are used; PEFT drops them", _BUGS)
        reads_ids = self.patch.calls.share or self.patch.packer.around.is_given(kwargs)
        input_ids = kwargs.get("input_ids") if reads_ids else None
        if position_ids is None and input_ids is None and not peft_way:
            return None  # a wrapper of PEFT's forward may not accept another argument
        kwargs["peftkern_call"] = OuterCall(position_ids, peft_way, input_ids)
        return (), kwargs

    def _is_peft_bug(self, kwargs: dict[str, Any]) -> bool:
        """Whether PEFT's own code runs a call, to reproduce its results."""
        if not self.peft_bugs or self.task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
            return self.peft_bugs
        mask = kwargs.get("attention_mask")
        places_images = rope_positions(self.patch.base, kwargs) is not None
        return (
            places_images or kwargs.get("position_ids") is not None or (mask is not None and _has_left_padding(mask))
        )

    def get_prompt(
        self, peft_method: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Tensor:
        """Replaces ``PeftModel.get_prompt``: the same values, in a tensor that remembers the prompt."""
        names = self.adapters.of_call(batch_size)
        if names is not None:
            return self._mixed_tensor(names)
        prompt = self._prompt(peft_method, batch_size, task_ids)
        rows = prompt.rows if prompt.per_sample else prompt.rows.expand(batch_size, -1, -1)
        if torch.compiler.is_compiling():
            self.traced = prompt
            return rows
        tensor = rows.as_subclass(PromptTensor)
        tensor.prompt = prompt
        return tensor

    def _mixed_tensor(self, names: Sequence[str]) -> Tensor:
        """[B, P, E], NaN: a tensor that remembers prompts of different lengths, P is the active adapter's."""
        prompt = self._mixed(names)
        shape = len(names), self.model.active_peft_config.num_virtual_tokens, prompt.rows.shape[2]
        tensor = prompt.rows.new_full(shape, float("nan")).as_subclass(PromptTensor)
        tensor.prompt = prompt
        return tensor

    def _mixed(self, names: Sequence[str]) -> Prompt:
        """The prompts of a batch of samples.

        Args:
            names: of the adapter of each sample, or :data:`BASE`.
        """
        model: Any = running.module(self.model, self.model)
        used = sorted({name for name in names if name != BASE}) or [model.active_adapter]
        kinds = {model.peft_config[name].peft_type.value for name in used}
        if self.peft_bugs or not kinds <= set(_PLAIN_TYPES):
            expected = f"{' or '.join(_PLAIN_TYPES)} adapters and peft_bugs=False"
            raise ValueError(f"adapter_names: expected {expected}, got {', '.join(sorted(kinds))}")
        rows = [self._rows(model, name) for name in used]
        longest, device = max(x.shape[0] for x in rows), rows[0].device
        bank = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[0])) for x in rows])
        ids = torch.tensor([-1 if name == BASE else used.index(name) for name in names], device=device)
        lens = torch.tensor([x.shape[0] for x in rows], dtype=torch.int32, device=device)
        return Prompt(bank, ids, lens=lens)

    def _rows(self, model: Any, name: str) -> Tensor:
        """[P, E], the prompt of an adapter, as in PEFT's ``get_prompt``, which computes that of the active one."""
        encoder, tokens = model.prompt_encoder[name], model.prompt_tokens[name]
        weight: Tensor = encoder.embedding.weight
        return weight if model.peft_config[name].inference_mode else encoder(tokens[None].to(weight.device))[0]

    def _prompt(self, compute: Any, batch_size: int, task_ids: Tensor | None) -> Prompt:
        """The active adapter's prompt, or those of the tasks in the batch, computed by PEFT's ``get_prompt``."""
        if self.kind != "MULTITASK_PROMPT_TUNING":
            return Prompt(compute(1), shown=True)
        if task_ids is None:
            raise ValueError("task_ids: expected the task of each sample [B], got None")
        if task_ids.numel() == 1:
            return Prompt(compute(1, task_ids.view(1)), shown=True)
        return Prompt(compute(batch_size, task_ids), task_ids, per_sample=True, shown=True)

    def find(self, patch: Patch, kwargs: dict[str, Any], continues: bool) -> Prompt | None:
        """The prompt in the embeddings, or the one that :meth:`prepare_inputs` has added to the arguments."""
        call: OuterCall | None = kwargs.pop("peftkern_call", None)
        prepared: Prompt | None = kwargs.pop("peftkern_prompt", None)
        if prepared is not None or continues:
            if continues and isinstance(kwargs.get("inputs_embeds"), PromptedEmbeddings):
                self._remove_prompt(kwargs, kwargs["inputs_embeds"].prompt, kwargs["inputs_embeds"].tokens)
            return None if continues else prepared
        prompt, tokens = self._in_embeddings(kwargs)
        if prompt is None or (call is not None and call.peft_way):
            kwargs["inputs_embeds"] = plain(kwargs.get("inputs_embeds"))
            return None
        given = {**kwargs, "inputs_embeds": plain(kwargs["inputs_embeds"])} if prompt.lens is None else None
        self._remove_prompt(kwargs, prompt, tokens)
        if call is not None and call.position_ids is not None:
            kwargs["position_ids"] = call.position_ids
        labels = kwargs.get("labels")
        if self.task == "TOKEN_CLS" and labels is not None and labels.shape[1] == tokens.shape[1]:
            self.patch.notice(
                "TOKEN_CLS", "labels are those of tokens; PEFT raises, because its outputs include the prompt", _BUGS
            )
        input_ids = None if call is None else call.input_ids
        if input_ids is not None and self.patch.packer.around.is_given(kwargs):
            # Positions and masks of images follow from tokens.
            kwargs["input_ids"] = input_ids
            del kwargs["inputs_embeds"]
            if rope_positions(self.patch.base, kwargs) is not None:
                self.patch.notice("images", "their positions are used; PEFT's are those of text", _BUGS)
        return replace(prompt, shown=prompt.lens is None, given=given, input_ids=input_ids)

    def _in_embeddings(self, kwargs: dict[str, Any]) -> tuple[Prompt | None, Tensor]:
        """(the prompt in a call's embeddings, the embeddings after it)."""
        embeddings = kwargs.get("inputs_embeds")
        if isinstance(embeddings, PromptedEmbeddings):
            return embeddings.prompt, embeddings.tokens
        if self.traced is not None:
            prompt, self.traced = self.traced, None
            if torch.compiler.is_compiling() and embeddings is not None:
                return prompt, embeddings[:, prompt.rows.shape[1] :]
        return None, embeddings  # type: ignore[return-value]

    def _remove_prompt(self, kwargs: dict[str, Any], prompt: Prompt, tokens: Tensor) -> None:
        """Remove the prompt from the arguments."""
        prompt_len, length = prompt.rows.shape[1], tokens.shape[1]
        if prompt.lens is not None:  # PEFT counts the active adapter's
            prompt_len = self.model.active_peft_config.num_virtual_tokens
        kwargs["inputs_embeds"] = tokens
        for name in ("attention_mask", "labels"):
            x = kwargs.get(name)
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == prompt_len + length:
                kwargs[name] = x[:, prompt_len:]

    def prepare_inputs(
        self,
        peft_method: Any,
        *args: Any,
        task_ids: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Replaces ``PeftModel.prepare_inputs_for_generation``.

        Returns the base model's own inputs, with the prompt until there is a cache. ``generate`` sees a cache of the
        sequence alone.
        """
        inputs = self.model.base_model_prepare_inputs_for_generation(*args, **kwargs)
        drop_token_types(inputs)
        cache = given_cache(inputs)
        if isinstance(cache, PrefixCache):
            return inputs
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = unmade(inputs["attention_mask"])
        mask = inputs.get("attention_mask")
        begun_by_peft = cache is not None and cache.get_seq_length() > 0
        bug = self.peft_bugs and ((isinstance(mask, Tensor) and not bool(mask.all())) or has_rope(self.patch.base))
        reason = self.patch.packer.why_unpackable(
            {n: x for n, x in inputs.items() if n != "position_ids" or x is None}
        )
        if adapter_names is not None and (reason is not None or begun_by_peft):
            reason = reason or "the cache was not made by this model"
            raise ValueError(f"adapter_names: expected None, because {reason}, got names")
        if reason is not None and not begun_by_peft:
            self.patch.fall_back(reason, self.concatenates)
        if begun_by_peft or bug or reason is not None:
            if task_ids is not None:
                kwargs["task_ids"] = task_ids
            inputs = peft_method(*args, **kwargs)
            if "inputs_embeds" in inputs:
                inputs["inputs_embeds"] = plain(inputs["inputs_embeds"])
            return inputs
        num_rows = tokens_of(inputs).shape[0]
        if adapter_names is not None:
            inputs["peftkern_prompt"] = self._mixed(self.adapters.of_rows(adapter_names, num_rows))
            return inputs
        prompt = self._prompt(self._get_prompt, num_rows, task_ids)
        inputs["peftkern_prompt"] = Prompt(prompt.rows, prompt.ids, prompt.per_sample)
        return inputs

    def notice_differences(self, numbers: HostNumbers) -> None:
        """Warn where PEFT's results differ."""
        # Where positions count the tokens of the mask, padding does not change them.
        if numbers.get("left padding") and not self.patch.packer.count_mask:
            self.patch.notice(
                "left padding",
                "the sequence begins right behind the prompt; PEFT puts the padding between them, which moves it",
                _BUGS,
            )
        if numbers.get("padding") and self.pools_last_column:
            self.patch.notice(
                "SEQ_CLS", "the last token is pooled; PEFT pools the last column, even if it is padding", _BUGS
            )


def _has_left_padding(mask: Tensor) -> bool:
    return mask.dim() == 2 and mask.shape[1] > 0 and not bool((mask[:, 0] != 0).all())
