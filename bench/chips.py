"""The chips whose time is modelled: rates, sizes and latencies."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = 4  # of a multiprocessor: each issues an instruction of one of its warps a clock
SHARED_RATE = 128  # bytes a clock and multiprocessor
LAUNCH_GAP = 1e-6  # seconds, assumed
REGISTERS = 64 << 10  # of a multiprocessor


@dataclass(frozen=True)
class Chip:
    """An NVIDIA chip. Lanes are results a clock and multiprocessor.

    Args:
        clock: Hz, the one that the peak rate is stated for.
        operations: of the tensor cores in bfloat16 with float32 sums, dense, a clock and
            multiprocessor; TF32 is half of it, 8-bit types twice.
        mma_sync: what mma.sync reaches of that; the rest is for wgmma and tcgen05 only.
        hbm_rate: bytes/s.
        l2_clock: bytes a clock.
    """

    name: str
    multiprocessors: int
    clock: float
    operations: int
    mma_sync: float
    fp32_lanes: int
    integer_lanes: int
    warps: int  # that a multiprocessor holds
    hbm_rate: float
    l2_clock: float
    l2_bytes: int

    @property
    def cycles(self) -> float:
        """Clocks of all multiprocessors a second."""
        return self.multiprocessors * self.clock

    @property
    def peak(self) -> float:
        """Dense bfloat16 operations a second."""
        return self.cycles * self.operations


# Multiprocessors, clock, dense peak, memory: NVIDIA's data sheets and white papers of each chip.
# The clock is the one at which the peak comes out: 989 TFLOP/s of an H100 are 132 x 4096 x 1.83 GHz
# (https://github.com/NVIDIA/cudnn-frontend/pull/650); under load it may be lower. B200: 2.25
# PFLOP/s; multiprocessors, L2 and bandwidth as its driver reports them,
# https://github.com/pytorch/ao/pull/4002.
# L2: 5,120 bytes a clock are from the white paper of A100, and a table of 2023 has them for H100
# too (doi 10.1016/j.ultsonch.2023.106546, table 3). None is published for the others: assumed.
# mma.sync on H100: 63 % of the peak, Luo et al., arXiv 2402.13499. On B200 not published: assumed
# to be no faster a clock than on A100.
# Lanes: CUDA programming guide, throughput of arithmetic instructions.
CHIPS = {
    "sm_80": Chip("A100 SXM4", 108, 1.41e9, 2048, 1.0, 64, 64, 64, 2.04e12, 5120, 40 << 20),
    "sm_86": Chip("A40", 84, 1.74e9, 1024, 1.0, 128, 64, 48, 696e9, 2048, 6 << 20),
    "sm_89": Chip("L40S", 142, 2.49e9, 1024, 1.0, 128, 64, 48, 864e9, 2560, 96 << 20),
    "sm_90": Chip("H100 SXM5", 132, 1.83e9, 4096, 0.63, 128, 64, 64, 3.35e12, 5120, 50 << 20),
    "sm_100": Chip("B200", 148, 1.856e9, 8192, 0.25, 128, 64, 64, 7.67e12, 10240, 126 << 20),
    "sm_120": Chip("RTX 5090", 170, 2.41e9, 512, 1.0, 128, 128, 48, 1.79e12, 3072, 96 << 20),
}  # fmt: skip
# Seconds, assumed for all: half as long again as the 200 and 400 clocks of that table, which are of
# an idle chip.
L2_LATENCY, HBM_LATENCY = 200e-9, 400e-9
