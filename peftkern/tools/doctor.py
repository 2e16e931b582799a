# SPDX-License-Identifier: Apache-2.0
"""Report versions, the build, the backends that run on this machine, and the result of a two-second self-test.

Paste the output into a bug report. The exit status is 1 if the self-test fails.
"""

# This module imports only the standard library at the start, and guards each probe: the report must come out where
# torch is broken.

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..processor import processor_name
from . import versions

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "cmake", "ninja", "flash-attn",
    "flash-attn-3", "flash-attn-4", "flashinfer-python",
)  # fmt: skip
_VARIABLES = (
    "PEFTKERN_BACKEND", "PEFTKERN_AUTOTUNE", "PEFTKERN_BUILD", "TRITON_INTERPRET", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``peftkern doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if the self-test failed."""
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["self-test"].get("passed") else 1


def collect() -> dict[str, dict[str, Any]]:
    """The report: sections of names and values. A probe that fails gives ``{"failed": reason}``."""
    probes: dict[str, Callable[[], dict[str, Any]]] = {
        "system": _system,
        "packages": _packages,
        "build": _build,
        "gpu": _gpu,
        "backends that run here": lambda: _backends()["here"],
        "backends for other devices": lambda: _backends()["elsewhere"],
        "variables": lambda: {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "self-test": _self_test,
    }
    return {section: _guarded(probe) for section, probe in probes.items()}


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:  # the report exists to show failures of any kind
        return {"failed": f"{type(error).__name__}: {error}"}


def _version_line(command: str) -> str:
    """The first line of ``command --version`` that contains a version."""
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=True)
    return next(line for line in result.stdout.splitlines() if re.search(r"\d\.\d", line))


def _system() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "peftkern": f"{__version__} ({_PACKAGE})",
        "python": f"{_judged('Python', platform.python_version())} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": processor_name(),
    }
    for name in ("c++", "nvcc"):
        facts[name] = _version_line(name) if shutil.which(name) else "not found"
    return facts


def _packages() -> dict[str, Any]:
    facts = {}
    for name in _PACKAGES:
        try:
            facts[name] = _judged(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def _judged(name: str, version: str) -> str:
    """The version, with a remark if it lies outside the tested range."""
    if name not in versions.TESTED or versions.is_tested(name, version):
        return version
    return f"{version} (untested; tested with {versions.tested_range(name)})"


def _build() -> dict[str, Any]:
    path = os.path.join(_PACKAGE, "_build_info.json")
    if not os.path.exists(path):
        return {"native libraries": "none; `pip install .` in a checkout with a C++ compiler builds the CPU library"}
    with open(path) as file:
        facts = dict(json.load(file))
    # CMake reads it when it configures; the Python files of an editable checkout may be newer.
    if "git_sha" in facts:
        facts = {"configured at commit": facts.pop("git_sha"), **facts}
    cuda = facts.pop("cuda", None)
    if cuda is not None:
        facts["cuda"] = (
            f"{cuda['version']} for compute capability {', '.join(cuda['architectures'])}; {cuda['flags']}"
        )
    return facts


def _gpu() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"devices": "torch finds no GPU"}
    facts: dict[str, Any] = {
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        "torch's flash": torch.nn.attention.current_flash_attention_impl() or "FlashAttention 2",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        architecture = device.gcnArchName if torch.version.hip else f"sm_{device.major}{device.minor}"
        facts[f"cuda:{index}"] = f"{device.name}, {architecture}, {device.total_memory >> 20} MiB"
    return facts


def _backends() -> dict[str, dict[str, Any]]:
    """Backends for this machine's devices (``here``), with dtypes and refusals, and the others (``elsewhere``)."""
    torch = importlib.import_module("torch")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    here: dict[str, Any] = {}
    elsewhere: dict[str, Any] = {}
    for device in devices:
        explanations = {dtype: _explain(device, dtype) for dtype in ("float32", "bfloat16")}
        for name in next(iter(explanations.values())).reasons:
            if _serves(name, device):
                here[f"{name} on {device}"] = _standing(name, explanations)
            elif not any(_serves(name, other) for other in devices):
                elsewhere[name] = "needs a GPU that torch can use"
    return {"here": here, "elsewhere": elsewhere or {"none": "every backend serves a device of this machine"}}


def _serves(name: str, device: str) -> bool:
    """Whether the backend is meant for a kind of device. Triton's interpreter, which runs on CPUs, is for tests."""
    return name == "reference" or (name == "cpu") == (device == "cpu")


def _explain(device: str, dtype: str) -> Any:
    """The explanation of a small training call."""
    torch, backends = importlib.import_module("torch"), importlib.import_module("peftkern.backends")
    shape, prefix = (1, 2, 16, 64), (2, 8, 64)
    dtypes = (getattr(torch, dtype), torch.float32)
    return backends.explain(
        backends.Call("prefix_attention", torch.device(device), *dtypes, shape, shape, prefix, (), needs_grad=True)
    )


def _standing(name: str, explanations: dict[str, Any]) -> str:
    """``float32, bfloat16 (chosen by 'auto')``, or what is missing."""
    runs = [dtype for dtype, found in explanations.items() if not found.reasons[name]]
    auto = [dtype for dtype, found in explanations.items() if found.chosen == name]
    taken = " (chosen by 'auto')" if auto == runs else f" ('auto' chooses it for {', '.join(auto)})"
    lacks: dict[str, list[str]] = {}
    for dtype, found in explanations.items():
        if found.reasons[name]:
            lacks.setdefault("; ".join(found.reasons[name]), []).append(dtype)
    words = [", ".join(runs) + (taken if auto else "")] if runs else []
    return "; ".join([*words, *(f"not {', '.join(dtypes)}: {reason}" for reason, dtypes in lacks.items())])


def _self_test() -> dict[str, Any]:
    """Compare a small attention, forward and backward, on every backend that can run it with the fp64 reference."""
    torch = importlib.import_module("torch")
    functional, backends = (importlib.import_module(f"peftkern.{name}") for name in ("functional", "backends"))
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), (2, 7, 64), (2, 7, 64))
    values = [torch.randn(shape, generator=generator) for shape in shapes]

    def gradients(dtype: Any, device: str, backend: str) -> Any:
        leaves = [x.to(device, dtype).requires_grad_() for x in values]
        out = functional.prefix_attention(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    facts: dict[str, Any] = {"passed": True}
    exact = gradients(torch.float64, "cpu", "reference")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        fp32 = backends.available_backends(device)
        for name in (*fp32, *(n for n in backends.available_backends(device, torch.float16) if n not in fp32)):
            try:
                got = gradients(torch.float32 if name in fp32 else torch.float16, device, name)
            except Exception as raised:  # the other backends are still tested
                facts[f"{name} on {device}"] = f"RAISED {type(raised).__name__}: {raised}"
                facts["passed"] = False
                continue
            errors = [(g.cpu() - e).abs().max() / e.abs().max() for g, e in zip(got, exact, strict=True)]
            error = torch.stack(errors).max().item()  # unlike Python's max, NaN if one of them is
            passed = error < (1e-5 if name in fp32 else 1e-2)
            facts[f"{name} on {device}"] = f"{'ok' if passed else 'WRONG'}, relative error {error:.1e}"
            facts["passed"] &= passed
    return facts


def render(report: dict[str, dict[str, Any]]) -> str:
    """The report as aligned text."""
    lines = []
    for section, facts in report.items():
        lines.append(section)
        width = max(map(len, facts), default=0)
        lines += [f"  {name:<{width}}  {_text(value)}" for name, value in facts.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
