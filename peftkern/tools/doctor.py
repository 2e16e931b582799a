# SPDX-License-Identifier: Apache-2.0
"""What this machine has, what each backend lacks, and a two-second self-test.

Paste the output into a bug report. Only the standard library is imported at the start, and each probe is guarded: a
failure becomes a line of the report. The exit status is 1 if the self-test fails.
"""

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

#: Versions that the test suite has run with; others are reported, not refused.
TESTED = {"torch": ("2.13", "2.15"), "transformers": ("5.20", "5.23", "5.24"), "peft": ("0.21",)}
_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "cmake", "ninja")
_VARIABLES = (
    "PEFTKERN_BACKEND", "PEFTKERN_BUILD", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CXX", "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
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
    """The report: sections of names and values. A probe that fails gives ``{"failed": reason}``; nothing raises."""
    probes: dict[str, Callable[[], dict[str, Any]]] = {
        "system": _system,
        "packages": _packages,
        "build": _build,
        "gpu": _gpu,
        "backends": _backends,
        "variables": lambda: {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "self-test": _self_test,
    }
    return {section: _guarded(probe) for section, probe in probes.items()}


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:  # whatever is broken on this machine is what the report is for
        return {"failed": f"{type(error).__name__}: {error}"}


def _version_line(command: str) -> str:
    """The first line of ``command --version`` with a version in it."""
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=True)
    return next(line for line in result.stdout.splitlines() if re.search(r"\d\.\d", line))


def _system() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "peftkern": f"{__version__} ({os.path.dirname(os.path.abspath(__file__))})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }
    with open("/proc/cpuinfo") as lines:
        facts["cpu"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    for name in ("c++", "nvcc"):
        facts[name] = _version_line(name) if shutil.which(name) else "not found"
    return facts


def _packages() -> dict[str, Any]:
    facts = {}
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
            continue
        tested = TESTED.get(name)
        known = tested is None or any(version.startswith(f"{v}.") for v in tested)
        facts[name] = version if known else f"{version} (untested; tested with {', '.join(tested or ())})"
    return facts


def _build() -> dict[str, Any]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_build_info.json")
    if not os.path.exists(path):
        return {
            "native libraries": "none built: `pip install .` in a checkout with a C++ compiler builds the CPU one"
        }
    with open(path) as file:
        facts = dict(json.load(file))
    cuda = facts.pop("cuda", None)
    if cuda is not None:
        facts["cuda"] = (
            f"{cuda['version']} for compute capability {', '.join(cuda['architectures'])}; {cuda['flags']}"
        )
    return facts


def _gpu() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"devices": "none that torch can use"}
    facts: dict[str, Any] = {
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB"
    return facts


def _backends() -> dict[str, Any]:
    torch, backends = importlib.import_module("torch"), importlib.import_module("peftkern.backends")
    facts = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        shape = (1, 2, 16, 64)
        for dtype in (torch.float32, torch.bfloat16):
            call = backends.Call(
                "prefix_attention", torch.device(device), dtype, torch.float32, shape, shape, (2, 8, 64), (), True
            )
            explanation = backends.explain(call)
            for name, reasons in explanation.reasons.items():
                chosen = " (taken by 'auto')" if name == explanation.chosen else ""
                facts[f"{name} {device} {str(dtype).removeprefix('torch.')}"] = "; ".join(reasons) or f"ok{chosen}"
    return facts


def _self_test() -> dict[str, Any]:
    """One small attention, forward and backward, on every backend that can, against the fp64 reference."""
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
            got = gradients(torch.float32 if name in fp32 else torch.float16, device, name)
            error = max(((g.cpu() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True))
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
