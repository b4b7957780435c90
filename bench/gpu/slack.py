"""How far bfloat16 products are off on this chip, over what sketch.py and forces.py allow for.

A share above 1 would break the proof that no pair is overlooked. The blocks are those of the
kernels, so that the same instructions are met: on sm_90, mma.sync with 16 and 32 rows, and wgmma
with more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.rig import Rig

N = 256
BLOCKS = {"forces": (16, 64, 128, 8), "pack": (32, 64, 64, 8), "filter": (128, 256, 64, 4)}
KINDS = ("normal", "same sign", "large first", "parallel")


@triton.jit
def _product_kernel(
    x_ptr,  # [N, K] bfloat16
    y_ptr,  # [N, K]
    out_ptr,  # [N, N] float32 out
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(y_ptr + n[None, :] * K + (start + k)[:, None])
        product = tl.dot(a, b, product)
    tl.store(out_ptr + m[:, None] * N + n[None, :], product)


def slack(rig: Rig) -> None:
    """Every block, depth and kind of points."""
    torch.manual_seed(0)
    for blocks in BLOCKS:
        depths = (64,) if blocks == "filter" else (128,) if rig.rehearses else (512, 4096)
        for depth in depths:
            for kind in KINDS:
                with rig.guarded("slack", blocks=blocks, kind=kind, depth=depth):
                    most = shares(blocks, *points(kind, depth, rig.device))
                    passed = all(share <= 1 for share in most.values())
                    rig.row("slack", blocks=blocks, kind=kind, depth=depth, **most, passed=passed)


def points(kind: str, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two times N points [N, depth] whose sums wander, only grow, begin large, or are as large as
    their lengths allow; values of bfloat16."""
    x, y = torch.randn(2, N, depth, device=device).unbind()
    if kind == "same sign":
        x, y = 0.5 + torch.rand_like(x) / 2, 0.5 + torch.rand_like(y) / 2
    if kind == "large first":
        x, y = x.abs(), y.abs()
        x[:, 0] = y[:, 0] = depth**0.5
    if kind == "parallel":
        y = x
    # The interpreter has no products of bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return x.bfloat16().to(dtype), y.bfloat16().to(dtype)


def shares(blocks: str, x: Tensor, y: Tensor) -> dict[str, float]:
    """The largest error of a product, of a squared distance and of a sketch over its bound."""
    block_m, block_n, block_k, warps = BLOCKS[blocks]
    depth = x.shape[1]
    product = torch.full((N, N), torch.nan, device=x.device)
    _product_kernel[N // block_m, N // block_n](
        x, y, product, N, depth, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    wide_x, wide_y = x.double(), y.double()
    off = (product.double() - wide_x @ wide_y.T).abs()
    squares = wide_x.square().sum(1)[:, None], wide_y.square().sum(1)
    norms, lengths = squares[0] + squares[1], (squares[0] * squares[1]).sqrt()
    found = x.float().square().sum(1)[:, None] + y.float().square().sum(1) - 2 * product
    true = torch.cdist(wide_x, wide_y, compute_mode="donot_use_mm_for_euclid_dist").square()
    of_bound = {
        "product": off / (depth * 2.0**-24 * norms),  # K 2^-23 of half the norms
        "distance": (found.double() - true).abs() / ((2 * depth + 16) * 2.0**-23 * norms),
        "sketch": off / ((depth + 16) * 2.0**-23 * lengths),
    }
    return {name: float(share.max()) for name, share in of_bound.items()}
