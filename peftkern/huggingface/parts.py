# SPDX-License-Identifier: Apache-2.0
"""The prefix of an encoder's layers, and of the layers of a decoder that attend to the encoder's output.

The hook on the encoder passes its prefix as the hook on a backbone does. The prefix of cross-attention travels with
the prefix of the decoder. It is never part of a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model_info import KeyValue, encoder_inputs
from .attention import Implementation
from .cache import LAYER_INFO, PrefixCache
from .call_arguments import forward_arguments
from .implementation import check_implementation, without_prefix
from .masks import LazyMask
from .probing import is_transient, some_tokens
from .relative_bias import SpanningBias
from .survey import CallRecord, PrefixLayerInfo
from .wiring import Wiring

__all__ = ["EncoderHooks", "PartLayers", "find_part_layers", "passing", "run_base"]


@dataclass(frozen=True)
class PartLayers:
    """The attention modules of an encoder-decoder that read the prefix, other than the decoder's self-attention.

    Attributes:
        encoder: the encoder.
        infos: the modules of the encoder, and the cross-attention of the decoder.
        samples: per part, keys and values [1, Hkv, T, D] of each layer.
    """

    encoder: PreTrainedModel
    infos: dict[nn.Module, PrefixLayerInfo]
    samples: dict[str, list[KeyValue]]

    def of(self, part: str) -> list[PrefixLayerInfo]:
        """Those of one part."""
        return [info for info in self.infos.values() if info.part == part]

    def install(self, wiring: Wiring) -> None:
        """Mark the modules."""
        for module, info in self.infos.items():
            wiring.set_attribute(module, LAYER_INFO, info)
            if info.part == "encoder" and hasattr(module, "compute_bias"):
                SpanningBias(module).install(wiring)


def find_part_layers(
    base: PreTrainedModel, decoder: PreTrainedModel, names: dict[nn.Module, str], parts: Sequence[str]
) -> PartLayers:
    """Run an encoder-decoder on a few tokens to find the attention modules of its parts.

    Args:
        base: the model, with peftkern's attention implementation and in eval mode (:func:`.probing.quiet`).
        decoder: the model in it that reads the cache, whose own attention modules are marked.
        names: path of each module, for messages.
        parts: the parts that have a prefix.

    Raises:
        ValueError: if the prefix does not reach all layers of a part.
    """
    encoder: Any = base.get_encoder() if base.config.is_encoder_decoder else None
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"parts: expected ('decoder',), because {type(base).__name__} has no encoder, got {tuple(parts)}"
        )
    encoded, decoded = CallRecord(names), CallRecord(names)
    with passing(encoder, encoded), passing(decoder, decoded):
        output = run_base(base, some_tokens(base, 3)[None], some_tokens(base, 2)[None])
    length = output.encoder_last_hidden_state.shape[1]
    decoded.calls = [call for call in decoded.calls if not hasattr(call[0], LAYER_INFO)]
    records = {"encoder": encoded, "cross": decoded}
    infos: dict[nn.Module, PrefixLayerInfo] = {}
    for part in (part for part in ("encoder", "cross") if part in parts):
        found = len(records[part].calls)
        expected = getattr(encoder.config, "num_hidden_layers", found) if part == "encoder" else found
        if not found or found != expected:
            raise ValueError(
                f"parts: expected none of {part!r}, because a prefix reaches {found} of its {expected or 'some'} "
                f"layers in {type(base).__name__}, got {tuple(parts)}"
            )
        for module, key, _ in records[part].calls:
            if key.shape[2] != length:
                raise ValueError(f"parts: {names[module]} attends to {key.shape[2]} keys for {length} encoded tokens")
        infos |= records[part].infos(part)
    samples = {part: [(key, value) for _, key, value in record.calls] for part, record in records.items()}
    return PartLayers(encoder, infos, samples)


@contextlib.contextmanager
def passing(model: nn.Module, prefix: Any) -> Iterator[None]:
    """Within the block, ``model`` gets ``prefix`` as a keyword argument."""
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "peftkern_prefix": prefix}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def run_base(base: PreTrainedModel, ids: Tensor, decoder_ids: Tensor, mask: Tensor | None = None) -> Any:
    """The output of an encoder-decoder without a cache, and without a head that computes a loss.

    Args:
        base: the model.
        ids: [B, S], tokens that the encoder reads, if it reads tokens.
        decoder_ids: [B, T].
        mask: [B, S], 0 for padding.
    """
    inputs = encoder_inputs(base, ids)
    if mask is not None and "attention_mask" in inputs:
        inputs["attention_mask"] = mask
    try:
        return base.base_model(**inputs, decoder_input_ids=decoder_ids, use_cache=False)
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f"model: {type(base).__name__} could not be run with a prefix: {error}") from error


class EncoderHooks:
    """Passes the prefix to an encoder.

    Args:
        encoder: called by the base model, and by ``generate``.
        infos: its attention modules that read the prefix.
        new_cache: returns the prefix of a call.
    """

    def __init__(
        self, encoder: PreTrainedModel, infos: Sequence[PrefixLayerInfo], new_cache: Callable[[], PrefixCache]
    ) -> None:
        self.encoder = encoder
        self.infos = infos
        self.new_cache = new_cache
        self.arguments = forward_arguments(encoder)

    def install(self, wiring: Wiring) -> None:
        """Add the hooks."""
        wiring.add_hooks(
            self.encoder.register_forward_pre_hook(self.before, with_kwargs=True),
            self.encoder.register_forward_hook(self.after, with_kwargs=True, always_call=True, prepend=True),
        )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook: pass the prefix."""
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if isinstance(kwargs.get("attention_mask"), LazyMask):
            kwargs["attention_mask"] = kwargs["attention_mask"].dense()
        if kwargs.get("output_attentions", getattr(self.encoder.config, "output_attentions", False)):
            raise ValueError(
                f"output_attentions: expected False, because {type(self.encoder).__name__} takes no cache, by which "
                "its own attention would get the prefix, got True"
            )
        check_implementation(self.encoder, self.infos)
        cache = self.new_cache()
        cache.begin()
        return (), {**kwargs, "peftkern_prefix": cache}

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook: check that every layer has read its prefix. ``output`` is None if the forward has raised."""
        cache: PrefixCache | None = kwargs.get("peftkern_prefix")
        if cache is None:
            return
        missing = cache.finish({info.name: sum(map(cache.has_prefix, info.layers)) for info in self.infos})
        drops_layers = self.encoder.training and getattr(self.encoder, "layerdrop", 0.0) > 0.0
        implementation = self.encoder.config._attn_implementation
        if output is not None and missing and not (drops_layers and isinstance(implementation, Implementation)):
            raise without_prefix("ran", self.encoder, missing)
