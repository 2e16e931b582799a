# SPDX-License-Identifier: Apache-2.0
"""PrefixKV and SoftPrompt: layout, gradients, initialisation and messages."""

from __future__ import annotations

import doctest

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import CartridgeConfig, PrefixTuningConfig
from peft.tuners.cartridge import CartridgeEncoder
from peft.tuners.prefix_tuning import PrefixEncoder

from peftkern import PrefixKV, SoftPrompt, prefix_kv, soft_prompt, soft_prompt_embedding

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 4}
LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 60}


def tokenizer(text):
    """A token per character."""
    return {"input_ids": [3 + ord(c) % 50 for c in text]}


def llama(**changes):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 2, **changes})
    )


def peft_layers(flat, num_layers=3, num_kv_heads=2, head_dim=4):
    """(key, value) [Hkv, P, D] per layer of the flat [P, L * 2 * Hkv * D], as in PEFT's get_prompt."""
    x = flat.view(1, flat.shape[0], num_layers * 2, num_kv_heads, head_dim)
    return [(pair[0, 0], pair[1, 0]) for pair in x.permute(2, 0, 3, 1, 4).split(2)]


def assert_layers_equal(actual, expected):
    assert len(actual) == len(expected)
    for layer, (a, e) in enumerate(zip(actual, expected, strict=True)):
        for name, x, y in zip(("key", "value"), a, e, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, msg=lambda m, n=name, i=layer: f"{n} of layer {i}: {m}")


def test_docstrings():
    for module in (prefix_kv, soft_prompt):
        failed, attempted = doctest.testmod(module)
        assert attempted > 0
        assert failed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layout_and_gradients_are_those_of_peft(dtype):
    config = PrefixTuningConfig(num_virtual_tokens=5, token_dim=8, num_layers=3)
    encoder = PrefixEncoder(config).to(dtype)
    prefix = PrefixKV(None, 5, **GEOMETRY, dtype=dtype)
    with torch.no_grad():
        prefix.trainable[0].copy_(encoder.embedding.weight)
    ours, theirs = prefix.layer_kv(), peft_layers(encoder(torch.arange(5)))
    assert_layers_equal(ours, theirs)
    for kv in (ours, theirs):
        torch.manual_seed(1)
        sum((x * torch.randn_like(x)).sum() for pair in kv for x in pair).backward()
    torch.testing.assert_close(prefix.trainable[0].grad, encoder.embedding.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_projection_and_its_gradients_are_those_of_peft(dtype, tolerance):
    config = PrefixTuningConfig(
        num_virtual_tokens=5, token_dim=8, num_layers=3, encoder_hidden_size=7, prefix_projection=True
    )
    encoder = PrefixEncoder(config).to(dtype)
    prefix = PrefixKV(None, 5, **GEOMETRY, projection=7, dtype=dtype)
    prefix.trainable[0].data.copy_(encoder.embedding.weight)
    prefix.transform.load_state_dict(encoder.transform.state_dict())
    ours, theirs = prefix.layer_kv(), peft_layers(encoder(torch.arange(5)[None].expand(3, -1))[0])
    for pair, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(pair, expected, rtol=tolerance, atol=tolerance)
    for kv in (ours, theirs):
        sum(x.square().sum() for pair in kv for x in pair).backward()
    gradients = [encoder.embedding.weight.grad, *(p.grad for p in encoder.transform.parameters())]
    for parameter, expected in zip(prefix.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_frozen_tokens_are_those_of_peft_cartridges():
    encoder = CartridgeEncoder(CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, token_dim=8, num_layers=3))
    prefix = PrefixKV(None, 5, **GEOMETRY, num_frozen_tokens=2)
    prefix.load_state_dict({"frozen.0": encoder.frozen_embedding, "trainable.0": encoder.trainable_embedding})
    assert_layers_equal(prefix.layer_kv(), peft_layers(encoder.weight))
    sum(x.square().sum() for pair in prefix.layer_kv() for x in pair).backward()
    assert prefix.frozen[0].grad is None
    torch.testing.assert_close(prefix.trainable[0].grad, 2 * prefix.trainable[0].detach())


def test_a_step_leaves_frozen_tokens_alone():
    prefix = PrefixKV(None, [4, 2, 0], **GEOMETRY, num_frozen_tokens=3)
    before = [[x.detach().clone() for x in pair] for pair in prefix.layer_kv()]
    optimizer = torch.optim.AdamW([p for p in prefix.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    sum(x.square().sum() for pair in prefix.layer_kv() for x in pair).backward()
    optimizer.step()
    for pair, old in zip(prefix.layer_kv(), before, strict=True):
        for x, y in zip(pair, old, strict=True):
            assert torch.equal(x[:, :3], y[:, :3]), "a frozen token moved"
            assert not (x[:, 3:] == y[:, 3:]).any(), "a trainable token did not move"


@pytest.mark.parametrize("lengths", [5, [5, 0, 3]])
def test_layers_are_views_of_the_parameters(lengths):
    prefix = PrefixKV(None, lengths, **GEOMETRY)
    storages = {p.untyped_storage().data_ptr() for p in prefix.parameters()}
    for length, pair in zip(prefix.lengths, prefix.layer_kv(), strict=True):
        for x in pair:
            assert x.shape == (2, length, 4)
            assert x.stride(-1) == 1
            assert length == 0 or x.untyped_storage().data_ptr() in storages


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    num_frozen=st.integers(0, 4),
)
def test_any_lengths_give_back_the_cache_they_started_from(lengths, num_kv_heads, head_dim, num_frozen):
    num_frozen = min(num_frozen, max(lengths))
    cache = [tuple(torch.randn(1, num_kv_heads, n + 1, head_dim) for _ in range(2)) for n in lengths]
    prefix = PrefixKV.from_cache(cache, lengths, num_frozen_tokens=num_frozen)
    assert prefix.lengths == tuple(lengths)
    assert_layers_equal(
        prefix.layer_kv(), [tuple(x[0, :, :n] for x in pair) for n, pair in zip(lengths, cache, strict=True)]
    )
    trainable = sum(p.numel() for p in prefix.parameters() if p.requires_grad)
    assert trainable == sum(max(0, n - num_frozen) for n in lengths) * 2 * num_kv_heads * head_dim


@pytest.mark.parametrize(("num_frozen", "layout"), [(0, False), (2, False), (0, True)])
def test_bake_keeps_the_output(num_frozen, layout):
    prefix = PrefixKV(None, 5, **GEOMETRY, projection=6, num_frozen_tokens=num_frozen, peft_seq2seq_layout=layout)
    baked = prefix.bake()
    assert baked.transform is None
    assert_layers_equal(baked.layer_kv(), prefix.layer_kv())
    assert baked.origin == prefix.origin


def test_peft_seq2seq_layout_is_that_of_its_cache():
    prefix = PrefixKV(None, 5, **{**GEOMETRY, "num_layers": 4}, peft_seq2seq_layout=True)
    x = prefix.trainable[0].view(1, 5, 8, 2, 4)
    groups = torch.cat([x, x], dim=2).permute(2, 0, 3, 1, 4).split(4)
    assert_layers_equal(prefix.layer_kv(), [(group[0, 0], group[1, 0]) for group in groups])


def test_zero_starts_without_effect_and_can_learn():
    flat, projected = (PrefixKV(None, 5, **GEOMETRY, projection=h, init="zero") for h in (None, 6))
    for prefix in (flat, projected):
        assert all(not x.any() for pair in prefix.layer_kv() for x in pair)
        sum(x.sum() for pair in prefix.layer_kv() for x in pair).backward()
    assert projected.transform[2].weight.grad.any(), "the gradient of the projection vanishes"


def test_the_smallest_projection():
    prefix = PrefixKV(None, 5, **GEOMETRY, projection=1)
    assert [tuple(x.shape) for pair in prefix.layer_kv() for x in pair] == [(2, 5, 4)] * 6


def test_random_is_as_wide_as_asked():
    prefix = PrefixKV(None, 500, **GEOMETRY, std=0.1, num_frozen_tokens=100)
    for weight in (*prefix.trainable, *prefix.frozen):
        assert weight.std().item() == pytest.approx(0.1, rel=0.05)


def configs():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    gqa = {**small, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 16, "sliding_window": 3}
    return [
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(**small, num_key_value_heads=1), (2, 1, 8)),
        (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**gqa), (2, 2, 16)),
        (transformers.MistralForCausalLM, transformers.MistralConfig(**gqa), (2, 2, 16)),
        (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60,
                                                               bos_token_id=1, eos_token_id=2), (2, 4, 8)),
        (transformers.BertForSequenceClassification, transformers.BertConfig(**small), (2, 4, 8)),
        (transformers.T5ForConditionalGeneration, transformers.T5Config(
            d_model=32, num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=6, d_ff=32, vocab_size=60,
            decoder_start_token_id=0), (3, 4, 6)),
        (transformers.BartForConditionalGeneration, transformers.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=8,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, pad_token_id=1, bos_token_id=0, eos_token_id=2,
            forced_eos_token_id=2, decoder_start_token_id=2), (3, 8, 4)),
    ]  # fmt: skip


@pytest.mark.parametrize(("model_cls", "config", "geometry"), configs(), ids=lambda x: getattr(x, "__name__", ""))
def test_geometry_and_real_text_of_each_family(model_cls, config, geometry):
    model = model_cls(config)
    for source in (model, config):
        prefix = PrefixKV(source, 4)
        assert (prefix.num_layers, prefix.num_kv_heads, prefix.head_dim) == geometry
    prefix = PrefixKV.from_text(model, tokenizer, "a text", 9)
    assert all(x.shape == (geometry[1], 9, geometry[2]) for pair in prefix.layer_kv() for x in pair)
    assert all(x.abs().sum() > 0 for pair in prefix.layer_kv() for x in pair)


def test_from_text_is_the_cache_of_the_text_and_leaves_the_model_alone():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prefix = PrefixKV.from_text(model, tokenizer, "abc", [7, 0], num_frozen_tokens=1)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    ids = torch.tensor([tokenizer("abcabca")["input_ids"]])
    cache = model.eval()(ids, use_cache=True).past_key_values
    torch.testing.assert_close(prefix.layer_kv()[0], (cache.layers[0].keys[0], cache.layers[0].values[0]))
    assert prefix.layer_kv()[1][0].shape == (2, 0, 8)
    assert prefix.trainable[0].requires_grad


def test_from_text_of_a_half_precision_checkpointed_model_is_an_fp32_master():
    model = llama().to(torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    prefix = PrefixKV.from_text(model, tokenizer, "abc", 3)
    assert prefix.trainable[0].dtype == torch.float32
    assert prefix.trainable[0].abs().sum() > 0


def test_a_real_text_prefix_stands_for_its_text():
    model = llama().eval()
    ids = torch.tensor([tokenizer("some words here")["input_ids"]])
    prefix = PrefixKV.from_text(model, tokenizer, "some words here", 6)
    cache = transformers.DynamicCache([(k[None], v[None]) for k, v in prefix.layer_kv()])
    out = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids).logits[:, 6:])


BAD_PREFIX = [
    ({"head_dim": None}, "model_or_config: expected a model or config, or num_layers"),
    ({"model_or_config": "gpt2", **dict.fromkeys(GEOMETRY)}, "expected a Hugging Face model or config"),
    ({"head_dim": 0}, "head_dim: expected an int of at least 1, got 0"),
    ({"length": -1}, "length: expected an int >= 0, or one for each of 3 layers, got -1"),
    ({"length": [1, 2]}, "length: expected an int >= 0, or one for each of 3 layers, got [1, 2]"),
    ({"length": [1, 2, 1.5]}, "length: expected an int >= 0, or one for each of 3 layers, got [1, 2, 1.5]"),
    ({"num_frozen_tokens": 6}, "num_frozen_tokens: expected 0 to length = 5, got 6"),
    ({"projection": 0}, "projection: expected None or a hidden size of at least 1, got 0"),
    ({"projection": 4, "length": [1, 2, 3]}, "projection: expected one length for all layers, got lengths [1, 2, 3]"),
    ({"peft_seq2seq_layout": True, "length": [1, 2, 3]}, "peft_seq2seq_layout: expected one length for all layers"),
    ({"init": "ones"}, "init: expected 'random', 'zero' or (key, value) per layer, got 'ones'"),
    ({"init": [(torch.zeros(2, 5, 4),) * 2]}, "init: expected (key, value) of 3 layers, got 1"),
    ({"init": [(torch.zeros(2, 4, 4),) * 2] * 3}, "layer 0: expected keys and values [Hkv = 2, at least 5 tokens"),
    ({"init": [(torch.zeros(2, 5, 4),) * 2] * 3, "projection": 4}, "init: expected 'random' or 'zero' with"),
    ({"num_kv_heads": [1, 2]}, "num_kv_heads: expected an int, or one for each of 3 layers, got [1, 2]"),
    ({"num_kv_heads": [2, 0, 2], "length": [1, 1, 1]}, "length: expected 0 in layer 1, which has no keys and values"),
    ({"value_head_dim": 2, "projection": 4}, "projection: expected keys and values of the same width in every layer"),
    ({"num_prefixes": 0}, "num_prefixes: expected None or at least 1, got 0"),
    ({"num_prefixes": 2, "projection": 4}, "num_prefixes: expected None, or prefixes of one length for all layers"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_PREFIX, ids=lambda x: x if isinstance(x, str) else "")
def test_prefix_messages(changes, message):
    with pytest.raises(ValueError, match="expected") as error:
        PrefixKV(**{"model_or_config": None, "length": 5, **GEOMETRY, **changes})
    assert message in str(error.value)


BAD_CACHE = [
    ([], None, "cache: expected keys and values of at least one layer, got none of any layer"),
    (transformers.DynamicCache(), None, "cache: expected keys and values of at least one layer"),
    ([(None, None)], None, "got none of [0]"),
    ([(torch.zeros(2, 1, 3, 4),) * 2], None, "layer 0: expected [1, Hkv, T, D] or [Hkv, T, D], got [2, 1, 3, 4]"),
    ([(torch.zeros(1, n, 4),) * 2 for n in (3, 4)], None, "length: expected an int or one per layer"),
    ([(torch.zeros(1, 3, 4),) * 2], 4, "at least 4 tokens"),
]


@pytest.mark.parametrize(("cache", "length", "message"), BAD_CACHE, ids=lambda x: x if isinstance(x, str) else "")
def test_cache_messages(cache, length, message):
    with pytest.raises(ValueError, match="expected") as error:
        PrefixKV.from_cache(cache, length)
    assert message in str(error.value)


def test_text_messages():
    model = llama(max_position_embeddings=8)
    with pytest.raises(ValueError, match="expected at least one token, got ''"):
        PrefixKV.from_text(model, tokenizer, "", 3)
    with pytest.raises(ValueError, match="length: expected at most the model's 8 positions, got 9"):
        PrefixKV.from_text(model, tokenizer, "abc", 9)


def test_lengths_that_differ_have_no_peft_layout():
    with pytest.raises(ValueError, match="prompt_embeddings: expected one length"):
        PrefixKV(None, [1, 2, 3], **GEOMETRY).prompt_embeddings()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("LlamaForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("BertModel", "FEATURE_EXTRACTION"),
        (None, "CAUSAL_LM"),
    ],
)
def test_task_type_of_a_config(name, task):
    config = transformers.LlamaConfig(architectures=[name] if name else None, name_or_path="somebody/model")
    origin = PrefixKV(config, 1, device="meta").origin
    assert origin == ("somebody/model", None, task)
    assert PrefixKV(transformers.T5Config(), 1, device="meta").origin.task_type == "SEQ_2_SEQ_LM"


def test_soft_prompt_runs_the_operation():
    model = llama()
    prompt = SoftPrompt(model, 3)
    ids, weight = torch.tensor([[4, 5], [6, 7]]), model.get_input_embeddings().weight
    assert torch.equal(prompt(ids, weight), soft_prompt_embedding(ids, weight, prompt.weight))
    bank = SoftPrompt(model.config, 3, num_prompts=4)
    which = torch.tensor([3, 0])
    out = bank(ids, weight, which)
    assert torch.equal(out[:, :3], bank.weight[which])
    assert (repr(prompt), repr(bank)) == (
        "SoftPrompt(length=3, embed_dim=32)",
        "SoftPrompt(num_prompts=4, length=3, embed_dim=32)",
    )


def test_soft_prompt_starts():
    model = llama().to(torch.bfloat16)
    weight = model.get_input_embeddings().weight
    rows = weight[tokenizer("abcab")["input_ids"]]
    text = SoftPrompt.from_text(model, tokenizer, "abc", 5)
    assert text.weight.dtype == torch.float32
    assert torch.equal(text.weight, rows.float())
    bank = SoftPrompt.from_text(model, tokenizer, "abc", 5, num_prompts=2)
    assert torch.equal(bank.weight, rows.float().expand(2, -1, -1))
    vocab = SoftPrompt(weight, 5, init="vocab").weight
    assert all((row == weight.float()).all(1).any() for row in vocab), "a row is no token's embedding"
    assert SoftPrompt(weight, 500, std=0.3).weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_soft_prompt_follows_embeddings_narrower_than_the_model():
    config = transformers.ElectraConfig(embedding_size=16, hidden_size=32)
    assert SoftPrompt(config, 2).embed_dim == 16
    assert SoftPrompt(transformers.OPTConfig(hidden_size=32, word_embed_proj_dim=16), 2).embed_dim == 16


BAD_PROMPT = [
    ({"model_or_embedding": None, "embed_dim": None}, "model_or_embedding: expected a model, config or weight"),
    ({"length": -1}, "expected length >= 0"),
    ({"num_prompts": 0}, "num_prompts None or >= 1"),
    (
        {"init": "vocab"},
        "init: expected 'random', 'vocab' (with a model or embedding weight) or a tensor, got 'vocab'",
    ),
    ({"init": torch.zeros(4, 8)}, "init: expected a tensor that expands to [3, 8], got [4, 8]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PROMPT, ids=lambda x: x if isinstance(x, str) else "")
def test_soft_prompt_messages(changes, message):
    with pytest.raises(ValueError, match="expected") as error:
        SoftPrompt(**{"model_or_embedding": None, "length": 3, "embed_dim": 8, **changes})
    assert message in str(error.value)
