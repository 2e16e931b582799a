# SPDX-License-Identifier: Apache-2.0
"""What a model that reads images or sound makes of its inputs before the layers of the text run.

::

    base model     tokens, images ─► embeddings [B, S, E], positions, masks, features of images
      backbone                       the layers, which see an image as rows of embeddings

The parts around the backbone see the unpacked batch, without the prefix or prompt. What they pass to the backbone is
packed here: positions [K, B, S] in several dimensions, and features of images for single layers. A batch whose mask
lets tokens see each other in both directions, or with other tensors, is not packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model_info import CACHE_NAMES
from .cache import PrefixCache
from .call_arguments import BOUNDARIES, forward_arguments
from .masks import LazyMask
from .packing import PackedBatch
from .probing import some_tokens

__all__ = [
    "MISPLACED",
    "AroundText",
    "has_rope",
    "has_tensor",
    "hide_prefix",
    "reads_more",
    "rope_positions",
    "text_positions",
]

#: Arguments of base models that decide which tokens see each other in both directions.
_DECIDE_MASKS = ("token_type_ids",)

#: Arguments of a backbone [B, S] that say which tokens get the features of images, [n, E] per layer, in their order.
_PLACES = ("visual_pos_masks",)
_FEATURES = ("deepstack_visual_embeds",)

#: Arguments of a backbone that packing replaces, or that have nothing to do with the layers.
_KNOWN = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "num_items_in_batch", *CACHE_NAMES,
    *BOUNDARIES, *_PLACES, *_FEATURES,
)  # fmt: skip

#: Arguments that hold no inputs.
_FLAGS = (
    "kwargs",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "logits_to_keep",
)


def reads_more(base: PreTrainedModel) -> bool:
    """Whether a model without an encoder of text has inputs other than text."""
    config = base.config
    return not config.is_encoder_decoder and config.get_text_config() is not config


#: A notice on PEFT's prefix.
MISPLACED = (
    "their positions and masks are computed for the sequence alone, and then moved behind the prefix; PEFT counts "
    "the prefix as tokens, which moves them, or raises"
)


class _Arrived(Exception):
    """Ends a trial call of the base model when the backbone is called."""


class AroundText:
    """The parts of a model around the backbone.

    Args:
        base: the Hugging Face model.
        backbone: the model in it that runs the layers.

    Attributes:
        reads_more: whether the base model has inputs other than text.
        inputs: the names of the base model's arguments that these parts read, and the backbone does not.
        first_position: the position of the first token, where the base model counts positions itself.
    """

    def __init__(self, base: PreTrainedModel, backbone: PreTrainedModel) -> None:
        self.base, self.backbone = base, backbone
        self.reads_more = base is not backbone and reads_more(base)
        names = frozenset(forward_arguments(base)) if self.reads_more else frozenset()
        passed = frozenset(forward_arguments(backbone))
        self.inputs = names - passed - frozenset(_DECIDE_MASKS)
        #: Inputs that the layers read, each in its own way.
        self._layer_inputs = sorted(name for name in names & passed if name not in (*_KNOWN, *_FLAGS))
        self.first_position = 0

    def is_given(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of the base model has inputs other than text."""
        return any(name in self.inputs and name not in _KNOWN and has_tensor(x) for name, x in kwargs.items())

    def why_layers_need_samples(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why the layers cannot run packed with the inputs of a call of the base model; None if they can."""
        if self._layer_inputs and self.is_given(kwargs):
            return f"{', '.join(self._layer_inputs)} of {type(self.backbone).__name__} cannot be packed"
        return None

    def why_unpackable(self) -> str | None:
        """Why the backbone cannot run packed batches within the base model, by a call on text; None if it can."""
        if not self.reads_more:
            return None
        arrived: dict[str, Any] = {}

        def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            arrived.update(kwargs)
            raise _Arrived

        ids = some_tokens(self.backbone, 3)[None]
        handle = self.backbone.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, peftkern_packed=True)
        except _Arrived:
            pass
        finally:
            handle.remove()
        if "peftkern_packed" not in arrived:
            return f"{type(self.base).__name__} passes no keyword arguments to {type(self.backbone).__name__}"
        positions = arrived.get("position_ids")
        if positions is not None:
            self.first_position = int(positions.flatten()[0])
        return self.why_padded(arrived)

    def why_padded(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why the arguments of a call of the backbone cannot be packed; None if they can."""
        if not self.reads_more:
            return None
        mask = kwargs.get("attention_mask")
        for one in mask.values() if isinstance(mask, Mapping) else (mask,):
            if isinstance(one, LazyMask) and (one.pattern is None or not one.pattern[0]):
                return "attention_mask lets tokens see each other in both directions"
            if isinstance(one, Tensor) and one.dim() != 2:
                return "attention_mask is not [B, S]"
        for name, x in kwargs.items():
            if name not in _KNOWN and not name.startswith("peftkern_") and has_tensor(x):
                return f"{name} cannot be packed"
        return None

    def places_images(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether positions or masks of a call of the backbone depend on which tokens are those of images."""
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        masks = mask.values() if isinstance(mask, Mapping) else (mask,)
        blocks = any(isinstance(one, LazyMask) and one.pattern is None for one in masks)
        return blocks or (isinstance(positions, Tensor) and positions.dim() == 3)

    def pack(self, packed: PackedBatch, kwargs: dict[str, Any], offset: int | Tensor) -> None:
        """Pack positions and the places of images, in place.

        Args:
            packed: the packed batch.
            kwargs: arguments of a call of the backbone.
            offset: positions that the model counts for a prefix, of all sequences or [n].
        """
        given = kwargs.get("position_ids")
        if isinstance(given, Tensor) and given.dim() == 3:
            kwargs["position_ids"] = packed.positions_of(given, offset)
        else:
            kwargs["position_ids"] = packed.positions(offset)
        for name in _PLACES:
            if kwargs.get(name) is not None:
                places = packed.layout.pack(kwargs[name])
                kwargs[name] = torch.nn.functional.pad(places, (packed.prompt_rows, 0))


def _rope_method(base: PreTrainedModel) -> Callable[..., Any] | None:
    """The method of a model with positions in several dimensions that computes them from tokens and images."""
    methods = (getattr(module, "get_rope_index", None) for module in base.modules())
    return next((method for method in methods if method is not None), None)


def has_rope(base: PreTrainedModel) -> bool:
    """Whether the tokens of images have positions in several dimensions."""
    return _rope_method(base) is not None


def rope_positions(base: PreTrainedModel, kwargs: Mapping[str, Any]) -> Tensor | None:
    """[K, B, S], for a call of the base model whose tokens are about to be replaced by their embeddings.

    Positions in several dimensions follow from tokens and the sizes of images, which embeddings do not tell. None if
    the model has none, or the call has no images.
    """
    compute = _rope_method(base)
    if compute is None or kwargs.get("input_ids") is None or kwargs.get("position_ids") is not None:
        return None
    parameters = inspect.signature(compute).parameters.values()
    known = {x.name: kwargs[x.name] for x in parameters if kwargs.get(x.name) is not None}
    required = (x.name for x in parameters if x.default is x.empty and x.kind is not x.VAR_KEYWORD)
    return compute(**known)[0] if all(name in known for name in required) else None


def hide_prefix(cache: PrefixCache, kwargs: dict[str, Any]) -> None:
    """Make a caller's cache, mask and positions those of the sequence alone, for one call of the base model."""
    offset, mask, position_ids = cache.offset, kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs["attention_mask"] = mask[:, offset:]
    if position_ids is not None:
        kwargs["position_ids"] = position_ids - offset
    cache.hidden = True


def text_positions(position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """[B, S], the positions by which sequences of a row are told apart, from [B, S] or [K, B, S].

    Of four rows, the first has the positions in the text. The others, in time, height and width, repeat within an
    image.
    """
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if mask is None and position_ids.shape[0] == 4 else None


def has_tensor(x: Any) -> bool:
    """Whether an argument of a call is a tensor, or a sequence or mapping with tensors."""
    if isinstance(x, Mapping):
        return any(map(has_tensor, x.values()))
    return isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(map(has_tensor, x)))
