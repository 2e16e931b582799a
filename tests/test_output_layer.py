# SPDX-License-Identifier: Apache-2.0
"""The blocks in which losses compute logits: their sizes, and the memory that they take."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from peftkern import distillation_loss, output_layer
from peftkern.distillation import top_k_log_probs
from peftkern.tools.bench.memory import allocated_bytes


@pytest.mark.parametrize(("rows", "width"), [(10**6, 64), (10**6, 4096), (3, 64), (5000, 512)])
def test_blocks_keep_their_share_of_memory(rows, width):
    """1/32 of the logits' bytes, from 4 to 256 MiB: half for rows, a third for columns, an eighth for embeddings."""
    weight = torch.empty(32000, width, device="meta")
    elements = min(max(rows * 32000 * 4 // 32, 4 << 20), 256 << 20) // 4
    sizes = output_layer.BlockSizes.of(rows, weight, 4, per_row=7)
    assert sizes.gathered == elements // 8 // (width + 1)
    assert sizes.rows <= max(16, elements / 2 / (3 * width + 8))
    assert sizes.columns <= max(64, elements / 3 / (sizes.rows + width + 1))
    fewest = math.ceil(rows / max(16, elements // 2 // (3 * width + 8)))
    assert math.ceil(rows / sizes.rows) == fewest, "more blocks than memory asks for"


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [
        (torch.float32, None),
        pytest.param(torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 9.0, marks=pytest.mark.slow),
    ],
)
def test_memory(dtype, softcap, monkeypatch):
    """The peak beyond the inputs is at most 5 % of the logits' bytes, with the gradient."""
    monkeypatch.setattr(output_layer, "_MIN_BYTES", 1 << 16)
    generator = torch.Generator().manual_seed(0)
    hidden, lm_head = (torch.randn(n, 16, generator=generator).to(dtype) for n in (256, 8192))
    log_probs, ids = (1.5 * torch.randn(256, 8192, generator=generator)).log_softmax(-1).topk(4)
    hidden.requires_grad_()
    logits = len(hidden) * len(lm_head) * dtype.itemsize
    budget = 0.05 * logits
    peak = allocated_bytes(lambda: distillation_loss(hidden, lm_head, ids, log_probs, softcap=softcap).backward())
    assert 0.01 * logits < peak <= budget
    assert allocated_bytes(lambda: top_k_log_probs(hidden.detach(), lm_head, 4)) <= budget
    with mock.patch.object(output_layer.BlockSizes, "of", return_value=output_layer.BlockSizes(256, 8192, 64)):
        assert (
            allocated_bytes(lambda: distillation_loss(hidden, lm_head, ids, log_probs, softcap=softcap).backward())
            > logits
        )
