# SPDX-License-Identifier: Apache-2.0
"""Digests of what determines the files of self-study, so that a file is not continued with something else.

All are SHA-256 in hex.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..modules import PrefixKV
from .conversations import Conversation

__all__ = ["digest_of", "digest_of_conversations", "digest_of_tensors", "digest_of_text"]


def digest_of_text(value: Any) -> str:
    """Of a value that JSON can write; other objects in it count as their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor], **more: Any) -> str:
    """Of names, dtypes, shapes and all values of tensors, and of ``more``, which JSON can write."""
    found = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach()
        found.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of(prefix: PrefixKV) -> str:
    """Of the tensors of a prefix, its lengths and the positions that it stands for."""
    tensors = {name: value for name, value in prefix.state_dict().items() if isinstance(value, Tensor)}
    return digest_of_tensors(tensors, lengths=list(prefix.lengths), positions=prefix.positions)


def digest_of_conversations(conversations: Sequence[Conversation]) -> str:
    """Of all conversations, in order."""
    return digest_of_text([asdict(conversation) for conversation in conversations])
