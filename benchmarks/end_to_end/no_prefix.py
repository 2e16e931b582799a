# SPDX-License-Identifier: Apache-2.0
"""Training steps of stock PEFT, PEFT + peftkern, and the frozen model without a prefix.

SmolLM2-135M (as `peftkern demo` finds it) on random tokens with a label on each. Forward and backward, no optimizer
step. "no prefix" is the frozen model with a gradient down to its embeddings, by stock SDPA: the cost of a step whose
prefix is free. Loss and prefix gradient of the two models with a prefix are first compared in fp32. Writes
results/training_step.csv and compares it with the project's bars (`python -m benchmarks.bars`).
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.demo import assets

from .. import bars
from ..common import Row, add_model_options, add_options, output_of, progress, show, write
from .models import prefix_of, step

KEYS = {"peftkern": "peftkern", "PEFT": "peft", "no prefix": "no_prefix"}  # column prefixes of the providers


def load(path: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model in a folder, or without one a tiny model; in training mode."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def make_models(path: str | None, dtype: torch.dtype, prefix_len: int) -> dict[str, torch.nn.Module]:
    """A model per provider; both prefixes are equal."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix_len)
    stock, ours = (get_peft_model(load(path, dtype), config) for _ in range(2))
    prefix_of(ours).data.copy_(prefix_of(stock).data.normal_(std=0.3))
    peftkern.patch(ours)
    bare = load(path, dtype).requires_grad_(False)
    bare.enable_input_require_grads()
    return {"peftkern": ours, "PEFT": stock, "no prefix": bare}


def check(path: str | None, prefix_len: int, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Relative differences of loss and prefix gradient (by its norm) to PEFT's, in fp32.

    In half precision a whole model's gradient proves nothing: PEFT's own can differ from fp32's by its full size.

    Raises:
        AssertionError: if a difference is larger than fp32 rounding in a model explains.
    """
    models = make_models(path, torch.float32, prefix_len)
    losses, gradients = [], []
    for name in ("peftkern", "PEFT"):
        losses.append(step(models[name], batch))
        gradients.append(prefix_of(models[name]).grad.double())
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    length = batch["input_ids"].shape[1]
    assert loss < 1e-5, f"S={length}: losses differ by {loss:.1e} of {losses[1]:.2f}"
    assert gradient < 1e-3, f"S={length}: prefix gradients differ by {gradient:.1e}"
    return loss, gradient


def measure(path: str | None, dtype: str, length: int, options: argparse.Namespace, seconds: float) -> list[Row]:
    """A row per number of threads."""
    torch.manual_seed(0)
    ids = torch.randint(0, 60 if path is None else 40_000, (options.batch, length))
    batch = {"input_ids": ids, "labels": ids}
    loss, gradient = check(path, options.prefix, batch)
    models = make_models(path, DTYPES[dtype], options.prefix)
    calls: dict[str, Callable[[], object]] = {name: functools.partial(step, m, batch) for name, m in models.items()}
    rows: list[Row] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        times = take_turns(calls, seconds, at_least=5)
        ours = times["peftkern"].median
        row = {"dtype": dtype, "threads": threads, "B": options.batch, "S": length, "P": options.prefix}
        for provider, key in KEYS.items():
            row |= {f"{key}_s": times[provider].median, f"{key}_spread": times[provider].spread}
        row |= {"over_peft": times["PEFT"].median / ours, "over_no_prefix": times["no prefix"].median / ours}
        rows.append(row | {"loss_difference": loss, "gradient_difference": gradient} | stamp())
    del models, calls
    gc.collect()
    return rows


def show_rows(title: str, rows: list[Row]) -> None:
    columns = ("dtype", "thr", "B", "S", "P", "ours s", "PEFT s", "no prefix s", "x PEFT", "x no prefix",
               "loss diff.", "gradient diff.")  # fmt: skip

    def line(r: Row) -> list[str]:
        timings = [f"{r[f'{key}_s']:.3f} ±{r[f'{key}_spread']:.0%}" for key in KEYS.values()]
        return [
            *(str(r[name]) for name in ("dtype", "threads", "B", "S", "P")), *timings, f"{r['over_peft']:.2f}",
            f"{r['over_no_prefix']:.2f}", f"{r['loss_difference']:.1e}", f"{r['gradient_difference']:.1e}",
        ]  # fmt: skip

    show(f"training step, {title}, medians ± spreads", columns, map(line, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_options(parser, seconds=20.0)
    add_model_options(parser)
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 1024, 2048], help="default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="default %(default)s")
    parser.add_argument("--prefix", type=int, default=20, help="default %(default)s")


def run(options: argparse.Namespace) -> None:
    """Check, measure, print, write."""
    if options.quick:
        source, options.seq, seconds = assets.ModelSource("", "a tiny Llama"), [24], 0.0
    else:
        source, seconds = assets.find_model(options.model, assets.cache_folder(options.cache)), options.seconds
    tasks = [
        (f"S={length}, {dtype}", functools.partial(measure, source.path or None, dtype, length, options, seconds))
        for dtype in options.dtypes for length in options.seq
    ]  # fmt: skip
    rows = list(progress(tasks))
    show_rows(source.title, rows)
    if output := output_of(options, "training_step.csv"):
        write(rows, output)
        bars.show(step=output)
