"""The modelled time of kernels on a GPU that is not here, from their machine code.

Nothing in it is measured. `predict` compiles launches and reads them: how often each loop of a
kernel runs follows from its arguments and from the work of a real cloud (counting.py), and how long
one round takes from a simulation of the issue of its instructions (schedule.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench import aot
from bench.chips import CHIPS, REGISTERS, SCHEDULERS, Chip
from bench.counting import Work, shared_out
from bench.machine import UNITS, Code, Instruction, Loop
from bench.schedule import Setting, busy, clocks
from pfml_triton.kernels.config import TILE_M

Times = NDArray[Any] | float  # of each program, or of every one


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


@dataclass(frozen=True)
class Kernel:
    """A launch with its machine code."""

    name: str
    grid: tuple[int, ...]
    args: dict[str, Any]
    stages: int
    warps: int
    machine: aot.MachineCode
    code: Code
    resident: int  # programs that a multiprocessor holds

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Part:
    """A piece of a kernel's code, and how often a program runs it."""

    code: list[Instruction]
    times: Times
    repeats: bool = True


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
    if arch not in CHIPS:
        raise ValueError(f"arch must be one of {tuple(CHIPS)}, got {arch!r}")
    return [_predict(launch, arch, work) for launch in launches]


def _predict(launch: aot.Launch, arch: str, work: Work) -> Prediction:
    name = _name(launch)
    try:
        kernel = read(launch, arch)
    except Exception as error:  # whatever Triton raises for what it cannot compile
        return Prediction(
            name, math.inf, math.inf, math.inf, f"not compiled: {type(error).__name__}",
            0, 0, 0, 0, 0, False,
        )  # fmt: skip
    m = kernel.machine
    facts = m.registers, m.stack_bytes, len(m.spills_in_loops), m.shared_bytes, kernel.resident
    if kernel.resident == 0:
        return Prediction(name, math.inf, math.inf, math.inf, "does not fit", *facts, False)
    parts = WORKLOADS.get(name, streamed)(kernel, work)
    seconds, low, high, limit = modelled(kernel, CHIPS[arch], parts)
    return Prediction(name, seconds, low, high, limit, *facts, True)


def _name(launch: aot.Launch) -> str:
    return launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")


def read(launch: aot.Launch, arch: str) -> Kernel:
    """Compile a launch for an NVIDIA chip, and read its machine code."""
    compiled = launch.compile(arch)
    machine, warps = aot.inspect(compiled), compiled.metadata.num_warps
    # Registers are dealt out by 8 a thread, and 1 KiB of shared memory besides a program's own.
    resident = min(
        REGISTERS // (32 * warps * 8 * math.ceil(machine.registers / 8)),
        (aot.SHARED_MEMORY[arch] + 1024) // (machine.shared_bytes + 1024),
        CHIPS[arch].warps // warps,
    )
    return Kernel(
        _name(launch), launch.grid, launch.args, compiled.metadata.num_stages, warps, machine,
        Code(aot.listing(compiled)), resident,
    )  # fmt: skip


def modelled(kernel: Kernel, chip: Chip, parts: Sequence[Part]) -> tuple[float, float, float, str]:
    """Seconds (point, low, high) of a kernel that consists of `parts`, and what limits it."""
    resident = min(kernel.resident, math.ceil(kernel.programs / chip.multiprocessors))
    point = _duration(kernel, chip, parts, resident, chip.l2_latency * 1.0)
    alone = _duration(kernel, chip, parts, 1, 2 * chip.l2_latency)
    total = dict.fromkeys(UNITS, 0.0)
    for part in parts:
        times = float(np.sum(np.broadcast_to(part.times, kernel.programs)))
        for instruction in part.code:
            if instruction.unit:
                total[instruction.unit] += times * busy(instruction, chip)
            total["issue"] += times
    share = kernel.warps / SCHEDULERS / chip.cycles
    limit = max(total, key=lambda unit: total[unit])
    low = total[limit] * share
    if low < 0.5 * point:
        limit = "latency"
    return point, min(low, point), max(alone, point), limit


def _duration(
    kernel: Kernel, chip: Chip, parts: Sequence[Part], resident: int, latency: float
) -> float:
    group = max(1, kernel.warps // SCHEDULERS)
    setting = Setting(
        max(1, math.ceil(resident * kernel.warps / SCHEDULERS) // group * group), group,
        latency * chip.clock,
    )  # fmt: skip
    each = np.zeros(kernel.programs)
    for part in parts:
        each += np.asarray(part.times) * clocks(part.code, chip, setting, repeats=part.repeats)
    return makespan(each / chip.clock, resident * chip.multiprocessors)


def makespan(times: Iterable[float], slots: int) -> float:
    """When the last of some programs ends, each started in turn as soon as a slot is free."""
    free = [0.0] * slots
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def product_loops(code: Code) -> list[Loop]:
    """The loops around the first tensor-core instruction that is in one, from the inner to the
    outer; none if there is none."""
    inner = [x for x in code.root.walk() if any(i.is_product for i in code.own(x))]
    loops = [x for x in inner if x is not code.root]
    if not loops:
        return []
    path = [x for x in code.root.walk() if x is not code.root and loops[0].lines <= x.lines]
    return sorted(path, key=lambda x: len(x.lines))


def rounds(kernel: Kernel, loop: Loop, operations: float) -> float:
    """How often a loop runs until a program has done these tensor-core operations; the compiler may
    have unrolled it. Where the opcode has no shape, every operation is there once."""
    each = sum(i.operations for i in kernel.code.own(loop)) * kernel.warps
    return operations / each if each else 1.0


def without_copies(code: Iterable[Instruction]) -> list[Instruction]:
    """What the last rounds of a pipelined loop do: they have nothing left to fetch."""
    return [i for i in code if i.name != "LDGSTS"]


def pipelined(kernel: Kernel, loop: Loop, times: Times, trips: float) -> list[Part]:
    """The parts of a loop of some `trips`, entered some `times`: the last fetch nothing."""
    own = kernel.code.own(loop)
    idle = min(kernel.stages - 1, trips)
    return [Part(own, times * (trips - idle)), Part(without_copies(own), times * idle)]


def streamed(kernel: Kernel, work: Work) -> list[Part]:
    """Any kernel that moves each byte of its arrays once, whatever its loops."""
    moved = sum(x.nbytes for x in kernel.args.values() if isinstance(x, Tensor))
    loops = [loop for loop in kernel.code.root.walk() if loop is not kernel.code.root]
    a_round = sum(i.bytes for loop in loops for i in kernel.code.own(loop)) * kernel.warps
    trips = moved / kernel.programs / a_round if a_round else 0.0
    return [
        Part(kernel.code.own(kernel.code.root), 1.0, repeats=False),
        *(Part(kernel.code.own(loop), trips) for loop in loops),
    ]


def _pack(kernel: Kernel, work: Work) -> list[Part]:
    loop = max(kernel.code.root.inner, key=lambda x: len(x.lines))
    trips = math.ceil(kernel.args["depth"] / kernel.args["BLOCK_D"])
    return [
        Part(kernel.code.own(kernel.code.root), 1.0, repeats=False),
        *pipelined(kernel, loop, 1.0, trips),
    ]


def _filter(kernel: Kernel, work: Work) -> list[Part]:
    blocks = np.array(filter_blocks(kernel), dtype=float)
    loop = max(kernel.code.root.inner, key=lambda x: len(x.lines))
    return [
        Part(kernel.code.own(kernel.code.root), np.minimum(blocks, 1.0), repeats=False),
        Part(kernel.code.own(loop), blocks),
    ]


def filter_blocks(kernel: Kernel) -> list[int]:
    """How many blocks of columns each program of the filter does, in the order of launch."""
    a, (width, height) = kernel.args, kernel.grid
    strip, blocks = a["STRIP"], []
    for y in range(height):
        for x in range(width):
            first = max(y * strip, x * a["BLOCK_M"] // a["BLOCK_N"] if a["MUTUAL"] else 0)
            blocks.append(max(0, min((y + 1) * strip, a["blocks_y"]) - first))
    return blocks


def _passes(kernel: Kernel, passes: int) -> list[Part]:
    """A kernel whose loops all run as often."""
    code = kernel.code
    return [
        Part(code.own(loop), 1.0 if loop is code.root else passes, loop is not code.root)
        for loop in code.root.walk()
    ]


def _count(kernel: Kernel, work: Work) -> list[Part]:
    return _passes(kernel, math.ceil(kernel.args["tiles_y"] / kernel.args["CHUNK"]))


def _plan(kernel: Kernel, work: Work) -> list[Part]:
    return _passes(kernel, math.ceil(kernel.args["tiles_x"] / kernel.args["BLOCK"]))


def _join(kernel: Kernel, work: Work) -> list[Part]:
    """Nearly all programs find that there is nothing to join."""
    code = kernel.code
    extra = (len(kernel.args["energy_ptr"]) - kernel.args["N"]) // TILE_M
    used = shared_out(work, extra)[1]
    stop = next(i for i, x in enumerate(code.instructions) if x and x.name == "EXIT")
    first = [x for x in code.instructions[: stop + 1] if x]
    share = used / kernel.grid[0]
    rest = [Part(code.own(loop), share) for loop in code.root.walk() if loop is not code.root]
    after = [i for i in code.root.own if i > stop]
    return [
        Part(first, 1.0, repeats=False),
        Part([x for i in after if (x := code.instructions[i])], share, repeats=False),
        *rest,
    ]


def _force(kernel: Kernel, work: Work) -> list[Part]:
    a, code = kernel.args, kernel.code
    tiles_x, slices = len(work.lengths), kernel.grid[1]
    nominate, tile, chunk = product_loops(code)
    turn = max((x for x in tile.inner if x is not nominate), key=lambda x: len(x.lines))
    search = [x for x in code.root.inner if x is not chunk]
    program, used = shared_out(work, kernel.grid[0] - tiles_x)
    tiles, turns = (np.bincount(program, weights, kernel.grid[0]) for weights in (None, work.turns))
    works = (np.arange(kernel.grid[0]) < tiles_x + used).astype(float)
    extra = works * (np.arange(kernel.grid[0]) >= tiles_x)
    steps = a["coarse_depth"] // a["BLOCK_K"]
    trips = rounds(kernel, nominate, 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["coarse_depth"])
    own = code.own(tile)
    if steps < kernel.stages - 1:  # the others of the first copies are skipped too
        copies = [i for i in own if i.name == "LDGSTS"]
        kept = copies[: len(copies) * steps // (kernel.stages - 1)]
        own = [i for i in own if i.name != "LDGSTS" or i in kept]
    parts = [
        Part(code.own(code.root), works, repeats=False),
        *(Part(code.own(x), extra * a["steps"]) for x in search[:1]),
        Part(code.own(chunk), works * math.ceil(a["tiles_y"] / a["CHUNK"])),
        Part(own, tiles),
        *pipelined(kernel, nominate, tiles, trips),
        Part(code.own(turn), turns),
        *(Part(code.own(x), turns * _looks(kernel, x)) for x in turn.inner),
    ]
    return [Part(p.code, np.tile(p.times, slices), p.repeats) for p in parts]


def _looks(kernel: Kernel, loop: Loop) -> float:
    """How often the loop runs that takes distances in several looks: each reads x and y."""
    a = kernel.args
    whole = a["BLOCK_M"] * a["depth"] * (a["x_ptr"].element_size() + a["y_ptr"].element_size())
    each = sum(i.bytes for i in kernel.code.own(loop) if i.name == "LDG") * kernel.warps
    return whole / each


WORKLOADS: dict[str, Callable[[Kernel, Work], list[Part]]] = {
    "pack": _pack, "filter": _filter, "count": _count, "plan": _plan, "force": _force,
    "join": _join,
}  # fmt: skip
