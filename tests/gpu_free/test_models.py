# SPDX-License-Identifier: Apache-2.0
"""Whole models, patched, on the Triton-based backends in the interpreter, against stock PEFT."""

from __future__ import annotations

import pytest

import peftkern

from ..huggingface import models
from ..huggingface.models import FP32_TOLERANCE

pytestmark = pytest.mark.interpreter
FAMILIES = ["llama (GQA)", "mistral (window 4)", "gpt-oss (sinks)", "bert", "t5"]


@pytest.mark.parametrize(
    "name", [n if n == "llama (GQA)" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
@pytest.mark.parametrize("backend", ["triton", "merge", "concat"])
def test_loss_and_all_gradients_are_those_of_peft(backend, name):
    """Prefix and base model trained, left padding and none."""
    family = models.FAMILIES[name]
    stock, patched = (models.peft_model(family, patched=p).requires_grad_() for p in (False, True))
    for mask in (None, models.LEFT):
        want = models.training_step(stock, family.task, mask)
        with peftkern.use_backend(backend):
            got = models.training_step(patched, family.task, mask)
        output, gradients = models.step_difference(got, want, mask if family.generates else None)
        assert abs(got.loss - want.loss) <= FP32_TOLERANCE * abs(want.loss)
        assert output <= FP32_TOLERANCE, f"outputs differ by {output:.1e}"
        assert gradients <= FP32_TOLERANCE, f"gradients differ by {gradients:.1e}"
