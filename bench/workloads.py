"""What a kernel does: how often its programs run each piece of its machine code.

The compiler may unroll and peel loops, so how often a loop runs follows from what it does in a
round (tensor-core operations, bytes) and from what there is to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench import aot
from bench.chips import REGISTERS, Chip
from bench.counting import Work, shared_out
from bench.machine import Code, Instruction, Loop
from pfml_triton.kernels.config import TILE_M

Times = NDArray[Any] | float  # of each program, or of every one


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
    resident: int  # programs that a multiprocessor holds; 0 if one is too many

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def bytes(self) -> int:
        """Of the arrays that it reads and writes, each once."""
        arrays = {id(x): x.nbytes for x in self.args.values() if isinstance(x, Tensor)}
        return sum(arrays.values())


@dataclass(frozen=True)
class Part:
    """A piece of a kernel's code, and how often a program runs it."""

    name: str
    code: Sequence[Instruction]
    times: Times
    repeats: bool = True  # in a loop, one round after another


def read(launch: aot.Launch, arch: str, chip: Chip) -> Kernel:
    """Compile a launch for an NVIDIA chip, and read its machine code."""
    compiled = launch.compile(arch)
    machine, warps = aot.inspect(compiled), compiled.metadata.num_warps
    # Registers are dealt out by 8 a thread, and 1 KiB of shared memory besides a program's own.
    resident = min(
        REGISTERS // (32 * warps * 8 * math.ceil(machine.registers / 8)),
        (aot.SHARED_MEMORY[arch] + 1024) // (machine.shared_bytes + 1024),
        chip.warps // warps,
    )
    return Kernel(
        name_of(launch), launch.grid, launch.args, compiled.metadata.num_stages, warps, machine,
        aot.code(compiled), resident,
    )  # fmt: skip


def name_of(launch: aot.Launch) -> str:
    """ "force" of `_force_kernel`."""
    return launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")


def parts_of(kernel: Kernel, work: Work) -> list[Part]:
    """What a kernel of this package does for the work of a cloud; one that is not known here is
    taken to move each byte of its arrays once."""
    return _WORKLOADS.get(kernel.name, _streamed)(kernel, work)


def product_loops(code: Code) -> list[Loop]:
    """The innermost loop of tensor-core instructions and those around it, from the inner to the
    outer; none if there is none."""
    loops = [loop for loop in code.root.walk() if loop is not code.root]
    own = [loop for loop in loops if any(i.is_product for i in code.own(loop))]
    around = [x for x in loops if own and min(own, key=lambda y: len(y.lines)).lines <= x.lines]
    return sorted(around, key=lambda loop: len(loop.lines))


def product_parts(kernel: Kernel, loop: Loop, operations: float, times: Times = 1.0) -> list[Part]:
    """The parts of a pipelined loop of products, entered some `times`.

    Args:
        operations: of the tensor cores in all rounds together, of a program.
        times: how often each program comes to the loop.

    The last rounds have nothing left to fetch.
    """
    own = kernel.code.own(loop)
    rounds = operations / (sum(i.operations for i in own) * kernel.warps)
    idle = min(kernel.stages - 1, rounds)
    return [
        Part("product", own, times * (rounds - idle)),
        Part("product, fetched", [i for i in own if i.name != "LDGSTS"], times * idle),
    ]


def sized(
    kernel: Kernel, code: Iterable[Instruction], *, operations: float = 0, moved: float = 0
) -> list[Instruction]:
    """Code whose products have so many `operations`, and whose bulk copies have `moved` so many
    bytes, where the opcode does not say (tcgen05, TMA). One thread of a program issues them, so
    each warp has its share."""

    def given(i: Instruction) -> Instruction:
        if i.is_product and not i.operations:
            return replace(i, operations=operations / kernel.warps)
        if i.is_bulk:
            return replace(i, bytes=moved / kernel.warps)
        return i

    return [given(i) for i in code]


def filter_blocks(kernel: Kernel) -> list[int]:
    """How many blocks of columns each program of the filter does, in the order of launch."""
    a, (width, height) = kernel.args, kernel.grid
    strip, blocks = a["STRIP"], []
    for y in range(height):
        for x in range(width):
            first = max(y * strip, x * a["BLOCK_M"] // a["BLOCK_N"] if a["MUTUAL"] else 0)
            blocks.append(max(0, min((y + 1) * strip, a["blocks_y"]) - first))
    return blocks


def _peeled(
    kernel: Kernel, name: str, rounds: Times, entered: Times, operations: float
) -> list[Part]:
    """A kernel of one loop, each of whose `rounds` has so many `operations` of the tensor cores, if
    any. The compiler may have taken the products of the first out of the loop."""
    code = kernel.code
    loop = max(code.root.inner, key=lambda inner: len(inner.lines))
    inside, ahead = (
        sum(i.is_product for i in code.own(part)) for part in (loop, code.root)
    )  # fmt: skip
    first = ahead / inside if inside else 0.0
    parts = _around(kernel, entered), Part(name, code.own(loop), np.maximum(rounds - first, 0.0))
    each = operations / inside if inside else 0.0
    return [replace(part, code=sized(kernel, part.code, operations=each)) for part in parts]


def _around(kernel: Kernel, times: Times = 1.0) -> Part:
    """What is in no loop."""
    return Part("around", kernel.code.own(kernel.code.root), times, repeats=False)


def _streamed(kernel: Kernel, work: Work) -> list[Part]:
    code = kernel.code
    loops = [loop for loop in code.root.walk() if loop is not code.root]
    a_round = sum(i.bytes for loop in loops for i in code.own(loop)) * kernel.warps
    rounds = kernel.bytes / kernel.programs / a_round if a_round else 0.0
    return [_around(kernel), *(Part("round", code.own(loop), rounds) for loop in loops)]


def _pack(kernel: Kernel, work: Work) -> list[Part]:
    a = kernel.args
    slices = math.ceil(a["depth"] / a["BLOCK_D"])
    parts = _peeled(kernel, "slice", slices, 1.0, 2 * a["BLOCK_M"] * a["BLOCK_D"] * a["K"])
    main = max(kernel.code.root.inner, key=lambda loop: len(loop.lines))
    ahead = (loop for loop in kernel.code.root.inner if loop is not main)
    return [*parts, *(Part("length", kernel.code.own(loop), slices) for loop in ahead)]


def _filter(kernel: Kernel, work: Work) -> list[Part]:
    a, blocks = kernel.args, np.array(filter_blocks(kernel))
    operations = 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["K"]
    return _peeled(kernel, "block", blocks, np.minimum(blocks, 1.0), operations)


def _passes(kernel: Kernel, passes: int) -> list[Part]:
    """A kernel whose loops all run as often."""
    code = kernel.code
    loops = [loop for loop in code.root.walk() if loop is not code.root]
    return [_around(kernel), *(Part("pass", code.own(loop), passes) for loop in loops)]


def _count(kernel: Kernel, work: Work) -> list[Part]:
    return _passes(kernel, math.ceil(kernel.args["tiles_y"] / kernel.args["CHUNK"]))


def _plan(kernel: Kernel, work: Work) -> list[Part]:
    return _passes(kernel, math.ceil(kernel.args["tiles_x"] / kernel.args["BLOCK"]))


def _total(kernel: Kernel, work: Work) -> list[Part]:
    a, code = kernel.args, kernel.code
    rows, labels, tiles = code.root.inner  # of a mutual field
    return [
        _around(kernel),
        Part("points", code.own(rows), math.ceil(a["N"] / a["BLOCK"])),
        Part("labels", code.own(labels), math.ceil(a["B"] / a["BLOCK"])),
        Part("tiles", code.own(tiles), math.ceil(a["tiles_x"] / a["BLOCK"])),
    ]


def _pull_back(kernel: Kernel, work: Work) -> list[Part]:
    """Its loops read the same arrays: for the products of gradient and point, and to scale."""
    a, code = kernel.args, kernel.code
    read = a["BLOCK_M"] * a["D"] * a["grad_ptr"].element_size() * (1 + a["UNIT"])
    return [
        _around(kernel),
        *(Part("slice", code.own(loop), _rounds(kernel, loop, read)) for loop in code.root.inner),
    ]


def _join(kernel: Kernel, work: Work) -> list[Part]:
    """Nearly all programs find that there is nothing to join."""
    code = kernel.code
    extra = (len(kernel.args["energy_ptr"]) - kernel.args["N"]) // TILE_M
    share = shared_out(work, extra)[1] / kernel.grid[0]
    stop = next(i for i, x in enumerate(code.instructions) if x and x.name == "EXIT")
    before, after = ([x for i in code.root.own if (i <= stop) == first and (
        x := code.instructions[i])] for first in (True, False))  # fmt: skip
    loops = [loop for loop in code.root.walk() if loop is not code.root]
    return [
        Part("look", before, 1.0, repeats=False),
        Part("around", after, share, repeats=False),
        *(Part("extra program", code.own(loop), share) for loop in loops),
    ]


def _force(kernel: Kernel, work: Work) -> list[Part]:
    a, code = kernel.args, kernel.code
    nominate, tile, chunk = product_loops(code)
    turn = max((x for x in tile.inner if x is not nominate), key=lambda x: len(x.lines))
    tiles_x, (programs, slices) = len(work.lengths), kernel.grid
    program, used = shared_out(work, programs - tiles_x)
    tiles, turns = (np.bincount(program, weights, programs) for weights in (None, work.turns))
    works = (np.arange(programs) < tiles_x + used).astype(float)
    search = works * (np.arange(programs) >= tiles_x) * a["steps"]
    peeled = kernel.warps * sum(i.operations for i in code.own(tile))
    product = product_parts(
        kernel, nominate, 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["coarse_depth"] - peeled, tiles
    )
    parts = [
        _around(kernel, works),
        *(Part("search", code.own(x), search) for x in code.root.inner[:1] if a["SHARED_OUT"]),
        Part("chunk of a list", code.own(chunk), works * math.ceil(a["tiles_y"] / a["CHUNK"])),
        Part("tile", _first_copies(kernel, code.own(tile)), tiles),
        *product,
        Part("turn", code.own(turn), turns),
        *(Part("look", code.own(x), turns * _looks(kernel, x)) for x in turn.inner),
    ]
    return [replace(part, times=np.tile(part.times, slices)) for part in parts]


def _first_copies(kernel: Kernel, code: list[Instruction]) -> list[Instruction]:
    """Code ahead of a pipelined loop, which fetches for no more rounds than there are."""
    steps, ahead = kernel.args["coarse_depth"] // kernel.args["BLOCK_K"], kernel.stages - 1
    copies = [n for n, i in enumerate(code) if i.name == "LDGSTS"]
    skipped = set(copies[len(copies) * steps // ahead :]) if steps < ahead else set()
    return [i for n, i in enumerate(code) if n not in skipped]


def _looks(kernel: Kernel, loop: Loop) -> float:
    """How often the loop runs that takes distances in several looks: each reads x and y."""
    a = kernel.args
    whole = a["BLOCK_M"] * a["depth"] * (a["x_ptr"].element_size() + a["y_ptr"].element_size())
    return _rounds(kernel, loop, whole)


def _rounds(kernel: Kernel, loop: Loop, read: int) -> float:
    """How often a loop runs in which a program reads so many bytes."""
    each = sum(i.bytes for i in kernel.code.own(loop) if i.name == "LDG") * kernel.warps
    return float(read / each)


_WORKLOADS: dict[str, Callable[[Kernel, Work], list[Part]]] = {
    "pack": _pack, "filter": _filter, "count": _count, "plan": _plan, "force": _force,
    "join": _join, "total": _total, "pull_back": _pull_back,
}  # fmt: skip
