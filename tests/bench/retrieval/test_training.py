import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.glyphs import load_glyphs
from bench.images import ImageSet
from rich.console import Console
from torch import Tensor

from bench import retrieval
from bench.settings import RetrievalSettings
from pfml_triton import PFMLLoss


def naive_recall(embeddings: Tensor, labels: Tensor, k: int) -> float:
    hits = 0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        cosine = [
            float(torch.cosine_similarity(embeddings[i], embeddings[j], dim=0)) for j in others
        ]
        nearest = sorted(range(len(others)), key=lambda position: -cosine[position])[:k]
        hits += any(labels[others[position]] == labels[i] for position in nearest)
    return hits / len(labels)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_recall_agrees_with_nested_loops(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (45,), generator=generator)
    labels = torch.cat([labels, torch.arange(6), torch.arange(6)])
    embeddings = torch.randn(57, 5, generator=generator) * torch.rand(57, 1, generator=generator)
    got = retrieval.recall_at_k(embeddings, labels, (1, 3, 56), chunk_size=chunk_size)
    want = {k: naive_recall(embeddings, labels, k) for k in (1, 3, 56)}
    assert got == pytest.approx(want)
    assert 0 < got[1] < got[3] < got[56] == 1


def test_a_query_does_not_find_itself() -> None:
    embeddings = torch.eye(4) + 0.1 * torch.ones(4, 4)
    embeddings[:2, 2] += 0.2  # a point of each class leans towards one of the other class
    labels = torch.tensor([0, 1, 0, 1])
    assert retrieval.recall_at_k(embeddings, labels, (1,))[1] < 1


def test_cosine_ignores_length() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [100.0, 1.0], [0.0, 1.0], [0.01, 1.0]])
    assert retrieval.recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), (1,)) == {1: 1.0}


@pytest.mark.parametrize(
    ("labels", "ks", "message"),
    [
        ([0, 0, 1, 1], (4,), r"every K must be in \[1, 3\].*got \(4,\)"),
        ([0, 0, 1, 1], (0, 1), r"every K must be in \[1, 3\].*got \(0, 1\)"),
        ([0, 0, 1, 1], (), "every K"),
        ([0, 0, 1, 2], (1,), "at least 2 images to be evaluated, class 1 has 1"),
        ([0, 0, 0, 0], (1,), "at least 2 classes, got 1"),
        ([0, 0, 1], (1,), r"got \(4, 2\) and \(3,\)"),
    ],
)
def test_recall_refuses(labels: list[int], ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval.recall_at_k(torch.ones(4, 2), torch.tensor(labels), ks)


def test_recall_refuses_embeddings_of_a_diverged_network() -> None:
    embeddings = torch.tensor([[1.0], [math.nan], [1.0], [1.0]])
    with pytest.raises(ValueError, match="finite"):
        retrieval.recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), (1,))


@pytest.fixture(scope="module")
def small() -> ImageSet:
    data = load_glyphs()
    first = data.names.index(next(name for name in data.names if name.startswith("A")))
    keep = (data.labels >= first) & (data.labels < first + 16)
    return ImageSet(data.images[keep], data.labels[keep] - first, data.names[first : first + 16])


def train_small(
    data: ImageSet, epochs: int = 10, seed: int = 0
) -> tuple[list[float], float, float]:
    """Loss of each epoch, and R@1 before and after."""
    torch.manual_seed(seed)
    network = retrieval.EmbeddingNetwork(32, width=8)
    loss = PFMLLoss(16, 32, 2)
    optimizer = torch.optim.Adam(
        [{"params": network.parameters(), "lr": 3e-3}, *loss.param_groups(3e-3, 10.0)]
    )
    images = retrieval.evaluation_images(data, seed=0)
    labels = torch.from_numpy(data.labels)
    before = retrieval.evaluate(network, images, labels)[1]
    losses = retrieval.train(
        network, loss, optimizer, data,
        epochs=epochs, batch_size=32, images_per_class=4, seed=seed,
    )  # fmt: skip
    return losses, before, retrieval.evaluate(network, images, labels)[1]


def test_training_lowers_the_loss_and_raises_recall(small: ImageSet) -> None:
    losses, before, after = train_small(small)
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert after > before + 0.2


def test_training_is_fixed_by_its_seed(small: ImageSet) -> None:
    first = train_small(small, epochs=1, seed=5)
    assert train_small(small, epochs=1, seed=5) == first
    assert train_small(small, epochs=1, seed=6) != first


def test_any_loss_of_embeddings_and_labels_can_be_trained(small: ImageSet) -> None:
    network = retrieval.EmbeddingNetwork(16, width=4)
    steps: list[int] = []
    losses = retrieval.train(
        network, torch.nn.CrossEntropyLoss(), torch.optim.Adam(network.parameters(), 3e-3), small,
        epochs=2, batch_size=32, images_per_class=4, seed=0,
        on_step=lambda done, loss: steps.append(done),
    )  # fmt: skip
    assert losses[1] < losses[0]
    assert steps == list(range(1, 2 * retrieval.steps_per_epoch(len(small.labels), 32) + 1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 30}, "multiple of images_per_class, got 30 and 4"),
        ({"images_per_class": 0}, "multiple of images_per_class, got 32 and 0"),
        ({"batch_size": 128}, "batch_size must be at most 64 .16 classes"),
    ],
)
def test_training_refuses(small: ImageSet, changed: dict[str, int], message: str) -> None:
    arguments = {"epochs": 1, "batch_size": 32, "images_per_class": 4} | changed
    with pytest.raises(ValueError, match=message):
        retrieval.check_training(small, **arguments)


def test_training_refuses_one_class(small: ImageSet) -> None:
    one = ImageSet(small.images[:15], np.zeros(15, dtype=np.int64), ["A"])
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        retrieval.check_training(one, 1, 4, 4)


def test_embedding_leaves_the_network_in_its_mode() -> None:
    network = retrieval.EmbeddingNetwork(8, width=4)
    images = torch.rand(5, 1, 32, 32)
    assert torch.allclose(
        retrieval.embed(network, images, batch_size=2), network.eval()(images), atol=1e-6
    )
    network.train()
    retrieval.embed(network, images)
    assert network.training


def test_device_names() -> None:
    assert retrieval.resolve_device("cpu") == torch.device("cpu")
    assert retrieval.resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="one of auto, cpu, cuda, got 'tpu'"):
        retrieval.resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ValueError, match="finds no GPU"):
        retrieval.resolve_device("cuda")


@pytest.fixture
def few_glyphs(monkeypatch: pytest.MonkeyPatch, small: ImageSet) -> None:
    monkeypatch.setattr(retrieval, "load_glyphs", lambda: small)


def test_the_sketch_that_follows_embeddings_prunes_more() -> None:
    """Embeddings in few directions, half a unit apart: 60 random directions cannot tell them."""
    embeddings = 0.125 * torch.randn(300, 8) @ torch.randn(8, 512) + torch.randn(512)
    labels = torch.arange(300)
    loss = PFMLLoss(300, 512, 2)
    loss(embeddings, labels)
    shares = retrieval.active_shares(loss, embeddings, labels, samples=100)
    assert list(shares) == ["batch", "batch_random", "all", "all_random"]
    assert 0 < shares["batch"] < 0.7 * shares["batch_random"]
    assert shares["all"] <= shares["all_random"] == 1


@pytest.mark.usefixtures("few_glyphs")
def test_run_appends_a_row_and_draws_the_fields(tmp_path: Path) -> None:
    settings = RetrievalSettings(epochs=1, batch_size=16, embedding_size=8, device="cpu")
    for _ in range(2):
        recalls = retrieval.run(settings, tmp_path / "out", Console(quiet=True))
    rows = [json.loads(x) for x in (tmp_path / "out/retrieval.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[-1].items() >= recalls.items()
    assert rows[-1]["trained_r8"] >= rows[-1]["trained_r1"]
    assert rows[0]["trained_r1"] == rows[1]["trained_r1"]  # the same seed
    assert 0 < rows[0]["active_share_batch"] <= 1
    assert (rows[0]["epochs"], rows[0]["seed"], rows[0]["train_classes"]) == (1, 0, 8)
    for picture in ("class_fields.png", "embedding_fields.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("few_glyphs")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"batch_size": 10_000}, "batch_size must be at most 32"),
        ({"delta": -1.0}, "delta"),
        ({"embedding_size": 2}, "embedding_size must be at least 3"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
    ],
)
def test_run_refuses_before_it_writes(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    settings = RetrievalSettings(**{"batch_size": 16} | changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        retrieval.run(settings, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()
