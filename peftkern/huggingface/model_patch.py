# SPDX-License-Identifier: Apache-2.0
"""What a patched model has that others do not: an attention implementation, hooks, and marks on attention modules."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from .attention import Implementation, register
from .cache import SITE, KeyValue, PrefixCache, PrefixOptions
from .positions import PositionTable, watch_tables
from .relative_bias import SpanningBias
from .survey import Site, find_backbone, survey

__all__ = ["PATCH", "ModelPatch", "self_attention_cache"]

#: Attribute of a patched model: its :class:`ModelPatch`.
PATCH = "_peftkern_patch"


class ModelPatch:
    """A prefix in one model. Subclasses say where the prefix comes from.

    The prefix travels as a keyword argument: the hook on the backbone adds it, ``transformers`` hands it down to the
    attention function. That way also leads through activation checkpointing, which takes the cache away from layers.

    Args:
        model: what the user patches.
        base: the Hugging Face model in it.
        options: for the attention function.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel, options: PrefixOptions) -> None:
        self.model = model
        self.base = base
        self.options = options
        self.backbone = find_backbone(base)
        self.arguments = tuple(inspect.signature(self.backbone.forward).parameters)
        self.sites: dict[nn.Module, Site] = {}
        self._handles: list[RemovableHandle] = []
        self._biases: list[SpanningBias] = []
        self._tables: list[PositionTable] = []
        self._checkpointed = [m for m in self.backbone.modules() if hasattr(m, "gradient_checkpointing")]

    def check_prefix(self) -> None:
        """Raise ValueError unless the prefix fits the model, whose :attr:`sites` are known."""
        raise NotImplementedError

    def find_cache(self, kwargs: dict[str, Any]) -> PrefixCache | None:
        """The prefix for a call of the backbone; None if it gets none. May put one into ``kwargs``."""
        raise NotImplementedError

    def place_sequence(self, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Put mask and positions in ``kwargs`` behind the prefix."""

    def clean_output(self, cache: PrefixCache, kwargs: dict[str, Any], output: Any) -> Any:
        """The backbone's output as the caller expects it."""
        return output

    def install(self) -> None:
        """Change the model. If that fails, the model is as it was."""
        register()
        try:
            for config in self._configs():
                if not isinstance(config._attn_implementation, Implementation):
                    config._attn_implementation_internal = Implementation(config._attn_implementation)
            with watch_tables(self.backbone) as self._tables:
                self.sites = survey(self.backbone, {module: name for name, module in self.model.named_modules()})
            for module, site in self.sites.items():
                setattr(module, SITE, site)
            self.check_prefix()
            for module in self.sites:
                if hasattr(module, "compute_bias"):
                    self._biases.append(SpanningBias(module))
            self._handles.append(self.backbone.register_forward_pre_hook(self.before_forward, with_kwargs=True))
            self._handles.append(
                self.backbone.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True)
            )
        except BaseException:
            self.remove()
            raise
        setattr(self.model, PATCH, self)

    def remove(self) -> None:
        """Undo :meth:`install`."""
        for handle in self._handles:
            handle.remove()
        for bias in self._biases:
            bias.remove()
        for module in self.sites:
            delattr(module, SITE)
        for config in self._configs():
            if isinstance(config._attn_implementation, Implementation):
                config._attn_implementation_internal = config._attn_implementation.over
        self.model.__dict__.pop(PATCH, None)

    def _configs(self) -> list[Any]:
        """The configs whose attention implementation rules in the model, each once."""
        configs = [module.config for module in self.base.modules() if isinstance(module, PreTrainedModel)]
        return list({id(config): config for config in configs}.values())

    def check_geometry(self, name: str, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Raise ValueError unless a prefix of this shape fits the model."""
        for site in self.sites.values():
            if site.layer >= num_layers:
                raise ValueError(
                    f"{name}: expected a prefix for layer {site.layer} ({site.name}), got {num_layers} layers"
                )
            if (site.num_kv_heads, site.head_dim) != (num_kv_heads, head_dim):
                raise ValueError(
                    f"{name}: expected {site.num_kv_heads} key-value heads of {site.head_dim}, as {site.name} has, "
                    f"got {num_kv_heads} of {head_dim}"
                )

    def new_cache(
        self, prefix: Sequence[KeyValue | None], *, offset: int, stores: bool, offset_outside: bool
    ) -> PrefixCache:
        """A cache for a call of the backbone that has none."""
        if torch.is_grad_enabled() and self.backbone.training and any(map(_is_reentrant, self._checkpointed)):
            self._check_reentrant(prefix)
        return PrefixCache(prefix, offset=offset, stores=stores, offset_outside=offset_outside, options=self.options)

    def _check_reentrant(self, prefix: Sequence[KeyValue | None]) -> None:
        """Raise where reentrant checkpointing fails, or loses gradients without a word."""
        keys = [kv[0] for kv in prefix if kv is not None]
        if any(_saves_tensors(key) for key in keys[:1]):
            reason = "the prefix is computed (projection, MLP), through which it would go back once a layer"
        elif len(self.sites) > len({site.layer for site in self.sites.values()}):
            reason = "layers share keys, whose gradients it loses"
        else:
            return
        advice = 'gradient_checkpointing_enable({"use_reentrant": False})'
        raise ValueError(f"use_reentrant: expected False, as {reason}, got True; use {advice}")

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: give the backbone its prefix."""
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache = self.find_cache(kwargs)
        if cache is not None:
            cache.begin()
            try:
                self.place_sequence(cache, kwargs)
                _refuse_packing(kwargs)
                for table in self._tables:
                    table.check(cache, kwargs)
            except Exception:
                cache.finish([])
                raise
            kwargs["peftkern_prefix"] = cache
        return (), kwargs

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: check that no layer ran without its prefix. ``output`` is None if the forward has raised.

        All that it knows of the call is in ``kwargs``: calls may be nested, or run in several threads.
        """
        cache: PrefixCache | None = kwargs.get("peftkern_prefix")
        if cache is None:
            return output
        expected = [site.name for site in self.sites.values() if cache.prefix[site.layer] is not None]
        missing = cache.finish(expected)
        if output is None:
            return None
        implementation = self.backbone.config._attn_implementation
        drops_layers = self.backbone.training and getattr(self.backbone, "layerdrop", 0.0) > 0.0
        if missing and not (drops_layers and isinstance(implementation, Implementation)):
            raise ValueError(
                f"model: attention ran without its prefix in {', '.join(missing)}; expected 'peftkern' as attention "
                f"implementation, got {str(implementation)!r}; unpatch the model and patch it again"
            )
        return self.clean_output(cache, kwargs, output)


def self_attention_cache(cache: Cache | None) -> Cache | None:
    """The part of a cache that self attention reads."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _refuse_packing(kwargs: dict[str, Any]) -> None:
    """Without a mask, models read several sequences per row off the positions; with a cache they do not."""
    position_ids = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or position_ids is None or position_ids.dim() != 2:
        return
    if not is_tracing(position_ids) and find_packed_sequence_indices(position_ids) is not None:
        raise ValueError(
            "position_ids: expected one sequence a row, got packed ones, which would see each other; pass padded "
            "sequences with an attention_mask"
        )


def _is_reentrant(module: Any) -> bool:
    """Whether a module runs under reentrant checkpointing."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(module.gradient_checkpointing and getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _saves_tensors(tensor: Tensor) -> bool:
    """Whether the graph behind ``tensor`` holds tensors that its first backward pass frees."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if any(name.startswith("_raw_saved_") for name in dir(node)):
                return True
            nodes += [parent for parent, _ in node.next_functions]
    return False
