# SPDX-License-Identifier: Apache-2.0
"""Reads from a Hugging Face model, config, tokenizer or cache what a prefix for it needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CACHE_NAMES", "KeyValue", "Origin", "cache_argument", "cache_name", "embed", "embed_dim_of", "geometry_of",
    "given_cache", "layers_of", "rename_cache", "text_cache", "text_config", "text_tokens",
]  # fmt: skip

KeyValue = tuple[Tensor, Tensor]

#: Names of a model's cache, as argument and as output. Which of them a model uses depends on the version of
#: transformers.
CACHE_NAMES = ("past_key_values", "cache")

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


def geometry_of(model_or_config: Any, given: tuple[int | None, int | None, int | None]) -> tuple[int, int, int]:
    """(num_layers, num_kv_heads, head_dim): the given values, where None the config's."""
    if any(n is None for n in given):
        if model_or_config is None:
            raise ValueError(
                "model_or_config: expected a model or config, or num_layers, num_kv_heads and head_dim, got None and "
                f"{', '.join(map(str, given))}"
            )
        found = _config_geometry(text_config(model_or_config))
        given = tuple(f if n is None else n for n, f in zip(given, found, strict=True))  # type: ignore[assignment]
    names = ("num_layers", "num_kv_heads", "head_dim")
    for name, n in zip(names, given, strict=True):
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {n!r}")
    return given  # type: ignore[return-value]


def _config_geometry(config: Any) -> tuple[int, int, int]:
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            "model_or_config: expected a model that caches keys and values per head, got one with multi-head latent "
            f"attention ({config.model_type}, kv_lora_rank = {config.kv_lora_rank})"
        )
    num_layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    heads_and_dims = {_heads_and_dim(layer) for layer in layers}
    if len(heads_and_dims) != 1:
        raise ValueError(
            "model_or_config: expected layers of one geometry, got (key-value heads, head dim) "
            f"{sorted(heads_and_dims)} in {config.model_type}"
        )
    return (num_layers, *heads_and_dims.pop())


def _heads_and_dim(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError(
            "model_or_config: expected a model with attention, whose keys and values a prefix extends, got "
            f"{config.model_type}, whose config has no num_attention_heads"
        )
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def embed_dim_of(config: Any) -> int:
    """Width of the token embeddings. ELECTRA and OPT-350m project it to the hidden size."""
    config = text_config(config)
    names = ("embedding_size", "word_embed_proj_dim", "hidden_size")
    return int(next(n for n in (getattr(config, name, None) for name in names) if n))


@torch.no_grad()
def embed(model: Any, ids: Sequence[int] | Tensor) -> Tensor:
    """[n, E], the model's embeddings of n tokens.

    The embedding runs, because its weight may be quantised and need not have the shape [V, E] then.
    """
    embedding = model.get_input_embeddings()
    rows: Tensor = embedding(torch.as_tensor(ids, device=embedding.weight.device))
    return rows


def text_tokens(tokenizer: Any, text: str, length: int) -> list[int]:
    """The text's token ids, repeated or truncated to the length."""
    ids = list(tokenizer(text)["input_ids"])
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
    """The model's cache of the tokens. Created without a config, so that sliding layers keep all tokens too."""
    from transformers import DynamicCache, EncoderDecoderCache

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    modes = {module: module.training for module in model.modules()}
    model.eval()  # neither dropout nor gradient checkpointing, which drops the cache
    try:
        cache: Any = DynamicCache()
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache())
            inputs = {"decoder_input_ids": input_ids}
        else:
            model, inputs = model.base_model, {}
        model(input_ids=input_ids, **inputs, **{cache_argument(model): cache}, use_cache=True)
    finally:
        for module, training in modes.items():
            module.training = training
    return cache


def layers_of(cache: Any) -> list[KeyValue]:
    """(key, value) [Hkv, T, D] of each layer of a cache with batch size 1."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = [(x.keys, x.values) for x in cache.layers] if hasattr(cache, "layers") else [tuple(x[:2]) for x in cache]
    if not layers or any(not isinstance(x, Tensor) for pair in layers for x in pair):
        raise ValueError(
            "cache: expected keys and values of every layer, got none of "
            f"{[i for i, pair in enumerate(layers) if not isinstance(pair[0], Tensor)] or 'any layer'}"
        )
    for layer, pair in enumerate(layers):
        for x in pair:
            if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[0] != 1):
                raise ValueError(f"cache: layer {layer}: expected [1, Hkv, T, D] or [Hkv, T, D], got {list(x.shape)}")
    return [tuple(x[0] if x.dim() == 4 else x for x in pair) for pair in layers]  # type: ignore[misc]
