# SPDX-License-Identifier: Apache-2.0
"""Providers of ``peftkern bench`` agree, and wrong or failing ones are caught."""

from __future__ import annotations

import pytest
import torch

from peftkern import reference
from peftkern.tools.bench import attention
from peftkern.tools.bench.checks import Judge
from peftkern.tools.bench.providers import PROVIDERS, Calls, Problem, Provider, Unavailable, prepare, visible_keys
from peftkern.tools.bench.shapes import Shape

from .planted import TIMED, plant

SHAPES = [
    Shape(1, 4, 2, 1, 40, 7),
    Shape(2, 4, 1, 17, 16, 1),
    Shape(3, 2, 2, 63, 80, 130),
    Shape(2, 4, 2, 5, 16, 7, cached=12),
    Shape(2, 3, 3, 19, 8, 0),
    Shape(2, 4, 2, 33, 16, 9, window=12),
    Shape(1, 4, 2, 33, 16, 9, window=12, softcap=5.0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [n for n in PROVIDERS if n != "flex"])
def test_providers_compute_the_same(name, shape):
    """A provider that cannot run gives a reason."""
    problem = Problem.make(shape, torch.float32)
    calls = prepare(name, problem)
    if isinstance(calls, Unavailable):
        assert len(calls.reason) > 10, calls
        return
    judge = Judge(problem)
    for backward in (False, True):
        verdict = judge.judge(calls, backward, PROVIDERS[name].uses_prefix)
        assert not verdict.wrong, verdict.wrong


@pytest.mark.parametrize("name", ["peft", "two-calls", "no-prefix", "peftkern"])
def test_providers_are_right_in_half_precision(name):
    problem = Problem.make(SHAPES[2], torch.bfloat16)
    calls = prepare(name, problem)
    assert isinstance(calls, Calls)
    for backward in (False, True):
        assert not Judge(problem).judge(calls, backward, PROVIDERS[name].uses_prefix).wrong


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6]], ids=str)
def test_flex_attention_computes_the_same(shape):
    problem = Problem.make(shape, torch.float32)
    calls = prepare("flex", problem)
    assert isinstance(calls, Calls)
    assert calls.both is None, "a backward that FlexAttention does not have on CPUs"
    verdict = Judge(problem).judge(calls, False)
    assert not verdict.wrong, verdict.wrong


def test_the_common_providers_run_on_a_cpu():
    problem = Problem.make(SHAPES[2], torch.float32)
    run = {name for name in PROVIDERS if name != "flex" and isinstance(prepare(name, problem), Calls)}
    assert run >= {"peft", "peft-flash", "peft-math", "peft-eager", "two-calls", "no-prefix", "peftkern-reference"}


def test_the_bottom_right_flash_kernel_is_called_as_its_op_asks(monkeypatch):
    """A stand-in replaces the CUDA op: layout, bottom-right causality, and the window are right."""
    called = {}

    def op(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, **window):
        called.update(max_q=max_q, max_k=max_k, is_causal=is_causal, **window)
        visible = torch.arange(max_k) <= torch.arange(max_q)[:, None] + max_k - max_q
        if window["window_size_left"] is not None:
            visible &= (
                torch.arange(max_q)[:, None] + max_k - max_q - torch.arange(max_k) <= window["window_size_left"]
            )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2), None

    class Device:
        type = "cuda"

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    for shape in (SHAPES[3], SHAPES[5]):
        problem = Problem.make(shape, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "device", Device())
            made = PROVIDERS["cat-flash"].make(problem)
        assert callable(made)
        verdict = Judge(problem).judge(Calls(lambda p=problem, m=made: m(*p.inputs), None, None), False)
        assert not verdict.wrong, verdict.wrong
        assert called["is_causal"]
        assert called["max_k"] == shape.P + shape.T


def test_where_everything_is_hidden_by_name():
    reasons = {n: prepare(n, Problem.make(SHAPES[6], torch.float32)) for n in ("peft", "cat-flash", "two-calls")}
    assert all(isinstance(reason, Unavailable) for reason in reasons.values())
    assert "softcap" in reasons["peft"].reason
    assert "window" in reasons["two-calls"].reason


def test_an_unknown_provider_is_named():
    with pytest.raises(ValueError, match=r"providers: expected some of peft, .*, got 'nonsense'"):
        prepare("nonsense", Problem.make(SHAPES[0], torch.float32))


def _last_element_off(out):
    return out + torch.zeros_like(out).index_fill_(2, torch.tensor([out.shape[2] - 1]), 0.01)


@pytest.mark.parametrize(
    "change",
    [lambda out: out * 1.001, lambda out: out.roll(1, 2), lambda out: out * torch.nan, _last_element_off],
    ids=["scaled", "rolled", "nan", "last row"],
)
def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, change):
    plant(monkeypatch, "peftkern", change)
    measured = attention.measure(
        Shape(2, 4, 2, 63, 16, 5), "fp32", ["forward"], TIMED, seconds=0.0, with_memory=False
    )
    row = next(row for row in measured if row["provider"] == "peftkern")
    assert row["status"] == "wrong"
    assert row["reason"]
    assert "p50_ms" not in row
    assert [row["status"] for row in measured if row["provider"] != "peftkern"] == ["ok", "ok"]


def test_a_wrong_gradient_is_reported(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.01

    plant(monkeypatch, "two-calls", Wrong.apply)
    measured = attention.measure(
        Shape(2, 4, 2, 33, 16, 5), "fp32", ["forward", "forward+backward"], ["two-calls"], seconds=0.0,
        with_memory=False,
    )  # fmt: skip
    assert [row["status"] for row in measured] == ["ok", "wrong"]
    assert "dprefix_v errs by" in measured[1]["reason"]


def test_a_failing_provider_does_not_cost_the_others_their_rows(monkeypatch):
    def fail(problem):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(PROVIDERS, "peft-math", Provider("fails", fail))
    measured = attention.measure(
        Shape(1, 2, 2, 9, 8, 3), "fp32", ["forward"], ["peft-math", "peft"], seconds=0.0, with_memory=False
    )
    assert [(row["status"], row["reason"]) for row in measured] == [
        ("failed", "RuntimeError: no such kernel"), ("ok", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_and_pairs_are_those_of_the_reference(shape):
    sizes = (1, shape.S, shape.T, 1, shape.P)
    sequence, prefix = reference.visibility(
        sizes, torch.device("cpu"), True, None, None, None, None, shape.window, True
    )
    parts = (prefix[:, :, :, 0].expand(1, 1, shape.S, shape.P), sequence.expand(1, 1, shape.S, shape.T))
    visible = visible_keys(shape, torch.device("cpu"))
    assert torch.equal(visible, torch.cat(parts, -1)[0, 0])
    assert shape.pairs == visible.sum().item()
