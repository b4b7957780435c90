"""Devices by name, as the command line has them."""

from __future__ import annotations

import torch

from bench.settings import DEVICES


def resolve_device(name: str) -> torch.device:
    """The device of one of `DEVICES`; "auto" is a GPU if there is one. ValueError otherwise."""
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch finds no GPU; try 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
