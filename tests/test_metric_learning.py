"""`pfml_triton.metric_learning`, in the installed pytorch-metric-learning."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.losses as library
import torch
from pytorch_metric_learning import miners, testers, trainers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pfml_triton
from pfml_triton.metric_learning import CrossBatchMemory, PFMLLoss

B, D, C, M = 8, 6, 4, 3
POTENTIAL = {"delta": 0.7, "delta_rep": 1.1, "min_distance": 0.1}


def batch(size: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, D), torch.randint(0, C, (size,))


def clone(memory: CrossBatchMemory) -> dict[str, Any]:
    return copy.deepcopy(memory.state_dict())


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The loss


def test_the_loss_is_that_of_the_package() -> None:
    ours, plain = PFMLLoss(C, D, M, **POTENTIAL), pfml_triton.PFMLLoss(C, D, M, **POTENTIAL)
    assert isinstance(ours, library.BaseMetricLossFunction)
    assert inspect.signature(PFMLLoss) == inspect.signature(pfml_triton.PFMLLoss)
    assert list(ours.state_dict()) == list(pfml_triton.PFMLLoss(C, D, M).state_dict())
    plain.load_state_dict(ours.state_dict())
    x, labels = batch()
    others = {"ref_emb": torch.randn(5, D), "ref_labels": torch.arange(5) % C}
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        found = []
        for loss in (copied, plain):
            points = x.clone().requires_grad_()
            value = loss(points, labels, **others)
            found.append([value, *torch.autograd.grad(value, [points, loss.proxies])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert copied.last_stats == plain.last_stats


def test_labels_and_proxies_follow_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a device without memory, since others are not everywhere."""
    seen = []

    def forward(self: PFMLLoss, *points: torch.Tensor, **others: torch.Tensor) -> None:
        seen.extend(x.device.type for x in (self.proxies, *points, *others.values()))

    monkeypatch.setattr(pfml_triton.PFMLLoss, "forward", forward)
    x, labels = batch()
    PFMLLoss(C, D, M)(x.to("meta"), labels, None, x.to("meta"), labels)
    assert seen == ["meta"] * 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_needs_moving() -> None:
    loss = PFMLLoss(C, D, M, **POTENTIAL)
    memory = CrossBatchMemory(copy.deepcopy(loss), D, 3 * B)
    for _ in range(3):
        x, labels = batch()
        alone, together = loss(x.cuda(), labels), memory(x.cuda(), labels)
        (alone + together).backward()
    assert loss.proxies.grad.device == memory.embedding_memory.device == x.cuda().device


def test_tuples_are_refused_with_the_reason() -> None:
    loss, (x, labels) = PFMLLoss(C, D, M), batch()
    tuples = miners.MultiSimilarityMiner()(x, labels)
    for refuses in (loss, CrossBatchMemory(loss, D, 20)):
        with pytest.raises(ValueError, match="PFML takes every pair, so there are no tuples to"):
            refuses(x, labels, tuples)
    with pytest.raises(Exception, match="CrossBatchMemory not supported for PFMLLoss"):
        library.CrossBatchMemory(loss, D, 20)


def test_labels_that_are_no_tensor_are_named() -> None:
    x, labels = batch()
    for refuses in (PFMLLoss(C, D, M), CrossBatchMemory(PFMLLoss(C, D, M), D, 20)):
        with pytest.raises(TypeError, match="labels must be a Tensor, got ndarray"):
            refuses(x, labels.numpy())
        with pytest.raises(TypeError, match="labels must be a Tensor, got NoneType"):
            refuses(x, None)


def test_one_of_several_losses() -> None:
    loss, other, (x, labels) = PFMLLoss(C, D, M), library.ContrastiveLoss(), batch()
    total = library.MultipleLosses([loss, other], weights=[0.5, 2.0])(x, labels)
    assert total.item() == pytest.approx(0.5 * loss(x, labels).item() + 2 * other(x, labels).item())


def test_without_the_library() -> None:
    """The package works, and the module says what is missing."""
    code = """
import sys
sys.modules["pytorch_metric_learning"] = None
import pfml_triton
try:
    import pfml_triton.metric_learning
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "which is not installed: pip install pytorch-metric-learning" in done.stdout


# The memory


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [10, 13, 24, 100])
def test_the_memory_adds_its_field(size: int, masked: bool) -> None:
    """That of the last rows before the batch, as far as they stay in the memory beside it."""
    loss = PFMLLoss(C, D, M, **POTENTIAL)
    memory = CrossBatchMemory(loss, D, size)
    rows, classes = torch.empty(0, D), torch.empty(0, dtype=torch.int64)
    for step in range(8):
        x, labels = batch(3 + (5 * step) % 7)
        mask = torch.arange(len(x)) % 3 == 0 if masked else None
        acting, queued = (~mask, mask) if masked else (slice(None), slice(None))
        points = x.clone().requires_grad_()
        value = memory(points, labels, enqueue_mask=mask)
        grads = torch.autograd.grad(value, [points, loss.proxies])

        new = x[queued]
        kept = max(len(rows) + len(new) - size, 0)
        bank, bank_labels = rows[kept:], classes[kept:]
        rows, classes = torch.cat([bank, new]), torch.cat([bank_labels, labels[queued]])
        if masked:
            bank, bank_labels = rows, classes
        points = x.clone().requires_grad_()
        true = loss(points[acting], labels[acting], ref_emb=bank, ref_labels=bank_labels)
        assert value.item() == pytest.approx(true.item(), rel=1e-6)
        for a, b in zip(grads, torch.autograd.grad(true, [points, loss.proxies]), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
    if masked:
        assert not grads[0][queued].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_batch_that_fills_the_memory_is_all_there_is(backend: str) -> None:
    loss = PFMLLoss(C, D, M, **POTENTIAL, backend=backend)
    memory = CrossBatchMemory(loss, D, B)
    for _ in range(3):
        x, labels = batch()
        assert torch.equal(memory(x, labels), loss(x, labels))


def test_the_memory_feels_no_force() -> None:
    memory = CrossBatchMemory(PFMLLoss(C, D, M, **POTENTIAL), D, 3 * B)
    (x, labels), (y, more) = batch(), batch()
    x.requires_grad_()
    memory(x, labels)
    memory(y.requires_grad_(), more).backward()
    assert x.grad is None
    assert y.grad is not None


def test_losses_of_several_steps_share_a_backward() -> None:
    """The memory has changed since the first of them was computed."""
    memory = CrossBatchMemory(PFMLLoss(C, D, M, **POTENTIAL), D, 2 * B)
    x = torch.randn(4, B, D, requires_grad=True)
    labels = torch.arange(B) % C
    torch.stack([memory(points, labels) for points in x]).sum().backward()
    together = x.grad.clone()
    memory.reset_queue()
    x.grad = None
    for points in x:
        memory(points, labels).backward()
    assert torch.equal(x.grad, together)


def test_the_memory_is_in_the_state() -> None:
    memory = CrossBatchMemory(PFMLLoss(C, D, M, **POTENTIAL), D, 20)
    for steps in range(4):  # from empty to full
        fresh = CrossBatchMemory(PFMLLoss(C, D, M, **POTENTIAL), D, 20)
        fresh.load_state_dict(clone(memory))
        for _ in range(2):
            x, labels = batch()
            assert torch.equal(memory(x, labels), fresh(x, labels))
        assert same_state(memory.state_dict(), fresh.state_dict()), steps


def test_what_is_refused_is_not_memorised() -> None:
    memory = CrossBatchMemory(PFMLLoss(C, D, M).eval(), D, B)  # in training, calls are counted
    x, labels = batch()
    memory(x[:5], labels[:5])
    before = clone(memory)
    for bad in (
        lambda: memory(x, labels + C),
        lambda: memory(x[:, :3], labels),
        lambda: memory(x, labels[:5]),
        lambda: memory(torch.cat([x, x]), torch.cat([labels, labels])),
        lambda: memory(x, labels, enqueue_mask=labels),
        lambda: memory(x, labels, enqueue_mask=labels[:5] > 0),
    ):
        with pytest.raises(ValueError, match="must be .*got"):
            bad()
    assert same_state(memory.state_dict(), before)


def test_a_refused_call_of_another_dtype_rounds_nothing() -> None:
    memory = CrossBatchMemory(PFMLLoss(C, D, M).eval(), D, B)
    x, labels = batch()
    memory(x, labels)
    before = clone(memory)
    with pytest.raises(ValueError, match="labels must be in"):
        memory(x.bfloat16(), labels + C)
    assert same_state(memory.state_dict(), before)
    for mask in ([True] * B, "yes"):
        with pytest.raises(ValueError, match=r"enqueue_mask must be \[B\] bool .* got (list|str)"):
            memory(x, labels, enqueue_mask=mask)


def test_labels_of_narrower_dtypes_leave_the_others_alone() -> None:
    loss = PFMLLoss(400, D, 1)
    memory = CrossBatchMemory(loss, D, 20)
    x, _ = batch()
    memory(x[:4], torch.arange(300, 304))
    value = memory(x[4:8], torch.arange(4, dtype=torch.uint8))
    expected = loss(x[4:8], torch.arange(4), None, x[:4], torch.arange(300, 304))
    assert torch.equal(value, expected)
    assert memory.label_memory[:8].tolist() == [300, 301, 302, 303, 0, 1, 2, 3]


def test_nothing_to_memorise() -> None:
    """An empty queue that gets nothing is not a full one."""
    memory = CrossBatchMemory(PFMLLoss(C, D, M), D, 20)
    x, labels = batch()
    value = memory(x, labels, enqueue_mask=torch.zeros(B, dtype=torch.bool))
    assert torch.equal(value, memory.loss(x, labels))
    assert torch.equal(value, memory(x, labels))
    assert memory.queue_idx == B
    assert not memory.has_been_filled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_memory_has_the_dtype_of_the_embeddings(dtype: torch.dtype) -> None:
    memory = CrossBatchMemory(PFMLLoss(C, D, M, **POTENTIAL), D, 20)
    (x, labels), (y, more) = batch(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        memory(x.to(dtype), labels.to(torch.int32))
        value = memory(y.to(dtype), more.to(torch.int32))
    assert memory.embedding_memory.dtype == dtype
    true = memory.loss(y.to(dtype), more, ref_emb=x.to(dtype), ref_labels=labels)
    assert value.item() == pytest.approx(true.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"loss": library.ContrastiveLoss()}, TypeError, "must be a PFMLLoss, got ContrastiveLoss"),
        ({"loss": None}, TypeError, "must be a PFMLLoss, got NoneType"),
        ({"embedding_size": 7}, ValueError, "must be that of the loss, 6, got 7"),
        ({"memory_size": 0}, ValueError, "memory_size must be >= 1, got 0"),
        ({"miner": miners.PairMarginMiner()}, ValueError, "no tuples to mine, got PairMarginMiner"),
    ],
)
def test_bad_settings_of_the_memory(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        CrossBatchMemory(**({"loss": PFMLLoss(C, D, M), "embedding_size": D} | arguments))


def test_losses_of_the_package_and_classes_made_of_them_are_taken() -> None:
    class Renamed(PFMLLoss):
        pass

    for loss in (Renamed(C, D), pfml_triton.PFMLLoss(C, D)):
        assert CrossBatchMemory(loss, D).loss is loss


# Trainers and testers


@pytest.mark.parametrize("trainer", ["MetricLossOnly", "TrainWithClassifier"])
@pytest.mark.parametrize("remembers", [False, True])
def test_trainers_and_testers(
    trainer: str, remembers: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noisy copies of few points, which a linear network hides in noise at first."""
    centres, labels = torch.randn(C, 20), torch.arange(80) % C
    images = torch.cat([centres[labels] + 0.3 * torch.randn(80, 20), 3 * torch.randn(80, 40)], 1)
    data = list(zip(images, labels.tolist(), strict=True))
    trunk, loss = nn.Linear(60, D), PFMLLoss(C, D, M, **POTENTIAL)
    before = loss.proxies.detach().clone()

    accuracy = AccuracyCalculator(("precision_at_1",), k=1, knn_func=CustomKNN(LpDistance()))
    tester = testers.GlobalEmbeddingSpaceTester(
        accuracy_calculator=accuracy, dataloader_num_workers=0, data_device="cpu"
    )

    def precision() -> float:
        return tester.test({"test": data}, 1, trunk)["test"]["precision_at_1_level0"]

    untrained = precision()
    models = {"trunk": trunk}
    losses = {"metric_loss": CrossBatchMemory(loss, D, 48) if remembers else loss}
    if trainer == "TrainWithClassifier":
        models["classifier"], losses["classifier_loss"] = nn.Linear(D, C), nn.CrossEntropyLoss()
    values = []
    getattr(trainers, trainer)(
        models=models,
        optimizers={
            "trunk_optimizer": torch.optim.Adam(trunk.parameters(), 1e-2),
            "metric_loss_optimizer": torch.optim.Adam(loss.param_groups(1e-4)),
        },
        batch_size=16,
        loss_funcs=losses,
        dataset=data,
        dataloader_num_workers=0,
        data_device="cpu",
        end_of_iteration_hook=lambda run: values.append(run.losses["metric_loss"].item()),
    ).train(num_epochs=20)
    assert len(values) == 100
    assert np.isfinite(values).all()
    assert loss.last_stats is not None
    assert loss.last_stats["attracting_pairs"] > 0
    assert not torch.equal(loss.proxies, before)
    assert precision() > max(untrained, 0.5) + 0.2
    capsys.readouterr()  # the progress bars


# Many processes


CASES = ("batch", "mean", "references", "memory", "mask")
WRAPPED = ("batch", "memory")  # the loss is in DistributedDataParallel


def gradients(case: str, world: int, rank: int | None) -> dict[str, torch.Tensor]:
    """Of the network and the proxies, in the last of four steps, by one rank, or by one process."""
    torch.manual_seed(1)
    network = nn.Linear(7, D).double()
    loss = PFMLLoss(C, D, M, **POTENTIAL, reduction="mean" if case == "mean" else "sum")
    remembers = case in ("memory", "mask")
    model, criterion = network, CrossBatchMemory(loss, D, 2 * world * B) if remembers else loss
    if rank is not None:
        model, criterion = DistributedDataParallel(network), DistributedLossWrapper(criterion)
        if case in WRAPPED:
            criterion = DistributedDataParallel(criterion)
    mine = slice(None) if rank is None else slice(rank * B, (rank + 1) * B)
    for _ in range(4):
        images, others = torch.randn(2, world * B, 7, dtype=torch.float64)
        labels, other_labels = torch.randint(0, C, (2, world * B))
        mask = torch.rand(world * B) < 0.5
        network.zero_grad()
        loss.zero_grad()
        rest: dict[str, Any] = {}
        if case == "references":
            rest = {"ref_emb": model(others[mine]), "ref_labels": other_labels[mine]}
        if case == "mask":
            rest = {"enqueue_mask": mask[mine]}
        criterion(model(images[mine]), labels[mine], **rest).backward()
    return {"network": network.weight.grad, "proxies": loss.proxies.grad}


def one_rank(rank: int, world: int, folder: Path) -> None:
    """All cases, and what is refused."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=120), world_size=world, rank=rank
    )
    found = {case: gradients(case, world, rank) for case in CASES}
    torch.save(found, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="efficient=True.*, where efficient=False is right"):
        DistributedLossWrapper(PFMLLoss(C, D, M), efficient=True)(*batch())
    torch.distributed.barrier()
    os._exit(0)  # a thread of gloo that has not ended aborts a process that does, now and then


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_are_one(world: int, tmp_path: Path) -> None:
    """The network's gradient; the proxies' is that as often as there are ranks."""
    run = torch.multiprocessing.spawn(one_rank, (world, tmp_path), nprocs=world, join=False)
    try:
        while not run.join(timeout=1):
            pass
    finally:
        for process in run.processes:
            process.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for case in CASES:
        true = gradients(case, world, None)
        for found in ranks:
            for name, factor, tolerance in (("network", 1, 1e-11), ("proxies", world, 1e-6)):
                expected = factor * true[name]
                error = (found[case][name] - expected).abs().max() / expected.abs().max()
                assert error < tolerance, (case, name)
            if case in WRAPPED:
                assert torch.equal(found[case]["proxies"], ranks[0][case]["proxies"]), case
