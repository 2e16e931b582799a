# SPDX-License-Identifier: Apache-2.0
"""Measurements that need a process of their own: peak memory, and whether a call fits into a memory budget.

``python -m benchmarks.end_to_end.workers`` reads an order as JSON and prints the answer of :func:`serve`.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import logging

from peftkern.tools.bench import memory

from ..common import Row
from .models import load, make_batch, step


def ask(order: Row) -> Any:
    """Run :func:`serve` in a process of its own."""
    return memory.in_own_process(["-m", __name__], order)


def serve(order: Row) -> Any:
    """Answer an order by its ``part``.

    Returns:
        For ``step`` the peak of a second step in bytes, for ``longest`` the longest S that fits into the budget, for
        ``generate`` whether the budget suffices.
    """
    torch.set_num_threads(order["threads"])
    model = load(order, order["arm"], order["dtype"], order["P"])
    vocab = model.get_base_model().config.vocab_size
    if order["part"] == "step":
        batch = make_batch(vocab, order["B"], order["S"], order["data"] == "padded")
        step(model, batch)
        return memory.peak_bytes(lambda: step(model, batch))
    if order["part"] == "generate":
        model.eval()
        generate(model, prompt_of(order)[:1], order["P"], 1)  # the first call makes lasting allocations
        return fits(order["budget_mb"], lambda: generate(model, prompt_of(order), order["P"], order["new_tokens"]))
    step(model, make_batch(vocab, 1, 16, False))

    def length_fits(length: int) -> bool:
        batch = make_batch(vocab, 1, length, False)
        return fits(order["budget_mb"], lambda: step(model, batch))

    return longest(length_fits, order["least"], order["most"])


def fits(budget_mb: int, call: Callable[[], object]) -> bool:
    """Whether a call succeeds with ``budget_mb`` MB in addition to what the process holds."""
    gc.collect()
    try:
        with memory.limited(budget_mb * 1_000_000):
            call()
    except memory.ALLOCATION_ERRORS as error:
        if not memory.is_out_of_memory(error):
            raise
        return False
    return True


def longest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest length that fits, within one part in eight: 0 if ``least`` does not fit, at most ``most``."""
    if not fits(least):
        return 0
    good, bad = least, 2 * least
    while fits(bad):
        if bad >= most:
            return most
        good, bad = bad, min(2 * bad, most)
    while bad - good > good // 8:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def generate(model: Any, ids: Tensor, prefix: int, new_tokens: int) -> Tensor:
    """Greedy tokens [B, new_tokens]. The base model decodes behind the cache that ``get_prompt`` makes."""
    base, cache, tokens = model.get_base_model(), model.get_prompt(batch_size=ids.shape[0]), []
    mask = torch.ones(ids.shape[0], prefix + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        for _ in range(new_tokens):
            output = base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
            mask = torch.cat([mask, mask.new_ones(ids.shape[0], 1)], 1)
    return torch.cat(tokens, 1)


def prompt_of(order: Row) -> Tensor:
    """Random tokens [B, S]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, order["vocab"], (order["B"], order["S"]), generator=generator)


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers and PEFT
    memory.return_freed_memory()
    print(json.dumps(serve(json.load(sys.stdin))))
