from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bench.retrieval.cells import gather
from bench.retrieval.curves import distance_figure, learning_figure
from bench.retrieval.wasserstein import ProxyDistances
from tests.bench.retrieval.synthetic import row, rows

PLAIN = gather([r for r in rows() if not r["variant"]])


def test_curves_are_means_over_seeds_of_common_epochs(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {r["run"]: {e: r["final_r1"] * e / 4 for e in (1, 2, 4)} for r in rows()}
    curves[row(seed=1)["run"]][3] = 0.1  # the other seeds lack it
    del curves[row("triplet", 0.2, 2)["run"]]
    learning_figure(PLAIN, curves, tmp_path / "x.png")
    clean, noisy = drawn[0].axes
    assert clean.get_title(loc="left") == "right labels"
    assert clean.lines[0].get_xydata().tolist() == [
        [e, pytest.approx(89.0 * e / 4)] for e in (1, 2, 4)
    ]
    assert (len(clean.lines), len(noisy.lines)) == (3, 2)
    ends = [text.get_text() for text in clean.texts]
    assert ends == ["69.0", "79.0", "89.0"]
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == [
        "PFML", "Proxy Anchor", "Triplet",
    ]  # fmt: skip


def test_a_curve_that_falls_stays_in_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {r["run"]: {0: 0.2, 1: 0.1} for r in rows()}
    learning_figure(PLAIN, curves, tmp_path / "x.png")
    assert drawn[0].axes[0].get_ylim()[0] == pytest.approx(10)


def test_no_curve_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation of pfml"):
        learning_figure(PLAIN, {}, tmp_path / "x.png")


def test_boxes_are_in_each_runs_own_units(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [
        ProxyDistances(np.full(9, 0.2), 2, 0.4, 2.0),
        ProxyDistances(np.full(9, 0.4), 2, 0.8, 4.0),
    ]
    distance_figure([(PLAIN[0], runs), (PLAIN[3], runs[:1])], tmp_path / "x.png")
    panels = drawn[0].axes
    # The median is the fifth line of a box: two whiskers and two caps come before.
    medians = [axes.lines[4].get_xdata()[0] for axes in panels]
    assert medians == pytest.approx([0.3, 0.5, 0.1])
    assert [t.get_text() for t in panels[0].get_yticklabels()] == [
        "PFML",
        "Proxy Anchor, 20 % noise",
    ]
    assert (tmp_path / "x.png").stat().st_size > 1000
