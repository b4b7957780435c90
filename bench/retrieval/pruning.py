"""How much of a trained embedding's pairs the exact filter leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from pfml_triton import PFMLLoss
from pfml_triton.functional import Stats, total_energy
from pfml_triton.sketch import random_basis


def active_shares(
    loss: PFMLLoss, embeddings: Tensor, labels: Tensor, samples: int
) -> dict[str, float]:
    """The share of tiles of pairs that pruning leaves of two clouds, in [0, 1].

    "batch" is `samples` embeddings of as many classes and the proxies, "all" is every embedding.
    Each with the sketch of the loss, and with one of random directions ("batch_random" and so on).
    """
    first_of_class = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()])
    some = first_of_class[torch.linspace(0, len(first_of_class) - 1, samples).long().unique()]
    proxies = loss.proxies.detach().flatten(0, 1).cpu()
    proxy_labels = torch.arange(loss.num_classes).repeat_interleave(loss.proxies_per_class)
    clouds = {
        "batch": (torch.cat([embeddings[some], proxies]), torch.cat([labels[some], proxy_labels])),
        "all": (embeddings, labels),
    }
    device = loss.proxies.device
    bases = {
        "": loss.sketch_basis,
        "_random": random_basis(loss.embedding_size, loss.sketch_basis.device),
    }
    shares = {}
    for cloud, (points, classes) in clouds.items():
        for basis, directions in bases.items():
            _, totals = total_energy(
                points.to(device), classes.to(device), loss.potential, unit=loss.normalize,
                backend=loss.backend, basis=directions,
            )  # fmt: skip
            shares[f"{cloud}{basis}"] = Stats.of(totals).active_share.item()
    return shares
