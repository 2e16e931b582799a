# SPDX-License-Identifier: Apache-2.0
"""Names, dtypes and other options of exports, the command, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from peftkern import PrefixKV, SoftPrompt, export, load_prefix, save_prefix
from peftkern.integrations.kv_file import kv_path, read_kv
from peftkern.tools import cli
from peftkern.tools import export as export_tool
from tests.checkpoints import t5
from tests.integrations.files import DTYPES, GEOMETRY, UNEQUAL


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


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", ".hidden", "-x", "a\0b", "a\nb", "é", "C:\\a", "x" * 201, None, 3]
)
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    refused = pytest.raises(ValueError, match="name: expected at most 200 letters, digits")
    with refused:
        kv_path(tmp_path, name)
    if name is None:  # the default of an export
        return
    prompts = [SoftPrompt(None, 2, embed_dim=4) for _ in range(2)]
    for index, prompt in enumerate(prompts):
        save_prefix(prompt, tmp_path / f"prompt-{index}")
    folders = [tmp_path / "prompt-0", tmp_path / "prompt-1"]
    for source, to in (
        (PrefixKV(None, 2, **GEOMETRY), "kv"),
        (PrefixKV(None, 2, **GEOMETRY, num_prefixes=2), "cartridges"),
        (prompts, "llama.cpp"),
        (folders[0], "prompt-embeds"),
        (folders, "tensorrt-llm"),
    ):
        with refused:
            export(source, tmp_path / "out" / "deep", to, name=name)
    assert sorted(tmp_path.iterdir()) == folders


def test_two_sources_of_one_name_are_refused(tmp_path):
    for parent in "ab":
        save_prefix(PrefixKV(None, 2, **GEOMETRY), tmp_path / parent / "doc")
    with pytest.raises(ValueError, match="expected sources of different names, got 'doc' twice"):
        export([tmp_path / "a" / "doc", tmp_path / "b" / "doc"], tmp_path / "new", "kv")


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
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main([*arguments[:-1], str(output)]) == 2
        assert f"folder: expected a folder, or nothing yet, at {tmp_path / 'file'}, got" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], str(tmp_path / ("x" * 300))]) == 1, "longer than file systems allow"
    with pytest.raises(SystemExit) as status:
        cli.main(["export", "x", "--to", "nonsense"])
    assert status.value.code == 2


def test_a_name_that_would_not_be_used_is_refused(tmp_path, capsys):
    """Several folders keep their own names. Their table has one, and so have modules beside folders."""
    for index in range(2):
        save_prefix(SoftPrompt(None, 2, embed_dim=4), tmp_path / f"prompt-{index}")
    folders, out = [str(tmp_path / f"prompt-{index}") for index in range(2)], tmp_path / "out"
    for to in ("prompt-embeds", "llama.cpp"):
        with pytest.raises(ValueError, match=r"name: expected None for several folders, .* got 'mine'"):
            export(folders, out, to, name="mine")
    arguments = ["export", *folders, "--output", str(out), "--to"]
    assert cli.main([*arguments, "llama.cpp", "--name", "mine"]) == 2
    assert "name: expected None for several folders" in capsys.readouterr().err
    assert cli.main(["export", folders[0], "--output", str(out), "--to", "llama.cpp", "--name", ""]) == 2
    assert "name: expected at most 200 letters" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*arguments, "tensorrt-llm", "--name", "mine"]) == 0
    assert export(folders[:1], out, "llama.cpp", name="one")[0].name == "one.f32"
    written = export([folders[0], SoftPrompt(None, 2, embed_dim=4)], out, "llama.cpp", name="mine")
    assert [path.name for path in written if path.suffix == ".f32"] == ["prompt-0.f32", "mine-1.f32"]


def test_the_command_line_knows_the_formats():
    from peftkern.integrations.export import FORMATS

    assert tuple(FORMATS) == export_tool.FORMATS
