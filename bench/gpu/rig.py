"""What the phases share: where rows go, the device, the clouds, and losses at them."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.clouds import Cloud, make_cloud
from bench.costs import Workload
from bench.gpu.phases import ROWS
from bench.memory import is_out_of_memory
from bench.parity import Truth, errors, truth
from bench.providers import POTENTIAL, PROVIDERS
from bench.results import append_row
from bench.settings import SIZES

Build = Callable[[Cloud], nn.Module] | None


@dataclass
class Rig:
    """What a phase works with.

    Args:
        out: folder that gets the rows.
        phase: name of the phase.
        rehearses: tiny clouds on the CPU, the torch backend, kernels in Triton's interpreter.
    """

    out: Path
    phase: str
    rehearses: bool = False
    _clouds: dict[str, Cloud] = field(default_factory=dict, init=False, repr=False)
    _truths: dict[tuple[str, torch.dtype], Truth] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearses else torch.device("cuda", 0)

    def row(self, name: str, **values: Any) -> None:
        """Append a row at once, so that it outlives whatever comes, and print it."""
        values = {key: _plain(value) for key, value in values.items()}
        row = {"bench": "gpu", "phase": self.phase, "name": name} | values
        append_row(self.out / ROWS, row)
        shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"{name}:", ", ".join(shown), flush=True)

    @contextmanager
    def guarded(self, name: str, **values: Any) -> Iterator[None]:
        """Let what fails be a row, so that the next case is measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
            self.row(name, **values, error=text, out_of_memory=is_out_of_memory(error))
        if not self.rehearses:
            torch.cuda.empty_cache()  # raises if the device is lost, which ends the phase

    def cloud(self, name: str) -> Cloud:
        """The cloud of one of `SIZES`, on the device."""
        if name not in self._clouds:
            size = SIZES[name]
            if self.rehearses:
                classes = min(size.classes, 5)
                size = replace(size, batch=10, classes=classes, proxies=3, depth=96)
            self._clouds[name] = make_cloud(size, 0).to(self.device)
        return self._clouds[name]

    def truth(self, name: str, dtype: torch.dtype) -> Truth:
        """In float64, of one of `SIZES`."""
        if (name, dtype) not in self._truths:
            self._truths[name, dtype] = truth(self.cloud(name), dtype, POTENTIAL)
        return self._truths[name, dtype]

    def work(self, name: str, dtype: torch.dtype = torch.float32, build: Build = None) -> Workload:
        """A loss at one of `SIZES`, this package's if there is nothing to build: never "auto", so
        that what cannot be served is an error."""
        ours = PROVIDERS["pfml-torch" if self.rehearses else "pfml-triton"].build
        return Workload(build or ours, self.cloud(name), dtype)

    def errors(self, name: str, work: Workload, value: Tensor) -> dict[str, float | None]:
        """Of the last call: of the gradient, relative to the largest force, and of the energy."""
        off = errors(self.truth(name, work.dtype), float(value), *work.gradients())
        return {"gradient_error": off.gradient, "energy_error": off.energy}


def bits(x: Tensor) -> Tensor:
    """As integers, in which NaN equals itself, and 0 is not -0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(whole[x.element_size()])


def _plain(value: Any) -> Any:
    """As JSON has it, which has no dtypes, no NaN and no infinity."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
