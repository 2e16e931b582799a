# SPDX-License-Identifier: Apache-2.0
"""Gates of prefix tokens in models: every way to run a batch, against attention that is written out, in fp64."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import peftkern
from peftkern import PrefixKV
from tests.huggingface import models
from tests.huggingface.families import tiny
from tests.huggingface.gates_by_hand import GatesByHand
from tests.huggingface.models import FAMILIES, IDS, LEFT, ONES, PREFIX, RIGHT, patch_of
from tests.huggingface.shared_rows import ROWS, differ, inputs_of, share_everything, train
from tests.huggingface.test_encoders import ENCODERS, encoder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FP64 = torch.float64
LLAMA = FAMILIES["llama (GQA)"]
#: Rotary positions, learned ones in two forms, windows with soft-capped scores, sinks of another kind of score.
NAMES = ["llama (GQA)", "gpt2", "opt", "gemma2 (softcap)"]
#: Families without keys of their own place for gates: windows hide the prefix by positions.
WINDOWS = ["mistral (window 4)", "gemma2 (softcap)", "gemma3", "gpt-oss (sinks)", "llama4 (chunks)"]
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def gated(family, length=5, **options):
    """A prefix with different gates."""
    torch.manual_seed(3)
    base = models.base_model(family, FP64)
    prefix = PrefixKV(base, length, learn_length=True, std=0.5, dtype=FP64, **options)
    prefix.gate_logits.data.normal_(std=2.0)
    return prefix


def patched(family, prefix, **options):
    options.setdefault("prefix_in_window", False)
    return peftkern.patch(models.base_model(family, FP64), prefix, freeze=True, **options)


def step(call, prefix, mask):
    """(the logits of labels, the loss, gradients of the prefix) of a training step."""
    labels = IDS.masked_fill(mask == 0, -100)
    prefix.zero_grad()
    out = call(IDS, mask, labels=labels)
    out.loss.backward()
    return (
        out.logits[mask == 1].detach(),
        out.loss.detach(),
        {n: p.grad.clone() for n, p in prefix.named_parameters()},
    )


def forward(model):
    """The call of a patched model in the form of GatesByHand."""
    return lambda ids, mask=None, **more: model(input_ids=ids, attention_mask=mask, **more)


@pytest.mark.parametrize("length", [5, [5, 3]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_the_one_by_hand(name, length):
    prefix = gated(FAMILIES[name], length)
    model = patched(FAMILIES[name], prefix).train()
    with models.fp64_throughout():
        want = step(GatesByHand(FAMILIES[name], prefix, 5), prefix, RIGHT)
        got = step(forward(model), prefix, RIGHT)
    assert not patch_of(model).packer.reasons
    for x, y in zip(got, want, strict=True):
        assert differ(x, y) < 1e-10


def test_projections_and_frozen_tokens_have_gates_too():
    for options in ({"projection": 16}, {"num_frozen_tokens": 2}):
        prefix = gated(LLAMA, **options)
        model = patched(LLAMA, prefix).train()
        with models.fp64_throughout():
            prefix.frozen.requires_grad_(True)
            want = step(GatesByHand(LLAMA, prefix, 5), prefix, RIGHT)
            got = step(forward(model), prefix, RIGHT)
        for x, y in zip(got, want, strict=True):
            assert differ(x, y) < 1e-10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_a_decoding_step_are_those_by_hand(name, side):
    mask = {"left": LEFT, "right": RIGHT}[side]
    prefix = gated(FAMILIES[name])
    model = patched(FAMILIES[name], prefix).eval()
    with models.fp64_throughout(), torch.no_grad():
        want = GatesByHand(FAMILIES[name], prefix, 5)(IDS, mask).logits
        places = (mask.cumsum(1) - 1).clamp(min=0)
        first = model(input_ids=IDS[:, :-2], attention_mask=mask[:, :-2], position_ids=places[:, :-2], use_cache=True)
        last = model(
            input_ids=IDS[:, -2:], attention_mask=mask, position_ids=places[:, -2:], use_cache=True,
            past_key_values=first.past_key_values,
        )  # fmt: skip
    got = torch.cat([first.logits, last.logits], 1)
    assert differ(got[mask == 1], want[mask == 1]) < 1e-10


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2"])
def test_generate_returns_the_tokens_by_hand(name, static):
    prefix = gated(FAMILIES[name])
    by_hand, ids = GatesByHand(FAMILIES[name], prefix, 5), IDS
    with torch.no_grad():
        for _ in range(GENERATE["max_new_tokens"]):
            ids = torch.cat([ids, by_hand(ids).logits[:, -1:].argmax(-1)], 1)
    model = patched(FAMILIES[name], prefix).eval()
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    assert model.generate(input_ids=IDS, attention_mask=ONES, **GENERATE, **options).tolist() == ids.tolist()


def test_a_chunk_into_a_static_cache_is_the_one_by_hand():
    prefix = gated(LLAMA)
    model = patched(LLAMA, prefix).eval()
    with models.fp64_throughout(), torch.no_grad():
        want = GatesByHand(LLAMA, prefix, 5)(IDS).logits
        cache = StaticCache(model.config, max_cache_len=16)
        first = model(input_ids=IDS[:, :3], past_key_values=cache, use_cache=True)
        places = torch.arange(3, IDS.shape[1])[None]
        last = model(
            input_ids=IDS[:, 3:], past_key_values=first.past_key_values, use_cache=True, position_ids=places,
            attention_mask=ONES,
        )  # fmt: skip
    assert differ(torch.cat([first.logits, last.logits], 1), want) < 1e-10


@pytest.mark.parametrize("kind", ["causal", "with columns of the prefix"])
def test_a_dense_mask_keeps_the_gates(kind):
    prefix = gated(LLAMA)
    model = patched(LLAMA, prefix).eval()
    mask = torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    if kind != "causal":
        mask = torch.cat([torch.ones(IDS.shape[1], 5, dtype=torch.bool), mask], 1)
    with models.fp64_throughout(), torch.no_grad():
        want = GatesByHand(LLAMA, prefix, 5)(IDS).logits
        got = model(input_ids=IDS, attention_mask=mask.expand(IDS.shape[0], 1, -1, -1)).logits
    assert differ(got, want) < 1e-10


def test_checkpointing_gives_the_same_gradients_and_refuses_to_lose_them():
    prefix = gated(LLAMA)
    model = patched(LLAMA, prefix).train()
    with models.fp64_throughout():
        want = step(GatesByHand(LLAMA, prefix, 5), prefix, RIGHT)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        got = step(forward(model), prefix, RIGHT)
    for x, y in zip(got, want, strict=True):
        assert differ(x, y) < 1e-10
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: expected False"):
        step(forward(model), prefix, RIGHT)


def test_autocast_computes_gates_in_fp32():
    prefix = gated(LLAMA).float()
    model = peftkern.patch(models.base_model(LLAMA), prefix).eval()
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT == 1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT == 1].float()
        prefix.gate_logits.data.fill_(9.0)
        other = model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT == 1]
    assert differ(got, want) < 0.02
    assert differ(other, want) > 0.1


@pytest.mark.parametrize("name", ["llama (GQA)", "opt"])
def test_shared_text_keeps_the_gates(name, monkeypatch):
    share_everything(monkeypatch)
    inputs = inputs_of(ROWS)
    with models.fp64_throughout():
        want, want_gradients = train(patched(FAMILIES[name], gated(FAMILIES[name])), inputs)
        model = patched(FAMILIES[name], gated(FAMILIES[name]), share="prefixes", prefix_in_window=True)
        got, gradients = train(model, inputs)
    usual, shared = patch_of(model).shared_rows
    assert shared < usual
    assert differ(got.loss.detach(), want.loss.detach()) < 1e-10
    assert differ(gradients, want_gradients) < 1e-10
    assert float(gradients["peftkern_prefix.gate_logits"].abs().max()) > 0


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.task == "CAUSAL_LM"])
def test_gates_of_zero_and_one_are_no_prefix_and_a_plain_one(name):
    family = FAMILIES[name]
    prefix = gated(family)
    plain = PrefixKV.from_cache(prefix.layer_kv(), model_or_config=models.base_model(family, FP64), dtype=FP64)
    want = {}
    with models.fp64_throughout(), torch.no_grad():
        want[-torch.inf] = models.base_model(family, FP64).eval()(input_ids=IDS, attention_mask=RIGHT).logits
        want[torch.inf] = patched(family, plain, shift_positions=False).eval()(IDS, attention_mask=RIGHT).logits
        model = patched(family, prefix, shift_positions=False).eval()
        for logit, logits in want.items():
            prefix.gate_logits.fill_(logit)
            got = model(input_ids=IDS, attention_mask=RIGHT).logits
            assert differ(got[RIGHT == 1], logits[RIGHT == 1]) < 1e-10
    assert differ(want[torch.inf], want[-torch.inf]) > 1e-3


@pytest.mark.parametrize("name", ["albert", "albert (2 groups)", "distilbert", "modernbert", "deepseek_v2"])
def test_each_layer_of_other_models_has_its_gates(name):
    """Tokens whose gates are 0 are as if they were not there.

    The layers of albert are one module, and deepseek_v2 caches compressed keys, with values of a width of their own.
    """
    build = encoder if name in ENCODERS else tiny.tiny_model
    prefix = PrefixKV(base := build(name), PREFIX, learn_length=True, std=1.0)
    generator = torch.Generator().manual_seed(4)
    kept = [torch.rand(PREFIX, generator=generator) < 0.6 for _ in prefix.lengths]
    prefix.gate_logits.data = torch.cat([torch.where(keep, torch.inf, -torch.inf) for keep in kept])
    layers = [(k[:, keep], v[:, keep]) for (k, v), keep in zip(prefix.layer_kv(), kept, strict=True)]
    plain = PrefixKV.from_cache(layers, [int(keep.sum()) for keep in kept], model_or_config=base)
    outputs = []
    for each in (plain, prefix, prefix.prune(0.0)):
        model = peftkern.patch(build(name).eval(), each, shift_positions=False, prefix_in_window=False)
        with torch.no_grad():
            outputs.append(model(input_ids=IDS, attention_mask=RIGHT)[0])
    assert len(set(plain.lengths)) > 1
    for got in outputs[1:]:
        real = RIGHT == 1 if got.dim() > 2 else slice(None)
        assert differ(got[real], outputs[0][real]) < 1e-5


@pytest.mark.parametrize("name", ["t5", "umt5 (bias per layer)"])
def test_relative_positions_and_gates_add_up(name):
    """Without its first token, whose gate is 0, a prefix is the one that has never had it."""
    family = FAMILIES[name]
    prefix = gated(family)
    logits = prefix.gate_logits.data.view(-1, 5)
    logits[:, 0] = -torch.inf
    shorter = PrefixKV.from_cache(
        [(k[:, 1:], v[:, 1:]) for k, v in prefix.layer_kv()], model_or_config=models.base_model(family, FP64),
        dtype=FP64, learn_length=True,
    )  # fmt: skip
    shorter.gate_logits.data.copy_(logits[:, 1:].flatten())
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, "labels": models.TARGETS}
    with models.fp64_throughout(), torch.no_grad():
        want = patched(family, shorter).eval()(**inputs).logits
        got = patched(family, prefix).eval()(**inputs).logits
        prefix.gate_logits[1:5] += 1.0
        other = patched(family, prefix).eval()(**inputs).logits
    assert differ(got, want) < 1e-10
    assert differ(other, want) > 1e-4
    with pytest.raises(ValueError, match="position_bias: expected no columns"):
        patched(family, prefix.prune(0.0)).eval()(**inputs)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_pruning_gates_of_zero_changes_nothing(name, shift):
    prefix = gated(FAMILIES[name])
    prefix.gate_logits.data[::3] = -torch.inf
    prefix.gate_logits.data[:5] = torch.tensor([-torch.inf, 1, -torch.inf, -torch.inf, 0])
    shorter = prefix.prune(0.0)
    assert max(shorter.lengths) < 5
    outputs = []
    for each in (prefix, shorter):
        model = patched(FAMILIES[name], each, shift_positions=shift)
        with models.fp64_throughout():
            training = step(forward(model.train()), each, RIGHT)
            model.eval()
            with torch.no_grad():
                evaluation = model(input_ids=IDS, attention_mask=LEFT, use_cache=False).logits[LEFT == 1]
        tokens = model.generate(input_ids=IDS, attention_mask=LEFT, **GENERATE)
        outputs.append((training, evaluation, tokens))
    (step_a, logits_a, tokens_a), (step_b, logits_b, tokens_b) = outputs
    assert differ(step_b[0], step_a[0]) < 1e-10
    assert differ(step_b[1], step_a[1]) < 1e-10
    assert differ(logits_b, logits_a) < 1e-10
    assert tokens_b.tolist() == tokens_a.tolist()


def test_a_pruned_prefix_is_the_one_by_hand_at_the_old_positions():
    prefix = gated(LLAMA)
    shorter = prefix.prune(float(torch.cat(prefix.gates()).median()))
    model = patched(LLAMA, shorter).train()
    with models.fp64_throughout():
        want = step(GatesByHand(LLAMA, shorter, 5), shorter, RIGHT)
        got = step(forward(model), shorter, RIGHT)
    for x, y in zip(got, want, strict=True):
        assert differ(x, y) < 1e-10


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_count_positions_refuse_a_pruned_prefix(name):
    prefix = gated(FAMILIES[name])
    shorter = prefix.prune(float(torch.cat(prefix.gates()).median()))
    base = models.base_model(FAMILIES[name], FP64)
    with pytest.raises(ValueError, match="prefix_in_window: expected False"):
        peftkern.patch(base, shorter)
    peftkern.patch(base, shorter, prefix_in_window=False)


def test_windows_refuse_to_share_text_behind_gates():
    family = FAMILIES["mistral (window 4)"]
    with pytest.raises(ValueError, match="share: expected None"):
        patched(family, gated(family), share="prefixes", prefix_in_window=True)


def test_masks_with_columns_of_removed_tokens_are_refused():
    prefix = gated(LLAMA)
    model = patched(LLAMA, prefix.prune(float(torch.cat(prefix.gates()).median()))).eval()
    mask = torch.ones(IDS.shape[0], 1, IDS.shape[1], 5 + IDS.shape[1], dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask: expected no columns for the prefix"):
        model(input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        ("llama (GQA)", 5, {"shift_positions": False}),
        ("llama (GQA)", [2, 5], {}),
        ("mistral (window 4)", 5, {"prefix_in_window": False}),
    ],
    ids=str,
)
def test_stock_attention_is_refused_where_it_would_place_the_prefix_elsewhere(name, length, options):
    base = models.base_model(FAMILIES[name])
    model = peftkern.patch(base, PrefixKV(base, length), **options).eval()
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(input_ids=IDS, output_attentions=True)


def test_stock_attention_is_refused():
    model = patched(LLAMA, gated(LLAMA)).eval()
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(input_ids=IDS, output_attentions=True)
    model(input_ids=IDS)


def test_gates_learn_to_close_where_the_loss_asks_for_it():
    prefix = gated(LLAMA).float()
    prefix.gate_logits.data.fill_(2.0)
    model = peftkern.patch(models.base_model(LLAMA), prefix, freeze=True).train()
    optimizer = torch.optim.AdamW(
        [{"params": [prefix.gate_logits], "lr": 0.5}, {"params": prefix.trainable.parameters(), "lr": 1e-3}],
        weight_decay=0.0,
    )
    for _ in range(12):
        (model(input_ids=IDS, labels=IDS).loss + 5.0 * prefix.sparsity()).backward()
        optimizer.step()
        optimizer.zero_grad()
    peftkern.unpatch(model)
    shorter = prefix.prune(0.5)
    assert sum(shorter.lengths) < sum(prefix.lengths)
    assert "peftkern_prefix.gate_logits" in peftkern.patch(model, shorter).state_dict()
