# SPDX-License-Identifier: Apache-2.0
"""Fast training of prefixes, cartridges and soft prompts on Hugging Face models.

    import peftkern
    peftkern.patch(peft_model)      # same parameters, same checkpoint, same numbers

Importing this package imports nothing else and changes nothing; each name below loads its module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "prefix_attention": "functional",
    "soft_prompt_embedding": "functional",
    "distillation_loss": "distillation",
    "cross_entropy": "distillation",
    "explain": "explanation",
    "available_backends": "backends.registry",
    "use_backend": "backends.registry",
    "BackendUnavailable": "backends.registry",
    "PrefixKV": "modules",
    "SoftPrompt": "modules",
    "save_prefix": "checkpoint",
    "load_prefix": "checkpoint",
    "export": "integrations.export",
    "capture_top_k": "huggingface",
    "distil": "huggingface",
    "label_loss": "huggingface",
    "patch": "huggingface",
    "unpatch": "huggingface",
    "patched": "huggingface",
    "switched": "huggingface",
}

__all__ = [
    "BackendUnavailable",
    "PrefixKV",
    "SoftPrompt",
    "available_backends",
    "capture_top_k",
    "cross_entropy",
    "distil",
    "distillation_loss",
    "explain",
    "export",
    "label_loss",
    "load_prefix",
    "patch",
    "patched",
    "prefix_attention",
    "save_prefix",
    "soft_prompt_embedding",
    "switched",
    "unpatch",
    "use_backend",
]

if TYPE_CHECKING:
    from .backends.registry import BackendUnavailable, available_backends, use_backend
    from .checkpoint import load_prefix, save_prefix
    from .distillation import cross_entropy, distillation_loss
    from .explanation import explain
    from .functional import prefix_attention, soft_prompt_embedding
    from .huggingface.distilling import capture_top_k, distil, label_loss
    from .huggingface.patch import patch, patched, unpatch
    from .huggingface.switch import switched
    from .integrations.export import export
    from .modules import PrefixKV, SoftPrompt


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
