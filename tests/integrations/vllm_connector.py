# SPDX-License-Identifier: Apache-2.0
"""The connector beside stand-ins for vLLM's scheduler and workers, and prefixes for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from peftkern.integrations.kv_file import KVFile, write_kv
from peftkern.integrations.vllm import prefix_params

from . import vllm_stand_ins as vllm
from .vllm_stand_ins import BLOCK, DIM, HEADS, LAYERS

LENGTHS = {"a": 5, "b": 8, "c": 19}


def write_prefix(folder, name, length, seed=0, layers=LAYERS, **changes):
    generator = torch.Generator().manual_seed(seed)
    pairs = [tuple(torch.randn(length, HEADS, DIM, generator=generator) for _ in range(2)) for _ in range(layers)]
    write_kv(folder / f"{name}.safetensors", KVFile(pairs, **{"positions": length, **changes}))
    return pairs


class Engine:
    """A connector beside a scheduler and one beside each rank's worker."""

    def __init__(self, monkeypatch, folder, ranks=1, extra=None):
        vllm.install(monkeypatch)
        self.scheduler = self._connector(folder, vllm.Role.SCHEDULER, ranks, extra)[0]
        self.workers, self.layers = [], []
        for rank in range(ranks):
            vllm.set_rank(rank)
            worker, config = self._connector(folder, vllm.Role.WORKER, ranks, extra)
            self.workers.append(worker)
            self.layers.append(config.compilation_config.static_forward_context)
            worker.register_kv_caches({})
        self.free = list(range(16))

    @staticmethod
    def _connector(folder, role, ranks, extra):
        from peftkern.integrations.vllm.connector import PrefixConnector

        config, cache = vllm.configs(folder, ranks)
        config.kv_transfer_config.kv_connector_extra_config |= extra or {}
        return PrefixConnector(config, role, cache), config

    def add(self, request):
        self.scheduler.on_new_request(request)
        return request

    def schedule(self, *requests, computed=0):
        """One step: lookup, blocks, plan, work. Returns the blocks of each request, and those that failed."""
        tables = []
        for request in requests:
            loaded, asynchronous = self.scheduler.get_num_new_matched_tokens(request, computed)
            assert not asynchronous
            loaded = 0 if request.skip_reading_prefix_cache else loaded  # as vLLM's scheduler has it
            assert computed + loaded < len(request._all_token_ids) or not loaded
            table = [self.free.pop() for _ in range(-(-len(request._all_token_ids) // BLOCK))]
            self.scheduler.update_state_after_alloc(
                request, SimpleNamespace(get_block_ids=lambda t=table: (t,)), loaded
            )
            tables.append(table)
        metadata = self.scheduler.build_connector_meta(SimpleNamespace())
        failed = set()
        for worker, layers in zip(self.workers, self.layers, strict=True):
            worker.bind_connector_metadata(metadata)
            worker.start_load_kv(SimpleNamespace(no_compile_layers=layers))
            failed |= worker.get_block_ids_with_load_errors()
            assert not worker.get_block_ids_with_load_errors()
        return tables, failed

    def read(self, table, start, stop, rank=0):
        """(key, value) of the tokens in a rank's cache, for each layer; the order of its heads is its own."""
        slots = torch.tensor([table[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)])
        own = [self.layers[rank][name].kv_cache[slots].flip(1) for name in vllm.layer_names()]
        return [(x[..., :DIM], x[..., DIM:]) for x in own]


def params_of(name):
    return prefix_params(name)["kv_transfer_params"]


def equal_pairs(found, pairs, start=0):
    return all(
        torch.equal(x, y[start:])
        for pair, own in zip(found, pairs, strict=True)
        for x, y in zip(pair, own, strict=True)
    )
