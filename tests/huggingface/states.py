# SPDX-License-Identifier: Apache-2.0
"""The state of a model before and after patching, and a prefix for the tiny Llama."""

from __future__ import annotations

from peftkern import PrefixKV
from tests.huggingface.models import PREFIX


def llama_prefix(length=PREFIX, **geometry):
    return PrefixKV(None, length, **{"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, **geometry})


def state_of(model):
    """Everything that patching could change in a model: attributes, hooks, configs and parameters of every module."""
    state = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        private = {key for key in vars(module) if key.startswith("_peftkern")}
        hooks = (len(module._forward_pre_hooks), len(module._forward_hooks), sorted(module._modules))
        implementation = str(module.config._attn_implementation) if hasattr(module, "config") else None
        state[name] = (attributes, private, hooks, implementation, module.training)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, flags
