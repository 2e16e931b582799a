# SPDX-License-Identifier: Apache-2.0
"""Masks as descriptions: the compact form, where it exists, equals the dense form."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from peftkern.huggingface.masks import LazyMask
from tests.huggingface import models
from tests.huggingface.models import BATCH, FAMILIES, LEFT, ONES, PREFIX, RIGHT, SEQ


def request(mask_function, attention_mask=None, seen=0, offset=PREFIX, **other):
    """The mask that ``create_causal_mask`` requests with a prefix, after ``seen`` of SEQ tokens."""
    return {
        **{"batch_size": BATCH, "q_length": SEQ - seen, "kv_length": SEQ, "q_offset": offset + seen},
        **{"kv_offset": offset, "mask_function": mask_function, "device": "cpu", "dtype": torch.float32},
        "attention_mask": None if attention_mask is None else behind_prefix(attention_mask, offset),
        **other,
    }


def behind_prefix(mask, offset=PREFIX):
    return torch.cat([torch.ones(BATCH, offset), mask], 1).bool()


def expand(compact, q_len, num_keys):
    """bool [B, 1, S, T] of a compact mask, from its definition."""
    i = torch.arange(q_len)[:, None] + num_keys - q_len
    t = torch.arange(num_keys)
    visible = (t <= i) if compact.causal else torch.ones(q_len, num_keys, dtype=torch.bool)
    if compact.window is not None:
        visible = visible & (i - t < compact.window)
    keys = torch.ones(BATCH, num_keys, dtype=torch.bool) if compact.key_mask is None else compact.key_mask
    return (visible & keys[:, None, :])[:, None]


PATTERNS = {
    "causal": causal_mask_function,
    "bidirectional": bidirectional_mask_function,
    "window": sliding_window_causal_mask_function(3),
}


@pytest.mark.parametrize("seen", [0, 3, SEQ - 1])
@pytest.mark.parametrize("padding", [None, ONES, RIGHT, LEFT], ids=["none", "ones", "right", "left"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compact_form_is_the_dense_mask(pattern, padding, seen):
    asked = request(PATTERNS[pattern], padding, seen)
    compact = LazyMask(**asked).compact(SEQ)
    assert compact is not None
    dense = sdpa_mask(**{**asked, "allow_is_causal_skip": False})
    assert torch.equal(expand(compact, SEQ - seen, SEQ), dense)


@pytest.mark.parametrize("padding", [None, ONES], ids=["none", "ones"])
def test_a_mask_without_padding_costs_no_key_mask(padding):
    assert LazyMask(**request(causal_mask_function, padding)).compact(SEQ).key_mask is None


@pytest.mark.parametrize(
    "mask_function",
    [
        chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
        sliding_window_bidirectional_mask_function(3),
        or_masks(causal_mask_function, bidirectional_mask_function),
        packed_sequence_mask_function(torch.zeros(BATCH, SEQ)),
        lambda b, h, q, k: k <= q,
    ],
    ids=["chunks", "two-sided window", "or", "packed", "unknown"],
)
def test_what_is_not_recognised_has_no_compact_form(mask_function):
    assert LazyMask(**request(mask_function)).compact(SEQ) is None


def test_unaligned_causal_mask_has_no_compact_form():
    """A static cache has columns for tokens that do not exist yet."""
    asked = {**request(causal_mask_function), "kv_length": SEQ + 4}
    assert LazyMask(**asked).compact(SEQ + 4) is None


def test_bias_has_columns_for_the_prefix_if_the_mask_knows_positions_for_it():
    chunks = chunked_causal_mask_function(PREFIX + 2, torch.zeros(BATCH, dtype=torch.long))
    bias = LazyMask(**request(chunks, LEFT)).bias(SEQ, PREFIX, torch.float32)
    assert bias.shape == (BATCH, 1, SEQ, PREFIX + SEQ)
    prefix_visible = bias[2, 0, :, :PREFIX] == 0
    assert prefix_visible.all(1).tolist() == [True] * 2 + [False] * (SEQ - 2), "the second chunk starts at query 2"
    assert LazyMask(**request(chunks, LEFT, offset=0)).bias(SEQ, PREFIX, torch.float32).shape[-1] == SEQ


@pytest.mark.parametrize("seen", [0, 3])
def test_a_mask_made_above_the_backbone_counts_the_prefix_in_windows(seen):
    """The mask was made before the prefix was known; its pattern is unknown and contains a window."""
    one_ahead = or_masks(sliding_window_causal_mask_function(4), lambda batch, head, query, key: key == query + 1)
    above, below = (LazyMask(**request(one_ahead, LEFT, seen, offset)) for offset in (0, PREFIX))
    assert above.compact(SEQ) is None, "the pattern is unknown"
    want = below.bias(SEQ, PREFIX, torch.float32)
    assert not (want[..., :PREFIX] == 0).all(), "the window hides keys of the prefix"
    assert torch.equal(above.bias(SEQ, PREFIX, torch.float32), want)


def test_encoder_mask_with_prefix_columns_is_read_from_the_end():
    """Encoders make masks without a cache: as wide as the attention mask that PEFT extended."""
    asked = request(bidirectional_mask_function, RIGHT, offset=PREFIX)
    asked.update(q_offset=0, kv_offset=0, kv_length=PREFIX + SEQ)
    assert torch.equal(LazyMask(**asked).compact(SEQ).key_mask, RIGHT.bool())


@pytest.mark.parametrize("padding", [None, LEFT], ids=["none", "left"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_implementations_get_their_own_mask(name, padding):
    asked = request(causal_mask_function, padding, allow_is_causal_skip=True)
    want = {"sdpa": sdpa_mask, "eager": eager_mask}[name](**asked)
    got = LazyMask(**asked).for_implementation(name, SEQ)
    assert (got is None and want is None) or torch.equal(got, want)


def test_an_implementation_without_mask_function_gets_none():
    assert LazyMask(**request(causal_mask_function, LEFT)).for_implementation("unheard of", SEQ) is None


def test_layers_share_what_was_built():
    mask = LazyMask(**request(causal_mask_function, LEFT))
    assert mask.compact(SEQ).key_mask is mask.compact(SEQ).key_mask
    assert mask.bias(SEQ, 0, torch.float32) is mask.bias(SEQ, 0, torch.float32)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4 (chunks)"])
def test_no_model_but_one_with_chunks_builds_the_square_mask(name, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"{name} asked for a dense mask")

    monkeypatch.setattr(LazyMask, "bias", refuse)
    family = FAMILIES[name]
    for mask in (None, LEFT):
        models.training_step(models.peft_model(family, patched=True), family.task, mask)
