import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.recipes import LOSSES, Recipe
from bench.retrieval.glyphs import load_glyphs
from bench.retrieval.images import ArrayImages
from bench.retrieval.losses import build_loss, proxies_of
from bench.retrieval.metrics import retrieval
from bench.retrieval.networks import build
from bench.retrieval.training import (
    Training,
    check_training,
    embed,
    epoch_batches,
    place_proxies,
)

SMALL = Recipe(
    embedding_size=16, batch_size=16, epochs=2, lr=3e-3, options={"proxies_per_class": 2}
)


@pytest.fixture(scope="module")
def small() -> ArrayImages:
    """Eight letters at half the size."""
    data = load_glyphs(size=16)
    first = data.names.index(next(name for name in data.names if name.startswith("A")))
    return data.of_classes(np.arange(first, first + 8))


def training_of(data: ArrayImages, recipe: Recipe = SMALL) -> Training:
    torch.manual_seed(recipe.seed)
    network = build("cnn", recipe.embedding_size, data.channels)
    loss = build_loss(recipe.loss, len(data.names), recipe.embedding_size, recipe.options)
    return Training(recipe, network, loss, data)


def parameters(training: Training) -> list[torch.Tensor]:
    both = [*training.network.parameters(), *training.loss.parameters()]
    return [parameter.detach().clone() for parameter in both]


def equal(first: Training, second: Training) -> bool:
    pairs = zip(parameters(first), parameters(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_training_lowers_the_loss_and_raises_recall(small: ArrayImages) -> None:
    training = training_of(small, replace(SMALL, epochs=8))
    labels = torch.from_numpy(small.labels)
    before = retrieval(embed(training.network, small), labels).recall[1]
    losses = [training.run_epoch() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert retrieval(embed(training.network, small), labels).recall[1] > before + 0.1
    assert training.schedule.get_last_lr()[0] < 1e-5  # the cycle is over


def test_training_is_fixed_by_its_seed(small: ArrayImages) -> None:
    runs = [training_of(small, replace(SMALL, seed=seed)) for seed in (5, 5, 6)]
    for run in runs:
        run.run_epoch()
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 6, 11, 15])  # of 11 steps an epoch
@pytest.mark.parametrize("loss", ["pfml", "proxy-anchor"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    small: ArrayImages, stop_after: int, loss: str, optimizer: str
) -> None:
    """At any step, in a new process's place: a network with other weights, another random state."""
    options = {"proxies_per_class": 2} if loss == "pfml" else {}
    recipe = replace(
        SMALL, loss=loss, options=options, optimizer=optimizer, clip=100.0, embedding_size=80
    )
    whole, stopped = training_of(small, recipe), training_of(small, recipe)
    means = [whole.run_epoch(), whole.run_epoch()]

    def stop(now: Training) -> None:
        if now.steps_done == stop_after:
            raise Stop

    def run_until_stopped() -> None:
        while True:
            stopped.run_epoch(stop)

    with pytest.raises(Stop):
        run_until_stopped()
    state, random = copy.deepcopy(stopped.state()), torch.get_rng_state()
    assert stopped.steps_done == stop_after

    resumed = training_of(small, replace(recipe, seed=99))
    resumed.recipe = recipe
    torch.manual_seed(12345)
    resumed.resume(state)
    rest = [resumed.run_epoch() for _ in range(2 - resumed.epoch)]
    assert rest == means[-len(rest) :]
    assert equal(whole, resumed)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert str(whole.optimizer.state_dict()) == str(resumed.optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    if loss == "pfml":
        assert whole.loss.training_calls == resumed.loss.training_calls > 0
        assert torch.equal(whole.loss.sketch_basis, resumed.loss.sketch_basis)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(small: ArrayImages, loss: str) -> None:
    training = training_of(small, replace(SMALL, loss=loss, options={}, epochs=1))
    before = parameters(training)
    assert np.isfinite(training.run_epoch())
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters(training), strict=True)]
    assert all(moved)


def test_the_mean_is_over_the_epoch(small: ArrayImages) -> None:
    training = training_of(small)
    sums: list[float] = []
    mean = training.run_epoch(lambda now: sums.append(float(now.loss_sum)))
    assert len(sums) == training.steps_per_epoch == len(small.labels) // 16
    assert mean == pytest.approx(sums[-1] / len(sums))
    assert float(training.loss_sum) == 0


def test_weight_decay_is_of_the_network_and_proxies_have_a_rate_of_their_own(
    small: ArrayImages,
) -> None:
    recipe = replace(SMALL, weight_decay=0.5, schedule="constant")
    network, proxies = training_of(small, recipe).optimizer.param_groups
    assert (network["lr"], network["weight_decay"]) == (3e-3, 0.5)
    assert (proxies["lr"], proxies["weight_decay"]) == (0.3, 0.0)


def test_clipping_bounds_the_gradients(small: ArrayImages) -> None:
    norms = []

    def note(now: Training) -> None:
        grads = [p.grad for p in now.network.parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    training_of(small, replace(SMALL, epochs=1)).run_epoch(note)
    assert max(norms) > 10
    norms.clear()
    training_of(small, replace(SMALL, epochs=1, clip=10.0)).run_epoch(note)
    assert 0 < max(norms) <= 10.001


def test_projected_proxies_have_length_one(small: ArrayImages) -> None:
    for project in (False, True):
        training = training_of(small, replace(SMALL, epochs=1, project_proxies=project))
        training.run_epoch()
        lengths = training.loss.proxies.detach().norm(dim=2)
        assert torch.allclose(lengths, torch.ones(()), atol=1e-5) == project


@pytest.mark.parametrize("loss", ["pfml", "proxynca"])
def test_proxies_placed_at_samples_are_of_their_class(small: ArrayImages, loss: str) -> None:
    training = training_of(small, replace(SMALL, loss=loss, options={}))
    place_proxies(training.loss, training.network, small, seed=3)
    embeddings = torch.nn.functional.normalize(embed(training.network, small), dim=1)
    proxies = proxies_of(training.loss)
    assert proxies is not None
    for c, points in enumerate(proxies.detach().reshape(8, -1, 16)):
        own = embeddings[small.labels == c]
        assert (torch.cdist(points, own).min(dim=1).values < 1e-3).all()


def test_batches_hold_as_many_images_of_each_class(small: ArrayImages) -> None:
    batches = epoch_batches(small.labels, SMALL, epoch=0)
    for batch in batches:
        counts = np.bincount(small.labels[batch], minlength=8)
        assert sorted(counts) == [0] * 4 + [4] * 4
    again, other = (epoch_batches(small.labels, SMALL, epoch) for epoch in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize(
    ("classes", "changed", "message"),
    [
        (1, {}, "at least 2 classes, got 1"),
        (8, {"batch_size": 64}, "batch_size must be at most 32 .8 classes of 4 images"),
    ],
)
def test_training_refuses(
    small: ArrayImages, classes: int, changed: dict[str, Any], message: str
) -> None:
    labels = small.of_classes(np.arange(classes)).labels
    with pytest.raises(ValueError, match=message):
        check_training(labels, replace(SMALL, **changed))


def test_embedding_leaves_the_network_in_its_mode(small: ArrayImages) -> None:
    network = build("cnn", 8, 1)
    few = embed(network, small, batch_size=5)
    assert network.training
    assert torch.allclose(few, embed(network.eval(), small, batch_size=1000), atol=1e-5)
    assert not network.training
    assert not few.requires_grad


def test_warm_up_trains_new_layers_and_proxies_alone(small: ArrayImages) -> None:
    recipe = replace(SMALL, warmup_epochs=1, weight_decay=0.1)
    training = training_of(small, recipe)
    training.network.pretrained = True  # as if its backbone were
    before = [p.detach().clone() for p in training.network.backbone_parameters()]
    head, proxies = training.network.head.weight.clone(), training.loss.proxies.clone()
    training.run_epoch()
    assert all(map(torch.equal, before, training.network.backbone_parameters()))
    assert not torch.equal(head, training.network.head.weight)
    assert not torch.equal(proxies, training.loss.proxies)
    training.run_epoch()
    assert not any(map(torch.equal, before, training.network.backbone_parameters()))
