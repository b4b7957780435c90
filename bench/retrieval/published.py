"""Published figures of the paper, to stand beside measured ones and never among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SOURCE = "Bhatnagar and Ahuja, CVPR 2025, arXiv 2405.18560"
READ_OFF = f"read off the plots of {SOURCE}"
TITLES = {"cub": "CUB-200-2011", "cars": "Cars-196", "sop": "Stanford Online Products"}
SHORT_TITLES = {"cub": "CUB", "cars": "Cars", "sop": "SOP"}

RESNET = "ResNet-50, 512"
DINO = "DINO ViT-S, 384"
VIT = "ViT-S, 384"
NOISE = 0.2  # share of the training labels that were replaced at random


class Published(NamedTuple):
    """What one method reached on one data set.

    Attributes:
        network: backbone and embedding size, as the paper names them.
        method: a loss, or the whole of a method.
        dataset: a key of `TITLES`.
        label_noise: share of the training labels that were wrong.
        recall: R@K in [0, 1] by K.
    """

    network: str
    method: str
    dataset: str
    label_noise: float
    recall: dict[int, float]


# R@1 and R@2 in percent on CUB and Cars, R@1 and R@10 on SOP; None where the paper has no figure.
_Pair = tuple[float, float] | None
_Row = tuple[str, str, _Pair, _Pair, _Pair]
_CLEAN: tuple[_Row, ...] = (
    (RESNET, "Proxy Anchor", (69.7, 80.0), (87.7, 92.9), None),
    (RESNET, "MS+DAS", (69.2, 79.2), (87.8, 93.1), (80.6, 91.8)),
    (RESNET, "HIST", (71.4, 81.1), (89.6, 93.9), (81.4, 92.0)),
    (RESNET, "CPML", (68.3, 78.7), (85.2, 91.5), (79.4, 90.7)),
    (RESNET, "PFML", (73.4, 82.4), (92.7, 95.5), (82.9, 92.5)),
    (DINO, "DINO", (70.8, 81.1), (42.9, 53.9), (63.4, 78.1)),
    (DINO, "Hyp", (80.9, 87.6), (89.2, 94.1), (85.1, 94.4)),
    (DINO, "HIER", (81.1, 88.2), (91.3, 95.2), (85.7, 94.6)),
    (DINO, "PFML", (83.1, 89.3), (94.7, 96.5), (86.5, 95.1)),
    (VIT, "ViT-S", (83.1, 90.4), (47.8, 60.2), (62.1, 77.7)),
    (VIT, "Hyp", (85.6, 91.4), (86.5, 92.1), (85.9, 94.9)),
    (VIT, "PFML", (87.8, 92.6), (91.5, 95.2), (88.2, 95.7)),
)
_NOISY: tuple[_Row, ...] = (
    (RESNET, "Triplet", (55.1, 68.7), (67.5, 77.9), None),
    (RESNET, "Multi-Similarity", (58.9, 71.8), (70.4, 79.8), None),
    (RESNET, "ProxyNCA", (60.1, 74.7), (74.3, 82.4), None),
    (RESNET, "Proxy Anchor", (60.7, 75.1), (76.9, 83.1), None),
    (RESNET, "HIST", (59.7, 74.6), (72.9, 81.8), None),
    (RESNET, "PFML", (66.7, 76.9), (84.5, 88.6), None),
)


def _figures() -> Iterator[Published]:
    ks = {"cub": (1, 2), "cars": (1, 2), "sop": (1, 10)}
    for noise, table in ((0.0, _CLEAN), (NOISE, _NOISY)):
        for network, method, *pairs in table:
            for (dataset, (first, second)), pair in zip(ks.items(), pairs, strict=True):
                if pair is not None:
                    recall = {first: pair[0] / 100, second: pair[1] / 100}
                    yield Published(network, method, dataset, noise, recall)


FIGURES = tuple(_figures())

# R@1 of PFML with ResNet-50 by the value of one setting, the others at M = 15, alpha = 3. What the
# plots show at the setting of the main table is the main table's figure.
_Curve = dict[float, float]
ABLATIONS: dict[str, dict[str, _Curve]] = {
    "proxies_per_class": {
        "cars": {0: 0.863, 5: 0.90, 10: 0.91, 15: 0.927},
        "cub": {0: 0.673, 5: 0.71, 10: 0.726, 15: 0.734},
    },
    "alpha": {
        "cars": {0: 0.867, 1: 0.895, 2: 0.918, 3: 0.927, 6: 0.92},
        "cub": {0: 0.682, 1: 0.71, 2: 0.727, 3: 0.734, 6: 0.733},
    },
    "delta": {},
    "delta_rep": {"cars": {0: 0.927, 0.25: 0.83}},
}
FLAT_DELTA = (0.10, 0.35)  # where the plot over delta is flat; no values are given


def published(dataset: str, label_noise: float) -> list[Published]:
    """The published figures for a data set at a label noise, in the paper's order."""
    return [f for f in FIGURES if f.dataset == dataset and f.label_noise == label_noise]
