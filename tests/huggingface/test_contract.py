# SPDX-License-Identifier: Apache-2.0
"""Assumptions of ``peftkern.huggingface`` about transformers and PEFT. A failure names the broken assumption."""

from __future__ import annotations

import inspect
from functools import partial

import peft
import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, cache_utils, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from peftkern.huggingface.cache_layers import PrefixLayer
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS

LLAMA = FAMILIES["llama (GQA)"]


def parameters(function):
    return list(inspect.signature(function).parameters)


def assert_starts_with(function, *names):
    got = parameters(function)
    version = f"transformers {transformers.__version__}, peft {peft.__version__}"
    assert got[: len(names)] == list(names), (
        f"{function.__qualname__} of {version} takes {got}, expected {list(names)}"
    )


def test_attention_interface():
    """attention.attention_forward is called like the stock functions."""
    assert_starts_with(
        sdpa_attention_forward, "module", "query", "key", "value", "attention_mask", "dropout", "scaling"
    )
    assert {"is_causal", "position_bias"} <= set(parameters(sdpa_attention_forward))
    assert callable(AttentionInterface.register)
    assert callable(AttentionInterface().get_interface)


def test_mask_interface():
    """masks.LazyMask receives these keyword arguments and passes them to the stock mask functions."""
    asked = {}

    def record(**request):
        asked.update(request)

    original = dict(AttentionMaskInterface._global_mapping)
    AttentionMaskInterface.register("sdpa", record)
    try:
        models.base_model(LLAMA)(input_ids=IDS, attention_mask=models.LEFT)
    finally:
        AttentionMaskInterface.register("sdpa", original["sdpa"])
    needed = {
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "mask_function",
        "attention_mask",
        "device",
    }
    assert needed <= set(asked), f"mask functions no longer get {needed - set(asked)}"
    assert asked["mask_function"] is masking_utils.causal_mask_function, "a plain causal mask is another function"
    assert asked["attention_mask"].dtype == torch.bool


def test_mask_patterns_are_closures_over_one_value():
    """masks._read_pattern reads them."""
    window = masking_utils.sliding_window_causal_mask_function(7)
    assert window.__code__ is masking_utils.and_masks(masking_utils.causal_mask_function).__code__
    overlay, causal = inspect.getclosurevars(window).nonlocals["mask_functions"]
    assert causal is masking_utils.causal_mask_function
    assert overlay.__code__ is masking_utils.sliding_window_overlay(1).__code__
    assert inspect.getclosurevars(overlay).nonlocals == {"sliding_window": 7}
    assert_starts_with(masking_utils.prepare_padding_mask, "attention_mask", "kv_length", "kv_offset")
    assert_starts_with(masking_utils.find_packed_sequence_indices, "position_ids")


def test_models_hand_masks_on_without_looking():
    """masks.LazyMask is not a tensor."""

    class Opaque:
        def __init__(self, **request):
            self.request = request

    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(type(attention_mask))
        return sdpa_attention_forward(module, query, key, value, masking_utils.sdpa_mask(**attention_mask.request))

    AttentionInterface.register("opaque", attention)
    AttentionMaskInterface.register("opaque", Opaque)
    try:
        for name, family in FAMILIES.items():
            model = models.base_model(family)
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config._attn_implementation_internal = "opaque"
            seen.clear()
            model(input_ids=IDS, attention_mask=models.LEFT, **models.labels_of(family.task))
            assert seen, f"{name} does not dispatch its attention"
            assert set(seen) == {Opaque}, f"{name} changes masks on their way to attention: {set(seen)}"
    finally:
        del AttentionInterface._global_mapping["opaque"], AttentionMaskInterface._global_mapping["opaque"]


def test_caches():
    """cache.PrefixCache implements these calls; cache.PrefixLayer stores like DynamicLayer."""
    assert_starts_with(cache_utils.Cache.__init__, "self", "layers")
    assert_starts_with(cache_utils.Cache.update, "self", "key_states", "value_states", "layer_idx")
    assert_starts_with(cache_utils.Cache.get_seq_length, "self", "layer_idx")
    assert_starts_with(cache_utils.Cache.get_mask_sizes, "self", "query_length", "layer_idx")
    assert_starts_with(cache_utils.DynamicLayer.update, "self", "key_states", "value_states")
    assert_starts_with(cache_utils.DynamicLayer.get_seq_length, "self")
    layer, ours = cache_utils.DynamicLayer(), PrefixLayer(stores=True)
    for each in (layer, ours):
        each.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), kwargs={})
    assert {"keys", "values", "is_initialized", "device"} <= set(vars(layer)) <= set(vars(ours))
    pair = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
    assert pair.self_attention_cache is not pair.cross_attention_cache
    assert pair.is_updated == {}


def test_position_and_mask_come_from_the_cache():
    """A cache that reports P positions shifts the sequence by P, without containing keys for them."""

    class Shifted(cache_utils.DynamicCache):
        def get_seq_length(self, layer_idx=0):
            return super().get_seq_length(layer_idx) + 3

        def get_mask_sizes(self, query_length, layer_idx):
            return super().get_mask_sizes(query_length, layer_idx)[0], 3

    model = models.base_model(LLAMA).eval()
    positions = torch.arange(IDS.shape[1])[None] + 3
    want = model(input_ids=IDS, position_ids=positions).logits
    got = model(input_ids=IDS, past_key_values=Shifted()).logits
    assert models.difference(got, want) < 1e-5, "models no longer take positions from get_seq_length"
    mask = torch.cat([torch.ones(3, 3), models.LEFT], 1)
    rows = models.LEFT.bool()
    want = model(input_ids=IDS, position_ids=positions, attention_mask=models.LEFT).logits[rows]
    got = model(input_ids=IDS, attention_mask=mask, past_key_values=Shifted()).logits[rows]
    assert models.difference(got, want) < 1e-5, "models no longer cut masks by get_mask_sizes"


def test_config_keeps_its_implementation_in_a_field_that_is_not_saved():
    """attention.Implementation is stored there."""
    config = models.base_model(LLAMA).config
    config._attn_implementation_internal = "peftkern"
    assert config._attn_implementation == "peftkern"
    assert "peftkern" not in config.to_json_string()


def test_models_say_whether_they_dispatch_attention():
    """survey.find_backbone calls them."""
    assert transformers.LlamaModel._can_set_attn_implementation()
    assert not transformers.BloomModel._can_set_attn_implementation()
    assert isinstance(models.base_model(LLAMA).get_decoder(), PreTrainedModel)


def test_eager_attention_is_beside_each_model():
    """attention._find_implementation falls back to it."""
    for name, family in FAMILIES.items():
        module = inspect.getmodule(type(models.base_model(family).get_decoder()))
        assert callable(getattr(module, "eager_attention_forward", None)), f"{name}: no eager_attention_forward"


def test_checkpointing_is_a_partial_that_names_its_mode():
    """prefix_patch._is_reentrant reads it."""
    model = models.base_model(LLAMA)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    assert layer.gradient_checkpointing
    assert isinstance(layer._gradient_checkpointing_func, partial)
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}


def test_relative_bias():
    """relative_bias.SpanningBias replaces T5's method."""
    from transformers.models.t5.modeling_t5 import T5Attention

    assert_starts_with(T5Attention.compute_bias, "self", "query_length", "key_length", "device", "past_seen_tokens")


def test_peft():
    """peft_prefix.PeftPrefix replaces get_prompt and reads these attributes."""
    assert_starts_with(peft.PeftModel.get_prompt, "self", "batch_size", "task_ids", "max_cache_len")
    model = models.peft_model(LLAMA, patched=False)
    for name in (
        "num_layers",
        "num_attention_heads",
        "token_dim",
        "num_virtual_tokens",
        "num_transformer_submodules",
    ):
        assert isinstance(getattr(model.active_peft_config, name), int), f"PEFT's config has no {name}"
    assert models.peft_prefix(model).shape == (models.PREFIX, 2 * 2 * 2 * 16)
    projected = models.peft_model(LLAMA, patched=False, **models.PROJECTION).prompt_encoder["default"]
    assert projected.transform(projected.embedding.weight).shape == (models.PREFIX, 2 * 2 * 2 * 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_keyword_arguments_reach_the_attention_function(name):
    """The prefix is passed as such a keyword argument."""
    family = FAMILIES[name]
    model = models.base_model(family)
    seen = []

    def attention(module, *args, **kwargs):
        seen.append("peftkern_prefix" in kwargs)
        kwargs.pop("peftkern_prefix", None)
        return original(module, *args, **kwargs)

    backbone = model.get_decoder()
    implementation = model.config._attn_implementation
    eager = inspect.getmodule(type(backbone)).eager_attention_forward
    original = AttentionInterface().get_interface(implementation, eager)
    AttentionInterface.register("listening", attention)
    AttentionMaskInterface.register("listening", AttentionMaskInterface()[implementation])
    try:
        backbone.config._attn_implementation = "listening"
        backbone(input_ids=IDS, peftkern_prefix=object())
    finally:
        del AttentionInterface._global_mapping["listening"], AttentionMaskInterface._global_mapping["listening"]
    assert seen, f"{name} does not dispatch its attention"
    assert all(seen), f"{name} drops keyword arguments on the way to attention"
