# SPDX-License-Identifier: Apache-2.0
"""Adapters that are disabled, merged or deleted while a model is patched, in every order."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import peftkern
from peftkern.huggingface.wiring import PATCH
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, assert_close, token_rows
from tests.huggingface.models import IDS, PREFIX, SEQ

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

PEFT = ("peft prefix", "peft prompt")
KINDS = {"peft prefix": PrefixTuningConfig, "peft prompt": PromptTuningConfig}


def outputs(model):
    """Logits and greedy tokens."""
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        return logits, model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY)


def assert_same_outputs(model, want, when):
    logits, tokens = outputs(model)
    assert_close(logits, want[0], f"logits {when}")
    assert tokens.tolist() == want[1].tolist(), f"other tokens {when}"


def stock(method):
    """(outputs with the adapter, and without it) of the stock model."""
    model = by_hand.build(method, patched=False).eval()
    with model.disable_adapter():
        without = outputs(model)
    return outputs(model), without


@pytest.mark.parametrize("method", PEFT)
def test_unpatched_while_disabled(method):
    with_adapter, without = stock(method)
    model = by_hand.build(method).eval()
    with model.disable_adapter():
        by_hand.refused(lambda: peftkern.unpatch(model), "disable")
        assert_same_outputs(model, without, "within disable_adapter")
    assert_same_outputs(model, with_adapter, "behind disable_adapter")
    if hasattr(model, PATCH):
        peftkern.unpatch(model)
        assert_same_outputs(model, with_adapter, "after unpatch")


@pytest.mark.parametrize("method", PEFT)
def test_nothing_stays_of_a_patch_that_ended_while_disabled(method):
    model = by_hand.build(method, patched=False).eval()
    before = set(vars(model)), set(vars(model.base_model))
    with model.disable_adapter():
        pass
    after_disabling = set(vars(model)), set(vars(model.base_model))
    peftkern.patch(model)
    with model.disable_adapter():
        if by_hand.refused(lambda: peftkern.unpatch(model), "disable"):
            return
    assert before <= after_disabling
    left = set(vars(model)), set(vars(model.base_model))
    assert left == after_disabling, "attributes are left behind"


@pytest.mark.parametrize("method", PEFT)
def test_patched_while_disabled(method):
    """``patched`` within ``disable_adapter``."""
    with_adapter, without = stock(method)
    model = by_hand.build(method, patched=False).eval()
    with model.disable_adapter(), peftkern.patched(model):
        assert_same_outputs(model, without, "of the disabled adapter")
    assert_same_outputs(model, with_adapter, "behind both blocks")


@pytest.mark.parametrize("method", PEFT)
def test_disabled_while_patched(method):
    with_adapter, without = stock(method)
    model = by_hand.build(method, patched=False).eval()
    with peftkern.patched(model):
        with model.disable_adapter():
            assert_same_outputs(model, without, "of the disabled adapter")
            with model.disable_adapter():
                assert_same_outputs(model, without, "of the twice disabled adapter")
        assert_same_outputs(model, with_adapter, "behind disable_adapter")
    assert_same_outputs(model, with_adapter, "behind both blocks")


@pytest.mark.parametrize("method", PEFT)
def test_patched_while_disabled_and_used_behind_it(method):
    with_adapter, _ = stock(method)
    model = by_hand.build(method, patched=False).eval()
    with model.disable_adapter():
        peftkern.patch(model)
    assert_same_outputs(model, with_adapter, "behind disable_adapter")
    peftkern.unpatch(model)
    assert_same_outputs(model, with_adapter, "after unpatch")


@pytest.mark.parametrize("method", PEFT)
def test_a_training_step_while_disabled_has_the_batch_of_the_base_model(method):
    model = by_hand.build(method).train()
    want = models.base_model(LLAMA).train()(input_ids=IDS, attention_mask=models.RIGHT, labels=IDS)
    with model.disable_adapter():
        got = model(input_ids=IDS, attention_mask=models.RIGHT, labels=IDS)
    assert_close(got.loss.detach(), want.loss.detach(), "loss")
    assert got.logits.shape == want.logits.shape


@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("deleted", ["other", "active"])
def test_an_adapter_is_deleted_while_patched(method, deleted):
    results = []
    for patched in (False, True):
        model = by_hand.build(method, patched=patched).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            model.add_adapter("longer", KINDS[method](task_type="CAUSAL_LM", num_virtual_tokens=PREFIX + 2))
        model.delete_adapter("longer" if deleted == "other" else "default")
        results.append(outputs(model.eval()))
        if patched:
            assert_same_outputs(model, results[0], "after delete_adapter")
            peftkern.unpatch(model)
            assert_same_outputs(model, results[0], "after unpatch")


@pytest.mark.parametrize("method", PEFT)
def test_merging_a_prompt_learning_model_fails_as_in_peft(method):
    """PEFT's base model has no such method; a patch must not hide the error."""
    want = stock(method)[0]
    model = by_hand.build(method).eval()
    with pytest.raises(AttributeError, match="merge_and_unload"):
        model.merge_and_unload()
    assert_same_outputs(model, want, "after the refusal")


def lora(seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(models.base_model(LLAMA), config).eval()


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_lora_is_taken_out_while_a_prefix_is_patched_in(method, way):
    """The returned model either has the prefix, also in its ``state_dict``, or runs without it."""
    model = lora()
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    without = getattr(lora(), way)()
    with torch.no_grad():
        if method == "native prefix":
            acting = by_hand.with_prefix(without, by_hand.llama_prefix(), IDS).logits
        else:
            acting = token_rows(by_hand.with_prompt(without, by_hand.prompt_values(), IDS).logits, SEQ)
        idle = without(input_ids=IDS).logits
    peftkern.patch(model, learned)
    got = {}

    def take_out():
        got["model"] = getattr(model, way)()
        with torch.no_grad():
            got["logits"] = got["model"](input_ids=IDS).logits

    if by_hand.refused(take_out, "unpatch"):
        return
    holds = any("peftkern" in name for name in got["model"].state_dict())
    what = f"logits with{'' if holds else 'out'} the prefix in state_dict"
    assert_close(got["logits"], acting if holds else idle, what)


@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_lora_is_merged_in_place_while_a_prefix_is_patched_in(method):
    model = lora()
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    peftkern.patch(model, learned)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        model.merge_adapter()
        assert_close(model(input_ids=IDS).logits, want, "logits with LoRA merged", 1e-4)
        model.unmerge_adapter()
    peftkern.unpatch(model)
    with torch.no_grad():
        assert_close(model(input_ids=IDS).logits, lora()(input_ids=IDS).logits, "logits after unpatch", 1e-4)


@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_a_disabled_lora_keeps_the_prefix(method):
    model = lora()
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    peftkern.patch(model, learned)
    with torch.no_grad():
        want = token_rows(by_hand.truth(method)(IDS).logits, SEQ)
        with model.disable_adapter():
            assert_close(model(input_ids=IDS).logits, want, "logits without LoRA")
