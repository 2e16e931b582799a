# SPDX-License-Identifier: Apache-2.0
"""The README is a promise: its Python runs, its table is what the backends say, its commands exist."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme_tables
from peftkern.tools import cli

TEXT = readme_tables.README.read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("block", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_python_blocks_run(block, monkeypatch, tmp_path):
    """Blocks share nothing but the tiny model and batch that the fixture namespace gives them."""
    from .readme_namespace import namespace

    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), namespace())


@pytest.mark.parametrize(("path", "name"), list(readme_tables.placed()), ids=lambda x: getattr(x, "name", x))
def test_the_tables_are_what_the_backends_and_the_results_say(path, name):
    current = readme_tables.TABLES[name]()
    assert readme_tables.in_file(path, name) == current, "run: python -m benchmarks.readme_tables --write"


def test_each_table_of_results_is_somewhere():
    assert {name for _, name in readme_tables.placed()} >= {"support table", "numbers", "alternatives", "end to end"}


def test_every_command_named_in_the_readme_exists():
    commands = next(a.choices for a in cli.build_parser()._actions if a.choices)
    named = set(re.findall(r"(?:bin/|`)peftkern ([a-z]+)", TEXT))
    assert named
    assert named <= set(commands)


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (readme_tables.README.parent / target).exists(), target
