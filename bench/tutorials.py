"""A blocked matrix product and FlashAttention-2, as Triton's tutorials 03 and 06 structure them.

Written to be compiled and read, beside the published speed of those tutorials; see validation.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N], or its transpose
    c_ptr,  # [M, N] out, float16
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    GROUP: tl.constexpr,  # rows of blocks that are walked together, so that L2 keeps what they read
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first_m, GROUP)
    block_m = first_m + program % (GROUP * blocks_n) % height
    block_n = program % (GROUP * blocks_n) // height

    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak
    b_tile = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        a = tl.load(a_tile, mask=k[None, :] < left, other=0.0)
        b = tl.load(b_tile, mask=k[:, None] < left, other=0.0)
        total = tl.dot(a, b, total)
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_tile = c_ptr + rows[:, None] * stride_cm + columns[None, :] * stride_cn
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c_tile, total.to(tl.float16), mask=inside)


@triton.jit
def _mix(logits, scale, mixed, total, largest):
    """One step of the softmax over all keys: the sums so far shrink to the new maximum."""
    larger = tl.maximum(largest, tl.max(logits, 1) * scale)
    p = tl.exp2(logits * scale - larger[:, None])
    shrink = tl.exp2(largest - larger)
    return mixed * shrink[:, None], total * shrink + tl.sum(p, 1), larger, p.to(tl.float16)


@triton.jit
def _attention_kernel(
    scale,
    lse_ptr,  # [Z H, L] out, log2 of the sums
    q_ptr,  # [Z H L, D] float16, and so are k, v and out
    k_ptr,
    v_ptr,
    out_ptr,
    rows,  # Z H L
    L,  # length of the context
    CAUSAL: tl.constexpr,  # a query looks at the keys up to its own place, or at all of its head
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qs = tl.make_tensor_descriptor(q_ptr, [rows, D], [D, 1], [BLOCK_M, D])
    ks = tl.make_tensor_descriptor(k_ptr, [rows, D], [D, 1], [BLOCK_N, D])
    vs = tl.make_tensor_descriptor(v_ptr, [rows, D], [D, 1], [BLOCK_N, D])
    outs = tl.make_tensor_descriptor(out_ptr, [rows, D], [D, 1], [BLOCK_M, D])
    head = tl.program_id(1) * L
    first = head + tl.program_id(0) * BLOCK_M
    scale *= 1.44269504  # so that exp2 does for exp
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    q = qs.load([first, 0])
    end = L
    if CAUSAL:
        end = tl.program_id(0) * BLOCK_M
    for start in range(0, end, BLOCK_N):
        logits = tl.dot(q, ks.load([head + start, 0]).T)
        mixed, total, largest, p = _mix(logits, scale, mixed, total, largest)
        mixed = tl.dot(p, vs.load([head + start, 0]), mixed)
    if CAUSAL:
        query = end + tl.arange(0, BLOCK_M)
        for start in range(end, end + BLOCK_M, BLOCK_N):
            logits = tl.dot(q, ks.load([head + start, 0]).T)
            seen = query[:, None] >= (start + tl.arange(0, BLOCK_N))[None, :]
            logits = logits * scale + tl.where(seen, 0, -1.0e6)
            mixed, total, largest, p = _mix(logits, 1.0, mixed, total, largest)
            mixed = tl.dot(p, vs.load([head + start, 0]), mixed)
    tl.store(lse_ptr + first + tl.arange(0, BLOCK_M), largest + tl.log2(total))
    outs.store([first, 0], (mixed / total[:, None]).to(tl.float16))
