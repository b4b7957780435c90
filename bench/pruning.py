"""What pruning saves: time, memory and operations against dense evaluation and plain PyTorch.

`run` is the experiment behind ``python -m bench pruning``. Several *providers* of the energy are
given the same cloud of points. Their gradients must agree before a time is taken; then forward and
backward together are timed, the providers in turn. Peak memory is that of one call in a process of
its own, which is this file run as a program.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from bench.clouds import WORST_CLOUDS, make_cloud
from bench.energies import (
    available_bytes,
    energy_of,
    operations,
    peak_memory,
    row_gradient,
    step,
)
from bench.results import append_row, provenance
from bench.retrieval import resolve_device
from bench.settings import PROVIDERS, SIZES, PruningSettings

# Of the gradient, relative to its largest entry, and of the energy. The Gram matrix in float32
# cancels: plain PyTorch loses 1e-5 where classes are apart, and more where points are nearer.
TOLERANCES = {"pfml": 1e-5, "pfml dense": 1e-5, "eager": 1e-4, "compile": 1e-4}
SAMPLED_ROWS = 64  # whose gradient is checked where "pfml dense" does not run
BYTES_PER_PAIR = {"eager": 32, "compile": 8}  # measured at N = 6,000: 29 and 5
WORST_RATIO = 1.15  # pruning that prunes nothing may cost this much
BUSY = 0.5  # load of the machine beforehand; two programs that spin on its cores are 40x slower

Row = dict[str, Any]

_MEASURED = (  # columns of a row, None where they do not apply
    "tolerance", "gradient_error", "energy_error", "repeats", "first_ms", "p20_ms", "p50_ms",
    "p80_ms", "ratio_to_pfml", "growth_exponent", "peak_bytes", "extra_bytes",
    "product_operations", "pair_operations",
)  # fmt: skip
_LEAST = {"repeats": 1, "depth": 3, "threads": 1, "sop_classes": 8, "sop_batch": 0}
_LEAST |= dict.fromkeys(("small_points", "large_points", "worst_points"), 8)


def run(settings: PruningSettings, out: Path, console: Console | None = None) -> list[Row]:
    """Measure every provider on every cloud, append a row for each and print a table.

    Args:
        settings: see `PruningSettings`.
        out: folder that gets ``pruning.jsonl``; a cloud's rows are appended once it is measured.
        console: where to print; standard output if None.

    Returns:
        The rows.

    Raises:
        ValueError: a setting is out of range, the device is not there, or a provider's energy or
            gradient is wrong.
    """
    console = console or Console()
    device = prepare(settings)
    out.mkdir(parents=True, exist_ok=True)
    common = {"bench": "pruning", "depth": settings.depth, "seed": settings.seed}
    load = os.getloadavg()[0]
    common |= provenance(device) | {"load": load}
    if load > BUSY:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f}): times will mislead.[/yellow]"
        )
    clouds = [c for size in settings.sizes for c in (WORST_CLOUDS if size == "worst" else (size,))]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _fresh_compiler_cache(), Progress(*columns, console=console) as progress:
        for cloud in clouds:
            for row in _measure(cloud, settings, device, progress):
                rows.append(row)
                if (row["cloud"], row["provider"]) == ("large", "pfml"):
                    row["growth_exponent"] = growth_exponent(rows)
                append_row(out / "pruning.jsonl", common | row)
    console.print(pruning_table(rows))
    for line in findings(rows):
        console.print(line, highlight=False)
    console.print(f"Wrote {len(rows)} rows to {out / 'pruning.jsonl'}.")
    return rows


def prepare(settings: PruningSettings) -> torch.device:
    """Check the settings, set the threads and return the device. ValueError for a wrong value."""
    for name, known in (("sizes", SIZES), ("providers", PROVIDERS)):
        chosen = getattr(settings, name)
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {chosen}")
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return resolve_device(settings.device)


def obstacle(provider: str, cloud: str, n: int, available: float, slow: bool) -> str | None:
    """Why a provider is not measured on a cloud of `n` points, or None.

    Args:
        available: bytes of memory.
        slow: whether to measure what takes minutes.
    """
    needed, gib = BYTES_PER_PAIR.get(provider, 0) * n**2, 2.0**30
    if needed > available:
        return f"does not fit: needs {needed / gib:.1f} GiB, {available / gib:.1f} are available"
    if provider == "pfml dense" and cloud == "large" and not slow:
        return "is not run: it takes minutes (--slow)"
    return None


def parity_errors(
    results: dict[str, tuple[float, Tensor]], points: Tensor, labels: Tensor
) -> dict[str, tuple[float, float | None]]:
    """Errors of gradient and energy by provider, relative to the largest entry and to the energy.

    Args:
        results: energy and gradient [N, D] by provider. They are held against "pfml dense" if it
            is among them; else the gradients of `SAMPLED_ROWS` points against their sum over all
            pairs, and the energies against nothing.
        points, labels: the cloud.

    Raises:
        ValueError: an error above `TOLERANCES`, or one that is no number.
    """
    if "pfml dense" in results:
        energy, expected = results["pfml dense"]
        rows = torch.arange(len(points), device=points.device)
    else:
        rows = torch.linspace(0, len(points) - 1, SAMPLED_ROWS, device=points.device).long()
        energy, expected = None, row_gradient(rows, points.detach(), labels)
    errors: dict[str, tuple[float, float | None]] = {}
    for provider, (value, gradient) in results.items():
        error = float((gradient[rows] - expected).abs().max() / expected.abs().max())
        of_energy = None if energy is None else abs(value - energy) / abs(energy)
        errors[provider] = error, of_energy
        allowed = TOLERANCES[provider]
        if not (error <= allowed and (of_energy is None or of_energy <= allowed)):
            raise ValueError(
                f"{provider} is wrong on {len(points)} points, so nothing is timed: its gradient "
                f"is off by {error:.2g} of the largest entry, its energy by {of_energy or 0:.2g}, "
                f"and {allowed:g} is allowed"
            )
    return errors


def peak_apart(cloud: str, provider: str, settings: PruningSettings) -> tuple[int, int]:
    """`peak_memory` in a fresh process, of a second call: what only the first needs, like the
    compiler's memory, is left out.

    Raises:
        OSError: the process failed, or was killed.
    """
    task = json.dumps({"cloud": cloud, "provider": provider, "settings": asdict(settings)})
    command = [sys.executable, "-m", "bench.pruning", task]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if child.returncode != 0:
        reason = child.stderr.strip().rpartition("\n")[2] or f"exit status {child.returncode}"
        raise OSError(f"the process to measure the memory of {provider} failed: {reason}")
    peak, extra = json.loads(child.stdout)
    return peak, extra


def _peak(cloud: str, provider: str, settings: PruningSettings) -> tuple[int, int]:
    device = prepare(settings)
    points, labels = (t.to(device) for t in make_cloud(cloud, settings))
    energy = energy_of(provider)
    # Compiled code is for one N. For the others a few points load whatever is loaded late.
    first = len(points) if provider == "compile" else 16
    step(energy, points[:first].clone().requires_grad_(), labels[:first])
    return peak_memory(energy, points.requires_grad_(), labels)


def _measure(
    cloud: str, settings: PruningSettings, device: torch.device, progress: Progress
) -> Iterator[Row]:
    """The rows of one cloud: at once those of what is not measured, the others at the end."""
    points, labels = (t.to(device) for t in make_cloud(cloud, settings))
    points.requires_grad_()
    n = len(points)
    running: dict[str, Row] = {}
    for provider in settings.providers:
        if cloud in WORST_CLOUDS and provider not in ("pfml", "pfml dense"):
            continue
        reason = obstacle(provider, cloud, n, available_bytes(device), settings.slow)
        row: Row = {"cloud": cloud, "n": n, "classes": len(labels.unique()), "provider": provider}
        row |= {"status": reason or "measured", "dense_operations": 4 * n**2 * settings.depth}
        row |= dict.fromkeys(_MEASURED)
        if reason is None:
            running[provider] = row
        else:
            yield row
    task = progress.add_task("", total=len(running) * (2 + settings.repeats))

    def begin(what: str) -> None:
        progress.update(task, description=f"{cloud}, N = {n:,}: {what}")

    energies = {provider: energy_of(provider) for provider in running}
    results: dict[str, tuple[float, Tensor]] = {}
    for provider, row in running.items():
        begin(f"first call of {provider}")
        first = partial(step, energies[provider], points, labels)
        if provider == "compile" or device.type == "cuda":  # nothing to count
            value, seconds = first()
        else:
            (value, seconds), row["product_operations"], row["pair_operations"] = operations(first)
        row["first_ms"] = 1e3 * seconds
        assert points.grad is not None
        results[provider] = value, points.grad
        progress.advance(task)
    for provider, (error, of_energy) in parity_errors(results, points, labels).items():
        row = running[provider]
        row |= {"gradient_error": error, "energy_error": of_energy}
        row |= {"tolerance": TOLERANCES[provider], "repeats": settings.repeats}
    results.clear()
    points.grad = None
    for provider, row in running.items():
        begin(f"memory of {provider}")
        try:
            row["peak_bytes"], row["extra_bytes"] = peak_apart(cloud, provider, settings)
        except OSError as error:
            progress.console.print(f"{cloud}, N = {n:,}: {error}.")
        progress.advance(task)
    times: dict[str, list[float]] = {provider: [] for provider in running}
    for _ in range(settings.repeats):
        for provider in running:
            begin(f"time of {provider}")
            times[provider].append(1e3 * step(energies[provider], points, labels)[1])
            progress.advance(task)
    for provider, row in running.items():
        quantiles = torch.tensor(times[provider]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True)
    for row in running.values():
        if "pfml" in running:
            row["ratio_to_pfml"] = row["p50_ms"] / running["pfml"]["p50_ms"]
        yield row


def growth_exponent(rows: list[Row]) -> float | None:
    """p of time ~ N^p for pfml, from the small to the large cloud; None without one of them."""
    ends = {row["cloud"]: row for row in rows if row["provider"] == "pfml"}
    if not {"small", "large"} <= ends.keys() or ends["small"]["n"] == ends["large"]["n"]:
        return None
    small, large = ends["small"], ends["large"]
    return math.log(large["p50_ms"] / small["p50_ms"]) / math.log(large["n"] / small["n"])


def pruning_table(rows: list[Row]) -> Table:
    """A table of what was measured: time, memory and operations."""
    table = Table(
        title="Energy and gradient, forward and backward",
        caption="x pfml: time in units of pfml's. extra, peak: memory, MiB.\nGop: 10^9 operations "
        "executed; share: of 4 N^2 D, two dense products.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits 80 columns
    )
    for name in ("cloud", "provider", "p50 ms", "x pfml", "extra", "peak", "Gop", "share"):
        table.add_column(name, justify="left" if name in ("cloud", "provider") else "right")

    def cell(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    cloud = None
    for row in rows:
        if row["status"] == "measured":
            executed = None
            if row["product_operations"] is not None:
                executed = row["product_operations"] + row["pair_operations"]
            table.add_row(
                "" if row["cloud"] == cloud else f"{row['cloud']} {row['n']:,}",
                row["provider"],
                cell(row["p50_ms"], ",.0f"),
                cell(row["ratio_to_pfml"], ".2f"),
                cell(row["extra_bytes"], ",.0f", 2**20),
                cell(row["peak_bytes"], ",.0f", 2**20),
                cell(executed, ",.0f", 1e9),
                cell(executed, ".1%", row["dense_operations"]),
            )
            cloud = row["cloud"]
    return table


def findings(rows: list[Row]) -> Iterator[str]:
    """What the table does not say, a line each: what did not run, growth, the worst case."""
    for row in rows:
        cloud, provider, ratio = row["cloud"], row["provider"], row["ratio_to_pfml"]
        if row["status"] != "measured":
            yield f"{cloud}, N = {row['n']:,}: {provider} {row['status']}."
        if row["growth_exponent"] is not None:
            yield f"From small to large the time of pfml grows as N^{row['growth_exponent']:.2f}."
        if cloud in WORST_CLOUDS and provider == "pfml dense" and ratio is not None:
            verdict = "below" if 1 / ratio < WORST_RATIO else "[red]not below[/red]"
            yield (
                f"Nothing to prune ({cloud}): pfml takes {1 / ratio:.2f} of the time of pfml dense,"
                f" {verdict} {WORST_RATIO}."
            )


@contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Let torch.compile find nothing of an earlier run, so that its first call tells its cost."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(
        json.dumps(_peak(asked["cloud"], asked["provider"], PruningSettings(**asked["settings"])))
    )
