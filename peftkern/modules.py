# SPDX-License-Identifier: Apache-2.0
"""What is learned: :class:`PrefixKV`, keys and values of every layer, and :class:`SoftPrompt`, input embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import soft_prompt_embedding
from .model_info import KeyValue, Origin, embed_dim_of, geometry_of, layers_of, text_cache, text_config, tokens_of

__all__ = ["PrefixKV", "SoftPrompt"]


class PrefixKV(nn.Module):
    """Learned keys and values that every query of a layer sees before the sequence's own (Li & Liang 2021).

    One length for all layers is stored as PEFT stores it, in one flat parameter [P, num_layers * 2 * Hkv * D] that
    holds for each token the key of layer 0, the value of layer 0, the key of layer 1, …; a length per layer as one
    such parameter [P_l, 2 * Hkv * D] per layer. Keys are stored after rotary embedding.

    Args:
        model_or_config: a Hugging Face model or config that gives number of layers, key-value heads and head
            dimension (and the device, if a model), or None if the three keywords do.
        length: tokens of the prefix: an int for all layers, or one int per layer; 0 leaves a layer out.
        num_layers, num_kv_heads, head_dim: the geometry, instead of or overriding the config's.
        num_frozen_tokens: the first tokens stay as initialised (of each layer, at most its length). Cartridges
            freeze one as an attention sink (Eyuboglu et al. 2025).
        projection: hidden size of an MLP (Linear, Tanh, Linear) that makes the keys and values of the other tokens
            from embeddings [P, Hkv * D], as PEFT's ``PrefixEncoder``. It runs on P rows, once per :meth:`layer_kv`;
            needs one length for all layers. :meth:`bake` folds it in.
        init: ``"random"``, ``"zero"``, or (key, value) per layer, as :meth:`from_cache` takes it. Keys and values of
            real text (:meth:`from_text`) train much faster.
        std: standard deviation of the random start. With a projection, which starts as PEFT's does (embeddings
            N(0, 1), ``nn.Linear``'s defaults), it is not used.
        dtype: of the parameters. fp32 is the master that half-precision activations read rounded.
        device: default the model's.
        peft_seq2seq_layout: layer l reads the keys and values stored for layer 2 l mod num_layers, which is how PEFT
            gives a prefix to encoder-decoder models. Needs one length for all layers.

    Attributes:
        lengths: tokens per layer.
        trainable, frozen: the flat parameters (``trainable[0]`` holds the embeddings if there is a projection).
        origin: :class:`Origin`, the model it was made for.

    Raises:
        ValueError: naming the argument, what was expected and what came; also for models whose layers differ in
            key-value heads or head dimension, or cache compressed keys and values (DeepSeek's MLA).

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
        """The first P_l tokens of (key, value) [Hkv, >= P_l, D] per layer, laid out as the parameters are."""
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
        """Copies flat keys and values [P_l, layers * 2 * Hkv * D] of each group into the parameters."""
        if self.transform is not None:
            raise ValueError(
                "init: expected 'random' or 'zero' beside a projection, whose MLP cannot be inverted to give wanted "
                "keys and values, got keys and values"
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
        """Starts from the keys and values of real text run through the frozen model, as Li & Liang 2021 recommend.

        The text's tokens, as ``tokenizer(text)`` gives them (no chat template), are repeated or cut to the (largest)
        length. Encoder-decoder models read the text on both sides, and give the decoder's keys and values.

        Args:
            model: a Hugging Face model; runs once, in eval mode without gradient, and is left as it was.
            tokenizer: called on the text.
            text: what the prefix starts from, for example an instruction.
            length: as of :class:`PrefixKV`, as are the ``options``.

        Raises:
            ValueError: for a text without tokens, or a length beyond the model's positions.
        """
        num_layers, _, _ = geometry_of(model, (options.get("num_layers"), 1, 1))
        longest = max(_lengths(length, num_layers))
        positions = getattr(text_config(model), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(f"length: expected at most the model's {positions} positions, got {longest}")
        ids = torch.tensor([tokens_of(tokenizer, text, longest)], device=model.get_input_embeddings().weight.device)
        return cls.from_cache(text_cache(model, ids), length, model_or_config=model, **options)

    @classmethod
    def from_cache(
        cls, cache: Any, length: int | Sequence[int] | None = None, *, model_or_config: Any = None, **options: Any
    ) -> PrefixKV:
        """Starts from the first tokens of a given cache.

        Args:
            cache: a ``transformers`` cache of batch 1, or (key, value) per layer, [1, Hkv, T, D] or [Hkv, T, D].
            length: as of :class:`PrefixKV`; None takes all T tokens.
            model_or_config: default: the cache's own geometry.
            options: as of :class:`PrefixKV`.

        >>> kv = [(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)) for _ in range(3)]
        >>> PrefixKV.from_cache(kv, length=5, num_frozen_tokens=1)
        PrefixKV(num_layers=3, num_kv_heads=2, head_dim=16, length=5, num_frozen_tokens=1)
        """
        kv = layers_of(cache)
        if length is None:
            tokens = sorted({x.shape[1] for pair in kv for x in pair})
            if len(tokens) != 1:
                raise ValueError(
                    f"length: expected an int or one per layer, as the cached layers hold {tokens} tokens"
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
        """A PEFT model's PREFIX_TUNING or CARTRIDGE adapter as a prefix of the very same parameters.

        So what PEFT trains can be saved with its projection and taken up again, as PEFT's own files cannot::

            save_prefix(PrefixKV.from_peft(peft_model), folder)
            PrefixKV.from_peft(peft_model).load_state_dict(load_prefix(folder).state_dict())

        Args:
            peft_model: a ``peft.PeftModel``.
            adapter_name: default the active one.

        Raises:
            ValueError: for an adapter of another kind.
        """
        name = adapter_name or peft_model.active_adapter
        config, encoder = peft_model.peft_config[name], peft_model.prompt_encoder[name]
        if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(f"adapter_name: expected a PREFIX_TUNING or CARTRIDGE adapter, got {config.peft_type}")
        transform = getattr(encoder, "transform", None)  # PEFT makes none for inference, whatever its config says
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
        """Hkv * D, what PEFT calls ``token_dim``."""
        return self.num_kv_heads * self.head_dim

    def _blocks(self) -> list[Tensor]:
        """The flat keys and values [P_l, layers * 2 * Hkv * D] of each group of layers that share a parameter."""
        blocks = [weight if self.transform is None else self.transform(weight) for weight in self.trainable]
        if self.num_frozen_tokens:
            blocks = [torch.cat(pair) for pair in zip(self.frozen, blocks, strict=True)]
        return blocks

    def layer_kv(self) -> list[KeyValue]:
        """(prefix_k, prefix_v) of each layer, each [Hkv, P_l, D].

        Strided views of the parameters (``stride(-1) == 1``), whose gradients meet in one ``unbind``. Frozen tokens
        or a projection cost one concatenation or one run of the MLP per call, so call this once per forward.
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
        """Keys and values [P, num_layers * 2 * Hkv * D] as PEFT stores them, without gradient.

        PEFT's encoders take them back: ``peft_model.prompt_encoder[name].load_prompt_embeddings(x)``.

        Raises:
            ValueError: if the layers have different lengths.
        """
        if len(set(self.lengths)) != 1:
            raise ValueError(f"prompt_embeddings: expected one length for all layers, got {list(self.lengths)}")
        with torch.no_grad():
            return self._blocks()[0].detach()

    def bake(self) -> PrefixKV:
        """A copy with the projection folded into flat keys and values; of equal output and cheaper."""
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
        """Geometry and what departs from the defaults."""
        uniform = len(set(self.lengths)) == 1
        parts = [f"num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"]
        parts.append(f"length={self.lengths[0]}" if uniform else f"lengths={list(self.lengths)}")
        parts += [f"num_frozen_tokens={self.num_frozen_tokens}"] if self.num_frozen_tokens else []
        parts += [f"projection={self.projection}"] if self.projection else []
        parts += ["peft_seq2seq_layout=True"] if self.peft_seq2seq_layout else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class SoftPrompt(nn.Module):
    """Learned input embeddings before the tokens' own (prompt tuning, Lester et al. 2021).

    Args:
        model_or_embedding: a Hugging Face model or config, the token embeddings' weight [V, E], or None if
            ``embed_dim`` is given.
        length: tokens of the prompt, P.
        num_prompts: None for one prompt, weight [P, E]; A for a bank, weight [A, P, E].
        embed_dim: E, instead of or overriding the model's.
        init: ``"random"``, normal with ``std``; ``"vocab"``, the embeddings of tokens drawn from the vocabulary
            (needs a model or weight); or a tensor that expands to the weight's shape.
        std: standard deviation of the random start.
        dtype: of the parameter; fp32 is the master that half-precision embeddings read rounded.
        device: default the model's.

    Attributes:
        weight: [P, E] or [A, P, E].
        origin: :class:`Origin`, the model it was made for.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    >>> embedding = torch.randn(100, 8)
    >>> prompt = SoftPrompt(embedding, 3)
    >>> prompt(torch.tensor([[1, 2]]), embedding).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        model_or_embedding: Any,
        length: int,
        *,
        num_prompts: int | None = None,
        embed_dim: int | None = None,
        init: str | Tensor = "random",
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        source = model_or_embedding
        if hasattr(source, "get_input_embeddings"):
            source = source.get_input_embeddings().weight
        if embed_dim is None and source is None:
            raise ValueError("model_or_embedding: expected a model, config or weight, or embed_dim, got None")
        if embed_dim is None:
            embed_dim = source.shape[1] if isinstance(source, Tensor) else embed_dim_of(source)
        if length < 0 or (num_prompts is not None and num_prompts < 1):
            raise ValueError(
                f"length, num_prompts: expected length >= 0 and num_prompts None or >= 1, got {length}, {num_prompts}"
            )
        self.origin = Origin() if isinstance(model_or_embedding, Tensor) else Origin.of(model_or_embedding)
        shape = (length, embed_dim) if num_prompts is None else (num_prompts, length, embed_dim)
        if device is None and isinstance(source, Tensor):
            device = source.device
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        with torch.no_grad():
            if isinstance(init, Tensor):
                if init.dim() > len(shape) or any(
                    n not in (1, m) for n, m in zip(init.shape[::-1], shape[::-1], strict=False)
                ):
                    raise ValueError(f"init: expected a tensor that expands to {list(shape)}, got {list(init.shape)}")
                self.weight.copy_(init)
            elif init == "random":
                self.weight.normal_(std=std)
            elif init == "vocab" and isinstance(source, Tensor):
                ids = torch.randint(source.shape[0], shape[:-1], device=source.device)
                self.weight.copy_(nn.functional.embedding(ids, source))
            else:
                raise ValueError(
                    f"init: expected 'random', 'vocab' (with a model or embedding weight) or a tensor, got {init!r}"
                )

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, text: str, length: int, **options: Any) -> SoftPrompt:
        """Starts from the embeddings of a text's tokens, repeated or cut to ``length`` as PEFT does.

        Args:
            model: a Hugging Face model.
            tokenizer: called on the text; special tokens it adds are kept.
            text: what the prompt starts from.
            length: as of :class:`SoftPrompt`, as are the ``options``.
        """
        embedding = model.get_input_embeddings()
        ids = torch.tensor(tokens_of(tokenizer, text, length), device=embedding.weight.device)
        with torch.no_grad():
            rows = embedding(ids)
        return cls(model, length, init=rows, **options)

    @property
    def length(self) -> int:
        """P."""
        return self.weight.shape[-2]

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.weight.shape[-1]

    def forward(
        self, input_ids: Tensor, embedding_weight: Tensor, prompt_ids: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """Embeds [B, S] tokens behind the prompt: [B, P+S, E] of the embedding's dtype.

        See :func:`peftkern.soft_prompt_embedding`; a bank needs ``prompt_ids`` [B].
        """
        return soft_prompt_embedding(input_ids, embedding_weight, self.weight, prompt_ids=prompt_ids, backend=backend)

    def extra_repr(self) -> str:
        """Shape."""
        bank = f"num_prompts={self.weight.shape[0]}, " if self.weight.dim() == 3 else ""
        return f"{bank}length={self.length}, embed_dim={self.embed_dim}"


def _lengths(length: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    lengths = (length,) * num_layers if isinstance(length, int) else tuple(length)
    if len(lengths) != num_layers or any(not isinstance(n, int) or n < 0 for n in lengths):
        raise ValueError(f"length: expected an int >= 0, or one for each of {num_layers} layers, got {length!r}")
    return lengths
