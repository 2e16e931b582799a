# SPDX-License-Identifier: Apache-2.0
"""Reference results of prompts and prefixes from stock code alone, and the allowed differences of a patched model.

A soft prompt is embeddings before the tokens' own; a prefix is what a stock ``DynamicCache`` holds before the call.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import peftkern
from peftkern import PrefixKV, SoftPrompt
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, PREFIX

LLAMA = FAMILIES["llama (GQA)"]
TOLERANCE = 1e-5
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompt_values(length: int = PREFIX, width: int = 64) -> Tensor:
    """The same values of a prompt at every call."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(5)) * 0.5


def soft_prompt(length: int = PREFIX, width: int = 64) -> SoftPrompt:
    """A prompt with :func:`prompt_values`."""
    return SoftPrompt(None, length, embed_dim=width, init=prompt_values(length, width))


def llama_prefix() -> PrefixKV:
    """The prefix of :func:`models.peft_model` for Llama, as a module."""
    return models.native_prefix(models.peft_model(LLAMA, patched=False))


def with_prompt(
    model: nn.Module,
    prompt: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    **more: Any,
) -> Any:
    """The output of a stock ``model`` on ``inputs_embeds`` that begin with the prompt [P, E]."""
    batch, length = ids.shape[0], prompt.shape[0]
    tokens = model.get_input_embeddings()(ids)
    embeds = torch.cat([prompt.to(tokens.dtype).expand(batch, -1, -1), tokens], 1)
    pad = nn.functional.pad
    if mask is not None:
        more["attention_mask"] = pad(mask, (length, 0), value=1)
    if labels is not None:
        more["labels"] = pad(labels, (length, 0), value=-100)
    return model(inputs_embeds=embeds, **more)


def with_prefix(model: nn.Module, prefix: PrefixKV, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    """The output of a stock ``model`` with the prefix in its cache."""
    if mask is not None:
        more["attention_mask"] = nn.functional.pad(mask, (max(prefix.lengths), 0), value=1)
    return model(input_ids=ids, past_key_values=stock_cache(prefix, ids.shape[0], model), **more)


def stock_cache(prefix: PrefixKV, batch: int, model: Any = None) -> DynamicCache:
    """A stock cache with the prefix of every sample; where ``model`` has recurrent layers, they keep fresh states."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if model is not None else DynamicCache()
    recurrent = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers]
    if not any(recurrent):
        cache, recurrent = DynamicCache(), []
    for layer, (key, value) in enumerate(prefix.layer_kv()):
        if layer < len(recurrent) and recurrent[layer]:
            continue
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


@torch.no_grad()
def greedy(logits: Callable[[Tensor], Tensor], ids: Tensor, new: int = 6) -> list[list[int]]:
    """Greedy tokens from one forward over the whole sequence per token; ``logits`` computes those of ids."""
    for _ in range(new):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return ids.tolist()


METHODS = ("peft prefix", "peft prompt", "native prefix", "native prompt")


def build(method: str, *, patched: bool = True, base: nn.Module | None = None, **options: Any) -> Any:
    """A tiny Llama, or ``base``, with one of :data:`METHODS`. Native ones are always patched."""
    if method.startswith("peft"):
        make = models.peft_model if method == "peft prefix" else models.prompt_model
        return make(LLAMA, patched=patched, **options)
    learned = llama_prefix() if method == "native prefix" else soft_prompt()
    return peftkern.patch(models.base_model(LLAMA) if base is None else base, learned, **options)


def truth(method: str) -> Callable[..., Any]:
    """The stock forward that :func:`build`'s model must equal: ``truth(method)(ids, mask=None, labels=None, ...)``.

    Its logits have rows for the prompt where ``method`` is a prompt, as PEFT's have.
    """
    if method.startswith("peft"):
        model = build(method, patched=False).eval()
        return lambda ids, mask=None, **more: model(input_ids=ids, attention_mask=mask, **more)
    base = models.base_model(LLAMA).eval()
    if method == "native prefix":
        return functools.partial(with_prefix, base, llama_prefix())
    return functools.partial(with_prompt, base, prompt_values())


def token_rows(logits: Tensor, tokens: int) -> Tensor:
    """The rows [B, S, ...] of tokens, without those of a prompt."""
    return logits[:, logits.shape[1] - tokens :]


def same_or_named(call: Callable[[], Tensor], want: Tensor, *words: str, what: str = "the outputs") -> None:
    """The results are equal, or a ValueError is raised whose message contains one of ``words``."""
    try:
        got = call()
    except ValueError as error:
        message = str(error)
        assert any(word.lower() in message.lower() for word in words), (
            f"refused, but the message has none of {words}, which would help: {message}"
        )
        return
    assert got.shape == want.shape, f"{what} have another shape: {list(got.shape)}, expected {list(want.shape)}"
    off = models.difference(got, want)
    assert off <= TOLERANCE, f"{what} differ by {off:.1e} without a word"


def refused(call: Callable[[], Any], *words: str) -> bool:
    """Whether ``call`` raises a ValueError that contains one of ``words``. Other errors propagate."""
    try:
        call()
    except ValueError as error:
        message = str(error)
        assert any(word.lower() in message.lower() for word in words), (
            f"refused, but the message has none of {words}, which would help: {message}"
        )
        return True
    return False


@contextlib.contextmanager
def notices() -> Iterator[list[str]]:
    """A list of the package's warnings in the block, including repeated ones."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in caught if "peftkern" in str(w.message)]


def assert_close(got: Tensor, want: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape, f"{what}: expected shape {list(want.shape)}, got {list(got.shape)}"
    off = models.difference(got, want)
    assert off <= tolerance, f"{what} differ by {off:.1e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The gradients of all parameters; at least one must have a gradient."""
    assert got.keys() == want.keys(), f"other parameters have gradients: {sorted(got.keys() ^ want.keys())}"
    assert want, "no parameter has a gradient"
    for name in sorted(want):
        assert_close(got[name], want[name], f"gradients of {name}", 1e-4)
