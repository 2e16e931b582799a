# SPDX-License-Identifier: Apache-2.0
"""What is done on the first day on a GPU, in which order, and the time that each part may take."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One process: a function that returns items by name.

    Attributes:
        name: of its record and its log.
        function: ``module:function`` of this package.
        arguments: of the function, after the :class:`~.context.Context`.
        item_limit: seconds after which an item is taken to hang.
        table: name of the CSV file that its rows go to; empty: they are in results.json only.
    """

    name: str
    function: str
    arguments: tuple[str, ...] = ()
    item_limit: float = 45.0
    table: str = ""


class Phase(NamedTuple):
    """Steps that run at the same time, each in a process of its own.

    Attributes:
        share: number of seconds that the phase takes at most.
        needs: name of a phase without whose success this one does not run; empty: none.
    """

    name: str
    share: float
    steps: tuple[Step, ...]
    needs: str = ""


#: Seconds of a whole run, and of them the seconds for the report.
LIMIT, REPORTING = 570.0, 5.0


def _right(backend: str) -> Step:
    return Step(f"right_{backend}", "machine:right", (backend,), 25.0)


def _correct(name: str, *arguments: str) -> Step:
    return Step(f"correct_{name}", "correctness:correct", arguments, 40.0, "correctness")


PHASES = (
    Phase("start", 30, (Step("machine", "machine:machine"), *map(_right, ("triton", "cuda", "merge", "concat")))),
    Phase("correctness", 120, (
        _correct("triton_1of2", "bf16", "triton", "", "1", "2"),
        _correct("triton_2of2", "bf16", "triton", "", "2", "2"),
        _correct("cuda", "bf16", "cuda", ""),
        _correct("merge_cuda", "bf16", "merge", "cuda"), _correct("merge_triton", "bf16", "merge", "triton"),
        _correct("concat_cuda", "bf16", "concat", "cuda"), _correct("concat_triton", "bf16", "concat", "triton"),
        _correct("other_dtypes", "fp16 fp32", "", ""),
    )),
    Phase("training", 120, (Step("training", "training:training", (), 60.0, "training"),), "start"),
    Phase("attention", 120, (Step("attention", "attention:attention", (), 40.0, "attention"),), "start"),
    Phase("host", 40, (Step("host", "host:host", (), 20.0, "host"),), "start"),
    Phase("generation", 45, (Step("generation", "generation:generation", (), 30.0, "generation"),), "start"),
    Phase("compiled", 90, (
        Step("cuda_graph", "compiled:cuda_graph"), Step("opcheck", "compiled:opcheck"),
        Step("compile", "compiled:compiled"),
    ), "start"),
)  # fmt: skip

#: What is worth the minutes that remain. Calibration comes last.
LEFTOVER = (
    Phase("sanitizer", 80, (Step("sanitizer", "leftover:sanitizer", (), 60.0),)),
    Phase("ncu", 50, (Step("ncu", "leftover:ncu", (), 45.0),)),
    Phase("calibration", 50, (Step("calibration", "leftover:calibration", (), 50.0),)),
)

#: Steps that test the runner.
PLANTED = (
    Phase("planted", 6, (
        Step("wrong", "planted:wrong"), Step("crash", "planted:crash"), Step("hang", "planted:hang", (), 0.5),
        Step("slow", "planted:slow", (), 60.0), Step("start", "planted:start"),
        Step("good", "planted:good", (), 60.0, "attention"),
    )),
    Phase("never", 6, (Step("unneeded", "planted:good"),), "planted"),
)  # fmt: skip


def steps(phases: tuple[Phase, ...]) -> dict[str, Step]:
    """The steps by name, in order."""
    return {step.name: step for phase in phases for step in phase.steps}
