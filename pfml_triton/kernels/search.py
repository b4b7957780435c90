"""Which tile shapes are fast: the configurations of every kernel, timed by triton.autotune.

What is tuned is a kernel in its place in a call. A configuration changes grids, padding and buffers
besides, so the launcher makes the launch anew for each, and that launch is timed. It can run any
number of times: kernels write their results and add to nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import testing

from ..potential import FieldTerms, Potential
from ..sketch import random_basis
from . import launch, tuning
from .config import Tiles

# The kernels that are tuned, in the order of their launches: their constexprs and launch options,
# and the fields of Tiles that these come from.
KERNELS = {
    "_pack_kernel": {"num_warps": "pack_warps"},
    "_filter_kernel": {
        "BLOCK_N": "filter_n",
        "STRIP": "filter_strip",
        "num_warps": "filter_warps",
        "num_stages": "filter_stages",
    },
    "_force_kernel": {
        "BLOCK_K": "block_k",
        "BLOCK_D": "block_d",
        "SLICES": "slices",
        "CHUNK": "chunk",
        "num_warps": "num_warps",
        "num_stages": "num_stages",
        "maxnreg": "max_registers",
    },
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# Warps of a program of the forces and registers of a thread, for one to three on a multiprocessor.
# Two warps, or sixteen, were never within 5 % of the best of the model's ranking.
_OCCUPANCIES = ((4, 168), (4, 255), (8, 128), (8, 255))
_HIP_WARPS = (2, 4, 8)
LARGEST_ERROR = 1e-4  # of the largest entry; another order of float32 sums makes less of it

Call = Callable[[Tiles], FieldTerms]
Space = Callable[[str, Tiles, int], list[triton.Config]]
Bench = Callable[..., list[float]]  # of triton.autotune: function, quantiles= -> [median, ...] ms


class Found(NamedTuple):
    """What tuning found of one kernel."""

    kernel: str
    shipped: triton.Config
    best: triton.Config
    ms: dict[triton.Config, float]  # the medians of all that were timed; inf if one cannot run

    @property
    def gain(self) -> float:
        """By how much the time of the shipped one is above the best, 0.1 for 10 %."""
        return self.ms[self.shipped] / self.ms[self.best] - 1 if self.ms else 0.0


def configuration(kernel: str, tiles: Tiles) -> triton.Config:
    """What the kernel is launched with."""
    values = {name: getattr(tiles, field) for name, field in KERNELS[kernel].items()}
    options = {name: values.pop(name) for name in _OPTIONS if name in values}
    return triton.Config(values, **options)


def configured(kernel: str, tiles: Tiles, values: dict[str, Any]) -> Tiles:
    """Tile shapes with the fields of one kernel from a configuration's `all_kwargs()`."""
    changed: dict[str, Any] = {field: values.get(name) for name, field in KERNELS[kernel].items()}
    return replace(tiles, **changed)


def short_space(kernel: str, shipped: Tiles, depth: int) -> list[triton.Config]:
    """The shipped configuration, first, and those that differ from it in one thing."""
    return _configurations(kernel, shipped, depth, _neighbours(kernel, shipped))


def space(kernel: str, shipped: Tiles, depth: int) -> list[triton.Config]:
    """`short_space`, and the product of what depends on each other.

    In the forces that is the split of the depth, the occupancy and the nomination's step; in the
    filter, everything but the strip, for which few blocks or many decide.
    """
    changes: list[dict[str, Any]] = [*_neighbours(kernel, shipped)]
    if kernel == "_filter_kernel":
        changes += (
            {"filter_n": n, "filter_warps": warps, "filter_stages": stages}
            for n, warps, stages in product((128, 256), (4, 8), _filter_stages(shipped))
        )
    elif kernel == "_force_kernel":
        changes += (
            {"block_d": d, "slices": slices, "block_k": k} | occupancy
            for (d, slices), k, occupancy in product(
                _splits(depth), (64, 128), _occupancies(shipped)
            )
        )
    return _configurations(kernel, shipped, depth, changes)


def _configurations(
    kernel: str, shipped: Tiles, depth: int, changes: Iterable[dict[str, Any]]
) -> list[triton.Config]:
    """Without repetition, and without those that do not fit together."""
    found = [configuration(kernel, shipped)]
    for change in changes:
        tiles = replace(shipped, **change)
        config = configuration(kernel, tiles)
        if config not in found and not tuning.fields_fault(tuning.tuned_fields(tiles), depth):
            found.append(config)
    return found


def _neighbours(kernel: str, shipped: Tiles) -> Iterable[dict[str, Any]]:
    if kernel == "_pack_kernel":
        return [{"pack_warps": warps} for warps in (4, 8, 16)]
    if kernel == "_filter_kernel":
        return [
            *({"filter_strip": strip} for strip in (1, 2, 4, 8)),
            *({"filter_stages": stages} for stages in _filter_stages(shipped)),
            {"filter_n": 128},
            {"filter_warps": 8},
        ]
    return [
        *_occupancies(shipped),
        *({"num_stages": stages} for stages in (2, 3, 4)),
        *({"block_k": k} for k in (32, 64, 128)),
        *({"chunk": chunk} for chunk in (128, 256, 512, 1024)),
    ]


def _filter_stages(shipped: Tiles) -> tuple[int, ...]:
    """Where the shipped filter does not prefetch, it must not (`config.FENCELESS`)."""
    return (2, 3) if shipped.filter_stages > 1 else (1,)


def _occupancies(shipped: Tiles) -> list[dict[str, Any]]:
    if shipped.max_registers is None:
        return [{"num_warps": warps} for warps in _HIP_WARPS]
    return [{"num_warps": warps, "max_registers": most} for warps, most in _OCCUPANCIES]


def _splits(depth: int) -> list[tuple[int, int]]:
    """Blocks of the depth, and how many of them a program has: all of them.

    `depth` is padded. More slices than `tuning.ALLOWED` has, for large depths, drop out later.
    """
    largest = min(depth, 128)
    return [
        (block, depth // block) for block in (largest, largest // 2, largest // 4) if block >= 16
    ]


class _Tunable:
    """One kernel of a call, for triton.autotune: `run` takes what describes the call, and a
    configuration; it makes the launches that the launcher makes of that."""

    def __init__(self, call: Call, kernel: str, tiles: Tiles, described: Iterable[str]) -> None:
        self.call, self.kernel, self.tiles = call, kernel, tiles
        self.fn = getattr(launch, kernel)
        self.arg_names = list(described)
        self.launches: list[Callable[[], Any]] = []
        self.launched: Tiles | None = None  # the tile shapes of these launches

    def run(self, *_: Any, **values: Any) -> None:
        tiles = configured(self.kernel, self.tiles, values)
        if tiles == self.launched:
            for again in self.launches:
                again()
        else:
            self.launches, self.launched = [], None  # frees their buffers
            self.launches, self.launched = launches_of(self.kernel, self.call, tiles), tiles


def launches_of(kernel: str, call: Call, tiles: Tiles) -> list[Callable[[], Any]]:
    """Make a call, and return its launches of a kernel, to be made again."""
    original, thread = getattr(launch, kernel), threading.get_ident()
    launches: list[Callable[[], Any]] = []

    class StandIn:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def launched(*args: Any, **kwargs: Any) -> None:
                again = partial(original[grid], *args, **kwargs)
                if threading.get_ident() == thread:
                    launches.append(again)
                again()

            return launched

    with mock.patch.object(launch, kernel, StandIn()):
        call(tiles)
    return launches


class GraphBench:
    """Times launches in a CUDA graph, whatever the number of points.

    Triton's default clears the L2 cache before each launch and times one launch after the other. In
    a step, the kernel before has just written the inputs, and a launch of a few points takes the
    GPU less time than the host. In a graph the inputs stay in the cache as far as they fit, and the
    host takes no part.

    The default serves, with a warning, if the first graph cannot be captured. After that, a capture
    that fails is an error: times of two kinds do not compare.
    """

    def __init__(self) -> None:
        self.chosen: Bench | None = None

    def __call__(self, launched: Callable[[], None], quantiles: Any) -> list[float]:
        # Before the capture: it compiles and allocates. The graph has a stream of its own, that
        # waits for nothing.
        launched()
        torch.cuda.synchronize()
        if self.chosen is not None:
            return self.chosen(launched, quantiles=quantiles)
        try:
            times = testing.do_bench_cudagraph(launched, quantiles=quantiles)
            self.chosen = testing.do_bench_cudagraph
        except RuntimeError as error:
            warnings.warn(
                f"no CUDA graph can be captured, so launches are timed one by one: {error}",
                tuning.TuningWarning,
                stacklevel=2,
            )
            times = testing.do_bench(launched, quantiles=quantiles)
            self.chosen = testing.do_bench
        return times


def tune(
    call: Call,
    shipped: Tiles,
    key: tuning.Key,
    work: str,
    *,
    space: Space = space,
    do_bench: Bench | None = None,
    timed: Callable[[], None] = lambda: None,
    told: Callable[[Found], None] = lambda found: None,
) -> tuple[Tiles, list[Found]]:
    """Time the configurations of every kernel of a call, and return the best, kernel by kernel.

    Args:
        call: makes it with the tile shapes it is given; the same work every time.
        shipped: tile shapes to begin with.
        key: what the call is for.
        work: what else its times depend on. Triton's cache keeps the times of a key and a work.
        space: the configurations of a kernel, the shipped one first.
        do_bench: times launches; a `GraphBench` if None.
        timed: is called after each configuration, unless Triton's cache has the times.
        told: is called with what was found of each kernel.

    The best are checked against the shipped ones: their results must agree.

    Raises:
        ArithmeticError: they do not.
    """
    tiles, found = shipped, []
    bench = do_bench or GraphBench()

    def timing(launched: Callable[[], None], quantiles: Any) -> list[float]:
        try:
            return bench(launched, quantiles=quantiles)
        finally:
            timed()

    with _tuning:
        expected = call(shipped)
        for kernel in KERNELS:
            described = key._asdict() | {"work": work, "tiles": str(tiles)}
            tuner = triton.autotune(
                space(kernel, tiles, key.depth),
                key=list(described),
                do_bench=timing,
                cache_results=not launch.INTERPRETED,
            )(_Tunable(call, kernel, tiles, described))
            tuner.run(grid=None, warmup=False, **described)
            timings = getattr(tuner, "configs_timings", {})  # none where one is left
            ms = {config: float(times[0]) for config, times in timings.items()}
            found.append(Found(kernel, configuration(kernel, tiles), tuner.best_config, ms))
            told(found[-1])
            tiles = configured(kernel, tiles, tuner.best_config.all_kwargs())
        fault = disagreement(call(tiles), expected)
    if fault:
        raise ArithmeticError(f"the result of {tiles} is not that of {shipped}: {fault}")
    return tiles, found


_tuning = threading.Lock()  # one kernel has one stand-in


def disagreement(ours: FieldTerms, expected: FieldTerms) -> str | None:
    """How the results of two tile shapes differ by more than rounding, or None.

    Other shapes add in another order: a pair at a radius, to within rounding, may fall on either
    side. Rows with such a pair are few, and are not compared.
    """
    same = (ours.attracting == expected.attracting) & (ours.repelling == expected.repelling)
    off = len(same) - int(same.sum())
    if off > max(2, len(same) // 1000):
        return f"{off} of {len(same)} points have another number of pairs"
    for name in ("energy", "grad"):
        a, b = (getattr(terms, name)[same] for terms in (ours, expected))
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        if not error <= LARGEST_ERROR * largest:
            return f"{name} differs by {error:.3g}, where the largest is {largest:.3g}"
    return None


def entry(key: tuning.Key, tiles: Tiles, found: list[Found]) -> dict[str, Any]:
    """What a tuning file keeps; times are the sums over the kernels that were tuned."""
    return (
        key._asdict()
        | tuning.versions()
        | {
            "tiles": tuning.tuned_fields(tiles),
            "ms": float(sum(f.ms[f.best] for f in found if f.ms)),
            "shipped_ms": float(sum(f.ms[f.shipped] for f in found if f.ms)),
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def autotune(
    key: tuning.Key,
    path: Path | None,
    shipped: Tiles,
    x: Tensor,
    labels: Tensor,
    potential: Potential,
    rest: Tensor | None,
    unit: bool,
    basis: Tensor | None,
) -> Tiles:
    """Tune the field of a cloud on itself over the short list, and save what was found.

    The cloud is what `launch.gather` makes of the last arguments. What goes wrong is a warning: a
    call that wanted a loss gets one.
    """
    basis = random_basis(x.shape[1], x.device) if basis is None else basis
    call = mutual_call(x, labels, potential, rest=rest, unit=unit, basis=basis)
    with torch.cuda.device_of(x):
        try:
            work = f"{len(labels)} x {x.shape[1]}, {potential}"
            tiles, found = tune(call, shipped, key, work, space=short_space)
        except Exception as error:  # of memory, of launches, of results that disagree
            warnings.warn(
                f"not tuned, so the shipped tile shapes serve: {error}",
                tuning.TuningWarning,
                stacklevel=2,
            )
            return shipped
    try:
        if path is not None:
            tuning.save(path, entry(key, tiles, found))
    except (tuning.TuningFileError, OSError) as error:
        warnings.warn(
            f"tuned, but not saved to {path}: {error}", tuning.TuningWarning, stacklevel=2
        )
    return tiles


def mutual_call(x: Tensor, labels: Tensor, potential: Potential, **how: Any) -> Call:
    """Gather a cloud, and compute the field of it on itself with its gradient."""

    def call(tiles: Tiles) -> FieldTerms:
        cloud = launch.gather(x, labels, potential, tiles=tiles, **how)
        return launch.field_terms(cloud, cloud, potential, needs_grad=True)

    return call
