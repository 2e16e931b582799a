# SPDX-License-Identifier: Apache-2.0
"""Shared text behind a learned prefix or prompt: as without sharing, and as in stock PEFT, in fp64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import peftkern
from peftkern import PrefixKV, SoftPrompt
from tests.cover import product
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, PREFIX, patch_of
from tests.huggingface.shared_rows import ROWS, A, B, C, D, F, differ, inputs_of, left_inputs, share_everything, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FP64 = torch.float64
NAMES = ["llama (GQA)", "mistral (window 4)", "opt"]
INPUTS = {"right": inputs_of(ROWS), "left": left_inputs(ROWS)}

#: Prompts of the rows, and the rows that run then: those with other prompts share nothing.
PROMPT_IDS = torch.tensor([0, 0, 1, 1, 1])
TASK_IDS = torch.tensor([2, 2, 0, 0, 0])
ALL, BY_PROMPT = len(A + B + C + D + F), len(A + B + C) + len(A + B + D + F)


@pytest.fixture(autouse=True)
def share_every_row(monkeypatch):
    share_everything(monkeypatch)


def native(make):
    def build(family, **options):
        base = models.base_model(family, FP64)
        torch.manual_seed(4)
        return peftkern.patch(base, make(base), **options)

    return build


def with_lora(family, **options):
    base = models.base_model(family, FP64)
    torch.manual_seed(4)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(base, config).double()
    return peftkern.patch(model, PrefixKV(base, PREFIX, dtype=FP64), **options)


def peft_prefix(family, **options):
    return peftkern.patch(models.peft_model(family, patched=False, dtype=FP64), **options)


def peft_prompt(kind):
    return lambda family, **options: models.prompt_model(family, kind, patched=True, dtype=FP64, **options)


BUILDS = {
    "PrefixKV": native(lambda base: PrefixKV(base, PREFIX, dtype=FP64)),
    "PrefixKV of two lengths": native(lambda base: PrefixKV(base, [2, PREFIX], dtype=FP64)),
    "PrefixKV beside LoRA": with_lora,
    "SoftPrompt": native(lambda base: SoftPrompt(base, PREFIX, dtype=FP64)),
    "a bank of SoftPrompts": native(lambda base: SoftPrompt(base, PREFIX, num_prompts=3, dtype=FP64)),
    "PREFIX_TUNING": peft_prefix,
    **{kind: peft_prompt(kind) for kind in models.PROMPTS},
}
EXTRA = {"a bank of SoftPrompts": {"prompt_ids": PROMPT_IDS}, "MULTITASK_PROMPT_TUNING": {"task_ids": TASK_IDS}}
PEFT = ["PREFIX_TUNING", *models.PROMPTS]


@pytest.mark.parametrize(("name", "kind", "side", "logits"), product(NAMES, BUILDS, INPUTS, ("all", "labelled")))
def test_a_training_step_equals_the_one_without_sharing(name, kind, side, logits):
    inputs = INPUTS[side] | EXTRA.get(kind, {})
    options = {"logits": "labelled"} if logits == "labelled" else {}
    with models.fp64_throughout():
        want, want_gradients = train(BUILDS[kind](FAMILIES[name], **options), inputs)
        model = BUILDS[kind](FAMILIES[name], share="prefixes", **options)
        got, got_gradients = train(model, inputs)
    rows = patch_of(model).shared_rows
    assert rows is not None, peftkern.explain(model)
    # Windows count the padding between a prefix and the text, so only rows with equal padding share.
    if not (side == "left" and "window" in name and "PREFIX" in kind.upper()):
        assert rows[1] == (BY_PROMPT if kind in EXTRA else ALL)
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10
    if got.logits.shape[0] == len(ROWS):
        real, tokens = inputs["attention_mask"].bool(), slice(-inputs["input_ids"].shape[1], None)
        assert differ(got.logits[:, tokens][real], want.logits[:, tokens][real]) <= 1e-10


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_equals_stock_pefts(name, kind):
    inputs = INPUTS["right"] | EXTRA.get(kind, {})
    build = models.peft_model if kind == "PREFIX_TUNING" else lambda *a, **o: models.prompt_model(*a[:1], kind, **o)
    with models.fp64_throughout():
        want, want_gradients = train(build(FAMILIES[name], patched=False, dtype=FP64), inputs)
        model = BUILDS[kind](FAMILIES[name], share="prefixes")
        got, got_gradients = train(model, inputs)
    assert patch_of(model).shared_rows is not None
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10


@pytest.mark.parametrize("kind", ["PrefixKV", "SoftPrompt", "a bank of SoftPrompts", *PEFT[:2]])
def test_groups(kind):
    """Behind a prompt, too, they reach no model."""
    inputs = INPUTS["right"] | EXTRA.get(kind, {}) | {"group_ids": torch.tensor([0, 0, 0, 1, 1])}
    model = BUILDS[kind](FAMILIES["llama (GQA)"], share="prefixes", strict=True)
    train(model, inputs)
    apart = len(A + B + C) + len(A + D) + len(F + A + B) if kind in EXTRA else len(A + B + C + D) + len(F + A + B)
    assert patch_of(model).shared_rows[1] == apart


@pytest.mark.parametrize("kind", BUILDS)
def test_generation_is_token_identical(kind):
    if kind == "a bank of SoftPrompts":
        pytest.skip("a bank does not support generate")
    inputs = {name: INPUTS["left"][name] for name in ("input_ids", "attention_mask")} | EXTRA.get(kind, {})
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for name in NAMES:
        want = BUILDS[kind](FAMILIES[name]).eval().generate(**inputs, **options)
        model = BUILDS[kind](FAMILIES[name], share="prefixes").eval()
        assert torch.equal(model.generate(**inputs, **options), want), name
        if "PREFIX" in kind.upper():
            assert "only training steps" in peftkern.explain(model)
        elif "window" not in name:  # windows count the padding between the prompt and the text
            assert patch_of(model).shared_rows is not None


@pytest.mark.parametrize("option", ["prefix_in_window", "shift_positions"])
def test_a_prefix_that_windows_do_not_count_is_refused(option):
    """Windows count the shared text, but one call has one rule for all prefixes."""
    build = BUILDS["PrefixKV"]
    with pytest.raises(ValueError, match="windows count shared text but not the prefix"):
        build(FAMILIES["mistral (window 4)"], share="prefixes", **{option: False})
    with models.fp64_throughout():
        want, want_gradients = train(build(FAMILIES["llama (GQA)"], **{option: False}), INPUTS["right"])
        model = build(FAMILIES["llama (GQA)"], share="prefixes", **{option: False})
        got, got_gradients = train(model, INPUTS["right"])
    assert patch_of(model).shared_rows is not None
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10
