# SPDX-License-Identifier: Apache-2.0
"""Text that the rows of a batch share runs once: as in the stock model, which runs it in every row."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern.huggingface import sharing
from peftkern.huggingface.layout import Layout
from peftkern.huggingface.text_cache import TextCache
from tests.huggingface import models
from tests.huggingface.models import FAMILIES
from tests.huggingface.shared_rows import A, B, C, D, E, F, differ, gradients, inputs_of, padded, share_everything

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LLAMA = FAMILIES["llama (GQA)"]
SHAREABLE = [
    name
    for name, family in FAMILIES.items()
    if family.task == "CAUSAL_LM" and name not in ("llama4 (chunks)", "gemma3n (shared KV)")
]
#: Rows of tokens by case, shorter ones padded.
BATCHES = {
    "a group": [A + B, A + C, A + D],
    "a tree": [A + B + C, A + B + D, A + B + E, A + C + D, A + C + E, D + F],
    "two groups": [A + C, A + D, B + F, B + E],
    "equal rows": [A + B, A + B, A + B],
    "a row that begins another": [A, A + B, A + B + C, A + D],
    "nothing in common": [A, B, C + D, F],
    "one row": [A + B],
    "an empty completion": [A + B, A, A + C],
}


@pytest.fixture(autouse=True)
def share_every_row(monkeypatch):
    share_everything(monkeypatch)


def step(model, inputs):
    """(logits at real tokens, loss from them, gradients of all parameters)."""
    model.train()
    model.zero_grad()
    out = model(**inputs)
    real = inputs["attention_mask"].bool()
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(out.logits[real].double(), targets[real])
    loss.backward()
    return out.logits[real].detach(), out.loss.detach(), loss.detach(), gradients(model)


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("name", SHAREABLE)
def test_shared_rows_equal_those_of_the_stock_model(name, case):
    """In fp64: logits, loss and every gradient."""
    family, inputs = FAMILIES[name], inputs_of(BATCHES[case])
    with models.fp64_throughout():
        want = step(models.base_model(family, torch.float64), inputs)
        model = peftkern.patch(models.base_model(family, torch.float64), share="prefixes")
        got = step(model, inputs)
    shares = case not in ("nothing in common", "one row")
    assert (model._peftkern_patch.shared_rows is not None) == shares, peftkern.explain(model)
    for x, y in zip(got, want, strict=True):
        assert differ(x, y) <= 1e-10


@pytest.mark.parametrize("seed", range(40))
def test_random_rows_are_found_again(seed):
    """Every token has its row, every row its ancestors, and no text lies twice unless that saves too little."""
    g = torch.Generator().manual_seed(seed)
    number, length = (int(torch.randint(1, n, (), generator=g)) for n in (12, 9))
    ids = torch.randint(0, 2, (number, length), generator=g)
    lengths = torch.randint(0, length + 1, (number,), generator=g)
    groups = torch.randint(0, 2, (number,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    layout = Layout.of(ids.shape, ids.device, mask=mask)
    texts = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    different = {
        (int(group), *text[: i + 1]) for group, text in zip(groups, texts, strict=True) for i in range(len(text))
    }
    for min_saved in (0, 4):
        shared = sharing.share_rows(layout, ids, groups, min_saved=min_saved)
        if shared is None:
            assert min_saved or len(different) == sum(map(len, texts))
            continue
        assert shared.num_rows == len(different) or (min_saved and shared.num_rows > len(different))
        assert 0 < layout.num_rows - shared.num_rows <= sharing.most_saved(ids, mask)
        offsets, tokens = shared.segments.offsets.tolist(), ids.flatten()[shared.tokens].tolist()
        for i, text in enumerate(texts):
            last = int(shared.segments.last[i])
            chain = shared.segments.chain(last) if last >= 0 else []
            rows = [row for j in chain for row in range(offsets[j], offsets[j + 1])]
            assert [tokens[row] for row in rows] == text
            assert shared.rows[i, : len(text)].tolist() == rows
            assert shared.positions[rows].tolist() == list(range(len(text)))


@pytest.mark.parametrize("name", ["llama4 (chunks)", "bert", "t5"])
def test_a_model_that_cannot_share_is_refused_by_name(name):
    family = FAMILIES[name]
    model = models.base_model(family)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="share: expected None, because"):
        peftkern.patch(model, share="prefixes")
    assert model.__dict__.keys() == before.keys()


def test_options_of_a_prefix_are_refused_without_one():
    with pytest.raises(ValueError, match="expected their defaults, because there is no prefix"):
        peftkern.patch(models.base_model(LLAMA), share="prefixes", freeze=True)


def test_an_unknown_way_to_share_is_refused():
    with pytest.raises(ValueError, match="share: expected None or 'prefixes', got 'rows'"):
        peftkern.patch(models.base_model(LLAMA), share="rows")


def test_a_layout_names_every_token():
    ids, mask = padded(BATCHES["a tree"])
    layout = sharing.share_rows(Layout.of(ids.shape, ids.device, mask=mask), ids)
    assert layout.num_rows == len(A + B + C + D + E) + len(C + D + E) + len(D + F)
    assert torch.equal(ids.flatten()[layout.tokens][layout.rows][mask.bool()], ids[mask.bool()])


GENERATES = ["llama (GQA)", "mistral (window 4)", "gemma2 (softcap)", "gpt-oss (sinks)", "gpt2", "opt"]
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATES)
def test_generation_is_token_identical(name, way):
    """Behind shared prompts of different lengths, and behind each row's own."""
    family = FAMILIES[name]
    rows = [A + B] if way == "lookup" else [A + B, A + B, A + C, D]
    ids, mask = padded(rows, "left")
    options = {"max_new_tokens": 6, "pad_token_id": 0, **({} if "do_sample" in WAYS[way] else {"do_sample": False})}
    tokens = {}
    for shares in (False, True):
        model = models.base_model(family).eval()
        model = peftkern.patch(model, share="prefixes") if shares else model
        torch.manual_seed(0)
        tokens[shares] = model.generate(input_ids=ids, attention_mask=mask, **options, **WAYS[way])
        assert way == "lookup" or not shares or model._peftkern_patch.shared_rows is not None
    assert torch.equal(tokens[True], tokens[False])


@pytest.mark.parametrize("mask", [None, torch.ones(1, len(A + B), dtype=torch.long)])
def test_equal_prompts_are_stored_once(mask):
    """The cache holds the prompt's keys once, and behind them one token a row."""
    model = peftkern.patch(models.base_model(LLAMA).eval(), share="prefixes")
    ids = torch.tensor([A + B])
    output = model.generate(
        ids, attention_mask=mask, num_return_sequences=4, do_sample=True, max_new_tokens=2, min_new_tokens=2,
        pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    cache = output.past_key_values
    assert isinstance(cache, TextCache)
    assert cache._texts[0].bank()[0].shape == (1, 2, len(A + B), 16)
    assert cache.layers[0].keys.shape == (4, 2, 1, 16)
    assert cache.get_seq_length() == len(A + B) + 1


WINDOWS = ["mistral (window 4)", "gemma2 (softcap)", "gpt-oss (sinks)"]


@pytest.mark.parametrize("name", WINDOWS)
def test_padding_before_a_row_leaves_what_it_shares(name):
    """Windows count padding between tokens, and nothing is before the first one."""
    ids, mask = padded([A + B, A + B, A + C, D], "left")
    model = peftkern.patch(models.base_model(FAMILIES[name]).eval(), share="prefixes")
    model(input_ids=ids, attention_mask=mask)
    assert model._peftkern_patch.shared_rows == (ids.numel(), len(A + B) + len(A + C) + len(D))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama (GQA)", *WINDOWS])
@torch.no_grad()
def test_a_padded_batch_continues(name, side):
    """Windows count the padding between a row and what continues it."""
    ids, mask = padded([A + B, A + B, A + C, D], side)
    steps = torch.randint(3, models.VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    logits = {}
    for shares in (False, True):
        model = models.base_model(FAMILIES[name]).eval()
        model = peftkern.patch(model, share="prefixes") if shares else model
        cache, seen, outputs = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values, mask, []
        assert not shares or model._peftkern_patch.shared_rows is not None
        for step in steps.split(1, 1):
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
            outputs.append(model(input_ids=step, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
        logits[shares] = torch.cat(outputs, 1)
    assert models.difference(logits[True], logits[False]) <= models.FP32_TOLERANCE


def test_explain_reports_the_last_call_and_all_calls():
    model = peftkern.patch(models.base_model(FAMILIES["llama (GQA)"]).eval(), share="prefixes")
    assert peftkern.explain(model).endswith("the last call shared none: no call yet")
    shared = padded(BATCHES["a group"])[0]
    model(input_ids=shared)
    usual, rows = model._peftkern_patch.shared_rows
    assert peftkern.explain(model).endswith(f"the last call ran {rows} rows instead of {usual}")
    model(input_ids=shared)
    model(input_ids=padded(BATCHES["nothing in common"])[0])
    assert peftkern.explain(model).endswith(
        f"shared none: its rows share too little text; 2 of 3 calls shared text and saved {2 * (usual - rows)} rows"
    )


def test_explain_names_a_cache_that_has_a_place_for_each_row():
    """Also after a call that has shared text."""
    model = peftkern.patch(models.base_model(FAMILIES["llama (GQA)"]).eval(), share="prefixes")
    ids = padded(BATCHES["equal rows"])[0]
    model(input_ids=ids)
    options = {"cache_implementation": "static", "disable_compile": True}
    model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0, **options)
    assert "shared none: its keys go into a StaticCache" in peftkern.explain(model)
    assert "; 1 of 2 calls shared text" in peftkern.explain(model)


@pytest.mark.parametrize("case", ["a group", "a tree", "an empty completion"])
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_auxiliary_loss_of_experts_counts_every_token(case, return_dict, masked):
    """In fp64: the loss with it, the router logits of tokens, and every gradient."""
    inputs, steps = inputs_of(BATCHES[case]), []
    real = inputs["attention_mask"].flatten().bool()
    if not masked:
        inputs["attention_mask"] = None
        real = torch.ones_like(real)
    with models.fp64_throughout():
        for shares in (False, True):
            model = models.base_model(FAMILIES["gpt-oss (sinks)"], torch.float64, router_aux_loss_coef=10.0)
            model = peftkern.patch(model, share="prefixes") if shares else model
            out = model(**inputs, output_router_logits=True, return_dict=return_dict)
            loss, routers = (out.loss, out.router_logits) if return_dict else (out[0], out[-1])
            loss.backward()
            assert not shares or model._peftkern_patch.shared_rows is not None, peftkern.explain(model)
            steps.append((loss.detach(), torch.stack(routers).detach()[:, real], gradients(model)))
    for want, got in zip(*steps, strict=True):
        assert differ(got, want) <= 1e-10
