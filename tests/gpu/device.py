"""The GPU that these tests are for, and what tests of several files do there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pfml_triton import PFMLLoss

DEVICE = torch.device("cuda", 0)
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]


def put(*tensors: Tensor) -> list[Tensor]:
    """The tensors, on the GPU."""
    return [tensor.to(DEVICE) for tensor in tensors]


def step(loss: PFMLLoss, x: Tensor, labels: Tensor, *bank: Tensor) -> list[Tensor]:
    """Value, gradients of embeddings and proxies, and statistics of a call."""
    x = x.detach().requires_grad_()
    value = loss(x, labels, None, *bank)
    gradients = torch.autograd.grad(3 * value, (x, loss.proxies))
    assert loss.last_stats is not None
    return [value.detach(), *gradients, *loss.last_stats.values()]


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
