"""What a step of the loss costs the host: everything but the work of the GPU.

A call of `PFMLLoss`, forward and backward, runs its Python and PyTorch's dispatcher before and
between the launches, while a GPU waits if it is faster than that. Here Triton's launcher stops
short of the driver, so that this can be timed without a GPU: the kernels do nothing, and the values
are garbage. What is timed is on CPU tensors, whose memory is cheaper to get than a GPU's, and whose
one sort is done instead of launched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.clouds import make_cloud
from bench.results import append_row, provenance
from bench.settings import SIZES, HostSettings
from pfml_triton import PFMLLoss, module
from pfml_triton.kernels import launch

Row = dict[str, Any]

TARGET_US = 150.0  # forward and backward without the launches
MOST_LAUNCHES = 5  # of ours
STEPS = ("gather", "field_terms", "total", "pull_back")  # of a backend
PARTS = {  # of a step, with what is timed for each: its own time, without the parts below it
    "module": "checks, labels, the basis of the sketch",
    "autograd forward": "backend, autograd function, what it saves",
    "sort": "of the labels",
    "buffers": "arguments of the kernels, and memory for what they write",
    "autograd backward": "PyTorch's engine, from the value to both leaves",
    "launcher": "Triton's own, from arguments to the driver",
}


def run(settings: HostSettings, out: Path, console: Console | None = None) -> Row:
    """Time the host's part of a step, print a breakdown, append a row to ``host.jsonl`` in `out`.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: the kernels were imported under Triton's interpreter.
    """
    if settings.size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {settings.size!r}")
    if settings.repeats < 10:
        raise ValueError(f"repeats must be at least 10, got {settings.repeats}")
    if launch.INTERPRETED:
        raise RuntimeError("no compiled kernels here: unset TRITON_INTERPRET before the import")
    console = console or Console()
    torch.set_num_threads(1)  # nothing here is parallel
    size = SIZES[settings.size]
    cloud = make_cloud(size, settings.seed)
    loss = PFMLLoss(size.classes, size.depth, size.proxies, backend="triton")
    loss.training_calls = 101  # from now on one in a hundred turns the basis
    embeddings = cloud.embeddings.clone().requires_grad_()

    def step() -> None:
        embeddings.grad = loss.proxies.grad = None  # as optimizer.zero_grad() leaves them
        loss(embeddings, cloud.batch_labels).backward()

    with launches_stubbed() as launched:
        step()  # compiles nothing, but fills caches
        launched.clear()
        step()
        kernels = list(launched)
        clock = _Clock()
        whole, without, parts = [], [], []
        for _ in range(settings.repeats):  # in turn, so that all see the machine alike
            whole.append(_seconds(step))
            with mock.patch.object(JITFunction, "run", _no_run):
                without.append(_seconds(step))
            with clock.watching():
                parts.append(clock.parts(step))
    row: Row = {"bench": "host", "size": settings.size, "n": size.n, "d": size.depth}
    row |= {"repeats": settings.repeats, "seed": settings.seed}
    row |= {"launches": len(kernels), "kernels": " ".join(kernels)}
    for name, times in (("", whole), ("without_launcher_", without)):
        quantiles = statistics.quantiles(times, n=10)
        row |= {f"{name}p{10 * q}_us": 1e6 * quantiles[q - 1] for q in (2, 5, 8)}
    for name in PARTS:
        row[f"{name.replace(' ', '_')}_us"] = 1e6 * statistics.median(p[name] for p in parts)
    row |= {"target_us": TARGET_US, "most_launches": MOST_LAUNCHES}
    append_row(out / "host.jsonl", row | provenance(torch.device("cpu")))
    console.print(_table(row))
    return row


class _CompiledKernel:
    """What Triton launches, with nothing behind it."""

    function = packed_metadata = None

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.launched.append(self.name)


class _Driver:
    """As much of a driver as Triton's launcher asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def launches_stubbed() -> Iterator[list[str]]:
    """Let launches end where the driver would take over; the names of those that were made."""
    launched: list[str] = []

    def compiled(function: Any, key: Any, _: Any, device: int, *__: Any) -> _CompiledKernel:
        kernel = _CompiledKernel(function.__name__, launched)
        function.device_caches[device][0][key] = kernel
        return kernel

    ours = [f for f in vars(launch).values() if isinstance(f, JITFunction)]
    try:
        with (
            mock.patch.object(driver, "_active", _Driver()),
            mock.patch.object(JITFunction, "_do_compile", compiled),
            mock.patch.object(launch, "obstacle", _no_obstacle),
        ):
            yield launched
    finally:
        for function in ours:
            function.device_caches.clear()


class _Clock:
    """Times the parts of a step by what is called, each without the parts that it calls."""

    def __init__(self) -> None:
        self.inside: list[float] = []  # what the calls that are open have spent in others
        self.own = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls that parts begin with."""
        watched = [
            (module, "total_energy", "autograd forward"),
            (torch, "sort", "sort"),
            *((launch, name, "buffers") for name in STEPS),
            (JITFunction, "run", "launcher"),
        ]
        with ExitStack() as stack:
            for owner, name, part in watched:
                timed = self.timed(getattr(owner, name), part)
                stack.enter_context(mock.patch.object(owner, name, timed))
            stack.enter_context(
                mock.patch.object(
                    torch.Tensor, "backward", self.timed(torch.Tensor.backward, "autograd backward")
                )
            )
            yield

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.perf_counter() - started
            self.own[part] += spent - self.inside.pop()
            if self.inside:
                self.inside[-1] += spent
            return result

        return wrapped

    def parts(self, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of each part of a step."""
        self.own = dict.fromkeys(PARTS, 0.0)
        self.timed(step, "module")()
        return self.own


def _no_obstacle(_: torch.Tensor) -> None:
    """None to the kernels. A mock's answer takes microseconds."""


def _no_run(*_: Any, **__: Any) -> None:
    """A launcher that is not even asked."""


def _seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _table(row: Row) -> Table:
    verdicts = [
        f"{row['without_launcher_p50_us']:.0f} us without Triton's launcher, "
        + ("below" if row["without_launcher_p50_us"] < TARGET_US else "[red]not below[/red]")
        + f" {TARGET_US:g}",
        f"{row['launches']} launches, at most {MOST_LAUNCHES} wanted: {row['kernels']}",
    ]
    table = Table(
        title=f"The host's part of a step, {row['size']}, N = {row['n']:,}",
        caption=f"Measured, medians of {row['repeats']}.\n" + ".\n".join(verdicts) + ".",
        box=SIMPLE_HEAD,
    )
    for name in ("part", "us", "what"):
        table.add_column(name, justify="right" if name == "us" else "left")
    for name, what in PARTS.items():
        table.add_row(name, f"{row[name.replace(' ', '_') + '_us']:.1f}", what)
    table.add_row("[bold]all", f"[bold]{row['p50_us']:.1f}", "timed as a whole")
    return table
