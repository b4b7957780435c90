"""Compile what the launcher launches, ahead of time and without a GPU, and read the machine code.

`record()` stands in for the kernels while the launcher runs, so that what is compiled here is what
a real call compiles: the same arguments, specialised as Triton's JIT specialises them. Run it in a
process without TRITON_INTERPRET.
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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from bench.machine import Code
from pfml_triton.kernels import launch

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e5m2: "fp8e5",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
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


def target_of(arch: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like; ValueError for others."""
    if arch not in SHARED_MEMORY:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {arch!r}")
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@dataclass
class Launch:
    """One launch as the launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # by parameter name, run-time arguments and constexprs
    options: dict[str, int]

    def compile(self, arch: str) -> Any:
        """Compile for `arch`, specialised on these arguments as Triton's JIT does it."""
        target = target_of(arch)
        backend = make_backend(target)
        signature, constexprs, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.args[parameter.name]
            if self._is_constant(parameter):
                signature[parameter.name] = "constexpr"
                constexprs[parameter.name] = value
                continue
            specialised = ""
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + _TYPES[value.dtype]
                specialised = backend.get_tensor_specialization(value, align=True)
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if not parameter.do_not_specialize:
                    specialised = backend.get_int_specialization(value, align=True)
            else:
                signature[parameter.name] = "fp32"
            if specialised:
                attributes[i,] = backend.parse_attr(specialised)
        source = ASTSource(
            fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attributes
        )
        return triton.compile(source, target=target, options=self.options)

    def runtime_args(self) -> list[Any]:
        """The arguments that the compiled kernel takes, in order, without constexprs."""
        return [self.args[p.name] for p in self.kernel.params if not self._is_constant(p)]

    def _is_constant(self, parameter: Any) -> bool:
        """Whether a parameter is compiled in: a constexpr, or an integer that is 1."""
        value = self.args[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        return parameter.is_constexpr or is_one


@dataclass
class _Recorder:
    kernel: Any
    launches: list[Launch]
    run: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            names = [p.name for p in self.kernel.params]
            bound = dict(zip(names, args, strict=False)) | kwargs
            assert set(bound) == set(names), set(bound) ^ set(names)
            self.launches.append(Launch(self.kernel, grid, bound, options))
            if self.run is not None:
                self.run(self.launches[-1])

        return launched


@contextmanager
def record(run: Any = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of making them.

    Works with tensors of any device, "meta" included. `run`, if given, is called with every launch
    at its place in the stream (a test passes an emulator).
    """
    launches: list[Launch] = []
    kernels = {
        name: value
        for name, value in vars(launch).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    if not kernels:
        raise RuntimeError("no compiled kernels here: unset TRITON_INTERPRET before the import")
    try:
        for name, kernel in kernels.items():
            setattr(launch, name, _Recorder(kernel, launches, run))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)


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
        lines = _tool("nvdisasm", "-c", path).splitlines()
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
