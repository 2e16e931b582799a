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
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.import_utils import is_tracing

from ..base_model import cache_argument, cache_name, given_cache, rename_cache
from .attention import Implementation, register
from .cache import SITE, KeyValue, PrefixCache, PrefixOptions, StreamCache
from .masks import LazyMask
from .packing import Head, Layout, Stream, next_labels
from .positions import PositionTable, watch_tables
from .relative_bias import SpanningBias
from .survey import Site, find_backbone, survey

__all__ = ["PATCH", "ModelPatch", "check_replaceable", "place_behind", "self_attention_cache"]

#: Attribute of a patched model: its :class:`ModelPatch`.
PATCH = "_peftkern_patch"


class ModelPatch:
    """A prefix in one model. Subclasses say where the prefix comes from.

    The prefix travels as a keyword argument: the hook on the backbone adds it, ``transformers`` hands it down to the
    attention function. That way also leads through activation checkpointing, which takes the cache away from layers.

    A batch may run as one stream of rows (:mod:`.packing`): the hook on the base model decides that and says which
    rows the output layer sees, the hook on the backbone packs what goes in and unpacks what comes out.

    Args:
        model: what the user patches.
        base: the Hugging Face model in it.
        options: for the attention function.
        packing: run batches as streams where that saves rows.
        logits: ``"all"``, or ``"labelled"`` for those alone, in training steps, that predict a label.
    """

    def __init__(
        self, model: nn.Module, base: PreTrainedModel, options: PrefixOptions, *, packing: bool, logits: str
    ) -> None:
        self.model = model
        self.base = base
        self.options = options
        self.packing = packing
        self.logits = logits
        #: Why batches are not packed; empty if they are.
        self.unpacked_because: list[str] = []
        self.backbone = find_backbone(base)
        self.arguments = tuple(inspect.signature(self.backbone.forward).parameters)
        self.sites: dict[nn.Module, Site] = {}
        self._handles: list[RemovableHandle] = []
        self._biases: list[SpanningBias] = []
        self._tables: list[PositionTable] = []
        self.base_arguments = tuple(inspect.signature(base.forward).parameters)
        #: By which names backbone and base model take a cache.
        self.cache_name = cache_argument(self.backbone)
        self.base_cache_name = cache_name(self.base_arguments) or self.cache_name
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

    def open_stream(self, kwargs: dict[str, Any]) -> Stream | None:
        """The stream for a call of the base model; None to run it as it is."""
        raise NotImplementedError

    def explain(self) -> str:
        """How batches run, and why not otherwise."""
        because = "; ".join(self.unpacked_because)
        how = f"with their padding: {because}" if because else "without their padding"
        layers = len({site.layer for site in self.sites.values()})
        return (
            f"{type(self.base).__name__}: a prefix in {layers} layers, read where it lies; training batches run {how}"
        )

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
            self.unpacked_because = why_not_packed(self) if self.packing else ["packing=False"]
            self.check_prefix()
            if self.logits == "labelled" and (self.unpacked_because or not self.head_is_packed):
                reasons = self.unpacked_because or [f"{type(self.base).__name__} has no logits of tokens"]
                raise ValueError(f"logits: expected 'all', got 'labelled'; {'; '.join(reasons)}")
            for module in self.sites:
                if hasattr(module, "compute_bias"):
                    self._biases.append(SpanningBias(module))
            self._handles.append(self.base.register_forward_pre_hook(self.before_call, with_kwargs=True))
            self._handles.append(self.backbone.register_forward_pre_hook(self.before_forward, with_kwargs=True))
            self._handles.append(
                self.backbone.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True)
            )
            self._handles.append(self.base.register_forward_hook(self.after_call, with_kwargs=True))
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
        if self.is_training_step and any(map(_is_reentrant, self._checkpointed)):
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

    @property
    def is_training_step(self) -> bool:
        """Whether a forward of now will have a backward."""
        return self.backbone.training and torch.is_grad_enabled()

    @property
    def head_is_packed(self) -> bool:
        """Whether the output layer runs on rows of the stream: a causal language model's.

        Models that take ``logits_to_keep`` compute every row of their logits by itself.
        """
        return "logits_to_keep" in self.base_arguments and self.base.loss_function is ForCausalLMLoss

    @property
    def windows(self) -> list[int]:
        """The sliding windows of the model."""
        patterns = [site.pattern for site in self.sites.values()]
        return [pattern[1] for pattern in patterns if pattern is not None and pattern[1] is not None]

    def lay_out(
        self,
        kwargs: dict[str, Any],
        mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        from_first: bool = False,
    ) -> Layout:
        """How the batch of a call of the base model is packed."""
        tokens = _tokens_of(kwargs)
        labels, loss_type = kwargs.get("labels"), getattr(self.base, "loss_type", None)
        needed, keep_padding = None, tokens.shape[1] == 0
        if self.head_is_packed:
            needed = None if labels is None else next_labels(labels) != -100
        elif loss_type == "ForTokenClassification":
            needed = None if labels is None else labels[:, labels.shape[1] - tokens.shape[1] :] != -100
        elif loss_type == "ForSequenceClassification":  # which may pool any token that is no padding by its number
            ids, pad = kwargs.get("input_ids"), self.base.config.get_text_config().pad_token_id
            keep_padding = ids is None or pad is None
            needed = None if keep_padding else ids != pad
        else:  # may look at every row
            keep_padding = True
        return Layout.of(
            (tokens.shape[0], tokens.shape[1]), tokens.device, mask=mask, position_ids=position_ids, needed=needed,
            keep_padding=keep_padding, keep_gaps=bool(self.windows), from_first=from_first,
            count_mask=any(table.reads_mask for table in self._tables),
        )  # fmt: skip

    def why_not_this(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call of the base model cannot run on a stream, in terms of its arguments; None if it can."""
        mask, position_ids, labels = (kwargs.get(name) for name in ("attention_mask", "position_ids", "labels"))
        told_by_positions = _BOUNDARIES if mask is None and position_ids is not None else ()
        for name, argument in kwargs.items():
            if isinstance(argument, Tensor) and name not in _PACKABLE and name not in told_by_positions:
                return f"{name} is no argument that can be packed"
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "attention_mask is not [B, S]"
        if position_ids is not None and position_ids.dim() != 2:
            return "position_ids are not [B, S]"
        keep = kwargs.get("logits_to_keep")
        if labels is not None and self.head_is_packed and (isinstance(keep, Tensor) or keep):
            return "logits_to_keep is given beside labels"
        if kwargs.get("output_attentions"):
            return "output_attentions are wanted"
        if kwargs.get("output_router_logits", getattr(self.base.config, "output_router_logits", False)):
            return "output_router_logits are wanted, whose loss counts prompts and padding"
        return None

    def pack_sequences(
        self, kwargs: dict[str, Any], mask: Tensor | None, position_ids: Tensor | None
    ) -> Stream | None:
        """A stream without prompts, if the batch has padding to leave out or several sequences a row.

        ``mask`` and ``position_ids`` speak of the sequence alone.
        """
        arguments = {**kwargs, "attention_mask": mask, "position_ids": position_ids}
        selects = self.logits == "labelled" and kwargs.get("labels") is not None and self.head_is_packed
        if self.unpacked_because or (mask is None and position_ids is None and not selects):
            return None
        if self.why_not_this(arguments) is not None:
            return None
        if mask is not None and is_tracing(mask):  # the number of rows would depend on values
            return None
        layout = self.lay_out(kwargs, mask, position_ids)
        return Stream(layout) if layout.leaves_out or layout.packed_rows or selects else None

    def before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: open a stream for the call of the base model."""
        kwargs = {**dict(zip(self.base_arguments, args, strict=False)), **kwargs}
        rename_cache(kwargs, self.base_cache_name)
        if isinstance(kwargs.get("attention_mask"), LazyMask):  # generate's, for a static cache
            kwargs["attention_mask"] = kwargs["attention_mask"].contiguous()
        stream = self.open_stream(kwargs)
        if stream is None:
            return (), kwargs
        kwargs["peftkern_stream"] = stream
        for name in _BOUNDARIES:  # of a batch that is no more
            kwargs.pop(name, None)
        if self.head_is_packed:
            labels, keep = kwargs.get("labels"), kwargs.pop("logits_to_keep", None)
            labelled = self.logits == "labelled" and self.is_training_step
            stream.head = Head(stream, labels, labelled=labelled, keep=0 if keep is None else keep)
            kwargs["labels"] = stream.head.labels
        return (), kwargs

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: lay the logits out as the batch is."""
        stream: Stream | None = kwargs.get("peftkern_stream")
        if stream is None:
            return output
        if not stream.used:
            names = f"{type(self.base).__name__} to hand its keyword arguments to {type(self.backbone).__name__}"
            raise ValueError(f"model: expected {names}, which got none; patch it with packing=False")
        head = stream.head
        if head is None:
            return output
        if isinstance(output, tuple):
            place = 0 if kwargs["labels"] is None else 1
            return (*output[:place], head.unpack(output[place]), *output[place + 1 :])
        output["logits"] = head.unpack(output["logits"])
        return output

    def _fill(self, stream: Stream, cache: PrefixCache, kwargs: dict[str, Any]) -> None:
        """Put the stream in place of a call's batch."""
        tokens: Tensor = _tokens_of(kwargs)
        if tokens.shape[:2] != stream.layout.shape:
            expected = f"{list(stream.layout.shape)} tokens in {type(self.backbone).__name__}"
            raise ValueError(f"model: expected {expected}, got {list(tokens.shape[:2])}")
        packed = stream.layout.pack(tokens)
        if kwargs.pop("input_ids", None) is not None:
            packed = self.backbone.get_input_embeddings()(packed)
        kwargs["inputs_embeds"] = stream.embeddings(packed)
        kwargs["position_ids"] = stream.positions(cache.offset)
        kwargs["attention_mask"] = None
        kwargs[self.cache_name] = cache
        stream.used = True

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: give the backbone its prefix."""
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        rename_cache(kwargs, self.cache_name)
        stream: Stream | None = kwargs.pop("peftkern_stream", None)
        if stream is not None and stream.prompts is not None:
            cache: PrefixCache | None = self._stream_cache(stream, kwargs)
        else:
            cache = self.find_cache(kwargs)
        if cache is not None:
            cache.begin()
            cache.stream = stream
            try:
                if stream is None:
                    self.place_sequence(cache, kwargs)
                    _refuse_packing(kwargs)
                else:
                    self._fill(stream, cache, kwargs)
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
        expected = [site.name for site in self.sites.values() if cache.reaches(site.layer)]
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
        if cache.stream is not None:
            output = self._unfill(cache.stream, cache, output)
        return self.clean_output(cache, kwargs, output)

    def _stream_cache(self, stream: Stream, kwargs: dict[str, Any]) -> StreamCache:
        layers = 1 + max(site.layer for site in self.sites.values())
        return StreamCache(layers, stream, stores=bool(kwargs.get("use_cache")), options=self.options)

    def _unfill(self, stream: Stream, cache: PrefixCache, output: Any) -> Any:
        """The backbone's output for the batch."""

        def place(x: Tensor) -> Tensor:
            return stream.unpack(x)

        def place_last(x: Tensor) -> Tensor:
            return stream.unpack(x) if stream.head is None else stream.head.select(x)

        if isinstance(output, tuple):  # the first is what the heads see
            kept = [cache.unpacked() if item is cache and isinstance(cache, StreamCache) else item for item in output]
            return (place_last(output[0]), *kept[1:])
        output["last_hidden_state"] = place_last(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(map(place, output["hidden_states"]))
        name = cache_name(output.keys())
        if isinstance(cache, StreamCache) and name is not None and output[name] is cache:
            output[name] = cache.unpacked() if cache.stores else None
        return output


_PACKABLE = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "start_positions", "end_positions",
    "logits_to_keep", "num_items_in_batch",
)  # fmt: skip
#: Where packed sequences begin, for flash kernels; positions say the same.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def why_not_packed(patch: ModelPatch) -> list[str]:
    """Why the model cannot run on a stream; empty if it can."""
    backbone, reasons = patch.backbone, []
    kind = type(backbone).__name__
    if backbone.config.is_encoder_decoder or patch.base.config.is_encoder_decoder:
        reasons.append(f"{kind} reads another sequence beside its own")
    if backbone.config.get_text_config() is not backbone.config or patch.base.config.get_text_config() is not (
        patch.base.config
    ):
        reasons.append(f"{type(patch.base).__name__} has inputs beside text")
    for name, forward in ((kind, backbone.forward), (type(patch.base).__name__, patch.base.forward)):
        parameters = inspect.signature(forward).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            reasons.append(f"{name} takes no keyword arguments that it does not know")
    if "position_ids" not in patch.arguments:
        reasons.append(f"{kind} takes no position_ids")
    for module, site in patch.sites.items():
        if hasattr(module, "compute_bias"):
            reasons.append(f"{site.name} has relative position biases")
        elif site.pattern is None or not site.pattern[0]:
            reasons.append(f"{site.name} has a mask other than a causal one with at most a window")
        elif site.counts_rows:
            reasons.append(f"{site.name} counts positions by itself")
        else:
            continue
        break
    return reasons or _how_streams_fail(patch)


@torch.no_grad()
def _how_streams_fail(patch: ModelPatch) -> list[str]:
    """Why a stream gives other hidden states than its batch, tried on two samples; empty if it does not.

    So that a model whose rows know of each other by other ways than attention and positions is found out.
    """
    backbone, (samples, length, prompt_len) = patch.backbone, (2, 3, 2)
    embedding = backbone.get_input_embeddings()
    ids = torch.arange(samples * length + prompt_len, device=embedding.weight.device) % embedding.weight.shape[0]
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        prompt, tokens = embedding(ids).split([prompt_len, samples * length])
        tokens = tokens.view(samples, length, -1)
        batch = torch.cat([prompt.expand(samples, -1, -1), tokens], 1)
        want = backbone(inputs_embeds=batch, attention_mask=None, use_cache=False)[0]
        stream = Stream(Layout.of((samples, length), ids.device), prompt[None], show_prompts=True)
        cache = StreamCache(
            1 + max(site.layer for site in patch.sites.values()), stream, stores=False, options=patch.options
        )
        packed = backbone(
            inputs_embeds=stream.embeddings(stream.layout.pack(tokens)), position_ids=stream.positions(0),
            attention_mask=None, use_cache=False, peftkern_prefix=cache, **{patch.cache_name: cache},
        )[0]  # fmt: skip
    except Exception as error:
        return [f"{type(backbone).__name__} could not be run on a stream: {error}"]
    finally:
        for module in training:
            module.training = True
    difference = (stream.unpack(packed).float() - want.float()).norm() / want.float().norm()
    allowed = 0.1 if want.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if difference <= allowed:
        return []
    return [f"{type(backbone).__name__} does not compute a stream's rows by themselves ({difference:.1e} off)"]


def self_attention_cache(kwargs: dict[str, Any]) -> Cache | None:
    """The part of a call's cache that self attention reads."""
    cache = given_cache(kwargs)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """What has one entry [B, S, ...] a token."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name]  # type: ignore[no-any-return]
    raise ValueError("input_ids: expected them or inputs_embeds, got neither")


def place_behind(cache: PrefixCache, kwargs: dict[str, Any]) -> None:
    """Columns of the mask and positions for a prefix of which the caller does not speak."""
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], cache.offset), mask], dim=1)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids + cache.offset


def check_replaceable(cache: Cache | None) -> None:
    """A cache that the caller made can give way to a :class:`PrefixCache` if it is empty and of the plain kind."""
    if cache is None:
        return
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = f"{type(cache).__name__} with offloading" if cache.offloading else type(cache).__name__
        raise ValueError(f"cache: expected None or a DynamicCache without offloading, got a {kind}")
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"cache: expected an empty cache or one that this model returned, got {cache.get_seq_length()} "
            "tokens that have not seen the prefix"
        )


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
