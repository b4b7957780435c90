"""The energies that are compared, and what one call of them costs: time, memory, operations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pfml_triton import Potential, potential_energy

POTENTIAL = Potential()
OPERATIONS_PER_PAIR = 5  # times D: difference, its square summed (2), weight, sum of the gradient

Energy = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")


def gram_energy(points: Tensor, labels: Tensor) -> Tensor:
    """The energy in plain PyTorch: |x|^2 + |y|^2 - 2 x.y, then one N x N matrix a step.

    With one power for both forces, and its sum taken by rows, it is as fast and as accurate as this
    form gets. It lacks the softened core: below `min_distance` the repulsion is constant.
    """
    p = POTENTIAL
    norms = points.square().sum(1)
    d2 = torch.addmm(norms, points, points.T, alpha=-2) + norms[:, None]
    inverse = d2.clamp_min(p.min_distance**2).rsqrt()
    same = labels[:, None] == labels
    clipped = torch.where(
        same, inverse.clamp_max(1 / p.delta), inverse.clamp_min(1 / p.repulsion_radius)
    )
    phi = clipped.pow(p.alpha)
    energy = torch.where(same, -phi, phi).sum(1).sum(dtype=torch.float64)
    return energy - len(points) * p.attraction_constant  # a point's potential on itself


def energy_of(provider: str) -> Energy:
    """The function of points [N, D] and labels [N] that one of `PROVIDERS` is."""
    if provider in ("pfml", "pfml dense"):
        return partial(potential_energy, potential=POTENTIAL, prune=provider == "pfml")
    return gram_energy if provider == "eager" else torch.compile(gram_energy, dynamic=False)


def row_gradient(rows: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The gradient [R, D] of the energy at the points `rows` [R], without pruning."""
    some = points[rows].requires_grad_()
    dense = partial(potential_energy, some, labels[rows], POTENTIAL, prune=False)
    in_all = dense(sources=points, source_labels=labels) - dense()
    return 2 * torch.autograd.grad(in_all, some)[0]  # each pair counts twice in the energy


def step(energy: Energy, points: Tensor, labels: Tensor) -> tuple[float, float]:
    """One forward and backward: the energy and the seconds. The gradient is in `points.grad`."""
    points.grad = None
    _synchronize(points.device)
    started = time.perf_counter()
    value = energy(points, labels)
    value.backward()
    _synchronize(points.device)
    seconds = time.perf_counter() - started
    return value.item(), seconds


def peak_memory(energy: Energy, points: Tensor, labels: Tensor) -> tuple[int, int]:
    """Bytes of memory at the peak of one step, and how many of them the step added.

    Resident memory of this process on a CPU, allocated memory on a GPU.

    Raises:
        OSError: resident memory is not to be had: this is not Linux.
    """
    if points.is_cuda:
        torch.cuda.reset_peak_memory_stats(points.device)
        before = torch.cuda.memory_allocated(points.device)
        step(energy, points, labels)
        peak = torch.cuda.max_memory_allocated(points.device)
    else:
        # Not ru_maxrss: it starts from the memory of the process that started this one.
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _kernel_bytes("/proc/self/status", "VmRSS")
        step(energy, points, labels)
        peak = _kernel_bytes("/proc/self/status", "VmHWM")
    return peak, peak - before


def available_bytes(device: torch.device) -> float:
    """Memory that a call may take; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kernel_bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def operations(function: Callable[[], T]) -> tuple[T, int, int]:
    """What `function` returns, and its operations: of matrix products, and of single pairs.

    Single pairs are those evaluated by the differences of their points, 5 D operations each; the
    torch backend subtracts them in place, by which they are known. Triton's kernels and compiled
    code do not show.
    """

    def product(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    def pairs(a: Sequence[int], b: Sequence[int], **_: Any) -> int:
        return OPERATIONS_PER_PAIR * math.prod(a) if len(a) == 2 and a == b else 0

    aten = torch.ops.aten
    formulas = {aten.addmm_: product, aten.baddbmm_: product, aten.sub_: pairs}
    with FlopCounterMode(display=False, custom_mapping=formulas) as mode:
        result = function()
    by_pairs = mode.get_flop_counts().get("Global", {}).get(aten.sub_, 0)
    return result, mode.get_total_flops() - by_pairs, by_pairs


def _kernel_bytes(path: str, field: str) -> int:
    """A figure that Linux gives in kB."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise OSError(f"no {field} in {path}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
