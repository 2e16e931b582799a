# SPDX-License-Identifier: Apache-2.0
"""Time `peftkern.patch`, and the shares of its survey and its trial.

    python -m benchmarks.patch_time --threads 2

PEFT models with a prefix and with a prompt, of SmolLM2-135M's shape with random weights. "first" is the first patch
of that model; the other times are medians of later pairs of patch and unpatch. The survey finds the
attention modules by running the model; the trial compares the patched model with the stock one on a few tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, logging

import peftkern
from peftkern.huggingface import model_patch, packer, trial
from peftkern.tools.bench.providers import DTYPES

from .common import Row, progress, show
from .end_to_end.models import SMOLLM2_TITLE, TINY_TITLE, smollm2_config

METHODS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
PARTS = ("survey", "trial")
#: (owner, name, part) of the timed functions. None of them calls another one.
TIMED = (
    (model_patch, "survey", "survey"), (trial.Trial, "__init__", "trial"), (trial.Trial, "try_prefix", "trial"),
    (trial.Trial, "try_packed", "trial"), (trial.Trial, "try_prompt", "trial"), (packer, "try_head", "trial"),
)  # fmt: skip


@contextlib.contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Within the block, each function in :data:`TIMED` adds its seconds to its part."""

    def timing(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        return run

    with contextlib.ExitStack() as stack:
        for owner, name, part in TIMED:
            stack.enter_context(mock.patch.object(owner, name, timing(getattr(owner, name), part)))
        yield


def patch_once(model: Any) -> Row:
    """Seconds of one patch and of its parts."""
    spent: dict[str, float] = defaultdict(float)
    with timed(spent):
        start = time.perf_counter()
        peftkern.patch(model, strict=True)
        total = time.perf_counter() - start
    peftkern.unpatch(model)
    return {"patch": total} | {part: spent[part] for part in PARTS}


def measure(method: str, dtype: str, options: argparse.Namespace) -> list[Row]:
    """The row for a method and a dtype."""
    gc.collect()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(smollm2_config(options.quick), dtype=DTYPES[dtype])
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=20))
    first = patch_once(model)["patch"]
    times = [patch_once(model) for _ in range(options.pairs)]
    row: Row = {"method": method, "dtype": dtype, "threads": torch.get_num_threads(), "first_s": first}
    return [row | {f"{name}_s": statistics.median(t[name] for t in times) for name in ("patch", *PARTS)}]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument(
        "--pairs", type=int, default=7, help="pairs of patch and unpatch per row (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers and PEFT
    torch.set_num_threads(options.threads)
    rows = list(progress([
        (f"{method}, {dtype}", functools.partial(measure, method, dtype, options))
        for dtype in options.dtypes for method in METHODS
    ]))  # fmt: skip
    columns = ("method", "dtype", "thr", "first s", "patch s", "survey s", "trial s", "survey", "trial")

    def line(r: Row) -> list[str]:
        seconds = [f"{r[f'{name}_s']:.3f}" for name in ("first", "patch", *PARTS)]
        shares = [f"{r[f'{part}_s'] / r['patch_s']:.0%}" for part in PARTS]
        return [r["method"], r["dtype"], str(r["threads"]), *seconds, *shares]

    title = TINY_TITLE if options.quick else SMOLLM2_TITLE
    show(f"peftkern.patch, {title}, medians of {options.pairs}", columns, map(line, rows))
    return rows


if __name__ == "__main__":
    main()
