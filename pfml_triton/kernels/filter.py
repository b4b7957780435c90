"""The filter kernel: which tiles of 16 x 16 pairs may hold a pair that repels?

One product of sketches a tile (sketch.py), and a maximum: the test is whether a product is
positive. The answers of a block are packed into bits by the threads that hold its products, so that
little crosses from thread to thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["stride_near", "blocks_y"])
def _filter_kernel(
    left_ptr,  # [P, K] bfloat16, left factors of the points that are acted on
    right_ptr,  # [Q, K] bfloat16, right factors of those that act
    near_ptr,  # [P / 16, Q / 128] uint8 out: bit b of byte B is the tile 8 B + b of 16 columns
    stride_near,
    blocks_y,  # Q / BLOCK_N
    MUTUAL: tl.constexpr,  # both clouds are one: do what is above the diagonal, and mirror it
    K: tl.constexpr,
    STRIP: tl.constexpr,  # blocks of columns that a program walks
    BLOCK_M: tl.constexpr,  # 128, so that a mirrored answer is one byte
    BLOCK_N: tl.constexpr,  # 128 or 256
):
    TILES_M: tl.constexpr = BLOCK_M // 16
    TILES_N: tl.constexpr = BLOCK_N // 16
    block_x = tl.program_id(0)
    tile_x = tl.arange(0, TILES_M)
    tile_y = tl.arange(0, TILES_N)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, K)
    # Column n of the product is column 8, 16 and 32 of each 64 in turn, so that the 16 columns of a
    # tile are registers and lanes of one warp even where mma.sync deals columns 8 and 16 to others.
    column = (n & -64) | ((n & 32) >> 2) | ((n & 24) << 1) | (n & 7)
    bit = 4 * tl.arange(0, TILES_N // 4)[:, None] + tl.arange(0, 4)[None, :]

    rows = left_ptr + (block_x * BLOCK_M).to(tl.int64) * K
    a = tl.load(rows + m[:, None] * K + k[None, :])
    above_ptr = near_ptr + (block_x * TILES_M + tile_x).to(tl.int64) * stride_near
    first = tl.program_id(1) * STRIP
    last = tl.minimum(first + STRIP, blocks_y)
    if MUTUAL:
        first = tl.maximum(first, block_x * BLOCK_M // BLOCK_N)
    for block_y in range(first, last):
        columns = right_ptr + tl.cast(block_y, tl.int64) * (BLOCK_N * K)
        b = tl.load(columns + column[None, :] * K + k[:, None])
        product = tl.reshape(tl.dot(a, b), (TILES_M, 2, 8, TILES_N // 4, 2, 4, 4, 2))
        largest = tl.max(tl.max(tl.max(product, 7), 4), 1)  # inside a thread, for NVIDIA's layouts
        bits = tl.where(largest < 0, 0, 1 << bit[None, None, :, :, None])
        bits = tl.sum(tl.sum(bits, 3), 2)  # of one thread
        word = tl.reduce(tl.reduce(bits, 2, _either), 1, _either)  # [TILES_M]
        if BLOCK_N == 256:
            to = (above_ptr + 2 * block_y).to(tl.pointer_type(tl.int16))
            tl.store(to, word.to(tl.int16))
        else:
            tl.store(above_ptr + block_y, word.to(tl.uint8))
        if MUTUAL:
            mirrored = tl.sum(((word[:, None] >> tile_y[None, :]) & 1) << tile_x[:, None], 0)
            to = near_ptr + (block_y * TILES_N + tile_y).to(tl.int64) * stride_near + block_x
            # Rows that reach above the diagonal themselves have their own program.
            below = block_y * BLOCK_N + 0 * tile_y >= (block_x + 1) * BLOCK_M
            tl.store(to, mirrored.to(tl.uint8), mask=below)
