# SPDX-License-Identifier: Apache-2.0
"""One training step of a real model: stock PEFT, PEFT + peftkern, and the frozen model without a prefix.

    python benchmarks/training_step.py                 S = 512, 1024, 2048 with P = 20, bf16, one thread and all

SmolLM2-135M (as `peftkern demo` finds it) on random tokens, a loss on every position. Forward and backward, no
optimizer step. "no prefix" is the frozen model with a gradient down to its embeddings, by stock SDPA: what the same
step would cost if the prefix cost nothing but that. The three take turns in one process. Loss and prefix gradient of
the two that have a prefix are compared first, in fp32. Medians; a spread is (third - first quartile) / median. Writes
results/training_step.csv and says how the figures stand to the bars that the project has set itself.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from pathlib import Path

import report
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

import peftkern
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.bench.show import add_options, progress, show, write
from peftkern.tools.demo import assets

KEYS = {"peftkern": "peftkern", "PEFT": "peft", "no prefix": "no_prefix"}  # a provider's name in columns


def load(path: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder, or a tiny one, in training mode."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def make_models(path: str | None, dtype: torch.dtype, prefix_len: int) -> dict[str, torch.nn.Module]:
    """A model per provider, the two prefixes equal."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix_len)
    stock, ours = (get_peft_model(load(path, dtype), config) for _ in range(2))
    weight = stock.prompt_encoder["default"].embedding.weight.data.normal_(std=0.3)
    ours.prompt_encoder["default"].embedding.weight.data.copy_(weight)
    peftkern.patch(ours)
    bare = load(path, dtype).requires_grad_(False)
    bare.enable_input_require_grads()
    return {"peftkern": ours, "PEFT": stock, "no prefix": bare}


def step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def check(path: str | None, prefix_len: int, ids: torch.Tensor) -> tuple[float, float]:
    """Relative differences of ours to PEFT's in fp32: of the loss, and of the prefix's gradient by its norm.

    In half precision a whole model's gradient is no test: PEFT's own may be as far from fp32's as that is large.

    Raises:
        AssertionError: if they are more than the rounding of fp32 through a model explains.
    """
    models = make_models(path, torch.float32, prefix_len)
    losses, gradients = [], []
    for name in ("peftkern", "PEFT"):
        losses.append(step(models[name], ids))
        gradients.append(models[name].prompt_encoder["default"].embedding.weight.grad.double())
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    assert loss < 1e-5, f"S={ids.shape[1]}: losses differ by {loss:.1e} of {losses[1]:.2f}"
    assert gradient < 1e-3, f"S={ids.shape[1]}: prefix gradients differ by {gradient:.1e}"
    return loss, gradient


def measure(
    path: str | None, dtype: str, length: int, options: argparse.Namespace, seconds: float
) -> list[dict[str, object]]:
    """A row per number of threads."""
    torch.manual_seed(0)
    ids = torch.randint(0, 60 if path is None else 40_000, (options.batch, length))
    loss, gradient = check(path, options.prefix, ids)
    models = make_models(path, DTYPES[dtype], options.prefix)
    calls: dict[str, Callable[[], object]] = {name: functools.partial(step, m, ids) for name, m in models.items()}
    rows: list[dict[str, object]] = []
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


def show_rows(title: str, rows: list[dict]) -> None:
    columns = ("dtype", "thr", "B", "S", "P", "ours s", "PEFT s", "no prefix s", "x PEFT", "x no prefix",
               "loss diff.", "gradient diff.")  # fmt: skip

    def line(r: dict) -> list[str]:
        timings = [f"{r[f'{key}_s']:.3f} ±{r[f'{key}_spread']:.0%}" for key in KEYS.values()]
        return [
            *(str(r[name]) for name in ("dtype", "threads", "B", "S", "P")), *timings, f"{r['over_peft']:.2f}",
            f"{r['over_no_prefix']:.2f}", f"{r['loss_difference']:.1e}", f"{r['gradient_difference']:.1e}",
        ]  # fmt: skip

    show(f"training step, {title}, medians ± spreads", columns, map(line, rows))


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=20.0)
    parser.add_argument("--model", help="folder or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="where the converted model is kept")
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefix", type=int, default=20)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if options.quick:
        source, options.seq, seconds = assets.ModelSource("", "a tiny Llama"), [24], 0.0
    else:
        source, seconds = assets.find_model(options.model, assets.cache_folder(options.cache)), options.seconds
    tasks = [
        (f"S={length}, {dtype}", functools.partial(measure, source.path or None, dtype, length, options, seconds))
        for dtype in options.dtypes or ["bf16"] for length in options.seq
    ]  # fmt: skip
    rows = list(progress(tasks))
    show_rows(source.title, rows)
    output = options.output or (None if options.quick else report.RESULTS / "training_step.csv")
    if output:
        write(rows, output)
        report.show(step=output)


if __name__ == "__main__":
    main()
