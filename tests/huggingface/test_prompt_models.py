# SPDX-License-Identifier: Apache-2.0
"""Prompts of every task, in plain models, and in models that cannot be packed."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern import SoftPrompt
from tests.huggingface import models
from tests.huggingface.models import (
    BATCH,
    FAMILIES,
    FP32_TOLERANCE,
    IDS,
    LEFT,
    ONES,
    PREFIX,
    RIGHT,
    SEQ,
    TASK_IDS,
    TASKS,
    VOCAB,
    assert_same_step,
)

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LLAMA = FAMILIES["llama (GQA)"]
CONCATENATED = ("llama4 (chunks)",)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_type_without_padding(name):
    family = TASKS[name]
    if family.task == "TOKEN_CLS":  # PEFT raises with labels
        inputs = {"labels": None}
        with torch.no_grad():
            want, got = (
                models.prompt_model(family, patched=p).train()(input_ids=IDS, **inputs).logits for p in (False, True)
            )
        assert got.shape == want.shape
        assert models.difference(got, want) <= FP32_TOLERANCE
        return
    want, got = (models.training_step(models.prompt_model(family, patched=p), family.task) for p in (False, True))
    assert_same_step(got, want)


@pytest.mark.parametrize(
    "name", ["llama QUESTION_ANS", "llama FEATURE_EXTRACTION", "bert QUESTION_ANS", "bert FEATURE_EXTRACTION"]
)
def test_heads_that_may_look_at_padding_get_it(name):
    family = TASKS[name]
    want, got = (
        models.training_step(models.prompt_model(family, patched=p), family.task, RIGHT) for p in (False, True)
    )
    assert_same_step(got, want)


@pytest.mark.parametrize("name", ["llama TOKEN_CLS", "bert TOKEN_CLS"])
def test_labels_of_tokens(name):
    """PEFT raises. The loss is computed from the rows of tokens."""
    family = TASKS[name]
    model = models.prompt_model(family, patched=True)
    labels = (IDS % 3).masked_fill(RIGHT == 0, -100)
    step = models.training_step(model, family.task, RIGHT, labels=labels)
    assert step.output.shape == (BATCH, PREFIX + SEQ, 3)
    want = torch.nn.functional.cross_entropy(step.output[:, PREFIX:].flatten(0, 1), labels.flatten())
    assert models.difference(step.loss, want) <= FP32_TOLERANCE
    stock = models.prompt_model(family, patched=False).train()
    with pytest.raises(ValueError, match="batch_size"):
        stock(input_ids=IDS, attention_mask=RIGHT, labels=labels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama SEQ_CLS", "gpt2 SEQ_CLS"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_decoders_pool_the_last_token(name, mask):
    family = TASKS[name]
    model = models.prompt_model(family, patched=True).eval()
    ids = IDS.masked_fill(mask == 0, 0)  # the models' padding
    with pytest.warns(UserWarning, match="SEQ_CLS: the last token is pooled"):
        got = model(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(mask.bool()):
        want = model(input_ids=ids[i : i + 1, row]).logits
        assert models.difference(got[i : i + 1], want) <= FP32_TOLERANCE
    peftkern.unpatch(model)
    stock = model(input_ids=ids, attention_mask=mask).logits
    peftkern.patch(model, peft_bugs=True)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, stock)


def test_labelled_logits_have_equal_loss_and_gradients():
    labels = IDS.masked_fill(RIGHT == 0, -100)
    labels[:, 1:4] = -100
    for mask in (None, RIGHT):
        stock = models.prompt_model(LLAMA, patched=False)
        want = models.training_step(stock, LLAMA.task, mask, labels=labels)
        patched = models.prompt_model(LLAMA, patched=True, logits="labelled")
        got = models.training_step(patched, LLAMA.task, mask, labels=labels)
        assert models.difference(got.loss, want.loss) <= FP32_TOLERANCE
        for name, gradient in want.gradients.items():
            assert models.difference(got.gradients[name], gradient) <= FP32_TOLERANCE
        supervised = torch.nn.functional.pad(labels, (PREFIX - 1, 1), value=-100) != -100
        first = supervised.clone()
        first[:, PREFIX:] = False
        rows = torch.cat([want.output[first], want.output[supervised & ~first]])
        assert got.output.shape == (1, int((labels != -100).sum()), VOCAB)
        evaluated = patched.eval()(input_ids=IDS, attention_mask=mask, labels=labels).logits
        assert evaluated.shape == want.output.shape, "evaluation has all logits"
        assert models.difference(got.output[0], rows) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2"])
def test_a_soft_prompt_in_a_plain_model(name):
    """Callers pass arguments of the sequence alone; the loss is PEFT's."""
    family = FAMILIES[name]
    stock = models.prompt_model(family, patched=False)
    prompt = SoftPrompt(stock.get_base_model(), PREFIX, init=models.peft_prefix(stock).detach())
    model = peftkern.patch(models.base_model(family), prompt, freeze=True)
    for mask in (None, RIGHT):
        want, got = (models.training_step(m, family.task, mask) for m in (stock, model))
        assert got.output.shape == (BATCH, SEQ, VOCAB)
        assert models.difference(got.loss, want.loss) <= FP32_TOLERANCE
        assert models.difference(prompt.weight.grad, models.peft_prefix(stock).grad) <= FP32_TOLERANCE
    want, got = (
        models.generate(m.eval(), family.task, attention_mask=ONES, do_sample=False, num_beams=2)
        for m in (stock, model)
    )
    assert got.tolist() == want.tolist()
    peftkern.unpatch(model)
    assert not hasattr(model, "peftkern_prompt")


def test_a_bank_of_soft_prompts():
    bank = SoftPrompt(models.base_model(LLAMA), PREFIX, num_prompts=4, init="vocab")
    model = peftkern.patch(models.base_model(LLAMA), bank, freeze=True)
    step = models.training_step(model, LLAMA.task, prompt_ids=TASK_IDS)
    used = bank.weight.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True, False, True, False]
    peftkern.unpatch(model)
    losses = []
    for i, task in enumerate(TASK_IDS):
        alone = SoftPrompt(model, PREFIX, init=bank.weight[task].detach())
        with peftkern.patched(model, alone):
            losses.append(model(input_ids=IDS[i : i + 1], labels=IDS[i : i + 1]).loss)
    assert models.difference(step.loss, torch.stack(losses).mean()) <= FP32_TOLERANCE
    with peftkern.patched(model, bank), pytest.raises(ValueError, match="prompt_ids: expected the prompt of each"):
        model(input_ids=IDS)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "umt5 (bias per layer)", "bart"])
def test_other_models_keep_the_concatenation(name):
    family = FAMILIES[name]
    kinds = ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"]
    for kind in kinds if name in ("bert", "t5") else kinds[:1]:
        inputs = {"task_ids": TASK_IDS} if kind.startswith("MULTITASK") else {}
        stock, patched = (models.prompt_model(family, kind, patched=p) for p in (False, True))
        want, got = (models.training_step(m, family.task, RIGHT, **inputs) for m in (stock, patched))
        assert_same_step(got, want)
        assert "the prompt is put before every sample" in peftkern.explain(patched)
    assert peftkern.explain(peftkern.patch(peftkern.unpatch(patched))) == peftkern.explain(patched)


@pytest.mark.parametrize("name", CONCATENATED)
def test_what_cannot_be_packed_says_why(name):
    model = models.prompt_model(FAMILIES[name], patched=True)
    explanation = peftkern.explain(model)
    assert "put before every sample" in explanation
    assert "mask other than a causal one" in explanation
    packed = peftkern.explain(models.prompt_model(LLAMA, patched=True))
    assert packed == "LlamaForCausalLM: the prompt runs once per batch, before the sequences without their padding"


def test_a_model_that_counts_rows_is_found_out():
    """Its positions are the columns of the batch, regardless of position_ids."""
    family = FAMILIES["llama (GQA)"]

    def model(patched):
        model = models.prompt_model(family, patched=False)
        rotary = model.get_base_model().model.rotary_emb
        stock = rotary.forward
        rotary.forward = lambda x, position_ids: stock(x, torch.arange(x.shape[1])[None])
        return peftkern.patch(model) if patched else model

    assert "on packed rows differs from the stock model" in peftkern.explain(model(True))
    want, got = (models.training_step(model(p), family.task) for p in (False, True))
    assert_same_step(got, want)
