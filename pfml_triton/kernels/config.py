"""The one table of tile shapes, the same choice every time.

The key of the forces kernel is the depth: it holds gradients of [BLOCK_M, SLICES * BLOCK_D] in
registers, so the depth decides what fits, while the dtype of the points only changes its loads. AMD
has wider warps, and Hopper a wider product for the filter. For every chip of
tests/kernels/test_compile.py every entry compiles without a spill inside a loop, and with at most
16 bytes of stack; with a Triton before 3.9, padded depths have up to 80, outside of loops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import triton

from ..sketch import MAX_DEPTH, sketch_depth

FUSED = {"enable_fp_fusion": True}  # stated, for its default differs between Tritons
# Fixed by the bits of filter.py: an active tile, and the rows of a block of the filter.
TILE_M, TILE_N, FILTER_M = 16, 64, 128
# Rows of a program of the pack kernel, too few for Hopper's wgmma: that reads its operands while
# threads go on, and they have to read them as well. Triton, through 3.9, lets the next ones
# overwrite those of a product that is still pending.
PACK_M = 16
ROWS = 256  # clouds are padded to as many, for blocks of the filter of either width
FEW = 4096  # points: tiles of them are fewer than two or three programs a multiprocessor
MANY = 1 << 20  # points, where their number is not known
_VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
OLD = _VERSION < (3, 9)
# No fence between cp.async and the products that read shared memory by the asynchronous proxy
# (triton-lang/triton#9610, #10537). What is not prefetched comes with one.
FENCELESS = _VERSION < (3, 7, 1)
MAX_SLICES = 4  # of 128; with eight the gradients no longer fit the registers of sm_80


@dataclass(frozen=True)
class Tiles:
    """Tile shapes of the forces kernel and of the filter.

    A program of the forces owns TILE_M points and `slices` slices of `block_d` of the depth; it
    meets the others in tiles of TILE_N, nominating over `block_k` of the depth at a time. A program
    of the filter works on FILTER_M rows and `filter_n` columns at a time.
    """

    block_k: int
    block_d: int
    slices: int
    num_warps: int
    num_stages: int
    max_registers: int | None  # a thread; None leaves it to the compiler
    filter_n: int
    filter_warps: int
    filter_stages: int
    filter_strip: int  # blocks that one program of the filter walks
    chunk: int  # tiles of a list that a program looks at together
    pack_warps: int = 4
    pack_registers: int | None = None  # like max_registers
    long_list: int = 64  # lists that cannot be longer are not shared out
    least_budget: int = 16  # tiles of a list that one program always takes
    extra_programs: int = 512  # for longer lists; each has sums for TILE_M points

    @property
    def depth_multiple(self) -> int:
        return self.block_d * self.slices

    def options(self) -> dict[str, int]:
        """The launch options of the forces kernel."""
        return _options(self.num_warps, self.num_stages, self.max_registers)

    def pack_options(self) -> dict[str, int]:
        """Those of the pack kernel, which is faster without a prefetch."""
        return _options(self.pack_warps, 1, self.pack_registers)


def _options(warps: int, stages: int, registers: int | None) -> dict[str, int]:
    options = FUSED | {"num_warps": warps, "num_stages": stages}
    return options if registers is None else options | {"maxnreg": registers}


def padded_depth(depth: int) -> int:
    """What the depth of coarse points is padded to, whatever the tile shapes."""
    if depth <= 128:
        return max(16, 1 << (depth - 1).bit_length())
    return -(-depth // 128) * 128


def tiles_for(depth: int, points: int = MANY, arch: str = "sm_80") -> Tiles:
    """The tile shapes for `points` points, that are acted on, of `depth` dimensions, on `arch`,
    "sm_90" or "gfx942", say.

    A depth that is whole (16, 32, 64, 128, 256 or 384) fits 128 threads a program, of which two or
    three share a multiprocessor: one waits for memory while another computes (from 128 on that
    takes Triton 3.9, for older ones keep more registers alive). From 512 on, and where a depth is
    padded, so that masks and second looks want registers, that would spill; a program has 256
    threads then, 8 warps of 32 on NVIDIA or 4 of 64 on AMD. So it has from 256 on where
    points are few, and a program has a multiprocessor to itself. Beyond 512 the slices are shared
    out evenly over programs, each of which nominates again.

    Left alone, NVIDIA's assembler spills inside loops to reach the next step of occupancy; a stated
    limit stops that.

    The filter holds 128 numbers of its product a thread of NVIDIA's. Two programs share a
    multiprocessor, so that one multiplies while the other takes maxima. Where points are few, so
    are blocks: each has its own program, and is small. Hopper and the Blackwell of data centres
    read its operands by the asynchronous proxy, so that with a Triton that leaves out the fence
    nothing is prefetched there; on Hopper, blocks of 256 columns are then the faster ones.

    The filter on Hopper, and the pack kernel, for which one shape is the best at all sizes, are as
    timed on an H200 (bench/results). There the forces of many points of 512 dimensions are faster
    with 4 warps, which spill in a loop; what that costs where more pairs act is not known.
    """
    padded = padded_depth(depth)
    registers: int | None
    few = points <= FEW
    hip, hopper = arch.startswith("gfx"), arch == "sm_90"
    prefetches = not (FENCELESS and arch[:-1] in ("sm_9", "sm_10", "sm_11"))
    is_whole = depth == padded and not hip
    if is_whole and padded <= (64 if OLD else 128 if few else 384):
        block_d = min(padded, 32)
        slices, chunk = padded // block_d, 256
        block_k = block_d if padded <= 128 else 64
        warps, registers = 4, 168 if padded <= 128 else 255
    else:
        block_d = min(padded, 128)
        needed = padded // block_d
        slices = -(-needed // -(-needed // MAX_SLICES))
        if is_whole and 128 <= padded <= 512:
            block_d, slices = 64, 2 * slices  # with registers to spare
        chunk = 256 if few or depth != padded else 512  # masks want registers
        block_k = min(padded, 64 if padded <= 128 else 128)
        warps, registers = (4, None) if hip else (8, 128 if padded <= 64 and not OLD else 255)
    return Tiles(
        block_k=block_k,
        block_d=block_d,
        slices=slices,
        num_warps=warps,
        num_stages=3,
        max_registers=registers,
        filter_n=256 if hopper and not few and not prefetches else 128,
        filter_warps=8 if few and sketch_depth(depth) == MAX_DEPTH and not hip else 4,
        filter_stages=1 if not prefetches or (few and hopper) else 2 if hopper else 3,
        filter_strip=1 if few else 16 if hopper else 8,
        chunk=chunk,
        pack_registers=None if hip or arch in ("sm_80", "sm_90") else 255,
    )


def smaller_tiles(tiles: Tiles) -> tuple[Tiles, Tiles]:
    """What serves in turn where a chip, or its compiler, cannot run these.

    The first prefetches less. The second does not prefetch, which is the plainest code there is: it
    takes at most 32 KiB of shared memory, and a barrier on sm_100. Neither takes more registers
    than a program has.
    """
    less = replace(
        tiles,
        block_k=min(tiles.block_k, 64),
        num_stages=min(tiles.num_stages, 2),
        chunk=min(tiles.chunk, 256),
        filter_n=128,
        filter_stages=min(tiles.filter_stages, 2),
    )
    none = replace(
        less,
        block_k=min(less.block_k, 32),
        num_stages=1,
        chunk=min(less.chunk, 64),
        filter_warps=less.filter_warps if tiles.max_registers is None else 8,
        filter_stages=1,
    )
    return less, none
