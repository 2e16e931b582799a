# SPDX-License-Identifier: Apache-2.0
"""``merge`` and ``concat`` beside kernels of packages, and beside those that torch registers, on CPU stand-ins."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys

import pytest
import torch

import peftkern
from peftkern.arguments import Call
from peftkern.backends import (
    Refusal,
    flash_packages,
    flash_registration,
    kernel_table,
    packages,
    registry,
    torch_attention,
)
from peftkern.backends.cost.model import RATES, Machine
from peftkern.backends.long_prefix import with_long_prefixes
from peftkern.backends.triton import TritonPrefixKernels
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import FEATURES, Shape, feature, tensors
from peftkern.tools import doctor

from ..cover import product
from ..skips import needs_source, source
from . import flash_stand_ins, stand_ins
from .guard import guard
from .test_merge import BOTH, PACKED, REFUSED, UNMASKED

interpreter = pytest.mark.interpreter
ROWS = ["FA2", "FA3", "FA4"]
SHAPE = Shape(B=2, Hq=2, Hkv=1, S=19, P=5, D=20)
#: Features in which the rows' own code differs.
OF_A_ROW = {"plain", "narrow_values", "non_causal", "kv_cache", "window", "packed", "softcap"}
#: What no row has, as none takes a mask.
LACKS = {backend: REFUSED[backend] - PACKED - {"softcap"} | UNMASKED[backend] for backend in BOTH}


def _feature(name: str, shape: Shape = SHAPE):
    return feature(name, shape) if name != "kv_cache" else (dataclasses.replace(shape, T=shape.S + 15), {})


def _check(backend: str, shape: Shape, options: dict, **kwargs):
    with guard():
        return check_backend(backend, tensors(shape, torch.bfloat16, torch.float32), options, **kwargs)


def _call(device="cuda", shape=(2, 4, 64, 64), features=(), needs_grad=True, dtype=torch.bfloat16) -> Call:
    return Call("prefix_attention", torch.device(device), dtype, dtype, shape, shape, (4, 8, shape[3]), features,
                needs_grad)  # fmt: skip


def _why_not(call: Call) -> dict[str, str]:
    """For each kernel of this machine the reason against it, or an empty text."""
    found = torch_attention.candidates(call, call.features, 64, kernel_table.attention_kernels())
    return {name: kernel.reasons[0] if isinstance(kernel, Refusal) else "" for name, kernel in found.items()}


@interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "row", "name"), product(BOTH, ROWS, FEATURES, among=lambda backend, row, name: name in OF_A_ROW)
)
def test_every_feature_on_every_package(backend, row, name, monkeypatch):
    flash_stand_ins.install(monkeypatch, row)
    shape, options = _feature(name)
    if name in LACKS[backend]:
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*: use backend='"):
            _check(backend, shape, options)
    else:
        _check(backend, shape, options)


@interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", sorted(OF_A_ROW))
@pytest.mark.parametrize("backend", BOTH)
def test_a_kernel_without_a_backward_runs_inference(backend, name, monkeypatch):
    """FlashInfer's, on one sequence; its lse is a base-2 logarithm."""
    flash_stand_ins.install(monkeypatch, "flashinfer")
    shape, options = _feature(name, dataclasses.replace(SHAPE, B=1))
    if name == "packed":
        with pytest.raises(peftkern.BackendUnavailable, match=f"{backend}: .*flashinfer: no "):
            _check(backend, shape, options, backward=False)
        return
    _check(backend, shape, options, backward=False)
    with pytest.raises(peftkern.BackendUnavailable, match="flashinfer: has no backward that takes the lse"):
        _check(backend, shape, options)


@interpreter
@pytest.mark.parametrize("row", ROWS)
def test_deterministic_algorithms(row, monkeypatch):
    flash_stand_ins.install(monkeypatch, row)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    _check("merge", SHAPE, {})


def _inputs(**options) -> torch_attention.KernelInputs:
    """Of one sequence of 9 queries and 9 or ``keys`` keys, head dim 20, two heads on one."""
    keys = options.pop("keys", 9)
    q, k, v = (torch.randn(1, heads, n, 20, dtype=torch.bfloat16) for heads, n in ((2, 9), (1, keys), (1, keys)))
    inputs = torch_attention.KernelInputs(q, k, v, 0.3, True, None, None, None, None)
    return inputs._replace(**options)


KINDS = {
    "causal": {}, "non-causal": {"causal": False}, "more keys": {"keys": 15}, "window": {"window": 4},
    "packed": {"cu_seqlens": torch.tensor([0, 3, 9])},
}  # fmt: skip


def _registered_flash(monkeypatch, version: str) -> torch_attention.AttentionKernel:
    flash_stand_ins.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", flash_stand_ins.FlashAttention4Of2Results)
    flash_stand_ins.register(monkeypatch, version)
    return flash_registration.as_registered(torch_attention.KERNELS)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["FA3", "FA4"])
def test_torchs_registration_takes_what_the_flash_row_passes(version, kind, monkeypatch):
    """The code of torch that stands between the op and the package, on the package's stand-in."""
    inputs = _inputs(**KINDS[kind])
    kernel = _registered_flash(monkeypatch, version)
    if kind == "window" and version == "FA4":
        assert kernel.why_not(_call("cpu"), ("window",), 64) == ["no window"]
        return
    got_out, got_lse = torch_attention.attention(kernel, inputs)
    stand_ins.install(monkeypatch, "flash")
    out, lse = torch_attention.attention(stand_ins.ROWS["flash"], inputs)
    expected = torch_attention.attention_backward(stand_ins.ROWS["flash"], out, out, lse + 1, inputs)
    kernel = _registered_flash(monkeypatch, version)
    got = torch_attention.attention_backward(kernel, out, out, lse + 1, inputs)
    for a, b in zip((got_out, got_lse, *got), (out, lse, *expected), strict=True):
        torch.testing.assert_close(a, b)


@interpreter
@pytest.mark.parametrize("version", ["FA3", "FA4"])
def test_a_registered_flash_attention_runs_a_call(version, monkeypatch):
    _registered_flash(monkeypatch, version)
    _check("merge", SHAPE, {})


def test_causality_alone_is_no_window():
    """Torch 2.11's registration of FA4 refuses a backward with a window."""
    q = torch.empty(1, 1, 4, 8)
    inputs = torch_attention.KernelInputs(q, q, q, 1.0, True, None, None, None, None)
    assert inputs.window_sizes == (None, None)
    assert inputs._replace(window=3).window_sizes == (2, 0)
    assert inputs._replace(window=3, causal=False).window_sizes == (2, None)


def test_a_registration_that_does_not_fit_its_package_is_a_reason(monkeypatch):
    """The registered FA4 of torch 2.13 cannot unpack what flash-attn-4 returns since 4.0.0b20."""
    flash_stand_ins.install(monkeypatch)
    flash_stand_ins.register(monkeypatch, "FA4")
    assert _why_not(_call("cpu"))["flash"] == "flash: torch expects 2 results of flash-attn-4, which returns 5"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    assert _why_not(_call("cpu")) == {"flash": ""}


@pytest.mark.parametrize(("version", "capability", "runs"), [
    ("FA3", (9, 0), True), ("FA3", (8, 0), False), ("FA3", (10, 0), False), ("FA4", (9, 0), True),
    ("FA4", (10, 0), True), ("FA4", (12, 0), False), (None, (8, 0), True),
])  # fmt: skip
def test_a_registered_flash_attention_brings_its_compute_capabilities(version, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    flash = dataclasses.replace(flash_registration.as_registered(torch_attention.KERNELS)[0], missing=lambda: None)
    reasons = flash.why_not(_call(), (), 64)
    assert reasons == ([] if runs else ["not for compute capability {}.{}".format(*capability)])


@pytest.mark.parametrize(("capability", "first"), [
    ((8, 6), "flash"), ((9, 0), "FA3"), ((10, 0), "FA4"), ((12, 0), "flash"),
])  # fmt: skip
def test_the_preferred_kernel_of_each_gpu(capability, first, monkeypatch):
    flash_stand_ins.install(monkeypatch, *flash_stand_ins.ROWS)
    rows = [dataclasses.replace(row, device="cuda") for row in flash_packages.KERNELS]
    monkeypatch.setattr(flash_packages, "KERNELS", rows)
    flash = dataclasses.replace(stand_ins.ROWS["flash"], device="cuda")
    monkeypatch.setattr(torch_attention, "KERNELS", [flash])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def chosen(call: Call) -> str:
        return next(name for name, reason in _why_not(call).items() if not reason)

    assert chosen(_call()) == first
    assert chosen(_call(features=("softcap",))) == first.replace("flash", "FA2")
    assert chosen(_call(shape=(2, 4, 64, 256))) == first.replace("FA4", "flash")


@interpreter
def test_a_package_that_does_not_import_is_a_reason(monkeypatch):
    """And the next kernel is taken."""
    monkeypatch.setitem(flash_stand_ins.MODULES, "flash_attn.flash_attn_interface", None)  # importing it raises
    flash_stand_ins.install(monkeypatch, "FA2")
    inputs = tensors(SHAPE, torch.float16)
    text = str(peftkern.explain(**inputs, backend="merge"))
    assert "FA2: cannot import flash_attn.flash_attn_interface (ModuleNotFoundError: " in text
    flash_stand_ins.install(monkeypatch, "FA2", "FA4")
    registry.forget()
    text = str(peftkern.explain(**inputs, backend="merge"))
    assert "merge: ok (Triton beside FA4 (flash-attn-4 4.0.0b36)), requested by backend" in text


def test_a_package_of_unknown_conventions_is_a_reason(monkeypatch):
    flash_stand_ins.install(monkeypatch, "FA2")
    monkeypatch.setattr(packages, "_version", {"flash-attn": "2.6.3", "flash-attn-4": "4.0.0b9"}.get)
    assert _why_not(_call("cpu")) == {
        "FA4": "FA4: flash-attn-4 4.0.0b9 is older than 4.0.0b10", "FA2": "FA2: flash-attn 2.6.3 is older than 2.8",
    }, "the others are not installed"  # fmt: skip


def _parameters(function: ast.FunctionDef | object) -> tuple[list[str], set[str]]:
    """Names of the positional parameters and of all, of a function or of its syntax tree."""
    if isinstance(function, ast.FunctionDef):
        positional = [x.arg for x in (*function.args.posonlyargs, *function.args.args)]
        return positional, {*positional, *(x.arg for x in function.args.kwonlyargs)}
    parameters = inspect.signature(function).parameters
    return [n for n, x in parameters.items() if x.kind != x.KEYWORD_ONLY], set(parameters)


SOURCES = [
    ("flash-attn", "flash_attn/flash_attn_interface.py", flash_stand_ins.FlashAttention2),
    ("flash-attn-4", "flash_attn/cute/interface.py", flash_stand_ins.FlashAttention4),
    ("flashinfer-python", "flashinfer/prefill.py", flash_stand_ins.FlashInfer),
]


@pytest.mark.parametrize(("file", "stand_in"), [
    pytest.param(file, stand_in, id=name, marks=needs_source(name, file)) for name, file, stand_in in SOURCES
])  # fmt: skip
def test_the_stand_ins_have_the_signatures_of_the_packages(file, stand_in):
    real = {x.name: x for x in ast.parse(source(file).read_text()).body if isinstance(x, ast.FunctionDef)}
    for name, function in vars(stand_in).items():
        if isinstance(function, staticmethod) and name not in ("_forward", "_backward"):
            positional, every = _parameters(function.__func__)
            of_package, every_of_package = _parameters(real[name])
            assert positional == of_package[: len(positional)], name
            assert every <= every_of_package, name


def test_doctor_lists_every_package():
    assert {row.package.distribution for row in flash_packages.KERNELS} <= set(doctor._PACKAGES)


def test_a_plan_names_the_package(monkeypatch):
    flash_stand_ins.install(monkeypatch, "FA2")
    plan = registry.plan_named("merge/FA2/triton")
    assert "beside FA2 (flash-attn 2.8.3.post2)" in plan.kernels
    with pytest.raises(ValueError, match="expected one of the attention kernels"):
        kernel_table.kernel_named("FA3")


def test_rates_of_packages():
    """FA2's kernels are torch's, and the model prices a softcap only where a kernel has it."""
    call = _call(shape=(4, 32, 2048, 128))
    capped = dataclasses.replace(call, features=("softcap",))

    def seconds(kernel: str, call: Call = call) -> float | None:
        times = registry.rank(call, Machine("sm_90", tuple(row.name for row in kernel_table.known_kernels())))
        return times[f"merge/{kernel}/triton"].seconds if f"merge/{kernel}/triton" in times else None

    assert seconds("FA2") == seconds("flash")
    assert seconds("FA3") < seconds("flash")
    assert seconds("FA2", capped) is not None
    assert [seconds(kernel, capped) for kernel in ("flash", "cudnn", "efficient")] == [None] * 3
    assert seconds("flashinfer") is None
    assert registry.BACKENDS["merge"].limits(capped), "torch alone has none"
    names = {row.name for row in kernel_table.known_kernels()} - {"cpu flash"}
    rates = RATES["gpu"]["sm_90"]["flops"]
    assert {RATES["engines"].get(name, {}).get("rates", name) for name in names} <= rates.keys()


@pytest.mark.parametrize(
    ("deterministic", "head_dim", "runs"), [(True, 192, True), (True, 200, False), (False, 256, True)]
)
def test_fa3_has_no_deterministic_backward_of_large_heads(deterministic, head_dim, runs, monkeypatch):
    flash_stand_ins.install(monkeypatch, "FA3")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    reason = _why_not(_call("cpu", shape=(2, 4, 64, head_dim)))["FA3"]
    assert reason == ("" if runs else "FA3: no deterministic gradients for head dims above 192")
    assert not _why_not(_call("cpu", shape=(2, 4, 64, head_dim), needs_grad=False))["FA3"]


@pytest.mark.parametrize(("features", "runs"), [((), True), (("softcap",), False)])
def test_a_softcap_is_not_lost_on_a_long_prefix(features, runs, monkeypatch):
    """Torch's kernels, which attend to a long prefix, have none."""
    monkeypatch.setattr(torch_attention, "KERNELS", [stand_ins.ROWS["flash"]])
    found = with_long_prefixes(_call("cpu", features=features), {"triton": TritonPrefixKernels()})
    assert ("flash+triton" in found) == runs


@pytest.mark.parametrize("kernel", flash_packages.KERNELS, ids=lambda kernel: kernel.name)
def test_head_dims_are_padded_to_what_a_package_takes(kernel):
    step = 64 if kernel.name == "flashinfer" else 8
    for dim in (1, 20, 64, 65, 128):
        assert kernel.head_dims(dim, dim) == (-(-dim // step) * step,) * 2
