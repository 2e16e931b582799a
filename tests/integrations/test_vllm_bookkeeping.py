# SPDX-License-Identifier: Apache-2.0
"""The connector's bookkeeping, beside stand-ins for vLLM's scheduler and workers."""

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
from peftkern.integrations.vllm.geometry import layers_by_index, rank_heads

from . import vllm_stand_ins as vllm
from .vllm_stand_ins import BLOCK, DIM, HEADS, LAYERS, Request

LENGTHS = {"a": 5, "b": 8, "c": 19}


def _write(folder, name, length, seed=0, layers=LAYERS, **changes):
    generator = torch.Generator().manual_seed(seed)
    pairs = [tuple(torch.randn(length, HEADS, DIM, generator=generator) for _ in range(2)) for _ in range(layers)]
    write_kv(folder / f"{name}.safetensors", KVFile(pairs, **{"positions": length, **changes}))
    return pairs


class Engine:
    """A connector beside a scheduler and one beside each rank's worker."""

    def __init__(self, monkeypatch, folder, ranks=1, extra=None):
        vllm.install(monkeypatch)
        self.scheduler = self._connector(folder, vllm.Role.SCHEDULER, ranks, extra)[0]
        self.workers, self.layers = [], []
        for rank in range(ranks):
            vllm.set_rank(rank)
            worker, config = self._connector(folder, vllm.Role.WORKER, ranks, extra)
            self.workers.append(worker)
            self.layers.append(config.compilation_config.static_forward_context)
            worker.register_kv_caches({})
        self.free = list(range(16))

    @staticmethod
    def _connector(folder, role, ranks, extra):
        from peftkern.integrations.vllm.connector import PrefixConnector

        config, cache = vllm.configs(folder, ranks)
        config.kv_transfer_config.kv_connector_extra_config |= extra or {}
        return PrefixConnector(config, role, cache), config

    def add(self, request):
        self.scheduler.on_new_request(request)
        return request

    def schedule(self, *requests, computed=0):
        """One step: lookup, blocks, plan, work. Returns the blocks of each request, and those that failed."""
        tables = []
        for request in requests:
            loaded, asynchronous = self.scheduler.get_num_new_matched_tokens(request, computed)
            assert not asynchronous
            loaded = 0 if request.skip_reading_prefix_cache else loaded  # as vLLM's scheduler has it
            assert computed + loaded < len(request._all_token_ids) or not loaded
            table = [self.free.pop() for _ in range(-(-len(request._all_token_ids) // BLOCK))]
            self.scheduler.update_state_after_alloc(
                request, SimpleNamespace(get_block_ids=lambda t=table: (t,)), loaded
            )
            tables.append(table)
        metadata = self.scheduler.build_connector_meta(SimpleNamespace())
        failed = set()
        for worker, layers in zip(self.workers, self.layers, strict=True):
            worker.bind_connector_metadata(metadata)
            worker.start_load_kv(SimpleNamespace(no_compile_layers=layers))
            failed |= worker.get_block_ids_with_load_errors()
            assert not worker.get_block_ids_with_load_errors()
        return tables, failed

    def read(self, table, start, stop, rank=0):
        """(key, value) of the tokens in a rank's cache, for each layer; the order of its heads is its own."""
        slots = torch.tensor([table[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)])
        own = [self.layers[rank][name].kv_cache[slots].flip(1) for name in vllm.layer_names()]
        return [(x[..., :DIM], x[..., DIM:]) for x in own]


@pytest.fixture
def folder(tmp_path):
    for seed, (name, length) in enumerate(LENGTHS.items()):
        _write(tmp_path, name, length, seed)
    return tmp_path


@pytest.fixture
def engine(monkeypatch, folder):
    return Engine(monkeypatch, folder)


def _prefix(name):
    return prefix_params(name)["kv_transfer_params"]


def _same(found, pairs, start=0):
    return all(
        torch.equal(x, y[start:])
        for pair, own in zip(found, pairs, strict=True)
        for x, y in zip(pair, own, strict=True)
    )


@pytest.mark.parametrize("name", LENGTHS)
def test_a_prefix_is_written_before_the_text(engine, folder, name):
    ids = [7, 8, 9]
    request = engine.add(Request("r", ids, _prefix(name)))
    length = LENGTHS[name]
    assert request.prompt_token_ids == request._all_token_ids == [0] * length + ids
    assert request.num_prompt_tokens == length + 3
    assert ids == [7, 8, 9], "the frontend's list stays"
    (table,), failed = engine.schedule(request)
    assert not failed
    assert _same(engine.read(table, 0, length), _write(folder, name, length, list(LENGTHS).index(name)))
    after = engine.read(table, length, len(table) * BLOCK)
    assert all(x.isnan().all() for pair in after for x in pair), "slots of the text stay"


def test_requests_with_and_without_prefixes_in_one_step(engine, folder):
    requests = [
        engine.add(Request(f"{name}{i}", [3, 4], name and _prefix(name))) for i in (0, 1) for name in ("a", None, "c")
    ]
    assert requests[1].prompt_token_ids == [3, 4]
    assert requests[1].cache_salt is None
    tables, _ = engine.schedule(*requests)
    for table, request in zip(tables, requests, strict=True):
        if request.kv_transfer_params is None:
            assert all(x.isnan().all() for pair in engine.read(table, 0, BLOCK) for x in pair)
        else:
            name = request.request_id[0]
            assert _same(engine.read(table, 0, LENGTHS[name]), _write(folder, name, LENGTHS[name], "abc".index(name)))


def test_the_longest_prompt_leaves_room_for_one_token(engine):
    request = engine.add(Request("r", [1] * 44, _prefix("c")))
    assert len(request.prompt_token_ids) == 63


def test_only_the_tokens_behind_cached_blocks_are_loaded(engine, folder):
    request = engine.add(Request("r", [1], _prefix("c")))
    (table,), _ = engine.schedule(request, computed=2 * BLOCK)
    assert _same(engine.read(table, 2 * BLOCK, 19), _write(folder, "c", 19, 2), start=2 * BLOCK)
    assert all(x.isnan().all() for pair in engine.read(table, 0, 2 * BLOCK) for x in pair)
    assert engine.scheduler.get_num_new_matched_tokens(request, 3 * BLOCK) == (0, False)


def test_a_preempted_request_gets_the_same_prefix_again(engine, folder):
    request = engine.add(Request("r", [1, 2], _prefix("c")))
    engine.schedule(request)
    kept = _write(folder, "c", 19, 2)
    _write(folder, "c", 19, 9)  # replaced while the request runs
    request._all_token_ids += [5] * BLOCK  # it has generated
    (table,), _ = engine.schedule(request)
    assert _same(engine.read(table, 0, 19), kept)


def test_files_are_added_replaced_and_removed(engine, folder):
    pairs = _write(folder, "new", 6, 5)
    first = engine.add(Request("1", [1], _prefix("new")))
    (table,), _ = engine.schedule(first)
    assert _same(engine.read(table, 0, 6), pairs)
    pairs = _write(folder, "new", 6, 6)
    second = engine.add(Request("2", [1], _prefix("new")))
    assert second.cache_salt != first.cache_salt
    (table,), _ = engine.schedule(second)
    assert _same(engine.read(table, 0, 6), pairs)
    (folder / "new.safetensors").unlink()
    (table,), failed = engine.schedule(engine.add(Request("3", [1], _prefix("new"))))
    assert failed == {table[0]}


def test_blocks_are_shared_by_requests_with_one_prefix_only(engine):
    def hashes(*args, **options):
        return engine.add(Request(*args, **options)).block_hashes

    text = list(range(20, 40))
    same = hashes("1", text, _prefix("b"))
    assert same == hashes("2", text, _prefix("b"))
    assert same[0] == hashes("3", [1], _prefix("b"))[0]
    others = [
        hashes("4", text, _prefix("c")),
        hashes("5", [0] * 8 + text),
        hashes("6", [0] * 8 + text, cache_salt=engine.scheduler._scheduling.folder.get("b").digest),
        hashes("7", text, _prefix("b"), cache_salt="mine"),
    ]
    assert not set(same).intersection(*others)
    assert all(not set(same) & set(other) for other in others)


def test_salts_cannot_be_guessed(monkeypatch, folder):
    salts = {Engine(monkeypatch, folder).add(Request("r", [1], _prefix("a"))).cache_salt for _ in range(2)}
    assert len(salts) == 2


def test_a_repetition_penalty_sees_the_text_only(engine):
    params = SimpleNamespace(repetition_penalty=1.2)
    request = engine.add(Request("r", [7, 8], _prefix("a"), sampling_params=params))
    assert set(request.prompt_token_ids) == {7, 8}


REFUSED = {
    "unknown": (_prefix("nobody"), {}, "prefix 'nobody': expected a file nobody.safetensors"),
    "path": (_prefix("../a"), {}, "name: expected at most 200 letters"),
    "endless": (_prefix("x" * 300), {}, "name: expected at most 200 letters"),
    "longest": (_prefix("x" * 200), {}, "expected a file"),
    "type": ({"prefix": 3}, {}, "kv_transfer_params: expected a prefix's name or None"),
    "key": ({"prefx": "a"}, {}, "kv_transfer_params: expected {'prefix': NAME}"),
    "foreign": (_prefix("foreign"), {}, "expected keys of the model's 2 layers with a cache, got 3 layers (layer 2"),
    "dims": (_prefix("dims"), {}, "expected a layer 0 of Shape(num_kv_heads=2, head_dim=4, value_head_dim=4)"),
    "lengths": (_prefix("lengths"), {}, "expected one length for all layers, got [3, 4]"),
    "positions": (_prefix("positions"), {}, "as many positions as it has tokens, got 4 tokens and 9 positions"),
    "unshifted": (_prefix("unshifted"), {}, "as many positions as it has tokens, got 4 tokens and 0 positions"),
    "damaged": (_prefix("damaged"), {}, "expected a safetensors file"),
    "long": (_prefix("c"), {"ids": [1] * 45}, "at most 44 behind a prefix of 19 (max_model_len 64), got 45"),
    "logprobs": (_prefix("a"), {"skip_reading_prefix_cache": True}, "prompt_logprobs"),
    "embeds": (_prefix("a"), {"ids": None, "prompt_embeds": torch.ones(2, 3)}, "got embeddings"),
    "image": (_prefix("a"), {"mm_features": ["image"]}, "got images"),
    "stream": (_prefix("a"), {"resumable": True}, "a stream of inputs"),
    "pooling": (_prefix("a"), {"sampling_params": None}, "one that generates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_served_fails_alone_and_says_why(engine, folder, name, caplog):
    _write(folder, "foreign", 4, layers=3)
    _write(folder, "positions", 4, positions=9)
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
    healthy = engine.add(Request("good", [1, 2], _prefix("a")))
    (bad_table, table), failed = engine.schedule(bad, healthy)
    assert failed == {bad_table[0]}
    assert _same(engine.read(table, 0, 5), _write(folder, "a", 5, 0))
    engine.scheduler.request_finished(bad, bad_table)
    assert list(engine.scheduler._scheduling.requests) == ["good"]


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
    bad = engine.add(Request("bad", [1, 2], _prefix("a")))
    assert "Request bad is refused" in caplog.text
    assert "Traceback" in caplog.text
    (table,), failed = engine.schedule(bad)
    assert failed == {table[0]}


def test_a_default_prefix_and_requests_without_one(monkeypatch, folder):
    engine = Engine(monkeypatch, folder, extra={"default": "b"})
    assert engine.add(Request("1", [1])).prompt_token_ids == [0] * 8 + [1]
    assert engine.add(Request("2", [1], _prefix("a"))).prompt_token_ids == [0] * 5 + [1]
    assert engine.add(Request("3", [1], _prefix(None))).prompt_token_ids == [1]


def test_tensors_are_sent_once_and_dropped_when_nobody_needs_them(monkeypatch, folder):
    engine = Engine(monkeypatch, folder, extra={"cache_bytes": 1})
    steps, take = [], engine.scheduler._scheduling.take_step
    engine.scheduler._scheduling.take_step = lambda: steps.append(take()) or steps[-1]
    first, again = (engine.add(Request(str(i), [1], _prefix("a"))) for i in range(2))
    engine.schedule(first)
    engine.schedule(again)
    assert [len(step.arrivals) for step in steps] == [1, 0]
    other = engine.add(Request("2", [1], _prefix("b")))
    engine.schedule(other)
    assert not steps[-1].drops, "requests with the first prefix are running"
    assert len(engine.workers[0]._writing.prefixes) == 2
    for request in (first, again):
        engine.scheduler.request_finished(request, [])
    engine.schedule()
    assert len(steps[-1].drops) == len(engine.workers[0]._writing.prefixes) == 1
    engine.schedule(engine.add(Request("3", [1], _prefix("a"))))
    assert len(steps[-1].arrivals) == 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_writes_its_heads(monkeypatch, folder, ranks):
    engine = Engine(monkeypatch, folder, ranks)
    (table,), _ = engine.schedule(engine.add(Request("r", [1], _prefix("c"))))
    pairs = _write(folder, "c", 19, 2)
    heads = {1: [slice(0, 2)], 2: [slice(0, 1), slice(1, 2)], 4: [slice(0, 1)] * 2 + [slice(1, 2)] * 2}[ranks]
    for rank, own in enumerate(heads):
        assert _same(engine.read(table, 0, 19, rank), [tuple(x[:, own] for x in pair) for pair in pairs])


def test_heads_that_ranks_cannot_share():
    assert rank_heads(torch.arange(8).reshape(1, 8, 1), 2, 3, 4).flatten().tolist() == [6, 7]
    for heads, world_size in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match="share evenly"):
            rank_heads(torch.zeros(1, heads, 1), 1, 0, world_size)


def test_layers_are_told_apart_by_one_number():
    with pytest.raises(ValueError, match="one number in their names, got 'attn'"):
        layers_by_index(["attn"])
    with pytest.raises(ValueError, match="one attention layer of each number"):
        layers_by_index(["layers.0.self_attn.attn", "layers.0.cross_attn.attn"])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("kv_transfer_config", {"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy: expected 'fail'"),
        ("kv_transfer_config", {"kv_connector_extra_config": {}}, "expected an existing 'folder'"),
        (
            "kv_transfer_config",
            {"kv_connector_extra_config": {"folder": ".", "cache_bytes": "4GiB"}},
            "cache_bytes: expected an integer of at least 0, got '4GiB'",
        ),
        (
            "kv_transfer_config",
            {"kv_connector_extra_config": {"folder": ".", "cache_bytes": -1}},
            "cache_bytes: .*-1",
        ),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "cache_bytes": True}}, "got True"),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "default": "../a"}}, "default: name: "),
        ("kv_transfer_config", {"kv_connector_extra_config": {"folder": ".", "default": 3}}, "default: name: .*'3'"),
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode_context_parallel_size: expected 1"),
    ],
)
def test_configurations_that_are_refused(monkeypatch, folder, part, change, message):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder)
    vars(getattr(config, part)).update(change)
    with pytest.raises(ValueError, match=message):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)


def test_models_that_are_refused(monkeypatch, folder):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder, speculative_config=SimpleNamespace(method="eagle"))
    with pytest.raises(ValueError, match="speculative_config: expected none or 'ngram'"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)
    config, cache = vllm.configs(folder)
    cache.kv_cache_groups[0].kv_cache_spec = vllm.SlidingWindowSpec()
    with pytest.raises(ValueError, match="ordinary attention, got SlidingWindowSpec"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)
    cache.kv_cache_groups *= 2
    with pytest.raises(ValueError, match="got 2 groups"):
        PrefixConnector(config, vllm.Role.SCHEDULER, cache)


def test_a_version_of_vllm_whose_requests_differ_is_refused(monkeypatch, folder):
    monkeypatch.setattr(Request, "num_tokens", 2)
    with pytest.raises(ValueError, match=r"vllm: expected a version with the requests of 0\.32, got 0\.99"):
        Engine(monkeypatch, folder)


def test_an_attention_backend_that_writes_elsewhere_is_refused(monkeypatch, folder):
    vllm.install(monkeypatch)
    from peftkern.integrations.vllm.connector import PrefixConnector

    config, cache = vllm.configs(folder)
    connector = PrefixConnector(config, vllm.Role.WORKER, cache)
    layer = config.compilation_config.static_forward_context[vllm.layer_names()[1]]
    layer.attn_backend.forward_includes_kv_cache_update = True
    with pytest.raises(ValueError, match=r"attention backend: .* got STAND_IN in model\.layers\.1"):
        connector.register_kv_caches({})


def test_a_folder_keeps_the_prefixes_that_were_used_last(folder):
    size = LAYERS * 2 * HEADS * DIM * 4
    prefixes = PrefixFolder(folder, (5 + 8) * size)
    a, b = prefixes.get("a"), prefixes.get("b")
    assert prefixes.get("a") is a
    c = prefixes.get("c")
    assert prefixes.digests() == {c.digest}, "the newest stays, whatever its size"
    assert prefixes.get("b") is not b
    assert prefixes.get("b").digest == b.digest


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch, times):
    prefix_folder = sys.modules[PrefixFolder.__module__]
    left = list(range(times))

    def read(path):
        contents = read_kv(path)
        if left:
            _write(folder, "a", 6 + left.pop(0), seed=5)  # a rename
        return contents

    monkeypatch.setattr(prefix_folder, "read_kv", read)
    prefixes = PrefixFolder(folder, 0)
    if times < 3:
        assert prefixes.get("a").length == 5 + times
    else:
        with pytest.raises(ValueError, match="expected a file that stays while it is read, got 3 that were replaced"):
            prefixes.get("a")


def _answer(folder, body):
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=vllm.configs(folder)[0]))

    async def raw():
        return body if isinstance(body, bytes) else json.dumps(body).encode()

    async def call_next(request):
        return "passed"

    return asyncio.run(prefix_errors(SimpleNamespace(method="POST", app=app, body=raw), call_next))


def test_http_clients_read_why_a_prefix_is_unknown(folder, monkeypatch):
    starlette = SimpleNamespace(JSONResponse=lambda content, status: (status, content["error"]["message"]))
    monkeypatch.setitem(sys.modules, "starlette", SimpleNamespace(responses=starlette))
    monkeypatch.setitem(sys.modules, "starlette.responses", starlette)
    status, message = _answer(folder, {"prompt": "x", **prefix_params("nobody")})
    assert status == 400
    assert message == "prefix 'nobody': expected a file nobody.safetensors in the server's folder, got none"
    status, message = _answer(folder, {"prompt": "x", **prefix_params("x" * 300)})
    assert status == 400
    assert message.startswith("name: expected at most 200 letters")


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 100_000, [1], {"prompt": "x"}, prefix_params("a"), prefix_params(None)]
)
def test_other_http_requests_pass(folder, body):
    assert _answer(folder, body) == "passed"
