"""Train a small embedding network with a metric learning loss and measure zero-shot retrieval.

The functions take arrays and any loss of (embeddings, labels), so that other data sets and losses
plug in; `run` is the experiment behind ``python -m bench retrieval``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from bench.figures import class_field_figure, embedding_field_figure
from bench.glyphs import load_glyphs
from bench.images import ImageSet, random_affine, split_by_class, to_tensor
from bench.results import append_row, provenance
from bench.settings import DEVICES, RetrievalSettings
from pfml_triton import PFMLLoss
from pfml_triton.functional import Stats, total_energy
from pfml_triton.sketch import random_basis

RECALL_KS = (1, 2, 4, 8)

Loss = Callable[[Tensor, Tensor], Tensor]
Progressed = Callable[[int, float], None]


class EmbeddingNetwork(nn.Sequential):
    """Four convolution blocks, average pool, one linear head.

    Args:
        embedding_size: length D of the embeddings; they are not normalised, the loss does that.
        width: channels of the first block; each further block has twice as many.
    """

    def __init__(self, embedding_size: int, width: int = 24) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for block in range(4):
            out = width * 2**block
            if block:
                layers.append(nn.MaxPool2d(2))
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, embedding_size)]
        super().__init__(*layers)


def train(
    network: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    *,
    epochs: int,
    batch_size: int,
    images_per_class: int,
    seed: int,
    on_step: Progressed | None = None,
) -> list[float]:
    """Train a network on randomly moved images, each drawn afresh in every batch.

    Learning rates rise from 1/25 of the optimiser's to all of it over the first 30% of the steps,
    then fall to 0 (one cycle).

    Args:
        network: maps [B, 1, H, W] float images to [B, D] embeddings; its device is used.
        loss: maps embeddings [B, D] and labels [B] to a scalar.
        optimizer: holds the parameters of the network and of the loss.
        data: training images of at least two classes.
        epochs: passes over as many images as `data` has, 1 or more.
        batch_size: B, a multiple of `images_per_class`, and no more than every class can fill.
        images_per_class: samples of each class in a batch, 2 or more for a class to attract.
        seed: of the batches and the moves. Sets pytorch-metric-learning's generator.
        on_step: called with the number of steps done and the loss after each.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: see `check_training`.
    """
    check_training(data, epochs, batch_size, images_per_class)
    device = next(network.parameters()).device
    images, labels = to_tensor(data.images), torch.from_numpy(data.labels)
    common_functions.NUMPY_RANDOM = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    sampler = MPerClassSampler(labels, images_per_class, batch_size, len(labels))
    per_epoch = steps_per_epoch(len(labels), batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=epochs * per_epoch,
        cycle_momentum=False,
    )
    network.train()
    means: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in torch.tensor(list(sampler)).split(batch_size):
            moved = random_affine(images[batch].to(device), generator)
            value = loss(network(moved), labels[batch].to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if on_step is not None:
                on_step(len(means) * per_epoch + len(losses), losses[-1])
        means.append(math.fsum(losses) / len(losses))
    return means


def check_training(data: ImageSet, epochs: int, batch_size: int, images_per_class: int) -> None:
    """Raise ValueError, naming what came and what can be, where `train` could not run."""
    classes = len(np.unique(data.labels))
    if classes < 2:
        raise ValueError(f"training needs at least 2 classes, got {classes}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
        raise ValueError(
            "batch_size must be a positive multiple of images_per_class, "
            f"got {batch_size} and {images_per_class}"
        )
    largest = min(classes * images_per_class, len(data.labels))
    if batch_size > largest:
        raise ValueError(
            f"batch_size must be at most {largest} ({classes} classes of {images_per_class} "
            f"images, {len(data.labels)} images), got {batch_size}"
        )


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in one pass; the rest is left for the next pass to draw."""
    return images // batch_size


def embed(network: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Embeddings [n, D], on the network's device, of images [n, 1, H, W] in evaluation mode."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with torch.no_grad():
        parts = [network(part.to(device)) for part in images.split(batch_size)]
    network.train(was_training)
    return torch.cat(parts)


def evaluation_images(data: ImageSet, seed: int) -> Tensor:
    """The images [n, 1, H, W], moved at random once: the same seed gives the same images."""
    return random_affine(to_tensor(data.images), torch.Generator().manual_seed(seed))


def evaluate(
    network: nn.Module, images: Tensor, labels: Tensor, ks: Sequence[int] = RECALL_KS
) -> dict[int, float]:
    """R@K of a network: every image queries all the others. Arguments as in `recall_at_k`."""
    return recall_at_k(embed(network, images), labels, ks)


def recall_at_k(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = RECALL_KS, chunk_size: int = 1024
) -> dict[int, float]:
    """Recall at K by cosine similarity, exact: every point queries all the others.

    A query counts for K if at least one of its K nearest neighbours, itself excluded, has its
    label. At most `chunk_size` x n similarities exist at a time.

    Args:
        embeddings: [n, D] float, any length.
        labels: [n] integers, at least two classes and two points of each.
        ks: the values of K, each in [1, n - 1].
        chunk_size: queries at a time.

    Returns:
        The share of queries that count, in [0, 1], by K.

    Raises:
        ValueError: shapes that do not match, embeddings that are not finite, a K outside its range,
            fewer than two classes, or a class that has one point and so no right answer.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            "expected embeddings [n, D] and labels [n], "
            f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    n = len(labels)
    if not ks or min(ks) < 1 or max(ks) > n - 1:
        raise ValueError(f"every K must be in [1, {n - 1}], the gallery's size, got {tuple(ks)}")
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"retrieval needs at least 2 classes, got {len(classes)}")
    if counts.min() < 2:
        raise ValueError(
            "every class needs at least 2 images to be evaluated, "
            f"class {classes[counts.argmin()].item()} has 1"
        )
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, got NaN or infinity: did training diverge?")
    labels = labels.to(embeddings.device)
    unit = functional.normalize(embeddings, dim=1)
    hits = torch.zeros(len(ks), dtype=torch.int64, device=embeddings.device)
    for start in range(0, n, chunk_size):
        similarity = unit[start : start + chunk_size] @ unit.T
        rows = torch.arange(len(similarity), device=similarity.device)
        similarity[rows, start + rows] = -math.inf
        neighbours = similarity.topk(max(ks), dim=1).indices
        right = labels[neighbours] == labels[start + rows, None]
        hits += torch.stack([right[:, :k].any(dim=1).sum() for k in ks])
    return {k: hit / n for k, hit in zip(ks, hits.tolist(), strict=True)}


def run(settings: RetrievalSettings, out: Path, console: Console | None = None) -> dict[str, float]:
    """Train and evaluate on the glyphs, print a table, append a row and draw class fields.

    Args:
        settings: see `RetrievalSettings`.
        out: folder that gets ``retrieval.jsonl`` (a row is appended), ``class_fields.png`` (a toy
            set in the plane) and ``embedding_fields.png`` (two classes of the trained embedding).
        console: where to print; standard output if None.

    Returns:
        R@K in [0, 1] by ``untrained_r1``, ``trained_r1`` and so on.

    Raises:
        ValueError: a setting is out of range, or the device is not there.
    """
    started = time.perf_counter()
    console = console or Console()
    device = resolve_device(settings.device)
    if settings.threads is not None:
        if settings.threads < 1:
            raise ValueError(f"threads must be at least 1, got {settings.threads}")
        torch.set_num_threads(settings.threads)
    if settings.embedding_size < 3:
        raise ValueError(
            "embedding_size must be at least 3, or there is no section of the sphere to draw, "
            f"got {settings.embedding_size}"
        )
    torch.manual_seed(settings.seed)

    train_set, test_set = split_by_class(load_glyphs())
    check_training(train_set, settings.epochs, settings.batch_size, settings.images_per_class)
    network = EmbeddingNetwork(settings.embedding_size).to(device)
    loss = PFMLLoss(
        len(train_set.names),
        settings.embedding_size,
        settings.proxies_per_class,
        alpha=settings.alpha,
        delta=settings.delta,
    ).to(device)
    optimizer = torch.optim.Adam(
        [
            {"params": network.parameters(), "lr": settings.lr},
            *loss.param_groups(settings.lr, proxy_lr_mult=settings.proxy_lr_mult),
        ]
    )
    counts = {
        "train_classes": len(train_set.names),
        "train_images": len(train_set.labels),
        "test_classes": len(test_set.names),
        "test_images": len(test_set.labels),
    }
    console.print(
        "Glyphs: {train_images} images of {train_classes} characters to train, "
        "{test_images} of {test_classes} others to test.".format(**counts)
    )
    test_images = evaluation_images(test_set, seed=0)
    test_labels = torch.from_numpy(test_set.labels)
    recalls = {
        "pixels": recall_at_k(test_images.flatten(1), test_labels),
        "untrained": evaluate(network, test_images, test_labels),
    }
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written stops it here
    train_started = time.perf_counter()
    losses = _train_with_progress(network, loss, optimizer, train_set, settings, console)
    train_seconds = time.perf_counter() - train_started
    recalls["trained"] = evaluate(network, test_images, test_labels)

    console.print(recall_table(recalls))
    flat = {f"{name}_r{k}": r for name, recall in recalls.items() for k, r in recall.items()}
    total_seconds = time.perf_counter() - started
    row = {"bench": "retrieval", "dataset": "glyphs", "loss": "PFMLLoss", **asdict(settings)}
    row |= counts | flat | {"first_loss": losses[0], "last_loss": losses[-1]}
    embeddings = embed(network, evaluation_images(train_set, seed=0)).cpu()
    train_labels = torch.from_numpy(train_set.labels)
    shares = active_shares(loss, embeddings, train_labels, settings.batch_size)
    row |= {f"active_share_{name}": share for name, share in shares.items()}
    row |= {"train_seconds": round(train_seconds, 2), "seconds": round(total_seconds, 2)}
    append_row(out / "retrieval.jsonl", row | provenance(device))
    class_field_figure(out / "class_fields.png")
    embedding_field_figure(
        out / "embedding_fields.png",
        embeddings,
        train_labels,
        loss.proxies.detach().cpu(),
        loss.potential,
        train_set.names,
    )
    percent = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
    console.print(
        f"Pruning leaves {percent['batch']} of the tiles of a batch and the proxies "
        f"({percent['batch_random']} with a random sketch), "
        f"{percent['all']} of all training images ({percent['all_random']}).",
        highlight=False,
    )
    console.print(
        f"{total_seconds:.0f} s in all, {train_seconds:.0f} s of them training. "
        f"Wrote retrieval.jsonl, class_fields.png and embedding_fields.png to {out}."
    )
    return flat


def active_shares(
    loss: PFMLLoss, embeddings: Tensor, labels: Tensor, samples: int
) -> dict[str, float]:
    """The share of tiles of pairs that pruning leaves of two clouds, in [0, 1].

    "batch" is `samples` embeddings of as many classes and the proxies, "all" is every embedding.
    Each with the sketch of the loss, and with one of random directions ("batch_random" and so on).
    """
    first_of_class = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()])
    some = first_of_class[torch.linspace(0, len(first_of_class) - 1, samples).long().unique()]
    proxies = loss.proxies.detach().flatten(0, 1).cpu()
    proxy_labels = torch.arange(loss.num_classes).repeat_interleave(loss.proxies_per_class)
    clouds = {
        "batch": (torch.cat([embeddings[some], proxies]), torch.cat([labels[some], proxy_labels])),
        "all": (embeddings, labels),
    }
    device = loss.proxies.device
    bases = {
        "": loss.sketch_basis,
        "_random": random_basis(loss.embedding_size, loss.sketch_basis.device),
    }
    shares = {}
    for cloud, (points, classes) in clouds.items():
        for basis, directions in bases.items():
            _, totals = total_energy(
                points.to(device), classes.to(device), loss.potential, unit=True,
                backend=loss.backend, basis=directions,
            )  # fmt: skip
            shares[f"{cloud}{basis}"] = Stats.of(totals).active_share.item()
    return shares


def resolve_device(name: str) -> torch.device:
    """The device of one of `DEVICES`; "auto" is a GPU if there is one. ValueError otherwise."""
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch finds no GPU; try 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def recall_table(recalls: dict[str, dict[int, float]]) -> Table:
    """A table of R@K in percent, a row for each name."""
    table = Table(title="Retrieval of characters never seen in training, %")
    table.add_column("embedding")
    for k in next(iter(recalls.values())):
        table.add_column(f"R@{k}", justify="right")
    for name, recall in recalls.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in recall.values()))
    return table


def _train_with_progress(
    network: nn.Module,
    loss: PFMLLoss,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    settings: RetrievalSettings,
    console: Console,
) -> list[float]:
    per_epoch = steps_per_epoch(len(data.labels), settings.batch_size)
    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.8g}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "", total=settings.epochs * per_epoch, epoch=1, epochs=settings.epochs, loss=math.nan
        )

        def on_step(done: int, value: float) -> None:
            epoch = (done - 1) // per_epoch + 1
            progress.update(task, completed=done, epoch=epoch, loss=value)

        return train(
            network,
            loss,
            optimizer,
            data,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            images_per_class=settings.images_per_class,
            seed=settings.seed,
            on_step=on_step,
        )
