"""The one table of tile shapes, the same choice every time.

The key is the depth, and nothing else: the forces kernel holds gradients of [BLOCK_M, SLICES *
BLOCK_D] in registers, so the depth decides what fits, while the dtype of the points only changes
its loads. For every chip of tests/kernels/test_compile.py every entry compiles without a spill
inside a loop, and with at most 16 bytes of stack.
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED = {"enable_fp_fusion": True}  # stated, for its default differs between Tritons
PACK_ROWS = 16  # rows that one program of the pack kernel copies
MAX_SLICES = 4  # of 128; with eight the gradients no longer fit the registers of sm_80


@dataclass(frozen=True)
class Tiles:
    """Tile shape of the forces kernel.

    A program owns `block_m` points and `slices` slices of `block_d` of the depth; it meets the
    others in tiles of `block_n`, nominating over `block_k` of the depth at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    slices: int
    num_warps: int
    num_stages: int
    max_registers: int | None  # a thread; None leaves it to the compiler

    @property
    def depth_multiple(self) -> int:
        return self.block_d * self.slices

    def options(self) -> dict[str, int]:
        """The launch options of Triton."""
        options = FUSED | {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


def tiles_for(depth: int, *, hip: bool) -> Tiles:
    """The tile shape for points of `depth` dimensions.

    The depth is padded to the next power of two up to 128, and from there to whole slices of 128,
    so that 384 costs three quarters of 512. Beyond 512 the slices are shared out evenly over
    programs, each of which nominates again.

    256 threads a program: 8 warps of 32 on NVIDIA, 4 of 64 on AMD (`hip`). Left alone, NVIDIA's
    assembler spills inside loops to reach the next step of occupancy; a stated limit stops that.
    """
    if depth <= 128:
        block_d = max(16, 1 << (depth - 1).bit_length())
        block_k, slices = min(block_d, 64), 1
    else:
        needed = -(-depth // 128)
        programs = -(-needed // MAX_SLICES)
        block_d, block_k, slices = 128, 64, -(-needed // programs)
    return Tiles(
        block_m=16,
        block_n=64,
        block_k=block_k,
        block_d=block_d,
        slices=slices,
        num_warps=4 if hip else 8,
        num_stages=3,
        max_registers=None if hip else 128 if block_d <= 64 else 255,
    )
