# SPDX-License-Identifier: Apache-2.0
"""Arguments that cannot be right are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftkern import PrefixKV
from peftkern.self_study import Study, Synthesis, Training, capture, compare, train
from peftkern.self_study.batches import longest_of

from .lab import Lab, trained


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("answer_tokens", 0), ("answer_temperature", -1.0), ("prompts", ()),
     ("question_temperature", float("nan"))],
)  # fmt: skip
def test_options_of_the_synthesis_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        Synthesis(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("batch_size", 0), ("save_every", 0), ("lr", 0.0), ("clip", float("inf")), ("objective", "kl")],
)
def test_options_of_the_training_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        Training(**{option: value})


def test_studies_and_cartridges_are_checked(lab, targets, tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(ValueError, match="studies: expected at least one"):
        train(lab.model, lab.fresh(), [], path)
    with pytest.raises(ValueError, match=r"studies\[0\].prefix_ids: expected None, because"):
        train(lab.model, lab.fresh(), Study(targets, (0,)), path)
    with pytest.raises(
        ValueError, match=r"studies\[0\].prefix_ids: expected the numbers of its cartridges, got None"
    ):
        train(lab.model, PrefixKV.stack([lab.fresh()]), Study(targets), path)
    with pytest.raises(ValueError, match=r"studies\[1\].prefix_ids: expected ints from 0 to 0, and .*, got \(1,\)"):
        train(lab.model, PrefixKV.stack([lab.fresh()]), [Study(targets, (0,)), Study(targets, (1,))], path)
    with pytest.raises(ValueError, match="cartridge: expected one with parameters that require gradients"):
        train(lab.model, lab.document, Study(targets), path)


@pytest.mark.parametrize("ids", [(), (-1,), (-1, -1), (2,), (-2, 0), (True,), (0.5,)])
def test_cartridges_that_no_sample_reads_are_refused(ids, lab, targets, tmp_path):
    bank = PrefixKV.stack([lab.fresh(), lab.fresh()])
    with pytest.raises(ValueError, match=r"studies\[0\].prefix_ids: expected ints from 0 to 1, and -1"):
        train(lab.model, bank, Study(targets, ids), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_texts_beyond_the_models_positions_are_refused(tmp_path):
    """Rotary embeddings would give some number for every position."""
    lab = Lab()
    conversations = lab.synthesise(tmp_path / "questions", 4)
    targets = capture(lab.model, lab.document, conversations, 8)
    taken, longest = lab.document.positions, longest_of(conversations)

    def limit(positions):
        lab.model.config.max_position_embeddings = positions

    limit(taken + longest)
    capture(lab.model, lab.document, conversations, 8)
    limit(taken + longest - 1)
    message = f"expected a prefix and a text of at most the model's {taken + longest - 1} positions together, got"
    with pytest.raises(ValueError, match=f"document: {message} {taken} and {longest}"):
        capture(lab.model, lab.document, conversations, 8)
    with pytest.raises(ValueError, match=f"whole: {message} {taken}"):
        compare(lab.model, lab.fresh(), {"whole": lab.document}, conversations)
    with pytest.raises(ValueError, match=f"document: {message} {taken}"):
        lab.synthesise(tmp_path / "others", 4)
    limit(8 + longest - 1)
    bank = PrefixKV.stack([lab.fresh(), lab.fresh()])
    with pytest.raises(ValueError, match=rf"studies\[1\].targets: expected .* got 8 and {longest}"):
        train(lab.model, bank, [Study(targets, (0, -1)), Study(targets, (0, 1))], tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer_ids": []}, r"\[2\].answer_ids: expected at least one token, got none"),
        ({"prompt_ids": []}, r"\[2\].prompt_ids: expected at least one token, got none"),
        ({"prompt_ids": [3, 64]}, r"\[2\].prompt_ids: expected tokens from 0 to 63, got 3 to 64"),
        ({"answer_ids": [-1]}, r"\[2\].answer_ids: expected tokens from 0 to 63, got -1 to -1"),
    ],
)
def test_conversations_are_checked(lab, conversations, targets, changes, words, tmp_path):
    wrong = [*conversations[:2], replace(conversations[2], **changes)]
    with pytest.raises(ValueError, match=f"^conversations{words}"):
        capture(lab.model, lab.document, wrong, 8)
    with pytest.raises(ValueError, match=f"^conversations{words}"):
        compare(lab.model, lab.document, {"start": lab.fresh()}, wrong)
    with pytest.raises(ValueError, match=rf"^studies\[0\].targets.conversations{words}"):
        trained(lab, replace(targets, conversations=wrong), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_are_checked(lab, conversations, size):
    for call in (lambda: capture(lab.model, lab.document, conversations, batch_size=size),
                 lambda: compare(lab.model, lab.document, {}, conversations, batch_size=size)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^batch_size: expected at least 1, got {size}"):
            call()


def test_targets_are_checked(lab, targets, tmp_path):
    wrong = {
        r"ids: expected \[\d+, K\], one row per token": {"ids": targets.ids[:-1]},
        r"log_probs: expected \[\d+, K\], one row": {"log_probs": targets.log_probs[:, :3]},
        "ids: expected tokens from 0 to 63, got": {"ids": targets.ids + 64},
        "log_probs: expected no number above 0, got nan": {"log_probs": targets.log_probs * float("nan")},
    }
    for words, changes in wrong.items():
        with pytest.raises(ValueError, match=rf"^studies\[0\].targets.{words}"):
            trained(lab, replace(targets, **changes), tmp_path / "checkpoint")
