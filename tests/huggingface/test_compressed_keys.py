# SPDX-License-Identifier: Apache-2.0
"""Models that cache compressed keys and values (multi-head latent attention): a prefix of the expanded ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface

import peftkern
from peftkern import PrefixKV, SoftPrompt, load_prefix, save_prefix
from tests.huggingface.families import tiny
from tests.huggingface.models import BATCH, IDS, LEFT, RIGHT, SEQ

FAMILIES = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"]
#: With sparse attention, where an indexer selects keys.
REFUSED = ["deepseek_v32", "glm_moe_dsa"]
MASKS = {"none": None, "left": LEFT, "right": RIGHT}
P = 4
TEXT = torch.arange(10, 10 + P)[None]


def tokenizer(text):
    return {"input_ids": TEXT[0].tolist()}


def text_model(family):
    """A model and its prefix, which is the text."""
    model = tiny.tiny_model(family).eval().requires_grad_(False)
    return model, PrefixKV.from_text(model, tokenizer, "four tokens", P)


def mask_over(mask):
    """bool [B, 1, S, P + S]: all of the prefix, and what the causal mask and the padding show of the sequence."""
    visible = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    if mask is not None:
        visible = visible & mask.bool()[:, None, None]
    return torch.cat([visible.new_ones(BATCH, 1, SEQ, P), visible], -1)


def step_by_hand(model, prefix, mask, monkeypatch):
    """The training step of a stock model whose attention function concatenates the prefix."""
    prefix_kv, visible = prefix.layer_kv(), mask_over(mask)

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key, value = (
            torch.cat([x.expand(BATCH, -1, -1, -1), y], 2)
            for x, y in zip(prefix_kv[module.layer_idx], (key, value), strict=True)
        )
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("by_hand", attention)
    for config in (model.config, model.get_decoder().config):
        monkeypatch.setattr(config, "_attn_implementation_internal", "by_hand")
    behind = torch.ones(BATCH, SEQ, dtype=torch.long) if mask is None else mask
    positions = P + torch.arange(SEQ).expand(BATCH, -1)
    return finish(model, prefix, behind, position_ids=positions, attention_mask=None, use_cache=False)


def finish(model, prefix, mask, **arguments):
    model.train()
    prefix.zero_grad()
    out = model(input_ids=IDS, labels=IDS.masked_fill(mask == 0, -100), **arguments)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach()[mask.bool()], [p.grad.clone() for p in prefix.parameters()]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps_are_those_of_attention_by_hand(family, mask, monkeypatch):
    model, prefix = text_model(family)
    with monkeypatch.context() as context:
        want = step_by_hand(model, prefix, MASKS[mask], context)
    peftkern.patch(model, prefix)
    got = finish(model, prefix, torch.ones_like(IDS) if mask == "none" else MASKS[mask], attention_mask=MASKS[mask])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_from_text_generates_what_its_text_does(family):
    model, prefix = text_model(family)
    whole = torch.cat([TEXT.expand(BATCH, -1), IDS], 1)
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    want = model.generate(whole, attention_mask=torch.ones_like(whole), **arguments)[:, P:]
    peftkern.patch(model, prefix)
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **arguments), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_runs_once_and_is_cached_compressed(family):
    model = tiny.tiny_model(family).eval().requires_grad_(False)
    prompt = SoftPrompt(model, P)
    with torch.no_grad():
        prompt.weight.copy_(model.get_input_embeddings()(TEXT[0]))
    whole = torch.cat([TEXT.expand(BATCH, -1), IDS], 1)
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    want = model.generate(whole, attention_mask=torch.ones_like(whole), **arguments)[:, P:]
    logits = model(whole).logits[:, P:]
    peftkern.patch(model, prompt)
    assert "the prompt runs once" in peftkern.explain(model)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **arguments), want)


def test_checkpoint_and_geometry(tmp_path):
    model, prefix = text_model("deepseek_v3")
    heads, dim, value_dim = prefix.shapes[0]
    assert (heads, dim, value_dim) == (4, model.config.qk_head_dim, model.config.v_head_dim)
    assert PrefixKV(model.config, P).shapes == prefix.shapes
    save_prefix(prefix, tmp_path)
    again = load_prefix(tmp_path, model=model)
    peftkern.patch(model, again)
    assert torch.equal(again.layer_kv()[1][1], prefix.layer_kv()[1][1])


@pytest.mark.parametrize("family", REFUSED)
def test_sparse_attention_is_refused_by_name(family):
    model = tiny.tiny_model(family)
    prefix = PrefixKV(model, P)
    with pytest.raises(ValueError, match="an indexer selects the keys that a query sees, and a prefix has no index"):
        peftkern.patch(model, prefix)


def test_a_call_that_needs_the_stock_attention_is_refused():
    model, prefix = text_model("deepseek_v3")
    peftkern.patch(model, prefix)
    with pytest.raises(
        ValueError, match=r"stores compressed keys and cannot contain the prefix, got output_attentions"
    ):
        model(input_ids=IDS, output_attentions=True)


def test_a_compressed_cache_is_no_prefix():
    model = tiny.tiny_model("deepseek_v3").eval()
    cache = transformers.DynamicCache()
    model(TEXT, past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"init: layer 0: expected keys and values \[Hkv = 4, at least 4 tokens, D = 32"
    ):
        PrefixKV.from_cache(cache, model_or_config=model)
