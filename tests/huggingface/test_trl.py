# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer on patched models: the losses, metrics and parameters of the stock PEFT model.

Its fused output layer (``add_fused_lm_head``) replaces the base model's ``forward``, runs the backbone alone and
returns log-probabilities without logits.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import peftkern
from tests.huggingface.kinds import KINDS, PEFT_KINDS, losses_differ, patched_model, stock_model
from tests.huggingface.models import PREFIX, difference
from tests.huggingface.trl_runs import (
    CASES,
    LLAMA,
    TOLERANCE,
    assert_same_run,
    data,
    make_trainer,
    patched_run,
    run,
    train,
)

METRICS = ("entropy", "mean_token_accuracy", "num_tokens")
slow = pytest.mark.slow


class Separate:
    """A collator that pads documents that TRL would pack into one row; as there, none predicts its first token."""

    def __init__(self):
        self.collate = DataCollatorForLanguageModeling(pad_token_id=0)

    def __call__(self, examples):
        documents = []
        for example in examples:
            lengths = example.get("seq_lengths", [len(example["input_ids"])])
            columns = [torch.tensor(example[name]).split(lengths) for name in ("input_ids", "labels")]
            documents += [
                {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in zip(*columns, strict=True)
            ]
        batch = self.collate(documents)
        batch["labels"][:, 0] = -100
        return batch


def separate_run(kind, rows, folder, **settings):
    """Stock PEFT with the batches of ``settings``, each document in its own row."""
    model = stock_model(kind, LLAMA)
    trainer = make_trainer("SFT", model, rows, folder, **settings)
    trainer.data_collator = Separate()
    return train(trainer)


@pytest.mark.parametrize(
    ("kind", "order"), [pytest.param(*case, marks=[] if case in CASES[:4] else slow) for case in CASES]
)
def test_sft(kind, order, tmp_path):
    want = run("SFT", stock_model(kind, LLAMA), data("text"), tmp_path)
    got = patched_run("SFT", kind, order, data("text"), tmp_path)
    assert_same_run(got, want, METRICS)


@slow
@pytest.mark.parametrize(("kind", "order"), CASES)
def test_sft_on_completions_alone(kind, order, tmp_path):
    want = run("SFT", stock_model(kind, LLAMA), data("completion"), tmp_path, completion_only_loss=True)
    got = patched_run("SFT", kind, order, data("completion"), tmp_path, completion_only_loss=True)
    assert_same_run(got, want, METRICS)


@slow
@pytest.mark.parametrize(("kind", "order"), CASES)
def test_sft_on_the_assistants_turns_alone(kind, order, tmp_path):
    want = run("SFT", stock_model(kind, LLAMA), data("chat"), tmp_path, assistant_only_loss=True)
    got = patched_run("SFT", kind, order, data("chat"), tmp_path, assistant_only_loss=True)
    assert_same_run(got, want, METRICS)


PACKINGS = {
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 20, "per_device_train_batch_size": 1},
    "packing, two rows": {"packing": True, "max_length": 20, "per_device_train_batch_size": 2},
}


@slow
@pytest.mark.parametrize(("kind", "order"), CASES)
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_with_documents_in_one_row(name, kind, order, tmp_path):
    """Each document has its own prefix; for stock PEFT see test_stock_documents_see_each_other."""
    want = separate_run(kind, data("text"), tmp_path, **PACKINGS[name])
    got = patched_run("SFT", kind, order, data("text"), tmp_path, **PACKINGS[name])
    assert_same_run(got, want)


@slow
@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stock_documents_see_each_other(kind, tmp_path):
    """Stock PEFT is no reference for packed rows: its loss is not that of the documents."""
    packed = run("SFT", stock_model(kind, LLAMA), data("text"), tmp_path, **PACKINGS["padding_free"])
    apart = separate_run(kind, data("text"), tmp_path, **PACKINGS["padding_free"])
    assert losses_differ(packed.losses, apart.losses) > 10 * TOLERANCE


@slow
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_with_documents_in_one_row_as_stock_peft_has_them(name, tmp_path):
    want = run("SFT", stock_model("prompt", LLAMA), data("text"), tmp_path, **PACKINGS[name])
    model = patched_model("prompt", LLAMA, peft_bugs=True)
    assert_same_run(run("SFT", model, data("text"), tmp_path, **PACKINGS[name]), want, METRICS)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_sft_with_gradient_checkpointing(kind, tmp_path):
    """TRL's default. Stock prefix tuning does not support it, so stock runs without it."""
    want = run("SFT", stock_model(kind, LLAMA), data("text"), tmp_path)
    got = run("SFT", patched_model(kind, LLAMA), data("text"), tmp_path, gradient_checkpointing=True)
    assert_same_run(got, want)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_sft_as_trl_has_it_by_default(kind, tmp_path):
    """In bf16, with gradient checkpointing and AdamW."""
    defaults = {"bf16": None, "optim": "adamw_torch", "learning_rate": 1e-2}
    exact = run("SFT", stock_model(kind, LLAMA), data("text"), tmp_path, **{**defaults, "bf16": False})
    want = run("SFT", stock_model(kind, LLAMA), data("text"), tmp_path, **defaults)
    got = run(
        "SFT", patched_model(kind, LLAMA), data("text"), tmp_path, gradient_checkpointing=True, **defaults
    )  # fmt: skip
    rounding = losses_differ(want.losses, exact.losses)
    assert 0 < losses_differ(got.losses, exact.losses) <= 3 * rounding + 2**-8 * 0.02, "further from fp32 than stock"


@slow
@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sft_of_other_settings(kind, settings, tmp_path):
    """On completions, whose first token has no label."""
    want = run("SFT", stock_model(kind, LLAMA), data("completion"), tmp_path, **settings)
    assert_same_run(run("SFT", patched_model(kind, LLAMA), data("completion"), tmp_path, **settings), want, METRICS)


def batch_of(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert not batch["attention_mask"].all(), "a batch with padding"
    return batch


def trainer_of(model, folder, rows="completion", **settings):
    return make_trainer("SFT", model, data(rows), folder, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_output_layer(kind, tmp_path):
    """``fused_lm_head=True`` in a call: every field that TRL requests, and the gradient."""
    stock, patched = (trainer_of(m, tmp_path) for m in (stock_model(kind, LLAMA), patched_model(kind, LLAMA)))
    batch = batch_of(stock)
    want, got = (t.model.train()(**batch, fused_lm_head=True) for t in (stock, patched))
    assert not hasattr(got, "logits"), "TRL's output has no logits"
    assert set(got) == set(want)
    length = batch["labels"].shape[1]
    assert got.log_probs.shape == want.log_probs.shape
    for field in ("log_probs", "entropy", "is_top1", "label_mask"):
        mine, theirs = (getattr(out, field)[:, 1 - length :].float() for out in (got, want))
        assert difference(mine, theirs) <= TOLERANCE, f"{field} differs by {difference(mine, theirs):.1e}"
    assert difference(got.loss, want.loss) <= TOLERANCE
    gradients = []
    for trainer, out in ((patched, got), (stock, want)):
        out.loss.backward()
        gradients.append(next(p.grad for p in trainer.model.parameters() if p.requires_grad))
    assert difference(*gradients) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("explicit", [False, True], ids=["default", "fused_lm_head=False"])
def test_the_output_layer_of_a_model_that_has_a_fused_one(explicit, kind, tmp_path):
    stock, patched = (trainer_of(m, tmp_path) for m in (stock_model(kind, LLAMA), patched_model(kind, LLAMA)))
    batch = batch_of(stock)
    flag = {"fused_lm_head": False} if explicit else {}
    want, got = (t.model.train()(**batch, **flag) for t in (stock, patched))
    assert difference(got.loss, want.loss) <= TOLERANCE
    real = batch["attention_mask"].bool()
    mine, theirs = (out.logits[:, -real.shape[1] :][real] for out in (got, want))
    assert difference(mine, theirs) <= TOLERANCE


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_sft_evaluates_with_logits(kind, tmp_path):
    """With metrics of the user, TRL runs the model again without labels."""
    stock, patched = (trainer_of(m, tmp_path) for m in (stock_model(kind, LLAMA), patched_model(kind, LLAMA)))
    batch = batch_of(stock)
    real = batch["attention_mask"].bool()
    outputs = []
    for trainer in (patched, stock):
        trainer.model.eval()
        loss, logits, _ = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
        outputs.append((loss, logits[:, -real.shape[1] :][real]))
    (loss, logits), (stock_loss, stock_logits) = outputs
    assert difference(loss, stock_loss) <= TOLERANCE
    assert difference(logits, stock_logits) <= TOLERANCE


@slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_with_label_smoothing(kind, tmp_path):
    """It computes the loss from logits. Stock PEFT's logits include the prompt, but TRL's labels do not."""
    smooth = {"label_smoothing_factor": 0.1}
    patched = trainer_of(patched_model(kind, LLAMA), tmp_path, **smooth)
    if kind == "prompt":
        trainers = patched, trainer_of(stock_model(kind, LLAMA), tmp_path, **smooth)
        for trainer in trainers:
            with pytest.raises(RuntimeError, match="must match the size of tensor"):
                train(trainer)
        return
    batch = batch_of(patched)
    stock = stock_model(kind, LLAMA).train()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = stock(**inputs).logits[:, -batch["labels"].shape[1] :]
    want = LabelSmoother(epsilon=0.1)({"logits": logits}, batch["labels"], shift_labels=True)
    patched.model.train()
    got = patched.compute_loss(patched.model, dict(batch))
    assert difference(got, want) <= TOLERANCE
    want.backward()
    got.backward()
    gradients = [
        next(p.grad for p in model.parameters() if p.requires_grad)[:PREFIX] for model in (patched.model, stock)
    ]
    assert difference(*gradients) <= TOLERANCE
    assert len(train(patched).losses) == 3


@slow
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_unpatching_leaves_the_fused_output_layer(kind, tmp_path):
    stock, patched = (trainer_of(m, tmp_path) for m in (stock_model(kind, LLAMA), patched_model(kind, LLAMA)))
    peftkern.unpatch(patched.model)
    batch = batch_of(stock)
    want, got = (t.model.train()(**batch, fused_lm_head=True) for t in (stock, patched))
    assert torch.equal(got.log_probs, want.log_probs)
