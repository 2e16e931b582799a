# SPDX-License-Identifier: Apache-2.0
"""Prints how far a patched model is from PEFT, per model family: ``python -m tests.huggingface.parity_table``.

Relative differences (largest difference over largest value) between PEFT and the same model patched. Prefixes: fp32,
the worst of four masks (none, all ones, right padding, left padding). ``--prompts``: soft prompts, fp32 and fp64, the
worst of the masks that PEFT has right (none, all ones, right padding). ``--backend`` chooses the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

import peftkern
from tests.huggingface import models

MODES = {"greedy": {"do_sample": False}, "beam": {"do_sample": False, "num_beams": 3}, "sample": {"do_sample": True}}


def parity(family: models.Family, **config: object) -> dict[str, str]:
    """One row: forward and backward, with checkpointing, a native prefix, and generation."""
    stock = models.peft_model(family, patched=False, **config)
    patched = models.peft_model(family, patched=True, **config)
    outputs, gradients = zip(*(_compare(patched, stock, family, mask) for mask in models.MASKS.values()), strict=True)
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = [_compare(patched, stock, family, mask)[1] for mask in models.MASKS.values()]
    row = {
        "logits": f"{max(outputs):.1e}",
        "gradients": f"{max(gradients):.1e}",
        "checkpointed": f"{max(checkpointed):.1e}",
        "native": "-" if config else _native(stock, family),
    }
    for mode, options in MODES.items():
        same = "-"
        if family.generates:
            want, got = (models.generate(m.eval(), family.task, **options) for m in (stock, patched))
            same = "same" if torch.equal(want, got) else "DIFFERENT"
        row[mode] = same
    return row


def _compare(model, reference, family, mask):
    got, want = (models.training_step(m, family.task, mask) for m in (model, reference))
    return models.step_difference(got, want, mask if family.generates else None)


def _native(stock, family):
    prefix = models.native_prefix(stock)
    model = peftkern.patch(models.base_model(family), prefix, freeze=True)
    worst = 0.0
    for mask in models.MASKS.values():
        models.training_step(stock, family.task, mask)
        models.training_step(model, family.task, mask)
        worst = max(worst, models.difference(prefix.trainable[0].grad, models.peft_prefix(stock).grad))
    return f"{worst:.1e}"


def prompt_parity(family: models.Family) -> dict[str, str]:
    """One row for prompt tuning: how the prompt runs, then loss, logits and prompt gradients in fp32 and fp64."""
    row = {}
    for dtype in (torch.float32, torch.float64):
        stock, patched = (models.prompt_model(family, patched=p, dtype=dtype) for p in (False, True))
        row["prompt runs"] = "a sample" if "before every sample" in str(peftkern.explain(patched)) else "once"
        worst = {"loss": 0.0, "logits": 0.0, "gradients": 0.0}
        for name, mask in models.MASKS.items():
            if name == "left":
                continue
            with models.fp64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
                want, got = (models.training_step(m, family.task, mask) for m in (stock, patched))
            outputs, gradients = models.step_difference(got, want, models.behind_prompt(mask))
            new = (models.difference(got.loss, want.loss), outputs, gradients)
            worst = {key: max(old, value) for (key, old), value in zip(worst.items(), new, strict=True)}
        row |= {f"{key} {'fp32' if dtype == torch.float32 else 'fp64'}": f"{x:.1e}" for key, x in worst.items()}
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="auto, or one of peftkern.available_backends()")
    parser.add_argument("--prompts", action="store_true", help="prompt tuning in place of prefix tuning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with peftkern.use_backend(options.backend):
        if options.prompts:
            causal = {name: family for name, family in models.FAMILIES.items() if family.task == "CAUSAL_LM"}
            _print_table(options.backend, ((name, prompt_parity(family)) for name, family in causal.items()))
        else:
            _print_table(options.backend, _prefix_rows())


def _prefix_rows() -> Iterator[tuple[str, dict[str, str]]]:
    rows: dict[str, tuple[models.Family, dict[str, object]]] = {
        **{name: (family, {}) for name, family in {**models.FAMILIES, **models.TASKS}.items()},
        "llama + projection": (models.FAMILIES["llama (GQA)"], models.PROJECTION),
        "t5 + projection": (models.FAMILIES["t5"], models.PROJECTION),
        "llama cartridge": (models.FAMILIES["llama (GQA)"], {"num_frozen_tokens": 2}),
    }
    for name, (family, config) in rows.items():
        yield name, parity(family, **config)


def _print_table(backend: str, rows: Iterator[tuple[str, dict[str, str]]]) -> None:
    for index, (name, row) in enumerate(rows):
        if index == 0:
            print(f"{'backend ' + backend:26s}" + "".join(f"{column:>15s}" for column in row))
        print(f"{name:26s}" + "".join(f"{value:>15s}" for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
