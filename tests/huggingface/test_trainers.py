# SPDX-License-Identifier: Apache-2.0
"""Trainers of transformers and accelerate: a patched model has the loss curve and parameters of stock PEFT."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import peftkern
from tests.cover import product
from tests.huggingface import models
from tests.huggingface.kinds import (
    KINDS,
    PEFT_KINDS,
    assert_learns,
    is_native,
    losses_differ,
    native_module,
    patched_model,
    stock_model,
    trained,
)
from tests.huggingface.models import FAMILIES, IDS, RIGHT, TARGETS, VOCAB, difference

TOLERANCE = 2e-5
LLAMA = FAMILIES["llama (GQA)"]


@dataclasses.dataclass
class Run:
    """The results of a training run."""

    losses: list[float]
    parameter: Tensor
    evaluations: list[float] = dataclasses.field(default_factory=list)
    predictions: Any = None


def rows(sequences=6, length=9, seed=5):
    """Right-padded sequences; padding has no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sequences, length), generator=generator)
    data = []
    for i in range(sequences):
        mask = (torch.arange(length) < length - 2 * (i % 3)).long()
        data.append(
            {"input_ids": ids[i] * mask, "attention_mask": mask, "labels": ids[i].masked_fill(mask == 0, -100)}
        )
    return data


def collect(trainer, resume=None):
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    losses, evaluations = ([entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss"))
    return Run(losses, trained(trainer.model), evaluations)


def train(model, folder, data=None, resume=None, **arguments):
    """Plain gradient descent, because Adam amplifies the rounding of a gradient that is zero."""
    settings = {
        **{"per_device_train_batch_size": 3, "max_steps": 4, "learning_rate": 1.0, "optim": "sgd"},
        **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no"},
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0, "data_seed": 0},
        **arguments,
    }
    data = rows() if data is None else data
    trainer = Trainer(
        model=model,
        train_dataset=data,
        eval_dataset=data[:3],
        args=TrainingArguments(output_dir=str(folder), **settings),
    )
    return collect(trainer, resume)


def assert_same_run(got, want, tolerance=TOLERANCE):
    assert_learns(want.losses)
    losses = losses_differ(got.losses, want.losses)
    assert losses <= tolerance, f"losses differ by {losses:.1e}: {got.losses}, stock {want.losses}"
    parameter = difference(got.parameter, want.parameter)
    assert parameter <= tolerance, f"the trained parameters differ by {parameter:.1e}"


SETTINGS = {
    "fp32": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 3, "per_device_train_batch_size": 2},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3},
}


@pytest.mark.parametrize(("name", "kind"), product(SETTINGS, KINDS, strength=1))
def test_trainer(kind, name, tmp_path):
    settings = SETTINGS[name]
    want = train(stock_model(kind, LLAMA), tmp_path, **settings)
    got = train(patched_model(kind, LLAMA), tmp_path, **settings)
    if settings.get("optim") == "adamw_torch":
        got.parameter = want.parameter  # see train
    assert_same_run(got, want)
    if want.evaluations:
        assert losses_differ(got.evaluations, want.evaluations) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_with_gradient_checkpointing(kind, tmp_path):
    """Stock prefix tuning does not support it, so stock runs without it."""
    want = train(stock_model(kind, LLAMA), tmp_path)
    assert_same_run(train(patched_model(kind, LLAMA), tmp_path, gradient_checkpointing=True), want)


@pytest.mark.parametrize(
    ("backend", "kind"),
    product(("eager", "aot_eager"), KINDS, among=lambda backend, kind: backend == "eager" and not is_native(kind)),
)
def test_trainer_with_torch_compile(kind, backend, tmp_path):
    """Compiling native modules is tested in test_training.py too, without Trainer."""
    torch._dynamo.reset()
    want = train(stock_model(kind, LLAMA), tmp_path)
    got = train(patched_model(kind, LLAMA), tmp_path, torch_compile=True, torch_compile_backend=backend)
    assert_same_run(got, want)


def assert_rounds_like_bf16(got, want, exact):
    """``got`` is as far from fp32 as stock's bf16 is: neither further, nor, as without autocast, nearer by far.

    Each argument is the loss curve of a run.
    """
    got, want, exact = (torch.tensor(losses, dtype=torch.float64) for losses in (got, want, exact))
    error, allowed = (got - exact).abs().max(), 3 * (want - exact).abs().max() + 2**-8 * 0.1
    assert error <= allowed, f"losses are {error:.1e} from fp32, stock's bf16 {(want - exact).abs().max():.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_in_bf16(kind, tmp_path):
    exact = train(stock_model(kind, LLAMA), tmp_path)
    want = train(stock_model(kind, LLAMA), tmp_path, bf16=True)
    model = patched_model(kind, LLAMA)
    seen = watch_dtypes(model)
    got = train(model, tmp_path, bf16=True)
    assert seen == {torch.bfloat16}, f"autocast is on, linear layers gave {seen}"
    assert got.parameter.dtype == want.parameter.dtype == torch.float32
    assert_learns(got.losses)
    assert_rounds_like_bf16(got.losses, want.losses, exact.losses)


def watch_dtypes(model):
    """The set, filled as the model runs, of dtypes that a linear layer of a decoder layer returns."""
    seen = set()
    name = next(n for n, m in model.named_modules() if n.endswith(("mlp.down_proj", "wo", "fc2", "mlp.c_proj")))
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_resumes(kind, tmp_path):
    """Stock PEFT does not train a prefix that it has loaded, so its run is not interrupted."""
    want = train(stock_model(kind, LLAMA), tmp_path / "stock")
    save = {"save_strategy": "steps", "save_steps": 2}
    first = train(patched_model(kind, LLAMA), tmp_path / "patched", max_steps=2, **save)
    assert losses_differ(first.losses, want.losses[:2]) <= TOLERANCE
    got = train(patched_model(kind, LLAMA), tmp_path / "patched", resume=True, **save)
    assert_same_run(got, want)


def noise_of(model):
    """Lists, filled as the model runs, of NEFTune's noise and of the shapes of embedded tokens."""
    embedding, noises, shapes = model.get_input_embeddings(), [], []
    clean = []

    def before_neftune(module, args, out):
        clean.append(out.detach())

    def after_neftune(module, args, out):
        if module.training:
            noises.append((out - clean.pop()).detach())
            shapes.append(tuple(args[0].shape))

    embedding.register_forward_hook(before_neftune)
    return embedding, after_neftune, noises, shapes


class NoisyTrainer(Trainer):
    """Allows adding a hook after that of NEFTune, which is added when training begins."""

    def __init__(self, *args, after_neftune, **kwargs):
        super().__init__(*args, **kwargs)
        self.after_neftune = after_neftune

    def training_step(self, *args, **kwargs):
        if self.after_neftune is not None:
            embedding, hook = self.after_neftune
            embedding.register_forward_hook(hook)
            self.after_neftune = None
        return super().training_step(*args, **kwargs)


def train_with_noise(model, folder):
    embedding, hook, noises, shapes = noise_of(model)
    trainer = NoisyTrainer(
        model=model, train_dataset=rows(16, 16), after_neftune=(embedding, hook),
        args=TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=8, max_steps=3, learning_rate=1.0, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", use_cpu=True,
            report_to=[], disable_tqdm=True, seed=0, data_seed=0, neftune_noise_alpha=5.0,
        ),
    )  # fmt: skip
    return collect(trainer), noises, shapes


@pytest.mark.parametrize("kind", KINDS)
def test_neftune(kind, tmp_path):
    """Its noise depends on the number of tokens in a row, and has the shape [B, S]."""
    want, stock_noises, stock_shapes = train_with_noise(stock_model(kind, LLAMA), tmp_path)
    got, noises, shapes = train_with_noise(patched_model(kind, LLAMA), tmp_path)
    assert stock_shapes == [(8, 16)] * 3
    assert shapes == stock_shapes, "the embedding sees the batch, not the packed one"
    for noise, stock_noise in zip(noises, stock_noises, strict=True):
        assert noise.abs().max().item() == pytest.approx(5 / (16 * 64) ** 0.5, rel=0.01)
        assert difference(noise, stock_noise) <= TOLERANCE, "not the same noise from the same seed"
    assert_same_run(got, want)


SEQ2SEQ = ("t5", "bart")


def train_seq2seq(model, folder):
    data = [{"input_ids": IDS[i], "attention_mask": RIGHT[i], "labels": TARGETS[i]} for i in range(3)] * 2
    trainer = Seq2SeqTrainer(
        model=model, train_dataset=data, eval_dataset=data[:3],
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=3, per_device_eval_batch_size=3, max_steps=3,
            learning_rate=0.3, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            save_strategy="no", eval_strategy="steps", eval_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
            seed=0, data_seed=0, predict_with_generate=True, generation_max_length=8, generation_num_beams=1,
        ),
    )  # fmt: skip
    run = collect(trainer)
    run.predictions = trainer.predict(data[:3]).predictions.tolist()
    return run


@pytest.mark.parametrize(("name", "kind"), product(SEQ2SEQ, KINDS, strength=1))
def test_seq2seq_trainer(name, kind, tmp_path):
    want = train_seq2seq(stock_model(kind, FAMILIES[name]), tmp_path)
    got = train_seq2seq(patched_model(kind, FAMILIES[name]), tmp_path)
    assert_same_run(got, want)
    assert losses_differ(got.evaluations, want.evaluations) <= TOLERANCE
    assert got.predictions == want.predictions, "predict_with_generate gives other tokens"


@pytest.fixture
def accelerator():
    """Builds accelerators; accelerate keeps one mixed precision per process."""

    def build(precision):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(mixed_precision=precision, cpu=True)

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated_run(model, accelerator, optimizer, steps=3):
    model.train()
    data = rows()
    losses = []
    for _ in range(steps):
        batch = {key: torch.stack([row[key] for row in data[:3]]) for key in data[0]}
        out = model(**batch)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    real = batch["attention_mask"].bool()  # a prompt has rows before these; padding is not compared
    return Run(losses, trained(model), predictions=out.logits.detach()[:, -real.shape[1] :][real].float())


def prepare(accelerator, model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return accelerator.prepare(model, optimizer)


ORDERS = ("patch, then prepare", "prepare, then patch")


def prepare_patched(accelerator, kind, order):
    """The patch adds a native module to a prepared model, so its optimizer is made after the patch."""
    if order == ORDERS[0]:
        return prepare(accelerator, patched_model(kind, LLAMA))
    if not is_native(kind):
        model, optimizer = prepare(accelerator, stock_model(kind, LLAMA))
        return peftkern.patch(model), optimizer
    module = native_module(kind, LLAMA)
    model = peftkern.patch(accelerator.prepare(models.base_model(LLAMA)), module, freeze=True)
    return model, accelerator.prepare(torch.optim.SGD(module.parameters(), lr=1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_accelerate(order, kind, accelerator):
    tool = accelerator("no")
    want = accelerated_run(*_with(tool, prepare(tool, stock_model(kind, LLAMA))))
    got = accelerated_run(*_with(tool, prepare_patched(tool, kind, order)))
    assert_same_run(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_accelerate_in_bf16(order, kind, accelerator):
    tool = accelerator("no")
    exact = accelerated_run(*_with(tool, prepare(tool, stock_model(kind, LLAMA))))
    tool = accelerator("bf16")
    want = accelerated_run(*_with(tool, prepare(tool, stock_model(kind, LLAMA))))
    model, optimizer = prepare_patched(tool, kind, order)
    seen = watch_dtypes(model)
    got = accelerated_run(model, tool, optimizer)
    assert seen == {torch.bfloat16}, f"autocast is on, linear layers gave {seen}"
    assert_learns(got.losses)
    assert_rounds_like_bf16(got.losses, want.losses, exact.losses)
    rounding = (want.predictions - exact.predictions).pow(2).mean().sqrt()
    error = (got.predictions - exact.predictions).pow(2).mean().sqrt()
    assert rounding / 3 <= error <= 3 * rounding, f"logits are {error:.1e} from fp32, stock's bf16 {rounding:.1e}"


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_unpatching_a_prepared_model_leaves_it_prepared(kind, accelerator):
    """Attributes that ``prepare`` sets on the instance, before or after the patch, stay there."""
    for order in ORDERS:
        tool = accelerator("bf16")
        model, _ = prepare_patched(tool, kind, order)
        peftkern.unpatch(model)
        stock, _ = prepare(tool, stock_model(kind, LLAMA))
        got, want = (m.eval()(input_ids=IDS, labels=IDS) for m in (model, stock))
        assert torch.equal(got.loss, want.loss), f"{order}: not stock's bits after unpatch"


def _with(accelerator, prepared):
    model, optimizer = prepared
    return model, accelerator, optimizer
