# SPDX-License-Identifier: Apache-2.0
"""Models that a sweep over all families has found: a loss of the whole batch, and attention that asks for a mask."""

from __future__ import annotations

import pytest
import torch

import peftkern
from tests.huggingface.families import runs, tiny
from tests.huggingface.models import LEFT


def test_a_loss_of_the_whole_batch_predicts_first_tokens_from_the_prompt():
    """With padding on the left, the place before a first token is padding, which shows the prompt's last row."""
    stock = runs.peft_model("video_llama_3", "prompt", torch.float32, stock=True)
    want = runs.step_alone(stock, LEFT)
    model = runs.peft_model("video_llama_3", "prompt", torch.float32, stock=False)
    peftkern.patch(model)
    assert "the prompt runs once" in peftkern.explain(model)
    got = runs.step(model, model.prompt_encoder, LEFT)
    torch.testing.assert_close(got.loss, want.loss)
    for name, gradient in want.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_attention_in_both_directions_without_a_mask_shares_no_text():
    with pytest.raises(ValueError, match="with shared text and no mask differs from the stock model"):
        peftkern.patch(tiny.tiny_model("paligemma"), share="prefixes")
