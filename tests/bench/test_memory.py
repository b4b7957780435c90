import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import memory
from bench.clouds import Cloud
from bench.providers import PROVIDERS, Provider
from bench.settings import Size, SpeedSettings

CPU = torch.device("cpu")
SETTINGS = SpeedSettings(threads=1)
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read in /proc"
)


def test_peak_memory_is_that_of_one_call() -> None:
    held = torch.ones(50 << 20)
    small = [bytearray(1 << 16) for _ in range(4000)]  # 250 MiB that stay with the allocator
    last = bytearray(1 << 16)
    del held, small
    for _ in range(2):
        peak, extra = memory.peak_memory(lambda: torch.ones(25 << 20).sum(), CPU)  # 100 MiB
        assert 99 < extra / 2**20 < 120
        assert peak > extra
    del last  # above what was freed, so that only trimming gives it back


def test_memory_is_available() -> None:
    assert 2**20 < memory.available_bytes(CPU) < 2**50


def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    ballast = torch.ones(256 << 20)  # 1 GiB that the other process does not have
    peaks = memory.peaks_apart("eager", Size(100, 300, 3), SETTINGS, CPU)
    (_, forward), (peak, both) = peaks["forward"], peaks["forward+backward"]
    assert 8 * 1000**2 < forward < both < 100 * 1000**2
    assert both < peak < 4 * len(ballast)


def fails(cloud: Cloud) -> nn.Module:
    raise RuntimeError("no such loss")


def dies(cloud: Cloud) -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize(
    ("build", "message"),
    [(fails, "RuntimeError: no such loss"), (dies, "it ended with status -9")],
)
def test_a_process_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, build: object, message: str
) -> None:
    # In the other process, too: it is forked from this one.
    monkeypatch.setitem(PROVIDERS, "eager", Provider(build=build))
    context = memory.multiprocessing.get_context("fork")
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(context, "set_forkserver_preload", lambda _: None)
    with pytest.raises(OSError, match=f"memory of eager failed: {message}"):
        memory.peaks_apart("eager", Size(8, 4, 1, depth=8), SETTINGS, CPU)
