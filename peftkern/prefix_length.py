# SPDX-License-Identifier: Apache-2.0
"""A prefix whose length is learned: gates of its tokens, and prefixes with fewer or more tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from .argument_types import MODEL, TOKENIZER, checks_arguments
from .layer_shapes import LayerShape, lengths_of
from .model_info import KeyValue, check_not_patched, layers_of, text_config, text_tokens
from .prefix_fields import PrefixFields
from .prefix_layout import checked, with_layers_that_share
from .prefix_parts import DECODER, check_parts, text_layers

__all__ = ["LearnedLength", "token_layers"]

#: Logit of a new gate, sigmoid(2) = 0.88: nearly open, where the sigmoid is still steep.
_OPEN = 2.0


class LearnedLength(PrefixFields):
    """The part of a prefix that weighs, removes and adds tokens.

    Each token p of a layer has a gate g_p = sigmoid(a_p) with a learned logit a_p. Attention adds log g_p to the
    token's scores of all heads, so the softmax weights are

        w_p = g_p exp(s_p) / (sum over prefix tokens j of g_j exp(s_j) + sum over sequence tokens t of exp(s_t)).

    A gate of 1 changes nothing, and a gate of 0 removes the token exactly. APT (Zhang et al. 2023, arXiv 2305.15212)
    also learns a gate per layer and token, but multiplies keys and values by it, so that a closed gate leaves a token
    with a key of 0. The gates are the plain sigmoid of their logits, without the noise of the hard concrete gates of
    L0 regularisation (Louizos et al. 2018, arXiv 1712.01312), so that outputs are deterministic.

    Attributes:
        lengths: tokens per layer.
        learn_length: whether tokens have gates.
        positions: positions that the prefix stands for; the sequence's start after them.
        gate_logits: [sum of the layers' tokens that are not frozen], a_p of layer 0, of layer 1 and so on; None
            without gates. A frozen token's gate is 1.
    """

    def _add_gates(self, **like: Any) -> None:
        """Create the gates, open."""
        self.gate_logits = None
        if self.learn_length:
            self.gate_logits = nn.Parameter(torch.full((sum(self._num_gates()),), _OPEN, **like))

    @property
    def has_gaps(self) -> bool:
        """Whether tokens may be missing between others, so that a token's place does not tell its position."""
        return self.learn_length and any(0 < n < self.positions for n in self.lengths)

    def _num_frozen(self) -> list[int]:
        return [min(n, self.num_frozen_tokens) for n in self.lengths]

    def _num_gates(self) -> list[int]:
        return [n - frozen for n, frozen in zip(self.lengths, self._num_frozen(), strict=True)]

    def _per_layer(self, x: Tensor, of_frozen: float) -> list[Tensor]:
        """Numbers of all gates -> those of each layer [P_l]. A frozen token gets ``of_frozen``."""
        layers = x.split(self._num_gates())
        return [
            pad(layer, (frozen, 0), value=of_frozen) for layer, frozen in zip(layers, self._num_frozen(), strict=True)
        ]

    def _logits(self) -> nn.Parameter:
        if self.gate_logits is None:
            raise ValueError("learn_length: expected a prefix with gates (learn_length=True), got False")
        return self.gate_logits

    def layer_bias(self) -> list[Tensor | None]:
        """What attention adds to the scores of each layer's tokens: log g_p, [P_l]. None without gates or tokens."""
        if self.gate_logits is None:
            return [None] * len(self.lengths)
        biases = self._per_layer(logsigmoid(self.gate_logits), 0.0)
        return [bias if n else None for n, bias in zip(self.lengths, biases, strict=True)]

    def gates(self) -> list[Tensor]:
        """The gates of each layer's tokens, [P_l] from 0 to 1; differentiable. A frozen token's gate is 1.

        Raises:
            ValueError: for a prefix without gates.
        """
        return self._per_layer(self._logits().sigmoid(), 1.0)

    def sparsity(self) -> Tensor:
        """The mean gate, a scalar from 0 to 1; differentiable. A multiple of it is added to the loss.

        If each gate is read as the probability that its token stays, this is the expected length divided by the
        length: the penalty of Louizos et al. 2018, an expected L0 norm, per token. Frozen tokens do not count.

        Raises:
            ValueError: for a prefix without gates.
        """
        logits = self._logits()
        return logits.sigmoid().sum() / max(1, logits.numel())

    @checks_arguments()
    @torch.no_grad()
    def prune(self, threshold: float) -> Self:
        """A copy without the tokens whose gate is at most ``threshold``. The others keep their gates.

        The sequence's positions stay as they were (:attr:`positions`). Gates of exactly 0 have no weight, and
        removing their tokens changes nothing. Otherwise let r be the sum of the removed tokens' weights in one
        softmax. Its other weights grow by the factor 1 / (1 - r). The total variation distance of the new weights
        from the old ones is therefore r, and the output of the head moves by at most r times the largest distance
        between two values. With gates <= threshold,

            r / (1 - r) <= threshold * (sum over removed p of exp(s_p)) / (sum over remaining j of g_j exp(s_j)),

        where j counts the sequence's tokens with a gate of 1. This holds for each layer on the same inputs; the
        inputs of later layers move too.

        Args:
            threshold: from 0 to below 1.

        Returns:
            A prefix of the same kind, with one length per layer and, in place of a projection, its output. It
            shares no memory with this one, so its parameters need a new optimizer.

        Raises:
            ValueError: for a prefix without gates, or another threshold.
        """
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold: expected a number from 0 to below 1, got {threshold}")
        kept = [~(gates <= threshold) for gates in self.gates()]
        kv = [
            None if pair is None else (pair[0][:, keep], pair[1][:, keep])
            for pair, keep in zip(self.layer_kv(), kept, strict=True)
        ]
        shorter = self._resized([int(keep.sum()) for keep in kept], kv)
        logits = self._per_layer(self._logits(), 0.0)
        shorter._set_logits([x[keep] for x, keep in zip(logits, kept, strict=True)])
        return shorter

    @checks_arguments()
    @torch.no_grad()
    def grow(self, n: int | Sequence[int], cache: Any) -> Self:
        """A copy with more tokens, which are those of a cache behind the prefix's positions.

        A prefix that stands for positions 0 to N - 1 takes the keys and values that the cache holds from place N on.
        New gates are open; the present tokens and gates do not change.

        Args:
            n: tokens to add: an int for all layers that attend to keys, or one int per layer.
            cache: as for :meth:`PrefixKV.from_cache`, of N + n tokens or more.

        Returns:
            A prefix of the same kind; with a projection, its output in place of it. It shares no memory with this
            one, so its parameters need a new optimizer.

        Raises:
            ValueError: for a cache that is too short or of other shapes, a bank, ``peft_seq2seq_layout``, or states.
        """
        return self._grown(n, layers_of(cache))

    @checks_arguments(model=MODEL, tokenizer=TOKENIZER)
    def grow_from_text(self, n: int | Sequence[int], model: Any, tokenizer: Any, text: str) -> Self:
        """:meth:`grow` with the keys and values of real text, which are much faster to train than random ones.

        The model reads the text from position 0 on, repeated or truncated to N + n tokens, and the last n tokens are
        used. A prefix ``from_text`` of N tokens therefore grows into the one of N + n tokens, as long as it has not
        been trained.

        Args:
            n: as for :meth:`grow`.
            model, tokenizer, text: as for :meth:`PrefixKV.from_text`. The model must not be patched.

        Raises:
            ValueError: as for :meth:`grow`, and for a text without tokens, or more tokens than the model's positions.
        """
        tokens = self.positions + max(lengths_of(n, self.shapes, "n"))
        check_parts(self.parts, n=n)
        layers = token_layers(model, lambda count: text_tokens(tokenizer, text, count), tokens, self.shapes, "n")
        return self._grown(n, layers)

    @torch.no_grad()
    def _grown(self, n: int | Sequence[int], layers: Sequence[KeyValue | None]) -> Self:
        check_parts(self.parts, n=n)
        more = lengths_of(n, self.shapes, "n")
        if self.num_prefixes is not None:
            raise ValueError(f"num_prefixes: expected None in a prefix that grows, got {self.num_prefixes}")
        if self.peft_seq2seq_layout:
            raise ValueError("peft_seq2seq_layout: expected False in a prefix that grows, got True")
        if self.state is not None:
            raise ValueError(
                "state: expected False in a prefix that grows, whose states are those of its tokens, got True"
            )
        if len(layers) != len(self.shapes):
            raise ValueError(f"cache: expected keys and values of {len(self.shapes)} layers, got {len(layers)}")
        kv = []
        for layer, (old, new) in enumerate(zip(self.layer_kv(), layers, strict=True)):
            shape, end = self.shapes[layer], self.positions + more[layer]
            if old is not None and shape is not None and more[layer]:
                found = [x[:, self.positions : end] for x in checked(layer, new, shape, end, "cache")]
                old = tuple(torch.cat([x, y.to(x)], -2) for x, y in zip(old, found, strict=True))  # type: ignore[assignment]
            kv.append(old)
        lengths = [a + b for a, b in zip(self.lengths, more, strict=True)]
        longer = self._resized(lengths, kv, positions=self.positions + max(more))
        if self.gate_logits is not None:
            logits = self._per_layer(self.gate_logits, 0.0)
            longer._set_logits([pad(x, (0, m), value=_OPEN) for x, m in zip(logits, more, strict=True)])
        return longer

    def _resized(self, lengths: Sequence[int], kv: Sequence[KeyValue | None], **options: Any) -> Self:
        """A prefix with other lengths and the given keys and values, which trains what this one does."""
        like = next(iter(self.trainable), torch.empty(0))
        other: Self = self._like(lengths, init=kv, dtype=like.dtype, device=like.device, **options)
        other.trainable.requires_grad_(any(x.requires_grad for x in self.trainable))
        if other.gate_logits is not None and self.gate_logits is not None:
            other.gate_logits.requires_grad_(self.gate_logits.requires_grad)
        return other.train(self.training)

    def _set_logits(self, layers: Sequence[Tensor]) -> None:
        """Copy the logits [P_l] of each layer's gates, with places for frozen tokens."""
        free = [x[frozen:] for x, frozen in zip(layers, self._num_frozen(), strict=True)]
        self._logits().data.copy_(torch.cat(free))


def token_layers(
    model: Any,
    tokens: Callable[[int], list[int]],
    count: int,
    shapes: Sequence[LayerShape | None],
    argument: str = "length",
    parts: Sequence[str] | Mapping[str, int] = DECODER,
) -> list[KeyValue | None]:
    """(key, value) [Hkv, count, D] of each layer, of the token ids that ``tokens(count)`` returns.

    Raises:
        ValueError: naming ``argument`` if the model has fewer positions; for a patched model.
    """
    check_not_patched(model)
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None and count > positions:
        raise ValueError(f"{argument}: expected at most the model's {positions} positions, got {count}")
    ids = torch.tensor([tokens(count)], device=model.get_input_embeddings().weight.device)
    return with_layers_that_share(text_layers(model, ids, parts), shapes, ids.shape[1])
