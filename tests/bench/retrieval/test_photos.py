import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.retrieval import photos
from bench.retrieval.photos import ATTEMPTS, DRAWS, PhotoImages
from tests.photographs import colour_of, write_image

SIZES = [(24, 18), (18, 24), (40, 11), (16, 16), (9, 7), (64, 48), (200, 3)]
BATCHES = [np.array([0, 3, 6]), np.array([5]), np.array([2, 1, 2, 4])]
SEEDS = [7, 8, 9]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> PhotoImages:
    folder = tmp_path_factory.mktemp("photos")
    paths = [write_image(folder / f"{i}.png", i % 3 + 1, size) for i, size in enumerate(SIZES)]
    return PhotoImages(np.arange(7) % 3, ["a", "b", "c"], paths, size=16, resized=18)


@pytest.fixture(scope="module")
def batches(images: PhotoImages) -> list[Tensor]:
    return list(images.training(BATCHES, SEEDS))


def with_workers(images: PhotoImages, workers: int) -> PhotoImages:
    return PhotoImages(images.labels, images.names, images.paths, 16, 18, workers)


def test_batches_have_the_promised_form(batches: list[Tensor]) -> None:
    assert [batch.shape for batch in batches] == [(b, 3, 16, 16) for b in (3, 1, 4)]
    assert all(batch.dtype == torch.float32 and batch.is_contiguous() for batch in batches)


def test_workers_change_nothing(images: PhotoImages, batches: list[Tensor]) -> None:
    parallel = with_workers(images, 2)
    for got, want in zip(parallel.training(BATCHES, SEEDS), batches, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(parallel.evaluation(2), images.evaluation(2), strict=True):
        assert torch.equal(got, want)


def test_a_batch_does_not_depend_on_what_came_before(
    images: PhotoImages, batches: list[Tensor]
) -> None:
    for k in (2, 0):
        (alone,) = images.training([BATCHES[k]], [SEEDS[k]])
        assert torch.equal(alone, batches[k])


def test_seed_and_place_in_the_batch_choose_the_crop(
    images: PhotoImages, batches: list[Tensor]
) -> None:
    (other,) = images.training([BATCHES[0]], [SEEDS[1]])
    assert not torch.equal(other, batches[0])
    assert not torch.equal(batches[2][0], batches[2][2])  # image 2 twice


def test_the_global_random_state_is_left_alone(images: PhotoImages) -> None:
    before = torch.get_rng_state()
    list(images.training(BATCHES, SEEDS))
    list(images.evaluation(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_number_of_seeds_is_refused(images: PhotoImages) -> None:
    with pytest.raises(ValueError, match="zip"):
        list(images.training(BATCHES, SEEDS[:2]))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluation_is_in_order_and_is_the_pictures(images: PhotoImages, batch_size: int) -> None:
    whole = torch.cat(list(images.evaluation(batch_size)))
    assert whole.shape == (7, 3, 16, 16)
    for i, tensor in enumerate(whole):
        picture = images.picture(i)
        assert picture.shape == (16, 16, 3)
        assert picture.dtype == np.uint8
        assert np.allclose(tensor.permute(1, 2, 0).numpy(), picture / 255, atol=1e-6)


def test_the_defaults_are_those_of_the_field(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", 1, (300, 280))
    data = PhotoImages(np.zeros(1, np.int64), ["a"], [path])
    assert (data.size, data.resized) == (224, 256)
    assert next(data.evaluation(1)).shape == (1, 3, 224, 224)


def test_centre_crop_is_resizing_and_then_cutting() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = image.resize((32, 24), Image.Resampling.BILINEAR)
    want = np.asarray(resized.crop((6, 2, 26, 22)))
    assert np.array_equal(photos.centre_crop(image, 20, 24), want)


def test_an_image_of_one_pixel_has_crops() -> None:
    image = Image.new("RGB", (1, 1), (10, 20, 30))
    drawn = np.random.default_rng(0).random(DRAWS)
    for crop in (photos.centre_crop(image, 16, 18), photos.random_crop(image, 16, drawn)):
        assert (crop == (10, 20, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(100, 80), (31, 57), (1, 1), (2, 1)])
def test_random_boxes_are_inside(width: int, height: int) -> None:
    rows = np.random.default_rng(0).random((500, DRAWS))
    boxes = np.array([photos.random_box(width, height, row) for row in rows])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (w >= 1).all()
    assert (h >= 1).all()


def test_random_boxes_have_the_published_range() -> None:
    rows = np.random.default_rng(0).random((2000, DRAWS))
    left, top, right, bottom = np.array([photos.random_box(1000, 800, row) for row in rows]).T
    area = (right - left) * (bottom - top) / (1000 * 800)
    ratio = (right - left) / (bottom - top)
    assert (area.min(), area.max()) == pytest.approx((0.08, 1), abs=0.02)
    assert (ratio.min(), ratio.max()) == pytest.approx((3 / 4, 4 / 3), abs=0.01)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, 1000, 800)


def test_an_image_too_long_for_any_attempt_gives_its_middle() -> None:
    drawn = np.full(DRAWS, 0.9)
    assert photos.random_box(1000, 30, drawn) == (480, 0, 520, 30)
    assert photos.random_box(30, 1000, drawn) == (0, 480, 30, 520)


def test_a_later_attempt_counts_where_the_first_does_not_fit() -> None:
    drawn = np.zeros(DRAWS)
    drawn[:2] = 1.0  # all of the area, wider than high
    drawn[2 : 2 * ATTEMPTS : 2] = 0.5
    drawn[3 : 2 * ATTEMPTS : 2] = 0.5
    side = round((100 * 100 * 0.54) ** 0.5)
    assert photos.random_box(100, 100, drawn) == (0, 0, side, side)


def test_half_of_the_images_are_mirrored() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    image = Image.fromarray(pixels)
    rows = np.random.default_rng(0).random((400, DRAWS))
    crops = [photos.random_crop(image, 8, row) for row in rows]
    left = np.array([crop[:, 0].mean() > crop[:, -1].mean() for crop in crops])
    differ = np.array([crop[:, 0].mean() != crop[:, -1].mean() for crop in crops])
    assert 0.4 < left[differ].mean() < 0.6


def test_modes_become_rgb(tmp_path: Path) -> None:
    colour = Image.new("RGB", (20, 20), colour_of(2))
    for mode, suffix in [
        ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"),
    ]:  # fmt: skip
        path = tmp_path / f"{mode}.{suffix}"
        colour.convert(mode).save(path)
        read = np.asarray(photos.read_rgb(path)).reshape(-1, 3).mean(axis=0)
        if mode in ("L", "LA"):
            assert abs(read - np.asarray(colour.convert("L")).mean()).max() < 3, mode
        elif mode != "1":
            assert abs(read - colour_of(2)).max() < 30, mode
        data = PhotoImages(np.zeros(1, np.int64), ["a"], [path], size=16, resized=16)
        assert next(data.training([np.array([0])], [0])).shape == (1, 3, 16, 16)


def test_take_relabelled_and_of_classes(images: PhotoImages) -> None:
    some = images.take(images.labels != 1)
    assert some.paths == [images.paths[i] for i in (0, 2, 3, 5, 6)]
    assert some.labels.tolist() == [0, 2, 0, 2, 0]
    assert (some.size, some.resized) == (16, 18)
    part = images.of_classes(np.array([1, 2]))
    assert part.names == ["b", "c"]
    assert part.labels.tolist() == [0, 1, 0, 1]
    assert part.paths == [images.paths[i] for i in (1, 2, 4, 5)]
    noisy = images.relabelled(1 - np.minimum(images.labels, 1))
    assert noisy.labels.tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert noisy.paths == images.paths


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_can_no_longer_be_read_is_named(tmp_path: Path, workers: int) -> None:
    paths = [write_image(tmp_path / f"{i}.jpg", 1, (64, 64)) for i in range(4)]
    data = PhotoImages(np.zeros(4, np.int64), ["a"], paths, 16, 18, workers)
    paths[2].unlink()
    before = multiprocessing.active_children()
    with pytest.raises(OSError, match=r"^cannot read .*2\.jpg: No such file") as caught:
        list(data.training([np.array([0, 1]), np.array([3, 2])], [0, 1]))
    assert "\n" not in str(caught.value)
    # The workers have ended, though the traceback holds the frame.
    assert set(multiprocessing.active_children()) <= set(before)
    paths[2].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.raises(OSError, match=r"^cannot read .*2\.jpg: .*truncated"):
        list(data.evaluation(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 16, "resized": 12}, "0 < size <= resized, got size 16 and resized 12"),
        ({"size": 0}, "got size 0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"paths": []}, "every path needs a label, got 0 and 7"),
    ],
)
def test_values_out_of_range_are_refused(
    images: PhotoImages, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PhotoImages(
            **{"labels": images.labels, "names": images.names, "paths": images.paths} | values
        )


SCRIPT = """
import sys
import time
import numpy as np
from bench.retrieval.photos import PhotoImages

if __name__ == "__main__":
    data = PhotoImages(np.zeros(1, np.int64), ["a"], [sys.argv[1]], workers=2)
    try:
        for k, batch in enumerate(data.training([np.zeros(8, np.int64)] * 10_000, range(10_000))):
            print(k, flush=True)
            if k == 1 and sys.argv[2] == "wait":
                time.sleep(1000)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(
    ("number", "to_all", "status", "then"),
    [
        # As a terminal sends Ctrl-C: to every worker too.
        (signal.SIGINT, True, 130, "go on"),
        # Workers that wait for work have to find out.
        (signal.SIGKILL, False, -signal.SIGKILL, "wait"),
    ],
)
def test_workers_end_with_the_main_process(
    tmp_path: Path, number: int, to_all: bool, status: int, then: str
) -> None:
    path = write_image(tmp_path / "a.jpg", 1, (600, 600))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, path, then], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]  # one of each worker
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        # The pipes close when the last process ends: a worker that stays is a hang.
        _, errors = process.communicate(timeout=300)
        assert process.returncode == status
        assert "Traceback" not in errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.usefixtures("interrupts")
def test_interrupts_are_held_and_not_lost() -> None:
    done = []

    def start() -> None:
        with photos._interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("what came after the signal")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
