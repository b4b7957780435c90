import struct
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bench import figures
from pfml_triton import Potential, potential_energy


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def test_class_field_figure_writes_a_wide_png(tmp_path: Path) -> None:
    figures.class_field_figure(tmp_path / "toy.png")
    width, height = png_size(tmp_path / "toy.png")
    assert width >= 1200
    assert width > height


@pytest.mark.parametrize("proxies_per_class", [0, 2])
def test_embedding_field_figure_writes_a_png(tmp_path: Path, proxies_per_class: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(4)
    embeddings = torch.randn(12, 8, generator=generator) + 3 * torch.eye(8)[labels]
    proxies = torch.randn(3, proxies_per_class, 8, generator=generator)
    path = tmp_path / "fields.png"
    figures.embedding_field_figure(path, embeddings, labels, proxies, Potential(), ["a", "$", "c"])
    assert png_size(path) > (600, 300)


def test_a_section_of_a_circle_is_refused(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="size 3 or more, got 2"):
        figures.embedding_field_figure(
            tmp_path / "x.png",
            torch.rand(4, 2),
            labels,
            torch.rand(2, 1, 2),
            Potential(),
            ["a", "b"],
        )


def test_forces_point_together_within_a_class_and_apart_between_near_classes() -> None:
    potential = Potential(alpha=3.0, delta=0.5)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    same = figures.net_forces(points, torch.tensor([0, 0]), potential)
    # Two unit-distance points, every pair counted twice: |F| = 2 alpha d^-(alpha + 1) = 6.
    torch.testing.assert_close(same, torch.tensor([[6.0, 0.0], [-6.0, 0.0]]))
    near = figures.net_forces(0.25 * points, torch.tensor([0, 1]), potential)
    assert near[0, 0] < 0 < near[1, 0]
    far = figures.net_forces(points, torch.tensor([0, 1]), potential)
    assert torch.equal(far, torch.zeros(2, 2))


def test_forces_lower_the_energy() -> None:
    clouds = [*map(torch.tensor, figures.TOY_SAMPLES)]
    points, labels = torch.cat(clouds), torch.arange(2).repeat_interleave(6)
    forces = figures.net_forces(points, labels, figures.TOY_POTENTIAL)
    step = 1e-4 * functional.normalize(forces.flatten(), dim=0).view_as(forces)
    before = potential_energy(points.double(), labels, figures.TOY_POTENTIAL)
    after = potential_energy((points + step).double(), labels, figures.TOY_POTENTIAL)
    assert after < before


def test_the_toy_set_shows_both_forces() -> None:
    first, second = map(torch.tensor, figures.TOY_SAMPLES)
    delta = figures.TOY_POTENTIAL.delta
    assert torch.cdist(first, second).min() < delta
    assert torch.pdist(first).min() > delta
