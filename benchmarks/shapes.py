# SPDX-License-Identifier: Apache-2.0
"""Shapes of prefix attention that benchmarks share, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One call: T = S + cached keys; ``model`` says where such sizes come from."""

    B: int
    Hq: int
    Hkv: int
    S: int
    D: int
    P: int
    cached: int = 0
    model: str = ""

    @property
    def T(self) -> int:
        """Sequence keys."""
        return self.S + self.cached

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs per head and sample: the prefix, the cache, and the causal triangle."""
        return self.S * (self.P + self.cached) + self.S * (self.S + 1) // 2

    def flops(self, direction: str) -> float:
        """Useful floating-point operations: 4 D per visible pair forward, 10 D backward (five products)."""
        per_pair = {"forward": 4, "backward": 10, "forward+backward": 14}[direction]
        return float(per_pair * self.D * self.B * self.Hq * self.pairs)

    def __str__(self) -> str:
        cached = f"+{self.cached}" if self.cached else ""
        return f"{self.B},{self.Hq},{self.Hkv},{self.S}{cached},{self.D},{self.P}"


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

# For a run that shows that a script works.
QUICK = (Shape(2, 4, 2, 33, 16, 5, model="quick"), Shape(1, 2, 2, 1025, 8, 3, model="quick"))
QUICK_DECODE = (
    Shape(2, 4, 2, 1, 16, 8, cached=15, model="quick"),
    Shape(1, 4, 2, 3, 16, 8, cached=60, model="quick"),
)
