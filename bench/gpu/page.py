"""The page of a run: Markdown from rows, whatever phases they are of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bench.settings import SIZES

Row = dict[str, Any]
Column = str | Callable[[Row], Any]  # a key of the rows, or what is made of one

# What a row is about, beside its phase and name: of rows that agree in these, the last counts.
_IDENTITY = (
    "size", "dtype", "provider", "precision", "kernel", "part", "test", "blocks", "kind", "depth",
    "tool",
)  # fmt: skip
_PEERS = ("eager", "compile", "reduce-overhead")
_ORDER = (*SIZES, "pfml", *_PEERS, "float32", "bfloat16")
_SHOWN = 15  # failures of the summary


class Table(NamedTuple):
    """The rows of a name, and of a phase if one is given, a line each; and how to read them."""

    title: str
    name: str
    columns: dict[str, Column]
    phase: str | None = None
    note: str = ""


_STEP: dict[str, Column] = {
    "size": "size", "dtype": "dtype", "loss": "provider", "products": "precision",
    "step us": lambda row: row["p50_us"] if "p50_us" in row else _reason(row),
    "host us": "host_us", "graph us": "graph_us", "x pfml": "x_pfml",
    "MiB": lambda row: row["extra_bytes"] / 2**20 if "extra_bytes" in row else None,
    "gradient error": "gradient_error",
}  # fmt: skip
_STEPS = Table(
    "Steps of this loss", "step", _STEP, "steps",
    "Forward and backward. Step us: median of steps back to back, so the host's time where that is "
    "the larger. Host us: until a step returns, on an idle device. Graph us: of a replayed CUDA "
    "graph, the GPU's part. Inputs may still be in the L2 cache. MiB: memory that a step adds at "
    "its peak. Gradient error: against float64, relative to the largest force.",
)  # fmt: skip
_BESIDE = Table(
    "Plain PyTorch beside it", "step", _STEP, "peers",
    "The same energy by one N x N matrix of distances a step, in eager mode and under "
    "torch.compile. x pfml: the time in units of that of this loss.",
)  # fmt: skip
_KERNELS = Table("Kernels of a step, measured and modelled", "kernel", {
    "size": "size", "kernel": "kernel", "us": "us", "again": "again_us", "modelled": "modelled_us",
    "from": "low_us", "to": "high_us", "limit": "limit", "measured / modelled": "of_model",
}, note="Each in a CUDA graph of its own, twice: the difference is noise. The model is that of "
   "`python -m bench roofline`.")  # fmt: skip
_PHASES = Table("Phases", "phase", {
    "phase": "phase", "status": "status", "seconds": lambda row: round(row["seconds"]),
    "why": "message",
})  # fmt: skip
_TABLES = (
    _PHASES,
    Table("First step, from an empty cache", "first step", {
        "size": "size", "dtype": "dtype", "first step s": "first_s", "second": "second_s",
        "gradient error": "gradient_error", "energy error": "energy_error",
    }),
    _STEPS,
    _KERNELS,
    Table("PyTorch's own work", "part", {
        "size": "size", "part": "part", "us": "us", "host us": "host_us",
    }),
    Table("What the profiler sees on the GPU in a step", "profile", {
        "size": "size", "kernel": lambda row: f"`{row['kernel']}`", "us": "us",
        "launches": "launches",
    }),
    _BESIDE,
    Table("Tuning", "tuned", {
        "size": "size", "kernel": "kernel", "shipped us": "shipped_us", "best us": "best_us",
        "timed": lambda row: f"{row['timed']} of {row['configurations']}",
        "best": lambda row: "as shipped" if row["best"] == row["shipped"] else row["best"],
    }),
    Table("Pack and filter beside a product on another stream", "race", {
        "size": "size", "dtype": "dtype", "calls": "repeats",
        "other bits in the points": "coarse_calls",
        "in sketches": lambda row: max(row["left_calls"], row["right_calls"]),
        "in the filter": "near_calls",
    }),
    Table("Pack and filter against float64", "bounds", {
        "size": "size", "dtype": "dtype", "error / bound": "sketch_error",
        "wrong bits": "wrong_bits", "too near 0 to tell": "unsure",
    }),
    Table("Errors of products over what the bounds allow", "slack", {
        "blocks of": "blocks", "K": "depth", "points": "kind", "product": "product",
        "distance": "distance", "sketch": "sketch",
    }),
    Table("compute-sanitizer on a step", "sanitizer", {
        "tool": "tool", "outcome": "outcome", "errors": "errors", "why": "message",
    }),
)  # fmt: skip


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each thing, in the order of their first.

    Rows of another device are left out, and errors of an earlier run of a phase once it has run
    again.
    """
    machines = [i for i, row in enumerate(rows) if row["name"] == "machine" and "device" in row]
    others = [i for i in machines if rows[i]["device"] != rows[machines[-1]]["device"]]
    rows = rows[next((i for i in machines if i > max(others)), 0) if others else 0 :]
    ends: dict[str, list[int]] = {}  # of each phase, where its runs end
    for i, row in enumerate(rows):
        if row["name"] == "phase" and row["status"] in ("done", "failed"):
            ends.setdefault(row["phase"], []).append(i)
    found: dict[tuple[Any, ...], Row] = {}
    for i, row in enumerate(rows):
        runs = ends.get(row["phase"], [])
        if "error" not in row or len(runs) < 2 or i > runs[-2]:
            found[row["phase"], row["name"], *map(row.get, _IDENTITY)] = row
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
    return re.sub(r"[^a-z0-9]+", "-", _title(rows).lower()).strip("-")


def markdown(rows: Sequence[Row]) -> str:
    """The page: all that the rows say."""
    rows = _joined(rows)
    blocks = [f"# {_title(rows)}", *_about(rows), _verdict(rows, len(rows))]
    for table in _TABLES:
        if lines := _lines(table, rows):
            blocks += [f"## {table.title}", lines, table.note]
    return "\n\n".join(block for block in blocks if block) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """What is asked for first, short enough for the end of a log; the last is the verdict."""
    rows = _joined(rows)
    blocks = [f"# {_title(rows)}", *_about(rows)]
    blocks += [_lines(table, rows) for table in (_KERNELS, _BESIDE, _STEPS, _PHASES)]
    return "\n\n".join(block for block in [*blocks, _verdict(rows, _SHOWN)] if block)


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Rows with what only other rows know: the model of a kernel, and the time of this loss."""
    models, own = {}, {}
    for row in rows:
        if row["name"] == "model" and "error" not in row:
            models[row["size"], row["kernel"]] = row
        if row.get("provider") == "pfml" and "p50_us" in row:  # of the phase of the peers, at last
            own[row["size"], row["dtype"]] = row["p50_us"]
    found = []
    for row in rows:
        model = models.get((row.get("size"), row.get("kernel")))
        if row["name"] == "kernel" and model:
            row = row | {key: model[key] for key in ("low_us", "high_us", "limit")}
            row["modelled_us"] = model["us"]
            if row["us"] is not None:
                row["of_model"] = min(row["us"], row["again_us"]) / model["us"]
        unit = own.get((row.get("size"), row.get("dtype")))
        if unit and "p50_us" in row:
            row = row | {"x_pfml": row["p50_us"] / unit}
        found.append(row)
    return found


def _machine(rows: Sequence[Row]) -> Row:
    return next((row for row in rows if row["name"] == "machine" and "device" in row), {})


def _title(rows: Sequence[Row]) -> str:
    machine = _machine(rows)
    return "Rehearsal" if machine.get("rehearsal") else machine.get("device", "Unknown device")


def _about(rows: Sequence[Row]) -> list[str]:
    """Versions, and what the chip reaches."""
    machine = _machine(rows)
    told = [
        f"There is no model of {row['arch']}: there are of {row['known']}."
        for row in rows if row["name"] == "no model"
    ]  # fmt: skip
    if not machine:
        unknown = "The phase `machine` left no row, so nobody knows what this was measured on."
        return [unknown, *told]
    told.insert(
        0,
        f"`python -m bench gpu`, {machine['time'][:10]}, commit {machine['commit']}: Python "
        f"{machine['python']}, torch {machine['torch']} (CUDA {machine['cuda']}), Triton "
        f"{machine['triton']}, driver {machine['driver']}, {machine['cores']} cores of "
        f"{machine['cpu']}. A copy reaches {machine['copy_tb_s']:.3g} TB/s, a product of bfloat16 "
        f"matrices {machine['bf16_tflop_s']:.3g} TFLOP/s.",
    )
    if machine["rehearsal"]:
        told.insert(0, "**This is a rehearsal without a GPU. Its numbers mean nothing.**")
    return told


def _verdict(rows: Sequence[Row], most: int) -> str:
    """How many tests and checks passed, and which failed, at most so many."""
    tests = Counter(row["outcome"] for row in rows if row["name"] == "test")
    others = sum(row.get("passed") is True for row in rows if row["name"] != "test")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.items()) or "none"
    failed = failures(rows)
    lines = [f"- {_named(row)}" for row in failed[:most]]
    if len(failed) > most:
        lines.append(f"- and {len(failed) - most} more, which the page has")
    told = f"Tests: {counts}. Other checks that passed: {others}."
    if not failed:
        return f"{told} Nothing failed."
    return "\n".join([f"{told} **Failed: {len(failed)}.**", "", *lines])


def _named(row: Row) -> str:
    """What a row is about, and what it says is wrong."""
    about = [str(row[key]) for key in _IDENTITY if row.get(key) is not None]
    known = ("bench", "phase", "name", "passed", *_IDENTITY)
    values = (f"{k} {_cell(v)}" for k, v in row.items() if k not in known and v is not None)
    wrong = row.get("error") or row.get("message") or ", ".join(values)
    return f"{row['phase']}, {row['name']} {' '.join(about)}: {wrong}".replace("\n", " ")[:300]


def _reason(row: Row) -> str:
    return "out of memory" if row["out_of_memory"] else "failed"


def _lines(table: Table, rows: Sequence[Row]) -> str:
    """A table in Markdown, "" if it has no lines. What failed has one in the tables of steps."""
    chosen = [
        row
        for row in rows
        if row["name"] == table.name
        and table.phase in (None, row["phase"])
        and (table.columns is _STEP or "error" not in row)
    ]
    if not chosen:
        return ""
    if table.columns is _STEP:
        places = ("size", "dtype", "provider")
        chosen.sort(key=lambda row: [_ORDER.index(row[key]) for key in places])
    columns = table.columns.values()
    cells = [[row.get(c) if isinstance(c, str) else c(row) for c in columns] for row in chosen]
    is_number = [
        any(isinstance(x, float | int) for x in column) for column in zip(*cells, strict=True)
    ]
    lines = [list(table.columns), ["---:" if right else "---" for right in is_number]]
    lines += [[_cell(value) for value in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
