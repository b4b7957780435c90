"""Which backend serves a call, and what serves where the kernels cannot.

Some obstacles are known beforehand (`launch.obstacle`): Triton is missing, the GPU is too old.
Others show when a kernel is first compiled and loaded: a tile does not fit the shared memory,
Triton fails to compile, there is no C compiler, no cache directory that can be written, a driver
too old for the code. Then the next tile shapes serve, where those can help, and at last the torch
backend. What was found holds until the process ends, and is told once.

Only what says that a kernel cannot be compiled, loaded or fitted counts. Memory that runs out, what
a running kernel did wrong and faults of the caller are raised as they are.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError, SubprocessError
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import torch_backend

if TYPE_CHECKING:
    from .backends import Backend

missing: str | None = None  # why there is no Triton
try:
    import triton
    from triton.compiler.errors import CompilationError

    from .kernels import launch, tuning
except ImportError as error:  # Triton has no wheel for this platform: the torch backend serves
    missing = f"Triton cannot be imported here ({torch.__version__=}): {error}"

BACKENDS = ("auto", "triton", "torch")

T = TypeVar("T")


class FallbackWarning(UserWarning):
    """Something slower serves in place of what does not run on this GPU.

    Told once a process, device and reason. Every process of many decides for itself; results of all
    of them agree to rounding.
    """


class _Fault(NamedTuple):
    """Why kernels cannot be compiled, loaded or fitted."""

    reason: str
    of_tiles: bool  # may other tile shapes help?


_lock = threading.Lock()
_refused: dict[tuple[int, int | None], str] = {}  # by device, and depth or None for any: why
_told: set[tuple[object, object]] = set()  # of whom, and what


def served(backend: str, points: Tensor, compute: Callable[[Backend], T]) -> T:
    """The result of `compute` with a backend that can serve these points.

    Args:
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        points: [N, D], on the device and of the depth that `compute` is about.
        compute: is called again with what serves next if the kernels fail. It must change nothing
            that it would then find changed.

    Raises:
        ValueError: backend="triton", and the kernels cannot serve whatever their tile shapes.
        RuntimeError: a kernel fails while a CUDA graph is captured.
    """
    chosen = _chosen(backend, points)
    if chosen is torch_backend:
        return compute(chosen)
    place = points.get_device(), points.shape[1]
    step = tuning.step_at(place)
    try:
        return compute(chosen)
    except Exception as error:
        fault = _fault_of(error)
        if fault is None:
            raise
        if points.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a kernel failed while a CUDA graph is captured, so nothing else can serve: "
                f"{fault.reason}; make the same call once before the capture"
            ) from error
        if not (fault.of_tiles and tuning.next_tiles(place, step)):
            _refused[place[0], place[1] if fault.of_tiles else None] = fault.reason
            if backend == "triton":
                raise _refusal(points, fault.reason) from error
    # Out of the handler, which keeps the tensors of the failed call alive.
    result = served(backend, points, compute)
    if _obstacle(points) is None:
        _tell(
            (place, tuning.step_at(place)),
            f"the first choice of tile shapes does not run on {_chip(points)} at a depth of "
            f"{place[1]}: {fault.reason}. Smaller ones serve in its place: the result is the same "
            "to rounding, but may take longer.",
        )
    return result


def _chosen(backend: str, points: Tensor) -> Backend:
    if backend == "torch":
        return torch_backend
    obstacle = _obstacle(points)
    if obstacle is None and (backend == "triton" or points.is_cuda):
        return launch
    if backend == "triton":
        raise _refusal(points, obstacle)
    if points.is_cuda and points.dtype != torch.float64:  # which is documented
        _tell(
            (points.get_device(), obstacle),
            f"the Triton kernels cannot serve on {_chip(points)}: {obstacle}. The torch backend "
            "serves in their place: the result is the same to rounding, but it takes longer, and "
            'waits for the GPU. backend="torch" asks for it without a warning, backend="triton" '
            "makes this an error.",
        )
    return torch_backend


def _obstacle(points: Tensor) -> str | None:
    """Why the kernels cannot serve these points as far as is known, or None."""
    if missing is not None:
        return missing
    obstacle = launch.obstacle(points)
    if obstacle is None and _refused:
        device = points.get_device()
        return _refused.get((device, None)) or _refused.get((device, points.shape[1]))
    return obstacle


def _refusal(points: Tensor, reason: str | None) -> ValueError:
    return ValueError(
        f'backend="triton" cannot serve on {_chip(points)}: {reason}; use backend="torch"'
    )


def _tell(key: tuple[object, object], message: str) -> None:
    """Warn, once for a key."""
    with _lock:
        if key in _told:
            return
        _told.add(key)
    warnings.warn(message, FallbackWarning, stacklevel=2)


def _chip(points: Tensor) -> str:
    return torch.cuda.get_device_name(points.device) if points.is_cuda else str(points.device)


# What a driver says (cuGetErrorString) of code that it cannot load, and of a launch that is too
# large. Anything else of a driver may be the late word on a kernel that ran before.
_UNLOADABLE, _TOO_LARGE = ("kernel image", "PTX"), "too many resources requested"
# The modules of Triton that a call goes through only where it compiles or loads, and those of what
# this takes of the machine.
_COMPILING = "triton.compiler"
_BUILDING = ("triton.runtime.build", "triton.runtime.cache", "triton.runtime.driver")
NEEDS = "Triton needs"  # how `needed` begins


def _fault_of(error: Exception) -> _Fault | None:
    """What an error says of the kernels; None if it is another kind of error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
        return None
    kernel, compiles, builds = None, False, isinstance(error, (OSError, SubprocessError))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        compiles |= module.startswith((_COMPILING, *_BUILDING))
        builds |= module.startswith(_BUILDING)
        if isinstance(frame.f_locals.get("self"), triton.JITFunction):
            kernel = frame.f_locals["self"].__name__
    line = _first_line(error)
    reason = needed(error) or (f"{kernel}: {line}" if kernel else line)
    if "Triton Error [" in line:  # of the driver
        if _TOO_LARGE in line:
            return _Fault(reason, of_tiles=True)
        return _Fault(reason, of_tiles=False) if any(w in line for w in _UNLOADABLE) else None
    return _Fault(reason, of_tiles=not builds) if compiles else None


def needed(error: BaseException) -> str | None:
    """What to install, if an error says that Triton could not build its launcher; else None.

    Triton compiles a little C for the driver before the first launch. Without a compiler it raises
    RuntimeError, or the OSError of starting what CC names; without Python's headers, the compiler
    says so on stderr, and the error has its command only.
    """
    what, cc = f"{NEEDS} a C compiler to launch kernels", os.environ.get("CC")
    if isinstance(error, RuntimeError) and "Failed to find C compiler" in str(error):
        return f"{what}, got none: install gcc or clang, or name one in the environment variable CC"
    if isinstance(error, OSError) and cc is not None and error.filename == cc:
        return (
            f"{what}, got CC={cc!r}, which does not start ({error.strerror}): install gcc, unset CC"
        )
    if isinstance(error, CalledProcessError) and isinstance(error.cmd, list):
        folders = [argument[2:] for argument in error.cmd if argument.startswith("-I")]
        if folders and not any((Path(folder) / "Python.h").exists() for folder in folders):
            python = "python{}.{}".format(*sys.version_info)
            return (
                f"{NEEDS} Python.h to launch kernels, and the C compiler finds none: "
                f"install {python}-dev or python3-dev (python3-devel on Fedora)"
            )
    return None


def _first_line(error: BaseException) -> str:
    """What went wrong. That of a compilation begins with the source, or is that of its cause."""
    while isinstance(error, CompilationError) and not error.error_message and error.__cause__:
        error = error.__cause__
    text = error.error_message if isinstance(error, CompilationError) else str(error)
    lines = (text or "").strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
