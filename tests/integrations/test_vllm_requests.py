# SPDX-License-Identifier: Apache-2.0
"""What the connector does with requests, beside stand-ins for vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from .vllm_connector import LENGTHS, Engine, equal_pairs, params_of, write_prefix
from .vllm_stand_ins import BLOCK, Request


@pytest.mark.parametrize("name", LENGTHS)
def test_a_prefix_is_written_before_the_text(engine, folder, name):
    ids = [7, 8, 9]
    request = engine.add(Request("r", ids, params_of(name)))
    length = LENGTHS[name]
    assert request.prompt_token_ids == request._all_token_ids == [0] * length + ids
    assert request.num_prompt_tokens == length + 3
    assert ids == [7, 8, 9], "the frontend's list stays"
    (table,), failed = engine.schedule(request)
    assert not failed
    assert equal_pairs(engine.read(table, 0, length), write_prefix(folder, name, length, list(LENGTHS).index(name)))
    after = engine.read(table, length, len(table) * BLOCK)
    assert all(x.isnan().all() for pair in after for x in pair), "slots of the text stay"


def test_requests_with_and_without_prefixes_in_one_step(engine, folder):
    requests = [
        engine.add(Request(f"{name}{i}", [3, 4], name and params_of(name)))
        for i in (0, 1)
        for name in ("a", None, "c")
    ]
    assert requests[1].prompt_token_ids == [3, 4]
    assert requests[1].cache_salt is None
    tables, _ = engine.schedule(*requests)
    for table, request in zip(tables, requests, strict=True):
        if request.kv_transfer_params is None:
            assert all(x.isnan().all() for pair in engine.read(table, 0, BLOCK) for x in pair)
        else:
            name = request.request_id[0]
            pairs = write_prefix(folder, name, LENGTHS[name], "abc".index(name))
            assert equal_pairs(engine.read(table, 0, LENGTHS[name]), pairs)


def test_the_longest_prompt_leaves_room_for_one_token(engine):
    request = engine.add(Request("r", [1] * 44, params_of("c")))
    assert len(request.prompt_token_ids) == 63


def test_only_the_tokens_behind_cached_blocks_are_loaded(engine, folder):
    request = engine.add(Request("r", [1], params_of("c")))
    (table,), _ = engine.schedule(request, computed=2 * BLOCK)
    assert equal_pairs(engine.read(table, 2 * BLOCK, 19), write_prefix(folder, "c", 19, 2), start=2 * BLOCK)
    assert all(x.isnan().all() for pair in engine.read(table, 0, 2 * BLOCK) for x in pair)
    assert engine.scheduler.get_num_new_matched_tokens(request, 3 * BLOCK) == (0, False)


def test_a_preempted_request_gets_the_same_prefix_again(engine, folder):
    request = engine.add(Request("r", [1, 2], params_of("c")))
    engine.schedule(request)
    kept = write_prefix(folder, "c", 19, 2)
    write_prefix(folder, "c", 19, 9)  # replaced while the request runs
    request._all_token_ids += [5] * BLOCK  # it has generated
    (table,), _ = engine.schedule(request)
    assert equal_pairs(engine.read(table, 0, 19), kept)


def test_blocks_are_shared_by_requests_with_one_prefix_only(engine):
    def hashes(*args, **options):
        return engine.add(Request(*args, **options)).block_hashes

    text = list(range(20, 40))
    same = hashes("1", text, params_of("b"))
    assert same == hashes("2", text, params_of("b"))
    assert same[0] == hashes("3", [1], params_of("b"))[0]
    others = [
        hashes("4", text, params_of("c")),
        hashes("5", [0] * 8 + text),
        hashes("6", [0] * 8 + text, cache_salt=engine.scheduler._scheduling.folder.get("b").digest),
        hashes("7", text, params_of("b"), cache_salt="mine"),
    ]
    assert not set(same).intersection(*others)
    assert all(not set(same) & set(other) for other in others)


def test_salts_cannot_be_guessed(monkeypatch, folder):
    salts = {Engine(monkeypatch, folder).add(Request("r", [1], params_of("a"))).cache_salt for _ in range(2)}
    assert len(salts) == 2


def test_a_repetition_penalty_sees_the_text_only(engine):
    params = SimpleNamespace(repetition_penalty=1.2)
    request = engine.add(Request("r", [7, 8], params_of("a"), sampling_params=params))
    assert set(request.prompt_token_ids) == {7, 8}


def test_a_default_prefix_and_requests_without_one(monkeypatch, folder):
    engine = Engine(monkeypatch, folder, extra={"default": "b"})
    assert engine.add(Request("1", [1])).prompt_token_ids == [0] * 8 + [1]
    assert engine.add(Request("2", [1], params_of("a"))).prompt_token_ids == [0] * 5 + [1]
    assert engine.add(Request("3", [1], params_of(None))).prompt_token_ids == [1]


def test_tensors_are_sent_once_and_dropped_when_nobody_needs_them(monkeypatch, folder):
    engine = Engine(monkeypatch, folder, extra={"cache_bytes": 1})
    steps, take = [], engine.scheduler._scheduling.take_step
    engine.scheduler._scheduling.take_step = lambda: steps.append(take()) or steps[-1]
    first, again = (engine.add(Request(str(i), [1], params_of("a"))) for i in range(2))
    engine.schedule(first)
    engine.schedule(again)
    assert [len(step.arrivals) for step in steps] == [1, 0]
    other = engine.add(Request("2", [1], params_of("b")))
    engine.schedule(other)
    assert not steps[-1].drops, "requests with the first prefix are running"
    assert len(engine.workers[0]._writing.prefixes) == 2
    for request in (first, again):
        engine.scheduler.request_finished(request, [])
    engine.schedule()
    assert len(steps[-1].drops) == len(engine.workers[0]._writing.prefixes) == 1
    engine.schedule(engine.add(Request("3", [1], params_of("a"))))
    assert len(steps[-1].arrivals) == 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_writes_its_heads(monkeypatch, folder, ranks):
    engine = Engine(monkeypatch, folder, ranks)
    (table,), _ = engine.schedule(engine.add(Request("r", [1], params_of("c"))))
    pairs = write_prefix(folder, "c", 19, 2)
    heads = {1: [slice(0, 2)], 2: [slice(0, 1), slice(1, 2)], 4: [slice(0, 1)] * 2 + [slice(1, 2)] * 2}[ranks]
    for rank, own in enumerate(heads):
        assert equal_pairs(engine.read(table, 0, 19, rank), [tuple(x[:, own] for x in pair) for pair in pairs])
