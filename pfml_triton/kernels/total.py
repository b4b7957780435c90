"""The total kernel: from what was found for every point to the value of the loss."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float64(high, low):
    """A number that came in two parts, for a kernel takes numbers as float32."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def _nothing(sq_norm):
    """0, or NaN where squares of distances may overflow: they are up to four times as large."""
    return (sq_norm * 4).to(tl.float64) * 0


@triton.jit(do_not_specialize=["N", "M", "tiles_x", "tiles", "pairs", "B", "classes"])
def _total_kernel(
    energy_ptr,  # [N], by point, as the forces kernel left them
    attracting_ptr,  # [N] int32
    repelling_ptr,  # [N] int32
    own_class_ptr,  # [N] int32
    nearest_ptr,  # [N]
    active_ptr,  # [tiles_x] int32
    x_sq_norm_ptr,  # [N], not finite where a point is not
    y_sq_norm_ptr,  # [M]
    before_ptr,  # [9] float64, if AFTER: the totals of another field on the same points
    label_ptr,  # [B or more] int64, by point, as the caller gave them
    value_ptr,  # [1] out, the energy over `pairs`; NaN if a point is not finite, or a label wrong
    totals_ptr,  # [9] float64 out, see potential.TOTALS
    N,
    M,
    tiles_x,
    tiles: tl.int64,  # of pairs
    pairs: tl.int64,  # that the energy is divided by
    B,  # of the points, whose labels have to be in [0, classes); 0 checks none
    classes,
    att_high,  # psi of a saturated pair of one class
    att_low,
    rep_high,  # of two classes
    rep_low,
    AMONG: tl.constexpr,  # is a point among those that act on it?
    OTHERS: tl.constexpr,  # is what acts another cloud, to be looked at as well?
    AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, in the order of the points: the same sum every time."""
    i = tl.arange(0, BLOCK)
    att_constant = _float64(att_high, att_low)
    rep_constant = _float64(rep_high, rep_low)
    energy = tl.zeros((BLOCK,), tl.float64)
    attracting = tl.zeros((BLOCK,), tl.int64)
    repelling = tl.zeros((BLOCK,), tl.int64)
    own_class = tl.zeros((BLOCK,), tl.int64)
    nothing = tl.zeros((BLOCK,), tl.float64)
    nearest = tl.full((BLOCK,), float("inf"), nearest_ptr.dtype.element_ty)
    for first in tl.range(0, N, BLOCK, num_stages=3):
        row, there = first + i, first + i < N
        attracts = tl.load(attracting_ptr + row, mask=there, other=0)
        repels = tl.load(repelling_ptr + row, mask=there, other=0)
        own_class += tl.load(own_class_ptr + row, mask=there, other=0)
        constants = attracts.to(tl.float64) * att_constant + repels.to(tl.float64) * rep_constant
        energy += tl.load(energy_ptr + row, mask=there, other=0.0).to(tl.float64) - constants
        attracting += attracts
        repelling += repels
        near = tl.load(nearest_ptr + row, mask=there, other=float("inf"))
        nearest = tl.minimum(nearest, near)
        nothing += _nothing(tl.load(x_sq_norm_ptr + row, mask=there, other=0.0))
    if OTHERS:
        for first in range(0, M, BLOCK):
            row = first + i
            nothing += _nothing(tl.load(y_sq_norm_ptr + row, mask=row < M, other=0.0))
    outside = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, B, BLOCK):  # in the loop above, it would spill on sm_86 and sm_89
        row = first + i
        label = tl.load(label_ptr + row, mask=row < B, other=0)
        outside += ((label < 0) | (label >= classes)).to(tl.int32)
    active = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, tiles_x, BLOCK):
        active += tl.load(active_ptr + first + i, mask=first + i < tiles_x, other=0)

    above = tl.sum(energy, 0)
    attractions = tl.sum(attracting, 0).to(tl.float64)
    repulsions = tl.sum(repelling, 0).to(tl.float64)
    distance = tl.sqrt(tl.min(nearest, 0).to(tl.float64))
    let_through = tl.sum(active, 0).to(tl.float64)
    all_tiles = tl.cast(tiles, tl.float64)
    of_class = tl.sum(own_class, 0) - (N if AMONG else 0)
    of_others = tl.cast(N, tl.int64) * (M - 1 if AMONG else M) - of_class
    total = above + of_class.to(tl.float64) * att_constant
    total += of_others.to(tl.float64) * rep_constant
    wrong = tl.sum(outside, 0)
    none = tl.sum(nothing, 0) + tl.where(wrong > 0, float("nan"), 0.0)
    out_of_range = wrong.to(tl.float64)
    if AFTER:
        above += tl.load(before_ptr)
        attractions += tl.load(before_ptr + 1)
        repulsions += tl.load(before_ptr + 2)
        distance = tl.minimum(distance, tl.load(before_ptr + 3))
        let_through += tl.load(before_ptr + 4)
        total += tl.load(before_ptr + 5)
        none += tl.load(before_ptr + 6)
        all_tiles += tl.load(before_ptr + 7)
        out_of_range += tl.load(before_ptr + 8)
    tl.store(totals_ptr, above)
    tl.store(totals_ptr + 1, attractions)
    tl.store(totals_ptr + 2, repulsions)
    tl.store(totals_ptr + 3, distance)
    tl.store(totals_ptr + 4, let_through)
    tl.store(totals_ptr + 5, total)
    tl.store(totals_ptr + 6, none)
    tl.store(totals_ptr + 7, all_tiles)
    tl.store(totals_ptr + 8, out_of_range)
    total = total / tl.cast(pairs, tl.float64)
    tl.store(value_ptr, (total + none).to(value_ptr.dtype.element_ty))
