"""Losses side by side: time, memory and operations of what a user would call.

`run` is the experiment behind ``python -m bench speed``. Several *providers* get the same cloud of
points. Those that compute Eq. 6 are held against `reference/` first, and one that is wrong gets no
time. Then they are timed in turn. Peak memory is that of a call in a process of its own.

This loss is timed as it is in the midst of a training: the basis of its sketch turns in one call of
a hundred, instead of in each of the first ones (`bench.providers`).

Each of these calls finds the device idle. On a GPU, a training keeps it busy, so three more columns
of a row tell the time of calls back to back, that of the host, and that of a CUDA graph, in which
the host has no part.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.clocks import back_to_back, graph_us, host_us
from bench.clouds import make_cloud
from bench.costs import Workload, cache_bytes, copies_beyond, operations
from bench.devices import resolve_device
from bench.memory import available_bytes, is_out_of_memory, peaks_apart
from bench.parity import Errors, Truth, errors, truth
from bench.providers import POTENTIAL, PROVIDERS, Provider, obstacle, tiles_of
from bench.results import append_row, provenance
from bench.settings import MODES, SIZES, SPEED_DTYPES, Size, SpeedSettings
from bench.tables import LEGEND, MEASURED, Row, findings, speed_table

BUSY = 0.5  # load of the machine beforehand; two programs that spin on its cores are 40x slower
QUICK_MS, MOST_REPEATS = 500.0, 100  # calls are repeated for so long, and no more often
_COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_BOTH = "forward+backward"
_ROUNDING = 0.5  # of a gradient to half precision, in units of that precision
_LATER = (  # columns of a row that only a measurement fills
    "configuration", "first_ms", "p20_ms", "p50_ms", "p80_ms", "repeats", "back_to_back_ms",
    "host_ms", "graph_ms", "peak_bytes", "extra_bytes", "active_share", "executed_operations",
    "parity_error", "energy_error", "tolerance",
)  # fmt: skip

T = TypeVar("T")
Rows = dict[str, Row]  # by mode


class WrongResult(ArithmeticError):
    """A provider does not compute what it says."""


def run(settings: SpeedSettings, out: Path, console: Console | None = None) -> list[Row]:
    """Measure every provider at every size, append a row for each and each mode, print a table.

    Args:
        settings: see `SpeedSettings`.
        out: folder that gets ``speed.jsonl``; a size's rows are appended once it is measured.
        console: where to print; standard output if None.

    Returns:
        The rows. What could not be measured has a `status` that says why.

    Raises:
        ValueError: a setting is out of range, or the device is not there.
        OSError: the rows cannot be written.
    """
    console = console or Console()
    sizes = chosen_sizes(settings)
    device = prepare(settings)
    path = out / "speed.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    path.open("a").close()  # that it cannot be written is better known now
    load = os.getloadavg()[0]
    common = provenance(device) | {"seed": settings.seed, "load": load}
    if load > BUSY:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f}): times will mislead.[/yellow]"
        )
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _fresh_compiler_cache(), Progress(*columns, console=console, transient=True) as progress:
        for name, size in sizes.items():
            try:
                measured = measure(name, size, settings, device, progress)
            except KeyboardInterrupt:
                console.print(f"Interrupted at {name}. {len(rows)} rows are in {path}.")
                raise
            for row in measured:
                append_row(path, row | common)
            rows += measured
            if any(row["status"] == MEASURED for row in measured):
                console.print(speed_table(measured))
    console.print(LEGEND)
    for line in findings(rows):
        console.print(line, highlight=False)
    console.print(f"Wrote {len(rows)} rows to {path}.")
    return rows


def chosen_sizes(settings: SpeedSettings) -> dict[str, Size]:
    """The sizes of a run by name, those of `n` last.

    Raises:
        ValueError: an unknown name, no size at all, or a cloud that cannot be.
    """
    unknown = [name for name in settings.sizes if name not in SIZES]
    if unknown or not (settings.sizes or settings.n):
        raise ValueError(f"sizes must be some of {', '.join(SIZES)}, got {settings.sizes}")
    sizes = {name: SIZES[name] for name in settings.sizes}
    for n in settings.n:
        size = custom_size(n, settings.d, settings.classes)
        sizes[f"n{size.n}-c{size.classes}-d{size.depth}"] = size
    return sizes


def custom_size(n: int, depth: int, classes: int | None) -> Size:
    """N points, well apart: 100 samples and equally many proxies of each class.

    The remainder of that division joins the batch. Without `classes` there are as many as make 4
    proxies of each.

    Raises:
        ValueError: a number is out of range.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if depth < 3:
        raise ValueError(f"d must be at least 3, got {depth}")
    proxies = n - min(n, 100)
    if classes is None:
        classes = proxies // 4 or max(1, n // 4)
    if not 1 <= classes <= n:
        raise ValueError(f"classes must be in 1..n = {n}, got {classes}")
    each = proxies // classes
    return Size(n - classes * each, classes, each, depth)


def prepare(settings: SpeedSettings) -> torch.device:
    """Check the settings, set the threads and return the device. ValueError for a wrong value."""
    for name, known in (("providers", PROVIDERS), ("modes", MODES)):
        chosen = getattr(settings, name)
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {chosen}")
    if settings.dtype not in SPEED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(SPEED_DTYPES)}, got {settings.dtype!r}")
    for name in ("repeats", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return resolve_device(settings.device)


def measure(
    name: str, size: Size, settings: SpeedSettings, device: torch.device, progress: Progress
) -> list[Row]:
    """The rows of one size, of every provider and mode."""
    cloud = make_cloud(size, settings.seed).to(device)
    dtype = getattr(torch, settings.dtype)
    available = available_bytes(device)
    table: dict[str, Rows] = {}
    for provider in settings.providers:
        chosen = settings.providers
        reason = obstacle(provider, size, device, available, chosen, settings.slow)
        row = _empty_row(name, size, settings, provider) | {"status": reason or MEASURED}
        table[provider] = {mode: row | _of_mode(mode, size) for mode in settings.modes}
    running = {provider: rows for provider, rows in table.items() if _is_measured(rows)}
    task = progress.add_task("", total=len(running) * (3 + settings.repeats))

    def begin(what: str) -> None:
        progress.update(task, advance=1, description=f"{name}, N = {size.n:,}: {what}")

    expected = None
    if any(PROVIDERS[provider].tolerance for provider in running):
        progress.update(task, description=f"{name}, N = {size.n:,}: reference")
        expected = truth(cloud, dtype, POTENTIAL)
    copies = copies_beyond(cache_bytes(device), cloud)
    works: dict[str, Workload] = {}
    for provider, rows in running.items():
        begin(f"first call of {provider}")
        with _told(rows):
            work = Workload(PROVIDERS[provider].build, cloud, dtype, copies)
            first_calls(PROVIDERS[provider], rows, work, expected, device)
            for row in rows.values():
                row["configuration"] = tiles_of(provider, cloud, device)
                row["active_share"] = work.active_share()
            for mode in rows:
                for _ in range(copies - 1):  # the other copies' first
                    work.call(mode)
            works[provider] = work
            work.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the other processes
    for provider in works:
        begin(f"memory of {provider}")
        try:
            peaks = peaks_apart(provider, size, settings, device)
        except OSError as error:
            progress.console.print(f"{name}, N = {size.n:,}: {error}.")
        else:
            for mode, row in running[provider].items():
                row["peak_bytes"], row["extra_bytes"] = peaks[mode]
    time_in_turn(works, running, settings.repeats, begin)
    if device.type == "cuda":
        for provider, work in works.items():
            begin(f"a busy device for {provider}")
            for mode, row in running[provider].items():
                with _told({mode: row}):
                    row |= busy_times(work, mode, copies, device)
                work.clear()
    progress.remove_task(task)
    return [row for rows in table.values() for row in rows.values()]


def first_calls(
    provider: Provider, rows: Rows, work: Workload, expected: Truth | None, device: torch.device
) -> None:
    """Call a provider once in every mode, check what it returns, and count its operations.

    The energy without a gradient is held against that of the reference; at sizes that have none,
    against the energy with a gradient.

    Raises:
        WrongResult: the gradient or an energy is off by more than the tolerance of the provider.
    """
    found: dict[str, Row] = {mode: {} for mode in (_BOTH, *rows)}
    with_gradient, off = 0.0, Errors(0.0, None)
    for mode, cells in found.items():
        (value, cells["first_ms"]), cells["executed_operations"] = _counted(
            partial(work.call, mode), provider.counted and device.type == "cpu"
        )
        if provider.tolerance is None or expected is None:
            continue
        energy = float(value)
        if mode == _BOTH:
            with_gradient, off = energy, errors(expected, energy, *work.gradients())
        else:
            right = with_gradient if expected.energy is None else expected.energy
            off = Errors(off.gradient, abs(energy - right) / abs(right))
        allowed = provider.tolerance
        if work.dtype != torch.float32:
            allowed += _ROUNDING * torch.finfo(work.dtype).eps
        checked = {"parity_error": _finite(off.gradient), "energy_error": _finite(off.energy)}
        checked["tolerance"] = allowed
        cells |= checked
        if not (off.gradient <= allowed and (off.energy is None or off.energy <= allowed)):
            for row in rows.values():
                row |= checked
            of_energy = "" if off.energy is None else f", the energy by {off.energy:.2g} of itself"
            raise WrongResult(
                f"the gradient is off by {off.gradient:.2g} of the largest force{of_energy}, and "
                f"{allowed:.2g} is allowed"
            )
    for mode, row in rows.items():
        row |= found[mode]


def time_in_turn(
    works: dict[str, Workload], table: dict[str, Rows], repeats: int, begin: Callable[[str], None]
) -> None:
    """Fill in the times: providers and modes take turns, so that a busy moment meets them all.

    Each is called `repeats` times, and again until it has taken `QUICK_MS` or `MOST_REPEATS` calls.
    """
    times: dict[tuple[str, str], list[float]] = {
        (provider, mode): [] for provider in works for mode in table[provider]
    }
    for turn in range(max(repeats, MOST_REPEATS)):
        for (provider, mode), taken in times.items():
            rows = table[provider]
            quick = turn < MOST_REPEATS and sum(taken) < QUICK_MS
            if not _is_measured(rows) or (turn >= repeats and not quick):
                continue
            if turn < repeats and mode == next(iter(rows)):
                begin(f"time of {provider}")
            with _told(rows):
                taken.append(works[provider].call(mode)[1])
                works[provider].clear()
    for (provider, mode), taken in times.items():
        row = table[provider][mode]
        if row["status"] == MEASURED:
            shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
            quantiles = torch.tensor(taken, dtype=torch.float64).quantile(shares).tolist()
            row |= zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True)
            row["repeats"] = len(taken)


def busy_times(work: Workload, mode: str, copies: int, device: torch.device) -> Row:
    """Milliseconds of a call back to back with others, of its host, and in a CUDA graph.

    The graph is None where it cannot be: on a CPU, and for a loss that waits for the device. It has
    a call of each copy of the inputs, as many as do not fit a cache.
    """
    call = partial(work.launch, mode)
    found = {"back_to_back_ms": 1e-3 * back_to_back(call, device).p50_us}
    found["host_ms"] = 1e-3 * host_us(call, device)
    try:
        us = graph_us(call, device, copies)
    except RuntimeError:  # out of memory among them
        us = None
    return found | {"graph_ms": None if us is None else 1e-3 * us}


def _empty_row(name: str, size: Size, settings: SpeedSettings, provider: str) -> Row:
    row: Row = {"bench": "speed", "size": name, "kind": size.kind, "n": size.n, "d": size.depth}
    row |= {"classes": size.classes, "proxies": size.proxies, "batch": size.batch}
    row |= {"dtype": settings.dtype, "provider": provider, "mode": None, "status": None}
    row |= {"computes": PROVIDERS[provider].computes, "dense_operations": None}
    return row | dict.fromkeys(_LATER)


def _of_mode(mode: str, size: Size) -> Row:
    products = 2 if mode == _BOTH else 1
    return {"mode": mode, "dense_operations": products * 2 * size.n**2 * size.depth}


def _counted(call: Callable[[], T], counted: bool) -> tuple[T, int | None]:
    return operations(call) if counted else (call(), None)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _is_measured(rows: Rows) -> bool:
    return all(row["status"] == MEASURED for row in rows.values())


@contextmanager
def _told(rows: Rows) -> Iterator[None]:
    """Let what goes wrong be the status of the rows, so that the others are measured."""
    try:
        yield
    except Exception as error:
        kind = "failed"
        if isinstance(error, WrongResult):
            kind = "wrong"
        elif is_out_of_memory(error):
            kind = "out of memory"
        elif isinstance(error, NotImplementedError):  # for this dtype or device
            kind = "cannot run"
        for row in rows.values():
            row["status"] = f"{kind}: {_first_line(error)}"


def is_broken(rows: Sequence[Row]) -> bool:
    """Whether a provider was wrong, or failed for a reason that nobody has foreseen."""
    return any(row["status"].startswith(("wrong", "failed")) for row in rows)


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, WrongResult) else f"{type(error).__name__}: {line}"


@contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Let torch.compile find nothing of an earlier run, so that its first call tells its cost."""
    before = os.environ.get(_COMPILER_CACHE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[_COMPILER_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_COMPILER_CACHE]
            if before is not None:
                os.environ[_COMPILER_CACHE] = before
