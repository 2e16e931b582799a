# SPDX-License-Identifier: Apache-2.0
"""A PrefixKV in the parts of encoder-decoders, compared with stock eager attention over keys concatenated by hand."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftkern
from peftkern import PrefixKV
from peftkern.huggingface.attention import Implementation
from tests.huggingface import by_hand, models
from tests.huggingface.models import BATCH, IDS, PREFIX, RIGHT, TARGETS, VOCAB, Family

TOLERANCE = 1e-5
ALL = ("encoder", "cross", "decoder")

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_T5 = {**_TOKENS, "d_model": 64, "d_kv": 24, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
#: Encoder and decoder differ in layers, heads and head dim.
_BART = {
    **_TOKENS, "d_model": 64, "max_position_embeddings": 64, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 128,
}  # fmt: skip


def _bert_bert() -> Any:
    bert = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    encoder = hf.BertConfig(**bert, num_hidden_layers=3, num_attention_heads=4)
    decoder = hf.BertConfig(**bert, num_hidden_layers=2, num_attention_heads=2)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _seq2seq(name: str, arguments: dict[str, Any]) -> Family:
    model = getattr(hf, f"{name}ForConditionalGeneration", None) or getattr(hf, f"{name}MTModel")
    return Family(model, getattr(hf, f"{name}Config"), arguments, "SEQ_2_SEQ_LM")


FAMILIES = {
    "t5": _seq2seq("T5", _T5),
    "umt5": _seq2seq("UMT5", _T5),
    "bart": _seq2seq("Bart", _BART),
    "mbart": _seq2seq("MBart", _BART),
    "pegasus": _seq2seq("Pegasus", _BART),
    "marian": _seq2seq("Marian", {**_BART, "decoder_vocab_size": VOCAB}),
    "m2m 100": _seq2seq("M2M100", _BART),
    "blenderbot": _seq2seq("Blenderbot", _BART),
    "whisper": _seq2seq(
        "Whisper", {**_BART, "max_target_positions": 64, "max_source_positions": 5, "num_mel_bins": 8}
    ),
    "bert beside bert": Family(hf.EncoderDecoderModel, _bert_bert, {}, "SEQ_2_SEQ_LM"),
}


def seq2seq(name: str) -> Any:
    """A model with the same weights at every call, without dropout, with the stock eager attention."""
    model = models.base_model(FAMILIES[name])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        for parameter in model.parameters():  # of small weights, nothing could be told apart
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.set_attn_implementation("eager")
    return model


def prefix_of(name: str, parts: Any = ALL, length: Any = PREFIX) -> PrefixKV:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return PrefixKV(seq2seq(name), length, parts=parts, std=1.0)


def inputs_of(name: str, mask: Tensor | None) -> dict[str, Any]:
    if name == "whisper":  # its encoder has no padding
        return {"input_features": torch.randn(BATCH, 8, 10, generator=torch.Generator().manual_seed(7))}
    return {"input_ids": IDS, "attention_mask": mask}


_CROSS = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn")


@contextlib.contextmanager
def prefix_by_hand(model: nn.Module, prefix: PrefixKV) -> Iterator[None]:
    """Within the block, eager attention sees the prefix before the keys of each layer. Positions do not count it."""
    kv = prefix.layer_kv()
    encoder = dict(model.get_encoder().named_modules())
    names = {module: name for name, module in model.get_decoder().named_modules()}
    places: dict[nn.Module, int] = {}
    for part, first in ((part, layers.start) for part, layers in prefix.parts.items()):
        found = {v: k for k, v in encoder.items()} if part == "encoder" else names
        for module, name in found.items():
            is_cross = any(word in name for word in _CROSS)
            if part == "encoder" or is_cross == (part == "cross"):
                layer = re.search(r"(?:^|\.)(\d+)\.", name)
                places[module] = first + int(layer.group(1)) if layer else first
    files = {sys.modules[type(m).__module__] for m in model.modules() if type(m).__module__ != "torch.nn"}
    files = {file for file in files if hasattr(file, "eager_attention_forward")}

    def attend(stock: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        pair = kv[places[module]] if module in places else None
        if pair is None:
            return stock(module, query, key, value, mask, **kwargs)
        prefix_k, prefix_v = (x.expand(key.shape[0], -1, -1, -1) for x in pair)
        total = prefix_k.shape[2] + key.shape[2]
        mask = mask if mask is None else nn.functional.pad(mask, (total - mask.shape[-1], 0))
        bias = kwargs.get("position_bias")
        if bias is not None and any(word in names.get(module, "") for word in _CROSS):
            kwargs["position_bias"] = nn.functional.pad(bias, (total - bias.shape[-1], 0))
        elif bias is not None:  # T5 computes the bias in its first layer for all, UMT5 in each
            stack = model.get_decoder() if module in names else model.get_encoder()
            each = [module, *stack.modules()]
            computes = next(m for m in each if getattr(m, "has_relative_attention_bias", False))
            kwargs["position_bias"] = type(computes).compute_bias(computes, total, total)[:, :, -query.shape[2] :]
        return stock(module, query, torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2), mask, **kwargs)

    with contextlib.ExitStack() as stack:
        for file in files:
            stock = file.eager_attention_forward
            replaced = functools.partial(attend, stock)
            stack.enter_context(mock.patch.object(file, "eager_attention_forward", replaced))
        yield


def step(model: Any, prefix: PrefixKV, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and the prefix's gradient."""
    prefix.zero_grad()
    out = model(**inputs, labels=TARGETS)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), torch.cat([w.grad.flatten() for w in prefix.trainable])


def assert_as_by_hand(name: str, prefix: PrefixKV, mask: Tensor | None) -> None:
    model = seq2seq(name).train()
    with prefix_by_hand(model, prefix):
        want = step(model, prefix, **inputs_of(name, mask))
    peftkern.patch(model, prefix, shift_positions=False, prefix_in_window=False)
    got = step(model, prefix, **inputs_of(name, mask))
    for x, y, what in zip(got, want, ("loss", "logits", "gradients of the prefix"), strict=True):
        by_hand.assert_close(x, y, what, TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_concatenated_keys(name):
    assert_as_by_hand(name, prefix_of(name), RIGHT)


@pytest.mark.parametrize("parts", [("encoder",), ("cross",), ("decoder", "cross")], ids="+".join)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_some_parts(name, parts):
    assert_as_by_hand(name, prefix_of(name, parts), None)


def test_each_layer_has_its_own_length_and_some_none():
    assert_as_by_hand("bart", prefix_of("bart", length=[2, 0, 3, PREFIX, 0, 1, 0, 4]), RIGHT)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "marian", "whisper", "bert beside bert"])
def test_generated_tokens_are_those_of_concatenated_keys(name, beams):
    prefix, model = prefix_of(name), seq2seq(name).eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    inputs = inputs_of(name, RIGHT)
    if name == "whisper":  # its own generate makes several attempts, with timestamps
        options["decoder_input_ids"] = torch.ones(BATCH, 1, dtype=torch.long)
    generate = lambda: hf.GenerationMixin.generate(model, **inputs, **options)  # noqa: E731
    with prefix_by_hand(model, prefix):
        want = generate()
    peftkern.patch(model, prefix, shift_positions=False)
    assert generate().tolist() == want.tolist()
    options["use_cache"] = False
    assert generate().tolist() == want.tolist()


@torch.no_grad()
def test_the_cache_of_cross_attention_has_the_keys_of_the_encoder_alone():
    model = peftkern.patch(seq2seq("bart").eval(), prefix_of("bart"))
    cache = model(**inputs_of("bart", RIGHT), decoder_input_ids=TARGETS, use_cache=True).past_key_values
    assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers} == {IDS.shape[1]}
    assert {layer.keys.shape[2] for layer in cache.self_attention_cache.layers} == {TARGETS.shape[1]}


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_gradient_checkpointing_changes_nothing(name):
    prefix = prefix_of(name)
    model = peftkern.patch(seq2seq(name).train(), prefix)
    want = step(model, prefix, **inputs_of(name, RIGHT))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = step(model, prefix, **inputs_of(name, RIGHT))
    for x, y in zip(got, want, strict=True):
        by_hand.assert_close(x, y, "outputs or gradients", TOLERANCE)


def test_positions_of_the_decoder_count_its_own_prefix_alone():
    """As in a prefix of the decoder alone, which other tests compare with PEFT."""
    decoder = prefix_of("bart", ("decoder",))
    kv = [None] * 5 + decoder.layer_kv()
    lengths = [0] * 5 + [PREFIX] * 3
    prefix = prefix_of("bart", length=lengths)
    with torch.no_grad():
        prefix._assign(prefix._blocks_of(kv))
    inputs = {**inputs_of("bart", RIGHT), "labels": TARGETS}
    want = peftkern.patch(seq2seq("bart"), decoder)(**inputs).logits
    by_hand.assert_close(peftkern.patch(seq2seq("bart"), prefix)(**inputs).logits, want, "logits")


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart", "bert beside bert"])
def test_a_prefix_from_text_has_the_keys_of_the_text(name):
    """Encoder and decoder run on the text; each attention module's keys are those of this run."""
    model, ids = seq2seq(name).eval(), torch.tensor([[5, 6, 7, 8]])
    prefix = PrefixKV.from_text(model, lambda _: {"input_ids": ids[0].tolist()}, "", 4, parts=ALL)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    empty = PrefixKV(model, 0, parts=ALL)
    kv = empty.layer_kv()

    class Seen(list):
        def __getitem__(self, index: int) -> Any:
            self.last = index
            return kv[index]

    rows = Seen()
    empty.layer_kv = lambda: rows
    cat = torch.cat

    def record(tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
        if len(tensors) == 2 and tensors[0].dim() == 4 and tensors[0].shape[2] == 0 and dim == 2:
            seen.setdefault(rows.last, []).append(tensors[1][0])
        return cat(tensors, dim, **kwargs)

    with prefix_by_hand(model, empty), mock.patch.object(torch, "cat", record):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids, use_cache=False)
    assert sorted(seen) == list(range(prefix.num_layers))
    for layer, pair in enumerate(prefix.layer_kv()):
        for got, want in zip(pair, seen[layer], strict=True):
            by_hand.assert_close(got, want, f"keys or values of layer {layer}")


@torch.no_grad()
def test_unpatched_models_are_as_before():
    model = seq2seq("bart").eval()
    inputs = {**inputs_of("bart", RIGHT), "decoder_input_ids": TARGETS}
    want = model(**inputs).logits
    with peftkern.patched(model, prefix_of("bart")):
        assert not torch.equal(model(**inputs).logits, want)
        explanation = peftkern.explain(model)
        assert "a prefix in 2 encoder and 3 cross and 3 decoder layers, read in place" in explanation
    assert torch.equal(model(**inputs).logits, want)
    assert not isinstance(model.get_encoder().config._attn_implementation, Implementation)
    assert not model.get_encoder()._forward_pre_hooks


def test_saved_parts_are_loaded_again(tmp_path):
    prefix = prefix_of("bart")
    peftkern.save_prefix(prefix, tmp_path)
    loaded = peftkern.load_prefix(tmp_path, model=seq2seq("bart"))
    assert repr(loaded) == repr(prefix)
    assert loaded.parts == prefix.parts
    for x, y in zip(loaded.layer_kv(), prefix.layer_kv(), strict=True):
        assert torch.equal(x[0], y[0])
        assert torch.equal(x[1], y[1])
    assert '"PEFTKERN_PREFIX"' in (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="expected a prefix for the model's"):
        peftkern.load_prefix(tmp_path, model=seq2seq("mbart").__class__(hf.MBartConfig(**{**_BART, "d_model": 32})))


REFUSED = {
    "name": (lambda: PrefixKV(seq2seq("bart"), 2, parts=("encoder", "head")), "parts: expected different names of"),
    "one name": (lambda: PrefixKV(seq2seq("bart"), 2, parts="encoder"), "parts: expected different names of"),
    "no encoder": (
        lambda: PrefixKV(models.base_model(by_hand.LLAMA), 2, parts=ALL),
        "parts: expected .* for LlamaForCausalLM, which is not a model with an encoder",
    ),
    "config": (lambda: PrefixKV(hf.BartConfig(**_BART), 2, parts=ALL), "for BartConfig, which is not a model"),
    "sizes beside a model": (lambda: PrefixKV(seq2seq("bart"), 2, parts=ALL, head_dim=4), "expected None, because"),
    "layers that do not add up": (
        lambda: PrefixKV(None, 2, parts={"encoder": 2}, num_layers=3, num_kv_heads=2, head_dim=4),
        "num_layers: expected 2, the layers of parts=",
    ),
    "bank": (
        lambda: PrefixKV(seq2seq("bart"), 2, parts=ALL, num_prefixes=3), "num_prefixes: expected its default, or"
    ),
    "audio": (
        lambda: PrefixKV.from_text(seq2seq("whisper"), lambda _: {"input_ids": [5]}, "", 2, parts=ALL),
        "because WhisperEncoder reads input_features instead of text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_refused_by_name(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_models_and_calls_that_a_prefix_cannot_follow_are_refused_by_name():
    sizes = {"num_kv_heads": 4, "head_dim": 16}
    prefix = PrefixKV(None, 2, parts={"encoder": 2, "cross": 2}, **sizes)
    llama = models.base_model(by_hand.LLAMA)
    with pytest.raises(ValueError, match=r"parts: expected \('decoder',\), because LlamaForCausalLM has no encoder"):
        peftkern.patch(llama, prefix)
    with pytest.raises(ValueError, match=r"prefix \(cross\): expected 2 key-value heads of 32"):
        peftkern.patch(seq2seq("bart"), prefix)
    model = peftkern.patch(seq2seq("bart"), prefix_of("bart", ("encoder", "cross")))
    inputs = {**inputs_of("bart", None), "decoder_input_ids": TARGETS}
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="expected a call of the model"):
        model.model.decoder.layers[0](torch.randn(1, 2, 64), encoder_hidden_states=torch.randn(1, 2, 64))
