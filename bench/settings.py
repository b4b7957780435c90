"""Settings of the studies. Imports nothing heavy, so that the command line answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """Settings of one comparison of losses by retrieval.

    Args:
        preset: one of `bench.recipes.PRESETS`, which gives all that is not said here.
        losses: some of `bench.recipes.LOSSES`.
        seeds: a run of each loss with each.
        label_noise: shares of the training labels that are replaced at random; a run with each.
        variations: values of fields of `bench.recipes.Recipe` or of options of the losses, by name;
            a run with every combination.
        split: one of `bench.recipes.SPLITS`.
        epochs: None for the preset's.
        data: folder of the data set; None for glyphs.
        weights: see `bench.recipes.Recipe`.
        strict: refuse images that cannot be read, instead of leaving them out.
        workers: processes that read photographs, None for one a core, up to 8.
        restart: begin anew where runs are done or half done.
        device: one of `DEVICES`.
        threads: CPU threads of PyTorch, None for its own choice.
    """

    preset: str = "glyphs"
    losses: tuple[str, ...] = ("pfml",)
    seeds: tuple[int, ...] = (0,)
    label_noise: tuple[float, ...] = (0.0,)
    variations: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    split: str = "test"
    epochs: int | None = None
    data: Path | None = None
    weights: str | None = None
    strict: bool = False
    workers: int | None = None
    restart: bool = False
    device: str = "auto"
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


GPU_PHASES = (
    "machine", "first", "correctness", "stress", "steps", "peers", "slack", "tune", "memcheck",
    "racecheck",
)  # fmt: skip


@dataclass(frozen=True)
class GpuSettings:
    """Settings of the first minutes on a GPU.

    Args:
        minutes: of all phases together.
        phases: some of `GPU_PHASES`; they run in that order, "machine" in any case.
        rehearse: run every phase without a GPU, on tiny clouds, for numbers that mean nothing.
    """

    minutes: float = 8.0
    phases: tuple[str, ...] = GPU_PHASES
    rehearse: bool = False


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
class RanksSettings:
    """Settings of one measurement of the loss over many processes.

    Args:
        sizes: some of `SIZES`.
        ranks: numbers of processes, each measured.
        seed: of the points.
    """

    sizes: tuple[str, ...] = ("cub", "sop")
    ranks: tuple[int, ...] = (1, 2, 3, 4)
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
