# SPDX-License-Identifier: Apache-2.0
"""A PrefixKV in encoders that take no cache, compared with stock eager attention over keys concatenated by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers as hf
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern import PrefixKV
from tests.huggingface import by_hand, models
from tests.huggingface.models import BATCH, IDS, LEFT, PREFIX, RIGHT, SEQ, VOCAB

TOLERANCE = 1e-5

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_WINDOWS = {**_SIZES, **_SPECIAL, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
_GQA = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2, "head_dim": 16}
_T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 24, "d_ff": 128, "num_layers": 3, "num_heads": 4}
_ESM = {**_SIZES, "mask_token_id": 4, "pad_token_id": 1}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A kind of encoder.

    Attributes:
        model, config: names of its classes.
        arguments: of the config.
        geometry: (layers, key-value heads, head dim).
        padding: the token whose row of the position table padding has; None if positions count all columns.
    """

    model: str
    config: str
    arguments: dict[str, Any]
    geometry: tuple[int, int, int] = (3, 4, 16)
    padding: int | None = None


ENCODERS = {
    "albert": Encoder("AlbertForMaskedLM", "AlbertConfig", {**_SIZES, "embedding_size": 32}),
    "albert (2 groups)": Encoder(
        "AlbertForSequenceClassification", "AlbertConfig",
        {**_SIZES, "embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2}, (4, 4, 16),
    ),
    "clip (causal)": Encoder("CLIPTextModel", "CLIPTextConfig", {**_SIZES, **_SPECIAL}),
    "distilbert": Encoder(
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4},
    ),
    "esm (rotary)": Encoder("EsmForMaskedLM", "EsmConfig", {**_ESM, "position_embedding_type": "rotary"}),
    "esm (table)": Encoder("EsmModel", "EsmConfig", {**_ESM, "position_embedding_type": "absolute"}, padding=1),
    "esmc": Encoder("EsmcModel", "EsmcConfig", {**_GQA, "num_key_value_heads": 4}),
    "eurobert": Encoder("EuroBertForSequenceClassification", "EuroBertConfig", _GQA, (3, 2, 16)),
    "gte": Encoder("GteForMaskedLM", "GteConfig", _SIZES),
    "jina v3": Encoder("JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3Config", {**_SIZES, **_SPECIAL}),
    "layoutlm": Encoder("LayoutLMForTokenClassification", "LayoutLMConfig", _SIZES),
    "markuplm": Encoder("MarkupLMModel", "MarkupLMConfig", {**_SIZES, **_SPECIAL}, padding=0),
    "mobilebert": Encoder(
        "MobileBertForMaskedLM", "MobileBertConfig",
        {**_SIZES, "embedding_size": 64, "intra_bottleneck_size": 32, "true_hidden_size": 32}, (3, 4, 8),
    ),
    "modernbert": Encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", {**_WINDOWS, "local_attention": 4}
    ),
    "neomme (GQA)": Encoder("NeoMMEForMaskedLM", "NeoMMEConfig", {**_GQA, "sliding_window": 3}, (3, 2, 16)),
    "nomic": Encoder("NomicBertForMaskedLM", "NomicBertConfig", _SIZES),
    "privacy filter (sinks)": Encoder(
        "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig",
        {**_GQA, "sliding_window": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "experts_implementation": "eager"},
        (3, 2, 16),
    ),
    "splinter": Encoder("SplinterModel", "SplinterConfig", _SIZES),
    "t5": Encoder("T5EncoderModel", "T5Config", _T5, (3, 4, 24)),
    "umt5": Encoder("UMT5EncoderModel", "UMT5Config", _T5, (3, 4, 24)),
    "ultrabert": Encoder("UltrabertForMaskedLM", "UltrabertConfig", {**_WINDOWS, "sliding_window": 4}),
}  # fmt: skip
ENCODERS = {name: kind for name, kind in ENCODERS.items() if hasattr(hf, kind.model)}


def encoder(name: str, **arguments: Any) -> Any:
    """A model with the same weights at every call, without dropout, with the stock eager attention."""
    kind = ENCODERS[name]
    family = models.Family(getattr(hf, kind.model), getattr(hf, kind.config), {**kind.arguments, **arguments})
    model = models.base_model(family)
    for parameter in model.parameters():  # of zeros, nothing could be told apart
        if parameter.dim() > 1:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(parameter.numel())
                parameter.normal_(std=0.1)
    model.set_attn_implementation("eager")
    return model


def prefix_of(name: str, length: Any = PREFIX) -> PrefixKV:
    layers, heads, dim = ENCODERS[name].geometry
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return PrefixKV(None, length, num_layers=layers, num_kv_heads=heads, head_dim=dim, std=1.0)


def backbone_of(model: Any) -> Any:
    return getattr(model.base_model, "text_model", model.base_model)


@contextlib.contextmanager
def prefix_by_hand(model: nn.Module, prefix: PrefixKV) -> Iterator[None]:
    """Within the block, the eager attention of the model's file sees the prefix before the keys of each layer."""
    kv, calls = prefix.layer_kv(), iter(range(10**6))
    modeling = sys.modules[type(backbone_of(model)).__module__]
    stock = modeling.eager_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        prefix_k, prefix_v = (x.expand(key.shape[0], -1, -1, -1) for x in kv[next(calls) % len(kv)])
        length = prefix_k.shape[2]
        mask = mask if mask is None else nn.functional.pad(mask, (length, 0))
        if kwargs.get("position_bias") is not None:  # T5
            computes = next(m for m in _from(model, module) if getattr(m, "has_relative_attention_bias", False))
            total = length + key.shape[2]
            kwargs["position_bias"] = type(computes).compute_bias(computes, total, total)[:, :, length:]
        return stock(module, query, torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2), mask, **kwargs)

    modeling.eager_attention_forward = attend
    try:
        yield
    finally:
        modeling.eager_attention_forward = stock


def _from(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """``module``, and the modules before it: T5 computes the bias in its first layer for all, UMT5 in each."""
    return [module, *model.modules()]


def positions_behind(name: str, ids: Tensor, length: int) -> dict[str, Tensor]:
    """The positions of tokens behind a prefix, as an argument of the model."""
    padding = ENCODERS[name].padding
    if name in ("t5", "umt5"):
        return {}
    if padding is None:
        return {"position_ids": torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1) + length}
    rows = []
    for row in ids.tolist():
        real = iter(range(padding + 1 + length, 10**6))
        rows.append([padding if token == padding else next(real) for token in row])
    return {"position_ids": torch.tensor(rows)}


def first_output(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def step(model: nn.Module, prefix: PrefixKV, mask: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The output at tokens and the prefix's gradient."""
    prefix.zero_grad()
    output = first_output(model(attention_mask=mask, **inputs))
    if mask is not None and output.shape[:2] == mask.shape:
        output = output[mask.bool()]
    (output * torch.linspace(-1.0, 1.0, output.shape[-1])).square().mean().backward()
    return output.detach(), torch.cat([weight.grad.flatten() for weight in prefix.trainable])


def assert_as_by_hand(name: str, mask: Tensor | None, *, shift: bool, length: Any = PREFIX) -> None:
    prefix, model = prefix_of(name, length), encoder(name).train()
    pad = 1 if name.startswith("esm (") else 0
    ids = IDS if mask is None else IDS.masked_fill(mask == 0, pad)
    positions = positions_behind(name, ids, max(prefix.lengths)) if shift else {}
    with prefix_by_hand(model, prefix):
        want = step(model, prefix, mask, input_ids=ids, **positions)
    peftkern.patch(model, prefix, shift_positions=shift)
    got = step(model, prefix, mask, input_ids=ids)
    by_hand.assert_close(got[0], want[0], "outputs", TOLERANCE)
    by_hand.assert_close(got[1], want[1], "gradients of the prefix", TOLERANCE)


#: A row with padding on the left, one with padding on the right, and one without.
MIXED = LEFT.clone()
MIXED[1] = RIGHT[0]


@pytest.mark.parametrize("mask", [None, MIXED], ids=["no padding", "padding"])
@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_and_gradients_are_those_of_concatenated_keys(name, mask):
    assert_as_by_hand(name, mask, shift=True)


@pytest.mark.parametrize("name", ["albert", "esm (table)", "modernbert", "t5"])
def test_positions_from_zero(name):
    assert_as_by_hand(name, MIXED, shift=False)


@pytest.mark.parametrize("name", ["albert", "modernbert", "umt5"])
def test_each_layer_has_its_own_length_and_some_none(name):
    assert_as_by_hand(name, MIXED, shift=True, length=[2, 0, PREFIX])


def test_positions_that_are_given_count_from_the_prefix():
    prefix, model = prefix_of("modernbert"), encoder("modernbert").eval()
    given = torch.arange(SEQ).flip(0)[None].expand(BATCH, -1)
    with prefix_by_hand(model, prefix):
        want = model(input_ids=IDS, position_ids=given + PREFIX).logits
    got = peftkern.patch(model, prefix)(input_ids=IDS, position_ids=given).logits
    by_hand.assert_close(got, want, "outputs")


def test_embeddings_in_place_of_tokens():
    """Without tokens, there is no padding that a table of positions could know."""
    prefix, model = prefix_of("esm (table)"), encoder("esm (table)").eval()
    embeds = model.get_input_embeddings()(IDS)
    with prefix_by_hand(model, prefix):
        want = model(inputs_embeds=embeds, **positions_behind("esm (table)", IDS, PREFIX)).last_hidden_state
    got = peftkern.patch(model, prefix)(inputs_embeds=embeds).last_hidden_state
    by_hand.assert_close(got, want, "outputs")


@pytest.mark.parametrize("name", ["eurobert", "modernbert", "t5"])
def test_gradient_checkpointing_changes_nothing(name):
    prefix = prefix_of(name)
    model = peftkern.patch(encoder(name).train(), prefix)
    want = step(model, prefix, MIXED, input_ids=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = step(model, prefix, MIXED, input_ids=IDS)
    for x, y in zip(got, want, strict=True):
        by_hand.assert_close(x, y, "outputs or gradients", TOLERANCE)


def test_layers_with_shared_weights_are_not_recomputed():
    """In the backward pass, nothing tells which of the layers a module computes."""
    prefix, model = prefix_of("albert"), encoder("albert").train()
    group = model.albert.encoder.albert_layer_groups[0]
    forward = group.forward
    group.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    peftkern.patch(model, prefix)
    loss = model(input_ids=IDS).logits.mean()
    with pytest.raises(ValueError, match=r"expected no activation checkpointing, because .* computes layers"):
        loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_prefix_from_text_has_the_keys_of_the_text(name):
    model, text = encoder(name).eval(), [5, 6, 7, 8]
    prefix = PrefixKV.from_text(model, lambda _: {"input_ids": text}, "", 4)
    assert [tuple(shape[:2]) for shape in prefix.shapes] == [ENCODERS[name].geometry[1:]] * prefix.num_layers
    assert prefix.num_layers == ENCODERS[name].geometry[0]
    modeling, kv = sys.modules[type(backbone_of(model)).__module__], []
    stock = modeling.eager_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        kv.append((key[0], value[0]))
        return stock(module, query, key, value, *args, **kwargs)

    modeling.eager_attention_forward = attend
    try:
        model(input_ids=torch.tensor([text]))
    finally:
        modeling.eager_attention_forward = stock
    for got, want in zip(prefix.layer_kv(), kv, strict=True):
        by_hand.assert_close(got[0], want[0], "keys")
        by_hand.assert_close(got[1], want[1], "values")


@torch.no_grad()
def test_unpatched_models_are_as_before():
    model = encoder("modernbert").eval()
    model.set_attn_implementation("sdpa")
    want, before = model(input_ids=IDS, attention_mask=MIXED).logits, dict(model.config.to_dict())
    with peftkern.patched(model, prefix_of("modernbert")):
        assert not torch.equal(model(input_ids=IDS, attention_mask=MIXED).logits, want)
        assert peftkern.explain(model).startswith("ModernBertForSequenceClassification: a prefix in 3 layers")
    assert torch.equal(model(input_ids=IDS, attention_mask=MIXED).logits, want)
    assert model.config.to_dict() == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["albert", "eurobert", "modernbert"])
def test_half_precision(name):
    """The trial's bound is that of the dtype; results are close to those in fp32."""
    prefix, model = prefix_of(name), encoder(name).eval()
    want = peftkern.patch(model, prefix)(input_ids=IDS, attention_mask=MIXED)
    peftkern.unpatch(model)
    model.set_attn_implementation("sdpa")
    got = peftkern.patch(model.to(torch.bfloat16), prefix)(input_ids=IDS, attention_mask=MIXED)
    assert models.difference(first_output(got).float(), first_output(want)) <= 0.1


CALLS = {
    "attentions": ({"output_attentions": True}, "output_attentions: expected False, because ModernBertModel"),
    "cache": ({"past_key_values": hf.DynamicCache()}, "cache: expected None, as ModernBertModel takes none"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_the_prefix_cannot_follow_are_refused(case):
    inputs, message = CALLS[case]
    model = peftkern.patch(encoder("modernbert").eval(), prefix_of("modernbert"))
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, **inputs)


def test_the_prefix_takes_positions_of_a_table():
    model = peftkern.patch(encoder("albert").eval(), prefix_of("albert"))
    model(input_ids=torch.ones(1, 59, dtype=torch.long))
    with pytest.raises(ValueError, match="expected at most 64 positions"):
        model(input_ids=torch.ones(1, 60, dtype=torch.long))


def test_parts_of_the_model_do_not_run_without_the_prefix():
    model = peftkern.patch(encoder("albert").eval(), prefix_of("albert"))
    with pytest.raises(ValueError, match="expected a call of the model"):
        model.albert.encoder(torch.randn(1, 3, 32))


_TINY = {key: value for key, value in _SIZES.items() if key != "pad_token_id"}
_NOT_DISPATCHED = "does not dispatch its attention through transformers' AttentionInterface"
REFUSED = {
    "deberta": (lambda: hf.DebertaModel(hf.DebertaConfig(**_TINY)), _NOT_DISPATCHED),
    "deberta-v2": (lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**_TINY)), _NOT_DISPATCHED),
    "mpnet": (lambda: hf.MPNetModel(hf.MPNetConfig(**_TINY)), _NOT_DISPATCHED),
    "longformer": (
        lambda: hf.LongformerModel(hf.LongformerConfig(**_TINY, attention_window=4)), _NOT_DISPATCHED
    ),
    "fourier transforms": (
        lambda: hf.FNetModel(hf.FNetConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2)),
        "a prefix reaches 0 of 2 layers of FNetModel",
    ),
    "keyword arguments end before attention": (
        lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**_TINY)), "a prefix reaches 0 of 3 layers of SiglipTextModel"
    ),
    "pixels": (
        lambda: hf.ViTModel(hf.ViTConfig(**{**_TINY, "image_size": 16, "patch_size": 8})),
        "expected a model that embeds tokens, got ViTModel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_prefix_cannot_reach_is_refused_by_name(case):
    build, message = REFUSED[case]
    model = build().eval()
    before = set(model.__dict__), str(model.config._attn_implementation)
    with pytest.raises(ValueError, match=message):
        peftkern.patch(model, PrefixKV(None, PREFIX, num_layers=3, num_kv_heads=4, head_dim=16))
    assert (set(model.__dict__), str(model.config._attn_implementation)) == before


def test_positions_that_cannot_be_shifted_are_refused_by_name():
    model = encoder("modernbert")
    rotary = model.model.rotary_emb
    stock = rotary.forward
    rotary.forward = lambda x, position_ids, *args: stock(x, torch.arange(x.shape[1])[None], *args)
    with pytest.raises(ValueError, match="shift_positions: expected False, because ModernBertModel ignores"):
        peftkern.patch(model, prefix_of("modernbert"))
    peftkern.patch(model, prefix_of("modernbert"), shift_positions=False)


@pytest.mark.parametrize("name", ["modernbert", "deberta-v2"])
def test_peft_s_prefix_keeps_peft_s_error(name):
    """PEFT gives its prefix to the model as a cache, which these models do not take."""
    settings = {**_SIZES, "num_labels": 3}
    kinds = {
        "modernbert": lambda: encoder("modernbert"),
        "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**settings)),
    }
    config = PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=PREFIX, num_layers=3, num_attention_heads=4, token_dim=64
    )
    model = get_peft_model(kinds[name](), config)
    with pytest.raises(ValueError) as stock:
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0]))
    with pytest.warns(UserWarning, match="the prefix is copied for every sample, by PEFT's own code"):
        peftkern.patch(model)
    with pytest.raises(ValueError) as patched:
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0]))
    assert str(patched.value) == str(stock.value)
    peftkern.unpatch(model)
    with pytest.raises(ValueError, match="strict=True"):
        peftkern.patch(model, strict=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:peftkern:UserWarning")
@pytest.mark.parametrize("name", ["albert", "modernbert", "deberta-v2"])
def test_a_soft_prompt_is_put_before_every_sample(name):
    if name == "deberta-v2":
        torch.manual_seed(0)
        model = hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**_SIZES)).eval()
    else:
        model = encoder(name).eval()
    width = model.get_input_embeddings().weight.shape[1]
    want = first_output(by_hand.with_prompt(model, by_hand.prompt_values(width=width), IDS, MIXED))
    peftkern.patch(model, by_hand.soft_prompt(width=width))
    got = first_output(model(input_ids=IDS, attention_mask=MIXED))
    if want.dim() == 3:
        want = by_hand.token_rows(want, SEQ)
    by_hand.assert_close(got, want, "outputs")
    stock = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX, token_dim=width)
    peftkern.unpatch(model)
    peft_model = get_peft_model(model.base_model, stock).eval()
    want = peft_model(input_ids=IDS, attention_mask=MIXED).last_hidden_state
    got = peftkern.patch(peft_model)(input_ids=IDS, attention_mask=MIXED).last_hidden_state
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:peftkern:UserWarning")
def test_a_soft_prompt_has_token_type_0_and_the_tokens_keep_theirs():
    model = encoder("albert").eval()
    width = model.get_input_embeddings().weight.shape[1]
    types = torch.arange(SEQ).expand_as(IDS) % 2
    values = by_hand.prompt_values(width=width)
    padded = torch.nn.functional.pad(types, (PREFIX, 0))
    want = by_hand.token_rows(
        first_output(by_hand.with_prompt(model, values, IDS, MIXED, token_type_ids=padded)), SEQ
    )
    peftkern.patch(model, by_hand.soft_prompt(width=width))
    got = first_output(model(input_ids=IDS, attention_mask=MIXED, token_type_ids=types))
    by_hand.assert_close(got, want, "outputs")
    without = first_output(model(input_ids=IDS, attention_mask=MIXED))
    assert not torch.allclose(without, want, atol=1e-3), "the types change nothing: the test shows nothing"


@pytest.mark.filterwarnings("ignore:peftkern:UserWarning")
def test_a_soft_prompt_has_no_labels_and_the_tokens_keep_theirs():
    model = encoder("albert").eval()
    width = model.get_input_embeddings().weight.shape[1]
    labels = IDS.masked_fill(MIXED == 0, -100)
    want = by_hand.with_prompt(model, by_hand.prompt_values(width=width), IDS, MIXED, labels).loss
    peftkern.patch(model, by_hand.soft_prompt(width=width))
    by_hand.assert_close(model(input_ids=IDS, attention_mask=MIXED, labels=labels).loss, want, "losses")
