"""Triton's interpreter, without the half of its work that changes no result, with bounds checked.

Import this before anything that imports triton.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import dataclasses
import threading
from typing import Any

import torch
import triton.experimental.gluon  # noqa: F401  # the interpreter does, wherever it first needs it
from triton.runtime import interpreter

# The interpreter computes whether an integer operation overflows, then ignores the answer unless
# `debug` is set: a sixth of a kernel's time.
_builder = interpreter.interpreter_builder
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

_patched: set[str] = set()  # modules of device functions


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function.

    The interpreter replaces all of triton.language anew at every such call, though the launch of
    the kernel has done it for the kernel's own module, and no launch undoes it for another: more
    than a third of a kernel's time.
    """
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter.InterpretedFunction.__call__ = _call

# Every load and store has to lie in a tensor that the kernel was given. Without a check, a read
# beyond one goes unnoticed where the memory around it is 0, as it often is.

_launch = threading.local()
_init_args = interpreter.GridExecutor._init_args_hst
_load = type(_builder).create_masked_load
_store = type(_builder).create_masked_store


def _init_args_and_bounds(self: Any, args: Any, kwargs: Any) -> Any:
    found = _init_args(self, args, kwargs)
    tensors = (interpreter._unwrap_tensor(x) for x in (*found[0], *found[1].values()))
    _launch.kernel = self.fn.__name__
    _launch.bounds = [
        (t.data_ptr(), t.data_ptr() + (1 + _offset_of_the_last(t)) * t.element_size())
        for t in tensors
        if isinstance(t, torch.Tensor) and t.numel() > 0
    ]
    return found


def _offset_of_the_last(tensor: torch.Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sizes)


def _check(pointers: Any, mask: Any) -> None:
    used = pointers.data[mask.data]
    if used.size == 0:
        return
    nbytes = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    first, end = int(used.min()), int(used.max()) + nbytes
    if not any(low <= first and end <= high for low, high in _launch.bounds):
        nearest = min(_launch.bounds, key=lambda bound: abs(bound[0] - first), default=None)
        raise IndexError(
            f"{_launch.kernel} uses bytes {first} to {end}, which are in none of its tensors; "
            f"the nearest has {nearest}"
        )


def _bounded_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    _check(pointers, mask)
    return _load(self, pointers, mask, *rest, **named)


def _bounded_store(
    self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
) -> Any:
    _check(pointers, mask)
    return _store(self, pointers, value, mask, *rest, **named)


interpreter.GridExecutor._init_args_hst = _init_args_and_bounds
type(_builder).create_masked_load = _bounded_load
type(_builder).create_masked_store = _bounded_store
