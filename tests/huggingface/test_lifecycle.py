# SPDX-License-Identifier: Apache-2.0
"""Patching changes one instance and is undone exactly."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel, PrefixTuningConfig

import peftkern
from peftkern import PrefixKV
from peftkern.huggingface import attention
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, LEFT, PREFIX, difference
from tests.huggingface.states import llama_prefix, state_of

TOLERANCE = 1e-5
LLAMA = FAMILIES["llama (GQA)"]


def test_importing_changes_nothing_in_transformers():
    code = (
        "import transformers, peftkern, peftkern.huggingface\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 'peftkern' not in AttentionInterface() and 'peftkern' not in AttentionMaskInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(peftkern.__file__).parents[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_restores_peft_models_to_the_bit(name):
    family = FAMILIES[name]
    model = models.peft_model(family, patched=False).eval()
    before, want = state_of(model), outputs(model, family)
    assert peftkern.patch(model) is model
    model.train()
    models.training_step(model, family.task, LEFT)
    model.zero_grad()
    assert peftkern.unpatch(model.eval()) is model
    assert state_of(model) == before
    assert torch.equal(outputs(model, family), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_restores_plain_models_to_the_bit(name):
    family = FAMILIES[name]
    geometry = models.native_prefix(models.peft_model(family, patched=False))
    model = models.base_model(family).eval()
    before, want = state_of(model), outputs(model, family)
    with peftkern.patched(model, geometry, freeze=True) as patched:
        assert patched is model
        assert not torch.equal(outputs(model, family), want)
    assert state_of(model) == before
    assert torch.equal(outputs(model, family), want)


def outputs(model, family):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=LEFT, **models.labels_of(family.task)).logits


def test_the_block_of_patched_ends_on_an_error():
    model = models.base_model(LLAMA)
    before = state_of(model)
    with pytest.raises(KeyError), peftkern.patched(model, llama_prefix()):
        raise KeyError
    assert state_of(model) == before


def test_the_block_of_patched_may_unpatch():
    model = models.base_model(LLAMA)
    before = state_of(model)
    with peftkern.patched(model, llama_prefix()):
        peftkern.unpatch(model)
    assert state_of(model) == before
    block = peftkern.patched(model, llama_prefix())
    peftkern.unpatch(block.__enter__())
    assert not block.__exit__(KeyError, KeyError("of the block"), None), "another error hides that of the block"
    assert state_of(model) == before


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_disabled_adapters_leave_the_base_model_to_the_bit(name):
    """Layers without a prefix run the previous implementation with its own kind of mask."""
    family = FAMILIES[name]
    model = models.peft_model(family, patched=False).eval()
    with model.disable_adapter():
        want = outputs(model, family)
    peftkern.patch(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, family), want)


def test_a_disabled_adapter_can_use_a_static_cache():
    """Its masks are made before the model runs, by the previous implementation."""
    model = models.peft_model(LLAMA, patched=True).eval()
    options = {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    want = models.generate(models.base_model(LLAMA).eval(), LLAMA.task, **options)
    with model.disable_adapter():
        got = models.generate(model, LLAMA.task, **options)
    assert got.tolist() == want.tolist()


def test_adapters_can_be_added_and_switched_while_patched():
    results = []
    for patched in (False, True):
        model = models.peft_model(LLAMA, patched=patched).eval()
        torch.manual_seed(5)
        model.add_adapter("longer", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX + 4))
        for name in ("default", "longer", "default"):
            model.set_adapter(name)
            results.append((patched, outputs(model, LLAMA)[LEFT.bool()]))
    stock, ours = ([out for flag, out in results if flag is patched] for patched in (False, True))
    for got, want in zip(ours, stock, strict=True):
        assert difference(got, want) <= TOLERANCE
    assert not torch.equal(ours[0], ours[1])


def test_another_model_with_the_same_config_is_not_changed():
    config = hf.LlamaConfig(**LLAMA.arguments)
    one, other = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    want = other(input_ids=IDS, attention_mask=LEFT).logits
    with peftkern.patched(one, llama_prefix()):
        assert torch.equal(other(input_ids=IDS, attention_mask=LEFT).logits, want)
    assert torch.equal(other(input_ids=IDS, attention_mask=LEFT).logits, want)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
def test_a_copy_is_patched_and_independent(native, copier):
    model = (
        peftkern.patch(models.base_model(LLAMA), llama_prefix()) if native else models.peft_model(LLAMA, patched=True)
    )
    want = outputs(model.eval(), LLAMA)
    clone = copier(model)
    peftkern.unpatch(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outputs(clone, LLAMA), want)
    peftkern.unpatch(clone)
    assert not torch.equal(outputs(clone, LLAMA), want) or not native


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "config", [{}, models.PROJECTION, {"num_frozen_tokens": 2}], ids=["flat", "mlp", "cartridge"]
)
def test_a_patched_peft_model_saves_the_files_of_an_unpatched_one(tmp_path, config):
    for name, patched in (("stock", False), ("patched", True)):
        models.peft_model(LLAMA, patched=patched, **config).save_pretrained(tmp_path / name)
    assert files_of(tmp_path / "patched") == files_of(tmp_path / "stock")
    loaded = PeftModel.from_pretrained(models.base_model(LLAMA), tmp_path / "patched").eval()
    want = outputs(loaded, LLAMA)
    assert difference(outputs(peftkern.patch(loaded), LLAMA), want) <= TOLERANCE


def test_the_base_of_a_patched_model_saves_the_files_of_an_unpatched_one(tmp_path):
    for name, patched in (("stock", False), ("patched", True)):
        models.peft_model(LLAMA, patched=patched).get_base_model().save_pretrained(tmp_path / name)
    assert files_of(tmp_path / "patched") == files_of(tmp_path / "stock")


def test_a_model_with_a_native_prefix_saves_it_beside_unchanged_weights(tmp_path):
    """``Trainer`` resumes from such a folder; the config does not mention the prefix."""
    model = models.base_model(LLAMA)
    want = outputs(model.eval(), LLAMA)
    peftkern.patch(model, llama_prefix()).save_pretrained(tmp_path)
    assert "peftkern" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert torch.equal(outputs(hf.LlamaForCausalLM.from_pretrained(tmp_path).eval(), LLAMA), want)


def test_nothing_of_a_forward_stays_in_the_model():
    """A remaining cache would keep the graph alive and prevent copies."""
    family = FAMILIES["gpt2"]
    model = models.peft_model(family, patched=True)
    models.training_step(model, family.task)
    copy.deepcopy(model)
    with pytest.raises(ValueError, match="at most 64 positions"):
        model(input_ids=torch.ones(1, 64, dtype=torch.long))
    copy.deepcopy(model)


def test_unpatch_wants_what_was_patched():
    with pytest.raises(
        ValueError, match="model: expected the object that was given to patch, got a LlamaForCausalLM"
    ):
        peftkern.unpatch(models.base_model(LLAMA))
    model = models.peft_model(LLAMA, patched=True)
    peftkern.unpatch(model)
    with pytest.raises(ValueError, match="got a PeftModelForCausalLM that is not patched"):
        peftkern.unpatch(model)


def test_an_attention_implementation_set_after_patch_is_noticed():
    """The prefix would be dropped silently, because the cache only contains keys of the sequence."""
    model = models.peft_model(LLAMA, patched=True)
    model.get_base_model().set_attn_implementation("sdpa")
    message = r"without its prefix in .*layers\.0\.self_attn, .*layers\.1\.self_attn; expected 'peftkern'.*got 'sdpa'"
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS)


def test_layers_dropped_in_training_are_not_missed():
    family = FAMILIES["bart"]
    model = models.base_model(family, decoder_layerdrop=0.5)
    peftkern.patch(model, PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=4, head_dim=16))
    model.train()
    for seed in range(8):
        torch.manual_seed(seed)
        model(input_ids=IDS, labels=models.TARGETS)


def test_a_prefix_read_in_place():
    """The layers get views of PEFT's parameter."""
    model = models.peft_model(LLAMA, patched=True)
    parameter = models.peft_prefix(model)
    cache = model.get_prompt(batch_size=8)
    storage = parameter.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == storage for layer in cache.prefix for t in layer)
    assert [tuple(k.shape) for k, _ in cache.prefix] == [(2, PREFIX, 16)] * 2


def test_the_next_layer_reads_what_the_kernel_wrote(monkeypatch):
    """Outputs are [B, S, Hq, D] in memory, so that no copy follows attention."""
    written, read = [], []

    def spy(*args, **kwargs):
        out = peftkern.prefix_attention(*args, **kwargs)
        written.append(out.data_ptr())
        return out

    model = models.peft_model(LLAMA, patched=True)
    monkeypatch.setattr(attention, "prefix_attention", spy)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: read.append(args[0].data_ptr()))
    model(input_ids=IDS, attention_mask=LEFT)
    assert read == written
