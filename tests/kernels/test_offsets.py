"""Offsets beyond 2^31: the interpreter's integers are as wide as the kernels', and wrap as they do.

The memory is a file with holes: only the pages that are touched exist.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from pfml_triton import PFMLLoss, Potential, potential_energy
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import tiles_for
from tests.clouds import basis, cloud

STRIDE = (1 << 31) // 3 + 8  # entries: from the fourth row on offsets are beyond 2^31


@pytest.fixture
def holes(tmp_path: Path) -> Tensor:
    """[8, 5] points that are gigabytes apart, zeros; what lies around them is zero too, so that an
    offset that wrapped to a negative one finds another point there."""
    path = tmp_path / "points"
    size = (1 << 31) + 7 * STRIDE + 5
    with path.open("wb") as file:
        file.truncate(4 * size)
    whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
    return whole.as_strided((8, 5), (STRIDE, 1), 1 << 31)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_are_gigabytes_apart(holes: Tensor, backend: str) -> None:
    """As points, as sources, beside proxies: the same as of a copy that is contiguous."""
    x, labels = cloud("clusters", 8, 5, 3, torch.float32)
    holes.copy_(x)
    loss = PFMLLoss(3, 5, 2, backend=backend).eval()
    results = []
    for points in (x.clone(), holes):
        given = points.detach().requires_grad_()
        energy = potential_energy(
            given, labels, sources=given.detach(), source_labels=labels + 1, backend=backend
        )
        value = loss(given, labels)
        results.append([energy.detach(), value.detach()])
        for u in (energy, value):
            (grad,) = torch.autograd.grad(u, given)
            results[-1].append(grad)
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_grid_stays_within_what_a_gpu_launches() -> None:
    """A hundred points that meet 20 million: the filter's second axis ends at 65,535."""
    points, labels = cloud("clusters", 100, 4, 3, torch.float32)
    packed = launch.gather(points, labels, Potential(), basis=basis(points))
    far = 20_000_000 // 256 * 256
    acting = mock.Mock(spec=launch.Cloud)
    acting.sq_norm, acting.right = torch.empty(far, device="meta"), packed.right
    kernel = mock.MagicMock()
    with mock.patch.object(launch, "_filter_kernel", kernel):
        launch.near_tiles(packed, acting)
    ((_, across),) = (call.args[0] for call in kernel.__getitem__.call_args_list)
    launched = kernel.__getitem__.return_value.call_args
    assert across <= 65_535
    # Every block of columns has its program.
    strip, blocks = launched.kwargs["STRIP"], far // tiles_for(4, 100).filter_n
    assert across * strip >= blocks > (across - 1) * strip
