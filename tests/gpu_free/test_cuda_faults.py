# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the CUDA sources: each must be named by a check of the shim, or miss the bound on numbers."""

from __future__ import annotations

import pytest
import torch

from peftkern import backends, native
from peftkern.testing import bounds
from peftkern.testing.cases import Shape, tensors

from .shim import Shim
from .test_cuda import Merging

FAULTS = {
    "no wait for the prefix": (
        "prefix_forward.cuh", "copy_async_wait<0>();", "", "uninitialised shared memory"),
    "no barrier before a prefix is replaced": (
        "prefix_forward.cuh", "__syncthreads();  // the other", "//", "shared-memory race|numbers"),
    "no barrier after a prefix is loaded": (
        "prefix_forward.cuh", "__syncthreads();\n        }\n        for", "}\n for", "shared memory"),
    "a prefix one key too long": (
        "common.cuh", "return slot < length &&", "return slot <= length &&", "numbers"),
    "a store beyond the rows": (
        "prefix_forward.cuh", "if (row[r].valid && at < call.head_dim)\n            *rein",
        "if (at < call.head_dim)\n            *rein", "out of bounds|race"),
    "fragments in the wrong order": (
        "common.cuh", "pack<T>(s[2 * k + 1][0], s[2 * k + 1][1])", "pack<T>(s[2 * k][0], s[2 * k][1])", "numbers"),
    "no barrier before p and ds are read": (
        "prefix_backward.cuh", "__syncthreads();\n      tile.add_keys_and_values", "tile.add_keys_and_values",
        "shared memory|shared-memory race"),
    "no barrier before the next rows are loaded": (
        "prefix_backward.cuh", "walk.advance();\n      __syncthreads();", "walk.advance();", "shared-memory race"),
    "no barrier before the next part of a prefix is loaded": (
        "prefix_backward.cuh", "if (first_key > 0) __syncthreads();", "", "shared-memory race"),
    "no barrier before ds is summed by head": (
        "prefix_backward.cuh", "__syncthreads();\n      each_sum", "each_sum", "shared memory|shared-memory race"),
    "rows of another head": (
        "prefix_backward.cuh", "(head + call.group - first_row % call.group) % call.group", "head", "numbers"),
    "half of the keys left out of delta": (
        "sequence_backward.cuh", "side < Shape::kSideWarps", "side < 1", "numbers"),
    "no barrier before the halves of delta are added": (
        "sequence_backward.cuh", "__syncthreads();\n  if (threadIdx.x >=", "if (threadIdx.x >=",
        "shared memory|shared-memory race"),
    "a sum that leaves a share out": (
        "shares.cuh", "for (int share = 1;", "for (int share = 2;", "numbers"),
    "keys of the other stage": (
        "sequence_forward.cuh", "blocks + block % 2 * 2 *", "blocks + (block + 1) % 2 * 2 *", "shared memory|race"),
    "a row that sees its future": (
        "sequence_forward.cuh", "key <= row.place)", "key <= row.place + 1)", "numbers"),
}  # fmt: skip
FAST = ("no wait for the prefix", "fragments in the wrong order", "no barrier before the next rows are loaded")


def _run(monkeypatch, file: str, right: str, wrong: str) -> None:
    def edit(name: str, text: str) -> str:
        if name == file:
            assert right in text, f"{file} no longer says {right!r}"
            return text.replace(right, wrong, 1)
        return text

    for seed in range(3):
        with monkeypatch.context() as patch:
            shim = Shim(patch, seed, preempt=seed == 2, edit=edit if right else None, head_dims=(64,))
            patch.setitem(backends.BACKENDS, "merging", Merging(shim, True))
            given = tensors(Shape(B=2, Hq=4, Hkv=2, S=45, P=300, D=64), torch.bfloat16)
            bounds.check_backend("merging", given, {})
            bounds.check_backend("cuda", tensors(Shape(B=2, Hq=4, Hkv=2, S=45, P=70, D=64), torch.float16), {})
            by_head = {"sinks": torch.linspace(-1, 2, 6), "prefix_bias": torch.linspace(-1, 1, 6)[:, None]}
            bounds.check_backend("cuda", tensors(Shape(B=1, Hq=6, Hkv=2, S=45, P=70, D=64), torch.float16), by_head)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAULTS])
def test_a_planted_fault_is_caught(monkeypatch, name):
    *edit, expected = FAULTS[name]
    numbers = "numbers" in expected
    with pytest.raises((native.cuda.NativeError, AssertionError)) as error:
        _run(monkeypatch, *edit)
    message = str(error.value)
    caught = isinstance(error.value, native.cuda.NativeError)
    named = caught and any(part in message for part in expected.split("|"))
    assert named or (numbers and not caught and "exceeds" in message), message
