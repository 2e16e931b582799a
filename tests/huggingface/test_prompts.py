# SPDX-License-Identifier: Apache-2.0
"""Prompts that run once per batch, against PEFT, which runs them once per sample."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PromptTuningConfig

import peftkern
from peftkern.huggingface.cache import PrefixCache
from tests.huggingface import models
from tests.huggingface.models import (
    BATCH,
    FAMILIES,
    FP32_TOLERANCE,
    FP64_TOLERANCE,
    IDS,
    LEFT,
    ONES,
    PREFIX,
    RIGHT,
    SEQ,
    TASK_IDS,
    assert_same_step,
    rows_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LLAMA = FAMILIES["llama (GQA)"]
CAUSAL = [name for name, family in FAMILIES.items() if family.task == "CAUSAL_LM"]
GENERATION = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_outputs_and_gradients_are_those_of_peft(name):
    family = FAMILIES[name]
    stock, patched = (models.prompt_model(family, patched=p) for p in (False, True))
    for mask in (None, ONES, RIGHT):
        want, got = (models.training_step(model, family.task, mask) for model in (stock, patched))
        assert_same_step(got, want, mask)


@pytest.mark.parametrize("name", CAUSAL)
def test_fp64_agrees_to_ten_digits(name):
    family = FAMILIES[name]
    stock, patched = (models.prompt_model(family, patched=p, dtype=torch.float64) for p in (False, True))
    for mask in (None, RIGHT):
        with models.fp64_throughout():
            want, got = (models.training_step(model, family.task, mask) for model in (stock, patched))
        assert_same_step(got, want, mask, FP64_TOLERANCE)


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "mistral (window 4)"])
@pytest.mark.parametrize("kind", ["P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_every_kind_of_prompt(name, kind):
    family = FAMILIES[name]
    inputs = {"task_ids": TASK_IDS} if kind.startswith("MULTITASK") else {}
    for mask in (None, RIGHT):
        steps = []
        for patched in (False, True):
            model = models.prompt_model(family, kind, patched=patched)
            steps.append(models.training_step(model, family.task, mask, labels=IDS.clone(), **inputs))
        assert_same_step(steps[1], steps[0], mask)


@pytest.mark.parametrize(
    ("kind", "inputs", "prompts"),
    [("PROMPT_TUNING", {}, 1), ("MULTITASK_PROMPT_TUNING", {"task_ids": TASK_IDS}, 2)],
)
def test_prompts_run_once_and_padding_not_at_all(kind, inputs, prompts):
    model = models.prompt_model(LLAMA, kind, patched=True)
    rows = rows_of(model)
    labels = IDS.masked_fill(RIGHT == 0, -100)
    models.training_step(model, LLAMA.task, RIGHT, labels=labels, **inputs)
    assert rows == [prompts * PREFIX + int(RIGHT.sum())]


def test_padding_with_labels_counts_as_in_peft():
    """Its rows are kept for their loss, and no other row attends to them."""
    model = models.prompt_model(LLAMA, patched=True)
    rows = rows_of(model)
    got = models.training_step(model, LLAMA.task, RIGHT)
    assert rows == [PREFIX + BATCH * SEQ - 1], "the last row of padding predicts nothing"
    assert_same_step(got, models.training_step(models.prompt_model(LLAMA, patched=False), LLAMA.task, RIGHT), RIGHT)


def test_inputs_embeds():
    stock, patched = (models.prompt_model(LLAMA, patched=p) for p in (False, True))
    embeds = stock.get_base_model().get_input_embeddings()(IDS).detach()
    want, got = (
        models.training_step(model, LLAMA.task, RIGHT, input_ids=None, inputs_embeds=embeds)
        for model in (stock, patched)
    )
    assert_same_step(got, want, RIGHT)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name, reentrant):
    if (name, reentrant) == ("gemma3n (shared KV)", True):
        pytest.skip("the stock model loses gradients of shared keys there")
    family = FAMILIES[name]
    want = models.training_step(models.prompt_model(family, patched=False), family.task, RIGHT)
    model = models.prompt_model(family, patched=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(models.training_step(model, family.task, RIGHT), want, RIGHT)


@pytest.mark.parametrize("name", ["llama (GQA)", pytest.param("mistral (window 4)", marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(name):
    family = FAMILIES[name]
    for mask in (None, LEFT):
        want = models.training_step(models.prompt_model(family, patched=True), family.task, mask)
        torch._dynamo.reset()
        model = models.prompt_model(family, patched=True).train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(input_ids=IDS, attention_mask=mask, labels=IDS).loss
        loss.backward()
        assert models.difference(loss, want.loss) <= FP32_TOLERANCE
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for parameter, gradient in want.gradients.items():
            assert models.difference(gradients[parameter], gradient) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_generated_tokens_are_those_of_peft(name):
    family = FAMILIES[name]
    stock, patched = (models.prompt_model(family, patched=p).eval() for p in (False, True))
    for mode, options in GENERATION.items():
        want, got = (models.generate(m, family.task, attention_mask=ONES, **options) for m in (stock, patched))
        assert got.tolist() == want.tolist(), mode


def test_tasks_generate_with_prompts_of_their_own():
    stock, patched = (models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=p).eval() for p in (False, True))
    for mode, options in GENERATION.items():
        options = {"attention_mask": ONES, "task_ids": TASK_IDS, **options}
        want, got = (models.generate(m, LLAMA.task, **options) for m in (stock, patched))
        assert got.tolist() == want.tolist(), mode


def test_generation_holds_one_prompt_for_all_rows():
    model = models.prompt_model(LLAMA, patched=True).eval()
    rows = rows_of(model)
    with torch.no_grad():
        cache = model(input_ids=IDS).past_key_values
    assert rows == [PREFIX + BATCH * SEQ]
    assert isinstance(cache, PrefixCache)
    assert [key.shape for key, _ in cache.prefix] == [(2, PREFIX, 16)] * 2
    assert [layer.keys.shape for layer in cache.layers] == [(BATCH, 2, SEQ, 16)] * 2


@torch.no_grad()
def test_a_cache_can_be_continued():
    model = models.prompt_model(LLAMA, patched=True).eval()
    want = model(input_ids=IDS).logits[:, -2:]
    cache = model(input_ids=IDS[:, :-2]).past_key_values
    got = model(input_ids=IDS[:, -2:], past_key_values=cache, attention_mask=ONES).logits
    assert models.difference(got, want) <= FP32_TOLERANCE


def one_by_one(model, mask, **inputs):
    """Logits of the tokens of each sample, run alone and without padding."""
    rows = []
    for i, row in enumerate(mask.bool()):
        out = model(input_ids=IDS[i : i + 1, row], **{k: v[i : i + 1] for k, v in inputs.items()})
        rows.append(out.logits[0, -int(row.sum()) :])
    return rows


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "mistral (window 4)", "opt"])
def test_left_padding_does_not_move_the_sequence(name):
    family = FAMILIES[name]
    model = models.prompt_model(family, patched=True).eval()
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        for _ in range(2):
            got = model(input_ids=IDS, attention_mask=LEFT, use_cache=False).logits[:, PREFIX:]
    # OPT counts positions by the mask, and PEFT is right there.
    assert len(notices) == (name != "opt"), "there is one notice"
    assert all("left padding: the sequence begins right behind the prompt" in str(n.message) for n in notices)
    for logits, row, want in zip(got, LEFT.bool(), one_by_one(model, LEFT), strict=True):
        assert models.difference(logits[row], want) <= FP32_TOLERANCE


def test_left_padding_trains_as_right_padding_does():
    """The same sequences, padded on either side."""
    left, right = (IDS.new_zeros(2, SEQ) for _ in range(2))
    left[0, 3:], right[0, :4] = IDS[0, :4], IDS[0, :4]
    left[1], right[1] = IDS[1], IDS[1]
    steps = []
    for ids in (left, right):
        mask = (ids != 0).long()
        model = models.prompt_model(LLAMA, patched=True)
        labels = ids.masked_fill(mask == 0, -100)
        steps.append(models.training_step(model, LLAMA.task, mask, input_ids=ids, labels=labels))
    assert models.difference(steps[0].loss, steps[1].loss) <= FP32_TOLERANCE
    for name, gradient in steps[1].gradients.items():
        assert models.difference(steps[0].gradients[name], gradient) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["llama (GQA)", "mistral (window 4)"])
def test_generation_from_left_padding_is_that_of_each_sample_alone(name):
    family = FAMILIES[name]
    model = models.prompt_model(family, patched=True).eval()
    got = models.generate(model, family.task, attention_mask=LEFT, do_sample=False)[:, SEQ:]
    if name != "llama (GQA)":  # windows count the padding between prompt and sequence, as in PEFT
        return
    for i, row in enumerate(LEFT.bool()):
        want = model.generate(
            input_ids=IDS[i : i + 1, row], attention_mask=ONES[i : i + 1, row], max_new_tokens=6, pad_token_id=0,
            eos_token_id=None, do_sample=False,
        )  # fmt: skip
        assert got[i].tolist() == want[0, -6:].tolist()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_peft_bugs_reproduces_peft():
    stock = models.prompt_model(LLAMA, patched=False)
    patched = models.prompt_model(LLAMA, patched=True, peft_bugs=True)
    positions = torch.arange(SEQ).expand(BATCH, -1) + 2
    for inputs in ({"attention_mask": LEFT}, {"attention_mask": RIGHT, "position_ids": positions}):
        want, got = (models.training_step(m, LLAMA.task, **inputs) for m in (stock, patched))
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.output, want.output)
    want, got = (models.generate(m.eval(), LLAMA.task, do_sample=False) for m in (stock, patched))
    assert got.tolist() == want.tolist()


def test_arguments_that_cannot_be_packed_go_the_way_of_peft():
    stock, patched = (models.prompt_model(LLAMA, patched=p).train() for p in (False, True))
    rows = rows_of(patched)
    for inputs in ({"output_attentions": True}, {"shift_labels": IDS.new_zeros(BATCH, PREFIX + SEQ)}):
        rows.clear()
        want = stock(input_ids=IDS, labels=IDS, **inputs).loss
        with pytest.warns(UserWarning, match=f"{next(iter(inputs))} .*the prompt put before every sample"):
            got = patched(input_ids=IDS, labels=IDS, **inputs).loss
        assert rows == [BATCH * (PREFIX + SEQ)]
        assert models.difference(got, want) <= FP32_TOLERANCE


def test_a_copy_is_a_patched_model_of_its_own():
    model = models.prompt_model(LLAMA, patched=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        models.peft_prefix(copied).zero_()
    want = models.training_step(models.prompt_model(LLAMA, patched=True), LLAMA.task)
    assert_same_step(models.training_step(model, LLAMA.task), want)
    assert not torch.equal(models.training_step(copied, LLAMA.task).loss, want.loss)
    assert peftkern.unpatch(copied) is copied


def test_adapters_can_be_added_and_switched_while_patched():
    losses = []
    for patched in (False, True):
        model = models.prompt_model(LLAMA, patched=patched)
        torch.manual_seed(5)
        model.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX + 2))
        model.set_adapter("longer")
        losses.append(model.train()(input_ids=IDS, labels=IDS).loss)
    assert models.difference(losses[1], losses[0]) <= FP32_TOLERANCE


def test_a_disabled_adapter_leaves_the_base_model():
    model = models.prompt_model(LLAMA, patched=True).eval()
    with torch.no_grad(), model.disable_adapter():
        got = model(input_ids=IDS, attention_mask=LEFT).logits
        want = models.base_model(LLAMA).eval()(input_ids=IDS, attention_mask=LEFT).logits
        assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama (GQA)", "bert"])
def test_unpatch_restores_to_the_bit(name):
    family = FAMILIES[name]
    model = models.prompt_model(family, patched=False).eval()
    before, attributes = model(input_ids=IDS, attention_mask=RIGHT).logits, set(vars(model))
    peftkern.patch(model)
    model(input_ids=IDS, attention_mask=RIGHT)
    peftkern.unpatch(model)
    assert set(vars(model)) == attributes
    assert torch.equal(model(input_ids=IDS, attention_mask=RIGHT).logits, before)


def test_positions_that_run_off_the_table_are_refused():
    model = models.prompt_model(FAMILIES["gpt2"], patched=True)
    ids = torch.ones(2, 60, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected at most 64 positions.*got 65, of which the prefix takes 5"):
        model(input_ids=ids)
