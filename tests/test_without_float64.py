"""The torch backend on a device without float64: this CPU, which has to do without.

Any operation that takes or returns a float64 tensor is an error, but for the two of the sketch that
go to the CPU for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pfml_triton import PFMLLoss, Potential, class_potential, potential, potential_energy, sketch
from pfml_triton.functional import Stats, total_energy
from tests.clouds import KINDS, assert_near, cloud


class _NoFloat64(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.on_the_cpu = 0  # calls that are there, and may have float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            is_wide = isinstance(x, Tensor) and x.dtype == torch.float64
            assert self.on_the_cpu or not is_wide, f"{func} in float64"
            assert self.on_the_cpu or x is not torch.float64, f"{func} to float64"
        return out


@contextmanager
def without_float64() -> Iterator[list[str]]:
    """Yields the names of what was done on the CPU."""
    mode, done = _NoFloat64(), []

    def there(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def called(x: Tensor) -> Tensor:
            done.append(function.__name__)
            mode.on_the_cpu += 1
            try:
                return function(x)
            finally:
                mode.on_the_cpu -= 1

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(potential, "_WITHOUT_FLOAT64", ("cpu",))
        for name in ("_orthonormal", "_is_sound"):
            patch.setattr(sketch, name, there(getattr(sketch, name)))
        with mode:
            yield done


def test_what_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, widest in (("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)):
        assert potential.widest(torch.device(kind)) == widest
    for index, has_it in enumerate((True, False)):
        found = SimpleNamespace(has_fp64=has_it)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, found=found: found)
        widest = torch.float64 if has_it else torch.float32
        assert potential.widest(torch.device("xpu", index)) == widest
    potential._xpu_has_float64.cache_clear()


def test_the_sketch_goes_to_the_cpu_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the basis is what it is with float64, to the bit."""
    moved: list[torch.Size] = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.shape) or to_cpu(x))
    points, basis = torch.randn(30, 70), sketch.random_basis(70, torch.device("cpu"))
    expected = sketch.turned_basis(basis, points)
    assert not torch.equal(expected, basis)
    assert not moved
    with without_float64():
        assert torch.equal(sketch.turned_basis(basis, points), expected)
        assert torch.equal(sketch.sound_basis(2 * basis), basis)
    assert moved == [(70, 60)] * 3


def bounds(points: Tensor, labels: Tensor, p: Potential) -> tuple[float, float, Tensor]:
    """Of the errors of energy, active energy and gradient: those that torch_backend.py derives."""
    x = points.double()
    difference = x[:, None] - x
    d2 = difference.square().sum(2)
    same = labels[:, None] == labels
    psi, w, active = p.pair_terms(d2, same)
    constant = torch.where(same, p.attraction_constant, p.repulsion_constant).abs()
    sizes = torch.where(active, psi.abs(), constant) + 2 * constant + (p.alpha == 0)
    n, depth = points.shape
    m = int(active.sum(1).max()) + n + (p.alpha + 2) * (depth + 8)
    of_grad = 2 * (w.abs()[:, :, None] * difference.abs()).sum(1)
    return tuple(m * 2.0**-24 * x for x in (sizes.sum(), sizes[active].sum(), of_grad))


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 2.5, 3.0])
@pytest.mark.parametrize("kind", [*KINDS, "islands"])
def test_within_the_bounds(kind: str, alpha: float, prune: bool) -> None:
    """Of the result with float64, where dense tiles serve what acts in great number."""
    if kind == "islands":  # classes so far apart that few tiles are active, all of whose pairs are
        labels = torch.arange(10).repeat_interleave(64)
        x = torch.randn(640, 20) + 9 * torch.eye(20)[labels]
    else:
        x, labels = cloud(kind, 300, 20, 3, torch.float32)
    p = Potential(alpha, 0.2, 0.5)

    def found() -> tuple[Tensor, Tensor, Stats]:
        leaf = x.clone().requires_grad_()
        value, totals = total_energy(leaf, labels, p, prune=prune, backend="torch")
        (grad,) = torch.autograd.grad(value, leaf)
        return totals, grad, Stats.of(totals)

    totals, grad, stats = found()
    with without_float64():
        ours, our_grad, our_stats = found()
    assert ours.dtype == torch.float32
    assert all(s.dtype in (torch.float32, torch.int64) for s in our_stats)
    energy_bound, active_bound, grad_bound = bounds(x, labels, p)
    assert abs(ours[5] - totals[5]) <= energy_bound
    assert abs(ours[0] - totals[0]) <= active_bound
    assert ((our_grad.double() - grad).abs() <= grad_bound + 1e-30).all()
    for a, b in zip(our_stats[1:3], stats[1:3], strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(our_stats.smallest_distance.double(), stats.smallest_distance, rtol=1e-5)
    if prune and kind != "wide_norms":
        assert our_stats.active_share == pytest.approx(float(stats.active_share))


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_sums_of_large_constants(alpha: float) -> None:
    """20,000 points apart: what is active is not lost among the constants of 4e8 pairs."""
    n, p = 20_000, Potential(alpha)
    x, labels = torch.randn(n, 8), torch.arange(n)
    x[1] = x[0] + 0.02

    def found() -> Tensor:
        return total_energy(x, labels, p, backend="torch")[1]

    expected = found()
    with without_float64():
        ours = found()
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(dtype: torch.dtype, normalize: bool, reduction: str, backend: str) -> None:
    """With turns of the sketch, a memory bank that feels a force, stats and `update_sketch`."""
    x, labels = cloud("clusters", 40, 70, 5, dtype)
    bank, bank_labels = cloud("collisions", 30, 70, 5, dtype, seed=1)
    pairs = 55 * 54 + 55 * 30

    def found() -> list[Tensor]:
        torch.manual_seed(0)
        loss = PFMLLoss(
            5, 70, 3, delta=0.4, delta_rep=1.2, normalize=normalize, reduction=reduction,
            backend=backend, validate=True,
        )  # fmt: skip
        optimizer = torch.optim.SGD(loss.parameters(), lr=1e-9)
        leaves = [x.clone().requires_grad_(), bank.clone().requires_grad_()]
        out = []
        for _ in range(3):
            value = loss(leaves[0], labels, None, leaves[1], bank_labels)
            value.backward()
            assert loss.last_stats is not None
            per_pair = value.detach() / (pairs if reduction == "sum" else 1)
            # What cancels in the value is of the size of the constants.
            out += [per_pair + loss.potential.repulsion_constant, *loss.last_stats.values()]
            optimizer.step()
        loss.update_sketch(x)
        loss.sketch_basis = loss.sketch_basis
        return [*out, loss.proxies.grad, *(leaf.grad for leaf in leaves), loss.sketch_basis]

    *expected, basis = found()
    with without_float64() as on_the_cpu:
        *ours, our_basis = found()
    assert on_the_cpu.count("_orthonormal") == 4
    assert torch.equal(our_basis, basis)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_near(
            a.double(), b.double(), dtype if a.dtype == dtype else torch.float32, what=f"{i}"
        )


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("kind", ["clusters", "collisions"])
def test_other_calls(kind: str, prune: bool) -> None:
    """`class_potential`, the other reduction of `potential_energy`, a NaN and a wrong label."""
    x, labels = cloud(kind, 200, 20, 3, torch.float32)

    def found() -> list[Tensor]:
        leaf = x[:50].clone().requires_grad_()
        psi = class_potential(leaf, x, labels, 1, prune=prune, backend="torch")
        (grad,) = torch.autograd.grad(psi.sum(), leaf)
        mean = potential_energy(
            x, labels, sources=x[:9] + 0.1, source_labels=labels[:9], reduction="mean",
            prune=prune, backend="torch",
        )  # fmt: skip
        return [psi.detach(), grad, mean, potential_energy(x[:0], labels[:0], backend="torch")]

    expected = found()
    with without_float64(), pytest.MonkeyPatch.context() as patch:
        ours = found()
        assert potential_energy(x / 0, labels, prune=prune, backend="torch").isnan()
        patch.setattr("pfml_triton.operators.check_range", lambda *_: None)
        loss = PFMLLoss(3, 20, 1, prune=prune, backend="torch")
        assert loss(x, labels + 1).isnan()
        assert loss.last_stats is not None
        assert loss.last_stats["labels_out_of_range"] == (labels == 2).sum()
    for a, b in zip(ours, expected, strict=True):
        assert_near(a, b.double(), torch.float32)


def test_the_operator_and_its_fake_agree() -> None:
    x, labels = cloud("clusters", 30, 6, 3, torch.float32)
    args = (
        x.requires_grad_(), labels, None, None, None, None, None, None, 3.0, 0.2, 0.2, 0.01,
        True, False, True, "torch", None, False, True, False, False,
    )  # fmt: skip
    operator = torch.ops.pfml_triton.potential_energy.default
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(potential, "_WITHOUT_FLOAT64", ("cpu",))
        torch.library.opcheck(operator, args)
