# SPDX-License-Identifier: Apache-2.0
"""A training step of a patched model waits for the device at most once, for the number of rows of the batch.

Counted on a CPU: the operations that on a GPU make the host wait, as their result, or its shape, depends on values.
"""

from __future__ import annotations

import collections

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import SoftPrompt
from tests.huggingface import kinds, models
from tests.huggingface.models import FAMILIES, IDS, MASKS, PREFIX, TASK_IDS

LLAMA = FAMILIES["llama (GQA)"]
ALLOWED = 1

WAITS = (
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "is_nonzero", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
)
MASKABLE = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")


def waits_for_device(func, args, kwargs):
    """Whether the host waits for values of an operation's arguments."""
    name = func.overloadpacket.__name__
    if name in MASKABLE:  # index by a mask: as many rows as it has ones
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


class CountWaits(TorchDispatchMode):
    """Count them in the block; ``found`` maps the name of an operation to its count."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()
        self.methods = CountMethods(self.found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits_for_device(func, args, kwargs or {}):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.methods.__exit__(*exception)


class CountMethods(TorchFunctionMode):
    """Ways to read values that dispatch no operation where the tensor is on the CPU already."""

    READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__)

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


OPERATIONS = {
    "item": (lambda x: x.sum().item(), 1),
    "bool": (lambda x: bool((x > 0).any()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "numpy": (lambda x: x.numpy(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "index by a mask": (lambda x: x[x > 0], 1),
    "assignment by a mask": (lambda x: x.clone().index_put_((x > 0,), torch.zeros(())), 1),
    "masked_select": (lambda x: x.masked_select(x > 0), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "where of a condition": (lambda x: torch.where(x > 0), 1),
    "unique": (lambda x: torch.unique(x, return_inverse=True), 1),
    "unique_consecutive": (lambda x: torch.unique_consecutive(x), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "repeat_interleave": (lambda x: torch.repeat_interleave(torch.tensor([1, 2])), 1),
    "repeat_interleave of known size": (lambda x: torch.repeat_interleave(torch.tensor([1, 2]), output_size=3), 0),
    "index": (lambda x: x[torch.tensor([0, 1])], 0),
    "where, cumsum": (lambda x: torch.where(x > 0, x, -x).cumsum(0), 0),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_counter(name):
    operation, waits = OPERATIONS[name]
    x = torch.randn(6)
    with CountWaits() as count:
        operation(x)
    assert count.found.total() == waits, dict(count.found)


def test_the_counter_sees_backward():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * dout.sum().item()

    x = torch.randn(6, requires_grad=True)
    with CountWaits() as count:
        Waits.apply(x).sum().backward()
    assert count.found == {"_local_scalar_dense": 1}


LABELS = IDS.clone()
LABELS[:, 1:3] = -100


def inputs_of(batch):
    if batch.startswith("packed"):
        positions = torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand_as(IDS)
        rows = {"input_ids": IDS, "labels": LABELS, "position_ids": positions}
        if batch == "packed":
            return rows
        starts = torch.tensor([0, 3, 7, 10, 14, 17, 21], dtype=torch.int32)  # as collators for flash kernels say it
        rows = {name: value.reshape(1, -1) for name, value in rows.items()}
        return rows | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    mask = MASKS[batch]
    labels = LABELS if mask is None else LABELS.masked_fill(mask == 0, -100)
    return {"input_ids": IDS, "labels": labels, **({} if mask is None else {"attention_mask": mask})}


def multitask(*, patched, **options):
    return models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=patched, **options)


def bank(**options):
    prompts = SoftPrompt(models.base_model(LLAMA), PREFIX, num_prompts=4, init="vocab")
    return peftkern.patch(models.base_model(LLAMA), prompts, freeze=True, **options)


PATCHED = {kind: lambda kind=kind, **options: kinds.patched_model(kind, LLAMA, **options) for kind in kinds.KINDS} | {
    "multitask": lambda **options: multitask(patched=True, **options),
    "native prompts": bank,
}
EXTRA = {"multitask": {"task_ids": TASK_IDS}, "native prompts": {"prompt_ids": TASK_IDS}}
STOCK = {kind: lambda kind=kind: kinds.stock_model(kind, LLAMA) for kind in kinds.PEFT_KINDS} | {
    "multitask": lambda: multitask(patched=False)
}


def waits_of_a_step(model, inputs):
    """In the second step, because the first may warn. Not for models without a gradient."""
    model.train()
    if not any(p.requires_grad for p in model.parameters()):
        model.get_input_embeddings().weight.requires_grad_(True)
    for _ in range(2):
        model.zero_grad()
        with CountWaits() as count:
            model(**inputs).loss.backward()
    return count.found


def assert_waits_once(patched, base, stock=None):
    told = f"stock PEFT {stock if stock is None else dict(stock)}, base model {dict(base)}"
    assert patched.total() <= ALLOWED, f"{patched.total()} waits, {dict(patched)}; {told}"


@pytest.mark.parametrize("kind", PATCHED)
@pytest.mark.parametrize("batch", ["none", "ones", "right", "left", "packed", "packed with boundaries"])
@pytest.mark.parametrize("logits", ["all", "labelled"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_step_waits_once(logits, batch, kind, record_property):
    """For a padded batch, the base model alone waits twice, to check whether its mask has zeros."""
    inputs = inputs_of(batch)
    base = waits_of_a_step(models.base_model(LLAMA), inputs)
    extra = dict(EXTRA.get(kind, {}))
    if batch == "packed with boundaries":
        extra = {name: value[:1] for name, value in extra.items()}
    patched = waits_of_a_step(PATCHED[kind](logits=logits), {**inputs, **extra})
    stock = waits_of_a_step(STOCK[kind](), {**inputs, **extra}) if kind in STOCK else None
    for name, found in (("patched", patched), ("stock", stock), ("base", base)):
        record_property(f"waits of {name}", found if found is None else dict(found))
    assert_waits_once(patched, base, stock)


@pytest.mark.parametrize("kind", PATCHED)
def test_gradient_checkpointing_waits_no_more(kind):
    inputs = inputs_of("right")
    model, base = PATCHED[kind](), models.base_model(LLAMA)
    for checkpointed in (model, base):
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    patched = waits_of_a_step(model, {**inputs, **EXTRA.get(kind, {})})
    assert_waits_once(patched, waits_of_a_step(base, inputs))
