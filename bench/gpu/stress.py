"""Do pack and filter write the same bits every time beside a product on another stream, and right?

Compilers have dropped a wait between an asynchronous copy, or a product, and the next use of its
memory. Such a race shows as bits that change from call to call; a fault that stays shows against
float64, within the bounds that pfml_triton/sketch.py proves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.clocks import wait
from bench.gpu.rig import Rig, bits
from bench.providers import POTENTIAL
from pfml_triton.kernels import launch
from pfml_triton.sketch import LIFT, SLACK, random_basis, turned_basis

SINGLE, BRAIN = torch.float32, torch.bfloat16
CASES = (("sop", SINGLE), ("cub", SINGLE), ("cub", BRAIN), ("vit-sop", SINGLE))
REPEATS, LOOK = 5000, 500  # calls, and after how many a row tells of them
PRODUCT = 4096  # rows and columns of what is multiplied beside
_UNIT = 2.0**-23
_ROWS = 1024  # of the filter's product in float64 at a time


def stress(rig: Rig) -> None:
    """Every case in turn, the largest grid first."""
    for size, dtype in CASES[1:3] if rig.rehearses else CASES:
        with rig.guarded("race", size=size, dtype=dtype):
            _stress(rig, size, dtype)


def _stress(rig: Rig, size: str, dtype: torch.dtype) -> None:
    repeats, look, n = (4, 2, 16) if rig.rehearses else (REPEATS, LOOK, PRODUCT)
    cloud = rig.cloud(size)
    x, rest = cloud.embeddings.to(dtype), cloud.proxies.flatten(0, 1)
    basis = turned_basis(random_basis(x.shape[1], rig.device), x)

    def call() -> tuple[launch.Cloud, dict[str, Tensor]]:
        packed = launch.gather(x, cloud.labels, POTENTIAL, rest=rest, unit=True, basis=basis)
        written = {name: getattr(packed, name) for name in ("coarse", "left", "right")}
        return packed, written | {"near": launch.near_tiles(packed, packed)}

    packed, expected = call()
    error = sketch_error(packed, basis, rounding=2.0**-7 if rig.rehearses else 2.0**-8)
    wrong, unsure = wrong_bits(packed, expected["near"])
    rig.row("bounds", size=size, dtype=dtype, sketch_error=error, wrong_bits=wrong, unsure=unsure,
            near_share=float((expected["near"] != 0).float().mean()),
            passed=error <= 1 and wrong == 0)  # fmt: skip
    changed = torch.zeros(repeats, len(expected), dtype=torch.int64, device=rig.device)
    a, b = (torch.randn(n, n, device=rig.device).bfloat16() for _ in range(2))
    product, beside = torch.empty_like(a), None if rig.rehearses else torch.cuda.Stream()
    for i in range(repeats):
        with torch.cuda.stream(beside):  # None: no other stream
            torch.mm(a, b, out=product)
        again = call()[1]
        for j, name in enumerate(expected):
            changed[i, j] = (bits(again[name]) != bits(expected[name])).sum()  # waits for nothing
        if (i + 1) % look == 0:
            wait(rig.device)  # also for the product, whose memory may be another's after this
            names, counts = (f"{name}_calls" for name in expected), (changed > 0).sum(0).tolist()
            rig.row("race", size=size, dtype=dtype, repeats=i + 1,
                    **dict(zip(names, counts, strict=True)), most_entries=int(changed.max()),
                    passed=not any(counts))  # fmt: skip


def sketch_error(packed: launch.Cloud, basis: Tensor, rounding: float) -> float:
    """The largest error of an entry of the sketch over what is proven, so 1 or less.

    That is (D + 16) 2^-23 |x| |q| of the accumulation, and the `rounding` of the entry to bfloat16:
    2^-8 of it, or 2^-7 in Triton's interpreter, which truncates.
    """
    (depth, width), n = basis.shape, len(packed)
    x, q = packed.coarse[:n, :depth].double(), basis.double()
    exact = x @ q
    summed = (depth + 16) * _UNIT * x.norm(dim=1, keepdim=True) * q.norm(dim=0)
    error = (packed.left[:n, :width].double() - exact).abs()
    return float((error / (summed + rounding * (exact.abs() + summed))).max())


def wrong_bits(packed: launch.Cloud, near: Tensor) -> tuple[int, int]:
    """Answers of the filter that float64 contradicts by more than (2 K + 16) 2^-23 (t_x + t_y), and
    how many are nearer to 0 than that, so that either answer will do."""
    left, right = packed.left.double(), packed.right.double()
    k = left.shape[1]
    square = left[:, : k - LIFT].square().sum(1)
    given = (left[:, k - 4] + left[:, k - 3] + (0.5 - SLACK) * square) / (1 + SLACK)
    size = (square + given).view(-1, 16).amax(1)  # t of the worst point of a tile
    wrong = unsure = 0
    for rows, found, tiles in zip(
        left.split(_ROWS), near.split(_ROWS // 16), size.split(_ROWS // 16), strict=True
    ):
        largest = (rows @ right.T).view(len(tiles), 16, -1, 16).amax((1, 3))
        is_set = (found[:, :, None] >> torch.arange(8, device=near.device) & 1).flatten(1) != 0
        sure = largest.abs() > (2 * k + 16) * _UNIT * (tiles[:, None] + size)
        wrong += int((is_set != (largest > 0))[sure].sum())
        unsure += int((~sure).sum())
    return wrong, unsure
