# SPDX-License-Identifier: Apache-2.0
"""Two processes under DDP and FSDP2 have the losses and parameters of stock PEFT on the whole batch.

All runs share one pair of processes, whose start takes longer than they do.
"""

from __future__ import annotations

import datetime
import os
import socket
import traceback

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peftkern
from tests.huggingface.kinds import (
    KINDS,
    assert_learns,
    is_native,
    losses_differ,
    patched_model,
    stock_model,
    trained,
)
from tests.huggingface.models import FAMILIES, VOCAB, difference

TOLERANCE = 1e-5
STEPS = 3
LLAMA = FAMILIES["llama (GQA)"]
IDS = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[::2, -2:] = 0  # equal numbers of tokens per half, so that the mean of their losses is that of the whole batch
LABELS = IDS.masked_fill(MASK == 0, -100)

PATCH_FIRST, WRAP_FIRST = "patch, then wrap", "wrap, then patch"
STRATEGIES = ("ddp", "fsdp2")
# A wrapper does not know the parameters of a native module that is added after it.
RUNS = [(kind, PATCH_FIRST) for kind in KINDS] + [(kind, WRAP_FIRST) for kind in KINDS if not is_native(kind)]


def wrap(model, strategy):
    if strategy == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(model, wrapped, rows, average):
    """The losses of all rows, and the parameter after the last step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    wrapped.train()
    for _ in range(STEPS):
        loss = wrapped(input_ids=IDS[rows], attention_mask=MASK[rows], labels=LABELS[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(average(loss.detach()).item())
    return losses, trained(model)


def mean_of_processes(loss):
    loss = loss.clone()
    torch.distributed.all_reduce(loss)
    return loss / 2


def distributed_run(kind, order, strategy, rank):
    if order == PATCH_FIRST:
        model = patched_model(kind, LLAMA)
        wrapped = wrap(model, strategy)
    else:
        model = stock_model(kind, LLAMA)
        wrapped = wrap(model, strategy)
        peftkern.patch(model)
    return run(model, wrapped, slice(2 * rank, 2 * rank + 2), mean_of_processes)


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    results = {}
    for strategy in STRATEGIES:
        for kind, order in RUNS:
            try:
                results[strategy, kind, order] = distributed_run(kind, order, strategy, rank)
            except Exception:  # reported by the test of this run; the other runs continue
                results[strategy, kind, order] = traceback.format_exc(limit=-4)
    torch.save(results, os.path.join(folder, f"{rank}"))
    torch.distributed.destroy_process_group()


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each process, losses and parameter of each run, or its traceback."""
    folder = str(tmp_path_factory.mktemp("runs"))
    torch.multiprocessing.spawn(_worker, args=(_free_port(), folder), nprocs=2)
    return [torch.load(os.path.join(folder, str(rank)), weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "order"), RUNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_like_one(strategy, kind, order, results):
    stock = stock_model(kind, LLAMA)
    want_losses, want_parameter = run(stock, stock, slice(None), lambda loss: loss)
    assert_learns(want_losses)
    for rank, of_process in enumerate(results):
        result = of_process[strategy, kind, order]
        assert not isinstance(result, str), f"process {rank} raised:\n{result}"
        losses, parameter = result
        assert losses_differ(losses, want_losses) <= TOLERANCE, f"process {rank}: {losses}, stock {want_losses}"
        assert difference(parameter, want_parameter) <= TOLERANCE, f"process {rank}: other parameters"
