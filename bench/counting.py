"""What one step consists of, counted without a GPU: launches, machine code, tiles and pairs.

The launches are those of `potential_energy` on meta tensors, so it wants a process without
TRITON_INTERPRET. The active tiles are found by the kernels' own criterion (pfml_triton/sketch.py
and kernels/plan.py), on the CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import aot
from pfml_triton import Potential, potential_energy
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import TILE_M, TILE_N, Tiles, tiles_for
from pfml_triton.sketch import accumulation, lifted, random_basis

_ROWS = 16 * TILE_M  # of a product that caches hold
_CHUNK = 64  # tiles whose distances are computed together


@dataclass(frozen=True)
class Kernel:
    """A launch with its machine code."""

    name: str
    grid: tuple[int, ...]
    args: dict[str, Any]
    stages: int
    warps: int
    code: aot.MachineCode
    lines: list[str]  # the listing
    loops: list[range]  # around the first tensor-core instruction, from the inner to the outer
    resident: int  # programs that a multiprocessor holds

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def inner_loop(self) -> Counter[str]:
        """The instructions of the innermost loop with tensor-core instructions, by name."""
        names = (aot.opcode(self.lines[i]) for loop in self.loops[:1] for i in loop)
        return Counter(name for name in names if name)


class Work(NamedTuple):
    """The active tiles of a cloud, in the order of the lists."""

    row: Tensor  # [A] which 16 points
    turns: Tensor  # [A] pairs nominated in one of these rows, at most
    pairs: int  # nominated in all
    lengths: Tensor  # [tiles of 16 points] of the lists


def record_step(
    points: Tensor, labels: Tensor, arch: str
) -> tuple[list[Kernel], dict[str, list[int]]]:
    """The kernels of one step, compiled for `arch`, in the order of their launches; and PyTorch's
    own operations in forward and in backward: the bytes that each reads and writes."""
    x, labels = points.to("meta").requires_grad_(), labels.to("meta")
    tiles = tiles_for(x.shape[1], hopper=arch == "sm_90")
    random_basis(x.shape[1], x.device)  # which is made once
    with (
        mock.patch.object(launch, "obstacle", return_value=None),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # not for meta
        mock.patch.object(launch, "_tiles_here", return_value=tiles),
        aot.record() as launches,
    ):
        with _Operations() as forward:
            energy = potential_energy(x, labels, backend="triton")
        with _Operations() as backward:
            energy.backward()
    operations = {"torch forward": forward.moved, "torch backward": backward.moved}
    return [compiled_kernel(made, arch) for made in launches], operations


class _Operations(TorchDispatchMode):
    """Notes the bytes of all operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if tensors and not func.is_view and "empty" not in str(func):
            self.moved.append(sum(t.nbytes for t in tensors))
        return result


def compiled_kernel(made: aot.Launch, arch: str) -> Kernel:
    """Compile a launch for an NVIDIA chip and read it."""
    compiled = made.compile(arch)
    code, lines, warps = aot.inspect(compiled), aot.listing(compiled), compiled.metadata.num_warps
    product = next((i for i, line in enumerate(lines) if "MMA" in aot.opcode(line)), -1)
    # 64 Ki registers, dealt out by 8 a thread, and 1 KiB of shared memory besides a program's own.
    resident = min(
        (64 << 10) // (32 * warps * 8 * math.ceil(code.registers / 8)),
        (aot.SHARED_MEMORY[arch] + 1024) // (code.shared_bytes + 1024),
        64 // warps,
    )
    return Kernel(
        made.kernel.__name__.removeprefix("_").removesuffix("_kernel"), made.grid, made.args,
        compiled.metadata.num_stages, warps, code, lines,
        sorted((loop for loop in aot.loops(lines) if product in loop), key=len), resident,
    )  # fmt: skip


def filter_blocks(kernel: Kernel) -> list[int]:
    """How many blocks of columns each program of the filter does, in the order of launch."""
    a, (width, height) = kernel.args, kernel.grid
    strip, blocks = a["STRIP"], []
    for y in range(height):
        for x in range(width):
            first = max(y * strip, x * a["BLOCK_M"] // a["BLOCK_N"] if a["MUTUAL"] else 0)
            blocks.append(max(0, min((y + 1) * strip, a["blocks_y"]) - first))
    return blocks


def instructions_a_pair(kernel: Kernel) -> float:
    """Thread instructions of the filter's inner loop for each pair of a block."""
    pairs = kernel.args["BLOCK_M"] * kernel.args["BLOCK_N"]
    return kernel.inner_loop.total() * 32 * kernel.warps / pairs


def shared_out(work: Work, extra: int) -> tuple[Tensor, int]:
    """Which program of the forces takes each active tile [A], and how many of the `extra` ones are
    needed, as kernels/plan.py has it."""
    if not extra:
        return work.row, 0
    budget = max(-(-len(work.row) // extra), Tiles.least_budget)
    more = (work.lengths - 1).clamp(min=0) // budget
    rank = torch.arange(len(work.row)) - (work.lengths.cumsum(0) - work.lengths)[work.row]
    beyond = len(work.lengths) + (more.cumsum(0) - more)[work.row] + rank // budget - 1
    return torch.where(rank < budget, work.row, beyond), int(more.sum())


def count_work(points: Tensor, labels: Tensor, potential: Potential) -> Work:
    """Count the work of a mutual field.

    Args:
        points: [N, D] float32, with the values that the kernels see.
        labels: [N].
        potential: its radii; a pair is nominated by its true distance.
    """
    labels, order = labels.sort(stable=True)
    points = points[order]
    row, column = active_tiles(points, labels, potential).nonzero(as_tuple=True)
    n = len(points)
    turns, pairs = [], 0
    for some_rows, some_columns in zip(row.split(_CHUNK), column.split(_CHUNK), strict=True):
        i = some_rows[:, None] * TILE_M + torch.arange(TILE_M)
        j = some_columns[:, None] * TILE_N + torch.arange(TILE_N)
        exists = (i < n)[:, :, None] & (j < n)[:, None, :]
        i, j = i.clamp(max=n - 1), j.clamp(max=n - 1)
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(points[i], points[j], compute_mode=exact)
        nominated = torch.where(
            labels[i][:, :, None] == labels[j][:, None, :],
            distance >= potential.delta,
            distance < potential.repulsion_radius,
        )
        in_row = (nominated & exists).sum(2)
        turns.append(in_row.amax(1))
        pairs += int(in_row.sum())
    return Work(row, torch.cat(turns), pairs, row.bincount(minlength=-(-n // TILE_M)))


def active_tiles(points: Tensor, labels: Tensor, potential: Potential) -> Tensor:
    """Which tiles of 16 x 64 pairs are active, bool, of points in the order of their labels."""
    n, dim = points.shape
    coarse = points.bfloat16().float()
    error = 1.001 * (points - coarse).norm(dim=1) + accumulation(dim) * coarse.norm(dim=1)
    sketch = coarse @ random_basis(dim, points.device).float()
    left, right = (side.float() for side in lifted(sketch, error, potential.repulsion_radius))
    height, width = -(-n // TILE_M), -(-n // TILE_N)
    near = []
    for part in left.split(_ROWS):
        tiles = -(-len(part) // TILE_M)
        padding = (0, width * TILE_N - n, 0, tiles * TILE_M - len(part))
        product = pad(part @ right.T, padding, value=-torch.inf)
        near.append(product.view(tiles, TILE_M, width, TILE_N).amax((1, 3)) >= 0)
    last_x = labels[torch.arange(1, height + 1).mul(TILE_M).clamp(max=n) - 1]
    last_y = labels[torch.arange(1, width + 1).mul(TILE_N).clamp(max=n) - 1]
    shares_label = (labels[::TILE_M, None] <= last_y) & (labels[::TILE_N] <= last_x[:, None])
    return torch.cat(near) | shares_label
