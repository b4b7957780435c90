import pytest
import torch
from torch import Tensor, nn

from bench import costs
from bench.clouds import Cloud, make_cloud
from bench.providers import PROVIDERS
from bench.settings import Size

SIZE = Size(40, 40, 4, depth=64)


class Recorded(nn.Module):
    """A loss that tells which inputs it was given."""

    def __init__(self, cloud: Cloud, calls: list[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.proxies = nn.Parameter(cloud.proxies.clone())
        self.calls = calls

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        pointers = embeddings.data_ptr(), self.proxies.data_ptr()
        self.calls.append((*pointers, torch.is_grad_enabled()))
        return embeddings.float().sum() + 2 * self.proxies.sum()


def test_copies_take_turns() -> None:
    calls: list[tuple[int, int, bool]] = []
    work = costs.Workload(lambda cloud: Recorded(cloud, calls), make_cloud(SIZE, 0), copies=3)
    for _ in range(2):
        for _ in range(3):
            work.call("forward+backward")
    assert calls[:3] == calls[3:]
    assert len({embeddings for embeddings, _, _ in calls}) == 3
    assert len({proxies for _, proxies, _ in calls}) == 3


def test_modes_are_with_gradients_and_without() -> None:
    calls: list[tuple[int, int, bool]] = []
    work = costs.Workload(lambda cloud: Recorded(cloud, calls), make_cloud(SIZE, 0))
    value, milliseconds = work.call("forward+backward")
    assert not value.requires_grad
    assert milliseconds > 0
    for _ in range(2):  # gradients do not add up
        work.call("forward+backward")
        embeddings, proxies = work.gradients()
        assert embeddings.unique().tolist() == [1.0]
        assert proxies.unique().tolist() == [2.0]
        assert proxies.dtype == torch.float64
    work.call("forward")
    assert [enabled for *_, enabled in calls] == [True, True, True, False]
    with pytest.raises(AssertionError):
        work.gradients()


def test_float16_gradients_are_scaled_down_and_up_again() -> None:
    size = Size(4, 1, 796, depth=64, kind="one-class")
    build = PROVIDERS["pfml"].build
    half = costs.Workload(build, make_cloud(size, 0), torch.float16)
    full = costs.Workload(build, make_cloud(size, 0), torch.float32)
    for work in (half, full):
        work.call("forward+backward")
    expected, _ = full.gradients()
    found, _ = half.gradients()
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


def test_copies_exceed_the_cache() -> None:
    cloud = make_cloud(SIZE, 0)
    assert cloud.points.nbytes == 200 * 64 * 4
    assert costs.copies_beyond(0, cloud) == 1
    for cache in (1, 50_000, 51_200, 200_000):
        copies = costs.copies_beyond(cache, cloud)
        assert copies * cloud.points.nbytes > cache
        assert (copies - 1) * cloud.points.nbytes <= cache
    assert costs.copies_beyond(10**9, cloud) == costs.MOST_COPIES
    assert costs.cache_bytes(torch.device("cpu")) == 0


def test_products_are_counted_whatever_their_form() -> None:
    a, b, out = torch.ones(8, 16), torch.ones(16, 4), torch.ones(8, 4)
    batch_a, batch_b, batch_out = (t.expand(3, -1, -1).clone() for t in (a, b, out))
    low_a, low_b = a.bfloat16(), b.bfloat16()
    calls = (
        lambda: a @ b,
        lambda: torch.mm(a, b, out=out),
        lambda: low_a @ low_b,
        lambda: torch.mm(low_a, low_b, out=out.bfloat16()),
        lambda: torch.addmm(out, a, b),
        lambda: torch.addmm(out, a, b, out=out),
        lambda: out.addmm_(a, b),
    )
    for call in calls:
        assert costs.operations(call)[1] == 2 * 8 * 16 * 4
    calls = (
        lambda: batch_a @ batch_b,
        lambda: torch.bmm(batch_a, batch_b, out=batch_out),
        lambda: torch.baddbmm(batch_out, batch_a, batch_b, out=batch_out),
        lambda: batch_out.baddbmm_(batch_a, batch_b),
    )
    for call in calls:
        assert costs.operations(call)[1] == 3 * 2 * 8 * 16 * 4
    assert costs.operations(lambda: "result") == ("result", 0)


def test_plain_pytorch_takes_three_dense_products() -> None:
    work = costs.Workload(PROVIDERS["eager"].build, make_cloud(SIZE, 0))
    assert costs.operations(lambda: work.call("forward+backward"))[1] == 6 * 200**2 * 64
    assert costs.operations(lambda: work.call("forward"))[1] == 2 * 200**2 * 64


def test_pairs_of_the_torch_backend_are_counted() -> None:
    size = Size(0, 50, 4, depth=64)
    work = costs.Workload(PROVIDERS["pfml"].build, make_cloud(size, 0))
    executed = costs.operations(lambda: work.call("forward+backward"))[1]
    pairs = 200 * 3 * 5 * 64  # every point attracts the 3 others of its class
    assert executed > pairs + 2 * 200 * 4 * 64
    lean = costs.Workload(PROVIDERS["eager"].build, make_cloud(size, 0))
    assert executed < costs.operations(lambda: lean.call("forward+backward"))[1]


def test_the_active_share_is_told_by_this_loss_alone() -> None:
    spread = make_cloud(Size(10, 1, 190, depth=64, kind="one-class"), 0)
    apart = make_cloud(Size(0, 320, 2, depth=256), 0)
    shares = []
    for cloud in (spread, apart):
        work = costs.Workload(PROVIDERS["pfml"].build, cloud)
        work.call("forward")
        shares.append(work.active_share())
    assert shares[0] == 1.0
    assert 0 < shares[1] < 0.5
    assert costs.Workload(PROVIDERS["eager"].build, apart).active_share() is None
