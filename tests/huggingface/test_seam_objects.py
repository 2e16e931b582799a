# SPDX-License-Identifier: Apache-2.0
"""A patched model is an ordinary object: copied, pickled, saved and loaded in processes that import nothing."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, METHODS, assert_close, token_rows
from tests.huggingface.models import IDS, LEFT, RIGHT, SEQ

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

ROOT = Path(peftkern.__file__).parents[1]
KINDS = [(method, "llama (GQA)") for method in METHODS] + [("peft prefix", "t5"), ("peft prompt", "t5")]
NAMES = [f"{method}, {family}" for method, family in KINDS]

RUN = """
import sys, torch

inputs = torch.load(sys.argv[2])


def results_of(model):
    model.eval()
    with torch.no_grad():
        logits = model(**inputs["forward"]).logits
        tokens = model.generate(**inputs["generate"])
    model.train()
    loss = model(**inputs["step"]).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "tokens": tokens, "loss": loss.detach(), "gradients": gradients}


def results_in_a_process(models, path):
    "Of models that have come as arguments, for torch.multiprocessing."
    out = {}
    for name, model in models.items():
        try:
            out[name] = results_of(model)
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    torch.save(out, path)


if __name__ == "__main__":
    {main}
"""
LOAD = """out = {}
    for path in sys.argv[4:]:
        try:
            assert "peftkern" not in sys.modules or path != sys.argv[4], "something has imported the package"
            out[path] = results_of(torch.load(path, weights_only=False))
        except Exception as error:
            out[path] = f"{type(error).__name__}: {error}"
    torch.save(out, sys.argv[3])"""
SPAWN = """models = {path: torch.load(path, weights_only=False) for path in sys.argv[4:]}
    process = torch.multiprocessing.get_context("spawn").Process(
        target=results_in_a_process, args=(models, sys.argv[3])
    )
    process.start()
    process.join()"""


def make(method, family):
    if family == "llama (GQA)":
        return by_hand.build(method)
    builder = models.peft_model if method == "peft prefix" else models.prompt_model
    return builder(models.FAMILIES[family], patched=True)


def inputs():
    step = {"input_ids": IDS, "attention_mask": RIGHT, "labels": IDS.masked_fill(RIGHT == 0, -100)}
    generate = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 3, **GREEDY}
    return {"forward": {**step, "labels": IDS}, "generate": generate, "step": step}


def results_here(model):
    calls = inputs()
    model.eval().zero_grad()
    with torch.no_grad():
        logits, tokens = model(**calls["forward"]).logits, model.generate(**calls["generate"])
    loss = model.train()(**calls["step"]).loss
    loss.backward()
    return {"logits": logits, "tokens": tokens, "loss": loss.detach(), "gradients": by_hand.gradients(model)}


def assert_same_results(got, want):
    assert not isinstance(got, str), f"in the other process: {got}"
    assert_close(got["logits"], want["logits"], "logits")
    assert_close(got["loss"], want["loss"], "loss")
    assert got["tokens"].tolist() == want["tokens"].tolist()
    by_hand.assert_same_gradients(got["gradients"], want["gradients"])


def run(folder, main, paths):
    """The results of the models at ``paths`` in a new process; it imports torch and nothing else."""
    script = folder / "run.py"
    script.write_text(RUN.replace("{main}", main))
    torch.save(inputs(), folder / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, str(script), str(folder / "inputs.pt"), str(folder / "inputs.pt"), str(folder / "out.pt"),
         *map(str, paths)], check=True, cwd=folder, env=environment,
    )  # fmt: skip
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def want():
    return {f"{method}, {family}": results_here(make(method, family)) for method, family in KINDS}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The results of every model, computed in a separate process."""
    folder, paths = tmp_path_factory.mktemp("loaded"), []
    for number, (method, family) in enumerate(KINDS):
        paths.append(folder / f"{number}.pt")
        torch.save(make(method, family), paths[-1])
    return dict(zip(NAMES, run(folder, LOAD, paths).values(), strict=True))


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("spawned"), []
    for number, (method, family) in enumerate(KINDS):
        paths.append(folder / f"{number}.pt")
        torch.save(make(method, family), paths[-1])
    return dict(zip(NAMES, run(folder, SPAWN, paths).values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_saved_whole_and_loaded_in_a_new_process(loaded, want, name):
    assert_same_results(loaded[name], want[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_given_to_a_spawned_process(spawned, want, name):
    """As in ``torch.multiprocessing.spawn`` and data loaders."""
    assert_same_results(spawned[name], want[name])


def loads_as_alone(pickled, code):
    """The output of ``code``, run on the object ``x`` in a process that has only imported torch."""
    program = f"import pickle, sys, torch\nx = pickle.load(sys.stdin.buffer)\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", program], input=pickled, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-600:]
    return done.stdout.decode().strip()


@pytest.mark.slow
def test_the_config_of_a_patched_model_in_a_new_process():
    """A model made from it is a stock model, and can be patched."""
    model = by_hand.build("native prefix")
    code = (
        "from transformers import LlamaForCausalLM\n"
        "import json\n"
        "model = LlamaForCausalLM(x).eval()\n"
        "assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 97)\n"
        "assert 'peftkern' not in x.to_json_string()\n"
        "print('runs')"
    )
    assert loads_as_alone(pickle.dumps(model.config), code).endswith("runs")


@pytest.mark.slow
def test_what_was_loaded_can_be_unpatched_and_explained_there():
    model = by_hand.build("peft prompt").eval()
    code = (
        "import peftkern\n"
        "from peftkern.huggingface.wiring import PATCH\n"
        "text = peftkern.explain(x)\n"
        "ids = torch.arange(6).view(2, 3) + 3\n"
        "with torch.no_grad():\n"
        "    patched = x(input_ids=ids).logits\n"
        "    stock = peftkern.unpatch(x)(input_ids=ids).logits\n"
        "assert PATCH not in vars(x)\n"
        "print((patched - stock).abs().max().item() < 1e-4, len(text) > 20)"
    )
    assert loads_as_alone(pickle.dumps(model), code).endswith("True True")


# In one process


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize(("method", "family"), KINDS, ids=NAMES)
def test_a_copy_computes_with_its_own_parameters(want, method, family, copier):
    model = make(method, family)
    clone = COPIES[copier](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_results(results_here(clone), want[f"{method}, {family}"])
    assert all(p.grad is None for p in model.parameters()), "gradients went to the model that was copied"
    peftkern.unpatch(model)
    clone.zero_grad()
    assert_same_results(results_here(clone), want[f"{method}, {family}"])
    peftkern.unpatch(clone)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_made_while_unpatched_is_stock(method):
    model = peftkern.unpatch(by_hand.build(method))
    clone = pickle.loads(pickle.dumps(model))
    assert "peftkern" not in str(type(clone.config._attn_implementation).__module__)
    assert not any("peftkern" in name for module in clone.modules() for name in vars(module))


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_moves_between_patched_models(method):
    """Saved with tensors only, so that ``torch.load`` reads it by default."""
    source, target = by_hand.build(method).eval(), by_hand.build(method).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.01)
        want = source(input_ids=IDS).logits
        target.load_state_dict(source.state_dict())
        assert_close(target(input_ids=IDS).logits, want, "logits")


def test_a_model_made_of_the_config_of_a_patched_one_is_stock():
    model = by_hand.build("native prefix")
    torch.manual_seed(1)
    fresh = hf.LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    assert_close(
        fresh(input_ids=IDS).logits.detach(), models.base_model(LLAMA).eval()(input_ids=IDS).logits.detach(), "logits"
    )
    got = peftkern.patch(fresh, by_hand.llama_prefix())(input_ids=IDS).logits
    assert_close(token_rows(got.detach(), SEQ), by_hand.truth("native prefix")(IDS).logits.detach(), "logits")
