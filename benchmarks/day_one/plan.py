# SPDX-License-Identifier: Apache-2.0
"""The stages of the first day on a GPU, their order and their time limits."""

from __future__ import annotations

#: Seconds for all stages together.
LIMIT = 525.0

#: Groups of stages with their time limits in seconds. Stages of a group may run at the same time.
GROUPS: tuple[dict[str, float], ...] = (
    {"environment": 60},
    {
        "build": 150, **{f"correct_triton_bf16_{part}of4": 150 for part in range(1, 5)}, "correct_triton_fp16": 120,
        "correct_triton_fp32": 120, **{f"correct_merge_bf16_{part}of2": 150 for part in range(1, 3)},
        "correct_merge_fp32": 120, "correct_concat_bf16": 120, "correct_concat_fp32": 120,
        "correct_reference_bf16": 90, "planted": 60,
    },
    {
        "correct_cpu_bf16": 60, "correct_cpu_fp32": 60, "correct_cuda_bf16": 60, "correct_cuda_fp16": 60,
        "opcheck": 90, "compile": 120, "cuda_graph": 90,
    },
    {"ceilings": 30},
    {"crossovers": 100},
    {"microbenchmarks": 110},
    {"training": 100},
)  # fmt: skip
#: Stages that test the runner: one crashes, one never ends.
PLANTED = ("planted_crash", "planted_hang")
#: Results of stages that need not run again.
DONE = ("ok", "left out")
