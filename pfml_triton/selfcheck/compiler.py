"""Every kernel compiled for a GPU that need not be here: this Triton can, or it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from ..kernels import launch
from ..kernels.config import tiles_for
from ..kernels.recording import record
from ..potential import Split
from ..sketch import random_basis
from . import truth
from .kernels import KERNELS
from .result import Comparison, Log, tell

POINTS, DEPTH = 5000, 512  # long lists, so that all kernels are launched


def target() -> tuple[str, str]:
    """What to compile for, as Triton and as people call it."""
    return ("gfx942", "MI300") if torch.version.hip is not None else ("sm_90", "H100")


def check(log: Log) -> None:
    """Compile what a loss launches, without looking into Triton's cache."""
    arch, chip = target()
    x = torch.empty(POINTS, DEPTH, device="meta")
    labels = torch.empty(POINTS, dtype=torch.int64, device="meta")
    basis = random_basis(DEPTH, torch.device("cpu")).to("meta")
    tiles = tiles_for(DEPTH, POINTS, arch)
    potential = truth.POTENTIAL
    with record() as launches:
        cloud = launch.gather(
            x[:100], labels, potential, rest=x[100:], unit=True, basis=basis, tiles=tiles
        )
        terms = launch.field_terms(cloud, cloud, potential, needs_grad=True)
        value, totals = launch.total(terms, cloud, cloud, potential, among=True)
        assert terms.grad is not None
        launch.pull_back(
            terms.grad, cloud.points, cloud.inverse, grad_output=value, totals=totals,
            split=Split(100, (torch.float32, torch.float32)), twice=True,
        )  # fmt: skip
    for number, one in enumerate(launches, 1):

        def body(comparison: Comparison) -> None:
            with _always_compiling():
                compiled = one.compile(arch)  # noqa: B023
            kind = "cubin" if arch.startswith("sm_") else "hsaco"
            comparison.holds(f"there is machine code ({kind})", len(compiled.asm[kind]) > 0)

        kernel = KERNELS[one.kernel.__name__]
        tell(f"compiling {kernel.name} for {chip}, {number} of {len(launches)}")
        log.run(
            f"compiled: {kernel.name}", f"machine code for {chip} ({arch})", "no error", body,
            dtype=torch.float32, depth=DEPTH, points=POINTS,
        )  # fmt: skip


@contextmanager
def _always_compiling() -> Iterator[None]:
    """Not what an earlier run has left in the cache."""
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        yield
