"""The launches of a call, seen one by one: to compile them ahead of time, or to look at each.

`record()` stands in for the kernels while the launcher runs, so that what is compiled or checked is
what a real call launches, with the arguments of a real call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from .. import operators
from . import launch

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e5m2: "fp8e5",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def target_of(arch: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like; ValueError for others."""
    if not re.fullmatch(r"sm_\d+|gfx\w+", arch):
        raise ValueError(f'architecture must be like "sm_90" or "gfx942", got {arch!r}')
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@dataclass
class Launch:
    """One launch as the launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # by parameter name, run-time arguments and constexprs
    options: dict[str, int]

    def run(self) -> None:
        """Make the launch."""
        self.kernel[self.grid](**self.args, **self.options)

    def compile(self, arch: str) -> Any:
        """Compile for `arch`, specialised on these arguments as Triton's JIT does it.

        It takes no GPU.

        Raises:
            RuntimeError: in a process with TRITON_INTERPRET.
            ValueError: an architecture of no kind that is known.
        """
        if not isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError("no compiled kernels here: unset TRITON_INTERPRET before the import")
        target = target_of(arch)
        backend = make_backend(target)
        signature, constexprs, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.args[parameter.name]
            if self._is_constant(parameter):
                signature[parameter.name] = "constexpr"
                constexprs[parameter.name] = value
                continue
            specialised = ""
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + _TYPES[value.dtype]
                specialised = backend.get_tensor_specialization(value, align=True)
            elif isinstance(value, int):
                size = "i32" if abs(value) < 2**31 else "i64"
                signature[parameter.name] = parameter.annotation_type or size
                if not parameter.do_not_specialize:
                    specialised = backend.get_int_specialization(value, align=True)
            else:
                signature[parameter.name] = "fp32"
            if specialised:
                attributes[i,] = backend.parse_attr(specialised)
        source = ASTSource(
            fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attributes
        )
        return triton.compile(source, target=target, options=self.options)

    def runtime_args(self) -> list[Any]:
        """The arguments that the compiled kernel takes, in order, without constexprs."""
        return [self.args[p.name] for p in self.kernel.params if not self._is_constant(p)]

    def _is_constant(self, parameter: Any) -> bool:
        """Whether a parameter is compiled in: a constexpr, or an integer that is 1."""
        value = self.args[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        return parameter.is_constexpr or is_one


@dataclass
class _Recorder:
    kernel: Any
    launches: list[Launch]
    run: Callable[[Launch], None] | None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            names = self.kernel.arg_names
            bound = dict(zip(names, args, strict=False)) | kwargs
            assert set(bound) == set(names), set(bound) ^ set(names)
            self.launches.append(Launch(self.kernel, grid, bound, options))
            if self.run is not None:
                self.run(self.launches[-1])

        return launched


@contextmanager
def record(run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of making them.

    Works with tensors of any device, "meta" included. `run`, if given, is called with every launch
    at its place in the stream: it may make it, with what comes before and after.
    """
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(launch).items() if name.endswith("_kernel")}
    has_no_values = operators.has_no_values
    operators.has_no_values = lambda x: False  # or a call would stop at its operator
    try:
        for name, kernel in kernels.items():
            setattr(launch, name, _Recorder(kernel, launches, run))
        yield launches
    finally:
        operators.has_no_values = has_no_values
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
