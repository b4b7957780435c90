"""Tile shapes of the two most expensive kernels, timed on this GPU beside the shipped ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import triton

from bench.clocks import Call, elapsed
from bench.gpu.rig import Rig
from bench.providers import POTENTIAL
from pfml_triton.kernels import search, tuning
from pfml_triton.kernels.config import Tiles, padded_depth
from pfml_triton.kernels.recording import record
from pfml_triton.sketch import random_basis

SIZES = ("cub", "sop")
KERNELS = ("_force_kernel", "_filter_kernel")
SECONDS = 40.0  # of one size; shared by the kernels
FILE = "tuning.json"  # beside the rows: the user's own stays as it is


class Clock:
    """Times configurations as triton.autotune asks it to, while there is time.

    The first of a kernel is the shipped one, which always gets a time.
    """

    def __init__(self, seconds: float, bench: search.Bench, most: int | None = None) -> None:
        self.seconds, self.bench, self.most = seconds, bench, most
        self.deadline, self.timed = 0.0, 0

    def space(self, kernel: str, shipped: Tiles, depth: int) -> list[triton.Config]:
        """What is timed of a kernel, which comes next."""
        self.timed, self.deadline = 0, time.monotonic() + self.seconds
        return search.short_space(kernel, shipped, depth)[: self.most if kernel in KERNELS else 1]

    def __call__(self, call: Call, quantiles: Sequence[float] = (0.5, 0.2, 0.8)) -> list[float]:
        """Milliseconds; infinite, and the call is not made, when the time is over."""
        if self.timed and time.monotonic() > self.deadline:
            return [float("inf")] * len(quantiles)
        self.timed += 1
        return self.bench(call, quantiles=quantiles)


def _once(call: Call, quantiles: Sequence[float]) -> list[float]:
    """What a rehearsal has of `search.GraphBench`, which needs a GPU."""
    return [elapsed(call, torch.device("cpu"))[1]] * len(quantiles)


def compiled(rig: Rig, size: str, share: str) -> None:
    """Compile every n-th configuration, "2/6" being the third of each six, for `tune` to find them
    in Triton's cache."""
    place, every = map(int, share.split("/"))
    call, tiles, depth = _call(rig, size)
    clock = Clock(0.0, _once)
    for kernel in KERNELS:
        for config in clock.space(kernel, tiles, depth)[place::every]:
            with record() as launches:
                call(search.configured(kernel, tiles, config.all_kwargs()))
            (launch,) = (made for made in launches if made.kernel.__name__ == kernel)
            try:
                if not rig.rehearses:
                    launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)
            except Exception as error:  # whatever Triton raises for what it cannot compile
                print(f"{size}, {kernel}, {config}: {error}", flush=True)


def tune(rig: Rig, size: str) -> None:
    """Time the configurations of both kernels, and keep what belongs in a tuning file."""
    with rig.guarded("tuned", size=size):
        x = rig.cloud(size).points
        call, tiles, _ = _call(rig, size)
        seconds = SECONDS / len(KERNELS)
        clock = Clock(seconds, search.GraphBench())
        if rig.rehearses:
            clock = Clock(seconds, _once, most=2)
        name = tuning.device_name(x) or x.device.type
        key = tuning.key_of(name, x.dtype, x.shape[1], len(x))

        def told(found: search.Found) -> None:
            if found.kernel in KERNELS:
                rig.row("tuned", size=size, kernel=found.kernel, **_result(found))

        work = f"{size}, {time.time()}"  # Triton's cache would keep times that were cut short
        best, found = search.tune(
            call, tiles, key, work, space=clock.space, do_bench=clock, told=told
        )
        tuning.save(rig.out / FILE, search.entry(key, best, found))


def _call(rig: Rig, size: str) -> tuple[search.Call, Tiles, int]:
    """The field of a cloud on itself, its shipped tile shapes, and its padded depth."""
    cloud = rig.cloud(size)
    x = cloud.points
    basis = random_basis(x.shape[1], x.device)
    call = search.mutual_call(x, cloud.labels, POTENTIAL, basis=basis)
    return call, tuning.shipped_tiles(x, len(x)), padded_depth(x.shape[1])


def _result(found: search.Found) -> dict[str, Any]:
    us = {config: 1e3 * ms for config, ms in found.ms.items() if ms < float("inf")}
    return {
        "shipped": _described(found.shipped), "best": _described(found.best),
        "shipped_us": us.get(found.shipped), "best_us": us.get(found.best),
        "timed": len(us), "configurations": len(found.ms),
    }  # fmt: skip


def _described(config: triton.Config) -> str:
    values = config.all_kwargs().items()
    return " ".join(f"{name}={value}" for name, value in values if name != "num_ctas")
