# SPDX-License-Identifier: Apache-2.0
"""Calls of a patched model that are compiled per layer, interrupted, hooked, or continue unusual caches."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import StaticCache

import peftkern
from peftkern.huggingface.masks import LazyMask
from peftkern.huggingface.packing import PackedBatch
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import METHODS
from tests.huggingface.models import FAMILIES, IDS, ONES, PREFIX, RIGHT, difference
from tests.huggingface.uncommon import UNCOMMON

LLAMA = FAMILIES["llama (GQA)"]
LABELS = IDS.masked_fill(RIGHT == 0, -100)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_compiled_one_by_one(method):
    """As in accelerate's regional compilation."""
    want = by_hand.build(method).train()(input_ids=IDS, attention_mask=RIGHT, labels=LABELS).loss
    torch._dynamo.reset()
    model = by_hand.build(method).train()
    for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        layer.compile(backend="eager")
    got = model(input_ids=IDS, attention_mask=RIGHT, labels=LABELS).loss
    got.backward()
    assert difference(got, want) <= 1e-5
    with torch.no_grad():
        model.eval()(input_ids=IDS, attention_mask=RIGHT)


def test_a_mask_that_is_edited_in_place():
    """A mask that hides the first token from all others."""
    model, stock = (models.peft_model(LLAMA, patched=patched).eval() for patched in (True, False))

    def hide(module, args, kwargs):
        kwargs["attention_mask"][..., PREFIX] = False
        return args, kwargs

    for patched in (model, stock):
        patched.get_base_model().model.layers[0].register_forward_pre_hook(hide, with_kwargs=True)
    with torch.no_grad():
        want, got = (m(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT.bool()] for m in (stock, model))
    assert difference(got, want) <= 1e-5


@pytest.mark.parametrize("seen", [PREFIX - 1, PREFIX, PREFIX + 1])
def test_a_cache_of_the_stock_attention_goes_on(seen):
    model = models.base_model(LLAMA).eval()
    model.set_attn_implementation("eager")
    peftkern.patch(model, by_hand.llama_prefix())
    ids = torch.cat([IDS, IDS], 1)[:, : seen + 1]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits[:, -1:]
        with pytest.warns(UserWarning, match="output_attentions"):
            out = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], output_attentions=True, use_cache=True)
        cache = out["past_key_values"] if "past_key_values" in out else out["cache"]
        got = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    assert difference(got, want) <= 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_cache_that_is_reset_begins_again():
    """It has held a concatenated prompt."""
    model = models.base_model(UNCOMMON["stablelm"]).eval()
    peftkern.patch(model, peftkern.SoftPrompt(model, 4))
    cache = StaticCache(model.config, max_cache_len=24)
    want = model(input_ids=IDS, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert difference(model(input_ids=IDS, past_key_values=cache, use_cache=True).logits, want) <= 1e-5


class Interrupt:
    """A hook that presses Ctrl-C once."""

    def __init__(self):
        self.armed = True

    def __call__(self, module, args):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["native prefix", "native prompt"])
def test_ctrl_c_leaves_nothing_behind(method):
    model = by_hand.build(method).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = model.model.layers[1].register_forward_pre_hook(Interrupt())
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    if method == "native prompt":
        with pytest.raises(ValueError, match="expected a call of LlamaForCausalLM"):
            model.forward(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_the_backbone_see_the_batch(method, order):
    base = models.base_model(LLAMA)
    shapes = []

    def look(module, args, output):
        shapes.append(output[0].shape)

    if method.startswith("native"):
        if order == "before":
            base.model.register_forward_hook(look)
        model = by_hand.build(method, base=base)
    else:
        make = models.peft_model if method == "peft prefix" else models.prompt_model
        model = make(LLAMA, patched=False)
        base = model.get_base_model()
        if order == "before":
            base.model.register_forward_hook(look)
        peftkern.patch(model)
    if order == "after":
        base.model.register_forward_hook(look)
    shapes.clear()
    model.train()(input_ids=IDS, attention_mask=RIGHT, labels=LABELS).loss.backward()
    rows = {IDS.shape[1], IDS.shape[1] + PREFIX}
    assert [(shape[0], shape[1] in rows) for shape in shapes] == [(IDS.shape[0], True)]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_leaves_no_stream_behind(method, monkeypatch):
    """Without the garbage collector: packed batches hold the graph of the prompt."""
    streams = weakref.WeakSet()
    init = PackedBatch.__init__

    def note(self, *args, **kwargs):
        init(self, *args, **kwargs)
        streams.add(self)

    monkeypatch.setattr(PackedBatch, "__init__", note)
    model = by_hand.build(method).train()
    gc.collect()
    streams.clear()
    gc.disable()
    try:
        model(input_ids=IDS, attention_mask=RIGHT, labels=LABELS).loss.backward()
        assert not streams
    finally:
        gc.enable()


def test_a_cast_of_the_embeddings_keeps_the_prompt():
    """FSDP casts the inputs of the modules that it wraps."""
    model = models.prompt_model(LLAMA, patched=True).train()
    rows = []
    base = model.get_base_model()
    base.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].to(torch.float32)}),
        with_kwargs=True, prepend=True,
    )  # fmt: skip
    base.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model(input_ids=IDS, attention_mask=ONES, labels=IDS)
    assert rows == [PREFIX + IDS.numel()]


def test_looking_at_a_mask_builds_nothing(monkeypatch):
    def dense(self):
        raise AssertionError("the dense mask was built")

    masks = []
    model = models.peft_model(LLAMA, patched=True).eval()
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr(LazyMask, "dense", dense)
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=RIGHT)
    (mask,) = masks
    batch, length = IDS.shape
    assert (tuple(mask.shape), mask.ndim, mask.dim(), mask.dtype) == (
        (batch, 1, length, PREFIX + length), 4, 4, torch.bool,
    )  # fmt: skip
