# SPDX-License-Identifier: Apache-2.0
"""Patching changes one instance, is undone exactly, and refuses unsupported cases with a reason."""

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
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.huggingface import attention
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, LEFT, PREFIX, difference

TOLERANCE = 1e-5
LLAMA = FAMILIES["llama (GQA)"]


def llama_prefix(length=PREFIX, **geometry):
    return PrefixKV(None, length, **{"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, **geometry})


def state_of(model):
    """Everything that patching could change in a model: attributes, hooks, configs and parameters of every module."""
    state = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        private = {key for key in vars(module) if key.startswith("_peftkern")}
        hooks = (len(module._forward_pre_hooks), len(module._forward_hooks), sorted(module._modules))
        implementation = str(module.config._attn_implementation) if hasattr(module, "config") else None
        state[name] = (attributes, private, hooks, implementation, module.training)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, flags


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


UNREACHABLE = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4)),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_attention_outside_of_the_interface_is_refused_naming_the_layers(name):
    model = UNREACHABLE[name]()
    before = state_of(model)
    prefix = PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=4, head_dim=16)
    with pytest.raises(ValueError, match=r"does not dispatch.*\.0\.\w+ \(\w+Attention\).*\.1\.\w+ \(\w+Attention\)"):
        peftkern.patch(model, prefix)
    assert state_of(model) == before
    if name != "mpt":  # PEFT cannot make that one
        tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
        with pytest.raises(ValueError, match=r"does not dispatch.*PEFT's own code"):
            peftkern.patch(tuned, strict=True)
        with pytest.warns(UserWarning, match=r"by PEFT's own code: .*does not dispatch"):
            peftkern.patch(tuned)


def test_a_module_that_is_two_layers_is_refused():
    """It would be ambiguous which of the two prefixes the module reads."""
    model = models.base_model(LLAMA)
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    record = []

    def alternate(module, args, kwargs):
        module.layer_idx = len(record) % 2
        record.append(module.layer_idx)

    model.model.layers[0].self_attn.register_forward_pre_hook(alternate, with_kwargs=True)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is layers 0 and 1 in one module"):
        peftkern.patch(model, llama_prefix())


def test_nothing_of_a_forward_stays_in_the_model():
    """A remaining cache would keep the graph alive and prevent copies."""
    family = FAMILIES["gpt2"]
    model = models.peft_model(family, patched=True)
    models.training_step(model, family.task)
    copy.deepcopy(model)
    with pytest.raises(ValueError, match="at most 64 positions"):
        model(input_ids=torch.ones(1, 64, dtype=torch.long))
    copy.deepcopy(model)


class NoCache(hf.PreTrainedModel):
    """Takes no cache."""

    config_class = hf.LlamaConfig

    def forward(self, input_ids):
        return input_ids


REFUSED = {
    "patched twice": (lambda: models.peft_model(LLAMA, patched=True), {}, "model: expected .*, got a patched one"),
    "base of a patched model": (
        lambda: models.peft_model(LLAMA, patched=True).get_base_model(),
        {"prefix": llama_prefix()},
        "got a patched one",
    ),
    "no prefix": (
        lambda: models.base_model(LLAMA),
        {},
        "prefix: expected a PrefixKV, because LlamaForCausalLM is not a PEFT",
    ),
    "LoRA": (
        lambda: get_peft_model(models.base_model(LLAMA), LoraConfig(task_type="CAUSAL_LM")),
        {},
        "expected PREFIX_TUNING, CARTRIDGE, .* adapters, got LORA",
    ),
    "prompt without positions": (
        lambda: models.base_model(LLAMA),
        {"prefix": SoftPrompt(models.base_model(LLAMA), 4), "shift_positions": False},
        "shift_positions, prefix_in_window, packing: expected True, because a prompt runs through",
    ),
    "prompt of another width": (
        lambda: models.base_model(LLAMA),
        {"prefix": SoftPrompt(None, 4, embed_dim=32)},
        "prefix: expected a prompt as wide as the token embeddings, 64, got 32",
    ),
    "prompt of a bidirectional model": (
        lambda: models.base_model(FAMILIES["bert"]),
        {"prefix": SoftPrompt(models.base_model(FAMILIES["bert"]), 4), "strict": True},
        "model: the prompt cannot run once for all samples: .*mask other than a causal one",
    ),
    "bugs of a prefix": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"peft_bugs": True},
        "peft_bugs: expected False except for a PEFT model with a prompt",
    ),
    "labelled logits of padded batches": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"logits": "labelled", "packing": False},
        "logits: expected 'all', got 'labelled'; packing=False",
    ),
    "labelled logits of classes": (
        lambda: models.peft_model(models.TASKS["llama SEQ_CLS"], patched=False),
        {"logits": "labelled"},
        "logits: expected 'all', got 'labelled'; LlamaForSequenceClassification has no logits per token",
    ),
    "labelled logits behind other masks": (
        lambda: models.prompt_model(FAMILIES["llama4 (chunks)"], patched=False),
        {"logits": "labelled"},
        "logits: expected 'all', got 'labelled'; .*mask other than a causal one",
    ),
    "prompt without a task": (
        lambda: PeftModel(models.base_model(LLAMA), PromptTuningConfig(num_virtual_tokens=4)),
        {},
        "model: expected a task_type in the config of adapter 'default'",
    ),
    "unknown logits": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"logits": "some"},
        "logits: expected 'all' or 'labelled', got 'some'",
    ),
    "unknown backend": (
        lambda: models.base_model(LLAMA),
        {"prefix": llama_prefix(), "backend": "two_part"},
        r"backend: expected 'auto' or one of \[.*'reference'.*\], got 'two_part'",
    ),
    "unknown backend of a PEFT model": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"backend": "two_part"},
        r"backend: expected 'auto' or one of \[.*'reference'.*\], got 'two_part'",
    ),
    "two prefixes": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"prefix": llama_prefix()},
        "prefix: expected None",
    ),
    "heads": (
        lambda: models.base_model(LLAMA),
        {"prefix": llama_prefix(num_kv_heads=4)},
        r"prefix: expected 2 key-value heads of 16, as model\.layers\.0\.self_attn has, got 4 key-value heads of 16",
    ),
    "layers": (
        lambda: models.base_model(LLAMA),
        {"prefix": llama_prefix(num_layers=1)},
        r"prefix: expected a prefix for layer 1 \(model\.layers\.1\.self_attn\), got 1 layers",
    ),
    "PEFT geometry": (
        lambda: get_peft_model(
            models.base_model(LLAMA),
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=1),
        ),
        {"strict": True},
        "adapter 'default': expected a prefix for layer 1",
    ),
    "unshifted PEFT": (
        lambda: models.peft_model(LLAMA, patched=False),
        {"shift_positions": False},
        "shift_positions",
    ),
    "fixed native": (
        lambda: models.base_model(LLAMA),
        {"prefix": llama_prefix(), "fix_seq2seq_layout": True},
        "fix_seq2seq_layout",
    ),
    "no transformer": (
        lambda: nn.Linear(2, 2),
        {"prefix": llama_prefix()},
        "model: expected a transformers PreTrained",
    ),
    "no cache": (
        lambda: NoCache(hf.LlamaConfig(**LLAMA.arguments)),
        {"prefix": llama_prefix()},
        "model: NoCache takes no cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_patched_is_refused_and_unchanged(case):
    build, arguments, message = REFUSED[case]
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peftkern.patch(model, **arguments)
    assert state_of(model) == before


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


def test_peft_sequences_that_leave_no_room_for_the_prefix():
    """PEFT: IndexError (GPT-2), RuntimeError about expanded sizes (BERT)."""
    for name in ("gpt2", "bert"):
        model = models.peft_model(FAMILIES[name], patched=True).eval()
        with pytest.raises(ValueError, match=r"at most 64 positions.*got 69, of which the prefix takes 5"):
            model(input_ids=torch.ones(1, 64, dtype=torch.long))


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
