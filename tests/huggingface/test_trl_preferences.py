# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on preferences and rewards: DPO, KTO, GRPO and Reward; patched models train like stock PEFT's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf

pytest.importorskip("trl")
pytest.importorskip("datasets")

from peft import PromptTuningConfig

import peftkern
from tests.huggingface import models
from tests.huggingface.kinds import KINDS, PEFT_KINDS, is_native, losses_differ, patched_model, stock_model
from tests.huggingface.models import PREFIX, difference
from tests.huggingface.trl_runs import (
    CASES,
    LLAMA,
    ORDERS,
    TOLERANCE,
    assert_same_run,
    data,
    make_trainer,
    patched_run,
    run,
    train,
)

slow = pytest.mark.slow


def with_reference(kind):
    """Arguments of a trainer. For a PEFT model, TRL's reference is an adapter; for others, a second model."""
    return {"more": {"ref_model": patched_model(kind, LLAMA)}} if is_native(kind) else {}


DPO_METRICS = ("rewards/margins", "logps/chosen", "logits/rejected", "mean_token_accuracy", "entropy")
KTO_METRICS = ("kl", "logps/chosen", "logits/rejected")


@pytest.mark.parametrize(
    ("kind", "order"), [pytest.param(*case, marks=[] if case == ("prompt", ORDERS[0]) else slow) for case in CASES]
)
def test_dpo(kind, order, tmp_path):
    want = run("DPO", stock_model(kind, LLAMA), data("preference"), tmp_path)
    got = patched_run("DPO", kind, order, data("preference"), tmp_path, **with_reference(kind))
    assert_same_run(got, want, DPO_METRICS)


@slow
@pytest.mark.parametrize(
    "settings", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"loss_type": ["sigmoid", "sft"]}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_dpo_of_other_settings(kind, settings, tmp_path):
    want = run("DPO", stock_model(kind, LLAMA), data("preference"), tmp_path, **settings)
    got = run("DPO", patched_model(kind, LLAMA), data("preference"), tmp_path, **settings, **with_reference(kind))
    assert_same_run(got, want, DPO_METRICS)


@slow
def test_dpo_whose_reference_is_the_model_without_its_adapter(tmp_path):
    """TRL makes the PEFT model and computes the reference in ``disable_adapter()``; the patch follows."""
    runs = []
    for patch in (False, True):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
        trainer = make_trainer(
            "DPO", models.base_model(LLAMA), data("preference"), tmp_path, more={"peft_config": config}
        )
        if patch:
            peftkern.patch(trainer.model)
        runs.append(train(trainer))
    assert_same_run(runs[1], runs[0], DPO_METRICS)


@slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_preferences_as_trl_has_them_by_default(name, kind, tmp_path):
    """In bf16, with gradient checkpointing, which stock prefix tuning cannot."""
    rows = data("preference" if name == "DPO" else "unpaired")
    exact = run(name, stock_model(kind, LLAMA), rows, tmp_path)
    want = run(name, stock_model(kind, LLAMA), rows, tmp_path, bf16=None)
    model = patched_model(kind, LLAMA)
    got = run(name, model, rows, tmp_path, bf16=None, gradient_checkpointing=True, **with_reference(kind))
    rounding = losses_differ(want.losses, exact.losses)
    assert losses_differ(got.losses, exact.losses) <= 3 * rounding + 2**-8, "further from fp32 than stock"


@slow
@pytest.mark.parametrize(("kind", "order"), CASES)
def test_kto(kind, order, tmp_path):
    want = run("KTO", stock_model(kind, LLAMA), data("unpaired"), tmp_path)
    got = patched_run("KTO", kind, order, data("unpaired"), tmp_path, **with_reference(kind))
    assert_same_run(got, want, KTO_METRICS)


def reward_words(completions, **_):
    """The number of tokens of a completion that are in the first half of the vocabulary."""
    return [sum(int(word[1:]) < 45 for word in text.split() if word[0] == "w") / 8 for text in completions]


GRPO = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 2}
GRPO_METRICS = ("reward", "reward_std", "entropy", "completions/mean_length")


def grpo_arguments(**settings):
    return {"more": {"reward_funcs": reward_words}, **GRPO, **settings}


def assert_same_grpo(got, want, metrics=GRPO_METRICS):
    """In the first pass over completions the loss is always zero, so parameters are compared."""
    for metric in metrics:  # a second pass over the same completions logs no rewards
        mine, theirs = ([log[metric] for log in r.logs if metric in log] for r in (got, want))
        assert theirs, f"TRL logs no {metric}"
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), f"{metric}: {mine}, wanted {theirs}"
    assert max(log["grad_norm"] for log in want.logs) > 1e-3, "nothing was learned"
    mine, theirs = ([log["grad_norm"] for log in r.logs] for r in (got, want))
    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert difference(got.parameter, want.parameter) <= 5 * TOLERANCE


@slow
@pytest.mark.parametrize(("kind", "order"), CASES)
def test_grpo(kind, order, tmp_path):
    """The same completions are drawn from the same seed in train mode, and used for training."""
    want = run("GRPO", stock_model(kind, LLAMA), data("equal prompts"), tmp_path, **grpo_arguments())
    got = patched_run("GRPO", kind, order, data("equal prompts"), tmp_path, **grpo_arguments())
    assert_same_grpo(got, want)


@slow
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_grpo_with_a_reference(kind, tmp_path):
    """It is another adapter of the PEFT model. The second pass over the completions has a loss."""
    settings = grpo_arguments(beta=0.1, num_iterations=2, max_steps=3)
    want = run("GRPO", stock_model(kind, LLAMA), data("equal prompts"), tmp_path, **settings)
    got = run("GRPO", patched_model(kind, LLAMA), data("equal prompts"), tmp_path, **settings)
    assert_same_grpo(got, want, (*GRPO_METRICS, "kl"))


@slow
@pytest.mark.parametrize("kind", ["prefix", "native prefix", "prompt"])
def test_grpo_with_prompts_of_different_lengths(kind, tmp_path):
    """They are padded on the left; stock PEFT puts the prompt before the padding."""
    options = {"peft_bugs": True} if kind == "prompt" else {}
    settings = grpo_arguments(per_device_train_batch_size=4, num_generations=2)
    want = run("GRPO", stock_model(kind, LLAMA), data("prompts"), tmp_path, **settings)
    got = run("GRPO", patched_model(kind, LLAMA, **options), data("prompts"), tmp_path, **settings)
    assert_same_grpo(got, want)


CLASSIFIER = dataclasses.replace(
    LLAMA, model=hf.LlamaForSequenceClassification, task="SEQ_CLS", arguments={**LLAMA.arguments, "num_labels": 1}
)
REWARD_METRICS = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")


def frozen_score(model):
    """PEFT also trains the classifier's layer; here only the prefix is trained."""
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(False)
    return model


@slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward(checkpointing, kind, tmp_path):
    """With texts of equal length, because stock PEFT pools the last column after a prompt, even if it is padding."""
    rows = data("preference" if kind.endswith("prefix") else "equal preference")
    want = run("Reward", frozen_score(stock_model(kind, CLASSIFIER)), rows, tmp_path)
    model = frozen_score(patched_model(kind, CLASSIFIER))
    got = run("Reward", model, rows, tmp_path, gradient_checkpointing=checkpointing)
    assert_same_run(got, want, REWARD_METRICS)


@slow
def test_reward_as_stock_peft_pools_it(tmp_path):
    want = run("Reward", frozen_score(stock_model("prompt", CLASSIFIER)), data("preference"), tmp_path)
    model = frozen_score(patched_model("prompt", CLASSIFIER, peft_bugs=True))
    assert_same_run(run("Reward", model, data("preference"), tmp_path), want, REWARD_METRICS)


def distillation_trainer(model, folder):
    torch.manual_seed(8)
    teacher = LLAMA.model(LLAMA.config(**LLAMA.arguments))
    settings = {"per_device_train_batch_size": 2, "max_completion_length": 5, "max_steps": 2}
    return make_trainer(
        "Distillation", model, data("equal prompts"), folder, more={"teacher_model": teacher}, **settings
    )  # fmt: skip


@slow
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_distillation_refuses_prompt_learning_patched_or_not(kind, tmp_path):
    for model in (stock_model(kind, LLAMA), patched_model(kind, LLAMA)):
        with pytest.raises(ValueError, match="Prompt-learning PEFT methods"):
            distillation_trainer(model, tmp_path)


@slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if is_native(kind)])
def test_distillation_into_a_native_module(kind, tmp_path):
    """It calls the backbone alone, whose hidden states equal those of stock PEFT with its prefix or prompt."""
    trainer = distillation_trainer(patched_model(kind, LLAMA), tmp_path)
    calls = []
    compute = trainer._get_last_hidden_state

    def note(model, ids, mask, keep, **inputs):
        hidden = compute(model, ids, mask, keep, **inputs)
        if model is trainer.model:
            calls.append((ids, mask, hidden.detach()))
        return hidden

    trainer._get_last_hidden_state = note
    if kind == "native prompt":  # its hooks are on the model, which this trainer bypasses
        with pytest.raises(ValueError, match="model: expected a call of LlamaForCausalLM"):
            train(trainer)
        return
    result = train(trainer)
    ids, mask, hidden = calls[0]
    stock = stock_model(kind, LLAMA).eval()
    with torch.no_grad():
        want = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    completion = hidden.shape[1]
    real = mask[:, -completion - 1 : -1].bool()
    assert difference(hidden[real], want[:, -completion - 1 : -1][real]) <= TOLERANCE
    assert result.losses[0] > 0
    assert all(log["grad_norm"] > 0 for log in result.logs)
