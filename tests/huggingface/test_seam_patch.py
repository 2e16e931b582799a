# SPDX-License-Identifier: Apache-2.0
"""``patch`` runs a trial without side effects, and warns once where it falls back to PEFT's code."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, METHODS, assert_close, notices
from tests.huggingface.models import FAMILIES, IDS, ONES, PREFIX, RIGHT, SEQ
from tests.huggingface.uncommon import UNCOMMON, tuned

FALLBACKS = [
    ("diffllama", "prefix"), ("stablelm", "prefix"), ("nemotron", "prefix"), ("stablelm", "prompt"),
    ("qwen3.5", "prompt"), ("deepseek-v3", "prompt"), ("jamba", "prompt"),
]  # fmt: skip
"""PEFT models that no kernel supports. Remove a model from this list when a kernel supports it."""
UNSERVED = [("stablelm", "prefix"), ("jamba", "prompt")]


def stock_of(method):
    """(model before patch, a function that patches it)."""
    if method.startswith("peft"):
        model = (models.peft_model if method == "peft prefix" else models.prompt_model)(LLAMA, patched=False)
        return model, lambda: peftkern.patch(model)
    model = models.base_model(LLAMA)
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    return model, lambda: peftkern.patch(model, learned)


# The trial has no side effects


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_patch_draws_no_random_number(method, training):
    model, patch = stock_of(method)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    patch()
    peftkern.unpatch(model)
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's random state is another"
    assert random.getstate() == before[1], "Python's random state is another"
    assert (np.random.get_state()[1] == before[2]).all(), "NumPy's random state is another"


def tensors_of(model):
    """Parameters and buffers, including those that are not in ``state_dict``."""
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


class CountingNorm(nn.Module):
    """It records statistics of its inputs in training and eval mode, like quantisation observers."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def forward(self, hidden):
        self.calls += 1
        self.largest = torch.maximum(self.largest, hidden.detach().abs().max())
        return self.norm(hidden)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_patch_changes_no_parameter_no_buffer_and_no_mode(method, training):
    model, patch = stock_of(method)
    base = model.get_base_model() if method.startswith("peft") else model
    base.model.norm = CountingNorm(base.model.norm)
    model.train(training)
    base.model.layers[0].train(not training)  # a frozen part that its owner keeps in another mode
    before, modes = tensors_of(model), {name: m.training for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    patch()
    learned = {name for name in tensors_of(model) if "peftkern" in name}
    after = tensors_of(model)
    assert after.keys() - learned == before.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert not changed, f"patch changed {changed}"
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    assert all(p.grad is None for p in model.parameters()), "the trial left gradients"


@pytest.mark.parametrize("name", ["qwen2", "gemma3n (shared KV)", "gpt2", "t5", "gpt-oss (sinks)", "llama4 (chunks)"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_patch_changes_no_buffer_of_other_families(name, kind):
    make = models.peft_model if kind == "prefix" else models.prompt_model
    model = make(FAMILIES[name], patched=False)
    before, state = tensors_of(model), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftkern.patch(model)
    after = tensors_of(model)
    assert [key for key in before if not torch.equal(after[key], before[key])] == []
    assert torch.equal(torch.get_rng_state(), state)


def test_dynamic_rotary_frequencies_are_those_of_before():
    """They are buffers that a forward at longer positions replaces."""
    for kind in (PrefixTuningConfig, PromptTuningConfig):
        config = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        base = models.base_model(LLAMA, max_position_embeddings=8, rope_parameters=config)
        model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
        before = tensors_of(model)
        peftkern.patch(model)
        after = tensors_of(model)
        assert [key for key in before if not torch.equal(after[key], before[key])] == []
        assert base.model.rotary_emb.max_seq_len_cached == 8


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_user_see_no_more_after_the_trial(method):
    """Existing hooks may run in the trial, and keep their place afterwards."""
    model, patch = stock_of(method)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    patch()
    calls.clear()
    model(input_ids=IDS)
    assert calls == [1]
    handle.remove()


# Transient errors of the trial are raised


class Failing(nn.Module):
    """A module that raises out of memory at one of its calls."""

    def __init__(self, inner, error, call=0):
        super().__init__()
        self.inner = inner
        self.error = error
        self.calls_left = call

    def forward(self, *args, **kwargs):
        self.calls_left -= 1
        if self.calls_left == -1:
            raise self.error
        return self.inner(*args, **kwargs)


ERRORS = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "cpu allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "interrupt": KeyboardInterrupt(),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", METHODS)
def test_a_transient_error_in_the_trial_is_raised(method, error):
    model, patch = stock_of(method)
    base = model.get_base_model() if method.startswith("peft") else model
    layer = base.model.layers[1]
    whole, layer.mlp = layer.mlp, Failing(layer.mlp, ERRORS[error])
    attributes, hooks = set(vars(model)), len(base._forward_pre_hooks)
    with notices() as found, pytest.raises(type(ERRORS[error])) as caught:
        patch()
    assert caught.value is ERRORS[error] or str(ERRORS[error]) in str(caught.value)
    assert not found, "an error of the moment was taken for an answer"
    assert set(vars(model)) == attributes, "a failed patch left attributes"
    assert len(base._forward_pre_hooks) == hooks, "a failed patch left hooks"
    layer.mlp = whole
    patch()
    truth = by_hand.truth(method)(IDS).logits.detach()
    assert_close(model.eval()(input_ids=IDS).logits.detach(), by_hand.token_rows(truth, SEQ)
                 if method == "native prompt" else truth, "logits of the second try")  # fmt: skip


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("method", METHODS)
def test_an_error_at_any_forward_of_the_trial_is_raised(method, call):
    """Also after the stock model has run, while the patched model is tried."""
    model, patch = stock_of(method)
    base = model.get_base_model() if method.startswith("peft") else model
    layer, error = base.model.layers[1], ERRORS["out of memory"]
    layer.mlp = failing = Failing(layer.mlp, error, call)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with notices() as found:
        try:
            patch()
        except torch.OutOfMemoryError:
            assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        else:
            assert failing.calls_left >= 0, "the error was taken for an answer"
    assert not found, "an error of the moment was taken for an answer"


# The fallback is PEFT, with one warning


@pytest.mark.parametrize(("name", "kind"), FALLBACKS)
def test_a_fallback_is_noticed_once_and_explained(name, kind):
    model, task = tuned(name, kind, patched=False), UNCOMMON[name].task
    with notices() as found:
        peftkern.patch(model)
        for mask in (None, RIGHT):
            models.training_step(model, task, mask)
        model.eval()(input_ids=IDS)
        model.generate(input_ids=IDS, attention_mask=ONES, max_new_tokens=2, **GREEDY)
    kind_of_model = type(model.get_base_model()).__name__.removesuffix("ForCausalLM")
    text = peftkern.explain(model)
    if not found:
        assert "PEFT" not in text, f"explain speaks of PEFT's way, but there was no notice: {text}"
        return
    assert len(found) == 1, f"expected one notice, got {found}"
    assert "PEFT" in found[0], f"the notice does not say that PEFT's code runs: {found[0]}"
    assert kind_of_model in found[0], f"the notice does not name the model: {found[0]}"
    reason = found[0].split(":", 1)[1].strip()
    assert len(reason) > 20, f"the notice gives no reason: {found[0]}"
    assert "PEFT" in text, f"explain does not say that PEFT's code runs: {text}"
    if kind == "prompt":
        assert "prefix" not in found[0].replace("prefix tuning", ""), "the reason speaks of a prefix"


@pytest.mark.parametrize(("name", "kind"), UNSERVED)
def test_the_notice_comes_again_for_another_model(name, kind):
    """Python hides a repeated warning, but each patched model must warn."""
    counts = []
    for _ in range(2):
        model = tuned(name, kind, patched=False)
        with notices() as found:
            peftkern.patch(model)
        counts.append(len(found))
    assert counts == [1, 1]


@pytest.mark.parametrize(("name", "kind"), FALLBACKS)
def test_strict_raises_in_place_of_the_fallback(name, kind):
    model = tuned(name, kind, patched=False)
    before = set(vars(model))
    with notices() as found:
        try:
            peftkern.patch(model, strict=True)
        except ValueError as error:
            message = str(error)
        else:
            assert "PEFT" not in peftkern.explain(model), "strict=True took PEFT's way"
            return
    assert not found, "raised and noticed"
    assert len(message) > 40, f"no reason: {message}"
    assert "strict" not in message or "PEFT" in message
    assert set(vars(model)) == before, "a refused patch left attributes"


@pytest.mark.parametrize("method", METHODS)
def test_strict_changes_nothing_where_no_fallback_is_needed(method):
    want = by_hand.truth(method)(IDS).logits.detach()
    with notices() as found:
        if method.startswith("peft"):
            model = peftkern.patch(stock_of(method)[0], strict=True).eval()
        else:
            model = by_hand.build(method, strict=True).eval()
        got = model(input_ids=IDS).logits.detach()
    assert not found
    assert_close(by_hand.token_rows(got, SEQ), by_hand.token_rows(want, SEQ), "logits")
    assert len(peftkern.explain(model)) > 20


CALLS = {
    "attentions": {"output_attentions": True},
    "last logits": {"logits_to_keep": 3},
    "some logits": {"logits_to_keep": torch.tensor([1, 2])},
    "cache and labels": {"use_cache": True, "labels": IDS},
    "no cache": {"use_cache": False},
}


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_call_that_cannot_be_sped_up_runs_as_in_peft(kind, call):
    outputs, make = [], models.peft_model if kind == "prefix" else models.prompt_model
    for patched in (False, True):
        model = make(LLAMA, patched=False).eval()
        model.get_base_model().set_attn_implementation("eager")
        if patched:
            peftkern.patch(model)
        outputs.append(None)

        def run(model=model):
            for mask in (None, ONES):
                outputs[-1] = model(input_ids=IDS, attention_mask=mask, **CALLS[call])

        with notices() as found:
            if by_hand.refused(run, *CALLS[call]):  # by the name of the argument
                return
    assert len(found) <= 1, f"expected one notice at most, got {found}"
    want, got = outputs
    assert list(got) == list(want), "the output has other fields"
    assert_close(got.logits, want.logits, "logits")
    for index, (a, b) in enumerate(zip(got.attentions or (), want.attentions or (), strict=True)):
        assert_close(a, b, f"attentions of layer {index}")


@pytest.mark.parametrize(("name", "kind"), UNSERVED)
def test_unpatch_after_a_fallback_leaves_what_was_there(name, kind):
    model = tuned(name, kind, patched=False).eval()
    with torch.no_grad():
        want, before = model(input_ids=IDS).logits, {n: set(vars(m)) for n, m in model.named_modules()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peftkern.patch(model)
            peftkern.unpatch(model)
        assert {n: set(vars(m)) for n, m in model.named_modules()} == before
        assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize("name", ["stablelm", "qwen3.5", "deepseek-v3"])
def test_a_soft_prompt_that_is_concatenated_is_noticed_once(name):
    with notices() as found:
        model = peftkern.patch(models.base_model(UNCOMMON[name]), by_hand.soft_prompt())
        model(input_ids=IDS, labels=IDS)
    if found:
        assert len(found) == 1, f"expected one notice, got {found}"
        assert type(model).__name__ in found[0]
    model = models.base_model(UNCOMMON[name])
    with notices(), torch.no_grad():
        if not by_hand.refused(lambda: peftkern.patch(model, by_hand.soft_prompt(), strict=True), "prompt"):
            model(input_ids=IDS)


@pytest.mark.parametrize("name", ["diffllama", "stablelm"])
def test_a_refused_prefix_names_the_model_and_leaves_it(name):
    """A plain model cannot fall back to PEFT."""
    model = models.base_model(UNCOMMON[name]).eval()
    prefix = peftkern.PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=2, head_dim=16, std=1.0)
    want, before = model(input_ids=IDS).logits, {n: set(vars(m)) for n, m in model.named_modules()}
    try:
        peftkern.patch(model, prefix)
    except ValueError as error:
        message = str(error)
    else:
        stock = models.base_model(UNCOMMON[name]).eval()
        assert_close(model(input_ids=IDS).logits.detach(), by_hand.with_prefix(stock, prefix, IDS).logits.detach(),
                     "logits of an accepted prefix")  # fmt: skip
        return
    assert type(model).__name__.removesuffix("ForCausalLM") in message, (
        f"the refusal does not name the model: {message}"
    )
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_lora_below_is_tried_with_its_weights(kind):
    """The trial runs the user's model with its adapters, not the base model alone."""
    results = []
    for patched in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            lora = get_peft_model(
                models.base_model(LLAMA), LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
            )
            config = (PrefixTuningConfig if kind == "prefix" else PromptTuningConfig)(
                task_type="CAUSAL_LM", num_virtual_tokens=PREFIX
            )
            model = get_peft_model(lora, config)
        with notices() as found:
            if patched:
                peftkern.patch(model)
            results.append(model(input_ids=IDS, attention_mask=RIGHT, labels=IDS).loss.detach())
        assert not found, "a LoRA is no reason for PEFT's way"
    assert_close(results[1], results[0], "loss")


@pytest.mark.parametrize("method", ["peft prefix", "peft prompt", "native prefix", "native prompt"])
def test_a_strict_patch_raises_in_a_call_that_cannot_be_sped_up(method):
    model = by_hand.build(method, patched=False) if method.startswith("peft") else by_hand.build(method, strict=True)
    if method.startswith("peft"):
        peftkern.patch(model, strict=True)
    model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"output_attentions.*strict=True"):
        model(input_ids=IDS, output_attentions=True)
