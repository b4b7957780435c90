from collections import Counter

import pytest
import torch

from bench import counting
from bench.clouds import make_cloud
from bench.settings import Size
from pfml_triton import Potential
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import TILE_M
from tests import clouds


@pytest.mark.parametrize("kind", ["clusters", "collisions", "one_class"])
def test_work_is_that_of_the_kernels(kind: str) -> None:
    points, labels = clouds.cloud(kind, 150, 70, 9, torch.float32)
    potential = Potential(delta=0.3)
    work = counting.count_work(points, labels, potential)
    q = clouds.basis(points)
    terms = clouds.terms_of(
        launch, points, labels, points, labels, potential, needs_grad=False, basis=q
    )
    assert len(work.row) == terms.active.sum()
    assert work.pairs == int((terms.attracting + terms.repelling).sum())
    assert work.lengths.sum() == len(work.row) == len(work.turns)
    assert torch.equal(work.row, work.row.sort().values)


def test_far_classes_share_no_tiles() -> None:
    points, labels, _ = make_cloud(Size(0, 300, 2), seed=0)
    work = counting.count_work(points, labels, Potential())
    assert len(work.row) < 1.1 * 600 / TILE_M  # little but the tiles on the diagonal
    assert work.pairs == 600
    assert work.turns.tolist() == [1] * len(work.row)


def test_long_lists_are_shared_out_as_planned() -> None:
    lengths = torch.tensor([3, 50, 0, 33])
    row = torch.repeat_interleave(torch.arange(4), lengths)
    work = counting.Work(row, torch.ones_like(row), 0, lengths)
    program, used = counting.shared_out(work, extra=512)  # so that the least budget, 16, counts
    assert used == 3 + 2
    expected = {0: 3, 1: 16, 4: 16, 5: 16, 6: 2, 3: 16, 7: 16, 8: 1}
    assert Counter(program.tolist()) == expected
    program, used = counting.shared_out(work, extra=2)  # a budget of 43
    assert (used, Counter(program.tolist())) == (1, {0: 3, 1: 43, 4: 7, 3: 33})
    assert counting.shared_out(work, extra=0) == (row, 0)
