"""From tensors to launches: the Triton backend.

Pack each cloud, filter, forces; where lists can be long, count and plan before the forces, and join
after them. No host synchronisation, no atomics, grids that depend on shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..potential import FieldTerms, Potential
from ..sketch import LIFT, REACH, SLACK, accumulation, sketch_depth
from . import tuning
from .config import FILTER_M, FUSED, TILE_M, TILE_N, Tiles
from .filter import _filter_kernel
from .forces import _force_kernel
from .pack import _pack_kernel
from .plan import _count_kernel, _join_kernel, _plan_kernel

INTERPRETED = not isinstance(_force_kernel, triton.JITFunction)
_tiles_here = tuning.tiles_here


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
    """N points and what the kernels make of them, in the order of their class.

    P rows, a whole number of tiles and of filter blocks; depth, D padded to whole slices.
    """

    points: Tensor  # [N, D], the caller's, where they are
    order: Tensor  # [P] int64, which point comes in which row
    labels: Tensor  # [P] int64
    coarse: Tensor  # [P, depth] bfloat16 (float32 holding bfloat16 values under the interpreter)
    sq_norm: Tensor  # [P] float32 (float64 for float64 points), NaN in padded rows
    radius: Tensor  # [P], like sq_norm
    first_label: Tensor  # [P / TILE_N] int64
    last_label: Tensor  # [P / TILE_N] int64
    left: Tensor  # [P, K] like coarse, the sketch as left factor of the filter's test
    right: Tensor  # [P, K], as right factor


def pack(x: Tensor, labels: Tensor, tiles: Tiles, delta_rep: float, basis: Tensor | None) -> Cloud:
    """Order points `x` [N, D] by `labels` [N] int64, coarsen them, and sketch them.

    `basis` [D, at most 60] bfloat16 is that of the sketch for a repulsion of radius `delta_rep`;
    None leaves the sketch out.
    """
    n, dim = x.shape
    points = x if x.stride(1) == 1 else x.contiguous()
    height = max(FILTER_M, tiles.filter_n)
    rows = triton.cdiv(n, height) * height
    depth = triton.cdiv(dim, tiles.depth_multiple) * tiles.depth_multiple
    sorted_labels, order = torch.sort(labels, stable=True)
    sorted_labels, order = (
        torch.nn.functional.pad(t, (0, rows - n)) for t in (sorted_labels, order)
    )
    # The interpreter multiplies in numpy, which has no bfloat16.
    coarse_dtype = torch.float32 if INTERPRETED else torch.bfloat16
    real = torch.promote_types(x.dtype, torch.float32)
    coarse = x.new_empty(rows, depth, dtype=coarse_dtype)
    sq_norm, radius = x.new_empty(2, rows, dtype=real)
    first_label, last_label = labels.new_empty(2, rows // TILE_N)
    k = sketch_depth(dim)
    width = min(dim, k - LIFT)
    if basis is not None:
        assert basis.shape == (dim, width), basis.shape
        assert basis.is_contiguous()
    left, right = x.new_empty(2, 0 if basis is None else rows, k, dtype=coarse_dtype)
    _pack_kernel[(rows // TILE_N,)](
        points, order, sorted_labels, coarse, sq_norm, radius, first_label, last_label,
        coarse if basis is None else basis, left, right,
        points.stride(0), n, dim, depth,
        REACH * delta_rep, accumulation(dim), SLACK,
        SKETCHED=basis is not None, WIDTH=width, K=k,
        BLOCK_M=TILE_N, BLOCK_D=tiles.block_d, num_warps=tiles.pack_warps, **FUSED,
    )  # fmt: skip
    return Cloud(
        points, order, sorted_labels, coarse, sq_norm, radius, first_label, last_label, left, right
    )


def near_tiles(acted_on: Cloud, acting: Cloud, tiles: Tiles) -> Tensor:
    """Which tiles of 16 x 16 pairs the sketches let through: bits [P / 16, Q / 128] uint8."""
    height, width = len(acted_on.order), len(acting.order)
    near = acted_on.labels.new_empty(height // TILE_M, width // 128, dtype=torch.uint8)
    if len(acted_on.left) == 0:  # not sketched: all of them
        return near.fill_(255)
    blocks_y = width // tiles.filter_n
    grid = height // FILTER_M, triton.cdiv(blocks_y, tiles.filter_strip)
    _filter_kernel[grid](
        acted_on.left, acting.right, near, near.stride(0), blocks_y,
        MUTUAL=acting is acted_on, K=acting.right.shape[1], STRIP=tiles.filter_strip,
        BLOCK_M=FILTER_M, BLOCK_N=tiles.filter_n,
        num_warps=tiles.filter_warps, num_stages=tiles.filter_stages, **FUSED,
    )  # fmt: skip
    return near


def field_terms(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    *,
    needs_grad: bool,
    basis: Tensor | None = None,
    tiles: Tiles | None = None,
) -> FieldTerms:
    """What the field of `y` does to the points `x`: see `FieldTerms`.

    Args:
        x, y: points [N, D] and [M, D], one dtype and device; any strides.
        x_labels, y_labels: classes [N] and [M], int64.
        needs_grad: whether the gradient is wanted.
        basis: Q of the sketch that filters tiles; None takes all of them.
        tiles: tile shapes; None takes them from the tuning file or the table (tuning.py).

    The energy and the gradient are float32 (float64 for float64 points, under the interpreter).
    """
    n, dim = x.shape
    real = torch.promote_types(x.dtype, torch.float32)
    if n == 0 or len(y) == 0:
        nothing = x.new_zeros(n, dtype=torch.int32)
        still = x.new_zeros(n, dim, dtype=real) if needs_grad else None
        alone = x.new_full((n,), torch.inf, dtype=real)
        return FieldTerms(
            x.new_zeros(n, dtype=real), nothing, nothing, still, alone, x.new_ones((), dtype=real)
        )
    tiles = tiles or _tiles_here(x, x_labels, y, y_labels, potential, basis)
    tiles_x, tiles_y = triton.cdiv(n, TILE_M), triton.cdiv(len(y), TILE_N)
    extra = tiles.extra_programs if tiles_y > tiles.long_list else 0
    out_rows = n + extra * TILE_M
    energy, nearest = (x.new_empty(out_rows, dtype=real) for _ in range(2))
    attracting, repelling = (x.new_empty(out_rows, dtype=torch.int32) for _ in range(2))
    active = x.new_empty(tiles_x, dtype=torch.int32)
    grad = x.new_empty(out_rows, dim, dtype=real) if needs_grad else energy  # not written
    with torch.cuda.device_of(x):
        acted_on = pack(x, x_labels, tiles, potential.repulsion_radius, basis)
        mutual = y is x and y_labels is x_labels
        acting = acted_on if mutual else pack(y, y_labels, tiles, potential.repulsion_radius, basis)
        near = near_tiles(acted_on, acting, tiles)
        depth = acted_on.coarse.shape[1]
        programs = depth // tiles.depth_multiple if needs_grad else 1
        extra_of, budget = active, active  # not read, but a kernel wants a pointer
        if extra:
            count, extra_of = torch.empty_like(active), torch.empty_like(active)
            budget = active.new_empty(1)
            _count_kernel[(tiles_x,)](
                acted_on.labels, near, acting.first_label, acting.last_label, count,
                near.stride(0), n, tiles_y,
                BLOCK_M=TILE_M, CHUNK=tiles.chunk, **FUSED,
            )  # fmt: skip
            _plan_kernel[(1,)](
                count, extra_of, budget, tiles_x, extra, tiles.least_budget, BLOCK=1024, **FUSED,
            )  # fmt: skip
        coarse_depth = triton.cdiv(dim, tiles.block_k) * tiles.block_k
        alpha, integer = potential.alpha, round(potential.alpha)
        _force_kernel[(tiles_x + extra, programs)](
            acted_on.points, acted_on.order, acted_on.coarse,
            acted_on.labels, acted_on.sq_norm, acted_on.radius,
            acting.points, acting.order, acting.coarse,
            acting.labels, acting.sq_norm, acting.radius,
            acting.first_label, acting.last_label, near, extra_of, budget,
            energy, attracting, repelling, nearest, active, grad,
            acted_on.points.stride(0), acting.points.stride(0), near.stride(0),
            n, dim, depth, coarse_depth, tiles_x, tiles_y, tiles_x.bit_length(),
            alpha, alpha - integer,
            potential.delta, potential.repulsion_radius, potential.min_distance,
            (2 * coarse_depth + 16) * 2.0**-23,
            ALPHA=integer, IS_INTEGER=alpha == integer, NEEDS_GRAD=needs_grad,
            SHARED_OUT=extra > 0, PADDED=depth != dim, WHOLE=dim == tiles.depth_multiple,
            SLICES=tiles.slices, CHUNK=tiles.chunk, BLOCK_M=TILE_M, BLOCK_N=TILE_N,
            BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d, **tiles.options(),
        )  # fmt: skip
        if extra:
            _join_kernel[(tiles_x, triton.cdiv(dim, 128) if needs_grad else 1)](
                extra_of, acted_on.order, energy, attracting, repelling, nearest, grad, n, dim,
                NEEDS_GRAD=needs_grad, BLOCK_M=TILE_M, BLOCK_D=128, **FUSED,
            )  # fmt: skip
    return FieldTerms(
        energy[:n],
        attracting[:n],
        repelling[:n],
        grad[:n] if needs_grad else None,
        nearest[:n],
        active.sum(dtype=real) / (tiles_x * tiles_y),
    )
