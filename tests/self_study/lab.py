# SPDX-License-Identifier: Apache-2.0
"""A tiny random model with a document and a cartridge, that the tests of self-study share."""

from __future__ import annotations

import copy

import torch

import peftkern
from peftkern import PrefixKV
from peftkern.self_study import Chat, Study, Synthesis, Training, synthesise, train

TEXT = "the import statement finds a module and binds a name to it in the local scope unless it fails " * 3
WORDS = ["[UNK]", "[END]", "<|", "|>", "user", "system", "assistant", *dict.fromkeys(TEXT.split())]
WORDS += ["Passage", "Write", "one", "short", "question", "What", "?", ".", '"', "Question", "Answer", ":"]
TEMPLATE = (
    "{% for m in messages %}<| {{ m['role'] }} |> {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}<| assistant |> {% endif %}"
)
OPTIONS = Synthesis(passage_tokens=4, question_tokens=3, answer_tokens=6, batch_size=4, answer_temperature=1.0)


def new_tokenizer(template=TEMPLATE, words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]", unk_token="[UNK]")
    fast.chat_template = template
    return fast


def new_model(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3, eos_token_id=1,
        bos_token_id=None, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Lab:
    """A patched model with a document and a cartridge."""

    def __init__(self, bank=False):
        self.tokenizer, self.model = new_tokenizer(), new_model()
        chat = Chat(self.tokenizer)
        self.document = PrefixKV.from_text(self.model, self.tokenizer, chat.document(TEXT)).requires_grad_(False)
        self.cartridge = self.fresh()
        peftkern.patch(self.model, PrefixKV.stack([self.cartridge]) if bank else self.cartridge, freeze=True)

    def fresh(self):
        return PrefixKV.from_cache(
            [(k.detach(), v.detach()) for k, v in self.document.layer_kv()], 4, num_frozen_tokens=1
        )

    def synthesise(self, path, count=10, options=OPTIONS, **more):
        return synthesise(self.model, self.tokenizer, self.document, TEXT, path, count, options, **more)


def other_weights(model):
    """The model with one weight changed a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return other


TRAINING = Training(steps=7, batch_size=3, save_every=2, lr=0.05)


def trained(lab, targets, path, **more):
    cartridge = lab.fresh()
    losses = train(lab.model, cartridge, Study(targets), path, TRAINING, **more)
    return losses, cartridge.flat_values()
