# SPDX-License-Identifier: Apache-2.0
"""Decoding in Triton's interpreter, under the guard: values, the bytes of the prefix, fixed grids and workspaces."""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern.backends.triton import launch
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import FEATURES, Shape, combination, feature, tensors

from ..cover import product
from .guard import guard

pytestmark = pytest.mark.interpreter
PREFIX, SEQUENCE, COMBINE = (f"_prefix_attention_decode_{part}_kernel" for part in ("prefix", "sequence", "combine"))
FUSED = "_prefix_attention_fwd_kernel"
# three blocks of rows over the batch, four splits of the prefix and of the keys, all ragged
SHAPE = Shape(B=3, Hq=8, Hkv=2, S=3, P=119, T=107, D=20)


@pytest.fixture(autouse=True)
def _short_inputs_too(monkeypatch):
    monkeypatch.setattr(launch, "DECODE_KEYS", 0)


def _check(shape: Shape, options: dict, dtype: torch.dtype = torch.float32, prefix_dtype: torch.dtype | None = None):
    with guard() as watch:
        check_backend("triton", tensors(shape, dtype, prefix_dtype), options, backward=False)
    return watch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [n for n in FEATURES if n != "dropout" and not n.startswith("packed")])
def test_every_feature(name):
    watch = _check(*(feature(name, SHAPE) if name != "kv_cache" else (SHAPE, {})))
    assert {PREFIX, SEQUENCE, COMBINE} == set(watch.stores)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "dtype"),
    product(["plain", "ragged_bank", "key_mask"], [torch.bfloat16, torch.float16], strength=1),
    ids=str,
)
def test_half_precision(name, dtype):
    """With the fp32 prefix that PEFT keeps beside half-precision activations."""
    _check(*feature(name, SHAPE), dtype, torch.float32)


ODD = [
    Shape(S=1, P=333, T=257, D=40), Shape(S=16, P=7, T=63), Shape(S=1, P=1, T=1, B=1, Hq=1, Hkv=1),
    Shape(S=2, P=0, T=70, D=80), Shape(S=5, P=130, T=0), Shape(S=3, P=9, T=40, B=33, Hq=4, Hkv=1),
    Shape(S=0, T=9), Shape(B=0, S=1, T=9), Shape(S=2, T=0, P=0), Shape(S=1, P=40, T=40, D=129, B=1),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape):
    _check(shape, {"causal": shape.kv_len >= shape.S})


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.slow) for s in range(8, 60))])
def test_random_combinations(seed):
    shape, options = combination(seed)
    _check(shape, options, (torch.float32, torch.float16, torch.bfloat16)[seed % 3])


@pytest.mark.parametrize(
    ("prefix_in_window", "window"), product([True, False], [1, 33, 64, 90, 200], strength=1), ids=str
)
def test_windows_that_leave_splits_empty(window, prefix_in_window):
    """Splits before the window see no key and must have no weight."""
    _check(SHAPE, {"window": window, "prefix_in_window": prefix_in_window})


@pytest.mark.parametrize("batch", [1, 4])
def test_the_prefix_is_read_once_for_the_whole_batch(batch):
    """Keys are read once, and each program reads its rows once: the minimum."""
    shape = Shape(B=batch, Hq=4, Hkv=2, S=2, P=128, T=96, D=32)
    watch = _check(shape, {})
    row, rows = 4 * shape.D, shape.B * shape.Hq * shape.S
    prefix_splits = watch.stores[PREFIX] // (rows * (row + 4))
    assert prefix_splits > 1
    assert watch.stores[PREFIX] == prefix_splits * rows * (row + 4)
    assert watch.loads[PREFIX] == 2 * shape.Hkv * shape.P * row + prefix_splits * rows * row
    seq_splits = watch.stores[SEQUENCE] // (rows * (row + 4))
    assert watch.loads[SEQUENCE] == 2 * shape.B * shape.Hkv * shape.T * row + seq_splits * rows * row
    assert watch.loads[COMBINE] == (prefix_splits + seq_splits) * rows * (row + 4)
    assert watch.stores[COMBINE] == rows * (row + 4)


def test_of_a_bank_only_what_is_seen_is_read():
    shape = Shape(B=4, Hq=2, Hkv=2, S=1, P=64, T=16, D=32, A=5)
    options = {"prefix_ids": torch.tensor([3, 1, 3, -1]), "prefix_lens": torch.tensor([64, 20, 64, 40, 9])}
    watch = _check(shape, options)
    row, rows = 4 * shape.D, shape.B * shape.Hq
    splits = watch.stores[PREFIX] // (rows * (row + 4))
    numbers = shape.Hkv * splits * 8 * (4 + 2)  # ids of four samples, two lengths
    keys = 2 * shape.Hkv * (20 + 40) * row
    assert keys + splits * rows * row < watch.loads[PREFIX] <= keys + splits * rows * row + 4 * numbers


def test_launches_depend_on_shapes_alone(monkeypatch):
    """A recorded CUDA graph must serve other ids, lengths and masks."""
    launches = []
    launch_kernel = launch.launch_kernel

    def record(kernel, grid, *arguments, **constants):
        launches[-1].append((kernel.__name__, grid))
        launch_kernel(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launch, "launch_kernel", record)
    inputs = tensors(Shape(B=2, S=1, P=70, T=70, A=3), torch.float32)
    for ids, lens, masked in (((0, 2), (70, 1, 70), 0), ((-1, 1), (0, 5, 9), 69)):
        launches.append([])
        mask = torch.arange(70).expand(2, 70) >= masked
        peftkern.prefix_attention(
            **inputs, prefix_ids=torch.tensor(ids), prefix_lens=torch.tensor(lens), key_mask=mask, backend="triton"
        )
    assert launches[0] == launches[1]
    assert [name for name, _ in launches[0]] == [PREFIX, SEQUENCE, COMBINE]


def test_runs_are_bitwise_equal_and_splits_agree(monkeypatch):
    """The number of splits depends on the device. With any number, all keys are summed."""
    inputs = tensors(SHAPE, torch.float32)

    def decode():
        return peftkern.prefix_attention(**inputs, backend="triton", return_lse=True)

    first = decode()
    assert all(torch.equal(a, b) for a, b in zip(first, decode(), strict=True))
    for processors in (1, 1000):
        monkeypatch.setattr(launch, "processors", lambda device, n=processors: n)
        for a, b in zip(first, decode(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options"),
    [(Shape(S=17, T=17), {}), (Shape(S=2, T=2), {"dropout_p": 0.5, "dropout_seed": 1}), (Shape(S=5, P=9, T=9), None)],
    ids=["many queries", "dropout", "few keys"],
)
def test_other_calls_take_the_fused_kernel(shape, options, monkeypatch):
    if options is None:
        monkeypatch.undo()
        options = {}
    assert set(_check(shape, options).stores) == {FUSED}


def test_gradients_of_a_decoding_step():
    """The fused backward accepts out and lse of decoding."""
    with guard():
        check_backend("triton", tensors(Shape(S=3, P=20, T=40), torch.float32), {}, dlse=True)
