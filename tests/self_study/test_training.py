# SPDX-License-Identifier: Apache-2.0
"""What a cartridge learns, alone and with others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern import PrefixKV, distillation_loss
from peftkern.self_study import HELD_OUT_PROMPTS, Study, Targets, Training, capture, compare, train
from tests.huggingface.models import FAMILIES, base_model
from tests.huggingface.uncommon import UNCOMMON

from .lab import OPTIONS, TEXT, Lab, new_tokenizer


def test_training_approaches_the_teacher_on_questions_held_out(lab, targets, tmp_path):
    options = replace(OPTIONS, seed=9, prompts=HELD_OUT_PROMPTS)
    held_out = lab.synthesise(tmp_path / "held_out", options=options)
    cartridge = lab.fresh()
    options = Training(steps=60, batch_size=4, lr=0.05)
    losses = train(lab.model, cartridge, Study(targets), tmp_path / "checkpoint", options)
    assert sum(losses[-10:]) < sum(losses[:10])
    students = {"none": PrefixKV(lab.model, 0), "start": lab.fresh(), "trained": cartridge, "whole": lab.document}
    found = compare(lab.model, lab.document, students, held_out)
    kl = {name: found[name].interval()[0] for name in students}
    assert kl["whole"] == pytest.approx(0, abs=1e-6)
    assert kl["trained"] < 0.9 * min(kl["start"], kl["none"])
    assert found["whole"].agreement == [1.0] * 10
    assert torch.equal(cartridge.frozen[0], lab.fresh().frozen[0]), "the first token is frozen"


@pytest.mark.parametrize("name", ["opt", "llama4", "lfm2", "jamba"])
def test_models_that_cannot_pack_train_on_padded_batches(name, targets, tmp_path):
    """The loss of a batch is that of its conversations one by one, whether it is packed (OPT) or padded."""
    llama4 = FAMILIES["llama4 (chunks)"]
    llama4 = replace(llama4, arguments={**llama4.arguments, "attention_chunk_size": 64})
    family = {"opt": FAMILIES["opt"], "llama4": llama4}.get(name) or UNCOMMON[name]
    torch.manual_seed(0)
    model = base_model(family).eval().requires_grad_(False)
    cartridge = PrefixKV.from_text(model, new_tokenizer(), TEXT, 4)
    peftkern.patch(model, cartridge, freeze=True)
    rows = [targets.rows([number]) for number in range(4)]
    few = Targets(targets.conversations[:4], *(torch.cat(parts) for parts in zip(*rows, strict=True)))
    want, tokens = 0.0, 0
    for conversation, (ids, log_probs) in zip(few.conversations, rows, strict=True):
        text = torch.tensor([[*conversation.prompt_ids, *conversation.answer_ids[:-1]]])
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[0, -len(ids) :]
        want += float(distillation_loss(logits, torch.eye(logits.shape[1]), ids, log_probs, objective="kl_with_tail",
                                        reduction="sum"))  # fmt: skip
        tokens += len(ids)
    losses = train(model, cartridge, Study(few), tmp_path / "checkpoint", Training(steps=3, batch_size=4, lr=0.05))
    assert losses[0] == pytest.approx(want / tokens, rel=1e-4)
    assert losses[2] < losses[0]
    assert not any(module.training for name, module in model.named_modules() if "peftkern" not in name)


def test_every_epoch_sees_each_conversation_once():
    options = Training(batch_size=4)
    seen = [number for step in range(5) for number in options.numbers(step, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_cartridges_that_are_composed_train_jointly(tmp_path):
    lab = Lab(bank=True)
    conversations = lab.synthesise(tmp_path / "train")
    targets = capture(lab.model, lab.document, conversations, 8)
    bank = PrefixKV.stack([lab.fresh(), lab.fresh()])
    studies = [Study(targets, (0,)), Study(targets, (1,)), Study(targets, (0, 1))]
    before = compare(lab.model, lab.document, {"both": (bank, (0, 1))}, conversations)["both"]
    train(lab.model, bank, studies, tmp_path / "checkpoint", Training(steps=30, batch_size=3, lr=0.05))
    students = {"both": (bank, (0, 1)), "first": (bank, (0,)), "alone": bank.select(0)}
    after = compare(lab.model, lab.document, students, conversations)
    assert after["both"].interval()[0] < before.interval()[0]
    assert after["first"].kl == pytest.approx(after["alone"].kl, abs=1e-5), "a cartridge can be taken out"
    assert torch.equal(bank.frozen[0][0], lab.fresh().frozen[0])
