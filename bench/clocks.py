"""Clocks: of a call on an idle device, of calls back to back, of the host, and of CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch

MOST_CALLS, MOST_SECONDS = 200, 0.5  # of calls back to back, whichever is less; 10 calls at least
_PARTS = 10  # that they are timed in
_HOST_CALLS = 20

T = TypeVar("T")
Call = Callable[[], Any]


class Pace(NamedTuple):
    """Microseconds of a call when calls follow each other without a wait.

    Quantiles are over ten runs of calls, each timed as a whole.
    """

    p20_us: float
    p50_us: float
    p80_us: float
    calls: int


def elapsed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `call` returns, and the milliseconds it takes.

    On a GPU these are between two events on the device, once it is idle: time in which it waits for
    the host counts, as it does for a caller.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            result = call()
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end)
    started = time.perf_counter()
    result = call()
    return result, 1e3 * (time.perf_counter() - started)


def back_to_back(call: Call, device: torch.device) -> Pace:
    """Time calls that follow each other, after one to warm up and one to tell how many to make.

    On a GPU, the time is the host's where the host is the slower of the two: see `host_us`.
    """
    call()
    seconds = 1e-3 * elapsed(call, device)[1]
    each = max(1, min(MOST_CALLS, int(MOST_SECONDS / max(seconds, 1e-6))) // _PARTS)
    marks = [_mark(device)]
    for _ in range(_PARTS):
        for _ in range(each):
            call()
        marks.append(_mark(device))
    wait(device)
    us = [_us_between(begin, end) / each for begin, end in pairwise(marks)]
    deciles = statistics.quantiles(us, n=10, method="inclusive")
    return Pace(deciles[1], deciles[4], deciles[7], _PARTS * each)


def host_us(call: Call, device: torch.device) -> float:
    """Median microseconds until a call returns, its work on the GPU not waited for."""
    times = []
    for _ in range(_HOST_CALLS):
        wait(device)  # an empty queue never holds the host up
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    wait(device)
    return statistics.median(times)


def graph_us(call: Call, device: torch.device, repeats: int = 1) -> float | None:
    """Median microseconds of a call in replays of a CUDA graph of `repeats` calls: the GPU's part.

    Inputs that the call before has left in the L2 cache are found there. None on a CPU.

    Raises:
        RuntimeError: the call cannot be captured; it waits for the GPU, say.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return back_to_back(capture(call, repeats).replay, device).p50_us / repeats


def capture(call: Call, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `repeats` calls, captured after three to warm up. RuntimeError as above."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _us_between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return 1e6 * (end - begin)
    return 1e3 * begin.elapsed_time(end)
