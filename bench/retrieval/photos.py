"""Photographs in files: decoded and cropped by workers while a network trains.

A batch is a function of its indices and its seed alone. Its random numbers are drawn in the process
that asks for it, and a worker only does with them what they say, so that the number of workers, and
how far they are ahead, change nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.retrieval.images import Images, Labels, to_tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

# The random resized crop: share of the area, width over height, and how often a crop that does not
# fit is drawn again. An image takes two numbers an attempt, two for the place, one for the flip.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
DRAWS = 2 * ATTEMPTS + 3


class Job(NamedTuple):
    """A batch to decode: draws [b, DRAWS] in [0, 1), or None for the evaluation crop."""

    paths: Sequence[Path]
    draws: NDArray[np.float64] | None


@dataclass(frozen=True)
class PhotoImages(Images):
    """Images in files, as RGB in [0, 1].

    To train, a random part of 8 to 100% of the area, of proportion 3:4 to 4:3, scaled to a square
    and mirrored half of the time; to evaluate, the shorter side scaled to `resized` and the square
    in the middle cut out. Rotation by EXIF is ignored.

    Attributes:
        paths: of each image its file.
        size: height and width of a batch in pixels.
        resized: the shorter side before the cut, `size` or more.
        workers: processes that decode ahead; with 0 the caller decodes.

    Raises:
        ValueError: a size or a number of workers outside its range, or another number of labels
            than of paths.
        OSError: while iterating, naming a file that cannot be read.
    """

    paths: Sequence[Path]
    size: int = 224
    resized: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resized:
            raise ValueError(
                f"expected 0 < size <= resized, got size {self.size} and resized {self.resized}"
            )
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}")
        if len(self.labels) != len(self.paths):
            raise ValueError(
                f"every path needs a label, got {len(self.paths)} and {len(self.labels)}"
            )

    @property
    def channels(self) -> int:
        return 3

    def training(self, batches: Sequence[Labels], seeds: Sequence[int]) -> Iterator[Tensor]:
        jobs = (
            Job([self.paths[i] for i in batch], draws(len(batch), seed))
            for batch, seed in zip(batches, seeds, strict=True)
        )
        return self._decoded(jobs, len(batches))

    def evaluation(self, batch_size: int) -> Iterator[Tensor]:
        starts = range(0, len(self.paths), batch_size)
        jobs = (Job(self.paths[start : start + batch_size], None) for start in starts)
        return self._decoded(jobs, len(starts))

    def picture(self, index: int) -> NDArray[np.uint8]:
        return centre_crop(read_rgb(self.paths[index]), self.size, self.resized)

    def content(self) -> int:
        names = "\n".join("/".join(path.parts[-2:]) for path in self.paths)
        return zlib.crc32(f"{self.size} {self.resized}\n{names}".encode())

    def take(self, keep: NDArray[np.bool_]) -> Self:
        return replace(self, labels=self.labels[keep], paths=list(compress(self.paths, keep)))

    def _decoded(self, jobs: Iterable[Job], count: int) -> Iterator[Tensor]:
        """The batches of `count` jobs, in their order."""
        workers = min(self.workers, count)
        loader = DataLoader(
            _Decoder(self.size, self.resized),
            sampler=jobs,
            batch_size=None,  # a job is a batch
            num_workers=workers,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_follow_the_main_process,
            # It draws a seed for its workers, which nothing uses: not from the global generator.
            generator=torch.Generator(),
        )
        with _interrupts_held():
            batches = iter(loader)  # starts the workers
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise OSError(batch)
                yield batch
        finally:
            del batches  # ends the workers now, not when a traceback lets go of this frame


@dataclass(frozen=True)
class _Decoder(Dataset["Tensor | str"]):
    """Turns a job into [b, 3, size, size] float32, or the message that names an unreadable file.

    An error that is raised in a worker reaches the user inside two tracebacks.
    """

    size: int
    resized: int

    def __getitem__(self, job: Job) -> Tensor | str:
        crops = np.empty((len(job.paths), self.size, self.size, 3), dtype=np.uint8)
        try:
            for i, path in enumerate(job.paths):
                if job.draws is None:
                    crops[i] = centre_crop(read_rgb(path), self.size, self.resized)
                else:
                    crops[i] = random_crop(read_rgb(path), self.size, job.draws[i])
        except OSError as error:
            return str(error)
        return to_tensor(crops).contiguous()


def draws(images: int, seed: int) -> NDArray[np.float64]:
    """The random numbers of a batch, [images, DRAWS] in [0, 1)."""
    return np.random.default_rng(seed).random((images, DRAWS))


def _context() -> BaseContext:
    """How workers are started.

    Not by "fork": it copies the locks of this process's threads (progress bars, OpenMP, CUDA) as
    they are, and a locked one stays so. A fork server has no threads, and imports PyTorch once for
    all; systems without one start every worker afresh.

    The server is started with SIGINT blocked, which workers inherit, see
    `_follow_the_main_process`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    resource_tracker.ensure_running()  # it would be started within, and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _follow_the_main_process(worker: int) -> None:
    """Make a worker end with the main process, and with nothing else.

    Ctrl-C reaches every process of a terminal; it is the main one that decides. Where that is
    killed, a worker that waits for work would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    assert main is not None

    def wait() -> None:
        connection.wait([main.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C take effect afterwards: a worker half started would be known to nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread only
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def read_rgb(path: Path, *, small: bool = False) -> Image.Image:
    """Decode a file, all of it, whatever its mode.

    Args:
        path: of the file.
        small: a JPEG at an eighth of its size, in less time.

    Raises:
        OSError: it cannot be read, naming it and the reason.
    """
    try:
        with Image.open(path) as file:
            if small:
                file.draft(None, (1, 1))
            return file.convert("RGB")
    except Exception as error:  # Pillow has no kind of its own: SyntaxError, ValueError, IndexError
        reason = getattr(error, "strerror", None) or f"{error}" or type(error).__name__
        raise OSError(f"cannot read {path}: {reason}") from error


def centre_crop(image: Image.Image, size: int, resized: int) -> NDArray[np.uint8]:
    """The middle square of an image whose shorter side is scaled to `resized`: [size, size, 3]."""
    side = min(image.size) * size / resized
    left, top = ((extent - side) / 2 for extent in image.size)
    return _scaled(image, size, (left, top, left + side, top + side))


def random_crop(image: Image.Image, size: int, drawn: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A part of an image scaled to a square, perhaps mirrored: [size, size, 3], by [DRAWS]."""
    crop = _scaled(image, size, random_box(*image.size, drawn))
    return crop[:, ::-1] if drawn[-1] < 0.5 else crop


def random_box(width: int, height: int, drawn: NDArray[np.float64]) -> Box:
    """A random part of an image, in whole pixels; drawn [DRAWS] in [0, 1) choose it.

    The first attempt that fits, or, where an image is too long for any, the largest middle part of
    a proportion in `RATIO`.
    """
    attempts = drawn[: 2 * ATTEMPTS].reshape(ATTEMPTS, 2)
    area = width * height * np.interp(attempts[:, 0], (0, 1), AREA)
    ratio = np.exp(np.interp(attempts[:, 1], (0, 1), np.log(RATIO)))
    widths, heights = np.sqrt(area * ratio).round(), np.sqrt(area / ratio).round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = fits.argmax()
        w, h = int(widths[first]), int(heights[first])
        left = math.floor(drawn[-3] * (width - w + 1))
        top = math.floor(drawn[-2] * (height - h + 1))
    else:
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _scaled(image: Image.Image, size: int, box: Box) -> NDArray[np.uint8]:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
