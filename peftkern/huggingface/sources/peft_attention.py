# SPDX-License-Identifier: Apache-2.0
"""PEFT's adaption prompts (LLaMA-Adapter), with PEFT's parameters and checkpoints.

PEFT puts a module around each attention module. It runs the attention, computes the queries again, and attends with
them to the adapter's keys, which it copies for every sample and head. Here that module passes keys and values to the
attention function, which has the queries. The module gets another class while the model is patched: PEFT moves the
modules of the active adapter into the model and out of it, so they must remain the same objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from torch import Tensor, nn

from ..attention import Implementation
from ..gated import GatedPrefix
from ..gated_patch import GatedPatch, GatedSource
from ..wiring import Patch

__all__ = ["PeftAttention"]

#: Attribute of an adopted module: the :class:`.cache.PrefixOptions` of its patch.
_OPTIONS = "_peftkern_options"


class GatedAttention(AdaptedAttention):  # type: ignore[misc]
    """An adapted attention with separate projections, whose adapter also goes through the output projection."""

    def forward(self, **kwargs: Any) -> Any:
        """The attention's outputs, with the adapter's part."""
        attention = self.model
        if not _is_ours(attention):
            return super().forward(**kwargs)
        project, prompt = attention.o_proj, self.adaption_prompt
        apart = not _is_linear(project)
        gated = _gated(self, attention.k_proj(prompt), attention.v_proj(prompt), apart=apart)
        output, *rest = _run(self, gated, **kwargs)
        if apart:
            output = output + project(gated.out)
        elif project.bias is not None:  # PEFT projects the two parts one by one, and adds the bias twice
            output = output + project.bias.to(output.dtype)
        return output, *rest


class GatedAttentionGPT(AdaptedAttentionGPT):  # type: ignore[misc]
    """An adapted attention with one projection for queries, keys and values, whose adapter skips the output's."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        """The attention's outputs, with the adapter's part."""
        if not _is_ours(self.model) or kwargs.get("encoder_hidden_states") is not None:
            return super().forward(hidden_states, **kwargs)
        _, key, value = self.model.c_attn(self.adaption_prompt).chunk(3, dim=2)
        gated = _gated(self, key, value, apart=True)
        output, *rest = _run(self, gated, hidden_states=hidden_states, **kwargs)
        return output + gated.out, *rest


#: PEFT's classes and ours.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    AdaptedAttention: GatedAttention,
    AdaptedAttentionGPT: GatedAttentionGPT,
}


def _is_ours(attention: Any) -> bool:
    """Whether an attention module calls our attention function."""
    return isinstance(attention.config._attn_implementation, Implementation)


def _is_linear(project: nn.Module) -> bool:
    """Whether a projection of a sum is the sum of the projections, except for the bias."""
    hooks = [*project._forward_pre_hooks.values(), *project._forward_hooks.values()]
    # Those of the trial only look.
    return type(project) is nn.Linear and all(
        (getattr(hook, "__module__", None) or "").startswith("peftkern.") for hook in hooks
    )


def _gated(module: Any, key: Tensor, value: Tensor, *, apart: bool) -> GatedPrefix:
    """The gated prefix of one call.

    Args:
        module: PEFT's module.
        key, value: [1, P, Hkv * D], projections of the adapter's prompt.
        apart: whether the module adds the prefix's output itself.
    """
    head_dim = module.model.head_dim
    key, value = (x[0].unflatten(-1, (-1, head_dim)).transpose(0, 1) for x in (key, value))
    options, gate = getattr(module, _OPTIONS), module.adaption_gate
    if value.dtype in (torch.bfloat16, torch.float16):  # the gate's gradient is a sum over all values
        key, value, gate = key.float(), value.float(), gate.float()
    return GatedPrefix(key, value * gate, head_dim**-0.5, options, apart)


def _run(module: Any, gated: GatedPrefix, **kwargs: Any) -> Any:
    """The outputs of the attention within PEFT's module."""
    outputs = module.model(**kwargs, peftkern_gated=gated)
    if not gated.served:
        kind = type(module.model).__name__
        raise ValueError(f"model: expected {kind} to pass its keyword arguments to the attention function, got none")
    return outputs


class PeftAttention(GatedSource):
    """The gated prefixes are those of a ``PeftModel``'s active adapter.

    Args:
        model: a ``PeftModel`` with ADAPTION_PROMPT adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        if not self._adapted():
            raise ValueError("model: its adapter is disabled, so it cannot be tried")

    def _adapted(self) -> list[nn.Module]:
        """PEFT's modules of the active adapter; empty while it is disabled."""
        tuner = self.model.base_model
        name = tuner._active_adapter
        if name is None or not tuner._enabled:
            return []
        target = tuner.peft_config[name].target_modules
        return [getattr(parent, target) for parent in tuner._parents[name]]

    def wire(self, patch: Patch) -> None:
        """Hook PEFT's tuner, whose forward is the base model's without its hooks."""
        assert isinstance(patch, GatedPatch)
        tuner = self.model.base_model
        patch.wiring.add_hooks(
            tuner.register_forward_pre_hook(patch.before_call, with_kwargs=True),
            tuner.register_forward_hook(patch.after_call, with_kwargs=True, always_call=True),
        )

    def adopt(self, patch: GatedPatch) -> None:
        """Give PEFT's modules of the active adapter our class. Windows do not hide the prefix, as in PEFT."""
        if torch.compiler.is_compiling():
            return
        for module in self._adapted():
            theirs = type(module)
            if theirs in _CLASSES:
                module.__class__ = _CLASSES[theirs]
                module.__dict__[_OPTIONS] = replace(patch.options, in_window=False)
                patch.wiring.on_undo(partial(_release, module, theirs))

    @contextlib.contextmanager
    def open_gates(self) -> Iterator[None]:
        """Within the block, the gates of the active adapter are 1."""
        modules: list[Any] = self._adapted()
        gates = [module._parameters["adaption_gate"] for module in modules]
        try:
            for module, gate in zip(modules, gates, strict=True):
                module._parameters["adaption_gate"] = nn.Parameter(torch.ones_like(gate), requires_grad=False)
            yield
        finally:
            for module, gate in zip(modules, gates, strict=True):
                module._parameters["adaption_gate"] = gate


def _release(module: Any, theirs: type[nn.Module]) -> None:
    """Give a module PEFT's class back."""
    if type(module) is _CLASSES[theirs]:
        module.__class__ = theirs
    module.__dict__.pop(_OPTIONS, None)
