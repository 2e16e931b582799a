# SPDX-License-Identifier: Apache-2.0
"""Learned states in which recurrent layers start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .model_info import text_cache

__all__ = [
    "LayerState", "RecurrentState", "StateShape", "as_state", "meta_states", "shapes_of_states", "states_of",
    "weight_shapes",
]  # fmt: skip

#: (state of the convolution [B, C, K], state of the recurrence [B, ...]); None for one that the layer does not have.
LayerState = tuple[Tensor | None, Tensor | None]

#: Shapes of both.
StateShape = tuple[Sequence[int] | None, Sequence[int] | None]

_PARTS = ("conv", "recurrent")


class RecurrentState(nn.Module):
    """The state of every recurrent layer before the first token, as the layer itself stores it.

    Such layers (linear attention, state spaces, short convolutions) do not attend to a prefix. A state is for them
    what a prefix is for attention: all that they know of the tokens before.

    Args:
        shapes: for each layer, the shapes [1, ...] of each of its states; empty for a layer without a state.
        dtype, device: of the parameters, whose initial values are 0: fresh states.

    Attributes:
        shapes: as given.
        weights: the parameters.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[StateShape]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shapes = [[(conv, recurrent) for conv, recurrent in layer] for layer in shapes]
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(tuple(shape), dtype=dtype, device=device))
                for name, shape in weight_shapes(self.shapes).items()
            }
        )
        if not self.weights:
            raise ValueError("state: expected False, because the model has no recurrent layers, got True")

    @classmethod
    def of_model(cls, model: Any, **options: Any) -> RecurrentState:
        """Fresh states of a Hugging Face model, which runs on two tokens.

        Raises:
            ValueError: for a config, or a model without recurrent layers.
        """
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                "state: expected False with a config, because only a model knows the shapes of its states, got True"
            )
        return cls(cls.of_tokens(model, [0, 0]).shapes, **options)

    @classmethod
    def of_tokens(cls, model: Any, ids: Sequence[int], **options: Any) -> RecurrentState:
        """The states of a Hugging Face model after these token ids."""
        device = model.get_input_embeddings().weight.device
        return cls.of_cache(text_cache(model, torch.tensor([[*ids]], device=device)), **options)

    @classmethod
    def of_cache(cls, cache: Any, **options: Any) -> RecurrentState:
        """The states in a ``transformers`` cache of batch 1."""
        states = states_of(getattr(cache, "layers", ()))
        self = cls(shapes_of_states(states), **options)
        with torch.no_grad():
            for layer, own in enumerate(states):
                for index, pair in enumerate(own):
                    for part, x in zip(_PARTS, pair, strict=True):
                        if x is not None:
                            self.weights[_name(layer, index, part)].copy_(x)
        return self

    def layer_states(self) -> list[list[LayerState]]:
        """For each layer, (conv, recurrent) [1, ...] of each of its states."""
        weights = dict(self.weights.items())

        def state(layer: int, index: int) -> LayerState:
            return weights.get(_name(layer, index, "conv")), weights.get(_name(layer, index, "recurrent"))

        return [[state(layer, index) for index in range(len(own))] for layer, own in enumerate(self.shapes)]

    def forward(self) -> list[list[LayerState]]:
        """:meth:`layer_states`."""
        return self.layer_states()


def weight_shapes(shapes: Sequence[Sequence[StateShape]]) -> dict[str, Sequence[int]]:
    """The shapes of the parameters of a :class:`RecurrentState`, by their names in ``weights``."""
    return {
        _name(layer, index, part): shape
        for layer, states in enumerate(shapes)
        for index, pair in enumerate(states)
        for part, shape in zip(_PARTS, pair, strict=True)
        if shape is not None
    }


def as_state(state: bool | RecurrentState, model: Any, **options: Any) -> RecurrentState | None:
    """The states that the argument ``state`` of :class:`peftkern.PrefixKV` asks for, with a dtype and device."""
    if state is False:
        return None
    return (RecurrentState.of_model(model) if state is True else state).to(**options)


def _name(layer: int, index: int, part: str) -> str:
    return f"{layer}_{part}_{index}"


def states_of(layers: Sequence[Any]) -> list[list[LayerState]]:
    """The states of each layer of a ``transformers`` cache; empty for a layer without."""
    return [
        [(conv, layer.recurrent_states[index]) for index, conv in getattr(layer, "conv_states", {}).items()]
        for layer in layers
    ]


def meta_states(layers: Sequence[Any]) -> list[list[LayerState]]:
    """:func:`states_of`, on the meta device."""

    def meta(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to("meta")

    return [[(meta(conv), meta(recurrent)) for conv, recurrent in layer] for layer in states_of(layers)]


def shapes_of_states(states: Sequence[Sequence[LayerState]]) -> list[list[Any]]:
    """The shapes of the states of each layer."""
    return [[tuple(None if x is None else list(x.shape) for x in pair) for pair in layer] for layer in states]
