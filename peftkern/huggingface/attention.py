# SPDX-License-Identifier: Apache-2.0
"""The attention function that ``transformers`` calls in every layer of a patched model.

A layer with a prefix runs :func:`peftkern.prefix_attention`. All other layers (cross attention, encoders, layers
without a prefix, disabled adapters) run the implementation that the model had before, with the mask that it expects.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..eager_attention import attention_of
from ..functional import prefix_attention
from .cache import LAYER_INFO, REQUIRED, WITHOUT_PREFIX, KeyValue, PrefixCache, PrefixOptions
from .gated import GatedPrefix
from .masks import CompactMask, LazyMask, additive, mask_function
from .wiring import Wiring

__all__ = ["Implementation", "attention_forward", "register", "set_implementation"]

NAME = "peftkern"

#: A mask that hides nothing, for masks that are passed as a bias.
_SEE_ALL = CompactMask(causal=False, window=None, key_mask=None)

#: Devices that support autocast; torch raises for others. A constant, so that torch.compile can trace it.
_AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))


#: (key, value), (prefix_k, prefix_v), and the bias [1, P] of the prefix tokens or None.
_Found = tuple[KeyValue, KeyValue, Tensor | None]


class Implementation(str):
    """The name ``"peftkern"`` as the attention implementation of a config, with the name that it replaces.

    The config stores it as its implementation. It is therefore copied and pickled with the model, and never written
    to ``config.json``.

    Args:
        over: the previous implementation, which runs the layers without a prefix.
    """

    over: str

    def __new__(cls, over: str) -> Implementation:
        """Also register the implementation, so that a model unpickled in a new process finds it."""
        register()
        self = super().__new__(cls, NAME)
        self.over = over
        return self

    def __getnewargs__(self) -> tuple[str]:
        return (self.over,)


def register() -> None:
    """Register the implementation in ``transformers``, which silently drops masks without the mask function."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_function)


def set_implementation(configs: Iterable[Any], wiring: Wiring) -> None:
    """Make peftkern the attention implementation of the configs that do not have it yet."""
    for config in configs:
        if not isinstance(config._attn_implementation, Implementation):
            config._attn_implementation_internal = Implementation(config._attn_implementation)
            wiring.on_undo(partial(_restore_implementation, config))


def _restore_implementation(config: Any) -> None:
    if isinstance(config._attn_implementation, Implementation):
        config._attn_implementation_internal = config._attn_implementation.over


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    peftkern_prefix: PrefixCache | None = None,
    peftkern_gated: GatedPrefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``transformers``' attention interface.

    Args:
        module: the attention module.
        query: [B, Hq, S, D].
        key, value: [B, Hkv, T, D], of the sequence.
        attention_mask: made by :func:`.masks.mask_function`, or a user's own [B, 1, S, T or P + T], bool or additive.
        peftkern_prefix: the cache that the forward hook of a patched model added to the keyword arguments.
        peftkern_gated: the gated prefix that the caller of the attention module added to them.
        kwargs: ``dropout``, ``scaling``, ``sliding_window``, ``softcap``, ``s_aux``, ``position_bias`` and any other
            arguments that the model passes.

    Returns:
        ([B, S, Hq, D] contiguous, None).
    """
    if isinstance(attention_mask, LazyMask) and attention_mask.edited:
        attention_mask = attention_mask.dense()
    if peftkern_prefix is None and hasattr(module, REQUIRED):
        raise ValueError(
            "model: expected a call of the model, whose hooks pass the prefix to its layers, got a call of its "
            "forward or of one of its parts, which would run without the prefix"
        )
    cache = None if peftkern_prefix is WITHOUT_PREFIX else peftkern_prefix
    if cache is None and peftkern_gated is None:
        return _previous_attention(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _autocast(query, key, value)
    found = None if cache is None else _find_prefix(module, key, value, attention_mask, cache)
    if peftkern_gated is not None:
        return _attend_gated(module, query, key, value, attention_mask, found, cache, peftkern_gated, **kwargs)
    if found is None:
        return _previous_attention(module, query, key, value, attention_mask, **kwargs)
    assert cache is not None
    (key, value), prefix, bias = found
    return _attend(module, query, key, value, attention_mask, prefix, bias, cache, **kwargs), None


def _find_prefix(
    module: nn.Module, key: Tensor, value: Tensor, mask: LazyMask | Tensor | None, cache: PrefixCache
) -> _Found | None:
    """((key, value), (prefix_k, prefix_v), bias) that a module reads; None if the previous attention runs it."""
    found = cache.prefix_for(module, key, value, mask)
    if found is not None or cache.packed is None:
        return found
    if not hasattr(module, LAYER_INFO):
        kind = type(module).__name__
        raise ValueError(f"model: expected attention modules that read the prefix in a packed batch, got {kind}")
    # A layer without a prefix must also separate the packed sequences.
    return (key, value), (key[0, :, :0], value[0, :, :0]), None


def _attend_gated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    found: _Found | None,
    cache: PrefixCache | None,
    gated: GatedPrefix,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module with a gated prefix, in one call of the op where the two parts permit.

    Args:
        found: what :func:`_find_prefix` has found.
        cache: of a packed batch, or with a prefix that is not gated.
        gated: the gated prefix.
    """
    kwargs = {**kwargs, "dropout": dropout, "scaling": scaling}
    if found is not None:
        (key, value), prefix, bias = found
    if gated.joins(module, **kwargs) and _is_plain_sequence(attention_mask, key.shape[2], found, cache):
        reader = _without_prefixes(gated.options) if cache is None else cache
        out = _attend(
            module, query, key, value, attention_mask, gated.pair(key), None, reader, gate=gated.open_gate(query),
            options=gated.options, **kwargs,
        )  # fmt: skip
        return out, None
    weights = None
    if found is None:
        out, weights = _previous_attention(module, query, key, value, attention_mask, **kwargs)
    else:
        assert cache is not None
        out = _attend(module, query, key, value, attention_mask, prefix, bias, cache, **kwargs)
    gated_out = gated.attend(query, key)
    if not gated.apart:
        return (out + gated_out).to(out.dtype), weights
    gated.out = gated_out.flatten(2)
    return out, weights


@lru_cache(maxsize=8)
def _without_prefixes(options: PrefixOptions) -> PrefixCache:
    """A cache for calls whose model has no prefix in its cache."""
    return PrefixCache([], offset=0, stores=False, offset_outside=False, options=options)


def _is_plain_sequence(
    mask: LazyMask | Tensor | None,
    num_keys: int,
    found: _Found | None,
    cache: PrefixCache | None,
) -> bool:
    """Whether a module reads no other prefix, and its mask is compact."""
    if found is None or cache is None or cache.packed is None:
        return found is None and (mask is None or (isinstance(mask, LazyMask) and mask.compact(num_keys) is not None))
    return cache.packed.layout.segments is None and found[1][0].shape[-2] == 0


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    prefix: KeyValue,
    key_bias: Tensor | None,
    cache: PrefixCache,
    *,
    options: PrefixOptions | None = None,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    _refuse_boundaries(**kwargs)
    options, device = cache.options if options is None else options, query.device
    num_keys, prefix_len = key.shape[2], prefix[0].shape[-2]
    if cache.packed is not None:
        mask, mask_bias = CompactMask(True, getattr(module, LAYER_INFO).pattern[1], cache.packed.key_mask), None
    elif attention_mask is None:
        mask, mask_bias = _mask_of(module, is_causal, sliding_window), None
    else:
        hideable = prefix_len if options.in_window else 0
        mask, mask_bias = _read_mask(attention_mask, query, num_keys, hideable, position_bias is not None)
    query_bias, bias = _split(_on(device, mask_bias), num_keys, prefix_len, "attention_mask")
    if position_bias is not None:
        prefix_positions, positions = _split(position_bias, num_keys, prefix_len, "position_bias")
        query_bias, bias = _add(query_bias, prefix_positions), _add(bias, positions)
    if query_bias is not None:
        _check_prefix_columns(cache, attention_mask, position_bias)
    sequence: dict[str, Any] = {
        "causal": mask.causal,
        "window": mask.window,
        "prefix_in_window": options.in_window,
        "key_mask": _on(device, mask.key_mask),
        "sinks": s_aux,
        "bias": bias,
        "gate": gate,
    }
    common: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout, "backend": options.backend}
    if query_bias is None and (key_bias is None or not _has_segments(cache)):
        prefix_k, prefix_v = (x[None] for x in prefix) if _has_segments(cache) else prefix
        sequence |= {"prefix_bias": key_bias, **_places(cache, prefix_len, device)}
        out: Tensor = prefix_attention(query, key, value, prefix_k, prefix_v, **sequence, **common)
        return out.transpose(1, 2)
    query_bias = _add(query_bias, None if key_bias is None else key_bias[None, None])
    assert query_bias is not None
    sequence |= _places(cache, 0, device)
    return _attend_separately(query, key, value, *prefix, query_bias, sequence, common).transpose(1, 2)


def _check_prefix_columns(
    cache: PrefixCache, attention_mask: LazyMask | Tensor | None, position_bias: Tensor | None
) -> None:
    """Raise where a bias that depends on queries and prefix positions cannot be given to the prefix's tokens."""
    if cache.ids is not None:
        raise ValueError(
            "attention_mask: expected a causal mask with at most a window, because samples have different prefixes, "
            f"got another pattern{'; call the model without torch.compile' if torch.compiler.is_compiling() else ''}"
        )
    if cache.has_gaps and (position_bias is not None or isinstance(attention_mask, Tensor)):
        name = "attention_mask" if position_bias is None else "position_bias"
        raise ValueError(
            f"{name}: expected no columns for the prefix, of which pruning has removed some positions, got a tensor "
            "with such columns"
        )


def _has_segments(cache: PrefixCache) -> bool:
    """Whether the batch is packed, and its rows share text."""
    return cache.packed is not None and cache.packed.layout.segments is not None


def _refuse_boundaries(cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> None:
    """Raise ValueError for boundaries of packed sequences that the seam has not replaced by its own."""
    if cu_seq_lens_q is not None:
        raise ValueError(
            "cu_seq_lens_q: expected None, because the model cannot run packed sequences with a prefix, got a "
            "tensor; pass padded sequences with an attention_mask"
        )


def _mask_of(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> CompactMask:
    """The mask of a call that gets none."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return CompactMask(bool(causal), sliding_window if causal else None, None)


def _places(cache: PrefixCache, prefix_len: int, device: torch.device) -> dict[str, Any]:
    """The arguments of attention that say where packed sequences and their prefixes are."""
    packed, prefixes = cache.packed, {"prefix_ids": _on(device, cache.ids), "prefix_lens": _on(device, cache.lens)}
    if packed is None:
        return prefixes
    offsets = {"cu_seqlens": _on(device, packed.cu_seqlens), "max_seqlen": packed.max_seqlen}
    if packed.layout.segments is not None:
        return {**offsets, **packed.chains(prefix_len, device)}
    return {**offsets, **prefixes, "prefix_start": packed.prefix_start}


def _read_mask(
    mask: LazyMask | Tensor, query: Tensor, num_keys: int, prefix_len: int, has_position_bias: bool
) -> tuple[CompactMask, Tensor | None]:
    """A mask in compact form, or as an additive bias [B, 1, S, T or P + T] where it has no compact form.

    Args:
        mask: as :func:`attention_forward` takes it.
        query: [B, Hq, S, D]; the bias has its dtype.
        num_keys: T.
        prefix_len: P if windows can hide the prefix, otherwise 0.
        has_position_bias: whether the layer has a bias that depends on the query.
    """
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            return _SEE_ALL, mask
        if mask.shape[1:] == (1, 1, num_keys):  # all heads and queries see the same keys, as in a decoding step
            return CompactMask(False, None, mask[:, 0, 0].expand(query.shape[0], -1)), None
        return _SEE_ALL, additive(mask, query.dtype)
    compact = mask.compact(num_keys)
    # The compact form cannot express a window that hides prefix keys together with a bias that depends on the query.
    if compact is None or (compact.window is not None and has_position_bias):
        return _SEE_ALL, mask.bias(num_keys, prefix_len, query.dtype)
    return compact, None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast. Rotary embedding leaves keys, but not values, in fp32 under autocast."""
    device = tensors[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _on(device: torch.device, x: Tensor | None) -> Tensor | None:
    """``x`` on the device of a layer; the layers of a model may be on different devices."""
    return x if x is None or x.device == device else x.to(device)


def _split(bias: Tensor | None, num_keys: int, prefix_len: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    """[..., n + T] -> ([..., P], the last prefix positions; [..., T]). The first is None where n or P is 0."""
    if bias is None:
        return None, None
    before = bias.shape[-1] - num_keys
    if before == 0 or prefix_len == 0:
        return None, bias[..., before:]
    if before < prefix_len:
        raise ValueError(
            f"{name}: expected {num_keys} columns (sequence) or {prefix_len + num_keys} (prefix and sequence), got "
            f"{bias.shape[-1]}"
        )
    return bias[..., before - prefix_len : before], bias[..., before:]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _attend_separately(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor,
    sequence: dict[str, Any],
    common: dict[str, Any],
) -> Tensor:
    """Attention with a prefix bias [B or 1, Hq or 1, S or 1, P] that the kernels do not support.

    They support one per key, for one prefix per sequence, but neither one that depends on the query (T5's relative
    positions) nor gates of a prefix that text shared by the batch follows. Attention over the sequence and attention
    over the prefix are therefore computed separately; for the latter, the prefix is passed as a sequence that all
    B * S queries share.
    The two results are weighted by their shares of the softmax denominator, exp(lse). Returns [B, Hq, S, D].
    """
    batch, num_heads, q_len, head_dim = query.shape
    no_k, no_v = prefix_k[:, :0], prefix_v[:, :0]
    bank_k, bank_v = (no_k, no_v) if sequence.get("prefix_ids") is None else (no_k[None], no_v[None])
    out, lse = prefix_attention(query, key, value, bank_k, bank_v, return_lse=True, **sequence, **common)

    rows = query.transpose(1, 2).reshape(1, batch * q_len, num_heads, head_dim).transpose(1, 2)
    row_bias = prefix_bias.expand(batch, -1, q_len, -1).transpose(0, 1)
    row_bias = row_bias.reshape(1, prefix_bias.shape[1], batch * q_len, -1)
    shared_k, shared_v = prefix_k[None].to(query.dtype), prefix_v[None].to(query.dtype)
    prefix_out, prefix_lse = prefix_attention(
        rows, shared_k, shared_v, no_k, no_v, causal=False, bias=row_bias, return_lse=True, **common
    )
    prefix_out = prefix_out.transpose(1, 2).reshape(batch, q_len, num_heads, -1).transpose(1, 2)
    prefix_lse = prefix_lse.reshape(num_heads, batch, q_len).transpose(0, 1)

    # sigmoid(a - b) = exp(a) / (exp(a) + exp(b)). Where both are -inf the query sees nothing, and both outputs are 0.
    difference = (prefix_lse - lse).nan_to_num(0.0, float("inf"), float("-inf"))
    share = torch.sigmoid(difference).unsqueeze(-1)
    merged: Tensor = share * prefix_out + (1.0 - share) * out
    return merged.to(query.dtype)


def _previous_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    *,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the attention implementation that the model had before the patch."""
    name = module.config._attn_implementation.over
    num_keys = key.shape[2]
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.for_implementation(name, num_keys)
    if isinstance(attention_mask, Tensor):
        attention_mask = attention_mask.to(query.device)
    if position_bias is not None:
        kwargs["position_bias"] = position_bias[..., position_bias.shape[-1] - num_keys :]
    attention = attention_of(module, name)
    return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
