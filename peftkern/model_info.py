# SPDX-License-Identifier: Apache-2.0
"""Reads from a Hugging Face model, config, tokenizer or cache what a prefix for it needs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager_attention import record_keys
from .overrides import overridden

__all__ = [
    "CACHE_NAMES", "PATCH", "KeyValue", "Origin", "cache_argument", "cache_name", "check_not_patched", "embed",
    "embed_dim_of", "encoder_inputs", "full_cache", "given_cache", "in_eval_mode", "layers_of", "rename_cache",
    "takes_cache", "text_cache", "text_config", "text_tokens",
]  # fmt: skip

KeyValue = tuple[Tensor, Tensor]

#: Names of a model's cache, as argument and as output. Which of them a model uses depends on the version of
#: transformers.
CACHE_NAMES = ("past_key_values", "cache")

#: Attribute of a patched model: its ``peftkern.huggingface.wiring.Patch``.
PATCH = "_peftkern_patch"

#: The most queries of a call when a model reads a long text.
CHUNK = 512

_KV = ("keys", "values")

_TASK_OF_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class Origin(NamedTuple):
    """The model and task of a prefix, stored in checkpoints. PEFT selects its model class by ``task_type``."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str = "CAUSAL_LM"

    @classmethod
    def of(cls, model_or_config: Any) -> Origin:
        """The origin of a Hugging Face model or config; the defaults for None."""
        if model_or_config is None:
            return cls()
        config = getattr(model_or_config, "config", model_or_config)
        seq2seq = getattr(config, "is_encoder_decoder", False)
        if config is model_or_config:
            name = (getattr(config, "architectures", None) or [""])[0]
        else:
            name = type(model_or_config).__name__
        task = next((task for suffix, task in _TASK_OF_CLASS.items() if name.endswith(suffix)), None)
        if task is None and name.endswith("Model") and not seq2seq:
            task = "FEATURE_EXTRACTION"
        return cls(
            getattr(config, "name_or_path", None) or None,
            task_type=task or ("SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"),
        )


def text_config(model_or_config: Any) -> Any:
    """The config of the language decoder: a vision-language model's text config, or an encoder-decoder's decoder."""
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"model_or_config: expected a Hugging Face model or config, got {type(model_or_config)}")
    return config.get_text_config(decoder=True)


def embed_dim_of(config: Any) -> int:
    """Width of the token embeddings. ELECTRA and OPT-350m project it to the hidden size."""
    config = text_config(config)
    names = ("embedding_size", "word_embed_proj_dim", "hidden_size")
    return int(next(n for n in (getattr(config, name, None) for name in names) if n))


@torch.no_grad()
def embed(model: Any, ids: Sequence[int] | Tensor) -> Tensor:
    """[..., E], the model's embeddings of tokens [...].

    The embedding runs, because its weight may be quantised and need not have the shape [V, E] then. It sees a batch
    of one sequence, as its hooks may expect.
    """
    embedding = model.get_input_embeddings()
    tokens = torch.as_tensor(ids, device=embedding.weight.device)
    rows: Tensor = embedding(tokens.reshape(1, -1))
    return rows.reshape(*tokens.shape, -1)


def check_not_patched(model: Any) -> None:
    """Raise ValueError for a model that is patched, or in which one is."""
    if any(PATCH in module.__dict__ for module in model.modules()):
        raise ValueError("model: expected a model that is not patched, got a patched one; call unpatch(model) first")


def text_tokens(tokenizer: Any, text: str | Sequence[int], length: int | None = None) -> list[int]:
    """The text's token ids, or the ids themselves, repeated or truncated to the length, if there is one."""
    if isinstance(text, str) and not callable(tokenizer):
        raise ValueError(f"tokenizer: expected a tokenizer for a text, got {type(tokenizer).__name__}")
    ids = list(tokenizer(text)["input_ids"] if isinstance(text, str) else text)
    if not all(isinstance(token, Integral) for token in ids):
        raise ValueError("text: expected a text, or ids of tokens, got a sequence of other things")
    length = len(ids) if length is None else length
    if not ids or length < 1:
        raise ValueError(f"text, length: expected at least one token, got {text!r} ({len(ids)} tokens) and {length}")
    return (ids * -(-length // len(ids)))[:length]


def cache_name(names: Iterable[str]) -> str | None:
    """The name of the cache among ``names`` of arguments or outputs; None if there is none."""
    return next((name for name in names if name in CACHE_NAMES), None)


def cache_argument(model: Any) -> str:
    """The name of a model's cache argument.

    Raises:
        ValueError: if it has none.
    """
    name = cache_name(inspect.signature(model.forward).parameters)
    if name is None:
        raise ValueError(f"model: {type(model).__name__} takes no cache, by which a prefix reaches its layers")
    return name


def takes_cache(model: Any) -> bool:
    """Whether a Hugging Face model takes a cache. Encoders like ModernBERT do not."""
    return _accepts_cache(_below_head(model))


def _accepts_cache(module: Any) -> bool:
    return cache_name(inspect.signature(module.forward).parameters) is not None


def _below_head(model: Any) -> Any:
    """The model without its output layer, or the whole model if what is below passes any arguments on (BART)."""
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    passes_on = all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters)
    return model if passes_on else model.base_model


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a call; None if there is none."""
    name = cache_name(arguments.keys())
    return None if name is None else arguments[name]


def rename_cache(arguments: MutableMapping[str, Any], name: str) -> None:
    """Rename the cache among the arguments of a call to ``name``, in place.

    Raises:
        ValueError: if there are two caches.
    """
    given = {other: arguments.pop(other) for other in CACHE_NAMES if other in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if any(cache is not caches[0] for cache in caches):
        raise ValueError(f"{', '.join(given)}: expected one cache, got one under each of these names")
    if given:
        arguments[name] = caches[0] if caches else None


@torch.no_grad()
def text_cache(model: Any, input_ids: Tensor) -> Any:
    """The model's cache of the tokens; (key, value) of every layer if the model takes no cache.

    Sliding layers keep all tokens too. A causal model reads many tokens in chunks of :data:`CHUNK` queries, so that
    the scores and masks of a layer are [CHUNK, T] and never [T, T], if a trial shows that chunks change nothing.
    """
    from transformers import EncoderDecoderCache

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with in_eval_mode(model):
        if not takes_cache(model):
            return record_keys(model.base_model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        cache = full_cache(model.config)
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, full_cache(model.config))
            inputs = {**encoder_inputs(model, input_ids), "decoder_input_ids": input_ids}
        else:
            model, inputs = _below_head(model), {"input_ids": input_ids}
            if input_ids.shape[1] > CHUNK and _reads_chunks(model, input_ids[:, :8]):
                _read(model, input_ids, cache, CHUNK)
                return cache
        model(**inputs, **{cache_argument(model): cache}, use_cache=True)
    return cache


def _read(model: Any, input_ids: Tensor, cache: Any, size: int) -> None:
    """Fill a cache with tokens [1, T], ``size`` at a time."""
    for start in range(0, input_ids.shape[1], size):
        ids = input_ids[:, start : start + size]
        places = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        model(input_ids=ids, position_ids=places, **{cache_argument(model): cache}, use_cache=True)


def _reads_chunks(model: Any, input_ids: Tensor) -> bool:
    """Whether a causal model computes the same keys and values from several calls as from one: tried on few tokens.

    Models whose rotary frequencies depend on the length of a call, and models with recurrent states, are not tried.
    """
    dynamic = [m for m in model.modules() if _depends_on_length(getattr(m, "rope_type", None))]
    if dynamic or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    whole, chunks = full_cache(model.config), full_cache(model.config)
    _read(model, input_ids, whole, input_ids.shape[1])
    if not all(type(layer) is type(whole.layers[0]) and hasattr(layer, "keys") for layer in whole.layers):
        return False
    _read(model, input_ids, chunks, 3)
    if [layer.keys.shape for layer in whole.layers] != [layer.keys.shape for layer in chunks.layers]:
        return False
    pairs = [(getattr(a, x), getattr(b, x)) for a, b in zip(whole.layers, chunks.layers, strict=True) for x in _KV]
    return all(float((a - b).norm()) <= 8 * torch.finfo(a.dtype).eps * float(a.norm()) for a, b in pairs)


def _depends_on_length(rope_type: Any) -> bool:
    types = rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or "longrope" in kind) for kind in types)


@contextlib.contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Run a block with neither dropout nor gradient checkpointing, which drops the cache."""
    with overridden(list(model.modules()), "training", False):
        yield


def encoder_inputs(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Arguments of the encoder of an encoder-decoder: the tokens, or silence for one that reads audio features.

    Raises:
        ValueError: for an encoder of other inputs.
    """
    encoder = model.get_encoder()
    if encoder.main_input_name == "input_ids":
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    bins, positions = (getattr(encoder.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if encoder.main_input_name != "input_features" or not (bins and positions):
        raise ValueError(
            f"model: expected an encoder of tokens or audio features, got {type(encoder).__name__}, which reads "
            f"{encoder.main_input_name}"
        )
    return {"input_features": encoder.conv1.weight.new_zeros(input_ids.shape[0], bins, 2 * positions)}


def full_cache(config: Any) -> Any:
    """An empty cache whose layers keep all tokens, also those with a sliding window."""
    from transformers.cache_utils import (
        DummyLayer,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    )

    config = config.get_text_config(decoder=True)
    if not getattr(config, "layer_types", None):
        return DynamicCache()
    cache = DynamicCache(config=config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    if all(type(layer) in plain for layer in cache.layers):
        return DynamicCache()  # grows where the model has more layers than its config says
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            cache.layers[index] = LinearAttentionAndFullAttentionLayer(layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = DynamicLayer()
    return cache


def _is_pair(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str) and len(x) >= 2


def layers_of(cache: Any) -> list[KeyValue | None]:
    """(key, value) [Hkv, T, D] of each layer of a cache with batch size 1; None for a layer without keys."""
    cache = getattr(cache, "self_attention_cache", cache)
    is_sequence = isinstance(cache, Sequence) and all(x is None or _is_pair(x) for x in cache)
    if not is_sequence and not isinstance(getattr(cache, "layers", None), Sequence):
        raise ValueError(f"cache: expected a cache, or (key, value) or None per layer, got {type(cache).__name__}")
    if hasattr(cache, "layers"):
        layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    else:
        layers = [(None, None) if x is None else tuple(x[:2]) for x in cache]
    found: list[Any] = [pair if all(isinstance(x, Tensor) for x in pair) else None for pair in layers]
    if not any(pair is not None for pair in found):
        raise ValueError(
            "cache: expected keys and values of at least one layer, got none of "
            f"{list(range(len(found))) or 'any layer'}"
        )
    for layer, pair in enumerate(found):
        for x in pair or ():
            if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[0] != 1):
                raise ValueError(f"cache: layer {layer}: expected [1, Hkv, T, D] or [Hkv, T, D], got {list(x.shape)}")
    return [pair and tuple(x[0] if x.dim() == 4 else x for x in pair) for pair in found]
