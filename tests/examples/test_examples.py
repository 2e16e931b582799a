# SPDX-License-Identifier: Apache-2.0
"""The examples run: each script and the code cells of the notebook."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
#: What the last line of a script's output begins with. None: the table of backends, which depends on the machine.
ENDS = {
    "own_model": None,
    "peft_model": "loss of the checkpoint in PEFT: ",
    "prefix_kv": "generated with the loaded prefix: ",
    "score_choices": "largest difference of the scores: ",
    "soft_prompt_trainer": "saved: SoftPrompt(length=16, embed_dim=64)",
}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_script_runs(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _module(path).main(["--questions" if path.stem == "score_choices" else "--steps", "4"])
    printed = capsys.readouterr().out
    if ENDS[path.stem] is None:
        assert "step 3: loss " in printed
        assert "reference: ok" in printed
    else:
        assert printed.splitlines()[-1].startswith(ENDS[path.stem])
    assert list(tmp_path.iterdir()) == [], "examples leave no files behind"


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_script_has_help(path, capsys):
    with pytest.raises(SystemExit) as end:
        _module(path).main(["--help"])
    assert end.value.code == 0
    assert f"python examples/{path.name}" in capsys.readouterr().out, "the help shows how to run the script"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, monkeypatch, tmp_path):
    """The code cells in one namespace, in order; no Jupyter is needed."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [], "outputs stay out of git"
        exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), namespace)
