# SPDX-License-Identifier: Apache-2.0
"""Hooks and markers a patch installs, for prefixes and prompts alike.

::

    base model      before_call     decides whether the batch is packed, and on which rows the output layer runs
      backbone      before_forward  passes the prefix to the layers, packs the embeddings
        layers      attention_forward
      backbone      after_forward   checks that every layer has read its prefix, unpacks hidden states
    base model      after_call      unpacks logits

Outside the backbone every tensor has the shape of the batch, unless the output layer is known to process each row
independently.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..eager_attention import configs_of
from ..model_info import cache_argument, cache_name, given_cache, rename_cache
from ..recurrent_state import LayerState, meta_states
from .attention import Implementation, register, set_implementation
from .cache import LAYER_INFO, REQUIRED, WITHOUT_PREFIX, PrefixCache, PrefixOptions
from .call_arguments import BOUNDARIES, bind, count_prefix, forward_arguments, self_attention_cache, tokens_of
from .call_options import CallOptions, LogitsError
from .calls import running, without_checkpointing
from .eager_trial import EagerTrial
from .implementation import check_implementation, without_prefix
from .layout import HostNumbers
from .masks import LazyMask, unmade
from .mixed import place_rows, row_offsets
from .outputs import unpack_all, unpack_logits, without_cache
from .packer import Packer
from .packing import LogitRows, PackedBatch
from .positions import PositionTable, shift_positions, watch_tables
from .probing import quiet
from .recurrent import RecurrentModule, layers_with_states, recurrent_layers, watch_recurrent
from .relative_bias import SpanningBias
from .sharer import Sharer
from .survey import PrefixLayerInfo, find_backbone, needs_encoder, survey, survey_without_cache
from .trial import Trial
from .wiring import Patch, Source

__all__ = ["ModelPatch"]


class ModelPatch(Patch):
    """Puts a prefix or prompt into one model.

    The prefix is passed as a keyword argument: the hook on the backbone adds it, and ``transformers`` forwards it to
    the attention function. Activation checkpointing, which removes the cache from layers, does not affect it.

    Args:
        model: the module that the user patches.
        base: the Hugging Face model in it.
        source: provides the prefix or prompt.
        options: for the attention function.
        calls: how calls run.

    Attributes:
        prefix_layers: the attention modules that read the prefix.
        packer: decides how calls are packed.
        tables: the tables of learned positions.
        stock_layers: those of a stock cache of the model; empty if all layers attend.
        recurrent: the modules that keep a state in the cache.
        state_like: for each layer of the cache, tensors [1, ...] on the meta device like its states.
        patched_dtype: of the backbone when it was patched.
        sharer: finds the text that rows share; None without ``share``.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        source: Source,
        options: PrefixOptions,
        calls: CallOptions,
    ) -> None:
        super().__init__(model, base)
        self.source = source
        self.options = options
        self.calls = calls
        self.sharer: Sharer | None = None
        self.backbone = find_backbone(base)
        self.arguments = forward_arguments(self.backbone)
        self.base_arguments = forward_arguments(base)
        #: Names of the cache argument of backbone and base model; None if they take no cache.
        self.cache_name = cache_argument(self.backbone) if source.needs_cache else cache_name(self.arguments)
        self.base_cache_name = cache_name(self.base_arguments) or self.cache_name
        if self.cache_name is None:  # windows of encoders know no positions before the sequence
            self.options = replace(options, in_window=False)
        self.prefix_layers: dict[nn.Module, PrefixLayerInfo] = {}
        self.packer: Packer
        self.tables: list[PositionTable] = []
        self.stock_layers = layers_with_states(self.backbone.config)
        self.recurrent: dict[nn.Module, RecurrentModule] = {}
        self.state_like: list[list[LayerState]] = []
        self.patched_dtype = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), None)
        self._noticed: set[str] = set()
        self._checkpointed = [m for m in self.backbone.modules() if hasattr(m, "gradient_checkpointing")]

    @abstractmethod
    def check(self, trial: Trial) -> None:
        """Raise ValueError unless the prefix fits the model and the patched model agrees with the stock model."""

    @property
    def requires_prefix(self) -> bool:
        """Whether every call must have a prefix. A PEFT model runs without one while its adapter is disabled."""
        return not self.source.is_given

    @abstractmethod
    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """The packed batch for a call of the base model; None to run it unpacked. May change ``kwargs``."""

    @abstractmethod
    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The cache with the prefix for a call of the backbone; None if it gets no prefix. May change ``kwargs``."""

    def clean_output(self, note: Any, output: Any) -> Any:
        """The base model's output in the form that the caller expects.

        Args:
            note: the note that :meth:`pack_call` left in :data:`.calls.running`.
        """
        return output

    def install(self) -> None:
        """Change the model. If this raises, the model is unchanged."""
        register()
        try:
            with quiet(self.backbone):
                set_implementation(configs_of(self.base), self.wiring)
                names = {module: name for name, module in self.model.named_modules()}
                encoded = self.cache_name is not None and needs_encoder(self.backbone)
                layers = layers_with_states(self.backbone.config)
                with (
                    watch_tables(self.backbone) as self.tables,
                    watch_recurrent(self.backbone, layers, names) as self.recurrent,
                ):
                    if self.cache_name is None:
                        self.prefix_layers, samples = survey_without_cache(self.backbone, names)
                    else:
                        self.prefix_layers, samples = survey(self.backbone, names, layers, encoded=encoded)
                self.state_like = meta_states(layers)
                for module, info in self.prefix_layers.items():
                    self.wiring.set_attribute(module, LAYER_INFO, info)
                    if hasattr(module, "compute_bias"):
                        SpanningBias(module).install(self.wiring)
                self.packer = Packer(
                    self.base, self.backbone, self.prefix_layers, self.tables, recurrent_layers(self.stock_layers)
                )
                self.sharer = Sharer(self.packer) if self.calls.share else None
                trial = EagerTrial if self.cache_name is None else Trial
                self.check(
                    trial(
                        self.backbone, self.prefix_layers, samples, self.options, stock_layers=self.stock_layers,
                        every_layer=self.source.fills_every_layer, encoded=encoded,
                    )
                )  # fmt: skip
            self._hook()
            if self.calls.logits == "labelled" and (self.packer.reasons or self.packer.head_forward is None):
                reasons = self.packer.reasons or [self.packer.why_head_needs_batch()]
                raise LogitsError(f"logits: expected 'all', got 'labelled'; {'; '.join(reasons)}")
            self.source.wire(self)
        except BaseException:
            self.remove()
            raise
        if self.requires_prefix:
            for module in self.readers():
                self.wiring.set_attribute(module, REQUIRED, True)
        self.mark(self.model, self.base)

    def readers(self) -> dict[nn.Module, PrefixLayerInfo]:
        """The attention modules that read the prefix."""
        return self.prefix_layers

    def reads(self, cache: PrefixCache, kwargs: Mapping[str, Any]) -> dict[str, int]:
        """Per attention module that a forward of the backbone runs, how many times it reads the prefix."""
        # Early exit reduces num_hidden_layers for the duration of a call.
        num_layers = getattr(self.backbone.config.get_text_config(), "num_hidden_layers", None)
        return {
            info.name: sum(cache.has_prefix(i) and (num_layers is None or i < num_layers) for i in info.layers)
            for info in self.prefix_layers.values()
        }

    def _hook(self) -> None:
        base, backbone = self.base, self.backbone
        self.wiring.add_hooks(
            base.register_forward_pre_hook(self.before_call, with_kwargs=True),
            backbone.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            # First, so that all other hooks see the unpacked batch.
            backbone.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True, prepend=True),
            base.register_forward_hook(self.after_call, with_kwargs=True, always_call=True),
        )

    def notice(self, case: str, difference: str, remedy: str = "") -> None:
        """Warn, once per ``case``."""
        if case not in self._noticed and not torch.compiler.is_compiling():
            self._noticed.add(case)
            warnings.warn(f"peftkern: {case}: {difference}.{remedy}", stacklevel=3)

    def fall_back(self, reason: str, how: str) -> None:
        """Warn once that calls run a slower fallback, or raise.

        Raises:
            ValueError: if the patch is strict.
        """
        if self.calls.strict:
            raise ValueError(f"model: {reason}; {how}, which strict=True rules out")
        self.notice(reason, how)

    @property
    def read_layers(self) -> frozenset[int]:
        """The layers of the cache that self-attention reads."""
        return frozenset(info.layer for info in self.prefix_layers.values())

    @property
    def shared_rows(self) -> tuple[int, int] | None:
        """Rows that the last call would have run as usual, and those that it ran; None if it shared none."""
        return None if self.sharer is None else self.sharer.rows

    @property
    def is_training_step(self) -> bool:
        """Whether the current forward will be followed by a backward."""
        return self.backbone.training and torch.is_grad_enabled()

    @property
    def checkpoints(self) -> bool:
        """Whether the current forward is a training step with activation checkpointing."""
        return self.is_training_step and any(module.gradient_checkpointing for module in self._checkpointed)

    def stores(self, kwargs: dict[str, Any]) -> bool:
        """Whether the output of a call contains a cache."""
        uses_cache = kwargs.get("use_cache")
        uses_cache = getattr(self.base.config, "use_cache", False) if uses_cache is None else uses_cache
        return bool(uses_cache) and not self.is_training_step

    def _read_cache(self, kwargs: dict[str, Any], name: str | None) -> None:
        """Rename the cache of a call to ``name``; raise ValueError for a cache if the model takes none."""
        if name is not None:
            rename_cache(kwargs, name)
        elif given_cache(kwargs) is not None:
            raise ValueError(f"cache: expected None, as {type(self.backbone).__name__} takes none, got one")

    # Hooks on the base model

    def before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: pack the batch of the call."""
        bound = bind(module, self.base_arguments, args, kwargs)
        if bound is None:
            return args, kwargs
        kwargs = bound
        self._read_cache(kwargs, self.base_cache_name)
        if (mask := kwargs.get("attention_mask")) is not None:
            begins = not isinstance(self_attention_cache(kwargs), PrefixCache)
            mask = unmade(mask) if begins else mask
            # Made by generate, for a static cache.
            kwargs["attention_mask"] = mask.for_static_cache() if isinstance(mask, LazyMask) else mask
        running.enter(self, module)
        packed = self.pack_call(kwargs, HostNumbers())
        if packed is None:
            return (), kwargs
        first = self.packer.around.first_position
        packed.numbered_from = first, first if kwargs.get("position_ids") is None else 0
        kwargs["peftkern_packed"] = packed
        for name in BOUNDARIES:  # describe the unpacked batch
            kwargs.pop(name, None)
        return (), kwargs

    def pack_logits(self, packed: PackedBatch, kwargs: dict[str, Any], numbers: HostNumbers) -> None:
        """Have the output layer run on rows of the packed batch."""
        labels, keep = kwargs.get("labels"), kwargs.pop("logits_to_keep", None)
        labelled = self.selects_labels(kwargs)
        count = numbers.get("labelled") + (numbers.get("labelled first") if packed.prompts is not None else 0)
        packed.logit_rows = LogitRows(
            packed, labels, labelled=labelled, keep=0 if keep is None else keep,
            num_labelled=count if labelled and numbers.all("labelled") and packed.prompt_lens is None else None,
        )  # fmt: skip
        kwargs["labels"] = packed.logit_rows.labels

    def selects_labels(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call computes only the logits that predict a label."""
        if self.calls.logits != "labelled" or not self.is_training_step or kwargs.get("labels") is None:
            return False
        if self.packer.head_runs_on_rows():
            return True
        self.notice(
            "logits='labelled'",
            "it has no effect, because the model's forward, loss or output layer has been replaced or hooked since "
            "it was patched; all logits are computed",
        )
        return False

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: unpack the logits. ``output`` is None if the forward has raised."""
        note = running.leave(self)
        if output is None:
            return None
        packed: PackedBatch | None = kwargs.get("peftkern_packed")
        if packed is not None and not packed.used:
            names = f"{type(self.base).__name__} to pass its keyword arguments to {type(self.backbone).__name__}"
            raise ValueError(f"model: expected {names}, which got none; patch it with packing=False")
        if packed is not None and packed.logit_rows is not None:
            deferred = kwargs["labels"] is not None and self.is_training_step and not torch.compiler.is_compiling()
            output = unpack_logits(packed.logit_rows, output, deferred=deferred)
        return self.clean_output(note, output)

    # Hooks on the backbone

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: pass the prefix to the backbone, and pack its inputs."""
        without_checkpointing.restore_interrupted()
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        self._read_cache(kwargs, self.cache_name)
        packed: PackedBatch | None = kwargs.pop("peftkern_packed", None)
        padded: PackedBatch | None = None
        if packed is not None and (reason := self.packer.around.why_padded(kwargs)) is not None:
            self.run_padded(packed, reason)
            packed, padded = None, packed
        if isinstance(kwargs.get("attention_mask"), LazyMask):  # made by the base model; mask functions take tensors
            kwargs["attention_mask"] = kwargs["attention_mask"].dense()
        cache = self.find_cache(kwargs, packed)
        if cache is None:
            if self.requires_prefix:
                kwargs["peftkern_prefix"] = WITHOUT_PREFIX
            return (), kwargs
        check_implementation(self.backbone, self.readers().values())
        cache.begin()
        cache.packed, cache.padded = packed, padded
        try:
            if packed is None:
                if self.cache_name is None:
                    if cache.prefix_positions and "position_ids" in self.arguments:
                        shift_positions(cache.prefix_positions, self.tables, kwargs)
                elif not cache.counts_outside:
                    count_prefix(cache, kwargs)
                place_rows(cache, kwargs, count_mask=self.packer.count_mask)
            else:
                self._pack_inputs(module, packed, cache, kwargs)
            for table in self.tables:
                table.check(cache, kwargs)
        except Exception:
            cache.finish({})
            raise
        kwargs["peftkern_prefix"] = cache
        if not torch.is_grad_enabled():
            cache.pause = without_checkpointing.begin(self._checkpointed)
        return (), kwargs

    def run_padded(self, packed: PackedBatch, reason: str) -> None:
        """Prepare a call whose arguments turn out not to be packable when they reach the backbone.

        Raises:
            ValueError: if the call cannot run unpacked either.
        """
        raise ValueError(f"model: expected arguments of {type(self.backbone).__name__} that can be packed; {reason}")

    def _pack_inputs(self, module: Any, packed: PackedBatch, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Replace the batch of a call by the packed batch."""
        tokens = tokens_of(kwargs)
        if tokens.shape[:2] != packed.layout.shape:
            expected = f"{list(packed.layout.shape)} tokens in {type(self.backbone).__name__}"
            raise ValueError(f"model: expected {expected}, got {list(tokens.shape[:2])}")
        if kwargs.get("input_ids") is not None and self.packer.packs_tokens:
            kwargs["input_ids"] = packed.layout.pack(tokens)
        else:
            if kwargs.pop("input_ids", None) is not None:
                # The embedding may have hooks and wrappers, which see the unpacked batch.
                tokens = module.get_input_embeddings()(tokens)
            kwargs["inputs_embeds"] = packed.embeddings(packed.layout.pack(tokens))
        if cache.offsets is not None and cache.ids is not None and packed.layout.owners is not None:
            cache.ids = cache.ids[packed.layout.owners]  # of every sequence
        offsets = row_offsets(cache)
        self.packer.around.pack(packed, kwargs, cache.offset if offsets is None else offsets)
        kwargs["attention_mask"] = None
        kwargs[str(self.cache_name)] = cache
        if packed.layout.segments is not None:
            for prefix_len in cache.prefix_lens():  # here, because compiled layers cannot read values
                packed.chains(prefix_len, packed.cu_seqlens.device)
        packed.used = True

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: check that every layer has read its prefix. ``output`` is None if the forward has raised.

        Calls may be nested or run in several threads, so the state of this call is in ``kwargs``.
        """
        cache: PrefixCache | None = kwargs.get("peftkern_prefix")
        if cache is None or cache is WITHOUT_PREFIX:
            return output
        if cache.pause is not None:
            without_checkpointing.end(cache.pause)
            cache.pause = None
        missing = cache.finish(self.reads(cache, kwargs))
        if output is None:
            return None
        implementation = self.backbone.config._attn_implementation
        drops_layers = self.backbone.training and getattr(self.backbone, "layerdrop", 0.0) > 0.0
        if missing and not (drops_layers and isinstance(implementation, Implementation)):
            raise without_prefix("ran", self.backbone, missing)
        if cache.packed is not None:
            output = self.unpack_output(cache.packed, cache, output)
        elif cache.padded is not None:
            output = self.pack_output(cache.padded, output)
        drops_cache = self.cache_name and kwargs.get("use_cache") is False and not cache.counts_outside
        return without_cache(kwargs, output) if drops_cache else output

    def unpack_output(self, packed: PackedBatch, cache: PrefixCache, output: Any) -> Any:
        """The backbone's output, unpacked."""
        first = packed.unpack if packed.logit_rows is None else packed.logit_rows.select
        if isinstance(output, tuple):  # the heads read its first element
            others = (self.unpack_cache(cache) if x is cache else unpack_all(packed, x) for x in output[1:])
            return (first(output[0]), *others)
        output["last_hidden_state"] = first(output["last_hidden_state"])
        for field in ("hidden_states", "router_logits"):
            if output.get(field) is not None:
                output[field] = unpack_all(packed, output[field])
        name = cache_name(output.keys())
        if name is not None and output[name] is cache:
            output[name] = self.unpack_cache(cache)
        return output

    def pack_output(self, packed: PackedBatch, output: Any) -> Any:
        """The backbone's output for an unpacked batch, with the hidden states that the output layer reads packed."""
        if packed.logit_rows is None:
            return output
        hidden = packed.logit_rows.select(packed.layout.pack(output[0]))
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def unpack_cache(self, cache: PrefixCache) -> PrefixCache | None:
        """The cache of a packed batch, unpacked."""
        return cache
