"""Lists of active tiles, and how the long ones are shared out.

The list of a row tile is never written down: the bits of the filter and the label ranges are one in
the order of the columns, N^2 / 2048 bytes in all. A program takes at most `budget` tiles of a list,
and what is left goes to *extra* programs, so that no program is left alone with a long list. Their
number is limited by the memory for their sums, so the budget is what that takes: with E extra
programs at hand and T active tiles in all, a budget of T / E or more needs at most E of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _active_tiles(
    near_ptr,  # [P / 16, Q / 128] uint8, see filter.py
    stride_near,
    tile_x,  # a tile of 16 rows
    x_first_label,
    x_last_label,
    first,
    tiles_y,
    y_first_label_ptr,  # [Q / 64], the first label of each tile of 64 columns
    y_last_label_ptr,  # [Q / 64]
    CHUNK: tl.constexpr,
):
    """Which of the CHUNK tiles of 64 columns from `first` on are active: [CHUNK] int32, 0 or 1."""
    tile_y = first + tl.arange(0, CHUNK)
    exists = tile_y < tiles_y
    byte = tl.load(near_ptr + tile_x.to(tl.int64) * stride_near + tile_y // 2, mask=exists, other=0)
    is_near = ((byte.to(tl.int32) >> (tile_y % 2 * 4)) & 15) != 0
    y_first_label = tl.load(y_first_label_ptr + tile_y, mask=exists, other=0)
    y_last_label = tl.load(y_last_label_ptr + tile_y, mask=exists, other=0)
    shares_label = (x_first_label <= y_last_label) & (y_first_label <= x_last_label)
    return (exists & (is_near | shares_label)).to(tl.int32)


@triton.jit(do_not_specialize=["stride_near", "N", "tiles_y"])
def _count_kernel(
    x_label_ptr,  # [N] int64 or int32, as all labels
    near_ptr,  # [P / 16, Q / 128] uint8
    y_first_label_ptr,  # [Q / 64]
    y_last_label_ptr,  # [Q / 64]
    count_ptr,  # [P / 16] int32 out, the length of each list
    stride_near,
    N,
    tiles_y,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile_x = tl.program_id(0)
    x_first_label = tl.load(x_label_ptr + tile_x * BLOCK_M)
    x_last_label = tl.load(x_label_ptr + tl.minimum(tile_x * BLOCK_M + BLOCK_M, N) - 1)
    count = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, tiles_y, CHUNK):
        count += _active_tiles(
            near_ptr, stride_near, tile_x, x_first_label, x_last_label,
            first, tiles_y, y_first_label_ptr, y_last_label_ptr, CHUNK,
        )  # fmt: skip
    tl.store(count_ptr + tile_x, tl.sum(count, 0))


@triton.jit(do_not_specialize=["tiles_x", "extra"])
def _plan_kernel(
    count_ptr,  # [tiles_x] int32
    extra_ptr,  # [tiles_x] int32 out, extra programs of all lists up to and with this one
    budget_ptr,  # [1] int32 out, tiles of a list that one program takes
    tiles_x,
    extra,  # programs at hand
    least,  # the smallest budget
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, tiles_x, BLOCK):
        total += tl.load(count_ptr + first + i, mask=first + i < tiles_x, other=0)
    budget = tl.maximum(tl.cdiv(tl.sum(total, 0), extra), least).to(tl.int32)
    tl.store(budget_ptr, budget)
    before = 0
    for first in range(0, tiles_x, BLOCK):
        count = tl.load(count_ptr + first + i, mask=first + i < tiles_x, other=0)
        more = tl.maximum(count - 1, 0) // budget
        tl.store(extra_ptr + first + i, before + tl.cumsum(more, 0), mask=first + i < tiles_x)
        before += tl.sum(more, 0)


@triton.jit(do_not_specialize=["N"])
def _join_kernel(
    extra_ptr,  # [tiles_x] int32
    order_ptr,  # [N] int64
    energy_ptr,  # [N + 16 E], the sums of the extra programs behind those of the points
    attracting_ptr,  # [N + 16 E] int32
    repelling_ptr,  # [N + 16 E] int32
    own_class_ptr,  # [N + 16 E] int32
    nearest_ptr,  # [N + 16 E]
    grad_ptr,  # [N + 16 E, D]
    N,
    D,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the sums of the extra programs to those of their points, in the order of the list."""
    tile_x = tl.program_id(0)
    begin = tl.load(extra_ptr + tile_x - 1, mask=tile_x > 0, other=0)
    end = tl.load(extra_ptr + tile_x)
    if begin == end:
        return
    i = tl.arange(0, BLOCK_M)
    owned = tile_x * BLOCK_M + i < N
    row = tl.load(order_ptr + tile_x * BLOCK_M + i, mask=owned, other=0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tl.program_id(1) == 0:
        energy = tl.load(energy_ptr + row)
        attracting = tl.load(attracting_ptr + row)
        repelling = tl.load(repelling_ptr + row)
        own_class = tl.load(own_class_ptr + row)
        nearest = tl.load(nearest_ptr + row)
        for e in range(begin, end):
            part = N + e * BLOCK_M + i
            energy += tl.load(energy_ptr + part)
            attracting += tl.load(attracting_ptr + part)
            repelling += tl.load(repelling_ptr + part)
            own_class += tl.load(own_class_ptr + part)
            nearest = tl.minimum(nearest, tl.load(nearest_ptr + part))
        tl.store(energy_ptr + row, energy, mask=owned)
        tl.store(attracting_ptr + row, attracting, mask=owned)
        tl.store(repelling_ptr + row, repelling, mask=owned)
        tl.store(own_class_ptr + row, own_class, mask=owned)
        tl.store(nearest_ptr + row, nearest, mask=owned)
    if NEEDS_GRAD:
        mask = owned[:, None] & (d < D)[None, :]
        offset = row[:, None] * D + d[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask)
        for e in range(begin, end):
            part = (N + e * BLOCK_M + i).to(tl.int64)
            grad += tl.load(grad_ptr + part[:, None] * D + d[None, :], mask=mask)
        tl.store(grad_ptr + offset, grad, mask=mask)
