"""The loss in a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pfml_triton import PFMLLoss
from tests.trainers.training import (
    EPOCHS,
    LR,
    ROWS,
    Run,
    is_launched,
    kept,
    main,
    rank,
    ranks,
    samples,
)


class Retrieval(lightning.LightningModule):
    def __init__(self, model: nn.Module, loss_fn: PFMLLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = self.loss_fn(self.model(images), labels)
        self.log_dict(self.loss_fn.last_stats)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        network = {"params": self.model.parameters(), "lr": LR}
        return torch.optim.AdamW([network, *self.loss_fn.param_groups(lr=LR)])


def train(network: nn.Module, loss: PFMLLoss, folder: Path, is_resumed: bool) -> Run:
    module = Retrieval(network, loss)
    quiet: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks(),
        strategy="ddp" if is_launched() else "auto",
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        default_root_dir=folder,
        **quiet,
    )
    data = TensorDataset(*samples())
    # On many processes Lightning shuffles; with this, on one as well, and alike.
    sampler = DistributedSampler(data, ranks(), rank())
    loader = DataLoader(data, ROWS // ranks(), sampler=sampler)
    trainer.fit(module, loader, ckpt_path=folder / "epoch=0.ckpt" if is_resumed else None)
    return kept(module.model, module.loss_fn, trainer.optimizers[0])


if __name__ == "__main__":
    main(train)
