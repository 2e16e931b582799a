# SPDX-License-Identifier: Apache-2.0
"""Prompts for llama.cpp: the numbers that ``llama_batch.embd`` points to."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..model_info import Origin

__all__ = ["embd_bytes"]

FORMAT, VERSION = "peftkern.embd", "1"


def embd_bytes(rows: Tensor, origin: Origin) -> dict[str, bytes]:
    """The files of rows [P, E] by their suffixes.

    ``.f32`` contains P * E little-endian floats, row after row, which a C program reads into ``llama_batch.embd``
    with one call. ``.f32.json`` describes it.
    """
    described = {"format": FORMAT, "version": VERSION, "n_tokens": rows.shape[0], "n_embd": rows.shape[1]}
    described |= {name: value for name, value in origin._asdict().items() if value is not None}
    data = rows.to(torch.float32).numpy().astype("<f4").tobytes()
    return {".f32": data, ".f32.json": json.dumps(described, indent=2).encode()}
