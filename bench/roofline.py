"""The modelled time of one step on a GPU that is not here, from its machine code.

Nothing in it is measured. Launches, machine code, tiles and pairs are counted (counting.py,
machine.py, workloads.py); rates are published or assumed (chips.py); estimate.py has the rule that
makes seconds of them, and validation.py says how far off it is on kernels of published speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import aot
from bench.chips import CHIPS, LAUNCH_GAP
from bench.clouds import make_cloud
from bench.counting import Work, count_work, record_step
from bench.estimate import Estimate, estimate, some, us
from bench.results import append_row, provenance
from bench.roofline_plot import roofline_figure
from bench.settings import DTYPES, MODELLED, SIZES, RooflineSettings, Size
from bench.validation import Validation, cases, sources, validate, validation_table
from bench.workloads import Kernel, name_of, parts_of, read
from pfml_triton import Potential

Row = dict[str, Any]
_FACTS = ("kernel", "programs", "regs", "spills", "KiB", "held", "MMA", "busiest")
_LEFT = ("kernel", "busiest")
_ENDS = {"low": "low", "point": "seconds", "high": "high"}


@dataclass(frozen=True)
class Prediction:
    """What one launch is modelled to take. Seconds are infinite where it does not fit."""

    name: str
    seconds: float  # point estimate
    low: float
    high: float
    limit: str
    registers: int
    stack_bytes: int
    spills_in_loops: int
    shared_bytes: int
    resident: int  # programs that a multiprocessor holds
    fits: bool


def predict(launches: Sequence[aot.Launch], arch: str, work: Work) -> list[Prediction]:
    """The modelled time of each launch on a chip, in order, for the work of a cloud.

    Args:
        launches: of `aot.record`, in a process without TRITON_INTERPRET.
        arch: one of `CHIPS`.
        work: of the cloud whose sizes the launches have.

    A launch that cannot be compiled, or wants more shared memory than a program may have, gets
    `fits=False` and infinite seconds.

    Raises:
        ValueError: there is no model of that chip.
    """
    check_arch(arch)
    return [_predict(launch, arch, work) for launch in launches]


def check_arch(arch: str) -> None:
    if arch not in CHIPS:
        raise ValueError(
            f"arch must be one of {', '.join(CHIPS)}, got {arch!r}: the model reads the machine "
            "code of NVIDIA's chips"
        )


def _predict(launch: aot.Launch, arch: str, work: Work) -> Prediction:
    name, never = name_of(launch), math.inf
    try:
        kernel = read(launch, arch, CHIPS[arch])
    except Exception as error:  # whatever Triton raises for what it cannot compile
        why = f"not compiled: {type(error).__name__}"
        return Prediction(name, never, never, never, why, 0, 0, 0, 0, 0, False)
    m = kernel.machine
    facts = m.registers, m.stack_bytes, len(m.spills_in_loops), m.shared_bytes, kernel.resident
    if kernel.resident == 0:
        return Prediction(name, never, never, never, "does not fit", *facts, False)
    e = estimate(kernel, CHIPS[arch], parts_of(kernel, work))
    return Prediction(name, e.seconds, e.low, e.high, e.limit, *facts, True)


def run(settings: RooflineSettings, out: Path, console: Console | None = None) -> list[Row]:
    """Model the steps, print them and the validation, append to ``roofline.jsonl`` in `out`.

    Returns:
        The rows: one for each kernel and one for each step, or those of the validation.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: the kernels were imported under Triton's interpreter.
    """
    for arch in settings.archs:
        check_arch(arch)
    for name, given, known in (
        ("size", settings.sizes, MODELLED),
        ("dtype", (settings.dtype,), DTYPES),
    ):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {unknown[0]!r}")
    console = console or Console()
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        for size in () if settings.validate else progress.track(settings.sizes):
            progress.console.print(f"[dim]{size}: counting the work of its points[/]")
            points, labels, shape = make_cloud(SIZES[size], settings.seed)
            dtype = getattr(torch, settings.dtype)
            points[: shape.batch] = points[: shape.batch].to(dtype)
            work = count_work(points, labels, Potential())
            for arch in settings.archs:
                step = model_step(size, shape, dtype, work, arch)
                for table in step.tables(explain=settings.explain):
                    progress.console.print(table)
                for line in step.findings():
                    progress.console.print(line, highlight=False)
                for row in step.rows():
                    rows.append(row | {"seed": settings.seed} | provenance(torch.device("cpu")))
                    append_row(out / "roofline.jsonl", rows[-1])
        results = [validate(case, progress) for case in cases()]
    console.print(validation_table(results))
    for line in sources(results):
        console.print(line, highlight=False)
    for result in results:
        rows.append(_validation_row(result) | provenance(torch.device("cpu")))
        append_row(out / "roofline.jsonl", rows[-1])
    if not settings.validate:
        roofline_figure(out / "roofline.jsonl", out / "roofline.png")
        console.print(f"Wrote {out / 'roofline.png'}", highlight=False)
    return rows


@dataclass(frozen=True)
class Step:
    """A modelled step: its kernels with their times, and what else it does."""

    size: str
    arch: str
    n: int
    depth: int
    dtype: str
    work: Work
    kernels: list[tuple[Kernel, Estimate]]
    others: list[Estimate]  # gaps between launches, PyTorch's own operations

    def seconds(self, end: str = "seconds", *, kernels_only: bool = False) -> float:
        """The sum of "low", "seconds" (the point) or "high"."""
        parts = [e for _, e in self.kernels] + ([] if kernels_only else self.others)
        return float(sum(getattr(e, end) for e in parts))

    @property
    def operations(self) -> int:
        """Of two dense products of all pairs, forward and backward."""
        return 4 * self.n**2 * self.depth

    def rows(self) -> Iterator[Row]:
        """A row for each kernel, and one for the step."""
        chip = CHIPS[self.arch]
        shared: Row = {
            "bench": "roofline", "modelled": True, "arch": self.arch, "chip": chip.name,
            "size": self.size, "n": self.n, "depth": self.depth, "dtype": self.dtype,
        }  # fmt: skip
        for kernel, e in self.kernels:
            m = kernel.machine
            yield shared | {"level": "kernel", "kernel": e.name} | _times(e) | {
                "limit": e.limit, "unit": e.unit, "limit_fraction": e.share,
                "programs": kernel.programs, "warps": kernel.warps, "resident": kernel.resident,
                "registers": m.registers, "stack_bytes": m.stack_bytes,
                "spills_in_loops": len(m.spills_in_loops), "shared_bytes": m.shared_bytes,
                "instructions": m.instructions,
                "tensor_core_instructions": m.tensor_core_instructions,
            }  # fmt: skip
        step: Row = {f"us_{end}": 1e6 * self.seconds(name) for end, name in _ENDS.items()}
        step |= {
            f"kernels_us_{end}": 1e6 * self.seconds(name, kernels_only=True)
            for end, name in _ENDS.items()
        }
        for e in self.others:
            step[f"{e.name}_us"] = 1e6 * e.seconds
        step |= {
            "active_tiles": len(self.work.row), "turns": int(self.work.turns.sum()),
            "nominated_pairs": self.work.pairs, "dense_operations": self.operations,
            "dense_tflops": self.operations / self.seconds() / 1e12,
            "dense_bfloat16_us": 1e6 * self.operations / chip.peak,
            "dense_tf32_us": 2e6 * self.operations / chip.peak,
            "bfloat16_peak_fraction": self.operations / self.seconds() / chip.peak,
            "tf32_peak_fraction": 2 * self.operations / self.seconds() / chip.peak,
        }  # fmt: skip
        yield shared | {"level": "step"} | step

    def tables(self, *, explain: bool) -> Iterator[Table]:
        """The times of the kernels and of the step, and how they come about."""
        table = Table(
            title=f"Modelled us of one step, {self.size}: N = {self.n:,}, "
            f"D = {self.depth}, {self.dtype}, {CHIPS[self.arch].name}",
            caption="Modelled, not measured. Held: programs of a multiprocessor at a time. MMA: "
            "tensor-core instructions. Busiest: the unit that is, and for how much of the time; "
            "below half, latency limits. Forward, backward: PyTorch's own operations.",
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for name in (*_FACTS, *_ENDS):
            table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
        for kernel, e in self.kernels:
            m = kernel.machine
            table.add_row(
                e.name, f"{kernel.programs:,}", str(m.registers), str(len(m.spills_in_loops)),
                f"{m.shared_bytes / 1024:.0f}", str(kernel.resident),
                str(m.tensor_core_instructions), f"{e.unit} {e.share:.0%}", *_us_columns(e),
            )  # fmt: skip
        empty = [""] * (len(_FACTS) - 1)
        ends = [_us(self.seconds(name, kernels_only=True)) for name in _ENDS.values()]
        table.add_section()
        table.add_row("[bold]kernels", *empty, *ends)
        for e in self.others:
            table.add_row(e.name, *empty, *_us_columns(e))
        ends = [f"[bold]{_us(self.seconds(name))}" for name in _ENDS.values()]
        table.add_section()
        table.add_row("[bold]step", *empty, *ends)
        yield table
        if explain:
            table = Table(title="Derivation, modelled", box=SIMPLE_HEAD, show_header=False)
            for e in [e for _, e in self.kernels] + self.others:
                table.add_row(e.name, "\n".join(e.lines), end_section=True)
            yield table

    def findings(self) -> Iterator[str]:
        """The work that was counted, and the distance from the limits of the chip."""
        chip, rate = CHIPS[self.arch], self.operations / self.seconds()
        yield (
            f"Counted: {len(self.work.row):,} active tiles of 16 x 64, "
            f"{int(self.work.turns.sum()):,} turns, {self.work.pairs:,} pairs that exert a force."
        )
        yield (
            f"Modelled: {rate / 1e12:,.0f} TFLOP/s dense-equivalent (4 N^2 D), "
            f"{rate / chip.peak:.2f} of the bfloat16 peak of {chip.peak / 1e12:,.0f} and "
            f"{2 * rate / chip.peak:.2f} of the TF32 peak, where skipped tiles count as done. "
            f"At the bfloat16 peak two dense products take {us(self.operations / chip.peak)}.\n"
        )


def model_step(name: str, size: Size, dtype: torch.dtype, work: Work, arch: str) -> Step:
    """Compile and model one step of a loss, forward and backward, on a chip."""
    chip = CHIPS[arch]
    launches, operations = record_step(size, arch, dtype)
    kernels = [read(launch, arch, chip) for launch in launches]
    estimates = [(k, estimate(k, chip, parts_of(k, work))) for k in kernels]
    gaps = LAUNCH_GAP * len(kernels)
    text = f"{len(kernels)} launches x {us(LAUNCH_GAP)}, assumed"
    others = [Estimate("launches", gaps, gaps, gaps, "launches", [text])]
    for when, moved in operations.items():
        seconds = sum(max(LAUNCH_GAP, each / chip.hbm_rate) for each in moved)
        text = (
            f"{some(len(moved), 'pass')} of PyTorch's own operations, {sum(moved) / 1e6:,.1f} MB: "
            f"each takes {us(LAUNCH_GAP)} or its bytes over HBM, whatever is more"
        )
        others.append(Estimate(when, seconds, seconds, seconds, "launches, HBM", [text]))
    given = str(dtype).removeprefix("torch.")
    return Step(name, arch, size.n, size.depth, given, work, estimates, others)


def _validation_row(result: Validation) -> Row:
    p, (m, n, k, warps, stages) = result.published, result.configuration
    return {
        "bench": "roofline", "modelled": True, "level": "validation", "arch": p.arch,
        "chip": CHIPS[p.arch].name, "kernel": p.name, "block_m": m, "block_n": n, "block_k": k,
        "warps": warps, "stages": stages, "published_low_tflops": p.low,
        "published_high_tflops": p.high, "source": p.source, "tflops": result.speed,
        "error": result.error, "is_inside": result.is_inside, "limit": result.best.limit,
    } | _times(result.best)  # fmt: skip


def _times(e: Estimate) -> Row:
    return {f"us_{end}": 1e6 * getattr(e, name) for end, name in _ENDS.items()}


def _us_columns(e: Estimate) -> list[str]:
    return [_us(getattr(e, name)) for name in _ENDS.values()]


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.{1 if seconds < 1e-5 else 0}f}"
