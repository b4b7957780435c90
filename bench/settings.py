"""Settings of the studies. Imports nothing heavy, so that the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = ("auto", "cpu", "cuda")
SIZES = ("small", "sop", "large", "worst")
PROVIDERS = ("pfml", "pfml dense", "eager", "compile")
# What a step is made of, by the name of its size: samples, classes, proxies a class, depth.
STEPS = {
    "cub": (100, 100, 15, 512),
    "cars": (100, 98, 15, 512),
    "sop": (100, 11_318, 2, 512),
    "vit-sop": (100, 11_318, 2, 384),
    "faces-100k": (512, 100_000, 1, 512),
}
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
class PruningSettings:
    """Settings of one measurement of the pruning; the defaults are sized for two CPU cores.

    Args:
        sizes: some of `SIZES`.
        providers: some of `PROVIDERS`.
        repeats: timed calls of each provider, in turn with the others.
        depth: D of the points.
        seed: of the points.
        device: one of `DEVICES`.
        slow: also run what takes minutes: "pfml dense" on the large cloud.
        threads: CPU threads of PyTorch, None for its own choice.
        small_points, large_points, worst_points: N of these clouds, in classes of 4.
        sop_classes: classes of 2 proxies, as many as Stanford Online Products has to train on.
        sop_batch: samples beside those proxies, 2 of a class.
    """

    sizes: tuple[str, ...] = SIZES
    providers: tuple[str, ...] = PROVIDERS
    repeats: int = 5
    depth: int = 512
    seed: int = 0
    device: str = "auto"
    slow: bool = False
    threads: int | None = None
    small_points: int = 8_000
    large_points: int = 100_000
    worst_points: int = 8_000
    sop_classes: int = 11_318
    sop_batch: int = 100


@dataclass(frozen=True)
class RooflineSettings:
    """Settings of the modelled steps.

    Args:
        archs: some of bench.chips.CHIPS.
        sizes: some of `STEPS`.
        dtype: of the points, one of `DTYPES`.
        seed: of the points.
        explain: print how each time comes about.
        validate: print the validation and nothing else.
    """

    archs: tuple[str, ...] = ("sm_80", "sm_90")
    sizes: tuple[str, ...] = tuple(STEPS)
    dtype: str = "float32"
    seed: int = 0
    explain: bool = False
    validate: bool = False
