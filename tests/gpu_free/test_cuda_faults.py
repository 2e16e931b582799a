# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the CUDA sources: a check of the shim must name each, or its results must exceed the bound."""

from __future__ import annotations

import functools

import pytest
import torch

from peftkern import native
from peftkern.testing import bounds
from peftkern.testing.cases import Shape, tensors

from .. import faults
from . import merging
from .shim import Shim, sources

#: By marker: what the marked line contains, what replaces it, and the checks that may catch it, separated by "|".
FAULTS = {
    "prefix-not-awaited": ("copy_async_wait<0>();", "", "uninitialised shared memory"),
    "prefix-replaced-early": ("__syncthreads();", "", "shared-memory race|numbers"),
    "prefix-read-early": ("__syncthreads();", "", "shared memory"),
    "prefix-one-key-long": ("token < length", "token <= length", "numbers"),
    "store-beyond-rows": ("row[r].valid && ", "", "out of bounds|race"),
    "fragments-swapped": (
        "pack<T>(s[2 * k + 1][0], s[2 * k + 1][1])", "pack<T>(s[2 * k][0], s[2 * k][1])", "numbers"),
    "p-and-ds-read-early": ("__syncthreads();", "", "shared memory|shared-memory race"),
    "next-rows-loaded-early": ("__syncthreads();", "", "shared-memory race"),
    "next-keys-loaded-early": ("if (first_key > 0) __syncthreads();", "", "shared-memory race"),
    "ds-summed-early": ("__syncthreads();", "", "shared memory|shared-memory race"),
    "rows-of-another-head": ("(head + call.group - first_row % call.group) % call.group", "head", "numbers"),
    "half-of-the-keys-in-delta": ("side < Shape::kSideWarps", "side < 1", "numbers"),
    "halves-of-delta-added-early": ("__syncthreads();", "", "shared memory|shared-memory race"),
    "split-left-out": ("int split = 1;", "int split = 2;", "numbers"),
    "keys-of-the-other-stage": ("block % 2 * 2", "(block + 1) % 2 * 2", "shared memory|race"),
    "row-sees-its-future": ("key <= row.position", "key <= row.position + 1", "numbers"),
}  # fmt: skip


def test_every_fault_has_a_marker_and_every_marker_a_fault():
    faults.check_markers(sources(), FAULTS)


def _run(monkeypatch, name: str, right: str, wrong: str) -> None:
    for seed in range(3):
        with monkeypatch.context() as patch:
            shim = Shim(patch, seed, preempt=seed == 2, edit=_edit(name, right, wrong), head_dims=(64,))
            merging.install(patch, shim)
            given = tensors(Shape(B=2, Hq=4, Hkv=2, S=45, P=300, D=64), torch.bfloat16)
            bounds.check_backend("merging", given, {})
            bounds.check_backend("cuda", tensors(Shape(B=2, Hq=4, Hkv=2, S=45, P=70, D=64), torch.float16), {})
            by_head = {"sinks": torch.linspace(-1, 2, 6), "prefix_bias": torch.linspace(-1, 1, 6)[:, None]}
            bounds.check_backend("cuda", tensors(Shape(B=1, Hq=6, Hkv=2, S=45, P=70, D=64), torch.float16), by_head)


@functools.lru_cache
def _edit(name: str, right: str, wrong: str):
    return functools.partial(faults.plant, fault=name, right=right, wrong=wrong)


#: Of each kind one: a wait, a barrier in either direction, a bound, a wrong number, the stages of a pipeline.
FAST = {
    "prefix-not-awaited", "prefix-replaced-early", "next-rows-loaded-early", "store-beyond-rows",
    "half-of-the-keys-in-delta", "keys-of-the-other-stage",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAULTS]
)
def test_a_planted_fault_is_caught(monkeypatch, name):
    right, wrong, expected = FAULTS[name]
    numbers = "numbers" in expected
    with pytest.raises((native.cuda.NativeError, AssertionError)) as error:
        _run(monkeypatch, name, right, wrong)
    message = str(error.value)
    caught = isinstance(error.value, native.cuda.NativeError)
    named = caught and any(part in message for part in expected.split("|"))
    assert named or (numbers and not caught and "exceeds" in message), message
