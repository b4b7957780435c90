"""Read the machine code of what the launcher launches, compiled ahead of time and without a GPU.

Launches are recorded and compiled by `pfml_triton.kernels.recording`, in a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from bench.machine import Code
from pfml_triton.kernels.recording import Launch, record

__all__ = ["ARCHITECTURES", "SHARED_MEMORY", "Launch", "MachineCode", "code", "inspect", "record"]

_LOCAL_MEMORY = ("LDL", "STL")
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities;
# 64 KiB of LDS on the AMD chips).
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
}
ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass
class MachineCode:
    """What the binary says of itself."""

    registers: int
    stack_bytes: int  # NVIDIA: local memory a thread; AMD: scratch
    shared_bytes: int
    tensor_core_instructions: int
    instructions: int
    spills_in_loops: list[str] = field(default_factory=list)  # listing lines


def inspect(compiled: Any) -> MachineCode:
    """Read a binary made by `Launch.compile`, with the disassembler that Triton ships."""
    if "cubin" in compiled.asm:
        return _inspect_nvidia(compiled)
    return _inspect_amd(compiled)


def code(compiled: Any) -> Code:
    """The machine code of an NVIDIA binary, disassembled."""
    return _code(compiled.asm["cubin"])


@lru_cache(maxsize=8)
def _code(cubin: bytes) -> Code:
    with _file(cubin) as path:
        lines = _tool("nvdisasm", "-c", "-ndf", path).splitlines()
    return Code([line for line in lines if re.match(r"\s*(\.L\w+:|/\*[0-9a-f]+\*/)", line)])


def spills_in_loops(code: Code) -> list[str]:
    """Loads and stores of local memory inside the loops of a listing."""
    inside = frozenset().union(*(loop.lines for loop in code.root.inner))
    found = [code.instructions[i] for i in sorted(inside)]
    return [i.text for i in found if i is not None and i.name in _LOCAL_MEMORY]


def _inspect_nvidia(compiled: Any) -> MachineCode:
    with _file(compiled.asm["cubin"]) as path:
        usage = _tool("cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {usage[:500]}")
    listing = code(compiled)
    instructions = listing.all(listing.root)
    return MachineCode(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=sum(i.is_product for i in instructions),
        instructions=len(instructions),
        spills_in_loops=spills_in_loops(listing),
    )


@contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    """The path of a file that holds an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def _inspect_amd(compiled: Any) -> MachineCode:
    assembly = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no .{name} in the assembly of {compiled.name}")
        return int(found[1])

    code = [
        line for line in assembly.splitlines() if re.match(r"\s+[vs]_|\s+(ds|global|buffer)_", line)
    ]
    # Scalar registers that are spilled to lanes of vector registers reserve a stack of 36 bytes,
    # which no instruction touches.
    uses_stack = re.search(r"\bscratch_|buffer_(load|store)\w* .*\boff, s\[0:3\]", assembly)
    return MachineCode(
        registers=metadata("vgpr_count"),
        stack_bytes=metadata("private_segment_fixed_size") if uses_stack else 0,
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=sum("mfma" in line for line in code),
        instructions=len(code),
        spills_in_loops=[f"{n} registers" for n in [metadata("vgpr_spill_count")] if n],
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [_NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout
