# SPDX-License-Identifier: Apache-2.0
"""The learned modules: :class:`PrefixKV` (keys and values) and :class:`SoftPrompt` (input embeddings)."""

from __future__ import annotations

from .prefix_kv import PrefixKV
from .soft_prompt import SoftPrompt

__all__ = ["PrefixKV", "SoftPrompt"]
