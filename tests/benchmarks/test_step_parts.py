# SPDX-License-Identifier: Apache-2.0
"""The parts of a training step: what each moment counts for, and that the benchmark runs at tiny sizes."""

from __future__ import annotations

import time

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks import plot, readme_tables, step_parts
from benchmarks.end_to_end.models import make_batch, smollm2_config

SLEEP = 0.15  # longer than any part of a step of the tiny model


@pytest.fixture
def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(smollm2_config(quick=True), dtype=torch.float32)


@pytest.fixture
def batch(base):
    return step_parts.one_label(make_batch(base.config.vocab_size, 3, 12, True))


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(SLEEP)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLEEP)
        return gradient.clone()


def _slowed(function, which=lambda result: result, put=lambda result, x: x):
    """The function, whose result takes a while in both directions."""

    def slow(*args, **kwargs):
        result = function(*args, **kwargs)
        return put(result, _Slow.apply(which(result)))

    return slow


def _slow_down(place: str, model, monkeypatch) -> None:
    layer = model.model.layers[-1]  # the first one's queries need no gradient
    if place == "attention function":
        functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
        name = model.config._attn_implementation
        slow = _slowed(functions[name], lambda result: result[0], lambda result, x: (x, *result[1:]))
        monkeypatch.setitem(functions._local_mapping, name, slow)
    elif place == "rotary":
        slow = _slowed(modeling_llama.apply_rotary_pos_emb, lambda r: r[0], lambda r, x: (x, r[1]))
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", slow)
    elif place == "loss":
        model.loss_function = _slowed(model.loss_function)
    else:
        module = {"query": layer.self_attn.q_proj, "down": layer.mlp.down_proj, "norm": layer.input_layernorm,
                  "output layer": model.lm_head}[place]  # fmt: skip
        module.forward = _slowed(module.forward)


@pytest.mark.parametrize("arm", ["PEFT", "patch"])
@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("query", step_parts.LINEAR),
        ("down", step_parts.LINEAR),
        ("attention function", step_parts.ATTENTION),
        ("rotary", step_parts.REST),
        ("norm", step_parts.REST),
        ("output layer", step_parts.HEAD),
        ("loss", step_parts.HEAD),
    ],
)
def test_a_moment_counts_for_the_part_that_runs(base, batch, monkeypatch, arm, place, part):
    made = step_parts.Arm(base, arm, 4, batch)
    _slow_down(place, made.model.get_base_model(), monkeypatch)
    found = made.timed_step()
    for phase in ("forward", "backward"):
        assert found[part, phase] >= SLEEP, f"{place}, {phase}: {found}"


def test_the_parts_add_up_to_the_step(base, batch):
    made = step_parts.Arm(base, "patch", 4, batch)
    made.timed_step()
    start = time.perf_counter()
    found = made.timed_step()
    assert sum(found.values()) <= time.perf_counter() - start
    assert all(seconds > 0 for seconds in found.values())
    assert {part for part, _ in found} == set(step_parts.PARTS)
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__, "the clocks are removed"


def test_clocks_change_nothing(base, batch):
    for name in step_parts.ARMS:
        made = step_parts.Arm(base, name, 4, batch)
        plain = made.model(**batch)
        with step_parts.Clocks(made.model).forward():
            timed = made.model(**batch)
        assert timed.logits.shape == plain.logits.shape, "labelled logits stay possible"
        assert torch.equal(timed.loss, plain.loss)
        assert (timed.logits.shape[:2] == (1, 3)) == (name == "patch, labelled logits")


def test_losses_that_differ_are_refused(base, batch):
    arms = {name: step_parts.Arm(base, name, 4, batch) for name in ("PEFT", "patch")}
    assert max(step_parts.check(arms, 1e-5).values()) < 1e-5
    step_parts.prefix_of(arms["patch"].model).data.mul_(1.1)
    with pytest.raises(AssertionError, match="patch: expected PEFT's loss"):
        step_parts.check(arms, 1e-5)


def test_rows_are_written_drawn_and_put_into_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "step_parts.csv"
    found = step_parts.main(["--quick", "--threads", "1", "--labels", "all", "--output", str(path)])
    rows = pd.read_csv(path)
    assert len(rows) == len(found) == len(step_parts.ARMS) * len(step_parts.PARTS)
    assert rows.groupby("arm")["share"].sum().to_numpy() == pytest.approx(1, rel=1e-3)
    assert (rows[["seconds", "step_s"]] > 0).all(axis=None)
    assert set(rows) >= {"cpu", "cores", "threads", "torch", "peftkern", "git", "date", "clocks", "spread"}
    assert path.with_suffix(".png").stat().st_size > 1000
    assert list(plot.figures_of(path)) == [""]
    assert "patch, labelled logits" in capsys.readouterr().out
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    table = readme_tables.step_parts().splitlines()
    assert len(table) == 2 + len(step_parts.ARMS)
    assert len({line.count("|") for line in table}) == 1


def test_without_results_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.step_parts() == readme_tables.NOT_RECORDED
