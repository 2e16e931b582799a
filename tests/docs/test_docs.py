# SPDX-License-Identifier: Apache-2.0
"""The docs build without a warning, and what they state about the code is true."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftkern
from peftkern.tools import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _summary():
    spec = importlib.util.spec_from_file_location("summary", DOCS / "summary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_build_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_design", "sphinx_copybutton"):
        pytest.importorskip(name, reason="needs pip install '.[docs]'")
    options = ["-W", "--keep-going", "-q", "-d", tmp_path / "cache"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "html"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "html" / "api" / "functions.html").read_text()
    assert 'id="peftkern.prefix_attention"' in page
    assert "cu_seqlens" in page, "the implementation's signature is shown"


def _path(table: str) -> list[tuple[str, str]]:
    """(file, name) of every function named in a table of the architecture page."""
    text = (DOCS / "architecture.md").read_text()
    rows = text.partition(f"<!-- {table} -->")[2].partition(f"<!-- end of {table} -->")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [(file.strip("`"), name) for file, names, _ in cells for name in re.findall(r"`([^`]+)`", names)]


@pytest.mark.parametrize(("file", "name"), _path("path") + _path("gpu path"))
def test_functions_on_the_way_from_patch_to_a_kernel_exist(file, name):
    if "triton" in file:
        pytest.importorskip("triton")
    found = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_the_way_from_patch_to_a_kernel_has_six_files():
    assert 0 < len({file for file, _ in _path("path")}) <= 6


def test_every_public_name_is_documented():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: peftkern\.(\w+)", text, re.M))
    assert documented - {"testing", "integrations", "self_study"} == set(peftkern.__all__)


def test_every_command_is_documented():
    text = (DOCS / "api" / "cli.md").read_text()
    commands = next(a.choices for a in cli.build_parser()._actions if a.choices)
    assert re.findall(r"^```{cli-help} (\S+)", text, re.M) == list(commands)


def test_the_plot_and_the_numbers_are_current(capsys):
    summary = _summary()
    assert summary.main([]) == 0, f"{capsys.readouterr().err}run: python docs/summary.py --write"
    assert summary.PLOT.stat().st_size < 15_000


def test_an_outdated_number_is_reported_and_written(tmp_path, monkeypatch, capsys):
    summary = _summary()
    for name, (path, make) in summary.BLOCKS.items():
        with open(tmp_path / path.name, "a") as file:  # a file may have several blocks
            file.write(f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n")
        monkeypatch.setitem(summary.BLOCKS, name, (tmp_path / path.name, make))
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.setattr(summary, "PLOT", tmp_path / "plot.svg")
    assert summary.main([]) == 1
    assert summary.main(["--write"]) == 0
    assert summary.main([]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- summary -->\n|")
    assert text.endswith("<!-- end of shared text -->\nafter\n")
    assert "old" not in text
    assert "README.md: written" in capsys.readouterr().err


def test_the_summary_shows_regressions():
    summary = _summary()
    assert min(speed for _, speed in summary.bars()) < 1
    assert 0 < summary.table().count("\n") - 1 <= 6
    assert "**0." in summary.table()


def test_the_version_of_the_citation():
    assert f"\nversion: {peftkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()
