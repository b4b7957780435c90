import shutil
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import providers, settings
from bench.clouds import make_cloud
from bench.costs import Workload
from bench.parity import errors, truth
from bench.providers import GIB, PROVIDERS, obstacle, tiles_of
from bench.settings import Size
from pfml_triton import operators
from pfml_triton.kernels.config import Tiles, tiles_for
from pfml_triton.sketch import turned_basis

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL, LARGE = settings.SIZES["cub"], settings.SIZES["faces-100k"]
SIZES = {
    "apart": Size(20, 30, 4, depth=64),
    "one-class": Size(20, 1, 180, depth=64, kind="one-class"),
    "collapsed": Size(20, 45, 4, depth=64, kind="collapsed"),
    "no proxies": Size(120, 30, 0, depth=64),
}
PEERS = ("proxy-anchor", "multi-similarity", "triplet", "contrastive")


def errors_of(provider: str, size: Size, dtype: torch.dtype) -> tuple[float, float | None]:
    cloud = make_cloud(size, seed=0)
    work = Workload(PROVIDERS[provider].build, cloud, dtype)
    value, _ = work.call("forward+backward")
    expected = truth(cloud, dtype, providers.POTENTIAL)
    assert float(work.call("forward")[0]) == pytest.approx(float(value), rel=1e-6)
    work.call("forward+backward")
    return errors(expected, float(value), *work.gradients())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("provider", ["pfml", "pfml-dense", "pfml-torch", "eager"])
def test_a_provider_is_the_loss(provider: str, name: str) -> None:
    gradient, energy = errors_of(provider, SIZES[name], torch.float32)
    tolerance = PROVIDERS[provider].tolerance
    assert gradient < tolerance
    assert energy < tolerance


@pytest.mark.parametrize("provider", ["pfml-triton", "pfml-triton-dense"])
def test_the_kernels_are_the_loss_under_the_interpreter(provider: str) -> None:
    gradient, energy = errors_of(provider, Size(6, 10, 2, depth=16), torch.float32)
    assert max(gradient, energy) < PROVIDERS[provider].tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("provider", ["pfml", "eager"])
def test_embeddings_of_half_precision(provider: str, dtype: torch.dtype) -> None:
    gradient, energy = errors_of(provider, SIZES["collapsed"], dtype)
    assert gradient < PROVIDERS[provider].tolerance + torch.finfo(dtype).eps / 2
    assert energy < PROVIDERS[provider].tolerance


@pytest.mark.slow
def test_the_compiled_loss_is_the_loss() -> None:
    assert max(errors_of("compile", SIZES["apart"], torch.float32)) < 1e-4


def test_more_sizes_are_compiled_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for classes in range(10, 20):  # 8 of one function are kept, and the next is an error
        cloud = make_cloud(Size(8, classes, 2, depth=16), 0)
        loss, plain = PROVIDERS["compile"].build(cloud), PROVIDERS["eager"].build(cloud)
        found, expected = (x(cloud.embeddings, cloud.batch_labels) for x in (loss, plain))
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="KeOps compiles what it computes")
@pytest.mark.parametrize("name", ["apart", "collapsed"])
def test_keops_is_the_loss(name: str) -> None:
    pytest.importorskip("pykeops", reason="pip install -e '.[keops]'")
    assert max(errors_of("keops", SIZES[name], torch.float32)) < PROVIDERS["keops"].tolerance


@pytest.mark.parametrize("provider", PEERS)
def test_another_loss_can_be_called_and_says_what_it_is(provider: str) -> None:
    work = Workload(PROVIDERS[provider].build, make_cloud(SIZES["apart"], 0))
    assert float(work.call("forward+backward")[0]) >= 0
    assert PROVIDERS[provider].tolerance is None
    name = provider.replace("-", "")
    assert name in PROVIDERS[provider].computes.lower()


def test_proxy_anchor_is_as_published() -> None:
    cloud = make_cloud(SIZES["apart"], 0)
    loss = PROVIDERS["proxy-anchor"].build(cloud)
    with torch.no_grad():
        loss.proxies.copy_(cloud.proxies[:, 0])
        found = loss(cloud.embeddings, cloud.batch_labels)
    similarity = cloud.embeddings @ cloud.proxies[:, 0].T
    own = cloud.batch_labels[:, None] == torch.arange(30)
    pull = torch.where(own, (-32 * (similarity - 0.1)).exp(), 0).sum(0).log1p()
    push = torch.where(own, 0, (32 * (similarity + 0.1)).exp()).sum(0).log1p()
    expected = pull.sum() / own.any(0).sum() + push.mean()
    torch.testing.assert_close(found, expected)


def test_names_are_those_of_the_command_line() -> None:
    assert tuple(PROVIDERS) == settings.PROVIDERS


def obstacle_of(name: str, size: Size, **changed: object) -> str | None:
    given = {"device": CPU, "available": 20 * GIB, "chosen": tuple(PROVIDERS), "slow": False}
    return obstacle(name, size, **(given | changed))


def test_what_runs_on_a_cpu() -> None:
    assert obstacle_of("pfml-triton", SMALL) == "needs a GPU, and this is the cpu"
    assert obstacle_of("pfml-torch", SMALL) == "is what pfml is on this device"
    assert obstacle_of("pfml-torch-dense", SMALL) == "is what pfml-dense is on this device"
    assert obstacle_of("pfml-torch", SMALL, chosen=("pfml-torch", "eager")) is None
    for name in ("pfml", "pfml-dense", "eager", "compile", *PEERS):
        assert obstacle_of(name, SMALL) is None
    for name in ("pfml", *PEERS):
        assert obstacle_of(name, LARGE) is None


def test_what_runs_on_a_gpu() -> None:
    assert obstacle_of("pfml-triton", SMALL, device=GPU) == "is what pfml is on this device"
    assert obstacle_of("pfml-triton", SMALL, device=GPU, chosen=("pfml-triton",)) is None
    assert obstacle_of("pfml-torch", SMALL, device=GPU) is None
    assert obstacle_of("pfml-dense", LARGE, device=GPU) is None  # estimates are those of a CPU


def test_what_does_not_fit_or_takes_long() -> None:
    reason = obstacle_of("eager", LARGE)
    assert reason == "does not fit: needs 301.1 GiB, 20.0 are available"
    assert obstacle_of("eager", LARGE, available=302 * GIB, slow=True).startswith("is not run")
    assert obstacle_of("pfml-dense", LARGE).endswith("98 s, estimated (--slow)")
    assert obstacle_of("pfml-dense", LARGE, slow=True) is None
    endless = obstacle_of("keops", LARGE, slow=True) if has_keops() else None
    assert endless is None or endless.endswith("s, estimated")


def has_keops() -> bool:
    return providers.find_spec("pykeops") is not None


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    assert obstacle_of("keops", SMALL) == (
        "needs pykeops, which is not installed: pip install -e '.[keops]'"
    )
    # Without Triton, auto is the torch backend on a GPU.
    assert obstacle_of("pfml-torch", SMALL, device=GPU) == "is what pfml is on this device"
    assert "needs triton" in obstacle_of("pfml-triton", SMALL, device=GPU)


def test_tile_shapes_are_told_where_triton_serves() -> None:
    cloud = make_cloud(SIZES["apart"], 0)
    assert tiles_of("pfml", cloud, CPU) is None
    assert tiles_of("eager", cloud, GPU) is None
    assert tiles_of("pfml-torch", cloud, GPU) is None
    told = dict(pair.split("=") for pair in tiles_of("pfml-triton", cloud, GPU).split())
    assert told.keys() == {field.name for field in fields(Tiles)}
    assert told["block_d"] == str(tiles_for(64).block_d)


def test_the_loss_is_as_in_the_midst_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def turned(basis: Tensor, points: Tensor) -> Tensor:
        turns.append(len(points))
        return turned_basis(basis, points)

    monkeypatch.setattr(operators, "turned_basis", turned)
    size = Size(20, 20, 4, depth=96)
    work = Workload(PROVIDERS["pfml"].build, make_cloud(size, 0))
    for _ in range(99):
        work.launch("forward")
    assert turns == []
    for _ in range(3):
        work.launch("forward")
    assert turns == [20]  # one call in a hundred
