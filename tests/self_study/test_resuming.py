# SPDX-License-Identifier: Apache-2.0
"""Interrupted anywhere, a run continues and gives bitwise equal results."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from peftkern import PrefixKV
from peftkern.self_study import Study, Training, capture, train

from .lab import TRAINING, Lab, other_weights, trained
from .runs import FILES, end_at, run


def test_a_resumed_run_is_bitwise_equal(lab, targets, tmp_path):
    losses, values = trained(lab, targets, tmp_path / "whole")
    for ends in (1, 2, 5):
        path, steps = tmp_path / f"stopped-{ends}", []
        trained(lab, targets, path, progress=lambda done, loss: steps.append(done), stop=lambda: len(steps) == ends)  # noqa: B023
        assert steps == list(range(1, ends + 1))
        again, resumed = trained(lab, targets, path)
        assert again == losses
        assert torch.equal(resumed, values)
    assert trained(lab, targets, tmp_path / "whole")[0] == losses, "a finished run is read"


def test_dropout_is_that_of_the_step(tmp_path):
    """Other random numbers drawn before, or in a process before it, change nothing."""
    lab = Lab()
    targets = capture(lab.model, lab.document, lab.synthesise(tmp_path / "questions", 4), 8)
    for module in lab.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    losses = trained(lab, targets, tmp_path / "eval")[0]
    lab.model.train()
    whole = trained(lab, targets, tmp_path / "whole")
    assert whole[0] != losses, "there is dropout"
    steps = []
    trained(
        lab, targets, tmp_path / "stopped", progress=lambda *step: steps.append(step), stop=lambda: len(steps) == 3
    )
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    resumed = trained(lab, targets, tmp_path / "stopped")
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers stay"


def test_an_interrupt_in_a_step_costs_the_steps_since_the_last_checkpoint(lab, targets, tmp_path):
    losses, values = trained(lab, targets, tmp_path / "whole")

    def interrupt(done, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(lab, targets, tmp_path / "checkpoint", progress=interrupt)
    assert lab.model.peftkern_prefix is lab.cartridge
    assert not lab.model.model.training
    steps = []
    again, resumed = trained(lab, targets, tmp_path / "checkpoint", progress=lambda done, loss: steps.append(done))
    assert steps == [5, 6, 7]
    assert again == losses
    assert torch.equal(resumed, values)


def test_the_same_call_continues_with_the_same_cartridge(lab, targets, tmp_path):
    """In one process, where the first call has changed the cartridge."""
    losses, values = trained(lab, targets, tmp_path / "whole")
    cartridge, path = lab.fresh(), tmp_path / "checkpoint"

    def interrupt(end, done, loss):
        if done == end:
            raise KeyboardInterrupt

    for end in (1, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            train(lab.model, cartridge, Study(targets), path, TRAINING, progress=partial(interrupt, end))
    for _ in range(2):
        assert train(lab.model, cartridge, Study(targets), path, TRAINING) == losses
        assert torch.equal(cartridge.flat_values(), values)
    assert trained(lab, targets, path)[0] == losses, "the start is accepted too"
    with torch.no_grad():
        cartridge.trainable[0].add_(1)
    with pytest.raises(ValueError, match="with other start; remove"):
        train(lab.model, cartridge, Study(targets), path, TRAINING)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "mark",
    ["made 4", "step 3", *(pytest.param(mark, marks=pytest.mark.slow) for mark in ("made 8", "step 1", "step 6"))],
)
def test_killed_at_any_time_a_run_resumes_bitwise_equal(mark, tmp_path):
    """A process is killed (SIGKILL) during the synthesis or during training; another one continues."""
    assert end_at(mark, tmp_path / "killed", signal.SIGKILL) == -signal.SIGKILL
    lines = []
    run(tmp_path / "killed", lines.append)
    assert "made 0" not in lines
    assert ("step 1" in lines) == (mark != "step 3" and mark != "step 6")
    run(tmp_path / "whole", lambda line: None)
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_checkpoints_of_another_run_are_refused(lab, targets, tmp_path):
    path = tmp_path / "checkpoint"
    trained(lab, targets, path)
    with pytest.raises(ValueError, match=r"path: expected a checkpoint of the same run, got .* with other options"):
        train(lab.model, lab.fresh(), Study(targets), path, Training(steps=3))
    turned = [replace(c, prompt_ids=c.prompt_ids[::-1], answer_ids=c.answer_ids[::-1]) for c in targets.conversations]
    changed = [
        replace(targets, ids=targets.ids.flip(0)),
        replace(targets, log_probs=targets.log_probs.flip(0)),
        replace(targets, conversations=turned),
    ]
    for other in changed:
        with pytest.raises(ValueError, match="with other studies; remove"):
            trained(lab, other, path)
    with pytest.raises(ValueError, match="with other model; remove"):
        train(other_weights(lab.model), lab.fresh(), Study(targets), path, TRAINING)
    with pytest.raises(ValueError, match="with other start; remove"):
        train(lab.model, PrefixKV(lab.model, 4, num_frozen_tokens=1), Study(targets), path, TRAINING)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="path: expected a checkpoint in"):
        trained(lab, targets, path)
