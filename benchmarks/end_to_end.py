# SPDX-License-Identifier: Apache-2.0
"""What whole models gain: training steps, the longest sequence before memory runs out, generation behind a prefix.

    python benchmarks/end_to_end.py                      all parts: `step`, `longest` and `generate`
    python benchmarks/end_to_end.py --part generate --models llama-3-8b --layers 1

`smollm2` is SmolLM2-135M (as `peftkern demo` finds it) with its weights. Other models are random ones of the named
sizes, cut to --layers layers and to the same part of their vocabulary, so that layers and logits keep their
proportion. Prefix tuning; what is compared: stock PEFT, `patch` (peftkern.patch without packing), `patch + gc` (with
gradient checkpointing, which PEFT refuses), `patch + packing` (padding left out, what peftkern.patch does by itself).

step      Forward and backward on a full batch and on one whose sequences are --seq / 4 to --seq long. Tokens/s count
          tokens without padding. Loss and prefix gradient of each are first compared with PEFT's, in fp32. Peak
          memory is how far a process grows in a step, in a process of its own.
longest   The longest S of one sample whose step succeeds with --budget MB beside the model, within one part in eight.
generate  Prefill of --prompt tokens and greedy decoding of --tokens, by the same loop over the base model; PEFT's
          cache is the prefix expanded over the batch. The tokens are compared first, in fp32. What needs more than
          --budget-generate MB beside the model is "out of memory". A prompt of one token, as torch's CPU kernels
          copy the last layer's weights once a row where logits of the last of several tokens are asked for.

The providers take turns in one process; medians and (third - first quartile) / median. Writes results/end_to_end.csv,
where rows of parts, models and processors that are not measured stay.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.utils.logging import disable_progress_bar

import peftkern
from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.bench.shapes import MODELS, Model
from peftkern.tools.bench.show import Row, add_options, progress, show, write
from peftkern.tools.demo import assets

RESULTS = Path(__file__).parent / "results" / "end_to_end.csv"
REAL = "smollm2"
TINY = Model("llama", 2, 32, 48, 128, 4, 2, 8)
ARMS = {"PEFT": None, "patch": {"packing": False}, "patch + gc": {"packing": False}, "patch + packing": {}}
PARTS = ("step", "longest", "generate")
COLUMNS = ("part", "model", "layers", "vocab", "data", "arm", "dtype", "threads", "B", "S", "P", "new_tokens",
           "median_s", "spread", "tokens_per_s", "over_peft", "peak_mb", "peak_over_peft", "longest_S", "budget_mb",
           "status", "loss_difference", "gradient_difference")  # fmt: skip


def config_of(name: str, layers: int) -> Any:
    """A ``transformers`` config of the named sizes, cut to ``layers`` layers and that part of the vocabulary."""
    m = TINY if name == "tiny" else MODELS[name]
    layers = min(layers, m.layers)
    vocab = max(64, m.vocab * layers // m.layers)
    if m.family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", vocab_size=vocab, n_embd=m.hidden, n_layer=layers, n_head=m.Hq, n_positions=65536
        )
    sizes: dict[str, Any] = {"head_dim": m.D, "max_position_embeddings": 65536}
    if m.window is not None:
        sizes["sliding_window"] = m.window
    return AutoConfig.for_model(
        m.family, vocab_size=vocab, hidden_size=m.hidden, intermediate_size=m.intermediate,
        num_hidden_layers=layers, num_attention_heads=m.Hq, num_key_value_heads=m.Hkv, **sizes,
    )  # fmt: skip


def load(order: Row, arm: str, dtype: str, prefix: int) -> Any:
    """A model behind a prefix, the same for every arm, in training mode."""
    dtypes = DTYPES | {"fp64": torch.float64}
    if order["path"] is not None:
        base = AutoModelForCausalLM.from_pretrained(order["path"], dtype=dtypes[dtype])
    else:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config_of(order["model"], order["layers"]), dtype=dtypes[dtype])
    model = get_peft_model(base.train(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
    weight = model.prompt_encoder["default"].embedding.weight.data
    weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    options = ARMS[arm]
    if options is not None:
        peftkern.patch(model, **options)
    if arm == "patch + gc":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(vocab: int, size: int, length: int, padded: bool) -> dict[str, Tensor]:
    """Random tokens with a label on each; padded: rows of ``length`` / 4 to ``length``, evenly."""
    ids = torch.randint(0, vocab, (size, length), generator=torch.Generator().manual_seed(0))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    lengths = torch.linspace(max(1, length // 4), length, size).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: Any, batch: dict[str, Tensor]) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.item())


def compare(order: Row, arms: list[str], batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Relative differences to PEFT's loss and prefix gradient, in fp32.

    Raises:
        AssertionError: if a loss differs by more than rounding explains, or a gradient is more than three times as
            far from PEFT's in fp64 as PEFT's in fp32, or as where one rounding of the prefix moves that.
    """

    def run(arm: str, dtype: str, rounding: float = 0.0) -> tuple[float, Tensor]:
        model = load(order, arm, dtype, order["P"])
        weight = model.prompt_encoder["default"].embedding.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        weight.data.mul_(1 + rounding * noise)
        loss = step(model, batch)
        gradient = weight.grad.double()
        del model
        gc.collect()
        return loss, gradient

    true = run("PEFT", "fp64")[1]

    def apart(x: Tensor, y: Tensor) -> float:
        return ((x - y).norm() / true.norm()).item()

    moved = run("PEFT", "fp32", torch.finfo(torch.float32).eps / 2)[1]
    results = {arm: run(arm, "fp32") for arm in arms}
    stock_loss, stock = results["PEFT"]
    allowed = 3 * max(apart(stock, true), apart(moved, true))
    differences = {}
    for arm, (loss, gradient) in results.items():
        off, error = abs(loss - stock_loss) / abs(stock_loss), apart(gradient, true)
        who = f"{order['model']}, {arm}"
        assert off < 1e-5, f"{who}: losses differ by {off:.1e} of {stock_loss:.2f}"
        assert error <= allowed, f"{who}: prefix gradients err by {error:.1e}, allowed {allowed:.1e}"
        differences[arm] = off, apart(gradient, stock)
    return differences


def ask(order: Row) -> Any:
    """The answer of :func:`serve` in a process of its own."""
    return memory.in_own_process([__file__, "--serve"], order)


def serve(order: Row) -> Any:
    """Bytes of a second step's peak, the longest S that the budget allows, or whether it allows to generate."""
    torch.set_num_threads(order["threads"])
    model = load(order, order["arm"], order["dtype"], order["P"])
    vocab = model.get_base_model().config.vocab_size
    if order["part"] == "step":
        batch = make_batch(vocab, order["B"], order["S"], order["data"] == "padded")
        step(model, batch)
        return memory.peak_bytes(lambda: step(model, batch))
    if order["part"] == "generate":
        model.eval()
        generate(model, prompt_of(order)[:1], order["P"], 1)  # what the first call allocates for good
        return fits(order["budget_mb"], lambda: generate(model, prompt_of(order), order["P"], order["new_tokens"]))
    step(model, make_batch(vocab, 1, 16, False))

    def length_fits(length: int) -> bool:
        batch = make_batch(vocab, 1, length, False)
        return fits(order["budget_mb"], lambda: step(model, batch))

    return longest(length_fits, order["least"], order["most"])


def fits(budget_mb: int, call: Callable[[], object]) -> bool:
    """Whether a call does with that much memory beside what the process holds."""
    gc.collect()
    try:
        with memory.limited(budget_mb * 1_000_000):
            call()
    except memory.ALLOCATION_ERRORS as error:
        if not memory.is_out_of_memory(error):
            raise
        return False
    return True


def longest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest length that fits, to one part in eight; 0 if ``least`` does not, ``most`` if that does."""
    if not fits(least):
        return 0
    good, bad = least, 2 * least
    while fits(bad):
        if bad >= most:
            return most
        good, bad = bad, min(2 * bad, most)
    while bad - good > good // 8:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def measure_step(order: Row, seconds: float, with_memory: bool) -> list[Row]:
    """A row per arm."""
    torch.set_num_threads(order["threads"])
    padded = order["data"] == "padded"
    arms = [arm for arm in ARMS if padded or arm != "patch + packing"]
    batch = make_batch(order["vocab"], order["B"], order["S"], padded)
    differences = compare(order, arms, batch)
    models = {arm: load(order, arm, order["dtype"], order["P"]) for arm in arms}
    steps: dict[str, Callable[[], object]] = {arm: functools.partial(step, m, batch) for arm, m in models.items()}
    times = take_turns(steps, seconds, at_least=3)
    del models, steps
    gc.collect()
    tokens = int((batch["labels"] != -100).sum())
    rows = []
    for arm in arms:
        peak = ask(order | {"arm": arm}) if with_memory else None
        rows.append(
            {"arm": arm, "median_s": times[arm].median, "spread": times[arm].spread, "status": "ok",
             "tokens_per_s": tokens / times[arm].median, "over_peft": times["PEFT"].median / times[arm].median,
             "peak_mb": peak and peak / 1e6, "loss_difference": differences[arm][0],
             "gradient_difference": differences[arm][1]}
        )  # fmt: skip
        if peak and rows[0]["peak_mb"]:
            rows[-1]["peak_over_peft"] = rows[0]["peak_mb"] / rows[-1]["peak_mb"]
    return [_row(order, row) for row in rows]


def measure_longest(order: Row) -> list[Row]:
    """A row per arm that a batch without padding has."""
    rows = [{"arm": arm, "longest_S": ask(order | {"arm": arm})} for arm in ("PEFT", "patch", "patch + gc")]
    for row in rows:
        row |= {"status": "the longest tried" if row["longest_S"] == order["most"] else "ok"}
        row |= {} if row["longest_S"] else {"status": "out of memory"}
        if row["status"] == rows[0]["status"] == "ok":
            row["over_peft"] = row["longest_S"] / rows[0]["longest_S"]
    return [_row(order, row) for row in rows]


def generate(model: Any, ids: Tensor, prefix: int, new_tokens: int) -> Tensor:
    """Greedy tokens [B, new_tokens], by the base model on the cache that ``get_prompt`` makes."""
    base, cache, tokens = model.get_base_model(), model.get_prompt(batch_size=ids.shape[0]), []
    mask = torch.ones(ids.shape[0], prefix + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        for _ in range(new_tokens):
            output = base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
            mask = torch.cat([mask, mask.new_ones(ids.shape[0], 1)], 1)
    return torch.cat(tokens, 1)


def prompt_of(order: Row) -> Tensor:
    """Random tokens [B, S]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, order["vocab"], (order["B"], order["S"]), generator=generator)


def measure_generate(order: Row, seconds: float) -> list[Row]:
    """A row per arm. What fits is asked of processes of their own: a limit leaves traces in what torch keeps."""
    torch.set_num_threads(order["threads"])
    ids, arms = prompt_of(order), ("PEFT", "patch")

    def calls(dtype: str, ids: Tensor, arms: Iterable[str]) -> dict[str, Callable[[], Any]]:
        models = {arm: load(order, arm, dtype, order["P"]).eval() for arm in arms}
        return {
            arm: functools.partial(generate, model, ids, order["P"], order["new_tokens"])
            for arm, model in models.items()
        }

    few = calls("fp32", ids[:2], arms)
    stock, ours = (few[arm]() for arm in arms)
    assert torch.equal(stock, ours), f"{order['model']}: generated tokens differ from PEFT's"
    del few
    gc.collect()
    fitting = [arm for arm in arms if ask(order | {"arm": arm})]
    times = take_turns(calls(order["dtype"], ids, fitting), seconds, at_least=3)
    rows = []
    for arm in arms:
        row: Row = {"arm": arm, "status": "ok" if arm in times else "out of memory"}
        if arm in times:
            row |= {"median_s": times[arm].median, "spread": times[arm].spread,
                    "tokens_per_s": order["B"] * order["new_tokens"] / times[arm].median}  # fmt: skip
            row |= {"over_peft": times["PEFT"].median / times[arm].median} if "PEFT" in times else {}
        rows.append(_row(order, row))
    return rows


def _row(order: Row, measured: Row) -> Row:
    row = order | measured
    return {name: row.get(name) for name in COLUMNS} | stamp()


def tasks_of(options: argparse.Namespace, path: str | None) -> list[tuple[str, Callable[[], list[Row]]]]:
    """(description, measurement) of all that was asked for."""
    tasks: list[tuple[str, Callable[[], list[Row]]]] = []
    for threads in options.threads:
        for dtype in options.dtypes or ["bf16"]:
            for model in options.models:
                real = path if model == REAL else None
                config = AutoConfig.from_pretrained(real) if real else config_of(model, options.layers)
                order: Row = {"model": model, "path": real, "layers": config.num_hidden_layers, "dtype": dtype,
                              "vocab": config.vocab_size, "threads": threads, "P": options.prefix}  # fmt: skip
                about = f"{model}, {dtype}, threads={threads}"
                if "step" in options.part:
                    for data in ("full", "padded"):
                        one = order | {"part": "step", "B": options.batch, "S": options.seq, "data": data}
                        call = functools.partial(measure_step, one, options.seconds, options.memory)
                        tasks.append((f"step, {data} batch, {about}", call))
                if "longest" in options.part and (model == REAL or options.quick):
                    one = order | {"part": "longest", "B": 1, "data": "full", "budget_mb": options.budget,
                                   "least": options.shortest, "most": options.longest}  # fmt: skip
                    tasks.append((f"longest, {about}", functools.partial(measure_longest, one)))
                for B, P in options.generate if "generate" in options.part else ():
                    one = order | {"part": "generate", "B": B, "S": options.prompt, "P": P, "data": "full",
                                   "new_tokens": options.tokens, "budget_mb": options.budget_generate}  # fmt: skip
                    call = functools.partial(measure_generate, one, options.seconds)
                    tasks.append((f"generate B={B} P={P}, {about}", call))
    return tasks


def kept(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of a file that are about other parts, models, dtypes, threads or processors than ``rows``."""
    if not path.exists():
        return []
    keys = ("part", "model", "dtype", "threads", "cpu")
    measured = {tuple(str(row[name]) for name in keys) for row in rows}
    there = pd.read_csv(path, keep_default_na=False).to_dict("records")
    return [row for row in there if tuple(str(row[name]) for name in keys) not in measured]


def show_rows(rows: list[Row]) -> None:
    """A table per part."""

    def text(value: Any, form: str = ".3g") -> str:
        return "-" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)

    parts = {
        "step": ("model", "layers", "data", "B", "S", "P", "arm", "threads", "median_s", "spread", "tokens_per_s",
                 "over_peft", "peak_mb", "peak_over_peft", "loss_difference", "gradient_difference"),
        "longest": ("model", "layers", "P", "arm", "threads", "budget_mb", "longest_S", "over_peft", "status"),
        "generate": ("model", "layers", "B", "P", "S", "new_tokens", "arm", "threads", "median_s", "spread",
                     "tokens_per_s", "over_peft", "status"),
    }  # fmt: skip
    for part, columns in parts.items():
        if found := [row for row in rows if row["part"] == part]:
            show(part, columns, ([text(row[name]) for name in columns] for row in found))


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, seconds=6.0)
    parser.set_defaults(threads=[torch.get_num_threads()])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=[REAL, *MODELS, "tiny"], default=[REAL, "llama-3.2-1b"])
    parser.add_argument("--layers", type=int, default=2, help="of a random model (default %(default)s)")
    parser.add_argument("--model", help="folder or hub name of the real model; default SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, help="where the converted model is kept")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (default %(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample (default %(default)s)")
    parser.add_argument("--prefix", type=int, default=32, help="of steps and longest (default %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peaks of steps")
    parser.add_argument("--budget", type=int, default=2000, help="MB, longest (default %(default)s)")
    parser.add_argument("--shortest", type=int, default=256, help="S that longest begins with (default %(default)s)")
    parser.add_argument("--longest", type=int, default=8192, help="S that it ends with (default %(default)s)")
    parser.add_argument("--budget-generate", type=int, default=6000, help="MB, generate (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=1, help="tokens before generated ones (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="to generate (default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128], help="generate (default %(default)s)")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 1024, 8192], help="generate")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's and transformers' names of arguments
    if options.serve:
        memory.return_freed_memory()
        print(json.dumps(serve(json.load(sys.stdin))))
        return
    if options.quick:
        small = {"models": ["tiny"], "seq": 24, "prefix": 5, "seconds": 0.0, "budget": 16, "shortest": 64,
                 "longest": 2048, "budget_generate": 500, "prompt": 5, "tokens": 3, "batches": [1, 3],
                 "prefixes": [4, 40]}  # fmt: skip
        vars(options).update(small)
    options.generate = [(B, P) for P in options.prefixes for B in options.batches]
    path = None
    if REAL in options.models:
        path = assets.find_model(options.model, assets.cache_folder(options.cache)).path
    output = options.output or (None if options.quick else RESULTS)
    rows: list[Row] = []
    try:
        for row in progress(tasks_of(options, path)):
            rows.append(row)
            if output:
                write(kept(output, rows) + rows, output)
    except KeyboardInterrupt:
        print("stopped: what was measured is kept", file=sys.stderr)
    finally:
        show_rows(rows)


if __name__ == "__main__":
    main()
