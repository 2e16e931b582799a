# SPDX-License-Identifier: Apache-2.0
"""Every way to generate returns the tokens of one stock forward over the whole sequence per token."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import GREEDY, LLAMA, METHODS, assert_close
from tests.huggingface.models import FAMILIES, IDS, LEFT, ONES

pytestmark = [
    pytest.mark.filterwarnings("ignore:peftkern:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

NEW = 6
PEFT = [method for method in METHODS if method.startswith("peft")]
CAUSAL = ["llama (GQA)", "gpt2", "mistral (window 4)", "gemma2 (softcap)", "gpt-neox", "opt", "qwen3"]


@pytest.fixture(scope="module")
def truths():
    return {method: by_hand.truth(method) for method in METHODS}


def by_steps(truths, method, ids, new=NEW):
    return by_hand.greedy(lambda ids: truths[method](ids).logits, ids, new)


def tokens(model, ids=IDS, **options):
    return model.generate(input_ids=ids, **{"max_new_tokens": NEW, **GREEDY, **options}).tolist()


WAYS = {
    "cache": ({}, 3),
    "no cache": ({"use_cache": False}, 3),
    "chunked prefill": ({"prefill_chunk_size": 3}, 3),
    "chunks that divide": ({"prefill_chunk_size": 7}, 3),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, 1),
    "no cache, one sample": ({"use_cache": False}, 1),
}
"""Options of ``generate``, and the size of the batch."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens(truths, method, way):
    options, batch = WAYS[way]
    model = by_hand.build(method).eval()
    assert tokens(model, IDS[:batch], **options) == by_steps(truths, method, IDS[:batch])


@pytest.mark.parametrize("method", METHODS)
def test_an_assistant_model(truths, method):
    """Two assistants: one that agrees with the model often, and one that never does."""
    want = by_steps(truths, method, IDS[:1])
    for seed in (1, 2):
        torch.manual_seed(seed)
        assistant = models.base_model(LLAMA).eval()
        if seed == 2:
            torch.nn.init.normal_(assistant.lm_head.weight)
        model = by_hand.build(method).eval()
        assert tokens(model, IDS[:1], assistant_model=assistant) == want


@pytest.mark.parametrize("method", METHODS)
def test_a_patched_assistant(truths, method):
    """The assistant is another patched model, and stores no state in the model that it assists."""
    model, assistant = by_hand.build(method).eval(), by_hand.build("native prefix").eval()
    assert tokens(model, IDS[:1], assistant_model=assistant) == by_steps(truths, method, IDS[:1])


@pytest.mark.parametrize("padding", ["none", "ones"])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_turn_on_the_returned_cache(truths, method, padding):
    model = by_hand.build(method).eval()
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, **GREEDY}
    mask = None if padding == "none" else ONES
    turn = model.generate(input_ids=IDS, attention_mask=mask, **options)
    longer = torch.cat([turn.sequences, IDS[:, :2]], 1)
    more = None if mask is None else torch.ones_like(longer)
    cache = turn.past_key_values
    second = model.generate(input_ids=longer, attention_mask=more, past_key_values=cache, **options)
    assert turn.sequences.tolist() == by_steps(truths, method, IDS, 4), "the first turn"
    assert second.sequences.tolist() == by_steps(truths, method, longer, 4), "the second turn"


@pytest.mark.parametrize("method", METHODS)
def test_branches_of_one_conversation(truths, method):
    """A copy of the returned cache continues independently."""
    model = by_hand.build(method).eval()
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, **GREEDY}
    turn = model.generate(input_ids=IDS, **options)
    for end in (IDS[:, :2], IDS[:, 3:6]):
        longer = torch.cat([turn.sequences, end], 1)
        cache = copy.deepcopy(turn.past_key_values)
        got = model.generate(input_ids=longer, past_key_values=cache, **options).sequences
        assert got.tolist() == by_steps(truths, method, longer, 3)


@pytest.mark.parametrize("name", CAUSAL[1:])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("way", ["no cache", "chunked prefill"])
def test_greedy_tokens_of_other_families(name, kind, way):
    make = models.peft_model if kind == "prefix" else models.prompt_model
    stock, model = make(FAMILIES[name], patched=False).eval(), make(FAMILIES[name], patched=True).eval()
    options, batch = WAYS[way]
    want = by_hand.greedy(lambda ids: stock(input_ids=ids).logits, IDS[:batch])
    assert tokens(model, IDS[:batch], **options) == want


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("way", ["cache", "no cache"])
def test_greedy_tokens_of_encoder_decoders(name, way):
    family = FAMILIES[name]
    stock, model = (models.peft_model(family, patched=patched).eval() for patched in (False, True))
    want = models.generate(stock, family.task, do_sample=False)
    assert models.generate(model, family.task, do_sample=False, **WAYS[way][0]).tolist() == want.tolist()


# In training mode


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "not reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "gpt-bigcode (MQA)", "opt", "t5", "bart"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_in_train_mode_gives_the_tokens_of_eval(kind, name, checkpointing):
    """As in callbacks and evaluation during training. GPT-2 drops its cache there; stock PEFT raises or is wrong."""
    family = FAMILIES[name]
    make = models.peft_model if kind == "prefix" else models.prompt_model
    want = models.generate(make(family, patched=False).eval(), family.task, do_sample=False, attention_mask=ONES)
    model = make(family, patched=True).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    got = models.generate(model, family.task, do_sample=False, attention_mask=ONES)
    assert got.tolist() == want.tolist()
    assert model.training, "generate left another mode"


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_in_train_mode_of_plain_models(kind, name):
    family, results = FAMILIES[name], []
    for training in (False, True):
        model = models.base_model(family)
        learned = models.native_prefix(models.peft_model(family, patched=False))
        peftkern.patch(model, learned if kind == "prefix" else by_hand.soft_prompt())
        if training:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.eval()
        results.append(tokens(model))
    assert results[1] == results[0]


def test_a_training_step_after_generation_in_train_mode():
    """The step is that of a model that has not generated, with checkpointing still on."""
    steps = []
    for generates in (False, True):
        model = models.peft_model(FAMILIES["gpt2"], patched=True).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if generates:
            tokens(model)
        assert model.get_base_model().is_gradient_checkpointing
        steps.append(models.training_step(model, "CAUSAL_LM", models.RIGHT))
    assert_close(steps[1].loss, steps[0].loss, "loss")
    by_hand.assert_same_gradients(steps[1].gradients, steps[0].gradients)


# Multitask prompts


@torch.no_grad()
@pytest.mark.parametrize("task_ids", [[1], [2, 0], [1, 1]], ids=str)
def test_task_ids_are_broadcast_as_in_peft(task_ids):
    """One task for the batch, or one for each of two samples; in generation and in forward."""
    stock, model = (
        models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=patched).eval() for patched in (False, True)
    )
    inputs = {"input_ids": IDS[:2], "task_ids": torch.tensor(task_ids)}
    assert_close(model(**inputs).logits, stock(**inputs).logits, "logits")
    options = {"max_new_tokens": NEW, **GREEDY}
    assert model.generate(**inputs, **options).tolist() == stock.generate(**inputs, **options).tolist()


def test_one_task_for_the_batch_trains_as_in_peft():
    steps = []
    for patched in (False, True):
        model = models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=patched)
        steps.append(models.training_step(model, "CAUSAL_LM", models.RIGHT, task_ids=torch.tensor([1])))
    assert_close(steps[1].loss, steps[0].loss, "loss")
    by_hand.assert_same_gradients(steps[1].gradients, steps[0].gradients)


@pytest.mark.parametrize("task_ids", [[1, 2], [0, 1, 2, 3]], ids=str)
def test_task_ids_of_another_batch_are_refused(task_ids):
    """PEFT fails in a multiplication of tensors."""
    model = models.prompt_model(LLAMA, "MULTITASK_PROMPT_TUNING", patched=True).eval()
    with pytest.raises((ValueError, RuntimeError)):
        model(input_ids=IDS, task_ids=torch.tensor(task_ids))


# Masks with holes


HOLES = {
    "one hole": [[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1]],
    "each sample": [[1, 0, 1, 0, 1, 0, 1], [1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]],
    "a hole and padding": [[0, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
}


@torch.no_grad()
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_masks_with_holes_with_pefts_bugs(kind, name, holes):
    """A prefix is always PEFT's. Logits of each step are compared too, because tokens may agree by chance."""
    make = models.peft_model if kind == "prefix" else models.prompt_model
    stock, model = make(FAMILIES[name], patched=False).eval(), make(FAMILIES[name], patched=False).eval()
    peftkern.patch(model, **({} if kind == "prefix" else {"peft_bugs": True}))
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor(HOLES[holes])}
    want, got = stock.generate(**inputs, **options), model.generate(**inputs, **options)
    for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert_close(a, b, f"logits of new token {step}")
    assert got.sequences.tolist() == want.sequences.tolist()
    keep = inputs["attention_mask"].bool()
    if kind == "prompt":
        keep = models.behind_prompt(inputs["attention_mask"]).bool()
    assert_close(model(**inputs).logits[keep], stock(**inputs).logits[keep], "logits of forward")


# A part of the model as its own assistant


@pytest.mark.parametrize("method", METHODS)
def test_an_early_exit_works_or_says_why_and_leaves_the_model_whole(truths, method):
    """The model itself, with fewer layers, is the assistant."""
    model, want = by_hand.build(method).eval(), by_steps(truths, method, IDS[:1])
    config = (model.get_base_model() if method in PEFT else model).config
    before = copy.deepcopy(config.to_dict())
    got = []
    if not by_hand.refused(
        lambda: got.append(tokens(model, IDS[:1], assistant_early_exit=1)), "early", "assistant", "layers"
    ):
        assert got[0] == want
    assert config.to_dict() == before, "the configuration is another"
    assert tokens(model) == by_steps(truths, method, IDS), "tokens after the early exit"
    with torch.no_grad():
        logits = models.generate(model, LLAMA.task, do_sample=False, attention_mask=LEFT)
    fresh = models.generate(by_hand.build(method).eval(), LLAMA.task, do_sample=False, attention_mask=LEFT)
    assert logits.tolist() == fresh.tolist()
