"""Memory: what is there, and the peak of a call, in a process of its own."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.clouds import make_cloud
from bench.costs import Workload
from bench.providers import PROVIDERS
from bench.settings import Size, SpeedSettings

Peaks = dict[str, tuple[int, int]]  # by mode: bytes at the peak, and those that the call added

_GOODBYE = 10  # seconds to end by itself


def peaks_apart(provider: str, size: Size, settings: SpeedSettings, device: torch.device) -> Peaks:
    """`peak_memory` by mode, in a fresh process, of a second call: what only the first needs, like
    the compiler's memory, is left out.

    Raises:
        OSError: the process failed, or was killed.
    """
    # Forked from one that has imported PyTorch and done nothing: a moment, not seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = sender, provider, size, settings, device, dict(os.environ)
    process = context.Process(target=_send_peaks, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join(_GOODBYE)
    except EOFError:
        process.join()
        answer = f"it ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise OSError(f"the process to measure the memory of {provider} failed: {answer}")
    return answer


def _send_peaks(
    sender: Connection,
    provider: str,
    size: Size,
    settings: SpeedSettings,
    device: torch.device,
    environment: dict[str, str],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process gets it too, and ends this one
    os.environ.update(environment)  # that of the server is as old as the server
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        sender.send(_peaks(provider, size, settings, device))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _peaks(provider: str, size: Size, settings: SpeedSettings, device: torch.device) -> Peaks:
    build, dtype = PROVIDERS[provider].build, getattr(torch, settings.dtype)

    def workload(size: Size) -> Workload:
        return Workload(build, make_cloud(size, settings.seed).to(device), dtype)

    work = workload(size)
    # A few points load whatever is loaded late. Compiled code is for one size.
    first = work if provider == "compile" else workload(Size(8, 4, 1, size.depth))
    peaks = {}
    for mode in settings.modes:
        first.call(mode)
        first.clear()
        peaks[mode] = peak_memory(partial(work.call, mode), device)
        work.clear()
    return peaks


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Bytes of memory at the peak of a call, and how many of them the call added.

    Resident memory of this process on a CPU, allocated memory on a GPU.

    Raises:
        OSError: resident memory is not to be had: this is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Not ru_maxrss: it starts from the memory of the process that started this one.
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed is not there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is left
        before = _kernel_bytes("/proc/self/status", "VmRSS")
        call()
        peak = _kernel_bytes("/proc/self/status", "VmHWM")
    return peak, peak - before


def available_bytes(device: torch.device) -> float:
    """Memory that a call may take; infinite where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return _kernel_bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was not to be had, on a GPU or on a CPU."""
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _kernel_bytes(path: str, field: str) -> int:
    """A figure that Linux gives in kB."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise OSError(f"no {field} in {path}")
