"""NVIDIA machine code as data: instructions, their units, and the tree of loops around them.

Everything is read from the listing that nvdisasm prints, so it holds for any kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

_LINE = re.compile(
    r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z]\w*)(?P<suffixes>[\w.]*)\s*(?P<operands>.*)"
)
_LABEL = re.compile(r"\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_RESULT = re.compile(r"(?:!?U?P\w+, )?R(\d+)\b")

# By unit. What a table does not name is integer or logic, or (uniform, control) takes no unit.
_FP32 = ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2")
_SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "FRND")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS", "SHFL")
# Spills among them: how much of L1 is left for them is not known, so they are taken to miss it.
_GLOBAL = ("LDL", "STL", "LDG", "STG", "LDGSTS", "RED", "ATOMG", "LD", "ST")
_BULK = ("UTMALDG", "UTMASTG", "UBLKCP")  # by one thread for all; the size is in a descriptor
_CONTROL = (
    "BRA", "BRX", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "NOP", "WARPSYNC", "BAR",
    "WARPGROUP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "SYNCS", "ELECT", "CCTL", "ERRBAR",
    "NANOSLEEP", "YIELD", "LDC", "LDCU", "S2R", "S2UR", "CS2R", "R2UR", "DEPBAR", "UTCBAR",
    "UTCATOMSWS", "ACQBULK", "VOTEU", "PREEXIT",
)  # fmt: skip
# The quarter of a multiprocessor that a scheduler has of each: tensor cores, lanes for FP32, for
# integers and logic, for special functions, shared memory, the way to L2, and the scheduler itself.
UNITS = ("tensor", "FP32", "integer", "SFU", "shared", "L2", "issue")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    name: str
    suffixes: str
    unit: str  # one of UNITS, or "" if it occupies none but an issue slot
    reads: tuple[int, ...]  # registers
    writes: tuple[int, ...]
    bytes: float  # that a warp moves through shared or global memory; 0 where it does not say
    operations: float  # of the tensor cores, a warp's; 0 where it does not say
    text: str

    @property
    def is_product(self) -> bool:
        return "MMA" in self.name

    @property
    def is_bulk(self) -> bool:
        """A copy that one thread starts for all of a program (TMA)."""
        return self.name in _BULK

    @property
    def is_asynchronous(self) -> bool:
        """A product that the warp does not wait for (wgmma, tcgen05)."""
        return self.name.endswith("GMMA") or self.name.startswith("UTC")


def decode(line: str) -> Instruction | None:
    """The instruction in a line of a listing, None for a label."""
    found = _LINE.match(line)
    if found is None:
        return None
    name, suffixes, operands = found["name"], found["suffixes"], found["operands"]
    width = _width(name, suffixes)
    result = _RESULT.match(operands)
    registers = [int(r) for r in _REGISTER.findall(operands)]
    writes: tuple[int, ...] = ()
    reads = registers
    if result is not None:
        count = 4 if "MMA" in name or ".x4" in suffixes or name == "LDSM" else width // 4
        if name.endswith("GMMA"):
            count = 0  # waited for by WARPGROUP.DEPBAR
        writes = tuple(range(int(result[1]), int(result[1]) + max(1, count))) if count else ()
        reads = registers[1:]
    if name in ("HMMA", "IMMA", "QMMA", "BMMA") and len(reads) >= 2:
        reads = [r + i for r, n in zip(reads, (4, 2, 4), strict=False) for i in range(n)]
    unit, moved, operations = "integer", 0, 0
    if "MMA" in name:
        unit, operations = "tensor", _operations(name, suffixes)
        moved = _operand_bytes(suffixes, operands)
    elif name in _FP32 or name.startswith("IMAD"):
        unit = "FP32"
    elif name in _SPECIAL:
        unit = "SFU"
    elif name in _SHARED:
        unit, moved = "shared", 32 * width
    elif name in _GLOBAL:
        unit, moved = "L2", 32 * width
    elif name in _BULK:
        unit = "L2"
    elif name in _CONTROL or name.startswith("U"):
        unit = ""
    text = line.split("*/", 1)[1].strip(" ;\t")
    return Instruction(name, suffixes, unit, tuple(reads), writes, moved, operations, text)


def _width(name: str, suffixes: str) -> int:
    """Bytes of a thread's result or of what it stores."""
    if name in ("LDSM", "STSM"):
        return 4 * int((re.search(r"\.(\d)$|\.x(\d)", suffixes) or [0, "1", None])[1] or 1)
    for part, width in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if part in suffixes:
            return width
    return 8 if name == "CS2R" or ".WIDE" in suffixes else 4


def _operations(name: str, suffixes: str) -> int:
    """Multiplications and additions of one warp, from the shape in the opcode."""
    big = re.match(r"\.(\d+)x(\d+)x(\d+)", suffixes)  # of four warps together
    if big:
        return 2 * prod(map(int, big.groups())) // 4
    small = re.match(r"\.(\d{4,5})", suffixes)
    if not small:
        return 0
    digits = small[1]  # 16816 is 16 x 8 x 16, 1688 is 16 x 8 x 8
    m, n, k = (int(digits[:2]), int(digits[2]), int(digits[3:]))
    return 2 * m * n * k


def _operand_bytes(suffixes: str, operands: str) -> int:
    """What a product reads of shared memory itself, a warp's share: both factors, or the second."""
    big = re.match(r"\.(\d+)x(\d+)x(\d+)", suffixes)
    if not big:
        return 0
    m, n = int(big[1]), int(big[2])
    first_is_there = re.match(r"R\d+, gdesc", operands)
    return 32 * (n + (m if first_is_there else 0)) // 4  # 32 bytes deep, whatever the type


@dataclass
class Loop:
    """A loop, or (the root) all of a kernel: its own instructions, and the loops inside it."""

    lines: frozenset[int]  # of the listing, with those of inner loops
    own: tuple[int, ...]  # without them, in order
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        """This loop and all inside it, outer ones first."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


class Code:
    """A listing, decoded: `instructions` by line, and the tree of loops, `root`."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        self.instructions = [decode(line) for line in lines]
        self.root = _tree(_natural_loops(self.lines, self.instructions), len(lines))

    def own(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop without those of inner loops."""
        return [i for i in map(self.instructions.__getitem__, loop.own) if i]

    def all(self, loop: Loop) -> list[Instruction]:
        """The instructions of a loop and of those inside it."""
        return [i for i in map(self.instructions.__getitem__, sorted(loop.lines)) if i]

    def count(self, loop: Loop) -> Counter[str]:
        """How often each name of an instruction stands in a loop, inner loops included."""
        return Counter(i.name for i in self.all(loop))


def _natural_loops(
    lines: Sequence[str], instructions: Sequence[Instruction | None]
) -> list[frozenset[int]]:
    """The lines of each loop: a branch back to a label that every way to the branch leads through,
    and all that lies between. Code out of line that returns (a wait for a barrier) is none."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    starts = {0} | set(labels.values())
    ends = {}  # by line: the lines that may follow
    for i, instruction in enumerate(instructions):
        if instruction is None or instruction.name not in ("BRA", "CALL", "EXIT", "RET"):
            continue
        target = _TARGET.search(lines[i])
        always = not re.search(r"\*/\s+@|BRA\.\w+ !?U?P|BRA !?U?P", lines[i])
        follow = [labels[target[1]]] if target and target[1] in labels else []
        if not always or instruction.name == "CALL":
            follow.append(i + 1)
        ends[i] = follow
        starts.add(i + 1)
    first = sorted(s for s in starts if s < len(lines))
    blocks = [range(a, b) for a, b in zip(first, [*first[1:], len(lines)], strict=True)]
    number = {block.start: n for n, block in enumerate(blocks)}
    after = [
        [number[f] for f in ends.get(block[-1], [block.stop]) if f in number] for block in blocks
    ]
    before: list[list[int]] = [[] for _ in blocks]
    reached, waiting = {0}, [0]
    while waiting:
        n = waiting.pop()
        for m in after[n]:
            before[m].append(n)
            if m not in reached:
                reached.add(m)
                waiting.append(m)
    dominators = _dominators(sorted(reached), before)
    loops: dict[int, set[int]] = {}
    for n in reached:
        for header in after[n]:
            if header in dominators[n]:
                body = loops.setdefault(header, {header})
                waiting = [n]
                while waiting:
                    m = waiting.pop()
                    if m not in body:
                        body.add(m)
                        waiting += before[m]
    return [frozenset(i for n in body for i in blocks[n]) for body in loops.values()]


def _dominators(nodes: Sequence[int], before: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """For each node those that every way from node 0 leads through, itself included."""
    found = {n: set(nodes) for n in nodes} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in nodes[1:]:
            new = set.intersection(*(found[m] for m in before[n])) | {n}
            if new != found[n]:
                found[n], changed = new, True
    return found


def _tree(loops: Sequence[frozenset[int]], lines: int) -> Loop:
    root = Loop(frozenset(range(lines)), ())
    placed = [root]
    for body in sorted(loops, key=len, reverse=True):
        loop = Loop(body, ())
        outer = min((p for p in placed if body < p.lines), key=lambda p: len(p.lines))
        outer.inner.append(loop)
        placed.append(loop)
    for loop in placed:
        loop.inner.sort(key=lambda inner: min(inner.lines))
        loop.own = tuple(sorted(loop.lines.difference(*(inner.lines for inner in loop.inner))))
    return root
