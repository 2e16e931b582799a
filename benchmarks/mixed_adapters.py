# SPDX-License-Identifier: Apache-2.0
"""Batches whose samples read different prefixes or prompts: time of training steps and of generation.

A batch of eight adapters runs beside a batch of one, and a batch whose samples read three prefixes of a bank beside
one whose samples read the same three stored as one prefix. The two run in one process and alternate; the table has
medians. The logits of the two are compared, those of adapters with runs of each adapter alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern

RESULTS = Path(__file__).parent / "results" / "mixed_adapters.csv"
VOCAB, SEQ, NEW_TOKENS = 1024, 64, 8
#: Lengths of the adapters; the batch of one adapter has their mean.
LENGTHS = (8, 12, 16, 16, 16, 16, 20, 24)
#: Tokens of each of the prefixes of which a sample reads three.
SHORT = 16
CONFIGS: dict[str, Callable[..., Any]] = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}


def small_llama() -> Any:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build(kind: str) -> Any:
    """A patched model with an adapter per length, and the adapter ``default`` of their mean length."""
    torch.manual_seed(0)

    def adapter(length: int) -> Any:
        return CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=length)

    model: Any = get_peft_model(small_llama(), adapter(sum(LENGTHS) // len(LENGTHS)))
    for index, length in enumerate(LENGTHS):
        model.add_adapter(f"a{index}", adapter(length))
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            parameter.requires_grad_(True)
    return peftkern.patch(model)


def largest_difference(model: Any, ids: torch.Tensor, names: list[str]) -> float:
    """The largest difference of a logit in the mixed batch from runs of one adapter each."""
    with torch.no_grad():
        mixed = model.eval()(input_ids=ids, adapter_names=names).logits[:, -SEQ:]
        worst = 0.0
        for name in sorted(set(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            model.set_adapter(name)
            alone = model(input_ids=ids[rows]).logits[:, -SEQ:]
            worst = max(worst, float((mixed[rows] - alone).abs().max()))
    model.set_adapter("default")
    return worst


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; the runs alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train(model: Any, ids: torch.Tensor, **options: Any) -> None:
    """A training step without the optimizer's."""
    model.train()(input_ids=ids, labels=ids, **options).loss.backward()
    model.zero_grad()


def generate(model: Any, ids: torch.Tensor, **options: Any) -> None:
    """A few tokens."""
    model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options
    )


def compare(kind: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for one kind of adapter."""
    model = build(kind)
    ids = torch.randint(3, VOCAB, (batch, SEQ))
    names = [f"a{row % len(LENGTHS)}" for row in range(batch)]
    difference = largest_difference(model, ids, names)
    one, mixed = (model, {}), (model, {"adapter_names": names})
    return measured(f"one {kind} of 8", one, mixed, ids, difference, repeats)


def compare_several(batch: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for three prefixes of a bank on each sample, beside the same three stored as one."""
    torch.manual_seed(0)
    base = small_llama()
    prefixes = [peftkern.PrefixKV(base, SHORT, std=0.5) for _ in LENGTHS]
    triples = [[a, (a + 1) % 8, (a + 3) % 8] for a in range(len(LENGTHS))]
    joined = [join(base, [prefixes[a] for a in triple]) for triple in triples]
    ids = torch.randint(3, VOCAB, (batch, SEQ))
    rows = torch.arange(batch) % len(triples)
    one = peftkern.patch(copy.deepcopy(base), peftkern.PrefixKV.stack(joined), freeze=True), {"prefix_ids": rows}
    triple_ids = torch.tensor(triples)[rows]
    bank = peftkern.PrefixKV.stack(prefixes)
    several = peftkern.patch(copy.deepcopy(base), bank, freeze=True), {"prefix_ids": triple_ids}
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, **options).logits for model, options in (one, several)]
    difference = float((logits[0] - logits[1]).abs().max())
    return measured("three prefixes of 8", one, several, ids, difference, repeats)


def join(base: Any, prefixes: list[peftkern.PrefixKV]) -> peftkern.PrefixKV:
    """Prefixes behind each other, as one."""
    layers = zip(*(prefix.layer_kv() for prefix in prefixes), strict=True)
    kv = [tuple(torch.cat(x, 1).detach() for x in zip(*layer, strict=True)) for layer in layers]
    return peftkern.PrefixKV.from_cache(kv, model_or_config=base)


def measured(
    what: str, one: tuple[Any, dict[str, Any]], mixed: tuple[Any, dict[str, Any]], ids: torch.Tensor,
    difference: float, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the table: two pairs of a model and the arguments of its calls."""
    table = []
    for name, run in (("training step", train), ("generation", generate)):
        calls = {"one": one, "mixed": mixed}
        runs = {kind: partial(run, model, ids, **options) for kind, (model, options) in calls.items()}
        seconds = measure(runs, repeats)
        table.append({
            "samples read": what, "run": name, "batch": ids.shape[0], "tokens": SEQ,
            "threads": torch.get_num_threads(), "one_ms": round(1e3 * seconds["one"], 2),
            "mixed_ms": round(1e3 * seconds["mixed"], 2), "ratio": round(seconds["mixed"] / seconds["one"], 3),
            "largest_difference": f"{difference:.1e}",
        })  # fmt: skip
    return table


def main() -> None:
    """Print the table, and write it to ``results/mixed_adapters.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    kinds = [*CONFIGS, "several"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.batch, options.repeats
    table = []
    for kind in options.kinds:
        table += compare_several(*size) if kind == "several" else compare(kind, *size)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
