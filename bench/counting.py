"""What one step consists of, counted without a GPU: launches, machine code, tiles and pairs.

The launches are those of `PFMLLoss` on meta tensors, so it wants a process without
TRITON_INTERPRET. The active tiles are found by the kernels' own criterion (pfml_triton/sketch.py
and kernels/plan.py), on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import aot
from bench.settings import Size
from pfml_triton import PFMLLoss, Potential
from pfml_triton.kernels import launch, tuning
from pfml_triton.kernels.config import TILE_M, TILE_N, Tiles, tiles_for
from pfml_triton.sketch import accumulation, lifted, random_basis

_ROWS = 16 * TILE_M  # of a product that caches hold
_CHUNK = 64  # tiles whose distances are computed together
_SORT_PASSES = 8  # of a radix sort of int64, a byte at a time


class Work(NamedTuple):
    """The active tiles of a cloud, in the order of the lists."""

    row: Tensor  # [A] which 16 points
    turns: Tensor  # [A] pairs nominated in one of these rows, at most
    pairs: int  # nominated in all
    lengths: Tensor  # [tiles of 16 points] of the lists


def record_step(
    size: Size, arch: str, dtype: torch.dtype = torch.float32
) -> tuple[list[aot.Launch], dict[str, list[int]]]:
    """The launches of one step as they are for `arch`, in order; and PyTorch's own operations in
    forward and in backward: the bytes that each reads and writes.

    `dtype` is that of the embeddings. Gradients are written to leaves that have none.
    """
    loss = PFMLLoss(size.classes, size.depth, size.proxies, backend="triton").to("meta").eval()
    x = torch.empty(size.batch, size.depth, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(size.batch, dtype=torch.int64, device="meta")
    tiles = tiles_for(size.depth, size.n, arch)
    with (
        mock.patch.object(launch, "obstacle", return_value=None),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # not for meta
        mock.patch.object(tuning, "tiles_here", return_value=tiles),
        aot.record() as launches,
    ):
        loss(x, labels)  # looks at the basis of the sketch, which is done once
        launches.clear()
        with _Operations() as forward:
            energy = loss(x, labels)
        with _Operations() as backward:
            energy.backward()
    operations = {"forward": forward.moved, "backward": backward.moved}
    return launches, operations


class _Operations(TorchDispatchMode):
    """Notes the bytes of all operations that launch something, a pass over them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if tensors and not func.is_view and "empty" not in str(func):
            passes = _SORT_PASSES if "sort" in str(func) else 1
            self.moved += passes * [sum(t.nbytes for t in tensors)]
        return result


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
    # Rounding the product to bfloat16 moves no sign (sketch.py), and is the faster where it can be.
    factor = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    left, right = (side.to(factor) for side in lifted(sketch, error, potential.repulsion_radius))
    height, width = -(-n // TILE_M), -(-n // TILE_N)
    left = torch.cat(
        [left, left[-1:].expand(height * TILE_M - n, -1)]
    )  # a row again changes nothing
    right = pad(right, (0, 0, 0, width * TILE_N - n))
    right[n:, -2] = -torch.inf  # where every left factor is 1
    near = []
    for part in left.split(_ROWS):
        product = (part @ right.T).view(-1, TILE_M, width, TILE_N)
        near.append(product.amax(3).amax(1) >= 0)
    last_x = labels[torch.arange(1, height + 1).mul(TILE_M).clamp(max=n) - 1]
    last_y = labels[torch.arange(1, width + 1).mul(TILE_N).clamp(max=n) - 1]
    shares_label = (labels[::TILE_M, None] <= last_y) & (labels[::TILE_N] <= last_x[:, None])
    return torch.cat(near) | shares_label
