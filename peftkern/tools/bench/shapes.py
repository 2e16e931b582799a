# SPDX-License-Identifier: Apache-2.0
"""Shapes of prefix attention by model name, and their work in operations and bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Model:
    """Sizes of a model from its ``config.json``. ``window`` is the size of its sliding windows, if it has any."""

    family: str  # transformers' ``model_type``
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    Hq: int
    Hkv: int
    D: int
    window: int | None = None
    softcap: float | None = None


MODELS = {
    "gpt2": Model("gpt2", 12, 768, 3072, 50257, 12, 12, 64),
    "smollm2-135m": Model("llama", 30, 576, 1536, 49152, 9, 3, 64),
    "llama-3.2-1b": Model("llama", 16, 2048, 8192, 128256, 32, 8, 64),
    "llama-3.2-3b": Model("llama", 28, 3072, 8192, 128256, 24, 8, 128),
    "llama-3-8b": Model("llama", 32, 4096, 14336, 128256, 32, 8, 128),
    "qwen3-4b": Model("qwen3", 36, 2560, 9728, 151936, 32, 8, 128),
    "gemma-2-9b": Model("gemma2", 42, 3584, 14336, 256000, 16, 8, 256, window=4096, softcap=50.0),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. T = S + cached keys; ``model`` names a model of such sizes; ``window`` counts the prefix."""

    B: int
    Hq: int
    Hkv: int
    S: int
    D: int
    P: int
    cached: int = 0
    model: str = ""
    window: int | None = None
    softcap: float | None = None

    @property
    def T(self) -> int:
        """Number of sequence keys."""
        return self.S + self.cached

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`peftkern.prefix_attention` that differ from their defaults."""
        options = {"window": self.window, "softcap": self.softcap}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs per head and sample: the prefix, the cache, and the causal triangle."""
        if self.window is None:
            return self.S * (self.P + self.cached) + self.S * (self.S + 1) // 2
        return sum(min(self.window, self.P + self.cached + i + 1) for i in range(self.S))

    def flops(self, direction: str) -> float:
        """Useful floating-point operations: 4 D per visible pair forward, 10 D backward (five products)."""
        per_pair = {"forward": 4, "backward": 10, "forward+backward": 14}[direction]
        return float(per_pair * self.D * self.B * self.Hq * self.pairs)

    def bytes(self, direction: str, itemsize: int) -> float:
        """Bytes that must be moved: each input read once, each output written once, the prefix once per call.

        Forward reads q, k, v and the prefix and writes out; backward reads those and dout and writes their gradients.
        """
        rows = self.B * self.D * (self.Hq * self.S)
        keys = self.B * self.D * (2 * self.Hkv * self.T) + 2 * self.Hkv * self.P * self.D
        forward, backward = 2 * rows + keys, 4 * rows + 2 * keys
        elements = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]
        return float(itemsize * elements)

    def __str__(self) -> str:
        cached = f"+{self.cached}" if self.cached else ""
        return f"{self.B},{self.Hq},{self.Hkv},{self.S}{cached},{self.D},{self.P}"


def sweep(
    models: Iterable[str], seq: Iterable[int], prefix: Iterable[int], batch: Iterable[int], cached: int = 0
) -> list[Shape]:
    """Every combination of sizes, for the attention of models in :data:`MODELS`.

    Raises:
        ValueError: for a model that is not in the table.
    """
    shapes = []
    for name, B, S, P in itertools.product(models, batch, seq, prefix):
        if name not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
        m = MODELS[name]
        shapes.append(Shape(B, m.Hq, m.Hkv, S, m.D, P, cached, name, m.window, m.softcap))
    return shapes


#: Ten shapes of training steps.
TRAINING = (
    Shape(4, 12, 12, 512, 64, 32, model="GPT-2"),
    Shape(2, 12, 12, 1024, 64, 64, model="GPT-2"),
    Shape(1, 32, 8, 1024, 128, 64, model="Llama-3-8B"),
    Shape(8, 12, 12, 256, 64, 512, model="GPT-2, long prefix"),
    Shape(1, 12, 12, 2048, 64, 64, model="GPT-2"),
    Shape(8, 16, 2, 128, 64, 16, model="Qwen2-like GQA"),
    Shape(2, 9, 3, 1024, 64, 20, model="SmolLM2-135M"),
    Shape(1, 9, 3, 4096, 64, 100, model="SmolLM2-135M, long"),
    Shape(16, 9, 3, 31, 64, 20, model="SmolLM2-135M, short"),
    Shape(1, 32, 8, 512, 128, 2048, model="Llama-3-8B, cartridge"),
)

#: Shapes of decoding: a few queries behind many cached keys.
DECODE = (
    Shape(1, 9, 3, 1, 64, 20, cached=1023, model="SmolLM2-135M"),
    Shape(128, 9, 3, 1, 64, 2048, cached=127, model="SmolLM2-135M, cartridge, large batch"),
    Shape(32, 32, 8, 1, 128, 2048, cached=127, model="Llama-3-8B, cartridge"),
    Shape(8, 32, 8, 1, 128, 512, cached=511, model="Llama-3-8B"),
    Shape(8, 32, 8, 4, 128, 512, cached=508, model="Llama-3-8B, 4 at once"),
    Shape(4, 32, 8, 16, 128, 256, cached=1008, model="Llama-3-8B, 16 at once"),
    Shape(1, 32, 8, 1, 128, 64, cached=16383, model="Llama-3-8B, long"),
    Shape(1, 32, 8, 1, 128, 64, cached=65535, model="Llama-3-8B, 64k"),
    Shape(1, 9, 3, 16, 64, 100, cached=65520, model="SmolLM2-135M, 64k, 16 at once"),
)

#: Tiny shapes, to see that something runs.
QUICK = (Shape(2, 4, 2, 33, 16, 5, model="quick"), Shape(1, 2, 2, 1025, 8, 3, model="quick"))

#: Lists of shapes by name.
SHAPES = {"training": TRAINING, "decode": DECODE, "quick": QUICK}
