# SPDX-License-Identifier: Apache-2.0
"""Every causal family of transformers, patched and stock; also tests that the sweep detects faults."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

import peftkern
from tests.huggingface.families import __main__ as command
from tests.huggingface.families import cells, limits, records, sweep, tiny, trials
from tests.huggingface.families.sweep import Family, decided

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT and of patched prompts, which are expected

QUICK = ("llama", "gpt2", "opt", "qwen2", "mistral")


@pytest.mark.parametrize("name", QUICK)
def test_common_families_equal_stock_and_leave_padding_out(name):
    family = sweep.sweep(name)
    for cell_name, cell in family.cells.items():
        assert cell.outcome == "equal", f"{name}, {cell_name}: {cell.outcome}: {cell.detail}"
        assert cell.way.startswith(("padding-free", "shared text once")), f"{name}, {cell_name}: {cell.how}"
        assert not any("cannot" in result for result in cell.checks.values()), f"{name}, {cell_name}: {cell.checks}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tiny.FAMILIES.keys() - tiny.CANNOT.keys() - set(QUICK)))
def test_every_family_equals_stock_or_is_refused(name):
    family = sweep.sweep(name)
    if not family.cells:
        advice = "give it arguments in tiny.OVERRIDES, or a reason in tiny.CANNOT"
        pytest.fail(f"{name} is not built: {family.not_built}; {advice}", pytrace=False)
    faults = [f"{name}, {kind}: {cell.outcome}: {cell.detail}" for kind, cell in family.failures.items()]
    faults += [
        f"{name}, {kind}: the refusal repeats an inner error: {cell.detail}"
        for kind, cell in family.cells.items()
        if not cell.is_clear
    ]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def test_no_family_is_built_and_cannot_be_built():
    assert not tiny.OVERRIDES.keys() & tiny.CANNOT.keys(), "a family is built and cannot be built"


KINDS = [cells.PeftPrefix, cells.PeftPrompt, cells.NativePrefix, cells.NativePrompt, cells.SharedText]


def _patched_with(monkeypatch, change):
    """Make ``peftkern.patch`` introduce a fault."""
    patch = peftkern.patch

    def faulty(model, *args, **options):
        change(patch(model, *args, **options))
        return model

    monkeypatch.setattr(peftkern, "patch", faulty)


def _scale_logits(model):
    def scale(module, args, output):
        output["logits"] = output["logits"] * 1.0001
        return output

    model.register_forward_hook(scale)


def _fail(model):
    def fail(module, args):
        raise RuntimeError("planted")

    model.register_forward_pre_hook(fail)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_difference_is_seen(kind, monkeypatch):
    _patched_with(monkeypatch, _scale_logits)
    cell = decided(kind, "llama")
    assert cell.outcome == "DIFFERENT", cell
    assert "logits 1.0e-04" in cell.detail


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_raises_is_seen(kind, monkeypatch):
    _patched_with(monkeypatch, _fail)
    cell = decided(kind, "llama")
    assert cell.outcome == "RAISES", cell
    assert "none: RuntimeError: planted" in cell.detail


@pytest.mark.parametrize(("error", "outcome"), [(ValueError, "refused"), (KeyError, "RAISES")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_a_value_error(kind, error, outcome, monkeypatch):
    def refuse(*args, **options):
        raise error("planted")

    monkeypatch.setattr(peftkern, "patch", refuse)
    cell = decided(kind, "llama")
    assert cell.outcome == outcome, cell
    assert "planted" in cell.detail


def test_a_prompt_that_is_put_wrong_behind_left_padding_is_seen(monkeypatch):
    patch = peftkern.patch
    monkeypatch.setattr(peftkern, "patch", lambda model, **options: patch(model, **{**options, "peft_bugs": True}))
    cell = decided(cells.PeftPrompt, "llama")
    assert cell.outcome == "DIFFERENT", cell
    assert cell.detail.startswith("left: ")
    assert "right" not in cell.detail


@pytest.mark.parametrize("kind", KINDS)
def test_what_unpatch_leaves_is_seen(kind, monkeypatch):
    unpatch = peftkern.unpatch

    def leave(model):
        unpatch(model).get_input_embeddings().weight.data *= 1 + 1e-6
        return model

    monkeypatch.setattr(peftkern, "unpatch", leave)
    cell = kind("llama", torch.float32).run()
    assert cell.outcome == "DIFFERENT", cell
    assert cell.detail.startswith("unpatched: ")


def test_a_prefix_without_effect_is_nothing_that_peft_can(monkeypatch):
    cell = decided(cells.PeftPrefix, "openai-gpt")
    assert (cell.outcome, cell.detail) == (
        "PEFT cannot",
        "ArithmeticError: the loss does not depend on the prefix or prompt",
    )


def test_calls_have_a_time_limit_that_no_handler_takes():
    def patient():
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)

    start = time.perf_counter()
    _, error = limits.attempt(patient, seconds=0.05)
    assert isinstance(error, limits.TimeLimit)
    assert time.perf_counter() - start < 1.0


def test_numbers_that_are_not_finite_have_to_be_so_in_both():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert trials.relative(nan, nan) == 0.0
    assert trials.relative(nan, one) == float("inf")
    assert trials.relative(one, nan) == float("inf")
    assert trials.relative(None, one) == float("inf")
    assert trials.relative(one[:1], one) == float("inf")


@pytest.fixture
def stub(monkeypatch):
    """A sweep without models; returns the families that it ran. ``gpt2`` interrupts once."""
    ran = []

    def run(name):
        ran.append(name)
        if ran.count("gpt2") == 1 and name == "gpt2":
            raise KeyboardInterrupt
        made = {cell: trials.Cell("equal", "", "without their padding", 1e-7) for cell in sweep.CELLS}
        if name == "opt":
            made["prefix"] = trials.Cell("refused", "model: OPTModel takes no cache")
        return Family(name, {} if name == "git" else made, "its loss | counts" if name == "git" else "")

    monkeypatch.setattr(command, "sweep", run)
    return ran


def test_an_interrupted_run_goes_on_and_writes_the_table(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "FAMILIES", {"opt": "", "gpt2": "", "git": ""})
    given = ["--output", str(tmp_path / "docs" / "table.md")]
    assert command.main(given) == 130
    results = tmp_path / "docs" / "table.jsonl"
    results.write_text(results.read_text() + '{"torn')
    results.write_text(results.read_text() + "\n")
    assert command.main(given) == 0
    assert stub == ["opt", "gpt2", "gpt2", "git"]
    text = (tmp_path / "docs" / "table.md").read_text()
    assert f"transformers {records.conditions()['transformers']}" in text
    assert "| `gpt2` | equal, 1e-07; padding-free |" in text
    assert "| `opt` | refused [1] | equal" in text
    assert "1. model: OPTModel takes no cache" in text
    assert "| `git` | its loss \\| counts |" in text


def test_results_of_other_sources_do_not_count(tmp_path):
    records.append(tmp_path / "results", Family("llama", {}, "no"), 1.0, {"sources": "old"})
    assert records.read(tmp_path / "results", {"sources": "new"}) == {}
    assert records.read(tmp_path / "results", {"sources": "old"}).keys() == {"llama"}


def test_a_refusal_that_repeats_an_inner_error_is_seen():
    inner = "model: DogeModel could not be run with a cache: 'LazyMask' object has no attribute 'dtype'"
    assert not trials.Cell("refused", inner).is_clear
    assert trials.Cell("refused", "model: OpenAIGPTModel takes no cache, by which a prefix reaches it").is_clear
    assert trials.Cell("equal").is_clear


@pytest.mark.parametrize(
    ("how", "way"),
    [
        (
            "Llama: the prompt runs once per batch, before the sequences without their padding",
            "padding-free, prompt once",
        ),
        (
            "Llama: a prefix in 2 layers, read in place; training batches run without their padding",
            "padding-free",
        ),
        ("Bart: a prefix in 2 layers; training batches run with their padding: no position_ids", "with padding"),
        ("Bart: the prompt is put before every sample (soft_prompt_embedding)", "concatenated (PEFT's way)"),
        ("StableLm: PEFT's own code runs: attention is not dispatched", "concatenated (PEFT's way)"),
    ],
)
def test_explanations_are_understood(how, way):
    assert trials.Cell("equal", how=how).way == way


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_that_does_not_exist_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        command.arguments(["--json", "results", "--shard", shard])
    assert f"got {shard}" in capsys.readouterr().err


def test_shards_are_all_families():
    names = [command.arguments(["--json", "results", "--shard", f"{i}/3"]).names for i in (1, 2, 3)]
    assert sorted(itertools.chain(*names)) == sorted(tiny.FAMILIES)
