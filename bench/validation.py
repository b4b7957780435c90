"""How far the model is off: its speed of Triton's tutorial kernels beside what was published.

The same rule as for the kernels of this package, and nothing is fitted. Where a tutorial tunes
itself, the prediction is the best of the configurations that it lists. Published speeds are those
that somebody measured with the Triton of that day; the model reads the code of the one that is
installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from bench import aot
from bench.chips import CHIPS
from bench.estimate import Estimate, estimate
from bench.tutorials import _attention_kernel, _product_kernel
from bench.workloads import Kernel, Part, product_loops, product_parts, read, sized

TRITON = "https://github.com/triton-lang/triton"
GOAL = 0.35  # the error that each should stay below

Tiles = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
# The lists of tutorial 03 for NVIDIA's chips.
_HALF: list[Tiles] = [
    (128, 256, 64, 8, 3), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4),
    (64, 128, 32, 4, 4), (128, 32, 32, 4, 4), (64, 32, 32, 2, 5), (32, 64, 32, 2, 5),
]  # fmt: skip
_BYTE: list[Tiles] = [
    (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (256, 64, 128, 4, 4), (64, 256, 128, 4, 4),
    (128, 128, 128, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 32, 64, 4, 4),
]  # fmt: skip
# Those of tutorial 06: of its pointers, and of its descriptors on Hopper, which leaves 8 warps to
# the largest tiles.
_POINTERS = [(m, n, 0, 4, s) for m, n, s in product((64, 128), (32, 64), (3, 4, 7))]
_DESCRIPTORS = [
    (m, n, 0, w, s)
    for m, n, w, s in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 6))
    if w == 4 or m * n == 128 * 128
]


@dataclass(frozen=True)
class Published:
    """A speed that was published, and what to compile to model it.

    Args:
        low, high: TFLOP/s.
        operations: of the whole kernel.
        launch: makes the launch of one of the `configurations`.
        parts: what the kernel does.
    """

    name: str
    arch: str
    low: float
    high: float
    source: str
    operations: float
    configurations: list[Tiles]
    launch: Callable[[Tiles], aot.Launch]
    parts: Callable[[Kernel], list[Part]]


class Validation(NamedTuple):
    """What the model makes of a published speed."""

    published: Published
    configuration: Tiles
    best: Estimate

    @property
    def speed(self) -> float:
        """TFLOP/s."""
        return self.published.operations / self.best.seconds / 1e12

    @property
    def error(self) -> float:
        """Of the speed, relative to the middle of what was published: positive is too fast."""
        return 2 * self.speed / (self.published.low + self.published.high) - 1

    @property
    def is_inside(self) -> bool:
        """Whether the speed is within what was published."""
        return self.published.low <= self.speed <= self.published.high


def cases() -> list[Published]:
    """What is compared; attention forward, in float16, of 4 x 32 heads of 8,192. `high` is `low`
    where a single figure was published."""
    half, byte = torch.float16, torch.float8_e5m2
    heads = 4 * 32
    causal = f"{TRITON.replace('triton-lang/triton', 'Dao-AILab/flash-attention')}/issues/307"
    return [
        _matmul(
            "matmul fp16, 4,096^3", "sm_80", 220, 245, "Triton tutorial 03, its text", 4096, half
        ),
        _attention(
            "attention, D 128, causal", "sm_80", 173, 188,
            f"{causal} (names no chip; A100 by its rate)", (heads, 8192, 128, True),
        ),
        _attention(
            "attention, D 64", "sm_80", 146, 167,
            f"{TRITON}/pull/1917, and the page of tutorial 06 (name no chip; A100 by their rate)",
            (heads, 8192, 64, False),
        ),
        _matmul(
            "matmul fp16, 3,072^3", "sm_90", 525, 525, f"{TRITON}/issues/3672", 3072, half
        ),
        _matmul(
            "matmul fp8, 3,584^3", "sm_90", 1280, 1280, f"{TRITON}/pull/3546", 3584, byte
        ),
        _attention(
            "attention, D 128", "sm_90", 460, 487,
            "https://github.com/facebookexperimental/triton/pull/205", (heads, 8192, 128, False),
        ),
    ]  # fmt: skip


def validate(case: Published, progress: Progress | None = None) -> Validation:
    """Model a case, compiling all that its tutorial lists."""
    tried: Iterable[Tiles] = case.configurations
    if progress is not None:
        tried = progress.track(tried, description=f"{case.arch} {case.name}")
    chip, found = CHIPS[case.arch], []
    for configuration in tried:
        kernel = read(case.launch(configuration), case.arch, chip)
        if kernel.resident:
            found.append((configuration, estimate(kernel, chip, case.parts(kernel))))
    return Validation(case, *min(found, key=lambda pair: pair[1].seconds))


def validation_table(results: list[Validation]) -> Table:
    """The comparison, with the errors."""
    mean = sum(abs(r.error) for r in results) / len(results)
    worst = max(results, key=lambda r: abs(r.error))
    missed = [r.published.name for r in results if abs(r.error) >= GOAL]
    verdict = f"missed by {', '.join(missed)}" if missed else "kept by all"
    table = Table(
        title="Triton's tutorials, TFLOP/s, published and modelled from the machine code",
        caption=f"Mean absolute error {mean:.0%}, largest {worst.error:+.0%}; the goal, below "
        f"{GOAL:.0%} each, is {verdict}. Modelled at the clock of the data sheet's peak: a chip "
        "that lowers its clock under load is slower.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in (
        "kernel",
        "chip",
        "tiles, warps, stages",
        "published",
        "modelled",
        "error",
        "limit",
    ):
        right = name in ("published", "modelled", "error")
        table.add_column(name, justify="right" if right else "left")
    for i, r in enumerate(results, 1):
        p, (m, n, k, warps, stages) = r.published, r.configuration
        tiles = "x".join(str(x) for x in (m, n, k) if x)
        span = f"{p.low:g}" if p.low == p.high else f"{p.low:g}-{p.high:g}"
        table.add_row(
            f"{p.name} [dim]({i})[/]", CHIPS[p.arch].name.split()[0],
            f"{tiles}, {warps}, {stages}", span, f"{r.speed:.0f}",
            f"{r.error:+.0%}{' inside' if r.is_inside else ''}", r.best.limit,
        )  # fmt: skip
    return table


def sources(results: list[Validation]) -> Iterator[str]:
    """Where the published speeds are from, a line each."""
    for i, r in enumerate(results, 1):
        yield f"({i}) {r.published.source}"


def _matmul(
    name: str, arch: str, low: float, high: float, source: str, n: int, dtype: torch.dtype
) -> Published:
    def launch(tiles: Tiles) -> aot.Launch:
        block_m, block_n, block_k, warps, stages = tiles
        a, b = (torch.empty(n, n, dtype=dtype, device="meta") for _ in range(2))
        b = b.T if dtype.itemsize == 1 else b  # as the tutorial has it
        args = {
            "a_ptr": a, "b_ptr": b, "c_ptr": torch.empty(n, n, dtype=torch.float16, device="meta"),
            "M": n, "N": n, "K": n, "stride_am": n, "stride_ak": 1, "stride_bk": b.stride(0),
            "stride_bn": b.stride(1), "stride_cm": n, "stride_cn": 1, "GROUP": 8,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        }  # fmt: skip
        grid = (math.ceil(n / block_m) * math.ceil(n / block_n),)
        return aot.Launch(_product_kernel, grid, args, _options(warps, stages))

    def parts(kernel: Kernel) -> list[Part]:
        code, a = kernel.code, kernel.args
        operations = 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["K"]
        around = Part("around", code.own(code.root), 1.0, repeats=False)
        return [around, *product_parts(kernel, product_loops(code)[0], operations)]

    configurations = _BYTE if dtype.itemsize == 1 else _HALF
    return Published(
        name, arch, low, high, source, 2 * n**3, configurations, launch, parts
    )  # fmt: skip


def _attention(
    name: str, arch: str, low: float, high: float, source: str, shape: tuple[int, int, int, bool]
) -> Published:
    heads, length, depth, causal = shape

    def launch(tiles: Tiles) -> aot.Launch:
        block_m, block_n, _, warps, stages = tiles
        q, k, v, out = (
            torch.empty(heads * length, depth, dtype=torch.float16, device="meta") for _ in "qkvo"
        )
        args = {
            "scale": 0.5, "lse_ptr": torch.empty(heads * length, device="meta"), "q_ptr": q,
            "k_ptr": k, "v_ptr": v, "out_ptr": out, "rows": heads * length, "L": length,
            "CAUSAL": causal, "D": depth, "BLOCK_M": block_m, "BLOCK_N": block_n,
        }  # fmt: skip
        return aot.Launch(
            _attention_kernel, (length // block_m, heads), args, _options(warps, stages)
        )

    def parts(kernel: Kernel) -> list[Part]:
        code, a = kernel.code, kernel.args
        first = np.tile(np.arange(kernel.grid[0]), kernel.grid[1]) * a["BLOCK_M"]
        looked_at = [first, a["BLOCK_M"]] if causal else [length]
        loops = [
            loop for loop in code.root.inner if any(i.is_product for i in code.own(loop))
        ]  # fmt: skip
        found = [Part("around", code.own(code.root), 1.0, repeats=False)]
        for loop, keys in zip(loops, looked_at, strict=False):  # one round of keys is no loop
            own = code.own(loop)
            each = sum(i.operations for i in own) * kernel.warps
            rounds = 4 * a["BLOCK_M"] * depth * keys / each
            found.append(Part("keys", own, rounds))
        return [
            replace(part, code=sized(kernel, part.code, moved=2 * a["BLOCK_N"] * depth))
            for part in found
        ]

    operations = 4 * heads * length**2 * depth / (2 if causal else 1)
    configurations = _DESCRIPTORS if arch == "sm_90" else _POINTERS
    return Published(
        name, arch, low, high, source, operations,
        [c for c in configurations if c[1] <= depth], launch, parts,
    )  # fmt: skip


def _options(warps: int, stages: int) -> dict[str, int]:
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
