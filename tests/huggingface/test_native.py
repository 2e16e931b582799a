# SPDX-License-Identifier: Apache-2.0
"""A PrefixKV in a plain Hugging Face model, compared with PEFT or, where PEFT fails, with the definition."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function, sdpa_mask

import peftkern
from peftkern import PrefixKV
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, LEFT, PREFIX, RIGHT, SEQ, difference

TOLERANCE = 1e-5
LLAMA = FAMILIES["llama (GQA)"]


def patched_like(reference, family, **options):
    """A plain model with the prefix of a PEFT model."""
    prefix = models.native_prefix(reference)
    return peftkern.patch(models.base_model(family), prefix, freeze=True, **options), prefix


def llama_prefix(length, **options):
    return PrefixKV(None, length, num_layers=2, num_kv_heads=2, head_dim=16, std=1.0, **options)


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(name, mask):
    family = FAMILIES[name]
    stock = models.peft_model(family, patched=False)
    model, prefix = patched_like(stock, family)
    want, got = (models.training_step(m, family.task, mask) for m in (stock, model))
    rows = slice(None) if mask is None or not family.generates or family.task == "SEQ_2_SEQ_LM" else mask.bool()
    assert difference(got.output[rows], want.output[rows]) <= TOLERANCE
    assert difference(prefix.trainable[0].grad, models.peft_prefix(stock).grad) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beam", "sample", "sample 2"],
)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generated_tokens_are_those_of_peft(name, options):
    family = FAMILIES[name]
    stock = models.peft_model(family, patched=False).eval()
    model, _ = patched_like(stock, family)
    want, got = (models.generate(m.eval(), family.task, **options) for m in (stock, model))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generation_without_cache_gives_the_tokens_of_generation_with_it(name):
    """PEFT fails here for Llama, Gemma, GPT-NeoX and GPT-OSS."""
    family = FAMILIES[name]
    model, _ = patched_like(models.peft_model(family, patched=False), family)
    want, got = (models.generate(model.eval(), family.task, do_sample=False, use_cache=use) for use in (True, False))
    assert got.tolist() == want.tolist()


def test_a_returned_cache_continues_the_sequence():
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).eval()
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=LEFT).logits[:, 4:]
        first = model(input_ids=IDS[:, :4], attention_mask=LEFT[:, :4], use_cache=True)
        second = model(input_ids=IDS[:, 4:], attention_mask=LEFT, past_key_values=first.past_key_values)
    assert first.past_key_values.get_seq_length() == 7, "between calls, a cache speaks of the sequence alone"
    assert difference(second.logits[:, :], want) <= TOLERANCE


def test_generate_continues_from_the_cache_of_a_previous_turn():
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).eval()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    turn = model.generate(IDS, max_new_tokens=4, **options)
    longer = torch.cat([turn.sequences, IDS[:, :2]], 1)
    want = model.generate(longer, max_new_tokens=4, **options).sequences
    got = model.generate(longer, max_new_tokens=4, past_key_values=turn.past_key_values, **options).sequences
    assert got.tolist() == want.tolist()


def logits_layer_by_layer(model, prefix, ids):
    """Llama's forward with a stock cache per layer, each holding that layer's own prefix."""
    backbone, offset = model.model, max(prefix.lengths)
    hidden = backbone.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None] + offset
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    for index, (layer, (key, value)) in enumerate(zip(backbone.layers, prefix.layer_kv(), strict=True)):
        cache = DynamicCache()
        for before in range(index):
            cache.update(hidden.new_empty(1, 1, 0, 1), hidden.new_empty(1, 1, 0, 1), before)
        cache.update(key.expand(ids.shape[0], -1, -1, -1), value.expand(ids.shape[0], -1, -1, -1), index)
        length = key.shape[1]
        mask = sdpa_mask(
            batch_size=ids.shape[0], q_length=ids.shape[1], kv_length=length + ids.shape[1], q_offset=length,
            mask_function=causal_mask_function, allow_is_causal_skip=False,
        )  # fmt: skip
        hidden = layer(
            hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rotary
        )
    return model.lm_head(backbone.norm(hidden))


@pytest.mark.parametrize("lengths", [[5, 3], [2, 5], [0, 4], [4, 0]])
def test_each_layer_has_its_own_length_and_some_none(lengths):
    """PEFT has one length for all layers."""
    base = models.base_model(LLAMA).eval()
    prefix = llama_prefix(lengths)
    want = logits_layer_by_layer(base, prefix, IDS)
    peftkern.patch(base, prefix)
    got = base(input_ids=IDS).logits
    assert difference(got, want) <= TOLERANCE
    assert difference(base(input_ids=IDS, attention_mask=models.ONES).logits, want) <= TOLERANCE


def test_lengths_of_encoder_layers():
    """Masks of encoders have columns for the longest prefix; a layer without a prefix drops them."""
    family = FAMILIES["bert"]
    base = models.base_model(family).eval()
    prefix = PrefixKV(None, [4, 0], num_layers=2, num_kv_heads=4, head_dim=16)
    with peftkern.patched(base, prefix):
        padded = base(input_ids=IDS, attention_mask=RIGHT).logits[:1]
        alone = base(input_ids=IDS[:1, :5]).logits
    assert difference(padded, alone) <= TOLERANCE, "padding must not be seen in either layer"


def test_t5_layers_of_different_length():
    """The relative bias spans the longest prefix; the first layer, which computes it, has none."""
    family = FAMILIES["t5"]
    model = models.base_model(family)
    prefix = PrefixKV(None, [0, 3, 5, 0], num_layers=4, num_kv_heads=4, head_dim=16)
    peftkern.patch(model, prefix)
    step = models.training_step(model, family.task, RIGHT)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = models.training_step(model, family.task, RIGHT)
    assert models.step_difference(recomputed, step)[1] <= TOLERANCE
    want = models.generate(model.eval(), family.task, do_sample=False, use_cache=False)
    assert models.generate(model, family.task, do_sample=False).tolist() == want.tolist()


def test_positions_from_zero():
    """PEFT computes the same for positions that its shift moves to 0."""
    stock = models.peft_model(LLAMA, patched=False)
    model, _ = patched_like(stock, LLAMA, shift_positions=False)
    positions = torch.arange(SEQ)[None].expand(3, -1)
    want = stock(input_ids=IDS, position_ids=positions - PREFIX, attention_mask=models.ONES).logits
    assert difference(model(input_ids=IDS).logits, want) <= TOLERANCE
    assert difference(model(input_ids=IDS, attention_mask=models.ONES).logits, want) <= TOLERANCE
    assert difference(model(input_ids=IDS, position_ids=positions).logits, want) <= TOLERANCE


def test_positions_from_zero_keep_the_window_for_the_sequence():
    family = FAMILIES["mistral (window 4)"]
    model = models.base_model(family).eval()
    prefix = llama_prefix(PREFIX)
    peftkern.patch(model, prefix, shift_positions=False)
    last = model(input_ids=IDS).logits[:, -1].sum()
    last.backward()
    assert (prefix.trainable[0].grad.abs().amax(1) > 0).all(), "every prefix token is seen by the last query"


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "bart"])
def test_a_sequence_as_long_as_the_position_table(name):
    """In PEFT the prefix consumes positions."""
    family = FAMILIES[name]
    table = 62 if name == "roberta" else 64  # its first two rows are for padding
    ids = torch.randint(3, models.VOCAB, (1, table))
    model = models.base_model(family).eval()
    reference = models.peft_model(family, patched=False)
    prefix = models.native_prefix(reference)
    inputs = {"input_ids": IDS, "decoder_input_ids": ids[:, :]} if name == "bart" else {"input_ids": ids}
    if name == "bart":
        inputs["input_ids"] = IDS[:1]
    with peftkern.patched(model, prefix, shift_positions=False):
        assert torch.isfinite(model(**inputs).logits).all()
    with (
        peftkern.patched(model, prefix),
        pytest.raises(
            ValueError, match=rf"at most {table} positions.*got {table + PREFIX}, of which the prefix takes {PREFIX}"
        ),
    ):
        model(**inputs)


def test_generation_stops_at_the_end_of_the_position_table():
    model = peftkern.patch(
        models.base_model(FAMILIES["gpt2"]), PrefixKV(None, 5, num_layers=2, num_kv_heads=4, head_dim=16)
    )
    with pytest.raises(ValueError, match="at most 64 positions"):
        model.eval().generate(IDS.repeat(1, 8), max_new_tokens=8, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_of_four_dimensions(kind):
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).eval()
    mask = (torch.ones(SEQ, SEQ).tril().bool() & LEFT[:, None, :].bool())[:, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    want = model(input_ids=IDS, attention_mask=LEFT).logits
    assert difference(model(input_ids=IDS, attention_mask=mask).logits[LEFT.bool()], want[LEFT.bool()]) <= TOLERANCE


def test_positional_arguments():
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).eval()
    want = model(input_ids=IDS, attention_mask=LEFT).logits
    assert torch.equal(model(IDS, LEFT).logits, want)
    assert torch.equal(model.model(IDS, LEFT).last_hidden_state @ model.lm_head.weight.T, want)


def test_the_prefix_is_a_submodule_until_unpatch():
    model = models.base_model(LLAMA)
    names, trainable = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    prefix = llama_prefix(PREFIX)
    peftkern.patch(model, prefix)
    assert model.peftkern_prefix is prefix
    assert set(model.state_dict()) - names == {"peftkern_prefix.trainable.0"}
    assert any(p is prefix.trainable[0] for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [*trainable, True], "patch freezes nothing unasked"
    peftkern.unpatch(model)
    assert set(model.state_dict()) == names


def test_freeze_is_undone():
    model = models.base_model(LLAMA)
    frozen_before = model.lm_head.weight.requires_grad_(False)
    with peftkern.patched(model, llama_prefix(PREFIX), freeze=True):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["peftkern_prefix.trainable.0"]
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen_before for p in model.parameters()]


def test_lora_and_a_prefix_train_together():
    """PEFT cannot combine them."""
    model = get_peft_model(models.base_model(LLAMA), LoraConfig(task_type="CAUSAL_LM", r=2))
    prefix = llama_prefix(PREFIX)
    peftkern.patch(model, prefix)
    gradients = models.training_step(model, "CAUSAL_LM", LEFT).gradients
    assert any("lora_" in name for name in gradients)
    assert gradients["base_model.model.peftkern_prefix.trainable.0"].abs().max() > 0
    assert models.generate(model.eval(), "CAUSAL_LM", do_sample=False).shape == (3, SEQ + 6)


def test_a_projection_runs_on_the_rows_of_the_prefix_alone():
    model = models.base_model(LLAMA)
    prefix = llama_prefix(PREFIX, projection=24)
    rows = []
    prefix.transform.register_forward_hook(lambda module, args, out: rows.append(tuple(args[0].shape)))
    peftkern.patch(model, prefix, freeze=True)
    models.training_step(model, "CAUSAL_LM")
    assert rows == [(PREFIX, 32)]


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda model: DynamicCache(offloading=False, config=None), None),
        (lambda model: filled(model), "tokens that have not attended to the prefix"),
    ],
    ids=["empty", "filled"],
)
def test_caches_of_the_caller(cache, message):
    model = models.base_model(LLAMA).eval()
    given = cache(model)
    peftkern.patch(model, llama_prefix(PREFIX))
    if message is None:
        assert model(input_ids=IDS, past_key_values=given).past_key_values.get_seq_length() == SEQ
        return
    with pytest.raises(ValueError, match=f"cache: .*{message}"):
        model(input_ids=IDS, past_key_values=given)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}], ids=["assisted", "chunks"]
)
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "gemma3", "opt"])
def test_assisted_and_chunked_generation(name, options):
    """PEFT's assisted generation fails for Llama, GPT-2 and Gemma 3, and returns other tokens for OPT."""
    family = FAMILIES[name]
    model, _ = patched_like(models.peft_model(family, patched=False), family)
    inputs = {"input_ids": IDS[2:], "attention_mask": models.ONES[2:], "max_new_tokens": 6, "pad_token_id": 0}
    want, got = (model.eval().generate(**inputs, eos_token_id=None, do_sample=False, **o) for o in ({}, options))
    assert got.tolist() == want.tolist()


def filled(model):
    return model(input_ids=IDS, use_cache=True).past_key_values


def test_the_cache_of_a_training_step_cannot_be_continued():
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).train()
    cache = model(input_ids=IDS).past_key_values
    with pytest.raises(ValueError, match="training step"):
        model(input_ids=IDS, past_key_values=cache)


def test_packed_sequences_that_are_not_a_training_step_are_refused():
    """Stock PEFT silently lets them attend to each other."""
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(PREFIX)).eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(ValueError, match="position_ids: expected one sequence per row"):
        model(input_ids=IDS, position_ids=positions)


def test_attention_weights_are_those_of_the_stock_attention():
    model = models.base_model(LLAMA).eval()
    model.set_attn_implementation("eager")
    prefix = llama_prefix(PREFIX)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix.layer_kv()):
        cache.update(key.expand(IDS.shape[0], -1, -1, -1), value.expand(IDS.shape[0], -1, -1, -1), layer)
    with torch.no_grad():
        want = model(input_ids=IDS, past_key_values=cache, output_attentions=True).attentions
        peftkern.patch(model, prefix)
        with pytest.warns(UserWarning, match="output_attentions: such calls run the stock attention"):
            got = model(input_ids=IDS, output_attentions=True).attentions
    assert [x.shape for x in got] == [x.shape for x in want]
    assert all(difference(x, y) <= 1e-5 for x, y in zip(got, want, strict=True))
