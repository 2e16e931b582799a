# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: both directions with PEFT, and continued training."""

from __future__ import annotations

import doctest
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftkern import PrefixKV, SoftPrompt, checkpoint, load_prefix, save_prefix
from tests.checkpoints import (
    CONFIGS,
    GEOMETRY,
    IDS,
    ONLY_OURS,
    OURS,
    assert_same,
    llama,
    logits_with,
    prefix_config,
    t5,
)


def test_docstrings():
    assert doctest.testmod(checkpoint).failed == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_loads_with_equal_tensors_and_logits(name, tmp_path):
    model = llama()
    theirs = peft.get_peft_model(model, CONFIGS[name]()).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prefix = load_prefix(tmp_path, model=model)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    if isinstance(prefix, PrefixKV):
        assert torch.equal(prefix.prompt_embeddings(), stored)
        assert prefix.num_frozen_tokens == (2 if name == "cartridge" else 0)
    else:
        assert torch.equal(prefix.weight, stored)
    assert prefix.origin == ("somebody/llama", None, "CAUSAL_LM")
    torch.testing.assert_close(logits_with(llama(), prefix), theirs(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_what_we_saved_with_equal_tensors_and_logits(name, tmp_path):
    prefix = OURS[name]()
    save_prefix(prefix, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    assert theirs.active_peft_config.base_model_name_or_path == "somebody/llama"
    expected = prefix.weight if isinstance(prefix, SoftPrompt) else prefix.prompt_embeddings()
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, expected)
    torch.testing.assert_close(theirs(IDS).logits, logits_with(llama(), prefix), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*OURS, *ONLY_OURS])
@pytest.mark.parametrize("with_config", [True, False])
def test_our_round_trip_keeps_everything(name, with_config, tmp_path):
    prefix = (OURS | ONLY_OURS)[name]()
    prefix.origin = prefix.origin._replace(revision="v2")
    save_prefix(prefix, tmp_path)
    if not with_config:
        (tmp_path / "adapter_config.json").unlink()
    assert_same(load_prefix(tmp_path), prefix)
    assert not any(p.requires_grad for p in load_prefix(tmp_path, trainable=False).parameters())


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), num_frozen=st.integers(0, 4))
def test_any_lengths_survive(tmp_path_factory, lengths, num_frozen):
    folder = tmp_path_factory.mktemp("prefix")
    geometry = {"num_layers": len(lengths), "num_kv_heads": 1, "head_dim": 3}
    prefix = PrefixKV(None, lengths, **geometry, num_frozen_tokens=min(num_frozen, max(lengths)))
    save_prefix(prefix, folder)
    assert_same(load_prefix(folder), prefix)


@pytest.mark.parametrize("name", ONLY_OURS)
def test_peft_refuses_what_it_cannot_express(name, tmp_path):
    save_prefix(ONLY_OURS[name](), tmp_path)
    with pytest.raises(KeyError, match="PEFTKERN_PR"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("name", ["prefix", "projection", "cartridge"])
def test_continued_training_is_training_without_the_stop(name, tmp_path):
    def step(prefix):
        optimizer = torch.optim.SGD([p for p in prefix.parameters() if p.requires_grad], lr=0.1)
        sum(x.square().sum() for pair in prefix.layer_kv() for x in pair).backward()
        optimizer.step()
        optimizer.zero_grad()

    prefix = OURS[name]()
    step(prefix)
    save_prefix(prefix, tmp_path)
    resumed = load_prefix(tmp_path)
    for x in (prefix, resumed):
        step(x)
    assert_same(resumed, prefix)


def test_peft_goes_on_training_what_we_loaded(tmp_path):
    """PEFT rejects is_trainable=True for prompt learning, so a new adapter loads our tensors."""
    save_prefix(OURS["prefix"](), tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    prefix = load_prefix(tmp_path)
    theirs = peft.get_peft_model(llama(), prefix_config())
    theirs.prompt_encoder["default"].load_prompt_embeddings(prefix.prompt_embeddings())
    theirs(IDS, labels=IDS).loss.backward()
    assert theirs.prompt_encoder["default"].embedding.weight.grad.any()


@pytest.mark.parametrize("name", ["prefix", "projection", "cartridge"])
def test_training_of_a_peft_model_goes_on(name, tmp_path):
    """With its MLP, which PEFT does not save."""

    def fresh():
        return peft.get_peft_model(llama(), CONFIGS[name]())

    def step(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        return loss

    trained = fresh()
    step(trained)
    save_prefix(PrefixKV.from_peft(trained), tmp_path)
    resumed = fresh()
    PrefixKV.from_peft(resumed).load_state_dict(load_prefix(tmp_path).state_dict())
    assert_same(load_prefix(tmp_path), PrefixKV.from_peft(resumed))
    for _ in range(2):
        trained.zero_grad()
        resumed.zero_grad()
        assert torch.equal(step(resumed), step(trained))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(theirs.get_prompt(1).layers[0].keys[0], load_prefix(tmp_path).layer_kv()[0][0])


def test_from_peft_names_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"expected a PREFIX_TUNING or CARTRIDGE adapter, got .*PROMPT_TUNING"):
        PrefixKV.from_peft(peft.get_peft_model(llama(), CONFIGS["prompt"]()))


@pytest.mark.parametrize("num_layers", [2, 3])
def test_seq2seq_keeps_the_layout_of_peft(num_layers, tmp_path):
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(t5(num_layers), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prefix = load_prefix(tmp_path)
    cache = theirs.get_prompt(1).self_attention_cache
    for layer, (k, v) in enumerate(prefix.layer_kv()):
        assert torch.equal(k, cache.layers[layer].keys[0]), f"key of layer {layer}"
        assert torch.equal(v, cache.layers[layer].values[0]), f"value of layer {layer}"
    save_prefix(prefix, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(t5(num_layers), tmp_path / "again").eval()
    expected = theirs(IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(again(IDS, decoder_input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_seq2seq_prompt_is_the_part_that_peft_uses(tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(t5(2), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prompt = load_prefix(tmp_path)
    assert torch.equal(prompt.weight, theirs.get_prompt(1)[0, :5])
    save_prefix(prompt, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(t5(2), tmp_path / "again").eval()
    expected = theirs(IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(again(IDS, decoder_input_ids=IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_becomes_an_fp32_master(dtype, tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY, dtype=dtype)
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path).trainable[0]
    assert loaded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(loaded.to(dtype), prefix.trainable[0])


def test_nan_and_inf_survive(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY)
    prefix.trainable[0].data[0, :2] = torch.tensor([float("nan"), float("inf")])
    save_prefix(prefix, tmp_path)
    assert torch.equal(load_prefix(tmp_path).trainable[0].nan_to_num(7), prefix.trainable[0].nan_to_num(7))


def test_loading_leaves_random_numbers_alone(tmp_path):
    save_prefix(OURS["projection"](), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_prefix(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path):
    prefix = OURS["prefix"]()
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place, as PEFT's save_pretrained overwrites
    assert_same(loaded, prefix)


def test_an_edited_config_names_another_base_model(tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("somebody/llama", "/my/llama"))
    assert load_prefix(tmp_path).origin.base_model_name_or_path == "/my/llama"
