import numpy as np
import pytest
import torch

from bench.images import ImageSet, random_affine, split_by_class, to_tensor


@pytest.fixture
def data() -> ImageSet:
    labels = np.repeat(np.arange(7), 3)
    images = np.broadcast_to(labels[:, None, None], (21, 8, 8)).astype(np.uint8)
    return ImageSet(images, labels, list("abcdefg"))


def test_split_shares_no_class_and_loses_no_image(data: ImageSet) -> None:
    train, test = split_by_class(data, seed=3)
    assert (len(train.names), len(test.names)) == (3, 4)
    assert sorted(train.names + test.names) == data.names
    assert len(train.labels) + len(test.labels) == 21
    for part in (train, test):
        assert np.array_equal(np.unique(part.labels), np.arange(len(part.names)))
        # The pixels hold the old label.
        assert [data.names[i] for i in part.images[:, 0, 0]] == [part.names[i] for i in part.labels]


def test_split_is_fixed_by_its_seed(data: ImageSet) -> None:
    assert split_by_class(data, 1)[0].names == split_by_class(data, 1)[0].names
    assert len({tuple(split_by_class(data, seed)[0].names) for seed in range(8)}) > 1


def test_split_of_one_class_is_refused(data: ImageSet) -> None:
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        split_by_class(ImageSet(data.images[:3], data.labels[:3], ["a"]))


def test_to_tensor_scales_to_one() -> None:
    tensor = to_tensor(np.array([[[0, 255], [51, 0]]], dtype=np.uint8))
    assert tensor.shape == (1, 1, 2, 2)
    assert torch.equal(tensor[0, 0], torch.tensor([[0.0, 1.0], [0.2, 0.0]]))


def moved(seed: int) -> torch.Tensor:
    square = torch.zeros(16, 1, 32, 32)
    square[:, :, 12:20, 12:20] = 1
    return random_affine(square, torch.Generator().manual_seed(seed))


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
