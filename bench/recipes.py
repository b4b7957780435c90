"""What a run of the retrieval benchmark depends on, and the presets. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

DATASETS = ("glyphs", "cub", "cars", "sop")
NETWORKS = ("cnn", "resnet50", "dino-vits16", "vits16")
LOSSES = (
    "pfml", "triplet", "contrastive", "npair", "proxynca", "proxy-anchor", "multi-similarity",
)  # fmt: skip
SPLITS = ("test", "validation")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("one-cycle", "constant")
PROXY_INITS = ("random", "samples")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of one run.

    Args:
        dataset: name of the data; of a user's arrays, any name.
        split: "test" retrieves the test classes; "validation" leaves them alone, trains on two
            thirds of the training classes and retrieves the others, to choose settings on.
        network: one of `NETWORKS`.
        weights: of a network of timm: a file, "random" for none, None for the published ones.
        embedding_size: D.
        freeze_batch_norm: keep the statistics and the factors of BatchNorm as they were loaded.
        loss: one of `LOSSES`.
        options: of the loss, where they are not the published ones of `bench.retrieval.losses`.
        label_noise: share in [0, 1) of the training labels that are replaced at random.
        seed: of the network, the proxies, the batches, their augmentation and the label noise. The
            split into classes and the test images do not depend on it.
        epochs: passes over as many images as the training set has.
        warmup_epochs: the first ones, in which only the network's new layers and the proxies learn.
        batch_size: images, a multiple of `images_per_class`.
        images_per_class: of each class in a batch.
        optimizer: one of `OPTIMIZERS`; Adam's weight decay is coupled, AdamW's is not.
        lr: learning rate of the network.
        proxy_lr_mult: the proxies' learning rate, in units of `lr`.
        weight_decay: of the network; proxies have none.
        schedule: "one-cycle" rises from 1/25 of the rates to all of them over the first 30% of the
            steps, then falls to 0; "constant" stays.
        clip: largest norm of the gradient of the network, and of the proxies; None for any.
        proxy_init: "random" as the loss draws them, "samples" at embeddings of random training
            images of their class, from the untrained network.
        project_proxies: scale proxies to unit length after every step.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
        recall_at: the K of R@K, 1 among them.
        variant: how this recipe differs from its preset, see `vary`; "" if it does not.
    """

    dataset: str = "glyphs"
    split: str = "test"
    network: str = "cnn"
    weights: str | None = None
    embedding_size: int = 64
    freeze_batch_norm: bool = False
    loss: str = "pfml"
    options: Mapping[str, Any] = field(default_factory=dict)
    label_noise: float = 0.0
    seed: int = 0
    epochs: int = 10
    warmup_epochs: int = 0
    batch_size: int = 128
    images_per_class: int = 4
    optimizer: str = "adam"
    lr: float = 3e-3
    proxy_lr_mult: float = 100.0
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    clip: float | None = None
    proxy_init: str = "random"
    project_proxies: bool = False
    evaluate_every: int = 2
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    variant: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("split", SPLITS), ("network", NETWORKS), ("loss", LOSSES), ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES), ("proxy_init", PROXY_INITS),
            ("freeze_batch_norm", (False, True)), ("project_proxies", (False, True)),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {_listed(allowed)}, got {value!r}")
        for name, least in (
            ("embedding_size", 1), ("epochs", 1), ("warmup_epochs", 0), ("batch_size", 1),
            ("images_per_class", 1), ("evaluate_every", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not _is_whole(value) or not least <= value < 2**63:
                raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
        for name in ("lr", "proxy_lr_mult", "weight_decay", "label_noise", "clip"):
            value = getattr(self, name)
            if name == "clip" and value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < math.inf
            ):
                raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")
        if self.batch_size % self.images_per_class:
            raise ValueError(
                "batch_size must be a multiple of images_per_class, "
                f"got {self.batch_size} and {self.images_per_class}"
            )
        if self.label_noise >= 1:
            raise ValueError(f"label_noise must be in [0, 1), got {self.label_noise}")
        if self.clip == 0:
            raise ValueError("clip must be above 0, got 0")
        ks = self.recall_at
        if not isinstance(ks, tuple) or 1 not in ks or not all(_is_whole(k) and k > 0 for k in ks):
            raise ValueError(f"recall_at must be whole numbers, 1 among them, got {ks!r}")

    def vary(self, **changes: Any) -> Self:
        """Change fields, or by any other name options of the loss, and say so in `variant`."""
        fields = {f.name for f in dataclasses.fields(self)}
        if fixed := changes.keys() & {"variant", "options", "dataset", "loss", "seed"}:
            raise ValueError(f"{_listed(sorted(fixed))} cannot be varied")
        options = {name: value for name, value in changes.items() if name not in fields}
        names = [self.variant] if self.variant else []
        return replace(
            self,
            **{name: value for name, value in changes.items() if name in fields},
            options={**self.options, **options},
            variant=",".join(names + [f"{name}={value}" for name, value in changes.items()]),
        )

    @property
    def run_id(self) -> str:
        """A name for the run, fit for a folder, by what sets it apart from others of its preset."""
        parts = [self.dataset, self.network, self.loss]
        parts += ["validation"] if self.split == "validation" else []
        parts += [f"noise{self.label_noise:g}"] if self.label_noise else []
        parts += [self.variant] if self.variant else []
        name = "-".join([*parts, f"seed{self.seed}"])
        fit = re.sub(r"[^\w.,=+-]", "_", name)
        if fit == name and len(name) <= 200 and not name.startswith("."):
            return name
        return f"_{fit[:180]}-{zlib.crc32(name.encode()):08x}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# What differs between losses on the glyphs: learning rates, the best of a search on the validation
# classes, clean and at 20% label noise, that is the same for all of them; and PFML's potential,
# from the study of its settings there. Both are in bench/retrieval/STUDY.md.
GLYPHS: dict[str, dict[str, Any]] = {
    "pfml": {
        "lr": 0.01,
        "options": {
            "alpha": 1.0, "delta": 0.1, "delta_rep": 0.2, "min_distance": 0.095,
            "proxies_per_class": 5,
        },
    },
    "triplet": {"lr": 0.003},
    "contrastive": {"lr": 0.003},
    "npair": {"lr": 0.001},
    "proxynca": {"lr": 0.003, "proxy_lr_mult": 10.0},
    "proxy-anchor": {"lr": 0.003, "proxy_lr_mult": 1.0},
    "multi-similarity": {"lr": 0.01},
}  # fmt: skip

# The paper's supplement, and where it is silent (the schedule, the sampler) the plainest choice.
_PAPER = Recipe(
    epochs=200, warmup_epochs=1, batch_size=100, lr=1e-4, schedule="constant", evaluate_every=1
)
_DATA: dict[str, dict[str, Any]] = {
    "cub": {"weight_decay": 5e-4, "freeze_batch_norm": True},
    "cars": {"weight_decay": 1e-4, "freeze_batch_norm": True},
    "sop": {"images_per_class": 2, "recall_at": (1, 10, 100, 1000)},
}
_PROXIES = {"cub": 15, "cars": 15, "sop": 2}
_DEPTHS = {"resnet50": 512, "dino-vits16": 384, "vits16": 384}
PRESETS = ("glyphs", *(f"{data}-{network}" for data in _DATA for network in _DEPTHS))


def preset(name: str, loss: str = "pfml") -> Recipe:
    """The recipe of a preset with a loss.

    "glyphs" is sized for two CPU cores. "cub-resnet50" and so on, every data set with every network
    of the paper, are its published settings (Bhatnagar and Ahuja, CVPR 2025, supplement Table 5).

    Args:
        name: one of `PRESETS`.
        loss: one of `LOSSES`.

    Raises:
        ValueError: no such preset or loss.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if name == "glyphs":
        return replace(Recipe(loss=loss), **GLYPHS[loss])
    data, _, network = name.partition("-")
    return replace(
        _PAPER,
        dataset=data,
        network=network,
        embedding_size=_DEPTHS[network],
        loss=loss,
        options={"proxies_per_class": _PROXIES[data]} if loss == "pfml" else {},
        **_DATA[data],
    )
