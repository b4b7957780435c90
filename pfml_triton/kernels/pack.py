"""The pack kernel: order and coarsen a cloud of points, and sketch it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def _pack_kernel(
    x_ptr,  # [N, D], the caller's points
    order_ptr,  # [P] int64, which point comes in which row
    label_ptr,  # [P] int64, classes by row
    coarse_ptr,  # [P, depth] out: the points in that order, bfloat16, zero where there are none
    sq_norm_ptr,  # [P] out: |coarse|^2; NaN in padded rows
    radius_ptr,  # [P] out: an upper bound of |point - coarse|
    first_label_ptr,  # [P / BLOCK_M] out: the label of a tile's first row
    last_label_ptr,  # [P / BLOCK_M] out: that of its last point
    basis_ptr,  # [D, WIDTH] bfloat16, Q of sketch.py
    left_ptr,  # [P, K] bfloat16 out: sketch and lift, as the left factor of the test
    right_ptr,  # [P, K] bfloat16 out: the same as the right factor
    stride_xn,
    N,
    D,
    depth,
    reach,
    accumulation,
    slack,
    SKETCHED: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, K)
    real = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    coarse_type: tl.constexpr = coarse_ptr.dtype.element_ty
    x_row = x_ptr + tl.load(order_ptr + rows) * stride_xn
    out_row = rows.to(tl.int64) * depth
    sq_norm = tl.zeros((BLOCK_M, BLOCK_D), real)
    sq_error = tl.zeros((BLOCK_M, BLOCK_D), real)
    sketch = tl.zeros((BLOCK_M, K), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        x = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
        coarse = x.to(tl.float32).to(tl.bfloat16)  # the interpreter has no float64 -> bfloat16
        tl.store(coarse_ptr + out_row[:, None] + d[None, :], coarse.to(coarse_type))
        error = x.to(real) - coarse.to(real)
        sq_norm += coarse.to(real) * coarse.to(real)
        sq_error += error * error
        if SKETCHED:
            q = tl.load(
                basis_ptr + d[:, None] * WIDTH + k[None, :],
                mask=(d < D)[:, None] & (k < WIDTH)[None, :],
                other=0.0,
            )
            sketch = tl.dot(coarse.to(coarse_type), q.to(coarse_type), sketch)
    # A padded row compares false to everything, so it is never nominated: no masks from here on.
    norm = tl.where(rows < N, tl.sum(sq_norm, 1), float("nan"))
    tl.store(sq_norm_ptr + rows, norm)
    # The sum of D squares is low by at most (D + 2) 2^-24 of itself, and D <= 16,000.
    # The square root takes what is below 2^-126 for 0.
    radius = tl.sqrt(tl.maximum(tl.sum(sq_error, 1), 1.2e-38)) * 1.001
    tl.store(radius_ptr + rows, radius)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, N) - 1
    if tile * BLOCK_M < N:
        tl.store(first_label_ptr + tile, tl.load(label_ptr + tile * BLOCK_M))
        tl.store(last_label_ptr + tile, tl.load(label_ptr + last))

    if SKETCHED:  # see sketch.py, which is the same in torch
        rounded = sketch.to(tl.bfloat16).to(tl.float32)
        lost = sketch - rounded
        radius = radius.to(tl.float32) + tl.sqrt(tl.sum(lost * lost, 1)) * 1.001
        radius += accumulation * tl.sqrt(norm.to(tl.float32))
        square = tl.sum(rounded * rounded, 1)
        given = (reach + radius) * radius + 0.25 * reach * reach
        lift = given - 0.5 * square + slack * (given + square)
        lift = tl.where(square < float("inf"), lift, float("inf"))
        lift = tl.where(rows < N, lift, float("-inf"))
        high = lift.to(tl.bfloat16).to(tl.float32)
        low = tl.where(tl.abs(high) < float("inf"), lift - high, 0.0)
        out = rows.to(tl.int64)[:, None] * K + k[None, :]
        ours = tl.where((k == K - 4)[None, :], high[:, None], low[:, None])
        left = tl.where((k < K - 4)[None, :], rounded, tl.where((k < K - 2)[None, :], ours, 1.0))
        ours = tl.where((k == K - 2)[None, :], high[:, None], low[:, None])
        right = tl.where((k < K - 4)[None, :], rounded, tl.where((k < K - 2)[None, :], 1.0, ours))
        tl.store(left_ptr + out, left.to(tl.bfloat16).to(coarse_type))
        tl.store(right_ptr + out, right.to(tl.bfloat16).to(coarse_type))
