"""The networks by name: a backbone, pre-trained or not, and one new linear head.

Embeddings come out as the head leaves them: losses and evaluation scale them to unit length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

RANDOM = "random"  # as `weights`: train from scratch what has a pre-training


class Pretrained(NamedTuple):
    """A backbone of timm, and which of the weights that exist for it.

    Attributes:
        tag: timm's name of both.
        options: for its constructor.
    """

    tag: str
    options: dict[str, Any]


# The paper names the networks, not their weights. For ResNet-50 they are torchvision's first, not
# the later ones of longer training; for ViT-S/16 those of ImageNet-21k without fine-tuning, which
# timm once called vit_small_patch16_224_in21k. ViTs take images of any multiple of 16 pixels.
PRETRAINED = {
    "resnet50": Pretrained("resnet50.tv_in1k", {"global_pool": "avg"}),
    "dino-vits16": Pretrained(
        "vit_small_patch16_224.dino", {"global_pool": "token", "dynamic_img_size": True}
    ),
    "vits16": Pretrained(
        "vit_small_patch16_224.augreg_in21k", {"global_pool": "token", "dynamic_img_size": True}
    ),
}
NETWORKS = ("cnn", *PRETRAINED)


class EmbeddingNetwork(nn.Module):
    """A backbone and one new linear head.

    Args:
        backbone: maps what `inputs` returns to features [B, F].
        features: F.
        embedding_size: D.
        inputs: applied first, to images [B, channels, H, W]; without parameters.
        pretrained: whether the backbone is, so that only the head is new.
        freeze_batch_norm: keep the running statistics and the affine parameters of the backbone's
            BatchNorm as they are, in training mode too. A backbone without BatchNorm has none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        embedding_size: int,
        *,
        inputs: nn.Module | None = None,
        pretrained: bool = False,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = inputs or nn.Identity()
        self.backbone = backbone
        self.head = nn.Linear(features, embedding_size)
        self.pretrained = pretrained
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        self._frozen = norms if freeze_batch_norm else []
        for norm in self._frozen:
            norm.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, D], of any length, of images [B, channels, H, W]."""
        embeddings: Tensor = self.head(self.backbone(self.inputs(images)))
        return embeddings

    def train(self, mode: bool = True) -> Self:
        """As in any module, but frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def new_parameters(self) -> list[nn.Parameter]:
        """Those that no pre-training has seen, the only ones to train in warm-up epochs."""
        return list((self.head if self.pretrained else self).parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The pre-trained ones that may be trained: all but frozen BatchNorm's."""
        if not self.pretrained:
            return []
        frozen = {id(p) for norm in self._frozen for p in norm.parameters()}
        return [p for p in self.backbone.parameters() if id(p) not in frozen]


class Normalize(nn.Module):
    """Takes a mean off images and divides by a deviation: [B, 1 or 3, H, W] to [B, 3, H, W].

    Args:
        mean, std: of the images that a backbone was trained on, in [0, 1]: red, green, blue.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = torch.tensor([list(mean), list(std)]).view(2, 3, 1, 1)
        # Not folded into the first convolution: weight decay would then pull at other weights than
        # those that were pre-trained. Not saved either: they belong to the network's name.
        self.register_buffer("scale", 1 / stds, persistent=False)
        self.register_buffer("shift", -means / stds, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images, self.scale)


def small_cnn(embedding_size: int, channels: int = 1, width: int = 24) -> EmbeddingNetwork:
    """Four convolution blocks, average pool and head, all of them new.

    Args:
        embedding_size: D.
        channels: of the images, 1 or 3.
        width: channels of the first block; each further block has twice as many.
    """
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
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return EmbeddingNetwork(nn.Sequential(*layers), channels, embedding_size)


def build(
    name: str,
    embedding_size: int,
    channels: int,
    *,
    weights: str | Path | None = None,
    freeze_batch_norm: bool = False,
) -> EmbeddingNetwork:
    """A network of images in [0, 1] by name, on the CPU, in training mode.

    Args:
        name: one of `NETWORKS`.
        embedding_size: D; the paper has 512 for ResNet-50 and 384 for the ViTs.
        channels: of the images, 1 or 3. One is repeated for a backbone of `PRETRAINED`.
        weights: of a backbone of `PRETRAINED`: a file with a state dict, written by torch.save or,
            if its name ends with .safetensors, by safetensors; a classifier in it is left out.
            None takes them from timm's cache, or its hub. `RANDOM` trains from scratch, as the
            "cnn" always does.
        freeze_batch_norm: see `EmbeddingNetwork`; for pre-trained weights only.

    Raises:
        ValueError: an argument out of range, timm is not there, weights that cannot be had or read,
            or that are another network's.
        OSError: the file cannot be opened.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    if embedding_size < 1:
        raise ValueError(f"embedding_size must be at least 1, got {embedding_size}")
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {channels}")
    if freeze_batch_norm and (name == "cnn" or weights == RANDOM):
        raise ValueError(
            "freeze_batch_norm keeps what pre-training found, and there is none: "
            f"got network {name!r} with {weights or 'no'} weights; set it to False"
        )
    if name == "cnn":
        if weights not in (None, RANDOM):
            raise ValueError(f"the cnn is trained from scratch and takes no weights, got {weights}")
        return small_cnn(embedding_size, channels)

    timm = _import_timm(name)
    tag, options = PRETRAINED[name]
    backbone = timm.create_model(tag, pretrained=False, num_classes=0, **options)
    trained_on = backbone.pretrained_cfg
    if weights != RANDOM:
        state = _from_cache(timm, tag, trained_on) if weights is None else read_state(Path(weights))
        load_backbone(backbone, state, trained_on["classifier"], source=weights or tag)
    return EmbeddingNetwork(
        backbone,
        backbone.num_features,
        embedding_size,
        inputs=Normalize(trained_on["mean"], trained_on["std"]),
        pretrained=weights != RANDOM,
        freeze_batch_norm=freeze_batch_norm,
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of torch.save, on the CPU; no code in it is run.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be opened.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no such file fails in many ways
        raise ValueError(f"{path} is no file of weights: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(
            f"{path} must hold a state dict, which has nothing but tensors, got {_some(other)} too"
        )
    return dict(state)


def load_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], classifier: str, source: str | Path
) -> None:
    """Load a backbone that has no classifier, leaving out that of the state dict.

    Args:
        backbone: gets the weights.
        state: of every parameter and buffer of `backbone`; nothing else but the classifier's.
        classifier: the first part of the classifier's keys.
        source: where the state comes from, for the error.

    Raises:
        ValueError: something is missing, unknown or of another shape; the backbone is as it was.
    """
    state = {k: v for k, v in state.items() if not k.startswith(f"{classifier}.")}
    own = backbone.state_dict()
    # BatchNorm has counted its batches only since PyTorch 0.4.1, and older files are still used.
    missing = [k for k in own if k not in state and not k.endswith(".num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    reshaped = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    found = {"it lacks": missing, "it has unknown": unknown, "it has": reshaped}
    problems = [f"{what} {_some(keys)}" for what, keys in found.items() if keys]
    if problems:
        kind = type(backbone).__name__
        raise ValueError(f"{source} does not fit this {kind}: {'; '.join(problems)}")
    backbone.load_state_dict(state)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"network {name!r} needs {error.name}, which is not installed: "
            "pip install -e '.[vision]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"network {name!r} needs timm, which cannot be imported: {error}. torchvision has to "
            f"belong to torch {torch.__version__}: its release, and like it for the CPU or for CUDA"
        ) from error
    return timm


def _from_cache(timm: Any, tag: str, trained_on: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published weights of a backbone, from timm's cache, or its hub if there is a network."""
    hub = trained_on["hf_hub_id"]
    try:
        state: dict[str, Tensor] = timm.models.load_state_dict_from_hf(hub)
    except Exception as error:  # the hub's client has errors of many kinds
        raise ValueError(
            f"the weights {tag} are not in timm's cache and cannot be downloaded "
            f"({type(error).__name__}). Get model.safetensors of {hub} from the Hugging Face hub "
            "where there is a network, and name the file: --weights FILE"
        ) from error
    return state
