# SPDX-License-Identifier: Apache-2.0
"""Unusual models: the results are PEFT's, or the refusal gives the reason."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern import PrefixKV
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, assert_close, token_rows
from tests.huggingface.models import FAMILIES, IDS, LEFT, ONES, PREFIX, RIGHT, SEQ
from tests.huggingface.uncommon import STOCK_FAILS, UNCOMMON, inputs_of, labels_of, tuned

pytestmark = [
    pytest.mark.filterwarnings("ignore:peftkern:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

PAIRS = [(name, kind) for name in UNCOMMON for kind in ("prefix", "prompt") if (name, kind) not in STOCK_FAILS]
MASKS = {"none": None, "right": RIGHT, "left": LEFT}
DECODERS = [name for name, family in UNCOMMON.items() if family.task == "CAUSAL_LM"]
REFUSAL = ("attention", "cache", "mask", "layer", "keys")
"""The reason why a model cannot have a prefix contains one of these words."""


def more_of(name, kind):
    return inputs_of(name, SEQ + PREFIX if kind == "prompt" else SEQ)


def pefts_bugs(kind, padding):
    """PEFT puts padding on the left between prompt and tokens."""
    return {"peft_bugs": True} if (kind, padding) == ("prompt", "left") else {}


@pytest.mark.parametrize(
    ("padding", "labelled"), [("none", "tokens"), ("right", "tokens"), ("right", "all"), ("left", "tokens")]
)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_training_steps_are_those_of_peft(name, kind, padding, labelled):
    task, mask, labels = UNCOMMON[name].task, MASKS[padding], labels_of(name)
    if labelled == "tokens" and mask is not None and task == "CAUSAL_LM":
        labels = labels.masked_fill(mask == 0, -100)
    elif labelled == "tokens":
        labels = labels.masked_fill(labels == labels[0, 1], -100)
    steps = []
    for patched in (False, True):
        options = pefts_bugs(kind, padding) if patched else {}
        model = tuned(name, kind, patched=patched, **options)
        steps.append(models.training_step(model, task, mask, labels=labels, **more_of(name, kind)))
    want, got = steps
    assert_close(got.loss, want.loss, "loss")
    assert got.output.shape == want.output.shape
    rows = ...
    if mask is not None and task == "CAUSAL_LM":
        rows = (models.behind_prompt(mask) if want.output.shape[1] > SEQ else mask).bool()
    assert_close(got.output[rows], want.output[rows], "logits")
    by_hand.assert_same_gradients(got.gradients, want.gradients)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)], ids=["greedy", "beam"]
)
@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair != ("idefics", "prompt")])
def test_generated_tokens_are_those_of_peft(name, kind, options):
    results = []
    for patched in (False, True):
        out = tuned(name, kind, patched=patched).eval().generate(
            input_ids=IDS, attention_mask=ONES, max_new_tokens=4, return_dict_in_generate=True, output_logits=True,
            **{**GREEDY, **options}, **inputs_of(name),
        )  # fmt: skip
        results.append(out)
    want, got = results
    assert got.sequences.tolist() == want.sequences.tolist()
    for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert_close(a, b, f"logits of new token {step}", 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["diffllama", "biogpt", "doge", "stablelm", "mllama", "paligemma"])
def test_a_prefix_generates_behind_padding_as_in_peft(name, padding):
    mask, results = MASKS[padding], []
    for patched in (False, True):
        model = tuned(name, "prefix", patched=patched).eval()
        out = model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
            **GREEDY,
        )  # fmt: skip
        results.append(torch.stack(out.logits))
    assert_close(results[1], results[0], "logits of the new tokens", 1e-4)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_model_says_how_it_runs(name, kind):
    """The explanation says that it runs faster, or why it runs PEFT's code."""
    text = peftkern.explain(tuned(name, kind, patched=True))
    assert len(text) > 20
    assert "LazyMask" not in text, "the reason mentions internal objects"


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_in_a_plain_model_is_right_or_refused(name):
    """The reference is a stock cache with the prefix, which some models do not support."""
    family = UNCOMMON[name]
    heads = 4 if name in ("biogpt", "idefics", "deepseek-v3") else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prefix = PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=heads, head_dim=16, std=1.0)
    for mask in (None, RIGHT, LEFT):
        inputs, stock = inputs_of(name), models.base_model(family).eval()
        try:
            with torch.no_grad():
                want = by_hand.with_prefix(stock, prefix, IDS, mask, **inputs).logits
        except Exception as error:  # the model does not support a prefix in a stock cache, so there is no reference
            message = str(error)
            assert by_hand.refused(lambda: peftkern.patch(models.base_model(family), prefix), *REFUSAL), message
            return
        keep = (ONES if mask is None else mask).bool()

        def logits(mask=mask, inputs=inputs, keep=keep):
            model = models.base_model(family).eval()
            with torch.no_grad(), peftkern.patched(model, prefix):
                return model(input_ids=IDS, attention_mask=mask, **inputs).logits[keep]

        by_hand.same_or_named(logits, want[keep], *REFUSAL, what="logits")


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "idefics"])
def test_a_soft_prompt_in_a_plain_model(name):
    """Concatenation works on every model that takes ``inputs_embeds``."""
    family = UNCOMMON[name]
    for mask in (None, RIGHT):
        labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
        stock, prompt = models.base_model(family).requires_grad_(False).train(), by_hand.soft_prompt()
        want = by_hand.with_prompt(stock, prompt.weight, IDS, mask, labels)
        (want_gradient,) = torch.autograd.grad(want.loss, prompt.weight)
        model = peftkern.patch(models.base_model(family), prompt, freeze=True).train()
        got = model(input_ids=IDS, attention_mask=mask, labels=labels)
        (gradient,) = torch.autograd.grad(got.loss, prompt.weight)
        peftkern.unpatch(model)
        assert_close(got.loss.detach(), want.loss.detach(), "loss")
        keep = (ONES if mask is None else mask).bool()
        assert_close(got.logits.detach()[keep], token_rows(want.logits.detach(), SEQ)[keep], "logits")
        assert_close(gradient, want_gradient, "gradient of the prompt", 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "idefics"])
def test_a_soft_prompt_generates_in_a_plain_model(name):
    stock = models.base_model(UNCOMMON[name]).eval()
    want = by_hand.greedy(lambda ids: by_hand.with_prompt(stock, by_hand.prompt_values(), ids).logits, IDS, 4)
    model = peftkern.patch(models.base_model(UNCOMMON[name]), by_hand.soft_prompt()).eval()
    assert model.generate(input_ids=IDS, max_new_tokens=4, **GREEDY).tolist() == want


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["none", "right"])
@pytest.mark.parametrize("name", ["t5", "bart", "longt5", "t5gemma", "bigbird-pegasus", "encoder-decoder (bert)"])
def test_a_soft_prompt_before_the_encoder(name, mask):
    """As in PEFT's prompt tuning, labels belong to the decoder and do not change."""
    family = {**FAMILIES, **UNCOMMON}[name]
    prompt = by_hand.soft_prompt()
    stock = models.base_model(family).requires_grad_(False).train()
    tokens = stock.get_input_embeddings()(IDS)
    embeds = torch.cat([prompt.weight.expand(len(IDS), -1, -1), tokens], 1)
    if name.startswith("encoder-decoder"):  # it counts the columns of the mask for its cross attention
        mask = ONES if mask is None else mask
    want = stock(inputs_embeds=embeds, attention_mask=models.behind_prompt(mask), labels=models.TARGETS)
    (want_gradient,) = torch.autograd.grad(want.loss, prompt.weight)
    model = peftkern.patch(models.base_model(family), prompt, freeze=True).train()
    got = model(input_ids=IDS, attention_mask=mask, labels=models.TARGETS)
    (gradient,) = torch.autograd.grad(got.loss, prompt.weight)
    assert_close(got.loss.detach(), want.loss.detach(), "loss")
    assert_close(got.logits.detach(), want.logits.detach(), "logits")
    assert_close(gradient, want_gradient, "gradient of the prompt", 1e-4)


# Positions that the caller gives, and padding on the left


@pytest.mark.parametrize("places", ["of tokens", "of columns", "shifted"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["opt", "llama (GQA)", "gpt2", "qwen3"])
def test_explicit_positions_with_a_prefix(name, padding, places):
    family, mask = FAMILIES[name], MASKS[padding]
    held = ONES if mask is None else mask
    position_ids = {
        "of tokens": (held.cumsum(1) - 1).clamp_min(0),
        "of columns": torch.arange(SEQ).expand(len(IDS), -1),
        "shifted": torch.arange(SEQ).expand(len(IDS), -1) + 2,
    }[places]
    labels = IDS.masked_fill(held == 0, -100)
    want, got = (
        models.training_step(
            models.peft_model(family, patched=patched), family.task, mask, labels=labels, position_ids=position_ids
        )
        for patched in (False, True)
    )
    assert_close(got.loss, want.loss, "loss")
    assert_close(got.output[held.bool()], want.output[held.bool()], "logits")
    by_hand.assert_same_gradients(got.gradients, want.gradients)


# Inputs other than text


IMAGE_IDS = IDS.clone()
IMAGE_IDS[:, :4] = models.VOCAB
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_paligemma_with_images(kind, padding):
    mask, steps = MASKS[padding], []
    for patched in (False, True):
        model = tuned("paligemma", kind, patched=patched)
        inputs = {"input_ids": IMAGE_IDS, "pixel_values": IMAGES, "labels": IDS}
        steps.append(models.training_step(model, "CAUSAL_LM", mask, **inputs))
    assert_close(steps[1].loss, steps[0].loss, "loss")
    by_hand.assert_same_gradients(steps[1].gradients, steps[0].gradients)


@pytest.mark.parametrize("padding", MASKS)
def test_mllama_with_images(padding):
    """A layer in the middle attends to states of the image only, and has no prefix."""
    states = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(8))
    mask, steps = MASKS[padding], []
    for patched in (False, True):
        model = tuned("mllama", "prefix", patched=patched)
        steps.append(models.training_step(model, "CAUSAL_LM", mask, cross_attention_states=states, labels=IDS))
    assert_close(steps[1].loss, steps[0].loss, "loss")
    by_hand.assert_same_gradients(steps[1].gradients, steps[0].gradients)
