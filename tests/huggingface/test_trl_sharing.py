# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPO, DPO and Reward trainers on models whose rows share text: the losses and parameters of the stock model.

The rows of a batch begin with the same prompt here as in practice: GRPO draws several completions of one prompt, and
DPO and Reward put the chosen and the rejected completion of a prompt into one batch.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
from peft import LoraConfig, get_peft_model

import peftkern
from peftkern.huggingface.share_patch import SharePatch
from tests.huggingface import models
from tests.huggingface.kinds import losses_differ
from tests.huggingface.models import FAMILIES
from tests.huggingface.test_trl_preferences import CLASSIFIER, reward_words
from tests.huggingface.trl_runs import LLAMA, make_trainer, words

slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

STEPS, TOLERANCE = 20, 1e-5
#: Small enough that training does not amplify rounding.
RATES = {"GRPO": 0.05, "DPO": 0.05, "Reward": 0.02}
GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
REFERENCE = {"beta": 0.1, "num_iterations": 2}


def data(name: str) -> datasets.Dataset:
    """Six samples with prompts of 30 to 34 tokens."""
    rows: list[dict[str, str]] = [{"prompt": words(i, 30 + i % 5)} for i in range(6)]
    for i, row in enumerate(rows if name != "GRPO" else []):
        row |= {"chosen": " " + words(i + 20, 4 + i % 3), "rejected": " " + words(i + 40, 5 + i % 2)}
    return datasets.Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """(whether it trains, the rows that it would have run and those that it ran) of calls that start sequences."""
    calls: list[tuple[bool, tuple[int, int] | None]] = []
    pack_call = SharePatch.pack_call

    def note(self, kwargs, numbers):
        self.sharer.rows, starts = None, kwargs["input_ids"].shape[1] > 1
        packed = pack_call(self, kwargs, numbers)
        if starts:
            calls.append((torch.is_grad_enabled(), self.shared_rows))
        return packed

    monkeypatch.setattr(SharePatch, "pack_call", note)
    return calls


def count_shared(calls, most=0.6):
    """{whether it trains: number of calls}; each has shared text."""
    for _, rows in calls:
        assert rows is not None, "a call shared nothing"
        assert rows[1] <= most * rows[0], f"a call ran {rows[1]} rows instead of {rows[0]}"
    return dict(collections.Counter(trains for trains, _ in calls))


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        trainer: GRPO, DPO or Reward.
        lora: train a LoRA adapter that the trainer adds; otherwise all parameters.
        given: what the trainer gets: a ``"model"``, a ``"PEFT model"`` with LoRA, or the ``"name"`` of a model.
        patch: the model ``"before"`` or ``"after"`` the trainer is made; ``"both"`` patches its reference too.
        settings: of the trainer.
    """

    trainer: str
    lora: bool = False
    given: str = "model"
    patch: str = "before"
    family: models.Family = LLAMA
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """The results of a training run."""

    logs: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]
    completions: list[list[str]]

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.logs if "loss" in log]


def make(case: Case, folder: Any, share: bool, drawn: list[list[str]]) -> Any:
    """The trainer of a case."""

    def reward(completions, **others):
        drawn.append(completions)
        return reward_words(completions, **others)

    family = CLASSIFIER if case.trainer == "Reward" else case.family
    more: dict[str, Any] = {"reward_funcs": reward} if case.trainer == "GRPO" else {}
    config = LoraConfig(
        task_type=family.task, r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False
    )
    models.base_model(family).save_pretrained(folder / "model")
    torch.manual_seed(7)  # LoRA's weights
    model: Any = family.model.from_pretrained(folder / "model")
    if case.given == "PEFT model":
        model = get_peft_model(model, config)
    elif case.lora:
        more["peft_config"] = config
    settings = {"max_steps": STEPS, "learning_rate": RATES[case.trainer], **case.settings}
    if settings.get("eval_strategy"):
        more["eval_dataset"] = data(case.trainer)
    if case.given == "name":
        model, settings["model_init_kwargs"] = str(folder / "model"), {"dtype": "float32"}
    elif share and case.patch != "after":
        peftkern.patch(model, share="prefixes")
    trainer = make_trainer(case.trainer, model, data(case.trainer), folder, more=more, **settings)
    if share and case.patch == "after":
        peftkern.patch(trainer.model, share="prefixes")
    if share and case.patch == "both":
        peftkern.patch(trainer.ref_model, share="prefixes")
    return trainer


def run(case: Case, folder: Any, *, share: bool, **settings: Any) -> Run:
    completions: list[list[str]] = []
    case = dataclasses.replace(case, settings={**case.settings, **settings})
    trainer = make(case, folder, share, completions)
    before = trained(trainer.model)
    trainer.train()
    parameters = trained(trainer.model)
    assert any(not torch.equal(parameters[name], x) for name, x in before.items()), "nothing was learned"
    logs = [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log]
    return Run(logs, parameters, completions)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


#: Logs that are no results, or that count equal numbers as different ones where the reference is the model.
NO_RESULTS = ("time", "per_second", "accuracies")


def assert_same(got: Run, want: Run) -> None:
    """Completions, all logs and all parameters are equal, up to rounding."""
    assert got.completions == want.completions
    assert len(set(want.losses)) > STEPS // 4, f"the losses are {want.losses}"
    for mine, theirs in zip(got.logs, want.logs, strict=True):
        results = {name: x for name, x in theirs.items() if not any(part in name for part in NO_RESULTS)}
        for name, x in results.items():
            tolerance = TOLERANCE if "loss" in name else 10 * TOLERANCE
            assert mine[name] == pytest.approx(x, rel=tolerance, abs=tolerance), f"{name}: {mine[name]}, wanted {x}"
    assert got.parameters.keys() == want.parameters.keys()
    for name, parameter in want.parameters.items():
        # a bias of keys has no gradient, so it stays what it is except for rounding
        error = (got.parameters[name] - parameter).norm() / parameter.norm().clamp(min=1e-2)
        assert error <= TOLERANCE, f"{name} differs by {error:.1e}"


TWO_PROMPTS = {**GROUPS, "per_device_train_batch_size": 8}
#: Of experts, TRL requests the router logits for their auxiliary loss.
EXPERTS = FAMILIES["gpt-oss (sinks)"]
WINDOWED = FAMILIES["mistral (window 4)"]
EVALUATES = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 4}

#: By name: (a case, its calls that train, its other calls that start sequences, whether it is a slow test).
CASES: dict[str, tuple[Case, int, int, bool]] = {
    "DPO": (Case("DPO", patch="both"), 20, 20, False),
    "DPO, LoRA": (Case("DPO", lora=True), 20, 20, True),
    "DPO, LoRA, patched after": (Case("DPO", lora=True, patch="after"), 20, 20, True),
    "DPO of a PEFT model": (Case("DPO", given="PEFT model"), 20, 20, True),
    "DPO by name": (Case("DPO", given="name", patch="after"), 20, 0, True),
    "DPO, reference not patched": (Case("DPO"), 20, 0, True),
    "DPO, reference computed before": (Case("DPO", settings={"precompute_ref_log_probs": True}), 20, 2, True),
    "DPO, checkpointing": (Case("DPO", lora=True, settings={"gradient_checkpointing": True}), 20, 20, True),
    "DPO with evaluation": (Case("DPO", lora=True, settings=EVALUATES), 20, 20 + 2 * 2 * 2, True),
    "GRPO": (Case("GRPO", settings=GROUPS), 20, 20, False),
    "GRPO, LoRA": (Case("GRPO", lora=True, settings=GROUPS), 20, 20, True),
    "GRPO with a reference": (Case("GRPO", patch="both", settings={**GROUPS, **REFERENCE}), 20, 30, True),
    "GRPO with a reference, LoRA": (Case("GRPO", lora=True, settings={**GROUPS, **REFERENCE}), 20, 30, False),
    "GRPO of a PEFT model": (Case("GRPO", given="PEFT model", settings={**GROUPS, **REFERENCE}), 20, 30, True),
    "GRPO by name": (Case("GRPO", given="name", patch="after", settings=GROUPS), 20, 20, True),
    "GRPO of two prompts": (Case("GRPO", settings=TWO_PROMPTS), 20, 20, True),
    "GRPO of two prompts, windows": (Case("GRPO", family=WINDOWED, settings=TWO_PROMPTS), 20, 20, True),
    "GRPO of experts": (Case("GRPO", family=EXPERTS, settings=GROUPS), 20, 20, True),
    "DPO of experts": (Case("DPO", family=EXPERTS, patch="both"), 20, 20, True),
    "GRPO, checkpointing": (Case("GRPO", settings={**GROUPS, "gradient_checkpointing": True}), 20, 20, True),
    "Reward": (Case("Reward"), 20, 0, False),
    "Reward, LoRA": (Case("Reward", lora=True), 20, 0, True),
    "Reward by name": (Case("Reward", given="name", patch="after"), 20, 0, True),
    "Reward, checkpointing": (Case("Reward", settings={"gradient_checkpointing": True}), 20, 0, True),
    "Reward with evaluation": (Case("Reward", settings=EVALUATES), 20, 2 * 2, True),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[slow] if x[3] else []) for name, x in CASES.items()])
def test_a_run_equals_that_of_the_stock_model(name, tmp_path, calls):
    case, training, others, _ = CASES[name]
    want = run(case, tmp_path, share=False)
    assert not calls
    got = run(case, tmp_path, share=True)
    counts = count_shared(calls)
    assert counts.get(True, 0) == training
    assert counts.get(False, 0) == others
    assert_same(got, want)


@slow
@pytest.mark.parametrize("trainer", RATES)
def test_in_bf16(trainer, tmp_path, calls):
    """accelerate's mixed precision: no further from fp32 than the stock model."""
    case = Case(trainer, lora=True, settings=GROUPS if trainer == "GRPO" else {})
    exact = run(case, tmp_path, share=False)
    want = run(case, tmp_path, share=False, bf16=True)
    got = run(case, tmp_path, share=True, bf16=True)
    count_shared(calls)
    if trainer == "GRPO":  # tokens are drawn from rounded probabilities, so the runs part at some step
        assert got.completions[0] == want.completions[0]
        return
    rounding = losses_differ(want.losses, exact.losses)
    assert losses_differ(got.losses, exact.losses) <= 3 * rounding + 2**-8


@slow
def test_groups_that_trl_shuffles_over_several_backward_passes_share_less(tmp_path, calls):
    """Each pass gets random rows of the two groups."""
    case = Case("GRPO", settings={**GROUPS, "gradient_accumulation_steps": 2})
    want = run(case, tmp_path, share=False)
    got = run(case, tmp_path, share=True)
    assert_same(got, want)
    assert count_shared([call for call in calls if not call[0]]) == {False: STEPS}
    assert count_shared([call for call in calls if call[0]], most=0.9) == {True: 2 * STEPS}
