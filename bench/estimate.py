"""From pieces of machine code to seconds: one rule for every kernel.

*Point.* A piece of code is run by all programs that a multiprocessor holds at a time, in the
simulation of schedule.py: what overlaps is for the code to say, not for a parameter. A program
takes the sum of its pieces, programs are handed to free places in turn, and the kernel ends with
the last; or when HBM has moved each byte of its arrays once, if that takes longer. Rates are those
of data sheets, at the clock that they are stated for. Loads take the latency of L2, or of HBM for
as much of what they ask for as is asked for the first time.

A kernel that spills inside a loop is taken at its upper end: its spills are loads and stores like
others, but how they fare depends on what is left of L1 for them, which is not known.

*Lower end.* The busiest unit is never idle, and arrays that fit L2 are there.

*Upper end.* One program a multiprocessor at a time, so that nothing overlaps but what a program
overlaps itself, and latencies twice as long.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.chips import HBM_LATENCY, L2_LATENCY, SCHEDULERS, Chip
from bench.machine import UNITS
from bench.schedule import Setting, busy, clocks
from bench.workloads import Kernel, Part

_LIMITS = 0.5  # of the time that a unit is busy, from which on it is what limits


@dataclass(frozen=True)
class Estimate:
    """Modelled seconds of a kernel, or of operations around it.

    Args:
        unit: the busiest.
        lines: the derivation.
    """

    name: str
    seconds: float
    low: float
    high: float
    unit: str
    lines: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the time that the busiest unit is busy: 1 is the limit of the chip."""
        return self.low / self.seconds

    @property
    def limit(self) -> str:
        """The unit that limits, or "latency" where none is busy for half of the time."""
        return self.unit if self.share >= _LIMITS else "latency"


def estimate(kernel: Kernel, chip: Chip, parts: Sequence[Part]) -> Estimate:
    """The time of a kernel that consists of `parts`."""
    times = [float(np.broadcast_to(part.times, kernel.programs).sum()) for part in parts]
    unit_seconds = _unit_seconds(kernel, chip, parts, times)
    resident = min(kernel.resident, math.ceil(kernel.programs / chip.multiprocessors))
    asked = sum(
        n * i.bytes for n, part in zip(times, parts, strict=True) for i in part.code
        if i.unit == "L2"
    ) * kernel.warps  # fmt: skip
    moved = min(kernel.bytes, asked)  # some arrays are not looked at in full
    hbm = moved / chip.hbm_rate
    limits = unit_seconds | {"HBM": hbm if moved > chip.l2_bytes else 0.0}
    unit = max(limits, key=lambda name: limits[name])
    first = moved / asked if asked else 0.0
    latency = (1 - first) * L2_LATENCY + first * HBM_LATENCY
    point, rounds = _duration(kernel, chip, parts, resident, latency)
    alone, _ = _duration(kernel, chip, parts, 1, 2 * latency)
    point = max(point, hbm, limits[unit])
    high = max(alone, point)
    if kernel.machine.spills_in_loops:
        point = high
    lines = [
        f"{part.name}: {n:,.0f} rounds of {len(part.code)} instructions, {clock:,.0f} clocks a "
        f"round of {some(resident, 'program')}"
        for n, part, clock in zip(times, parts, rounds, strict=True)
    ]
    busiest = sorted(unit_seconds, key=lambda name: -unit_seconds[name])[:4]
    lines.append("busy: " + ", ".join(f"{name} {us(unit_seconds[name])}" for name in busiest))
    lines.append(
        f"memory: {asked / 1e6:,.1f} MB asked for, {moved / 1e6:,.1f} MB for the first "
        f"time, {us(hbm)} of HBM; a load takes {1e9 * latency:.0f} ns"
    )
    return Estimate(kernel.name, point, limits[unit], high, unit, lines)


def makespan(times: Iterable[float], slots: int) -> float:
    """When the last of some programs ends, each started in turn as soon as a slot is free."""
    free = [0.0] * slots
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return float(max(free))


def us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} us"


def some(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _unit_seconds(
    kernel: Kernel, chip: Chip, parts: Sequence[Part], times: Sequence[float]
) -> dict[str, float]:
    """How long each unit of the multiprocessors is busy, if all share the work evenly."""
    total = dict.fromkeys(UNITS, 0.0)
    for n, part in zip(times, parts, strict=True):
        for instruction in part.code:
            if instruction.unit:
                total[instruction.unit] += n * busy(instruction, chip)
            total["issue"] += n
    share = kernel.warps / SCHEDULERS / chip.cycles
    return {unit: clock * share for unit, clock in total.items()}


def _duration(
    kernel: Kernel, chip: Chip, parts: Sequence[Part], resident: int, latency: float
) -> tuple[float, list[float]]:
    """Seconds of a kernel of which a multiprocessor runs `resident` programs at a time, and the
    clocks of a round of each part."""
    group = max(1, kernel.warps // SCHEDULERS)
    warps = max(1, resident * kernel.warps // SCHEDULERS)
    setting = Setting(warps, group, latency * chip.clock, kernel.stages - 1)
    rounds = [clocks(part.code, chip, setting, repeats=part.repeats) for part in parts]
    each = np.zeros(kernel.programs)
    for part, clock in zip(parts, rounds, strict=True):
        each += np.asarray(part.times) * clock
    return makespan(each / chip.clock, resident * chip.multiprocessors), rounds
