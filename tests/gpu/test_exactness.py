"""What the kernels compute on a GPU, against float64. The most telling tests come first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pfml_triton import PFMLLoss, Potential, class_potential, potential_energy
from pfml_triton.selfcheck import kernels, loss
from pfml_triton.selfcheck.result import Log, Report
from tests.clouds import KINDS, assert_near, cloud, eager, truth
from tests.gpu.device import DEVICE, ON_GPU, put, step

pytestmark = ON_GPU

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
OPS = torch.ops.pfml_triton


def assert_passed(report: Report) -> None:
    assert report.checks
    assert not report.not_checked, report.not_checked
    failed = [f"{c.name}, {c.dtype}, D = {c.depth}: {c.detail}" for c in report.failed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("case", kernels.on_gpu(), ids=str)
def test_every_kernel(case: kernels.Case) -> None:
    """The checks of the self-check: what each kernel writes is what float64 makes of what it read,
    in every dtype and kind of depth."""
    report = Report({}, [], {})
    kernels.check(Log(report, DEVICE, "gpu"), case)
    assert_passed(report)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
def test_whole_losses(dtype: torch.dtype) -> None:
    """Those of the self-check as well: near collisions, pruning, NaN, runs that repeat, and CUDA
    graphs of evaluation and training."""
    report = Report({}, [], {})
    loss.check(Log(report, DEVICE, "gpu"), "triton", [dtype], [64, 100, 512], 600)
    assert_passed(report)


@pytest.mark.parametrize("potential", [Potential(), Potential(2.5, 0.3, 0.6)], ids=["3", "2.5"])
@pytest.mark.parametrize(("dtype", "depth"), [(SINGLE, 512), (SINGLE, 100), (BRAIN, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_clouds(kind: str, dtype: torch.dtype, depth: int, potential: Potential) -> None:
    """Energy and gradient against the reference, as near as eager PyTorch is, or float32."""
    x, labels = put(*cloud(kind, 300, depth, 25, dtype))
    x.requires_grad_()
    value = potential_energy(x, labels, potential, backend="triton")
    (grad,) = torch.autograd.grad(value, x)
    with torch.device(DEVICE):  # for the masks that the references make
        true, true_grad = truth(x, labels, potential)
        plain, plain_grad = eager(x.float(), labels, potential)
    assert_near(value.detach(), true, SINGLE, plain, "energy")
    assert_near(grad, true_grad, dtype, plain_grad, "gradient")


@pytest.mark.parametrize("normalize", [True, False])
def test_memory_bank(normalize: bool) -> None:
    """Value, gradients and statistics of a loss with the field of 5,000 other points, which shares
    out long lists, beside the torch backend in float64."""
    ours = PFMLLoss(40, 96, 3, delta_rep=0.5, normalize=normalize, backend="triton").to(DEVICE)
    theirs = copy.deepcopy(ours).double()
    theirs.backend = "torch"
    x, labels = put(*cloud("clusters", 150, 96, 40, SINGLE))
    bank, bank_labels = put(*cloud("clusters", 5000, 96, 40, SINGLE, seed=1))
    bank[:50] = x[:50] + 1e-3
    found = step(ours.eval(), x, labels, bank, bank_labels)
    true = step(theirs.eval(), x.double(), labels, bank.double(), bank_labels)
    for a, b in zip(found[:-1], true[:-1], strict=True):  # the last is of tiles, which differ
        # Scaled to unit length in float32, points 0.01 apart lose 6e-6 of their distance.
        assert (a.double() - b.double()).abs().max() <= 5e-5 * b.abs().max()


def test_pruning_changes_nothing() -> None:
    """At a size where most of the tiles are skipped, and others have long lists."""
    x, labels = put(*cloud("clusters", 20_000, 128, 2_000, SINGLE))
    results = []
    for prune in (True, False):
        leaf = x.clone().requires_grad_()
        value = potential_energy(leaf, labels, prune=prune, backend="triton")
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*results, strict=True):
        assert_near(a, b.double(), SINGLE)


def test_class_potential() -> None:
    x, labels = put(*cloud("collisions", 700, 100, 9, SINGLE))
    queries = (x[::3] + 0.01).requires_grad_()
    wide = queries.detach().double().requires_grad_()
    ours = class_potential(queries, x, labels, 4, backend="triton")
    true = class_potential(wide, x.double(), labels, 4, backend="torch")
    assert_near(ours.detach(), true.detach(), SINGLE, what="field")
    (grad,), (true_grad,) = (torch.autograd.grad(f.sum(), q) for f, q in
                             ((ours, queries), (true, wide)))  # fmt: skip
    assert_near(grad, true_grad, SINGLE, what="gradient")


@pytest.mark.parametrize("unit", [True, False])
def test_opcheck(unit: bool) -> None:
    x, labels, sources, classes = put(
        *cloud("clusters", 40, 70, 4, SINGLE), *cloud("clusters", 30, 70, 4, SINGLE, seed=1)
    )
    proxies = x[:8].reshape(4, 2, 70).clone().requires_grad_()
    labels = torch.cat([labels, torch.arange(8, device=DEVICE) // 2])
    field: tuple[Any, ...] = (None, None, None, 3.0, 0.5, 0.8, 0.01)
    how = unit, True, True, "triton", 4, False, True, True, True
    leaves = x.requires_grad_(), labels, proxies, sources.requires_grad_(), classes
    torch.library.opcheck(OPS.potential_energy.default, (*leaves, *field, *how))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    """One graph with no break, of which replays find what eager mode does."""
    module = PFMLLoss(9, 70, 2, delta_rep=0.5, backend="triton").to(DEVICE).eval()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for seed in range(4):
        x, labels = put(*cloud("clusters", 90, 70, 9, SINGLE, seed))
        found: list[list[Tensor]] = []
        for call in (compiled, module):
            leaf = x.clone().requires_grad_()
            module.proxies.grad = None
            value = call(leaf, labels)
            value.backward()
            assert leaf.grad is not None
            assert module.proxies.grad is not None
            found.append([t.clone() for t in (value.detach(), leaf.grad, module.proxies.grad)])
        for a, b in zip(*found, strict=True):
            assert_near(a, b.double(), SINGLE)
