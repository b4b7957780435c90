"""A folder as retrieval runs leave it, of small made-up numbers, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import append_row
from bench.retrieval.images import ArrayImages, DataSet
from bench.retrieval.losses import options_of

CLASSES, PER_CLASS, DEPTH, SIDE = 6, 5, 8, 16
LEVEL = {"pfml": 0.9, "proxy-anchor": 0.8, "triplet": 0.7}
PROXIES = {"pfml": 3, "proxy-anchor": 1, "triplet": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    name: options_of(name, options)
    for name, options in (("pfml", {"proxies_per_class": 3}), ("proxy-anchor", {}), ("triplet", {}))
}
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha=1.0": {"alpha": 1.0},
    "delta=0.3": {"delta": 0.3},
    "delta_rep=0.45": {"delta_rep": 0.45},
    "proxies_per_class=0": {"proxies_per_class": 0},
    "alpha=1.0,delta=0.3": {"alpha": 1.0, "delta": 0.3},
}


def row(
    loss: str = "pfml", noise: float = 0.0, seed: int = 0, variant: str = "", **changed: Any
) -> dict[str, Any]:
    """A row of results, its shares a function of what it is of; `changed` replaces fields."""
    options = OPTIONS[loss] | VARIANTS.get(variant, {})
    final = LEVEL[loss] - 0.5 * noise - 0.01 * seed * (1 + noise) - 0.002 * len(variant)
    name = "-".join(filter(None, ["dots", "cnn", loss, f"noise{noise:g}", variant, f"seed{seed}"]))
    shares = {f"r{k}": 1 - (1 - final) / k for k in (1, 2, 4)} | {"map_at_r": final / 2}
    found: dict[str, Any] = {
        "run": name, "dataset": "dots", "split": "test", "network": "cnn", "loss": loss,
        "label_noise": noise, "seed": seed, "variant": variant, "epochs": 4, "lr": 1e-3,
        "batch_size": 32, "options": options, "best_epoch": 2 + seed, "skipped_images": 0,
    }  # fmt: skip
    found |= {f"final_{metric}": value for metric, value in shares.items()}
    found |= {f"best_{metric}": min(1, value + 0.0213) for metric, value in shares.items()}
    found |= {"active_share_batch": 0.1 + 0.01 * seed, "untrained_r1": 0.1 * seed}
    found |= {"train_images": 30, "train_classes": 6, "test_images": 30, "test_classes": 6}
    found |= {"seconds": 3.0 + seed, "train_seconds": 2.0, "time": "2026-01-02T03:04:05+00:00"}
    found |= {"commit": "abc", "torch": "2.13.0", "cpu": "A Processor", "device": "cpu"}
    return found | {"threads": 1} | changed


def rows() -> list[dict[str, Any]]:
    """Three losses, clean and noisy, three seeds; variants of one loss, two seeds."""
    plain = [row(loss, noise, seed) for loss in LEVEL for noise in (0.0, 0.2) for seed in range(3)]
    return plain + [row(variant=variant, seed=seed) for variant in VARIANTS for seed in range(2)]


def dots(seed: int = 0) -> DataSet:
    """Six classes to train on and six to test: images of noise with a bright dot of their own."""

    def images(first: int) -> ArrayImages:
        generator = np.random.default_rng(seed + first)
        labels = np.arange(CLASSES).repeat(PER_CLASS)
        pixels = generator.integers(0, 90, (len(labels), SIDE, SIDE), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            y, x = divmod(2 * int(label), 4)
            image[4 * y + 2 : 4 * y + 6, 4 * x + 2 : 4 * x + 6] = 255
        return ArrayImages(labels, [f"dot ${first + c}" for c in range(CLASSES)], pixels)

    return DataSet("dots", images(0), images(CLASSES))


def arrays(loss: str, seed: int, spread: float = 0.4) -> dict[str, np.ndarray]:
    """Embeddings around one direction a class, of any length, and proxies nearer to it."""
    generator = np.random.default_rng([seed, len(loss)])
    labels = np.arange(CLASSES).repeat(PER_CLASS)

    def around(centres: np.ndarray, size: float) -> np.ndarray:
        return (centres + size * generator.normal(size=centres.shape)).astype(np.float32)

    train, test = generator.normal(size=(2, CLASSES, DEPTH))
    proxies = around(train[:, None].repeat(PROXIES[loss], axis=1), spread / 2)
    return {
        "test": around(test[labels], 3 * spread), "test_labels": labels,
        "train": around(train[labels], spread), "train_labels": labels, "proxies": proxies,
    }  # fmt: skip


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    """The rows, a log with four evaluations of each, and arrays of the plain ones."""
    for result in results:
        append_row(folder / "results.jsonl", result)
        for epoch in range(1, 5):
            event = {"event": "epoch", "run": result["run"], "epoch": epoch, "loss": 1.0}
            append_row(folder / "log.jsonl", event)
            r1 = result["final_r1"] * epoch / 4
            append_row(folder / "log.jsonl", event | {"event": "evaluation", "r1": r1})
        if not result["variant"]:
            (folder / result["run"]).mkdir(exist_ok=True)
            contents = arrays(result["loss"], result["seed"])
            np.savez(folder / result["run"] / "embeddings.npz", **contents)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
