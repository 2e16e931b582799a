# SPDX-License-Identifier: Apache-2.0
"""Runs a model on a few tokens to see whether a patch computes what the stock model computes.

What is compared with the stock model, whose cache holds the same prefix: a batch without padding, rows padded on the
left and on the right, one decoding step, the stream of rows, and the output layer on rows. A difference is an answer;
an error for want of memory or of a device is raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_model import cache_argument
from .cache import KeyValue, PrefixCache, PrefixOptions, StreamCache
from .packing import IGNORED, Layout, Stream, next_labels
from .probing import is_transient
from .survey import Site

if TYPE_CHECKING:
    from .packer import Packer

__all__ = ["try_head", "try_prefix", "try_stream"]

_PREFIX_LEN = 3
#: No kernel is compiled for these sizes: the trial is about what surrounds attention.
_BACKEND = "reference"


def try_prefix(
    backbone: PreTrainedModel, sites: dict[nn.Module, Site], options: PrefixOptions
) -> tuple[str | None, float]:
    """(how a prefix that attention reads differs from one in the stock cache, or None, rounding between the two).

    Where padding and a decoding step differ by much more than the plain batch does, it is not rounding.
    """
    name, kind = cache_argument(backbone), type(backbone).__name__
    options = replace(options, in_window=True, backend=_BACKEND)
    prefix = _random_prefix(backbone, sites)
    ids = _some_tokens(backbone, 3 * 5).view(3, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, -2:] = 0

    def caches() -> tuple[Any, PrefixCache]:
        cache = PrefixCache(prefix, offset=_PREFIX_LEN, stores=True, offset_outside=True, options=options)
        return cache.as_stock(ids.shape[0], backbone.dtype), cache

    def run(cache: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], _PREFIX_LEN), mask], 1)
        arguments = {"input_ids": tokens, "attention_mask": mask, name: cache, "use_cache": True}
        if not isinstance(cache, PrefixCache):
            return backbone(**arguments)[0]  # type: ignore[no-any-return]
        cache.begin()
        output = backbone(**arguments, peftkern_prefix=cache)
        missing = cache.finish([site.name for site in sites.values()])
        if missing:
            raise ValueError(f"attention ran without its prefix in {', '.join(missing)}")
        return output[0]  # type: ignore[no-any-return]

    stock: Any = None
    try:
        stock, cache = caches()
        want = run(stock, ids, None)
        got = run(cache, ids, None)
        noise = _difference(got, want)
        if (reason := _compare(f"{kind} with a prefix", got, want, math.inf)) is not None:
            return reason, noise
        stock, cache = caches()
        want, real = run(stock, ids, mask), mask.bool()
        got = run(cache, ids, mask)
        if (reason := _compare(f"{kind} with a prefix and padding", got[real], want[real], noise)) is not None:
            return reason, noise
        longer = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        want = run(stock, ids[:, :1], longer)
        got = run(cache, ids[:, :1], longer)
        return _compare(f"{kind} with a prefix and a cache", got, want, noise), noise
    except Exception as error:
        if is_transient(error):
            raise
        return f"{kind} could not be run with a prefix: {_first_line(error)}", 0.0


def try_stream(
    backbone: PreTrainedModel,
    sites: dict[nn.Module, Site],
    layout_of: Callable[..., Layout],
    options: PrefixOptions,
    noise: float,
) -> str | None:
    """How hidden states of a stream differ from those of its padded batch; None if they do not.

    This finds models whose rows know of each other by other ways than attention and positions.

    Args:
        layout_of: ``layout_of(tokens, mask)`` is the layout of a batch.
        noise: rounding, as :func:`try_prefix` has measured it.
    """
    kind, (samples, length) = type(backbone).__name__, (3, 5)
    options = replace(options, backend=_BACKEND)
    ids = _some_tokens(backbone, samples * length + _PREFIX_LEN)
    embedding = backbone.get_input_embeddings()
    try:
        prompt, tokens = embedding(ids).split([_PREFIX_LEN, samples * length])
        tokens = tokens.view(samples, length, -1)
        mask = ids.new_ones(samples, length)
        mask[2, -2:] = 0
        padded = torch.cat([mask.new_ones(samples, _PREFIX_LEN), mask], 1)
        batch = torch.cat([prompt.expand(samples, -1, -1), tokens], 1)
        want = backbone(inputs_embeds=batch, attention_mask=padded, use_cache=False)[0]
        stream = Stream(layout_of(tokens, mask), prompt[None], show_prompts=True)
        num_layers = 1 + max(site.layer for site in sites.values())
        cache = StreamCache(num_layers, stream, stores=False, options=options)
        packed = backbone(
            inputs_embeds=stream.embeddings(stream.layout.pack(tokens)), position_ids=stream.positions(0),
            attention_mask=None, use_cache=False, peftkern_prefix=cache, **{cache_argument(backbone): cache},
        )[0]  # fmt: skip
        real = padded.bool()
        got = stream.unpack(packed)
        return _compare(f"{kind} on a stream of rows", got[real], want[real], noise)
    except Exception as error:
        if is_transient(error):
            raise
        return f"{kind} could not be run on a stream of rows: {_first_line(error)}"


def try_head(packer: Packer) -> bool:
    """Whether the base model's own forward computes logits and loss row by row.

    The forward runs on a batch, and again on the rows of the batch that predict a label, which a hook on the backbone
    selects. Both give the same logits and the same loss.
    """
    base, backbone = packer.base, packer.backbone
    ids = _some_tokens(backbone, 2 * 4).view(2, 4)
    targets = next_labels(ids)
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1).flip(0)
    labels = torch.nn.functional.pad(targets.flatten()[rows], (1, 0), value=IGNORED)[None]

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        chosen = torch.nn.functional.pad(rows, (0, 1))
        hidden = output[0].flatten(0, 1)[chosen][None]
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    forward = type(base).forward
    try:
        want = forward(base, input_ids=ids, labels=ids, use_cache=False)
        handle = backbone.register_forward_hook(select)
        try:
            got = forward(base, input_ids=ids, labels=labels, use_cache=False)
        finally:
            handle.remove()
        wanted = want["logits"].flatten(0, 1)[rows]
        kind = type(base).__name__
        if _compare(kind, got["logits"][0, :-1], wanted, math.inf) is not None:
            return False
        return _compare(kind, got["loss"][None], want["loss"][None], math.inf) is None
    except Exception as error:
        if is_transient(error):
            raise
        return False


def _random_prefix(backbone: PreTrainedModel, sites: dict[nn.Module, Site]) -> list[KeyValue | None]:
    """Keys and values of _PREFIX_LEN tokens per layer, as large as those of the survey."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[int, KeyValue] = {}
    for module, site in sites.items():
        if site.layer not in layers:
            parameter = next(module.parameters(), None)
            device = backbone.device if parameter is None or parameter.device.type == "meta" else parameter.device
            shape = (2, site.num_kv_heads, _PREFIX_LEN, site.head_dim)
            pair = torch.randn(shape, generator=generator) * torch.tensor(site.scale).view(2, 1, 1, 1)
            layers[site.layer] = tuple(pair.to(device, backbone.dtype).unbind())  # type: ignore[assignment]
    return [layers.get(layer) for layer in range(1 + max(layers))]


def _some_tokens(backbone: PreTrainedModel, count: int) -> Tensor:
    """[count] ids that are no special tokens, different ones as far as the vocabulary goes."""
    weight: Tensor = backbone.get_input_embeddings().weight
    config = backbone.config.get_text_config()
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
    special = {getattr(config, name, None) for name in names}
    vocabulary = min(weight.shape[0], getattr(config, "vocab_size", None) or weight.shape[0])
    ids = [i for i in range(min(vocabulary, count + 64)) if i not in special] or [0]
    return torch.tensor(ids, device=weight.device).repeat(-(-count // len(ids)))[:count]


def _difference(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the Euclidean norm."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.float(), want.float().to(got.device)
    if bool(want.isnan().any()) and torch.equal(want.isnan(), got.isnan()):
        got, want = got.nan_to_num(), want.nan_to_num()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def _compare(what: str, got: Tensor, want: Tensor, noise: float) -> str | None:
    """What to say of a difference that is no rounding; None for one that is.

    Rounding is at most a few units of the dtype per layer and, where it has been measured, at most four times that.
    """
    difference = _difference(got, want)
    least, most = _ROUNDING.get(want.dtype, (1e-4, 1e-3))
    if difference <= min(most, max(least, 4 * noise)):
        return None
    return f"{what} differs from the stock model: its hidden states are off by {difference:.1e} of their norm"


#: Per dtype, rounding of hidden states that says nothing, and rounding that is not believed.
_ROUNDING = {torch.bfloat16: (1e-2, 5e-2), torch.float16: (2e-3, 2e-2)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
