"""The forces kernel: nominate with a matrix product, evaluate from differences.

A program owns BLOCK_M points and walks the tiles of other points that may act on them.

*Nominate.* One tensor-core product of the coarse (bfloat16) points gives every squared distance of
the tile to within a proven margin, whatever the dtype of the points. Let x~ be the coarse point and
r_x >= |x - x~| its radius: the true distance d and that of the coarse points, d~, differ by at most
r_x + r_y. The computed square of d~,

    s = |x~|^2 + |y~|^2 - 2 x~.y~        over a depth of K,

is made of products that are exact in float32, and of sums of K terms. Tensor cores align the terms
of an addition to the largest and truncate, so an addition is off by at most 2^-23 of that, and no
term and no partial sum exceeds |x~| |y~| <= (|x~|^2 + |y~|^2) / 2. The product is off by at most
K 2^-23 (|x~|^2 + |y~|^2), the norms by half as much, and a few roundings follow. With slack =
(2 K + 16) 2^-23, |s - d~^2| <= slack (|x~|^2 + |y~|^2), and a pair can exert force only if

    classes differ and  s <  (delta_rep + r_x + r_y)^2 + slack (|x~|^2 + |y~|^2),  or
    classes agree  and  s >= max(delta - r_x - r_y, 0)^2 - slack (|x~|^2 + |y~|^2).

*Evaluate.* Few pairs of a trained embedding pass. They are taken one a row at a time, in the order
of their columns, and their distance, energy and force come from the difference x - y in float32:
no cancellation, however near the points or large their norm, and the same bits every time. The
matrix product decides nothing but who is looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _phi_and_stiffness(d2, alpha, residue, ALPHA: tl.constexpr, IS_INTEGER: tl.constexpr):
    """phi(d) and k(d) = -phi'(d) / d at d^2 > 0, where alpha = ALPHA + residue, |residue| <= 1/2.

    The integer part by multiplications: an exponential of all of alpha log d would lose as many
    bits as that number has before its point.
    """
    inverse = tl.rsqrt(d2)
    if IS_INTEGER and ALPHA == 0:
        phi = tl.log(inverse)
        stiffness = inverse * inverse
    else:
        phi = inverse * 0 + 1
        for power in tl.static_range(ALPHA):
            phi = phi * inverse
        if not IS_INTEGER:
            phi = phi * tl.exp2(residue * tl.log2(inverse))
        stiffness = alpha * phi * inverse * inverse
    return phi, stiffness


@triton.jit
def _square(length, real: tl.constexpr):
    length = tl.full((1,), length, real)
    return length * length


@triton.jit
def _difference(x_ptr, x_row, y_ptr, y_row, d):
    """x - y of BLOCK_M pairs at the depths d [BLOCK_D], in float32 (float64 for float64 points)."""
    x = tl.load(x_ptr + x_row[:, None] + d[None, :])
    y = tl.load(y_ptr + y_row[:, None] + d[None, :])
    real = tl.float64 if x.dtype == tl.float64 else tl.float32
    return x.to(real) - y.to(real)


@triton.jit(do_not_specialize=["N"])
def _force_kernel(
    x_ptr,  # [P, depth], points that are acted on; padded rows are zero
    x_coarse_ptr,  # [P, depth] bfloat16, the same rounded
    x_label_ptr,  # [P] int64
    x_sq_norm_ptr,  # [P], |coarse|^2; NaN in padded rows
    x_radius_ptr,  # [P], >= |point - coarse|
    order_ptr,  # [N] int64, the row of grad and energy that each row of x belongs to
    y_ptr,  # [Q, depth], points that act, packed like x
    y_coarse_ptr,  # [Q, depth]
    y_label_ptr,  # [Q]
    y_sq_norm_ptr,  # [Q]
    y_radius_ptr,  # [Q]
    tiles_ptr,  # [P / BLOCK_M, at most Q / BLOCK_N] int32, active tiles of y for every tile of x
    counts_ptr,  # [P / BLOCK_M] int32, how many
    energy_ptr,  # [N] out, energy of every point from the pairs that exert force on it
    attracting_ptr,  # [N] int32 out, how many of them attract
    repelling_ptr,  # [N] int32 out, how many repel
    grad_ptr,  # [N, D] out, the derivative of the energy in the point
    stride_tiles,
    stride_counts,
    N,
    D,
    depth,
    coarse_depth,
    alpha,
    residue,
    att_radius,
    rep_radius,
    min_distance,
    slack,
    ALPHA: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile_x = tl.program_id(0)
    first_slice = tl.program_id(1) * SLICES
    real = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32

    # Offsets that grow with the cloud are int64 and scalar; what is left inside a tile is int32.
    rows = tile_x * BLOCK_M + tl.arange(0, BLOCK_M)
    in_x = tl.arange(0, BLOCK_M)
    in_y = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    x_tile = x_ptr + (tile_x * BLOCK_M).to(tl.int64) * depth
    x_coarse_tile = x_coarse_ptr + (tile_x * BLOCK_M).to(tl.int64) * depth
    x_label = tl.load(x_label_ptr + rows)
    x_sq_norm = tl.load(x_sq_norm_ptr + rows)
    x_radius = tl.load(x_radius_ptr + rows)

    att_sq_radius = _square(att_radius, real)
    rep_sq_radius = _square(rep_radius, real)
    core_sq_radius = _square(min_distance, real)

    energy = tl.zeros((BLOCK_M,), real)
    attracting = tl.zeros((BLOCK_M,), tl.int32)
    repelling = tl.zeros((BLOCK_M,), tl.int32)
    grad = ()
    for i in tl.static_range(SLICES):
        grad = grad + (tl.zeros((BLOCK_M, BLOCK_D), real),)

    for t in range(tl.load(counts_ptr + tile_x * stride_counts)):
        tile_y = tl.load(tiles_ptr + tile_x.to(tl.int64) * stride_tiles + t)
        cols = tile_y * BLOCK_N + in_y
        y_tile = y_ptr + (tile_y * BLOCK_N).to(tl.int64) * depth
        y_coarse_tile = y_coarse_ptr + (tile_y * BLOCK_N).to(tl.int64) * depth

        # Nominate
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, coarse_depth, BLOCK_K):
            a = tl.load(x_coarse_tile + in_x[:, None] * depth + (start + k)[None, :])
            b = tl.load(y_coarse_tile + in_y[None, :] * depth + (start + k)[:, None])
            product = tl.dot(a, b, product)
        norms = x_sq_norm[:, None] + tl.load(y_sq_norm_ptr + cols)[None, :]
        margin = x_radius[:, None] + tl.load(y_radius_ptr + cols)[None, :]
        coarse_d2 = norms - 2.0 * product
        outer = rep_radius + margin
        inner = tl.maximum(att_radius - margin, 0.0)
        same = x_label[:, None] == tl.load(y_label_ptr + cols)[None, :]
        nominated = tl.where(
            same,
            coarse_d2 >= inner * inner - slack * norms,
            coarse_d2 < outer * outer + slack * norms,
        )
        waiting = nominated.to(tl.int32)
        tile_energy = tl.zeros((BLOCK_M,), real)

        # Evaluate
        for turn in range(tl.max(tl.sum(waiting, 1), 0)):
            first = tl.min(tl.where(waiting != 0, in_y[None, :], BLOCK_N), 1)
            waiting = tl.where(in_y[None, :] == first[:, None], 0, waiting)
            taken = first < BLOCK_N
            chosen = tl.where(taken, first, 0)
            squares = tl.zeros((BLOCK_M, BLOCK_D), real)
            for start in range(0, depth, BLOCK_D):
                difference = _difference(x_tile, in_x * depth, y_tile, chosen * depth, start + d)
                squares += difference * difference
            d2 = tl.sum(squares, 1)
            y_label = tl.load(y_label_ptr + tile_y * BLOCK_N + chosen)
            attracts = taken & (x_label == y_label) & (d2 >= att_sq_radius)
            repels = taken & (x_label != y_label) & (d2 < rep_sq_radius)
            attracting += attracts.to(tl.int32)
            repelling += repels.to(tl.int32)
            clipped = tl.maximum(d2, core_sq_radius)
            phi, stiffness = _phi_and_stiffness(clipped, alpha, residue, ALPHA, IS_INTEGER)
            repulsion = phi + 0.5 * stiffness * (clipped - d2)
            tile_energy += tl.where(attracts, -phi, tl.where(repels, repulsion, 0.0))
            if NEEDS_GRAD:
                weight = tl.where(attracts, stiffness, tl.where(repels, -stiffness, 0.0))
                updated = ()
                for i in tl.static_range(SLICES):
                    difference = _difference(
                        x_tile,
                        in_x * depth,
                        y_tile,
                        chosen * depth,
                        (first_slice + i) * BLOCK_D + d,
                    )
                    updated = updated + (grad[i] + weight[:, None] * difference,)
                grad = updated
        energy += tile_energy

    owned = rows < N
    out_row = tl.load(order_ptr + rows, mask=owned, other=0)
    if first_slice == 0:
        tl.store(energy_ptr + out_row, energy, mask=owned)
        tl.store(attracting_ptr + out_row, attracting, mask=owned)
        tl.store(repelling_ptr + out_row, repelling, mask=owned)
    if NEEDS_GRAD:
        for i in tl.static_range(SLICES):
            depths = (first_slice + i) * BLOCK_D + d
            tl.store(
                grad_ptr + out_row[:, None] * D + depths[None, :],
                grad[i],
                mask=owned[:, None] & (depths < D)[None, :],
            )
