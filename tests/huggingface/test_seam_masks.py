# SPDX-License-Identifier: Apache-2.0
"""Attention and masks of other packages: rejected by the trial, or given the dense mask."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, assert_close, token_rows
from tests.huggingface.models import IDS, LEFT, ONES, PREFIX, RIGHT, SEQ, Family

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

# Attention with computation between the cache and the attention function


class Attention(LlamaAttention):
    """Llama's attention, with methods for subclasses to change."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        cache, heads = past_key_values if cache is None else cache, (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        query, key, value, attention_mask = self.between(query, key, value, attention_mask, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(self.behind(out, value).reshape(*hidden_states.shape[:-1], -1)), weights

    def between(self, query, key, value, mask, cache):
        """Between cache and attention function."""
        return query, key, value, mask

    def behind(self, out, value):
        """Behind the attention function."""
        return out


class CountsCache(Attention):
    """It weights by the number of tokens in its cache."""

    def between(self, query, key, value, mask, cache):
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        return query * (1 + 0.1 * seen), key, value, mask


class CountsKeys(Attention):
    """It scales queries by the logarithm of the number of keys, like models for long contexts."""

    def between(self, query, key, value, mask, cache):
        return query * math.log(key.shape[2] + 1), key, value, mask


class NormsKeys(Attention):
    """It normalises keys after the cache instead of before it."""

    def between(self, query, key, value, mask, cache):
        return query, nn.functional.normalize(key, dim=-1) * 4, value, mask


class SwapsValues(Attention):
    """It rearranges values after the cache, like DiffLlama."""

    def between(self, query, key, value, mask, cache):
        return query, key, value.flip(1), mask


class AddsMean(Attention):
    """It adds the mean of all values, including the prefix."""

    def behind(self, out, value):
        return out + 0.3 * value.mean((1, 2))[:, None, None]


class SlicesMask(Attention):
    """It truncates the mask to the number of keys, like models before transformers 4.48."""

    def between(self, query, key, value, mask, cache):
        return query, key, value, None if mask is None else mask[:, :, :, : key.shape[2]]


class LooksAtMask(Attention):
    """It casts the mask, adds a bias by distance, and reads its size."""

    def between(self, query, key, value, mask, cache):
        if mask is None or isinstance(mask, tuple) or mask.ndim != 4:
            return query, key, value, mask
        visible = mask if mask.dtype == torch.bool else mask == 0
        columns = torch.arange(mask.shape[-1], device=mask.device, dtype=query.dtype)
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
        return query, key, value, bias - 0.2 * (columns[-1] - columns)


ODD = [CountsCache, CountsKeys, NormsKeys, SwapsValues, AddsMean, SlicesMask, LooksAtMask]


def odd_family(attention):
    def build(config):
        model = hf.LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.self_attn.__class__ = attention
        return model

    return Family(build, hf.LlamaConfig, LLAMA.arguments)


@pytest.mark.parametrize("attention", ODD)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_odd_attention_has_the_numbers_of_peft(kind, attention):
    make, family = models.peft_model if kind == "prefix" else models.prompt_model, odd_family(attention)
    stock, model = make(family, patched=False), make(family, patched=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftkern.patch(model)
        for training in (False, True):
            for mask in (None, RIGHT):
                labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
                inputs = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
                want, got = (m.train(training)(**inputs) for m in (stock, model))
                keep = ... if mask is None else (mask if kind == "prefix" else models.behind_prompt(mask)).bool()
                assert_close(got.logits.detach()[keep], want.logits.detach()[keep], f"logits, {training=}")
                assert_close(got.loss.detach(), want.loss.detach(), f"loss, {training=}")


@torch.no_grad()
@pytest.mark.parametrize("attention", ODD)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_odd_attention_generates_the_tokens_of_peft(kind, attention):
    make, family, logits = models.peft_model if kind == "prefix" else models.prompt_model, odd_family(attention), []
    for patched in (False, True):
        model = make(family, patched=patched).eval()
        out = model.generate(
            input_ids=IDS, attention_mask=ONES, max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
            **GREEDY,
        )  # fmt: skip
        logits.append(torch.stack(out.logits))
    assert_close(logits[1], logits[0], "logits of the new tokens")


@torch.no_grad()
@pytest.mark.parametrize("attention", ODD)
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_odd_attention_in_a_plain_model_is_right_or_refused(method, attention):
    family = odd_family(attention)
    stock, learned = models.base_model(family).eval(), by_hand.llama_prefix()
    for mask in (None, RIGHT):
        if method == "native prefix":
            want = by_hand.with_prefix(stock, learned, IDS, mask).logits
        else:
            want = token_rows(by_hand.with_prompt(stock, by_hand.prompt_values(), IDS, mask).logits, SEQ)
        keep = (ONES if mask is None else mask).bool()

        def logits(mask=mask, keep=keep):
            module = learned if method == "native prefix" else by_hand.soft_prompt()
            with peftkern.patched(models.base_model(family).eval(), module) as model:
                return model(input_ids=IDS, attention_mask=mask).logits[keep]

        by_hand.same_or_named(logits, want[keep], "attention", "layer", "prefix", "rows", what="logits")


# Masks behave like tensors

TOUCHES = {
    "slice": lambda mask: mask[:, :, :, :],
    "last rows": lambda mask: torch.cat([mask[:, :, :-1], mask[:, :, -1:]], 2),
    "to": lambda mask: mask.to(mask.dtype).contiguous(),
    "and": lambda mask: mask & mask.new_ones(mask.shape),
    "where": lambda mask: torch.where(mask.new_ones(()), mask, ~mask),
    "additive": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -1e9),
    "arithmetic": lambda mask: (1.0 - mask.float()) * -1e9 + 0.0,
    "attributes": lambda mask: mask.view(mask.size()) if mask.ndim == mask.dim() == len(mask.shape) else None,
    "clone": lambda mask: mask.clone(),
    "in place": lambda mask: mask.clone().masked_fill_(torch.arange(mask.shape[-1]) == mask.shape[-1] - 3, False),
    "hides a key of the prefix": lambda mask: torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1),
}


def touch(model, change):
    """Every layer changes its mask, like models with their own masks."""

    def hook(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        return None if mask is None else (args, {**kwargs, "attention_mask": change(mask)})

    for layer in model.model.layers:
        layer.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("name", TOUCHES)
@pytest.mark.parametrize(("mask", "order"), [(RIGHT, "before"), (LEFT, "after")], ids=["right", "left"])
@pytest.mark.parametrize("method", ["peft prefix", "native prefix"])
def test_masks_that_layers_change(method, order, mask, name):
    change = TOUCHES[name]
    if method == "peft prefix":
        stock, model = (models.peft_model(LLAMA, patched=False).eval() for _ in range(2))
        touch(stock.get_base_model(), change)
        want, target = stock(input_ids=IDS, attention_mask=mask).logits, model.get_base_model()
    else:
        stock, model = (models.base_model(LLAMA).eval() for _ in range(2))
        touch(stock, change)
        want, target = by_hand.with_prefix(stock, by_hand.llama_prefix(), IDS, mask).logits, model
    if order == "before":
        touch(target, change)
    peftkern.patch(model, *([by_hand.llama_prefix()] if method == "native prefix" else []))
    if order == "after":
        touch(target, change)
    keep = mask.bool()
    by_hand.same_or_named(
        lambda: model(input_ids=IDS, attention_mask=mask).logits[keep], want[keep], "mask", what="logits"
    )


def dense(kind):
    """A mask [B, 1, S, S] of the caller: True where a token sees another."""
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    if kind == "two sequences a row":
        causal = causal & ((torch.arange(SEQ) < 4)[:, None] == (torch.arange(SEQ) < 4))
    elif kind == "sees all of the first three":
        causal = causal | (torch.arange(SEQ) < 3)
    return causal.expand(len(IDS), 1, SEQ, SEQ).clone()


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("kind", ["causal", "two sequences a row", "sees all of the first three"])
@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_a_dense_mask_of_the_caller(method, kind, additive):
    """It covers the sequence alone; every token attends to the prefix."""
    mask, stock = dense(kind), models.base_model(LLAMA).eval()
    if method == "native prefix":
        whole = nn.functional.pad(mask, (PREFIX, 0), value=True)
    else:
        whole = nn.functional.pad(mask, (PREFIX, 0, PREFIX, 0), value=True)
        whole[:, :, :PREFIX] = torch.ones(PREFIX, PREFIX + SEQ, dtype=torch.bool).tril()
    if additive:
        mask, whole = (torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (mask, whole))
    if method == "native prefix":
        positions = torch.arange(SEQ)[None] + PREFIX
        cache = by_hand.stock_cache(by_hand.llama_prefix(), len(IDS))
        want = stock(input_ids=IDS, attention_mask=whole, past_key_values=cache, position_ids=positions).logits
    else:
        want = by_hand.with_prompt(stock, by_hand.prompt_values(), IDS, attention_mask=whole).logits
    model = by_hand.build(method).eval()
    by_hand.same_or_named(
        lambda: model(input_ids=IDS, attention_mask=mask).logits,
        token_rows(want, SEQ),
        "attention_mask",
        what="logits",
    )
