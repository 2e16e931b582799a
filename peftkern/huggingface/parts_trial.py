# SPDX-License-Identifier: Apache-2.0
"""The trial of an encoder-decoder with a prefix in its encoder or cross-attention.

No cache could hold such a prefix. The stock model runs with eager attention over concatenated keys instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..eager_attention import use_attention
from ..model_info import KeyValue
from .cache import PrefixCache, PrefixOptions
from .eager_trial import NAME, EagerTrial, attention_with_prefix
from .parts import PartLayers, passing, run_base
from .probing import some_tokens
from .trial import Outputs, prefix_like

__all__ = ["PartsTrial"]

#: (prefix_k, prefix_v) of each layer, per part.
Rows = dict[str, list[KeyValue]]


class PartsTrial(EagerTrial):
    """Runs of an encoder-decoder on a few tokens.

    Args:
        base: the encoder-decoder, with peftkern's attention implementation and in eval mode
            (:func:`.probing.quiet`).
        decoder: the model in it that reads the cache.
        layers: the modules that read the prefix, which are marked.
        num_layers: layers of the decoder's self-attention.
        options: for the attention function.
    """

    def __init__(
        self, base: PreTrainedModel, decoder: PreTrainedModel, layers: PartLayers, num_layers: int,
        options: PrefixOptions,
    ) -> None:  # fmt: skip
        super().__init__(base, layers.infos, {}, options)
        self.decoder, self.layers, self.num_layers = decoder, layers, num_layers
        generator = torch.Generator().manual_seed(0)
        parts = {info.part for info in layers.infos.values()}
        self.rows: Rows = {
            part: [prefix_like(pair, generator) for pair in samples] if part in parts else []
            for part, samples in layers.samples.items()
        }

    def _try_prefix(self) -> str | None:
        moved = {
            part: [(self.round_otherwise(key), self.round_otherwise(value)) for key, value in rows]
            for part, rows in self.rows.items()
        }
        with use_attention(self.backbone, NAME, attention_with_prefix):
            with self.measured_linear_layers():
                stock = self._run_parts(self.rows)
            self._rounding = self.measure_rounding(self._run_parts(moved), stock, None)
        what = f"{self.kind} with a prefix in its {' and '.join(part for part, rows in self.rows.items() if rows)}"
        return self.compare(what, self._run_parts(self.rows), stock, None, self._rounding)

    def _run_parts(self, rows: Rows) -> Outputs:
        """Outputs of the attention modules in the order of their calls, followed by those of the base model.

        Queries at padding have outputs too, as keys are all that an encoder's mask hides.
        """
        common: dict[str, Any] = {"offset": 0, "stores": False, "offset_outside": False, "options": self.options}
        nothing: list[KeyValue | None] = [None] * self.num_layers
        caches = {
            "encoder": PrefixCache(rows["encoder"], **common),
            "cross": PrefixCache(nothing, beside=rows["cross"], **common),
        }
        outputs: Outputs = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(record) for module in self.layers.infos]
        for cache in caches.values():
            cache.begin()
        decoder_ids = some_tokens(self.backbone, 3 * 2).view(3, 2)
        try:
            with passing(self.layers.encoder, caches["encoder"]), passing(self.decoder, caches["cross"]):
                outputs.append(run_base(self.backbone, self.ids, decoder_ids, self.mask)[0])
        finally:
            for handle in handles:
                handle.remove()
        for part, cache in caches.items():
            if missing := cache.finish({info.name: len(info.layers) for info in self.layers.of(part)}):
                raise ValueError(f"attention ran without its prefix in {', '.join(missing)}")
        return outputs
