"""From tensors to launches: the Triton backend.

Three launches a pair of clouds: pack each, then forces. No host synchronisation, no atomics, grids
that depend on shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..potential import FieldTerms, Potential
from .config import FUSED, PACK_ROWS, Tiles, tiles_for
from .forces import _force_kernel
from .pack import _pack_kernel

INTERPRETED = not isinstance(_force_kernel, triton.JITFunction)


def obstacle(points: Tensor) -> str | None:
    """Why the kernels cannot serve these points, or None."""
    if INTERPRETED:
        return None if points.device.type == "cpu" else "Triton's interpreter takes CPU tensors"
    if not points.is_cuda:
        return (
            f"the kernels need tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1 in "
            f"the environment before the import), got points on {points.device}"
        )
    if points.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, got float64"
    return None


@dataclass(frozen=True)
class Cloud:
    """Points in the order of their class, padded to whole tiles. P rows, padded `depth`."""

    points: Tensor  # [P, depth], the dtype of the caller's points
    coarse: Tensor  # [P, depth] bfloat16 (float32 holding bfloat16 values under the interpreter)
    labels: Tensor  # [P] int64
    sq_norm: Tensor  # [P] float32, NaN in padded rows
    radius: Tensor  # [P] float32
    order: Tensor  # [N] int64

    def arguments(self) -> tuple[Tensor, ...]:
        return self.points, self.coarse, self.labels, self.sq_norm, self.radius


def pack(x: Tensor, labels: Tensor, tiles: Tiles) -> Cloud:
    """Order points `x` [N, D] by `labels` [N] int64, pad and coarsen them."""
    n, dim = x.shape
    rows = triton.cdiv(n, tiles.block_n) * tiles.block_n
    depth = triton.cdiv(dim, tiles.depth_multiple) * tiles.depth_multiple
    sorted_labels, order = torch.sort(labels, stable=True)
    points = x.new_empty(rows, depth)
    # The interpreter multiplies in numpy, which has no bfloat16.
    coarse_dtype = torch.float32 if INTERPRETED else torch.bfloat16
    coarsen = x.dtype != coarse_dtype or INTERPRETED
    coarse = x.new_empty(rows, depth, dtype=coarse_dtype) if coarsen else points
    real = torch.promote_types(x.dtype, torch.float32)
    sq_norm, radius = x.new_empty(2, rows, dtype=real)
    cloud = Cloud(
        points,
        coarse,
        torch.nn.functional.pad(sorted_labels, (0, rows - n)),
        sq_norm,
        radius,
        order,
    )
    _pack_kernel[(rows // PACK_ROWS,)](
        x, order, points, coarse, sq_norm, radius,
        x.stride(0), x.stride(1), n, dim, depth,
        COARSEN=coarsen, BLOCK_M=PACK_ROWS, BLOCK_D=tiles.block_d, **FUSED,
    )  # fmt: skip
    return cloud


def field_terms(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    *,
    needs_grad: bool,
    tiles: Tiles | None = None,
) -> FieldTerms:
    """What the field of `y` does to the points `x`: see `FieldTerms`.

    Args:
        x, y: points [N, D] and [M, D], one dtype and device; any strides.
        x_labels, y_labels: classes [N] and [M], int64.
        needs_grad: whether the gradient is wanted.
        tiles: tile shape; None takes it from the table.

    The energy and the gradient are float32 (float64 for float64 points, under the interpreter).
    """
    n, dim = x.shape
    real = torch.promote_types(x.dtype, torch.float32)
    if n == 0 or len(y) == 0:
        nothing = x.new_zeros(n, dtype=torch.int32)
        still = x.new_zeros(n, dim, dtype=real) if needs_grad else None
        return FieldTerms(x.new_zeros(n, dtype=real), nothing, nothing, still)
    tiles = tiles or tiles_for(dim, hip=torch.version.hip is not None)
    energy = x.new_empty(n, dtype=real)
    attracting, repelling = (x.new_empty(n, dtype=torch.int32) for _ in range(2))
    grad = x.new_empty(n, dim, dtype=real) if needs_grad else energy
    with torch.cuda.device_of(x):
        acted_on = pack(x, x_labels, tiles)
        acting = acted_on if y is x and y_labels is x_labels else pack(y, y_labels, tiles)
        # Every tile acts on every other. Which ones do not is the exact filter's to say.
        row_tiles = triton.cdiv(n, tiles.block_m)
        column_tiles = len(acting.points) // tiles.block_n
        active = torch.arange(column_tiles, dtype=torch.int32, device=x.device)
        counts = torch.full((1,), column_tiles, dtype=torch.int32, device=x.device)
        depth = acted_on.points.shape[1]
        coarse_depth = triton.cdiv(dim, tiles.block_k) * tiles.block_k
        alpha, integer = potential.alpha, round(potential.alpha)
        _force_kernel[(row_tiles, depth // tiles.depth_multiple if needs_grad else 1)](
            *acted_on.arguments(), acted_on.order, *acting.arguments(),
            active, counts, energy, attracting, repelling, grad, 0, 0,
            n, dim, depth, coarse_depth,
            alpha, alpha - integer,
            potential.delta, potential.repulsion_radius, potential.min_distance,
            (2 * coarse_depth + 16) * 2.0**-23,
            ALPHA=integer, IS_INTEGER=alpha == integer,
            NEEDS_GRAD=needs_grad, SLICES=tiles.slices,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d,
            **tiles.options(),
        )  # fmt: skip
    return FieldTerms(energy, attracting, repelling, grad if needs_grad else None)
