"""What is called and timed, and what operations a call has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.clocks import elapsed
from bench.clouds import Cloud

OPERATIONS_PER_PAIR = 5  # times D: difference, its square summed (2), weight, sum of the gradient
MOST_COPIES = 64
_HALF_SCALE = 2.0**-14  # of the loss under float16, which holds no gradient above 65,504

T = TypeVar("T")


class Workload:
    """A loss at a cloud, ready to be called again and again.

    Args:
        build: the loss for a cloud.
        cloud: on the device that the loss is to run on.
        dtype: of the embeddings.
        copies: of the inputs, each with a loss of its own, which take turns.
    """

    def __init__(
        self,
        build: Callable[[Cloud], nn.Module],
        cloud: Cloud,
        dtype: torch.dtype = torch.float32,
        copies: int = 1,
    ) -> None:
        self._all = [
            (build(cloud), cloud.embeddings.to(dtype, copy=True).requires_grad_())
            for _ in range(copies)
        ]
        self._turns = itertools.cycle(self._all)
        self._loss, self._embeddings = self._all[0]
        self._labels = cloud.batch_labels
        self.dtype = dtype
        self._scale = _HALF_SCALE if dtype == torch.float16 else 1.0

    def call(self, mode: str) -> tuple[Tensor, float]:
        """One call in one of `MODES`, of the next copy: the loss, and milliseconds."""
        self._next()
        return elapsed(lambda: self._step(mode), self._labels.device)

    def launch(self, mode: str) -> None:
        """As `call`, but nothing is timed, and nothing waits for the device."""
        self._next()
        self._step(mode)

    def _next(self) -> None:
        self.clear()
        self._loss, self._embeddings = next(self._turns)

    def _step(self, mode: str) -> Tensor:
        if mode == "forward":
            with torch.no_grad():
                return self._loss(self._embeddings, self._labels)
        value: Tensor = self._loss(self._embeddings, self._labels)
        (value if self._scale == 1 else value * self._scale).backward()
        return value.detach()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the last call, in float64: by the embeddings [B, D] and by the proxies [C, M, D]."""
        proxies = self._loss.get_parameter("proxies")
        assert self._embeddings.grad is not None
        assert proxies.grad is not None
        by_embeddings, by_proxies = self._embeddings.grad.double(), proxies.grad.double()
        return by_embeddings / self._scale, by_proxies / self._scale

    def active_share(self) -> float | None:
        """Of the tiles of pairs, those that this package's loss has looked at in the last call, in
        [0, 1]; None for others."""
        stats = getattr(self._loss, "last_stats", None)
        return None if stats is None else float(stats["active_share"])

    def clear(self) -> None:
        """Forget the gradients of the last call."""
        self._loss.zero_grad()
        self._embeddings.grad = None


def copies_beyond(cache_bytes: int, cloud: Cloud) -> int:
    """How many copies of a cloud do not fit a cache together, at most `MOST_COPIES`.

    Where they take turns, no call finds its inputs where the last one has left them.
    """
    input_bytes = cloud.points.nbytes
    return min(MOST_COPIES, 1 + cache_bytes // max(input_bytes, 1))


def cache_bytes(device: torch.device) -> int:
    """The L2 cache of a GPU; 0 on a CPU, where a training step too finds its inputs in a cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def operations(function: Callable[[], T]) -> tuple[T, int]:
    """What `function` returns, and how many operations of matrix products and of single pairs.

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
    return result, mode.get_total_flops()
