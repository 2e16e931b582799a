# SPDX-License-Identifier: Apache-2.0
"""The worker of :mod:`benchmarks.versions`: runs one version of the package through its public names alone.

It reads a line of JSON per request, [name, arguments...], and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor

import peftkern


def _inputs(shape: list[int], grad: bool) -> list[Tensor]:
    """q, k, v, prefix_k and prefix_v in bf16; q, k and v lie in memory as [B, S, H, D]."""
    batch, heads, kv_heads, length, dim, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    qkv = [draw(batch, length, n, dim).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
    return [x.requires_grad_(grad) for x in (*qkv, draw(kv_heads, prefix, dim), draw(kv_heads, prefix, dim))]


class Worker:
    """The requests. ``prepare_*`` sets the call that ``run`` times."""

    def __init__(self) -> None:
        self.call: Any = None

    def prepare_kernel(self, shape: list[int], training: bool) -> None:
        """One attention layer, forward or forward and backward."""
        inputs = _inputs(shape, training)
        dout = torch.ones_like(inputs[0])

        def call() -> None:
            out = peftkern.prefix_attention(*inputs)
            if training:
                torch.autograd.grad(out, inputs, dout)

        self.call = call

    def prepare_step(self, kind: str, batch: int, length: int, seq: int) -> None:
        """A training step of SmolLM2-135M's shape: a full batch with a prefix, or padded rows or a prompt to pack."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).bfloat16().train()
        learned = peftkern.SoftPrompt(model, length) if kind == "prompt" else peftkern.PrefixKV(model, length)
        peftkern.patch(model, learned, freeze=True)
        ids = torch.randint(0, 40_000, (batch, seq), generator=torch.Generator().manual_seed(1))
        lengths = (
            torch.full((batch, 1), seq) if kind != "padded" else torch.linspace(seq // 4, seq, batch).long()[:, None]
        )
        mask = torch.arange(seq) < lengths
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
        self.call = lambda: model(**inputs).loss.backward()

    def run(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start

    def host(self, calls: int) -> list[float]:
        """Microseconds of processor time per call at B = S = 1: prefix_attention, and torch.cat with SDPA."""
        q, k, v, prefix_k, prefix_v = (x.float() for x in _inputs([1, 4, 2, 1, 16, 4], False))

        def concatenated() -> Tensor:
            keys, values = torch.cat([prefix_k[None], k], 2), torch.cat([prefix_v[None], v], 2)
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        def ours() -> Tensor:
            return peftkern.prefix_attention(q, k, v, prefix_k, prefix_v)

        times, threads = [], torch.get_num_threads()
        torch.set_num_threads(1)  # others would add their waiting to the processor time
        with torch.no_grad():
            for call in (ours, concatenated):
                start = time.process_time()
                for _ in range(calls):
                    call()
                times.append((time.process_time() - start) / calls * 1e6)
        torch.set_num_threads(threads)
        return times


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    tree, threads = sys.argv[1], int(sys.argv[2])
    assert os.path.realpath(peftkern.__file__).startswith(os.path.realpath(tree)), peftkern.__file__
    torch.set_num_threads(threads)
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
