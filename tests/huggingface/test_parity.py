# SPDX-License-Identifier: Apache-2.0
"""A patched PEFT model compared with PEFT: outputs, all gradients and generated tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import peftkern
from peftkern.huggingface.prefix_patch import PrefixPatch
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, FP32_TOLERANCE, FP64_TOLERANCE, MASKS, PROJECTION, TASKS

BACKENDS = ("reference", "cpu")
GENERATION = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param not in peftkern.available_backends("cpu"):
        pytest.fail(f"the {request.param!r} kernels do not load here; `python -m peftkern doctor` says why")
    with peftkern.use_backend(request.param):
        yield request.param


def assert_parity(family, backend_dtype=torch.float32, tolerance=FP32_TOLERANCE, masks=MASKS, **config):
    stock = models.peft_model(family, patched=False, dtype=backend_dtype, **config)
    patched = models.peft_model(family, patched=True, dtype=backend_dtype, **config)
    assert isinstance(models.patch_of(patched), PrefixPatch), "PEFT's own code runs, which equals itself"
    for name, mask in masks.items():
        want = models.training_step(stock, family.task, mask)
        got = models.training_step(patched, family.task, mask)
        output, gradients = models.step_difference(got, want, mask if family.generates else None)
        assert output <= tolerance, f"mask {name}: outputs differ by {output:.1e}"
        assert gradients <= tolerance, f"mask {name}: gradients differ by {gradients:.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(name, backend):
    assert_parity(FAMILIES[name])


@pytest.mark.parametrize("name", ["llama (GQA)", "bert"])
def test_three_layers(name):
    """Of two, some sums are products too."""
    family = FAMILIES[name]
    assert_parity(dataclasses.replace(family, arguments={**family.arguments, "num_hidden_layers": 3}))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_type(name):
    assert_parity(TASKS[name])


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "t5", "bert"])
def test_projection_runs_once_with_the_gradients_of_many(name):
    assert_parity(FAMILIES[name], **PROJECTION)


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "bart"])
def test_cartridge_with_frozen_tokens(name):
    assert_parity(FAMILIES[name], num_frozen_tokens=2)


@pytest.mark.parametrize(
    "name", ["llama (GQA)", "mistral (window 4)", "gpt-oss (sinks)", "gpt2", "bert", "t5", "bart"]
)
def test_fp64_agrees_to_ten_digits(name):
    with peftkern.use_backend("reference"):
        assert_parity(FAMILIES[name], torch.float64, FP64_TOLERANCE, {"none": None, "left": models.LEFT})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_that_sees_nothing_is_zero_as_in_sdpa(implementation):
    """Padding longer than the window hides every key; stock eager attention then takes the mean of all values."""
    family = FAMILIES["mistral (window 4)"]
    ids = torch.randint(3, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    losses, gradients = [], []
    for attention, patched in (("sdpa", False), (implementation, True)):
        model = models.peft_model(family, patched=False).train()
        model.get_base_model().set_attn_implementation(attention)
        if patched:
            peftkern.patch(model)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(models.peft_prefix(model).grad)
    assert models.difference(losses[1], losses[0]) <= FP32_TOLERANCE
    assert models.difference(gradients[1], gradients[0]) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt-neox", "gpt2"])
def test_half_precision_base_keeps_an_fp32_prefix(name, backend):
    """The prefix is rounded when it is read; its gradient is at least as exact as PEFT's."""
    family = FAMILIES[name]
    exact = models.training_step(
        models.peft_model(family, patched=False, dtype=torch.bfloat16).double(), family.task, models.RIGHT
    )
    errors = []
    for patched in (False, True):
        model = models.peft_model(family, patched=patched, dtype=torch.bfloat16)
        step = models.training_step(model, family.task, models.RIGHT)
        assert models.peft_prefix(model).grad.dtype == torch.float32
        errors.append(models.step_difference(step, exact, models.RIGHT))
    (stock_output, stock_gradients), (output, gradients) = errors
    floor = torch.finfo(torch.bfloat16).eps
    assert output <= 2 * stock_output + floor, f"outputs: {output:.1e}, PEFT {stock_output:.1e}"
    assert gradients <= 3 * stock_gradients + floor, f"gradients: {gradients:.1e}, PEFT {stock_gradients:.1e}"


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generated_tokens_are_those_of_peft(name, mode):
    family = FAMILIES[name]
    stock = models.peft_model(family, patched=False).eval()
    patched = models.peft_model(family, patched=True).eval()
    want = models.generate(stock, family.task, **GENERATION[mode])
    got = models.generate(patched, family.task, **GENERATION[mode])
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt2", "mistral (window 64)"])
def test_generation_without_cache_where_peft_can(name):
    family = FAMILIES[name]
    want, got = (
        models.generate(models.peft_model(family, patched=p).eval(), family.task, do_sample=False, use_cache=False)
        for p in (False, True)
    )
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_gradient_mode_are_independent(training, grad):
    family = FAMILIES["llama (GQA)"]
    outputs = []
    for patched in (False, True):
        model = models.peft_model(family, patched=patched).train(training)
        with torch.set_grad_enabled(grad):
            out = model(input_ids=models.IDS, attention_mask=models.LEFT, labels=models.IDS)
        if grad:
            out.loss.backward()
            outputs.append(models.peft_prefix(model).grad)
        else:
            outputs.append(out.loss)
    assert models.difference(outputs[1], outputs[0]) <= FP32_TOLERANCE


def test_explicit_positions_are_shifted_once():
    family = FAMILIES["llama (GQA)"]
    positions = (models.LEFT.cumsum(-1) - 1).clamp_min(0)
    want, got = (
        models.peft_model(family, patched=p)(
            input_ids=models.IDS, attention_mask=models.LEFT, position_ids=positions
        ).logits[models.LEFT.bool()]
        for p in (False, True)
    )
    assert models.difference(got, want) <= FP32_TOLERANCE


def test_inputs_embeds():
    family = FAMILIES["gpt2"]
    want, got = (
        model(inputs_embeds=model.get_base_model().get_input_embeddings()(models.IDS)).logits
        for model in (models.peft_model(family, patched=p) for p in (False, True))
    )
    assert models.difference(got, want) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_layers_share_prefixes_as_in_peft_unless_fixed(name):
    """PEFT reads the keys of decoder layer l from block 4l mod 2L; half of the parameter has no gradient."""
    family = FAMILIES[name]
    model = models.peft_model(family, patched=True)
    models.training_step(model, family.task)
    used = models.peft_prefix(model).grad.view(models.PREFIX, -1, 64).abs().amax((0, 2)) > 0
    assert used.tolist() == [block % 4 < 2 for block in range(len(used))]

    peftkern.unpatch(model)
    peftkern.patch(model, fix_seq2seq_layout=True)
    models.training_step(model, family.task)
    used = models.peft_prefix(model).grad.view(models.PREFIX, -1, 64).abs().amax((0, 2)) > 0
    assert used.all(), "every layer has a prefix of its own"
