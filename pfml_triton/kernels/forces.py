"""The forces kernel: nominate with a matrix product, evaluate from differences.

A program owns BLOCK_M points and walks the active tiles of other points; where that list is long,
extra programs take parts of it (plan.py).

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

from .plan import _active_tiles


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
def _at(row, d, D, PADDED: tl.constexpr):
    """Entries d [BLOCK_D] of BLOCK_M points that start at `row`."""
    entries = row[:, None] + d[None, :]
    if PADDED:
        values = tl.load(entries, mask=(d < D)[None, :], other=0.0)
    else:
        values = tl.load(entries)
    return values


@triton.jit
def _difference(x_row, y, d, D, PADDED: tl.constexpr, real: tl.constexpr):
    """x - y at the depths d, in float32 (float64 for float64 points)."""
    return _at(x_row, d, D, PADDED).to(real) - y.to(real)


@triton.jit(do_not_specialize=["stride_near", "N", "M", "tiles_x", "tiles_y", "steps"])
def _force_kernel(
    x_ptr,  # [N, D], the points that are acted on, as the caller has them
    x_order_ptr,  # [N] int64, which of them comes in which row
    x_coarse_ptr,  # [P, depth] bfloat16, the same in that order, rounded
    x_label_ptr,  # [N] int64 or int32, as all labels
    x_sq_norm_ptr,  # [P], |coarse|^2; NaN in padded rows
    x_radius_ptr,  # [P], >= |point - coarse|
    y_ptr,  # [M, D], the points that act
    y_order_ptr,  # [M] int64
    y_coarse_ptr,  # [Q, depth]
    y_label_ptr,  # [M]
    y_sq_norm_ptr,  # [Q]
    y_radius_ptr,  # [Q]
    y_first_label_ptr,  # [Q / BLOCK_N]
    y_last_label_ptr,  # [Q / BLOCK_N]
    near_ptr,  # [P / 16, Q / 128] uint8, see filter.py
    extra_ptr,  # [tiles_x] int32, see plan.py
    budget_ptr,  # [1] int32
    # Rows from N on, here and in grad, are those of the E extra programs.
    energy_ptr,  # [N + 16 E] out, energy of every point from the pairs that exert force on it
    attracting_ptr,  # [N + 16 E] int32 out, how many of them attract
    repelling_ptr,  # [N + 16 E] int32 out, how many repel
    own_class_ptr,  # [N + 16 E] int32 out, how many there are of its class, exerting force or not
    nearest_ptr,  # [N + 16 E] out, the smallest d^2 of those that repel
    active_ptr,  # [tiles_x] int32 out, active tiles of each row tile
    grad_ptr,  # [N + 16 E, D] out, the derivative of the energy in the point
    stride_xn,
    stride_yn,
    stride_near,
    N,
    M,
    D,
    depth,
    coarse_depth,
    tiles_x,
    tiles_y,
    steps,  # of a binary search in tiles_x
    alpha,
    residue,
    att_radius,
    rep_radius,
    min_distance,
    slack,
    ALPHA: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    SHARED_OUT: tl.constexpr,  # are there extra programs?
    PADDED: tl.constexpr,  # is depth more than D?
    WHOLE: tl.constexpr,  # does this program have all of the depth, unpadded?
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile_x = tl.program_id(0)
    first_slice = tl.program_id(1) * SLICES
    real = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32

    # Which part of which list
    begin = 0
    end = tiles_y
    extra = tile_x - tiles_x
    if SHARED_OUT:
        budget = tl.load(budget_ptr)
        end = budget
        if extra >= 0:
            if extra >= tl.load(extra_ptr + tiles_x - 1):
                return
            low = 0  # the first row tile with more extra programs up to and with it than `extra`
            high = tiles_x - 1
            for step in range(steps):
                middle = (low + high) // 2
                is_after = tl.load(extra_ptr + middle) <= extra
                low = tl.where(is_after, middle + 1, low)
                high = tl.where(is_after, high, middle)
            tile_x = low
            before = tl.load(extra_ptr + tile_x - 1, mask=tile_x > 0, other=0)
            begin = (extra - before + 1) * budget
            end = begin + budget

    # Offsets that grow with the cloud are int64 and scalar; what is left inside a tile is int32.
    in_x = tl.arange(0, BLOCK_M)
    in_y = tl.arange(0, BLOCK_N)
    in_chunk = tl.arange(0, CHUNK)
    rows = tile_x * BLOCK_M + in_x
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    x_order = tl.load(x_order_ptr + rows, mask=rows < N, other=0)
    x_row = x_ptr + x_order * stride_xn
    x_coarse_tile = x_coarse_ptr + (tile_x * BLOCK_M).to(tl.int64) * depth
    x_label = tl.load(x_label_ptr + rows, mask=rows < N, other=0)
    x_sq_norm = tl.load(x_sq_norm_ptr + rows)
    x_radius = tl.load(x_radius_ptr + rows)
    x_first_label = tl.load(x_label_ptr + tile_x * BLOCK_M)
    x_last_label = tl.load(x_label_ptr + tl.minimum(tile_x * BLOCK_M + BLOCK_M, N) - 1)

    att_sq_radius = _square(att_radius, real)
    rep_sq_radius = _square(rep_radius, real)
    core_sq_radius = _square(min_distance, real)

    energy = tl.zeros((BLOCK_M,), real)
    attracting = tl.zeros((BLOCK_M,), tl.int32)
    repelling = tl.zeros((BLOCK_M,), tl.int32)
    own_class = tl.zeros((BLOCK_M,), tl.int32)
    nearest = tl.full((BLOCK_M,), float("inf"), real)
    grad = ()
    for i in tl.static_range(SLICES):
        grad = grad + (tl.zeros((BLOCK_M, BLOCK_D), real),)

    active = 0
    for first in range(0, tiles_y, CHUNK):
        listed = _active_tiles(
            near_ptr, stride_near, tile_x, x_first_label, x_last_label,
            first, tiles_y, y_first_label_ptr, y_last_label_ptr, CHUNK,
        )  # fmt: skip
        ahead = active
        active += tl.sum(listed, 0)
        if SHARED_OUT:
            rank = ahead + tl.cumsum(listed, 0) - listed
            listed = tl.where((rank >= begin) & (rank < end), listed, 0)
        for entry in range(tl.sum(listed, 0)):
            in_list = tl.min(tl.where(listed != 0, in_chunk, CHUNK), 0)
            listed = tl.where(in_chunk == in_list, 0, listed)
            tile_y = first + in_list
            cols = tile_y * BLOCK_N + in_y
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
            y_label = tl.load(y_label_ptr + cols, mask=cols < M, other=0)
            same = (x_label[:, None] == y_label[None, :]) & (cols < M)[None, :]
            own_class += tl.sum(same.to(tl.int32), 1)  # a tile that shares a label is active
            nominated = tl.where(
                same,
                coarse_d2 >= inner * inner - slack * norms,
                coarse_d2 < outer * outer + slack * norms,
            )
            waiting = nominated.to(tl.int32)
            tile_energy = tl.zeros((BLOCK_M,), real)

            # Evaluate
            for turn in range(tl.max(tl.sum(waiting, 1), 0)):
                column = tl.min(tl.where(waiting != 0, in_y[None, :], BLOCK_N), 1)
                waiting = tl.where(in_y[None, :] == column[:, None], 0, waiting)
                # From here on in the layout of the points, whatever that of the product is: else
                # every slice of a difference would be converted to it, through shared memory.
                column = tl.gather(column, in_x, 0)
                taken = column < BLOCK_N
                chosen = tile_y * BLOCK_N + tl.where(taken, column, 0)
                y_row = y_ptr + tl.load(y_order_ptr + chosen) * stride_yn
                # Fused explicitly: the same bits with and without the gradient.
                squares = tl.zeros((BLOCK_M, BLOCK_D), real)
                differences = ()
                if WHOLE:  # one look at the points does for distance and gradient
                    ys = ()  # asked for together, so that one wait does for all
                    for i in tl.static_range(SLICES):
                        ys = ys + (_at(y_row, i * BLOCK_D + d, D, PADDED),)
                    for i in tl.static_range(SLICES):
                        difference = _difference(x_row, ys[i], i * BLOCK_D + d, D, PADDED, real)
                        squares = tl.fma(difference, difference, squares)
                        differences = differences + (difference,)
                else:
                    for start in range(0, depth, BLOCK_D):
                        y = _at(y_row, start + d, D, PADDED)
                        difference = _difference(x_row, y, start + d, D, PADDED, real)
                        squares = tl.fma(difference, difference, squares)
                d2 = tl.sum(squares, 1)
                chosen_label = tl.load(y_label_ptr + chosen)
                attracts = taken & (x_label == chosen_label) & (d2 >= att_sq_radius)
                repels = taken & (x_label != chosen_label) & (d2 < rep_sq_radius)
                attracting += attracts.to(tl.int32)
                repelling += repels.to(tl.int32)
                nearest = tl.where(repels, tl.minimum(nearest, d2), nearest)
                clipped = tl.maximum(d2, core_sq_radius)
                phi, stiffness = _phi_and_stiffness(clipped, alpha, residue, ALPHA, IS_INTEGER)
                repulsion = tl.fma(0.5 * stiffness, clipped - d2, phi)
                tile_energy += tl.where(attracts, -phi, tl.where(repels, repulsion, 0.0))
                if NEEDS_GRAD:
                    weight = tl.where(attracts, stiffness, tl.where(repels, -stiffness, 0.0))
                    updated = ()
                    for i in tl.static_range(SLICES):
                        if WHOLE:
                            difference = differences[i]
                        else:
                            depths = (first_slice + i) * BLOCK_D + d
                            y = _at(y_row, depths, D, PADDED)
                            difference = _difference(x_row, y, depths, D, PADDED, real)
                        updated = updated + (grad[i] + weight[:, None] * difference,)
                    grad = updated
            energy += tile_energy

    owned = rows < N
    out_row = x_order
    if SHARED_OUT:
        row_of_extra = extra * BLOCK_M + in_x
        out_row = tl.where(row_of_extra >= 0, (N + row_of_extra).to(tl.int64), out_row)
        owned = owned | (row_of_extra >= 0)
    if first_slice == 0:
        tl.store(energy_ptr + out_row, energy, mask=owned)
        tl.store(attracting_ptr + out_row, attracting, mask=owned)
        tl.store(repelling_ptr + out_row, repelling, mask=owned)
        tl.store(own_class_ptr + out_row, own_class, mask=owned)
        tl.store(nearest_ptr + out_row, nearest, mask=owned)
        if extra < 0:
            tl.store(active_ptr + tile_x, active)
    if NEEDS_GRAD:
        for i in tl.static_range(SLICES):
            depths = (first_slice + i) * BLOCK_D + d
            tl.store(
                grad_ptr + out_row[:, None] * D + depths[None, :],
                grad[i],
                mask=owned[:, None] & (depths < D)[None, :],
            )
