# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, on the host shim: numbers within the bound of all backends, and nothing a check objects to."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

import peftkern
from peftkern import native, reference
from peftkern.arguments import allocate_gradients, allocate_outputs
from peftkern.backends import cuda
from peftkern.backends.cuda import CudaPrefixKernels
from peftkern.testing import bounds
from peftkern.testing.cases import EMPTY, FEATURES, ODD, Shape, combination, feature, tensors

from . import merging
from .merging import args_of, sizes_of
from .shim import Shim

KERNELS = CudaPrefixKernels()
HALVES = [torch.float16, torch.bfloat16]
REFUSED = ("bias", "bias_row", "dropout", "narrow_values", "wide_values")
SUPPORTED = [name for name in FEATURES if name not in REFUSED]
OF_THE_PREFIX = (
    "plain", "non_causal", "scale", "kv_cache", "window", "window_after_prefix", "softcap", "sinks", "packed", "bank",
    "ragged_bank", "packed_window", "packed_bank", "packed_prompt",
)  # fmt: skip


@pytest.fixture
def shim(monkeypatch):
    return Shim(monkeypatch)


def _mark(cases, fast):
    return [pytest.param(*case, marks=() if fast(*case) else pytest.mark.slow) for case in cases]


# -- the whole attention ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head_dim"),
    _mark(itertools.product(SUPPORTED, (40, 64, 80, 128, 256)), lambda name, dim: dim == 64 or name == "ragged_bank"),
)
def test_attention_with_each_feature(shim, name, head_dim):
    shape, options = sizes_of(name, D=head_dim)
    dtype = torch.float16 if head_dim % 128 else torch.bfloat16
    bounds.check_backend("cuda", tensors(shape, dtype), options, dlse=True)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.slow) for s in range(8, 64))])
def test_random_combinations(shim, seed):
    shape, options = combination(seed)
    for name in ("bias", "dropout_p", "dropout_seed"):
        options.pop(name, None)
    shape = dataclasses.replace(shape, D=(16, 40, 64)[seed % 3], Dv=None)
    bounds.check_backend("cuda", tensors(shape, HALVES[seed % 2], seed=seed), options, dlse=seed % 4 < 2)


# what the kernels for one head keep apart: a group of more heads than a pass takes, a prefix of several parts
OPTIONS_OF_HEADS = {
    "prefix_bias": {"prefix_bias": torch.linspace(-1, 1, 12 * 70).view(12, 70)},
    "of_heads": {"prefix_bias": torch.linspace(-1, 1, 12)[:, None], "sinks": torch.linspace(-1, 2, 12)},
    "of_tokens": {"prefix_bias": torch.linspace(-1, 1, 70)[None], "softcap": 2.0},
    "gate": {"gate": torch.linspace(-1, 1, 12), "sinks": torch.linspace(-1, 2, 12), "window": 60},
    "all": {
        "gate": torch.linspace(-1, 1, 12), "prefix_bias": torch.linspace(-1, 1, 12 * 70).view(12, 70),
        "sinks": torch.linspace(-1, 2, 12),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS_OF_HEADS)
@pytest.mark.parametrize("head_dim", [64, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (80, 128, 256))])
def test_what_differs_by_head(shim, name, head_dim):
    shape = Shape(B=2, Hq=12, Hkv=2, S=13, P=70, D=head_dim)
    bounds.check_backend("cuda", tensors(shape, torch.bfloat16), OPTIONS_OF_HEADS[name], dlse=True)


@pytest.mark.parametrize("case", [{"S": 13, "P": 9}, {"S": 1, "P": 40, "T": 300}, {"B": 3, "S": 1, "P": 40}], ids=str)
@pytest.mark.parametrize("gate", [None, torch.tensor([0.3, -1.0, 0.5, 2.0])], ids=["joint", "gate"])
def test_sinks_that_are_not_finite(shim, case, gate):
    """A sink of inf takes the whole weight, -inf none: as in fp64. By one pass, by splits, and by a merge."""
    shape = dataclasses.replace(Shape(B=1, Hq=4, Hkv=2, D=64), **case)
    sinks = torch.tensor([torch.inf, -torch.inf, 0.5, torch.inf])
    options = {"sinks": sinks, "gate": gate}
    inputs, results = tensors(shape, torch.float16), {}
    dout = torch.randn(shape.B, 4, shape.S, 64, generator=torch.Generator().manual_seed(0))
    for backend, kernel_inputs in (("cuda", inputs), ("reference", {n: x.double() for n, x in inputs.items()})):

        def attention(backend=backend, **given):
            return peftkern.prefix_attention(**given, backend=backend, return_lse=True)

        got = bounds.run(attention, kernel_inputs, options, dout, torch.ones(dout.shape[:3]))
        results[backend] = {"out": got.out, "lse": got.lse, **got.gradients}
    for name, want in results["reference"].items():
        got = results["cuda"][name].double()
        torch.testing.assert_close(got, want.double(), rtol=2e-2, atol=2e-2, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["sinks", "prefix_bias", "gate", "q", "prefix_v"])
def test_one_gradient_alone_is_the_one_among_all(shim, name):
    shape, options = sizes_of("plain", P=70)
    given = {**tensors(shape, torch.bfloat16), **options, "sinks": torch.randn(4), "prefix_bias": torch.randn(4, 70)}
    if name == "gate":
        given["gate"] = torch.randn(4)

    def gradient(*names: str):
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in given.items()}
        peftkern.prefix_attention(**leaves, backend="cuda").square().sum().backward()
        return leaves[name].grad

    torch.testing.assert_close(gradient(name), gradient(*given), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    _mark(
        ((shape, dtype) for shape in ODD if shape.D % 8 == 0 for dtype in HALVES),
        lambda s, d: s.S < 64 and (s.D < 100) == (d == HALVES[0]),
    ),
    ids=str,
)
def test_attention_of_odd_sizes(shim, shape, dtype):
    bounds.check_backend("cuda", tensors(shape, dtype), {})


def test_an_fp32_prefix_beside_half_precision(shim):
    given = tensors(Shape(S=19, P=7, D=64), torch.bfloat16, prefix_dtype=torch.float32)
    results = bounds.check_backend("cuda", given, {})
    assert results.gradients["prefix_k"].dtype == torch.float32


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_tensors(shim, shape):
    bounds.check_backend("cuda", tensors(shape, torch.float16), {"causal": shape.kv_len >= shape.S}, dlse=True)


def test_unneeded_gradients_are_not_computed(shim):
    given = {
        n: x.requires_grad_(n.startswith("prefix")) for n, x in tensors(Shape(S=19, P=7, D=64), HALVES[0]).items()
    }
    out = peftkern.prefix_attention(**given, backend="cuda")
    shim.reset()
    out.sum().backward()
    assert given["q"].grad is None
    assert len(shim.launches()) == 2, "the prefix's part, and the sum of its splits"


# -- the parts beside another library's kernel -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head_dim", "in_place"),
    _mark(
        itertools.product(OF_THE_PREFIX, (40, 64, 80, 96, 128, 256), (True, False)),
        lambda name, dim, in_place: in_place and (dim == 64 or name in ("plain", "ragged_bank")),
    ),
)
def test_merging_with_each_feature(shim, monkeypatch, name, head_dim, in_place):
    shape, options = sizes_of(name, D=head_dim)
    merging.install(monkeypatch, shim, in_place)
    sinks = options.pop("sinks", None)
    given = tensors(shape, torch.bfloat16 if head_dim in (64, 256) else torch.float16)
    if sinks is None:
        bounds.check_backend("merging", given, options)
    else:  # their gradient is not this kernel's
        bounds.check_backend("merging", given, {**options, "sinks": sinks}, backward=False)


@pytest.mark.parametrize(
    ("prefix_len", "head_dim"),
    _mark(
        itertools.product((1, 16, 63, 64, 65, 130, 300), (64, 128, 256)),
        lambda p, d: (p, d) in ((65, 64), (130, 128)),
    ),
)
def test_merging_prefixes_of_all_lengths(shim, monkeypatch, prefix_len, head_dim):
    merging.install(monkeypatch, shim)
    shape = Shape(B=2, Hq=6, Hkv=2, S=23, P=prefix_len, D=head_dim)
    bounds.check_backend("merging", tensors(shape, torch.bfloat16), {})


def test_merging_without_a_sequence(shim):
    shape = Shape(S=19, P=7, D=64)
    given = tensors(shape, torch.float16)
    args = args_of(given)
    out, lse = KERNELS.merge_prefix(args, None, None)
    given |= {n: given[n][:, :, :0] for n in ("k", "v")}
    true, true_lse = reference.prefix_attention(**{n: x.double() for n, x in given.items()}, causal=False)
    bounds.assert_bound("out", out, true, bounds.deviations(given, {"causal": False})["out"])
    torch.testing.assert_close(lse, true_lse.float())


def test_merging_ignores_what_concerns_the_sequence(shim):
    given = tensors(Shape(S=19, P=7, D=64), torch.float16)
    bias, mask = torch.zeros(1, 1, 19, 19), torch.zeros(2, 19, dtype=torch.bool)
    plain, other = (
        KERNELS.merge_prefix(args_of(given, **o), None, None) for o in ({}, {"bias": bias, "key_mask": mask})
    )
    assert torch.equal(plain[0], other[0])


def test_a_row_without_a_prefix_keeps_what_it_has(shim):
    shape, options = sizes_of("bank")
    args = args_of(tensors(shape, torch.float16), **options)
    part_out, part_lse = allocate_outputs(args)
    shim.writable(part_out, part_lse)
    part_out.normal_()
    part_lse.normal_()
    before = part_out.clone(), part_lse.clone()
    out, lse = KERNELS.merge_prefix(args, part_out, part_lse)
    without = options["prefix_ids"] == -1
    assert without.any()
    assert torch.equal(out[without], before[0][without])
    torch.testing.assert_close(lse[without], before[1][without])
    assert not torch.equal(out[~without], before[0][~without])


@pytest.mark.parametrize("name", ["plain", "bank"])
@pytest.mark.parametrize("prefix_dtype", [torch.float16, torch.float32], ids=str)
def test_concat(shim, name, prefix_dtype):
    shape, options = sizes_of(name, D=40)
    args = args_of(tensors(shape, torch.float16, prefix_dtype), **options)
    laid = KERNELS.concat_prefix(args)
    ids = options.get("prefix_ids", torch.zeros(shape.B, dtype=torch.int64))
    for joined, prefix, seq in zip(laid, args[3:5], args[1:3], strict=True):
        rows = (prefix if name == "bank" else prefix[None])[ids].half()
        rows[ids == -1] = 0
        assert torch.equal(joined, torch.cat([rows, seq], 2))
    total = torch.empty_like(args.prefix_k, dtype=torch.float32, memory_format=torch.contiguous_format)
    shim.writable(total)
    KERNELS.sum_prefix_gradient(args, laid[0], total)
    expected = torch.zeros_like(total if name == "bank" else total[None])
    for b, a in enumerate(ids.tolist()):
        if a >= 0:
            expected[a] += laid[0][b, :, : shape.P].float()
    torch.testing.assert_close(total, expected.view_as(total))


# -- decoding and embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "ragged_bank", "key_mask", "sinks", "prefix_bias", "gate"])
@pytest.mark.parametrize("rows", [1, 2])
def test_decoding(shim, name, rows):
    """Rows of many samples share the tiles that a shared prefix meets."""
    shape, options = sizes_of(name, B=5, Hq=8, S=rows, T=21, P=37)
    bounds.check_backend("cuda", tensors(shape, torch.bfloat16), options, backward=False)


LONG = [
    Shape(B=1, Hq=4, Hkv=2, S=1, T=700, P=400, D=64), Shape(B=3, Hq=8, Hkv=2, S=3, T=333, P=130, D=64),
    Shape(B=2, Hq=4, Hkv=1, S=2, T=5, P=301, D=64), Shape(B=2, Hq=4, Hkv=4, S=1, T=257, P=0, D=64),
    Shape(B=1, Hq=4, Hkv=2, S=1, T=0, P=300, D=64), Shape(B=1, Hq=2, Hkv=2, S=1, T=200, P=33, D=256),
    Shape(B=1, Hq=8, Hkv=2, S=2, T=130, P=190, D=80), Shape(B=1, Hq=1, Hkv=1, S=1, T=0, P=0, D=64),
]  # fmt: skip


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_decoding_over_splits_of_the_keys(shim, monkeypatch, shape):
    monkeypatch.setattr(cuda, "_SPLIT_KEYS", 0)
    options = {"causal": shape.kv_len >= shape.S}
    bounds.check_backend("cuda", tensors(shape, torch.bfloat16), options, backward=False)
    assert len(shim.launches()) == 1 + bool(shape.P) + bool(shape.kv_len)


@pytest.mark.parametrize("name", [n for n in SUPPORTED if not n.startswith("packed")])
def test_decoding_over_splits_with_each_feature(shim, monkeypatch, name):
    monkeypatch.setattr(cuda, "_SPLIT_KEYS", 0)
    shape, options = sizes_of(name, B=3, Hq=8, S=3)
    shape, options = feature(name, dataclasses.replace(shape, P=140, T=190))
    bounds.check_backend("cuda", tensors(shape, torch.float16), options, backward=False)


def test_splits_occupy_the_device(shim):
    """Of 1100 keys and one sample: as many blocks as two for each of the 4 multiprocessors, all of them in order."""
    given = tensors(Shape(B=1, Hq=4, Hkv=2, S=1, T=1000, P=100, D=64), torch.bfloat16)
    results = [peftkern.prefix_attention(**given, backend="cuda") for _ in range(2)]
    assert torch.equal(*results)
    assert len(shim.launches()) == 2 * 3


def test_decoding_reads_a_shared_prefix_once_per_block(shim):
    shape = Shape(B=8, Hq=8, Hkv=2, S=1, T=16, P=64, D=64)
    peftkern.prefix_attention(**tensors(shape, torch.bfloat16), backend="cuda")
    rows = {"q": 2 * 64, "part_out": 64, "k and v": 2 * 8 * 2 * 16, "prefix": 2 * 2 * 64}
    assert shim.counters()["loaded"] <= 1.1 * sum(rows.values()) * 64 * 2


@pytest.mark.parametrize("bank", [None, 3])
@pytest.mark.parametrize(("dtype", "prompt_dtype"), [(HALVES[0], HALVES[0]), (HALVES[1], torch.float32)], ids=str)
def test_embedding(shim, bank, dtype, prompt_dtype):
    weight = torch.randn(11, 24).to(dtype).requires_grad_()
    shape = (5, 24) if bank is None else (bank, 5, 24)
    prompt = torch.randn(shape).to(prompt_dtype).requires_grad_()
    ids = torch.randint(11, (4, 7))
    options = {} if bank is None else {"prompt_ids": torch.tensor([2, 0, 2, 0])}
    results = []
    for backend in ("cuda", "reference"):
        out = peftkern.soft_prompt_embedding(ids, weight, prompt, **options, backend=backend)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        results.append((out, *torch.autograd.grad(out, (weight, prompt), dout)))
    assert torch.equal(results[0][0], results[1][0])
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_token_out_of_range_is_seen(shim):
    weight, prompt = torch.zeros(5, 8, dtype=torch.float16), torch.zeros(2, 8, dtype=torch.float16)
    out = KERNELS.attention.soft_prompt_embedding(torch.tensor([[1, 5]]), weight, prompt, None)
    assert out[0, 3].isnan().all()
    assert out[0, :3].eq(0).all()


# -- order, traffic --------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_order_of_threads(monkeypatch):
    shape, options = sizes_of("ragged_bank", S=33, P=70)
    given = tensors(shape, torch.bfloat16)
    results = []
    for seed, preempt in ((0, False), (1, False), (2, True)):
        with monkeypatch.context() as patch:
            Shim(patch, seed, preempt)
            results.append(bounds.check_backend("cuda", given, options))
    for other in results[1:]:
        assert torch.equal(results[0].out, other.out)
        assert torch.equal(results[0].lse, other.lse)
        for name, value in results[0].gradients.items():
            assert torch.equal(value, other.gradients[name]), f"d{name} depends on the order"


@pytest.mark.parametrize(
    "head_dim", [64, pytest.param(80, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
def test_memory_traffic_is_the_least_possible(shim, head_dim):
    """Forward: q, out twice, lse twice; backward: q, dout, out, dq twice, lse; the prefix once per block."""
    shape = Shape(B=2, Hq=4, Hkv=2, S=301, P=16, D=head_dim)
    args = args_of(tensors(shape, torch.bfloat16))
    part_out, part_lse = allocate_outputs(args)
    part_out.normal_()
    part_lse.normal_()
    shim.writable(part_out, part_lse)
    shim.reset()
    out, lse = KERNELS.merge_prefix(args, part_out, part_lse)
    q_bytes, lse_bytes = args.q.numel() * 2, lse.numel() * 4
    prefix_bytes = 2 * args.prefix_k.numel() * 2
    blocks = 4  # per key head, on a device of 4 multiprocessors
    _assert_traffic(shim, 3 * q_bytes + 2 * lse_bytes + blocks * prefix_bytes)

    gradients = allocate_gradients(args, [True, False, False, True, True, *[False] * 4])
    gradients.dq.normal_()
    shim.writable(*gradients)
    dout = torch.randn_like(out)
    shim.reset()
    KERNELS.merge_prefix_backward(dout, out, lse, args, gradients.dq, gradients)
    splits = 2
    sums = (2 * splits + 1) * 2 * prefix_bytes  # in fp32: each split written and read, their sum written
    _assert_traffic(shim, 5 * q_bytes + lse_bytes + splits * prefix_bytes + sums)


def _assert_traffic(shim: Shim, least: int) -> None:
    counted = shim.counters()
    ratio = (counted["loaded"] + counted["stored"]) / least
    print(f"bytes moved over the least possible: {ratio:.3f}")
    assert ratio <= 1.05


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_has_not_is_refused_by_name(shim, name):
    shape, options = sizes_of(name)
    reasons = peftkern.explain(**tensors(shape, torch.float16), **options).reasons["cuda"]
    assert len(reasons) == 1
    assert reasons[0].endswith("use backend='triton'")
    assert name.removesuffix("_row").removeprefix("narrow_").removeprefix("wide_") in reasons[0]


def test_other_dtypes_and_head_dims_are_refused(shim):
    assert "float32" in peftkern.explain(**tensors(Shape(D=64), torch.float32)).reasons["cuda"][0]
    for head_dim in (20, 264):
        reasons = peftkern.explain(**tensors(Shape(D=head_dim), torch.float16)).reasons["cuda"]
        assert reasons == [f"head dim {head_dim} is not a multiple of 8 up to 256: use backend='triton'"]
    reasons = peftkern.explain(**tensors(Shape(D=192, Dv=128), torch.float16)).reasons["cuda"]
    assert reasons == ["values of head dim 128 beside keys of another: use backend='triton'"]


def test_a_status_becomes_an_exception(shim):
    args = args_of(tensors(Shape(D=64), torch.float16))
    shifted = args._make([*(x[..., 1:] for x in args[:5]), *args[5:]])
    with pytest.raises(native.cuda.NativeError, match="not a multiple of 16 bytes"):
        native.cuda.prefix_attention(shifted, *allocate_outputs(args))
    with pytest.raises(native.cuda.NativeError, match="out of range"):
        native.cuda.prefix_attention(args._replace(dropout_p=0.5), *allocate_outputs(args))
    args = args_of(tensors(Shape(D=64, Dv=56), torch.float16))
    with pytest.raises(native.cuda.NativeError, match="out of range"):
        native.cuda.prefix_attention(args, *allocate_outputs(args))


def _library(architectures: str) -> SimpleNamespace:
    return SimpleNamespace(peftkern_cuda_architectures=lambda: architectures.replace(";", ",").encode())


@pytest.mark.parametrize(
    ("architectures", "device", "reason"),
    [
        ("8.0;9.0", (8, 6), ""),
        ("8.6", (8, 0), "this wheel has sm_86; this GPU is sm_80: rebuild with TORCH_CUDA_ARCH_LIST=8.0"),
        ("8.0;9.0", (12, 0), "this wheel has sm_80, sm_90; this GPU is sm_120: rebuild with "
                             "TORCH_CUDA_ARCH_LIST=12.0 or use backend='triton'"),
        ("8.0;9.0+PTX", (12, 0), ""),
        ("9.0a", (9, 0), ""),
        ("10.0a+PTX", (10, 3), "this wheel has sm_100a+PTX; this GPU is sm_103"),
        ("8.0", (7, 5), "sm_75 has no asynchronous copies: the kernels need compute capability 8.0"),
    ],
)  # fmt: skip
def test_a_gpu_that_the_wheel_does_not_serve_is_told(monkeypatch, architectures, device, reason):
    monkeypatch.setattr(native.cuda, "_library", _library(architectures))
    message = native.cuda.unsupported(*device)
    assert message.startswith(reason) if reason else message == ""


def test_a_missing_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native.cuda, "_PATH", tmp_path / "libpeftkern_cuda.so")
    library, reason = native.cuda._load()
    assert library is None
    assert "is not built. If nvcc is installed, run" in reason
    (tmp_path / "libpeftkern_cuda.so").write_bytes(b"not a library")
    assert "does not load" in native.cuda._load()[1]
