# SPDX-License-Identifier: Apache-2.0
"""Output layers and losses other than the stock ones get the unpacked batch: fused heads, own losses, adapters."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

import peftkern
from tests.huggingface import by_hand, models
from tests.huggingface.by_hand import LLAMA, METHODS, assert_close
from tests.huggingface.models import IDS, ONES, PREFIX, RIGHT, SEQ, Family

pytestmark = pytest.mark.filterwarnings("ignore:peftkern:UserWarning")

LABELS = IDS.masked_fill(RIGHT == 0, -100)
LABELS[:, 0] = -100  # whether a prompt predicts the first token is a matter of where the head looks
SHAPES = pytest.mark.parametrize("mask", [None, ONES, RIGHT], ids=["none", "ones", "right"])


# Heads that do not return the batch's logits


@dataclasses.dataclass
class TokenScores(ModelOutput):
    """In the form of TRL's fused head."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


def log_probs_of(self, hidden, labels):
    """Log-probabilities of the labels, [B, S - 1]; 0 where there is no label."""
    scores = self.lm_head(hidden[:, :-1]).log_softmax(-1)
    targets = labels[:, 1:]
    return scores.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets != -100)


def loss_of(self, hidden, labels):
    return -log_probs_of(self, hidden, labels).sum() / (labels[:, 1:] != -100).sum()


HEADS = {
    "loss alone": lambda self, hidden, labels: CausalLMOutputWithPast(loss=loss_of(self, hidden, labels)),
    "tuple": lambda self, hidden, labels: (loss_of(self, hidden, labels),),
    "tensor": loss_of,
    "token log-probs": lambda self, hidden, labels: TokenScores(
        loss_of(self, hidden, labels), log_probs_of(self, hidden, labels)
    ),
    "sequence log-probs": lambda self, hidden, labels: {"log_probs": log_probs_of(self, hidden, labels).sum(1)},
    "mean of each sequence": lambda self, hidden, labels: TokenScores(
        -(log_probs_of(self, hidden, labels).sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
    ),
    "logits of the last token": lambda self, hidden, labels: CausalLMOutputWithPast(
        loss=loss_of(self, hidden, labels), logits=self.lm_head(hidden[:, -1])
    ),
}


def forward_with(head):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            inputs_embeds=inputs_embeds, **kwargs,
        )[0]  # fmt: skip
        return HEADS[head](self, hidden, labels)

    return forward


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def tensors_of(output):
    """Name -> tensor of any kind of output."""
    if isinstance(output, torch.Tensor):
        return {"tensor": output}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}


def backward(outputs):
    """Backward through everything that the head returned."""
    sum((value.float() * torch.linspace(0.5, 1.5, value.numel()).view(value.shape)).sum() for value in
        outputs.values()).backward()  # fmt: skip


def family_of(model):
    return Family(model, hf.LlamaConfig, LLAMA.arguments)


def headed(head, way):
    """A family with the head; the stock family if the forward of its instances is replaced later."""
    if way.startswith("replaced"):
        return LLAMA
    forward = forward_with(head)
    members = {"forward": decorated(forward) if way == "decorated" else forward}
    return family_of(type("FusedLlama", (hf.LlamaForCausalLM,), members))


def replace_forward(base, head):
    base.forward = types.MethodType(forward_with(head), base)


WAYS = ("subclass", "decorated", "replaced before", "replaced after")
CASES = [(head, "subclass", mask) for head in HEADS for mask in ("none", "right")]
CASES += [("loss alone", "subclass", "ones")]
CASES += [(head, way, "right") for head in ("loss alone", "token log-probs") for way in WAYS[1:]]


@pytest.mark.parametrize(("head", "way", "padding"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_fused_heads(method, head, way, padding):
    mask = models.MASKS[padding]
    family, native = headed(head, way), method.startswith("native")
    steps = []
    for patched in (False, True):
        make = models.peft_model if "prefix" in method else models.prompt_model
        if native:
            model = base = models.base_model(family).requires_grad_(False)
            learned = by_hand.llama_prefix() if "prefix" in method else by_hand.soft_prompt()
        else:
            model = make(family, patched=False)
            base = model.get_base_model()
        if way == "replaced before" or (way == "replaced after" and not patched):
            replace_forward(base, head)
        if patched:
            peftkern.patch(model, *([learned] if native else []))
        if patched and way == "replaced after":
            replace_forward(base, head)
        model.train()
        if native and not patched:
            if "prefix" in method:
                out = by_hand.with_prefix(model, learned, IDS, mask, labels=LABELS)
            else:
                out = by_hand.with_prompt(model, learned.weight, IDS, mask, LABELS)
        else:
            out = model(input_ids=IDS, attention_mask=mask, labels=LABELS)
        outputs = {name: value for name, value in tensors_of(out).items() if value.is_floating_point()}
        backward(outputs)
        trained = learned if native else model
        steps.append((type(out), {k: v.detach() for k, v in outputs.items()}, by_hand.gradients(trained)))
    (kind, want, want_gradients), (got_kind, got, got_gradients) = steps
    assert got_kind is kind, f"the output is another kind of object: {got_kind}"
    assert list(got) == list(want), "the output has other fields"
    for name, value in want.items():
        assert_close(got[name], value, name)
    by_hand.assert_same_gradients(got_gradients, want_gradients)


# Models that a prompt cannot see through


def assert_same_step(make_model, mask, **inputs):
    """A training step of stock PEFT and of the patched model."""
    want, got = (
        models.training_step(make_model(patched), "CAUSAL_LM", mask, labels=LABELS, **inputs)
        for patched in (False, True)
    )
    assert_close(got.loss, want.loss, "loss")
    assert got.output.shape == want.output.shape, "logits have another shape"
    rows = ... if mask is None else mask.bool()
    if mask is not None and got.output.shape[1] > SEQ:
        rows = models.behind_prompt(mask).bool()
    assert_close(got.output[rows], want.output[rows], "logits")
    by_hand.assert_same_gradients(got.gradients, want.gradients)


ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "lora of the output layer": LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
}
CONFIGS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}


def nested(below, kind, patched):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        base = get_peft_model(models.base_model(LLAMA), ADAPTERS[below])
        model = get_peft_model(base, CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
        nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.5)
    return peftkern.patch(model) if patched else model


@SHAPES
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("below", ADAPTERS)
def test_over_another_adapter(below, kind, mask):
    assert_same_step(functools.partial(nested, below, kind), mask)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("below", ADAPTERS)
def test_generation_over_another_adapter(below, kind):
    """Stock PEFT loses the prompt: the inner model's ``generate`` restores a method that the outer one has set.

    Its tokens or those with the prompt; nothing else, and no error that does not say so.
    """
    stock = nested(below, kind, False).eval()
    want = by_hand.greedy(lambda ids: stock(input_ids=ids).logits, IDS, 4)
    pefts = stock.generate(input_ids=IDS, max_new_tokens=4, **by_hand.GREEDY).tolist()
    got = nested(below, kind, True).eval().generate(input_ids=IDS, max_new_tokens=4, **by_hand.GREEDY)
    assert got.tolist() in (want, pefts)


class WithoutLogitsToKeep(hf.LlamaForCausalLM):
    """Like many models outside transformers."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, hidden_states=out.hidden_states)


class WithoutKeywords(hf.LlamaForCausalLM):
    """It accepts no unknown arguments."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, past_key_values=None,
        output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits)


class ConvolvedHead(nn.Module):
    """Each row of its output depends on the rows before."""

    def __init__(self, lm_head):
        super().__init__()
        self.lm_head = lm_head
        self.weight = lm_head.weight

    def forward(self, hidden):
        before = nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.lm_head(hidden + 0.5 * before)


class CentredHead(ConvolvedHead):
    """Each row of its output depends on all rows of its sequence."""

    def forward(self, hidden):
        return self.lm_head(hidden - hidden.mean(1, keepdim=True))


def model_with(kind, patched, *, family=LLAMA, loss=None, head=None):
    make = models.peft_model if kind == "prefix" else models.prompt_model
    model = make(family, patched=False)
    base = model.get_base_model()
    if loss is not None:
        base.loss_function = LOSSES[loss]
    if head is not None:
        base.lm_head = head(base.lm_head)
    return peftkern.patch(model) if patched else model


@SHAPES
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", [WithoutLogitsToKeep, WithoutKeywords])
def test_base_models_of_other_signatures(base, kind, mask):
    assert_same_step(lambda patched: model_with(kind, patched, family=family_of(base)), mask)


@SHAPES
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("head", [ConvolvedHead, CentredHead])
def test_output_layers_that_mix_rows(head, kind, mask):
    assert_same_step(lambda patched: model_with(kind, patched, head=head), mask)


def sequence_mean(logits, labels, vocab_size, **kwargs):
    """Every sequence has the same weight, regardless of its number of labels."""
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def with_z_loss(logits, labels, vocab_size, **kwargs):
    """It reads the logits of every row, including padding and prompt."""
    return ForCausalLMLoss(logits, labels, vocab_size) + 0.1 * logits.logsumexp(-1).square().mean()


def with_neighbours(logits, labels, vocab_size, **kwargs):
    """Penalises differences between neighbouring rows."""
    return ForCausalLMLoss(logits, labels, vocab_size) + (logits[:, 1:] - logits[:, :-1]).abs().mean()


def unshifted(logits, labels, vocab_size, **kwargs):
    """Each row predicts its own label, as in masked and diffusion models."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


LOSSES = {
    "mean of each sequence": sequence_mean,
    "z-loss": with_z_loss,
    "neighbours": with_neighbours,
    "unshifted": unshifted,
    "partial": functools.partial(ForCausalLMLoss, ignore_index=-100),
    "lambda": lambda logits, labels, vocab_size, **kwargs: 2 * ForCausalLMLoss(logits, labels, vocab_size),
}


@SHAPES
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_own_loss_functions(loss, kind, mask):
    assert_same_step(lambda patched: model_with(kind, patched, loss=loss), mask)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("loss", ["mean of each sequence", "z-loss"])
def test_a_loss_function_that_is_set_after_patch(loss, kind):
    def make(patched):
        model = model_with(kind, patched)
        model.get_base_model().loss_function = LOSSES[loss]
        return model

    assert_same_step(make, RIGHT)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_output_layer_that_is_put_in_after_patch(kind):
    def make(patched):
        model = model_with(kind, patched)
        base = model.get_base_model()
        base.lm_head = ConvolvedHead(base.lm_head)
        return model

    assert_same_step(make, RIGHT)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_number_of_items_in_the_batch_reaches_the_loss(kind):
    """``Trainer`` divides by it under gradient accumulation."""
    assert_same_step(lambda patched: model_with(kind, patched), RIGHT, num_items_in_batch=torch.tensor(50))
