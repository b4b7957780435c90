"""The loss in the model that the Hugging Face Trainer trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from pfml_triton import PFMLLoss
from tests.trainers.training import EPOCHS, LR, ROWS, STEPS, Run, kept, main, ranks, samples


class Retrieval(nn.Module):
    def __init__(self, model: nn.Module, loss_fn: PFMLLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = self.model(images)
        return {"loss": self.loss_fn(embeddings, labels), "embeddings": embeddings}


def train(network: nn.Module, loss: PFMLLoss, folder: Path, is_resumed: bool) -> Run:
    groups = [{"params": network.parameters(), "lr": LR}, *loss.param_groups(lr=LR)]
    trainer = Trainer(
        Retrieval(network, loss),
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=ROWS // ranks(),
            num_train_epochs=EPOCHS,
            save_strategy="epoch",
            ddp_find_unused_parameters=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"images": i, "labels": c} for i, c in zip(*samples(), strict=True)],
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS}" if is_resumed else None)
    return kept(trainer.model.model, trainer.model.loss_fn, trainer.optimizer)


if __name__ == "__main__":
    main(train)
