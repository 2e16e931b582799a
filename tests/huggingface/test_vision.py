# SPDX-License-Identifier: Apache-2.0
"""Models that read images: prefixes and prompts give stock numbers with images in the call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from tests.huggingface import models, vision_runs
from tests.huggingface.by_hand import assert_close, notices
from tests.huggingface.models import patch_of
from tests.huggingface.vision_models import VISION, batch_of, ids_of, vision_model
from tests.huggingface.vision_runs import KINDS, by_hand, new_tokens, patched, peft_model, step, values_of

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning", "ignore:.*oken type ids.*:UserWarning")

#: One of each way in which images reach the text.
FAST = [("llava", "prompt"), ("gemma3", "PrefixKV"), ("mllama", "PrefixKV"), *(("qwen3_vl", kind) for kind in KINDS)]

#: PEFT has a prefix for layers of cross-attention, and finds no embedding whose rows are more than vocab_size.
PEFT_CANNOT = [("mllama", "prefix"), ("mllama", "prompt")]

CELLS = [
    pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
    for name in VISION
    for kind in KINDS
    if (name, kind) not in PEFT_CANNOT
]

#: Their mask is not causal, so a prompt stands before every sample, and padding on the left between them.
CONCATENATED = [
    ("gemma3", "SoftPrompt"), ("paligemma", "SoftPrompt"), ("paligemma", "prompt"), ("mllama", "SoftPrompt"),
]  # fmt: skip


def reference_batch(name: str, kind: str, padding: str, **options: Any) -> dict[str, Any]:
    """A batch as the stock model reads it: PEFT leaves out which tokens are those of an image."""
    batch = batch_of(name, padding, **options)
    if kind in ("prefix", "prompt"):
        batch.pop("token_type_ids", None)
    return batch


def assert_same(got: vision_runs.Step, want: vision_runs.Step) -> None:
    assert_close(got.loss, want.loss, "losses")
    assert_close(got.logits, want.logits, "logits")
    assert_close(got.gradient.flatten(), want.gradient.flatten(), "gradients")


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_training_step_with_images(name, kind):
    """Against the stock model with a cache, or embeddings, made by hand."""
    model = patched(name, kind)
    for padding in ("none", "right", "left"):
        if padding == "left" and (name, kind) in CONCATENATED:
            continue
        want = by_hand(name, kind, reference_batch(name, kind, padding), values_of(name, kind))
        assert_same(step(model, batch_of(name, padding)), want)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_generation_with_images(name, kind):
    """Against a forward of the stock model over the whole sequence for each token. Windows count padding."""
    padding = "none" if name in ("gemma3", "aya_vision") and "rompt" in kind else "left"
    mask = {} if padding == "left" else {"attention_mask": torch.ones_like(ids_of(name))}
    own = {**reference_batch(name, kind, padding, labels=False), **mask}
    want = vision_runs.tokens_by_hand(name, kind, own, values_of(name, kind))
    assert torch.equal(new_tokens(patched(name, kind), {**batch_of(name, padding, labels=False), **mask}), want)


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "paligemma", "idefics3"))]
)
def test_prefix_is_that_of_peft(name):
    model = patched(name, "prefix")
    for padding in ("none", "right", "left"):
        batch = batch_of(name, padding)
        assert_same(step(model, batch), step(peft_model(name, "prefix"), batch))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_positions_of_images_are_those_of_peft_on_request(kind):
    """PEFT counts the prefix as tokens, or has no tokens, so positions in three dimensions are not an image's."""
    batch = batch_of("qwen2_vl", "none")
    want = step(peft_model("qwen2_vl", kind), batch)
    assert_same(step(patched("qwen2_vl", kind, peft_bugs=True), batch), want)
    with notices() as found:
        right = step(patched("qwen2_vl", kind), batch)
    assert models.difference(right.logits, want.logits) > 1e-4
    assert any("peft_bugs" in note for note in found)


@pytest.mark.parametrize(
    ("name", "kind"), [("llava", "PrefixKV"), ("qwen3_vl", "SoftPrompt"), ("mistral3", "prompt")]
)
def test_batches_run_packed(name, kind):
    model, batch = patched(name, kind), batch_of(name, "right")
    explanation = peftkern.explain(model)
    assert "without their padding" in explanation
    rows: list[int] = []
    layer = patch_of(model).backbone.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(args[0].shape[1]), with_kwargs=True)
    step(model, batch)
    prompts = models.PREFIX if "rompt" in kind else 0
    assert rows == [int(batch["attention_mask"].sum()) + prompts]


def test_bidirectional_images_run_padded():
    """The tokens of an image see each other, which no packed batch has."""
    model, batch = patched("gemma3", "PrefixKV"), batch_of("gemma3", "right")
    shapes: list[Any] = []
    layer = patch_of(model).backbone.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(args[0].shape[:2]), with_kwargs=True)
    step(model, batch)
    del batch["token_type_ids"]
    step(model, batch)
    assert shapes == [torch.Size(batch["input_ids"].shape), torch.Size([1, int(batch["attention_mask"].sum())])]


def test_rows_with_images_share_no_text():
    """Tokens of two images are equal, the images are not."""
    model = peftkern.patch(vision_model("llava"), share="prefixes")
    batch = batch_of("llava", "none")
    batch["input_ids"] = ids_of("llava")[:1].expand(3, -1).clone()
    want = vision_model("llava")(**batch)
    got = model(**batch)
    assert_close(got.logits, want.logits, "logits")
    assert patch_of(model).shared_rows is None
    assert "other than text" in peftkern.explain(model)


@pytest.mark.parametrize("kind", ["SoftPrompt", "prompt"])
def test_prompts_before_every_sample_keep_the_positions_of_images(kind):
    """A call that cannot be packed computes the same."""
    model, batch = patched("qwen2_vl", kind), batch_of("qwen2_vl", "right")
    want = step(patched("qwen2_vl", kind), batch)
    assert_same(step(model, {**batch, "output_attentions": True}), want)


def test_unpatch_restores_the_model():
    model, batch = vision_model("qwen3_vl"), batch_of("qwen3_vl", "left")
    want = model(**batch).logits
    prefix = vision_runs.module_of("qwen3_vl", "PrefixKV")
    with peftkern.patched(model, prefix):
        model(**batch)
    assert torch.equal(model(**batch).logits, want)


def _documented() -> dict[str, list[str]]:
    """The rows of the table in the documentation, by model."""
    text = (Path(peftkern.__file__).parents[1] / "docs/support.md").read_text()
    table = text.split("<!-- images table -->")[1].split("<!-- end of images table -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_documentation_lists_the_models():
    assert _documented().keys() == VISION.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("qwen3_vl", "mllama") else pytest.mark.slow) for name in VISION]
)
def test_documentation_says_how_batches_run(name):
    for kind, documented in zip(("PrefixKV", "SoftPrompt"), _documented()[name][2:], strict=True):
        assert (_rows_of_a_step(name, kind) == [1]) == (documented == "yes"), f"{kind}: {documented}"


def _rows_of_a_step(name: str, kind: str) -> list[int]:
    """The batch sizes that the first layer of the text sees in a training step."""
    model, rows = patched(name, kind), []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(args[0].shape[0]), with_kwargs=True)
    step(model, batch_of(name, "right"))
    return rows
