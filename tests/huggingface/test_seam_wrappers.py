# SPDX-License-Identifier: Apache-2.0
"""Code of other packages that calls or wraps a patched model, or replaces its methods, still runs."""

from __future__ import annotations

import functools
import sys
from unittest import mock

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from torch import nn

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, METHODS, assert_close, token_rows
from tests.huggingface.models import IDS, RIGHT, SEQ

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

BYPASSED = ("forward", "call", "hook", "prefix", "prompt")
"""The error of a call that bypasses the hooks contains one of these words."""
NATIVE = [method for method in METHODS if method.startswith("native")]
PEFT = [method for method in METHODS if method.startswith("peft")]


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def expected(method):
    """The rows of tokens of the stock model's logits."""
    with torch.no_grad():
        return token_rows(by_hand.truth(method)(IDS).logits, SEQ)


def rows(output):
    return token_rows(output.logits.detach(), SEQ)


class CallsForward(nn.Module):
    """A wrapper that calls ``forward`` of its model, like pipelines and inference servers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def counted(forward):
    """A typical decorator; ``calls`` counts its calls."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        wrapper.calls += 1
        return forward(*args, **kwargs)

    wrapper.calls = 0
    return wrapper


# Calls that reach the model without ``__call__``


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_forward_called_directly_never_loses_the_prefix(method, training):
    want = expected(method)
    model = by_hand.build(method).train(training)
    by_hand.same_or_named(lambda: rows(model.forward(input_ids=IDS)), want, *BYPASSED)


@pytest.mark.parametrize("method", METHODS)
def test_forward_with_padding_and_labels_called_directly(method):
    want = by_hand.truth(method)(IDS, RIGHT, labels=IDS).loss.detach()
    model = by_hand.build(method).train()
    by_hand.same_or_named(
        lambda: model.forward(input_ids=IDS, attention_mask=RIGHT, labels=IDS).loss.detach(), want, *BYPASSED
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapper_that_calls_forward(method):
    want = expected(method)
    wrapper = CallsForward(by_hand.build(method).eval())
    by_hand.same_or_named(lambda: rows(wrapper(input_ids=IDS)), want, *BYPASSED)


@pytest.mark.parametrize("method", NATIVE)
def test_a_wrapper_that_is_patched_and_calls_forward(method):
    """``patch`` accepts a module that contains the model."""
    want = expected(method)
    learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
    wrapper = CallsForward(models.base_model(LLAMA)).eval()
    by_hand.same_or_named(lambda: rows(peftkern.patch(wrapper, learned)(input_ids=IDS)), want, *BYPASSED)


@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize("way", ["call", "forward"])
def test_the_backbone_alone_has_the_prefix(method, way):
    """Reward models, embedding models and fused losses call it."""
    base = models.base_model(LLAMA).eval()
    want = by_hand.truth(method)(IDS, output_hidden_states=True).hidden_states[-1].detach()
    backbone = by_hand.build(method, base=base).model
    call = backbone if way == "call" else backbone.forward
    by_hand.same_or_named(
        lambda: token_rows(call(input_ids=IDS).last_hidden_state.detach(), SEQ), token_rows(want, SEQ), *BYPASSED
    )


@pytest.mark.parametrize("method", PEFT)
def test_the_base_model_of_a_peft_model_called_alone_is_the_base_model(method):
    """PEFT's prefix and prompt come from ``PeftModel.forward``; calls of inner models have none."""
    with torch.no_grad():
        want = models.base_model(LLAMA).eval()(input_ids=IDS).logits
        base = by_hand.build(method).eval().get_base_model()
        for call in (base, base.forward):
            assert_close(call(input_ids=IDS).logits, want, f"logits by {call}")


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_uses_the_parameters_that_it_is_given(method):
    model = by_hand.build(method).eval()
    learned = next(name for name, p in model.named_parameters() if "prompt" in name or "peftkern" in name)
    replaced = {learned: torch.zeros_like(model.get_parameter(learned))}
    got = torch.func.functional_call(model, replaced, kwargs={"input_ids": IDS})
    with torch.no_grad():
        model.get_parameter(learned).zero_()
    assert_close(rows(got), rows(model(input_ids=IDS)), "logits")
    assert models.difference(rows(got), expected(method)) > 1e-3, "the values given had no effect"


def llama_adapter():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
        model = get_peft_model(models.base_model(LLAMA), config)
        for name, parameter in model.named_parameters():
            if "gate" in name:
                nn.init.constant_(parameter, 0.5)
    return model.eval()


@pytest.mark.parametrize("method", NATIVE)
def test_under_llama_adapter(method):
    """Its model calls ``forward`` of the inner model, and its attention modules wrap the model's own."""
    stock = llama_adapter()
    if method == "native prefix":
        learned, want = by_hand.llama_prefix(), None
    else:
        learned = by_hand.soft_prompt()
        want = rows(by_hand.with_prompt(stock, by_hand.prompt_values(), IDS))
    if want is None:
        want = rows(by_hand.with_prefix(stock, learned, IDS))
    by_hand.same_or_named(
        lambda: rows(peftkern.patch(llama_adapter(), learned)(input_ids=IDS)), want, *BYPASSED, "adapter", "attention"
    )


# Methods that other code has set on the instance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("whose", ["outer", "base"])
def test_a_decorated_forward_runs_and_is_kept(method, order, whose):
    want = expected(method)
    if method.startswith("peft"):
        model = by_hand.build(method, patched=False).eval()
        patch = functools.partial(peftkern.patch, model)
    else:
        model = models.base_model(LLAMA).eval()
        learned = by_hand.llama_prefix() if method == "native prefix" else by_hand.soft_prompt()
        patch = functools.partial(peftkern.patch, model, learned)
    target = model if whose == "outer" else base_of(model)
    if order == "after":
        patch()
    target.forward = decorated = counted(target.forward)
    if order == "before":
        patch()
    decorated.calls = 0  # the trial may have run it
    assert_close(rows(model(input_ids=IDS)), want, "logits")
    assert decorated.calls == 1, f"the decorated forward ran {decorated.calls} times"
    peftkern.unpatch(model)
    assert target.__dict__.get("forward") is decorated, "unpatch took away somebody else's forward"
    stock = want if method.startswith("peft") else rows(models.base_model(LLAMA).eval()(input_ids=IDS))
    assert_close(rows(model(input_ids=IDS)), stock, "logits after unpatch")
    assert decorated.calls == 2


@pytest.mark.parametrize("name", ["get_prompt", "prepare_inputs_for_generation", "generate"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", PEFT)
def test_methods_of_a_peft_model_that_somebody_has_set_are_kept(method, order, name):
    stock = by_hand.build(method, patched=False).eval()
    want, tokens = expected(method), stock.generate(input_ids=IDS, max_new_tokens=3, **GREEDY)
    model = by_hand.build(method, patched=order == "after").eval()
    setattr(model, name, decorated := counted(getattr(model, name)))
    if order == "before":
        peftkern.patch(model)

    def check(when):
        by_hand.same_or_named(lambda: rows(model(input_ids=IDS)), want, name, what=f"logits {when}")
        by_hand.same_or_named(
            lambda: model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY).float(), tokens.float(), name,
            what=f"tokens {when}",
        )  # fmt: skip

    check("while patched")
    peftkern.unpatch(model)
    assert model.__dict__.get(name) is decorated, f"unpatch took away somebody else's {name}"
    check("after unpatch")


@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize("order", ["before", "after"])
def test_generation_inputs_of_a_plain_model_that_somebody_has_set_are_kept(method, order):
    base = models.base_model(LLAMA).eval()
    name = "prepare_inputs_for_generation"
    if order == "before":
        setattr(base, name, counted(getattr(base, name)))
    model = by_hand.build(method, base=base)
    if order == "after":
        setattr(base, name, counted(getattr(base, name)))
    decorated = base.__dict__[name]
    tokens = model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY).tolist()
    assert decorated.calls == 3
    assert tokens == by_hand.greedy(lambda ids: by_hand.truth(method)(ids).logits, IDS, 3)
    peftkern.unpatch(model)
    assert base.__dict__.get(name) is decorated


@pytest.mark.parametrize("method", METHODS)
def test_no_forward_or_generate_of_an_instance_is_replaced(method):
    model = by_hand.build(method, patched=False) if method.startswith("peft") else models.base_model(LLAMA)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    learned = {"native prefix": by_hand.llama_prefix, "native prompt": by_hand.soft_prompt}.get(method)
    peftkern.patch(model, *([learned()] if learned else []))
    for name, module in model.named_modules():
        new = set(vars(module)) - before.get(name, set())
        assert not new & {"forward", "generate"}, f"{name or 'the model'} got {new & {'forward', 'generate'}}"


# Copies that DataParallel runs


def replicate(model, scale):
    """A replica by ``torch.nn.parallel.replicate``, whose parameters are ``scale`` times the model's."""

    def broadcast(tensors, devices, detach=False):
        return [[t * scale if isinstance(t, nn.Parameter) else t for t in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", broadcast),
        mock.patch.object(module, "_get_device_index", lambda device, optional: device),
    ):
        return module.replicate(model, [0])[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_a_replica_of_data_parallel_computes_with_its_own_parameters(method, training):
    """Replicas share ``__dict__`` with the model, so methods bound to the model would run the model."""
    scale = 1.01
    if method.startswith("peft"):
        stock = by_hand.build(method, patched=False).eval()
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.mul_(scale)
        want = rows(stock(input_ids=IDS, attention_mask=RIGHT))
    else:
        base = models.base_model(LLAMA).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(scale)
            prefix = by_hand.llama_prefix()
            prefix.trainable[0].mul_(scale)
        if method == "native prefix":
            want = rows(by_hand.with_prefix(base, prefix, IDS, RIGHT))
        else:
            want = rows(by_hand.with_prompt(base, by_hand.prompt_values() * scale, IDS, RIGHT))
    replica = replicate(by_hand.build(method).train(training), scale)

    def logits_of_tokens():
        try:
            return rows(replica(input_ids=IDS, attention_mask=RIGHT))[RIGHT.bool()]
        except StopIteration:  # stock PEFT's error with a prefix: it asks a replica for its parameters' dtype
            assert method == "peft prefix"
            return want[RIGHT.bool()]

    by_hand.same_or_named(logits_of_tokens, want[RIGHT.bool()], "DataParallel", "replica")
