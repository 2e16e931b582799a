# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's environment: serve the cases of a folder, and print what came as one JSON line.

``python vllm_worker.py MODEL FOLDER EXPERIMENT``
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm import LLM, SamplingParams

from peftkern.integrations.vllm import prefix_params

TOKENS = 64


def engine(model: str, folder: Path, extra: dict[str, Any] | None = None, **options: Any) -> LLM:
    """A vLLM engine in this process that serves the prefixes of a folder."""
    settings = {"folder": str(folder / "prefixes"), **(extra or {})}
    return LLM(
        model, dtype="float32", max_model_len=512, enforce_eager=True, enable_prompt_embeds=True, seed=0,
        kv_transfer_config={
            "kv_connector": "PrefixConnector", "kv_connector_module_path": "peftkern.integrations.vllm",
            "kv_role": "kv_consumer", "kv_connector_extra_config": settings,
        }, **options,
    )  # fmt: skip


def prompt_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The prompt of a case."""
    if case["kind"] == "prompt":
        return {"prompt_embeds": torch.load(folder / case["embeds"], weights_only=True)}
    return {"prompt_token_ids": case["ids"]}


def params_of(case: dict[str, Any], **options: Any) -> SamplingParams:
    """Greedy, 64 tokens, with the prefix of a case."""
    name = case["kind"] if case["kind"] not in ("plain", "prompt") else None
    options = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, **options}
    return SamplingParams(**options, extra_args=prefix_params(name) if name else None)


def run(llm: LLM, cases: list[dict[str, Any]], folder: Path, **options: Any) -> list[int]:
    """Indices of the cases, served in one batch, whose tokens differ from those expected."""
    outputs = llm.generate(
        [prompt_of(case, folder) for case in cases], [params_of(case, **options) for case in cases], use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return [i for i, case in enumerate(cases) if tokens[i] != case["expected"][: len(tokens[i])] or not tokens[i]]


def equal(model: str, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """One at a time, all in one batch, and again with everything in the prefix cache."""
    llm = engine(model, folder)
    firsts = {case["kind"]: index for index, case in reversed(list(enumerate(cases)))}
    single = {kind: not run(llm, [cases[index]], folder) for kind, index in firsts.items()}
    return {"single": single, "mixed": run(llm, cases, folder), "again": run(llm, cases, folder)}


def tight(model: str, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Small blocks, too few of them, prefill in chunks, and room for one prefix only."""
    llm = engine(
        model, folder, {"cache_bytes": 1}, block_size=32, num_gpu_blocks_override=36, max_num_batched_tokens=64,
        max_num_seqs=32, enable_prefix_caching=True,
    )  # fmt: skip
    preempted = _count_preemptions(llm)
    result: dict[str, Any] = {"mixed": run(llm, cases, folder), "preempted": len(preempted)}
    result["placeholders"] = _placeholders(llm, cases, folder)
    result["hot"] = _hot(llm, cases, folder)
    result["refused"] = _refused(llm, cases, folder)
    scheduling = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduling
    result["unfinished"] = len(scheduling.requests)
    return result


def _count_preemptions(llm: LLM) -> list[str]:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []

    def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counting
    return preempted


def _placeholders(llm: LLM, cases: list[dict[str, Any]], folder: Path) -> list[int]:
    """Text that looks like placeholders and claims their salt never shares a block with a prefix."""
    block = next(case for case in cases if case["kind"] == "block")
    text = {"prompt_token_ids": [0] * 128 + block["ids"]}
    plain = params_of({"kind": "plain"}, max_tokens=4)
    before = llm.generate([text], [plain], use_tqdm=False)[0].outputs[0].token_ids
    wrong = run(llm, [block], folder)
    after = llm.generate([text], [plain], use_tqdm=False)[0].outputs[0].token_ids
    return wrong + ([] if list(before) == list(after) != block["expected"][:4] else [-1])


def _hot(llm: LLM, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A file that is added, replaced and removed while the engine runs."""
    path = folder / "prefixes" / "hot.safetensors"
    found: dict[str, Any] = {}
    for name in ("short", "longer"):
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes((folder / "prefixes" / f"{name}.safetensors").read_bytes())
        temporary.rename(path)
        case = next(case for case in cases if case["kind"] == name)
        found[name] = not run(llm, [{**case, "kind": "hot"}], folder)
    path.unlink()
    output = llm.generate([prompt_of(case, folder)], [params_of({"kind": "hot"})], use_tqdm=False)[0]
    return {**found, "removed": output.outputs[0].finish_reason}


def _refused(llm: LLM, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Requests that cannot be served right, beside one that can."""
    good = next(case for case in cases if case["kind"] == "cartridge")
    ids, embeds = {"prompt_token_ids": good["ids"]}, next(case for case in cases if case["kind"] == "prompt")
    bad = {
        "unknown": (ids, params_of({"kind": "nobody"})),
        "path": (ids, params_of({"kind": "../prefixes/short"})),
        "foreign": (ids, params_of({"kind": "foreign"})),
        "damaged": (ids, params_of({"kind": "damaged"})),
        "logprobs": (ids, params_of({"kind": "short"}, prompt_logprobs=1)),
        "long": ({"prompt_token_ids": [7] * 212}, params_of({"kind": "cartridge"})),
        "embeds": (prompt_of(embeds, folder), params_of({"kind": "short"})),
        "key": (ids, SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"prefx": "short"}})),
    }
    longest = {"prompt_token_ids": [7] * 211}, params_of(good)
    prompts, params = [list(x) for x in zip(*bad.values(), longest, (ids, params_of(good)), strict=True)]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    reasons = {name: output.finish_reason for name, output in zip(bad, outputs, strict=False)}
    return {
        "reasons": reasons,
        "longest": len(outputs[-2].token_ids),
        "beside": list(outputs[-1].token_ids) == good["expected"],
    }


def main() -> None:
    """Run one experiment."""
    model, folder, experiment = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    cases = json.loads((folder / "cases.json").read_text())
    print(json.dumps(globals()[experiment](model, folder, cases)))


if __name__ == "__main__":
    main()
