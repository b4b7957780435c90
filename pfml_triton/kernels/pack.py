"""The pack kernel: order, pad and coarsen a cloud of points."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def _pack_kernel(
    x_ptr,  # [N, D], the caller's points, any strides
    order_ptr,  # [N] int64, which point comes in which row
    points_ptr,  # [P, depth] out: the points in that order, zero in padded rows and columns
    coarse_ptr,  # [P, depth] out: the same rounded to bfloat16; untouched if not COARSEN
    sq_norm_ptr,  # [P] out: |coarse|^2; NaN in padded rows
    radius_ptr,  # [P] out: an upper bound of |point - coarse|
    stride_xn,
    stride_xd,
    N,
    D,
    depth,
    COARSEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = tl.load(order_ptr + rows, mask=rows < N, other=0)
    x_row = x_ptr + source * stride_xn
    out_row = rows.to(tl.int64) * depth
    real = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sq_norm = tl.zeros((BLOCK_M, BLOCK_D), real)
    sq_error = tl.zeros((BLOCK_M, BLOCK_D), real)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        x = tl.load(x_row[:, None] + d.to(tl.int64)[None, :] * stride_xd, mask=inside, other=0.0)
        coarse = x.to(tl.float32).to(tl.bfloat16)  # the interpreter has no float64 -> bfloat16
        offset = out_row[:, None] + d[None, :]
        tl.store(points_ptr + offset, x)
        if COARSEN:
            tl.store(coarse_ptr + offset, coarse.to(coarse_ptr.dtype.element_ty))
        error = x.to(real) - coarse.to(real)
        sq_norm += coarse.to(real) * coarse.to(real)
        sq_error += error * error
    # A padded row compares false to everything, so it is never nominated: no masks from here on.
    norm = tl.where(rows < N, tl.sum(sq_norm, 1), float("nan"))
    tl.store(sq_norm_ptr + rows, norm)
    # The sum of D squares is low by at most (D + 2) 2^-24 of itself: less than this for D < 8192.
    tl.store(radius_ptr + rows, tl.sqrt(tl.sum(sq_error, 1)) * 1.001)
