"""The loss in a loop of Accelerate."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pfml_triton import PFMLLoss
from tests.trainers.training import EPOCHS, LR, ROWS, Run, kept, main, ranks, samples


def train(network: nn.Module, loss: PFMLLoss, folder: Path, is_resumed: bool) -> Run:
    accelerator = Accelerator(cpu=True)
    groups = [{"params": network.parameters(), "lr": LR}, *loss.param_groups(lr=LR)]
    model, loss_fn, optimizer, loader = accelerator.prepare(
        network,
        loss,
        torch.optim.AdamW(groups),
        DataLoader(TensorDataset(*samples()), ROWS // ranks()),
    )
    if is_resumed:
        accelerator.load_state(folder / "0")
    for epoch in range(is_resumed, EPOCHS):
        for images, labels in loader:
            value = loss_fn(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
        if not is_resumed:
            accelerator.save_state(folder / f"{epoch}")
    unwrapped = [accelerator.unwrap_model(module) for module in (model, loss_fn)]
    return kept(*unwrapped, optimizer)


if __name__ == "__main__":
    main(train)
