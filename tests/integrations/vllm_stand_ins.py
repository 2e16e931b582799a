# SPDX-License-Identifier: Apache-2.0
"""The parts of vLLM that the connector touches, in a few lines each, so that its bookkeeping runs without vLLM."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

BLOCK = 8
#: Layers, key-value heads over all ranks, and head dim of the model.
LAYERS, HEADS, DIM = 2, 2, 4


class Role(enum.Enum):
    SCHEDULER, WORKER = range(2)


class Metadata:
    pass


class Base:
    """``KVConnectorBase_V1``."""

    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_transfer_config = vllm_config, vllm_config.kv_transfer_config
        self._connector_metadata: Any = None

    def on_new_request(self, request: Any) -> None: ...

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._connector_metadata = metadata

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


class FullAttentionSpec:
    block_size, dtype = BLOCK, torch.float32

    def __init__(self, num_kv_heads: int = HEADS, head_size: int = DIM) -> None:
        self.num_kv_heads, self.head_size, self.head_size_v = num_kv_heads, head_size, head_size


class SlidingWindowSpec(FullAttentionSpec):
    pass


def set_rank(rank: int) -> None:
    """The rank of the next worker."""
    sys.modules["vllm.distributed"].get_tensor_model_parallel_rank = lambda: rank


def install(monkeypatch: Any) -> None:
    """Put stand-ins into ``sys.modules``, and let the connector be imported anew."""
    contents = {
        "vllm": {"__version__": "0.99", "SamplingParams": lambda: SimpleNamespace(repetition_penalty=1.0)},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.distributed.kv_transfer": {},
        "vllm.distributed.kv_transfer.kv_connector": {},
        "vllm.distributed.kv_transfer.kv_connector.v1": {},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base, "KVConnectorMetadata": Metadata, "KVConnectorRole": Role,
        },
        "vllm.v1": {},
        "vllm.v1.request": {"Request": lambda name, ids, params, pooling: Request(name, ids, sampling_params=params)},
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": FullAttentionSpec},
    }  # fmt: skip
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "peftkern.integrations.vllm.connector", raising=False)


class Request:
    """``vllm.v1.request.Request``: hashes of full blocks are chained, and the salt is in the first."""

    def __init__(self, request_id: str, ids: list[int] | None, params: Any = None, **options: Any) -> None:
        self.request_id = request_id
        self.prompt_token_ids, self._all_token_ids = ids, list(ids or [])
        self.num_prompt_tokens = len(self._all_token_ids)
        self.kv_transfer_params = params
        self.sampling_params = SimpleNamespace(repetition_penalty=1.0)
        self.prompt_embeds = self.prompt_is_token_ids = self.cache_salt = None
        self.mm_features: list[Any] = []
        self.resumable = self.skip_reading_prefix_cache = False
        self.block_hashes: list[Any] = []
        self.__dict__.update(options)
        self.update_block_hashes()

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        return tuple(self._all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._all_token_ids)

    def update_block_hashes(self) -> None:
        while (start := len(self.block_hashes) * BLOCK) + BLOCK <= len(self._all_token_ids):
            before = self.block_hashes[-1] if self.block_hashes else self.cache_salt
            self.block_hashes.append(hash((before, tuple(self._all_token_ids[start : start + BLOCK]))))


class Impl:
    """An attention layer's implementation, which packs its cache in an order of its own."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        assert key.dtype == value.dtype == torch.float32
        assert slots.dtype == torch.int64
        kv_cache[slots] = torch.cat([key, value], -1).flip(1)


def worker_layer(num_kv_heads: int, num_blocks: int = 16) -> Any:
    """An attention layer; its cache [slots, Hkv, 2 D] is full of NaN."""
    cache = torch.full((num_blocks * BLOCK, num_kv_heads, 2 * DIM), torch.nan)
    backend = SimpleNamespace(forward_includes_kv_cache_update=False, get_name=lambda: "STAND_IN")
    return SimpleNamespace(kv_cache=cache, impl=Impl(), num_kv_heads=num_kv_heads, attn_backend=backend)


def layer_names() -> list[str]:
    return [f"model.layers.{index}.self_attn.attn" for index in range(LAYERS)]


def configs(folder: Any, ranks: int = 1, **changes: Any) -> tuple[Any, Any]:
    """``VllmConfig`` and ``KVCacheConfig``; ``changes`` replace parts of the first."""
    own = max(HEADS // ranks, 1)
    layers: dict[str, Any] = {name: worker_layer(own) for name in layer_names()}
    layers["model.layers.0.mlp.experts"] = SimpleNamespace()  # a layer without a cache
    parts: dict[str, Any] = {
        "kv_transfer_config": SimpleNamespace(
            kv_connector_extra_config={"folder": str(folder)}, kv_load_failure_policy="fail"
        ),
        "parallel_config": SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1),
        "model_config": SimpleNamespace(
            max_model_len=64, dtype=torch.float32, get_total_num_kv_heads=lambda: HEADS
        ),
        "compilation_config": SimpleNamespace(static_forward_context=layers),
        "speculative_config": None,
    }  # fmt: skip
    group = SimpleNamespace(layer_names=layer_names(), kv_cache_spec=FullAttentionSpec(own))
    return SimpleNamespace(**{**parts, **changes}), SimpleNamespace(kv_cache_groups=[group])
