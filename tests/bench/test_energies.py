from pathlib import Path

import pytest
import torch

from bench import energies
from bench.clouds import make_cloud
from bench.settings import PruningSettings
from pfml_triton import potential_energy
from reference import potential_field

SETTINGS = PruningSettings(small_points=200, worst_points=200, depth=64)
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")


@pytest.mark.parametrize("provider", ["pfml", "pfml dense", "eager"])
@pytest.mark.parametrize("cloud", ["small", "one class", "collapsed"])
def test_every_provider_is_the_energy(cloud: str, provider: str) -> None:
    points, labels = make_cloud(cloud, SETTINGS)
    wide = points.double().requires_grad_()
    expected = potential_field.point_energy(wide, labels, energies.POTENTIAL).sum()
    expected.backward()
    value, seconds = energies.step(energies.energy_of(provider), points.requires_grad_(), labels)
    assert seconds > 0
    assert value == pytest.approx(expected.item(), rel=1e-5 if provider == "eager" else 1e-6)
    error = (points.grad - wide.grad).abs().max() / wide.grad.abs().max()
    assert error < (1e-4 if provider == "eager" else 1e-5)


@pytest.mark.slow
def test_the_compiled_energy_is_the_same() -> None:
    points, labels = make_cloud("small", SETTINGS)
    results = []
    for provider in ("eager", "compile"):
        points.requires_grad_()
        value, _ = energies.step(energies.energy_of(provider), points, labels)
        results.append((value, points.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-3)


def test_a_step_starts_without_a_gradient() -> None:
    points, labels = make_cloud("small", SETTINGS)
    energy = energies.energy_of("pfml")
    energies.step(energy, points.requires_grad_(), labels)
    once = points.grad.clone()
    energies.step(energy, points, labels)
    assert torch.equal(points.grad, once)


def test_row_gradient_is_a_part_of_the_gradient() -> None:
    points, labels = make_cloud("small", SETTINGS)
    rows = torch.tensor([3, 50, 51, 52, 199])
    some = energies.row_gradient(rows, points, labels)
    potential_energy(points.requires_grad_(), labels).backward()
    torch.testing.assert_close(some, points.grad[rows], rtol=1e-4, atol=1e-3)


def test_products_are_counted_whatever_their_form() -> None:
    a, b, out = torch.ones(8, 16), torch.ones(16, 4), torch.ones(8, 4)
    batch_a, batch_b, batch_out = (t.expand(3, -1, -1).clone() for t in (a, b, out))
    low_a, low_b = a.bfloat16(), b.bfloat16()
    calls = (
        lambda: a @ b,
        lambda: torch.mm(a, b, out=out),
        lambda: low_a @ low_b,
        lambda: torch.mm(low_a, low_b, out=out.bfloat16()),
        lambda: torch.addmm(out, a, b),
        lambda: torch.addmm(out, a, b, out=out),
        lambda: out.addmm_(a, b),
    )
    for call in calls:
        assert energies.operations(call)[1:] == (2 * 8 * 16 * 4, 0)
    calls = (
        lambda: batch_a @ batch_b,
        lambda: torch.bmm(batch_a, batch_b, out=batch_out),
        lambda: torch.baddbmm(batch_out, batch_a, batch_b, out=batch_out),
        lambda: batch_out.baddbmm_(batch_a, batch_b),
    )
    for call in calls:
        assert energies.operations(call)[1:] == (3 * 2 * 8 * 16 * 4, 0)
    assert energies.operations(lambda: "result")[0] == "result"


def test_plain_pytorch_takes_three_dense_products() -> None:
    points, labels = make_cloud("small", SETTINGS)
    points.requires_grad_()
    counted = energies.operations(lambda: energies.step(energies.gram_energy, points, labels))
    assert counted[1:] == (6 * 200**2 * 64, 0)


def test_pairs_of_the_torch_backend_are_counted() -> None:
    points, labels = make_cloud("small", SETTINGS)
    points.requires_grad_()
    energy = energies.energy_of("pfml")
    _, products, pairs = energies.operations(lambda: energies.step(energy, points, labels))
    assert pairs == 200 * 3 * 5 * 64  # every point attracts the 3 others of its class
    assert products >= 2 * 200 * 4 * 64


@linux
def test_peak_memory_is_that_of_one_call() -> None:
    def hungry(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return points.sum() + torch.ones(25 << 20).sum()  # 100 MiB

    points = torch.ones(4, 4, requires_grad=True)
    held = torch.ones(50 << 20)
    del held
    for _ in range(2):
        peak, extra = energies.peak_memory(hungry, points, torch.zeros(4))
        assert 99 < extra / 2**20 < 120
        assert peak > extra


@linux
def test_memory_is_available() -> None:
    assert 2**20 < energies.available_bytes(torch.device("cpu")) < 2**50
