# SPDX-License-Identifier: Apache-2.0
"""Configurations, models and versions of vLLM that the connector refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peftkern.integrations.vllm.geometry import layers_by_index, rank_heads

from . import vllm_stand_ins as vllm
from .vllm_connector import Engine
from .vllm_stand_ins import Request


def test_heads_that_ranks_cannot_share():
    assert rank_heads(torch.arange(8).reshape(1, 8, 1), 2, 3, 4).flatten().tolist() == [6, 7]
    for heads, world_size in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match="share evenly"):
            rank_heads(torch.zeros(1, heads, 1), 1, 0, world_size)


def test_layers_are_told_apart_by_one_number():
    with pytest.raises(ValueError, match="one number in their names, got 'attn'"):
        layers_by_index(["attn"])
    with pytest.raises(ValueError, match="one attention layer of each number"):
        layers_by_index(["layers.0.self_attn.attn", "layers.0.cross_attn.attn"])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("kv_transfer_config", {"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy: expected 'fail'"),
        ("kv_transfer_config", {"kv_connector_extra_config": {}}, "expected an existing 'folder'"),
        (
            "kv_transfer_config",
            {"kv_connector_extra_config": {"folder": ".", "cache_bytes": "4GiB"}},
            "cache_bytes: expected an integer of at least 0, got '4GiB'",
        ),
        (
            "kv_transfer_config",
            {"kv_connector_extra_config": {"folder": ".", "cache_bytes": -1}},
            "cache_bytes: .*-1",
        ),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "cache_bytes": True}}, "got True"),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "default": "../a"}}, "default: name: "),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "default": 3}}, "default: name: .*'3'"),
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode_context_parallel_size: expected 1"),
    ],
)
def test_configurations_that_are_refused(monkeypatch, folder, part, change, message):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder)
    vars(getattr(config, part)).update(change)
    with pytest.raises(ValueError, match=message):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)


def test_models_that_are_refused(monkeypatch, folder):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder, speculative_config=SimpleNamespace(method="eagle"))
    with pytest.raises(ValueError, match="speculative_config: expected none or 'ngram'"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)
    config, cache = vllm.configs(folder)
    cache.kv_cache_groups[0].kv_cache_spec = vllm.SlidingWindowSpec()
    with pytest.raises(ValueError, match="ordinary attention, got SlidingWindowSpec"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)
    cache.kv_cache_groups *= 2
    with pytest.raises(ValueError, match="got 2 groups"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)


def test_a_version_of_vllm_whose_requests_differ_is_refused(monkeypatch, folder):
    monkeypatch.setattr(Request, "num_tokens", 2)
    with pytest.raises(ValueError, match=r"vllm: expected a version with the requests of 0\.32, got 0\.99"):
        Engine(monkeypatch, folder)


def test_an_attention_backend_that_writes_elsewhere_is_refused(monkeypatch, folder):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder)
    connector = PrefixConnector(config, vllm.Role.WORKER, cache)
    layer = config.compilation_config.static_forward_context[vllm.layer_names()[1]]
    layer.attn_backend.forward_includes_kv_cache_update = True
    with pytest.raises(ValueError, match=r"attention backend: .* got STAND_IN in model\.layers\.1"):
        connector.register_kv_caches({})
