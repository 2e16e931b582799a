# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: both directions with PEFT, continued training, crashes, and files that are not ours."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import stat
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftkern import PrefixKV, SoftPrompt, checkpoint, load_prefix, save_prefix

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
IDS = torch.tensor([[5, 9, 3, 7], [2, 8, 8, 1]])


def llama(**changes):
    torch.manual_seed(7)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 32, "vocab_size": 60, "name_or_path": "somebody/llama"}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes})).eval()


def t5(num_layers):
    torch.manual_seed(7)
    config = transformers.T5Config(
        d_model=32, num_layers=num_layers, num_heads=4, d_kv=8, d_ff=32, vocab_size=60, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def prefix_config(**changes):
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **changes)


CONFIGS = {
    "prefix": prefix_config,
    "projection": lambda: prefix_config(prefix_projection=True, encoder_hidden_size=12),
    "cartridge": lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12),
}

OURS = {
    "prefix": lambda: PrefixKV(llama(), 5, std=0.5),
    "projection": lambda: PrefixKV(llama(), 5, projection=6),
    "cartridge": lambda: PrefixKV(llama(), 5, std=0.5, num_frozen_tokens=2),
    "cartridge, all frozen": lambda: PrefixKV(llama(), 5, std=0.5, num_frozen_tokens=5),
    "cartridge, projection": lambda: PrefixKV(llama(), 5, num_frozen_tokens=1, projection=6),
    "prompt": lambda: SoftPrompt(llama(), 5, std=0.5),
}
ONLY_OURS = {
    "length per layer": lambda: PrefixKV(llama(), [3, 5]),
    "layer left out, frozen": lambda: PrefixKV(llama(num_hidden_layers=3), [3, 0, 1], num_frozen_tokens=2),
    "seq2seq, natural order": lambda: PrefixKV(t5(2), 5),
    "bank": lambda: SoftPrompt(llama(), 5, num_prompts=3),
}


def files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    assert repr(actual) == repr(expected)
    assert actual.origin == expected.origin
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    trainable = [{n for n, p in x.named_parameters() if p.requires_grad} for x in (actual, expected)]
    assert trainable[0] == trainable[1]


def logits_with(model, prefix):
    """The model's logits with a prefix handed to it by means of transformers alone."""
    if isinstance(prefix, SoftPrompt):
        embeds = prefix(IDS, model.get_input_embeddings().weight)
        return model(inputs_embeds=embeds).logits
    kv = [tuple(x.detach()[None].expand(2, -1, -1, -1) for x in pair) for pair in prefix.layer_kv()]
    return model(IDS, past_key_values=transformers.DynamicCache(kv)).logits


def test_docstrings():
    assert doctest.testmod(checkpoint).failed == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_loads_with_equal_tensors_and_logits(name, tmp_path):
    model = llama()
    theirs = peft.get_peft_model(model, CONFIGS[name]()).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prefix = load_prefix(tmp_path, model=model)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    if isinstance(prefix, PrefixKV):
        assert torch.equal(prefix.prompt_embeddings(), stored)
        assert prefix.num_frozen_tokens == (2 if name == "cartridge" else 0)
    else:
        assert torch.equal(prefix.weight, stored)
    assert prefix.origin == ("somebody/llama", None, "CAUSAL_LM")
    torch.testing.assert_close(logits_with(llama(), prefix), theirs(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_what_we_saved_with_equal_tensors_and_logits(name, tmp_path):
    prefix = OURS[name]()
    save_prefix(prefix, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    assert theirs.active_peft_config.base_model_name_or_path == "somebody/llama"
    expected = prefix.weight if isinstance(prefix, SoftPrompt) else prefix.prompt_embeddings()
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, expected)
    torch.testing.assert_close(theirs(IDS).logits, logits_with(llama(), prefix), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*OURS, *ONLY_OURS])
@pytest.mark.parametrize("with_config", [True, False])
def test_our_round_trip_keeps_everything(name, with_config, tmp_path):
    prefix = (OURS | ONLY_OURS)[name]()
    prefix.origin = prefix.origin._replace(revision="v2")
    save_prefix(prefix, tmp_path)
    if not with_config:
        (tmp_path / "adapter_config.json").unlink()
    assert_same(load_prefix(tmp_path), prefix)
    assert not any(p.requires_grad for p in load_prefix(tmp_path, trainable=False).parameters())


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), num_frozen=st.integers(0, 4))
def test_any_lengths_survive(tmp_path_factory, lengths, num_frozen):
    folder = tmp_path_factory.mktemp("prefix")
    geometry = {"num_layers": len(lengths), "num_kv_heads": 1, "head_dim": 3}
    prefix = PrefixKV(None, lengths, **geometry, num_frozen_tokens=min(num_frozen, max(lengths)))
    save_prefix(prefix, folder)
    assert_same(load_prefix(folder), prefix)


@pytest.mark.parametrize("name", ONLY_OURS)
def test_peft_refuses_what_it_cannot_express(name, tmp_path):
    save_prefix(ONLY_OURS[name](), tmp_path)
    with pytest.raises(KeyError, match="PEFTKERN_PR"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("name", ["prefix", "projection", "cartridge"])
def test_continued_training_is_training_without_the_stop(name, tmp_path):
    def step(prefix):
        optimizer = torch.optim.SGD([p for p in prefix.parameters() if p.requires_grad], lr=0.1)
        sum(x.square().sum() for pair in prefix.layer_kv() for x in pair).backward()
        optimizer.step()
        optimizer.zero_grad()

    prefix = OURS[name]()
    step(prefix)
    save_prefix(prefix, tmp_path)
    resumed = load_prefix(tmp_path)
    for x in (prefix, resumed):
        step(x)
    assert_same(resumed, prefix)


def test_peft_goes_on_training_what_we_loaded(tmp_path):
    """PEFT refuses is_trainable=True for prompt learning; its fresh adapter takes our tensors instead."""
    save_prefix(OURS["prefix"](), tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    prefix = load_prefix(tmp_path)
    theirs = peft.get_peft_model(llama(), prefix_config())
    theirs.prompt_encoder["default"].load_prompt_embeddings(prefix.prompt_embeddings())
    theirs(IDS, labels=IDS).loss.backward()
    assert theirs.prompt_encoder["default"].embedding.weight.grad.any()


@pytest.mark.parametrize("name", ["prefix", "projection", "cartridge"])
def test_training_of_a_peft_model_goes_on(name, tmp_path):
    """With its MLP, which PEFT does not save."""

    def fresh():
        return peft.get_peft_model(llama(), CONFIGS[name]())

    def step(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        return loss

    trained = fresh()
    step(trained)
    save_prefix(PrefixKV.from_peft(trained), tmp_path)
    resumed = fresh()
    PrefixKV.from_peft(resumed).load_state_dict(load_prefix(tmp_path).state_dict())
    assert_same(load_prefix(tmp_path), PrefixKV.from_peft(resumed))
    for _ in range(2):
        trained.zero_grad()
        resumed.zero_grad()
        assert torch.equal(step(resumed), step(trained))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(theirs.get_prompt(1).layers[0].keys[0], load_prefix(tmp_path).layer_kv()[0][0])


def test_from_peft_names_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"expected a PREFIX_TUNING or CARTRIDGE adapter, got .*PROMPT_TUNING"):
        PrefixKV.from_peft(peft.get_peft_model(llama(), CONFIGS["prompt"]()))


@pytest.mark.parametrize("num_layers", [2, 3])
def test_seq2seq_keeps_the_layout_of_peft(num_layers, tmp_path):
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(t5(num_layers), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prefix = load_prefix(tmp_path)
    cache = theirs.get_prompt(1).self_attention_cache
    for layer, (k, v) in enumerate(prefix.layer_kv()):
        assert torch.equal(k, cache.layers[layer].keys[0]), f"key of layer {layer}"
        assert torch.equal(v, cache.layers[layer].values[0]), f"value of layer {layer}"
    save_prefix(prefix, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(t5(num_layers), tmp_path / "again").eval()
    expected = theirs(IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(again(IDS, decoder_input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_seq2seq_prompt_is_the_part_that_peft_uses(tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(t5(2), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    prompt = load_prefix(tmp_path)
    assert torch.equal(prompt.weight, theirs.get_prompt(1)[0, :5])
    save_prefix(prompt, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(t5(2), tmp_path / "again").eval()
    expected = theirs(IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(again(IDS, decoder_input_ids=IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_becomes_an_fp32_master(dtype, tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY, dtype=dtype)
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path).trainable[0]
    assert loaded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(loaded.to(dtype), prefix.trainable[0])


def test_nan_and_inf_survive(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY)
    prefix.trainable[0].data[0, :2] = torch.tensor([float("nan"), float("inf")])
    save_prefix(prefix, tmp_path)
    assert torch.equal(load_prefix(tmp_path).trainable[0].nan_to_num(7), prefix.trainable[0].nan_to_num(7))


def test_loading_leaves_random_numbers_alone(tmp_path):
    save_prefix(OURS["projection"](), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_prefix(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path):
    prefix = OURS["prefix"]()
    save_prefix(prefix, tmp_path)
    loaded = load_prefix(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place, as PEFT's save_pretrained overwrites
    assert_same(loaded, prefix)


def test_an_edited_config_names_another_base_model(tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("somebody/llama", "/my/llama"))
    assert load_prefix(tmp_path).origin.base_model_name_or_path == "/my/llama"


class Crash(BaseException):
    """Like KeyboardInterrupt: nothing catches it by accident."""


def _crash_at(monkeypatch, what, call):
    """The call-th use of a step of saving dies."""
    real, calls = getattr(os, what), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call:
            raise Crash
        return real(*args)

    monkeypatch.setattr(os, what, dies)


STEPS = [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("fsync", 3)]


@pytest.mark.parametrize(("what", "call"), STEPS, ids=[f"{what} {call}" for what, call in STEPS])
@pytest.mark.parametrize("old", ["prefix", "prompt", "length per layer", None])
def test_a_crash_loses_nothing(old, what, call, tmp_path, monkeypatch):
    """Whatever was in the folder, after the crash it is the old checkpoint or the new one, and no litter."""
    before, after = (OURS | ONLY_OURS)[old]() if old else None, OURS["projection"]()
    if before is not None:
        save_prefix(before, tmp_path)
    with monkeypatch.context() as patch:
        _crash_at(patch, what, call)
        with pytest.raises(Crash):
            save_prefix(after, tmp_path)
    assert set(os.listdir(tmp_path)) <= {"adapter_model.safetensors", "adapter_config.json"}
    survivor = before if (what, call) in STEPS[:3] else after
    if survivor is None:
        assert os.listdir(tmp_path) == []
    else:
        assert_same(load_prefix(tmp_path), survivor)
    save_prefix(after, tmp_path)
    assert_same(load_prefix(tmp_path), after)


def test_killed_between_the_files_it_loads(tmp_path):
    """A kill leaves what an exception would have cleaned: new weights, the config of before, a temporary file."""
    old, new = OURS["prompt"](), ONLY_OURS["length per layer"]()
    save_prefix(old, tmp_path)
    save_prefix(new, tmp_path / "new")
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path)
    (tmp_path / ".adapter_config.json.0.tmp").write_text("{")
    assert_same(load_prefix(tmp_path), new)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    (tmp_path / "plain").touch()
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert len(set(modes.values())) == 1, modes


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("truncated")
    save_prefix(PrefixKV(None, 2, **GEOMETRY), folder)
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match="got a truncated or foreign file") as error:
        load_prefix(folder)
    assert str(path) in str(error.value)
    prefix = PrefixKV(None, 2, **GEOMETRY)
    save_prefix(prefix, folder)
    assert_same(load_prefix(folder), prefix)


def _pickle(folder, zipped):
    torch.save({"prompt_embeddings": torch.zeros(5, 64)}, folder / "x", _use_new_zipfile_serialization=zipped)
    os.replace(folder / "x", folder / "adapter_model.safetensors")


def _edit_config(text="", **changes):
    """What PEFT saved, with its config changed, replaced by a text, or (None) missing."""

    def edit(folder):
        peft.get_peft_model(llama(), prefix_config()).save_pretrained(folder, save_embedding_layers=False)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.unlink()
        if text is not None:
            path.write_text(text or json.dumps({**config, **changes}))

    return edit


def _rename_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({"lora_A": tensors["prompt_embeddings"].clone()}, folder / "adapter_model.safetensors")


def _header(**changes):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            own = json.loads(file.metadata()["peftkern"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, {"peftkern": json.dumps({**own, **changes})})

    return edit


NO_FILE = "adapter_model.safetensors: expected a safetensors file, got none"
BAD_CONFIG = "adapter_config.json: expected PEFT's config"
BAD_FOLDERS = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), NO_FILE),
    "no folder": (shutil.rmtree, NO_FILE),
    "only a pickle": (
        lambda folder: os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin"),
        "adapter_model.bin is a pickle",
    ),
    "pickle under our name": (lambda folder: _pickle(folder, True), "got a pickle, which is not read"),
    "old pickle under our name": (lambda folder: _pickle(folder, False), "got a pickle, which is not read"),
    "git-lfs pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "got a truncated or foreign file",
    ),
    "no config": (_edit_config(text=None), BAD_CONFIG),
    "config cut": (_edit_config(text='{"peft'), BAD_CONFIG),
    "config a list": (_edit_config(text="[]"), "got a JSON list"),
    "lora": (_edit_config(peft_type="LORA"), "expected peft_type to be one of PREFIX_TUNING, CARTRIDGE"),
    "field missing": (_edit_config(num_layers=None), "num_layers: expected a positive int, got None"),
    "field of wrong type": (_edit_config(token_dim="16"), "token_dim: expected a positive int, got '16'"),
    "zero heads": (_edit_config(num_attention_heads=0), "num_attention_heads: expected a positive int, got 0"),
    "odd token_dim": (_edit_config(token_dim=17), "token_dim: expected a multiple of 2 heads, got 17"),
    "more tokens": (_edit_config(num_virtual_tokens=6), "expected floats [6, 64], got torch.float32 [5, 64]"),
    "huge": (_edit_config(num_layers=10**9), "prompt_embeddings: expected floats [5, 32000000000]"),
    "foreign tensors": (_rename_tensor, "expected 'prompt_embeddings' in the weights or their config, got neither"),
    "newer": (_header(peftkern_format=2), "expected peftkern_format 1, got 2"),
    "header of more layers": (_header(num_layers=3, lengths=[5, 5, 5]), "expected floats [5, 96]"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_named(name, tmp_path):
    folder = tmp_path / "adapter"
    save_prefix(OURS["prefix"](), folder)
    spoil, message = BAD_FOLDERS[name]
    spoil(folder)
    before = files(folder) if folder.exists() else None
    with pytest.raises(ValueError, match="adapter_") as error:
        load_prefix(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert before == (files(folder) if folder.exists() else None)


def test_integers_are_no_prefix(tmp_path):
    _edit_config()(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(5, 64, dtype=torch.int64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"prompt_embeddings: expected floats \[5, 64\], got torch.int64"):
        load_prefix(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "'num_layers': 3"),
        ({"num_key_value_heads": 4}, "'num_kv_heads': 4"),
        ({"head_dim": 16}, "'head_dim': 16"),
    ],
)
def test_a_prefix_for_another_model_is_refused(changes, words, tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    with pytest.raises(ValueError, match="expected a prefix for the model's") as error:
        load_prefix(tmp_path, model=llama(**changes))
    for word in (words, "somebody/llama", str(tmp_path)):
        assert word in str(error.value)


def test_a_prompt_for_another_model_is_refused(tmp_path):
    save_prefix(OURS["prompt"](), tmp_path)
    with pytest.raises(ValueError, match=r"\{'embed_dim': 64\}, got one for \{'embed_dim': 32\}"):
        load_prefix(tmp_path, model=llama(hidden_size=64).config)


def test_a_classifier_that_peft_saved_beside_it_is_kept(tmp_path):
    """SEQ_CLS adapters carry the classifier: loading names it, saving does not overwrite it."""
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    )
    theirs = peft.get_peft_model(bert, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.warns(UserWarning, match=r"expected a prefix alone; not loaded: \[.*classifier"):
        prefix = load_prefix(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"expected to replace a prefix alone, got also \[.*classifier"):
        save_prefix(prefix, tmp_path)
    assert files(tmp_path) == before


def test_only_prefixes_are_saved(tmp_path):
    with pytest.raises(ValueError, match="prefix: expected a PrefixKV or SoftPrompt, got Linear"):
        save_prefix(torch.nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()
