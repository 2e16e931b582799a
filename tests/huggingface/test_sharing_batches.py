# SPDX-License-Identifier: Apache-2.0
"""Shared text in calls of every form: padding, masks, positions, groups, labels, heads, outputs."""

from __future__ import annotations

import pytest
import torch

import peftkern
from tests.huggingface import models
from tests.huggingface.models import FAMILIES, TASKS, patch_of
from tests.huggingface.shared_rows import (
    ROWS,
    A,
    B,
    C,
    D,
    E,
    F,
    differ,
    inputs_of,
    left_inputs,
    padded,
    share_everything,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LLAMA = FAMILIES["llama (GQA)"]
KINDS = ["llama (GQA)", "mistral (window 4)", "opt", "gpt-oss (sinks)"]


@pytest.fixture(autouse=True)
def share_every_row(monkeypatch):
    share_everything(monkeypatch)


def pair(family, **options):
    """The stock model and the patched one, in fp64."""
    stock, model = (models.base_model(family, torch.float64) for _ in range(2))
    return stock, peftkern.patch(model, share="prefixes", **options)


def masked(inputs, hide):
    """The inputs with places hidden that have no label."""
    mask = inputs["attention_mask"].clone()
    for place in hide:
        mask[place] = 0
    return inputs | {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


RIGHT, LEFT = inputs_of(ROWS), left_inputs(ROWS)
IDS = RIGHT["input_ids"]
STEPS = torch.arange(IDS.shape[1])[None]
CALLS = {
    "right": RIGHT,
    "left": LEFT,
    "equal padding on the left": left_inputs([A + C, A + C, F + B, F + B + D]),
    "no mask": {"input_ids": IDS, "labels": IDS},
    "positions of all rows": RIGHT | {"position_ids": STEPS + 3},
    "positions per row": RIGHT | {"position_ids": STEPS + torch.tensor([3, 3, 0, 1, 0])[:, None]},
    "holes": masked(RIGHT, [(0, 2), (1, 2), (2, 8)]),
    "a hole with a label": RIGHT | {"attention_mask": masked(RIGHT, [(0, 8), (4, 7)])["attention_mask"]},
    "a row of padding": masked(RIGHT, [3]),
    "the first row of padding": masked(RIGHT, [0]),
    "int32": RIGHT | {"input_ids": IDS.int()},
    "a bool mask": RIGHT | {"attention_mask": RIGHT["attention_mask"].bool()},
}


@pytest.mark.parametrize("labelled", [False, True], ids=["all logits", "labelled"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_equals_the_stock_models(name, call, labelled):
    inputs = CALLS[call]
    with models.fp64_throughout():
        stock, model = pair(FAMILIES[name], logits="labelled" if labelled else "all")
        want, want_gradients = train(stock, inputs)
        got, got_gradients = train(model, inputs)
    assert patch_of(model).shared_rows is not None, peftkern.explain(model)
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10
    if not labelled:
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert differ(got.logits[real], want.logits[real]) <= 1e-10


PACKED = {
    "one row": [[A + B, A + C, A]],
    "several rows": [[A, B], [A, D + E], [D + E + B[:1], C + D[:1]]],
    "nothing in common": [[A, B], [C + D[:2], F + D[:1]]],
}


@pytest.mark.parametrize("labelled", [False, True], ids=["all logits", "labelled"])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("name", KINDS)
def test_several_sequences_per_row_equal_one_per_row(name, case, labelled):
    """Positions tell them apart. Some stock models (OPT, GPT-OSS) do not, so this does not depend on shared text."""
    texts = [text for row in PACKED[case] for text in row]
    ids = torch.tensor([[token for text in row for token in text] for row in PACKED[case]])
    positions = torch.cat([torch.arange(len(text)) for text in texts]).view_as(ids)
    alone = inputs_of(texts)
    alone["labels"] = alone["input_ids"].masked_fill(alone["attention_mask"] == 0, -100)
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    with models.fp64_throughout():
        stock, model = pair(FAMILIES[name], logits="labelled" if labelled else "all")
        want, want_gradients = train(stock, alone)
        got, got_gradients = train(model, inputs)
    assert (patch_of(model).shared_rows is None) == (case == "nothing in common"), peftkern.explain(model)
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10
    if not labelled:
        assert differ(got.logits.flatten(0, 1), want.logits[alone["attention_mask"].bool()]) <= 1e-10


@pytest.mark.parametrize(
    ("what", "inputs"),
    [
        ("share too little text", inputs_of([A, B, F])),
        ("share too little text", inputs_of([A + B])),
        ("inputs_embeds", None),
    ],
)
def test_labelled_logits_do_not_need_shared_text(what, inputs):
    """Labels alone are enough to select logits."""
    stock, model = pair(FAMILIES["llama (GQA)"], logits="labelled")
    if inputs is None:
        embeddings = stock.get_input_embeddings()(IDS).detach()
        inputs = {"inputs_embeds": embeddings, "attention_mask": RIGHT["attention_mask"], "labels": RIGHT["labels"]}
    with models.fp64_throughout():
        want, want_gradients = train(stock, inputs)
        got, got_gradients = train(model, inputs)
    assert patch_of(model).shared_rows is None
    assert what in peftkern.explain(model)
    assert got.logits.shape[:2] == (1, int((inputs["labels"][:, 1:] != -100).sum()))
    assert differ(got.loss, want.loss) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10


def test_rows_of_different_groups_share_nothing():
    _, model = pair(FAMILIES["llama (GQA)"])
    _, both = train(model, RIGHT)
    assert patch_of(model).shared_rows == (55, len(A + B + C + D + F))
    _, apart = train(model, RIGHT | {"group_ids": torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)})
    assert patch_of(model).shared_rows == (55, len(A + B + C + D + F + A + B))
    assert differ(apart, both) <= 1e-6  # the loss of fp64 models is fp32
    train(model, RIGHT | {"group_ids": torch.arange(5)})
    assert patch_of(model).shared_rows is None


def test_left_padding_costs_windows_nothing():
    """Windows count padding between rows, but not before them."""
    for name in ("mistral (window 4)", "llama (GQA)"):
        _, model = pair(FAMILIES[name])
        train(model, LEFT)
        assert patch_of(model).shared_rows == (55, len(A + B + C + D + F)), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([9, 10])], ids=["1", "3", "tensor"])
def test_logits_to_keep(keep, training):
    inputs = {name: LEFT[name] for name in ("input_ids", "attention_mask", "position_ids")} | {"logits_to_keep": keep}
    stock, model = (m.train(training) for m in pair(FAMILIES["llama (GQA)"]))
    with models.fp64_throughout():
        want, got = stock(**inputs).logits, model(**inputs).logits
    assert patch_of(model).shared_rows is not None
    assert differ(got, want) <= 1e-10


def test_tuples_and_hidden_states():
    stock, model = (m.eval() for m in pair(FAMILIES["llama (GQA)"]))
    real = RIGHT["attention_mask"].bool()
    with torch.no_grad(), models.fp64_throughout():
        want = stock(**RIGHT, output_hidden_states=True, return_dict=False)
        got = model(**RIGHT, output_hidden_states=True, return_dict=False)
    assert patch_of(model).shared_rows is not None
    assert len(got) == len(want) == 4  # loss, logits, cache, hidden states
    assert differ(got[0], want[0]) <= 1e-10
    assert differ(got[1][real], want[1][real]) <= 1e-10
    for x, y in zip(got[3], want[3], strict=True):
        assert differ(x[real], y[real]) <= 1e-10


TASK_LABELS = {
    "llama SEQ_CLS": {"labels": torch.tensor([0, 1, 2, 0, 1])},
    "llama TOKEN_CLS": {"labels": (IDS % 3).masked_fill(RIGHT["attention_mask"] == 0, -100)},
    "llama QUESTION_ANS": {
        "start_positions": torch.tensor([0, 1, 2, 1, 2]),
        "end_positions": torch.tensor([3, 4, 5, 3, 4]),
    },
    "llama FEATURE_EXTRACTION": {},
}


@pytest.mark.parametrize("task", TASK_LABELS)
def test_other_heads(task):
    """Question answering reads all places; the others' outputs at padding are unused."""
    inputs = {"input_ids": IDS, **TASK_LABELS[task]}
    if task != "llama QUESTION_ANS":
        inputs["attention_mask"] = RIGHT["attention_mask"]
    if task == "llama FEATURE_EXTRACTION":  # the loss of this test reads all places
        inputs["input_ids"] = torch.tensor([A + B, A + C + D[:1], A + D + E])
        del inputs["attention_mask"]
    with models.fp64_throughout():
        stock, model = pair(TASKS[task])
        (want, want_gradients), (got, got_gradients) = train(stock, inputs), train(model, inputs)
    assert patch_of(model).shared_rows is not None
    if "loss" in want:
        assert differ(got["loss"], want["loss"]) <= 1e-10
    assert differ(got_gradients, want_gradients) <= 1e-10


def test_attention_weights_come_from_the_previous_implementation():
    config = {"attn_implementation": "eager"}
    stock, model = (models.base_model(FAMILIES["llama (GQA)"], torch.float64, **config).eval() for _ in range(2))
    peftkern.patch(model, share="prefixes")
    with torch.no_grad():
        want, got = stock(**RIGHT, output_attentions=True), model(**RIGHT, output_attentions=True)
    assert "output_attentions" in peftkern.explain(model)
    for x, y in zip(got.attentions, want.attentions, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4)], ids=["no columns", "no rows"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["no mask", "mask"])
def test_an_empty_batch_does_what_it_does_in_the_stock_model(shape, with_mask):
    ids = torch.ones(shape, dtype=torch.long)
    inputs = {"input_ids": ids, **({"attention_mask": ids} if with_mask else {})}
    results = []
    for model in pair(FAMILIES["llama (GQA)"]):
        try:
            results.append(tuple(model.eval()(**inputs).logits.shape))
        except (RuntimeError, IndexError) as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_a_hook_on_the_embeddings_of_another_package_prevents_sharing():
    """Noise differs at equal tokens; a hook that only asks for gradients does not."""
    _, model = pair(FAMILIES["llama (GQA)"])
    embeddings = model.get_input_embeddings()
    model.enable_input_require_grads()
    train(model, RIGHT)
    assert patch_of(model).shared_rows is not None
    hook = embeddings.register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    train(model, RIGHT)
    assert patch_of(model).shared_rows is None
    assert "hooks" in peftkern.explain(model)
    hook.remove()
    embeddings.forward = lambda ids: type(embeddings).forward(embeddings, ids)
    train(model, RIGHT)
    assert patch_of(model).shared_rows is None


def test_batches_in_which_sharing_saves_little_run_as_usual(monkeypatch):
    monkeypatch.undo()
    stock, model = pair(FAMILIES["llama (GQA)"])
    inputs = inputs_of([A + B, A + C, D + E])
    _, want = train(stock, inputs)
    _, got = train(model, inputs)
    assert patch_of(model).shared_rows is None
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_mask_of_four_dimensions_runs_as_usual():
    stock, model = pair(FAMILIES["llama (GQA)"])
    ids, _ = padded([A + B, A + B])
    causal = torch.ones(2, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with models.fp64_throughout():
        want, got = stock(input_ids=ids, attention_mask=causal), model(input_ids=ids, attention_mask=causal)
    assert "attention_mask" in peftkern.explain(model)
    assert differ(got.logits, want.logits) <= 1e-10


def compared(inputs, **options):
    """(the largest difference of logits at real tokens, rows before and after), in evaluation."""
    stock = models.base_model(LLAMA).eval()
    model = peftkern.patch(models.base_model(LLAMA).eval(), share="prefixes")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()
    with torch.no_grad():
        want, got = stock(**inputs, **options).logits, model(**inputs, **options).logits
    return models.difference(got[real], want[real]), patch_of(model).shared_rows


def test_left_padding_of_different_lengths_with_positions():
    """Rows share by position, not by column: long prompts, for which the fast bound decides."""
    prompt = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, mask = padded([prompt + A, prompt + B[:2], prompt + C[:1]], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    difference, rows = compared({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert difference <= 1e-5
    assert rows == (ids.numel(), 40 + len(A) + 3)


def test_tokens_at_equal_negative_positions_differ():
    ids = torch.tensor([A + C, B + D[:1] + C, A + C])[:, :10]
    positions = torch.arange(-5, 5).expand(3, -1)
    mask = torch.ones_like(ids)
    difference, _ = compared({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert difference <= 1e-5


@pytest.mark.parametrize("use_cache", [None, False])
def test_several_sequences_in_a_row_are_those_of_the_stock_model(use_cache):
    """With a cache it does not tell them apart."""
    ids = torch.tensor([A + B[:4], A + C])
    positions = torch.tensor([[*range(6), *range(4)]]).expand(2, -1)
    difference, _ = compared({"input_ids": ids, "position_ids": positions}, use_cache=use_cache)
    assert difference <= 1e-5


@pytest.mark.parametrize("shape", [(3, 9), (2, 12), (1, 8)])
def test_labels_of_another_shape_go_to_the_stock_model(shape):
    results = []
    for shares in (False, True):
        model = models.base_model(LLAMA)
        model = peftkern.patch(model, share="prefixes") if shares else model
        try:
            results.append(float(model(input_ids=torch.tensor([A + D[:2]] * 3), labels=torch.full(shape, 5)).loss))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def _scale_rows(module, args, output):
    return output * torch.tensor([1.0, 2.0, 3.0])[:, None, None]


def test_a_hook_on_a_layer_gets_the_batch():
    """As for steering: it changes each row by another factor."""
    ids, logits = torch.tensor([A + B, A + B, A + B[::-1]]), []
    for shares in (False, True):
        model = models.base_model(LLAMA).eval()
        model = peftkern.patch(model, share="prefixes") if shares else model
        model.model.layers[1].register_forward_hook(_scale_rows)
        logits.append(model(input_ids=ids).logits)
    assert "hooks on layers may read the batch" in peftkern.explain(model)
    assert models.difference(*logits) <= 1e-5


@pytest.mark.parametrize("ids", [torch.tensor([0, 1]), torch.tensor([0.1, 0.2, 0.3]), [0, 1, 2]])
def test_groups_that_are_not_one_integer_per_row_are_refused(ids):
    model = peftkern.patch(models.base_model(LLAMA), share="prefixes")
    with pytest.raises(ValueError, match=r"group_ids: expected integers \[3\]"):
        model(input_ids=torch.tensor([A, A, A]), group_ids=ids)
