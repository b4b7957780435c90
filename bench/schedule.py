"""How long machine code takes on a quarter of a multiprocessor, when its warps share the units.

A small simulation, the same for every kernel. Each of the four schedulers of a multiprocessor has
its own warps and a quarter of the units. It issues one instruction a clock, of any warp whose next
one is ready: in order within a warp, when the registers it reads are there, and when its unit is
free. Loads, stores, copies and special functions queue up at their unit; asynchronous copies and
products (cp.async, wgmma, tcgen05) are waited for where the code says so, and so are barriers.
Branches are not decided: a piece of code runs from top to bottom.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.chips import SCHEDULERS, SHARED_RATE, Chip
from bench.machine import UNITS, Instruction

# Clocks until a result can be used, from published microbenchmarks of A100 and H100, rounded.
_LATENCY = {
    "LDS": 23, "LDSM": 29, "SHFL": 23, "MUFU": 18, "HMMA": 18, "S2R": 20, "F2F": 18,
}  # fmt: skip
_OTHER_LATENCY, _BARRIER, _ASYNCHRONOUS = 4, 20, 30
_L1_PORT = 64  # bytes a clock that a multiprocessor takes from L2
_QUEUES = ("SFU", "shared", "L2")
_WARM, _TIMED = 3, 6  # repeats before the clock runs, and while it does
_NUMBER = re.compile(r"0x([0-9a-f]+)")


def busy(instruction: Instruction, chip: Chip) -> float:
    """Clocks that an instruction of one warp occupies its unit, a quarter of a multiprocessor's."""
    name, unit = instruction.name, instruction.unit
    if unit == "tensor":
        rate = chip.operations / SCHEDULERS
        if not instruction.is_asynchronous:
            rate *= chip.mma_sync
        if "TF32" in instruction.suffixes:
            rate /= 2
        elif name[0] in "QIO":  # 8-bit types
            rate *= 2
        reads = instruction.bytes * SCHEDULERS / SHARED_RATE
        return max(1.0, instruction.operations / rate, reads)
    if unit == "FP32":
        lanes = 64 if name.startswith("IMAD") else chip.fp32_lanes
        return 32 * SCHEDULERS / lanes * (2 if name.endswith("2") and name[0] == "F" else 1)
    if unit == "integer":
        return 32 * SCHEDULERS / (16 if name.startswith("REDUX") else chip.integer_lanes)
    if unit == "SFU":
        return 32 * SCHEDULERS / 16
    if unit == "shared":
        return instruction.bytes * SCHEDULERS / SHARED_RATE
    if unit == "L2":
        l2 = chip.l2_clock / chip.multiprocessors
        return instruction.bytes * SCHEDULERS / min(_L1_PORT, l2)
    return 0.0


@dataclass(frozen=True)
class Setting:
    """Who shares a quarter of a multiprocessor, and how far memory is.

    Args:
        warps: of all resident programs, on one scheduler.
        group: of them, those of one program, which wait for each other at barriers.
        latency: clocks until a load from global memory is there.
        ahead: rounds that bulk copies are ahead of their use.
    """

    warps: int
    group: int
    latency: float
    ahead: int = 0


def clocks(code: Sequence[Instruction], chip: Chip, setting: Setting, *, repeats: bool) -> float:
    """Clocks for each warp to run `code` once; where it `repeats`, in the long run."""
    if not code:
        return 0.0
    if not repeats:
        return _run(code, chip, setting, 1)
    warm = _run(code, chip, setting, _WARM)
    return (_run(code, chip, setting, _WARM + _TIMED) - warm) / _TIMED


@dataclass
class _Warp:
    program: int  # that it belongs to
    position: int = 0
    time: float = 0.0  # when the next instruction has what it waits for
    is_waiting: bool = False  # at a barrier
    ready: dict[int, float] = field(default_factory=dict)  # when, by register
    copies: float = 0.0  # when the copies that belong to no group yet are there
    groups: list[float] = field(default_factory=list)
    product: float = 0.0  # when the last asynchronous product is there
    products: list[float] = field(default_factory=list)  # those that can be waited for
    bulk: list[float] = field(default_factory=list)  # bulk copies not waited for yet


def _run(code: Sequence[Instruction], chip: Chip, setting: Setting, repeats: int) -> float:
    """When all warps have run `code` so many times."""
    return _Quarter(code, chip, setting, repeats).run()


class _Quarter:
    """A quarter of a multiprocessor and the warps of its scheduler."""

    def __init__(
        self, code: Sequence[Instruction], chip: Chip, setting: Setting, repeats: int
    ) -> None:
        self.code = [i for i in code if i.name != "NOP"]
        self.costs = [busy(i, chip) for i in self.code]
        self.end, self.latency = len(self.code) * repeats, setting.latency
        self.free = dict.fromkeys((*UNITS, ""), 0.0)
        self.now = self.last = 0.0
        bulk = sum(i.name == "UTMALDG" for i in self.code) * setting.ahead
        self.warps = [_Warp(n // setting.group) for n in range(setting.warps)]
        self.running = list(self.warps)
        for warp in self.warps:
            warp.bulk = [0.0] * bulk
            self._await(warp)

    def run(self) -> float:
        """When the last result is there."""
        while self.running:
            warp, at = min(
                ((w, self._earliest(w)) for w in self.running if not w.is_waiting),
                key=lambda pair: pair[1],
            )
            index = warp.position % len(self.code)
            instruction, cost = self.code[index], self.costs[index]
            issued = max(at, self.now)
            self.now = issued + 1
            start = max(issued, self.free[instruction.unit])
            if instruction.unit:
                self.free[instruction.unit] = start + cost
            if instruction.is_product:
                reads = instruction.bytes * SCHEDULERS / SHARED_RATE
                self.free["shared"] = max(self.free["shared"], start) + reads
            if instruction.name == "BAR":
                self._meet(warp)
                continue
            done = self._done(warp, instruction, issued, start, cost)
            warp.ready |= dict.fromkeys(instruction.writes, done)
            self.last = max(self.last, done)
            self._advance(warp, self.now)
        return max(self.last, self.now)

    def _earliest(self, warp: _Warp) -> float:
        """When a warp can issue, as far as it and its unit are concerned."""
        instruction = self.code[warp.position % len(self.code)]
        if instruction.unit in _QUEUES or instruction.is_asynchronous:
            return warp.time
        return max(warp.time, self.free[instruction.unit])

    def _done(
        self, warp: _Warp, instruction: Instruction, issued: float, start: float, cost: float
    ) -> float:
        """When the result of an instruction is there that its unit starts with at `start`."""
        name, there = instruction.name, start + cost + self.latency
        if instruction.is_product and instruction.is_asynchronous:
            warp.product = start + cost + _ASYNCHRONOUS
            if "gsb0" in instruction.text:
                warp.products.append(warp.product)
            return issued
        if instruction.is_product:
            return start + cost + _LATENCY["HMMA"]
        if name == "LDGSTS":
            warp.copies = max(warp.copies, there)
        elif name == "UTMALDG":
            warp.bulk.append(there)
        elif name == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        elif instruction.unit == "L2" and instruction.writes:
            return there
        elif instruction.unit in _QUEUES:
            return start + cost + _LATENCY.get(name, _OTHER_LATENCY)
        return start + _LATENCY.get(name, _OTHER_LATENCY)

    def _meet(self, warp: _Warp) -> None:
        """Let a warp wait for the others of its program, or go on with them if it is the last."""
        warp.is_waiting, warp.time = True, self.now
        members = [w for w in self.warps if w.program == warp.program]
        if all(w.is_waiting for w in members):
            release = max(w.time for w in members) + _BARRIER
            self.last = max(self.last, release)
            for member in members:
                member.is_waiting = False
                self._advance(member, release)

    def _advance(self, warp: _Warp, time: float) -> None:
        warp.position, warp.time = warp.position + 1, time
        if warp.position < self.end:
            self._await(warp)
        else:
            self.running = [w for w in self.running if w is not warp]

    def _await(self, warp: _Warp) -> None:
        """Move a warp's time to when its next instruction has what it waits for."""
        instruction = self.code[warp.position % len(self.code)]
        times = [warp.time, *(warp.ready.get(r, 0.0) for r in instruction.reads)]
        if instruction.name == "DEPBAR" and "SB0" in instruction.text:
            times += _but_last(warp.groups, instruction.text)
        elif instruction.name == "WARPGROUP" and "DEPBAR" in instruction.suffixes:
            times += _but_last(warp.products, instruction.text)
        elif instruction.name == "SYNCS" and "TRYWAIT" in instruction.suffixes:
            times.append(warp.bulk.pop(0) if warp.bulk else warp.product)
        warp.time = max(times)


def _but_last(times: list[float], text: str) -> list[float]:
    """All but the last of some times, of which the text of an instruction says how many."""
    found = _NUMBER.search(text)
    allowed = int(found[1], 16) if found else 0
    return times[: max(0, len(times) - allowed)]
