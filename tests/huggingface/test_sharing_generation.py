# SPDX-License-Identifier: Apache-2.0
"""``generate`` and continued caches behind text that rows share, as in the stock model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import peftkern
from peftkern.huggingface.text_cache import TextCache
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, patch_of
from tests.huggingface.shared_rows import A, B, C, D, E, F, padded, share_everything

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

KINDS = ["llama (GQA)", "mistral (window 4)", "gemma3", "opt"]
TREE = [A + B + C, A + B + D, A + C, F + E]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def share_every_row(monkeypatch):
    share_everything(monkeypatch)


def pair(name, **config):
    """The stock model and the patched one."""
    stock, model = (models.base_model(FAMILIES[name], **config).eval() for _ in range(2))
    return stock, peftkern.patch(model, share="prefixes")


def tokens(model, rows, **options):
    ids, mask = padded(rows, "left")
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=mask, **{**GREEDY, **options})


WAYS = {
    "no cache": {"use_cache": False},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "several sequences of each row": {"do_sample": True, "num_return_sequences": 3},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_ways_to_generate(name, way):
    stock, model = pair(name)
    assert torch.equal(tokens(model, TREE, **WAYS[way]), tokens(stock, TREE, **WAYS[way]))
    assert patch_of(model).shared_rows is not None, peftkern.explain(model)


@pytest.mark.parametrize("name", KINDS)
def test_a_long_prompt_exceeds_the_window(name):
    rows = [(A + B + C) * 3 + D, (A + B + C) * 3 + E, (A + B + C) * 2]
    stock, model = pair(name)
    assert torch.equal(tokens(model, rows), tokens(stock, rows))
    assert patch_of(model).shared_rows == (3 * 48, 48 + len(E))  # the third row begins the others


@pytest.mark.parametrize("name", KINDS)
def test_scores_logits_and_hidden_states(name):
    rows = [A + B, A + C + D[:1], A + C + E[:1]]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    stock, model = pair(name)
    want, got = tokens(stock, rows, **options), tokens(model, rows, **options)
    assert patch_of(model).shared_rows is not None
    assert torch.equal(got.sequences, want.sequences)
    for x, y in zip(got.scores, want.scores, strict=True):
        assert models.difference(x, y) <= 1e-5
    for x, y in zip(got.hidden_states, want.hidden_states, strict=True):
        for hidden, wanted in zip(x, y, strict=True):
            assert models.difference(hidden, wanted) <= 1e-5


@pytest.mark.parametrize("options", [{"cache_implementation": "static", "disable_compile": True}, {"num_beams": 1}])
def test_what_cannot_share_runs_as_usual(options):
    """A static cache; attention weights."""
    attentions = {"return_dict_in_generate": True, "output_attentions": True} if "num_beams" in options else {}
    stock, model = pair("llama (GQA)", attn_implementation="eager")
    want, got = tokens(stock, TREE, **options, **attentions), tokens(model, TREE, **options, **attentions)
    assert patch_of(model).shared_rows is None
    assert ("output_attentions" if attentions else "StaticCache") in peftkern.explain(model)
    if attentions:
        for x, y in zip(got.attentions, want.attentions, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        want, got = want.sequences, got.sequences
    assert torch.equal(got, want)


@pytest.mark.parametrize("patched", [False, True], ids=["stock assistant", "patched assistant"])
def test_an_assistant_model(patched):
    stock, model = pair("llama (GQA)")
    assistant = pair("llama (GQA)")[patched]
    want = tokens(stock, [A + B + A], assistant_model=pair("llama (GQA)")[0])
    assert torch.equal(tokens(model, [A + B + A], assistant_model=assistant), want)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_padding_changes_nothing_in_other_rows(name):
    stock, model = pair(name)
    rows = [A + B, A + C + D[:1], []]
    got = tokens(model, rows)
    assert patch_of(model).shared_rows is not None
    assert torch.equal(got[:2], tokens(stock, rows)[:2])


@pytest.mark.parametrize("own_cache", [False, True], ids=["returned cache", "own cache"])
@pytest.mark.parametrize("name", KINDS)
def test_a_chat_goes_on_from_a_cache(name, own_cache):
    """The caller's own cache may be behind the text; ``generate`` then runs what is missing."""
    ids, mask = padded(TREE, "left")
    answers = []
    for model in pair(name):
        given = {"past_key_values": DynamicCache()} if own_cache else {}
        options = {**GREEDY, "return_dict_in_generate": True}
        first = model.generate(input_ids=ids, attention_mask=mask, **given, **options)
        longer = torch.cat([first.sequences, torch.tensor([D]).expand(len(TREE), -1)], 1)
        seen = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
        cache = given.get("past_key_values", first.past_key_values)
        assert cache.get_seq_length() > 0
        answers.append(model.generate(input_ids=longer, attention_mask=seen, past_key_values=cache, **GREEDY))
    assert patch_of(model).shared_rows is not None
    assert torch.equal(*answers)


@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("own_cache", [False, True], ids=["returned cache", "own cache"])
@pytest.mark.parametrize("name", KINDS)
def test_calls_by_hand_go_on_from_a_cache(name, own_cache, side, positions):
    """Three tokens, then one. Windows count padding behind the text, and the caller may look into its own cache."""
    ids, mask = padded(TREE, side)
    more = torch.tensor([D]).expand(len(TREE), -1)
    logits = []
    for model in pair(name):
        cache, seen, found = DynamicCache() if own_cache else None, mask, []
        for tokens in (ids, more, more[:, :1]):
            seen = seen if tokens is ids else torch.nn.functional.pad(seen, (0, tokens.shape[1]), value=1)
            arguments = {"input_ids": tokens, "attention_mask": seen, "past_key_values": cache, "use_cache": True}
            if positions:
                arguments["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            with torch.no_grad():
                output = model(**arguments)
            cache = cache if own_cache else output.past_key_values
            assert cache.get_seq_length() == seen.shape[1]
            found.append(output.logits)
        logits.append(torch.cat(found[1:], 1))
    assert models.difference(*logits[::-1]) <= 1e-5


@pytest.mark.parametrize("name", ["llama (GQA)", "opt"])
def test_operations_on_a_cache(name):
    ids, mask = padded([A + B, A + C + D[:1], A + B], "left")
    logits = []
    for model in pair(name):
        with torch.no_grad():
            cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
            seen = torch.nn.functional.pad(mask, (0, 3), value=1)
            more = torch.tensor([D]).expand(3, -1)
            cache = model(input_ids=more, attention_mask=seen, past_key_values=cache).past_key_values
            cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
            cache.crop(-2)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 5]))
            cache.reorder_cache(torch.tensor([2, 1, 0]))
            seen = seen[:, :-1].repeat_interleave(2, 0)[[0, 3, 5]][[2, 1, 0]]
            logits.append(model(input_ids=more[:, :1], attention_mask=seen, past_key_values=cache).logits)
    assert isinstance(cache, TextCache)
    assert models.difference(*logits[::-1]) <= 1e-5


WAYS_OUT = {
    "tokens of the text are removed": lambda model, cache: cache.crop(-2),
    "the model is unpatched": lambda model, cache: peftkern.unpatch(model),
    "keys are appended outside of the model": lambda model, cache: cache.update(*[torch.zeros(3, 2, 0, 16)] * 2, 0),
}


# transformers does not crop a cache with a window
@pytest.mark.parametrize(
    ("name", "way"),
    [*(("llama (GQA)", way) for way in WAYS_OUT), ("mistral (window 4)", "the model is unpatched")],
)
@torch.no_grad()
def test_the_texts_become_a_stock_cache(name, way):
    """Where something other than our attention reads them."""
    ids, mask = padded([A + B, A + C + D[:1], A + B], "left")
    more, logits = torch.tensor([D[:1]]).expand(3, -1), []
    for shares in (False, True):
        model = models.base_model(FAMILIES[name]).eval()
        model = peftkern.patch(model, share="prefixes") if shares else model
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        assert isinstance(cache, TextCache) == shares
        if shares or way.startswith("tokens"):
            WAYS_OUT[way](model, cache)
        seen = torch.nn.functional.pad(mask[:, : cache.get_seq_length()], (0, 1), value=1)
        logits.append(model(input_ids=more, attention_mask=seen, past_key_values=cache).logits)
    assert models.difference(*logits[::-1]) <= 1e-5


@torch.no_grad()
def test_a_reset_cache_starts_again():
    model = peftkern.patch(models.base_model(FAMILIES["llama (GQA)"]).eval(), share="prefixes")
    ids = torch.tensor([A + B, A + B])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    want = models.base_model(FAMILIES["llama (GQA)"]).eval()(input_ids=ids).logits
    assert models.difference(model(input_ids=ids, past_key_values=cache).logits, want) <= 1e-5


@pytest.mark.parametrize("options", [{"use_cache": False}, {"train": True}])
@torch.no_grad()
def test_a_cache_that_the_caller_brings_is_filled(options):
    """As stock models do, which do not ask whether a cache is wanted."""
    model = peftkern.patch(models.base_model(FAMILIES["llama (GQA)"]), share="prefixes")
    model.train(options.pop("train", False))
    cache = DynamicCache()
    model(input_ids=torch.tensor([A + B, A + B]), past_key_values=cache, **options)
    assert cache.get_seq_length() == len(A + B)
