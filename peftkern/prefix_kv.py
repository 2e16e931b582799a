# SPDX-License-Identifier: Apache-2.0
"""Learned keys and values of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .model_info import KeyValue, Origin, geometry_of, layers_of, text_cache, text_config, text_tokens

__all__ = ["PrefixKV"]


class PrefixKV(nn.Module):
    """Learned keys and values that every query of a layer attends to before those of the sequence (Li & Liang 2021).

    With one length for all layers, the values are stored as in PEFT, in one flat parameter
    [P, num_layers * 2 * Hkv * D]: for each token the key of layer 0, the value of layer 0, the key of layer 1, and so
    on. With one length per layer, there is one such parameter [P_l, 2 * Hkv * D] per layer. Keys are stored after
    rotary embedding.

    Args:
        model_or_config: a Hugging Face model or config, which determines the number of layers, key-value heads and
            head dimension (and a model the device), or None if the three keywords are given.
        length: tokens of the prefix: an int for all layers, or one int per layer. A layer of length 0 has no prefix.
        num_layers, num_kv_heads, head_dim: the geometry; override those of the config.
        num_frozen_tokens: number of first tokens that keep their initial values (at most the length of each layer).
            Cartridges freeze one as an attention sink (Eyuboglu et al. 2025).
        projection: hidden size of an MLP (Linear, Tanh, Linear) that computes the keys and values of the other tokens
            from embeddings [P, Hkv * D], as PEFT's ``PrefixEncoder`` does. It runs on P rows, once per
            :meth:`layer_kv`. Needs one length for all layers. :meth:`bake` replaces it by its output.
        init: ``"random"``, ``"zero"``, or (key, value) per layer, in the form that :meth:`from_cache` takes. A prefix
            that starts from real text (:meth:`from_text`) trains much faster.
        std: standard deviation of the random initial values. Not used with a projection, whose initial values are
            PEFT's (embeddings N(0, 1), ``nn.Linear``'s defaults).
        dtype: of the parameters. With fp32, half-precision activations read a rounded copy of the fp32 master.
        device: default: the model's.
        peft_seq2seq_layout: layer l reads the keys and values stored for layer 2 l mod num_layers, as PEFT does in
            encoder-decoder models. Needs one length for all layers.

    Attributes:
        lengths: tokens per layer.
        trainable, frozen: the flat parameters (with a projection, ``trainable[0]`` contains the embeddings).
        origin: :class:`Origin`, the model that the prefix was made for.

    Raises:
        ValueError: naming the argument, what was expected and what was given; also for models whose layers differ in
            key-value heads or head dimension, or that cache compressed keys and values (DeepSeek's MLA).

    >>> prefix = PrefixKV(None, 5, num_layers=2, num_kv_heads=2, head_dim=16)
    >>> prefix.trainable[0].shape
    torch.Size([5, 128])
    >>> prefix_k, prefix_v = prefix.layer_kv()[0]
    >>> prefix_k.shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        model_or_config: Any,
        length: int | Sequence[int],
        *,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_frozen_tokens: int = 0,
        projection: int | None = None,
        init: str | Sequence[KeyValue] = "random",
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        peft_seq2seq_layout: bool = False,
    ) -> None:
        super().__init__()
        geometry = (num_layers, num_kv_heads, head_dim)
        self.num_layers, self.num_kv_heads, self.head_dim = geometry_of(model_or_config, geometry)
        self.lengths = _lengths(length, self.num_layers)
        self.num_frozen_tokens = num_frozen_tokens
        self.projection = projection
        self.peft_seq2seq_layout = peft_seq2seq_layout
        self.origin = Origin.of(model_or_config)
        longest, uniform = max(self.lengths), len(set(self.lengths)) == 1
        if not 0 <= num_frozen_tokens <= longest:
            raise ValueError(f"num_frozen_tokens: expected 0 to length = {longest}, got {num_frozen_tokens}")
        if projection is not None and projection < 1:
            raise ValueError(f"projection: expected None or a hidden size of at least 1, got {projection}")
        if not uniform and (projection is not None or peft_seq2seq_layout):
            argument = "projection" if projection is not None else "peft_seq2seq_layout"
            raise ValueError(f"{argument}: expected one length for all layers, got lengths {list(self.lengths)}")

        ragged = [range(layer, layer + 1) for layer, n in enumerate(self.lengths) if n]
        self._groups = [range(self.num_layers)] if uniform else ragged
        if device is None:
            device = getattr(model_or_config, "device", None)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.frozen, self.trainable = nn.ParameterList(), nn.ParameterList()
        for layers in self._groups:
            rows, width = self.lengths[layers[0]], len(layers) * 2 * self.token_dim
            num_frozen = min(rows, num_frozen_tokens)
            if num_frozen_tokens:
                self.frozen.append(nn.Parameter(torch.empty(num_frozen, width, **like), requires_grad=False))
            columns = width if projection is None else self.token_dim
            self.trainable.append(nn.Parameter(torch.empty(rows - num_frozen, columns, **like)))
        self.transform: nn.Sequential | None = None
        if projection is not None:
            self.transform = nn.Sequential(
                nn.Linear(self.token_dim, projection, **like),
                nn.Tanh(),
                nn.Linear(projection, self.num_layers * 2 * self.token_dim, **like),
            )
        self._initialise(init, std)

    @torch.no_grad()
    def _initialise(self, init: str | Sequence[KeyValue], std: float) -> None:
        if not isinstance(init, str):
            self._assign(self._blocks_of(init))
        elif init == "random":
            for weight in self.frozen:
                weight.normal_(std=std)
            for weight in self.trainable:
                weight.normal_(std=1.0 if self.transform is not None else std)
        elif init == "zero":
            for weight in (*self.frozen, *self.trainable):
                weight.zero_()
            if self.transform is not None:
                self.trainable[0].normal_()
                nn.init.zeros_(self.transform[2].weight)  # type: ignore[arg-type]
                nn.init.zeros_(self.transform[2].bias)  # type: ignore[arg-type]
        else:
            raise ValueError(f"init: expected 'random', 'zero' or (key, value) per layer, got {init!r}")

    def _blocks_of(self, kv: Sequence[KeyValue]) -> list[Tensor]:
        """The first P_l tokens of (key, value) [Hkv, >= P_l, D] per layer, in the layout of the parameters."""
        if len(kv) != self.num_layers:
            raise ValueError(f"init: expected (key, value) of {self.num_layers} layers, got {len(kv)}")
        for layer, (length, pair) in enumerate(zip(self.lengths, kv, strict=True)):
            for x in pair:
                heads, tokens, dim = x.shape if x.dim() == 3 else (-1, -1, -1)
                if (heads, dim) != (self.num_kv_heads, self.head_dim) or tokens < length:
                    raise ValueError(
                        f"init: layer {layer}: expected keys and values [Hkv = {self.num_kv_heads}, at least "
                        f"{length} tokens, D = {self.head_dim}], got {list(x.shape)}"
                    )
        return [
            torch.cat(
                [x[:, : self.lengths[layer]].transpose(0, 1).flatten(1) for layer in layers for x in kv[layer]], 1
            )
            for layers in self._groups
        ]

    @torch.no_grad()
    def _assign(self, blocks: Iterable[Tensor]) -> None:
        """Copy flat keys and values [P_l, layers * 2 * Hkv * D] of each group into the parameters."""
        if self.transform is not None:
            raise ValueError(
                "init: expected 'random' or 'zero' with a projection, whose MLP cannot be inverted, got keys and "
                "values"
            )
        for group, block in enumerate(blocks):
            num_frozen = 0
            if self.num_frozen_tokens:
                num_frozen = self.frozen[group].shape[0]
                self.frozen[group].copy_(block[:num_frozen])
            self.trainable[group].copy_(block[num_frozen:])

    @classmethod
    def from_text(
        cls, model: Any, tokenizer: Any, text: str, length: int | Sequence[int], **options: Any
    ) -> PrefixKV:
        """A prefix initialised with the keys and values of real text, as Li & Liang 2021 recommend.

        The tokens that ``tokenizer(text)`` returns (no chat template) are repeated or truncated to the (largest)
        length. In encoder-decoder models, encoder and decoder read the text, and the decoder's keys and values are
        used.

        Args:
            model: a Hugging Face model. It runs once, in eval mode and without gradients, and is not changed.
            tokenizer: called on the text.
            text: for example an instruction.
            length: as for :class:`PrefixKV`.
            options: as for :class:`PrefixKV`.

        Raises:
            ValueError: for a text without tokens, or a length beyond the model's positions.
        """
        num_layers, _, _ = geometry_of(model, (options.get("num_layers"), 1, 1))
        longest = max(_lengths(length, num_layers))
        positions = getattr(text_config(model), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(f"length: expected at most the model's {positions} positions, got {longest}")
        ids = torch.tensor([text_tokens(tokenizer, text, longest)], device=model.get_input_embeddings().weight.device)
        return cls.from_cache(text_cache(model, ids), length, model_or_config=model, **options)

    @classmethod
    def from_cache(
        cls, cache: Any, length: int | Sequence[int] | None = None, *, model_or_config: Any = None, **options: Any
    ) -> PrefixKV:
        """A prefix initialised with the first tokens of a cache.

        Args:
            cache: a ``transformers`` cache of batch 1, or (key, value) per layer, [1, Hkv, T, D] or [Hkv, T, D].
            length: as for :class:`PrefixKV`; None takes all T tokens.
            model_or_config: default: the geometry of the cache.
            options: as for :class:`PrefixKV`.

        >>> kv = [(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)) for _ in range(3)]
        >>> PrefixKV.from_cache(kv, length=5, num_frozen_tokens=1)
        PrefixKV(num_layers=3, num_kv_heads=2, head_dim=16, length=5, num_frozen_tokens=1)
        """
        kv = layers_of(cache)
        if length is None:
            tokens = sorted({x.shape[1] for pair in kv for x in pair})
            if len(tokens) != 1:
                raise ValueError(
                    f"length: expected an int or one per layer, as the cached layers have {tokens} tokens, got None"
                )
            length = tokens[0]
        if model_or_config is None:
            key = kv[0][0]
            own = {
                "num_layers": len(kv),
                "num_kv_heads": key.shape[0],
                "head_dim": key.shape[2],
                "device": key.device,
            }
            options = {**own, **options}
        return cls(model_or_config, length, init=kv, **options)

    @classmethod
    def from_peft(cls, peft_model: Any, adapter_name: str | None = None) -> PrefixKV:
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
        config, encoder = peft_model.peft_config[name], peft_model.prompt_encoder[name]
        if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(f"adapter_name: expected a PREFIX_TUNING or CARTRIDGE adapter, got {config.peft_type}")
        transform = getattr(encoder, "transform", None)  # PEFT creates none for inference, even if the config has one
        prefix = cls(
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

    @property
    def token_dim(self) -> int:
        """Hkv * D, PEFT's ``token_dim``."""
        return self.num_kv_heads * self.head_dim

    def _blocks(self) -> list[Tensor]:
        """The flat keys and values [P_l, layers * 2 * Hkv * D] of each group of layers that share a parameter."""
        blocks = [weight if self.transform is None else self.transform(weight) for weight in self.trainable]
        if self.num_frozen_tokens:
            blocks = [torch.cat(pair) for pair in zip(self.frozen, blocks, strict=True)]
        return blocks

    def layer_kv(self) -> list[KeyValue]:
        """(prefix_k, prefix_v) of each layer, each [Hkv, P_l, D].

        These are strided views of the parameters (``stride(-1) == 1``) from a single ``unbind``, so that backward
        assembles one gradient per parameter. Frozen tokens cost a concatenation per call, and a projection a run of
        the MLP, so call this once per forward.
        """
        kv: list[KeyValue | None] = [None] * self.num_layers
        blocks = self._blocks()
        for block, layers in zip(blocks, self._groups, strict=True):
            x = block.view(block.shape[0], 2 * len(layers), self.num_kv_heads, self.head_dim)
            pieces = x.permute(1, 2, 0, 3).unbind(0)  # each [Hkv, P_l, D]
            for layer, k, v in zip(layers, pieces[::2], pieces[1::2], strict=True):
                kv[layer] = (k, v)
        nothing = blocks[0].new_empty(self.num_kv_heads, 0, self.head_dim)
        stored = [pair if pair is not None else (nothing, nothing) for pair in kv]
        if self.peft_seq2seq_layout:
            return [stored[2 * layer % self.num_layers] for layer in range(self.num_layers)]
        return stored

    def forward(self) -> list[KeyValue]:
        """:meth:`layer_kv`."""
        return self.layer_kv()

    def prompt_embeddings(self) -> Tensor:
        """Keys and values [P, num_layers * 2 * Hkv * D] in PEFT's layout, without gradient.

        PEFT's encoders load them with ``peft_model.prompt_encoder[name].load_prompt_embeddings(x)``.

        Raises:
            ValueError: if the layers have different lengths.
        """
        if len(set(self.lengths)) != 1:
            raise ValueError(f"prompt_embeddings: expected one length for all layers, got {list(self.lengths)}")
        with torch.no_grad():
            return self._blocks()[0].detach()

    def bake(self) -> PrefixKV:
        """A copy with flat keys and values in place of the projection; returns the same values at a lower cost."""
        first = self.trainable[0]
        baked = PrefixKV(
            None, self.lengths, num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            num_frozen_tokens=self.num_frozen_tokens, init="zero", dtype=first.dtype, device=first.device,
            peft_seq2seq_layout=self.peft_seq2seq_layout,
        )  # fmt: skip
        baked.origin = self.origin
        with torch.no_grad():
            baked._assign(self._blocks())
        for weight, source in zip(baked.trainable, self.trainable, strict=True):
            weight.requires_grad_(source.requires_grad)
        return baked.train(self.training)

    def extra_repr(self) -> str:
        """The geometry, and arguments that differ from their defaults."""
        uniform = len(set(self.lengths)) == 1
        parts = [f"num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"]
        parts.append(f"length={self.lengths[0]}" if uniform else f"lengths={list(self.lengths)}")
        parts += [f"num_frozen_tokens={self.num_frozen_tokens}"] if self.num_frozen_tokens else []
        parts += [f"projection={self.projection}"] if self.projection else []
        parts += ["peft_seq2seq_layout=True"] if self.peft_seq2seq_layout else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _lengths(length: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    lengths = (length,) * num_layers if isinstance(length, int) else tuple(length)
    if len(lengths) != num_layers or any(not isinstance(n, int) or n < 0 for n in lengths):
        raise ValueError(f"length: expected an int >= 0, or one for each of {num_layers} layers, got {length!r}")
    return lengths
