# SPDX-License-Identifier: Apache-2.0
"""Packed batches: their layout, and prefixes in training steps without padding."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import PrefixKV
from peftkern.arguments import host_values
from peftkern.huggingface.layout import Layout
from peftkern.huggingface.packing import LogitRows, PackedBatch, take_rows
from peftkern.huggingface.sharing import share_rows
from tests.huggingface import models
from tests.huggingface.models import BATCH, FAMILIES, IDS, LEFT, MASKS, PREFIX, RIGHT, SEQ, VOCAB, rows_of
from tests.transfers import Moves

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

TOLERANCE = 1e-5
LLAMA = FAMILIES["llama (GQA)"]
CPU = torch.device("cpu")
CAUSAL = [name for name, family in FAMILIES.items() if family.task == "CAUSAL_LM"]

#: Three sequences in one row, and the same ones padded.
PACKED_IDS = IDS.flatten()[:14].view(2, SEQ)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
SEQUENCES = [PACKED_IDS[0, :3], PACKED_IDS[0, 3:], PACKED_IDS[1, :5], PACKED_IDS[1, 5:]]


def padded(sequences, value):
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)


@pytest.mark.parametrize("name", MASKS)
def test_a_layout_goes_there_and_back(name):
    mask = MASKS[name]
    layout = Layout.of((BATCH, SEQ), CPU, mask=mask)
    packed = layout.pack(IDS)
    real = (torch.ones(BATCH, SEQ) if mask is None else mask).bool()
    assert packed.tolist() == [IDS[real].tolist()]
    assert layout.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert layout.cu_seqlens.dtype == torch.int32
    assert torch.equal(packed[0][layout.rows][real], IDS[real])
    assert layout.positions.tolist() == torch.arange(SEQ).expand(BATCH, -1)[real].tolist()
    assert layout.key_mask is None


def test_padding_shows_a_row_of_its_sequence():
    layout = Layout.of((2, 4), CPU, mask=torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]))
    assert layout.rows.tolist() == [[0, 0, 1, 1], [2, 2, 2, 3]]


def test_positions_from_the_first_token():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert Layout.of((2, 4), CPU, mask=mask).positions.tolist() == [1, 2, 3, 0, 1, 2]
    assert Layout.of((2, 4), CPU, mask=mask, from_first=True).positions.tolist() == [0, 1, 2, 0, 1, 2]
    kept = Layout.of((2, 4), CPU, mask=mask, from_first=True, keep_padding=True)
    assert kept.pack(torch.arange(8).view(2, 4)).tolist() == [[1, 2, 3, 0, 4, 5, 6, 7]], "padding goes behind"
    assert kept.rows.tolist() == [[3, 0, 1, 2], [4, 5, 6, 7]]
    assert kept.key_mask.tolist() == [True, True, True, False, True, True, True, False]


def test_needed_padding_and_gaps():
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    needed = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    layout = Layout.of((2, 5), CPU, mask=mask, needed=needed)
    assert layout.tokens.tolist() == [0, 2, 5, 6, 7]
    assert layout.key_mask.tolist() == [True, True, True, True, False]
    assert Layout.of((2, 5), CPU, mask=mask, keep_gaps=True).tokens.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
@pytest.mark.parametrize("from_first", [False, True])
def test_small_and_empty_batches(shape, from_first):
    layout = Layout.of(shape, CPU, mask=torch.zeros(shape), from_first=from_first, keep_padding=shape[1] == 0)
    assert layout.rows.shape == shape
    assert layout.cu_seqlens.shape == (shape[0] + 1,)
    if 0 not in shape:
        assert layout.cu_seqlens.tolist() == [0, 0], "a sample without tokens is an empty sequence"


def test_rows_of_several_sequences():
    layout = Layout.of((2, SEQ), CPU, position_ids=POSITIONS)
    assert layout.cu_seqlens.tolist() == [0, 3, 7, 12, 14]
    assert layout.owners.tolist() == [0, 0, 1, 1]
    assert layout.several_per_row
    assert not Layout.of((2, SEQ), CPU, position_ids=torch.arange(SEQ)[None]).several_per_row


def test_a_head_pairs_rows_with_the_labels_of_the_next_ones():
    """The prompt's last row, 1, predicts the first token of each sequence."""
    labels = torch.tensor([[10, 11, 12], [20, 21, -100]])
    layout = Layout.of((2, 3), CPU, mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    packed = PackedBatch(layout, torch.zeros(1, 2, 4), show_prompts=True)
    head = LogitRows(packed, labels, labelled=False)
    assert head.rows.tolist() == [1, 1, 0, 1, 2, 3, 4, 5, 6, 0]
    assert head.labels.tolist() == [[-100, 10, 20, -100, -100, 11, 12, -100, 21, -100]]
    head = LogitRows(packed, labels, labelled=True)
    assert head.rows.tolist() == [1, 1, 2, 3, 5, 0]
    assert head.labels.tolist() == [[-100, 10, 20, 11, 12, 21]]
    assert packed.shown_rows().tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 6]]
    assert LogitRows(packed, None, labelled=True, keep=1).rows.tolist() == [4, 6]


def test_the_numbers_of_chains_are_moved_at_once_without_waiting():
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8], [9, 9, 9, 9]])
    layout = share_rows(Layout.of(ids.shape, CPU), ids, min_saved=1)
    packed = PackedBatch(layout, torch.zeros(2, 5, 4), torch.tensor([1, 1, 0]))
    with Moves() as moves:
        got = packed.chains(PREFIX, torch.device("meta"))
    assert moves.asynchronous == [True]
    want = packed.chains(PREFIX, CPU)
    assert got["max_prefix_len"] == want["max_prefix_len"]
    for name in ("prefix_ids", "prefix_starts", "prefix_lens"):
        assert (got[name].shape, got[name].dtype) == (want[name].shape, torch.int32)
        assert host_values(got[name]).tolist() == want[name].tolist()
    assert want["prefix_starts"].tolist() == [0, 5, 10, 12, 14, 16]
    assert want["prefix_lens"].tolist() == [PREFIX, 5, 5, 2, 2, 2, 4]


@pytest.mark.parametrize("labelled", [False, True])
def test_rows_of_labels_are_moved_without_waiting(labelled):
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]])
    layout = share_rows(Layout.of(ids.shape, CPU), ids, labels=ids, min_saved=1)
    assert layout.segments.repeated.tolist() == [0, 1]
    packed = PackedBatch(layout.to(torch.device("meta")))
    labels = ids.to("meta")
    with Moves() as moves:
        LogitRows(packed, labels, labelled=labelled, num_labelled=6)
    assert moves.asynchronous == ([] if labelled else [True])


class Float32(TorchDispatchMode):
    """``largest`` becomes the number of bytes of the largest fp32 tensor that is made in the block."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("limit", "num_columns"), [(1 << 24, 37), (4 * 27 * 5, 37), (1, 37), (1, 0)])
def test_the_gradient_of_repeated_rows_is_summed_in_fp32_a_few_columns_at_a_time(
    limit, num_columns, dtype, monkeypatch
):
    monkeypatch.setattr("peftkern.huggingface.packing._CHUNK_BYTES", limit)
    rows = torch.tensor([[0, 6, 2, 2, 2], [2, 0, 3, 4, 2], [0, 1, 2, 5, 5], [0, 0, 0, 0, 0]])
    num_rows = 7
    x = torch.zeros(num_rows, num_columns, dtype=dtype, requires_grad=True)
    dout = torch.randn(*rows.shape, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = take_rows(x, rows, repeat=True)
    with Float32() as temporary:
        out.backward(dout)
    want = torch.zeros(num_rows, num_columns).index_add_(0, rows.flatten(), dout.float().flatten(0, 1))
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, want.to(dtype))
    if dtype != torch.float32:
        assert temporary.largest <= max(limit, 4 * rows.numel())


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_prefix_tuning_leaves_padding_out(name, padding):
    """Loss and gradients are equal to those of PEFT, which computes padding."""
    family, mask = FAMILIES[name], MASKS[padding]
    labels = IDS.masked_fill(mask == 0, -100)
    want = models.training_step(models.peft_model(family, patched=False), family.task, mask, labels=labels)
    model = models.peft_model(family, patched=True)
    got = models.training_step(model, family.task, mask, labels=labels)
    assert models.difference(got.loss, want.loss) <= TOLERANCE
    output, gradients = models.step_difference(got, want, mask)
    assert output <= TOLERANCE
    assert gradients <= TOLERANCE


@pytest.mark.parametrize(
    "config", [{}, {"num_frozen_tokens": 2}, models.PROJECTION], ids=["prefix", "cartridge", "mlp"]
)
def test_only_tokens_run_through_the_model(config):
    model = models.peft_model(LLAMA, patched=True, **config)
    rows = rows_of(model)
    # On the left, the padding before a first token predicts it, as in PEFT.
    counts = {"right": int(RIGHT.sum()), "left": int(LEFT.sum()) + 2, "ones": BATCH * SEQ, "none": BATCH * SEQ}
    for name, count in counts.items():
        rows.clear()
        labels = IDS if MASKS[name] is None else IDS.masked_fill(MASKS[name] == 0, -100)
        models.training_step(model, LLAMA.task, MASKS[name], labels=labels)
        assert rows == [count], name
    rows.clear()
    logits = model.train()(input_ids=IDS, attention_mask=LEFT, logits_to_keep=2).logits
    assert (rows, logits.shape[1]) == ([int(LEFT.sum())], 2), "of which the last logits are wanted"
    peftkern.unpatch(model)
    peftkern.patch(model, packing=False)
    rows.clear()
    models.training_step(model, LLAMA.task, RIGHT)
    assert rows == [BATCH * SEQ]
    assert "training batches run with their padding: packing=False" in peftkern.explain(model)


def test_models_that_cannot_be_packed_say_so():
    assert peftkern.explain(models.peft_model(LLAMA, patched=True)) == (
        "LlamaForCausalLM: a prefix in 2 layers, read in place; training batches run without their padding"
    )
    for name in ("llama4 (chunks)", "bert", "t5"):
        assert "run with their padding: " in peftkern.explain(models.peft_model(FAMILIES[name], patched=True))
    with pytest.raises(ValueError, match="model: expected one that was given to patch"):
        peftkern.explain(models.base_model(LLAMA))


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "mistral (window 4)", "opt"])
@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
def test_rows_packed_by_position_ids_are_sequences_behind_a_prefix(name, native):
    """PEFT silently lets them attend to each other."""
    family = FAMILIES[name]
    stock = models.peft_model(family, patched=False)
    ids, labels = padded(SEQUENCES, 0), padded(SEQUENCES, -100)
    mask = padded([torch.ones_like(sequence) for sequence in SEQUENCES], 0)
    want = models.training_step(stock, family.task, mask, input_ids=ids, labels=labels)
    if native:
        prefix = models.native_prefix(stock)
        model = peftkern.patch(models.base_model(family), prefix, freeze=True)
    else:
        model = models.peft_model(family, patched=True)
    got = models.training_step(model, family.task, input_ids=PACKED_IDS, labels=PACKED_IDS, position_ids=POSITIONS)
    assert models.difference(got.loss, want.loss) <= TOLERANCE
    gradient = prefix.trainable[0].grad if native else models.peft_prefix(model).grad
    assert models.difference(gradient, models.peft_prefix(stock).grad) <= TOLERANCE
    rows = torch.cat([want.output[i, : len(sequence)] for i, sequence in enumerate(SEQUENCES)])
    assert models.difference(got.output.view(-1, VOCAB), rows) <= TOLERANCE


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_boundaries_for_flash_kernels_say_what_positions_say(kind):
    """In the form that transformers' DataCollatorWithFlattening returns."""
    build = models.peft_model if kind == "prefix" else models.prompt_model
    row = {
        "input_ids": PACKED_IDS.view(1, -1),
        "labels": PACKED_IDS.view(1, -1),
        "position_ids": POSITIONS.view(1, -1),
    }
    boundaries = torch.tensor([0, 3, 7, 12, 14], dtype=torch.int32)
    flash = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 5, "max_length_k": 5}
    want = models.training_step(build(LLAMA, patched=True), LLAMA.task, **row)
    got = models.training_step(build(LLAMA, patched=True), LLAMA.task, **row, **flash)
    assert torch.equal(got.loss, want.loss)
    del row["position_ids"]
    stock = models.training_step(build(LLAMA, patched=False), LLAMA.task, **row, **flash)
    with pytest.warns(UserWarning, match="cu_seq_lens_q"):
        got = models.training_step(build(LLAMA, patched=True), LLAMA.task, **row, **flash)
    assert models.difference(got.loss, stock.loss) <= 1e-5


@pytest.mark.parametrize("name", ["llama (GQA)", "gpt2", "mistral (window 4)"])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_rows_packed_by_position_ids_are_sequences_behind_a_prompt(name, kind):
    family = FAMILIES[name]
    tasks = torch.tensor([2, 0])
    many, few = ({}, {}) if kind == "PROMPT_TUNING" else ({"task_ids": tasks[[0, 0, 1, 1]]}, {"task_ids": tasks})
    ids, labels = padded(SEQUENCES, 0), padded(SEQUENCES, -100)
    mask = padded([torch.ones_like(sequence) for sequence in SEQUENCES], 0)
    stock, patched = (models.prompt_model(family, kind, patched=p) for p in (False, True))
    want = models.training_step(stock, family.task, mask, input_ids=ids, labels=labels, **many)
    got = models.training_step(
        patched, family.task, input_ids=PACKED_IDS, labels=PACKED_IDS, position_ids=POSITIONS, **few
    )
    assert models.difference(got.loss, want.loss) <= TOLERANCE
    for parameter, gradient in want.gradients.items():
        assert models.difference(got.gradients[parameter], gradient) <= TOLERANCE


@pytest.mark.parametrize("name", ["none", "right"])
def test_labelled_logits_of_a_prefix(name):
    mask = MASKS[name]
    labels = IDS.masked_fill(RIGHT == 0, -100)
    labels[:, 1:4] = -100
    want = models.training_step(models.peft_model(LLAMA, patched=False), LLAMA.task, mask, labels=labels)
    model = models.peft_model(LLAMA, patched=False)
    got = models.training_step(peftkern.patch(model, logits="labelled"), LLAMA.task, mask, labels=labels)
    supervised = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    assert models.difference(got.loss, want.loss) <= TOLERANCE
    assert models.difference(got.output[0], want.output[supervised]) <= TOLERANCE
    assert models.difference(models.peft_prefix(model).grad, want.gradients[next(iter(want.gradients))]) <= TOLERANCE


def test_hidden_states_of_a_packed_batch_are_padded_again():
    for model, extra in (
        (models.peft_model(LLAMA, patched=True), 0),
        (models.prompt_model(LLAMA, patched=True), PREFIX),
    ):
        out = model.train()(input_ids=IDS, attention_mask=RIGHT, labels=IDS, output_hidden_states=True)
        assert {tuple(x.shape) for x in out.hidden_states} == {(BATCH, extra + SEQ, 64)}
        first = model.get_base_model().get_input_embeddings()(IDS)
        assert torch.equal(out.hidden_states[0][:, extra:][RIGHT.bool()], first[RIGHT.bool()])


def test_outputs_as_tuples():
    for model in (models.peft_model(LLAMA, patched=True), models.prompt_model(LLAMA, patched=True)):
        want = model.train()(input_ids=IDS, attention_mask=RIGHT, labels=IDS)
        got = model(input_ids=IDS, attention_mask=RIGHT, labels=IDS, return_dict=False)
        assert torch.equal(got[0], want.loss)
        assert torch.equal(got[1], want.logits)


@pytest.mark.parametrize("options", [{"shift_positions": False}, {"prefix_in_window": False}])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_a_stream_treats_positions_and_windows_as_the_padded_batch_does(options, mask):
    family = FAMILIES["mistral (window 4)"]
    prefix = PrefixKV(None, PREFIX, num_layers=2, num_kv_heads=2, head_dim=16, std=1.0)
    labels = IDS.masked_fill(mask == 0, -100)
    steps = []
    for packing in (False, True):
        with peftkern.patched(models.base_model(family), prefix, freeze=True, packing=packing, **options) as model:
            steps.append(models.training_step(model, family.task, mask, labels=labels))
    assert models.difference(steps[1].loss, steps[0].loss) <= TOLERANCE
    assert models.step_difference(steps[1], steps[0], mask)[1] <= TOLERANCE


def test_per_layer_lengths_in_a_stream():
    prefix = PrefixKV(None, [PREFIX, 0], num_layers=2, num_kv_heads=2, head_dim=16)
    model = peftkern.patch(models.base_model(LLAMA), prefix, freeze=True)
    labels = IDS.masked_fill(RIGHT == 0, -100)
    steps = [models.training_step(model, LLAMA.task, RIGHT, labels=labels)]
    peftkern.unpatch(model)
    peftkern.patch(model, prefix, freeze=True, packing=False)
    steps.append(models.training_step(model, LLAMA.task, RIGHT, labels=labels))
    assert models.difference(steps[0].loss, steps[1].loss) <= TOLERANCE


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_a_bank_are_added_in_place():
    """Autograd alone would fill a tensor of the size of all rows with zeros for those of the prompts."""
    batch = PackedBatch.__new__(PackedBatch)
    batch.num_prompts, batch.prompt_len, batch.prompt_rows = 2, 3, 6
    x = torch.randn(1, 2, 10, 4, requires_grad=True)
    rows, bank = batch.with_bank(x)
    gradients = torch.randn(1, 2, 10, 4), torch.randn(2, 2, 3, 4)
    want = gradients[0].clone()
    want[0, :, :6] += gradients[1].transpose(0, 1).flatten(1, 2)
    with Operations() as operations:
        (got,) = torch.autograd.grad((rows, bank), x, gradients)
    assert torch.equal(got, want)
    assert not operations.names & {"zeros", "new_zeros", "zeros_like", "slice_backward", "select_backward"}
    plain = x.detach()
    rows, bank = batch.with_bank(plain)
    assert rows is plain
    assert torch.equal(bank, plain[0, :, :6].view(2, 2, 3, 4).transpose(0, 1))
