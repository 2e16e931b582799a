# SPDX-License-Identifier: Apache-2.0
"""Training with checkpointing, Trainer, compile and several processes, compared with PEFT where PEFT can."""

from __future__ import annotations

import collections
import math
import os
import socket
import tempfile

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PrinterCallback, Trainer, TrainingArguments

import peftkern
from peftkern import PrefixKV
from tests.cover import product
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, PREFIX, PROJECTION, RIGHT, VOCAB

TOLERANCE = 1e-5
LLAMA = FAMILIES["llama (GQA)"]
SHARED_AND_REENTRANT = ("gemma3n (shared KV)", True)


def llama_prefix(**options):
    return PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=2, head_dim=16, **options)


def enable_checkpointing(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        case
        for case in product(FAMILIES, (False, True), strength=1, among=lambda *case: case != SHARED_AND_REENTRANT)
        if case.values != SHARED_AND_REENTRANT
    ],
)
def test_activation_checkpointing_gives_the_gradients_of_peft_without(name, reentrant):
    """PEFT with it raises (test_peft_cannot_checkpoint)."""
    family = FAMILIES[name]
    want = models.training_step(models.peft_model(family, patched=False), family.task, RIGHT)
    model = models.peft_model(family, patched=True)
    enable_checkpointing(model, reentrant)
    got = models.training_step(model, family.task, RIGHT)
    output, gradients = models.step_difference(got, want, RIGHT if family.task == "CAUSAL_LM" else None)
    assert output <= TOLERANCE, f"outputs differ by {output:.1e}"
    assert gradients <= TOLERANCE, f"gradients differ by {gradients:.1e}"


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "t5", "bart"])
def test_peft_cannot_checkpoint(name):
    model = models.peft_model(FAMILIES[name], patched=False)
    enable_checkpointing(model, reentrant=False)
    with pytest.raises(RuntimeError, match="must match"):
        models.training_step(model, FAMILIES[name].task, RIGHT)


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
def test_checkpointing_with_a_projection(native):
    """Reentrant checkpointing would run backward through the MLP once per layer, which is refused with advice."""

    def build():
        if native:
            torch.manual_seed(4)
            return peftkern.patch(models.base_model(LLAMA), llama_prefix(projection=24), freeze=True)
        return models.peft_model(LLAMA, patched=True, **PROJECTION)

    want = models.training_step(build(), LLAMA.task, RIGHT)
    model = build()
    enable_checkpointing(model, reentrant=False)
    assert models.step_difference(models.training_step(model, LLAMA.task, RIGHT), want, RIGHT)[1] <= TOLERANCE
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(ValueError, match=r"use_reentrant: expected False.*gradient_checkpointing_enable"):
        models.training_step(model, LLAMA.task, RIGHT)


def test_shared_keys_with_reentrant_checkpointing_are_refused():
    """The stock model loses gradients: shared keys are not arguments of the layers that read them."""
    family = FAMILIES[SHARED_AND_REENTRANT[0]]
    model = models.peft_model(family, patched=True)
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant: expected False, as layers share keys"):
        models.training_step(model, family.task)


def test_dropout_of_a_recomputed_layer_drops_the_same_weights():
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix())
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    steps = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, reentrant=False)
        torch.manual_seed(6)
        steps.append(models.training_step(model, LLAMA.task, RIGHT))
    assert torch.equal(steps[0].loss, steps[1].loss)
    assert models.step_difference(steps[1], steps[0])[1] <= TOLERANCE


def saved_bytes(model):
    """Bytes that one forward keeps for its backward, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    ids = torch.randint(3, VOCAB, (4, 48))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids)
    return sum(size for size, _ in saved.values())


def test_less_is_kept_for_the_backward_pass():
    """No copies of the prefix per sample, no repeated heads, no S x (P + S) mask."""
    family = FAMILIES["llama (GQA)"]
    stock, patched = (saved_bytes(models.peft_model(family, patched=p, num_virtual_tokens=64)) for p in (False, True))
    # 2 layers of keys and values with heads repeated, prefix and sequence, against a sequence with its own heads.
    per_layer = 2 * 4 * (4 * (64 + 48) - 2 * 48) * 16 * 4
    assert stock - patched >= 2 * per_layer, f"PEFT keeps {stock} bytes, patched {patched}"


COMPILED = ["llama (GQA)", "mistral (window 4)", "bert"]


@pytest.mark.parametrize(
    "name", [*COMPILED, *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "bart", "gemma2 (softcap)"))]
)
def test_compile_makes_one_graph(name):
    torch._dynamo.reset()
    family = FAMILIES[name]
    want = models.training_step(models.peft_model(family, patched=False), family.task, RIGHT)
    model = models.peft_model(family, patched=True)
    if isinstance(model.base_model.base_model.forward, models.Renamed):
        pytest.skip("PEFT raises, as it does not find this model's cache; the renamed one cannot be traced")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.train()(input_ids=IDS, attention_mask=RIGHT, **models.labels_of(family.task)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = models.Step(want.output, want.loss, gradients)
    assert models.step_difference(got, want)[1] <= TOLERANCE


def test_compile_of_a_native_prefix_does_not_recompile():
    torch._dynamo.reset()
    model = peftkern.patch(models.base_model(LLAMA), llama_prefix(), freeze=True)
    want = models.training_step(model, LLAMA.task)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradient = model.peftkern_prefix.trainable[0].grad
    assert models.difference(gradient, want.gradients["peftkern_prefix.trainable.0"]) <= TOLERANCE
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = IDS.flip(0)
        compiled(input_ids=other, labels=other)


def train(model, folder, max_steps=4, resume=False, **arguments):
    """The logged losses of ``Trainer``."""
    data = [{"input_ids": IDS[i], "attention_mask": RIGHT[i], "labels": IDS[i]} for i in range(3)] * 2
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, max_steps=max_steps, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_steps=1, disable_tqdm=True, seed=0, data_seed=0,
        lr_scheduler_type="constant", **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    trainer = Trainer(model=model, train_dataset=data, eval_dataset=data[:3], args=arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    return [round(entry[key], 5) for key in ("loss", "eval_loss") for entry in history if key in entry]


def test_trainer_logs_the_losses_of_peft(tmp_path):
    stock = train(models.peft_model(LLAMA, patched=False), tmp_path)
    assert train(models.peft_model(LLAMA, patched=True), tmp_path) == stock
    assert train(models.peft_model(LLAMA, patched=True), tmp_path, gradient_checkpointing=True) == stock
    assert len(set(stock)) == len(stock) == 4, "it must have learned something"


def test_trainer_logs_the_losses_of_peft_behind_a_prompt(tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    stock = train(models.prompt_model(LLAMA, patched=False), tmp_path, **evaluation)
    stock_to_rounding = pytest.approx(stock, abs=2e-5)
    assert train(models.prompt_model(LLAMA, patched=True), tmp_path, **evaluation) == stock_to_rounding
    checkpointed = models.prompt_model(LLAMA, patched=True, logits="labelled")
    assert train(checkpointed, tmp_path, gradient_checkpointing=True) == pytest.approx(stock[:4], abs=2e-5)
    assert len(set(stock)) == len(stock), "it must have learned something"


def test_trainer_resumes_a_native_prefix(tmp_path):
    """PEFT refuses to train a loaded prefix."""

    def model():
        torch.manual_seed(7)
        return peftkern.patch(models.base_model(LLAMA), llama_prefix(std=1.0), freeze=True)

    whole = train(model(), tmp_path / "whole")
    save = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    first = train(model(), tmp_path / "halves", max_steps=2, **save)
    both = train(model(), tmp_path / "halves", resume=True, **save)
    assert first == whole[:2]
    assert both == whole, "log history and parameters are those of training in one go"


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank, port, report, kind, strategy):
    native = kind == "native"
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    build = models.prompt_model if kind == "prompt" else models.peft_model
    reference = build(LLAMA, patched=False).train()
    ids = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(3))
    reference(input_ids=ids, labels=ids).loss.backward()
    if native:
        prefix = models.native_prefix(reference)
        model, parameter = peftkern.patch(models.base_model(LLAMA), prefix, freeze=True), prefix.trainable[0]
    else:
        model = build(LLAMA, patched=True)
        parameter = models.peft_prefix(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if strategy == "ddp":
        parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    else:
        mesh = init_device_mesh("cpu", (2,))
        base = model if native else model.get_base_model()
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        parallel = fully_shard(model.train(), mesh=mesh)
        parameter = prefix.trainable[0] if native else models.peft_prefix(model)
    for _ in range(2):
        model.zero_grad()
        mine = ids[2 * rank : 2 * rank + 2]
        parallel(input_ids=mine, labels=mine).loss.backward()
    gradient = parameter.grad if strategy == "ddp" else parameter.grad.full_tensor()
    if rank == 0:
        torch.save(models.difference(gradient, models.peft_prefix(reference).grad), report)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["peft", "native", "prompt"])
def test_two_processes(kind, strategy):
    """With checkpointing, on gloo: the gradient of both halves equals that of the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "difference")
        torch.multiprocessing.spawn(_worker, args=(_free_port(), report, kind, strategy), nprocs=2)
        assert torch.load(report) <= TOLERANCE


def _collectives(step):
    """Collectives of one step: Counter of (op, elements of its tensors)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    found = collections.Counter()
    for event in profile.events():
        if event.name.startswith("gloo:"):
            found[event.name.removeprefix("gloo:"), _elements(event.input_shapes)] += 1
    return found


def _elements(shapes):
    if shapes and all(isinstance(n, int) for n in shapes):
        return math.prod(shapes)
    return sum(_elements(shape) for shape in shapes if isinstance(shape, (list, tuple)))


def _counting_worker(rank, port, report, kind, strategy):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    build = models.prompt_model if kind == "prompt" else models.peft_model
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3 + rank))
    found = {}
    for patched in (False, True):
        model = build(LLAMA, patched=patched).train()
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if strategy == "ddp":
            parallel = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.get_base_model().model.layers:
                fully_shard(layer, mesh=mesh)
            parallel = fully_shard(model, mesh=mesh)

        def step(parallel=parallel, model=model):
            model.zero_grad()
            parallel(input_ids=ids, labels=ids).loss.backward()

        step()
        step()  # DDP arranges its buckets anew after the first
        found[patched] = _collectives(step)
    if rank == 0:
        torch.save((found[False], found[True], size), report)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["peft", "prompt"])
def test_two_processes_reduce_the_gradient_once(kind, strategy):
    """A step has the same collectives as the model without the patch: one sum of the prefix's gradient."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "collectives")
        torch.multiprocessing.spawn(_counting_worker, args=(_free_port(), report, kind, strategy), nprocs=2)
        stock, patched, size = torch.load(report, weights_only=False)
    assert patched == stock
    sums = [elements for (op, elements), count in patched.items() if "reduce" in op for _ in range(count)]
    assert len(sums) == 1, f"reductions of {sums} elements, the prefix has {size}"
    assert size <= sums[0] < 1.5 * size, "FSDP pads to equal shards, nothing else is reduced"
