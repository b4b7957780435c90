import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.retrieval import networks
from bench.retrieval.networks import EmbeddingNetwork, Normalize, build, small_cnn


def plain_cnn(channels: int, embedding_size: int, width: int) -> nn.Sequential:
    """The network of the first published figures, written out."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(channels, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *block(4 * width, 8 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, embedding_size),
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_the_cnn_is_the_network_of_the_first_figures(channels: int) -> None:
    torch.manual_seed(3)
    network = build("cnn", 16, channels)
    torch.manual_seed(3)
    plain = plain_cnn(channels, 16, width=24)
    parameters = list(network.parameters())
    assert len(parameters) == len(list(plain.parameters()))
    assert all(map(torch.equal, parameters, plain.parameters()))
    images = torch.rand(4, channels, 16, 16)
    assert torch.equal(network(images), plain(images))
    assert torch.equal(network.eval()(images), plain.eval()(images))  # running statistics


def test_embeddings_keep_their_length() -> None:
    embeddings = small_cnn(8, width=4)(torch.rand(5, 1, 16, 16))
    assert embeddings.shape == (5, 8)
    assert not torch.allclose(embeddings.norm(dim=1), torch.ones(5))


def test_all_of_the_cnn_is_new() -> None:
    network = small_cnn(8, width=4)
    assert list(map(id, network.new_parameters())) == list(map(id, network.parameters()))
    assert network.backbone_parameters() == []


@pytest.fixture
def frozen() -> EmbeddingNetwork:
    backbone = small_cnn(8, channels=3, width=4).backbone
    network = EmbeddingNetwork(backbone, 32, 8, pretrained=True, freeze_batch_norm=True)
    for norm in norms(network):
        nn.init.normal_(norm.running_mean, std=0.1)  # of some pre-training
    return network


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def step(network: EmbeddingNetwork, parameters: list[nn.Parameter]) -> None:
    """One step of Adam with weight decay, which moves whatever has a gradient."""
    optimizer = torch.optim.Adam(parameters, 1e-2, weight_decay=1e-2)
    network.train()
    network(torch.rand(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()


def moved(network: nn.Module, before: nn.Module) -> set[str]:
    """Names of the parameters and buffers that differ."""
    old = before.state_dict()
    return {k for k, v in network.state_dict().items() if not torch.equal(v, old[k])}


def test_frozen_batch_norm_stays_as_it_is(frozen: EmbeddingNetwork) -> None:
    before = deepcopy(frozen)
    step(frozen, list(frozen.parameters()))
    changed = moved(frozen, before)
    assert changed == {
        "head.weight", "head.bias",
        "backbone.0.weight", "backbone.4.weight", "backbone.8.weight", "backbone.12.weight",
    }  # fmt: skip
    assert frozen.training
    assert len(norms(frozen)) == 4
    assert not any(norm.training for norm in norms(frozen))


def test_batch_norm_moves_where_it_is_not_frozen() -> None:
    network = small_cnn(8, channels=3, width=4)
    before = deepcopy(network)
    step(network, list(network.parameters()))
    assert moved(network, before) == set(network.state_dict())


def test_a_copy_of_a_frozen_network_is_frozen_itself(frozen: EmbeddingNetwork) -> None:
    copy = deepcopy(frozen).train()
    assert not any(norm.training for norm in norms(copy))
    assert {id(norm) for norm in norms(copy)} == {id(norm) for norm in copy._frozen}


def test_warm_up_trains_the_head_alone(frozen: EmbeddingNetwork) -> None:
    before = deepcopy(frozen)
    step(frozen, frozen.new_parameters())
    assert moved(frozen, before) == {"head.weight", "head.bias"}


def test_parameters_are_shared_out_once(frozen: EmbeddingNetwork) -> None:
    groups = [*frozen.backbone_parameters(), *frozen.new_parameters()]
    assert len({id(p) for p in groups}) == len(groups)
    trainable = {id(p) for p in frozen.parameters() if p.requires_grad}
    assert {id(p) for p in groups} == trainable
    for parameter in frozen.backbone_parameters():
        parameter.requires_grad_(False)  # as a trainer may do in warm-up epochs
    assert len(frozen.backbone_parameters()) == 4


def test_images_are_normalized_channel_by_channel() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    normalize = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        wanted = (pixels[:, channel] - mean) / std
        assert torch.allclose(normalize(pixels)[:, channel], wanted, atol=1e-6)
    grey = normalize(pixels[:, :1])
    assert torch.equal(grey, normalize(pixels[:, :1].expand(2, 3, 4, 4)))
    assert list(normalize.state_dict()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg"}, "network must be one of cnn, resnet50, .*, got 'vgg'"),
        ({"embedding_size": 0}, "embedding_size must be at least 1, got 0"),
        ({"channels": 4}, "1 or 3 channels, got 4"),
        (
            {"weights": Path("a.pt")},
            "trained from scratch and takes no weights, got a.pt",
        ),
        ({"freeze_batch_norm": True}, "there is none: got network 'cnn' with no weights"),
        (
            {"name": "resnet50", "weights": "random", "freeze_batch_norm": True},
            "there is none: got network 'resnet50' with random weights",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{"name": "cnn", "embedding_size": 8, "channels": 3} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", networks.PRETRAINED)
def test_a_network_whose_library_is_not_there_says_how_to_get_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"'{name}' needs timm.*pip install -e '\.\[vision\]'"):
        build(name, 8, 3, weights="random")


def test_a_library_that_does_not_import_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ValueError, match=r"operator does not exist.*belong to torch \d"):
        build("resnet50", 8, 3, weights="random")


BACKBONE = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def state(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The state of `BACKBONE` with a classifier, some of it replaced or, if None, taken out."""
    whole = BACKBONE.state_dict() | {"head.weight": torch.ones(9, 3)}
    whole |= {k.replace("_0_", "0.").replace("_1_", "1."): v for k, v in changed.items()}
    return {k: v for k, v in whole.items() if v is not None}


def test_a_backbone_takes_what_fits_and_leaves_the_classifier() -> None:
    backbone = deepcopy(BACKBONE)
    given = state(_0_weight=torch.full((3, 2), 7.0), _1_num_batches_tracked=None)
    networks.load_backbone(backbone, given, "head", source="a file")
    assert torch.equal(backbone[0].weight, torch.full((3, 2), 7.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (state(_0_weight=None, _1_bias=None), "a file does not fit .*: it lacks 0.weight, 1.bias$"),
        (state(fc=torch.ones(1)), "it has unknown fc$"),
        (state(_0_bias=torch.ones(5)), r"it has 0.bias \(5,\) instead of \(3,\)$"),
        ({}, "it lacks 0.weight, 0.bias, 1.weight and 3 more$"),
    ],
)
def test_a_backbone_refuses_what_does_not_fit(given: dict[str, torch.Tensor], message: str) -> None:
    backbone = deepcopy(BACKBONE)
    with pytest.raises(ValueError, match=message):
        networks.load_backbone(backbone, given, "head", source="a file")
    assert not moved(backbone, BACKBONE)


class Evil:
    """What weights must not hold: code that runs when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"0.weight": torch.ones(1)}, "epoch": 3},
            "nothing but tensors, got model, epoch",
        ),
        (torch.ones(3), "must hold a state dict, got Tensor"),
        (Evil(), "is no file of weights"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth .*{message}"):
        networks.read_state(tmp_path / "weights.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"not found", b"\x80\x02"])
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth is no file of weights"):
        networks.read_state(tmp_path / "weights.pth")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(BACKBONE.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"weights\.pth is no file of weights"):
        networks.read_state(path)


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="weights.pth"):
        networks.read_state(tmp_path / "weights.pth")
