"""How long the loss takes, beside the same energy in plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from .. import PFMLLoss
from . import truth
from .result import Comparison, Gap, Log, Timing

DEPTH, BATCH, REPEATS = 512, 100, 15


def check(log: Log, backend: str, sizes: list[int]) -> None:
    """Time forward and backward at each number of points, if both find the same energy."""
    for n in sizes:
        log.run(
            "same energy", "what is timed beside each other agrees", "plain PyTorch, float32",
            partial(_time, log, backend, n), dtype=torch.float32, depth=DEPTH, points=n,
        )  # fmt: skip


def _time(log: Log, backend: str, n: int, c: Comparison) -> None:
    device = log.device
    generator = torch.Generator().manual_seed(0)
    classes = (n - BATCH) // 15
    loss = PFMLLoss(classes, DEPTH, 15, backend=backend).to(device)
    x = torch.randn(BATCH, DEPTH, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, classes, (BATCH,), generator=generator).to(device)
    everyone = torch.cat([labels, torch.arange(classes, device=device).repeat_interleave(15)])
    value = torch.zeros(())

    def ours() -> None:
        nonlocal value
        x.grad = loss.proxies.grad = None
        value = loss(x, labels)
        value.backward()

    def eager() -> None:
        nonlocal value
        x.grad = loss.proxies.grad = None
        points = torch.nn.functional.normalize(torch.cat([x, loss.proxies.flatten(0, 1)]), dim=1)
        value = truth.energy(points, everyone, loss.potential, by_differences=False)
        value.backward()

    loss_ms = _median_ms(ours, device)
    energy, eager_ms = value.detach(), None
    try:
        eager_ms = _median_ms(eager, device)
        c.near("energy", energy, value, 1e-4)
    except torch.OutOfMemoryError:
        log.report.not_checked.append(
            Gap(f"the time of plain PyTorch at N = {n} on {device}", "its matrices do not fit")
        )
    points = BATCH + 15 * classes
    log.report.timings.append(
        Timing(str(device), backend, points, DEPTH, "float32", REPEATS, loss_ms, eager_ms)
    )


def _median_ms(step: Callable[[], None], device: torch.device) -> float:
    for _ in range(3):  # compile, and fill caches
        step()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS)]
        for start, end in zip(marks[::2], marks[1::2], strict=True):
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(
            a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True)
        )
