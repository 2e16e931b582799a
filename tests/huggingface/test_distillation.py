# SPDX-License-Identifier: Apache-2.0
"""Distillation between models: the losses are those of the logits that the model itself computes."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F

import peftkern
from peftkern import reference
from peftkern.huggingface import output_rows

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Models whose logits are more than a product, and what the trial must find.
KINDS = {
    "llama": (hf.LlamaConfig, {}, (1.0, None)),
    "tied": (hf.LlamaConfig, {"tie_word_embeddings": True}, (1.0, None)),
    "softcap": (hf.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16}, (1.0, 30.0)),
    "no softcap": (hf.Gemma2Config, {"head_dim": 16, "final_logit_softcapping": None}, (1.0, None)),
    "factor": (hf.CohereConfig, {"logit_scale": 0.0625}, (0.0625, None)),
    "divisor": (hf.GraniteConfig, {"logits_scaling": 6.0}, (1 / 6.0, None)),
    "bias": (hf.PhiConfig, {}, (1.0, None)),
}


def _model(kind="llama", dtype=torch.float32, seed=0):
    config, options, _ = KINDS[kind]
    torch.manual_seed(seed)
    options = {**_SIZES, **options}
    if kind == "bias":
        del options["num_key_value_heads"]
    model = hf.AutoModelForCausalLM.from_config(config(**options)).to(dtype).eval()
    for parameter in model.parameters():  # logits that a softcap changes
        parameter.data *= 3
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.requires_grad_(False)


def _batch(labels=True):
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    targets = ids.masked_fill(mask == 0, -100)
    targets[2, :4] = -100
    return {**batch, "labels": targets} if labels else batch


def _form(model, batch):
    head = output_rows.read_rows(model, batch).head
    return head.scale, head.softcap


def _rows(batch):
    return F.pad(batch["labels"][:, 1:] != -100, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_found_and_the_numbers_are_the_models(kind, dtype):
    model, batch = _model(kind, dtype), _batch()
    output, rows = model(**batch), _rows(batch)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 6e-2}
    torch.testing.assert_close(peftkern.label_loss(model, batch), output.loss.float(), **tolerance)
    log_probs = output.logits[rows].float().log_softmax(-1)
    ids, got = peftkern.capture_top_k(model, batch, 5)
    torch.testing.assert_close(got, log_probs.gather(1, ids), **tolerance)
    if dtype == torch.float32:
        assert torch.equal(ids, log_probs.topk(5).indices)
    assert _form(model, batch) == KINDS[kind][2]


def _students():
    yield "PrefixKV", lambda m: peftkern.patch(m, peftkern.PrefixKV(m, 4)), lambda m: m.peftkern_prefix.parameters()
    yield (
        "SoftPrompt",
        lambda m: peftkern.patch(m, peftkern.SoftPrompt(m, 4)),
        lambda m: m.peftkern_prompt.parameters(),
    )
    for name, config in (("PREFIX_TUNING", PrefixTuningConfig), ("PROMPT_TUNING", PromptTuningConfig)):
        yield (
            name,
            lambda m, config=config: peftkern.patch(
                get_peft_model(m, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
            ),
            lambda m: [p for p in m.parameters() if p.requires_grad],
        )


STUDENTS = {name: (build, parameters) for name, build, parameters in _students()}


@pytest.mark.parametrize("kind", ["llama", "softcap"])
@pytest.mark.parametrize("name", STUDENTS)
def test_losses_and_gradients_of_patched_models(name, kind):
    """Against the losses from the logits that the patched model itself returns."""
    build, parameters = STUDENTS[name]
    teacher, batch = _model(kind, seed=1), _batch()
    student = build(_model(kind)).train()
    learned = list(parameters(student))
    top_k = peftkern.capture_top_k(teacher, batch, 6)
    logits = student(**{n: x for n, x in batch.items() if n != "labels"}).logits[:, -9:]
    chosen = logits[_rows(batch)]
    identity = torch.eye(VOCAB)
    for objective in ("cross_entropy", "kl_with_tail"):
        want = reference.distillation_loss(chosen, identity, *top_k, objective=objective).mean()
        got = peftkern.distil(student, batch, *top_k, objective=objective)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(loss, learned, retain_graph=True) for loss in (got, want))
        for x, y in zip(*gradients, strict=True):
            assert y.abs().max() > 0
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first_is_labelled", [False, True])
@pytest.mark.parametrize("name", STUDENTS)
def test_the_loss_of_labels_is_the_models_own(name, first_is_labelled):
    student, batch = STUDENTS[name][0](_model()).train(), _batch()
    if not first_is_labelled:
        batch["labels"][:, 0] = -100
    if name == "SoftPrompt" and first_is_labelled:
        with pytest.raises(ValueError, match=re.escape("labels: expected -100 for first tokens")):
            peftkern.label_loss(student, batch)
        return
    torch.testing.assert_close(peftkern.label_loss(student, batch), student(**batch).loss, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing():
    student, batch = STUDENTS["PrefixKV"][0](_model()).train(), _batch()
    top_k = peftkern.capture_top_k(_model(seed=1), batch, 6)
    gradients = []
    for _ in range(2):
        student.zero_grad()
        peftkern.distil(student, batch, *top_k).backward()
        gradients.append([p.grad for p in student.peftkern_prefix.parameters()])
        student.gradient_checkpointing_enable({"use_reentrant": False})
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_rows_are_those_asked_for():
    model, batch = _model(), _batch(labels=False)
    logits = model(**batch).logits.log_softmax(-1)
    rows = torch.zeros(3, 9, dtype=torch.bool)
    rows[0, 2] = rows[2, 5] = True
    for mask, given in ((rows, {"rows": rows}), (batch["attention_mask"] != 0, {})):
        got = peftkern.capture_top_k(model, batch, 4, **given)
        torch.testing.assert_close(got.log_probs, logits[mask].topk(4).values)
    assert peftkern.capture_top_k(model, {"input_ids": batch["input_ids"]}, 4).ids.shape == (27, 4)


def test_padding_is_left_out_if_the_mask_covers_a_prefix_or_cache():
    model, batch = _model(), _batch(labels=False)
    kept = batch["attention_mask"] != 0
    student = peftkern.patch(model, peftkern.PrefixKV(model, 4))
    want = peftkern.capture_top_k(student, batch, 4)
    longer = {**batch, "attention_mask": F.pad(batch["attention_mask"], (4, 0), value=1)}
    torch.testing.assert_close(peftkern.capture_top_k(student, longer, 4), want)
    peftkern.unpatch(student)
    cache = model(input_ids=batch["input_ids"][:, :3]).past_key_values
    rest = {**longer, "input_ids": batch["input_ids"][:, 3:], "past_key_values": cache}
    rest["attention_mask"] = batch["attention_mask"]
    logits = model(**batch).logits.log_softmax(-1)[:, 3:][kept[:, 3:]]
    torch.testing.assert_close(peftkern.capture_top_k(model, rest, 4).log_probs, logits.topk(4).values)


def test_rows_are_asked_for_if_the_mask_does_not_tell_them():
    model, batch = _model(), _batch(labels=False)
    mask = batch["attention_mask"]
    causal = (mask[:, None, None, :] * torch.ones(9, 9, dtype=torch.int64).tril()).bool()
    for other, got in ((mask[:, 1:], "[3, 8]"), (causal, "[3, 1, 9, 9]"), ({"full_attention": causal}, "dict")):
        changed = {**batch, "attention_mask": other}
        with pytest.raises(ValueError, match=re.escape(f"attention_mask [3, at least 9], got one of {got}")):
            peftkern.capture_top_k(model, changed, 4)
    changed = {**batch, "attention_mask": causal}
    same = peftkern.capture_top_k(model, changed, 4, rows=mask != 0)
    torch.testing.assert_close(same.log_probs, peftkern.capture_top_k(model, batch, 4).log_probs)


def test_the_output_layer_runs_on_few_rows():
    model, batch = _model().train(), _batch()
    calls, shapes = [], []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    losses = [peftkern.label_loss(model, batch) for _ in range(3)]
    assert len(calls) == 3
    assert shapes == [(3, 6, VOCAB)] * 3
    assert losses[0] == losses[1] == losses[2]
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "softcap", "factor"])
def test_autocast(kind):
    model, batch = _model(kind), _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            peftkern.label_loss(model, batch), model(**batch).loss.float(), rtol=2e-2, atol=2e-2
        )
        assert _form(model, batch) == KINDS[kind][2]


@pytest.mark.parametrize("kind", ["llama", "softcap", "factor"])
def test_a_model_that_accelerate_prepared(kind):
    """Its autocast is within the forward, and its logits are converted to fp32 behind it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    plain, batch = _model(kind), _batch()
    want = plain(**batch).loss
    ids, log_probs = peftkern.capture_top_k(plain, _batch(labels=False), 5, rows=_rows(batch))
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer in the same process may have left one
    try:
        model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(plain)
        assert _form(model, batch) == KINDS[kind][2]
        torch.testing.assert_close(peftkern.label_loss(model, batch), want, rtol=2e-2, atol=2e-2)
        found = peftkern.capture_top_k(model, _batch(labels=False), 5, rows=_rows(batch))
        torch.testing.assert_close(found[1], log_probs, rtol=2e-2, atol=5e-2)
        peftkern.distil(model, _batch(labels=False), ids, log_probs, rows=_rows(batch))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_models_with_other_logits_are_refused():
    batch = _batch()
    for change in (lambda x: x + 0.1 * x.square(), lambda x: x * 1.37, lambda x: x[..., :-1], lambda x: 9 * x.sin()):
        model = _model()
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda m, args, out, change=change: change(out))
        with pytest.raises(ValueError, match="model: expected logits that are hidden states times output embeddings"):
            peftkern.label_loss(model, batch)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="model: expected a causal language model with an output layer of floats"):
        peftkern.label_loss(model, batch)
    with pytest.raises(ValueError, match="model: expected a causal language model, got LlamaModel"):
        peftkern.label_loss(_model().model, batch)


def test_large_hidden_states_in_half_precision():
    """The larger rows of the trial must not overflow."""
    model, batch = _model("softcap", torch.float16), _batch()
    model.model.norm.register_forward_hook(lambda m, args, out: 1000 * out)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / 100, requires_grad=False)
    assert _form(model, batch) == (1.0, 30.0)


def test_a_change_between_two_calls_is_seen():
    """Of the config, by a hook, and by an adapter, which starts at zero."""
    batch, model = _batch(), _model("softcap")
    peftkern.label_loss(model, batch)
    model.config.final_logit_softcapping = 11.0
    torch.testing.assert_close(peftkern.label_loss(model, batch), model(**batch).loss, rtol=1e-4, atol=1e-4)

    model = _model()
    peftkern.label_loss(model, batch)
    handle = model.lm_head.register_forward_hook(lambda m, args, out: 1.01 * out)
    with pytest.raises(ValueError, match="model: expected logits that are hidden states times output embeddings"):
        peftkern.label_loss(model, batch)
    handle.remove()

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"]))
    for frozen in (False, True):
        with pytest.raises(ValueError, match=r"model: expected an output layer with a weight and a bias.*lora_A"):
            peftkern.label_loss(adapted.requires_grad_(not frozen), batch)
    merged = adapted.merge_and_unload().requires_grad_(False)
    torch.testing.assert_close(peftkern.label_loss(merged, batch), merged(**batch).loss, rtol=1e-4, atol=1e-4)


_WIDTHS = {"hidden_size": 32, "d_model": 32, "num_hidden_layers": 1, "vocab_size": VOCAB, "num_attention_heads": 2}
OTHERS = {
    "a T5": (hf.T5ForConditionalGeneration, hf.T5Config(d_kv=16, d_ff=32, num_layers=1, num_heads=2, **_WIDTHS)),
    "a Bart": (hf.BartForConditionalGeneration, hf.BartConfig(encoder_layers=1, decoder_layers=1, **_WIDTHS)),
    "a masked language model": (hf.BertForMaskedLM, hf.BertConfig(**_WIDTHS)),
    "one that sees later tokens": (hf.BertLMHeadModel, hf.BertConfig(**_WIDTHS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_not_causal_are_refused(name):
    kind, config = OTHERS[name]
    model, batch = kind(config).eval().requires_grad_(False), _batch()
    for call in (lambda: peftkern.label_loss(model, batch), lambda: peftkern.capture_top_k(model, batch, 4)):
        with pytest.raises(ValueError, match=f"model: expected a causal language model, got {kind.__name__}, a"):
            call()


def test_a_bert_that_decodes_is_a_causal_language_model():
    model, batch = (
        hf.BertLMHeadModel(hf.BertConfig(is_decoder=True, **_WIDTHS)).eval().requires_grad_(False),
        _batch(),
    )
    torch.testing.assert_close(peftkern.label_loss(model, batch), model(**batch).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_the_number_of_items_in_a_batch_divides_the_loss_of_labels(num_items):
    model, batch = _model(), {**_batch(), "num_items_in_batch": num_items}
    torch.testing.assert_close(peftkern.label_loss(model, batch), model(**batch).loss, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_that_of_labels_alone_is_refused():
    mixtral = hf.MixtralConfig(num_local_experts=2, head_dim=16, output_router_logits=True, **_SIZES)
    model, batch = hf.MixtralForCausalLM(mixtral).eval().requires_grad_(False), _batch()
    with pytest.raises(ValueError, match="model: expected the loss of labels alone, got aux_loss too"):
        peftkern.label_loss(model, batch)
    plain = {**batch, "output_router_logits": False}
    torch.testing.assert_close(peftkern.label_loss(model, plain), model(**plain).loss, rtol=1e-4, atol=1e-4)
    decoder = hf.BartForCausalLM(hf.BartConfig(decoder_layers=1, **_WIDTHS)).requires_grad_(False)  # labels unshifted
    with pytest.raises(ValueError, match="model: expected one that computes ForCausalLMLoss, got BartForCausalLM"):
        peftkern.label_loss(decoder, batch)
    model = _model()
    for name, value in (("shift_labels", batch["labels"]), ("ignore_index", 5)):
        with pytest.raises(ValueError, match=f"batch: expected labels.*got {name}"):
            peftkern.label_loss(model, {**batch, name: value})
    model.loss_function = F.cross_entropy
    with pytest.raises(ValueError, match="ForCausalLMLoss, got LlamaForCausalLM with cross_entropy"):
        peftkern.label_loss(model, batch)


@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_padded_rows_may_hold_anything(padding):
    """The output layer is tried on rows that say something; a batch of NaN has a loss of NaN, as the model's own."""
    model, batch = _model("softcap"), _batch()
    batch["labels"][:, 6:] = batch["labels"][1] = -100

    def pad(module, args, output, first=5):
        output.last_hidden_state[:, first:] = padding
        output.last_hidden_state[1] = padding

    want = model(**batch).loss
    handle = model.model.register_forward_hook(pad)
    assert _form(model, batch) == (1.0, 30.0)
    torch.testing.assert_close(peftkern.label_loss(model, batch), want, rtol=1e-4, atol=1e-4)
    handle.remove()
    if padding != 0:
        model.model.register_forward_hook(lambda *args: pad(*args, first=0))
        assert peftkern.label_loss(model, batch).isnan()


def test_bad_arguments_are_named():
    model, batch = _model(), _batch()
    top_k = peftkern.capture_top_k(model, batch, 4)
    with pytest.raises(ValueError, match="teacher_ids: expected shape"):
        peftkern.distil(model, batch, top_k.ids[1:], top_k.log_probs[1:])
    with pytest.raises(ValueError, match=re.escape("rows: expected bool [3, 9], got torch.int64 [3, 9]")):
        peftkern.capture_top_k(model, batch, 4, rows=batch["attention_mask"])
    with pytest.raises(ValueError, match="k: expected an int in"):
        peftkern.capture_top_k(model, batch, VOCAB + 1)
    with pytest.raises(ValueError, match="batch: expected labels"):
        peftkern.label_loss(model, _batch(labels=False))
    message = "model: expected a frozen output layer, got ['weight'] to be trained"
    with pytest.raises(ValueError, match=re.escape(message)):
        peftkern.distil(model.requires_grad_(), batch, *top_k)
    with pytest.raises(ValueError, match="model: expected a transformers PreTrainedModel"):
        peftkern.capture_top_k(torch.nn.Linear(2, 2), batch, 4)
