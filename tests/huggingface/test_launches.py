# SPDX-License-Identifier: Apache-2.0
"""What a patched layer runs in a training step, compared with a layer of the base model without a prefix.

Attention changes, and nothing is added: casts, index tensors and masks are made once per forward. On a GPU every
operation counted here is a kernel launch.
"""

from __future__ import annotations

import collections
import dataclasses

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.huggingface import kinds, models
from tests.huggingface.models import FAMILIES, IDS, MASKS

LLAMA = FAMILIES["llama (GQA)"]
#: Operations that launch no kernel.
FREE = frozenset(
    ["view", "transpose", "slice", "select", "t", "expand", "unsqueeze", "squeeze", "detach", "alias", "as_strided",
     "unbind", "permute", "_unsafe_view", "empty", "new_empty", "new_empty_strided", "lift_fresh"]
)  # fmt: skip
#: Of stock attention on a CPU; ``zeros`` is made by its backward.
STOCK = frozenset(
    ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward", "zeros",
     "cat"]
)  # fmt: skip
OURS = {"prefix_attention": 1, "prefix_attention_backward": 1}


class Operations(TorchDispatchMode):
    """Counts the operations in the block, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        return output


def operations_per_layer(make, batch):
    """{name: operations that one more layer adds to a step}; of a second step, as the first may warn."""
    counts = []
    for layers in (2, 3):
        model = make(dataclasses.replace(LLAMA, arguments=LLAMA.arguments | {"num_hidden_layers": layers})).train()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.enable_input_require_grads()
        for _ in range(2):
            model.zero_grad()
            with Operations() as operations:
                model(**batch).loss.backward()
        counts.append(operations.counts)
    return {name: counts[1][name] - counts[0][name] for name in counts[1] if name not in FREE}


MASK = MASKS["right"]
BATCHES = {
    "full": {"input_ids": IDS, "labels": IDS},
    "padded": {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_patched_layer_adds_no_operations(kind, batch):
    """A prompt's keys are rows of the batch, whose gradient from the other rows is added in place."""
    base = operations_per_layer(lambda family: models.base_model(family).requires_grad_(False), BATCHES["full"])
    patched = operations_per_layer(lambda family: kinds.patched_model(kind, family), BATCHES[batch])
    added = {name: patched.get(name, 0) - base.get(name, 0) for name in base.keys() | patched.keys()}
    want = OURS | ({"add_": 2} if kind.endswith("prompt") else {})
    assert {name: count for name, count in added.items() if count > 0 and name not in STOCK} == want
