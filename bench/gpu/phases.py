"""The phases by name, and one task of a phase as a process: ``python -m bench.gpu.phases TASK``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.settings import GPU_PHASES

ROWS = "rows.jsonl"
PHASE = "PFML_TRITON_GPU_PHASE"  # environment variable: the phase that a task belongs to
FOLDER = "PFML_TRITON_GPU_ROWS"  # environment variable: where the plugin of pytest writes them
Task = tuple[str, ...]  # a function of `_functions`, and its arguments


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


def _alone(*tasks: Task) -> tuple[tuple[Task, ...], ...]:
    """What is timed: one task after the other."""
    return tuple((task,) for task in tasks)


# What only compiles, or reads machine code, has company.
_LATER_STEPS = tuple(("first", size) for size in ("sop", "vit-sop", "faces-100k"))
_MODELS = tuple(("model", size) for size in ("cub", "sop", "vit-sop"))
_COMPILED = tuple(("compiled", size, f"{i}/6") for size in ("cub", "sop") for i in range(6))

# The shares add up to more than 1: most phases end before their time.
PHASES = {
    "machine": Phase(0.06, 5, _alone(("machine",))),
    "first": Phase(0.2, 15, (*_alone(("first", "cub")), (*_LATER_STEPS, *_MODELS))),
    "correctness": Phase(0.4, 15, _alone(("correctness",))),
    "stress": Phase(0.12, 15, _alone(("stress",))),
    "steps": Phase(0.2, 15, _alone(("steps",))),
    "peers": Phase(0.2, 15, _alone(("peers",))),
    "slack": Phase(0.06, 10, _alone(("slack",))),
    "tune": Phase(0.22, 30, (_COMPILED, *_alone(("tune", "cub"), ("tune", "sop")))),
    "memcheck": Phase(0.12, 15, _alone(("sanitize", "memcheck"))),
    "racecheck": Phase(0.12, 15, _alone(("sanitize", "racecheck"))),
}
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
    rig = Rig(out, os.environ.get(PHASE, name), rehearses)
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
