# SPDX-License-Identifier: Apache-2.0
"""The README and the pages in docs/: their Python runs, their tables are current, their commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from peftkern.tools import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_python_blocks_run(name, block, monkeypatch, tmp_path):
    """Blocks share nothing but the tiny models and the data that readme_namespace gives them."""
    from .readme_namespace import namespace, trl_namespace

    monkeypatch.chdir(tmp_path)
    variables = namespace()
    if "from trl import" in block:
        pytest.importorskip("trl")
        pytest.importorskip("datasets")
        variables |= trl_namespace()
    exec(compile(block, name, "exec"), variables)


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_the_example_of_the_operation_trains_its_prefix(name):
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", TEXTS[name], re.S) if "peftkern.prefix_attention(" in x)
    variables: dict[str, Any] = {}
    exec(compile(block, name, "exec"), variables)
    if ".backward()" not in block:
        variables["out"].sum().backward()
    assert variables["prefix"].grad.abs().max() > 0


@pytest.mark.parametrize(("path", "name"), list(readme_tables.placed()), ids=lambda x: getattr(x, "name", x))
def test_the_tables_are_what_the_backends_and_the_results_say(path, name):
    current = readme_tables.TABLES[name]()
    assert readme_tables.in_file(path, name) == current, "run: python -m benchmarks.readme_tables --write"


def test_each_table_of_results_is_somewhere():
    assert {name for _, name in readme_tables.placed()} >= {"support table", "numbers", "alternatives", "end to end"}


def test_the_readme_is_short_and_has_both_commands():
    text = README.read_text()
    assert text.count("\n") <= 150
    for command in ("demo", "tests"):
        assert re.search(rf"<!-- command: {command} -->\n```sh\n[^\n]+\n```", text), f"command: {command}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_that_is_named_exists(name):
    commands = next(a.choices for a in cli.build_parser()._actions if a.choices)
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", TEXTS[name], re.S))
    named = re.findall(r"(?:bin/|^|&& )peftkern ([a-z][a-z-]*)", shell, re.M)
    named += re.findall(r"`(?:\.venv/bin/)?peftkern ([a-z][a-z-]*)", TEXTS[name])
    assert set(named) <= set(commands)


def test_the_readme_names_commands():
    assert re.search(r"bin/peftkern demo", README.read_text())


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)#\s]+)\)", TEXTS[name]):
        assert (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_and_modules_that_are_named_exist(name):
    for path in re.findall(r"\bpython (benchmarks/\S+\.py|examples/\S+\.py|docs/\S+\.py)", TEXTS[name]):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"\bpython -m ((?:benchmarks|tests)\.[\w.]+)", TEXTS[name]):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in re.findall(r"`((?:peftkern|csrc|tests|benchmarks|examples)/[\w./]+)`", TEXTS[name]):
        assert (ROOT / path).exists(), path
