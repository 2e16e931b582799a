# SPDX-License-Identifier: Apache-2.0
"""One training step of a real model: stock PEFT, PEFT + peftkern, and the frozen model without a prefix.

    python benchmarks/training_step.py --seq 512 1024 2048

SmolLM2-135M (as `peftkern demo` finds it) on random tokens, a loss on every position. Forward and backward, no
optimizer step. "no prefix" is the frozen model with a gradient down to its embeddings, by stock SDPA: what the same
step would cost if the prefix cost nothing but that. The three take turns in one process. Medians and quartiles; the
loss of both prefix models is compared first. Writes results/training_step.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
from pathlib import Path

import torch
from cpu_attention import DTYPES, take_turns
from peft import PrefixTuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, logging

import peftkern
from peftkern.demo import assets

RESULTS = Path(__file__).parent / "results" / "training_step.csv"
COLUMNS = ("dtype", "threads", "B", "S", "P", "peft_s", "peftkern_s", "no_prefix_s", "spread", "over_peft",
           "over_no_prefix", "loss_difference")  # fmt: skip


def make_steps(path: str, dtype: torch.dtype, prefix_len: int, ids: torch.Tensor) -> dict:
    """A function per provider that runs one step and returns the loss."""

    def load():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()

    def step(model):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix_len)
    stock, ours = (get_peft_model(load(), config) for _ in range(2))
    weight = stock.prompt_encoder["default"].embedding.weight.data.normal_(std=0.3)
    ours.prompt_encoder["default"].embedding.weight.data.copy_(weight)
    peftkern.patch(ours)
    bare = load().requires_grad_(False)
    bare.enable_input_require_grads()
    return {"PEFT": lambda: step(stock), "peftkern": lambda: step(ours), "no prefix": lambda: step(bare)}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="where the converted model is kept")
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefix", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=20.0, help="per row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    source = assets.find_model(options.model, assets.cache_folder(options.cache))

    rows = []
    for dtype in options.dtypes:
        for length in options.seq:
            torch.manual_seed(0)
            ids = torch.randint(0, 40_000, (options.batch, length))
            steps = make_steps(source.path, DTYPES[dtype], options.prefix, ids)
            stock, ours = steps["PEFT"](), steps["peftkern"]()
            difference = abs(stock - ours) / stock
            allowed = max(1e-5, torch.finfo(DTYPES[dtype]).eps)
            assert difference < allowed, f"S={length} {dtype}: losses differ by {difference:.1e} of {stock:.2f}"
            for threads in options.threads:
                torch.set_num_threads(threads)
                times = take_turns(steps, options.seconds, at_least=5)
                peft, ours, bare = (statistics.median(times[name]) for name in ("PEFT", "peftkern", "no prefix"))
                quartiles = statistics.quantiles(times["peftkern"], n=4)
                rows.append(
                    (dtype, threads, options.batch, length, options.prefix, peft, ours, bare,
                     (quartiles[2] - quartiles[0]) / ours, peft / ours, bare / ours, difference)
                )  # fmt: skip
            del steps
            gc.collect()

    table = Table(title=f"training step, {source.title}", caption=f"torch {torch.__version__}")
    for name in ("dtype", "threads", "B", "S", "P", "PEFT s", "ours s", "no prefix s", "spread", "x PEFT",
                 "x no prefix", "loss difference"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *map(str, row[:5]), *(f"{x:.3f}" for x in row[5:8]), f"{row[8]:.0%}", f"{row[9]:.2f}", f"{row[10]:.2f}",
            f"{row[11]:.1e}",
        )  # fmt: skip
    Console(width=130).print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in rows)


if __name__ == "__main__":
    main()
