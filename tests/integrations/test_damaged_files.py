# SPDX-License-Identifier: Apache-2.0
"""Malicious and damaged files: each is refused by name, runs nothing and changes nothing."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import zipfile

import pytest
import torch

from peftkern import PrefixKV, export, load_prefix
from peftkern.integrations import torch_file
from tests.integrations.files import (
    GEOMETRY,
    METADATA,
    Call,
    Storage,
    archive,
    kv_file,
    kv_tensors,
    lists,
    parameters,
    pickled,
    raw_safetensors,
    tensor,
)

SHAPE, STRIDE = (1, 2, 4, 8), (64, 32, 8, 1)
NUMBERS = bytes(64 * 4)


def _saved(**changes):
    """A cartridge with changed lists; None removes one."""

    def write(path):
        state = {name: x for name, x in {**lists(), **changes}.items() if x is not None}
        torch.save(state, path)

    return write


def _one(x):
    """A pickle in which each list has one tensor of 64 numbers in record 0, and one of them is ``x``."""
    fine = tensor(Storage(64), SHAPE, STRIDE)
    return pickled({"trainable_keys": [x], "trainable_values": [fine]})


def _crafted(x, records=(NUMBERS,), **options):
    return lambda path: archive(path, _one(x), records, **options)


def _touch(path):
    """Code that leaves a trace."""
    return f"touch {path.with_name('executed')}"


def _evil(function, *arguments, nest=lambda x: x):
    """Code in place of the lists of a cartridge, or of a tensor."""

    def write(path):
        call = Call(function, *(a.format(trace=path.with_name("executed")) for a in arguments))
        archive(path, pickled(nest(call)), [NUMBERS])

    return write


def _in_list(call):
    return {"trainable_keys": [call], "trainable_values": [tensor(Storage(64), SHAPE, STRIDE)]}


def _swapped(path):
    """The names of two tensors are exchanged."""
    torch.save(lists(), path)
    data = path.read_bytes()
    for old, new in ((b"data/0", b"data/x"), (b"data/1", b"data/0"), (b"data/x", b"data/1")):
        data = data.replace(old, new)
    path.write_bytes(data)


def _saved_before_archives(path):
    torch.save(lists(), path, _use_new_zipfile_serialization=False)


def _truncated(part):
    def write(path):
        torch.save(lists(), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))])

    return write


def _flipped(path):
    """One bit of a tensor differs from what was saved."""
    torch.save(lists(), path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = next(e for e in file.infolist() if e.filename.endswith("data/0"))
    position = data.index(lists()["trainable_keys"][0].numpy().tobytes(), entry.header_offset)
    data[position + 5] ^= 1
    path.write_bytes(data)


def _tuples(path):
    """A key whose hash would take 2 ** 60 steps."""
    data = b"\x80\x02}K\x01K\x01\x86q\x00"
    for i in range(60):
        data += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    archive(path, data + b"Ns.")


def _tuples_renamed(path):
    """As above, with two names for each tuple."""
    data = b"\x80\x02}K\x01K\x01\x86q\x00q\x01"
    archive(path, data + b"h\x01h\x01\x86q\x00q\x01" * 60 + b"Ns.")


def _deep_tuples(path):
    """A key whose hash would overflow the stack."""
    archive(path, b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.")


def _beside(write):
    """A fine cartridge whose config ``write`` writes."""

    def both(path):
        torch.save(lists(), path)
        write(path.with_name("config.yaml"))

    return both


def _config(text):
    return _beside(lambda path: path.write_bytes(text))


def _directory(path):
    path.mkdir()
    (path / "inside").touch()


def _nan(x):
    x = x.clone()
    x[0, 1, 2, 3] = float("nan")
    return x


def _without_first():
    layers = parameters(K)
    del layers._parameters["0"]
    return layers


def _repeated(path):
    """Says that the file's only tensor is that of 100 layers."""
    x = tensor(Storage(64), SHAPE, STRIDE)
    archive(path, pickled({"trainable_keys": [x] * 100, "trainable_values": [x] * 100}), [NUMBERS])


K = lists()["trainable_keys"]
CARTRIDGES = {
    # code
    "os.system": (_evil(os.system, "touch {trace}"), "system"),
    "os.system in a list": (_evil(os.system, "touch {trace}", nest=_in_list), "system"),
    "eval": (_evil(eval, "open('{trace}', 'w')"), "eval"),
    "exec": (_evil(exec, "open('{trace}', 'w')", nest=_in_list), "exec"),
    "subprocess": (_evil(subprocess.Popen, "touch {trace}", nest=_in_list), "Popen"),
    "a function of torch": (_evil(torch.load, "{trace}", nest=_in_list), "torch.serialization load"),
    "getattr": (_evil(getattr, "a", "b"), "getattr"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Call(os.system, _touch(path)))), "zip archive"),
    "a pickle of another name": (
        lambda path: archive(path, _one(0), extra=[("y/data.pkl", pickled(Call(os.system, _touch(path))))]),
        "one torch.save",
    ),
    # files
    "an old file of torch": (_saved_before_archives, "zip archive"),
    "empty": (lambda path: path.write_bytes(b""), "zip archive"),
    "cut at 10 %": (_truncated(0.1), "zip archive"),
    "cut at 60 %": (_truncated(0.6), "zip archive"),
    "cut at 99 %": (_truncated(0.99), "zip archive"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "zip archive"),
    "a folder": (_directory, "got a folder"),
    "a link to nothing": (lambda path: path.symlink_to(path.with_name("nothing")), "got none"),
    "a link to itself": (lambda path: path.symlink_to(path), "expected a file that torch.save wrote"),
    "a pipe": (os.mkfifo, "got something else"),
    "a flipped bit": (_flipped, "CRC"),
    "duplicate entries": (_crafted(tensor(Storage(64), SHAPE, STRIDE), extra=[("x/data/0", NUMBERS)]), "duplicate"),
    "records in another order": (_swapped, "'data/1': expected data/0"),
    "a compressed archive": (
        _crafted(tensor(Storage(1 << 20), (1, 2, 1 << 16, 8), (1 << 20, 1 << 19, 8, 1)), [bytes(1 << 22)],
                 compression=zipfile.ZIP_DEFLATED),
        "without compression",
    ),
    "a huge pickle": (lambda path: archive(path, b"\x80\x02" + b"N0" * (3 << 20) + b"."), "at most 4194304 bytes"),
    "big-endian": (_crafted(tensor(Storage(64), SHAPE, STRIDE), byteorder="big"), "byteorder: expected little"),
    # pickles
    "protocol 4": (lambda path: torch.save(lists(), path, pickle_protocol=4), "expected pickle protocol 2, got 4"),
    "no pickle": (lambda path: archive(path, b"\x80\x02hello"), "data.pkl"),
    "an unfinished pickle": (lambda path: archive(path, _one(0)[:-9]), "cartridge.pt: "),
    "nested tuples": (_tuples, "a tuple that is used twice"),
    "nested tuples with two names": (_tuples_renamed, "a tuple that is used twice"),
    "deep tuples": (_deep_tuples, "expected tuples at most 3 deep, got deeper ones"),
    "duplicated tuples": (
        lambda path: archive(path, b"\x80\x02}K\x01K\x01\x86" + b"2\x86" * 60 + b"Ns."), "a tuple that is used twice"
    ),
    "no mark": (lambda path: archive(path, b"\x80\x02}t."), "expected a mark"),
    "a tuple of nothing": (lambda path: archive(path, b"\x80\x02\x86."), "expected values for each operation, got"),
    "a list": (lambda path: torch.save([K], path), "expected a dict of lists, got a list"),
    "a tensor": (lambda path: torch.save(K[0], path), "expected a dict of lists, got a Tensor"),
    "a number for a list": (_saved(trainable_keys=3), "trainable_keys: expected a list of tensors, got a int"),
    "a number for a tensor": (_saved(trainable_keys=[K[0], 3]), "[1]: expected a dense tensor, got a int"),
    "a number for a key": (lambda path: torch.save({**lists(), 3: []}, path), "got also int"),
    "another list": (_saved(segment_keys=K), "got also segment_keys"),
    "no values": (_saved(trainable_values=None), "trainable_values: expected a tensor per layer, got none"),
    "no layers": (_saved(trainable_keys=[]), "trainable_keys: expected a tensor per layer, got none"),
    "frozen keys alone": (_saved(frozen_values=None), "frozen_values: expected 2 tensors"),
    "fewer values": (_saved(trainable_values=K[:1]), "expected 2 tensors, as in trainable_keys, got 1"),
    "a ParameterList without some": (_saved(trainable_keys=_without_first()), "expected the parameters of a Param"),
    # sizes
    "more numbers than the file": (
        _crafted(tensor(Storage(1 << 40), (1, 2, 1 << 36, 8), (1 << 40, 1 << 39, 8, 1))),
        "trainable_keys[0]: expected a record of 4398046511104 bytes",
    ),
    "a record that is too short": (_crafted(tensor(Storage(64), SHAPE, STRIDE), [NUMBERS[:-4]]), "got 252 bytes"),
    "no record": (_crafted(tensor(Storage(64, "7"), SHAPE, STRIDE)), "data.pkl"),
    "one number a million times": (
        _crafted(tensor(Storage(64), (1, 2, 1 << 30, 8), (0, 0, 0, 0))), "trainable_keys[0]: expected numbers within",
    ),
    "beyond its storage": (_crafted(tensor(Storage(64), SHAPE, STRIDE, 1)), "cartridge.pt: "),
    "a negative offset": (_crafted(tensor(Storage(64), SHAPE, STRIDE, -1)), "cartridge.pt: "),
    "a negative size": (_crafted(tensor(Storage(64), (1, 2, -4, 8), STRIDE)), "cartridge.pt: "),
    "numbers without a record": (_crafted(tensor(Storage(0), SHAPE, STRIDE), [b""]), "in the file, got 0 bytes"),
    "one tensor for many layers": (_repeated, "in which tensors repeat"),
    "ragged layers": (
        _saved(trainable_keys=[K[0], K[1][:, :, :3]]), "trainable_keys[1]: expected [1, 2, 4, 8] in torch.float32",
    ),
    "other heads": (_saved(trainable_values=[x[:, :1] for x in K]), "trainable_values[0]: expected [1, 2, 4, 8]"),
    "other dims in frozen": (_saved(frozen_keys=[x[:, :, :1, :4] for x in K]), "keys[0]: expected [1, 2, 1, 8]"),
    "two samples": (_saved(trainable_keys=[x.expand(2, -1, -1, -1).clone() for x in K]), "expected [1, heads"),
    "three dims": (_saved(trainable_keys=[x[0] for x in K]), "expected [1, heads, tokens, dims]"),
    "no heads": (_saved(trainable_keys=[x[:, :0] for x in K]), "expected [1, heads, tokens, dims]"),
    # numbers
    "integers": (_saved(trainable_keys=[x.long() for x in K]), "LongStorage"),
    "doubles": (_saved(trainable_keys=[x.double() for x in K]), "DoubleStorage"),
    "complex numbers": (_saved(trainable_keys=[x + 0j for x in K]), "ComplexFloatStorage"),
    "sparse tensors": (_saved(trainable_keys=[x.to_sparse() for x in K]), "cartridge.pt: data.pkl: expected"),
    "two dtypes": (_saved(trainable_values=[x.half() for x in K]), "expected [1, 2, 4, 8] in torch.float32"),
    "NaN": (_saved(trainable_values=[K[0], _nan(K[1])]), "trainable_values[1]: expected finite numbers"),
    "infinity": (_saved(frozen_keys=[x[:, :, :1] / 0 for x in K]), "frozen_keys[0]: expected finite numbers"),
    "fixed tokens that differ from frozen ones": (
        _saved(fixed_keys=[x[:, :, :1] for x in K], fixed_values=[x[:, :, :1] for x in K]),
        "fixed_keys: expected what frozen_keys contains",
    ),
    # the config
    "a folder as the config": (_beside(lambda path: path.mkdir()), "config.yaml: expected YAML, got something"),
    "a pipe as the config": (_beside(os.mkfifo), "config.yaml: expected YAML, got something"),
    "a link to nothing as the config": (_beside(lambda path: path.symlink_to("nothing")), "expected YAML, got some"),
    "no YAML": (_config(b"a: [1"), "config.yaml: expected YAML"),
    "binary YAML": (_config(b"\x00\x01"), "config.yaml: expected YAML"),
    "a list in YAML": (_config(b"- 1"), "config.yaml: expected a mapping, got sequence"),
    "empty YAML": (_config(b""), "config.yaml: expected a mapping, got nothing"),
    "a list as the model's name": (
        _config(b"model: {pretrained_model_name_or_path: [a]}"), "pretrained_model_name_or_path: expected a name",
    ),
    "deep YAML": (_config(b"[" * 3000), "more than 500 brackets"),
    "nested blocks of YAML": (_config(b"- " * 20_000), "config.yaml: expected YAML"),
    "long YAML": (_config(b"a" * (2 << 20)), "config.yaml: expected YAML"),
}  # fmt: skip


def _header(**changes):
    """A header of two layers of 4 tokens, with changed entries."""

    def write(path):
        header = {"__metadata__": METADATA}
        for index, name in enumerate(kv_tensors()):
            header[name] = {"dtype": "F32", "shape": [4, 2, 8], "data_offsets": [256 * index, 256 * (index + 1)]}
        raw_safetensors(path, {**header, **changes}, NUMBERS * 4)

    return write


def _entry(**changes):
    fine = {"dtype": "F32", "shape": [4, 2, 8], "data_offsets": [0, 256]}
    return _header(**{"layers.0.key": {**fine, **changes}})


def _duplicate(path):
    _header()(path)
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    raw_safetensors(path, header.replace(b"layers.0.value", b"layers.0.key"), NUMBERS * 4)


def _kv_flipped(path):
    """One bit of a tensor differs from what was exported."""
    export(PrefixKV(None, 4, **GEOMETRY), path.parent, "kv", name="kv")
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def _changed(tensors=None, **metadata):
    return lambda path: kv_file(path, tensors, **metadata)


def _kv_truncated(path):
    kv_file(path)
    path.write_bytes(path.read_bytes()[:-9])


X = kv_tensors()["layers.0.key"]
FOREIGN = "expected a safetensors file, got a damaged or foreign one"
KV_FILES = {
    # files
    "empty": (lambda path: path.write_bytes(b""), FOREIGN),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Call(os.system, _touch(path)))), FOREIGN),
    "a file of torch": (lambda path: torch.save(kv_tensors(), path), FOREIGN),
    "truncated": (_kv_truncated, FOREIGN),
    "a flipped bit": (_kv_flipped, "sha256: expected that of the tensors"),
    "another checksum": (_changed(sha256="0" * 64), "sha256: expected that of the tensors"),
    "a folder": (_directory, "expected a safetensors file, got none"),
    "a pipe": (os.mkfifo, "got none"),
    "a link to nothing": (lambda path: path.symlink_to(path.with_name("nothing")), "got none"),
    # headers
    "a header of 2 ** 63 bytes": (lambda path: path.write_bytes((1 << 63).to_bytes(8, "little") + b"{}"), FOREIGN),
    "a header longer than the file": (lambda path: path.write_bytes(b"\0\0\0\1\0\0\0\0{}"), FOREIGN),
    "deep JSON": (lambda path: raw_safetensors(path, b'{"a":' * 100_000), FOREIGN),
    "no JSON": (lambda path: raw_safetensors(path, b"hello"), FOREIGN),
    "a negative size": (_entry(shape=[-4, 2, 8]), FOREIGN),
    "a size that overflows": (_entry(shape=[1 << 62, 1 << 62, 8]), FOREIGN),
    "more numbers than bytes": (_entry(shape=[400, 2, 8]), FOREIGN),
    "offsets backwards": (_entry(data_offsets=[256, 0]), FOREIGN),
    "offsets that overlap": (_entry(data_offsets=[256, 512]), FOREIGN),
    "duplicate names": (_duplicate, "kv.safetensors: "),
    # metadata
    "no metadata": (_header(__metadata__={}), "format: expected 'peftkern.kv'"),
    "another format": (_changed(format="pt"), "format: expected 'peftkern.kv' in the metadata, got 'pt'"),
    "another version": (_changed(version="2"), "version: expected '1', got '2'"),
    "no number of layers": (_changed(num_layers=None), "num_layers: expected an integer from 1"),
    "a billion layers": (_changed(num_layers="999999999"), "num_layers: expected an integer from 1 to 65536"),
    "fewer layers": (_changed(num_layers="1"), "'layers.i.key' or 'layers.i.value' with i < 1"),
    "a negative number of layers": (_changed(num_layers="-2"), "num_layers: expected an integer"),
    "a number in words": (_changed(num_layers="two"), "num_layers: expected an integer"),
    "a number in Arabic digits": (_changed(num_layers="\u0662"), "num_layers: expected an integer"),
    "positions within the prefix": (_changed(positions="3"), "positions: expected an integer from 4"),
    "no positions": (_changed(positions=None), "positions: expected an integer"),
    "more frozen tokens": (_changed(num_frozen_tokens="5"), "num_frozen_tokens: expected an integer from 0 to 4"),
    # tensors
    "no value": (_changed({"layers.1.value": None}), "layers.1.value: expected a tensor, because"),
    "no layers": (_changed(dict.fromkeys(kv_tensors())), "layers: expected keys and values of at least one layer"),
    "another tensor": (_changed({"lora_A": X}), "lora_A: expected a tensor 'layers.i.key'"),
    "a layer twice": (_changed({"layers.01.key": X}), "layers.01.key: expected a tensor"),
    "two dims": (_changed({"layers.0.key": X[0]}), "layers.0.key: expected [tokens, at least 1 head, at least 1]"),
    "no heads": (_changed({"layers.0.key": X[:, :0]}), "layers.0.key: expected [tokens, at least 1 head"),
    "other tokens": (_changed({"layers.0.value": X[:3]}), "layers.0.value: expected the tokens and heads of the key"),
    "integers": (_changed({"layers.0.key": X.long()}), "layers.0.key: expected one of F32, BF16, F16, got I64"),
    "doubles": (_changed({k: x.double() for k, x in kv_tensors().items()}), "BF16, F16, got F64"),
    "two dtypes": (_changed({"layers.1.key": X.half()}), "expected F"),
    "NaN": (_changed({"layers.1.key": X * float("nan")}), "layers.1.key: expected finite numbers"),
    "infinity": (_changed({"layers.1.value": X / 0}), "layers.1.value: expected finite numbers"),
}  # fmt: skip


def _state_of(folder):
    """All files of a folder: their kind, and the bytes of regular ones."""
    return {
        path: path.read_bytes() if path.is_file() else os.lstat(path).st_mode for path in sorted(folder.rglob("*"))
    }


def _refused(path, message, load):
    """The message of a ValueError, after which all files are as before."""
    before = _state_of(path.parent)
    with pytest.raises(ValueError, match="expected") as error:
        load()
    assert message in str(error.value)
    assert str(path.parent) in str(error.value)
    assert len(str(error.value)) < 1000
    assert _state_of(path.parent) == before
    assert not path.with_name("executed").exists()


@pytest.fixture
def little_memory():
    """4 GiB more than the process has; a reader that allocates what a file claims fails."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Duplicate name")
@pytest.mark.parametrize("name", CARTRIDGES)
def test_bad_cartridges_are_refused(name, tmp_path):
    write, message = CARTRIDGES[name]
    path = tmp_path / "cartridge.pt"
    write(path)
    (tmp_path / "other").write_text("stays")
    _refused(path, message, lambda: load_prefix(tmp_path))
    if not path.is_dir():
        _refused(path, message, lambda: load_prefix(path))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", KV_FILES)
def test_bad_kv_files_are_refused(name, tmp_path):
    write, message = KV_FILES[name]
    path = tmp_path / "kv.safetensors"
    write(path)
    _refused(path, message, lambda: load_prefix(path))


CODE = list(CARTRIDGES)[: list(CARTRIDGES).index("a plain pickle")]


@pytest.mark.parametrize("name", CODE)
def test_torch_refuses_code_that_our_own_check_would_miss(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_check_pickle", lambda data: None)
    path = tmp_path / "cartridge.pt"
    CARTRIDGES[name][0](path)
    _refused(path, "what torch.load refuses (UnpicklingError", lambda: load_prefix(path))


def test_the_crafted_files_would_run_code(tmp_path):
    """What makes the tests above meaningful: an ordinary unpickler runs the code, and the fine parts are fine."""
    path = tmp_path / "cartridge.pt"
    CARTRIDGES["os.system"][0](path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()
    for device in ("cpu", "cuda:3"):
        _crafted(tensor(Storage(64, device=device), SHAPE, STRIDE))(path)
        assert load_prefix(path).lengths == (4,)
    kv_file(tmp_path / "kv.safetensors")
    assert load_prefix(tmp_path / "kv.safetensors").lengths == (4, 4)
