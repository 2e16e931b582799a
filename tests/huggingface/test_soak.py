# SPDX-License-Identifier: Apache-2.0
"""Thousands of patches and training steps leave nothing behind: no memory, no tensors, no objects, no hooks."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import peftkern
from peftkern import PrefixKV
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, LEFT, PREFIX
from tests.huggingface.test_lifecycle import state_of

LLAMA = FAMILIES["llama (GQA)"]
CYCLES, STEPS, SAMPLES = 2000, 2000, 40
#: Of resident memory, over the last three quarters: the slope in bytes per iteration and the growth in all.
MAX_SLOPE, MAX_GROWTH = 2 * 2**10, 4 * 2**20


#: Objects that caches of libraries may gain meanwhile: not one per iteration.
MAX_OBJECTS = 20


class Sample(NamedTuple):
    """What is alive after an iteration."""

    iteration: int
    resident: int
    tensors: int
    objects: int


def _sample(iteration: int) -> tuple[int, ...]:
    """The fields of a :class:`Sample`: a plain tuple of numbers is no object to the garbage collector."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that what is resident is in use
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    objects = gc.get_objects()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in objects)
    return iteration, resident, tensors, len(objects)


def _watched(step: Callable[[int], object], count: int, samples: int = SAMPLES) -> list[Sample]:
    """Samples at equal distances while ``step`` runs ``count`` times."""
    taken = []
    for i in range(count):
        step(i)
        if (i + 1) % (count // samples) == 0:
            taken.append(_sample(i + 1))
    return [Sample(*x) for x in taken]


def _slope(xs: list[int], ys: list[int]) -> float:
    """Of the line that fits best."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def assert_flat(samples: list[Sample]) -> str:
    """Nothing grows after the first quarter. Returns the counts as text."""
    samples = samples[len(samples) // 4 :]
    first, last = samples[0], samples[-1]
    slope = _slope([x.iteration for x in samples], [x.resident for x in samples])
    growth = last.resident - first.resident
    text = (
        f"iterations {first.iteration} to {last.iteration}: {slope:.0f} bytes per iteration, "
        f"{growth / 2**20:.2f} MiB more of {last.resident / 2**20:.0f}; tensors {first.tensors} -> {last.tensors}, "
        f"objects {first.objects} -> {last.objects}"
    )
    assert slope <= MAX_SLOPE, f"resident memory grows: {text}"
    assert growth <= MAX_GROWTH, f"resident memory grows: {text}"
    assert len({x.tensors for x in samples}) == 1, f"tensors stay alive: {text}"
    spread = max(x.objects for x in samples) - min(x.objects for x in samples)
    assert spread <= MAX_OBJECTS, f"objects stay alive: {text}"
    return text


KINDS = {
    "PEFT prefix": lambda: (models.peft_model(LLAMA, patched=False), {}),
    "PEFT prompt": lambda: (models.prompt_model(LLAMA, patched=False), {}),
    "PrefixKV": lambda: (
        models.base_model(LLAMA),
        {"prefix": PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=2, head_dim=16), "freeze": True},
    ),
    "shared text": lambda: (models.base_model(LLAMA), {"share": "prefixes"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_patching_again_and_again(kind):
    model, options = KINDS[kind]()
    model.eval()
    before = state_of(model)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=LEFT).logits

    def cycle(i: int) -> None:
        peftkern.patch(model, **options)
        if i % 100 == 0:
            model(input_ids=IDS, attention_mask=LEFT, labels=IDS).loss.backward()
            model.zero_grad()
        peftkern.unpatch(model)

    print(kind, assert_flat(_watched(cycle, CYCLES)))
    assert state_of(model) == before, "hooks or attributes are left over"
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, attention_mask=LEFT).logits, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PEFT prefix", "PEFT prompt", "PrefixKV"])
def test_training_on_and_on(kind):
    """With a new length in each step, so that nothing is kept per shape either."""
    model, options = KINDS[kind]()
    before = state_of(model)
    peftkern.patch(model, **options).train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-3)
    losses = []

    def step(i: int) -> None:
        columns = slice(0, 3 + i % (IDS.shape[1] - 2))
        ids, mask = IDS[:, columns], (LEFT if i % 2 else models.ONES)[:, columns]
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if i % 500 == 0:
            losses.append(loss.item())

    print(kind, assert_flat(_watched(step, STEPS)), f"losses {losses}")
    assert losses[-1] < losses[0]
    peftkern.unpatch(model)
    after = state_of(model.train(before[0][""][4]))
    assert after == before, "hooks or attributes are left over"


@pytest.mark.slow
def test_a_leak_is_seen():
    """Kept tensors, kept objects, and memory that only the allocator knows of."""
    kept: list = []
    for leak, message in (
        (lambda i: kept.append(torch.zeros(1)), "tensors"),
        (lambda i: kept.append([i]), "objects"),
        (lambda i: kept.append(bytes(2**15) if i else 0), "memory"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_flat(_watched(leak, 400, samples=8))
        kept.clear()
