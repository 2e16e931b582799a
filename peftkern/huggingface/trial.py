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
from .layout import IGNORED, Layout, next_labels
from .packing import Stream
from .probing import is_transient, some_tokens
from .survey import Site

if TYPE_CHECKING:
    from .packer import Packer

__all__ = ["Trial", "try_head"]

#: ``layout_of(tokens, mask, from_first)`` is how a batch is packed.
LayoutOf = Callable[[Tensor, Tensor, bool], Layout]

_PREFIX_LEN = 3
#: No kernel is compiled for these sizes: the trial is about what surrounds attention.
_BACKEND = "reference"


class Trial:
    """Runs of one backbone, whose attention is peftkern's already, on a few tokens.

    Args:
        backbone: in eval mode, without gradients (:func:`.probing.quiet`).
        sites: its attention modules that take a prefix.
        samples: per layer of the cache, keys and values [1, Hkv, 2, D] of two tokens.
        options: for the attention function.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        sites: dict[nn.Module, Site],
        samples: dict[int, KeyValue],
        options: PrefixOptions,
    ) -> None:
        self.backbone = backbone
        self.sites = sites
        self.options = replace(options, in_window=True, backend=_BACKEND)
        self.kind = type(backbone).__name__
        self.cache_name = cache_argument(backbone)
        self.prefix = _some_prefix(backbone, samples)
        self.ids = some_tokens(backbone, 2 * 4).view(2, 4)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :2] = 0
        self.mask[1, -1:] = 0
        #: How far the stock model and peftkern round apart.
        self.noise = 0.0
        self._padded: Tensor | None = None

    def try_prefix(self) -> str | None:
        """How a prefix that attention reads differs from one in the stock cache; None if it does not.

        Where padding and a decoding step differ by much more than the plain batch does, it is not rounding.
        """
        return self._guarded(self._try_prefix, "with a prefix")

    def _try_prefix(self) -> str | None:
        ids, mask, real = self.ids, self.mask, self.mask.bool()
        want, got = (self._run(cache, ids[:1], None) for cache in (self._stock(1), self._cache(stores=False)))
        self.noise = _difference(got, want)
        if (reason := _compare(f"{self.kind} with prefix keys in its cache", got, want, math.inf)) is not None:
            return reason
        stock, cache = self._stock(ids.shape[0]), self._cache()
        self._padded, got = self._run(stock, ids, mask), self._run(cache, ids, mask)
        what = f"{self.kind} with prefix keys in its cache and padding"
        if (reason := _compare(what, got[real], self._padded[real], self.noise)) is not None:
            return reason
        longer = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        want, got = self._run(stock, ids[:, :1], longer), self._run(cache, ids[:, :1], longer)
        return _compare(f"{self.kind} with prefix keys in its cache, decoding", got, want, self.noise)

    def try_stream(self, layout_of: LayoutOf) -> str | None:
        """How a stream behind the prefix differs from the padded batch; None if it does not."""

        def run() -> str | None:
            real = self.mask.bool()
            stream, cache = Stream(layout_of(self.ids, self.mask, False)), self._cache()
            tokens = self.backbone.get_input_embeddings()(self.ids)
            got = stream.unpack(self._run_stream(cache, stream, tokens))
            assert self._padded is not None
            return _compare(f"{self.kind} on a stream of rows", got[real], self._padded[real], self.noise)

        return self._guarded(run, "on a stream of rows")

    def try_prompt(self, layout_of: LayoutOf) -> str | None:
        """How a stream behind a prompt differs from a batch with the prompt in every row; None if it does not."""

        def run() -> str | None:
            ids, (samples, length) = some_tokens(self.backbone, self.ids.numel() + _PREFIX_LEN), self.ids.shape
            prompt, tokens = self.backbone.get_input_embeddings()(ids).split([_PREFIX_LEN, self.ids.numel()])
            tokens = tokens.view(samples, length, -1)
            mask = self.mask.clone()
            mask[0] = 1  # padding between prompt and text would move the text
            padded = torch.cat([mask.new_ones(samples, _PREFIX_LEN), mask], 1)
            batch = torch.cat([prompt.expand(samples, -1, -1), tokens], 1)
            want = self.backbone(inputs_embeds=batch, attention_mask=padded, use_cache=False)[0]
            stream = Stream(layout_of(tokens, mask, True), prompt[None], show_prompts=True)
            cache = StreamCache(len(self.prefix), stream, stores=False, options=self.options)
            got, real = stream.unpack(self._run_stream(cache, stream, tokens)), padded.bool()
            return _compare(f"{self.kind} on a stream of rows behind a prompt", got[real], want[real], self.noise)

        return self._guarded(run, "on a stream of rows behind a prompt")

    def _guarded(self, run: Callable[[], str | None], what: str) -> str | None:
        try:
            return run()
        except Exception as error:
            if is_transient(error):
                raise
            return f"{self.kind} could not be run {what}: {_first_line(error)}"

    def _cache(self, stores: bool = True) -> PrefixCache:
        return PrefixCache(self.prefix, offset=_PREFIX_LEN, stores=stores, offset_outside=True, options=self.options)

    def _stock(self, batch: int) -> Any:
        return self._cache().as_stock(batch, self.backbone.dtype)

    def _run(self, cache: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], _PREFIX_LEN), mask], 1)
        arguments = {"input_ids": tokens, "attention_mask": mask, self.cache_name: cache, "use_cache": True}
        if not isinstance(cache, PrefixCache):
            return self.backbone(**arguments)[0]  # type: ignore[no-any-return]
        cache.begin()
        output = self.backbone(**arguments, peftkern_prefix=cache)
        missing = cache.finish([site.name for site in self.sites.values()])
        if missing:
            raise ValueError(f"attention ran without its prefix in {', '.join(missing)}")
        return output[0]  # type: ignore[no-any-return]

    def _run_stream(self, cache: PrefixCache, stream: Stream, tokens: Tensor) -> Tensor:
        cache.stream = stream
        rows = stream.embeddings(stream.layout.pack(tokens))
        return self.backbone(  # type: ignore[no-any-return]
            inputs_embeds=rows, position_ids=stream.positions(cache.offset), attention_mask=None, use_cache=False,
            peftkern_prefix=cache, **{self.cache_name: cache},
        )[0]  # fmt: skip


def try_head(packer: Packer) -> bool:
    """Whether the base model's own forward computes logits and loss row by row.

    The forward runs on a batch, and again on the rows of the batch that predict a label, which a hook on the backbone
    selects. Both give the same logits and the same loss.
    """
    base, backbone = packer.base, packer.backbone
    ids = some_tokens(backbone, 2 * 3).view(2, 3)
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


def _some_prefix(backbone: PreTrainedModel, samples: dict[int, KeyValue]) -> list[KeyValue | None]:
    """Keys and values of _PREFIX_LEN tokens per layer: those of the samples, a little of each changed at random.

    A prefix unlike what the model has seen would make rounding look large.
    """
    generator = torch.Generator().manual_seed(0)

    def vary(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[1], _PREFIX_LEN, x.shape[3], generator=generator).to(x.device, x.dtype)
        return x[0, :, [0, 1, 1]] + 0.1 * x.float().square().mean().sqrt().to(x.dtype) * noise

    layers = {layer: (vary(key), vary(value)) for layer, (key, value) in samples.items()}
    # PEFT has a prefix for every layer of the model, whether it attends to the sequence or not.
    config = backbone.config.get_text_config(decoder=True)
    num_layers = max(1 + max(layers), getattr(config, "num_hidden_layers", None) or 0)
    return [layers.get(layer, next(iter(layers.values()))) for layer in range(num_layers)]


def _difference(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the Euclidean norm."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.float(), want.float().to(got.device)
    if bool(want.isnan().any()) and torch.equal(want.isnan(), got.isnan()):
        got, want = got.nan_to_num(), want.nan_to_num()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def _compare(what: str, got: Tensor, want: Tensor, noise: float) -> str | None:
    """A sentence on a difference that rounding does not explain; None for one that it does.

    Rounding that has been measured may be four times as large elsewhere.
    """
    difference = _difference(got, want)
    least, most = _ROUNDING.get(
        want.dtype, (2e-5, 2e-3 if torch.get_float32_matmul_precision() != "highest" else 1e-4)
    )
    if difference <= min(most, max(least, 4 * noise)):
        return None
    return f"{what} differs from the stock model: its hidden states are off by {difference:.1e} of their norm"


#: Per dtype, the difference that is always accepted, and the largest that is ever accepted.
_ROUNDING = {torch.bfloat16: (1e-2, 5e-2), torch.float16: (2e-3, 2e-2)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
