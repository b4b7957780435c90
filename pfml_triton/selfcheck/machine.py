"""What this machine is: versions, devices, which backend serves on each and why."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .. import __version__, serving


def versions() -> dict[str, str | None]:
    """By name; None for what is not there."""
    return {
        "pfml_triton": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _driver() -> str | None:
    """The newest CUDA that the driver knows, which is what PyTorch can tell of it."""
    if not torch.cuda.is_available():
        return None
    number = int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]  # CUDA builds
    if torch.version.hip is not None:
        return str(number)
    return f"for CUDA {number // 1000}.{number % 1000 // 10}"


def devices(chosen: list[torch.device]) -> list[dict[str, Any]]:
    """The devices to check: what they are, and who serves there."""
    found = []
    for device in chosen:
        backend, reason = served_by(device)
        described: dict[str, Any] = {"device": str(device)}
        if device.type == "cuda":
            has = torch.cuda.get_device_properties(device)
            described |= {
                "name": has.name,
                "capability": getattr(has, "gcnArchName", f"{has.major}.{has.minor}"),
                "memory_bytes": has.total_memory,
                "multiprocessors": has.multi_processor_count,
            }
        else:
            described |= {
                "name": platform.processor() or platform.machine(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "memory_bytes": None,
                "multiprocessors": None,
            }
        found.append(described | {"backend": backend, "reason": reason})
    return found


def served_by(device: torch.device) -> tuple[str, str]:
    """The backend that `backend="auto"` takes on a device, and why."""
    if serving.missing is not None:
        return "torch", serving.missing
    from ..kernels import launch

    obstacle = launch.obstacle(torch.empty(0, 1, device=device))
    if device.type != "cuda":
        return "torch", "Triton kernels need a GPU, and this is none"
    if obstacle is None:
        return "triton", f"it is a GPU, and Triton {_triton_version()} is installed"
    if launch.INTERPRETED:
        return "torch", "TRITON_INTERPRET is set, which keeps the kernels off the GPU: unset it"
    return "torch", obstacle


def tuning() -> dict[str, Any]:
    """The tuning file: where it is or would be, how many of its entries serve, and the faults."""
    nothing: dict[str, Any] = {"file": None, "found": False, "usable_entries": 0, "faults": []}
    if serving.missing is not None:
        return nothing
    from ..kernels import tuning

    path = tuning.tuning_file()
    if path is None:
        return nothing
    described = nothing | {"file": str(path)}
    try:
        entries, faults = tuning.usable(tuning.parse(path))
    except FileNotFoundError:
        return described
    except (tuning.TuningFileError, OSError) as error:
        return described | {"found": True, "faults": [str(error)]}
    return described | {"found": True, "usable_entries": len(entries), "faults": faults}
