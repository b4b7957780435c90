import pytest

from bench.retrieval.published import (
    ABLATIONS,
    FIGURES,
    NOISE,
    RESNET,
    TITLES,
    Published,
    published,
)


def test_figures_are_those_of_the_paper() -> None:
    found = {(f.network, f.method, f.dataset, f.label_noise): f.recall for f in FIGURES}
    assert len(found) == len(FIGURES) == 12 * 3 - 1 + 6 * 2
    assert found[RESNET, "PFML", "cars", 0.0] == pytest.approx({1: 0.927, 2: 0.955})
    assert found[RESNET, "PFML", "sop", 0.0] == pytest.approx({1: 0.829, 10: 0.925})
    assert found[RESNET, "Triplet", "cub", NOISE] == pytest.approx({1: 0.551, 2: 0.687})
    assert (RESNET, "Proxy Anchor", "sop", 0.0) not in found


@pytest.mark.parametrize("figure", FIGURES)
def test_recall_is_a_share_that_rises_with_k(figure: Published) -> None:
    recall = list(figure.recall.items())
    assert recall == sorted(recall)
    assert 0 < recall[0][1] < recall[1][1] < 1


def test_published_is_of_one_data_set_and_noise() -> None:
    assert {f.dataset for f in published("cub", NOISE)} == {"cub"}
    assert [f.method for f in published("cub", NOISE)][-1] == "PFML"
    assert published("glyphs", 0.0) == published("cub", 0.1) == []


def test_ablations_meet_the_main_table_at_its_settings() -> None:
    main = {f.dataset: f.recall[1] for d in TITLES for f in published(d, 0.0)
            if (f.network, f.method) == (RESNET, "PFML")}  # fmt: skip
    for setting, value in (("proxies_per_class", 15), ("alpha", 3), ("delta_rep", 0)):
        for dataset, curve in ABLATIONS[setting].items():
            assert curve[value] == max(curve.values()) == pytest.approx(main[dataset])
