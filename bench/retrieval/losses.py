"""The losses by name, each with the hyperparameters that its authors published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, regularizers
from torch import Tensor, nn

from pfml_triton import PFMLLoss


@dataclass(frozen=True)
class LossRecipe:
    """How to make a loss, and where its numbers come from.

    Attributes:
        build: makes a module of (embeddings [B, D], labels [B]) from the number of classes C, the
            embedding size D and the options by name.
        options: the published ones, by name.
        source: the publication.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any]
    source: str


class _Mined(nn.Module):
    """A loss of the tuples that a miner finds in the batch."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


def _triplet(num_classes: int, embedding_size: int, *, margin: float) -> nn.Module:
    squared = distances.LpDistance(power=2)
    return _Mined(
        losses.TripletMarginLoss(margin, distance=squared),
        miners.TripletMarginMiner(margin, "semihard", distance=squared),
    )


def _contrastive(num_classes: int, embedding_size: int, *, margin: float) -> nn.Module:
    return losses.ContrastiveLoss(pos_margin=0, neg_margin=margin)


def _npair(num_classes: int, embedding_size: int, *, regularization: float) -> nn.Module:
    return losses.NPairsLoss(
        embedding_regularizer=regularizers.LpRegularizer(power=2),
        embedding_reg_weight=regularization,
    )


def _multi_similarity(
    num_classes: int, embedding_size: int, *, alpha: float, beta: float, base: float, epsilon: float
) -> nn.Module:
    return _Mined(
        losses.MultiSimilarityLoss(alpha, beta, base), miners.MultiSimilarityMiner(epsilon)
    )


REGISTRY: dict[str, LossRecipe] = {
    "pfml": LossRecipe(
        PFMLLoss,
        {"alpha": 3.0, "delta": 0.2, "delta_rep": None, "proxies_per_class": 15},
        "Bhatnagar and Ahuja, CVPR 2025",
    ),
    "triplet": LossRecipe(
        _triplet, {"margin": 0.2}, "Schroff et al. (FaceNet), CVPR 2015: semi-hard negatives"
    ),
    "contrastive": LossRecipe(_contrastive, {"margin": 1.0}, "Hadsell et al., CVPR 2006"),
    "npair": LossRecipe(_npair, {"regularization": 0.002}, "Sohn, NeurIPS 2016"),
    "proxynca": LossRecipe(
        losses.ProxyNCALoss, {"softmax_scale": 1.0}, "Movshovitz-Attias et al., ICCV 2017"
    ),
    "proxy-anchor": LossRecipe(
        losses.ProxyAnchorLoss, {"margin": 0.1, "alpha": 32.0}, "Kim et al., CVPR 2020"
    ),
    "multi-similarity": LossRecipe(
        _multi_similarity,
        {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1},
        "Wang et al., CVPR 2019",
    ),
}


def build_loss(
    name: str, num_classes: int, embedding_size: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a loss of (embeddings [B, D], labels [B]) with its published options, or others.

    Args:
        name: one of `REGISTRY`.
        num_classes: C; labels are in [0, C).
        embedding_size: D.
        options: to put in the place of published ones, by name. PFMLLoss takes all its arguments.

    Raises:
        ValueError: no such loss, or no such option of it.
    """
    if name not in REGISTRY:
        raise ValueError(f"loss must be one of {', '.join(REGISTRY)}, got {name!r}")
    recipe = REGISTRY[name]
    try:
        return recipe.build(num_classes, embedding_size, **options_of(name, options or {}))
    except TypeError as error:
        known = ", ".join(recipe.options)
        raise ValueError(
            f"options of {name} are {known}, got {dict(options or {})}: {error}"
        ) from error


def options_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options that a loss is built with: the published ones, and others in their place."""
    return {**REGISTRY[name].options, **options}


def proxies_of(loss: nn.Module) -> Tensor | None:
    """The proxies of a loss: [C, M, D] of PFMLLoss, [C, D] of the others that have any."""
    proxies = getattr(loss, "proxies", None)
    return proxies if isinstance(proxies, nn.Parameter) and proxies.numel() else None


def proxy_array(loss: nn.Module, num_classes: int, embedding_size: int) -> Tensor:
    """The proxies as [C, M, D] float32 on the CPU, M = 0 where the loss has none."""
    proxies = proxies_of(loss)
    if proxies is None:
        return torch.empty(num_classes, 0, embedding_size)
    return proxies.detach().float().cpu().reshape(num_classes, -1, embedding_size)
