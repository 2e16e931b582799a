# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch: ``adapter_names`` gives every sample the numbers of a run of its own adapter."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

import peftkern
from tests.huggingface.models import _DECODER, _GPT2, VOCAB

#: The sample without an adapter has no padding on the left, which the stock model would count as positions.
NAMES = ["short", "default", "long", "short", "__base__"]
LENGTHS = {"default": 5, "short": 2, "long": 8}
_OPT = {**_DECODER, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}
KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**_DECODER, "num_key_value_heads": 2}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**_DECODER, "num_key_value_heads": 2, "sliding_window": 4}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT),
}
SOURCES = {
    "prefix": lambda length: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length),
    "mlp": lambda length: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": lambda length: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length),
    "p-tuning": lambda length: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, encoder_hidden_size=16
    ),
}
#: Every kind of model with prefixes and prompts, and adapters that an MLP computes.
BOTH = [
    *((kind, source) for kind in KINDS for source in ("prefix", "prompt")),
    ("llama", "mlp"),
    ("llama", "p-tuning"),
]
PADDINGS = ("none", "left", "right")
pytestmark = pytest.mark.filterwarnings("ignore:.*right-padding was detected")


def _model(kind="llama", source="prefix", lengths=LENGTHS):
    torch.manual_seed(0)
    make, config, arguments = KINDS[kind]
    model = get_peft_model(make(config(**arguments)), SOURCES[source](lengths["default"]))
    for name, length in lengths.items():
        if name != "default":
            model.add_adapter(name, SOURCES[source](length))
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            parameter.requires_grad_(True)
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def _batch(padding="none"):
    size = len(NAMES)
    ids = torch.randint(3, VOCAB, (size, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(size):
        if padding == "left":
            mask[row, : row % 4] = 0
        if padding == "right":
            mask[row, 9 - row % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _one_by_one(model, batch, run, names=NAMES):
    """The results of runs of one sample each, with its adapter."""
    results = []
    for row, name in enumerate(names):
        sample = {key: x[row : row + 1] for key, x in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(sample))
        else:
            model.set_adapter(name)
            results.append(run(sample))
    model.set_adapter("default")
    return results


def _gradients(model):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return gradients


def _patch(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peftkern.patch(model, **options)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kind", "source"), BOTH)
def test_training_equals_runs_of_one_adapter_each(kind, source, padding):
    model, batch = _model(kind, source), _batch(padding)
    _patch(model).train()
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    if source in ("prompt", "p-tuning"):  # prompts predict the first token, where there is one
        counts = (batch["labels"] != -100).sum(1) - torch.tensor([name == "__base__" for name in NAMES]).int()

    def run(sample):
        output = model(**sample)
        if output.loss.requires_grad:  # not without an adapter
            (output.loss * counts[len(seen)] / counts.sum()).backward()
        seen.append(output.loss)
        return output.logits[:, -9:].detach()

    seen: list[torch.Tensor] = []
    want = torch.cat(_one_by_one(model, batch, run))
    gradients = _gradients(model)
    output = model(**batch, adapter_names=NAMES)
    output.loss.backward()
    got = _gradients(model)
    real = batch["attention_mask"].bool()
    assert torch.allclose(output.logits[:, -9:][real], want[real], atol=2e-5)
    assert torch.allclose(
        output.loss, sum(x * n for x, n in zip(seen, counts, strict=True)) / counts.sum(), rtol=1e-5
    )
    assert got.keys() == gradients.keys()
    for name in gradients:
        assert (got[name] - gradients[name]).norm() <= 2e-5 * gradients[name].norm()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kind", "source"), BOTH)
def test_evaluation_equals_runs_of_one_adapter_each(kind, source, padding):
    model, batch = _patch(_model(kind, source)).eval(), _batch(padding)
    with torch.no_grad():
        want = torch.cat(_one_by_one(model, batch, lambda sample: model(**sample).logits[:, -9:]))
        got = model(**batch, adapter_names=NAMES).logits[:, -9:]
        if padding == "none":
            unmasked = model(input_ids=batch["input_ids"], adapter_names=NAMES).logits[:, -9:]
            assert torch.allclose(unmasked, want, atol=2e-5)
    real = batch["attention_mask"].bool()
    assert torch.allclose(got[real], want[real], atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("kind", "source"), BOTH)
def test_generation_equals_runs_of_one_adapter_each(kind, source, beams):
    model, batch = _patch(_model(kind, source)).eval(), _batch("left")
    del batch["labels"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    names = NAMES[1:] + NAMES[:1]
    want = torch.cat(_one_by_one(model, batch, lambda sample: model.generate(**sample, **options), names))
    assert torch.equal(model.generate(**batch, **options, adapter_names=names), want)


@pytest.mark.parametrize("source", SOURCES)
def test_checkpointing_and_labelled_logits(source):
    model, batch = _model(source=source), _batch("right")
    _patch(model, logits="labelled").train()
    want = model(**batch, adapter_names=NAMES)
    want.loss.backward()
    gradients = _gradients(model)
    firsts = 0 if source in ("prefix", "mlp") else 4  # prompts predict them, where there is one
    assert want.logits.shape[:2] == (1, firsts + int((batch["labels"][:, 1:] != -100).sum()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, adapter_names=NAMES).loss.backward()
    got = _gradients(model)
    assert all(torch.allclose(got[name], gradients[name], rtol=1e-4, atol=1e-7) for name in gradients)


def test_one_adapter_by_name_is_that_adapter():
    model, batch = _patch(_model()).eval(), _batch("right")
    with torch.no_grad():
        got = model(**batch, adapter_names=["long"] * 5).logits[:, -9:]
        base = model(**batch, adapter_names=["__base__"] * 5).logits[:, -9:]
        with model.disable_adapter():
            assert torch.allclose(base, model(**batch).logits, atol=2e-5)
        model.set_adapter("long")
        assert torch.allclose(got, model(**batch).logits[:, -9:], atol=2e-5)


@pytest.mark.parametrize("source", ["prefix", "prompt"])
def test_adapters_are_replaced_while_patched(source, tmp_path):
    """Weights copied into an adapter, loaded over it, or added under a new name count in the next call."""
    model, batch = _patch(_model(source=source)).eval(), _batch("right")

    def run(names=NAMES):
        with torch.no_grad():
            return model(**batch, adapter_names=names).logits[batch["attention_mask"].bool()]

    model.save_pretrained(tmp_path)
    before, weight = run(), model.prompt_encoder["long"].embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))
    assert not torch.allclose(run(), before, atol=1e-3)
    model.load_adapter(tmp_path / "long", "long")
    assert torch.allclose(run(), before, atol=1e-5)
    model.load_adapter(tmp_path / "short", "new")
    assert torch.allclose(run([name.replace("short", "new") for name in NAMES]), before, atol=1e-5)


def test_heads_of_adapters_are_refused():
    """The head of the active adapter would run on all rows."""
    torch.manual_seed(0)
    base = hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER, num_labels=3))
    model = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    peftkern.patch(model)
    with pytest.raises(ValueError, match=r"adapter_names: .*head"):
        model(input_ids=_batch()["input_ids"], adapter_names=["default"] * 5)


def test_wrong_names_and_models_are_refused():
    model, batch = _patch(_model()), _batch()
    with pytest.raises(ValueError, match=r"adapter_names: expected names among .*, got other"):
        model(**batch, adapter_names=["other"] * 5)
    with pytest.raises(ValueError, match="adapter_names: expected one name for each of 5 samples, got 3"):
        model(**batch, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch, adapter_names=NAMES, output_attentions=True)
    torch.manual_seed(0)
    seq2seq = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )
    t5 = peftkern.patch(get_peft_model(seq2seq, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)))
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="adapter_names: expected None, because"):
        t5(input_ids=ids, labels=ids, adapter_names=["default"] * 5)
