"""The phases by name, and one task of a phase as a process: ``python -m bench.gpu.phases TASK``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.settings import GPU_PHASES

Task = tuple[str, ...]  # a function of `_functions`, and its arguments
_SHARES = range(6)  # of what is compiled side by side


@dataclass(frozen=True)
class Phase:
    """Tasks under one time limit.

    Args:
        share: of the minutes of a run that it gets at most.
        least: seconds without which it is not begun.
        stages: one after the other; the tasks of a stage run side by side, as far as there are
            cores.
    """

    share: float
    least: float
    stages: tuple[tuple[Task, ...], ...]


# The shares add up to more than 1: most phases end before their time. What is timed runs alone;
# what only compiles, or reads machine code, has company.
PHASES = {
    "machine": Phase(0.06, 5, ((("machine",),),)),
    "first": Phase(
        0.2,
        15,
        (
            (("first", "cub"),),
            (
                *(("first", size) for size in ("sop", "vit-sop", "faces-100k")),
                *(("model", size) for size in ("cub", "sop", "vit-sop")),
            ),
        ),
    ),
    "correctness": Phase(0.25, 15, ((("correctness",),),)),
    "stress": Phase(0.12, 15, ((("stress",),),)),
    "steps": Phase(0.2, 15, ((("steps",),),)),
    "peers": Phase(0.2, 15, ((("peers",),),)),
    "slack": Phase(0.06, 10, ((("slack",),),)),
    "tune": Phase(
        0.22,
        30,
        (
            tuple(("compiled", size, f"{i}/{len(_SHARES)}") for size in ("cub", "sop")
                  for i in _SHARES),
            (("tune", "cub"),),
            (("tune", "sop"),),
        ),
    ),
    "memcheck": Phase(0.12, 15, ((("sanitize", "memcheck"),),)),
    "racecheck": Phase(0.12, 15, ((("sanitize", "racecheck"),),)),
}  # fmt: skip
assert tuple(PHASES) == GPU_PHASES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a task in this process and return the exit status."""
    parser = argparse.ArgumentParser("python -m bench.gpu.phases")
    parser.add_argument("task", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args(arguments)
    run_task(tuple(chosen.task), chosen.out, chosen.rehearse)
    return 0


def run_task(task: Task, out: Path, rehearses: bool) -> None:
    """Run a task, which appends its rows to ``rows.jsonl`` in `out`."""
    from bench.gpu.rig import Rig

    name, *arguments = task
    rig = Rig(out, os.environ.get("PFML_TRITON_GPU_PHASE", name), rehearses)
    _functions()[name](rig, *arguments)


def _functions() -> dict[str, Callable[..., None]]:
    from bench.gpu import checks, slack, steps, stress, tune

    return {
        "machine": steps.machine, "first": steps.first, "model": steps.model,
        "correctness": checks.correctness, "stress": stress.stress, "steps": steps.steps,
        "peers": steps.peers, "slack": slack.slack, "compiled": tune.compiled, "tune": tune.tune,
        "sanitize": checks.sanitize, "once": steps.once,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
