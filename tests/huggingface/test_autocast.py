# SPDX-License-Identifier: Apache-2.0
"""``torch.autocast``: every patched method rounds like the stock PEFT model, in the same dtypes.

Errors are against stock PEFT in fp32. Rotary models leave keys in fp32 beside values in half precision; GPT-2 and OPT
have both in half precision; T5 adds a bias.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor

import peftkern
from tests.huggingface import kinds, models
from tests.huggingface.models import FAMILIES, IDS, LEFT, RIGHT, SEQ, TARGETS, TASK_IDS

METHODS = (
    *("PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"),
    *("PrefixKV", "SoftPrompt"),
)
NATIVE = {"PrefixKV": "native prefix", "SoftPrompt": "native prompt"}
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE", "PrefixKV")

ROTARY, GPT2, OPT, T5 = "llama (GQA)", "gpt2", "opt", "t5"
NAMES = (ROTARY, GPT2, OPT, T5)
CASES = [
    (name, method) for name in NAMES for method in METHODS if (name, method) not in {(T5, "CPT"), (T5, "CARTRIDGE")}
]
HALF = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
]


# A ReLU whose input rounds to the other side of zero moves a gradient by more than rounding.
SMOOTH = {OPT: {"activation_function": "gelu"}, T5: {"feed_forward_proj": "gated-gelu"}}


def build(method, name, *, patched):
    family = FAMILIES[name]
    family = dataclasses.replace(family, arguments={**family.arguments, **SMOOTH.get(name, {})})
    if method in NATIVE:
        return (kinds.patched_model if patched else kinds.stock_model)(NATIVE[method], family)
    if method == "PREFIX_TUNING":
        return models.peft_model(family, patched=patched)
    if method == "CARTRIDGE":
        return models.peft_model(family, patched=patched, num_frozen_tokens=1)
    return models.prompt_model(family, method, patched=patched)


def inputs_of(method, name):
    labels = TARGETS if name == T5 else IDS.masked_fill(RIGHT == 0, -100)
    tasks = {"task_ids": TASK_IDS} if method == "MULTITASK_PROMPT_TUNING" else {}
    return {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, **tasks}


@dataclasses.dataclass
class Outcome:
    """The dtypes of a forward, and of its backward if there was one."""

    loss: Tensor
    logits: Tensor
    dtypes: tuple[torch.dtype, torch.dtype]
    gradients: list[Tensor] = dataclasses.field(default_factory=list)


def autocast(dtype):
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def step(model, method, name, dtype, *, training):
    model.train(training)
    with autocast(dtype), torch.set_grad_enabled(training):
        out = model(**inputs_of(method, name))
    logits = out.logits.detach()
    if name != T5:  # a prompt has rows before these; padding is not compared
        logits = logits[:, -SEQ:][RIGHT.bool()]
    outcome = Outcome(out.loss.detach().double(), logits.double(), (out.loss.dtype, out.logits.dtype))
    if training:
        scale = 2.0**12 if dtype == torch.float16 else 1.0  # as a gradient scaler does, so that nothing underflows
        (out.loss * scale).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32, "parameters are fp32, and so are their gradients"
                outcome.gradients.append(parameter.grad.double() / scale)
    return outcome


def rms(x):
    return x.pow(2).mean().sqrt().item()


def assert_rounds_like(what, got, want, exact, factor, dtype):
    """Root mean square errors, which single elements hardly change. The floor is a rounding of the largest value."""
    error, allowed = rms(got - exact), factor * rms(want - exact)
    allowed += torch.finfo(dtype).eps / 4 * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.1e}, stock's {rms(want - exact):.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_and_backward(training, dtype, name, method):
    exact = step(build(method, name, patched=False), method, name, torch.float32, training=training)
    want = step(build(method, name, patched=False), method, name, dtype, training=training)
    got = step(build(method, name, patched=True), method, name, dtype, training=training)
    assert got.dtypes == want.dtypes, f"loss and logits are {got.dtypes}, stock's {want.dtypes}"
    assert rms(want.logits - exact.logits) > 0, "stock does not round here"
    assert_rounds_like("logits", got.logits, want.logits, exact.logits, 2, dtype)
    assert rms(got.logits - exact.logits) >= rms(want.logits - exact.logits) / 3, "autocast is off: as exact as fp32"
    spread = rms(want.logits - exact.logits)  # a single number may agree by chance
    assert abs(got.loss - exact.loss) <= 2 * abs(want.loss - exact.loss) + spread
    assert len(got.gradients) == len(want.gradients)
    if method == "SoftPrompt" and name == T5:  # PEFT's parameter has rows for the decoder, which it never uses
        exact.gradients, want.gradients = ([g[: models.PREFIX] for g in o.gradients] for o in (exact, want))
    for i, gradients in enumerate(zip(got.gradients, want.gradients, exact.gradients, strict=True)):
        assert_rounds_like(f"gradient {i}", *gradients, 3, dtype)


def generate(model, method, name, dtype):
    """Tokens and logits of six greedy steps; padded on the left where PEFT supports it."""
    mask = {"attention_mask": LEFT} if method in PREFIXES and name != T5 else {}
    tasks = {"task_ids": TASK_IDS} if method == "MULTITASK_PROMPT_TUNING" else {}
    with autocast(dtype):
        out = model.eval().generate(
            input_ids=IDS, **mask, **tasks, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, -6:], torch.stack(out.logits, 1).double()


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_generate(dtype, name, method):
    """The same tokens until another one is equally likely within rounding, and the logits of all steps until then."""
    (_, exact), (want, want_logits) = (
        generate(build(method, name, patched=False), method, name, d) for d in (torch.float32, dtype)
    )
    got, got_logits = generate(build(method, name, patched=True), method, name, dtype)
    rounding = (want_logits - exact)[:, 0].abs().max() + torch.finfo(dtype).eps / 2 * exact.abs().max()
    for row in range(got.shape[0]):
        differing = (got[row] != want[row]).nonzero().flatten()
        steps = int(differing[0]) + 1 if len(differing) else got.shape[1]
        error = (got_logits[row, :steps] - want_logits[row, :steps]).abs().max()
        assert error <= 4 * rounding, f"row {row}: logits differ by {error:.1e}, rounding is {rounding:.1e}"
        if len(differing):
            logits = want_logits[row, steps - 1]
            gap = logits[want[row, steps - 1]] - logits[got[row, steps - 1]]
            assert gap <= 4 * rounding, f"row {row}: another token, which is less likely by {gap:.1e}"


@pytest.mark.parametrize("method", METHODS)
def test_a_patch_within_autocast(method):
    """Autocast does not affect the trial of ``patch``: the patched model is the same as outside."""
    with torch.autocast("cpu", torch.bfloat16):
        inside = build(method, ROTARY, patched=True)
    outside = build(method, ROTARY, patched=True)
    for dtype in (torch.float32, torch.bfloat16):
        got, want = (step(m, method, ROTARY, dtype, training=False) for m in (inside, outside))
        assert torch.equal(got.logits, want.logits), f"in {dtype}"


@pytest.mark.parametrize("method", METHODS)
def test_autocast_with_gradient_checkpointing(method):
    """Layers run again in backward, which is usually called outside autocast."""
    exact, want = (
        step(build(method, ROTARY, patched=False), method, ROTARY, dtype, training=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    model = build(method, ROTARY, patched=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = step(model, method, ROTARY, torch.bfloat16, training=True)
    for i, gradients in enumerate(zip(got.gradients, want.gradients, exact.gradients, strict=True)):
        assert_rounds_like(f"gradient {i}", *gradients, 3, torch.bfloat16)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_unpatching_within_autocast(method):
    stock, model = (build(method, ROTARY, patched=patched) for patched in (False, True))
    with torch.autocast("cpu", torch.bfloat16):
        peftkern.unpatch(model)
    want, got = (step(m, method, ROTARY, torch.bfloat16, training=False) for m in (stock, model))
    assert torch.equal(got.logits, want.logits)
