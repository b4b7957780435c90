"""The rates of the chips whose time is modelled, and what is assumed of them.

Rates are ranges: of what a data sheet or a published microbenchmark gives, the more and the less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.aot import Waits

Ends = NDArray[np.float64]  # [2], the lower and the upper end of a range of times

# Assumed, seconds: about what microbenchmarks publish for an idle chip, and twice that.
L2_LATENCY, HBM_LATENCY = np.array([0.15e-6, 0.3e-6]), np.array([0.3e-6, 0.6e-6])
LAUNCH_GAP = 1e-6
HBM_REACHED = np.array([1.0, 0.9])  # of the data sheet's bandwidth
L2_PEAK = 5120  # bytes a clock: A100 white paper; none is published for H100
SCHEDULERS = 4  # of a multiprocessor: each issues an instruction of a warp a clock
# 64 results a clock and multiprocessor: comparisons, min and max, integer sums, logic, shifts (CUDA
# programming guide, throughput of arithmetic instructions, compute capabilities 8.0 and 9.0).
ALU_RESULTS = 64
ALU = ("FMNMX", "FSETP", "SEL", "IADD3", "LOP3", "SHF", "ISETP", "PLOP3", "LEA", "PRMT")


@dataclass(frozen=True)
class Chip:
    """Rates from NVIDIA's data sheets; `l2_read` from published microbenchmarks."""

    name: str
    multiprocessors: int
    clock: float  # Hz, the one that the peak rate is stated for
    operations: int  # dense bfloat16, of a multiprocessor a clock; TF32 is half of it
    hbm_rate: float  # bytes/s
    l2_read: float  # bytes/s

    @property
    def cycles(self) -> float:
        """Clocks of all multiprocessors a second."""
        return self.multiprocessors * self.clock

    @property
    def hbm(self) -> Ends:
        return self.hbm_rate * HBM_REACHED

    @property
    def l2(self) -> Ends:
        return np.array([L2_PEAK * self.clock, self.l2_read])

    def seconds(self, waits: Waits, far: Ends = HBM_LATENCY) -> Ends:
        """What a critical path takes, where loads of points have the latency `far`."""
        return waits.clocks / self.clock + waits.near * L2_LATENCY + waits.far * far


CHIPS = {
    "sm_90": Chip("H100 SXM5", 132, 1.83e9, 4096, 3.35e12, 5.5e12),  # 989 TFLOP/s
    "sm_80": Chip("A100 SXM4 80 GB", 108, 1.41e9, 2048, 2.04e12, 4.0e12),  # 312 TFLOP/s
}
