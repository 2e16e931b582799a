# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders that hear: a prefix of the decoder gives stock numbers, with audio in the call."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import peftkern
from peftkern import SoftPrompt
from tests.huggingface import speech_models
from tests.huggingface.by_hand import assert_close
from tests.huggingface.speech_models import SPEECH, batch_of, by_hand, module_of, speech_model

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def patched(name: str) -> Any:
    return peftkern.patch(speech_model(name), module_of(name), freeze=True)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", SPEECH)
def test_training_step(name, padding):
    model, prefix, batch = patched(name).train(), module_of(name), batch_of(name, padding)
    want, got = by_hand(name, prefix, batch), model(**batch)
    want.loss.backward()
    got.loss.backward()
    mask = batch["decoder_attention_mask"]
    tokens = slice(None) if mask is None else mask.bool()
    assert_close(got.loss, want.loss, "losses")
    assert_close(got.logits[tokens], want.logits[tokens], "logits")
    assert_close(model.peftkern_prefix.trainable[0].grad, prefix.trainable[0].grad, "gradients")


@pytest.mark.parametrize("name", SPEECH)
def test_generation(name):
    inputs = SPEECH[name].inputs()
    want = speech_models.tokens_by_hand(name, module_of(name), inputs)
    assert torch.equal(patched(name).eval().generate(**inputs, **GREEDY)[:, -4:], want)


@functools.cache
def _decoder_inputs() -> dict[str, Any]:
    batch = batch_of("whisper", "right")
    states = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(9))
    ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    return {
        "input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100),
        "encoder_outputs": (states,),
    }  # fmt: skip


def decoder() -> Any:
    """The decoder of Whisper alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return hf.WhisperForCausalLM(hf.WhisperConfig(**SPEECH["whisper"].arguments, dropout=0.0)).eval()


@pytest.mark.parametrize("heard", [True, False])
def test_prompt_of_a_decoder_alone(heard):
    """States of an encoder belong to samples, so the prompt stands before every sample."""
    model, prompt, inputs = decoder(), SoftPrompt(None, 5, embed_dim=64), {**_decoder_inputs()}
    if not heard:
        del inputs["encoder_outputs"]
    tokens = model.get_input_embeddings()(inputs["input_ids"])
    by_hand = {
        **inputs, "inputs_embeds": torch.cat([prompt.weight.expand(3, -1, -1), tokens], 1),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (5, 0), value=1),
        "labels": nn.functional.pad(inputs["labels"], (5, 0), value=-100),
    }  # fmt: skip
    del by_hand["input_ids"]
    want = model(**by_hand).loss
    assert_close(peftkern.patch(decoder(), prompt)(**inputs).loss, want, "losses")
