"""From tensors to launches: the Triton backend.

Pack each cloud, filter, forces, total; where lists can be long, count and plan before the forces,
and join after them. In backward, pull back. No host synchronisation, no atomics, grids that depend
on shapes only. What the functions are for, `pfml_triton.backends.Backend` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from ..potential import TOTALS, FieldTerms, Given, Potential, Split
from ..sketch import LIFT, REACH, SLACK, accumulation, sketch_depth
from . import tuning
from .config import FILTER_M, FUSED, PACK_M, ROWS, TILE_M, TILE_N, Tiles, padded_depth
from .filter import _filter_kernel
from .forces import _force_kernel
from .pack import _pack_kernel, _pull_back_kernel
from .plan import _count_kernel, _join_kernel, _plan_kernel
from .total import _total_kernel

_MOST_PROGRAMS = 65_535  # along the second axis of a grid
INTERPRETED = not isinstance(_force_kernel, triton.JITFunction)


def _cdiv(a: int, b: int) -> int:
    """a / b, rounded up. That of Triton takes microseconds on the host."""
    return -(-a // b)


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
    return _obstacle_of(points.get_device())


@cache
def _obstacle_of(device: int) -> str | None:
    """Older GPUs have no such products: what Triton compiles for them spills, and crawls."""
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return (
            f"the kernels multiply in bfloat16 on tensor cores, which takes compute capability "
            f"8.0, got {major}.{minor}"
        )
    return None


@dataclass(frozen=True)
class Cloud:
    """N points and what the kernels make of them, in the order of their class.

    P rows, a whole number of tiles and of filter blocks; depth, D padded (`padded_depth`).
    """

    points: Tensor  # [N, D], in the caller's order
    inverse: Tensor | None  # [N], 1 / length that the points had, if they were scaled
    order: Tensor  # [N] int64, which point comes in which row
    labels: Tensor  # [N] int64 or int32
    coarse: Tensor  # [P, depth] bfloat16 (float32 holding bfloat16 values under the interpreter)
    sq_norm: Tensor  # [P] float32 (float64 for float64 points), NaN in padded rows
    radius: Tensor  # [P], like sq_norm
    first_label: Tensor  # [P / TILE_N], like labels
    last_label: Tensor  # [P / TILE_N]
    left: Tensor  # [P, K] like coarse, the sketch as left factor of the filter's test
    right: Tensor  # [P, K], as right factor
    tiles: Tiles

    def __len__(self) -> int:
        return self.points.shape[0]  # len() of a tensor takes microseconds


def gather(
    x: Tensor,
    labels: Tensor,
    potential: Potential,
    *,
    rest: Tensor | None = None,
    unit: bool = False,
    basis: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Cloud:
    """See `Backend`.

    Args:
        tiles: tile shapes; None takes those of the tuning file or the table (tuning.py).
    """
    (b, dim), n = x.shape, labels.shape[0]
    inverse, is_placed = None, unit or rest is not None
    real = torch.promote_types(x.dtype, torch.float32) if rest is None else rest.dtype
    if tiles is None:
        dtype = real if is_placed else x.dtype
        tiles = tuning.tiles_here(x, n, dtype, labels, potential, rest, unit, basis)
    points = x = x if x.stride(1) == 1 else x.contiguous()
    if rest is None:
        assert n == b, (n, b)  # or the kernels would read beyond the points
        rest = x
    else:
        assert n == b + rest.shape[0], (n, b, rest.shape)
        rest = rest if rest.stride(1) == 1 else rest.contiguous()
    rows, depth = _cdiv(n, ROWS) * ROWS, padded_depth(dim)
    if is_placed:
        points = x.new_empty(n, dim, dtype=real)
    if unit:
        inverse = x.new_empty(n, dtype=real)
    k = sketch_depth(dim)
    width = min(dim, k - LIFT)
    if basis is not None:
        assert basis.shape == (dim, width), basis.shape
        assert basis.is_contiguous()
    with torch.cuda.device_of(x):
        sorted_labels, order = torch.sort(labels, stable=True)
        # The interpreter multiplies in numpy, which has no bfloat16.
        coarse_dtype = torch.float32 if INTERPRETED else torch.bfloat16
        coarse = x.new_empty(rows, depth, dtype=coarse_dtype)
        sq_norm, radius = x.new_empty(rows, dtype=real), x.new_empty(rows, dtype=real)
        first_label = labels.new_empty(rows // TILE_N)
        last_label = labels.new_empty(rows // TILE_N)
        sketched = 0 if basis is None else rows
        left, right = (x.new_empty(sketched, k, dtype=coarse_dtype) for _ in range(2))
        _pack_kernel[(rows // PACK_M,)](
            x, rest, points, sq_norm if inverse is None else inverse,
            order, sorted_labels, coarse, sq_norm, radius, first_label, last_label,
            coarse if basis is None else basis, left, right,
            x.stride(0), rest.stride(0), b, n, dim, depth,
            REACH * potential.repulsion_radius, accumulation(dim), SLACK,
            PLACED=is_placed, UNIT=unit, SKETCHED=basis is not None, WIDTH=width, K=k,
            TILE=TILE_N, BLOCK_M=PACK_M, BLOCK_D=min(depth, 128), **tiles.pack_options(),
        )  # fmt: skip
    return Cloud(
        points, inverse, order, sorted_labels, coarse, sq_norm, radius, first_label, last_label,
        left, right, tiles,
    )  # fmt: skip


def near_tiles(acted_on: Cloud, acting: Cloud) -> Tensor:
    """Which tiles of 16 x 16 pairs the sketches let through: bits [P / 16, Q / 128] uint8."""
    tiles = acted_on.tiles
    height, width = acted_on.sq_norm.shape[0], acting.sq_norm.shape[0]
    near = acted_on.labels.new_empty(height // TILE_M, width // 128, dtype=torch.uint8)
    if acted_on.left.shape[0] == 0:  # not sketched: all of them
        return near.fill_(255)
    blocks_y, strip = width // tiles.filter_n, tiles.filter_strip
    while _cdiv(blocks_y, strip) > _MOST_PROGRAMS:  # a batch may meet 8 million points
        strip *= 2
    grid = height // FILTER_M, _cdiv(blocks_y, strip)
    _filter_kernel[grid](
        acted_on.left, acting.right, near, near.stride(0), blocks_y,
        MUTUAL=acting is acted_on, K=acting.right.shape[1], STRIP=strip,
        BLOCK_M=FILTER_M, BLOCK_N=tiles.filter_n,
        num_warps=tiles.filter_warps, num_stages=tiles.filter_stages, **FUSED,
    )  # fmt: skip
    return near


def field_terms(
    acted_on: Cloud, acting: Cloud, potential: Potential, *, needs_grad: bool
) -> FieldTerms:
    """See `Backend`. The tile shapes are those of the points that are acted on.

    The energy and the gradient are float32 (float64 for float64 points, under the interpreter).
    """
    x, tiles, n, m = acted_on.points, acted_on.tiles, len(acted_on), len(acting)
    dim, real = x.shape[1], acted_on.sq_norm.dtype
    if n == 0 or m == 0:
        nothing = x.new_zeros(n, dtype=torch.int32)
        still = x.new_zeros(n, dim, dtype=real) if needs_grad else None
        alone = x.new_full((n,), torch.inf, dtype=real)
        at_rest = x.new_zeros(n, dtype=real)
        return FieldTerms(at_rest, nothing, nothing, nothing, still, alone, nothing[:0], 0)
    tiles_x, tiles_y = _cdiv(n, TILE_M), _cdiv(m, TILE_N)
    extra = tiles.extra_programs if tiles_y > tiles.long_list else 0
    out_rows = n + extra * TILE_M
    energy, nearest = x.new_empty(out_rows, dtype=real), x.new_empty(out_rows, dtype=real)
    attracting, repelling, own_class = (x.new_empty(out_rows, dtype=torch.int32) for _ in range(3))
    active = x.new_empty(tiles_x, dtype=torch.int32)
    grad = x.new_empty(out_rows, dim, dtype=real) if needs_grad else energy  # not written
    with torch.cuda.device_of(x):
        near = near_tiles(acted_on, acting)
        depth = acted_on.coarse.shape[1]
        programs = _cdiv(dim, tiles.depth_multiple)
        is_padded = not dim == depth == programs * tiles.depth_multiple
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
        coarse_depth = _cdiv(dim, tiles.block_k) * tiles.block_k
        alpha, integer = potential.alpha, round(potential.alpha)
        _force_kernel[(tiles_x + extra, programs if needs_grad else 1)](
            acted_on.points, acted_on.order, acted_on.coarse,
            acted_on.labels, acted_on.sq_norm, acted_on.radius,
            acting.points, acting.order, acting.coarse,
            acting.labels, acting.sq_norm, acting.radius,
            acting.first_label, acting.last_label, near, extra_of, budget,
            energy, attracting, repelling, own_class, nearest, active, grad,
            acted_on.points.stride(0), acting.points.stride(0), near.stride(0),
            n, m, dim, depth, coarse_depth, tiles_x, tiles_y, tiles_x.bit_length(),
            alpha, alpha - integer,
            potential.delta, potential.repulsion_radius, potential.min_distance,
            (2 * coarse_depth + 16) * 2.0**-23,
            ALPHA=integer, IS_INTEGER=alpha == integer, NEEDS_GRAD=needs_grad,
            SHARED_OUT=extra > 0, PADDED=is_padded, WHOLE=dim == tiles.depth_multiple,
            SLICES=tiles.slices, CHUNK=tiles.chunk, BLOCK_M=TILE_M, BLOCK_N=TILE_N,
            BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d, **tiles.options(),
        )  # fmt: skip
        if extra:
            _join_kernel[(tiles_x, _cdiv(dim, 128) if needs_grad else 1)](
                extra_of, acted_on.order, energy, attracting, repelling, own_class, nearest, grad,
                n, dim, NEEDS_GRAD=needs_grad, BLOCK_M=TILE_M, BLOCK_D=128, **FUSED,
            )  # fmt: skip
            energy, attracting, repelling, own_class, nearest, grad = (
                t[:n] for t in (energy, attracting, repelling, own_class, nearest, grad)
            )
    return FieldTerms(
        energy, attracting, repelling, own_class, grad if needs_grad else None, nearest, active,
        tiles_x * tiles_y,
    )  # fmt: skip


def total(
    terms: FieldTerms,
    acted_on: Cloud,
    acting: Cloud,
    potential: Potential,
    *,
    among: bool,
    pairs: int = 1,
    before: Tensor | None = None,
    given: Given | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    labels, batch, classes = (acted_on.labels, 0, 0) if given is None else given
    value = acted_on.sq_norm.new_empty(())
    totals = value.new_empty(len(TOTALS), dtype=torch.float64)
    with torch.cuda.device_of(value):
        _total_kernel[(1,)](
            terms.energy, terms.attracting, terms.repelling, terms.own_class, terms.nearest,
            terms.active, acted_on.sq_norm, acting.sq_norm,
            totals if before is None else before, labels.contiguous(), value, totals,
            len(acted_on), len(acting), terms.active.shape[0], terms.tiles, pairs, batch, classes,
            *potential.constants,
            AMONG=among, OTHERS=acting is not acted_on, AFTER=before is not None,
            BLOCK=1024, num_warps=16, **FUSED,
        )  # fmt: skip
    return value, totals


def pull_back(
    grad: Tensor,
    points: Tensor | None,
    inverse: Tensor | None,
    *,
    grad_output: Tensor,
    totals: Tensor,
    split: Split,
    pairs: int = 1,
    twice: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """See `Backend`."""
    n, dim = grad.shape
    block_d = min(512, max(16, 1 << (dim - 1).bit_length()))
    block_m = 1024 // block_d
    first, second = split.empty(grad)
    with torch.cuda.device_of(grad):
        _pull_back_kernel[(_cdiv(n, block_m),)](
            grad, grad if points is None else points, grad if inverse is None else inverse,
            grad_output, totals,
            grad if first is None else first, grad if second is None else second,
            split.b, n, dim, pairs,
            TWICE=twice, UNIT=inverse is not None,
            NEEDS_X=first is not None, NEEDS_REST=second is not None,
            BLOCK_M=block_m, BLOCK_D=block_d, **FUSED,
        )  # fmt: skip
    return first, second
