# SPDX-License-Identifier: Apache-2.0
"""The C ABI: known answers, refusals, and what a missing or foreign library says."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from peftkern import native, reference
from peftkern.arguments import AttentionArgs, allocate_gradients, allocate_outputs
from peftkern.testing.cases import Shape, tensors

# kat_vectors of Random123, philox 4x32 10: counter, key, answer
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _args(shape: Shape | None = None, **options) -> AttentionArgs:
    values = dict.fromkeys(AttentionArgs._fields[5:15]) | tensors(shape or Shape(), torch.float32)
    values |= {"scale": 0.25, "causal": True, "window": None, "prefix_in_window": True, "softcap": 0.0}
    return AttentionArgs(**{**values, "dropout_p": 0.0, **options})


def test_library_is_built():
    assert native.cpu.MISSING == "", "build the library before the tests: pip install ."


@pytest.mark.parametrize("module", ["native.cpu", "native.cuda", "ops", "backends.merge", "tools.bench.rows"])
def test_a_module_can_be_the_first_that_is_imported(module):
    done = subprocess.run([sys.executable, "-c", f"import peftkern.{module}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX)
def test_philox_known_answers(counter, key, answer):
    assert native.cpu.philox4x32(counter, key) == answer
    words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == answer


def test_instruction_sets_are_named_in_order():
    available = native.cpu.available_isas()
    assert available[0] == "portable"
    assert [native.cpu.ISAS[name] for name in available] == sorted(native.cpu.ISAS[name] for name in available)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert native.cpu.default_isa(dtype) in available


def test_an_instruction_set_wins_over_the_constants_of_a_call(monkeypatch):
    """Plans prepare the constants of a call with "auto": a test of one instruction set would run another."""
    args = _args()
    out, lse = allocate_outputs(args)
    gradients = allocate_gradients(args, [True] * 5 + [False] * 4)
    packed = []
    monkeypatch.setattr(native.cpu, "_call", lambda name, struct: packed.append(struct))
    auto = native.fill.attention_constants(args, out.stride())
    backward_auto = native.fill.backward_constants(out, None, out, args, gradients)
    for isa, constants, backward_constants in (
        ("portable", auto, backward_auto), ("portable", None, None), ("auto", auto, backward_auto),
    ):  # fmt: skip
        native.cpu.prefix_attention(args, out, lse, isa, constants)
        native.cpu.prefix_attention_backward(out, None, out, lse, args, gradients, isa, backward_constants)
    portable, without, plain = packed[::2]
    assert portable == without
    assert portable != plain, "isa='portable' was ignored: the call runs with the instruction set of its constants"
    assert packed[1] == packed[3] != packed[5]


@pytest.mark.parametrize("isa", native.cpu.available_isas())
def test_every_instruction_set_runs(isa):
    args = _args()
    out, lse = allocate_outputs(args)
    native.cpu.prefix_attention(args, out, lse, isa)
    expected, expected_lse = reference.prefix_attention(**args.without_hints())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_a_processor_without_the_instruction_set_is_told(monkeypatch):
    monkeypatch.setitem(native.cpu.ISAS, "avx4096", 99)
    args = _args()
    with pytest.raises(native.cpu.NativeError, match="lacks the requested instruction set"):
        native.cpu.prefix_attention(args, *allocate_outputs(args), isa="avx4096")


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_ids": torch.tensor([0, 7])},
        {"prefix_ids": torch.tensor([0, -2])},
        {"prefix_ids": torch.tensor([0, 1]), "prefix_lens": torch.tensor([1, 99])},
        {"prefix_ids": torch.tensor([0, 1]), "prefix_lens": torch.tensor([-1, 1], dtype=torch.int32)},
    ],
    ids=str,
)
def test_an_index_out_of_range_is_refused_not_followed(options):
    args = _args(Shape(A=2), **options)
    with pytest.raises(native.cpu.NativeError, match="out of range"):
        native.cpu.prefix_attention(args, *allocate_outputs(args))


@pytest.mark.parametrize("place", [(-2, 0), (2, 0), (0, -1), (0, 5), (-1, 7)], ids=str)
def test_a_row_out_of_range_is_refused_not_followed(place):
    """Two prefixes of two tokens, one of which lies nowhere in a bank of 2 x 5 rows and a sequence of 7."""
    args = _args(Shape(A=2), prefix_ids=torch.tensor([0, 1]))
    rows = torch.zeros(2, 2, 2, dtype=torch.long)
    native.cpu.prefix_attention(args, *allocate_outputs(args), rows=rows)
    rows[1, 1] = torch.tensor(place)
    with pytest.raises(native.cpu.NativeError, match="out of range"):
        native.cpu.prefix_attention(args, *allocate_outputs(args), rows=rows)


def test_offsets_out_of_range_are_refused():
    args = _args(Shape(B=1, S=7), cu_seqlens=torch.tensor([0, 9, 7]))
    with pytest.raises(native.cpu.NativeError, match="out of range"):
        native.cpu.prefix_attention(args, *allocate_outputs(args))


def test_a_head_beyond_the_limit_is_refused():
    args = _args(Shape(D=264))
    with pytest.raises(native.cpu.NativeError, match="out of range"):
        native.cpu.prefix_attention(args, *allocate_outputs(args))


def test_a_token_out_of_range_is_refused():
    weight, prompt = torch.zeros(5, 4), torch.zeros(2, 4)
    with pytest.raises(native.cpu.NativeError, match="out of range"):
        native.cpu.soft_prompt_embedding(torch.tensor([[5]]), weight, prompt, None, torch.empty(1, 3, 4))


def test_a_missing_library_is_a_reason_and_no_import_error(monkeypatch, tmp_path):
    monkeypatch.setattr(native.cpu, "_PATH", tmp_path / "libpeftkern_cpu.so")
    library, reason = native.cpu._load()
    assert library is None
    assert "is not built. If a C++ compiler is installed, run `pip install .`" in reason


def test_a_foreign_library_is_a_reason(monkeypatch, tmp_path):
    path = tmp_path / "libpeftkern_cpu.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(native.cpu, "_PATH", path)
    assert "does not load" in native.cpu._load()[1]


def test_another_abi_version_is_a_reason(monkeypatch):
    monkeypatch.setattr(native.cpu, "ABI_VERSION", native.cpu.ABI_VERSION + 1)
    library, reason = native.cpu._load()
    assert library is None
    assert f"has ABI {native.cpu.ABI_VERSION - 1}, this package needs {native.cpu.ABI_VERSION}" in reason


def test_status_codes_have_texts():
    texts = {native.cpu._library.peftkern_error_string(status) for status in range(5)}
    assert len(texts) == 5
    assert native.cpu._library.peftkern_isa_name(99) is None
    assert native.cpu._library.peftkern_prefix_attention(ctypes.c_char_p(None)) != 0, "a null struct was accepted"
