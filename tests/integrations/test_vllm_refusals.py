# SPDX-License-Identifier: Apache-2.0
"""Requests that the connector refuses fail alone, and HTTP clients read why."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftkern import PrefixKV, export
from peftkern.integrations.kv_file import KVFile, read_kv, write_kv
from peftkern.integrations.prefix_folder import PrefixFolder
from peftkern.integrations.vllm import prefix_errors, prefix_params

from . import vllm_stand_ins as vllm
from .vllm_connector import equal_pairs, params_of, write_prefix
from .vllm_stand_ins import DIM, HEADS, LAYERS, Request

REFUSED = {
    "unknown": (params_of("nobody"), {}, "prefix 'nobody': expected a file nobody.safetensors"),
    "path": (params_of("../a"), {}, "name: expected at most 200 letters"),
    "endless": (params_of("x" * 300), {}, "name: expected at most 200 letters"),
    "longest": (params_of("x" * 200), {}, "expected a file"),
    "type": ({"prefix": 3}, {}, "kv_transfer_params: expected a prefix's name or None"),
    "key": ({"prefx": "a"}, {}, "kv_transfer_params: expected {'prefix': NAME}"),
    "foreign": (
        params_of("foreign"),
        {},
        "expected keys of the model's 2 layers with a cache, got 3 layers (layer 2",
    ),
    "dims": (params_of("dims"), {}, "expected a layer 0 of Shape(num_kv_heads=2, head_dim=4, value_head_dim=4)"),
    "lengths": (params_of("lengths"), {}, "expected one length for all layers, got [3, 4]"),
    "positions": (params_of("positions"), {}, "as many positions as it has tokens, got 4 tokens and 9 positions"),
    "unshifted": (params_of("unshifted"), {}, "as many positions as it has tokens, got 4 tokens and 0 positions"),
    "damaged": (params_of("damaged"), {}, "expected a safetensors file"),
    "long": (params_of("c"), {"ids": [1] * 45}, "at most 44 behind a prefix of 19 (max_model_len 64), got 45"),
    "logprobs": (params_of("a"), {"skip_reading_prefix_cache": True}, "prompt_logprobs"),
    "embeds": (params_of("a"), {"ids": None, "prompt_embeds": torch.ones(2, 3)}, "got embeddings"),
    "image": (params_of("a"), {"mm_features": ["image"]}, "got images"),
    "stream": (params_of("a"), {"resumable": True}, "a stream of inputs"),
    "pooling": (params_of("a"), {"sampling_params": None}, "one that generates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_served_fails_alone_and_says_why(engine, folder, name, caplog):
    write_prefix(folder, "foreign", 4, layers=3)
    write_prefix(folder, "positions", 4, positions=9)
    prefix = PrefixKV(None, 4, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM)
    export(prefix, folder, "kv", name="unshifted", shift_positions=False)
    key = torch.zeros(4, HEADS, 2 * DIM)
    for other, lengths in (("dims", (4, 4)), ("lengths", (4, 3))):
        pairs = [(key[:length].clone(), key[:length].clone()) for length in lengths]
        write_kv(folder / f"{other}.safetensors", KVFile(pairs, 4))
    (folder / "damaged.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:100])
    params, options, message = REFUSED[name]
    bad = engine.add(Request("bad", **{"ids": [1, 2], "params": params, **options}))
    assert message in caplog.text
    assert "Request bad is refused" in caplog.text
    assert not bad.block_hashes, "a block that no other request can have"
    healthy = engine.add(Request("good", [1, 2], params_of("a")))
    (bad_table, table), failed = engine.schedule(bad, healthy)
    assert failed == {bad_table[0]}
    assert equal_pairs(engine.read(table, 0, 5), write_prefix(folder, "a", 5, 0))
    engine.scheduler.request_finished(bad, bad_table)
    assert list(engine.scheduler._scheduling.requests) == ["good"]


HALF, SINGLE, BYTES = torch.float16, torch.float32, torch.uint8


@pytest.mark.parametrize(
    ("model", "cache", "stored", "number", "fits"),
    [
        (HALF, HALF, SINGLE, 65504, True),
        (HALF, HALF, SINGLE, -65536, False),
        (HALF, HALF, torch.bfloat16, 65536, False),
        (SINGLE, HALF, SINGLE, 1e5, False),
        (HALF, BYTES, SINGLE, 1e5, False),
        (SINGLE, BYTES, SINGLE, 1e5, True),  # vLLM quantises with a scale
        (SINGLE, torch.float8_e4m3fn, SINGLE, 1e5, True),
        (torch.bfloat16, torch.bfloat16, SINGLE, torch.finfo(SINGLE).max, False),
    ],
)
def test_numbers_that_would_become_infinite_are_refused(
    folder, monkeypatch, caplog, model, cache, stored, number, fits
):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    pairs = [tuple(torch.zeros(4, HEADS, DIM, dtype=stored) for _ in range(2)) for _ in range(LAYERS)]
    pairs[-1][1][2, 0, 1] = number
    write_kv(folder / "large.safetensors", KVFile(pairs, 4))
    config, cache_config = vllm.configs(folder)
    config.model_config.dtype = model
    cache_config.kv_cache_groups[0].kv_cache_spec.dtype = cache
    connector = PrefixConnector(config, vllm.Role.SCHEDULER, cache_config)
    requests = [Request(name, [1, 2], params_of(name)) for name in ("large", "a")]
    for request in requests:
        connector.on_new_request(request)
    assert [len(request.prompt_token_ids) for request in requests] == [6 if fits else 2, 7]
    assert ("Request large is refused: prefix 'large': expected numbers up to " in caplog.text) != fits


def _raise(error):
    def raising(*args, **options):
        raise error

    return raising


def test_a_file_system_that_refuses_the_file_refuses_the_request(folder, monkeypatch):
    monkeypatch.setattr(Path, "is_file", _raise(PermissionError(13, "Permission denied")))
    with pytest.raises(
        ValueError, match=r"prefix 'a': expected a readable file a\.safetensors \(Permission denied\)"
    ):
        PrefixFolder(folder, 0).get("a")
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a safetensors file, .*Permission denied"):
        read_kv(folder / "a.safetensors")


@pytest.mark.parametrize("part", ["check_shapes", "put_prefix_before"])
def test_no_fault_of_the_connector_ends_the_engine(engine, monkeypatch, caplog, part):
    scheduling = sys.modules["peftkern.integrations.vllm.scheduling"]
    monkeypatch.setattr(scheduling, part, _raise(KeyError("a fault")))
    bad = engine.add(Request("bad", [1, 2], params_of("a")))
    assert "Request bad is refused" in caplog.text
    assert "Traceback" in caplog.text
    (table,), failed = engine.schedule(bad)
    assert failed == {table[0]}


def _answer(folder, body, **changes):
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=vllm.configs(folder, **changes)[0]))

    async def raw():
        return body if isinstance(body, bytes) else json.dumps(body).encode()

    async def call_next(request):
        return "passed"

    return asyncio.run(prefix_errors(SimpleNamespace(method="POST", app=app, body=raw), call_next))


@pytest.fixture
def starlette(monkeypatch):
    """Answers are (status, message)."""
    responses = SimpleNamespace(JSONResponse=lambda content, status: (status, content["error"]["message"]))
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=responses))
    monkeypatch.setitem(sys.modules, "starlette.responses", responses)


def test_http_clients_read_why_a_prefix_is_unknown(folder, starlette):
    status, message = _answer(folder, {"prompt": "x", **prefix_params("nobody")})
    assert status == 400
    assert message == "prefix 'nobody': expected a file nobody.safetensors in the server's folder, got none"
    status, message = _answer(folder, {"prompt": "x", **prefix_params("x" * 300)})
    assert status == 400
    assert message.startswith("name: expected at most 200 letters")


@pytest.mark.parametrize("config", [None, SimpleNamespace(kv_connector_extra_config={})])
def test_http_clients_read_that_a_server_has_no_prefixes(config, folder, starlette):
    """One without a connector, or with another."""
    status, message = _answer(folder, {"prompt": "x", **prefix_params("a")}, kv_transfer_config=config)
    assert status == 400
    assert message == "kv_transfer_params: expected none, because this server has no prefixes, got 'a'"
    for body in ({"prompt": "x"}, {"prompt": "x", **prefix_params(None)}):
        assert _answer(folder, body, kv_transfer_config=config) == "passed"


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 100_000, [1], {"prompt": "x"}, prefix_params("a"), prefix_params(None)]
)
def test_other_http_requests_pass(folder, body):
    assert _answer(folder, body) == "passed"
