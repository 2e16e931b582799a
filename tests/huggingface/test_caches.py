# SPDX-License-Identifier: Apache-2.0
"""Each cache of ``generate`` either continues the prefix with stock tokens, or is refused before a token is made."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer, StaticLayer

import peftkern
from tests.huggingface import by_hand, kinds, models
from tests.huggingface import test_mixed_adapters as mixed
from tests.huggingface.kinds import KINDS
from tests.huggingface.models import FAMILIES, IDS, LEFT, ONES, PREFIX

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")

LLAMA = FAMILIES["llama (GQA)"]
PREFIXES = ("prefix", "native prefix")
PROMPTS = ("prompt", "native prompt")
STEPS = 5


def generate(model, mask=LEFT, **options):
    inputs = {"input_ids": IDS, "attention_mask": mask, **by_hand.GREEDY, "max_new_tokens": STEPS, **options}
    return model.generate(**inputs)


def options_of(implementation, **config):
    config = {"cache_config": config} if config else {}
    return {"cache_implementation": implementation, "disable_compile": True, **config}


def tokens_like_a_dynamic_cache(model, mask=LEFT, **options):
    want = generate(model, mask).tolist()
    for _ in range(2):  # the second call may reuse the first one's static cache
        assert generate(model, mask, **options).tolist() == want


# Static caches


@pytest.mark.parametrize("mask", [ONES, LEFT], ids=["ones", "left"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "opt"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_continues_in_a_static_cache(kind, name, mask):
    model = kinds.patched_model(kind, FAMILIES[name], strict=True).eval()
    tokens_like_a_dynamic_cache(model, mask, **options_of("static"))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_is_no_part_of_a_static_cache(kind):
    """The caller's layers store the sequence alone."""
    model = kinds.patched_model(kind, LLAMA).eval()
    base = getattr(model, "get_base_model", lambda: model)()
    given = StaticCache(base.config, max_cache_len=IDS.shape[1] + STEPS)
    cache = generate(model, past_key_values=given, return_dict_in_generate=True, disable_compile=True).past_key_values
    for layer, own in zip(cache.layers, given.layers, strict=True):
        assert layer is own
        assert type(layer) is StaticLayer
        assert int(layer.get_seq_length()) == IDS.shape[1] + STEPS - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generate_compiles_one_graph(kind):
    """As ``generate`` does by itself with a static cache on a GPU."""
    model = kinds.patched_model(kind, LLAMA).eval()
    want = generate(model).tolist()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = hf.CompileConfig(backend="eager")
    config._compile_all_devices = True
    assert generate(model, cache_implementation="static", compile_config=config).tolist() == want
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_beams_and_several_prompts_in_a_static_cache():
    model = kinds.patched_model("native prompt", LLAMA).eval()
    want = generate(model, num_beams=2).tolist()
    assert generate(model, num_beams=2, **options_of("static")).tolist() == want
    model = models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=True).eval()
    want = generate(model, task_ids=models.TASK_IDS).tolist()
    assert generate(model, task_ids=models.TASK_IDS, **options_of("static")).tolist() == want


@pytest.mark.parametrize("source", ["prefix", "prompt"])
def test_rows_of_several_adapters_in_a_static_cache(source):
    """Their prefixes have different lengths."""
    model = peftkern.patch(mixed._model("llama", source)).eval()
    batch = {**mixed._batch("left"), "labels": None, **by_hand.GREEDY, "adapter_names": mixed.NAMES}
    want = model.generate(**batch, max_new_tokens=STEPS).tolist()
    assert model.generate(**batch, max_new_tokens=STEPS, **options_of("static")).tolist() == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_with_sliding_windows_is_refused(kind):
    model = kinds.patched_model(kind, FAMILIES["gemma3"]).eval()
    with pytest.raises(ValueError, match="a StaticCache without sliding windows"):
        generate(model, **options_of("static"))


# Quantised caches


class PrefixedFp8Layer(Fp8QuantizedLayer):
    """A stock layer that quantises the sequence, behind a prefix [B, Hkv, P, D] that it does not quantise."""

    def __init__(self, key, value):
        super().__init__()
        self.prefix = key, value

    def update(self, *args, **kwargs):
        pair = super().update(*args, **kwargs)
        return tuple(torch.cat(both, 2) for both in zip(self.prefix, pair, strict=True))

    def get_seq_length(self):
        return super().get_seq_length() + self.prefix[0].shape[2]


@torch.no_grad()
@pytest.mark.parametrize("kind", PREFIXES)
def test_a_quantised_cache_quantises_the_sequence_and_not_the_prefix(kind):
    model, stock = kinds.patched_model(kind, LLAMA).eval(), models.base_model(LLAMA).eval()
    prefix = kinds.native_module(kind if kinds.is_native(kind) else f"native {kind}", LLAMA)
    cache = DynamicCache()
    cache.layers = [PrefixedFp8Layer(*(x.expand(3, -1, -1, -1) for x in pair)) for pair in prefix.layer_kv()]
    ids, mask, want = IDS, torch.nn.functional.pad(LEFT, (PREFIX, 0), value=1), []
    positions = PREFIX + (LEFT.cumsum(1) - 1).clamp(min=0)
    for _ in range(STEPS):
        logits = stock(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[
            :, -1
        ]
        want.append(logits)
        ids, mask, positions = (
            logits.argmax(-1)[:, None],
            torch.nn.functional.pad(mask, (0, 1), value=1),
            positions[:, -1:] + 1,
        )
    out = generate(model, output_logits=True, return_dict_in_generate=True, **options_of("quantized", backend="fp8"))
    assert all(isinstance(layer, Fp8QuantizedLayer) for layer in out.past_key_values.layers)
    for step, (got, wanted) in enumerate(zip(out.logits, want, strict=True)):
        by_hand.assert_close(got, wanted, f"logits of step {step}")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_quantised_cache_in_eight_bits(kind):
    """Of these models, they are those of a dynamic cache. Beams reorder the quantised rows."""
    model = kinds.patched_model(kind, LLAMA, strict=True).eval()
    options = options_of("quantized", backend="fp8")
    tokens_like_a_dynamic_cache(model, **options)
    assert generate(model, num_beams=2, **options).tolist() == generate(model, num_beams=2).tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_cache_of_quanto(kind):
    pytest.importorskip("optimum.quanto")
    model = kinds.patched_model(kind, LLAMA).eval()
    options = options_of("quantized", backend="quanto", nbits=4, q_group_size=32, residual_length=2)
    runs = [generate(model, output_logits=True, return_dict_in_generate=True, **more) for more in ({}, options)]
    assert type(runs[1].past_key_values.layers[0]).__name__ == "QuantoQuantizedLayer"
    by_hand.assert_close(runs[1].logits[0], runs[0].logits[0], "logits of the first token")
    off = models.difference(runs[1].logits[1], runs[0].logits[1])
    assert 0 < off < 0.3, f"logits of the second token are off by {off:.1e}"


# Offloaded caches


class Stream(contextlib.AbstractContextManager):
    """Stands in for a stream of CUDA; records that layers have been moved."""

    def __exit__(self, *args):
        return None

    def wait_stream(self, other):
        return None


@pytest.fixture
def offloads(monkeypatch):
    """Offloading on a CPU, which transformers needs CUDA for; the layers that were moved away, and back."""
    moved = types.SimpleNamespace(away=[], back=[])
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    for layer in (DynamicCache().layer_class_to_replicate, StaticLayer):
        monkeypatch.setattr(layer, "offload", lambda self: moved.away.append(self))
        monkeypatch.setattr(layer, "prefetch", lambda self: moved.back.append(self))
    return moved


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_cache(kind, implementation, offloads):
    model = kinds.patched_model(kind, LLAMA, strict=True).eval()
    tokens_like_a_dynamic_cache(model, **options_of(implementation))
    assert len({id(layer) for layer in offloads.away}) == len({id(layer) for layer in offloads.back}) > 1


# Ways to fill a cache


@pytest.mark.parametrize("cache", ["static", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_a_second_turn(kind, cache):
    """The first call reads the prompt in chunks; the second one continues the cache that it returned."""
    model = kinds.patched_model(kind, LLAMA).eval()
    config = getattr(model, "get_base_model", lambda: model)().config
    given = StaticCache(config, 32) if cache == "static" else QuantizedCache("fp8", config)
    runs = []
    for start in (None, given):
        options = {"past_key_values": start, "return_dict_in_generate": True, "disable_compile": True}
        first = generate(model, prefill_chunk_size=3, **options)
        longer = torch.cat([first.sequences, IDS[:, :2]], 1)
        mask = torch.nn.functional.pad(LEFT, (0, longer.shape[1] - LEFT.shape[1]), value=1)
        options["past_key_values"] = first.past_key_values
        runs.append(generate(model, mask, **{**options, "input_ids": longer}).sequences.tolist())
    assert runs[1] == runs[0]


# Refused


@pytest.mark.parametrize("kind", ["native prefix", "native prompt"])  # PEFT takes no cache
def test_a_training_step_takes_plain_caches_only(kind):
    model = kinds.patched_model(kind, LLAMA).train()
    cache = QuantizedCache("fp8", model.config)
    with pytest.raises(ValueError, match="expected None or a DynamicCache without offloading, got a QuantizedCache"):
        model(input_ids=IDS, past_key_values=cache)


#: Its attention cannot read a prefix: PEFT's own code runs, and a SoftPrompt is put before every sample.
BLOOM = models.Family(
    hf.BloomForCausalLM, hf.BloomConfig, {"vocab_size": models.VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}
)


@pytest.mark.parametrize("kind", [*KINDS, "prefix in Bloom", "prompt in Bloom", "native prompt in Bloom"])
def test_continuous_batching_is_refused(kind):
    """PEFT's own code, too, would run it without the prefix. ``unpatch`` allows it."""
    with by_hand.notices() as notices:
        model = kinds.patched_model(kind.removesuffix(" in Bloom"), BLOOM if "Bloom" in kind else LLAMA)
    assert bool(notices) == ("Bloom" in kind)
    base = getattr(model, "get_base_model", lambda: model)()
    for begin in (model.generate_batch, base.generate_batch):
        with pytest.raises(ValueError, match="the paged cache of continuous batching has no prefix or prompt"):
            begin([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="generate_batch"):
        model.init_continuous_batching()
    peftkern.unpatch(model)
    assert "init_continuous_batching" not in base.__dict__


def test_a_paged_cache_is_refused():
    """Where a manager of continuous batching was made by hand."""
    model = kinds.patched_model("native prefix", LLAMA).eval()
    with pytest.raises(ValueError, match="got a Paged"):
        model(input_ids=IDS, cache=type("Paged", (), {})())
