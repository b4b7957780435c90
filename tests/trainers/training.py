"""What all trainers train here, and what is kept of it; test_trainers.py starts their programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfml_triton import PFMLLoss
from pfml_triton.distributed import ShardedPFMLLoss

CLASSES, PROXIES, INPUTS = 5, 2, 6
DEPTH = 70  # deeper than the sketch, whose directions turn then
ROWS, STEPS, EPOCHS = 12, 4, 2  # of a batch on all processes together; of an epoch
LR = 1e-3  # of the network
SETTINGS: dict[str, Any] = {"delta": 0.6, "delta_rep": 1.2, "min_distance": 0.1}
LOSSES = {"own field": PFMLLoss, "one field": ShardedPFMLLoss}

Run = dict[str, Any]  # what is left at its end, see `kept`
# Trains for all epochs and saves a checkpoint after each, or goes on from the first of them.
Train = Callable[[nn.Module, PFMLLoss, Path, bool], Run]


def samples() -> tuple[Tensor, Tensor]:
    """Images [N, INPUTS] and labels [N]."""
    generator = torch.Generator().manual_seed(5)
    rows = ROWS * STEPS
    images = torch.randn(rows, INPUTS, generator=generator)
    return images, torch.randint(CLASSES, (rows,), generator=generator)


def rank() -> int:
    """Of torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """By torchrun, so that there is a process group."""
    return "RANK" in os.environ


def ranks() -> int:
    """Of torchrun, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def kept(network: nn.Module, loss: PFMLLoss, optimizer: torch.optim.Optimizer) -> Run:
    """What has to be the same on all ranks, or in a run that was resumed."""
    groups = optimizer.param_groups
    return {
        "network": network.state_dict(),
        "proxies": loss.proxies.detach(),
        "optimizer": optimizer.state_dict()["state"],
        "calls": loss.training_calls,
        "sketch": loss.sketch_basis,
        "statistics": loss.last_stats,
        # A schedule keeps those that it starts from.
        "learning rates": [group.get("initial_lr", group["lr"]) for group in groups],
    }


def main(train: Train) -> None:
    """Every run of this number of processes, into the folder that is named."""
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), ranks() if is_launched() else 0
    runs: dict[str, Run] = {}
    for name, kind in LOSSES.items():
        if not is_launched() and kind is ShardedPFMLLoss:
            continue  # there is no process group
        for is_resumed in (False, True):
            torch.manual_seed(100 * is_resumed + rank())  # ranks and runs begin differently
            network = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, DEPTH))
            loss = kind(CLASSES, DEPTH, PROXIES, **SETTINGS)
            start = loss.proxies.detach().clone()
            run = train(network, loss, folder / f"{name} of {world}", is_resumed)
            runs[f"{name}, resumed" if is_resumed else name] = run | {"start": start}
    torch.save(runs, folder / f"rank {rank()} of {world}")
