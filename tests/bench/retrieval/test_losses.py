import pytest
import torch

from bench.recipes import LOSSES
from bench.retrieval.losses import REGISTRY, build_loss, proxies_of, proxy_array
from pfml_triton import PFMLLoss


def test_the_registry_has_the_losses_of_the_recipes() -> None:
    assert tuple(REGISTRY) == LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_batch_apart(name: str) -> None:
    """Steps down each loss bring points nearer to their class than to others."""
    torch.manual_seed(0)
    loss = build_loss(name, 6, 8)
    labels = torch.arange(6).repeat(4)
    points = torch.randn(24, 8).requires_grad_()
    optimizer = torch.optim.Adam([points, *loss.parameters()], lr=0.05)

    def separation() -> float:
        unit = torch.nn.functional.normalize(points.detach(), dim=1)
        similarity = unit @ unit.T
        same = labels == labels[:, None]
        return float(similarity[same].mean() - similarity[~same].mean())

    before = separation()
    for _ in range(100):
        optimizer.zero_grad()
        loss(points, labels).backward()
        optimizer.step()
    assert separation() > before + 0.2


def test_the_published_options_of_this_loss_and_others_in_their_place() -> None:
    loss = build_loss("pfml", 4, 8)
    assert isinstance(loss, PFMLLoss)
    assert (loss.potential.alpha, loss.potential.delta, loss.proxies_per_class) == (3.0, 0.2, 15)
    loss = build_loss("pfml", 4, 8, {"alpha": 1.0, "reduction": "mean"})
    assert (loss.potential.alpha, loss.potential.delta, loss.reduction) == (1.0, 0.2, "mean")


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"options of {name} are .*'nothing': 3"):
        build_loss(name, 4, 8, {"nothing": 3})


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="one of pfml, triplet.*got 'softmax'"):
        build_loss("softmax", 4, 8)


@pytest.mark.parametrize(("name", "per_class"), [("pfml", 15), ("proxynca", 1), ("triplet", 0)])
def test_proxies(name: str, per_class: int) -> None:
    loss = build_loss(name, 4, 8)
    assert proxy_array(loss, 4, 8).shape == (4, per_class, 8)
    proxies = proxies_of(loss)
    assert (proxies is None) == (per_class == 0)
    if proxies is not None:
        assert torch.equal(proxy_array(loss, 4, 8).flatten(), proxies.detach().flatten())


def test_no_proxies_is_none() -> None:
    assert proxies_of(build_loss("pfml", 4, 8, {"proxies_per_class": 0})) is None
