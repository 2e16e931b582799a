# SPDX-License-Identifier: Apache-2.0
"""Prefixes whose layers differ in width, have narrower values, or have no keys at all; banks."""

from __future__ import annotations

import pytest
import torch
import transformers

from peftkern import PrefixKV, load_prefix, save_prefix
from peftkern.layer_shapes import LayerShape, shapes_of
from peftkern.prefix_layout import Group

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 60, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

#: Config and the (Hkv, D, D_v) of each layer.
CONFIGS = {
    "one shape": (transformers.LlamaConfig(**SMALL, **HEADS), [(2, 8, 8)] * 4),
    "two widths": (
        transformers.Gemma4TextConfig(
            **SMALL, **HEADS, head_dim=8, global_head_dim=16, num_kv_shared_layers=0, vocab_size_per_layer_input=60,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        [(2, 8, 8), (2, 16, 16)] * 2,
    ),
    "recurrent layers": (
        transformers.Qwen3NextConfig(
            **SMALL, **HEADS, head_dim=16, layer_types=["linear_attention", "full_attention"] * 2
        ),
        [None, (2, 16, 16)] * 2,
    ),
    "compressed keys": (
        transformers.DeepseekV3Config(
            **SMALL, num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4,
            v_head_dim=6, kv_lora_rank=16,
        ),
        [(4, 12, 6)] * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_of_a_config(name):
    config, shapes = CONFIGS[name]
    assert list(shapes_of(config)) == [None if shape is None else LayerShape(*shape) for shape in shapes]


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_kv_has_the_shape_of_each_layer(name):
    config, shapes = CONFIGS[name]
    for pair, shape in zip(PrefixKV(config, 5).layer_kv(), shapes, strict=True):
        if shape is None:
            assert pair is None
        else:
            heads, dim, value_dim = shape
            assert [list(x.shape) for x in pair] == [[heads, 5, dim], [heads, 5, value_dim]]
            assert all(x.stride(-1) == 1 for x in pair)


@pytest.mark.parametrize("bank", [None, 3], ids=["one", "bank"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_keep_every_layer(name, bank, tmp_path):
    prefix = PrefixKV(CONFIGS[name][0], 5, num_frozen_tokens=1, num_prefixes=bank, std=1.0)
    save_prefix(prefix, tmp_path)
    again = load_prefix(tmp_path)
    assert again.shapes == prefix.shapes
    for a, b in zip(prefix.layer_kv(), again.layer_kv(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_block_has_what_its_views_read(num_layers):
    shapes = tuple(LayerShape(heads, dim, dim) for heads, dim in ((2, 4), (1, 8), (3, 2))[:num_layers])
    group = Group(range(num_layers), 5, shapes)
    kv = [tuple(torch.randn(heads, 6, dim) for _ in range(2)) for heads, dim, _ in shapes]
    block = group.block(kv)
    assert block.shape == (5, group.width)
    for pair, want in zip(group.views(block), kv, strict=True):
        assert all(torch.equal(x, y[:, :5]) for x, y in zip(pair, want, strict=True))


def test_an_encoder_tells_the_shapes_that_its_config_does_not():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = transformers.MobileBertConfig(
        **sizes, intermediate_size=64, embedding_size=64, intra_bottleneck_size=32, true_hidden_size=32
    )
    assert shapes_of(transformers.MobileBertModel(config)) == (LayerShape(4, 8, 8),) * 2


def test_gradients_reach_what_a_narrower_layer_reads():
    prefix = PrefixKV(CONFIGS["two widths"][0], 3)
    (key, value), _ = prefix.layer_kv()[:2]
    (key.sum() + 2 * value.sum()).backward()
    cells = prefix.trainable[0].grad.view(3, 8, 2, 16)
    assert (cells[:, 0, :, :8] == 1).all()
    assert (cells[:, 1, :, :8] == 2).all()
    assert cells.sum() == 3 * 2 * 8 * 3


def test_a_bank_is_the_prefixes_it_was_made_of():
    prefixes = [PrefixKV(None, 4, num_layers=2, num_kv_heads=2, head_dim=8, std=1.0) for _ in range(3)]
    bank = PrefixKV(None, 4, num_layers=2, num_kv_heads=2, head_dim=8, num_prefixes=3)
    with torch.no_grad():
        bank.trainable[0].copy_(torch.stack([prefix.trainable[0] for prefix in prefixes]))
    assert bank.prefix_lens.tolist() == [4, 4, 4]
    for layer, pair in enumerate(bank.layer_kv()):
        for row, prefix in enumerate(prefixes):
            assert all(torch.equal(x[row], y) for x, y in zip(pair, prefix.layer_kv()[layer], strict=True))
