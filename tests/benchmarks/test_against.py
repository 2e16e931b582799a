# SPDX-License-Identifier: Apache-2.0
"""benchmarks/against.py and benchmarks/patch_time.py run and leave nothing behind."""

from __future__ import annotations

import contextlib
import subprocess

import pandas as pd
import pytest
import torch

from .test_scripts import STAMP, script

__all__ = ["script"]  # a fixture


@pytest.fixture
def repository(tmp_path):
    """A git checkout with a native library."""

    def git(*arguments: str) -> str:
        about = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(root), *about, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    root = tmp_path / "checkout"
    for name in ("csrc/a.c", "peftkern/a.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "--message", "a")
    (root / "peftkern" / "libpeftkern_cpu.so").write_text("built")
    (root / "peftkern" / "a.py").write_text("2")
    return root, git


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_other_commit_lies_beside_the_checkout_for_a_while(script, repository, error):
    root, git = repository
    with contextlib.suppress(KeyboardInterrupt), script("against").worktree("HEAD", root) as tree:
        assert (tree / "peftkern" / "a.py").read_text() == "1"
        assert (tree / "peftkern" / "libpeftkern_cpu.so").read_text() == "built"
        if error:
            raise error
    assert not tree.exists()
    assert len(git("worktree", "list").splitlines()) == 1, "git still knows the worktree"
    assert (root / "peftkern" / "a.py").read_text() == "2"


def test_commits_that_cannot_share_native_libraries_are_refused(script, repository):
    root, _ = repository
    worktree = script("against").worktree
    with pytest.raises(SystemExit, match="nowhere: expected a commit"), worktree("nowhere", root):
        pass
    (root / "csrc" / "a.c").write_text("2")
    with pytest.raises(SystemExit, match="its native libraries must be built"), worktree("HEAD", root):
        pass


def test_batches_without_reviews_are_padded(script):
    module = script("against")
    bench = module.Workbench({"path": "", "model": "", "data": None, "reviews": False})
    for case in module.ALL:
        batch = bench.batch(case)
        assert batch["input_ids"].shape == (case.batch, case.seq)
        if case.data != "random":
            lengths = batch["attention_mask"].sum(1)
            assert len(set(lengths.tolist())) > 1, f"{case}: rows have one length"
            assert (batch["labels"] != -100).int().argmax(1).equal(lengths - 1), f"{case}: labels are elsewhere"


def test_an_interrupted_comparison_keeps_its_rows(script, monkeypatch, tmp_path, capsys):
    module = script("against")

    def measure(workers, trees, order, options, index):
        if index == 1:
            raise KeyboardInterrupt
        row = {"index": index, "case": "a", "B": 1, "P": 2, "S": 3, "ratio": 1.0234, "peak_ratio": 0.5, "model": "m",
               "dtype": "bf16", "threads": 1, "git": "a", "git_before": "b"}  # fmt: skip
        figures = ("seconds", "spread", "loss", "peak_mb")
        return [row | {f"{name}_{side}": 1.0 for name in figures for side in module.SIDES}]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "worktree", contextlib.nullcontext)
    monkeypatch.setattr(module, "find_model", lambda *_: {})
    monkeypatch.setattr(module, "Worker", lambda *_: contextlib.nullcontext())
    path = tmp_path / "rows.csv"
    with pytest.raises(SystemExit) as stopped:
        module.main(["HEAD", "--only", "0", "1", "2", "--output", str(path)])
    assert stopped.value.code == 130
    assert list(pd.read_csv(path)["index"]) == [0]
    assert capsys.readouterr().out.splitlines()[-1] == "worst: 1.02 times the time, 0.50 times the memory"


@pytest.mark.slow
def test_against_the_commit_of_the_checkout(script, monkeypatch, tmp_path, capsys):
    module = script("against")
    if (
        not (module.ROOT / ".git").exists()
        or module.git(module.ROOT, "diff", "--quiet", "HEAD", "--", "csrc").returncode
    ):
        pytest.skip("needs a checkout whose csrc is that of its commit")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "rows.csv"
    module.main(["HEAD", "--quick", "--only", "3", "--threads", "1", "--output", str(path)])
    assert str(tmp_path) not in module.git(module.ROOT, "worktree", "list").stdout, "git still knows the worktree"
    assert list(tmp_path.iterdir()) == [path], "temporary files are left"
    rows = pd.read_csv(path)
    assert set(rows) >= STAMP
    assert (rows[["seconds_before", "seconds_after", "ratio"]] > 0).all(axis=None)
    assert rows["loss_before"].equals(rows["loss_after"]), "one package, two losses"
    assert rows["git_before"][0] == rows["git"][0].removesuffix("+")
    assert rows["peak_ratio"].isna().all() or rows["peak_ratio"].between(0.5, 2).all()
    assert capsys.readouterr().out.splitlines()[-1].startswith("worst: ")


@pytest.mark.slow
def test_a_worker_that_finds_another_package_is_told_of(script, tmp_path):
    order = {"threads": 1, "memory": False}
    with (
        script("against").Worker(tmp_path, order) as worker,
        pytest.raises(RuntimeError, match="expected peftkern in"),
    ):
        worker.ask("build", 0)


def test_time_of_patch(script, capsys):
    module = script("patch_time")
    functions = [getattr(owner, name) for owner, name, _ in module.TIMED]
    rows = module.main(["--quick", "--pairs", "2", "--dtypes", "fp32", "--threads", str(torch.get_num_threads())])
    assert [row["method"] for row in rows] == ["prefix", "prompt"]
    for row in rows:
        assert row["survey_s"] > 0
        assert row["trial_s"] > 0
    assert functions == [getattr(owner, name) for owner, name, _ in module.TIMED], "a function is still timed"
    assert "medians of 2" in capsys.readouterr().out
