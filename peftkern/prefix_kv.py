# SPDX-License-Identifier: Apache-2.0
"""Learned keys and values of every layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .argument_types import MODEL_OR_CONFIG, NAMES, checks_arguments
from .layer_shapes import lengths_of
from .model_info import KeyValue, Origin
from .prefix_bank import Bank
from .prefix_layout import checked, groups_of, shares_parameter
from .prefix_length import LearnedLength
from .prefix_options import check_options
from .prefix_parts import DECODER, parts_of, positions_of
from .prefix_starts import Starts
from .recurrent_state import RecurrentState, as_state

__all__ = ["PrefixKV"]


class PrefixKV(Starts, Bank, LearnedLength):
    """Learned keys and values that every query of a layer attends to before those of the sequence (Li & Liang 2021).

    With one length for all layers, the values are stored as in PEFT, in one flat parameter
    [P, num_layers * 2 * Hkv * D]: for each token the key of layer 0, the value of layer 0, the key of layer 1, and so
    on. Hkv and D are the largest of all layers; narrower layers use the first heads and dims. With one length per
    layer, values narrower than keys (compressed keys, MLA) or layers without keys (recurrent layers), there is one
    parameter [P_l, Hkv * (D + D_v)] for each layer with a prefix. Keys are stored after rotary embedding.

    Args:
        model_or_config: a Hugging Face model or config, which determines the number of layers, key-value heads and
            head dimensions (and a model the device), or None if the keywords are given. A model whose layers differ
            or compress their keys runs on two tokens.
        length: tokens of the prefix: an int for all layers that attend to keys, or one int per layer. A layer of
            length 0 has no prefix.
        num_layers: number of layers; overrides that of the model.
        num_kv_heads, head_dim, value_head_dim: an int for all layers, or one int per layer; override those of the
            model. A layer with 0 heads has no keys (a recurrent layer).
        num_prefixes: A, for a bank of prefixes [A, P, ...]. ``prefix_ids`` [B] in each call selects one per sample,
            -1 none; [B, K] selects K, whose union the sample sees. :meth:`stack` makes a bank of prefixes.
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
        parts: which layers of an encoder-decoder have a prefix: ``"encoder"``, ``"cross"`` (those attend to the
            encoder's output) and ``"decoder"``. The layers of the prefix are numbered in this order. If
            ``model_or_config`` is not a model, the number of layers of each part, ``{"encoder": 6, "decoder": 6}``.
        peft_seq2seq_layout: layer l reads the keys and values stored for layer 2 l mod num_layers, as PEFT does in
            encoder-decoder models. Needs one length for all layers.
        learn_length: give each token of each layer a gate, the sigmoid of a learned logit. Attention adds its
            logarithm to the token's scores, so that it multiplies the softmax weight in all heads. Gates start nearly
            open. With :meth:`sparsity` in the loss they close where they can, and :meth:`prune` removes their tokens.
            The logits, ``gate_logits``, need a larger learning rate than keys and values (with AdamW, 0.1 to 0.3).
        positions: positions that the prefix stands for; the sequence's start after them. Default: the longest length.
            Pruned prefixes keep theirs.
        state: also learn the states in which the recurrent layers of a model start, which runs on two tokens. Such
            layers do not attend to the keys. Initially the states are fresh ones (0), or with :meth:`from_text` those
            after the text. A ``RecurrentState`` is taken as it is.

    Attributes:
        shapes: (num_kv_heads, head_dim, value_head_dim) of each layer; None for a layer without keys.
        parts: the layers of each part.
        state: the states of recurrent layers, a ``peftkern.recurrent_state.RecurrentState``; None without.
        lengths: tokens per layer.
        prefix_lens: [A] int32, tokens of each prefix of a bank; None without a bank.
        trainable, frozen: the flat parameters (with a projection, ``trainable[0]`` contains the embeddings).
        origin: :class:`Origin`, the model that the prefix was made for.

    Raises:
        ValueError: naming the argument, what was expected and what was given.

    >>> prefix = PrefixKV(None, 5, num_layers=2, num_kv_heads=2, head_dim=16)
    >>> prefix.trainable[0].shape
    torch.Size([5, 128])
    >>> prefix_k, prefix_v = prefix.layer_kv()[0]
    >>> prefix_k.shape
    torch.Size([2, 5, 16])
    """

    @checks_arguments(model_or_config=MODEL_OR_CONFIG, parts=NAMES)
    def __init__(
        self,
        model_or_config: Any,
        length: int | Sequence[int],
        *,
        num_layers: int | None = None,
        num_kv_heads: int | Sequence[int] | None = None,
        head_dim: int | Sequence[int] | None = None,
        value_head_dim: int | Sequence[int] | None = None,
        num_prefixes: int | None = None,
        num_frozen_tokens: int = 0,
        projection: int | None = None,
        init: str | Sequence[KeyValue | None] = "random",
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        parts: Sequence[str] | Mapping[str, int] = DECODER,
        peft_seq2seq_layout: bool = False,
        learn_length: bool = False,
        positions: int | None = None,
        state: bool | RecurrentState = False,
    ) -> None:
        super().__init__()
        self.parts, self.shapes = parts_of(model_or_config, parts, num_layers, num_kv_heads, head_dim, value_head_dim)
        self.lengths = lengths_of(length, self.shapes)
        self.num_prefixes = num_prefixes
        self.num_frozen_tokens = num_frozen_tokens
        self.projection = projection
        self.peft_seq2seq_layout = peft_seq2seq_layout
        self.learn_length = learn_length
        self.positions = positions_of(self.parts, self.lengths) if positions is None else positions
        self.origin = Origin.of(model_or_config)
        check_options(self, has_state=state is not False)
        self._groups = groups_of(self.lengths, self.shapes)
        if device is None:
            device = getattr(model_or_config, "device", None)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        bank = [] if num_prefixes is None else [num_prefixes]
        self.frozen, self.trainable = nn.ParameterList(), nn.ParameterList()
        for group in self._groups:
            num_frozen = min(group.length, num_frozen_tokens)
            if num_frozen_tokens:
                frozen = torch.empty(*bank, num_frozen, group.width, **like)
                self.frozen.append(nn.Parameter(frozen, requires_grad=False))
            columns = group.width if projection is None else self.token_dim
            self.trainable.append(nn.Parameter(torch.empty(*bank, group.length - num_frozen, columns, **like)))
        self.state = as_state(state, model_or_config, **like)
        self.transform: nn.Sequential | None = None
        if projection is not None:
            self.transform = nn.Sequential(
                nn.Linear(self.token_dim, projection, **like),
                nn.Tanh(),
                nn.Linear(projection, self._groups[0].width, **like),
            )
        self._add_gates(**like)
        #: [A] int32, the number of tokens of each prefix of a bank, the others of which nothing reads.
        self.prefix_lens: Tensor | None
        lens = None if num_prefixes is None else torch.full((num_prefixes,), max(self.lengths), dtype=torch.int32)
        self.register_buffer("prefix_lens", lens if lens is None or device is None else lens.to(device))
        self._initialise(init, std)

    @torch.no_grad()
    def _initialise(self, init: str | Sequence[KeyValue | None], std: float) -> None:
        if not std >= 0:  # NaN too
            raise ValueError(f"std: expected at least 0, got {std}")
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

    def _blocks_of(self, kv: Sequence[KeyValue | None]) -> list[Tensor]:
        """The first P_l tokens of (key, value) [Hkv, >= P_l, D] per layer, in the layout of the parameters.

        None stands for a layer without keys and values of its own.
        """
        if len(kv) != self.num_layers:
            raise ValueError(f"init: expected (key, value) of {self.num_layers} layers, got {len(kv)}")
        blocks = []
        for group in self._groups:
            pairs = [
                checked(layer, kv[layer], shape, group.length)
                for layer, shape in zip(group.layers, group.shapes, strict=True)
            ]
            block = group.block(pairs)
            blocks.append(block if self.num_prefixes is None else block.expand(self.num_prefixes, -1, -1))
        return blocks

    @torch.no_grad()
    def _assign(self, blocks: Iterable[Tensor]) -> None:
        """Copy flat keys and values [(A,) P_l, width] of each group into the parameters."""
        if self.transform is not None:
            raise ValueError(
                "init: expected 'random' or 'zero' with a projection, whose MLP cannot be inverted, got keys and "
                "values"
            )
        for group, block in enumerate(blocks):
            num_frozen = 0
            if self.num_frozen_tokens:
                num_frozen = self.frozen[group].shape[-2]
                self.frozen[group].copy_(block[..., :num_frozen, :])
            self.trainable[group].copy_(block[..., num_frozen:, :])

    @property
    def num_layers(self) -> int:
        """Number of layers, including those without a prefix."""
        return len(self.shapes)

    @property
    def num_kv_heads(self) -> int:
        """The largest number of key-value heads of a layer."""
        return max(shape.num_kv_heads for shape in self.shapes if shape)

    @property
    def head_dim(self) -> int:
        """The largest head dim of a layer's keys."""
        return max(shape.head_dim for shape in self.shapes if shape)

    @property
    def token_dim(self) -> int:
        """Hkv * D, PEFT's ``token_dim``."""
        return self.num_kv_heads * self.head_dim

    def _blocks(self) -> list[Tensor]:
        """The flat keys and values [(A,) P_l, width] of each group of layers that share a parameter."""
        blocks = [weight if self.transform is None else self.transform(weight) for weight in self.trainable]
        if self.num_frozen_tokens:
            blocks = [torch.cat(pair, -2) for pair in zip(self.frozen, blocks, strict=True)]
        return blocks

    def layer_kv(self) -> list[KeyValue | None]:
        """(prefix_k, prefix_v) of each layer, [Hkv, P_l, D] and [Hkv, P_l, D_v], or [A, ...] each of a bank.

        These are strided views of the parameters (``stride(-1) == 1``) from a single ``unbind``, so that backward
        assembles one gradient per parameter. Frozen tokens cost a concatenation per call, and a projection a run of
        the MLP, so call this once per forward. None stands for a layer without keys.
        """
        blocks = self._blocks()
        kv: list[KeyValue | None] = [None] * self.num_layers
        for block, group in zip(blocks, self._groups, strict=True):
            for layer, pair in zip(group.layers, group.views(block), strict=True):
                kv[layer] = pair
        like = self.trainable[0] if len(self.trainable) else torch.empty(0)
        for layer, shape in enumerate(self.shapes):
            if kv[layer] is None and shape is not None:
                heads, *dims = shape
                kv[layer] = like.new_empty(heads, 0, dims[0]), like.new_empty(heads, 0, dims[1])
        if self.peft_seq2seq_layout:
            return [kv[2 * layer % self.num_layers] for layer in range(self.num_layers)]
        return kv

    def forward(self) -> list[KeyValue | None]:
        """:meth:`layer_kv`."""
        return self.layer_kv()

    @property
    def shares_parameter(self) -> bool:
        """Whether the keys and values of all layers lie in one parameter, in PEFT's layout."""
        return shares_parameter(self.lengths, self.shapes)

    def prompt_embeddings(self) -> Tensor:
        """Keys and values [P, num_layers * 2 * Hkv * D] in PEFT's layout, [A, P, ...] of a bank, without gradient.

        PEFT's encoders load them with ``peft_model.prompt_encoder[name].load_prompt_embeddings(x)``.

        Raises:
            ValueError: for gates, which PEFT has not, and layers of different lengths, or not stored in its layout.
        """
        if self.learn_length:
            raise ValueError("prompt_embeddings: expected a prefix without gates, got learn_length=True")
        if not self.shares_parameter:
            got = list(self.lengths) if len(set(self.lengths)) > 1 else f"layers of {self.shapes}"
            raise ValueError(f"prompt_embeddings: expected one length and width for all layers, got {got}")
        usual = positions_of(self.parts, self.lengths)
        if tuple(self.parts) != DECODER or self.positions != usual:
            got = f"parts {tuple(self.parts)}" if tuple(self.parts) != DECODER else f"positions {self.positions}"
            raise ValueError(f"prompt_embeddings: expected a prefix of the decoder at its own positions, got {got}")
        return self.flat_values()

    @torch.no_grad()
    def flat_values(self) -> Tensor:
        """The keys and values of all layers as they lie in their one parameter, with the projection's output."""
        return self._blocks()[0].detach()

    def bake(self) -> PrefixKV:
        """A copy with flat keys and values in place of the projection; returns the same values at a lower cost."""
        first = self.trainable[0]
        baked = self._like(self.lengths, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            baked._assign(self._blocks())
            if baked.gate_logits is not None and self.gate_logits is not None:
                baked.gate_logits.copy_(self.gate_logits).requires_grad_(self.gate_logits.requires_grad)
        for weight, source in zip(baked.trainable, self.trainable, strict=True):
            weight.requires_grad_(source.requires_grad)
        return baked.train(self.training)

    def _like(self, length: Sequence[int], **options: Any) -> PrefixKV:
        """A prefix with the same geometry and other lengths, without a projection; by default, of zeros."""
        names = ("num_frozen_tokens", "peft_seq2seq_layout", "num_prefixes", "learn_length", "positions")
        own = {name: getattr(self, name) for name in names}
        other = PrefixKV(None, length, **{"init": "zero", **own, **self.geometry, **options})
        other.origin = self.origin
        other.state = copy.deepcopy(self.state)
        if other.num_prefixes == self.num_prefixes and self.prefix_lens is not None:
            other.prefix_lens = self.prefix_lens.clone()
        return other

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments ``num_layers``, ``num_kv_heads``, ``head_dim``, ``value_head_dim`` and other ``parts``."""
        sizes = list(zip(*((0, 0, 0) if shape is None else shape for shape in self.shapes), strict=True))
        names = ("num_kv_heads", "head_dim", "value_head_dim")
        same = {name: each[0] if len(set(each)) == 1 else list(each) for name, each in zip(names, sizes, strict=True)}
        parts = {name: len(layers) for name, layers in self.parts.items()}
        return {"num_layers": self.num_layers, **same, **({} if tuple(parts) == DECODER else {"parts": parts})}

    def extra_repr(self) -> str:
        """The geometry, and arguments that differ from their defaults."""
        geometry = self.geometry
        if geometry["value_head_dim"] == geometry["head_dim"]:
            del geometry["value_head_dim"]
        parts = [f"{name}={value}" for name, value in geometry.items()]
        uniform = len(set(self.lengths)) == 1
        parts.append(f"length={self.lengths[0]}" if uniform else f"lengths={list(self.lengths)}")
        for name in ("num_prefixes", "num_frozen_tokens", "projection", "peft_seq2seq_layout", "learn_length"):
            value = getattr(self, name)
            parts += [f"{name}={value}"] if value else []
        usual = positions_of(self.parts, self.lengths)
        parts += [f"positions={self.positions}"] if self.positions != usual else []
        parts += ["state=True"] if self.state is not None else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
