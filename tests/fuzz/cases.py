# SPDX-License-Identifier: Apache-2.0
"""Draws valid calls: sizes, memory layouts, dtypes, every feature, an instruction set, threads."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
LENGTHS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97)
HEAD_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 33, 40, 64, 65, 80, 96, 127, 128, 200, 255, 256)


@dataclasses.dataclass
class Case:
    """One call.

    Attributes:
        name: ``seed:number``.
        isa: the instruction set.
        threads: how many threads run it.
        tensors: q, k, v, prefix_k and prefix_v; or weight and prompt of an embedding.
        options: the other arguments.
        dout: the gradient of the output, None for a call without backward.
        dlse: the gradient of lse, if it has one.
    """

    name: str
    isa: str
    threads: int
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dout: Tensor | None
    dlse: Tensor | None

    @property
    def is_embedding(self) -> bool:
        return "weight" in self.tensors

    def __str__(self) -> str:
        def text(x: object) -> str:
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else str(x)

        given = {**self.tensors, **self.options, "dout": self.dout, "dlse": self.dlse}
        listed = ", ".join(f"{name}={text(x)}" for name, x in given.items() if x is not None)
        return f"case {self.name} on {self.isa}, {self.threads} threads: {listed}"


def draw(name: str, isas: tuple[str, ...]) -> Case:
    """The case of a name; the instruction set is one of ``isas``."""
    pick = _Pick(name)
    isa = isas[int(pick.random.random() * len(isas))]  # as many draws on every machine
    threads = pick.of((1, 1, 2, 3))
    made = pick.embedding() if pick.chance(0.08) else pick.attention()
    return Case(name, isa, threads, *made)


class _Pick:
    """Draws from one seed."""

    def __init__(self, name: str) -> None:
        self.random = random.Random(name)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def of(self, values):
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def laid_out(self, sizes: tuple[int, ...], dtype: torch.dtype, dense: float = 0.9) -> Tensor:
        """Random values in a memory order of its own, cut out of a larger tensor.

        The last dim is dense with the probability ``dense``.
        """
        order = list(range(len(sizes) - 1))
        self.random.shuffle(order)
        order.append(len(sizes) - 1)
        if not self.chance(dense):
            self.random.shuffle(order)
        extra = [(self.of((0, 0, 1, 2)), self.of((0, 0, 1, 2))) for _ in sizes]
        step = 1 if self.chance(dense) else 2
        memory = [sizes[i] + sum(extra[i]) for i in order]
        if order[-1] == len(sizes) - 1:
            memory[-1] *= step
        x = (
            torch.randn(memory, generator=self.generator)
            .to(dtype)
            .permute([order.index(i) for i in range(len(sizes))])
        )
        slices = [slice(before, before + n) for (before, _), n in zip(extra, sizes, strict=True)]
        if order[-1] == len(sizes) - 1:
            slices[-1] = slice(extra[-1][0], extra[-1][0] + step * sizes[-1], step)
        return x[tuple(slices)]

    def broadcast(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Every dim as it is, of size 1, or expanded from 1."""
        kinds = [self.of(("full", "one", "expanded")) for _ in sizes]
        x = self.laid_out(tuple(n if kind == "full" else 1 for n, kind in zip(sizes, kinds, strict=True)), dtype)
        return x.expand([n if kind == "expanded" else -1 for n, kind in zip(sizes, kinds, strict=True)])

    def indices(self, values: Tensor) -> Tensor:
        """Index tensors of either dtype, some with gaps."""
        values = values.to(self.of(INDICES))
        if self.chance(0.7):
            return values
        return torch.stack([values, values], -1)[..., 0]

    # attention ------------------------------------------------------------------------------------------------------

    def attention(self) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None, Tensor | None]:
        kind, dtype = self.of(("batch", "packed", "cached", "decode")), self.of(DTYPES)
        kv_heads, group = self.of((1, 2, 3)), self.of((1, 2, 3, 5, 8))
        dim = self.of(HEAD_DIMS)
        value_dim = self.of(HEAD_DIMS) if self.chance(0.3) else dim
        batch = 1 if kind == "packed" else self.of((0, 1, 1, 2, 3))
        q_len = 1 if kind == "decode" else self.of(LENGTHS)
        kv_len = q_len + self.of((1, 30, 100, 250)) if kind in ("cached", "decode") else q_len
        causal = self.chance(0.7)
        if not causal and kind == "cached" and self.chance(0.3):
            kv_len = self.of(LENGTHS)
        prefix_len, bank = self.of((*LENGTHS, 130)), self.of((None, None, 1, 1, 2, 3))
        heads = kv_heads * group
        options: dict[str, Any] = {"causal": causal}
        sequences = self._packing(q_len, options) if kind == "packed" else batch
        self._numbers(dim, options)
        chains = bank is not None and self._bank(kind, q_len, sequences, bank, prefix_len, options)
        if "prefix_starts" in options and self.chance(0.2):
            prefix_len = 0
            options["prefix_lens"] = options["prefix_lens"].clone()
            options["prefix_lens"][:bank] = 0
        if "prefix_starts" not in options and self.chance(0.4):
            options["key_mask"] = self._mask(batch, kv_len)
        self._biases((batch, heads, q_len, kv_len), prefix_len, dtype, chains, options)
        prefix = (*(() if bank is None else (bank,)), kv_heads, prefix_len)
        prefix_dtype = self.of((dtype, torch.float32))
        kv = (batch, kv_heads, kv_len)
        tensors = {
            "q": self.laid_out((batch, heads, q_len, dim), dtype), "k": self.laid_out((*kv, dim), dtype),
            "v": self.laid_out((*kv, value_dim), dtype), "prefix_k": self.laid_out((*prefix, dim), prefix_dtype),
            "prefix_v": self.laid_out((*prefix, value_dim), prefix_dtype),
        }  # fmt: skip
        dout = dlse = None
        if self.chance(0.85):
            dout = self.laid_out((batch, heads, q_len, value_dim), dtype, dense=0.7)
            dlse = self.laid_out((batch, heads, q_len), torch.float32) if self.chance(0.5) else None
        return tensors, options, dout, dlse

    def _packing(self, q_len: int, options: dict[str, Any]) -> int:
        """The offsets of packed sequences. Returns how many there are."""
        cuts = sorted(self.integer(0, q_len) for _ in range(self.integer(0, 4)))
        offsets = torch.tensor([0, *cuts, q_len])
        options["cu_seqlens"] = self.indices(offsets)
        if self.chance(0.4):
            options["max_seqlen"] = int(offsets.diff().max()) + self.of((0, 0, 5))
        return len(cuts) + 1

    def _numbers(self, dim: int, options: dict[str, Any]) -> None:
        if self.chance(0.3):
            options["scale"] = self.of((0.3, 1.5, -1.0)) * dim**-0.5
        if self.chance(0.4):
            options |= {"window": self.integer(1, 140), "prefix_in_window": self.chance(0.5)}
        if self.chance(0.25):
            options["softcap"] = self.of((0.5, 5.0, 50.0))
        if self.chance(0.25):
            options |= {"dropout_p": self.of((0.1, 0.5)), "dropout_seed": self.random.getrandbits(63)}

    def _bank(
        self, kind: str, q_len: int, sequences: int, bank: int, prefix_len: int, options: dict[str, Any]
    ) -> bool:
        """Which prefixes each sequence sees. Returns whether it may be several."""
        lens = torch.randint(0, prefix_len + 1, (bank,), generator=self.generator)
        count = bank
        if kind == "packed" and options.get("prefix_in_window", True) and self.chance(0.3):
            starts = torch.randint(0, q_len + 1, (2,), generator=self.generator)
            lens, count = torch.cat([lens, (q_len - starts) // 2]), bank + 2
            options |= {"prefix_starts": self.indices(starts), "prefix_lens": self.indices(lens)}
        elif self.chance(0.5):
            options["prefix_lens"] = self.indices(lens)
        width = self.of(((), (), (), (1,), (2,), (3,)))
        ids = torch.randint(-1, count, (sequences, *width), generator=self.generator)
        chains = bool(width) or "prefix_starts" in options
        if chains and self.chance(0.3):
            options["max_prefix_len"] = 3 * (prefix_len + q_len)
        if kind == "packed" and bank == 1 and not chains and self.chance(0.6):
            first = self.integer(0, sequences - 1)
            ids = torch.where(torch.arange(sequences) < first, -1, 0)
            options["prefix_start"] = int(options["cu_seqlens"][first])
        options["prefix_ids"] = self.indices(ids)
        return chains

    def _mask(self, batch: int, kv_len: int) -> Tensor:
        mask = torch.rand(batch, kv_len, generator=self.generator) < self.of((0.0, 0.1, 0.9, 1.0))
        return mask if self.chance(0.6) else torch.stack([mask, ~mask], -1)[..., 0]

    def _biases(
        self, sizes: tuple[int, ...], prefix_len: int, dtype: torch.dtype, chains: bool, options: dict[str, Any]
    ) -> None:
        if self.chance(0.25):
            options["bias"] = self.broadcast(*sizes, dtype=self.of((torch.float32, dtype)))
            if self.chance(0.3):
                hidden = torch.rand(options["bias"].shape, generator=self.generator) < 0.2
                options["bias"] = options["bias"].masked_fill(hidden, -torch.inf)
        if not chains and self.chance(0.25):
            options["prefix_bias"] = self.broadcast(sizes[1], prefix_len)
        for name in ("sinks", "gate"):
            if self.chance(0.2):
                options[name] = torch.randn(sizes[1], generator=self.generator)

    # embedding ------------------------------------------------------------------------------------------------------

    def embedding(self) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None, Tensor | None]:
        dtype, batch, length = self.of(DTYPES), self.of((0, 1, 2, 5)), self.of(LENGTHS)
        vocab, dim, prompt_len, bank = (
            self.of((1, 7, 50)),
            self.of(HEAD_DIMS),
            self.of(LENGTHS),
            self.of((None, 1, 3)),
        )
        options: dict[str, Any] = {
            "input_ids": self.indices(torch.randint(vocab, (batch, length), generator=self.generator))
        }
        if bank is not None:
            options["prompt_ids"] = self.indices(torch.randint(bank, (batch,), generator=self.generator))
        prompt = (*(() if bank is None else (bank,)), prompt_len, dim)
        tensors = {
            "weight": self.laid_out((vocab, dim), dtype),
            "prompt": self.laid_out(prompt, self.of((dtype, torch.float32))),
        }
        dout = self.laid_out((batch, prompt_len + length, dim), dtype) if self.chance(0.8) else None
        return tensors, options, dout, None
