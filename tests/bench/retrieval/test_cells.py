import math
from typing import Any

import pytest
import torch

from bench.results import provenance
from bench.retrieval.cells import PROVENANCE, Spread, gather, natural, recall_ks
from tests.bench.retrieval.synthetic import row, rows


def test_spread_is_mean_and_sample_standard_deviation() -> None:
    values = [0.5, 0.6, 0.9]
    mean = sum(values) / 3
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert Spread.of(values) == pytest.approx((mean, sd, 3))
    assert Spread.of(values).text() == "66.7 ± 20.8"
    assert Spread.of([0.5]) == (0.5, None, 1)
    assert Spread.of([0.25]).text(scale=1, digits=3) == "0.250"


def test_cells_hold_the_seeds_of_one_recipe() -> None:
    cells = gather(reversed(rows()))
    keys = [(c.loss, c.variant, c.label_noise, c.seeds) for c in cells]
    assert keys[:3] == [
        ("pfml", "", 0.0, (0, 1, 2)), ("pfml", "", 0.2, (0, 1, 2)),
        ("pfml", "alpha=1.0", 0.0, (0, 1)),
    ]  # fmt: skip
    assert [c.loss for c in cells if not c.variant] == [
        "pfml", "pfml", "proxy-anchor", "proxy-anchor", "triplet", "triplet",
    ]  # fmt: skip
    assert sum(len(c.rows) for c in cells) == len(rows())
    assert cells[0].value("final_r1").mean == pytest.approx((0.9 + 0.89 + 0.88) / 3)


def test_the_latest_row_of_a_run_counts() -> None:
    (cell,) = gather([row(final_r1=0.1), row(final_r1=0.2)])
    assert cell.value("final_r1") == (0.2, None, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 5), ("lr", 1.0), ("options", {"alpha": 2.0}), ("test_images", 29), ("momentum", 1)],
)
def test_rows_of_different_recipes_are_never_averaged(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"differ in {field}: .* and .*{value}"):
        gather([row(seed=0), row(seed=1, **{field: value})])


def test_where_and_how_fast_a_run_was_may_differ() -> None:
    other = {"commit": "def", "time": "later", "seconds": 9.0, "best_epoch": 1, "threads": 8}
    (cell,) = gather([row(seed=0), row(seed=1, **other)])
    assert cell.seeds == (0, 1)
    assert {*provenance(torch.device("cpu"))} == {*PROVENANCE}


def test_a_seed_counts_once() -> None:
    with pytest.raises(ValueError, match="a and b are of one recipe and one seed, 0"):
        gather([row(run="a"), row(run="b")])


def test_a_row_says_what_it_is_of() -> None:
    lacking = row()
    del lacking["variant"], lacking["seed"]
    with pytest.raises(ValueError, match="row 2 of the results lacks seed, variant"):
        gather([row(), lacking])


@pytest.mark.parametrize("value", [None, math.nan, 86.6, -0.1, True, "0.5"])
def test_a_measure_that_is_no_share_is_an_error(value: Any) -> None:
    (cell,) = gather([row(final_r1=value)])
    with pytest.raises(ValueError, match=r"final_r1 must be in \[0, 1\], got"):
        cell.value("final_r1")
    with pytest.raises(ValueError, match="final_r7"):
        cell.value("final_r7")


def test_ks_are_those_of_every_row() -> None:
    assert recall_ks(gather([row(), row("triplet", final_r10=0.9)])) == [1, 2, 4]
    assert recall_ks([]) == []


def test_variants_sort_by_value() -> None:
    variants = ["a=10", "a=2", "", "b=x", "a=2,b=1"]
    assert sorted(variants, key=natural) == ["", "a=2", "a=2,b=1", "a=10", "b=x"]
