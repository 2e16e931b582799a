# SPDX-License-Identifier: Apache-2.0
"""Models that share text under torch.compile, checkpointing, autocast, accelerate, copies, threads, two processes."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import threading

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from transformers.integrations.neftune import neftune_post_forward_hook

import peftkern
from peftkern.huggingface import sharer, sharing
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, patch_of
from tests.huggingface.shared_rows import ROWS, A, B, C, D, E, differ, inputs_of, share_everything, train
from tests.huggingface.test_two_processes import _free_port, wrap

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LLAMA = FAMILIES["llama (GQA)"]
INPUTS = inputs_of(ROWS)
REAL = INPUTS["attention_mask"].bool()
SHARED = (55, 22)
BATCHES = [
    inputs_of(rows)
    for rows in ([A + B, A + C], [A + B, A + C, A + D], [A, A + B, A + B + C], [A + B + C, A + B + D, A + E, D])
]


@pytest.fixture(autouse=True)
def share_every_row(monkeypatch):
    share_everything(monkeypatch)


def shared(**config):
    return peftkern.patch(models.base_model(LLAMA, **config), share="prefixes")


def results(model, inputs=INPUTS, **options):
    """(loss, logits at tokens, gradients) of a training step."""
    output, found = train(model, inputs | options)
    found = {name.replace("_orig_mod.", "").replace("module.", ""): x for name, x in found.items()}
    return output.loss.detach(), output.logits[inputs["attention_mask"].bool()].detach(), found


def assert_equal(got, want, tolerance=1e-5):
    assert max(differ(x, y) for x, y in zip(got, want, strict=True)) <= tolerance


@pytest.fixture(scope="module")
def stock():
    return results(models.base_model(LLAMA))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_runs_as_usual_and_says_so(fullgraph):
    torch._dynamo.reset()
    model = shared(num_hidden_layers=1)
    stock = results(models.base_model(LLAMA, num_hidden_layers=1))
    assert_equal(results(torch.compile(model, backend="eager", fullgraph=fullgraph)), stock)
    assert patch_of(model).shared_rows is None
    assert "compile the layers" in peftkern.explain(model)


@pytest.mark.parametrize("kind", ["none", "prefix", "prompt"])
def test_compiled_layers_share_without_a_graph_break(kind):
    torch._dynamo.reset()

    def build(**options):
        base = models.base_model(LLAMA, num_hidden_layers=1)
        torch.manual_seed(0)
        learned = {"prefix": peftkern.PrefixKV, "prompt": peftkern.SoftPrompt}.get(kind, lambda *_, **__: None)
        return peftkern.patch(base, learned(base, 5, std=0.5), **options)

    model, usual = (
        build(share="prefixes"),
        models.base_model(LLAMA, num_hidden_layers=1) if kind == "none" else build(),
    )
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for inputs in BATCHES[1:3]:
        assert_equal(results(model, inputs), results(usual, inputs))
        assert patch_of(model).shared_rows is not None


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, stock):
    model = shared()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(results(model), stock)
    assert patch_of(model).shared_rows == SHARED


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_in_train_mode(mode):
    model, usual = shared().train(), models.base_model(LLAMA).eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with mode():
        got, want = model(**INPUTS), usual(**INPUTS)
    assert patch_of(model).shared_rows == SHARED
    assert got.past_key_values.get_seq_length() == INPUTS["input_ids"].shape[1]
    assert differ(got.logits[REAL], want.logits[REAL]) <= 1e-5
    assert model.model.gradient_checkpointing


def test_autocast():
    """Rows in other places of a batch are rounded differently, but not by more than bf16 rounds."""
    model, usual = shared(), models.base_model(LLAMA)
    exact = results(usual)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = results(model), results(usual)
    assert patch_of(model).shared_rows == SHARED
    for x, y, z in zip(got, want, exact, strict=True):
        assert differ(x, z) <= 1.5 * differ(y, z) + 1e-4


@pytest.mark.parametrize("first", ["patch", "prepare"])
def test_accelerate(first, stock):
    model, accelerator = models.base_model(LLAMA), Accelerator(cpu=True)
    if first == "patch":
        model = accelerator.prepare(peftkern.patch(model, share="prefixes"))
    else:
        model = peftkern.patch(accelerator.prepare(model), share="prefixes")
    assert_equal(results(model), stock)
    assert patch_of(model).shared_rows == SHARED


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_on_their_own(copied, stock):
    model = shared()
    other = copied(model)
    assert_equal(results(other), stock)
    assert patch_of(other).shared_rows == SHARED
    assert "no call yet" in peftkern.explain(model)


def test_threads_do_not_mix_their_calls():
    """Groups are different in each thread."""
    model, usual, wrong = shared().eval(), models.base_model(LLAMA).eval(), []
    groups = [torch.zeros(len(x["input_ids"]), dtype=torch.long) for x in BATCHES]
    with torch.no_grad():
        want = [usual(**inputs).logits for inputs in BATCHES]

    def work(i):
        real = BATCHES[i]["attention_mask"].bool()
        for _ in range(10):
            given = {"group_ids": groups[i]} if i % 2 else {}
            try:
                with torch.no_grad():
                    difference = differ(model(**BATCHES[i], **given).logits[real], want[i][real])
            except Exception as error:
                difference = error
            if not (isinstance(difference, float) and difference <= 1e-5):
                wrong.append((i, difference))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(BATCHES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nested_and_interrupted_calls(stock):
    model, inner = shared(), []

    def call(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(**BATCHES[0]).logits.detach()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(call)
    assert_equal(results(model), stock)
    handle.remove()
    real = BATCHES[0]["attention_mask"].bool()
    assert differ(inner[0][real], models.base_model(LLAMA)(**BATCHES[0]).logits.detach()[real]) <= 1e-5
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**INPUTS)
    handle.remove()
    assert_equal(results(model), stock)


def test_unpatch_restores_the_model():
    model, fresh = models.base_model(LLAMA), models.base_model(LLAMA)
    config, implementation = model.config.to_json_string(), model.config._attn_implementation
    peftkern.patch(model, share="prefixes")
    with pytest.raises(ValueError, match="not patched"):
        peftkern.patch(model, share="prefixes")
    results(model)
    peftkern.unpatch(model)
    assert not any((*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in model.modules())
    assert (model.config.to_json_string(), model.config._attn_implementation) == (config, implementation)
    assert torch.equal(model.eval()(**INPUTS).logits, fresh.eval()(**INPUTS).logits)


def test_dropout_draws_once_for_shared_rows():
    family = FAMILIES["gpt2"]
    torch.manual_seed(1)
    model = family.model(family.config(**family.arguments))
    usual = copy.deepcopy(model)
    peftkern.patch(model, share="prefixes")
    loss, _, gradients = results(model)
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in gradients.values())
    assert patch_of(model).shared_rows == SHARED
    with torch.no_grad():
        assert differ(model.eval()(**INPUTS).logits[REAL], usual.eval()(**INPUTS).logits[REAL]) <= 1e-5


def test_noise_on_embeddings_prevents_sharing():
    """NEFTune adds other noise to equal tokens."""
    model = shared()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    results(model)
    assert patch_of(model).shared_rows is None


EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    """The loss that balances experts counts the tokens of the batch."""
    config = {**LLAMA.arguments, **EXPERTS[name], "experts_implementation": "eager"}
    torch.manual_seed(0)
    usual = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**config))
    model = peftkern.patch(copy.deepcopy(usual), share="prefixes")
    assert_equal(results(model), results(usual))
    assert patch_of(model).shared_rows == SHARED
    assert_equal(results(model, output_router_logits=True), results(usual, output_router_logits=True))
    assert patch_of(model).shared_rows == SHARED


def test_models_that_embed_tokens_in_every_layer_share_tokens():
    """Gemma 3n does not embed them in its layers if it is given embeddings, so packed rows are tokens."""
    usual = models.base_model(FAMILIES["gemma3n (shared KV)"])
    model = peftkern.patch(copy.deepcopy(usual), share="prefixes")
    assert_equal(results(model), results(usual))
    assert patch_of(model).shared_rows == SHARED


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    sharing.MIN_SAVED_ROWS, sharer.MAX_ROWS = 1, 0.99
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    found = {}
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in _four().items()}
    # A model that FSDP2 has sharded does not run in parts, so it cannot be patched.
    for strategy, patches_first in (("ddp", True), ("ddp", False), ("fsdp2", True)):
        model = models.base_model(LLAMA)
        model = peftkern.patch(model, share="prefixes") if patches_first else model
        wrapped = wrap(model, strategy)
        model = model if patches_first else peftkern.patch(model, share="prefixes")
        loss, _, gradients = results(wrapped, half)
        gradients = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in gradients.items()}
        found[strategy, patches_first] = loss, gradients, patch_of(model).shared_rows
    torch.save(found, os.path.join(folder, f"{rank}"))
    torch.distributed.destroy_process_group()


def _four():
    """Four rows; each half has as many labels as the other."""
    inputs = inputs_of([A + B, A + C, A + C, A + B])
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, args=(_free_port(), str(tmp_path)), nprocs=2)
    of_processes = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    loss, _, gradients = results(models.base_model(LLAMA), _four())
    for key in of_processes[0]:
        losses = torch.stack([found[key][0] for found in of_processes])
        assert differ(losses.mean(), loss) <= 1e-5, key
        for _, got, rows in (found[key] for found in of_processes):
            assert rows == (22, len(A + B + C)), key
            assert differ(got, gradients) <= 1e-5, key
