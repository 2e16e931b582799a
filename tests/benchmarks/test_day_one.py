# SPDX-License-Identifier: Apache-2.0
"""The first day on a GPU, rehearsed on a CPU: faults are found, time is kept, nothing is lost, every step runs."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.day_one import child, correctness, leftover, machine, plan, plans, prepare, report
from benchmarks.day_one.context import Context, Finding, LeftOut
from benchmarks.day_one.record import DONE, RESTART, Record, State
from benchmarks.day_one.vendor_alone import vendor_alone
from peftkern import testing
from peftkern.backends import composite, kernel_table, torch_attention

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day_one.py"
CPU_KERNEL = kernel_table.kernel_named("cpu flash")


def _start(folder, *arguments, cwd):
    """Start the script outside of the checkout, without its variables."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "OUT")}
    environment |= {"XDG_CACHE_HOME": str(folder.parent / "untouched")}
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd
    )


def _run(folder, *arguments, cwd):
    process = _start(folder, *arguments, cwd=cwd)
    said, _ = process.communicate(timeout=plan.LIMIT + 30)
    return process.returncode, said


# the runner


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder of a run with planted faults, what it said, its exit status and its seconds."""
    folder = tmp_path_factory.mktemp("planted")
    start = time.monotonic()
    status, said = _run(folder / "out", "--planted", "--pack", str(folder / "packed"), cwd=folder)
    return folder, said, status, time.monotonic() - start


def test_planted_faults_are_told_apart(planted):
    folder, said, status, _ = planted
    steps = json.loads((folder / "out" / "results.json").read_text())["steps"]
    found = {name: step["status"] for name, step in steps.items()}
    assert found == {"wrong": "wrong", "crash": "crashed", "hang": "hung", "slow": "partial", "start": "crashed",
                     "good": "ok", "unneeded": "no time left"}  # fmt: skip
    for name in ("wrong", "crash", "hang"):
        ends = {item: end["status"] for item, end in steps[name]["ends"].items()}
        assert ends == {"first": "ok", "fault": found[name], "last": "ok"}, "an item cost more than itself"
    assert "planted.py" in steps["hang"]["ends"]["fault"]["line"], "it is not said where it hangs"
    assert status == 1
    assert "Stopped after a fault in" in said


def test_what_ran_out_of_time_is_not_ok(planted):
    folder, said, _, seconds = planted
    slow = json.loads((folder / "out" / "results.json").read_text())["steps"]["slow"]
    assert slow["missing"][-1] == "slow 999"
    assert "| slow | partial |" in said
    assert "out of time for" in (folder / "out" / "report.md").read_text()
    assert seconds < sum(phase.share for phase in plan.PLANTED) + plan.REPORTING


def test_a_run_comes_back_in_few_files(planted):
    folder, *_ = planted
    packed = {file.name for file in (folder / "packed").iterdir()}
    assert packed == {"report.md", "results.json", "attention.csv", "logs.tar.gz"}
    assert (folder / "packed" / "attention.csv").read_text().splitlines() == [
        "step,item,status,value", "good,first,ok,1", "good,last,ok,1"
    ]  # fmt: skip
    tables = {step.table for step in plan.steps(plan.PHASES + plan.LEFTOVER).values() if step.table}
    assert len(tables) + len({"report.md", "results.json", "logs.tar.gz"}) <= report.FILES


def _starts(folder, step):
    lines = (folder / "raw" / f"{step}.jsonl").read_text().splitlines()
    return [event["start"] for event in map(json.loads, lines) if "start" in event]


def test_a_kill_loses_the_running_item_only(tmp_path):
    folder = tmp_path / "out"
    arguments = ("--planted", "--only", "good", "slow", "--limit", "9")
    process = _start(folder, *arguments, cwd=tmp_path)
    while "slow 2" not in (_starts(folder, "slow") if (folder / "raw" / "slow.jsonl").exists() else ()):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"]["slow"]["items"][0] == "first"
    assert results["exit_status"] == 3

    time.sleep(1.0)  # the process of the step notices at its next item
    for path in (folder / "raw").glob("*.jsonl"):
        path.unlink()
    (folder / "raw" / "logs").rename(folder / "logs")
    (folder / "raw").rmdir()  # only results.json is left
    (folder / "results.json").write_text(json.dumps(results | {"steps": {"good": {
        "items": ["first", "last"], "missing": ["last"], "ends": {"first": {"end": "first", "status": "ok",
        "seconds": 0.0, "line": "good", "rows": [{"value": 1.0}]}}}}}))  # fmt: skip
    status, _ = _run(folder, "--planted", "--only", "good", cwd=tmp_path)
    assert status == 0
    assert _starts(folder, "good") == ["last"], "an item ran again that results.json holds"


def test_a_line_that_was_cut_off_is_ignored(tmp_path):
    record = Record(tmp_path, "step")
    record.write(items=["a", "b"])
    record.end("a", "ok", 1.0, "fine")
    with record.path.open("a") as stream:
        stream.write('{"end": "b", "sta')
    assert record.read().missing == ["b"]
    record.end("b", "ok", 1.0, "fine")
    assert record.read().missing == []


def test_a_new_run_repeats_faults_only(tmp_path):
    record = Record(tmp_path, "step")
    record.write(items=["a", "b", "c"])
    for item, status in (("a", "ok"), ("b", "wrong"), ("c", "out of time")):
        record.end(item, status, 1.0, "")
    assert record.read().status == "wrong"
    record.begin()
    assert list(record.read().ends) == ["a"]


@pytest.mark.parametrize(
    ("items", "ends", "status"),
    [
        (None, {}, "no time left"), ([], {}, "left out"), (["a"], {}, "no time left"),
        (["a", "b"], {"a": "ok"}, "partial"), (["a", "b"], {"a": "ok", "b": "out of time"}, "partial"),
        (["a", "b"], {"a": "ok", "b": "left out"}, "ok"), (["a"], {"a": "left out"}, "left out"),
        (["a", "b"], {"a": "hung"}, "hung"), (["a", "b"], {"a": "failed", "b": "wrong"}, "wrong"),
    ],
)  # fmt: skip
def test_the_status_of_a_step(items, ends, status):
    assert State(items, {name: {"status": end} for name, end in ends.items()}).status == status


def test_a_process_in_which_cuda_is_unusable_ends(monkeypatch, tmp_path):
    """Its step goes on in another process; see how items end in test_planted_faults_are_told_apart."""
    monkeypatch.setattr(Context, "is_broken", lambda self: True)
    with pytest.raises(SystemExit, match=str(RESTART)):
        child.child(plan.steps(plan.PLANTED)["wrong"], tmp_path, 9.0, dry_run=True)
    child.child(plan.steps(plan.PLANTED)["wrong"], tmp_path, 9.0, dry_run=True)
    assert Record(tmp_path, "wrong").read().missing == []


def test_the_shares_are_the_limit():
    assert sum(phase.share for phase in plan.PHASES) + plan.REPORTING == plan.LIMIT == 570
    assert sum(phase.share for phase in plan.LEFTOVER) <= 180
    steps = [step for phase in plan.PHASES + plan.LEFTOVER for step in phase.steps]
    assert len({step.name for step in steps}) == len(steps)
    assert max(len(phase.steps) for phase in plan.PHASES) == 8


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        machine.machine(Context(tmp_path, dry_run=False))


# the steps


def _items(step, tmp_path, dry_run=True):
    module, _, function = step.function.partition(":")
    made = getattr(__import__(f"benchmarks.day_one.{module}", fromlist=[function]), function)
    return made(Context(tmp_path, dry_run), *step.arguments)


#: Steps whose items take long, and the items to run.
SOME = {"training": {"padded", "gradient checkpointing"},
        "generation": {"smollm2-135m B=16 P=64"}}  # fmt: skip
STEPS = {name: step for name, step in plan.steps(plan.PHASES + plan.LEFTOVER).items() if name[:8] != "correct_"}


def test_rows_name_the_machine(tmp_path):
    raw = tmp_path / "raw"
    record = Record(raw, "machine")
    record.write(items=["versions"])
    record.end("versions", "ok", 0.1, "", **child.outcome(lambda: machine.versions(Context(raw, True)))[2])
    Record(raw, "host").end("training: cuda", "ok", 0.1, "", rows=[{"forward_us": 2.0}])
    report.Report(tmp_path, raw, plan.PHASES).write()
    with (tmp_path / "host.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row)[:4] == ["step", "item", "status", "forward_us"]
    assert {"torch", "peftkern", "git", "date"} <= row.keys()
    assert row["torch"] == torch.__version__


def test_the_choice_of_auto_is_reported():
    rows = [
        {
            "shape": "s",
            "what": name,
            "error": 0.0,
            "forward_us": 1.0,
            "both_us": us,
            **({"plan": plan} if plan else {}),
        }
        for name, us, plan in (("auto", 3.0, "a"), ("a", 3.0, "a"), ("b", 2.0, "b"), ("peft", 9.0, ""))
    ]
    state = State(["x"], {"x": {"status": "ok", "rows": rows}})
    assert report._choices({"attention": state})[2] == "| s | a | 3.0 | b | 2.0 | 9.0 | inf |"


@pytest.mark.parametrize("name", [*STEPS, "correct_cuda"])
def test_every_step_runs(tmp_path, name):
    """In this process, with tiny sizes."""
    items = _items(plan.steps(plan.PHASES + plan.LEFTOVER)[name], tmp_path)
    assert items
    chosen = {title: item for title, item in items.items() if title in SOME.get(name, items)}
    assert chosen.keys() == (SOME.get(name) or items.keys())
    for title, item in chosen.items():
        status, line, more = child.outcome(item)
        assert status in DONE, (title, line, more)
        json.dumps(more)


@pytest.mark.slow
def test_dry_run(tmp_path):
    status, said = _run(tmp_path / "out", "--dry-run", cwd=tmp_path)
    assert status == 0, said
    assert "Dry run" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "untouched" / "peftkern").exists(), "a dry run calibrates the user's machine"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_checks_of_a_gpu(monkeypatch, dtype):
    """All features and sizes are right on copies with the same strides, as on another device."""
    for case in correctness.cases(dtype):
        if case[1].S + case[1].P < 200:  # the reference takes seconds for larger ones
            finding = correctness.check("cpu:0", "reference", dtype, case)
            assert finding.rows[0]["differs_between_runs"] == ""


def test_results_that_differ_between_runs_are_wrong(monkeypatch):
    case, right, calls = correctness.cases("bf16", dry_run=True)[0], correctness.run_on, []

    def unsteady(device, name, **inputs):
        calls.append(1)
        out, lse = right(device, name, **inputs)
        return out + 1e-3 * (len(calls) == 3), lse

    monkeypatch.setattr(correctness, "run_on", unsteady)
    with pytest.raises(AssertionError, match="three runs differ in out"):
        correctness.check("cpu", "reference", "bf16", case)


# torch's kernel alone


def _coarse(bits):
    """torch's CPU kernel on inputs with fewer bits, as kernels that multiply in TF32."""

    def forward(inputs):
        scale = 2.0**bits
        return CPU_KERNEL.forward(
            inputs._replace(q=inputs.q + (inputs.q * scale).round() / scale - inputs.q.detach())
        )

    return replace(CPU_KERNEL, forward=forward)


def test_fp32_is_judged_by_torchs_kernel_too(monkeypatch):
    """A result as exact as torch's kernel alone is not wrong; one that is less exact is."""
    kernel = _coarse(9)
    monkeypatch.setattr(plans, "torch_kernel", lambda name, call: kernel)
    case = ("plain", testing.Shape(S=33, P=9, D=64), {})
    monkeypatch.setattr(
        correctness, "run_on", lambda device, name, **inputs: vendor_alone(kernel, "cpu", {})(**inputs)
    )
    finding = correctness.check("cpu", "merge", "fp32", case)
    assert "torch's kernel alone on concatenated keys" in finding.line
    worse = vendor_alone(_coarse(6), "cpu", {})
    monkeypatch.setattr(correctness, "run_on", lambda device, name, **inputs: worse(**inputs))
    with pytest.raises(AssertionError, match="torch's kernel alone"):
        correctness.check("cpu", "merge", "fp32", case)


@pytest.mark.parametrize("name", ["plain", "kv_cache", "key_mask", "window", "window_after_prefix", "bank",
                                  "ragged_bank", "packed"])  # fmt: skip
def test_torchs_kernel_alone_is_right(name):
    shape, options = testing.feature(name, testing.Shape(S=33, P=9, D=64))
    alone = vendor_alone(CPU_KERNEL, "cpu", options)
    _, ratios = testing.ratios(alone, testing.tensors(shape, torch.float32), options)
    assert max(ratio.worst for ratio in ratios.values()) <= 1


def test_what_torchs_kernels_lack_is_not_compared():
    for name in ("sinks", "gate", "softcap", "bias", "packed_bank"):
        assert vendor_alone(CPU_KERNEL, "cpu", testing.feature(name, testing.Shape())[1]) is None


def test_the_calls_for_the_sanitizer_run():
    leftover.run_calls("reference", "tiny", "cpu")


def test_a_step_says_how_an_item_ended():
    def left_out():
        raise LeftOut("not here")

    assert child.outcome(left_out)[:2] == ("left out", "not here")
    assert child.outcome(lambda: Finding("fine"))[:2] == ("ok", "fine")
    assert child.outcome(lambda: 1 / 0)[0] == "failed"


def test_the_names_of_plans():
    found = ["triton", "merge/flash/cuda", "merge/cudnn/flash+triton", "concat/flash/cuda"]
    assert plans.matching(found, "merge", "triton") == ["merge/cudnn/flash+triton"]
    assert plans.matching(found, "", "cuda") == ["merge/flash/cuda", "concat/flash/cuda"]
    assert plans.matching(found) == found


def test_prepared_libraries_are_used(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    (tmp_path / "peftkern").mkdir()
    with pytest.raises(SystemExit, match="no libraries; build them with --prepare"):
        prepare.use(tmp_path / "libraries")
    (tmp_path / "libraries" / "out").mkdir(parents=True)
    for name in ("libpeftkern_cuda.so", "_build_info.json"):
        (tmp_path / "libraries" / "out" / name).write_text(name)
    prepare.use(tmp_path / "libraries")
    assert {file.name for file in (tmp_path / "peftkern").iterdir()} == {"libpeftkern_cuda.so", "_build_info.json"}


def test_the_results_of_another_kernel_are_left_out():
    def refused():
        with plans.on_its_own_kernel():
            composite.successors["merge/cudnn/triton", "sizes"] = torch_attention.KERNELS[0]
        return Finding("1 us")

    assert child.outcome(refused)[:2] == (
        "left out", "refused at run time, and another kernel took its place: merge/cudnn/triton"
    )  # fmt: skip
    composite.successors.clear()
