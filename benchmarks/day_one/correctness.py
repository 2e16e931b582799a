# SPDX-License-Identifier: Apache-2.0
"""Every feature and odd sizes, forward and backward, by every plan: against fp64, and bitwise over three runs."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import testing
from peftkern.testing import bounds

from . import plans
from .context import Context, Finding, Items, LeftOut
from .vendor_alone import vendor_alone

#: Odd sizes (S, P, D) that every dtype is checked with, and more for bf16.
SIZES = ((63, 17, 64), (1, 1, 64), (17, 0, 64), (333, 130, 128), (64, 7, 40), (96, 32, 80), (5, 3, 128))
#: A result may err this many times as much as torch's kernel alone where that one is less exact than the bound.
VENDOR_FACTOR = 1.5
#: Results of torch's kernels, which may add them up in any order.
UNORDERED = frozenset({"q", "k", "v"})

Case = tuple[str, testing.Shape, dict[str, Any]]


def cases(dtype: str, dry_run: bool = False) -> list[Case]:
    """(name, shape, options) of the calls to check: all features in bf16, some in the other dtypes."""
    plain = [testing.Shape(B=2, Hq=4, Hkv=2, S=S, P=P, D=D) for S, P, D in SIZES]
    small = testing.Shape(S=9, P=7, D=40)
    if dry_run:
        return [("key_mask", *testing.feature("key_mask", small))]
    names = [name for name in testing.FEATURES if name != "plain"]
    if dtype != "bf16":
        plain, names = plain[:4], ["key_mask", "window", "ragged_bank", "packed", "kv_cache"]
    found: list[Case] = [(name, *testing.feature(name, small)) for name in names]
    found[2:2] = [(str(shape), shape, {}) for shape in plain]
    return [*found, ("KV cache, decoding", testing.Shape(S=1, P=1100, D=64, T=300), {})]


def correct(
    context: Context, dtypes: str, backend: str, prefix_kernels: str, part: str = "1", parts: str = "1"
) -> Items:
    """An item per case, dtype and plan; the plans of a case follow each other. Several processes share the cases."""
    items: Items = {}
    for dtype in dtypes.split():
        for case in cases(dtype, context.dry_run)[int(part) - 1 :: int(parts)]:
            tensors = testing.tensors(case[1], plans.DTYPES[dtype])
            call = plans.call_of(context.device, tensors, case[2])
            found = plans.matching(plans.names(call), backend, prefix_kernels)
            if context.dry_run:
                found = [name for name in found if name != "cpu"][:1] or ["cpu"]
            for name in found:
                items[f"{case[0]}, {dtype}, {name}"] = functools.partial(check, context.device, name, dtype, case)
    return items


def check(device: str, name: str, dtype: str, case: Case) -> Finding:
    """Compare a plan with fp64, and three runs of it with each other."""
    _, shape, options = case
    device = "cpu" if name == "cpu" else device
    tensors = testing.tensors(shape, plans.DTYPES[dtype], seed=1)
    kernel = functools.partial(run_on, device, name)
    try:
        with plans.on_its_own_kernel():
            got, ratios = testing.ratios(kernel, tensors, options, roundings=bounds.roundings_of(name))
    except Exception as error:
        if device == "cpu" and "only 0-dimensional arrays can be converted" in str(error):
            raise LeftOut(f"the interpreter of Triton {version('triton')} needs numpy < 2.4") from error
        raise
    worst = max(ratios, key=lambda result: -1.0 if ratios[result].worst == 0 else ratios[result].worst)
    line = f"{ratios[worst].worst:.2f} of the bound ({worst})"
    failed = {result: ratio for result, ratio in ratios.items() if not ratio.worst <= 1}
    if failed:
        line = _as_exact_as_torch(device, name, tensors, options, failed)
    unequal = repeats(kernel, tensors, options, got)
    promised = [result for result in unequal if result not in UNORDERED and not name.startswith("concat")]
    if promised:
        raise AssertionError(f"three runs differ in {', '.join(promised)}")
    row = {"plan": name, "dtype": dtype, "case": case[0], "ratio": ratios[worst].worst, "of": worst}
    return Finding(line, [{**row, "differs_between_runs": " ".join(unequal)}])


def run_on(device: str, name: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """out and lse on the CPU, of a call that runs on ``device`` with the same strides."""
    if device != "cpu":
        inputs = {n: bounds.moved(x, device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    out, lse = peftkern.prefix_attention(**inputs, return_lse=True, backend=name)
    return out.cpu(), lse.cpu()


def _as_exact_as_torch(
    device: str, name: str, tensors: dict[str, Tensor], options: dict[str, Any], failed: dict[str, testing.Ratio]
) -> str:
    """Say that torch's kernel alone errs as much. Raises AssertionError if it does not, or cannot be compared."""
    first = next(iter(failed.values())).message
    kernel = plans.torch_kernel(name, plans.call_of(device, tensors, options))
    alone = kernel and tensors["q"].dtype == torch.float32 and vendor_alone(kernel, device, options)
    if not alone:
        raise AssertionError(first)
    _, theirs = testing.ratios(alone, tensors, options)
    for result, ratio in failed.items():
        if not ratio.worst <= VENDOR_FACTOR * theirs[result].worst:
            raise AssertionError(f"{ratio.message}; torch's kernel alone {theirs[result].worst:.2f} times the bound")
    worst = max(failed, key=lambda result: failed[result].worst)
    return (
        f"{worst} errs {failed[worst].worst:.2f} times the bound, torch's kernel alone on concatenated keys "
        f"{theirs[worst].worst:.2f} times"
    )


def repeats(
    kernel: testing.bounds.Attention, tensors: dict[str, Tensor], options: dict[str, Any], got: testing.bounds.Results
) -> list[str]:
    """Names of the results that differ bitwise between ``got`` and two more runs."""
    dout = torch.randn(got.out.shape, generator=torch.Generator().manual_seed(1)).to(tensors["q"].dtype)
    unequal: dict[str, None] = {}
    for _ in range(2):
        again = bounds.run(kernel, tensors, options, dout, None)
        pairs = {"out": (got.out, again.out), "lse": (got.lse, again.lse)}
        pairs |= {result: (x, again.gradients[result]) for result, x in got.gradients.items()}
        unequal |= {result: None for result, (x, y) in pairs.items() if not torch.equal(x, y)}
    return list(unequal)
