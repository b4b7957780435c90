from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.retrieval.images import (
    ArrayImages,
    arrays,
    random_affine,
    random_moves,
    split_by_class,
    to_tensor,
    with_label_noise,
)


@pytest.fixture
def data() -> ArrayImages:
    labels = np.repeat(np.arange(7), 3)
    images = np.broadcast_to(labels[:, None, None], (21, 8, 8)).astype(np.uint8)
    return ArrayImages(labels, list("abcdefg"), images)


def test_split_shares_no_class_and_loses_no_image(data: ArrayImages) -> None:
    train, test = split_by_class(data, seed=3)
    assert (len(train.names), len(test.names)) == (3, 4)
    assert sorted([*train.names, *test.names]) == data.names
    assert len(train.labels) + len(test.labels) == 21
    for part in (train, test):
        assert np.array_equal(np.unique(part.labels), np.arange(len(part.names)))
        # The pixels hold the old label.
        assert [data.names[i] for i in part.images[:, 0, 0]] == [part.names[i] for i in part.labels]


def test_split_is_fixed_by_its_seed(data: ArrayImages) -> None:
    assert split_by_class(data, 1)[0].names == split_by_class(data, 1)[0].names
    assert len({tuple(split_by_class(data, seed)[0].names) for seed in range(8)}) > 1


def test_split_of_one_class_is_refused(data: ArrayImages) -> None:
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        split_by_class(data.of_classes(np.array([0])))


def test_split_takes_a_share_but_never_all(data: ArrayImages) -> None:
    train, validation = split_by_class(data, train_share=2 / 3)
    assert (len(train.names), len(validation.names)) == (4, 3)
    with pytest.raises(ValueError, match="a class of 7, got 0.1: 0 and 7"):
        split_by_class(data, train_share=0.1)


def test_to_tensor_scales_to_one() -> None:
    tensor = to_tensor(np.array([[[0, 255], [51, 0]]], dtype=np.uint8))
    assert tensor.shape == (1, 1, 2, 2)
    assert torch.equal(tensor[0, 0], torch.tensor([[0.0, 1.0], [0.2, 0.0]]))


def moved(seed: int) -> torch.Tensor:
    square = torch.zeros(16, 1, 32, 32)
    square[:, :, 12:20, 12:20] = 1
    return random_affine(square, random_moves(16, seed))


def test_random_affine_is_fixed_by_its_seed() -> None:
    assert torch.equal(moved(0), moved(0))
    assert not torch.equal(moved(0), moved(1))


def test_random_affine_moves_each_image_its_own_way_and_only_a_little() -> None:
    images = moved(0)
    assert len(images.unique(dim=0)) == 16
    area = images.sum(dim=(1, 2, 3))
    assert ((area > 64 * 0.6) & (area < 64 * 1.6)).all()
    line = torch.arange(32) - 15.5
    for centre in (images.sum(dim=(1, 2)) @ line / area, images.sum(dim=(1, 3)) @ line / area):
        assert centre.abs().max() < 4
        assert centre.std() > 0.5


def test_a_batch_depends_on_its_indices_and_its_seed_alone(data: ArrayImages) -> None:
    batches = [np.array([0, 5, 9]), np.array([5, 5, 2])]
    both = list(data.training(batches, [3, 4]))
    assert torch.equal(next(iter(data.training(batches[1:], [4]))), both[1])
    assert not torch.equal(next(iter(data.training(batches[1:], [5]))), both[1])
    assert [tuple(batch.shape) for batch in both] == [(3, 1, 8, 8), (3, 1, 8, 8)]


def test_evaluation_takes_all_images_in_order_and_as_they_are(data: ArrayImages) -> None:
    images = torch.cat(list(data.evaluation(batch_size=4)))
    assert torch.equal(images, to_tensor(data.images))


def test_moved_images_are_the_same_whatever_the_batches(data: ArrayImages) -> None:
    gray = replace(data, images=np.full((21, 8, 8), 200, np.uint8), moved=5)
    whole = torch.cat(list(gray.evaluation(100)))
    assert torch.equal(torch.cat(list(gray.evaluation(4))), whole)
    assert len(whole.unique(dim=0)) == 21
    assert np.array_equal(gray.picture(7), whole[7, 0].mul(255).round().numpy())


def test_a_picture_is_the_image_as_it_is_evaluated(data: ArrayImages) -> None:
    colour = np.stack([data.images, data.images + 1, data.images + 2], axis=3)
    assert np.array_equal(data.picture(20), data.images[20])
    assert np.array_equal(replace(data, images=colour).picture(20), colour[20])


def test_colour_goes_first(data: ArrayImages) -> None:
    colour = np.stack([data.images, data.images + 1, data.images + 2], axis=3)
    (batch,) = replace(data, images=colour).evaluation(batch_size=100)
    assert batch.shape == (21, 3, 8, 8)
    assert torch.equal(batch[:, 1], to_tensor(data.images + 1)[:, 0])


def test_label_noise_changes_exactly_its_share_and_every_label_to_another() -> None:
    labels = np.repeat(np.arange(10), 30)
    noisy = with_label_noise(labels, 10, 0.2, seed=1)
    assert (noisy != labels).sum() == 60
    assert set(np.unique(noisy)) == set(range(10))
    # Every other class is drawn, none far more often than the others.
    moves = (noisy - labels)[noisy != labels] % 10
    assert np.bincount(moves, minlength=10)[1:].min() > 0
    assert np.array_equal(noisy, with_label_noise(labels, 10, 0.2, seed=1))
    assert not np.array_equal(noisy, with_label_noise(labels, 10, 0.2, seed=2))
    assert np.array_equal(labels, with_label_noise(labels, 10, 0.0, seed=1))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_label_noise_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\), got {share}"):
        with_label_noise(np.zeros(4, dtype=np.int64), 2, share, seed=0)


def test_arrays_numbers_the_classes_of_each_set() -> None:
    images = np.zeros((4, 8, 8, 1), dtype=np.uint8)
    data = arrays(images, np.array([30, 10, 30, 10]), images, np.array([-1, 10, 10, -1]), "mine")
    assert data.name == "mine"
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    assert data.train.names == ["10", "30"]
    assert data.test.labels.tolist() == [0, 1, 1, 0]
    assert data.train.channels == 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"train_images": np.zeros((4, 8, 8))}, TypeError, "train images must be uint8.*float64"),
        ({"test_labels": np.zeros(4)}, TypeError, "test images.*uint8 and float64"),
        ({"train_images": np.zeros((4, 8, 8, 2), np.uint8)}, ValueError, r"\[4, 8, 8, 2\]"),
        ({"train_images": np.zeros((4, 8, 7), np.uint8)}, ValueError, r"at least 8.*\[4, 8, 7\]"),
        ({"test_images": np.zeros((3, 8, 8), np.uint8)}, ValueError, r"test labels must be \[3\]"),
    ],
)
def test_arrays_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    images, labels = np.zeros((4, 8, 8), dtype=np.uint8), np.array([0, 0, 1, 1])
    given = {
        "train_images": images, "train_labels": labels,
        "test_images": images, "test_labels": labels,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        arrays(**given | changed)


def test_arrays_are_of_one_kind_and_not_empty() -> None:
    images, labels = np.zeros((4, 8, 8), dtype=np.uint8), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="as many channels, got 3 and 1"):
        arrays(np.zeros((4, 8, 8, 3), np.uint8), labels, images, labels)
    with pytest.raises(ValueError, match=r"test labels must be \[0\].* not empty, got \[0\]"):
        arrays(images, labels, images[:0], labels[:0])


def test_any_strides_and_read_only_arrays_will_do(data: ArrayImages) -> None:
    images = np.random.default_rng(0).integers(0, 255, (21, 8, 8)).astype(np.uint8)[:, :, ::-1]
    images.flags.writeable = False
    (batch,) = replace(data, images=images).evaluation(100)
    assert np.array_equal(batch[:, 0].mul(255).round().numpy(), images)
