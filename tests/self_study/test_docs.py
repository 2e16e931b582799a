# SPDX-License-Identifier: Apache-2.0
"""The code of docs/cartridges.md."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import peftkern
from peftkern import self_study
from peftkern.self_study import Training, synthesise, train

from .lab import OPTIONS, TEXT, new_model, new_tokenizer


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """With fewer and shorter questions, and fewer steps."""

    class Small:
        def __getattr__(self, name):
            return getattr(self_study, name)

        def synthesise(self, model, tokenizer, document, text, path, count, options=OPTIONS):
            prompts = options.prompts
            return synthesise(model, tokenizer, document, text, path, 5, replace(OPTIONS, prompts=prompts))

        def train(self, *arguments):
            return train(*arguments, Training(steps=3, batch_size=2))

    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "cartridges.md").read_text()
    blocks = re.findall(r"^```{code-block} python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3
    run, compared, composed = (block.replace("from peftkern import self_study\n", "") for block in blocks)
    names = {"model": new_model(), "tokenizer": new_tokenizer(), "text": TEXT, "self_study": Small()}
    exec(run + compared, names)
    names |= {f"cartridge_{x}": names["cartridge"] for x in "ab"}
    names |= {f"targets_{x}": names["targets"] for x in ("a", "b", "of_both")}
    exec(composed, names)
    assert peftkern.load_prefix("cartridge").lengths == (128, 128)
    assert peftkern.load_prefix("cartridge-a").lengths == (128, 128)
