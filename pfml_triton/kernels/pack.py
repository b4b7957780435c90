"""From a caller's tensors to a cloud of points, and of gradients back.

The pack kernel gathers the points of one or two tensors and scales them to unit length if asked
to, orders and coarsens them, and sketches them. The pull-back kernel is its counterpart in
backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import potential

EPSILON = tl.constexpr(potential.EPSILON)


@triton.jit
def _entries(
    x_ptr, rest_ptr, index, d, stride_xn, stride_rn, B, inside, real: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """Entries d of the points `index`, of which those from B on are in the second tensor."""
    if PLACED:
        first = inside & (index < B)[:, None]
        x = tl.load(x_ptr + (index * stride_xn)[:, None] + d[None, :], mask=first, other=0.0)
        second = inside & (index >= B)[:, None]
        at = ((index - B) * stride_rn)[:, None] + d[None, :]
        x = x.to(real) + tl.load(rest_ptr + at, mask=second, other=0.0).to(real)
    else:
        x = tl.load(x_ptr + (index * stride_xn)[:, None] + d[None, :], mask=inside, other=0.0)
    return x


@triton.jit(do_not_specialize=["B", "N"])
def _pack_kernel(
    x_ptr,  # [B, D], the caller's points
    rest_ptr,  # [N - B, D], more of them
    points_ptr,  # [N, D] out, if PLACED: both, in the caller's order
    inverse_ptr,  # [N] out, if UNIT: 1 / length that a point had
    order_ptr,  # [N] int64, which point comes in which row
    label_ptr,  # [N] int64 or int32, classes by row
    coarse_ptr,  # [P, depth] out: the points in that order, bfloat16, zero where there are none
    sq_norm_ptr,  # [P] out: |coarse|^2; NaN in padded rows
    radius_ptr,  # [P] out: an upper bound of |point - coarse|
    first_label_ptr,  # [P / TILE] out: the label of a tile's first row
    last_label_ptr,  # [P / TILE] out: that of its last point
    basis_ptr,  # [D, WIDTH] bfloat16, Q of sketch.py
    left_ptr,  # [P, K] bfloat16 out: sketch and lift, as the left factor of the test
    right_ptr,  # [P, K] bfloat16 out: the same as the right factor
    stride_xn,
    stride_rn,
    B,
    N,
    D,
    depth,
    reach,
    accumulation,
    slack,
    PLACED: tl.constexpr,  # are the points gathered in points_ptr? Else they stay where they are
    UNIT: tl.constexpr,  # are they scaled to unit length on the way?
    SKETCHED: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, K)
    real: tl.constexpr = sq_norm_ptr.dtype.element_ty
    coarse_type: tl.constexpr = coarse_ptr.dtype.element_ty
    index = tl.load(order_ptr + rows, mask=rows < N, other=0)
    length = tl.full((BLOCK_M,), 1.0, real)
    if UNIT:
        squares = tl.zeros((BLOCK_M, BLOCK_D), real)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (rows < N)[:, None] & (d < D)[None, :]
            x = _entries(
                x_ptr, rest_ptr, index, d, stride_xn, stride_rn, B, inside, real, PLACED
            )  # fmt: skip
            squares += x * x
        length = tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPSILON)
        # A point whose length overflows must not become the origin.
        length = tl.where(length < float("inf"), length, float("nan"))
        tl.store(inverse_ptr + index, 1.0 / length, mask=rows < N)
    out_row = rows.to(tl.int64) * depth
    sq_norm = tl.zeros((BLOCK_M, BLOCK_D), real)
    sq_error = tl.zeros((BLOCK_M, BLOCK_D), real)
    sketch = tl.zeros((BLOCK_M, K), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        x = _entries(
            x_ptr, rest_ptr, index, d, stride_xn, stride_rn, B, inside, real, PLACED
        )  # fmt: skip
        if UNIT:
            x = x / length[:, None]
        if PLACED:
            tl.store(points_ptr + (index * D)[:, None] + d[None, :], x, mask=inside)
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
    first = block * BLOCK_M
    if first % TILE == 0 and first < N:
        last = tl.minimum(first + TILE, N) - 1
        tl.store(first_label_ptr + first // TILE, tl.load(label_ptr + first))
        tl.store(last_label_ptr + first // TILE, tl.load(label_ptr + last))

    # As in sketch.py, except where |s~|^2 overflows: then so does 4 |x|^2, and the loss is NaN.
    if SKETCHED:
        rounded = sketch.to(tl.bfloat16).to(tl.float32)
        lost = sketch - rounded
        radius = radius.to(tl.float32) + tl.sqrt(tl.sum(lost * lost, 1)) * 1.001
        radius += accumulation * tl.sqrt(norm.to(tl.float32))
        square = tl.sum(rounded * rounded, 1)
        given = (reach + radius) * radius + 0.25 * reach * reach
        lift = given - 0.5 * square + slack * (given + square)
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


@triton.jit(do_not_specialize=["B", "N", "pairs"])
def _pull_back_kernel(
    grad_ptr,  # [N, D], the derivative of the energy in the points
    points_ptr,  # [N, D], if UNIT: they
    inverse_ptr,  # [N], if UNIT: 1 / length that a point had
    grad_output_ptr,  # [1], the derivative in the value of the loss
    totals_ptr,  # [9] float64, see potential.TOTALS
    x_grad_ptr,  # [B, D] out, if NEEDS_X
    rest_grad_ptr,  # [N - B, D] out, if NEEDS_REST
    B,
    N,
    D,
    pairs: tl.int64,  # that the energy is divided by
    TWICE: tl.constexpr,  # is the gradient that of half the energy?
    UNIT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The derivative in what the points were made of, and by the value's own derivative."""
    real: tl.constexpr = grad_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = rows.to(tl.int64) * D
    factor = tl.load(grad_output_ptr).to(real) + tl.load(totals_ptr + 6).to(real)
    factor = factor * (2.0 if TWICE else 1.0) / tl.cast(pairs, real)
    factor = tl.zeros((BLOCK_M,), real) + factor
    along = tl.zeros((BLOCK_M,), real)
    if UNIT:  # y = x / |x| varies across itself only, but for a length that was EPSILON
        inverse = tl.load(inverse_ptr + rows, mask=rows < N, other=0.0)
        factor = factor * inverse
        products = tl.zeros((BLOCK_M, BLOCK_D), real)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (rows < N)[:, None] & (d < D)[None, :]
            grad = tl.load(grad_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
            y = tl.load(points_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
            products += grad * y
        # 1 or less than it, whatever the rounding
        along = tl.where(inverse * EPSILON < 0.999, tl.sum(products, 1), 0.0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        grad = tl.load(grad_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
        if UNIT:
            y = tl.load(points_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
            grad = grad - along[:, None] * y
        grad = grad * factor[:, None]
        if NEEDS_X:
            to = x_grad_ptr + row[:, None] + d[None, :]
            tl.store(to, grad.to(x_grad_ptr.dtype.element_ty), mask=inside & (rows < B)[:, None])
        if NEEDS_REST:
            to = rest_grad_ptr + (row - tl.cast(B, tl.int64) * D)[:, None] + d[None, :]
            mask = inside & (rows >= B)[:, None]
            tl.store(to, grad.to(rest_grad_ptr.dtype.element_ty), mask=mask)
