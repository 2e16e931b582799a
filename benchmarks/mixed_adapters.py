# SPDX-License-Identifier: Apache-2.0
"""A batch of several adapters beside a batch of one: time of training steps and of generation.

Both run in one process and alternate; the table has medians. Every row of the mixed batch is also compared with a run
of its adapter alone.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
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
CONFIGS: dict[str, Callable[..., Any]] = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}


def build(kind: str) -> Any:
    """A patched model with an adapter per length, and the adapter ``default`` of their mean length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip

    def adapter(length: int) -> Any:
        return CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=length)

    model: Any = get_peft_model(LlamaForCausalLM(config), adapter(sum(LENGTHS) // len(LENGTHS)))
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


def compare(kind: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table for one kind of adapter."""
    model = build(kind)
    ids = torch.randint(3, VOCAB, (batch, SEQ))
    names = [f"a{row % len(LENGTHS)}" for row in range(batch)]
    difference = largest_difference(model, ids, names)

    def train(**options: Any) -> None:
        model.train()(input_ids=ids, labels=ids, **options).loss.backward()
        model.zero_grad()

    def generate(**options: Any) -> None:
        model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options
        )

    table = []
    for what, run in (("training step", train), ("generation", generate)):
        seconds = measure({"one": run, "mixed": lambda run=run: run(adapter_names=names)}, repeats)
        ratio = round(seconds["mixed"] / seconds["one"], 3)
        row = {"adapters": kind, "run": what, "batch": batch, "number": len(LENGTHS), "tokens": SEQ}
        row |= {"threads": torch.get_num_threads(), "one_ms": round(1e3 * seconds["one"], 2)}
        row |= {
            "mixed_ms": round(1e3 * seconds["mixed"], 2),
            "ratio": ratio,
            "largest_difference": f"{difference:.1e}",
        }
        table.append(row)
    return table


def main() -> None:
    """Print the table, and write it to ``results/mixed_adapters.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [row for kind in options.kinds for row in compare(kind, options.batch, options.repeats)]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
