# SPDX-License-Identifier: Apache-2.0
"""Times of a GPU without those of Python, on a GPU in simulated time."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peftkern.backends import registry
from peftkern.backends.cost import measured
from peftkern.tools import calibrate
from peftkern.tools.bench import measuring
from peftkern.tools.bench.device_time import enqueue
from peftkern.tools.bench.measuring import clock_for, take_turns

from .stand_in_gpu import Gpu


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.mark.parametrize(("host", "device"), [(2e-4, 2e-5), (2e-5, 2e-3), (6e-3, 1e-5)])
def test_the_time_of_the_gpu_does_not_contain_that_of_the_cpu(gpu, host, device):
    times = enqueue(lambda: gpu.run(host, device))
    assert times.queued
    assert times.device == pytest.approx([device] * 5)
    assert times.host == pytest.approx(host)
    assert take_turns({"a": lambda: gpu.run(host, device)}, 0.0, clock=clock_for("cuda"))["a"].median == (
        pytest.approx(device)
    )


def test_a_call_that_waits_for_the_gpu_is_told(gpu):
    def call():
        gpu.run(1e-4, 1e-4)
        gpu.synchronize()

    assert not enqueue(call).queued


#: Seconds of a GPU per second of the model.
SLOWNESS = 1.7


def _measure(monkeypatch, gpu, file, host):
    """Calibrate a GPU whose kernels take SLOWNESS times as long as modelled, with ``host`` seconds per launch."""

    def measure(device, seconds, shapes, dtypes, note, end):
        for launches, work in ((4e-6, 1e-3), (8e-6, 2e-5), (4e-6, 1e-6), (1.2e-5, 4e-6)):
            on_gpu = SLOWNESS * (launches + work)
            calls = {"x": lambda on_gpu=on_gpu: gpu.run(host, on_gpu)}
            cost = measuring.costs(calls, torch.device("cuda"), 0.0)["x"]
            yield calibrate.Row("triton", "triton x", (), cost.seconds, launches, work, cost.host)

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(calibrate, "measure", measure)
    monkeypatch.setattr(calibrate, "identity", lambda device: "a GPU")
    return calibrate.calibrate("cuda", file=file)


def test_the_factors_do_not_absorb_the_time_of_python(monkeypatch, gpu, tmp_path):
    for host in (1e-5, 3e-4):
        rows = calibrate.read_rows(_measure(monkeypatch, gpu, tmp_path / "rates.json", host))
        assert calibrate.fit(rows)["triton x"] == pytest.approx((SLOWNESS, SLOWNESS), rel=1e-6)
        assert calibrate.hosts(rows) == pytest.approx({"triton x": host})


def test_a_file_of_ones_own_is_not_what_auto_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "forget", lambda: pytest.fail("auto reads new factors"))
    file = calibrate.calibrate("cpu", 0.0, calibrate.SHAPES[:1], (torch.float32,), file=tmp_path / "rates.json")
    assert file == tmp_path / "rates.json"
    assert {row.host for row in calibrate.read_rows(file)} == {0.0}
    assert not measured.path(torch.device("cpu")).exists()


def test_a_gpu_measures_large_shapes_first(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(calibrate, "measure", lambda device, seconds, shapes, *rest: asked.extend(shapes) or [])
    monkeypatch.setattr(calibrate, "identity", lambda device: "a GPU")
    calibrate.calibrate("cuda", file=tmp_path / "rates.json")
    assert asked == [*calibrate.LARGE, *calibrate.SHAPES]
