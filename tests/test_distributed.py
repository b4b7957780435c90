"""The loss over 1 to 4 processes, with gloo: what every one of them finds is what one would.

A number of processes is started once, and goes through all checks; a check is a function of its
rank's `World` that raises if it fails.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pfml_triton import PFMLLoss
from tests import interpreter  # noqa: F401  # in the processes as well

C, M, D, B = 5, 2, 7, 12
SETTINGS: dict[str, Any] = {"delta": 0.6, "delta_rep": 0.9, "min_distance": 0.1}
PATIENCE = timedelta(seconds=120)  # until ranks that wait for each other are a failure


@dataclass
class World:
    """What a check knows: it runs on every rank at once."""

    rank: int
    size: int
    folder: Path

    @property
    def shard_of_last(self) -> int:
        """Classes whose proxies the last rank holds."""
        return max(C - (self.size - 1) * -(-C // self.size), 0)

    def loss(self, **settings: Any) -> PFMLLoss:
        return PFMLLoss(C, D, M, process_group=dist.group.WORLD, **SETTINGS | settings)

    def pair(self, **settings: Any) -> tuple[PFMLLoss, PFMLLoss]:
        """The loss of many processes and that of one, with the same proxies."""
        many = self.loss(**settings)
        one = PFMLLoss(C, D, M, **SETTINGS | settings)
        with torch.no_grad():
            one.proxies.copy_(many.proxies.full_tensor())
        return many, one

    def share(self, rows: int = B) -> slice:
        """This rank's rows of a batch: uneven, and none for the second of three ranks or more."""
        weights = [0 if i == 1 and self.size > 2 else i + 1 for i in range(self.size)]
        ends = [round(rows * sum(weights[: i + 1]) / sum(weights)) for i in range(self.size)]
        return slice(ends[self.rank - 1] if self.rank else 0, ends[self.rank])


def batch(rows: int = B, depth: int = D, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, depth, generator=generator).to(dtype), torch.arange(rows) % C


def near(ours: Tensor, theirs: Tensor, allowed: float = 1e-6) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.allclose(ours.double(), theirs.double(), rtol=0, atol=allowed * scale), (
        f"{float((ours.double() - theirs.double()).abs().max()):.3g} of {scale:.3g}"
    )


def gradients(world: World, dtype: torch.dtype, exact: bool, **settings: Any) -> None:
    many, one = world.pair(**settings)
    x, labels = batch(dtype=dtype)
    ours = x[world.share()].clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    value, whole = many(ours, labels[world.share()]), one(theirs, labels)
    (3 * value).backward()
    (3 * whole).backward()
    near(value, whole)
    # What the ranks will average is as many times too large.
    assert ours.grad is not None
    assert theirs.grad is not None
    rounding = {torch.bfloat16: 2.0**-7, torch.float64: 1e-12}.get(dtype, 1e-6)
    near(ours.grad / world.size, theirs.grad[world.share()], rounding)
    proxies = many.proxies.grad
    assert isinstance(proxies, DTensor)
    near(proxies.full_tensor(), one.proxies.grad)
    if exact:  # a row is the same sum
        assert torch.equal(ours.grad, world.size * theirs.grad[world.share()])
        assert torch.equal(proxies.full_tensor(), one.proxies.grad)
    stats, of_one = many.last_stats, one.last_stats
    assert stats is not None
    assert of_one is not None
    for name in ("attracting_pairs", "repelling_pairs", "smallest_distance"):
        near(stats[name], of_one[name])
    near(stats["active_energy"], of_one["active_energy"], 1e-5)
    bits = [torch.empty(1) for _ in range(world.size)]
    dist.all_gather(bits, value.detach().float().view(1))
    assert all(torch.equal(b, bits[0]) for b in bits)


def gradients_of_torch(world: World) -> None:
    gradients(world, torch.float32, exact=False, backend="torch")
    gradients(world, torch.float64, exact=False, backend="torch", reduction="mean")
    gradients(world, torch.bfloat16, exact=False, backend="torch", normalize=False)


def gradients_of_the_kernels(world: World) -> None:
    """Bit for bit those of one process; three times is no power of two, so a multiple rounds."""
    exact = world.size != 3
    gradients(world, torch.float32, exact=exact, backend="triton")
    gradients(world, torch.float32, exact=exact, backend="triton", prune=False, reduction="mean")


def network_is_that_of_one(world: World, wrapped: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, D))
    many, one = world.pair()
    alone = copy.deepcopy(net)
    x, labels = batch(depth=4)
    model = wrapped(net)  # whose hooks average the gradients, as long as it lives
    many(model(x[world.share()]), labels[world.share()]).backward()
    one(alone(x), labels).backward()
    ours = [*net.parameters(), many.proxies]
    for mine, theirs in zip(ours, [*alone.parameters(), one.proxies], strict=True):
        grad = mine.grad
        near(grad.full_tensor() if isinstance(grad, DTensor) else grad, theirs.grad)


def network_under_ddp(world: World) -> None:
    network_is_that_of_one(world, DistributedDataParallel)


def network_under_fsdp2(world: World) -> None:
    mesh = world.loss().proxies.device_mesh
    network_is_that_of_one(world, lambda net: fully_shard(net, mesh=mesh))


def training(world: World) -> None:
    """Ten steps of Adam: the network and the proxies follow those of one process."""
    torch.manual_seed(1)
    net = nn.Linear(4, D).double()
    many, one = (loss.double() for loss in world.pair())
    alone = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    steps = []
    for module, loss in ((ddp, many), (alone, one)):
        groups = [{"params": module.parameters()}, *loss.param_groups(lr=1e-3)]
        steps.append((module, loss, torch.optim.Adam(groups, lr=1e-3)))
    for step in range(10):
        rows = B - step  # a batch of another size every time
        x, labels = batch(rows, 4, torch.float64)
        for (module, loss, optimizer), share in zip(
            steps, (world.share(rows), slice(None)), strict=True
        ):
            optimizer.zero_grad()
            loss(module(x[share]), labels[share]).backward()
            optimizer.step()
    for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        near(ours.detach(), theirs.detach(), 1e-9)
    near(many.proxies.detach().full_tensor(), one.proxies.detach(), 1e-9)
    assert many.training_calls == one.training_calls == 10


def out_of_step(world: World) -> None:
    """Ranks with fewer batches go on with empty ones, until the last has none left."""
    torch.manual_seed(1)
    net = nn.Linear(4, D).double()
    many, one = (loss.double() for loss in world.pair())
    alone = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    x, labels = batch(depth=4, dtype=torch.float64)
    own = [slice(2 * i, 2 * i + 2) for i in range(world.rank, 6, world.size)]
    own = own[: world.rank + 1]  # as many batches as the rank's number, and one
    steps = torch.tensor(len(own))
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    for step in range(int(steps)):
        mine = own[step] if step < len(own) else slice(0)
        ddp.zero_grad()
        many(ddp(x[mine]), labels[mine]).backward()
        rows = torch.cat([torch.arange(B)[s[step]] for s in everyone if step < len(s)])
        alone.zero_grad()
        one(alone(x[rows]), labels[rows]).backward()
        for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
            near(ours.grad, theirs.grad, 1e-9)


def a_loss_under_fsdp2(world: World) -> None:
    """Without a process_group the proxies are whole in forward, and every rank's field its own."""
    many, one = world.pair()
    mesh = many.proxies.device_mesh
    sharded = copy.deepcopy(one)
    fully_shard(sharded, mesh=mesh)
    x, labels = batch()
    value, whole = sharded(x, labels), one(x, labels)
    assert torch.equal(value, whole)
    value.backward()
    whole.backward()
    near(sharded.proxies.grad.full_tensor(), one.proxies.grad)


def ddp_of_the_loss_is_refused(world: World) -> None:
    """Its shards must not be broadcast over each other."""
    even = PFMLLoss(2 * world.size, D, M, process_group=dist.group.WORLD)
    before = even.proxies.to_local().clone()
    with pytest.raises(RuntimeError):
        DistributedDataParallel(even)
    assert torch.equal(even.proxies.to_local(), before)
    nested = nn.ModuleDict({"net": nn.Linear(3, D), "loss": even})
    with pytest.raises(RuntimeError):
        DistributedDataParallel(nested)
    assert torch.equal(even.proxies.to_local(), before)


def memory_bank(world: World) -> None:
    many, one = world.pair()
    x, labels = batch()
    bank, bank_labels = x.roll(1, 0) + 0.2, labels.roll(2)
    share = world.share()
    ours, theirs = x[share].clone().requires_grad_(), x.clone().requires_grad_()
    value = many(ours, labels[share], ref_emb=bank[share], ref_labels=bank_labels[share])
    whole = one(theirs, labels, ref_emb=bank, ref_labels=bank_labels)
    near(value, whole)
    value.backward()
    whole.backward()
    near(ours.grad / world.size, theirs.grad[share])
    near(many.proxies.grad.full_tensor(), one.proxies.grad)
    with pytest.raises((ValueError, RuntimeError), match="ref_emb receives no force|refuses"):
        many(ours, labels[share], ref_emb=ours, ref_labels=labels[share])


def the_sketch_turns_alike(world: World) -> None:
    many = PFMLLoss(C, 70, 1, process_group=dist.group.WORLD)
    one = PFMLLoss(C, 70, 1)
    x, labels = batch(depth=70)
    for _ in range(3):
        many(x[world.share()], labels[world.share()])
        one(x, labels)
    near(many.sketch_basis, one.sketch_basis)
    assert not torch.equal(many.sketch_basis, PFMLLoss(C, 70, 1).sketch_basis)
    bases = [torch.empty(70 * 60) for _ in range(world.size)]
    dist.all_gather(bases, many.sketch_basis.float().flatten())
    assert all(torch.equal(basis, bases[0]) for basis in bases)


def no_batch_at_all(world: World) -> None:
    many, one = world.pair()
    value, whole = (loss(torch.empty(0, D), torch.empty(0).long()) for loss in (many, one))
    near(value, whole)
    value.backward()
    whole.backward()
    near(many.proxies.grad.full_tensor(), one.proxies.grad)


def dtypes_that_differ(world: World) -> None:
    """The widest of them serves all."""
    many, one = world.pair()
    x, labels = batch(dtype=torch.float64)
    mine = x[world.share()].to(torch.float64 if world.rank == 0 else torch.bfloat16)
    ours = mine.clone().requires_grad_()
    value = many(ours, labels[world.share()])
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, mine.double())
    assert value.dtype == torch.float64
    near(value, one(torch.cat(parts), labels), 1e-9)
    value.backward()
    assert ours.grad.dtype == ours.dtype


def compiled_around(world: World) -> None:
    many, one = world.pair()
    x, labels = batch()
    share = world.share()
    value = torch.compile(many, backend="aot_eager")(x[share], labels[share])
    near(value, one(x, labels))
    value.backward()
    assert many.proxies.grad is not None


def no_proxies(world: World) -> None:
    many = PFMLLoss(C, D, 0, process_group=dist.group.WORLD, **SETTINGS)
    one = PFMLLoss(C, D, 0, **SETTINGS)
    x, labels = batch()
    near(many(x[world.share()], labels[world.share()]), one(x, labels))


def nan_everywhere(world: World) -> None:
    """A point of the last rank that is not finite shows on all."""
    many, _ = world.pair()
    x, labels = batch()
    x[-1, 3] = torch.nan
    ours = x[world.share()].clone().requires_grad_()
    value = many(ours, labels[world.share()])
    value.backward()
    assert value.isnan()
    assert ours.grad.isnan().all()
    assert many.proxies.grad.to_local().isnan().all()


def one_rank_in_error(world: World) -> None:
    """Nobody hangs, everybody hears of it, and the next call works."""
    many, _ = world.pair()
    x, labels = batch()
    share, last = world.share(), world.rank == world.size - 1
    for bad, says in (
        (lambda: many(x[share], labels[share] + C), r"labels must be in \[0, 5\)"),
        (lambda: many(x[share][:, :3], labels[share]), r"embeddings must be \[B, 7\]"),
        (lambda: many(x[share].numpy(), labels[share]), "embeddings must be a Tensor"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            bad() if last else many(x[share], labels[share])
        if last:
            assert isinstance(caught.value, (TypeError, ValueError))
            assert caught.match(says)
        else:
            assert caught.match(f"rank {world.size - 1} of {world.size} refuses")
    assert many(x[share], labels[share]).isfinite()
    if last:
        many.num_classes += 1
    with pytest.raises(Exception) as caught:  # noqa: PT011
        many(x[share], labels[share])
    assert caught.match("proxies must be" if last else "refuses")
    many.num_classes = C
    many.validate = True
    if last and many.proxies.to_local().numel():
        with torch.no_grad():
            many.proxies.to_local()[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="proxies must be finite"):
            many(x[share], labels[share])
    elif world.shard_of_last:
        with pytest.raises(RuntimeError, match="refuses"):
            many(x[share], labels[share])


def losses_that_differ(world: World) -> None:
    x, labels = batch()
    grown = world.loss()
    grown.num_classes = C + 1
    grown.proxies = PFMLLoss(C + 1, D, M, process_group=dist.group.WORLD).proxies
    with pytest.raises(ValueError, match="num_classes cannot change with a process_group"):
        grown(x, labels)
    if world.size == 1:
        return
    ours = PFMLLoss(C, D, M + (world.rank == 0), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"one C, M and D on all ranks, got \[\[5, 3, 7\], \[5, 2"):
        ours(x, labels)


def dtensors_are_refused(world: World) -> None:
    many, one = world.pair()
    x, labels = batch()
    mesh = many.proxies.device_mesh
    for loss in (many, one):
        with pytest.raises(TypeError, match=r"embeddings must be a plain Tensor, .*to_local"):
            loss(distribute_tensor(x, mesh, [Replicate()]), labels)
        with pytest.raises(TypeError, match=r"labels must be a plain Tensor, .*to_local"):
            loss(x, distribute_tensor(labels, mesh, [Replicate()]))


def initial_proxies(world: World) -> None:
    """Alike for every number of ranks, and of another draw for another seed."""
    torch.manual_seed(world.rank)  # that of rank 0 decides
    many = PFMLLoss(600, 3, 1, process_group=dist.group.WORLD)
    full = many.proxies.detach().full_tensor()
    expected = torch.empty(0, 1, 3)
    torch.manual_seed(0)
    seed = int(torch.randint(2**31, (1,)))
    for first in (0, 256, 512):
        generator = torch.Generator().manual_seed(seed + first)
        block = torch.empty(256, 1, 3).normal_(std=3**-0.5, generator=generator)
        expected = torch.cat([expected, block])
    assert torch.equal(full, expected[:600])
    local = many.proxies.to_local()
    assert len(local) == min(-(-600 // world.size), 600 - -(-600 // world.size) * world.rank)


def state(world: World) -> None:
    """Saved by as many ranks, with the state of Adam: read by other numbers, see below."""
    torch.manual_seed(3)
    many, _ = world.pair()
    optimizer = torch.optim.Adam(many.parameters(), lr=0.1)
    x, labels = batch()
    many(x[world.share()], labels[world.share()]).backward()
    optimizer.step()
    dcp.save(saved(many, optimizer), checkpoint_id=world.folder / f"state{world.size}")
    assert list(many.state_dict()) == ["proxies"]
    twin = copy.deepcopy(many)
    assert torch.equal(twin.proxies.full_tensor(), many.proxies.full_tensor())


def saved(loss: PFMLLoss, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"loss": loss.state_dict(), "adam": optimizer.state_dict()["state"]}


def state_of_others(world: World) -> None:
    """What the first ranks saved, on fewer, and with a loss of one process."""
    folder = max(world.folder.glob("state*"))  # whose ranks were the most
    for loss in world.pair():
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        loss.proxies.grad = torch.zeros_like(loss.proxies)
        optimizer.step()  # makes the state
        with torch.no_grad():
            loss.proxies.zero_()
        into = saved(loss, optimizer)
        dcp.load(into, checkpoint_id=folder)
        found = [loss.proxies.detach(), *(into["adam"][0][k] for k in ("exp_avg", "exp_avg_sq"))]
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in found]
        assert all(t.any() for t in whole)
        reference = world.folder / "found.pt"
        if reference.exists():
            for ours, theirs in zip(whole, torch.load(reference), strict=True):
                assert torch.equal(ours, theirs)
        elif world.rank == 0:
            torch.save(whole, world.folder / "part of it")
            (world.folder / "part of it").rename(reference)  # the other ranks look for it


def casts_and_moves(world: World) -> None:
    many, _ = world.pair()
    optimizer = torch.optim.SGD(many.parameters(), lr=1.0)
    many.double().to("cpu")
    assert many.proxies.dtype == torch.float64
    assert many.proxies.to_local().dtype == torch.float64
    assert optimizer.param_groups[0]["params"][0] is many.proxies
    x, labels = batch(dtype=torch.float64)
    many(x[world.share()], labels[world.share()]).backward()
    assert many.proxies.grad is not None


CHECKS: tuple[Callable[[World], None], ...] = (
    gradients_of_torch, gradients_of_the_kernels, network_under_ddp, training, out_of_step,
    network_under_fsdp2, a_loss_under_fsdp2, ddp_of_the_loss_is_refused, memory_bank,
    the_sketch_turns_alike, no_batch_at_all, dtypes_that_differ, compiled_around, no_proxies,
    nan_everywhere, one_rank_in_error, losses_that_differ, dtensors_are_refused,
    initial_proxies, state, state_of_others, casts_and_moves,
)  # fmt: skip


def work(rank: int, size: int, folder: Path) -> None:
    """All checks, on one rank; what fails is written down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size, timeout=PATIENCE
    )
    world, failures = World(rank, size, folder), {}
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check(world)
        except BaseException:
            failures[check.__name__] = traceback.format_exc()
            break  # the others wait for this rank: it may be anywhere
    torch.save(failures, folder / f"failures{size}.{rank}")
    if not failures:
        dist.barrier()
    os._exit(0)  # a thread of gloo that has not ended aborts a process that does, now and then


def failures_of(size: int, folder: Path) -> str:
    """What fails on that many ranks, or nothing."""
    context = torch.multiprocessing.spawn(work, (size, folder), size, join=False)
    try:
        while not context.join(timeout=1):
            pass
    finally:
        for process in context.processes:
            process.kill()
    texts = []
    for rank in range(size):
        found: dict[str, str] = torch.load(folder / f"failures{size}.{rank}")
        texts += [f"{name}, rank {rank} of {size}\n{text}" for name, text in found.items()]
    return "\n".join(texts)


@pytest.mark.parametrize("group", ["nccl", -100, True])  # -100 has a rank that is not in the group
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(TypeError, match=f"process_group must be .* got {group!r}"):
        PFMLLoss(C, D, process_group=group)


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("sizes", [(4, 2), pytest.param((3, 1), marks=pytest.mark.slow)])
def test_ranks(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """The first save a state, which the others read."""
    for size in sizes:
        assert not (failures := failures_of(size, tmp_path)), failures
