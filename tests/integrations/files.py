# SPDX-License-Identifier: Apache-2.0
"""Prefixes, and files with faults, that the tests of export and import share."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from peftkern import PrefixKV

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8}
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


def lists(tokens=4, frozen=1, num_layers=2, dtype=torch.float32, kind="frozen", wrap=list):
    """What Cartridges saves."""
    torch.manual_seed(3)

    def tensors(length):
        return wrap([torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(num_layers)])

    return {
        "trainable_keys": tensors(tokens), "trainable_values": tensors(tokens),
        f"{kind}_keys": tensors(frozen), f"{kind}_values": tensors(frozen),
    }  # fmt: skip


def parameters(tensors):
    return nn.ParameterList([nn.Parameter(x) for x in tensors])


def archive(path: Path, data: bytes, records=(), compression=zipfile.ZIP_STORED, extra=(), byteorder="little"):
    """A zip archive as torch.save writes it, with any pickle and any records."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/byteorder", byteorder)
        file.writestr("x/version", "3\n")
        for index, record in enumerate(records):
            file.writestr(f"x/data/{index}", record)
        for name, content in extra:
            file.writestr(name, content)


class Storage:
    """A storage by its persistent id, with any number of elements."""

    def __init__(self, numel, key="0", device="cpu"):
        self.parts = torch.FloatStorage, key, device, numel

    @property
    def id(self):
        return ("storage", *self.parts)


class Call:
    """A pickle of it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class _Pickler(pickle._Pickler):
    def persistent_id(self, x):
        return x.id if isinstance(x, Storage) else None


def pickled(state) -> bytes:
    """A pickle in which :class:`Storage` and :class:`Call` may occur."""
    data = io.BytesIO()
    _Pickler(data, 2).dump(state)
    return data.getvalue()


def tensor(storage, size, stride, offset=0):
    """A tensor of a pickle, of any size and stride."""
    # Lists, because torch.save uses no tuple twice.
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, [*size], [*stride], False, OrderedDict())


def kv_tensors(tokens=4, num_layers=2, dtype=torch.float32):
    torch.manual_seed(3)
    return {
        f"layers.{layer}.{part}": torch.randn(tokens, 2, 8, dtype=dtype)
        for layer in range(num_layers)
        for part in ("key", "value")
    }


METADATA = {"format": "peftkern.kv", "version": "1", "num_layers": "2", "positions": "4"}


def kv_file(path, tensors=None, **metadata):
    """A kv file with changed tensors and metadata (None removes)."""
    tensors = {name: x for name, x in {**kv_tensors(), **(tensors or {})}.items() if x is not None}
    save_file(tensors, path, {name: x for name, x in {**METADATA, **metadata}.items() if x is not None})


def raw_safetensors(path, header, data=b""):
    """A safetensors file with any header: a dict, or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def layers_of(prefix):
    return [pair for pair in prefix.layer_kv() if pair is not None]


def assert_bit_equal(actual: PrefixKV, expected: PrefixKV):
    """Keys and values of all layers, and what else a file carries."""
    assert actual.lengths == expected.lengths
    assert actual.shapes == expected.shapes
    assert (actual.positions, actual.num_frozen_tokens) == (expected.positions, expected.num_frozen_tokens)
    for ours, theirs in zip(layers_of(actual), layers_of(expected), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y.to(x.dtype))
