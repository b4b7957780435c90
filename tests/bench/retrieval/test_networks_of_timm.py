"""The networks that need the vision extra, on images of 32 pixels and random weights."""

import shutil
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench.recipes import preset
from bench.retrieval import networks
from bench.retrieval.datasets import load
from bench.retrieval.networks import EmbeddingNetwork, build
from bench.retrieval.protocol import compare
from pfml_triton import PFMLLoss
from tests.photographs import COUNTS, write_cub

pytestmark = [
    pytest.mark.vision,
    pytest.mark.skipif(find_spec("timm") is None, reason="needs timm: pip install -e '.[vision]'"),
]
FEATURES = {"resnet50": 2048, "dino-vits16": 384, "vits16": 384}


def random_network(
    name: str, seed: int = 0, channels: int = 3, **options: bool
) -> EmbeddingNetwork:
    torch.manual_seed(seed)
    return build(name, 16, channels, weights="random", **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a ResNet-50, with its classifier, and of a ViT-S/16, without and with one."""
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    resnet = resnet50()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1)
    vit = random_network("vits16", seed=1).backbone.state_dict()
    torch.save(resnet.state_dict(), folder / "resnet50.pth")
    torch.save(vit, folder / "vits16.pth")
    save_file(vit | {"head.weight": torch.ones(9, 384)}, folder / "vits16.safetensors")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_shapes(name: str) -> None:
    network = random_network(name)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    assert network(torch.rand(1, 3, 48, 32)).shape == (1, 16)
    assert network.head.in_features == FEATURES[name]


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_grey_images(name: str) -> None:
    grey = torch.rand(2, 1, 32, 32)
    of_one = random_network(name, channels=1).eval()
    of_three = random_network(name).eval()
    assert torch.equal(of_one(grey), of_three(grey.expand(2, 3, 32, 32)))


def test_resnet_averages_over_the_last_map_as_torchvision_does(files: dict[str, Path]) -> None:
    from torchvision.models import resnet50

    network = build("resnet50", 16, 3, weights=files["resnet50.pth"]).eval()
    theirs = resnet50().eval()
    theirs.load_state_dict(torch.load(files["resnet50.pth"]))
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    expected = theirs(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(network.backbone(images), expected, rtol=1e-4, atol=1e-5)
    normal = network.inputs(images)
    assert torch.equal(network(images), network.head(network.backbone(normal)))


def test_vits_take_the_class_token() -> None:
    network = random_network("vits16").eval()
    images = torch.rand(2, 3, 32, 32)
    tokens = network.backbone.forward_features(images)
    assert tokens.shape == (2, 1 + 2 * 2, 384)
    assert torch.equal(network.backbone(images), tokens[:, 0])


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_a_backbone_gets_pixels_as_its_library_would_prepare_them(name: str) -> None:
    import timm

    network = random_network(name).eval()
    pixels = torch.rand(2, 3, 32, 32)
    wanted = timm.data.resolve_model_data_config(network.backbone)
    torch.testing.assert_close(
        network(pixels),
        network.head(network.backbone(scaled(pixels, wanted["mean"], wanted["std"]))),
        rtol=1e-4,
        atol=1e-5,
    )
    assert wanted["mean"] == ((0.5,) * 3 if name == "vits16" else (0.485, 0.456, 0.406))


def scaled(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def step(network: EmbeddingNetwork, parameters: list[nn.Parameter], steps: int = 1) -> set[str]:
    """Train with the loss, and return the parts of the network whose state has changed."""
    before = deepcopy(network.state_dict())
    loss = PFMLLoss(2, 16, 2)
    optimizer = torch.optim.Adam(parameters, 1e-3, weight_decay=1e-3)
    labels = torch.tensor([0, 0, 1, 1])
    network.train()
    for _ in range(steps):
        value = loss(network(torch.rand(4, 3, 32, 32)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_a_training_step_moves_head_and_backbone(name: str) -> None:
    network = random_network(name)
    changed = step(network, network.new_parameters())  # from scratch all is new
    assert changed > {"head.weight", "head.bias"}
    first = "conv1.weight" if name == "resnet50" else "patch_embed.proj.weight"
    assert f"backbone.{first}" in changed


def test_frozen_batch_norm_stays_as_pre_training_left_it(files: dict[str, Path]) -> None:
    network = build("resnet50", 16, 3, weights=files["resnet50.pth"], freeze_batch_norm=True)
    changed = step(network, list(network.parameters()), steps=2)
    norms = {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in module.state_dict()
    }
    assert len(norms) == 53 * 5
    assert not changed & norms
    assert changed | norms == set(network.state_dict())


def test_warm_up_trains_the_head_alone(files: dict[str, Path]) -> None:
    network = build("vits16", 16, 3, weights=files["vits16.pth"])
    assert step(network, network.new_parameters()) == {"head.weight", "head.bias"}
    both = [*network.backbone_parameters(), *network.new_parameters()]
    assert list(map(id, both)) == list(map(id, network.parameters()))


@pytest.mark.parametrize("name", ["dino-vits16", "vits16"])
@pytest.mark.parametrize("file", ["vits16.pth", "vits16.safetensors"])
def test_weights_from_a_file(name: str, file: str, files: dict[str, Path]) -> None:
    images = torch.rand(2, 3, 32, 32)
    backbone = random_network("vits16", seed=1).backbone.eval()
    network = build(name, 16, 3, weights=str(files[file])).eval()
    assert torch.equal(network.backbone(images), backbone(images))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        (
            "resnet50",
            "vits16.pth",
            "does not fit this ResNet: it lacks conv1.weight, .* unknown ",
        ),
        ("vits16", "resnet50.pth", "does not fit this VisionTransformer: it lacks cls_token, "),
        ("vits16", "damaged.safetensors", "is no file of weights"),
    ],
)
def test_a_wrong_file_is_refused(
    name: str, file: str, message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(files["vits16.safetensors"].read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} {message}"):
        build(name, 16, 3, weights=files.get(file, damaged))


def test_weights_for_larger_images_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["vits16.pth"])
    state["pos_embed"] = torch.zeros(1, 577, 384)
    torch.save(state, tmp_path / "vits16_384.pth")
    with pytest.raises(ValueError, match=r"pos_embed \(1, 577, 384\) instead of \(1, 197, 384\)"):
        build("vits16", 16, 3, weights=tmp_path / "vits16_384.pth")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of timm's weights, empty, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("resnet50", "resnet50.tv_in1k"),
        ("dino-vits16", "vit_small_patch16_224.dino"),
        ("vits16", "vit_small_patch16_224.augreg_in21k"),
    ],
)
def test_without_network_and_cache_the_error_says_what_to_get(name: str, tag: str) -> None:
    with pytest.raises(ValueError, match=rf"model.safetensors of timm/{tag} .*--weights FILE"):
        build(name, 16, 3)


def test_weights_from_the_cache(cache: Path, files: dict[str, Path]) -> None:
    folder = cache / "models--timm--vit_small_patch16_224.dino"
    for part in ("refs", "snapshots/0123"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("0123")
    shutil.copy(files["vits16.safetensors"], folder / "snapshots/0123/model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    network = build("dino-vits16", 16, 3).eval()
    assert network.pretrained
    expected = random_network("vits16", seed=1).backbone.eval()(images)
    assert torch.equal(network.backbone(images), expected)


@pytest.mark.parametrize("name", ["cub-resnet50", "cub-vits16"])
def test_a_published_preset_trains_on_photographs(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """The recipe of the paper, on a data set in CUB's layout that was made up."""
    write_cub(tmp_path)
    data = load("cub", tmp_path, workers=1, counts=COUNTS, console=Console(quiet=True))
    small = {"size": 32, "resized": 36}
    data = data._replace(train=replace(data.train, **small), test=replace(data.test, **small))
    network = preset(name).network
    changes = {
        "epochs": 2, "batch_size": 4, "images_per_class": 2, "embedding_size": 16,
        "recall_at": (1, 2), "weights": str(files[f"{network}.pth"]),
    }  # fmt: skip
    (row,) = compare(
        data, ["pfml"], tmp_path / "out", base=name, changes=changes, device="cpu",
        console=Console(quiet=True),
    )  # fmt: skip
    assert (row["epochs"], row["warmup_epochs"], row["final_epoch"]) == (2, 1, 2)
    state = torch.load(tmp_path / "out" / row["run"] / "checkpoint.pt", weights_only=True)["state"]
    before = torch.load(files[f"{network}.pth"], weights_only=True)
    kept = [key for key in before if f"backbone.{key}" in state["network"]]
    moved = [k for k in kept if not torch.equal(before[k], state["network"][f"backbone.{k}"])]
    assert len(kept) > 100
    assert len(moved) > 40  # after the warm-up the backbone learns
    assert not [k for k in moved if network == "resnet50" and ("bn" in k or "running" in k)]
