"""Temporary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn


class EmbeddingNetwork(nn.Sequential):
    def __init__(self, embedding_size: int, channels: int = 1, width: int = 24) -> None:
        layers: list[nn.Module] = []
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

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


def build(
    name: str,
    embedding_size: int,
    channels: int,
    *,
    weights: Path | None = None,
    freeze_batch_norm: bool = False,
) -> EmbeddingNetwork:
    return EmbeddingNetwork(embedding_size, channels)
