# SPDX-License-Identifier: Apache-2.0
"""``two_part`` and ``slot``: the Triton part in the guarded interpreter, the vendor's part by torch's CPU op.

The vendor table's other rows run their own code too, on stand-ins for the ops that only a GPU has (stand_ins.py), and
call the real ops on tensors without data, which checks arguments and shapes.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import peftkern
from peftkern import ops
from peftkern.backends import BACKENDS, allocate_outputs, two_part, vendor
from peftkern.backends.triton import prefix_part

from ..bounds import check_backend
from ..cases import FEATURES, Shape, combination, feature, tensors
from . import stand_ins
from .guard import guard

pytestmark = pytest.mark.interpreter
SHAPE = Shape(B=2, Hq=4, Hkv=2, S=33, P=19, D=20)  # two blocks of rows, of which the second is ragged
BOTH = ["two_part", "slot"]

#: What each backend refuses: features, by the vendor's row where a mask cannot be had.
REFUSED = {"two_part": {"softcap", "dropout"}, "slot": {"softcap", "dropout", "gate", "packed_bank"}}
UNMASKED = {
    "two_part": {"key_mask", "bias", "bias_row"},
    "slot": {"key_mask", "bias", "bias_row", "prefix_bias", "bank", "ragged_bank", "packed", "window_after_prefix"},
}
#: The slot's prefix gradients are fp32 sums of what the vendor has rounded to half precision per sample, as eager has.
ROUNDED_TERMS = {"two_part": 1, "slot": 2}


def _feature(name: str, shape: Shape = SHAPE):
    """``kv_cache`` names a T that is too short for this shape."""
    return feature(name, shape) if name != "kv_cache" else (dataclasses.replace(shape, T=shape.S + 15), {})


def _check(backend: str, shape: Shape, options: dict, dtype: torch.dtype, prefix_dtype=None, **kwargs):
    kwargs.setdefault("sum_factor", ROUNDED_TERMS[backend])
    with guard() as watch:
        results = check_backend(backend, tensors(shape, dtype, prefix_dtype), options, **kwargs)
    return results, watch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("backend", BOTH)
def test_every_feature_on_torchs_cpu_kernel(backend, dtype, name):
    """With the fp32 prefix that PEFT keeps beside half-precision activations."""
    shape, options = _feature(name)
    if name in REFUSED[backend]:
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _check(backend, shape, options, dtype)
    else:
        _check(backend, shape, options, dtype, torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("row", ["flash", "cudnn", "efficient", "base 2"])
@pytest.mark.parametrize("backend", BOTH)
def test_every_feature_on_every_row(backend, row, name, monkeypatch):
    """In the widest dtype of the row."""
    stand_ins.install(monkeypatch, row)
    shape, options = _feature(name, dataclasses.replace(SHAPE, Hq=2, Hkv=1, B=2, S=35))
    dtype = {"efficient": torch.float32, "cudnn": torch.bfloat16}.get(row, torch.float16)
    if name in REFUSED[backend] or (row == "flash" and name in UNMASKED[backend]):
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _check(backend, shape, options, dtype)
    else:
        _check(backend, shape, options, dtype)
