# SPDX-License-Identifier: Apache-2.0
"""What training steps and decoding launch, and that they do not stop to compile: recorded, nothing runs.

Training on packed sequences and decoding see other sizes at every step. Compiling takes seconds, and it would stop
random steps on random ranks.
"""

from __future__ import annotations

import dataclasses
import os
import random
from types import SimpleNamespace

import pytest
import torch

import peftkern
from peftkern import backends
from peftkern.backends import torch_attention

from .recorder import Recorder, recorder

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's launcher is not used there"
)
#: Variants that a kernel may be compiled to, whatever the sizes of the calls.
BUDGET = 1
HEADS, KV_HEADS = 8, 2
BACKENDS = ["triton", "merge"]


def _forward(q, k, v, *_, **options):
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.empty_like(q), torch.empty(rows), None, None, None


def _backward(dout, q, k, v, *_, **options):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.fixture(autouse=True)
def _flash_that_computes_nothing(monkeypatch):
    """The ops of flash allocate their results, on the CPU."""
    flash = next(row for row in torch_attention.KERNELS if row.name == "flash")
    ops = SimpleNamespace(_flash_attention_forward=_forward, _flash_attention_backward=_backward)
    monkeypatch.setattr(torch_attention, "_aten", ops)
    monkeypatch.setattr(torch_attention, "KERNELS", [dataclasses.replace(flash.on_any_machine(), device="cpu")])
    backends.forget()
    yield
    backends.forget()


def _rows(heads: int, length: int, head_dim: int, batch: int = 1, grad: bool = True) -> torch.Tensor:
    """[B, H, N, D] in memory as [B, N, H, D], as a linear layer writes it."""
    x = torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16, requires_grad=grad)
    return x.transpose(1, 2)


def _prefix(prefix_len: int, head_dim: int, *bank: int) -> list[torch.Tensor]:
    return [torch.empty(*bank, KV_HEADS, prefix_len, head_dim, requires_grad=True) for _ in "kv"]


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_step(backend: str, lengths: list[int], prefix: list[torch.Tensor], **options) -> None:
    """Forward and backward of packed sequences behind one prefix."""
    head_dim, value_dim = (x.shape[-1] for x in prefix)
    sizes = (HEADS, head_dim), (KV_HEADS, head_dim), (KV_HEADS, value_dim)
    q, k, v = (_rows(heads, sum(lengths), dim) for heads, dim in sizes)
    out = peftkern.prefix_attention(
        q, k, v, *prefix, cu_seqlens=_starts(lengths), max_seqlen=max(lengths), backend=backend, **options
    )
    out.backward(torch.empty_like(out))


def prompt_step(backend: str, lengths: list[int], prompt: list[torch.Tensor], hint: bool) -> None:
    """The same where the first sequence is the prompt itself, and all others see it."""
    length = prompt[0].shape[-2]
    ids = torch.tensor([-1, *[0] * len(lengths)], dtype=torch.int32)
    packed_step(
        backend, [length, *lengths], prompt, prefix_ids=ids, prefix_start=length if hint else None
    )  # fmt: skip


def decode(backend: str, tokens: int, prefix_len: int, head_dim: int, batch: int, masked: bool) -> None:
    """Read a text of 30 tokens, then write ``tokens``; the cache grows by concatenation."""
    prefix = [x.detach() for x in _prefix(prefix_len, head_dim)]
    for kv_len in (30, *range(31, 31 + tokens)):
        q = _rows(HEADS, 30 if kv_len == 30 else 1, head_dim, batch, grad=False)
        k, v = (torch.empty(batch, KV_HEADS, kv_len, head_dim, dtype=torch.bfloat16) for _ in "kv")
        mask = torch.ones(batch, prefix_len + kv_len, dtype=torch.bool)[:, prefix_len:] if masked else None
        peftkern.prefix_attention(q, k, v, *prefix, key_mask=mask, backend=backend)


def _lengths(total: int) -> list[int]:
    """Random lengths of sequences that add up to ``total``."""
    cuts = sorted(random.sample(range(1, total), random.randrange(min(24, total - 1))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _check(recorded: Recorder) -> None:
    counts = recorded.variants()
    assert recorded.launches
    assert max(counts.values()) <= BUDGET, f"more than {BUDGET} variants: {counts}"


@pytest.fixture(params=[80, pytest.param(400, marks=pytest.mark.slow)], ids=lambda steps: f"{steps} steps")
def totals(request):
    random.seed(0)
    return [random.randrange(2, 3000) for _ in range(request.param)]


@pytest.mark.parametrize(("prefix_len", "dims"), [(20, (64, 64)), (128, (128, 128)), (20, (192, 128))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_training_compiles_once(backend, prefix_len, dims, totals):
    prefix = [_prefix(prefix_len, dim)[0] for dim in dims]
    with recorder() as recorded:
        for total in totals:
            packed_step(backend, _lengths(total), prefix)
    _check(recorded)


@pytest.mark.parametrize("hint", [False, True], ids=["ids", "ids and prefix_start"])
@pytest.mark.parametrize(("prefix_len", "head_dim"), [(20, 64), (128, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_prompt_tuning_compiles_once(backend, prefix_len, head_dim, hint, totals):
    prompt = _prefix(prefix_len, head_dim, 1)
    with recorder() as recorded:
        for total in totals:
            prompt_step(backend, _lengths(total), prompt, hint)
    _check(recorded)


@pytest.mark.parametrize(
    ("backend", "tokens", "prefix_len", "batch", "masked"),
    [
        ("triton", 500, 20, 1, False), ("triton", 500, 2048, 3, True), ("triton", 2000, 20, 3, True),
        ("merge", 500, 20, 1, False), ("merge", 2000, 128, 3, False),
    ],
)  # fmt: skip
def test_decoding_compiles_once(backend, tokens, prefix_len, batch, masked):
    """Across the number of keys from which on they are split."""
    with recorder() as recorded:
        decode(backend, tokens, prefix_len, 128, batch, masked)
    _check(recorded)


FUSED = {
    "_prefix_attention_fwd_kernel": 1, "_prefix_attention_bwd_prepare_kernel": 1,
    "_prefix_attention_bwd_dq_kernel": 1, "_prefix_attention_bwd_dkv_kernel": 1,
    "_prefix_attention_bwd_prefix_kernel": 1, "_sum_partials_kernel": 2,
}  # fmt: skip
ONE_PASS = {"_prefix_merge_fwd_kernel": 1, "_prefix_merge_bwd_kernel": 1, "_sum_partials_kernel": 2}
BY_ROWS_AND_TOKENS = {
    name: n for name, n in FUSED.items() if "fwd" not in name and "dkv" not in name
} | {"_prefix_merge_fwd_kernel": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "prefix_len", "hint", "expected"),
    [
        ("triton", 20, None, FUSED), ("triton", 20, True, FUSED),
        ("merge", 20, None, ONE_PASS), ("merge", 20, True, ONE_PASS), ("merge", 20, False, BY_ROWS_AND_TOKENS),
        ("merge", 512, None, BY_ROWS_AND_TOKENS),
    ],
)  # fmt: skip
def test_launches_of_a_training_step(backend, prefix_len, hint, expected):
    """A hint of None: a prefix beside packed sequences. Otherwise prompt tuning, with and without prefix_start."""
    with recorder() as recorded:
        if hint is None:
            packed_step(backend, [100, 28], _prefix(prefix_len, 64))
        else:
            prompt_step(backend, [100, 28], _prefix(prefix_len, 64, 1), hint)
    assert recorded.counts() == expected


def test_launches_of_decoding():
    """One kernel for a step over few keys; with 1024 and more, the keys are split: prefix, sequence, their merge."""
    with recorder() as recorded:
        decode("triton", 500, 600, 64, 2, False)
    few = 1024 - 600 - 30
    assert recorded.counts() == {
        "_prefix_attention_fwd_kernel": few,
        **{f"_prefix_attention_decode_{part}_kernel": 501 - few for part in ("prefix", "sequence", "combine")},
    }


def test_arguments_reach_the_launch():
    """The rows of a prompt are not among those that the merge visits."""
    with recorder() as recorded:
        prompt_step("merge", [100, 28], _prefix(20, 64, 1), hint=True)
    forward = next(x for x in recorded.launches if x.kernel == "_prefix_merge_fwd_kernel")
    values = forward.arguments
    assert (values["row_start"], values["q_len"], values["BLOCK_M"]) == (20, 148, 128)
    tiles = HEADS // KV_HEADS  # one of 128 rows for each head
    assert forward.grid == (tiles * KV_HEADS, 1, 1)
    assert values["workers"] == tiles
    assert values["opts"].cu_seqlens is None, "searched for sequences"


def test_the_recorder_counts_what_triton_would_compile():
    """An integer within a tuple that turns a multiple of 16 is one more variant; so the check can fail."""
    with recorder() as recorded:
        for prefix_len in (20, 32):
            packed_step("merge", [100, 28], _prefix(prefix_len, 64))
    assert recorded.variants()["_prefix_merge_fwd_kernel"] == 2
