# SPDX-License-Identifier: Apache-2.0
"""A campaign of five minutes, and its machinery: guard pages, crashes, repetition of what failed, a wide draw."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from peftkern import native

from .. import skips
from ..csrc.program import build, mutated
from . import campaign, cases, guards

pytestmark = pytest.mark.skipif(bool(native.cpu.MISSING), reason="needs the CPU library")
#: Cases per hour, on a machine that does something else too.
MIN_RATE = 2000


@pytest.mark.slow
def test_five_minutes(capsys):
    seed = int(time.time())
    with capsys.disabled():
        count, rate, failures = campaign.run(seed, 5.0)
    assert not failures, f"{len(failures)} of {count} cases failed:\n" + "\n\n".join(map(str, failures))
    assert rate >= MIN_RATE, f"{rate:.0f} cases per hour, seed {seed}"


def test_a_few_cases(tmp_path):
    lines = []
    count, _, failures = campaign.run(0, 0.05, lines.append, tmp_path / "failing")
    assert not failures, "\n".join(map(str, failures))
    assert f"{count} cases of seed 0" in lines[-1]


_WITH_LIBRARY = """
import pathlib
from peftkern.native import abi, cpu
cpu._PATH = pathlib.Path({library!r})
cpu._library, cpu.MISSING = cpu._load()
assert not cpu.MISSING, cpu.MISSING
cpu._functions = {{name: getattr(cpu._library, f"peftkern_{{name}}") for name in abi.CPU_FUNCTIONS}}
from tests.fuzz import worker
worker.main()
"""


@pytest.mark.slow
@skips.needs("g++", "cmake", "ninja")
def test_a_planted_read_past_the_end_is_found(tmp_path):
    """By one byte, behind the last row of a tensor."""
    source = mutated(tmp_path / "source", "prompt-read-past-its-end")
    build(tmp_path / "build", "-DPEFTKERN_PORTABLE_ONLY=ON", source=source)
    code = _WITH_LIBRARY.format(library=str(tmp_path / "build" / "libpeftkern_cpu.so"))
    worker, failures = campaign.Worker((sys.executable, "-c", code)), []
    names = [name for name in (f"0:{i}" for i in range(200)) if cases.draw(name, ("portable",)).is_embedding]
    try:
        failures = [failure for failure in map(worker.failure, names) if failure]
    finally:
        worker.close()
    assert any("SIGSEGV" in str(failure) for failure in failures), list(map(str, failures))


_TOUCH = """
import ctypes, torch
from tests.fuzz import guards
x = guards.moved(torch.arange(6.0).reshape(2, 3), {place!r})
ctypes.string_at(x.data_ptr(), 24)
print("inside", flush=True)
ctypes.string_at(x.data_ptr() + {offset}, 1)
print("outside", flush=True)
"""


@pytest.mark.parametrize(("place", "offset"), [("start", -1), ("end", 24)])
def test_one_byte_outside_ends_the_process(place, offset):
    done = subprocess.run(
        [sys.executable, "-c", _TOUCH.format(place=place, offset=offset)], cwd=campaign.ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == "inside\n", done.stderr
    assert done.returncode < 0


@pytest.mark.parametrize("place", ["start", "end"])
def test_copies_have_values_and_strides(place):
    for x in (
        torch.randn(5, 8)[:, 1:4], torch.randn(4, 6).t(), torch.randn(3, 1).expand(3, 4), torch.tensor(7),
        torch.zeros(2, 0, 3), torch.rand(4, 4) < 0.5, torch.randn(7).bfloat16(),
    ):  # fmt: skip
        y = guards.moved(x, place)
        assert torch.equal(x, y)
        assert (x.stride(), x.dtype) == (y.stride(), y.dtype)
    gap = guards.moved(torch.zeros(4, 8)[:, :3], place).as_strided((3, 5), (8, 1), 3)
    assert gap.isnan().all(), "between the rows"
    with guards.allocating(place):
        assert not x.new_empty(2).isnan().all(), "only what the package allocates is replaced"


def _worker(tmp_path, code: str) -> campaign.Worker:
    script = tmp_path / "worker.py"
    script.write_text(f"import json, os, sys, time\nfor line in sys.stdin:\n    name = line.strip()\n{code}")
    return campaign.Worker((sys.executable, str(script)))


_CRASH = """
    print(json.dumps({"start": "what case " + name + " is"}), flush=True)
    if name == "3:2" and not os.path.exists("MENDED"):
        os.kill(os.getpid(), 11)
    print(json.dumps({"passed": name}), flush=True)
"""


def test_a_crash_is_reported_and_repeated_first(tmp_path):
    lines, file = [], tmp_path / "failing"
    code = _CRASH.replace("MENDED", str(tmp_path / "mended"))
    count, _, failures = campaign.run(3, 0.005, lines.append, file, _worker(tmp_path, code))
    assert [x.name for x in failures] == ["3:2"]
    assert count > 3, "the campaign goes on behind a crash"
    for part in ("what case 3:2 is", "SIGSEGV", "python -m tests.fuzz --case 3:2"):
        assert part in str(failures[0])
    count, _, failures = campaign.run(4, 0.0, lines.append, file, _worker(tmp_path, code))
    assert count == 1, "only what failed before ran"
    assert [x.name for x in failures] == ["3:2"]
    (tmp_path / "mended").touch()
    campaign.run(4, 0.0, lines.append, file, _worker(tmp_path, code))
    assert campaign.remembered(file) == []


def test_a_hang_is_reported(tmp_path):
    worker = _worker(tmp_path, "    time.sleep(60)\n")
    failure = worker.failure("1:1", patience=0.5)
    worker.close()
    assert "does not end" in str(failure)


_LATE = """
    print(json.dumps({"start": "case"}), flush=True)
    print(json.dumps({"passed": name}), flush=True)
    if name == "1:1":
        DIE
"""


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_a_process_that_ends_between_two_cases_fails_the_one_before(tmp_path, pause):
    worker = _worker(tmp_path, _LATE.replace("DIE", "os.kill(os.getpid(), 11)"))
    assert worker.failures("1:0") == worker.failures("1:1") == []
    time.sleep(pause)  # with a pause the pipe is closed when the next case is written
    failures = worker.failures("1:2")
    assert worker.failures("1:3") == [], "the next process is sound"
    worker.close()
    assert [x.name for x in failures] == ["1:1"], "the case whose process died, not the one that was never started"
    assert "SIGSEGV" in str(failures[0])


def test_each_process_has_its_own_error_output(tmp_path):
    code = """
    print("error of " + name + "." * 100, file=sys.stderr, flush=True)
    os._exit(3)
"""
    worker = _worker(tmp_path, code)
    first, second = str(worker.failure("1:1")), str(worker.failure("1:2"))
    assert "error of 1:1" in first
    assert "error of 1:2" in second
    assert "error of 1:1" not in second
    assert "\0" not in second, "the file was cut, but the process went on writing behind its old end"


def test_draws_have_every_feature():
    """On the same machine a name draws the same case, and a few hundred have everything."""
    isas, seen = ("portable", "avx2"), Counter()
    for i in range(400):
        case = cases.draw(f"0:{i}", isas)
        seen.update([case.isa, str(case), *case.tensors, *(n for n, x in case.options.items() if x is not None)])
        if not case.is_embedding:
            q, v = case.tensors["q"], case.tensors["v"]
            seen.update([q.dtype, "odd head dim" * (q.shape[3] % 2), "value dim" * (q.shape[3] != v.shape[3])])
            seen.update(["group" * (q.shape[1] > v.shape[1]), "strided" * (q.stride(3) != 1)])
            seen.update(["strided dout" * (case.dout is not None and case.dout.stride(3) != 1)])
            seen.update(["prefixes" * (getattr(case.options.get("prefix_ids"), "ndim", 0) == 2)])
    wanted = [*isas, *cases.DTYPES, "causal", "window", "prefix_in_window", "softcap", "bias", "prefix_bias", "sinks",
              "gate", "dropout_p", "prefix_ids", "prefix_lens", "prefix_starts", "cu_seqlens", "max_seqlen",
              "prefix_start", "max_prefix_len", "key_mask", "scale", "odd head dim", "value dim", "group", "strided",
              "strided dout", "prefixes", "prompt", "prompt_ids"]  # fmt: skip
    assert not [x for x in wanted if seen[x] < 2]
    assert str(cases.draw("0:7", isas)) == str(cases.draw("0:7", isas))
