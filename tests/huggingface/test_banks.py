# SPDX-License-Identifier: Apache-2.0
"""Banks of prefixes: one or several for each sample, in training, evaluation and generation; replacing rows."""

from __future__ import annotations

import pickle

import pytest
import torch

import peftkern
from peftkern import PrefixKV
from peftkern.backends import gather
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, LEFT, RIGHT

NAMES = ["llama (GQA)", "gpt2", "gemma2 (softcap)"]
LENS = (3, 5, 2, 4)
MASKS = {"none": None, "left": LEFT, "right": RIGHT}
#: Prefixes of the samples: one, one or none, and several, of which -1 pads.
IDS_OF = {"one": [2, 0, 1], "one or none": [1, -1, 3], "several": [[0, 2], [3, -1], [1, 0]]}


def prefixes(model):
    return [PrefixKV(model, n, std=0.5) for n in LENS]


def concatenated(model, parts):
    """The prefixes behind each other, as one; None for no prefix."""
    if not parts:
        return None
    pairs = zip(*(part.layer_kv() for part in parts), strict=True)
    layers = [tuple(torch.cat(x, 1) for x in zip(*layer, strict=True)) for layer in pairs]
    return PrefixKV.from_cache([tuple(x.detach() for x in pair) for pair in layers], model_or_config=model)


def own_prefix(model, parts, row):
    ids = [i for i in (row if isinstance(row, list) else [row]) if i >= 0]
    return concatenated(model, [parts[i] for i in ids]), ids


def alone(model, prefix, sample, mask):
    """Logits of one sample's tokens behind its prefix, and the gradients of that prefix for their summed loss."""
    real = torch.ones_like(IDS[sample]).bool() if mask is None else mask[sample].bool()
    ids, arguments = IDS[sample : sample + 1], {"attention_mask": real.long()[None], "use_cache": False}
    if prefix is None:
        return model(input_ids=ids, **arguments).logits[0, real], []
    with peftkern.patched(model, prefix):
        out = model(input_ids=ids, **arguments).logits[0, real]
        loss(out, ids[0, real]).backward()
    return out.detach(), [p.grad for p in prefix.trainable]


def first_projection(model):
    """The first layer that sees every row of the backbone."""
    return next(m for m in model.get_decoder().modules() if type(m).__name__ in ("Linear", "Conv1D"))


def packs(name, mask):
    """Whether padding is left out: not on the left where windows count it."""
    return "gemma2" not in name or mask is RIGHT


def loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", IDS_OF)
@pytest.mark.parametrize("name", NAMES)
def test_each_sample_sees_its_prefixes(name, kind, mask):
    torch.manual_seed(0)
    model = models.base_model(FAMILIES[name]).eval().requires_grad_(False)
    parts, mask = prefixes(model), MASKS[mask]
    bank = PrefixKV.stack(parts)
    want_grad = torch.zeros_like(bank.trainable[0])
    rows = []
    for sample, row in enumerate(IDS_OF[kind]):
        prefix, ids = own_prefix(model, parts, row)
        logits, grads = alone(model, prefix, sample, mask)
        rows.append(logits)
        for i, part in zip(ids, grads[0].split([LENS[i] for i in ids]) if grads else (), strict=True):
            want_grad[i, : LENS[i]] += part
    peftkern.patch(model, bank)
    real = torch.ones_like(IDS) if mask is None else mask
    for training in (False, True):
        model.train(training)
        bank.zero_grad()
        rows_run = []
        watch = first_projection(model).register_forward_pre_hook(
            lambda module, args, seen=rows_run: seen.append(args[0].shape[0])
        )
        labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
        out = model(input_ids=IDS, attention_mask=mask, labels=labels, prefix_ids=torch.tensor(IDS_OF[kind]))
        watch.remove()
        if training:
            assert rows_run == [1 if mask is not None and packs(name, mask) else 3], "rows of the batch that runs"
        for sample, logits in enumerate(rows):
            torch.testing.assert_close(out.logits[sample][real[sample].bool()], logits, rtol=1e-4, atol=1e-5)
        sum(loss(out.logits[i][real[i].bool()], IDS[i][real[i].bool()]) for i in range(len(rows))).backward()
        torch.testing.assert_close(bank.trainable[0].grad, want_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("kind", IDS_OF)
def test_generation_with_beams(kind, num_beams):
    torch.manual_seed(0)
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    parts = prefixes(model)
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    want = []
    for sample, row in enumerate(IDS_OF[kind]):
        prefix, _ = own_prefix(model, parts, row)
        ids = IDS[sample][LEFT[sample].bool()][None]
        if prefix is None:
            want.append(model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, -4:])
        else:
            with peftkern.patched(model, prefix):
                want.append(model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, -4:])
    peftkern.patch(model, PrefixKV.stack(parts))
    got = model.generate(IDS, attention_mask=LEFT, prefix_ids=torch.tensor(IDS_OF[kind]), **arguments)
    assert torch.equal(got[:, -4:], torch.stack(want))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(
        again.generate(IDS, attention_mask=LEFT, prefix_ids=torch.tensor(IDS_OF[kind]), **arguments), got
    )


def test_a_row_is_replaced_between_two_calls():
    torch.manual_seed(0)
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    parts = prefixes(model)
    bank = PrefixKV.stack(parts[:2])
    peftkern.patch(model, bank)
    ids = torch.tensor([0, 1, 0])
    before = model(input_ids=IDS, prefix_ids=ids).logits
    bank.replace(1, parts[2])
    after = model(input_ids=IDS, prefix_ids=ids).logits
    peftkern.unpatch(model)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    with peftkern.patched(model, parts[2]):
        torch.testing.assert_close(after[1:2], model(input_ids=IDS[1:2]).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(bank.select(1).trainable[0], parts[2].trainable[0])


def test_layers_and_steps_share_what_follows_from_the_ids(monkeypatch):
    counted, compute = [], gather._rows
    monkeypatch.setattr(gather, "_rows", lambda *args: counted.append(1) or compute(*args))
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    ids = torch.tensor(IDS_OF["several"])
    with peftkern.patched(model, PrefixKV.stack(prefixes(model))):
        model(input_ids=IDS, prefix_ids=ids, labels=IDS).loss.backward()
        assert len(counted) == 1, "computed again in a layer or in the backward"
        model.generate(input_ids=IDS, prefix_ids=ids, max_new_tokens=4, do_sample=False)
        assert len(counted) == 2, "computed again in a decoding step"
        before = model(input_ids=IDS, prefix_ids=ids).logits
        ids[0] = torch.tensor([3, 1])
        after = model(input_ids=IDS, prefix_ids=ids).logits
        assert not torch.equal(before[0], after[0]), "the caller's ids have changed"
        assert len(counted) == 4


def test_a_cache_repeats_several_ids_per_row():
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    ids = torch.tensor(IDS_OF["several"])
    with torch.no_grad(), peftkern.patched(model, PrefixKV.stack(prefixes(model))):
        cache = model(input_ids=IDS, prefix_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        again, token = ids.repeat_interleave(2, 0), IDS[:, -1:].repeat_interleave(2, 0)
        got = model(input_ids=token, past_key_values=cache).logits
        whole = torch.cat([IDS.repeat_interleave(2, 0), token], 1)
        want = model(input_ids=whole, prefix_ids=again).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "got NoneType"),
        ([0, 1, 0], "got list"),
        (torch.tensor([0, 1]), r"got torch.int64 \[2\]"),
        (torch.tensor([0.0, 1.0, 0.0]), r"got torch.float32 \[3\]"),
        (torch.tensor([0, 4, 1]), "0 to 3, -1 for none, got 0 to 4"),
    ],
)
def test_ids_that_select_nothing(ids, message):
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    peftkern.patch(model, PrefixKV.stack(prefixes(model)))
    with pytest.raises(ValueError, match=rf"prefix_ids: expected the prefix of each sample \[3\], .*{message}"):
        model(input_ids=IDS, prefix_ids=ids)


def test_a_single_prefix_takes_no_ids():
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    peftkern.patch(model, PrefixKV(model, 3))
    with pytest.raises(ValueError, match="prefix_ids: expected None, because the prefix is not a bank"):
        model(input_ids=IDS, prefix_ids=torch.tensor([0, 0, 0]))


def test_a_model_whose_positions_are_not_arguments_takes_no_bank():
    model = models.base_model(FAMILIES["t5"])
    with pytest.raises(ValueError, match="prefix: expected a single prefix, because"):
        peftkern.patch(model, PrefixKV.stack(prefixes(model)))


def test_a_static_cache_embeddings_and_a_graph():
    torch.manual_seed(0)
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    peftkern.patch(model, PrefixKV.stack(prefixes(model)))
    ids = torch.tensor([2, -1, 1])
    arguments = {"prefix_ids": ids, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS, attention_mask=LEFT, **arguments)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(IDS, attention_mask=LEFT, **static, **arguments), want)
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, attention_mask=LEFT, **arguments), want[:, IDS.shape[1] :]
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=IDS, prefix_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model(input_ids=IDS, prefix_ids=ids, use_cache=False).logits)


def test_what_a_bank_cannot_hold():
    geometry = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match="positions: expected None in a bank, whose prefixes take their own, got 9"):
        PrefixKV(None, 5, num_prefixes=2, positions=9, **geometry)
    with pytest.raises(ValueError, match=r"prefixes\[1\]: expected a single prefix .* got peft_seq2seq_layout=True"):
        PrefixKV.stack([PrefixKV(None, 4, **geometry), PrefixKV(None, 3, peft_seq2seq_layout=True, **geometry)])


def test_a_bank_needs_peftkerns_attention():
    model = models.base_model(FAMILIES["llama (GQA)"]).eval()
    peftkern.patch(model, PrefixKV.stack(prefixes(model)))
    with pytest.raises(ValueError, match="because samples have different prefixes, got output_attentions"):
        model(input_ids=IDS, prefix_ids=torch.tensor([0, 1, 2]), output_attentions=True)


@pytest.mark.parametrize("widths", [{}, {"value_head_dim": 8}], ids=["one parameter", "a parameter per layer"])
def test_prefixes_without_tokens(widths):
    geometry = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, **widths}
    parts = [PrefixKV(None, length, **geometry) for length in (5, 0)]
    bank = PrefixKV.stack(parts)
    assert bank.prefix_lens.tolist() == [5, 0]
    bank.replace(0, parts[1])
    bank.replace(1, parts[0])
    assert bank.prefix_lens.tolist() == [0, 5]
    assert bank.select(0).lengths == (0, 0)
    for found, made in zip(bank.select(1).layer_kv(), parts[0].layer_kv(), strict=True):
        assert all(map(torch.equal, found, made))
    assert PrefixKV.stack([parts[1], parts[1]]).prefix_lens.tolist() == [0, 0]
