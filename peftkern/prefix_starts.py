# SPDX-License-Identifier: Apache-2.0
"""Where the initial values of a prefix come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .argument_types import MODEL, MODEL_OR_CONFIG, PEFT_MODEL, TOKENIZER, checks_arguments
from .layer_shapes import LayerShape, lengths_of
from .model_info import Origin, layers_of, text_tokens
from .prefix_length import token_layers
from .prefix_parts import DECODER, parts_of
from .recurrent_state import RecurrentState

__all__ = ["Starts"]


class Starts(nn.Module):
    """The constructors of a prefix with given initial values."""

    @classmethod
    @checks_arguments(model=MODEL, tokenizer=TOKENIZER)
    def from_text(
        cls,
        model: Any,
        tokenizer: Any,
        text: str | Sequence[int],
        length: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """A prefix initialised with the keys and values of real text, as Li & Liang 2021 recommend.

        The tokens that ``tokenizer(text)`` returns (no chat template) are repeated or truncated to the (largest)
        length. In encoder-decoder models, encoder and decoder read the text. The cross-attention's keys and values
        are those of the encoded text. Causal models read a long text in chunks, as in :func:`.model_info.text_cache`.

        Args:
            model: a Hugging Face model. It runs in eval mode and without gradients, and is not changed.
            tokenizer: called on the text.
            text: for example an instruction, or a document; or the ids of its tokens, which need no tokenizer.
            length: as for :class:`PrefixKV`; None keeps all tokens of the text.
            options: as for :class:`PrefixKV`.

        Raises:
            ValueError: for a text without tokens, more tokens than the model has positions, or a patched model.
        """
        if length is None:
            length = len(text_tokens(tokenizer, text))
        return cls._from_tokens(model, length, lambda longest: text_tokens(tokenizer, text, longest), options)

    @classmethod
    @checks_arguments(model=MODEL)
    def from_vocabulary(
        cls, model: Any, length: int | Sequence[int], *, generator: torch.Generator | None = None, **options: Any
    ) -> Any:
        """A prefix initialised with the keys and values of random tokens of the vocabulary.

        It learns faster than random numbers, and more slowly than real text (:meth:`from_text`).

        Args:
            model: as for :meth:`from_text`.
            length: as for :class:`PrefixKV`.
            generator: of the CPU; default: torch's.
            options: as for :class:`PrefixKV`.

        Raises:
            ValueError: for a length beyond the model's positions, or of 0 in all layers.
        """
        vocab_size = model.get_input_embeddings().weight.shape[0]

        def sample(longest: int) -> list[int]:
            if longest < 1:
                raise ValueError(f"length: expected at least one token, got {length}")
            return torch.randint(vocab_size, (longest,), generator=generator).tolist()

        return cls._from_tokens(model, length, sample, options)

    @classmethod
    def _from_tokens(
        cls, model: Any, length: int | Sequence[int], tokens: Callable[[int], list[int]], options: dict[str, Any]
    ) -> Any:
        """A prefix with the keys and values of the token ids that ``tokens`` returns for the largest length."""
        names = ("num_layers", "num_kv_heads", "head_dim", "value_head_dim")
        parts = options.get("parts", DECODER)
        _, shapes = parts_of(model, parts, *(options.get(name) for name in names))
        ids = tokens(max(lengths_of(length, shapes)))
        layers = token_layers(model, lambda _: ids, len(ids), shapes, parts=parts)
        if options.get("state") is True:
            options = {**options, "state": RecurrentState.of_tokens(model, ids)}
        return cls.from_cache(layers, length, model_or_config=model, **options)

    @classmethod
    @checks_arguments(model_or_config=MODEL_OR_CONFIG)
    def from_cache(
        cls, cache: Any, length: int | Sequence[int] | None = None, *, model_or_config: Any = None, **options: Any
    ) -> Any:
        """A prefix initialised with the first tokens of a cache.

        Args:
            cache: a ``transformers`` cache of batch 1, or (key, value) per layer, [1, Hkv, T, D] or [Hkv, T, D], None
                for a layer without keys. Compressed keys and values have to be expanded.
            length: as for :class:`PrefixKV`; None takes all T tokens.
            model_or_config: default: the geometry of the cache.
            options: as for :class:`PrefixKV`. With ``state=True``, the states are those of the cache, and the length
                has to be the number of its tokens.

        >>> kv = [(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)) for _ in range(3)]
        >>> PrefixKV.from_cache(kv, length=5, num_frozen_tokens=1)
        PrefixKV(num_layers=3, num_kv_heads=2, head_dim=16, length=5, num_frozen_tokens=1)
        """
        kv = layers_of(cache)
        found = {x.shape[1] for pair in kv if pair is not None for x in pair}
        if length is None:
            tokens = sorted(found)
            if len(tokens) != 1:
                raise ValueError(
                    f"length: expected an int or one per layer, as the cached layers have {tokens} tokens, got None"
                )
            length = tokens[0]
        if options.get("state") is True:
            options["state"] = RecurrentState.of_cache(cache)
            if (longest := length if isinstance(length, int) else max(length)) != max(found):
                raise ValueError(f"length: expected all {max(found)} tokens, which the states follow, got {longest}")
        if model_or_config is None:
            sizes = [(0, 0, 0) if pair is None else LayerShape.of(pair) for pair in kv]
            own: dict[str, Any] = {"num_layers": len(kv), "device": next(pair[0].device for pair in kv if pair)}
            names = ("num_kv_heads", "head_dim", "value_head_dim")
            own |= {name: list(each) for name, each in zip(names, zip(*sizes, strict=True), strict=True)}
            options = {**own, **options}
        return cls(model_or_config, length, init=kv, **options)

    @classmethod
    @checks_arguments(peft_model=PEFT_MODEL)
    def from_peft(cls, peft_model: Any, adapter_name: str | None = None) -> Any:
        """A prefix that shares the parameters of a PEFT model's PREFIX_TUNING or CARTRIDGE adapter.

        It saves and restores an adapter with its projection, which PEFT's own files do not contain::

            save_prefix(PrefixKV.from_peft(peft_model), folder)
            PrefixKV.from_peft(peft_model).load_state_dict(load_prefix(folder).state_dict())

        Args:
            peft_model: a ``peft.PeftModel``.
            adapter_name: default: the active adapter.

        Raises:
            ValueError: for an adapter of another type.
        """
        name = adapter_name or peft_model.active_adapter
        if name not in peft_model.peft_config:
            raise ValueError(f"adapter_name: expected one of {list(peft_model.peft_config)}, got {name!r}")
        config, encoder = peft_model.peft_config[name], peft_model.prompt_encoder[name]
        if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(f"adapter_name: expected a PREFIX_TUNING or CARTRIDGE adapter, got {config.peft_type}")
        transform = getattr(encoder, "transform", None)  # PEFT creates none for inference, even if the config has one
        prefix: Any = cls(
            None, config.num_virtual_tokens, num_layers=config.num_layers, num_kv_heads=config.num_attention_heads,
            head_dim=config.token_dim // config.num_attention_heads, init="zero", device="meta",
            num_frozen_tokens=getattr(config, "num_frozen_tokens", 0),
            projection=None if transform is None else transform[0].out_features,
            peft_seq2seq_layout=config.num_transformer_submodules == 2,
        )  # fmt: skip
        prefix.transform = transform
        prefix.trainable[0] = getattr(encoder, "trainable_embedding", encoder.embedding.weight)
        if prefix.num_frozen_tokens:
            prefix.frozen[0] = encoder.frozen_embedding
        task_type = getattr(config.task_type, "value", config.task_type)
        prefix.origin = Origin(config.base_model_name_or_path, config.revision, task_type or Origin().task_type)
        return prefix
