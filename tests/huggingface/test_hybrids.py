# SPDX-License-Identifier: Apache-2.0
"""Prefixes beside recurrent layers, and learned states of these layers.

The truth is the stock model with a cache made by hand: the prefix in its attention layers, and fresh states, or with
``state=True`` the given ones, in its recurrent layers.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

import peftkern
from peftkern import PrefixKV, load_prefix, save_prefix
from peftkern.huggingface.cache_layers import HybridLayer, layer_like
from peftkern.huggingface.recurrent import RecurrentLayer
from peftkern.recurrent_state import RecurrentState, states_of
from tests.huggingface.families import runs, tiny
from tests.huggingface.models import BATCH, IDS, LEFT, ONES, PREFIX, RIGHT, SEQ

#: Families of this many kinds: linear attention; attention beside a state space; convolutions alone.
FAST = ("qwen3_next", "falcon_h1", "lfm2_moe")
SLOW = (
    "bamba", "granitemoehybrid", "jamba", "lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5_moe", "qwen3_5_text",
    "zamba", "zamba2", "zaya",
)  # fmt: skip
ALL = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
#: Their recurrence starts anew in every call of several tokens.
STATELESS = ("jamba", "zamba")
STATEFUL = [*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW if f not in STATELESS)]
#: Their attention compresses its keys, so no stock cache can hold the prefix; the text alone is the truth.
COMPRESSED = [pytest.param(family, marks=pytest.mark.slow) for family in ("kimi_linear", "bailing_hybrid")]
#: Long enough for every convolution.
TEXT = 5
BEAMS = {"num_beams": 2}


def built(family: str, **options: object) -> tuple:
    """(stock model, patched model, its prefix)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, model = tiny.tiny_model(family), tiny.tiny_model(family)
        torch.manual_seed(2)
        prefix = PrefixKV(model, PREFIX, std=1.0, **options)
        return stock, peftkern.patch(model, prefix, freeze=True), prefix


def tokens_of_text(text: str) -> dict[str, list[int]]:
    return {"input_ids": [3 + 5 * i % 17 for i in range(TEXT)]}


def behind_text(family: str) -> tuple:
    """(stock model, the text's tokens [B, T], model patched with the text's keys and states, its prefix)."""
    stock, model = tiny.tiny_model(family), tiny.tiny_model(family)
    prefix = PrefixKV.from_text(model, tokens_of_text, "a text", TEXT, state=True)
    text = torch.tensor([tokens_of_text("")["input_ids"]]).expand(BATCH, -1)
    return stock.eval(), text, peftkern.patch(model, prefix, freeze=True), prefix


@torch.no_grad()
def close(got: Tensor, want: Tensor, tolerance: float = 5e-6) -> None:
    assert float((got - want).norm()) <= tolerance * max(float(want.norm()), 1e-6)


def same_steps(got: runs.Step, want: runs.Step) -> None:
    close(got.loss, want.loss)
    close(got.logits, want.logits)
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert gradient is not None, name
        assert got.gradients[name] is not None, name
        close(got.gradients[name], gradient)


@pytest.mark.parametrize("family", ALL)
def test_attention_reads_the_prefix_and_recurrent_layers_start_afresh(family):
    stock, model, prefix = built(family)
    for mask in (None, RIGHT, LEFT):
        want = runs.prefix_by_hand(stock, prefix, runs.copies(stock, prefix), mask)
        same_steps(runs.step(model, prefix, mask), want)
    bare = runs.bare(stock, RIGHT)
    assert torch.equal(runs.bare(peftkern.unpatch(model), RIGHT), bare)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
def test_generated_tokens(family, options):
    stock, model, prefix = built(family)
    for mask in (ONES, LEFT):
        cache = runs.copies(stock, prefix)
        for layer in cache.layers:
            if isinstance(layer, DynamicLayer):
                DynamicLayer.batch_repeat_interleave(layer, options.get("num_beams", 1))
        want = runs.generate_behind_cache(stock, cache, mask, **options)
        assert torch.equal(runs.generate(model, mask, **options), want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("family", ["qwen3_next", *(pytest.param(f, marks=pytest.mark.slow) for f in FAST[1:])])
def test_activation_checkpointing_changes_no_number(family, state, reentrant):
    _, model, prefix = built(family, state=state)
    if state:
        with torch.no_grad():
            for weight in prefix.state.parameters():
                weight.normal_()
    want = runs.step(model, prefix, RIGHT)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same_steps(runs.step(model, prefix, RIGHT), want)


@pytest.mark.parametrize("family", [*STATEFUL, *COMPRESSED])
def test_keys_and_states_of_a_text_stand_for_the_text(family):
    stock, text, model, prefix = behind_text(family)
    whole = torch.cat([text, IDS], 1)
    with torch.no_grad():
        want = stock(whole).logits[:, TEXT:]
        close(model.eval()(IDS).logits, want)
        ones = torch.cat([torch.ones_like(text), RIGHT], 1)
        padded, got = stock(whole, attention_mask=ones).logits[:, TEXT:], model(IDS, attention_mask=RIGHT).logits
    close(got[RIGHT.bool()], padded[RIGHT.bool()])
    close(model.train()(IDS).logits, want)
    for options in ({}, BEAMS):
        tokens = runs.generate(stock, torch.ones_like(whole), whole, **options)
        assert torch.equal(runs.generate(model, ONES, **options), tokens)
    assert all(weight.dtype == torch.float32 for weight in prefix.state.parameters())


class Assigned(DynamicCache):
    """A stock cache whose states are replaced and not overwritten, so that autograd can follow them."""

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, conv_kernel_size=None, **kwargs):
        return torch.cat([self.layers[layer_idx].conv_states[state_idx], conv_states], -1)

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        return recurrent_states


def with_states(model: torch.nn.Module, prefix: PrefixKV) -> Assigned:
    """A cache by hand with a prefix and states."""
    cache = Assigned(config=model.config.get_text_config(decoder=True))
    for index, (kv, states) in enumerate(zip(prefix.layer_kv(), prefix.state.layer_states(), strict=True)):
        layer = cache.layers[index]
        if isinstance(layer, DynamicLayer):
            cache.update(*(x.expand(BATCH, -1, -1, -1) for x in kv), index)
        for number, (conv, recurrent) in enumerate(states):
            layer.conv_states[number] = conv.expand(BATCH, *conv.shape[1:])
            layer.recurrent_states[number] = recurrent if recurrent is None else recurrent.expand(BATCH, -1, -1, -1)
            layer.has_previous_state[number] = True
    return cache


@pytest.mark.parametrize("family", ["qwen3_next", *(pytest.param(f, marks=pytest.mark.slow) for f in FAST[1:])])
def test_gradients_of_states(family):
    stock, model, prefix = built(family, state=True)
    with torch.no_grad():
        for weight in prefix.state.parameters():
            weight.normal_()
    for mask in (None, RIGHT):
        want = runs.prefix_by_hand(stock, prefix, with_states(stock, prefix), mask)
        same_steps(runs.step(model, prefix, mask), want)


def test_fresh_states_are_zero():
    _, plain, prefix = built("qwen3_next")
    _, model, other = built("qwen3_next", state=True)
    other.load_state_dict(prefix.state_dict(), strict=False)
    close(model.eval()(IDS).logits, plain.eval()(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAST)
def test_a_cache_continues_and_is_reset(family):
    _, _, model, _ = behind_text(family)
    want = model.eval()(IDS).logits
    first = model(IDS[:, :3], use_cache=True)
    got = model(IDS[:, 3:], past_key_values=first.past_key_values).logits
    close(torch.cat([first.logits, got], 1), want)
    cache = first.past_key_values
    cache.reset()
    close(model(IDS, past_key_values=cache).logits, want)
    cache.reset()
    one = model(IDS[:, :1], past_key_values=cache).logits  # decoding steps from the first token on
    two = model(IDS[:, 1:2], past_key_values=cache).logits
    close(torch.cat([one, two], 1), want[:, :2])


@torch.no_grad()
@pytest.mark.parametrize("family", FAST)
def test_rows_of_a_cache_are_repeated_and_selected(family):
    _, _, model, _ = behind_text(family)
    want = model.eval()(IDS).logits
    for change, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        cache = model(IDS[:, :3], use_cache=True).past_key_values
        change(cache)
        close(model(IDS[rows, 3:], past_key_values=cache).logits, want[rows, 3:])


def test_a_training_step_stores_no_state():
    """Activation checkpointing runs a layer twice; a decoding step overwrites the state that it is given."""
    initial = torch.ones(2, 3, 4), torch.ones(2, 3)
    for stock in DynamicCache(config=tiny.tiny_config("falcon_h1")).layers:
        layer = layer_like(stock, False, [initial])
        assert isinstance(layer, HybridLayer)
        assert layer.update_conv_state(torch.zeros(2, 3, 6)).shape == (2, 3, 10)
        layer.update_recurrent_state(torch.zeros(2, 3))
        layer.update(torch.zeros(2, 1, 6, 8), torch.zeros(2, 1, 6, 8))
        assert layer.conv_states[0] is initial[0]
        assert layer.recurrent_states[0] is initial[1]
        assert layer.get_seq_length() == 0
    assert RecurrentLayer(False).update_conv_state(torch.ones(2, 3, 1), conv_kernel_size=4).tolist()[0][0] == [
        0.0, 0.0, 0.0, 1.0,
    ]  # fmt: skip
    _, model, prefix = built("lfm2_moe", state=True)
    if not hasattr(Cache, "get_conv_state"):  # before transformers 5.23, such a step raises
        return
    before = [weight.clone() for weight in prefix.state.parameters()]
    model.train()(IDS[:, :1]).logits.sum().backward()
    assert all(map(torch.equal, before, prefix.state.parameters()))


@pytest.mark.parametrize("state", [False, True])
def test_a_training_step_with_fresh_states_has_no_cache(state):
    """Models have faster kernels without one."""
    _, model, _ = built("qwen3_next", state=state)
    mixer, given = model.model.layers[0].linear_attn, []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        del kwargs["peftkern_prefix"]
        given.append(any(isinstance(x, Cache) for x in kwargs.values()))

    mixer.register_forward_pre_hook(note, with_kwargs=True)
    model.train()(IDS)
    model.eval()(IDS)
    assert given == [state, True]


def test_prefix_tuning_runs_where_peft_cannot():
    stock = tiny.tiny_model("qwen3_next")
    geometry = runs.cached_geometry(stock)
    heads = geometry["num_kv_heads"]
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, num_layers=geometry["num_layers"],
        num_attention_heads=heads, token_dim=heads * geometry["head_dim"],
    )  # fmt: skip
    model = get_peft_model(tiny.tiny_model("qwen3_next"), config)
    with pytest.raises(ValueError, match="layer 0"):
        model(IDS)
    peftkern.patch(model)
    learned = PrefixKV.from_peft(model)
    with torch.no_grad():
        learned.trainable[0].normal_()
    cache = runs.copies(stock, learned)
    want = runs.prefix_by_hand(stock, learned, cache, RIGHT)
    got = runs.step(model, model.prompt_encoder, RIGHT)
    close(got.logits, want.logits)
    close(got.gradients["default.embedding.weight"], learned.trainable[0].grad)
    tokens = runs.generate_behind_cache(stock, runs.copies(stock, learned), LEFT)
    assert torch.equal(runs.generate(model, LEFT), tokens)


@torch.no_grad()
def test_attention_weights_come_from_the_stock_attention():
    stock, model, prefix = built("qwen3_next")
    mask = torch.nn.functional.pad(RIGHT, (PREFIX, 0), value=1)
    stock.set_attn_implementation("eager")
    want = stock.eval()(IDS, attention_mask=mask, past_key_values=runs.copies(stock, prefix), output_attentions=True)
    peftkern.unpatch(model).set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="output_attentions"):
        got = peftkern.patch(model, prefix).eval()(IDS, attention_mask=RIGHT, output_attentions=True)
    close(got.logits, want.logits)
    assert got.attentions[-1].shape[-1] == PREFIX + SEQ


@torch.no_grad()
def test_positions_are_those_of_generation_in_a_model_that_ignores_its_cache():
    """Bamba's forward counts positions from 0 behind any cache; its ``generate`` does not."""
    _, model, _ = built("bamba")
    out = model.eval().generate(
        IDS, attention_mask=ONES, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    close(model(out.sequences[:, :-1]).logits[:, SEQ - 1 :], torch.stack(out.logits, 1))


def test_packed_rows_are_refused_by_name():
    _, model, prefix = built("qwen3_next")
    assert "recurrent in layer 0, whose state would run across packed sequences" in peftkern.explain(model)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])[:SEQ].expand(BATCH, -1)
    with pytest.raises(ValueError, match="position_ids: expected one sequence per row"):
        model(IDS, position_ids=positions)
    peftkern.unpatch(model)
    with pytest.raises(ValueError, match=r"share: expected None, because .* recurrent in layer 0"):
        peftkern.patch(model, prefix, share="prefixes")
    with pytest.raises(ValueError, match=r"logits: expected 'all'.*recurrent in layer 0"):
        peftkern.patch(model, prefix, logits="labelled")


@pytest.mark.parametrize("family", STATELESS)
def test_states_that_a_model_does_not_read_are_refused(family):
    model = tiny.tiny_model(family)
    with pytest.raises(ValueError, match=r"state: expected False, because \w+MambaMixer does not continue"):
        peftkern.patch(model, PrefixKV(model, PREFIX, state=True))


def test_refusals_of_states():
    model = tiny.tiny_model("qwen3_next")
    with pytest.raises(ValueError, match="state: expected False with a config"):
        PrefixKV(model.config, PREFIX, state=True)
    with pytest.raises(ValueError, match=r"state: .* no recurrent layers"):
        PrefixKV(tiny.tiny_model("llama"), PREFIX, state=True)
    with pytest.raises(ValueError, match="num_prefixes: expected None with state=True"):
        PrefixKV(model, PREFIX, state=True, num_prefixes=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(IDS[:1], past_key_values=cache)
    assert PrefixKV.from_cache(cache, state=True).state is not None
    with pytest.raises(ValueError, match=f"length: expected all {SEQ} tokens"):
        PrefixKV.from_cache(cache, 3, state=True)
    other = PrefixKV(model, PREFIX, state=RecurrentState([[((1, 3, 4), None)], []]))
    with pytest.raises(ValueError, match=r"state: expected states .* in layer 0, got"):
        peftkern.patch(model, other)
    peftkern.patch(model, PrefixKV(model, PREFIX, state=True))
    with pytest.raises(ValueError, match="attention_mask: expected padding on the right only"):
        model(IDS, attention_mask=LEFT)
    with pytest.raises(ValueError, match=r"cache: expected None.*got a StaticCache"):
        model.eval().generate(IDS, cache_implementation="static", max_new_tokens=2, pad_token_id=0)


def test_checkpointing_is_refused_where_a_module_cannot_find_its_state():
    model = tiny.tiny_model("zaya")
    peftkern.patch(model, PrefixKV(model, PREFIX, state=True))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing: expected it to be off"):
        model.train()(IDS)


def test_states_are_saved_copied_and_described(tmp_path):
    _, _, _, prefix = behind_text("falcon_h1")
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path)
    assert repr(loaded) == repr(prefix)
    assert "state=True" in repr(prefix)
    for other in (loaded, prefix.bake()):
        assert other.state_dict().keys() == prefix.state_dict().keys()
        assert all(torch.equal(x, prefix.state_dict()[name]) for name, x in other.state_dict().items())
    assert load_prefix(tmp_path, model=tiny.tiny_model("falcon_h1")).state is not None


def test_the_stock_cache_by_hand_has_fresh_states():
    _, model, prefix = built("qwen3_next")
    cache = runs.copies(model, prefix)
    recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    assert recurrent
    assert states_of(recurrent) == [[(None, None)]]


def test_calls_that_would_lose_learned_states_are_refused():
    _, model, prefix = built("qwen3_next", state=True)
    with pytest.raises(ValueError, match="because recurrent layers start in learned states, got output_attentions"):
        model(input_ids=IDS, output_attentions=True)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"attention_mask: expected None under torch.compile"):
        compiled(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    peftkern.unpatch(model)
    with pytest.raises(ValueError, match="state: expected False in a prefix that grows"):
        prefix.grow_from_text(2, model, tokens_of_text, "a text")


def test_a_model_that_is_cast_after_it_was_patched():
    _, model, _ = built("qwen3_next", state=True)
    model.to(torch.bfloat16)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_assisted_generation_crops_states_of_convolutions():
    _, model, _ = built("lfm2_moe")
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS[:1], **arguments)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=2, **arguments), want)
