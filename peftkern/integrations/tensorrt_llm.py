# SPDX-License-Identifier: Apache-2.0
"""The prompt table of TensorRT-LLM (``--prompt_table_path``)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["prompt_table_bytes"]


def prompt_table_bytes(prompts: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files of a table by their suffixes.

    ``.npy`` contains [tasks, P, E], in the order of the prompts, with zeros behind shorter ones, as NeMo's converter
    writes it. A request of task t refers to its tokens as V, ..., V + P_t - 1, where V is the size of the vocabulary.
    The numbers are float16 if all prompts are, else float32, since numpy has no bfloat16. ``.tasks.json`` lists the
    name, number and length P_t of each task.

    Args:
        prompts: rows [P_t, E] by the name of the task.

    Raises:
        ValueError: naming the prompt that has another width.
    """
    import numpy

    half = all(x.dtype == torch.float16 for x in prompts.values())
    width = next(iter(prompts.values())).shape[1]
    table = torch.zeros(
        len(prompts), max(x.shape[0] for x in prompts.values()), width, dtype=torch.float16 if half else torch.float32
    )
    for task, (name, x) in enumerate(prompts.items()):
        if x.shape[1] != width:
            raise ValueError(f"{name}: expected a prompt of width {width}, as the first one, got {x.shape[1]}")
        table[task, : x.shape[0]] = x
    data = io.BytesIO()
    numpy.save(data, table.numpy())
    tasks = [{"task": task, "name": name, "tokens": x.shape[0]} for task, (name, x) in enumerate(prompts.items())]
    return {".npy": data.getvalue(), ".tasks.json": json.dumps({"tasks": tasks}, indent=2).encode()}
