import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from bench.retrieval.cells import Cell, gather
from bench.retrieval.tables import (
    TextTable,
    distance_table,
    main_table,
    noise_table,
    published_noise_table,
    published_table,
    study_table,
)
from bench.retrieval.wasserstein import ProxyDistances
from tests.bench.retrieval.synthetic import LEVEL, row, rows


def mean_and_sd(values: list[float], scale: float = 100) -> str:
    """By hand, in percent."""
    mean = 0.0
    for value in values:
        mean += value / len(values)
    square = 0.0
    for value in values:
        square += (value - mean) ** 2 / (len(values) - 1)
    return f"{scale * mean:.1f} ± {scale * math.sqrt(square):.1f}"


def plain(noise: float | None = None, dataset: str = "dots") -> list[Cell]:
    found = gather([r | {"dataset": dataset} for r in rows() if not r["variant"]])
    return [c for c in found if noise is None or c.label_noise == noise]


def texts(table: TextTable, *, published: bool = False) -> list[tuple[str, ...]]:
    return [line.texts for line in table.lines if line.published == published]


@pytest.mark.parametrize("when", ["final", "best"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_main_table_is_mean_and_spread_over_seeds(when: str, noise: float) -> None:
    table = main_table(plain(noise), when)
    assert table.columns == ("loss", "seeds", "R@1", "R@2", "R@4", "MAP@R")
    expected = []
    for loss, name in (("pfml", "PFML"), ("proxy-anchor", "Proxy Anchor"), ("triplet", "Triplet")):
        line = [name, "3"]
        for metric in ("r1", "r2", "r4", "map_at_r"):
            values = [row(loss, noise, seed)[f"{when}_{metric}"] for seed in range(3)]
            line.append(mean_and_sd(values))
        expected.append(tuple(line))
    assert texts(table) == expected
    assert [line.best for line in table.lines] == [{2, 3, 4, 5}, set(), set()]
    assert not texts(table, published=True)
    assert ("20 % of the training labels wrong" in table.title) == bool(noise)


def test_published_figures_stand_beside_those_of_their_data_set() -> None:
    table = main_table(plain(0.0, "cub"))
    assert len(texts(table)) == 3
    lines = {line[0]: line[1:] for line in texts(table, published=True)}
    assert lines["PFML (ResNet-50, 512)"] == ("published", "73.4", "82.4", "—", "—")
    assert len(lines) == 12
    assert "Published: Bhatnagar" in table.note
    assert {line.best for line in table.lines if line.published} == {frozenset()}


def test_one_seed_has_no_spread() -> None:
    table = main_table(gather([row(seed=4)]))
    assert table.lines[0].texts[2] == "86.0"
    assert table.note.startswith("Percent, of one seed, 4.")


def test_missing_seeds_are_told() -> None:
    results = [r for r in rows() if r["run"] not in ("dots-cnn-pfml-noise0-seed1",)]
    cells = gather([r for r in results if not r["variant"]])
    table = main_table([c for c in cells if not c.label_noise])
    assert [line[1] for line in texts(table)] == ["2 of 3, no 1", "3", "3"]
    assert texts(table)[0][2] == mean_and_sd([0.9, 0.88])
    assert [line[1] for line in texts(noise_table(cells))] == ["2 of 3, no 1 / 3", "3", "3"]


def test_the_drop_is_seed_by_seed() -> None:
    table = noise_table(plain())
    assert table.columns == ("loss", "seeds", "clean", "20 % noise", "drop")
    for line, loss in zip(texts(table), LEVEL, strict=True):
        clean, noisy = (
            [row(loss, noise, seed)["final_r1"] for seed in range(3)] for noise in (0, 0.2)
        )
        drops = [a - b for a, b in zip(clean, noisy, strict=True)]
        assert line[2:] == (mean_and_sd(clean), mean_and_sd(noisy), mean_and_sd(drops))


def test_the_least_drop_is_the_best_and_is_of_common_seeds() -> None:
    cells = gather(
        [row("pfml", 0.0, 0, final_r1=0.9), row("pfml", 0.0, 1, final_r1=0.5),
         row("pfml", 0.2, 0, final_r1=0.6),
         row("triplet", 0.0, 0, final_r1=0.5), row("triplet", 0.2, 0, final_r1=0.4)]
    )  # fmt: skip
    table = noise_table(cells)
    assert texts(table)[0] == ("PFML", "2 / 1 of 2, no 1",
                               mean_and_sd([0.9, 0.5]), "60.0", "30.0")  # fmt: skip
    assert [line.best for line in table.lines] == [{2, 3}, {4}]


def test_a_loss_without_clean_runs_has_no_drop() -> None:
    table = noise_table(gather([row(), row("triplet", 0.2), row("triplet", 0.5)]))
    assert table.columns[2:] == ("clean", "20 % noise", "drop", "50 % noise", "drop")
    assert texts(table)[1][2:] == ("—", "60.0", "—", "45.0", "—")
    assert texts(table)[0][2:] == ("90.0", "—", "—", "—", "—")


def test_published_drops_are_of_the_same_network() -> None:
    lines = {
        line[0]: line[2:] for line in texts(noise_table(plain(dataset="cars")), published=True)
    }
    assert lines["PFML (ResNet-50, 512)"] == ("92.7", "84.5", "8.2")
    assert lines["Triplet (ResNet-50, 512)"] == ("—", "67.5", "—")


def test_study_table_compares_with_the_plain_recipe() -> None:
    cells = [c for c in gather(rows()) if c.loss == "pfml"]
    table = study_table(cells)
    lines = texts(table)
    assert [line[0] for line in lines] == [
        "plain", "plain", "alpha=1.0", "alpha=1.0, delta=0.3", "delta=0.3", "delta_rep=0.45",
        "proxies_per_class=0",
    ]  # fmt: skip
    assert lines[0][4] == ""
    found = [[row(variant=v, seed=s)["final_r1"] for s in (0, 1)] for v in ("", "alpha=1.0")]
    gain = [b - a for a, b in zip(*found, strict=True)]
    assert lines[2][1:5] == ("0 %", "2 of 3, no 2", mean_and_sd(found[1]), mean_and_sd(gain))
    better = gather([row(), row(variant="alpha=1.0", final_r1=0.95)])
    assert texts(study_table(better))[1][4] == "+5.0"


def test_one_table_is_of_one_data_set() -> None:
    with pytest.raises(ValueError, match="one dataset, got dots, cub"):
        main_table(plain(0.0) + plain(0.0, "cub"))
    with pytest.raises(ValueError, match=r"one label_noise, got 0\.0, 0\.2"):
        main_table(plain())
    with pytest.raises(ValueError, match="at least one cell"):
        noise_table([])


def test_one_table_is_of_one_budget() -> None:
    cells = gather([row(), row("triplet", epochs=5)])
    with pytest.raises(ValueError, match="one table is of one epochs, got 4, 5"):
        main_table(cells)


def test_published_figures_are_of_test_classes() -> None:
    table = main_table(gather([row(dataset="cub", network="resnet50", split="validation")]))
    assert not any(line.published for line in table.lines)


def test_distances_are_compared_in_each_runs_own_units() -> None:
    cell, *_ = plain(0.0)
    runs = [
        ProxyDistances(np.array([0.1, 0.3]), 2, 0.4, 2.0),
        ProxyDistances(np.array([0.4]), 2, 1.6, 1),
    ]
    (line,) = texts(distance_table([(cell, runs)], (0, 1, 2, 3)))
    assert line[:4] == ("PFML", "2", "0 %", "3 of 4, no 3")
    w2, spread, apart = ([0.2, 0.4], [0.5, 0.25], [0.1, 0.4])
    for text, values in zip(line[4:], (w2, spread, apart), strict=True):
        mean = sum(values) / 2
        sd = abs(values[0] - values[1]) / math.sqrt(2)
        assert text == f"{mean:.3f} ± {sd:.3f}"


def test_published_tables_say_so() -> None:
    for table, lines in ((published_table(), 12), (published_noise_table(), 6)):
        assert len(table.lines) == lines
        assert all(line.published for line in table.lines)
        assert table.title.startswith("Published, other data sets")
        assert "Not measured here" in table.note
    assert published_table().lines[4].texts == (
        "ResNet-50, 512", "PFML", "73.4", "82.4", "92.7", "95.5", "82.9", "92.5",
    )  # fmt: skip


def test_the_page_and_the_console_show_every_text() -> None:
    cells = gather([row(dataset="<b>[red]cub", seed=s) for s in range(2)])
    table = main_table(cells)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table.rich())
    shown = console.export_text()
    html = table.html()
    for text in (*table.columns, *table.lines[0].texts):
        assert text in shown
        assert text in re.sub("<[^>]+>", "|", html)
    assert "<b>[red]cub" in shown  # neither markup nor an element
    odd = main_table(gather([row(loss="pfml"), row() | {"loss": "<i>x", "run": "x"}]))
    assert "&lt;i&gt;x" in odd.html()
    assert "<i>" not in odd.html()


def test_tables_fit_a_console_of_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (main_table(plain(0.0)), noise_table(plain())):
        console.print(table.rich())
    shown = console.export_text()
    assert "94.5 ± 0.5" in shown
    assert "…" not in shown
