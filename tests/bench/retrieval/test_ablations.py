from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bench.retrieval.ablations import PANELS, ablation_figure, points_of
from bench.retrieval.cells import gather
from tests.bench.retrieval.synthetic import OPTIONS, row, rows

CELLS = gather(rows())


def test_points_are_the_plain_recipe_and_what_overrides_one_setting_alone() -> None:
    found = {field: points_of(CELLS, field) for field in PANELS}
    xs = {field: [x for x, _ in points[0.0]] for field, points in found.items()}
    assert xs == {
        "proxies_per_class": [0, 3], "alpha": [1.0, 3.0], "delta": [0.2, 0.3],
        "delta_rep": [0.0, 0.25],
    }  # fmt: skip
    assert all([*points] == [0.0] for points in found.values())  # noise: the plain one alone
    mean = (row(variant="alpha=1.0")["final_r1"] + row(variant="alpha=1.0", seed=1)["final_r1"]) / 2
    assert found["alpha"][0.0][0][1].mean == pytest.approx(mean)
    assert found["alpha"][0.0][1][1].n == 3


def test_other_losses_and_noise_levels_stay_apart() -> None:
    options = {"options": OPTIONS["pfml"] | {"alpha": 0.0}, "variant": "alpha=0.0"}
    noisy = row(noise=0.2) | options | {"run": "x", "final_r1": 0.5}
    other = row("triplet", variant="alpha=0.0")
    points = points_of(gather([*rows(), noisy, other]), "alpha")
    assert [*points] == [0.0, 0.2]
    assert [x for x, _ in points[0.2]] == [0.0, 3.0]
    assert points_of(gather([row(), row("triplet", variant="alpha=0.0")]), "alpha") == {}


def test_the_figure_tells_measured_from_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    cells = [cell for cell in CELLS if not cell.variant.startswith("delta=")]
    ablation_figure(cells, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    above, below = figures[0].subfigs
    assert above.get_suptitle() == "Measured: dots, cnn, test classes"
    assert below.get_suptitle().startswith("Published, other data sets")
    measured, published = (
        [[line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) > 1]
         for axes in part.axes] for part in (above, below)
    )  # fmt: skip
    assert measured[1][0][1] == pytest.approx([3.0, 89.0])
    assert [text.get_text() for text in above.axes[2].texts] == ["not run"]
    assert published[0][0][0] == pytest.approx([0, 86.3])
    assert [text.get_text() for text in below.axes[2].texts] == ["flat"]


def test_nothing_varied_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run varies one of proxies_per_class, alpha"):
        ablation_figure(gather([row(), row("triplet")]), tmp_path / "x.png")
