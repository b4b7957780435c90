"""Times: the first step, steps of this loss and of plain PyTorch, kernels measured and modelled."""

from __future__ import annotations

import os
import traceback
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.chips import CHIPS
from bench.clocks import back_to_back, graph_us, host_us, wait
from bench.clouds import Cloud
from bench.costs import Workload
from bench.counting import count_work, record_step
from bench.estimate import estimate
from bench.gpu.rig import Build, Rig
from bench.memory import peak_memory
from bench.providers import POTENTIAL, PROVIDERS, PlainLoss, gram_loss
from bench.results import provenance
from bench.workloads import parts_of, read
from pfml_triton import PFMLLoss
from pfml_triton.kernels.recording import record
from pfml_triton.sketch import random_basis, turned_basis

STEP = "forward+backward"
SINGLE, BRAIN = torch.float32, torch.bfloat16
TIMED = ("cub", "sop", "faces-100k", "vit-sop")  # the most wanted first
PRECISIONS = {"float32": "highest", "tf32": "high"}  # of products, in PyTorch's words
MODES = {"eager": None, "compile": "default", "reduce-overhead": "reduce-overhead"}
LAUNCHES = 20  # of a kernel in one graph
TOLERANCE = {SINGLE: 1e-5, BRAIN: 4e-3}  # of our gradients; half a unit of rounding is the second


def machine(rig: Rig) -> None:
    """Versions, the chip, and what it reaches on a copy and on a product of matrices."""
    gpu: dict[str, Any] = {"arch": None, "multiprocessors": None, "memory_bytes": None}
    if not rig.rehearses:
        found = torch.cuda.get_device_properties(rig.device)
        gpu = {"arch": f"sm_{found.major}{found.minor}", "memory_bytes": found.total_memory}
        gpu["multiprocessors"] = found.multi_processor_count
    n = 64 if rig.rehearses else 8192
    a, b = (torch.randn(n, n, device=rig.device).to(BRAIN) for _ in range(2))
    copy = back_to_back(lambda: a.copy_(b), rig.device).p50_us
    product = back_to_back(lambda: a @ b, rig.device).p50_us
    ceilings = {"copy_tb_s": 4 * n * n / copy / 1e6, "bf16_tflop_s": 2 * n**3 / product / 1e6}
    rig.row("machine", **provenance(rig.device), cores=os.cpu_count(), **gpu, **ceilings,
            cuda=torch.version.cuda, rehearsal=rig.rehearses)  # fmt: skip


def first(rig: Rig, size: str) -> None:
    """The first step of a process: compiled, if Triton's cache is empty. Is it right?"""

    def build(cloud: Cloud) -> nn.Module:
        ours = PROVIDERS["pfml-torch" if rig.rehearses else "pfml-triton"].build(cloud)
        assert isinstance(ours, PFMLLoss)
        ours.training_calls = 0  # the basis of the sketch turns, as in any first step
        return ours

    for dtype in (SINGLE, BRAIN):
        with rig.guarded("first step", size=size, dtype=dtype):
            work = rig.work(size, dtype, build)
            value, first_ms = work.call(STEP)
            off = rig.errors(size, work, value)
            second_ms = work.call(STEP)[1]
            rig.row("first step", size=size, dtype=dtype, first_s=1e-3 * first_ms,
                    second_s=1e-3 * second_ms, **off, passed=_is_right(off, dtype))  # fmt: skip


def model(rig: Rig, size: str) -> None:
    """What each kernel is modelled to take on this chip, from its machine code; needs cores, and no
    GPU."""
    arch = "sm_90"  # in a rehearsal
    if not rig.rehearses:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if torch.version.hip is not None or arch not in CHIPS:
        rig.row("no model", arch=arch, known=" ".join(CHIPS))
        return
    with rig.guarded("model", size=size):
        cloud = rig.cloud(size).to(torch.device("cpu"))
        work = count_work(cloud.points, cloud.labels, POTENTIAL)
        for launch in record_step(cloud.size, arch)[0]:
            kernel = read(launch, arch, CHIPS[arch])
            e = estimate(kernel, CHIPS[arch], parts_of(kernel, work))
            rig.row("model", size=size, kernel=launch.kernel.__name__, us=1e6 * e.seconds,
                    low_us=1e6 * e.low, high_us=1e6 * e.high, limit=e.limit, arch=arch)  # fmt: skip


def steps(rig: Rig) -> None:
    """This loss at sizes of data sets, and where its time goes."""
    for size in TIMED:
        work = measure(rig, "pfml", size, SINGLE)
        if work is None:
            continue
        for part in (kernels, parts, profiled):
            with rig.guarded(part.__name__, size=size):
                part(rig, size, work)
    for size in TIMED:
        measure(rig, "pfml", size, BRAIN)


def measure(
    rig: Rig,
    provider: str,
    size: str,
    dtype: torch.dtype,
    build: Build = None,
    precision: str = "float32",
) -> Workload | None:
    """Time and check the step of a provider, this package's if there is nothing to build.

    None, and a row that says why, if it fails.
    """
    which = {"provider": provider, "size": size, "dtype": dtype, "precision": precision}
    with rig.guarded("step", **which):
        rig.truth(size, dtype)  # first: its memory is not the provider's
        work = rig.work(size, dtype, build)
        step = partial(work.launch, STEP)
        value, first_ms = work.call(STEP)
        found: dict[str, Any] = {"first_s": 1e-3 * first_ms} | rig.errors(size, work, value)
        if provider == "pfml":
            found["passed"] = _is_right(found, dtype)
        work.clear()
        found["peak_bytes"], found["extra_bytes"] = peak_memory(step, rig.device)
        found |= back_to_back(step, rig.device)._asdict()
        found["host_us"] = host_us(step, rig.device)
        found["graph_us"] = None
        if not MODES.get(provider):  # torch.compile makes graphs of its own, or is for no graph
            try:
                found["graph_us"] = graph_us(step, rig.device)
            except RuntimeError:  # the other times are worth keeping
                traceback.print_exc()
        rig.row("step", **which, **found)
        return work
    return None


def kernels(rig: Rig, size: str, work: Workload) -> None:
    """Each kernel of a step in a graph of its own, twice: the difference is noise."""
    if rig.rehearses:  # the torch backend has none
        work = rig.work(size, build=PROVIDERS["pfml-triton"].build)
    with record(lambda launch: launch.run()) as launches:
        work.launch(STEP)
    for launch in launches:
        us, again_us = (graph_us(launch.run, rig.device, LAUNCHES) for _ in range(2))
        rig.row("kernel", size=size, kernel=launch.kernel.__name__, us=us, again_us=again_us,
                programs=" x ".join(map(str, launch.grid)))  # fmt: skip


def parts(rig: Rig, size: str, _: Workload) -> None:
    """PyTorch's own work: the sort of every step, and the turn of the basis of one in a hundred."""
    cloud = rig.cloud(size)
    basis = random_basis(cloud.size.depth, rig.device)
    calls = {
        "sort": lambda: torch.sort(cloud.labels, stable=True),
        "turn of the basis": lambda: turned_basis(basis, cloud.embeddings),
    }
    for part, call in calls.items():
        pace = back_to_back(call, rig.device)
        rig.row("part", size=size, part=part, us=pace.p50_us, host_us=host_us(call, rig.device))


def profiled(rig: Rig, size: str, work: Workload) -> None:
    """What runs on the GPU in a step, PyTorch's kernels and copies included, and a trace of it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not rig.rehearses)
    with profile(activities=activities) as found:
        for _ in range(10):
            work.launch(STEP)
        wait(rig.device)
    for entry in found.key_averages():
        if entry.device_type.name == "CUDA":
            rig.row("profile", size=size, kernel=entry.key[:80], launches=entry.count / 10,
                    us=entry.self_device_time_total / 10)  # fmt: skip
    if size == TIMED[0]:
        found.export_chrome_trace(str(rig.out / f"trace-{size}.json.gz"))


def peers(rig: Rig) -> None:
    """The same energy in plain PyTorch, and this loss beside it on the same warm machine.

    Memory that does not suffice is a result: N x N matrices of the larger sizes are large.
    """

    def build(mode: str | None) -> Build:
        if mode is None:
            return lambda cloud: PlainLoss(cloud, gram_loss)
        torch.compiler.reset()  # it allows a few sizes of one function, and then no more
        function = torch.compile(gram_loss, dynamic=False, fullgraph=True, mode=mode)
        return lambda cloud: PlainLoss(cloud, function)

    few, many = ("cub", "sop"), ("vit-sop", "faces-100k")
    plan = [(provider, size, p, SINGLE) for provider in MODES for size in few for p in PRECISIONS]
    plan += [("eager", size, p, SINGLE) for size in many for p in PRECISIONS]
    plan += [(provider, size, "float32", BRAIN) for size in few for provider in MODES]
    plan += [(name, size, "float32", SINGLE) for size in many for name in tuple(MODES)[1:]]
    for size in few:
        measure(rig, "pfml", size, SINGLE)
    for provider, size, precision, dtype in plan[:2] if rig.rehearses else plan:
        torch.set_float32_matmul_precision(PRECISIONS[precision])
        measure(rig, provider, size, dtype, build(MODES[provider]), precision)
    torch.set_float32_matmul_precision("highest")


def once(rig: Rig) -> None:
    """One step, and nothing else that a sanitizer would have to slow down."""
    print("energy", float(rig.work("cub").call(STEP)[0]))


def _is_right(off: dict[str, Any], dtype: torch.dtype) -> bool:
    return all(error is None or error <= TOLERANCE[dtype]
               for error in (off["gradient_error"], off["energy_error"]))  # fmt: skip
