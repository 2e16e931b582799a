# SPDX-License-Identifier: Apache-2.0
"""Exports that come back bit-equal, what the files contain, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file

import peftkern
from peftkern import PrefixKV, SoftPrompt, export, load_prefix, save_prefix
from peftkern.files import replace_files
from peftkern.integrations.kv_file import KVFile, kv_path, read_kv, write_kv
from peftkern.integrations.prompt_embeds import encode, prompt_embeds
from peftkern.model_info import Origin
from peftkern.tools import cli
from peftkern.tools import export as export_tool
from tests.checkpoints import llama, t5
from tests.integrations.files import GEOMETRY, assert_bit_equal, lists, parameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIFORM = {
    "prefix": lambda dtype: PrefixKV(None, 5, **GEOMETRY, dtype=dtype),
    "cartridge": lambda dtype: PrefixKV(None, 5, **GEOMETRY, num_frozen_tokens=2, dtype=dtype),
    "all frozen": lambda dtype: PrefixKV(None, 5, **GEOMETRY, num_frozen_tokens=5, dtype=dtype),
    "one token": lambda dtype: PrefixKV(None, 1, **GEOMETRY, dtype=dtype),
}
UNEQUAL = {
    "ragged": lambda dtype: PrefixKV(None, [3, 0, 5], **GEOMETRY, num_frozen_tokens=2, dtype=dtype),
    "narrow values": lambda dtype: PrefixKV(None, 5, **GEOMETRY, value_head_dim=4, dtype=dtype),
    "unequal layers": lambda dtype: PrefixKV(
        None, 4, num_layers=3, num_kv_heads=[2, 1, 4], head_dim=[8, 16, 4], dtype=dtype
    ),
    "layers without keys": lambda dtype: PrefixKV(
        None, [0, 4, 0], num_layers=3, num_kv_heads=[0, 2, 0], head_dim=8, dtype=dtype
    ),
    "other positions": lambda dtype: PrefixKV(None, 5, **GEOMETRY, positions=9, dtype=dtype),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNIFORM | UNEQUAL)
def test_kv_files_come_back_bit_equal(name, dtype, tmp_path):
    prefix = (UNIFORM | UNEQUAL)[name](dtype)
    prefix.origin = Origin("somebody/llama", "main", "SEQ_CLS")
    assert export(prefix, tmp_path, "kv", name="doc") == [tmp_path / "doc.safetensors"]
    contents = read_kv(tmp_path / "doc.safetensors")
    assert contents.dtype == dtype
    assert [pair is None for pair in contents.layers] == [shape is None for shape in prefix.shapes]
    back = load_prefix(tmp_path / "doc.safetensors")
    assert_bit_equal(back, prefix)
    assert back.origin == prefix.origin
    assert {x.dtype for x in back.parameters()} == {torch.float32}
    assert not any(x.requires_grad for x in load_prefix(tmp_path / "doc.safetensors", trainable=False).parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNIFORM)
def test_cartridges_come_back_bit_equal(name, dtype, tmp_path):
    prefix = UNIFORM[name](dtype)
    prefix.origin = Origin("somebody/llama: 3")
    export(prefix, tmp_path, "cartridges", name="doc")
    back = load_prefix(tmp_path / "doc")
    assert_bit_equal(back, prefix)
    assert back.origin.base_model_name_or_path == "somebody/llama: 3"


def test_keys_and_values_of_one_memory_are_written(tmp_path):
    """As models have them whose values are their keys, and parts of one tensor."""
    x = torch.randn(5, 2, 8)
    pairs = [(x, x), (x, x[:3].repeat(2, 1, 1)[:5]), (x[1:4], x[:3])]
    write_kv(tmp_path / "x.safetensors", KVFile(pairs, 5))
    for found, pair in zip(read_kv(tmp_path / "x.safetensors").layers, pairs, strict=True):
        assert all(torch.equal(*both) for both in zip(found, pair, strict=True))


def test_kv_tensors_have_the_documented_layout(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY)
    export(prefix, tmp_path, "kv", name="doc")
    tensors = load_file(tmp_path / "doc.safetensors")
    assert sorted(tensors) == sorted(f"layers.{i}.{part}" for i in range(3) for part in ("key", "value"))
    for layer, (key, value) in enumerate(prefix.layer_kv()):
        assert torch.equal(tensors[f"layers.{layer}.key"], key.transpose(0, 1))
        assert torch.equal(tensors[f"layers.{layer}.value"], value.transpose(0, 1))


def test_cartridges_have_the_layout_that_servers_read(tmp_path):
    """Tokasaurus asks every list for its first tensor and for as many layers, also where nothing is frozen."""
    for frozen in (0, 2):
        prefix = PrefixKV(None, 5, **GEOMETRY, num_frozen_tokens=frozen)
        export(prefix, tmp_path, "cartridges", name="doc", force=True)
        state = torch.load(tmp_path / "doc" / "cartridge.pt", weights_only=True)
        assert set(state) == {f"{a}_{b}" for a in ("trainable", "frozen", "fixed") for b in ("keys", "values")}
        for name, tensors in state.items():
            tokens = 5 - frozen if name.startswith("trainable") else frozen
            assert [list(x.shape) for x in tensors] == [[1, 2, tokens, 8]] * 3, name
        assert torch.equal(
            torch.cat([state["fixed_keys"][1], state["trainable_keys"][1]], 2)[0], prefix.layer_kv()[1][0]
        )
        config = yaml.safe_load((tmp_path / "doc" / "config.yaml").read_text())
        assert config == {"kv_cache_initializer": {"max_tokens": 5}}


@pytest.mark.parametrize("kind", ["frozen", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_cartridges_are_read(kind, dtype, tmp_path):
    """As its TrainableCache saves them, in lists of parameters; without frozen tokens, these lists are empty."""
    for wrap, frozen in ((list, 1), (parameters, 1), (parameters, 0)):
        state = lists(dtype=dtype, kind=kind, wrap=wrap, frozen=frozen)
        if not frozen:
            state |= {f"{kind}_keys": parameters([]), f"{kind}_values": parameters([])}
        torch.save(state, tmp_path / "cartridge.pt")
        (tmp_path / "config.yaml").write_text("model:\n  value:\n    pretrained_model_name_or_path: a/b\n")
        prefix = load_prefix(tmp_path)
        assert (prefix.lengths, prefix.num_frozen_tokens) == ((4 + frozen,) * 2, frozen)
        key, value = prefix.layer_kv()[1]
        assert torch.equal(key[:, frozen:], state["trainable_keys"][1][0].float())
        if frozen:
            assert torch.equal(value[:, :1], state[f"{kind}_values"][1][0].float())
        assert prefix.origin.base_model_name_or_path == "a/b"


def test_views_and_shared_storages_are_read(tmp_path, monkeypatch):
    """A tensor may be a strided part of a storage that others use, too, which is read once."""
    whole = torch.randn(2, 1, 4, 2, 8)
    keys = [x.transpose(1, 2) for x in whole]
    torch.save({"trainable_keys": keys, "trainable_values": keys}, tmp_path / "cartridge.pt")
    read, real = [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, entry: (read.append(entry.filename), real(self, entry))[1]
    )
    key, value = load_prefix(tmp_path).layer_kv()[1]
    assert torch.equal(key, keys[1][0])
    assert torch.equal(value, keys[1][0])
    assert [name for name in read if "/data/" in name] == ["cartridge/data/0"]


def test_a_yaml_tag_constructs_nothing(tmp_path):
    torch.save(lists(), tmp_path / "cartridge.pt")
    trace = tmp_path / "executed"
    (tmp_path / "config.yaml").write_text(
        f"x: !!python/object/apply:os.system ['touch {trace}']\nmodel: {{pretrained_model_name_or_path: a/b}}\n"
    )
    assert load_prefix(tmp_path).origin.base_model_name_or_path == "a/b"
    assert not trace.exists()


def test_a_projection_is_evaluated(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY, projection=6)
    for to in ("kv", "cartridges"):
        export(prefix, tmp_path, to, name="doc")
    for path in (tmp_path / "doc.safetensors", tmp_path / "doc"):
        assert_bit_equal(load_prefix(path), prefix.bake())


def test_a_bank_becomes_a_file_per_prefix(tmp_path):
    singles = [PrefixKV(None, n, **GEOMETRY) for n in (3, 5)]
    written = export(PrefixKV.stack(singles), tmp_path, "kv", name="docs")
    assert [path.name for path in written] == ["docs-0.safetensors", "docs-1.safetensors"]
    for path, single in zip(written, singles, strict=True):
        assert_bit_equal(load_prefix(path), single)


def test_a_loaded_prefix_fits_the_model(tmp_path):
    prefix = PrefixKV(llama(), 4)
    export(prefix, tmp_path, "kv", name="doc")
    assert load_prefix(tmp_path / "doc.safetensors", model=llama()).origin == prefix.origin
    with pytest.raises(ValueError, match=r"doc\.safetensors: expected a prefix for the model's .*'num_layers': 3"):
        load_prefix(tmp_path / "doc.safetensors", model=llama(num_hidden_layers=3))


def test_folders_are_exported_under_their_names(tmp_path):
    for name in ("law", "tax"):
        save_prefix(PrefixKV(None, 5, **GEOMETRY), tmp_path / name)
    written = export([tmp_path / "law", str(tmp_path / "tax")], tmp_path / "served", "kv")
    assert [path.name for path in written] == ["law.safetensors", "tax.safetensors"]
    again = export(tmp_path / "served" / "law.safetensors", tmp_path / "served", "cartridges")
    assert again[0].parent.name == "law"
    assert export(again[0].with_name("cartridge.pt"), tmp_path / "again", "kv") == [
        tmp_path / "again/law.safetensors"
    ]


def test_prompt_embeddings(tmp_path):
    for dtype in DTYPES:
        prompt = SoftPrompt(None, 4, embed_dim=8, dtype=dtype)
        export(prompt, tmp_path, "prompt-embeds", name="p", force=True)
        assert torch.equal(torch.load(tmp_path / "p.pt", weights_only=True), prompt.weight)
        assert torch.equal(load_file(tmp_path / "p.safetensors")["prompt_embeds"], prompt.weight)


def test_prompt_embeddings_with_text_continue_as_the_model_does():
    """Also where the embedding layer scales: the rows of a prompt lie behind it, as inputs_embeds do."""
    import transformers

    torch.manual_seed(7)
    gemma = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=32, vocab_size=60,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor([5, 9, 3])
    for model in (llama(), gemma):
        prompt = SoftPrompt.from_text(model, lambda text: {"input_ids": [4, 8]}, "text", 2)
        rows = prompt_embeds(prompt, ids.tolist(), model)
        assert torch.equal(rows, prompt_embeds(prompt.weight, ids, model.get_input_embeddings()))
        expected = model(torch.tensor([[4, 8, 5, 9, 3]])).logits
        torch.testing.assert_close(model(inputs_embeds=rows[None]).logits, expected, rtol=0, atol=0)
    with peftkern.patched(llama(), SoftPrompt(llama(), 3)) as patched:
        prompt = next(x for x in patched.modules() if isinstance(x, SoftPrompt))
        rows = prompt_embeds(prompt, ids, llama().get_input_embeddings().weight)
        patched_logits = patched(ids[None]).logits[:, -3:]
    torch.testing.assert_close(llama()(inputs_embeds=rows[None]).logits[:, -3:], patched_logits)


def test_prompt_embeddings_as_text():
    rows = torch.randn(3, 8)
    assert torch.equal(torch.load(io.BytesIO(base64.b64decode(encode(rows))), weights_only=True), rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.randn(2, 4), [1], torch.randn(9, 8)),
            r"prompt: expected \[tokens, 8\], as the embeddings, got \[2, 4\]",
        ),
        ((torch.randn(3, 2, 8), [1], torch.randn(9, 8)), r"prompt: expected \[tokens, 8\]"),
        ((torch.randn(2, 8), [[1]], torch.randn(9, 8)), r"input_ids: expected integers \[tokens\]"),
        ((torch.randn(2, 8), [1.0], torch.randn(9, 8)), r"input_ids: expected integers \[tokens\]"),
        ((torch.randn(2, 8), [1], "model"), "embedding: expected a model, its embedding layer or a weight"),
    ],
)
def test_prompt_embeddings_of_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_embeds(*arguments)


def test_a_prompt_table_pads_shorter_prompts_with_zeros(tmp_path):
    prompts = [SoftPrompt(None, n, embed_dim=8, dtype=torch.bfloat16) for n in (2, 4)]
    export(prompts, tmp_path, "tensorrt-llm", name="table")
    table = numpy.load(tmp_path / "table.npy", allow_pickle=False)
    assert table.shape == (2, 4, 8)
    assert table.dtype == numpy.float32
    for task, prompt in enumerate(prompts):
        assert torch.equal(torch.from_numpy(table[task, : prompt.length]), prompt.weight.float())
    assert not table[0, 2:].any()
    assert json.loads((tmp_path / "table.tasks.json").read_text())["tasks"] == [
        {"task": 0, "name": "table-0", "tokens": 2},
        {"task": 1, "name": "table-1", "tokens": 4},
    ]
    bank = SoftPrompt(None, 3, embed_dim=8, num_prompts=2, dtype=torch.float16)
    export(bank, tmp_path, "tensorrt-llm", name="bank")
    assert numpy.load(tmp_path / "bank.npy").dtype == numpy.float16
    with pytest.raises(ValueError, match="p-1: expected a prompt of width 8, as the first one, got 4"):
        export([prompts[0], SoftPrompt(None, 2, embed_dim=4)], tmp_path, "tensorrt-llm", name="p")


def test_rows_for_llama_cpp(tmp_path):
    prompt = SoftPrompt(None, 3, embed_dim=8, dtype=torch.bfloat16)
    prompt.origin = Origin("somebody/llama")
    export(prompt, tmp_path, "llama.cpp", name="p")
    rows = numpy.fromfile(tmp_path / "p.f32", "<f4").reshape(3, 8)
    assert torch.equal(torch.from_numpy(rows), prompt.weight.float())
    described = json.loads((tmp_path / "p.f32.json").read_text())
    assert (described["format"], described["n_tokens"], described["n_embd"]) == ("peftkern.embd", 3, 8)
    assert described["base_model_name_or_path"] == "somebody/llama"


def _with_nan():
    prefix = PrefixKV(None, 2, **GEOMETRY)
    prefix.trainable[0].data[1, 20] = float("nan")
    return prefix


def _prefix(**options):
    return lambda: PrefixKV(None, 2, **GEOMETRY, **options)


def _prompt(**options):
    return lambda: SoftPrompt(None, 2, embed_dim=8, **options)


def _unequal(name):
    return lambda: UNEQUAL[name](torch.float32)


INFINITY = torch.tensor(float("inf"))
#: Source, format, and part of the message.
REFUSED = {
    "prompt to kv": (_prompt(), "kv", "prefix: expected a PrefixKV for to='kv', got a SoftPrompt"),
    "prefix to embeds": (_prefix(), "prompt-embeds", "expected a SoftPrompt for to='prompt-embeds'"),
    "encoder": (lambda: PrefixKV(t5(2), 2, parts=("encoder", "cross")), "kv", "parts: expected the decoder alone"),
    "seq2seq layout": (_prefix(peft_seq2seq_layout=True), "kv", "peft_seq2seq_layout: expected the layers' own"),
    "gates": (_prefix(learn_length=True), "cartridges", "learn_length: expected no gates"),
    "doubles": (_prefix(dtype=torch.float64), "kv", "expected float32, bfloat16 or float16"),
    "ragged": (_unequal("ragged"), "cartridges", "layer 1: expected keys and values [tokens, heads, dims] of one"),
    "narrow values": (_unequal("narrow values"), "cartridges", "layer 0: expected keys and values"),
    "no keys": (_unequal("layers without keys"), "cartridges", "layer 0: expected keys and values"),
    "positions": (_unequal("other positions"), "cartridges", "positions: expected 5, the number of tokens"),
    "NaN in kv": (_with_nan, "kv", "layers.0.value: expected finite numbers"),
    "NaN in a cartridge": (_with_nan, "cartridges", "trainable_values[0]: expected finite numbers"),
    "infinity in a prompt": (_prompt(init=INFINITY), "llama.cpp", "expected finite numbers"),
    "format": (_prefix(), "gguf", "to: expected one of kv, cartridges, prompt-embeds"),
    "module": (lambda: torch.nn.Linear(2, 2), "kv", "prefix: expected a PrefixKV, SoftPrompt or folder, got Linear"),
    "nothing": (list, "kv", "prefix: expected at least one, got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_has_no_room_for_is_refused(name, tmp_path):
    make, to, message = REFUSED[name]
    prefix = make()
    with pytest.raises(ValueError, match="expected") as error:
        export(prefix, tmp_path / "new", to)
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folders_and_files_keep_the_dtype_in_which_they_are_stored(dtype, tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY, dtype=dtype)
    save_prefix(prefix, tmp_path / "saved")
    export(prefix, tmp_path, "kv", name="kv")
    export(prefix, tmp_path, "cartridges", name="cartridge")
    save_prefix(PrefixKV(None, 5, **GEOMETRY, projection=6, dtype=dtype), tmp_path / "projection")
    save_prefix(PrefixKV(None, 5, **GEOMETRY, num_prefixes=2, dtype=dtype), tmp_path / "bank")
    for source in ("saved", "kv.safetensors", "cartridge", "projection", "bank"):
        first, *_ = export(tmp_path / source, tmp_path / "served", "kv", name="x", force=True)
        assert read_kv(first).dtype == dtype, source
        first, *_ = export(tmp_path / source, tmp_path / "served", "kv", name="x", dtype=torch.float32, force=True)
        assert read_kv(first).dtype == torch.float32, source
    save_prefix(SoftPrompt(None, 4, embed_dim=8, dtype=dtype), tmp_path / "prompt")
    for to, name in (
        ("prompt-embeds", "prompt.safetensors"),
        ("tensorrt-llm", "prompt.npy"),
        ("llama.cpp", "prompt.f32"),
    ):
        export(tmp_path / "prompt", tmp_path, to)
        assert (tmp_path / name).exists()
    assert load_file(tmp_path / "prompt.safetensors")["prompt_embeds"].dtype == dtype


def test_the_names_of_a_banks_prefixes_are_short_enough(tmp_path):
    """A server could not find longer ones."""
    bank = PrefixKV(None, 5, **GEOMETRY, num_prefixes=2)
    assert len(export(bank, tmp_path / "served", "kv", name="x" * 198)) == 2
    with pytest.raises(ValueError, match="name: expected at most 200 letters"):
        export(bank, tmp_path / "new", "kv", name="x" * 199)
    assert not (tmp_path / "new").exists()


def test_a_file_says_that_the_prefix_takes_no_positions(tmp_path):
    """Only kv files can, and nothing reads such a file as a prefix that takes positions."""
    prefix = PrefixKV(None, 5, **GEOMETRY)
    save_prefix(prefix, tmp_path / "doc")
    (path,) = export(prefix, tmp_path, "kv", shift_positions=False)
    assert read_kv(path).positions == 0
    with pytest.raises(ValueError, match=r"prefix\.safetensors: positions: .*shift_positions=False"):
        load_prefix(path)
    with pytest.raises(ValueError, match="shift_positions: expected True for to='cartridges'"):
        export(prefix, tmp_path, "cartridges", shift_positions=False)
    with pytest.raises(ValueError, match=r"shift_positions: expected True for to='llama\.cpp'"):
        export(SoftPrompt(None, 2, embed_dim=4), tmp_path, "llama.cpp", shift_positions=False)
    arguments = ["export", str(tmp_path / "doc"), "--to", "kv", "--output", str(tmp_path)]
    for options, positions in (([], 5), (["--no-shift-positions", "--force"], 0)):
        assert cli.main([*arguments, *options]) == 0
        assert read_kv(tmp_path / "doc.safetensors").positions == positions


def test_states_are_refused(tmp_path):
    from peftkern.recurrent_state import RecurrentState

    state = RecurrentState([[], [([1, 4, 3], [1, 2, 4, 4])], []])
    prefix = PrefixKV(None, [2, 0, 2], num_layers=3, num_kv_heads=[2, 0, 2], head_dim=8, state=state)
    with pytest.raises(ValueError, match="prefix: state: expected no states of recurrent layers"):
        export(prefix, tmp_path, "kv")


def test_nothing_is_written_unless_everything_can_be(tmp_path):
    fine, wrong = (UNIFORM["prefix"](torch.float32), UNEQUAL["ragged"](torch.float32))
    with pytest.raises(ValueError, match="layer 1"):
        export([fine, wrong], tmp_path / "new", "cartridges")
    assert not (tmp_path / "new").exists()


def test_existing_files_stay_without_force(tmp_path):
    prefix = PrefixKV(None, 2, **GEOMETRY)
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a.safetensors").write_text("old")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "target")
    (tmp_path / "c.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "d.safetensors").mkdir()
    for name in "abcd":
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: expected no file of this name, or force=True"):
            export(prefix, tmp_path, "kv", name=name)
    for name in "abc":
        export(prefix, tmp_path, "kv", name=name, force=True)
        assert_bit_equal(load_prefix(tmp_path / f"{name}.safetensors"), prefix)
    with pytest.raises(ValueError, match=r"d\.safetensors: expected no file"):
        export(prefix, tmp_path, "kv", name="d", force=True)
    assert (tmp_path / "target").read_text() == "precious", "a link was followed"
    assert not (tmp_path / "nothing").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    old, new = (PrefixKV(None, 2, **GEOMETRY) for _ in range(2))
    export(old, tmp_path, "kv", name="doc")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export(new, tmp_path, "kv", name="doc", force=True)
    assert os.listdir(tmp_path) == ["doc.safetensors"]
    assert_bit_equal(load_prefix(tmp_path / "doc.safetensors"), old)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", ".hidden", "-x", "a\0b", "a\nb", "é", "C:\\a", "x" * 201, None, 3]
)
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name: expected at most 200 letters, digits"):
        kv_path(tmp_path, name)
    if name:
        with pytest.raises(ValueError, match="name: expected at most 200 letters, digits"):
            export(PrefixKV(None, 2, **GEOMETRY), tmp_path, "kv", name=name)


def test_two_sources_of_one_name_are_refused(tmp_path):
    for parent in "ab":
        save_prefix(PrefixKV(None, 2, **GEOMETRY), tmp_path / parent / "doc")
    with pytest.raises(ValueError, match="expected sources of different names, got 'doc' twice"):
        export([tmp_path / "a" / "doc", tmp_path / "b" / "doc"], tmp_path / "new", "kv")


def test_contents_do_not_change_with_the_file(tmp_path):
    """A server keeps what it has read, also if somebody writes into the file."""
    path = tmp_path / "doc.safetensors"
    export(PrefixKV(None, 2, **GEOMETRY), tmp_path, "kv", name="doc")
    layers = read_kv(path).layers
    before = [x.clone() for pair in layers for x in pair]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(map(torch.equal, [x for pair in layers for x in pair], before))


def test_wrong_contents_are_not_written(tmp_path):
    x = torch.randn(3, 2, 8)
    for layers, message in (
        ([(x, x[:2])], "layers.0.value: expected the tokens and heads of the key"),
        ([(x, x), (x.half(), x.half())], "layers.1.key: expected F32, as the first tensor, got F16"),
        ([None], "layers: expected keys and values of at least one layer"),
    ):
        with pytest.raises(ValueError, match=message):
            write_kv(tmp_path / "new" / "doc.safetensors", KVFile(layers, 3))
    with pytest.raises(ValueError, match="positions: expected an integer from 3"):
        write_kv(tmp_path / "new" / "doc.safetensors", KVFile([(x, x)], 2))
    assert not (tmp_path / "new").exists()


def test_a_server_reads_kv_files_without_transformers(tmp_path):
    export(PrefixKV(None, 2, **GEOMETRY), tmp_path, "kv", name="doc")
    script = (
        "import sys; from peftkern.integrations.kv_file import read_kv; print(read_kv(sys.argv[1]).lengths)\n"
        "heavy = {'transformers', 'triton', 'peft', 'peftkern.functional'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "doc.safetensors"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "[2, 2, 2]\n"), result.stderr


def test_files_are_replaced_together(tmp_path, monkeypatch):
    """All are on the disk before the first appears."""
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1])
    replace_files(tmp_path, {"a": b"1", "b": b"2"})
    assert steps == ["fsync", "fsync", "replace", "replace", "fsync"]


def test_the_command_line_exports(tmp_path, capsys):
    save_prefix(PrefixKV(None, 3, **GEOMETRY), tmp_path / "doc")
    arguments = ["export", str(tmp_path / "doc"), "--to", "kv", "--output", str(tmp_path / "served")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'served' / 'doc.safetensors'}\n"
    assert cli.main(arguments) == 2
    assert "peftkern export: error:" in capsys.readouterr().err
    assert cli.main([*arguments, "--force", "--dtype", "bfloat16", "--name", "other"]) == 0
    assert read_kv(tmp_path / "served" / "other.safetensors").dtype == torch.bfloat16
    assert cli.main(["export", str(tmp_path / "nothing"), "--to", "kv"]) == 2
    assert "expected a safetensors file, got none" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main([*arguments[:-1], str(tmp_path / "file" / "below")]) == 1
    with pytest.raises(SystemExit) as status:
        cli.main(["export", "x", "--to", "nonsense"])
    assert status.value.code == 2


def test_the_command_line_knows_the_formats():
    from peftkern.integrations.export import FORMATS

    assert tuple(FORMATS) == export_tool.FORMATS
