# SPDX-License-Identifier: Apache-2.0
"""Models whose layers differ in key-value heads and head dim, share keys, and look up an embedding per layer."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model

import peftkern
from peftkern import PrefixKV, SoftPrompt, load_prefix, save_prefix
from tests.huggingface import models
from tests.huggingface.models import IDS, LEFT, RIGHT, VOCAB

P = 5
MASKS = {"none": None, "left": LEFT, "right": RIGHT}
#: Changes of the config. PEFT can give prompts no embedding per layer.
KINDS = {"layers alone": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, "per-layer embeddings": {}}


def text_config(**changes):
    return {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 8,
        "global_head_dim": 16, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "pad_token_id": 0, **changes,
    }  # fmt: skip


def gemma4(**changes):
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**text_config(**changes))).eval()


def peft_model(**changes):
    model = get_peft_model(gemma4(**changes), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.5)
    return model


def step(model, parameter, mask):
    """Loss, logits of the tokens and the gradient of ``parameter`` of a training step."""
    model.train()
    parameter.grad = None
    labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
    out = model(input_ids=IDS, attention_mask=mask, labels=labels)
    out.loss.backward()
    real = torch.ones_like(IDS) if mask is None else mask
    model.eval()
    return out.loss.detach(), out.logits.detach()[real.bool()], parameter.grad.clone()


@pytest.mark.filterwarnings("ignore:Prefix tuning injected")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_prefixes_and_prefix_kv_give_the_numbers_of_peft(kind, mask):
    model = peft_model(**KINDS[kind])
    weight = model.prompt_encoder["default"].embedding.weight
    stock = step(model, weight, MASKS[mask])
    peftkern.patch(model)
    assert "without their padding" in peftkern.explain(model)
    torch.testing.assert_close(step(model, weight, MASKS[mask]), stock)
    peftkern.unpatch(model)

    base = model.get_base_model().requires_grad_(False)
    prefix = PrefixKV(base, P)
    with torch.no_grad():
        prefix.trainable[0].copy_(weight)
    peftkern.patch(base, prefix)
    torch.testing.assert_close(step(base, prefix.trainable[0], MASKS[mask]), stock)


@pytest.mark.filterwarnings("ignore:Prefix tuning injected")
def test_generation_gives_the_tokens_of_peft():
    model = peft_model()
    arguments = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    stock = model.generate(**arguments)
    peftkern.patch(model)
    assert torch.equal(model.generate(**arguments), stock)


@pytest.mark.filterwarnings("ignore:Prefix tuning injected")
def test_checkpoints_pass_between_peft_and_prefix_kv(tmp_path):
    model = peft_model()
    weight = model.prompt_encoder["default"].embedding.weight
    model.save_pretrained(tmp_path / "peft")
    prefix = load_prefix(tmp_path / "peft", model=model.get_base_model())
    assert torch.equal(prefix.trainable[0], weight)
    save_prefix(prefix, tmp_path / "ours")
    assert load_prefix(tmp_path / "ours").shapes == prefix.shapes
    again = get_peft_model(gemma4(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    again.load_adapter(tmp_path / "ours", "loaded")
    assert torch.equal(again.prompt_encoder["loaded"].embedding.weight, weight)
    with pytest.raises(ValueError, match=r"prefix: expected 2 key-value heads of 8, as .* has, got 2 .* of 16"):
        peftkern.patch(gemma4(), load_prefix(tmp_path / "peft"))


@pytest.mark.parametrize("name", ["gemma 4", "gemma 3n"])
def test_a_prefix_from_text_stands_for_its_text(name):
    model = gemma4() if name == "gemma 4" else models.base_model(models.FAMILIES["gemma3n (shared KV)"]).eval()
    prefix = PrefixKV.from_text(model, lambda _: {"input_ids": IDS[0, :4].tolist()}, "four tokens", 4)
    want = model(input_ids=IDS[:1]).logits[:, 4:]
    peftkern.patch(model, prefix)
    torch.testing.assert_close(model(input_ids=IDS[:1, 4:]).logits, want)


def test_packed_rows_look_up_per_layer_embeddings_by_their_tokens():
    """From embeddings alone, the model would compare each row with every token of the vocabulary."""
    model = gemma4()
    prefix = PrefixKV(model, P)
    peftkern.patch(model, prefix)
    given = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: given.append(args[0].shape[1]))
    model.get_decoder().get_per_layer_inputs = lambda input_ids, inputs_embeds: type(
        model.get_decoder()
    ).get_per_layer_inputs(model.get_decoder(), *[_needed(input_ids), inputs_embeds])
    step(model, prefix.trainable[0], RIGHT)
    assert given == [int(RIGHT.sum())]


def _needed(input_ids):
    assert input_ids is not None
    return input_ids


def test_a_soft_prompt_has_no_per_layer_embedding():
    model = gemma4()
    prompt = SoftPrompt(model, 3)
    peftkern.patch(model, prompt)
    with pytest.raises(RuntimeError, match="reverse the embedding"):
        model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("attention", [None, "vision"], ids=["causal", "images see all of themselves"])
def test_images_behind_a_prefix_of_text(attention):
    """The stock model reads the same text before them."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    tokens = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92, "vision_soft_tokens_per_image": 4}
    config = transformers.Gemma4Config(
        text_config=text_config(use_bidirectional_attention=attention),
        vision_config={**tower, "pooling_kernel_size": 2},
        audio_config=None,
        **tokens,
    )
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 80, (2, 12))
    ids[:, 3:7] = 90
    whole = torch.cat([torch.arange(5, 5 + P).expand(2, -1), ids], 1)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
    image = {"pixel_values": torch.randn(2, 16, 48), "image_position_ids": places}

    def arguments(tokens):
        types = (tokens == 90).long()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": types, **image}

    greedy = {"max_new_tokens": 3, "do_sample": False}
    want = model(**arguments(whole)).logits[:, P:], model.generate(**arguments(whole), **greedy)[:, -3:]
    peftkern.patch(model, PrefixKV.from_text(model, lambda _: {"input_ids": whole[0, :P].tolist()}, "text", P))
    torch.testing.assert_close(model(**arguments(ids)).logits, want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(**arguments(ids), **greedy)[:, -3:], want[1])
