# SPDX-License-Identifier: Apache-2.0
"""Hooks, callers and own losses see the shape of the batch, although the layers run packed rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.cache_utils import Cache

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, METHODS, assert_close, token_rows
from tests.huggingface.models import (
    BATCH,
    FAMILIES,
    IDS,
    LEFT,
    MASKS,
    ONES,
    PREFIX,
    PROMPTS,
    RIGHT,
    SEQ,
    TASK_IDS,
    TASKS,
)

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LABELS = IDS.masked_fill(RIGHT == 0, -100)


# The embedding sees [B, S]


def noisy(embedding, seen):
    """NEFTune's hook: noise of the shape of the embeddings, whose size depends on the number of tokens."""

    def hook(module, args, output):
        seen.append(tuple(output.shape))
        generator = torch.Generator().manual_seed(11)
        size = 5.0 / (output.shape[1] * output.shape[2]) ** 0.5
        return output + (torch.rand(output.shape, generator=generator) * 2 - 1) * size

    return embedding.register_forward_hook(hook)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("padding", ["none", "ones", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_noise_at_the_embedding(method, padding, order):
    mask, expected, seen = MASKS[padding], [], []
    native = method.startswith("native")
    stock = models.base_model(LLAMA) if native else by_hand.build(method, patched=False)
    noisy(stock.train().get_input_embeddings(), expected)
    if method == "native prefix":
        want = by_hand.with_prefix(stock, by_hand.llama_prefix(), IDS, mask, labels=LABELS)
    elif method == "native prompt":
        want = by_hand.with_prompt(stock, by_hand.prompt_values(), IDS, mask, LABELS)
    else:
        want = stock(input_ids=IDS, attention_mask=mask, labels=LABELS)
    model = models.base_model(LLAMA) if native else by_hand.build(method, patched=False)
    if order == "before":
        noisy(model.get_input_embeddings(), seen)
    if native:
        peftkern.patch(model, by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt())
    else:
        peftkern.patch(model)
    if order == "after":
        noisy(model.get_input_embeddings(), seen)
    seen.clear()
    got = model.train()(input_ids=IDS, attention_mask=mask, labels=LABELS)
    assert seen == expected == [(BATCH, SEQ, 64)], f"the embedding saw {seen}, in the stock model {expected}"
    assert_close(got.loss.detach(), want.loss.detach(), "loss")


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_before_the_embedding_sees_the_batch_of_ids(method):
    model, seen = by_hand.build(method).train(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=IDS, attention_mask=RIGHT, labels=LABELS)
    assert len(seen) == 1
    assert torch.equal(seen[0], IDS), "the embedding was called with something other than the batch"


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "opt", "gemma2 (softcap)", "gemma3n (shared KV)"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_noise_at_the_embedding_of_other_families(name, kind):
    """Some models scale embeddings, project them, or add position embeddings."""
    make, losses, calls = getattr(models, "peft_model" if kind == "prefix" else "prompt_model"), [], []
    for patched in (False, True):
        model, seen = make(FAMILIES[name], patched=patched).train(), []
        noisy(model.get_input_embeddings(), seen)
        losses.append(model(input_ids=IDS, attention_mask=RIGHT, labels=LABELS).loss.detach())
        calls.append(seen)
    assert calls[1] == calls[0], "the embedding saw other shapes than in the stock model"
    assert_close(losses[1], losses[0], "loss")


def test_hooks_on_backbone_and_output_layer_see_the_batch():
    """Their outputs, and those of the model, are [B, P + S, ...] with a prompt and [B, S, ...] with a prefix."""
    for method, rows in (("peft prompt", PREFIX + SEQ), ("peft prefix", SEQ)):
        model, seen = by_hand.build(method).train(), {}
        base = model.get_base_model()
        base.register_forward_hook(lambda module, args, out, seen=seen: seen.update(model=out.logits.shape))
        base.model.register_forward_hook(lambda module, args, out, seen=seen: seen.update(backbone=out[0].shape))
        base.lm_head.register_forward_hook(lambda module, args, out, seen=seen: seen.update(head=out.shape))
        model(input_ids=IDS, attention_mask=RIGHT)
        for name, width in (("backbone", 64), ("head", 97), ("model", 97)):
            assert tuple(seen[name]) == (BATCH, rows, width), f"{method}: the output of {name} is {seen[name]}"


# One adapter for each sample


def mixed_lora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = get_peft_model(models.base_model(LLAMA), LoraConfig(target_modules=["q_proj", "v_proj"], **config))
        model.add_adapter("other", LoraConfig(target_modules=["q_proj", "lm_head"], **config))
    return model.eval()


NAMES = ["default", "other", "__base__"]


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "ones", "right", "left"])
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_samples_with_adapters_of_their_own(method, padding):
    mask, stock, model = MASKS[padding], mixed_lora(), mixed_lora()
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    more = {"adapter_names": NAMES}
    if padding == "left" and method == "native prompt":  # the sequence begins right behind the prompt
        places = (LEFT.cumsum(1) - 1).clamp_min(0) + PREFIX
        prompt_places = torch.arange(PREFIX).expand(BATCH, -1)
        more["position_ids"] = torch.cat([prompt_places, places], 1)
    if method == "native prefix":
        want = by_hand.with_prefix(stock, learned, IDS, mask, **more)
    else:
        want = by_hand.with_prompt(stock, by_hand.prompt_values(), IDS, mask, **more)
    peftkern.patch(model, learned)
    got = model(input_ids=IDS, attention_mask=mask, adapter_names=NAMES).logits
    keep = (ONES if mask is None else mask).bool()
    assert_close(got[keep], token_rows(want.logits, SEQ)[keep], "logits")


@torch.no_grad()
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_generation_with_adapters_of_their_own(method):
    stock, model = mixed_lora(), mixed_lora()
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()

    def logits(ids):
        if method == "native prefix":
            return by_hand.with_prefix(stock, learned, ids, adapter_names=NAMES).logits
        return by_hand.with_prompt(stock, by_hand.prompt_values(), ids, adapter_names=NAMES).logits

    want = by_hand.greedy(logits, IDS, 4)
    peftkern.patch(model, learned)
    assert model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=4, **GREEDY).tolist() == want


# Outputs have the fields, the order and the shapes of PEFT's


def structure(output):
    """Names (or places) and shapes; a cache is a cache."""

    def shape(value):
        if isinstance(value, Cache):
            return "cache"
        if isinstance(value, torch.Tensor):
            return list(value.shape)
        return [shape(item) for item in value]

    if hasattr(output, "items"):
        return [(name, shape(value)) for name, value in output.items()]
    return [shape(value) for value in output]


def tensors(output):
    values = output.values() if hasattr(output, "values") else output
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif not isinstance(value, Cache):
            yield from value


OUTPUTS = {"llama CAUSAL_LM": LLAMA, **{name: family for name, family in TASKS.items() if "llama" in name}}
STOCK_RAISES = {  # (kind, task)
    ("MULTITASK_PROMPT_TUNING", "QUESTION_ANS"), ("MULTITASK_PROMPT_TUNING", "FEATURE_EXTRACTION"),
}  # fmt: skip
PAIRS = [
    (kind, name)
    for kind in ("PREFIX", *PROMPTS)
    for name, family in OUTPUTS.items()
    if (kind, family.task) not in STOCK_RAISES and (kind != "CPT" or family.task == "CAUSAL_LM")
]


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False], ids=["dict", "tuple"])
@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_outputs_have_the_fields_and_shapes_of_peft(kind, name, labelled, return_dict):
    family = OUTPUTS[name]
    if labelled and ((family.task == "TOKEN_CLS" and kind != "PREFIX") or (kind == "CPT" and not return_dict)):
        pytest.skip("stock PEFT raises")
    outputs = []
    for patched in (False, True):
        make = models.peft_model if kind == "PREFIX" else models.prompt_model
        model = make(family, **({} if kind == "PREFIX" else {"kind": kind}), patched=patched).eval()
        inputs = models.labels_of(family.task) if labelled else {}
        if kind.startswith("MULTITASK"):
            inputs["task_ids"] = TASK_IDS
        outputs.append(model(input_ids=IDS, output_hidden_states=True, return_dict=return_dict, **inputs))
    want, got = outputs
    assert structure(got) == structure(want)
    for index, (a, b) in enumerate(zip(tensors(got), tensors(want), strict=True)):
        assert_close(a, b, f"tensor {index} of the output")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "CPT", "PREFIX"])
def test_the_first_output_of_a_training_step_is_the_loss(kind):
    """``Trainer`` without a label smoother, and many loops, take ``outputs[0]``."""
    losses = []
    for patched in (False, True):
        make = models.peft_model if kind == "PREFIX" else models.prompt_model
        model = make(LLAMA, **({} if kind == "PREFIX" else {"kind": kind}), patched=patched).train()
        output = model(input_ids=IDS, attention_mask=RIGHT, labels=IDS.clone())
        assert output[0].dim() == 0, f"outputs[0] is {list(output[0].shape)}, not the loss"
        assert output[0] is output.loss
        assert list(output)[:2] == ["loss", "logits"]
        losses.append(output[0].detach())
    assert_close(losses[1], losses[0], "loss")


# Without labels, callers may read outputs at padding


def own_loss(outputs):
    """A loss of every row, including padding, and of neighbouring rows."""
    logits = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    weights = torch.linspace(0.2, 1.0, logits.shape[1])[None, :, None]
    return (logits * weights).logsumexp(-1).mean() + (logits[:, 1:] - logits[:, :-1]).square().mean()


def assert_same_unlabelled_step(make, mask, where, **inputs):
    """Outputs of all rows (or of tokens), the own loss and its gradients."""
    steps = []
    for patched in (False, True):
        model = make(patched).train()
        out = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True, **inputs)
        loss = own_loss(out)
        loss.backward()
        steps.append((out, loss.detach(), by_hand.gradients(model)))
    (want, want_loss, want_gradients), (got, got_loss, got_gradients) = steps
    first = "logits" if "logits" in want else "last_hidden_state"
    assert_close(got[first].detach(), want[first].detach(), f"{first} {where}")
    assert len(got.hidden_states) == len(want.hidden_states)
    for index, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert_close(a.detach(), b.detach(), f"hidden states {index} {where}")
    assert_close(got_loss, want_loss, "own loss")
    by_hand.assert_same_gradients(got_gradients, want_gradients)


@pytest.mark.parametrize("padding", ["right", "left", "ones"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "mistral (window 4)", "opt"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_own_losses_on_the_logits(kind, name, padding):
    """With ``peft_bugs`` for prompts with padding on the left, where PEFT's positions differ."""
    make = models.peft_model if kind == "prefix" else models.prompt_model
    options = {"peft_bugs": True} if (kind, padding) == ("prompt", "left") else {}

    def build(patched):
        model = make(FAMILIES[name], patched=False)
        return peftkern.patch(model, **options) if patched else model

    assert_same_unlabelled_step(build, MASKS[padding], f"with {padding} padding")


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("task", ["llama FEATURE_EXTRACTION", "bert FEATURE_EXTRACTION"])
def test_own_losses_on_hidden_states(task, padding):
    def build(patched):
        return models.peft_model(TASKS[task], patched=patched)

    if task.startswith("llama") or padding == "right":
        assert_same_unlabelled_step(build, MASKS[padding], f"with {padding} padding")


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_own_losses_in_plain_models(method, padding):
    mask, base = MASKS[padding], models.base_model(LLAMA).train()
    more = {"output_hidden_states": True}
    if (method, padding) == ("native prompt", "left"):
        places = (LEFT.cumsum(1) - 1).clamp_min(0) + PREFIX
        more["position_ids"] = torch.cat([torch.arange(PREFIX).expand(BATCH, -1), places], 1)
    with torch.no_grad():
        if method == "native prefix":
            want = by_hand.with_prefix(base, by_hand.llama_prefix(), IDS, mask, **more)
        else:
            want = by_hand.with_prompt(base, by_hand.prompt_values(), IDS, mask, **more)
    got = by_hand.build(method).train()(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
    # There is no convention for positions of padding before the first token.
    keep = mask.bool() if "position_ids" in more else torch.ones_like(mask).bool()
    assert_close(got.logits.detach()[keep], token_rows(want.logits, SEQ)[keep], "logits")
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_close(token_rows(a.detach(), SEQ)[keep], token_rows(b, SEQ)[keep], "hidden states")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_labelled_logits_without_labels_are_all_logits(kind):
    """``logits="labelled"`` only affects steps with labels."""
    make = models.peft_model if kind == "prefix" else models.prompt_model

    def build(patched):
        model = make(LLAMA, patched=False)
        return peftkern.patch(model, logits="labelled") if patched else model

    assert_same_unlabelled_step(build, RIGHT, "with right padding")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_layers_of_the_backbone_keep_gradients_of_every_token(kind):
    """A parameter of the base model is trained together with the prefix, by an own loss that reads padding."""
    results = []
    for patched in (False, True):
        make = models.peft_model if kind == "prefix" else models.prompt_model
        model = make(LLAMA, patched=False)
        trained = model.get_base_model().model.norm.weight.requires_grad_(True)
        if patched:
            peftkern.patch(model)
        own_loss(model.train()(input_ids=IDS, attention_mask=RIGHT)).backward()
        results.append(trained.grad)
    assert isinstance(trained, nn.Parameter)
    assert_close(results[1], results[0], "gradient of the last norm", 1e-4)
