# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding behind a prefix with a dynamic, a static and a compiled static cache.

SmolLM2-135M's shape with random weights. Both models run the same loop over the base model: a prefill, then one token
per step. "static compiled" compiles the step to one graph. PEFT's generate fails with a static cache, so its static
rows are what can be written by hand: a static cache that has been filled with a copy of the prefix per sample. Tokens
are compared in fp32 before anything is timed. Writes results/decoding.csv.

On a processor without bf16 instructions, bf16 rows compare conversions.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import peftkern
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES

from ..common import Row, add_options, output_of, progress, show, write
from .models import SMOLLM2_TITLE, TINY_TITLE, prefix_of, smollm2_config

CACHES = ("dynamic", "static", "static compiled")
PROVIDERS = ("PEFT", "peftkern")


class Decoder:
    """A model behind a prefix, and its decoding loop.

    Args:
        model: a PEFT model, patched or not.
        cache: one of :data:`CACHES`.
        shape: (B, prompt tokens, new tokens).
    """

    def __init__(self, model: Any, cache: str, shape: tuple[int, int, int]) -> None:
        self.model, self.base = model, model.get_base_model()
        self.patched = hasattr(model, "_peftkern_patch")
        samples, length, self.new_tokens = shape
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.base.config.vocab_size, (samples, length), generator=generator)
        self.cache: Any = None
        if cache != "dynamic":
            prefix_len = 0 if self.patched else model.active_peft_config.num_virtual_tokens
            self.cache = StaticCache(self.base.config, max_cache_len=prefix_len + length + self.new_tokens)
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False) if "compiled" in cache else self._step

    def _step(self, token: Tensor, cache: Any) -> Tensor:
        output = self.base(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    def new_cache(self) -> Any:
        """A cache that holds the prefix, or knows it, and no tokens."""
        if self.cache is None:
            return self.model.get_prompt(batch_size=self.ids.shape[0])
        self.cache.reset()
        if self.patched:
            if isinstance(self.cache, StaticCache):  # the first run; the cache made here is used again
                inputs = self.model.prepare_inputs_for_generation(self.ids, past_key_values=self.cache)
                self.cache = inputs["past_key_values"]
            return self.cache
        for layer, pair in enumerate(self.model.get_prompt(batch_size=self.ids.shape[0]).layers):
            self.cache.update(pair.keys, pair.values, layer)
        return self.cache

    @torch.no_grad()
    def run(self) -> Tensor:
        """Greedy tokens [B, new tokens]."""
        cache = self.new_cache()
        tokens = [self._step(self.ids, cache)]
        for _ in range(self.new_tokens - 1):
            tokens.append(self.step(tokens[-1], cache))
        return torch.cat(tokens, 1)


def make_model(provider: str, dtype: torch.dtype, prefix: int, quick: bool) -> Any:
    """The model of a provider; weights and prefix do not depend on it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(smollm2_config(quick), dtype=dtype)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
    prefix_of(model).data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return (peftkern.patch(model) if provider == "peftkern" else model).eval()


def check(cache: str, options: argparse.Namespace) -> None:
    """Raise AssertionError unless both providers generate the same tokens in fp32."""
    shape = (options.batch, options.prompt, options.tokens)
    tokens = [
        Decoder(make_model(provider, torch.float32, options.prefix, options.quick), cache, shape).run()
        for provider in PROVIDERS
    ]
    assert torch.equal(*tokens), f"{cache}: generated tokens differ from PEFT's"
    torch.compiler.reset()
    gc.collect()


def measure(cache: str, dtype: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """One row."""
    torch.set_num_threads(threads)
    check(cache, options)
    shape = (options.batch, options.prompt, options.tokens)
    calls: dict[str, Callable[[], object]] = {
        p: Decoder(make_model(p, DTYPES[dtype], options.prefix, options.quick), cache, shape).run for p in PROVIDERS
    }
    times = take_turns(calls, options.seconds, at_least=3 if options.quick else 9)
    torch.compiler.reset()
    peft, ours = (times[provider] for provider in PROVIDERS)
    row = {"cache": cache, "dtype": dtype, "threads": threads, "B": options.batch, "P": options.prefix,
           "S": options.prompt, "new_tokens": options.tokens, "peft_ms_per_token": peft.median / options.tokens * 1e3,
           "ours_ms_per_token": ours.median / options.tokens * 1e3, "peft_spread": peft.spread,
           "ours_spread": ours.spread, "over_peft": peft.median / ours.median}  # fmt: skip
    return [row | stamp()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_options(parser, seconds=30.0, threads=[1])
    parser.set_defaults(dtypes=["fp32", "bf16"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--batch", type=int, default=1, help="samples (default %(default)s)")
    parser.add_argument("--prefix", type=int, default=64, help="prefix tokens (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens before generated ones (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (default %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Check, measure, print, write."""
    if options.quick:
        vars(options).update(prefix=5, prompt=4, tokens=4, seconds=0.0)
    tasks: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"{cache} cache, {dtype}, threads={threads}", functools.partial(measure, cache, dtype, threads, options))
        for threads in options.threads for dtype in options.dtypes for cache in options.caches
    ]  # fmt: skip
    rows, output = [], output_of(options, "decoding.csv")
    for row in progress(tasks):
        rows.append(row)
        if output:
            write(rows, output)
    columns = ("cache", "dtype", "thr", "B", "P", "S", "new", "PEFT ms/token", "ours ms/token", "x PEFT")

    def line(r: Row) -> list[str]:
        numbers = [str(r[name]) for name in ("cache", "dtype", "threads", "B", "P", "S", "new_tokens")]
        timings = [f"{r[f'{name}_ms_per_token']:.2f} ±{r[f'{name}_spread']:.0%}" for name in ("peft", "ours")]
        return [*numbers, *timings, f"{r['over_peft']:.2f}"]

    show(f"decoding, {TINY_TITLE if options.quick else SMOLLM2_TITLE}, medians ± spreads", columns, map(line, rows))
