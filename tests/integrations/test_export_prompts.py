# SPDX-License-Identifier: Apache-2.0
"""Exported soft prompts: embeddings with text, tables and rows."""

from __future__ import annotations

import base64
import io
import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

import peftkern
from peftkern import SoftPrompt, export
from peftkern.integrations.prompt_embeds import encode, prompt_embeds
from peftkern.model_info import Origin
from tests.checkpoints import llama
from tests.integrations.files import DTYPES


def test_prompt_embeddings(tmp_path):
    for dtype in DTYPES:
        prompt = SoftPrompt(None, 4, embed_dim=8, dtype=dtype)
        export(prompt, tmp_path, "prompt-embeds", name="p", force=True)
        assert torch.equal(torch.load(tmp_path / "p.pt", weights_only=True), prompt.weight)
        assert torch.equal(load_file(tmp_path / "p.safetensors")["prompt_embeds"], prompt.weight)


def test_prompt_embeddings_with_text_continue_as_the_model_does():
    """Also where the embedding layer scales: the rows of a prompt lie behind it, as inputs_embeds do."""
    import transformers

    torch.manual_seed(7)
    gemma = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=32, vocab_size=60,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor([5, 9, 3])
    for model in (llama(), gemma):
        prompt = SoftPrompt.from_text(model, lambda text: {"input_ids": [4, 8]}, "text", 2)
        rows = prompt_embeds(prompt, ids.tolist(), model)
        assert torch.equal(rows, prompt_embeds(prompt.weight, ids, model.get_input_embeddings()))
        expected = model(torch.tensor([[4, 8, 5, 9, 3]])).logits
        torch.testing.assert_close(model(inputs_embeds=rows[None]).logits, expected, rtol=0, atol=0)
    with peftkern.patched(llama(), SoftPrompt(llama(), 3)) as patched:
        prompt = next(x for x in patched.modules() if isinstance(x, SoftPrompt))
        rows = prompt_embeds(prompt, ids, llama().get_input_embeddings().weight)
        patched_logits = patched(ids[None]).logits[:, -3:]
    torch.testing.assert_close(llama()(inputs_embeds=rows[None]).logits[:, -3:], patched_logits)


def test_prompt_embeddings_as_text():
    rows = torch.randn(3, 8)
    assert torch.equal(torch.load(io.BytesIO(base64.b64decode(encode(rows))), weights_only=True), rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.randn(2, 4), [1], torch.randn(9, 8)),
            r"prompt: expected \[tokens, 8\], as the embeddings, got \[2, 4\]",
        ),
        ((torch.randn(3, 2, 8), [1], torch.randn(9, 8)), r"prompt: expected \[tokens, 8\]"),
        ((torch.randn(2, 8), [[1]], torch.randn(9, 8)), r"input_ids: expected integers \[tokens\]"),
        ((torch.randn(2, 8), [1.0], torch.randn(9, 8)), r"input_ids: expected integers \[tokens\]"),
        (
            (torch.full((2, 8), 1e5), [1], torch.randn(9, 8).half()),
            r"prompt in torch\.float16: expected finite numbers",
        ),
        ((torch.randn(2, 8), [1], "model"), "embedding: expected a model, its embedding layer or a weight"),
    ],
)
def test_prompt_embeddings_of_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_embeds(*arguments)


def test_a_prompt_table_pads_shorter_prompts_with_zeros(tmp_path):
    prompts = [SoftPrompt(None, n, embed_dim=8, dtype=torch.bfloat16) for n in (2, 4)]
    export(prompts, tmp_path, "tensorrt-llm", name="table")
    table = numpy.load(tmp_path / "table.npy", allow_pickle=False)
    assert table.shape == (2, 4, 8)
    assert table.dtype == numpy.float32
    for task, prompt in enumerate(prompts):
        assert torch.equal(torch.from_numpy(table[task, : prompt.length]), prompt.weight.float())
    assert not table[0, 2:].any()
    assert json.loads((tmp_path / "table.tasks.json").read_text())["tasks"] == [
        {"task": 0, "name": "table-0", "tokens": 2},
        {"task": 1, "name": "table-1", "tokens": 4},
    ]
    bank = SoftPrompt(None, 3, embed_dim=8, num_prompts=2, dtype=torch.float16)
    export(bank, tmp_path, "tensorrt-llm", name="bank")
    assert numpy.load(tmp_path / "bank.npy").dtype == numpy.float16
    with pytest.raises(ValueError, match="p-1: expected a prompt of width 8, as the first one, got 4"):
        export([prompts[0], SoftPrompt(None, 2, embed_dim=4)], tmp_path, "tensorrt-llm", name="p")


def test_rows_for_llama_cpp(tmp_path):
    prompt = SoftPrompt(None, 3, embed_dim=8, dtype=torch.bfloat16)
    prompt.origin = Origin("somebody/llama")
    export(prompt, tmp_path, "llama.cpp", name="p")
    rows = numpy.fromfile(tmp_path / "p.f32", "<f4").reshape(3, 8)
    assert torch.equal(torch.from_numpy(rows), prompt.weight.float())
    described = json.loads((tmp_path / "p.f32.json").read_text())
    assert (described["format"], described["n_tokens"], described["n_embd"]) == ("peftkern.embd", 3, 8)
    assert described["base_model_name_or_path"] == "somebody/llama"
