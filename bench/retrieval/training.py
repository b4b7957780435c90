"""One training run: its batches, its steps, and a state that resumes exactly.

Batches and their augmentation are functions of the seed, the epoch and the step alone. So a run
that was stopped anywhere and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor, nn
from torch.nn import functional

from bench.recipes import Recipe
from bench.retrieval.images import Images, Labels
from bench.retrieval.losses import proxies_of
from bench.retrieval.networks import EmbeddingNetwork

Progressed = Callable[["Training"], None]


@dataclass
class Training:
    """A network and a loss in training.

    Attributes:
        recipe: the settings.
        network: maps [B, C, H, W] float images to [B, D] embeddings; its device is used.
        loss: maps embeddings [B, D] and labels [B] to a scalar.
        images: to train on, under the labels that the loss is to see.
        optimizer, schedule: of the parameters of both.
        epoch: epochs done.
        step: steps done in the next one.
        loss_sum: float64 scalar on the device, of the losses of those steps.
        seconds: that the steps have taken.
        history: what was found so far, rows for whoever reads the state.
    """

    recipe: Recipe
    network: EmbeddingNetwork
    loss: nn.Module
    images: Images
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_training(self.images.labels, self.recipe)
        recipe = self.recipe
        self.device = next(self.network.parameters()).device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        proxies = list(self.loss.parameters())
        self.optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](
            [
                {
                    "params": [p for p in self.network.parameters() if p.requires_grad],
                    "weight_decay": recipe.weight_decay,
                },
                *([{"params": proxies, "lr": recipe.lr * recipe.proxy_lr_mult}] if proxies else []),
            ],
            lr=recipe.lr,
            weight_decay=0.0,
        )
        self.schedule = _schedule(self.optimizer, recipe, recipe.epochs * self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass; the rest is left for the next pass to draw."""
        return len(self.images.labels) // self.recipe.batch_size

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def run_epoch(self, on_step: Progressed | None = None) -> float:
        """Take the steps that the next epoch still has.

        Args:
            on_step: called after each step; what it raises leaves a state that can be resumed.

        Returns:
            The mean loss of the whole epoch. Waits for the device, as no step does.
        """
        self._learn_backbone(self.epoch >= self.recipe.warmup_epochs)
        self.network.train()
        self.loss.train()
        labels = torch.from_numpy(self.images.labels)
        batches = epoch_batches(self.images.labels, self.recipe, self.epoch)[self.step :]
        seeds = [self._seed(step) for step in range(self.step, self.steps_per_epoch)]
        before = time.perf_counter()
        for batch, images in zip(batches, self.images.training(batches, seeds), strict=True):
            self._take_step(images.to(self.device), labels[batch].to(self.device))
            self.step += 1
            before, last = time.perf_counter(), before
            self.seconds += before - last
            if on_step is not None:
                on_step(self)
        mean = self.loss_sum.item() / self.steps_per_epoch
        self.loss_sum.zero_()
        self.epoch, self.step = self.epoch + 1, 0
        return mean

    def _take_step(self, images: Tensor, labels: Tensor) -> None:
        value = self.loss(self.network(images), labels)
        self.optimizer.zero_grad()
        value.backward()
        proxies = proxies_of(self.loss)
        if self.recipe.clip is not None:
            for part in (self.network, self.loss):
                nn.utils.clip_grad_norm_(list(part.parameters()), self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.recipe.project_proxies and proxies is not None:
            with torch.no_grad():
                proxies.copy_(functional.normalize(proxies, dim=-1))
        self.loss_sum += value.detach()

    def _learn_backbone(self, learn: bool) -> None:
        """In the warm-up only new layers and proxies have gradients: the optimiser skips others."""
        for parameter in self.network.backbone_parameters():
            parameter.requires_grad_(learn)
            if not learn:
                parameter.grad = None

    def _seed(self, step: int) -> int:
        entropy = np.random.SeedSequence([self.recipe.seed, self.epoch, step])
        return int(entropy.generate_state(1)[0])

    def state(self) -> dict[str, Any]:
        """All that `resume` needs: tensors, numbers and strings."""
        return {
            "network": self.network.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "history": self.history,
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self._on_gpu else None,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, of a training with the same recipe and images."""
        self.network.load_state_dict(state["network"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum.copy_(state["loss_sum"])
        self.seconds = state["seconds"]
        self.history = state["history"]
        torch.set_rng_state(state["random"])
        if self._on_gpu and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self.device)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        cycle_momentum=False,
    )


def check_training(labels: Labels, recipe: Recipe) -> None:
    """Raise ValueError where images of these labels [n] cannot fill the recipe's batches."""
    classes = len(np.unique(labels))
    if classes < 2:
        raise ValueError(f"training needs at least 2 classes, got {classes}")
    largest = min(classes * recipe.images_per_class, len(labels))
    if recipe.batch_size > largest:
        raise ValueError(
            f"batch_size must be at most {largest} ({classes} classes of {recipe.images_per_class} "
            f"images, {len(labels)} images), got {recipe.batch_size}"
        )


def epoch_batches(labels: Labels, recipe: Recipe, epoch: int) -> list[Labels]:
    """The batches of one epoch, of each the indices of its images [B], fixed by seed and epoch."""
    common_functions.NUMPY_RANDOM = np.random.default_rng([recipe.seed, epoch])
    sampler = MPerClassSampler(labels, recipe.images_per_class, recipe.batch_size, len(labels))
    indices = np.fromiter(sampler, dtype=np.int64)
    return np.split(indices, len(indices) // recipe.batch_size)


def embed(network: nn.Module, images: Images, batch_size: int = 256) -> Tensor:
    """Embeddings [n, D] float32, on the network's device, in evaluation mode and not augmented."""
    return torch.cat(list(_embedded(network, images, batch_size)))


@torch.no_grad()
def _embedded(network: nn.Module, images: Images, batch_size: int) -> Iterator[Tensor]:
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    for batch in images.evaluation(batch_size):
        yield network(batch.to(device)).float()
    network.train(was_training)


@torch.no_grad()
def place_proxies(loss: nn.Module, network: nn.Module, images: Images, seed: int) -> None:
    """Put the proxies of a loss at embeddings of random images of their class, length 1."""
    proxies = proxies_of(loss)
    if proxies is None:
        return
    embeddings = functional.normalize(embed(network, images), dim=1)
    per_class = proxies.shape[1] if proxies.ndim == 3 else 1
    generator = np.random.default_rng(seed)
    for c in range(len(proxies)):
        members = np.flatnonzero(images.labels == c)
        if len(members):  # label noise can empty a class
            chosen = generator.choice(members, per_class, replace=len(members) < per_class)
            proxies[c] = embeddings[torch.from_numpy(chosen)].view_as(proxies[c])
