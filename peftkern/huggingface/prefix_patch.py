# SPDX-License-Identifier: Apache-2.0
"""Patches for a prefix of keys and values in every layer: prefix tuning, cartridges, :class:`peftkern.PrefixKV`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from ..layer_shapes import LayerShape
from ..model_info import given_cache
from ..prefix_parts import DECODER, PARTS
from .around_text import MISPLACED, hide_prefix
from .cache import KeyValue, PrefixCache
from .call_arguments import check_replaceable, count_prefix, self_attention_cache, tokens_of
from .calls import running
from .initial_states import check_states, initial_states, refuse_padding_before_states
from .layout import HostNumbers
from .mixed import PrefixBank, why_not_mixed
from .model_patch import ModelPatch
from .packing import PackedBatch
from .parts import EncoderHooks, PartLayers, find_part_layers
from .parts_trial import PartsTrial
from .prefix_source import PrefixSource
from .probing import quiet
from .recurrent import give_cache
from .recurrent_trial import ignores_cache
from .survey import PrefixLayerInfo
from .trial import Trial

__all__ = ["PrefixPatch"]


class PrefixPatch(ModelPatch):
    """Puts a prefix of keys and values into one model."""

    source: PrefixSource
    #: The layers of other parts than the decoder; None if these have no prefix.
    part_layers: PartLayers | None = None
    #: Whether the model counts positions from 0 whatever its cache contains, unless it is given ``position_ids``.
    ignores_cache: bool = False

    @property
    def hides_prefix(self) -> bool:
        """Whether the parts around the backbone see the sequence without the prefix that PEFT passes to them.

        What they compute from tokens and images (positions, masks) would otherwise count the prefix as tokens.
        """
        return self.packer.around.reads_more and not self.source.keeps_bugs

    def check(self, trial: Trial) -> None:
        """Raise ValueError unless the prefix fits the model and the patched model agrees with the stock model."""
        if tuple(self.source.parts) != DECODER:
            names = {module: name for name, module in self.model.named_modules()}
            with quiet(self.base):
                self.part_layers = find_part_layers(self.base, self.backbone, names, self.source.parts)
            self.part_layers.install(self.wiring)
        self.source.check(self)
        for module, info in self.recurrent.items():
            hook = partial(give_cache, info)
            self.wiring.add_hooks(module.register_forward_pre_hook(hook, with_kwargs=True))
        self.ignores_cache = trial.ignores_cache = ignores_cache(trial)
        if (reason := trial.try_prefix()) is not None:
            raise ValueError(f"model: {reason}")
        if self.part_layers is not None:
            with quiet(self.base):
                parts = PartsTrial(self.base, self.backbone, self.part_layers, self.num_layers, self.options)
                reason = parts.try_prefix()
            if reason is not None:
                raise ValueError(f"model: {reason}")
        if self.source.offset and (reason := trial.try_positions(self.tables)) is not None:
            raise ValueError(f"shift_positions: expected False, because {reason}, got True")
        if states := self.source.layer_states(self):
            check_states(self, states, trial)
        if self.calls.packing:
            self.packer.try_out(trial, shared=self.calls.share)
        else:
            self.packer.reasons = ["packing=False"]
        if self.source.has_bank and (reason := why_not_mixed(self)) is not None:
            raise ValueError(f"prefix: expected a single prefix, because {reason}, got a bank")
        if not self.calls.share:
            return
        if self.packer.reasons:
            raise ValueError(f"share: expected None, because {'; '.join(self.packer.reasons)}, got 'prefixes'")
        if self.packer.has_windows and not self.options.in_window:
            raise ValueError(
                "share: expected None, because windows count shared text but not the prefix (prefix_in_window=False "
                "or shift_positions=False), got 'prefixes'"
            )
        if self.packer.has_windows and self.source.has_bias:
            raise ValueError(
                "share: expected None, because attention over shared text cannot hide a prefix with gates "
                "(learn_length) behind windows, got 'prefixes'"
            )

    def explain(self) -> str:
        """One line: how batches run, and why they do not run faster."""
        because = "; ".join(self.packer.reasons)
        how = f"with their padding: {because}" if because else "without their padding"
        layers = str(self.num_layers)
        if self.part_layers is not None:
            counts = {"decoder": self.num_layers, **{part: len(self.part_layers.samples[part]) for part in PARTS[:2]}}
            layers = " and ".join(f"{counts[part]} {part}" for part in PARTS if part in self.source.parts)
        shared = ("" if self.sharer is None else f"; {self.sharer.explain()}") + self.calls.logits_note
        prefix = f"a prefix in {layers} layers, read in place"
        return f"{type(self.base).__name__}: {prefix}; training batches run {how}{shared}"

    @property
    def num_layers(self) -> int:
        """Layers that read the decoder's prefix."""
        return len({layer for info in self.prefix_layers.values() for layer in info.layers})

    def readers(self) -> dict[nn.Module, PrefixLayerInfo]:
        """The attention modules that read the prefix."""
        return {**super().readers(), **(self.part_layers.infos if self.part_layers is not None else {})}

    def reads(self, cache: PrefixCache, kwargs: Mapping[str, Any]) -> dict[str, int]:
        """Per attention module that a forward of the backbone runs, how many times it reads the prefix."""
        reads = super().reads(cache, kwargs)
        if self.part_layers is not None and kwargs.get("encoder_hidden_states") is not None:
            for info in self.part_layers.of("cross"):
                reads[info.name] = sum(cache.beside[layer] is not None for layer in info.layers)
        return reads

    def _hook(self) -> None:
        super()._hook()
        if self.part_layers is not None and (infos := self.part_layers.of("encoder")):
            EncoderHooks(self.part_layers.encoder, infos, self.new_encoder_cache).install(self.wiring)

    def check_geometry(
        self, name: str, shapes: Sequence[LayerShape | None], without: frozenset[int] = frozenset(),
        part: str = "decoder",
    ) -> None:  # fmt: skip
        """Raise ValueError unless a prefix of these shapes fits all layers of a part but those ``without`` one."""
        for info in (info for info in self.readers().values() if info.part == part):
            shape = shapes[info.layer] if info.layers[-1] < len(shapes) else None
            if shape is None and info.layer in without:
                continue
            if shape is None:
                raise ValueError(
                    f"{name}: expected a prefix for layer {info.layers[-1]} ({info.name}), got {len(shapes)} layers"
                )
            if shape != info.shape:
                raise ValueError(
                    f"{name}: expected {info.shape}, as {info.name} has, got {shape} in layer {info.layer}"
                )

    def new_cache(
        self, *, stores: bool, offset_outside: bool, given: Cache | None = None, batch: int = 1,
        bank: PrefixBank | None = None,
    ) -> PrefixCache:  # fmt: skip
        """A cache with the prefix, for a call that starts a sequence. It stores the sequence as ``given`` does.

        Args:
            stores, offset_outside: as for :class:`PrefixCache`.
            given: the caller's cache.
            batch: B, for states of recurrent layers.
            bank: the prefixes of the samples; None if all have the source's.

        Raises:
            ValueError: for a given cache that it cannot replace.
        """
        check_replaceable(given, plain=self.is_training_step or self.backbone.config.is_encoder_decoder)
        prefix, bias = self.source.layer_kv(self) if bank is None else bank.layers, self.source.layer_bias(self)
        beside = self.source.layer_kv(self, "cross") if "cross" in self.source.parts else ()
        if self.is_training_step and any(map(_is_reentrant, self._checkpointed)):
            self._check_reentrant([*prefix, *beside], bias)
        states = initial_states(self, self.source.layer_states(self), batch)
        return PrefixCache(
            prefix, beside=beside, offset=self.source.offset, stores=stores, offset_outside=offset_outside,
            options=self.options, given=given if stores else None, bias=bias, has_gaps=self.source.has_gaps,
            like=self.stock_layers, states=states, read_layers=None if self.source.is_given else self.read_layers,
            **({} if bank is None else bank.rows),
        )  # fmt: skip

    def new_encoder_cache(self) -> PrefixCache:
        """The prefix for a call of the encoder, whose positions and windows do not count it."""
        assert self.part_layers is not None
        prefix, encoder = self.source.layer_kv(self, "encoder"), self.part_layers.encoder
        checkpointed = [m for m in encoder.modules() if hasattr(m, "gradient_checkpointing")]
        if self.is_training_step and any(map(_is_reentrant, checkpointed)):
            self._check_reentrant(prefix, ())
        options = replace(self.options, in_window=False)
        return PrefixCache(prefix, offset=0, stores=False, offset_outside=False, options=options)

    def _check_reentrant(self, prefix: Sequence[KeyValue | None], bias: Sequence[Tensor | None]) -> None:
        """Raise where reentrant checkpointing would fail, or would silently lose gradients."""
        keys, biases = [kv[0] for kv in prefix if kv is not None], [x for x in bias if x is not None]
        if any(map(_saves_tensors, [*keys[:1], *biases[:1]])):
            reason = "the prefix is computed (projection, MLP, gates), and backward would run through it per layer"
        elif len(self.prefix_layers) > len({info.layer for info in self.prefix_layers.values()}):
            reason = "layers share keys, whose gradients it loses"
        else:
            return
        advice = 'gradient_checkpointing_enable({"use_reentrant": False})'
        raise ValueError(f"use_reentrant: expected False, as {reason}, got True; use {advice}")

    def pack_call(self, kwargs: dict[str, Any], numbers: HostNumbers) -> PackedBatch | None:
        """Pack a training step whose batch has padding, several sequences per row, or text that rows share."""
        sharer, groups = self.sharer, kwargs.pop("group_ids", None) if self.calls.share else None
        cache, offset = self_attention_cache(kwargs), 0
        if isinstance(cache, PrefixCache) and cache.counts_outside and self.hides_prefix:
            hide_prefix(cache, kwargs)
        if isinstance(cache, PrefixCache):
            starts = not cache.stores
            offset = cache.offset if cache.counts_outside else 0
        else:
            starts = not self.source.is_given and cache is None and self.is_training_step
        if not starts:
            if sharer is not None and tokens_of(kwargs).shape[1] > 1:
                sharer.skip("behind a prefix, only training steps share text")
            return None
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, offset:]
        if position_ids is not None:
            position_ids = position_ids - offset
        sequence = {**kwargs, "attention_mask": mask, "position_ids": position_ids}
        plain = mask is None and position_ids is None and sharer is None
        if plain and self.calls.logits != "labelled":
            return None
        if (reason := self.packer.why_unpackable(sequence)) is not None:
            if sharer is not None:
                sharer.skip(reason)
            return None
        if mask is not None and is_tracing(mask):  # the number of packed rows depends on values
            return None
        has_bank = self.source.has_bank or (isinstance(cache, PrefixCache) and cache.ids is not None)
        if has_bank and sharer is not None:
            sharer.skip("samples have different prefixes")
            sharer = None
        selects = self.selects_labels(kwargs)
        if plain and not selects:
            return None
        host = None if sharer is None else sharer.on_host(sequence, group_ids=groups)
        builder = self.packer.layout_builder(
            host or sequence, numbers, count_labels=selects, without_padding=host is not None
        )
        numbers.fetch()
        layout = builder.build() if sharer is None or host is None else sharer.build(builder, host)
        if layout.segments is None and not selects and not builder.saves_rows:
            if builder.is_all_real:
                kwargs["attention_mask"] = None  # so that the mask function need not check it again
            running.leave_note(self, _ONE_SEQUENCE_PER_ROW)
            return None
        packed = PackedBatch(layout.to(tokens_of(kwargs).device))
        if self.packer.head_runs_on_rows():
            self.pack_logits(packed, kwargs, numbers)
        return packed

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: unpack the logits, and let callers count the prefix again."""
        cache = self_attention_cache(kwargs)
        if isinstance(cache, PrefixCache):
            cache.hidden = False
        return super().after_call(module, args, kwargs, output)

    def run_padded(self, packed: PackedBatch, reason: str) -> None:
        """Note that the output layer alone runs on packed rows."""
        packed.used = True

    def find_cache(self, kwargs: dict[str, Any], packed: PackedBatch | None) -> PrefixCache | None:
        """The caller's cache if it contains the prefix, or a new one in place of an empty one."""
        prefix_ids = None if self.source.is_given else kwargs.pop("prefix_ids", None)
        if self.cache_name is None or self.part_layers is not None:
            self._refuse_stock(kwargs)
        if self.cache_name is None:
            return self.new_cache(stores=False, offset_outside=False)
        given = given_cache(kwargs)
        sequence = self_attention_cache(kwargs)
        if isinstance(sequence, PrefixCache):
            cache = sequence
            if cache.hidden and self.packer.around.places_images(kwargs):
                self.notice("images", MISPLACED, " patch(model, peft_bugs=True) reproduces PEFT.")
        elif self.source.is_given or hasattr(sequence, _REPLACED_CACHE):
            if hasattr(sequence, _REPLACED_CACHE) and not self.source.is_given:
                assert sequence is not None
                prefix: PrefixCache = getattr(sequence, _REPLACED_CACHE)
                count_prefix(prefix, kwargs, sequence.get_seq_length() - prefix.prefix_positions)
            return None
        else:
            stores = not self.is_training_step and kwargs.get("use_cache") is not False
            batch = tokens_of(kwargs).shape[0]
            if self.source.layer_states(self):
                refuse_padding_before_states(kwargs)
            bank = self.source.bank_of(self, prefix_ids, batch)
            cache = self.new_cache(stores=stores, offset_outside=False, given=sequence, batch=batch, bank=bank)
            if isinstance(given, EncoderDecoderCache):
                kwargs[self.cache_name] = EncoderDecoderCache(cache, given.cross_attention_cache)
            elif kwargs.get("encoder_hidden_states") is not None:
                kwargs[self.cache_name] = EncoderDecoderCache(cache, DynamicCache())
            else:
                kwargs[self.cache_name] = cache
        if packed is None and self.ignores_cache and kwargs.get("position_ids") is None:
            places = torch.arange(tokens_of(kwargs).shape[1], device=tokens_of(kwargs).device)
            kwargs["position_ids"] = places[None] + cache.get_seq_length()
        if packed is None:
            self._refuse_packing(kwargs)
            if (reason := self._why_stock(kwargs)) is not None and cache.get_seq_length() == cache.offset:
                self._run_stock(cache, kwargs, reason)
                return None
        return cache

    def _why_stock(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call needs the stock attention; None if it does not."""
        if kwargs.get("output_attentions", getattr(self.backbone.config, "output_attentions", False)):
            return "output_attentions"
        if self.source.is_given and kwargs.get("cu_seq_lens_q") is not None:
            return "cu_seq_lens_q without position_ids"
        return None

    def _refuse_stock(self, kwargs: dict[str, Any]) -> None:
        """Raise for a call that needs the stock attention, which cannot get the prefix without a cache."""
        if (reason := self._why_stock(kwargs)) is not None:
            kind = type(self.backbone).__name__
            lacks = (
                f"{kind} takes no cache" if self.cache_name is None else "caches have no encoder or cross-attention"
            )
            raise ValueError(
                f"{reason}: expected False, because {lacks}, by which stock attention would get the prefix, got True"
            )

    def _run_stock(self, cache: PrefixCache, kwargs: dict[str, Any], reason: str) -> None:
        """Replace our cache by a stock cache that contains the prefix."""
        compressed = [info.name for info in self.prefix_layers.values() if info.compressed]
        if compressed:
            raise ValueError(
                f"model: expected a call for peftkern's attention, because the stock cache of {compressed[0]} stores "
                f"compressed keys and cannot contain the prefix, got {reason}"
            )
        if cache.ids is not None:
            raise ValueError(
                "model: expected a call for peftkern's attention, because samples have different prefixes, got "
                f"{reason}"
            )
        if self.source.layer_states(self):
            raise ValueError(
                "model: expected a call for peftkern's attention, because recurrent layers start in learned states, "
                f"got {reason}"
            )
        windows = [info.name for info in self.prefix_layers.values() if info.pattern is None or info.pattern[1]]
        if windows and not self.options.in_window:
            raise ValueError(
                f"{reason}: expected False, because the stock attention of {windows[0]} hides the prefix behind its "
                "window, which prefix_in_window=False or shift_positions=False rules out, got True"
            )
        self.fall_back(reason, "such calls run the stock attention, with a copy of the prefix for every sample")
        batch = tokens_of(kwargs).shape[0]
        stock = self.source.stock_cache(cache, batch, self.backbone)
        self_attention = getattr(stock, "self_attention_cache", stock)
        setattr(self_attention, _REPLACED_CACHE, cache)
        name = str(self.cache_name)
        given = kwargs.get(name)
        if isinstance(given, EncoderDecoderCache) and self_attention is stock:
            stock = EncoderDecoderCache(stock, given.cross_attention_cache)
        kwargs[name] = stock
        if not cache.counts_outside:
            count_prefix(cache, kwargs)

    def _refuse_packing(self, kwargs: dict[str, Any]) -> None:
        """Warn or raise for several sequences per row, which models separate by positions only without a cache."""
        position_ids = kwargs.get("position_ids")
        if kwargs.get("attention_mask") is not None or position_ids is None or position_ids.dim() != 2:
            return
        if position_ids.shape[1] < 2:  # a decoding step
            return
        if is_tracing(position_ids) or running.note(self) is _ONE_SEQUENCE_PER_ROW:
            return
        if find_packed_sequence_indices(position_ids) is None:
            return
        if self.source.is_given:
            self.fall_back("position_ids", "sequences packed into one row attend to each other, as in PEFT")
            return
        raise ValueError(
            "position_ids: expected one sequence per row, got packed sequences, which would attend to each other; "
            "pass padded sequences with an attention_mask"
        )


#: Note on a call in which every row is known to contain one sequence.
_ONE_SEQUENCE_PER_ROW = "one sequence per row"

#: Attribute of a stock cache that contains a prefix: the PrefixCache that it replaces.
_REPLACED_CACHE = "_peftkern_prefix_cache"


def _is_reentrant(module: Any) -> bool:
    """Whether a module uses reentrant checkpointing."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(module.gradient_checkpointing and getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def _saves_tensors(tensor: Tensor) -> bool:
    """Whether the graph of ``tensor`` has saved tensors, which the first backward pass frees."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if any(name.startswith("_raw_saved_") for name in dir(node)):
                return True
            nodes += [parent for parent, _ in node.next_functions]
    return False
