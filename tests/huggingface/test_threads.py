# SPDX-License-Identifier: Apache-2.0
"""Several threads change one model: each sees it patched or not, and blocks may end in any order."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

import peftkern
from peftkern import PrefixKV, eager_attention, model_info
from peftkern.backends import registry
from peftkern.huggingface import switch
from peftkern.huggingface.probing import quiet
from peftkern.huggingface.wiring import PATCH, changing
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, IDS, RIGHT

TIMES = 20


def base():
    torch.manual_seed(0)
    return models.base_model(FAMILIES["llama (GQA)"]).eval().requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=RIGHT, use_cache=False).logits


def traces(model):
    """Everything that a patch leaves in a model."""

    def of(module):
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        implementation = str(module.config._attn_implementation) if hasattr(module, "config") else None
        return set(module.__dict__), set(module._modules), module.training, hooks, implementation

    return {name: of(module) for name, module in model.named_modules()}


def at_once(*functions):
    """What functions return or raise that threads call at the same time."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(index, function):
        barrier.wait()
        try:
            results[index] = function()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=call) for call in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_of_two_threads_patches_a_model():
    model = base()
    stock, before = logits(model), traces(model)
    first, second = PrefixKV(model, 3, std=0.5), PrefixKV(model, 5, std=0.5)
    want = {}
    for prefix in (first, second):
        with peftkern.patched(model, prefix):
            want[prefix] = logits(model)
    for time in range(TIMES):
        results = at_once(*(lambda prefix=prefix: peftkern.patch(model, prefix) for prefix in (first, second)))
        errors = [error for error in results if isinstance(error, Exception)]
        assert len(errors) == 1, f"{results} the {time}th time"
        assert isinstance(errors[0], ValueError)
        assert str(errors[0]).startswith("model: expected a model that is not patched")
        assert torch.equal(logits(model), want[model.peftkern_prefix])
        peftkern.unpatch(model)
        assert traces(model) == before
        assert torch.equal(logits(model), stock)


def test_a_wrapper_and_what_it_holds_are_one_model():
    model = base()
    outer = torch.nn.ModuleDict({"inner": model})
    before = traces(model)
    for _ in range(TIMES):
        prefixes = PrefixKV(model, 3), PrefixKV(model, 3)
        results = at_once(*(lambda x=x, p=p: peftkern.patch(x, p) for x, p in zip((outer, model), prefixes)))  # noqa: B905
        patched = [x for x in results if not isinstance(x, Exception)]
        assert len(patched) == 1, results
        peftkern.unpatch(patched[0])
        assert traces(model) == before


def test_a_patch_and_an_unpatch_overlap():
    model = base()
    before = traces(model)
    for _ in range(TIMES):
        patched, unpatched = at_once(
            lambda: peftkern.patch(model, PrefixKV(model, 3)), lambda: peftkern.unpatch(model)
        )
        assert patched is model
        if isinstance(unpatched, Exception):
            assert "is not patched" in str(unpatched)
            peftkern.unpatch(model)
        assert traces(model) == before


def test_two_threads_unpatch():
    model = base()
    before = traces(model)
    for _ in range(TIMES):
        peftkern.patch(model, PrefixKV(model, 3))
        results = at_once(*[lambda: peftkern.unpatch(model)] * 2)
        assert sum(isinstance(x, ValueError) for x in results) == 1, results
        assert traces(model) == before


def test_two_models_are_patched_at_once():
    one, other = base(), base()
    for _ in range(3):
        results = at_once(*(lambda x=x: peftkern.patch(x, PrefixKV(x, 3)) for x in (one, other)))
        assert results == [one, other]
        peftkern.unpatch(one)
        peftkern.unpatch(other)


def test_an_error_ends_a_change():
    model = base()
    with pytest.raises(ValueError, match="prefix"):
        peftkern.patch(model, torch.nn.Linear(2, 2))
    (result,) = at_once(lambda: peftkern.patch(model, PrefixKV(model, 3)))
    assert result is model


def test_blocks_of_one_thread_may_be_nested():
    model = base()
    with changing(model), changing(model.model), changing(model):
        assert peftkern.patch(model, PrefixKV(model, 3)) is model


def test_a_block_does_not_remove_the_patch_of_another():
    model = base()
    with peftkern.patched(model, PrefixKV(model, 3)):
        peftkern.unpatch(model)
        peftkern.patch(model, PrefixKV(model, 4))
    assert PATCH in model.__dict__
    peftkern.unpatch(model)


def _backend(model, number):
    names = ("reference", "cpu", "reference")
    return peftkern.use_backend(names[number]), lambda: registry.choice("auto", True)[0], names[number]


def _switched(model, number):
    prefix = model.prefixes[number]
    return peftkern.switched(model, prefix), lambda: model.peftkern_prefix, prefix


def _packing(model, number):
    return switch.packing(model, {"input_ids": IDS}), lambda: model.model.training, True


def _quiet(model, number):
    return quiet(model), lambda: any(m.training for m in model.modules()), False


def _eval_mode(model, number):
    return model_info.in_eval_mode(model), lambda: any(m.training for m in model.modules()), False


def _attention(model, number):
    name = f"of_block_{number}"
    block = eager_attention.use_attention(model, name, lambda *args, **kwargs: None)
    return block, lambda: str(model.config._attn_implementation), name


BLOCKS = {
    "use_backend": _backend, "switched": _switched, "packing": _packing, "quiet": _quiet, "in_eval_mode": _eval_mode,
    "use_attention": _attention,
}  # fmt: skip


@pytest.fixture(scope="module")
def patched_model():
    model = base()
    peftkern.patch(model, PrefixKV(model, 3))
    model.__dict__["prefixes"] = [PrefixKV(model, n) for n in (2, 4, 5)]
    return model


@pytest.fixture
def patched(patched_model, kind):
    """In the mode that blocks of this kind change."""
    return patched_model.train(kind != "packing")


class Block:
    """A block that runs in a thread of its own until it is ended."""

    def __init__(self, block):
        self._begun, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(block,))
        self._thread.start()
        assert self._begun.wait(60)

    def _run(self, block):
        with block:
            self._begun.set()
            assert self._ends.wait(60)

    def end(self):
        self._ends.set()
        self._thread.join()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_blocks_may_end_in_any_order(kind, order, patched):
    """The block that was entered last and has not ended counts, and at the end nothing has changed."""
    blocks = [BLOCKS[kind](patched, number) for number in range(3)]
    read = blocks[0][1]
    original = read(), traces(patched), logits(patched)
    running = {}
    for number, (block, _, value) in enumerate(blocks):
        running[number] = Block(block)
        assert read() == value
    for number in order:
        running.pop(number).end()
        assert read() == (blocks[max(running)][2] if running else original[0])
    assert (read(), traces(patched)) == original[:2]
    assert torch.equal(logits(patched), original[2])


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_threads_overlap(kind, patched):
    original = BLOCKS[kind](patched, 0)[1](), traces(patched)

    def run(number):
        barrier.wait()
        with BLOCKS[kind](patched, number)[0]:
            threading.Event().wait(0.002 * number)

    for _ in range(TIMES):
        barrier = threading.Barrier(3)
        results = at_once(*(lambda number=number: run(number) for number in range(3)))
        assert results == [None] * 3
        assert (BLOCKS[kind](patched, 0)[1](), traces(patched)) == original
