"""The page of a run: Markdown from rows, whatever phases they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# What a row is about, beside its phase and name: of rows that agree in these, the last counts.
_IDENTITY = (
    "size", "dtype", "provider", "precision", "kernel", "part", "test", "blocks", "kind", "depth",
    "tool",
)  # fmt: skip
_SHOWN = 15  # failures of the summary
_PEERS = ("eager", "compile", "reduce-overhead")
_MIB = 2.0**20


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each thing, in the order of their first.

    Errors of an earlier run of a phase are gone once it has run again.
    """
    ends: dict[str, list[int]] = {}  # of each phase, where its runs end
    for i, row in enumerate(rows):
        if row["name"] == "phase" and row["status"] in ("done", "failed"):
            ends.setdefault(row["phase"], []).append(i)
    found: dict[tuple[Any, ...], Row] = {}
    for i, row in enumerate(rows):
        runs = ends.get(row["phase"], [])
        if "error" not in row or len(runs) < 2 or i > runs[-2]:
            found[(row["phase"], row["name"], *map(row.get, _IDENTITY))] = row
    return list(found.values())


def failures(rows: Iterable[Row]) -> list[Row]:
    """Checks that failed, and what broke: not peers that run out of memory, nor phases that run
    out of time."""
    return [
        row
        for row in rows
        if row.get("passed") is False
        or row.get("status") == "failed"
        or ("error" in row and not (row.get("provider") in _PEERS and row["out_of_memory"]))
    ]


def slug(rows: Sequence[Row]) -> str:
    """The device as a file is named."""
    machine = _machine(rows)
    name = "rehearsal" if machine.get("rehearsal") else machine.get("device", "unknown device")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def page(rows: Sequence[Row]) -> str:
    """All that the rows say."""
    sections = {
        "Phases": _phases(rows),
        "Checks": _checks(rows),
        "First step, from an empty cache": _first_steps(rows),
        "Steps": _steps(rows, "steps"),
        "Kernels": _kernels(rows),
        "PyTorch's own work in a step": _parts(rows),
        "Plain PyTorch": _steps(rows, "peers"),
        "Tuning": _tuned(rows),
    }
    text = [f"# {_title(rows)}", *_about(rows)]
    for title, blocks in sections.items():
        if blocks:
            text += [f"## {title}", *blocks]
    return "\n\n".join(text) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """What is asked for first, short enough for the end of a log."""
    failed = failures(rows)
    lines = [f"- {_named(row)}" for row in failed[:_SHOWN]]
    if len(failed) > _SHOWN:
        lines.append(f"- and {len(failed) - _SHOWN} more, which the page has")
    blocks = [f"# {_title(rows)}", *_about(rows), *_steps(rows, "steps"), *_kernels(rows)]
    blocks += [*_steps(rows, "peers"), *_phases(rows), _tests(rows)]
    blocks.append("\n".join(["Failed:", *lines]) if failed else "Nothing that was checked failed.")
    return "\n\n".join(block for block in blocks if block)


def _machine(rows: Sequence[Row]) -> Row:
    return next((row for row in rows if row["name"] == "machine" and "device" in row), {})


def _title(rows: Sequence[Row]) -> str:
    machine = _machine(rows)
    return "Rehearsal" if machine.get("rehearsal") else machine.get("device", "Unknown device")


def _about(rows: Sequence[Row]) -> list[str]:
    """Versions and what the chip reaches."""
    machine = _machine(rows)
    if not machine:
        return ["The phase `machine` left no row, so nobody knows what this was measured on."]
    told = [
        f"`python -m bench gpu`, {machine['time'][:10]}, commit {machine['commit']}: Python "
        f"{machine['python']}, torch {machine['torch']} (CUDA {machine['cuda']}), Triton "
        f"{machine['triton']}, driver {machine['driver']}, {machine['cores']} cores of "
        f"{machine['cpu']}. A copy reaches {machine['copy_tb_s']:.3g} TB/s, a product of bfloat16 "
        f"matrices {machine['bf16_tflop_s']:.3g} TFLOP/s."
    ]
    if machine["rehearsal"]:
        told.insert(0, "**This is a rehearsal without a GPU. Its numbers mean nothing.**")
    return told


def _phases(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["phase"], row["status"], f"{row['seconds']:.0f}", row["message"])
        for row in rows if row["name"] == "phase"
    ]  # fmt: skip
    return _table(("phase", "status", "seconds", ""), lines)


def _checks(rows: Sequence[Row]) -> list[str]:
    blocks = [_tests(rows)]
    races = [
        (row["size"], row["dtype"], f"{row['repeats']:,}", sum(row["runs_that_differ"].values()))
        for row in _of(rows, "race")
    ]
    blocks += _table(
        ("pack and filter beside a product", "dtype", "calls", "calls with other bits"), races
    )
    bounds = [
        (row["size"], row["dtype"], row["sketch_error"], row["wrong_bits"], row["unsure"])
        for row in _of(rows, "bounds")
    ]
    blocks += _table(
        ("pack and filter", "dtype", "error / bound", "wrong bits", "too near to tell"), bounds
    )
    slack = [
        (blocks_, *(max(row[share] for row in some) for share in ("product", "distance", "sketch")))
        for blocks_, some in _grouped(_of(rows, "slack"), lambda row: row["blocks"]).items()
    ]
    blocks += _table(
        ("blocks of", "product error / bound", "distance error / bound", "sketch error / bound"),
        slack,
    )
    sanitizers = [
        (row["tool"], row["outcome"], row["errors"], row["message"])
        for row in _of(rows, "sanitizer")
    ]
    blocks += _table(("compute-sanitizer", "outcome", "errors", ""), sanitizers)
    if failed := failures(rows):
        blocks.append("\n".join(["**Failed:**", "", *(f"- {_named(row)}" for row in failed)]))
    return [block for block in blocks if block]


def _tests(rows: Sequence[Row]) -> str:
    outcomes = _grouped([row for row in rows if row["name"] == "test"], lambda row: row["outcome"])
    if not outcomes:
        return ""
    seconds = sum(row["seconds"] or 0.0 for some in outcomes.values() for row in some)
    counts = ", ".join(f"{len(some)} {outcome}" for outcome, some in outcomes.items())
    return f"Tests: {counts}, in {seconds:.0f} s."


def _first_steps(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["size"], row["dtype"], row["forward_s"], row["backward_s"], row["second_s"],
         row["gradient_error"], row["energy_error"])
        for row in _of(rows, "first step")
    ]  # fmt: skip
    return _table(
        ("size", "dtype", "forward s", "backward s", "second step s", "gradient error",
         "energy error"), lines,
    )  # fmt: skip


def _steps(rows: Sequence[Row], phase: str) -> list[str]:
    """Microseconds of steps, those of a size together, and this loss as the unit."""
    every = [row for row in _of(rows, "step") if row["phase"] == phase]
    units = {(row["size"], row["dtype"]): row["p50_us"]
             for row in [*_of(rows, "step"), *every] if row["provider"] == "pfml"}  # fmt: skip
    lines = []
    for row in sorted(every, key=lambda row: (row["size"], row["dtype"] != "float32")):
        unit = units.get((row["size"], row["dtype"]))
        lines.append((
            row["size"], row["dtype"], row["provider"], row["precision"], row["p50_us"],
            row["host_us"], row["graph_us"], row["p50_us"] / unit if unit else None,
            row["extra_bytes"] / _MIB, row["gradient_error"],
        ))  # fmt: skip
    lines += [
        (row["size"], row["dtype"], row["provider"], row["precision"],
         "out of memory" if row["out_of_memory"] else "failed", *[None] * 5)
        for row in rows if row["name"] == "step" and row["phase"] == phase and "error" in row
    ]  # fmt: skip
    headings = ("size", "dtype", "loss", "products", "step us", "host us", "graph us", "x pfml",
                "MiB", "gradient error")  # fmt: skip
    return _table(headings, lines)


def _kernels(rows: Sequence[Row]) -> list[str]:
    """Measured beside modelled, where the chip has a model."""
    models = {(row["size"], row["kernel"]): row for row in _of(rows, "model")}
    lines = []
    for row in _of(rows, "kernel"):
        model = models.get((row["size"], row["kernel"]))
        us = None if row["us"] is None else min(row["us"], row["again_us"])
        lines.append((
            row["size"], row["kernel"].strip("_").removesuffix("_kernel"), us,
            *([model["us"], f"{model['low_us']:.3g} to {model['high_us']:.3g}", model["limit"]]
              if model else [None] * 3),
            us / model["us"] if us is not None and model else None,
        ))  # fmt: skip
    headings = ("size", "kernel", "us", "modelled us", "from, to", "limit", "measured / modelled")
    blocks = _table(headings, lines)
    for row in rows:
        if row["name"] == "no model":
            blocks.append(f"There is no model of {row['arch']}: there are of {row['known']}.")
    return blocks


def _parts(rows: Sequence[Row]) -> list[str]:
    parts = [(row["size"], row["part"], row["us"], row["host_us"]) for row in _of(rows, "part")]
    profile = [
        (row["size"], f"`{row['kernel']}`", row["us"], row["launches"])
        for row in _of(rows, "profile")
    ]
    return [
        *_table(("size", "part", "us", "host us"), parts),
        *_table(("size", "on the GPU, by the profiler", "us a step", "launches a step"), profile),
    ]


def _tuned(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in _of(rows, "tuned"):
        shipped, best = row["shipped_us"], row["best_us"]
        gain = f"{shipped / best - 1:.0%}" if shipped and best else None
        timed = f"{row['timed']} of {row['configurations']}"
        own = "the shipped one" if row["best"] == row["shipped"] else row["best"]
        lines.append((row["size"], row["kernel"], shipped, best, gain, timed, own))
    headings = ("size", "kernel", "shipped us", "best us", "gain", "timed", "best")
    return _table(headings, lines)


def _of(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of that name that are no errors."""
    return [row for row in rows if row["name"] == name and "error" not in row]


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _named(row: Row) -> str:
    """What a row is about, and what it says is wrong."""
    about = [str(row[key]) for key in _IDENTITY if row.get(key) is not None]
    if row["name"] == "phase":
        about = [row["phase"]]
    wrong = row.get("error") or row.get("message") or ", ".join(
        f"{key} {_cell(value)}" for key, value in row.items()
        if key not in ("bench", "phase", "name", "passed", *_IDENTITY) and value is not None
    )  # fmt: skip
    return f"{row['name']}, {' '.join(about)}: {wrong}".replace("\n", " ")[:300]


def _table(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    """A block of Markdown; none without lines."""
    if not lines:
        return []
    rows = [[_cell(value) for value in line] for line in lines]
    rule = ["---:" if any(isinstance(line[i], float | int) for line in lines) else "---"
            for i in range(len(headings))]  # fmt: skip
    return ["\n".join(f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows])]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
