import math

import pytest
import torch
from torch.nn.functional import normalize

from bench import parity
from bench.clouds import Cloud, make_cloud
from bench.settings import Size
from pfml_triton import Potential
from reference.potential_field import total_potential_energy

POTENTIAL = Potential()
SIZES = [
    Size(10, 9, 3, depth=24),
    Size(10, 1, 60, depth=24, kind="one-class"),
    Size(10, 20, 4, depth=24, kind="collapsed"),
    Size(30, 10, 0, depth=24),
]


def autograd(cloud: Cloud) -> tuple[float, torch.Tensor]:
    """Energy and gradient [N, D] of the reference in float64, as a loss scales its points."""
    raw = cloud.points.double().mul(2).requires_grad_()
    embeddings, proxies = normalize(raw).split([cloud.size.batch, cloud.size.n - cloud.size.batch])
    labels, proxy_labels = cloud.labels.split([len(embeddings), len(proxies)])
    energy = total_potential_energy(embeddings, labels, proxies, proxy_labels, POTENTIAL)
    energy.backward()
    assert raw.grad is not None
    return energy.item(), raw.grad


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_truth_is_the_reference(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_BLOCK_PAIRS", 1000)  # several blocks
    cloud = make_cloud(size, seed=0)
    energy, gradient = autograd(cloud)
    long = Cloud(cloud.points * 2, cloud.labels, size)
    expected = parity.truth(long, torch.float32, POTENTIAL)
    assert expected.energy == pytest.approx(energy, rel=1e-12)
    assert len(expected.rows) == min(size.n, parity.SAMPLED_ROWS)
    torch.testing.assert_close(
        expected.gradient, gradient[expected.rows], rtol=0, atol=1e-12 * expected.force
    )
    assert expected.force > expected.gradient.abs().max()


def test_a_large_cloud_has_a_sample_of_rows_and_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "MOST_POINTS", 36)
    monkeypatch.setattr(parity, "SAMPLED_ROWS", 5)
    expected = parity.truth(make_cloud(SIZES[0], seed=0), torch.float32, POTENTIAL)
    assert expected.rows.tolist() == [0, 9, 18, 27, 36]
    assert expected.energy is None


def test_the_truth_is_that_of_rounded_embeddings() -> None:
    cloud = make_cloud(SIZES[0], seed=0)
    rounded = cloud.points.clone()
    rounded[: cloud.size.batch] = cloud.embeddings.bfloat16().float()
    of_rounded = parity.truth(Cloud(rounded, cloud.labels, cloud.size), torch.float32, POTENTIAL)
    found = parity.truth(cloud, torch.bfloat16, POTENTIAL)
    assert torch.equal(found.gradient, of_rounded.gradient)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_errors_see_what_is_wrong(size: Size) -> None:
    cloud = make_cloud(size, seed=0)
    energy, gradient = autograd(cloud)
    gradient *= 2  # by points of unit length
    expected = parity.truth(cloud, torch.float32, POTENTIAL)

    def errors_of(energy: float, gradient: torch.Tensor) -> parity.Errors:
        shape = size.classes, size.proxies, size.depth
        return parity.errors(
            expected, energy, gradient[: size.batch], gradient[size.batch :].view(shape)
        )

    right = errors_of(energy, gradient)
    assert right.gradient < 1e-12
    assert right.energy is not None
    assert right.energy < 1e-12
    assert errors_of(energy, gradient * 1.01).gradient > 1e-4
    assert errors_of(energy * 1.01, gradient).energy == pytest.approx(0.01)
    one = gradient.clone()
    one[expected.rows[-1], 3] += 0.01 * expected.force
    assert errors_of(energy, one).gradient == pytest.approx(0.01, rel=1e-3)
    one[expected.rows[0], 0] = math.nan
    assert math.isnan(errors_of(energy, one).gradient)
    # What the loss would be without the derivative of the scaling to unit length.
    radial = gradient + 0.1 * expected.force * cloud.points
    assert errors_of(energy, radial).gradient > 1e-3
