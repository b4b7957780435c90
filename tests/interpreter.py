"""Triton's interpreter, without the half of its work that changes no result.

Import this before anything that imports triton.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import dataclasses
from typing import Any

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
