"""What a training on a GPU does: steps that repeat, that wait for nothing, in graphs, on streams,
in threads, by the thousand; and what is too large for 32 bits."""

from __future__ import annotations

import copy
import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import triton
from torch import Tensor

from bench.clocks import capture
from pfml_triton import PFMLLoss, Potential, potential_energy
from pfml_triton.distributed import ShardedPFMLLoss
from pfml_triton.kernels import launch, search, tuning
from pfml_triton.kernels.config import Tiles
from pfml_triton.sketch import random_basis
from tests.clouds import assert_near, cloud
from tests.gpu.device import DEVICE, ON_GPU, put, same, step

pytestmark = ON_GPU


@pytest.fixture(autouse=True)
def _as_users_have_it() -> None:
    """No fill of empty buffers, which would be kernels between ours."""
    torch.use_deterministic_algorithms(False)


def problem(n: int, depth: int = 20, seed: int = 0) -> list[Tensor]:
    """Embeddings and labels, a memory bank and its labels."""
    return put(
        *cloud("clusters", n, depth, 5, torch.float32, seed),
        *cloud("collisions", n // 2, depth, 5, torch.float32, seed + 1),
    )


def loss_of(depth: int = 20, classes: int = 5, **settings: object) -> PFMLLoss:
    torch.manual_seed(0)
    return PFMLLoss(classes, depth, 2, delta=0.5, backend="triton", **settings).to(DEVICE)


def free_memory(gib: float) -> None:
    """Skip where the GPU has less."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.1f} are free")


@pytest.mark.parametrize("n", [1000, 5000])  # the latter with long lists
def test_200_runs_are_the_same_bit_for_bit(n: int) -> None:
    loss, given = loss_of().eval(), problem(n)
    first = step(loss, *given)
    assert all(same(step(loss, *given), first) for _ in range(200))


def test_nothing_waits_for_the_gpu() -> None:
    """130 training steps after the first, with an optimiser, basis turns and batches that vary."""
    loss = loss_of(512, classes=100)
    optimizer = torch.optim.Adam(loss.param_groups(lr=1e-4), foreach=True)
    x, labels, bank, bank_labels = problem(300, 512)

    def train(i: int) -> None:
        rows = slice(0, 300 - i % 7)
        embeddings = x[rows].detach().requires_grad_()
        value = loss(embeddings, labels[rows], None, *((bank, bank_labels) if i % 2 else ()))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.update_sketch(embeddings.detach())

    for i in range(2):
        train(i)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(130):
            train(i)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the latter by torch
@pytest.mark.parametrize("wrong", [-1, 5, 2**32, -(2**63)])
def test_labels_out_of_range_show(wrong: int, dtype: torch.dtype) -> None:
    """Nothing waits for them: they make the loss and its gradients NaN, and are counted."""
    loss = loss_of().eval()
    loss.backend = "auto"
    x, labels, bank, bank_labels = problem(300)
    labels[[0, 299]] = wrong
    for others in ([], [bank.to(dtype), bank_labels]):
        *values, outside = step(loss, x.to(dtype), labels, *others)
        assert outside == 2
        assert all(t.isnan().all() for t in values[:3])
        *values, outside = step(loss, x.to(dtype)[1:299], labels[1:299], *others)
        assert outside == 0
        assert all(t.isfinite().all() for t in values[:3])


def test_labels_of_a_memory_bank_are_any() -> None:
    """Those out of range repel all points, whatever their lowest 32 bits say."""
    loss, (x, labels, bank, bank_labels) = loss_of().eval(), problem(300)
    first = step(loss, x, labels, bank, bank_labels - 10)
    for offset in (5, 2**32, -(2**32)):
        assert same(step(loss, x, labels, bank, bank_labels + offset), first)


@pytest.mark.parametrize("n", [200, 5000])
@pytest.mark.parametrize("training", [False, True])
def test_replays_of_a_whole_step(training: bool, n: int) -> None:
    """Forward, backward and optimiser in one graph, with the sketch turned between its replays:
    the same parameters, to the bit, as without a graph."""
    x, labels, *_ = problem(n, 96)
    losses, embeddings = [], []
    for graphed in (True, False):
        loss = loss_of(96).train(training)
        optimizer = torch.optim.SGD(loss.parameters(), lr=1e-4)
        static, static_labels = x.clone().requires_grad_(), labels.clone()

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)  # noqa: B023
            static.grad = None  # noqa: B023
            loss(static, static_labels).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        start, basis = copy.deepcopy(loss.state_dict()), loss.sketch_basis
        train = capture(train).replay if graphed else train
        loss.load_state_dict(start)  # after the steps that a capture begins with
        loss.sketch_basis = basis
        if not graphed:
            loss.eval()  # which does not turn the sketch either
        for i in range(10):
            with torch.no_grad():
                static.copy_(x.roll(i, 0) * (1 + 0.01 * i))
                static_labels.copy_(labels.roll(i, 0))
            if i % 3 == 0:
                loss.update_sketch(static.detach())
            train()
        losses.append(loss)
        embeddings.append(static.grad)
    assert not torch.equal(losses[0].sketch_basis, random_basis(96, DEVICE))
    assert torch.equal(losses[0].sketch_basis, losses[1].sketch_basis)
    assert torch.equal(losses[0].proxies, losses[1].proxies)
    assert torch.equal(*embeddings)


@pytest.mark.parametrize("n", [1000, 5000])
def test_a_stream_that_is_not_the_default_one(n: int) -> None:
    """What is computed on a stream waits for what was put there before, and for nothing else."""
    loss = loss_of(64).eval()
    x, labels, *_ = problem(n, 64)
    expected = step(loss, x, labels)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                late = torch.full_like(x, math.nan)
                torch.cuda._sleep(20_000_000)  # the points are garbage until long after the launch
                late.copy_(x)
                results.append(step(loss, late, labels))
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


def test_threads_with_a_stream_each() -> None:
    problems = [problem(700, seed=seed) for seed in range(8)]
    losses = [loss_of().eval() for _ in range(8)]
    alone = [step(*pair) for pair in zip(losses, *zip(*problems, strict=True), strict=True)]
    torch.cuda.synchronize()
    barrier = threading.Barrier(8)

    def call(i: int) -> list[Tensor]:
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            results = step(losses[i], *problems[i])
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, range(8)))
    assert all(same(ours, expected) for ours, expected in zip(together, alone, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_points_on_a_device_that_is_not_the_current_one() -> None:
    """Both devices compute the same, whichever is current, each on a stream of its own."""
    given, results = problem(700), []
    for device in ("cuda:0", "cuda:1"):
        loss = loss_of().eval().to(device)
        there = [t.to(device) for t in given]
        torch.cuda.synchronize(device)
        for current in (0, 1):
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(current), torch.cuda.stream(stream), torch.cuda.device(current):
                results.append([t.cpu() for t in step(loss, *there)])
    assert all(same(result, results[0]) for result in results[1:])


def test_2000_steps_leave_nothing_behind() -> None:
    loss, given = loss_of(), problem(200)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)

    def train(steps: int) -> int:
        for i in range(steps):
            x = given[0][: 1 + i % 200].detach().requires_grad_()
            loss(x, given[1][: len(x)], None, *given[2:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(DEVICE)

    before = train(200)
    assert train(2000) <= before


def test_rows_beyond_32_bits() -> None:
    """Rows of float16 so far apart that their offsets need 33 bits, as those of a copy."""
    free_memory(14)
    x, labels = put(*cloud("collisions", 8, 64, 3, torch.float16))
    stride = ((1 << 31) // 3 + 8) // 16 * 16  # entries
    far = torch.empty(7 * stride + 64, dtype=x.dtype, device=DEVICE).as_strided(
        (8, 64), (stride, 1)
    )
    far.copy_(x)
    found = []
    for points in (far, x):
        terms = launch.field_terms(
            *(launch.gather(points, labels, Potential()),) * 2, Potential(), needs_grad=True
        )
        assert terms.grad is not None
        found.append([terms.energy, terms.grad, terms.attracting, terms.repelling])
    assert same(*found)


def test_points_beyond_32_bits() -> None:
    """4.3 million sources of 512 entries, of which those at the end are near the points."""
    free_memory(24)
    x, labels = put(*cloud("clusters", 300, 512, 20, torch.bfloat16))
    sources = torch.randn((1 << 22) + 100_000, 512, device=DEVICE, dtype=torch.bfloat16)
    of_sources = torch.full((len(sources),), 1000, device=DEVICE)
    sources[-300:], of_sources[-300:] = x.roll(1, 0), labels
    results = []
    for points, acting in ((sources, of_sources), (sources[-300:], of_sources[-300:])):
        leaf = x.clone().requires_grad_()
        value = potential_energy(
            leaf, labels, sources=points, source_labels=acting, backend="triton"
        )
        results.append(torch.autograd.grad(value, leaf)[0])
    assert results[1].abs().max() > 0
    assert_near(results[0], results[1].double(), torch.bfloat16)


def test_tuning_from_times_to_a_file_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = put(*cloud("clusters", 1500, 64, 100, torch.float32))
    path = tmp_path / "tuning.json"
    shipped = tuning.shipped_tiles(x, len(x))

    def space(kernel: str, tiles: Tiles, depth: int) -> list[triton.Config]:
        return search.short_space(kernel, tiles, depth)[:3]

    name = tuning.device_name(x)
    assert name is not None
    key = tuning.key_of(name, x.dtype, 64, len(x))
    call = search.mutual_call(x, labels, Potential(), basis=random_basis(64, DEVICE))
    tiles, found = search.tune(call, shipped, key, str(tmp_path), space=space)
    assert all(0 < f.ms[f.best] < math.inf for f in found)
    tuning.save(path, search.entry(key, tiles, found))
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(path))
    tuning.forget()
    try:
        assert tuning.tiles_here(x) == tiles
    finally:
        tuning.forget()


def test_one_rank_of_nccl(tmp_path: Path) -> None:
    """The values of `PFMLLoss`, to the bit, through NCCL's collectives and gloo's for the host."""
    given = problem(300, 96)
    torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=DEVICE
    )
    try:
        one = loss_of(96).eval()
        many = ShardedPFMLLoss(5, 96, 2, delta=0.5, backend="triton").to(DEVICE).eval()
        many.load_state_dict(one.state_dict())
        value, *others = step(many, *given)
        expected = step(one, *given)
        assert same(others, expected[1:])
        assert_near(value, expected[0].double(), torch.float32)  # a sum of float64 in between
    finally:
        dist.destroy_process_group()
