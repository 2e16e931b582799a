# SPDX-License-Identifier: Apache-2.0
"""A training step that shares text waits for the device once, for the tensors that decide what is shared.

There is no device here, so one is imitated: tensors of a subclass are "on the device", and so is what is computed
from them or moved there. Reading the values of such a tensor counts. Other tensors are on the host, and free to read.
"""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import peftkern
from peftkern import PrefixKV, SoftPrompt
from peftkern.huggingface import sharer
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, PREFIX, patch_of
from tests.huggingface.shared_rows import ROWS, inputs_of, left_inputs, share_everything
from tests.huggingface.test_synchronisations import CountMethods, CountWaits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

#: The device of the imitation. Host tensors are on torch.device("cpu"), which differs from it.
DEVICE = torch.device("cpu", 0)


class OnDevice(Tensor):
    """A tensor on the device; results of operations on it are, too."""

    device = property(lambda self: DEVICE)


def on_device(x):
    return x.clone().as_subclass(OnDevice)


def moves_to_device(func, args, kwargs):
    """Whether a call moves a host tensor to the device."""
    return func is Tensor.to and DEVICE in (*args[1:], *kwargs.values()) and not isinstance(args[0], OnDevice)


class Transfers(TorchFunctionMode):
    """``to`` and ``cpu`` move tensors between host and device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            return result.as_subclass(Tensor)
        return on_device(result) if moves_to_device(func, args, kwargs or {}) else result


class CountDeviceMethods(CountMethods):
    """Reads of tensors on the device, and moves to the device that the host waits for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waits = moves_to_device(func, args, kwargs or {}) and not (kwargs or {}).get("non_blocking")
        if waits and not args[0].is_floating_point():  # parameters are on the host in the imitation only
            self.found["to"] += 1
        if any(isinstance(x, OnDevice) for x in tree_leaves(args)):
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class CountDeviceWaits(CountWaits):
    """Counts waits for the device only."""

    def __init__(self):
        super().__init__()
        self.methods = CountDeviceMethods(self.found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def host_values(x):
    """:func:`peftkern.arguments.host_values`, for which the device is not the CPU."""
    if not isinstance(x, OnDevice):
        return x
    host = getattr(x, "_peftkern_host", None)
    return x.cpu() if host is None else host


def to_host(tensors):
    """:func:`.sharer._to_host`, for which the device is not the CPU: one transfer of all tensors."""
    assert all(isinstance(x, OnDevice) for x in tensors.values())
    flat = torch.cat([x.flatten().long() for x in tensors.values()]).cpu()
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(tensors.items(), parts, strict=True)}


@pytest.fixture(autouse=True)
def imitation(monkeypatch):
    share_everything(monkeypatch)
    monkeypatch.setattr(sharer, "_to_host", to_host)
    for name, module in list(sys.modules.items()):
        if name.startswith("peftkern.") and hasattr(module, "host_values"):
            monkeypatch.setattr(module, "host_values", host_values)


def waits_of_a_step(model, inputs):
    """(waits for the device in the forward, all reads in the backward) of the second step; the first may warn."""
    model.train()
    for _ in range(2):
        model.zero_grad()
        with Transfers(), CountDeviceWaits() as forward:
            loss = model(**{name: on_device(x) for name, x in inputs.items()}).loss
        loss = loss.as_subclass(Tensor)
        with CountWaits() as backward:
            loss.backward()
    return dict(forward.found), dict(backward.found)


def patched(kind, name, **options):
    base = models.base_model(FAMILIES[name])
    learned = {
        "none": lambda: None,
        "prefix": lambda: PrefixKV(base, PREFIX, std=0.5),
        "prompt": lambda: SoftPrompt(base, PREFIX, std=0.5),
        "prompts": lambda: SoftPrompt(base, PREFIX, num_prompts=3, std=0.5),
    }[kind]()
    return peftkern.patch(base, learned, share="prefixes", **options)


BATCHES = {"right": inputs_of(ROWS), "left": left_inputs(ROWS)}


@pytest.mark.parametrize("logits", ["all", "labelled"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "name", ["llama (GQA)", "mistral (window 4)"]
)  # tables of positions are checked on CPUs only
@pytest.mark.parametrize("kind", ["none", "prefix", "prompt", "prompts"])
def test_a_training_step_waits_once(kind, name, batch, logits):
    inputs = BATCHES[batch] | {"group_ids": torch.zeros(len(ROWS), dtype=torch.long)}
    if kind == "prompts":
        inputs["prompt_ids"] = torch.tensor([0, 0, 1, 1, 0])
    model = patched(kind, name, logits=logits)
    forward, backward = waits_of_a_step(model, inputs)
    assert patch_of(model).shared_rows is not None or (kind == "prefix" and batch == "left")
    assert forward == {"cpu": 1}
    assert backward == {}


def test_evaluation_waits_once():
    model = patched("none", "llama (GQA)").eval()
    inputs = {name: on_device(x) for name, x in BATCHES["right"].items()}
    with torch.no_grad(), Transfers(), CountDeviceWaits() as count:
        model(**inputs)
    assert patch_of(model).shared_rows is not None
    assert count.found == {"cpu": 1}


def test_the_imitation():
    host, device = torch.arange(4), on_device(torch.arange(4))
    with Transfers(), CountDeviceWaits() as count:
        assert isinstance(host.to(DEVICE) + 1, OnDevice)
        assert isinstance(device[host > 5], OnDevice)
        assert not isinstance(device.cpu(), OnDevice)
        host.tolist(), host.sum().item(), host[host > 1], (device + 1).to(torch.int32)
        host.to(DEVICE, non_blocking=True), device.to(DEVICE), host.to(torch.int32)
        device.sum().item(), host.to(DEVICE).tolist(), host[device > 1]
    assert count.found == {"cpu": 1, "_local_scalar_dense": 1, "tolist": 1, "index": 2, "to": 2}


def test_a_planted_read_is_seen():
    model = patched("none", "llama (GQA)")
    build = sharer.Sharer.build

    def reads(self, builder, host, *args):
        layout = build(self, builder, host, *args)
        layout.to(DEVICE).rows.max().item()
        return layout

    with mock.patch.object(sharer.Sharer, "build", reads):
        forward, _ = waits_of_a_step(model, BATCHES["right"])
    assert forward == {"cpu": 1, "_local_scalar_dense": 1}
