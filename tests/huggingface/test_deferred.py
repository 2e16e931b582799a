# SPDX-License-Identifier: Apache-2.0
"""A training step does not copy the logits of its packed rows into the batch before somebody reads them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.huggingface.deferred import DeferredTensor, deferred_rows
from tests.huggingface import kinds, models
from tests.huggingface.models import FAMILIES, IDS, MASKS, difference

LLAMA = FAMILIES["llama (GQA)"]
ROWS = torch.tensor([[0, 1, 1], [2, 3, 4]])
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Scale(torch.autograd.Function):
    """Its ``apply`` does not consult ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, dout):
        return dout * 3


def divide(x):
    x /= 2
    return x


def assign(x):
    x[:, 0] = 0.0
    return x


OPERATIONS = {
    "multiply": lambda x: x * 2, "slice": lambda x: x[..., :-1, :], "cat": lambda x: torch.cat([x, x]),
    "autograd function": Scale.apply, "cast": lambda x: x.float(), "casts": lambda x: x.half().float() * 2,
    "in place": divide, "assignment": assign, "same device": lambda x: x.cpu(), "detach": lambda x: x.detach(),
    "vmap": lambda x: torch.vmap(lambda y: y * 2)(x), "compile": lambda x: torch.compile(lambda y: y * 2 + 1)(x),
}  # fmt: skip


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_a_deferred_tensor(name, dtype, needs_grad):
    results, gradients = [], []
    for copy_rows in (deferred_rows, lambda x, rows: x[rows]):
        x = X.to(dtype).requires_grad_(needs_grad)
        y = OPERATIONS[name](copy_rows(x * 1, ROWS))
        if y.requires_grad:
            (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
        results.append(y)
        gradients.append(x.grad)
    got, want = results
    assert (got.dtype, got.requires_grad) == (want.dtype, want.requires_grad)
    assert got.tolist() == want.tolist()
    assert (gradients[0] is None) == (gradients[1] is None)
    assert gradients[0] is None or torch.equal(*gradients)


READERS = {
    "numpy": lambda x: x.detach().numpy(), "asarray": lambda x: np.asarray(x.detach()),
    "tolist": lambda x: x.tolist(), "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "deepcopy": lambda x: copy.deepcopy(x.detach()), "dlpack": lambda x: torch.utils.dlpack.from_dlpack(x.detach()),
    "iteration": lambda x: torch.stack(list(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers_of_a_deferred_tensor(name):
    assert torch.equal(torch.as_tensor(READERS[name](deferred_rows(X, ROWS))), X[ROWS])


def test_a_deferred_tensor_is_read_once():
    x = deferred_rows(X, ROWS)
    assert (x.shape, x.dtype, x.device, len(x), x.dim(), x.numel()) == ((2, 3, 4), X.dtype, X.device, 2, 3, 24)
    assert isinstance(x.float(), DeferredTensor)
    assert x._copied is None
    assert x.data_ptr() == x.data_ptr() != 0
    x *= 0
    assert not x.any()


class Shapes(TorchDispatchMode):
    """The shapes of the tensors that operations have returned."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not isinstance(output, DeferredTensor):
            self.found.add(tuple(output.shape))
        return output


def batch_of(mask):
    return {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("wrap", [lambda f: f, convert_outputs_to_fp32], ids=["plain", "accelerate"])
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_training_step_copies_no_logits(kind, wrap, return_dict):
    """With accelerate's casts too, and with outputs in a tuple. What is read has the values of the whole batch."""
    model = kinds.patched_model(kind, LLAMA).train()
    mask = MASKS["right"]
    with Shapes() as shapes:
        output = wrap(model)(**batch_of(mask), return_dict=return_dict)
        loss, logits = (output["loss"], output["logits"]) if return_dict else output[:2]
        loss.backward()
    assert tuple(logits.shape) not in shapes.found, "the logits of the batch have been copied"
    with torch.no_grad():
        want = model.eval()(**batch_of(mask)).logits
    real = mask == 1
    assert difference(logits[:, -mask.shape[1] :][real], want[:, -mask.shape[1] :][real]) <= 1e-5


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_only_a_training_step_with_labels_defers_its_logits(kind):
    """Others read the logits: evaluation does, with labels too, and so does a loss of one's own."""
    model, batch = kinds.patched_model(kind, LLAMA), batch_of(MASKS["right"])
    assert type(model.train()(**batch).logits) is DeferredTensor
    assert type(model(input_ids=IDS, attention_mask=MASKS["right"]).logits) is torch.Tensor
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
        assert type(model.eval()(**batch).logits) is torch.Tensor


@pytest.mark.parametrize("kind", kinds.PEFT_KINDS)
def test_a_loss_of_the_logits_has_their_gradient(kind):
    mask = MASKS["right"]
    weight = torch.randn(models.VOCAB, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (kinds.patched_model(kind, LLAMA), kinds.stock_model(kind, LLAMA)):
        output = model.train()(**batch_of(mask))
        logits = output.logits[:, -mask.shape[1] :][mask == 1]
        (output.loss + (logits * weight).square().mean()).backward()
        gradients.append(models.peft_prefix(model).grad)
    assert difference(*gradients) <= 1e-4
