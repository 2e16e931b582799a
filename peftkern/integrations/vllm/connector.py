# SPDX-License-Identifier: Apache-2.0
"""The connector that vLLM loads by name. Needs vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from ..prefix_folder import PrefixFolder, plain_name
from .geometry import Shape, layers_by_index
from .requests import try_request
from .scheduling import Scheduling, Step
from .writing import Writing, check_layer, layers_with_cache

__all__ = ["PrefixConnector"]

#: Default of ``cache_bytes``.
CACHE_BYTES = 4 << 30


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler sends to the workers."""

    step: Step = field(default_factory=Step)


class PrefixConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Gives a request the prefix or cartridge that ``kv_transfer_params={"prefix": NAME}`` names.

    ``kv_connector_extra_config`` has ``folder``, with one file ``NAME.safetensors`` for each prefix
    (:mod:`peftkern.integrations.kv_file`), and optionally ``default``, the name for requests that name none, and
    ``cache_bytes``, the memory of prefixes that are kept although no request uses them.

    A request's prompt is the text. The connector puts the prefix before it: positions 0 to P - 1 are the prefix's,
    and the text starts at P. A refused request ends with ``finish_reason="error"``, and the log says why.

    Raises:
        ValueError: for a model or configuration that it cannot serve correctly.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder, default, cache_bytes = _settings(self._kv_transfer_config.kv_connector_extra_config)
        _check_engine(vllm_config, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            _check_version()
            group = kv_cache_config.kv_cache_groups[0]
            self._scheduling = Scheduling(
                PrefixFolder(folder, cache_bytes),
                default,
                _shapes(vllm_config, group),
                _dtypes(vllm_config, group),
                group.kv_cache_spec.block_size,
                vllm_config.model_config.max_model_len,
            )
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            world_size = vllm_config.parallel_config.tensor_parallel_size
            self._writing = Writing(vllm_config.model_config.dtype, get_tensor_model_parallel_rank(), world_size)
            self._failed_blocks: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing is handed to another server."""
        return False

    # Beside the scheduler.

    def on_new_request(self, request: Any) -> None:
        """Put the prefix before the prompt, or refuse the request."""
        self._scheduling.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of the prefix that are not in the cache yet; they are loaded before the next step runs."""
        return self._scheduling.num_loaded_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load, for a new request and for one that was preempted alike."""
        self._scheduling.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The plan of this step."""
        return StepMetadata(self._scheduling.take_step())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Let go of the request's prefix. Its blocks are free at once."""
        self._scheduling.finish(request)
        return False, None

    # In a worker.

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Check that every attention layer can be written to."""
        modules = self._vllm_config.compilation_config.static_forward_context
        for name in layers_with_cache(modules).values():
            check_layer(name, modules[name])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write prefixes into the paged cache."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self._writing.run(metadata.step, forward_context.no_compile_layers)
        self._failed_blocks |= metadata.step.failed_blocks

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of refused requests."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are complete, or ahead of the model on its stream."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _settings(extra: Mapping[str, Any]) -> tuple[str, str | None, int]:
    """The folder, the name of the default prefix, and ``cache_bytes``, of ``kv_connector_extra_config``."""
    rest = dict(extra)
    folder, default = rest.pop("folder", None), rest.pop("default", None)
    cache_bytes = rest.pop("cache_bytes", CACHE_BYTES)
    if rest or not isinstance(folder, str) or not Path(folder).is_dir():
        raise ValueError(
            "kv_connector_extra_config: expected an existing 'folder' and perhaps 'default' and 'cache_bytes', "
            f"got {dict(extra)}"
        )
    if default is not None:
        try:
            plain_name(default)
        except ValueError as error:
            raise ValueError(f"kv_connector_extra_config: default: {error}") from None
    if type(cache_bytes) is not int or cache_bytes < 0:
        raise ValueError(
            f"kv_connector_extra_config: cache_bytes: expected an integer of at least 0, got {cache_bytes!r}"
        )
    return folder, default, cache_bytes


def _check_version() -> None:
    """Raise ValueError for a vLLM whose requests differ from those of 0.32, for which this is written."""
    import vllm
    from vllm.v1.request import Request

    request = Request("peftkern", [1, 2], vllm.SamplingParams(), None)
    if not hasattr(KVConnectorBase_V1, "on_new_request") or not try_request(request):
        raise ValueError(f"vllm: expected a version with the requests of 0.32, got {vllm.__version__}")


def _check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise ValueError for a configuration under which a prefix would not be read as it was trained."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise ValueError(f"{name}: expected 1 with prefixes, got {getattr(parallel, name)}")
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "fail":
        raise ValueError(f"kv_load_failure_policy: expected 'fail', so that refused requests end, got {policy!r}")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ValueError(f"speculative_config: expected none or 'ngram' with prefixes, got {speculative.method!r}")
    groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
    if len(groups) != 1:
        raise ValueError(f"model: expected attention layers of one kind, got {len(groups)} groups of layers")


def _shapes(vllm_config: Any, group: Any) -> dict[int, Shape]:
    """The shapes, over all ranks, of the model's layers with a cache."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = _specs(group)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    total = vllm_config.model_config.get_total_num_kv_heads()
    shapes = {}
    for index, name in layers_by_index(group.layer_names).items():
        own = specs[name]
        if type(own) is not FullAttentionSpec:
            raise ValueError(f"model: expected layers of ordinary attention, got {type(own).__name__} in {name}")
        shapes[index] = Shape(own.num_kv_heads if ranks == 1 else total, own.head_size, own.head_size_v)
    return shapes


def _dtypes(vllm_config: Any, group: Any) -> list[torch.dtype]:
    """The dtypes of the model's keys and values, and of caches that store them without a scale."""
    cached = dict.fromkeys(spec.dtype for spec in _specs(group).values())
    plain = [dtype for dtype in cached if dtype.is_floating_point and dtype.itemsize > 1]
    return [vllm_config.model_config.dtype, *plain]


def _specs(group: Any) -> Mapping[str, Any]:
    """What the cache of each layer looks like."""
    spec = group.kv_cache_spec
    return getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
