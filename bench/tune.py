"""Tile shapes: timed on a GPU, or ranked from their machine code without one.

`run` is the experiment behind ``python -m bench tune``. What is tuned is the
field, on itself, of a cloud of points like those of a trained network. The search itself is the
package's (pfml_triton/kernels/search.py); where there is no GPU, the static model of roofline.py
takes the place of the times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from bench import aot
from bench.chips import CHIPS
from bench.clouds import make_cloud
from bench.counting import Work, count_work
from bench.results import append_row, provenance
from bench.roofline import Prediction, predict
from bench.settings import SIZES, SPEED_DTYPES, Size, TuneSettings
from pfml_triton import Potential
from pfml_triton.kernels import search, tuning
from pfml_triton.kernels.config import Tiles, padded_depth, tiles_for
from pfml_triton.sketch import random_basis

ARCHS = tuple(CHIPS)
DEVICE = "cuda"  # where configurations are timed
POTENTIAL = Potential()
SHOWN = 8  # configurations of a table

Row = dict[str, Any]


_FACTS = ("modelled us", "limit", "registers", "spills", "shared KiB", "resident")
_HEADINGS = {  # of columns
    "BLOCK_K": "K", "BLOCK_D": "D", "BLOCK_N": "N", "STRIP": "strip", "SLICES": "slices",
    "CHUNK": "chunk", "num_warps": "warps", "num_stages": "stages", "maxnreg": "most regs",
    "modelled us": "us", "registers": "regs", "resident": "res.",
}  # fmt: skip


class Bucket(NamedTuple):
    """Points that are tuned for."""

    size_name: str
    size: Size
    dtype: str

    @property
    def row(self) -> Row:
        size = {"size": self.size_name, "n": self.size.n, "d": self.size.depth}
        return size | {"dtype": self.dtype}

    def __str__(self) -> str:
        return f"{self.size_name}, N = {self.size.n:,}, D = {self.size.depth}, {self.dtype}"


class Ranked(NamedTuple):
    """A configuration and its modelled time."""

    config: triton.Config
    prediction: Prediction

    @property
    def is_usable(self) -> bool:
        return self.prediction.fits and not self.prediction.spills_in_loops


def run(settings: TuneSettings, out: Path, console: Console | None = None) -> list[Row]:
    """Tune or rank every bucket, print tables, append rows to ``tune.jsonl`` in `out`, return them.

    Raises:
        ValueError: a setting is out of range; there is no GPU, and `static` is not set; the tuning
            file cannot be read, so that nothing may be written to it.
        OSError: the tuning file could not be written. What it should have is printed.
    """
    console = console or Console()
    buckets = list(chosen_buckets(settings))
    if settings.static:
        return _ranked(settings, buckets, out, console)
    return _tuned(settings, buckets, out, console)


def chosen_buckets(settings: TuneSettings) -> Iterator[Bucket]:
    """Every size, depth and dtype of the settings.

    Raises:
        ValueError: as `run`, for the settings.
    """
    for name, known in (("sizes", tuple(SIZES)), ("dtypes", SPEED_DTYPES)):
        given = getattr(settings, name)
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name} must be some of {known}, got {given}")
    if not settings.depths or not all(1 <= d <= 16_000 for d in settings.depths):
        raise ValueError(f"depths must be in 1..16000, got {settings.depths}")
    if settings.static and settings.arch not in ARCHS:
        raise ValueError(f"a static ranking needs an arch, one of {ARCHS}, got {settings.arch}")
    if settings.arch is not None and not settings.static:
        raise ValueError("arch is for a static ranking: a GPU that is here says what it is")
    if not settings.static and not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU here to time configurations on; --static --arch "
            f"{'|'.join(ARCHS)} ranks them by their machine code"
        )
    for name in settings.sizes:
        for depth in settings.depths:
            for dtype in settings.dtypes:
                yield Bucket(name, replace(SIZES[name], depth=depth), dtype)


class Cloud:
    """The points of a bucket, on the CPU, and the work that they make."""

    def __init__(self, bucket: Bucket, seed: int) -> None:
        cloud = make_cloud(bucket.size, seed)
        self.points = cloud.points.to(getattr(torch, bucket.dtype))
        self.labels = cloud.labels

    def work(self) -> Work:
        return count_work(self.points.float(), self.labels, POTENTIAL)

    def call(self, device: str) -> search.Call:
        """The field of the cloud on itself, on a device, for any tile shapes."""
        x, labels = self.points.to(device), self.labels.to(device)
        basis: Tensor = random_basis(x.shape[1], torch.device("cpu")).to(device)
        return search.mutual_call(x, labels, POTENTIAL, basis=basis)


def rank(
    kernel: str,
    shipped: Tiles,
    configs: Sequence[triton.Config],
    call: search.Call,
    arch: str,
    work: Work,
    advance: Callable[[], None] = lambda: None,
) -> list[Ranked]:
    """The configurations by modelled time, the fastest first.

    One that spills inside a loop, or does not fit, comes after all others: what a spill costs
    depends on what the caches hold at that moment, which is not modelled.

    Args:
        kernel: one of `search.KERNELS`.
        shipped: tile shapes of the other kernels.
        call: makes the launches, on meta tensors.
        arch: one of `CHIPS`.
        work: of the cloud that `call` has.
        advance: is called after each.
    """
    ranked = []
    for config in configs:
        with aot.record() as launches:
            call(search.configured(kernel, shipped, config.all_kwargs()))
        made = [made for made in launches if made.kernel.__name__ == kernel]
        (prediction,) = predict(made, arch, work)
        ranked.append(Ranked(config, prediction))
        advance()
    return sorted(ranked, key=lambda r: (not r.is_usable, r.prediction.seconds))


def _ranked(
    settings: TuneSettings, buckets: Sequence[Bucket], out: Path, console: Console
) -> list[Row]:
    assert settings.arch is not None
    rows: list[Row] = []
    common = {"bench": "tune", "modelled": True, "arch": settings.arch, "seed": settings.seed}
    common |= provenance(torch.device("cpu"))
    with _progress(console) as progress:
        for bucket in buckets:
            cloud = Cloud(bucket, settings.seed)
            call, work = cloud.call("meta"), cloud.work()
            points = tuning.points_bucket(bucket.size.n)
            shipped = tiles_for(bucket.size.depth, points, settings.arch)
            for kernel in search.KERNELS:
                configs = search.space(kernel, shipped, padded_depth(bucket.size.depth))
                task = progress.add_task(f"{kernel}: {bucket}", total=len(configs))
                advance = partial(progress.advance, task)
                ranked = rank(kernel, shipped, configs, call, settings.arch, work, advance)
                progress.remove_task(task)
                new = list(ranking_rows(kernel, bucket, ranked, configs[0]))
                for row in new:
                    append_row(out / "tune.jsonl", row | common)
                rows += new
                title = f"{kernel}: {bucket}, {CHIPS[settings.arch].name}"
                console.print(ranking_table(title, ranked, configs[0]))
    console.print(f"Modelled, not measured. {len(rows)} rows are in {out / 'tune.jsonl'}.")
    return rows


def ranking_rows(
    kernel: str, bucket: Bucket, ranked: Sequence[Ranked], shipped: triton.Config
) -> Iterator[Row]:
    """A row for each configuration, in their order."""
    best = ranked[0].prediction.seconds
    for place, (config, p) in enumerate(ranked):
        facts = asdict(p)
        times = {f"modelled_us{end}": 1e6 * facts.pop(name) for name, end in _ENDS.items()}
        yield bucket.row | {
            "kernel": kernel, "rank": place + 1, "configuration": described(config),
            "is_shipped": config == shipped, "above_best": p.seconds / best - 1,
        } | times | facts  # fmt: skip


_ENDS = {"seconds": "", "low": "_low", "high": "_high"}


def ranking_table(title: str, ranked: Sequence[Ranked], shipped: triton.Config) -> Table:
    """The best and the shipped one."""
    names = [name for name in shipped.all_kwargs() if name != "num_ctas"]
    table = Table(title=f"{title}, modelled", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("", *names, *_FACTS):
        words = _HEADINGS.get(name, name).split()
        justify: Literal["left", "right"] = "left" if name == "limit" else "right"
        table.add_column(
            "\n".join(words), justify=justify, min_width=max(map(len, words), default=2)
        )
    for place, (config, p) in enumerate(ranked):
        if place < SHOWN or config == shipped:
            values = (config.all_kwargs().get(name) for name in names)
            time = f"{1e6 * p.seconds:.1f}" if p.fits else "no fit"
            limit = "\n".join(p.limit.split())
            numbers = p.registers, p.spills_in_loops, p.shared_bytes >> 10, p.resident
            table.add_row(
                str(place + 1), *map(str, values), time, limit, *map(str, numbers),
                style="bold" if config == shipped else "",
            )  # fmt: skip
    place, ours = next((i, r) for i, r in enumerate(ranked) if r.config == shipped)
    above = ours.prediction.seconds / ranked[0].prediction.seconds - 1
    unusable = sum(not r.is_usable for r in ranked)
    table.caption = (
        f"The shipped one is number {place + 1} of {len(ranked)}, {above:.0%} above the best. "
        f"The last {unusable} spill in a loop or do not fit. res.: programs on a multiprocessor."
    )
    table.caption_justify = "left"
    return table


def described(config: triton.Config) -> str:
    """ "BLOCK_N=128 num_warps=4", say."""
    values = config.all_kwargs().items()
    return " ".join(f"{name}={value}" for name, value in values if name != "num_ctas")


def _tuned(
    settings: TuneSettings, buckets: Sequence[Bucket], out: Path, console: Console
) -> list[Row]:
    device = torch.device(DEVICE)
    path = settings.file or tuning.tuning_file()
    if path is None:
        raise ValueError(f"no tuning file: {tuning.FILE_VARIABLE} is empty, and no file is given")
    check_file(path)
    rows: list[Row] = []
    unsaved: list[Row] = []
    common = {"bench": "tune", "modelled": False, "seed": settings.seed} | provenance(device)
    with _progress(console) as progress:
        for bucket in buckets:
            new, entry = tune_bucket(bucket, settings, console, progress)
            for row in new:
                append_row(out / "tune.jsonl", row | common)
            rows += new
            try:
                tuning.save(path, entry)
            except OSError as error:
                unsaved.append(entry)
                console.print(f"[red]Not saved: {error}.[/red] This belongs in {path}:")
                console.print_json(json.dumps({"format": tuning.FORMAT, "entries": [entry]}))
    if unsaved:
        raise OSError(
            f"tuning file {path} could not be written; what belongs in it is printed above, and "
            f"can be saved by hand in a file that {tuning.FILE_VARIABLE} names"
        )
    console.print(f"Saved to {path}. {len(rows)} rows are in {out / 'tune.jsonl'}.")
    return rows


def check_file(path: Path) -> None:
    """What cannot be read may not be written to.

    Raises:
        ValueError: there is a tuning file, but it cannot be read.
    """
    try:
        tuning.parse(path)
    except FileNotFoundError:
        return
    except tuning.TuningFileError as error:
        raise ValueError(
            f"tuning file {path}: {error}. It is left as it is: move it away, or give --file"
        ) from error


def tune_bucket(
    bucket: Bucket, settings: TuneSettings, console: Console, progress: Progress
) -> tuple[list[Row], Row]:
    """Time the configurations of a bucket: a row for each, and the entry of the tuning file."""
    cloud = Cloud(bucket, settings.seed)
    x = cloud.points.to(DEVICE)
    n, depth = x.shape
    name = tuning.device_name(x)
    assert name is not None
    key = tuning.key_of(name, x.dtype, depth, n)
    shipped = tuning.shipped_tiles(x, n)
    configurations = sum(len(search.space(kernel, shipped, key.depth)) for kernel in search.KERNELS)
    task = progress.add_task(f"{bucket}: compiling and timing", total=configurations)
    rows: list[Row] = []

    def told(found: search.Found) -> None:
        rows.extend(measured_rows(bucket, found))
        console.print(gain(bucket, found), highlight=False)

    tiles, found = search.tune(
        cloud.call(DEVICE), shipped, key, f"{bucket} seed {settings.seed}",
        space=search.space, timed=partial(progress.advance, task), told=told,
    )  # fmt: skip
    progress.remove_task(task)
    return rows, search.entry(key, tiles, found)


def measured_rows(bucket: Bucket, found: search.Found) -> Iterator[Row]:
    """A row for each configuration that was timed, the fastest first."""
    best = found.ms[found.best]
    for place, (config, ms) in enumerate(sorted(found.ms.items(), key=lambda item: item[1])):
        yield bucket.row | {
            "kernel": found.kernel, "rank": place + 1, "configuration": described(config),
            "is_shipped": config == found.shipped, "above_best": ms / best - 1, "p50_ms": ms,
        }  # fmt: skip


def gain(bucket: Bucket, found: search.Found) -> str:
    """The winner beside the shipped configuration."""
    name = f"{found.kernel}: {bucket}: "
    times = f"{1e3 * found.ms[found.best]:.1f} us, shipped {1e3 * found.ms[found.shipped]:.1f} us"
    if found.best == found.shipped:
        return f"{name}{times}: the shipped one is the best, {described(found.shipped)}"
    return (
        f"{name}{times}, gain {found.gain:.0%}: {described(found.best)} instead of "
        f"{described(found.shipped)}"
    )


def _progress(console: Console) -> Progress:
    columns: Iterable[Any] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)
