# SPDX-License-Identifier: Apache-2.0
"""How models and prefixes are told apart."""

from __future__ import annotations

import torch

from peftkern import PrefixKV
from peftkern.huggingface.fingerprint import fingerprint
from peftkern.self_study.identity import digest_of

from .lab import new_model, other_weights


def test_a_model_is_itself_wherever_it_is_from(lab, tmp_path):
    """Patched or not, loaded from another folder, and with another prefix."""
    want = fingerprint(lab.model)
    assert fingerprint(new_model()) == want
    new_model().save_pretrained(tmp_path)
    assert fingerprint(type(lab.model).from_pretrained(tmp_path)) == want
    assert fingerprint(other_weights(lab.model)) != want
    assert fingerprint(new_model().bfloat16()) != want
    assert fingerprint(new_model(rope_parameters={"rope_type": "default", "rope_theta": 1e3})) != want


def test_a_digest_tells_prefixes_apart():
    """Of the same bytes in another shape, dtype, place or position."""
    kv = [(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))] * 2
    prefixes = [
        PrefixKV.from_cache(kv),
        PrefixKV.from_cache(kv, num_frozen_tokens=1),
        PrefixKV.from_cache([(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))] * 2),
        PrefixKV.from_cache([(torch.zeros(2, 8, 8).half(), torch.zeros(2, 8, 8).half())] * 2),
    ]
    moved = PrefixKV.from_cache(kv)
    moved.positions += 3
    assert len({digest_of(prefix) for prefix in (*prefixes, moved)}) == 5
    assert digest_of(PrefixKV.from_cache(kv)) == digest_of(prefixes[0])
