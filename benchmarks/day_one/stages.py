# SPDX-License-Identifier: Apache-2.0
"""The stages of gpu_day_one.py: each a function of a :class:`Context` that says what it found, or raises."""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import backends, functional, ops
from peftkern.backends.cost import model as choose
from peftkern.tools import calibrate, doctor
from peftkern.tools.bench import shapes as bench_shapes

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LeftOut(Exception):
    """Why a stage cannot run here; no failure."""


@dataclass
class Context:
    """Where and how long a stage runs, and what it has to say; the first line is its headline."""

    folder: Path
    dry_run: bool
    end: float
    lines: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """That the stage is about."""
        return "cpu" if self.dry_run else "cuda"

    def in_time(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items that time is left for: a fifth of it is kept for the end."""
        items = list(items)
        for done, item in enumerate(items):
            if time.monotonic() > self.end:
                self.lines.append(f"out of time after {done} of {len(items)}")
                return
            yield item

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows as a CSV of the folder."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (self.folder / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)
        self.tables.append(f"{name}.csv")


def run(name: str, folder: Path, limit: float, dry_run: bool) -> dict[str, Any]:
    """Run the stage called ``name``; its result as it is written down."""
    context = Context(folder, dry_run, time.monotonic() + 0.8 * limit)
    torch.manual_seed(0)
    try:
        if not dry_run and name not in ("environment", "build") and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU: `--dry-run` is for machines without one")
        if match := re.fullmatch(r"correct_(\w+)_(bf16|fp16|fp32)(?:_(\d)of(\d))?", name):
            backend, dtype, part, parts = match.groups()
            correct(context, backend, dtype, int(part or 1), int(parts or 1))
        else:
            STAGES[name](context)
        status = "ok"
    except LeftOut as reason:
        status, context.lines = "left out", [str(reason), *context.lines]
    except Exception as error:
        status = "failed"
        context.lines = [
            f"{type(error).__name__}: {error}",
            *context.lines,
            *traceback.format_exc().splitlines()[-6:],
        ]
    return {"status": status, "lines": [line[:600] for line in context.lines], "tables": context.tables}


def environment(context: Context) -> None:
    report = doctor.collect()
    gpus = [text for name, text in report["gpu"].items() if name.startswith("cuda:")]
    packages = ", ".join(f"{name} {report['packages'].get(name)}" for name in ("torch", "triton", "transformers"))
    context.lines += ["; ".join(gpus) or "no GPU", packages, *doctor.render(report).splitlines()]
    for command in (["git", "-C", str(ROOT), "rev-parse", "HEAD"], ["nvidia-smi"], ["rocm-smi"]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            context.lines += ["", " ".join(command), *done.stdout.splitlines()]


def build(context: Context) -> None:
    """Native libraries that the checkout lacks, built aside and put in place as whole files."""
    package = ROOT / "peftkern"
    wanted = [name for name in ("cpu", "cuda") if not (package / f"libpeftkern_{name}.so").exists()]
    if "cuda" in wanted and (context.dry_run or shutil.which("nvcc") is None or torch.version.hip is not None):
        context.lines.append("no CUDA library: " + ("a dry run" if context.dry_run else "nvcc is not on PATH"))
        wanted.remove("cuda")
    if "cpu" in wanted and not (shutil.which("g++") or shutil.which("c++")):
        context.lines.append("no CPU library: no C++ compiler")
        wanted.remove("cpu")
    if not wanted:
        raise LeftOut("nothing to build")
    if shutil.which("cmake") is None:
        raise LeftOut(f"cmake is not on PATH (`pip install cmake ninja`), so no library is built for {wanted}")
    made, out = context.folder / "native", context.folder / "native" / "out"
    shutil.rmtree(made, ignore_errors=True)
    options = [f"-DPEFTKERN_OUTPUT_DIR={out}", f"-DPEFTKERN_CUDA={'ON' if 'cuda' in wanted else 'OFF'}"]
    environment = dict(os.environ)
    if "cuda" in wanted and "TORCH_CUDA_ARCH_LIST" not in environment:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(made), *generator, *options],
        ["cmake", "--build", str(made), "--parallel", str(os.cpu_count() or 2)],
    ):
        subprocess.run(command, check=True, env=environment)
    for file in [*out.glob("*.so"), *out.glob("_build_info.json")]:
        shutil.copy(file, package / f".{file.name}")
        (package / f".{file.name}").replace(package / file.name)
    context.lines.insert(0, f"built for {' and '.join(wanted)}")


def correct(context: Context, backend: str, name_of_dtype: str, part: int, parts: int) -> None:
    """Forward and every gradient over features and odd shapes, within the tests' bound of the fp64 reference.

    All features in bf16, some in the other dtypes: each is a set of kernels to compile. ``parts`` share them out.
    """
    from tests import bounds, cases

    plain = [
        cases.Shape(B=2, Hq=4, Hkv=2, S=S, P=P, D=D)
        for S, P, D in (
            (63, 17, 64),
            (1, 1, 64),
            (17, 0, 64),
            (333, 130, 128),
            (64, 7, 40),
            (96, 32, 80),
            (5, 3, 128),
        )
    ]
    small = cases.Shape(S=9, P=7, D=40)
    dtype = DTYPES[name_of_dtype]
    if context.dry_run:
        plain, names, parts = plain[1:2], ["ragged_bank"], 1
    elif name_of_dtype != "bf16":
        plain, names = plain[:5], ["key_mask", "window", "ragged_bank", "packed", "kv_cache"]
    else:
        names = [name for name in cases.FEATURES if name != "plain"]
    todo: list[tuple[str, cases.Shape, dict]] = [(str(shape), shape, {}) for shape in plain]
    todo += [(name, *cases.feature(name, small)) for name in names]
    if not context.dry_run:
        todo.append(("KV cache, decoding", cases.Shape(S=1, P=1100, D=64, T=300), {}))
    todo = todo[part - 1 :: parts]
    passed, refused, wrong = 0, [], []
    device = "cpu" if backend == "cpu" else context.device
    for name, shape, options in context.in_time(todo):
        tensors = cases.tensors(shape, dtype, seed=1)
        features = {
            key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()
        }  # fmt: skip
        call = peftkern.explain(*(x.to(device).requires_grad_() for x in tensors.values()), **features).call
        reasons = backends.get_backend(backend).why_not(call)
        if reasons:
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        try:
            bounds.check_backend(backend, tensors, options, device=device)
            passed += 1
        except Exception as error:
            if context.dry_run and "only 0-dimensional arrays can be converted" in str(error):
                raise LeftOut(f"the interpreter of Triton {version('triton')} needs numpy < 2.4") from error
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            if "CUDA error" in str(error):
                break  # this process can do no more
    context.lines += wrong + [f"refused: {line}" for line in refused]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {passed + len(wrong)} calls are wrong, the first: {wrong[0]}")
    if not passed:
        raise LeftOut(refused[0] if refused else "no time")
    context.lines.insert(0, f"{passed} calls right, {len(refused)} refused")


def planted(context: Context) -> None:
    """Faults that must be found: a wrong result by the bound, a crash and a hang by the runner."""
    import gpu_day_one

    from tests import bounds, cases

    backend = backends.get_backend("reference")
    right = backend.prefix_attention

    def wrong(args: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(args)
        return out * 1.01, lse

    backend.prefix_attention = wrong  # type: ignore[method-assign]
    try:
        bounds.check_backend("reference", cases.tensors(cases.Shape(), torch.float32), {}, backward=False)
    except AssertionError as error:
        context.lines.append(f"found: {error}")
    else:
        raise AssertionError("a result that is wrong by a hundredth passes the check")
    finally:
        backend.prefix_attention = right  # type: ignore[method-assign]
    inner = context.folder / "planted"
    inner.mkdir(exist_ok=True)
    for name, status in zip(gpu_day_one.PLANTED, ("crashed", "timed out"), strict=True):
        result = gpu_day_one.run_stage(name, inner, 1.5, dry_run=False)
        if result["status"] != status:
            raise AssertionError(f"{name} was taken for {result['status']!r}")
        context.lines.append(f"found: {name} {status}")
    context.lines.insert(0, "a wrong result, a crash and a hang are found")


def _inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype, grad: bool = True) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v of a calibrate.SHAPES-like row, [B, S, H, D] in memory."""
    batch, heads, kv_heads, queries, keys, dim, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    qkv = [draw(batch, n, h, dim).transpose(1, 2) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    return [x.requires_grad_(grad) for x in (*qkv, draw(kv_heads, prefix, dim), draw(kv_heads, prefix, dim))]


def _names(context: Context, dtype: torch.dtype) -> list[str]:
    """Backends that run a plain call here, the interpreter left out."""
    found = backends.available_backends(context.device, dtype)
    return [name for name in found if not context.dry_run or name in ("cpu", "reference")]


def opcheck(context: Context) -> None:
    dtype = torch.float16
    names = _names(context, dtype)
    for backend in context.in_time(names[:1] if context.dry_run else names):
        inputs = [x.detach() for x in _inputs((2, 4, 2, 17, 17, 64, 7), context.device, dtype)]
        args = functional._attention_args(*inputs, *[True, *[None] * 6, True, *[None] * 5, 0.0, None])
        torch.library.opcheck(ops.prefix_attention, (*args, backend))
        out, lse = ops.prefix_attention(*args, backend)
        needs = [x is not None for x in args.differentiable]
        torch.library.opcheck(ops.prefix_attention_backward, (out, None, out, lse, *args, needs, backend))
        context.lines.append(f"{backend}: forward and backward")
    context.lines.insert(0, f"{len(context.lines)} backends")


def _gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def compiled(context: Context) -> None:
    """One graph for static and for dynamic sizes, with the results of eager calls."""
    compiler = "aot_eager" if context.dry_run else "inductor"
    for backend in context.in_time(["auto", *([] if context.dry_run else _names(context, torch.bfloat16))]):
        torch._dynamo.reset()

        def attention(*inputs: Tensor, backend: str = backend) -> Tensor:
            return peftkern.prefix_attention(*inputs, backend=backend) * 2

        graph = torch.compile(attention, fullgraph=True, backend=compiler, dynamic=None)
        for length in (32, 48, 80):
            inputs = _inputs((2, 4, 2, length, length, 64, 7), context.device, torch.bfloat16)
            for got, true in zip(_gradients(graph, inputs), _gradients(attention, inputs), strict=True):
                torch.testing.assert_close(got, true, rtol=5e-2, atol=5e-2)
        context.lines.append(f"{backend}: one graph, forward and backward, {compiler}")
    context.lines.insert(0, f"{len(context.lines)} backends")


def cuda_graph(context: Context) -> None:
    """Captured once, replayed on other values: the results of eager calls."""
    if context.dry_run:
        raise LeftOut("a CPU has no CUDA graphs")
    for backend in context.in_time(_names(context, torch.bfloat16)):
        for shape in ((2, 8, 2, 128, 128, 64, 32), (4, 8, 2, 1, 2048, 64, 512)):
            inputs = [x.detach() for x in _inputs(shape, "cuda", torch.bfloat16)]
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(3):
                    peftkern.prefix_attention(*inputs, backend=backend)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.no_grad(), torch.cuda.graph(graph):
                    out = peftkern.prefix_attention(*inputs, backend=backend)
            except Exception as error:
                if backend == "reference":  # checks values on the host
                    context.lines.append(f"reference: not captured ({error})"[:200])
                    break
                raise
            for x in inputs:
                x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out, peftkern.prefix_attention(*inputs, backend=backend), rtol=0, atol=0)
        else:
            context.lines.append(f"{backend}: captured and replayed, training and decoding shapes")
    context.lines.insert(0, f"{len(context.lines)} backends")


def _seconds(context: Context, call: Callable[[], object]) -> float:
    """Median of a call; on a GPU with a cold L2 cache, by triton.testing.do_bench."""
    if not context.dry_run:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=50, return_mode="median")) / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(context: Context) -> None:
    rows = []
    count = 1 << (16 if context.dry_run else 29)
    source, target = (torch.ones(count, dtype=torch.bfloat16, device=context.device) for _ in range(2))
    rate = 4 * count / _seconds(context, lambda: target.copy_(source)) / 1e9
    rows.append({"what": f"copy, {2 * count >> 20} MiB", "rate": rate, "unit": "GB/s, read and written"})
    size = 64 if context.dry_run else 8192
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / _seconds(context, functools.partial(torch.matmul, a, b)) / 1e12
        rows.append({"what": f"matmul {name}, {size}^3", "rate": rate, "unit": "TFLOP/s"})
    context.table("ceilings", rows)
    context.lines += [", ".join(f"{r['what']}: {r['rate']:.4g} {r['unit']}" for r in rows)]


def crossovers(context: Context) -> None:
    """Every backend beside the model; the choice before and after it is calibrated with these rows."""
    device = torch.device(context.device, torch.cuda.current_device() if context.device == "cuda" else None)
    shapes = calibrate.SHAPES[:2] if context.dry_run else None
    budget = 0.0 if context.dry_run else 0.5 * (context.end - time.monotonic())
    dtypes = (torch.float32,) if context.dry_run else (torch.bfloat16, torch.float32)
    machine = choose.machine_of(device, dtypes[0], choose.registered_flash(), torch.get_num_threads())
    file = calibrate.calibrate(device, budget, shapes, dtypes, print, 0.9 * (context.end - time.monotonic()))
    rows = calibrate.read_rows(file)
    calls: dict[tuple, dict[str, calibrate.Row]] = {}
    for row in rows:
        calls.setdefault((row.kind.partition(" ")[2], tuple(row.shape)), {})[row.backend] = row
    scales = dict(calibrate.load(device))
    table: list[dict[str, Any]] = []
    regret: dict[str, list[float]] = {"modelled": [], "calibrated": []}

    def calibrated(row: calibrate.Row) -> float:
        launches, work = scales[row.kind]
        return row.launches * launches + row.work * work

    for (kind, shape), found in calls.items():
        best = min(row.seconds for row in found.values())
        picks = {
            "modelled": min(found.values(), key=lambda r: r.launches + r.work),
            "calibrated": min(
                found.values(), key=lambda r: r.launches * scales[r.kind][0] + r.work * scales[r.kind][1]
            ),
        }
        for how, row in picks.items():
            regret[how].append(row.seconds / best)
        line: dict[str, Any] = {"call": kind, "B,Hq,Hkv,S,T,D,P": ",".join(map(str, shape)), "arch": machine.arch}
        for name, row in found.items():
            line |= {f"{name}_ms": row.seconds * 1e3, f"{name}_modelled_ms": (row.launches + row.work) * 1e3}
        table.append(line | {f"{how}_choice": row.backend for how, row in picks.items()})
    context.table("crossovers", table)
    shutil.copy(file, context.folder / file.name)
    for how, values in regret.items():
        within = sum(value <= 1.15 for value in values)
        context.lines.append(
            f"{how} choice: {within} of {len(values)} within 1.15x of the best, worst {max(values):.2f}x"
        )
    context.lines.append(f"the calibrated profile is in {file}, where 'auto' reads it, and in this folder")


#: Of the microbenchmarks: training shapes, then decoding.
MICRO = (
    *bench_shapes.sweep(["llama-3-8b"], [2048], [128], [4]),
    *bench_shapes.sweep(["llama-3-8b"], [512], [16, 2048], [8]),
    *bench_shapes.sweep(["gpt2"], [512], [32], [8]),
    *bench_shapes.sweep(["llama-3-8b"], [8192], [128], [1]),
    *bench_shapes.sweep(["llama-3-8b"], [1], [2048], [32], cached=511),
    *bench_shapes.sweep(["llama-3-8b"], [1], [64], [1], cached=16383),
    *bench_shapes.sweep(["smollm2-135m"], [512], [20], [16]),
    *bench_shapes.sweep(["gemma-2-9b"], [1024], [64], [2]),
)


def microbenchmarks(context: Context) -> None:
    """`peftkern bench` on each shape: all peers and backends; what is wrong is not timed."""
    from peftkern.tools.bench import attention, rows

    results = rows.Results(context.folder / "microbenchmarks.csv")
    shapes = bench_shapes.QUICK[:1] if context.dry_run else MICRO
    for shape in context.in_time(shapes):
        directions = ["forward"] if shape.cached else ["forward", "forward+backward"]
        key = attention.key_columns(shape)
        if any(all(str(row[n]) == str(x) for n, x in key.items() if x is not None) for row in results.rows):
            continue  # of a run that was stopped here
        results.add(attention.measure(
            shape, "bf16", directions, device=context.device, seconds=0.0 if context.dry_run else 1.0, at_least=3,
            with_memory=not context.dry_run,
        ))  # fmt: skip
    context.tables.append("microbenchmarks.csv")
    speedups = []
    for group in rows.groups(results.rows):
        times = {row["provider"]: row["p50_ms"] for row in group if row["status"] == "ok"}
        context.lines.append(f"{rows.title(group[0])}: " + ", ".join(f"{n} {t:.4g} ms" for n, t in times.items()))
        context.lines += [f"  {r['provider']}: {r['status']}, {r['reason']}" for r in group if r["status"] != "ok"]
        if {"peft", "peftkern"} <= times.keys():
            speedups.append(times["peft"] / times["peftkern"])
    if speedups:
        context.lines.insert(0, f"auto is {min(speedups):.2f} to {max(speedups):.2f} times as fast as PEFT's way")
    bad = [r for r in results.rows if r["status"] in ("wrong", "failed") and rows.is_ours(r["provider"])]
    if bad:
        raise AssertionError(f"{len(bad)} rows of ours are bad: {bad[0]['provider']}, {bad[0]['reason']}")


def training(context: Context) -> None:
    """A step of prefix tuning, PEFT beside peftkern: loss and gradient compared in fp32, then timed in bf16."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (64, 128, 2, 4, 2) if context.dry_run else (4096, 14336, 4, 32, 8)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(vocab_size=512, **dict(zip(keys, sizes, strict=True)))
    batch, length, prefix = (2, 24, 5) if context.dry_run else (4, 1024, 128)

    def model(dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        with torch.device(context.device):
            stock = LlamaForCausalLM(config).to(dtype)
        adapted = get_peft_model(stock, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix))
        weight = adapted.prompt_encoder["default"].embedding.weight
        generator = torch.Generator().manual_seed(1)
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        return adapted.to(context.device).train()

    def step(adapted: torch.nn.Module, ids: Tensor) -> tuple[float, Tensor]:
        adapted.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), adapted.prompt_encoder["default"].embedding.weight.grad.clone()

    ids = torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(2)).to(context.device)
    adapted = model(torch.float32)
    few = ids[:2, :128]
    stock_loss, stock_gradient = step(adapted, few)
    with peftkern.patched(adapted):
        loss, gradient = step(adapted, few)
    error = ((gradient - stock_gradient).norm() / stock_gradient.norm()).item()
    context.lines.append(f"fp32: loss {loss:.6f}, PEFT's {stock_loss:.6f}; gradients differ by {error:.1e}")
    if not (abs(loss - stock_loss) < 1e-4 * abs(stock_loss) and error < 1e-3):
        raise AssertionError(context.lines[-1])
    del adapted, gradient, stock_gradient
    adapted, seconds, peaks = model(torch.bfloat16), {}, {}
    for name in ("PEFT", "peftkern"):
        if name == "peftkern":
            peftkern.patch(adapted)
        step(adapted, ids)
        times = []
        if not context.dry_run:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2 if context.dry_run else 8):
            start = time.perf_counter()
            step(adapted, ids)
            if not context.dry_run:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
        peaks[name] = 0.0 if context.dry_run else torch.cuda.max_memory_allocated() / 1e6
    about = {"B": batch, "S": length, "P": prefix}
    rates = {n: batch * length / s for n, s in seconds.items()}
    context.table("training", [
        {"what": n, **about, "ms": 1e3 * s, "tokens_per_s": rates[n], "peak_mb": peaks[n]} for n, s in seconds.items()
    ])  # fmt: skip
    context.lines.insert(0, f"a step is {seconds['PEFT'] / seconds['peftkern']:.2f} times as fast as PEFT's")


STAGES: dict[str, Callable[[Context], None]] = {
    "environment": environment, "build": build, "planted": planted, "opcheck": opcheck, "compile": compiled,
    "cuda_graph": cuda_graph, "ceilings": ceilings, "crossovers": crossovers, "microbenchmarks": microbenchmarks,
    "training": training,
}  # fmt: skip
