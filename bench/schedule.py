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
from dataclasses import dataclass

from bench.chips import SCHEDULERS, SHARED_RATE, Chip
from bench.machine import UNITS, Instruction

# Clocks until a result can be used, from published microbenchmarks of A100 and H100, rounded.
_LATENCY = {
    "LDS": 23, "LDSM": 29, "LDL": 33, "SHFL": 23, "MUFU": 18, "HMMA": 18, "S2R": 20, "F2F": 18,
}  # fmt: skip
_OTHER_LATENCY, _BARRIER, _ASYNCHRONOUS = 4, 20, 30
_L1_PORT = 64  # bytes a clock that a multiprocessor takes from L2
_QUEUES = ("special functions", "shared memory", "global memory")
_WARM, _TIMED = 3, 6  # repeats before the clock runs, and while it does
_NUMBER = re.compile(r"0x([0-9a-f]+)")


def busy(instruction: Instruction, chip: Chip) -> float:
    """Clocks that an instruction of one warp occupies its unit, a quarter of a multiprocessor's."""
    name, unit = instruction.name, instruction.unit
    if unit == "tensor cores":
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
    if unit == "special functions":
        return 32 * SCHEDULERS / 16
    if unit == "shared memory":
        return instruction.bytes * SCHEDULERS / SHARED_RATE
    if unit == "global memory":
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


class _Warp:
    def __init__(self) -> None:
        self.position = 0
        self.time = 0.0  # when the next instruction may issue, if its unit lets it
        self.ready: dict[int, float] = {}  # by register
        self.copies = 0.0  # when the copies that belong to no group yet are there
        self.groups: list[float] = []
        self.product = 0.0  # when the last asynchronous product is there
        self.products: list[float] = []  # the same, at each point that can be waited for
        self.bulk: list[float] = []  # when bulk copies are there that were not waited for yet
        self.is_waiting = False  # at a barrier


def _run(code: Sequence[Instruction], chip: Chip, setting: Setting, repeats: int) -> float:
    code = [i for i in code if i.name != "NOP"]
    costs = [busy(i, chip) for i in code]
    end = len(code) * repeats
    warps = [_Warp() for _ in range(setting.warps)]
    free = dict.fromkeys((*UNITS, ""), 0.0)
    now, last = 0.0, 0.0
    bulk = sum(i.name == "UTMALDG" for i in code)
    for warp in warps:
        warp.bulk = [0.0] * (bulk * setting.ahead)
        _await(warp, code)
    running = list(range(len(warps)))
    while running:
        best, at = -1, float("inf")
        for n in running:
            warp = warps[n]
            if warp.is_waiting:
                continue
            time = warp.time
            instruction = code[warp.position % len(code)]
            if instruction.unit not in _QUEUES and not instruction.is_asynchronous:
                time = max(time, free[instruction.unit])
            if time < at:
                best, at = n, time
        warp = warps[best]
        index = warp.position % len(code)
        instruction, cost = code[index], costs[index]
        issued = max(at, now)
        now = issued + 1
        start = max(issued, free[instruction.unit])
        if instruction.unit:
            free[instruction.unit] = start + cost
        if instruction.is_product:
            reads = instruction.bytes * SCHEDULERS / SHARED_RATE
            free["shared memory"] = max(free["shared memory"], start) + reads
        name = instruction.name
        if name == "BAR":
            warp.is_waiting, warp.time = True, now
            first = best - best % setting.group
            members = warps[first : first + setting.group]
            if all(m.is_waiting for m in members):
                release = max(m.time for m in members) + _BARRIER
                for member in members:
                    member.is_waiting, member.time = False, release
                    member.position += 1
                    if member.position < end:
                        _await(member, code)
                    else:
                        running.remove(warps.index(member))
                last = max(last, release)
            continue
        done = start + _LATENCY.get(name, _OTHER_LATENCY)
        if instruction.is_asynchronous and instruction.is_product:
            warp.product = start + cost + _ASYNCHRONOUS
            done = issued
            if "gsb0" in instruction.text:
                warp.products.append(warp.product)
        elif instruction.is_product:
            done = start + cost + _LATENCY["HMMA"]
        elif name == "LDGSTS":
            warp.copies = max(warp.copies, start + cost + setting.latency)
        elif name == "UTMALDG":
            warp.bulk.append(start + cost + setting.latency)
        elif name == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        elif instruction.unit == "global memory" and instruction.writes:
            done = start + cost + setting.latency
        elif instruction.unit in _QUEUES:
            done = start + cost + _LATENCY.get(name, _OTHER_LATENCY)
        for register in instruction.writes:
            warp.ready[register] = done
        last = max(last, done)
        warp.time = now
        warp.position += 1
        if warp.position < end:
            _await(warp, code)
        else:
            running.remove(best)
    return max(last, now)


def _await(warp: _Warp, code: Sequence[Instruction]) -> None:
    """Move a warp's time to when its next instruction has what it waits for."""
    instruction = code[warp.position % len(code)]
    time = warp.time
    for register in instruction.reads:
        time = max(time, warp.ready.get(register, 0.0))
    if instruction.name == "DEPBAR" and "SB0" in instruction.text:
        time = max([time, *_but_last(warp.groups, instruction.text)])
    elif instruction.name == "WARPGROUP" and "DEPBAR" in instruction.suffixes:
        time = max([time, *_but_last(warp.products, instruction.text)])
    elif instruction.name == "SYNCS" and "TRYWAIT" in instruction.suffixes:
        time = max(time, warp.bulk.pop(0) if warp.bulk else warp.product)
    warp.time = time


def _but_last(times: list[float], text: str) -> list[float]:
    found = _NUMBER.search(text)
    allowed = int(found[1], 16) if found else 0
    return times[: len(times) - allowed]
