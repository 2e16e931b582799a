# SPDX-License-Identifier: Apache-2.0
"""Score the choices of few-shot questions. The examples and each question run once instead of once per choice.

python examples/score_choices.py                                      a tiny random model, in seconds
python examples/score_choices.py --model HuggingFaceTB/SmolLM2-135M   a real one, from the Hub or a folder
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftkern


def load_model(name: str | None) -> PreTrainedModel:
    """The model called ``name``, or a tiny random one."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# start of the example
@torch.no_grad()
def score(model: PreTrainedModel, prompts: list[Tensor], continuations: list[Tensor]) -> Tensor:
    """The log-likelihood of each continuation behind its prompt, [N]. All are 1-dim tensors of token ids."""
    rows = [torch.cat(pair) for pair in zip(prompts, continuations, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(lengths.max()))
    mask = (columns >= len(columns) - lengths[:, None]).long()
    keep = max(map(len, continuations))
    logits = model(
        pad_sequence(rows, batch_first=True, padding_side="left"), attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=keep + 1, use_cache=False,
    ).logits  # fmt: skip
    targets = pad_sequence(continuations, batch_first=True, padding_value=-100, padding_side="left")
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return -losses.sum(1)


# end of the example


def make_questions(count: int) -> list[tuple[Tensor, list[Tensor]]]:
    """(prompt, four choices) of ``count`` questions of random tokens, behind the same few-shot examples."""
    examples = torch.randint(1, 256, (512,))
    questions = [torch.cat([examples, torch.randint(1, 256, (40,))]) for _ in range(count)]
    lengths = torch.randint(8, 25, (count, 4)).tolist()
    return [(q, [torch.randint(1, 256, (n,)) for n in four]) for q, four in zip(questions, lengths, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Score random questions without and with sharing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub name or a folder; default a tiny random model")
    parser.add_argument("--questions", type=int, default=4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = load_model(options.model).eval()
    pairs = [(q, choice) for q, choices in make_questions(options.questions) for choice in choices]
    prompts, continuations = (list(x) for x in zip(*pairs, strict=True))

    def timed() -> tuple[Tensor, float]:
        score(model, prompts, continuations)
        start = time.perf_counter()
        return score(model, prompts, continuations), time.perf_counter() - start

    plain, seconds = timed()
    peftkern.patch(model, share="prefixes")
    shared, shared_seconds = timed()
    print(peftkern.explain(model))
    print(f"{seconds:.3f} s per row, {shared_seconds:.3f} s shared")
    print(f"largest difference of the scores: {float((plain - shared).abs().max()):.0e}")


if __name__ == "__main__":
    main()
