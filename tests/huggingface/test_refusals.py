# SPDX-License-Identifier: Apache-2.0
"""What cannot be patched is refused with a reason, and left as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import peftkern
from peftkern import PrefixKV, SoftPrompt
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, PREFIX
from tests.huggingface.states import llama_prefix, state_of

LLAMA = FAMILIES["llama (GQA)"]


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


def test_peft_sequences_that_leave_no_room_for_the_prefix():
    """PEFT: IndexError (GPT-2), RuntimeError about expanded sizes (BERT)."""
    for name in ("gpt2", "bert"):
        model = models.peft_model(FAMILIES[name], patched=True).eval()
        with pytest.raises(ValueError, match=r"at most 64 positions.*got 69, of which the prefix takes 5"):
            model(input_ids=torch.ones(1, 64, dtype=torch.long))
