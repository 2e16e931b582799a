# SPDX-License-Identifier: Apache-2.0
"""What the teacher predicts, and its file."""

from __future__ import annotations

import pytest
import torch

from peftkern.self_study import Chat, capture

from .lab import TEXT, new_model, other_weights


def test_targets_are_the_predictions_of_the_model_that_reads_the_text(lab, conversations, targets):
    """The reference runs the document's tokens in front of every conversation."""
    plain, ids = new_model(), Chat(lab.tokenizer).document(TEXT)
    row = 0
    for conversation in conversations:
        text = torch.tensor([[*ids, *conversation.prompt_ids, *conversation.answer_ids]])
        with torch.no_grad():
            log_probs = plain(text).logits[0].log_softmax(-1)[-len(conversation.answer_ids) - 1 : -1]
        rows = slice(row, row + len(conversation.answer_ids))
        want = log_probs.topk(8)
        torch.testing.assert_close(targets.log_probs[rows], want.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(targets.ids[rows].long(), want.indices)
        row = rows.stop
    assert row == len(targets.ids)


def test_targets_are_read_again_or_refused(lab, conversations, targets, tmp_path):
    path = tmp_path / "targets.safetensors"
    for _ in range(2):
        found = capture(lab.model, lab.document, conversations, 8, path)
        assert torch.equal(found.ids, targets.ids)
        assert torch.equal(found.log_probs, targets.log_probs)
    with pytest.raises(ValueError, match="path: expected targets made with the same k, got"):
        capture(lab.model, lab.document, conversations, 5, path)
    with pytest.raises(ValueError, match="same conversations, got"):
        capture(lab.model, lab.document, conversations[:3], 8, path)
    with pytest.raises(ValueError, match="same model, got"):
        capture(other_weights(lab.model), lab.document, conversations, 8, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="path: expected targets in"):
        capture(lab.model, lab.document, conversations, 8, path)
    with pytest.raises(ValueError, match="conversations: expected at least one"):
        capture(lab.model, lab.document, [], 8)
