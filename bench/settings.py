"""Settings of the studies. Imports nothing heavy, so that the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda")
PROVIDERS = (
    "pfml", "pfml-dense", "pfml-triton", "pfml-triton-dense", "pfml-torch", "pfml-torch-dense",
    "eager", "compile", "keops",
    "proxy-anchor", "multi-similarity", "triplet", "contrastive",
)  # fmt: skip
MODES = ("forward", "forward+backward")
SPEED_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RetrievalSettings:
    """Settings of one retrieval run; the defaults are sized for two CPU cores.

    Args:
        epochs: passes over as many images as the training set has.
        seed: of the network, the proxies, the batches and their augmentation. The split into
            training and test classes and the test images do not depend on it.
        device: one of `DEVICES`.
        batch_size: images, a multiple of `images_per_class`.
        images_per_class: of each class in a batch.
        embedding_size: D.
        proxies_per_class: M.
        alpha, delta: the decay and the radius of the potential.
        lr: Adam's learning rate for the network.
        proxy_lr_mult: the proxies' learning rate, in units of `lr`.
        threads: CPU threads of PyTorch, None for its own choice.
    """

    epochs: int = 20
    seed: int = 0
    device: str = "auto"
    batch_size: int = 128
    images_per_class: int = 4
    embedding_size: int = 64
    proxies_per_class: int = 5
    alpha: float = 3.0
    delta: float = 0.2
    lr: float = 3e-3
    proxy_lr_mult: float = 100.0
    threads: int | None = None


@dataclass(frozen=True)
class Size:
    """A batch and the proxies beside it: N = batch + classes * proxies points.

    Args:
        batch: B, samples.
        classes: C.
        proxies: M of each class.
        depth: D of the points.
        kind: one of `KINDS`, where the points lie, see `bench.clouds.make_cloud`.
    """

    batch: int
    classes: int
    proxies: int
    depth: int = 512
    kind: str = "apart"

    @property
    def n(self) -> int:
        return self.batch + self.classes * self.proxies

    @property
    def samples_per_class(self) -> int:
        """In the batch: 2, or more where the classes would not fill it."""
        return max(2, -(-self.batch // self.classes))


KINDS = ("apart", "one-class", "collapsed")
SIZES = {
    "cub": Size(100, 100, 15),
    "cars": Size(100, 98, 15),
    "sop": Size(100, 11_318, 2),
    "vit-sop": Size(100, 11_318, 2, depth=384),
    "faces-100k": Size(512, 100_000, 1),
    "one-class": Size(100, 1, 7_900, kind="one-class"),
    "collapsed": Size(100, 1_975, 4, kind="collapsed"),
}


MODELLED = tuple(name for name, size in SIZES.items() if size.kind == "apart")


@dataclass(frozen=True)
class SpeedSettings:
    """Settings of one comparison of providers; the defaults are sized for two CPU cores.

    Args:
        sizes: some of `SIZES`, by name.
        n: further sizes of as many points, well apart.
        d, classes: D and C of those; C is as many as make 4 proxies a class if None.
        providers: some of `PROVIDERS`.
        modes: some of `MODES`.
        dtype: of the embeddings, one of `SPEED_DTYPES`; proxies are float32.
        repeats: timed calls of each provider, in turn with the others; quick ones get more.
        seed: of the points.
        device: one of `DEVICES`.
        slow: also run what takes minutes.
        threads: CPU threads of PyTorch, None for its own choice.
    """

    sizes: tuple[str, ...] = tuple(SIZES)
    n: tuple[int, ...] = ()
    d: int = 512
    classes: int | None = None
    providers: tuple[str, ...] = PROVIDERS
    modes: tuple[str, ...] = MODES
    dtype: str = "float32"
    repeats: int = 3
    seed: int = 0
    device: str = "auto"
    slow: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class HostSettings:
    """Settings of one measurement of the host's part of a step.

    Args:
        size: one of `SIZES`.
        repeats: timed steps.
        seed: of the points.
    """

    size: str = "cub"
    repeats: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class RooflineSettings:
    """Settings of the modelled steps.

    Args:
        archs: some of bench.chips.CHIPS.
        sizes: some of `MODELLED`, by name.
        dtype: of the embeddings, one of `DTYPES`; proxies are float32.
        seed: of the points.
        explain: print how each time comes about.
        validate: print the validation and nothing else.
    """

    archs: tuple[str, ...] = ("sm_80", "sm_90")
    sizes: tuple[str, ...] = MODELLED
    dtype: str = "float32"
    seed: int = 0
    explain: bool = False
    validate: bool = False


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one search for tile shapes.

    Args:
        sizes: some of `SIZES`, by name: how many points, in which classes. One of each number of
            points that rounds to the same power of four is enough.
        depths: D of the points.
        dtypes: of the points, some of `SPEED_DTYPES`.
        static: rank configurations by their machine code instead of by their time on a GPU.
        arch: for `static`, one of bench.chips.CHIPS.
        file: the tuning file that gets what was measured; the user's own if None.
        seed: of the points.
    """

    sizes: tuple[str, ...] = ("cub", "sop")
    depths: tuple[int, ...] = (384, 512)
    dtypes: tuple[str, ...] = ("float32",)
    static: bool = False
    arch: str | None = None
    file: Path | None = None
    seed: int = 0
