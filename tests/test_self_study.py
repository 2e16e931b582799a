# SPDX-License-Identifier: Apache-2.0
"""Self-study on a tiny random model: conversations, targets and training that survive an interruption anywhere."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern import PrefixKV, distillation_loss, self_study
from peftkern.huggingface.fingerprint import fingerprint
from peftkern.self_study import (
    HELD_OUT_PROMPTS,
    Chat,
    Comparison,
    Study,
    Synthesis,
    Targets,
    Training,
    capture,
    compare,
    read_conversations,
    synthesise,
    train,
)
from peftkern.self_study.identity import digest_of
from tests.huggingface.models import FAMILIES, base_model
from tests.huggingface.uncommon import UNCOMMON

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
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, eos_token_id=1,
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


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.fixture(scope="module")
def conversations(lab, tmp_path_factory):
    return lab.synthesise(tmp_path_factory.mktemp("study") / "train.jsonl")


@pytest.fixture(scope="module")
def targets(lab, conversations):
    return capture(lab.model, lab.document, conversations, 8)


# The chat


def test_the_turn_behind_the_document_is_what_the_template_writes():
    chat, tokenizer = Chat(new_tokenizer()), new_tokenizer()
    assert chat.has_template
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "What ?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(chat.document(TEXT))["input_ids"] + chat.turn("What ?") == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no system message') }}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ messages[0]['content'] }}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_without_a_usable_template_the_document_is_plain_text(template):
    chat = Chat(new_tokenizer(template))
    assert not chat.has_template
    assert chat.document(" some text\n") == "some text\n\n"
    assert chat.turn("What ?") == new_tokenizer()("Question: What ?\nAnswer:")["input_ids"]


# Conversations


def test_conversations_depend_on_the_seed_alone(lab, conversations, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert lab.synthesise(tmp_path / "a") == conversations
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state"
    assert lab.synthesise(tmp_path / "b", options=replace(OPTIONS, seed=1)) != conversations
    assert len(conversations) == 10
    assert all(0 < len(c.answer_ids) <= 6 and c.prompt_ids and c.question for c in conversations)
    assert all(1 not in c.answer_ids[:-1] for c in conversations), "an answer ends at its end"
    assert read_conversations(tmp_path / "a") == conversations


@pytest.mark.parametrize("kept", [1, 3, 5, 10, 11])
@pytest.mark.parametrize("torn", [b"", b'{"answer": "tor'])
def test_synthesis_continues_behind_the_last_whole_batch(lab, conversations, kept, torn, tmp_path):
    path, told = tmp_path / "train.jsonl", []
    lab.synthesise(path)
    complete = path.read_bytes()
    path.write_bytes(b"".join(complete.splitlines(keepends=True)[:kept]) + torn)
    assert lab.synthesise(path, progress=lambda done, count: told.append(done)) == conversations
    assert path.read_bytes() == complete
    assert told[0] == (10 if kept == 11 else (kept - 1) // 4 * 4)


def test_a_damaged_or_another_file_is_refused(lab, tmp_path):
    path = tmp_path / "train.jsonl"
    lab.synthesise(path, count=4)
    with pytest.raises(ValueError, match="path: expected a file made with the same count, seed"):
        lab.synthesise(path, count=8, options=replace(OPTIONS, seed=1))
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in ((1, b'{"peftkern_self_study": 99}\n'), (2, b"{}\n"), (3, b"no JSON\n"), (2, b"[1]\n")):
        path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        with pytest.raises(ValueError, match=rf"train.jsonl, line {number}: expected JSON of self-study format"):
            lab.synthesise(path, count=4)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a file of self-study format"):
        lab.synthesise(path, count=4)


def other_weights(model):
    """The model with one weight changed a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return other


def renamed():
    """A tokenizer of as many words, one of which is another, and occurs nowhere."""
    words = list(WORDS)
    words[words.index('"')] = "other"
    return new_tokenizer(words=words)


@pytest.mark.parametrize("name", ["model", "generation", "document", "tokenizer", "tokenizer (template)"])
def test_conversations_made_by_something_else_are_refused(lab, name, tmp_path):
    path = tmp_path / "train.jsonl"
    lab.synthesise(path, count=4)
    given = {"model": lab.model, "tokenizer": lab.tokenizer, "document": lab.document}
    if name == "model":
        given["model"] = other_weights(lab.model)
    elif name == "generation":
        given["model"] = copy.deepcopy(lab.model)
        given["model"].generation_config.repetition_penalty = 1.5
    elif name == "document":
        given["document"] = lab.fresh()
    else:
        others = {"tokenizer": renamed(), "tokenizer (template)": new_tokenizer(TEMPLATE.replace("<| assistant", ""))}
        given["tokenizer"] = others[name]
    with pytest.raises(ValueError, match=rf"path: expected a file made with the same {name.split()[0]}, got"):
        synthesise(text=TEXT, path=path, count=4, options=OPTIONS, **given)


def test_a_model_is_itself_wherever_it_is_from(lab, tmp_path):
    """Patched or not, loaded from another folder, and with another prefix."""
    want = fingerprint(lab.model)
    assert fingerprint(new_model()) == want
    new_model().save_pretrained(tmp_path)
    assert fingerprint(type(lab.model).from_pretrained(tmp_path)) == want
    assert fingerprint(other_weights(lab.model)) != want
    assert fingerprint(new_model().bfloat16()) != want
    assert fingerprint(new_model(rope_parameters={"rope_type": "default", "rope_theta": 1e3})) != want


def test_a_digest_tells_prefixes_apart():
    """Of the same bytes in another shape, dtype, place or position."""
    kv = [(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))] * 2
    prefixes = [
        PrefixKV.from_cache(kv),
        PrefixKV.from_cache(kv, num_frozen_tokens=1),
        PrefixKV.from_cache([(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))] * 2),
        PrefixKV.from_cache([(torch.zeros(2, 8, 8).half(), torch.zeros(2, 8, 8).half())] * 2),
    ]
    moved = PrefixKV.from_cache(kv)
    moved.positions += 3
    assert len({digest_of(prefix) for prefix in (*prefixes, moved)}) == 5
    assert digest_of(PrefixKV.from_cache(kv)) == digest_of(prefixes[0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("answer_tokens", 0), ("answer_temperature", -1.0), ("prompts", ()),
     ("question_temperature", float("nan"))],
)  # fmt: skip
def test_options_of_the_synthesis_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        Synthesis(**{option: value})


# Targets


def test_targets_are_the_predictions_of_the_model_that_reads_the_text(lab, conversations, targets):
    """The reference runs the document's tokens in front of every conversation."""
    plain, ids = new_model(), lab.tokenizer(Chat(lab.tokenizer).document(TEXT))["input_ids"]
    row = 0
    for conversation in conversations:
        text = torch.tensor([[*ids, *conversation.prompt_ids, *conversation.answer_ids]])
        with torch.no_grad():
            log_probs = plain(text).logits[0].log_softmax(-1)[-len(conversation.answer_ids) - 1 : -1]
        rows = slice(row, row + len(conversation.answer_ids))
        want = log_probs.topk(8)
        torch.testing.assert_close(targets.log_probs[rows], want.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(targets.ids[rows].long(), want.indices)
        row = rows.stop
    assert row == len(targets.ids)


def test_targets_are_read_again_or_refused(lab, conversations, targets, tmp_path):
    path = tmp_path / "targets.safetensors"
    for _ in range(2):
        found = capture(lab.model, lab.document, conversations, 8, path)
        assert torch.equal(found.ids, targets.ids)
        assert torch.equal(found.log_probs, targets.log_probs)
    with pytest.raises(ValueError, match="path: expected targets made with the same k, got"):
        capture(lab.model, lab.document, conversations, 5, path)
    with pytest.raises(ValueError, match="same conversations, got"):
        capture(lab.model, lab.document, conversations[:3], 8, path)
    with pytest.raises(ValueError, match="same model, got"):
        capture(other_weights(lab.model), lab.document, conversations, 8, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="path: expected targets in"):
        capture(lab.model, lab.document, conversations, 8, path)
    with pytest.raises(ValueError, match="conversations: expected at least one"):
        capture(lab.model, lab.document, [], 8)


# Training

TRAINING = Training(steps=7, batch_size=3, save_every=2, lr=0.05)


def trained(lab, targets, path, **more):
    cartridge = lab.fresh()
    losses = train(lab.model, cartridge, Study(targets), path, TRAINING, **more)
    return losses, cartridge.flat_values()


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


def test_a_resumed_run_is_bitwise_equal(lab, targets, tmp_path):
    losses, values = trained(lab, targets, tmp_path / "whole")
    for ends in (1, 2, 5):
        path, steps = tmp_path / f"stopped-{ends}", []
        trained(lab, targets, path, progress=lambda done, loss: steps.append(done), stop=lambda: len(steps) == ends)  # noqa: B023
        assert steps == list(range(1, ends + 1))
        again, resumed = trained(lab, targets, path)
        assert again == losses
        assert torch.equal(resumed, values)
    assert trained(lab, targets, tmp_path / "whole")[0] == losses, "a finished run is read"


def test_an_interrupt_in_a_step_costs_the_steps_since_the_last_checkpoint(lab, targets, tmp_path):
    losses, values = trained(lab, targets, tmp_path / "whole")

    def interrupt(done, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(lab, targets, tmp_path / "checkpoint", progress=interrupt)
    assert lab.model.peftkern_prefix is lab.cartridge
    assert not lab.model.model.training
    steps = []
    again, resumed = trained(lab, targets, tmp_path / "checkpoint", progress=lambda done, loss: steps.append(done))
    assert steps == [5, 6, 7]
    assert again == losses
    assert torch.equal(resumed, values)


def test_the_same_call_continues_with_the_same_cartridge(lab, targets, tmp_path):
    """In one process, where the first call has changed the cartridge."""
    losses, values = trained(lab, targets, tmp_path / "whole")
    cartridge, path = lab.fresh(), tmp_path / "checkpoint"

    def interrupt(end, done, loss):
        if done == end:
            raise KeyboardInterrupt

    for end in (1, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            train(lab.model, cartridge, Study(targets), path, TRAINING, progress=partial(interrupt, end))
    for _ in range(2):
        assert train(lab.model, cartridge, Study(targets), path, TRAINING) == losses
        assert torch.equal(cartridge.flat_values(), values)
    assert trained(lab, targets, path)[0] == losses, "the start is accepted too"
    with torch.no_grad():
        cartridge.trainable[0].add_(1)
    with pytest.raises(ValueError, match="with other start; remove"):
        train(lab.model, cartridge, Study(targets), path, TRAINING)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "mark",
    ["made 4", "step 3", *(pytest.param(mark, marks=pytest.mark.slow) for mark in ("made 8", "step 1", "step 6"))],
)
def test_killed_at_any_time_a_run_resumes_bitwise_equal(mark, tmp_path):
    """A process is killed (SIGKILL) during the synthesis or during training; another one continues."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # a fork has imported everything already
        torch.set_num_threads(1)
        run(tmp_path / "killed", lambda line: os.write(writer, line.encode() + b"\n") and time.sleep(0.05))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        assert mark in map(str.strip, told), "the run tells where it is"
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    lines = []
    run(tmp_path / "killed", lines.append)
    assert "made 0" not in lines
    assert ("step 1" in lines) == (mark != "step 3" and mark != "step 6")
    run(tmp_path / "whole", lambda line: None)
    for name in ("result.json", "train.jsonl", "checkpoint.safetensors", "targets.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def run(folder: Path, tell) -> None:
    """A whole run in ``folder``, which tells what it does."""
    lab = Lab()
    made = lab.synthesise(folder / "train.jsonl", progress=lambda done, count: tell(f"made {done}"))
    targets = capture(lab.model, lab.document, made, 8, folder / "targets.safetensors")
    cartridge = copy.deepcopy(lab.cartridge)
    path = folder / "checkpoint.safetensors"
    losses = train(
        lab.model, cartridge, Study(targets), path, TRAINING, progress=lambda done, loss: tell(f"step {done}")
    )
    (folder / "result.json").write_text(json.dumps([losses, cartridge.flat_values().tolist()]))


def test_checkpoints_of_another_run_are_refused(lab, targets, tmp_path):
    path = tmp_path / "checkpoint"
    trained(lab, targets, path)
    with pytest.raises(ValueError, match=r"path: expected a checkpoint of the same run, got .* with other options"):
        train(lab.model, lab.fresh(), Study(targets), path, Training(steps=3))
    turned = [replace(c, prompt_ids=c.prompt_ids[::-1], answer_ids=c.answer_ids[::-1]) for c in targets.conversations]
    changed = [
        replace(targets, ids=targets.ids.flip(0)),
        replace(targets, log_probs=targets.log_probs.flip(0)),
        replace(targets, conversations=turned),
    ]
    for other in changed:
        with pytest.raises(ValueError, match="with other studies; remove"):
            trained(lab, other, path)
    with pytest.raises(ValueError, match="with other model; remove"):
        train(other_weights(lab.model), lab.fresh(), Study(targets), path, TRAINING)
    with pytest.raises(ValueError, match="with other start; remove"):
        train(lab.model, PrefixKV(lab.model, 4, num_frozen_tokens=1), Study(targets), path, TRAINING)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="path: expected a checkpoint in"):
        trained(lab, targets, path)


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("batch_size", 0), ("save_every", 0), ("lr", 0.0), ("clip", float("inf"))]
)
def test_options_of_the_training_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        Training(**{option: value})


def test_studies_and_cartridges_are_checked(lab, targets, tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(ValueError, match="studies: expected at least one"):
        train(lab.model, lab.fresh(), [], path)
    with pytest.raises(ValueError, match=r"studies\[0\].prefix_ids: expected None, because"):
        train(lab.model, lab.fresh(), Study(targets, (0,)), path)
    with pytest.raises(ValueError, match=r"studies\[0\].prefix_ids: expected numbers below 1"):
        train(lab.model, PrefixKV.stack([lab.fresh()]), Study(targets), path)
    with pytest.raises(ValueError, match=r"studies\[1\].prefix_ids: expected numbers below 1, got \(1,\)"):
        train(lab.model, PrefixKV.stack([lab.fresh()]), [Study(targets, (0,)), Study(targets, (1,))], path)
    with pytest.raises(ValueError, match="cartridge: expected one with parameters that require gradients"):
        train(lab.model, lab.document, Study(targets), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer_ids": []}, r"\[2\].answer_ids: expected at least one token, got none"),
        ({"prompt_ids": []}, r"\[2\].prompt_ids: expected at least one token, got none"),
        ({"prompt_ids": [3, 64]}, r"\[2\].prompt_ids: expected tokens from 0 to 63, got 3 to 64"),
        ({"answer_ids": [-1]}, r"\[2\].answer_ids: expected tokens from 0 to 63, got -1 to -1"),
    ],
)
def test_conversations_are_checked(lab, conversations, targets, changes, words, tmp_path):
    wrong = [*conversations[:2], replace(conversations[2], **changes)]
    with pytest.raises(ValueError, match=f"^conversations{words}"):
        capture(lab.model, lab.document, wrong, 8)
    with pytest.raises(ValueError, match=f"^conversations{words}"):
        compare(lab.model, lab.document, {"start": lab.fresh()}, wrong)
    with pytest.raises(ValueError, match=rf"^studies\[0\].targets.conversations{words}"):
        trained(lab, replace(targets, conversations=wrong), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_are_checked(lab, conversations, size):
    for call in (lambda: capture(lab.model, lab.document, conversations, batch_size=size),
                 lambda: compare(lab.model, lab.document, {}, conversations, batch_size=size)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^batch_size: expected at least 1, got {size}"):
            call()


def test_targets_are_checked(lab, targets, tmp_path):
    wrong = {
        r"ids: expected \[\d+, K\], one row per token": {"ids": targets.ids[:-1]},
        r"log_probs: expected \[\d+, K\], one row": {"log_probs": targets.log_probs[:, :3]},
        "ids: expected tokens from 0 to 63, got": {"ids": targets.ids + 64},
        "log_probs: expected no number above 0, got nan": {"log_probs": targets.log_probs * float("nan")},
    }
    for words, changes in wrong.items():
        with pytest.raises(ValueError, match=rf"^studies\[0\].targets.{words}"):
            trained(lab, replace(targets, **changes), tmp_path / "checkpoint")


def test_every_epoch_sees_each_conversation_once():
    options = Training(batch_size=4)
    seen = [number for step in range(5) for number in options.numbers(step, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


# Composition


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


def test_the_interval_is_that_of_a_bootstrap():
    comparison = Comparison([float(i % 2) for i in range(100)], [1.0] * 100)
    mean, low, high = comparison.interval()
    assert mean == 0.5
    assert low == pytest.approx(0.4, abs=0.03)
    assert high == pytest.approx(0.6, abs=0.03)
    assert comparison.interval("agreement") == (1.0, 1.0, 1.0)
    assert comparison.interval() == (mean, low, high)


# The page


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """With fewer and shorter questions, and fewer steps."""

    class Small:
        def __getattr__(self, name):
            return getattr(self_study, name)

        def synthesise(self, model, tokenizer, document, text, path, count, options=OPTIONS):
            prompts = options.prompts
            return synthesise(model, tokenizer, document, text, path, 5, replace(OPTIONS, prompts=prompts))

        def train(self, *arguments):
            return train(*arguments, Training(steps=3, batch_size=2))

    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "cartridges.md").read_text()
    blocks = re.findall(r"^```{code-block} python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3
    run, compared, composed = (block.replace("from peftkern import self_study\n", "") for block in blocks)
    names = {"model": new_model(), "tokenizer": new_tokenizer(), "text": TEXT, "self_study": Small()}
    exec(run + compared, names)
    peftkern.unpatch(names["model"])
    names |= {f"cartridge_{x}": names["cartridge"] for x in "ab"}
    names |= {f"targets_{x}": names["targets"] for x in ("a", "b", "of_both")}
    exec(composed, names)
    assert peftkern.load_prefix("cartridge").lengths == (128, 128)
    assert peftkern.load_prefix("cartridge-a").lengths == (128, 128)
